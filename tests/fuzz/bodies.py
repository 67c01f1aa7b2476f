"""Request bodies: the JSON of every endpoint, and vectors in base64."""

from __future__ import annotations

import base64
import binascii
import contextlib
import json
from collections.abc import Callable, Sequence
from random import Random
from typing import Any

import numpy as np

from engine.errors import EngineError
from engine.metadata import schema
from handler.routes.table import ENDPOINTS
from handler.wire.bodies import encode, read_body
from handler.wire.matrices import check_dimensions, document_arrays, matrix, query_matrices
from handler.wire.requests import (
    CreateRequest,
    FilteredSearchRequest,
    FilteredTextSearchRequest,
    SearchRequest,
    TextSearchRequest,
    UpdateRequest,
    UpdateTextsRequest,
    Vectors,
)
from handler.wire.translation import index_config, metadata_rows, parse_time, search_params, subset_ids

from .mutation import mutated_json
from .target import Target, Wrong, asked, is_equal

KINDS: tuple[Any, ...] = tuple(dict.fromkeys(endpoint.body for endpoint in ENDPOINTS if endpoint.body is not None))


def read(data: bytes) -> bool:
    """The first byte says which body; the rest is its JSON. What is read must be written so that it reads the same."""
    kind = KINDS[data[0] % len(KINDS)] if data else KINDS[0]
    accepted, body = asked(lambda: read_body(data[1:], kind))
    if not accepted:
        return False
    written = encode(body)
    is_equal(encode(read_body(written, kind)), written, kind.__name__)
    for use in _USES.get(kind, ()):
        with contextlib.suppress(EngineError):
            asked(lambda use=use: use(body))  # type: ignore[misc]
    return True


def _documents(body: Any) -> None:
    matrices = document_arrays(body.documents)
    check_dimensions(matrices, None) if matrices else None
    for values in matrices:
        if not np.isfinite(values).all():
            raise Wrong("a vector that is not finite passed")


def _rows(body: Any) -> None:
    rows = metadata_rows(body.metadata, len(body.documents))
    if rows is not None:
        columns, stored, _ = schema.extend((), rows)
        again = schema.extend(columns, stored)
        is_equal((again.columns, again.rows), (columns, stored), "rows that are stored and sent again")


def _search(body: Any) -> None:
    for n_documents in (0, 3, 1 << 40):
        params = search_params(body.params, n_documents)
        if not 0 <= params.k <= n_documents or params.n_candidates > max(1 << 40, n_documents):
            raise Wrong(f"impossible parameters: {params}")
    subset = getattr(body, "subset", None)
    if subset is not None:
        is_equal(subset_ids(subset).tolist(), sorted(set(subset)), "subset")
    if isinstance(body.as_of, str):
        parse_time(body.as_of)
    if body.queries and not isinstance(body.queries[0], str):
        query_matrices(body.queries)


_USES: dict[Any, tuple[Callable[[Any], None], ...]] = {
    UpdateRequest: (_documents, _rows),
    UpdateTextsRequest: (_rows,),
    SearchRequest: (_search,),
    FilteredSearchRequest: (_search,),
    TextSearchRequest: (_search,),
    FilteredTextSearchRequest: (_search,),
    CreateRequest: (lambda body: index_config(body.config, 999),),
}


def _seeds() -> list[bytes]:
    found = []
    for endpoint in ENDPOINTS:
        if endpoint.body is not None:
            example = endpoint.request_example or {}
            found.append(bytes([KINDS.index(endpoint.body)]) + json.dumps(example).encode())
    vectors = {"embeddings_b64": base64.b64encode(np.ones((2, 3), "<f4")).decode(), "shape": [2, 3]}
    full = {
        "queries": [vectors, {"embeddings": [[0.5, 1]]}], "params": {"top_k": 3, "n_ivf_probe": 4, "n_full_scores": 99, "centroid_score_threshold": 0.4},
        "subset": [3, 1, 1], "text_query": ["a b"], "alpha": 0.5, "fusion": "rrf", "filter_condition": "a = ?", "filter_parameters": [1],
        "as_of": "2026-11-23T08:00:00Z", "max_age_s": 3,
    }  # fmt: skip
    rows = [{"title": "x", "n": 1, "r": 1.5, "b": True, "l": [1, {"a": None}], "z": None, "_subset_": 4}, {"n": "12", "r": 3}]
    update = {"documents": [vectors, {**vectors, "dtype": "float16", "shape": [3, 4]}], "metadata": rows, "ids": ["a", "b"]}
    for kind, example in ((SearchRequest, full), (UpdateRequest, update)):
        found.append(bytes([KINDS.index(kind)]) + json.dumps(example).encode())
    return found


def _mutate(data: bytes, rng: Random, others: Sequence[bytes], tokens: Sequence[bytes]) -> bytes:
    if rng.random() < 0.05:
        return bytes([rng.randrange(256)]) + data[1:]
    return data[:1] + mutated_json(data[1:], rng, [other[1:] for other in others], tokens)


_TOKENS = (
    b'"embeddings":',
    b'"embeddings_b64":',
    b'"shape":',
    b'"params":',
    b'"metadata":',
    b"[[",
    b"]]",
    b"null",
    b"1e999",
    b"-",
    b"\\ud800",
)
BODIES = Target("bodies", "JSON of every request body", read, _seeds, _TOKENS, _mutate)


# Base64


def read_base64(data: bytes) -> bool:
    """JSON of one matrix: what is taken is what Python's own base64 and struct make of it."""
    accepted, item = asked(lambda: read_body(data, Vectors))
    if not accepted or item.embeddings_b64 is None or item.shape is None:
        return False
    accepted, values = asked(lambda: matrix(item, "it"))
    if not accepted:
        return False
    try:
        text = json.loads(data.decode(errors="replace"))["embeddings_b64"]  # keys that are not known are not looked at, UTF-8 or not
        expected = base64.b64decode(text, validate=True)
    except (ValueError, KeyError, TypeError, binascii.Error) as error:
        raise Wrong("vectors out of what is no base64") from error
    is_equal(values.tobytes(), expected, "base64")
    is_equal(values.shape, tuple(item.shape), "shape")
    return True


def _vector_seeds() -> list[bytes]:
    found = []
    for n, dim, dtype in ((1, 1, "float32"), (2, 3, "float32"), (3, 4, "float16")):
        values = np.arange(n * dim).reshape(n, dim).astype("<f4" if dtype == "float32" else "<f2")
        found.append(json.dumps({"embeddings_b64": base64.b64encode(values).decode(), "shape": [n, dim], "dtype": dtype}).encode())
    return found


BASE64 = Target(
    "base64", "vectors in base64 with shape", read_base64, _vector_seeds, (b"=", b"==", b"A", b"/", b"\\n", b"-_"), mutated_json
)
