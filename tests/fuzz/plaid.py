"""NextPlaid's and FastPlaid's index directories: one file of a sound directory replaced."""

from __future__ import annotations

import atexit
import io
import json
import shutil
import sqlite3
import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from random import Random

import numpy as np

from engine.transfer.nextplaid.opening import read
from engine.transfer.nextplaid.source import PlaidSource

from .arrays import _NPY_TOKENS, _npy
from .mutation import mutated, mutated_json
from .target import Target, Wrong, asked, is_equal

CHUNKS = ((2, 0, 3), (1, 4))
DIM, NBITS, N_CENTROIDS = 8, 4, 5


def _files() -> dict[str, bytes]:
    """A NextPlaid index of five documents; its merged files are there too, for FastPlaid's way of reading."""
    rng = np.random.default_rng(1)
    n_tokens = sum(map(sum, CHUNKS))
    codes, residuals = rng.integers(0, N_CENTROIDS, n_tokens), rng.integers(0, 256, (n_tokens, DIM * NBITS // 8)).astype(np.uint8)
    counts = {"num_chunks": len(CHUNKS), "nbits": NBITS, "num_documents": 5, "num_embeddings": n_tokens, "next_plaid_compatible": True}
    files = {
        "metadata.json": json.dumps(counts).encode(),
        "config.json": json.dumps({"nbits": NBITS, "seed": 3, "max_documents": None, "fts_tokenizer": "unicode61"}).encode(),
        "centroids.npy": _npy(rng.standard_normal((N_CENTROIDS, DIM)).astype("<f2")),
        "bucket_weights.npy": _npy(np.linspace(-1, 1, 1 << NBITS).astype("<f4")),
        "merged_codes.npy": _npy(codes.astype("<i8")),
        "merged_residuals.npy": _npy(residuals),
        "merged_codes.manifest.json": json.dumps(
            {f"{i}.codes.npy": {"rows": sum(chunk), "merged": True} for i, chunk in enumerate(CHUNKS)}
        ).encode(),
        "merged_residuals.manifest.json": json.dumps(
            {f"{i}.residuals.npy": {"rows": sum(chunk)} for i, chunk in enumerate(CHUNKS)}
        ).encode(),
        "metadata.db": _rows(),
    }
    start = 0
    for i, chunk in enumerate(CHUNKS):
        end = start + sum(chunk)
        files[f"doclens.{i}.json"] = json.dumps(list(chunk)).encode()
        if i == 0:  # the second chunk is read from the merged files
            files[f"{i}.codes.npy"], files[f"{i}.residuals.npy"] = _npy(codes[start:end].astype("<i8")), _npy(residuals[start:end])
        start = end
    return files


def _rows() -> bytes:
    with sqlite3.connect(":memory:") as connection:
        connection.execute("CREATE TABLE METADATA (_subset_ INTEGER PRIMARY KEY, title TEXT, year INTEGER)")
        connection.executemany("INSERT INTO METADATA VALUES (?, ?, ?)", [(n, f"title {n}", 2000 + n) for n in range(5)])
        connection.commit()
        data = connection.serialize()
    connection.close()
    return data


@cache
def _directory() -> tuple[Path, dict[str, bytes]]:
    root = Path(tempfile.mkdtemp(prefix="tartan-fuzz-"))
    atexit.register(shutil.rmtree, root, ignore_errors=True)
    files = _files()
    for name, data in files.items():
        (root / name).write_bytes(data)
    return root, files


def read_directory(data: bytes) -> bool:
    """The first byte says which file the rest stands for."""
    root, files = _directory()
    name = sorted(files)[data[0] % len(files)] if data else "metadata.json"
    (root / name).write_bytes(data[1:])
    try:
        accepted, _ = asked(lambda: _taken(root))
        return accepted
    finally:
        (root / name).write_bytes(files[name])


def _taken(root: Path) -> None:
    plaid = read(root)
    n_documents = 0
    for block in plaid.blocks():
        norms = np.linalg.norm(block.tokens.astype(np.float64), axis=1)
        if not np.isfinite(block.tokens).all() or not ((np.abs(norms - 1) < 1e-3) | (norms < 1e-3)).all():
            raise Wrong("vectors that are not of length 1")
        n_documents += len(block.ids)
    is_equal(n_documents, plaid.n_documents, "documents")
    plaid.sample(3)
    source = PlaidSource(plaid)
    is_equal(sum(len(block.offsets) - 1 for block in source.blocks(0)), n_documents, "documents of the source")


def _seeds() -> list[bytes]:
    files = _files()
    return [bytes([number]) + files[name] for number, name in enumerate(sorted(files))]


def _mutate(data: bytes, rng: Random, others: Sequence[bytes], tokens: Sequence[bytes]) -> bytes:
    if data[1:2] in (b"{", b"["):
        return data[:1] + mutated_json(data[1:], rng, (), tokens)
    return data[:1] + mutated(data[1:], rng, [other[1:] for other in others], tokens)


PLAID = Target("nextplaid", "index directories of NextPlaid and FastPlaid", read_directory, _seeds, _NPY_TOKENS, _mutate)


def as_file(name: str, content: bytes) -> bytes:
    """The input that replaces this file; for tests."""
    return bytes([sorted(_files()).index(name)]) + content


def npy_with_header(header: str, payload: bytes = b"") -> bytes:
    """An .npy file of version 1.0 with this header; for tests."""
    buffer = io.BytesIO()
    padded = header.encode("latin-1") + b"\n"
    buffer.write(b"\x93NUMPY\x01\x00" + len(padded).to_bytes(2, "little") + padded + payload)
    return buffer.getvalue()
