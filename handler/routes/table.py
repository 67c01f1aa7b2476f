"""Every endpoint of the server, in the order of the documents."""

from __future__ import annotations

from handler.routes import documents, encoding, history, indices, metadata, search, service, shards, uploads
from handler.routes.endpoint import Endpoint

ENDPOINTS: tuple[Endpoint, ...] = (
    *service.ENDPOINTS,
    *indices.ENDPOINTS,
    *documents.ENDPOINTS,
    *uploads.ENDPOINTS,
    *search.ENDPOINTS,
    *metadata.ENDPOINTS,
    *encoding.ENDPOINTS,
    *history.ENDPOINTS,
    *shards.ENDPOINTS,
)
