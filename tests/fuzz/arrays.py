"""Arrays and lines: what documents come from. .npy and .npz files, JSON lines of vectors and of texts, uploads."""

from __future__ import annotations

import base64
import io
import json
import zipfile
from collections.abc import Sequence
from random import Random
from typing import Any

import numpy as np

from engine.index.bulk import Source
from engine.transfer.arrays import open_npy
from engine.transfer.input_kind import kind_of
from engine.transfer.npz import open_npz
from engine.transfer.text_lines import TextLines
from engine.transfer.vector_lines import VectorLines
from handler.routes.uploads import _Bytes, _from_source

from .mutation import mutated, mutated_json
from .target import Target, Wrong, asked, is_equal

LENGTHS = np.array([2, 1, 3])


def _npy(array: np.ndarray, version: tuple[int, int] | None = None) -> bytes:
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, array, version)
    return buffer.getvalue()


def _tokens(dtype: str = "<f4") -> np.ndarray:
    return np.arange(18, dtype=dtype).reshape(6, 3)


def taken(source: Source) -> tuple[int, int]:
    """Documents and tokens that a source gives; it must give what it announced, finite and of one dimension."""
    n_documents = n_tokens = 0
    for block in source.blocks(0):
        if block.tokens.ndim != 2 or not np.isfinite(block.tokens).all() or int(block.offsets[-1]) != len(block.tokens):
            raise Wrong("a block of impossible tokens")
        n_documents += len(block.offsets) - 1
        n_tokens += len(block.tokens)
    is_equal(n_documents, source.n_documents, "documents of a source")
    source.sample(4)
    return n_documents, n_tokens


# .npy


def read_npy(data: bytes) -> bool:
    """The first byte says which of the two files it is. numpy's own reading is the second opinion."""
    if not data:
        return False
    is_tokens = data[0] % 2 == 0
    files = (data[1:], _npy(LENGTHS)) if is_tokens else (_npy(_tokens()), data[1:])
    accepted, found = asked(lambda: _taken_npy(*files))
    if accepted:
        own = np.load(io.BytesIO(data[1:]), allow_pickle=False)
        tokens = np.concatenate([block.tokens for block in open_npy(_Bytes(files[0]), _Bytes(files[1])).blocks(0)])
        if is_tokens:
            is_equal(tokens.tobytes(), own.astype(tokens.dtype).tobytes(), "tokens")
        is_equal(found[1], 6, "tokens of a source")
    return accepted


def _taken_npy(tokens: bytes, lengths: bytes) -> tuple[int, int]:
    return taken(open_npy(_Bytes(tokens), _Bytes(lengths)))


def _npys() -> list[bytes]:
    found = [b"\0" + _npy(_tokens(dtype)) for dtype in ("<f4", "<f2", ">f8")] + [
        b"\0" + _npy(_tokens(), (2, 0)),
        b"\0" + _npy(_tokens(), (3, 0)),
    ]
    return found + [b"\1" + _npy(LENGTHS.astype(dtype)) for dtype in ("<i8", "<u2", ">i4", "u1")]


_NPY_TOKENS = (
    b"'descr': ", b"'<f4'", b"'|O'", b"'fortran_order': True", b"'shape': ", b"(1000000000000, 3)", b"(-6, -3)", b"(6, 3)", b"(True, 18)", b"(", b"{", b"[[",
    b"\x93NUMPY", b"\x01\x00", b"\x03\x00", b"L", b"'''", b"\\", b"#", b"-" * 9, b"('<f4', (3,))", b"'<f4,<f4'", b"'V0'",
)  # fmt: skip
NPY = Target("npy", ".npy arrays of tokens and of lengths", read_npy, _npys, _NPY_TOKENS)


# .npz


def read_npz(data: bytes) -> bool:
    accepted, _ = asked(lambda: taken(open_npz(_Bytes(data))))
    if accepted and data.startswith(b"PK\x03\x04"):  # numpy goes by the first bytes, zipfile by the last
        blocks = list(open_npz(_Bytes(data)).blocks(0))
        with np.load(io.BytesIO(data), allow_pickle=False) as archive:
            names = [name for name in ("tokens", "embeddings") if name in archive]
            is_equal(np.concatenate([block.tokens for block in blocks]).shape, archive[names[0]].shape, "tokens")
    return accepted


def _npzs() -> list[bytes]:
    found = []
    for compression in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w", compression) as archive:
            for name, array in (("tokens", _tokens()), ("doclens", LENGTHS)):
                archive.writestr(f"{name}.npy", _npy(array))
        found.append(buffer.getvalue())
    return found


NPZ = Target(
    "npz",
    ".npz archives",
    read_npz,
    _npzs,
    (b"PK\x03\x04", b"PK\x01\x02", b"PK\x05\x06", b"PK\x06\x06", b"tokens.npy", b"doclens.npy", b"\x0c\0"),
)


# JSON lines


def _hashed(texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """An encoder that costs nothing: one token a text."""
    for text in texts:
        text.encode()
    return np.ones((len(texts), 4), np.float32), np.arange(len(texts) + 1)


def read_lines(data: bytes) -> bool:
    """As `tartan index` does: what kind it is decides who reads it."""
    accepted, kind = asked(lambda: kind_of(_Bytes(data)))
    if not accepted or kind not in ("vectors", "texts"):
        return False
    if kind == "vectors":
        accepted, _ = asked(lambda: taken(VectorLines(_Bytes(data))))
    else:
        accepted, _ = asked(lambda: taken(TextLines(_Bytes(data), _hashed, encoder="none")))
    return accepted


def _line(**values: Any) -> bytes:
    return json.dumps(values).encode()


def _lines() -> list[bytes]:
    packed = base64.b64encode(np.ones((2, 3), "<f4")).decode()
    numbers = _line(embeddings=[[1, 2, 3], [0.5, 1, 2]], id="a", metadata={"n": 1})
    return [
        b"\n".join([numbers, _line(embeddings_b64=packed, shape=[2, 3], dtype="float32", id=7, document_id=3)]),
        b"\xef\xbb\xbf" + _line(embeddings_b64=packed, shape=[4, 3], dtype="float16") + b"\r\n\r\n",
        b"\n".join([_line(title="a", text="b c", _id="x", year=3), _line(text="d", id=4, metadata={"k": [1]})]),
    ]


def _mutate_lines(data: bytes, rng: Random, others: Sequence[bytes], tokens: Sequence[bytes]) -> bytes:
    lines = data.split(b"\n")
    at = rng.randrange(len(lines))
    lines[at] = mutated_json(lines[at], rng, [other.split(b"\n")[0] for other in others], tokens)
    return b"\n".join(lines) if rng.random() < 0.9 else mutated(data, rng, others, tokens)


LINES = Target(
    "lines",
    "JSON lines of vectors and texts",
    read_lines,
    _lines,
    (b"\n", b"\r", b"\xff", b"null", b"[[", b"]]", b"1e999", b"\\ud800"),
    _mutate_lines,
)


# Uploads


def read_upload(data: bytes) -> bool:
    """What was put at a presigned address and is committed."""
    accepted, add = asked(lambda: _from_source(data, 1 << 20))
    if accepted and (not np.isfinite(add.tokens).all() or int(add.offsets[-1]) != len(add.tokens)):
        raise Wrong("an upload of impossible tokens")
    return accepted


UPLOAD = Target("upload", "uploads (.npz, JSON lines)", read_upload, lambda: [*_npzs(), *_lines()[:2]], (b"PK\x03\x04", b"\n"))
