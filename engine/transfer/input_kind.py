"""What an input of a bulk build is, by its first bytes: arrays of vectors, vectors in JSON lines, texts in JSON lines.

    npy        arrays.py         tokens float (T, D) and document lengths int (N,), end to end; optionally fields (JSON lines) and ids (text lines)
    npz        npz.py            the same arrays as members `tokens` (or `embeddings`) and `doclens` (or `lengths`)
    vectors    vector_lines.py   {"embeddings": [[...], ...]} or {"embeddings_b64": "...", "shape": [t, D], "dtype": "float32"}, with "id" and "metadata"
    texts      text_lines.py     {"text": ..., "title": ..., "id": ...}; every key but the id is a field; an encoder makes the vectors

Each is a Source (engine/index/bulk.py). Opening a source reads it once: everything that can be wrong with it is found then, before an
index is touched, and the same pass gives the fingerprint by which an interrupted build is resumed. (Inputs above
content.WHOLE_FINGERPRINT_BYTES are only probed; a bad number far inside is then found by the build.) Memory is that of a block, and 24
to 40 bytes a document. None of them writes or unpickles.

Called by `tartan index`, the build tasks (inputs.py) and the uploads.
"""

from __future__ import annotations

from typing import Literal

from engine.errors import InvalidRequest
from engine.transfer.content import Content, lines
from engine.transfer.json_lines import ANY_OBJECT, decoded

Kind = Literal["npy", "npz", "vectors", "texts"]


def kind_of(content: Content) -> Kind:
    """What an input is, by its first bytes. InvalidRequest if it is none of the four."""
    head = bytes(content.read([(0, min(8, content.size_bytes))])[0])
    if head.startswith(b"\x93NUMPY"):
        return "npy"
    if head.startswith(b"PK\x03\x04"):
        return "npz"
    if not content.size_bytes:
        raise InvalidRequest("the input is empty", file=content.label)
    first = next(lines(content), None)
    keys = decoded(content, first, ANY_OBJECT).keys() if first else ()
    if "embeddings" in keys or "embeddings_b64" in keys:
        return "vectors"
    if "text" in keys or "title" in keys:
        return "texts"
    expected = ".npy, .npz, or JSON lines with embeddings, embeddings_b64, text or title"
    raise InvalidRequest("not an input that can be indexed", file=content.label, expected=expected, found=sorted(keys)[:8])
