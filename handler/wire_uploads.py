"""Bodies of the presigned paths. As wire.py: strict structures, nothing of HTTP or the store."""

from __future__ import annotations

from msgspec import Struct


class UploadAddress(Struct):
    """Where to PUT the documents (as application/json or application/octet-stream, no other header), until when, and how many bytes at most."""

    upload_id: str
    url: str
    method: str
    expires_at: str
    max_bytes: int


class DownloadAddress(Struct):
    """Where an answer lies: GET it until then. `content_type` is what the answer would have had."""

    download_url: str
    size_bytes: int
    content_type: str
    expires_at: str
