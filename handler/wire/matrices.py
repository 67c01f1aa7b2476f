"""Token vectors out of their two wire forms, nested lists and base64, as the arrays that the engine takes.

What is no matrix, or not finite, is BAD_REQUEST here, and another dimension than the index's DIMENSION_MISMATCH. Nothing here normalises.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from engine.config import MAX_DIM, MAX_DOCUMENT_TOKENS, MAX_QUERY_TOKENS
from handler.problems import Problem, bad_request
from handler.wire.requests import Vectors


def matrix(item: Vectors, what: str, max_rows: int = MAX_DOCUMENT_TOKENS) -> np.ndarray:
    """float32 or float16 (rows, D) out of either wire form; `what` names it in errors. Problem BAD_REQUEST if it is none.

    The bytes of a base64 form are viewed, not copied.
    """
    if item.embeddings_b64 is not None and item.shape is not None:
        return _from_bytes(item.embeddings_b64, item.shape, item.dtype, what, max_rows)
    if item.embeddings is not None:
        return _from_lists(item.embeddings, what, max_rows)
    raise bad_request(f"{what} has neither embeddings nor embeddings_b64 with shape")


def _from_bytes(data: bytes, shape: tuple[int, int], dtype: str, what: str, max_rows: int) -> np.ndarray:
    n_rows, dim = _checked_shape(shape[0], shape[1], what, max_rows)
    little_endian = np.dtype("<f2" if dtype == "float16" else "<f4")
    n_bytes = n_rows * dim * little_endian.itemsize
    if len(data) != n_bytes:
        found = f"holds {len(data)} bytes" if data else "is empty or no base64"
        raise bad_request(f"{what}: embeddings_b64 {found}, and {n_rows} x {dim} values of {dtype} need {n_bytes}")
    return _checked_finite(np.frombuffer(data, little_endian).reshape(n_rows, dim), what)


def _from_lists(rows: list[list[float]], what: str, max_rows: int) -> np.ndarray:
    _, dim = _checked_shape(len(rows), len(rows[0]) if rows else 0, what, max_rows)
    if any(len(row) != dim for row in rows):
        raise bad_request(f"{what}: rows differ in length")
    with np.errstate(over="ignore"):  # beyond float32 becomes infinite and is refused below
        return _checked_finite(np.array(rows, np.float64).astype(np.float32), what)


def _checked_shape(n_rows: int, dim: int, what: str, max_rows: int) -> tuple[int, int]:
    if n_rows < 1 or dim < 1:
        raise bad_request(f"{what} is empty: at least one row and one column are needed, found {n_rows} x {dim}")
    if n_rows > max_rows:
        raise bad_request(f"{what} has {n_rows} rows, at most {max_rows} are possible")
    if dim > MAX_DIM:
        raise bad_request(f"{what} has {dim} dimensions, at most {MAX_DIM} are possible")
    return n_rows, dim


def _checked_finite(values: np.ndarray, what: str) -> np.ndarray:
    """`values` if all are finite. The sum tells at once; only if it overflowed must each value be looked at."""
    with np.errstate(over="ignore", invalid="ignore"):
        is_finite = math.isfinite(values.sum(dtype=np.float32)) or bool(np.isfinite(values).all())
    if not is_finite:
        raise bad_request(f"{what} has a value that is not finite")
    return values


def query_matrix(item: Vectors, what: str) -> np.ndarray:
    """float32 (Q, D) of one query, used as given."""
    return np.ascontiguousarray(matrix(item, what, MAX_QUERY_TOKENS), np.float32)


def query_matrices(items: Sequence[Vectors]) -> list[np.ndarray]:
    return [query_matrix(item, f"query {i}") for i, item in enumerate(items)]


def document_arrays(items: Sequence[Vectors]) -> list[np.ndarray]:
    return [matrix(item, f"document {i}") for i, item in enumerate(items)]


def joined(matrices: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """(tokens (T, D), offsets int64 (N + 1,)) of documents that have one dimension."""
    offsets = np.zeros(len(matrices) + 1, np.int64)
    np.cumsum([len(values) for values in matrices], out=offsets[1:])
    return np.concatenate(matrices), offsets


def check_dimensions(matrices: Sequence[np.ndarray], dim: int | None) -> None:
    """Problem DIMENSION_MISMATCH unless all have `dim` columns (None: as many as the first)."""
    expected = dim if dim is not None else matrices[0].shape[1]
    for i, values in enumerate(matrices):
        if values.shape[1] != expected:
            raise Problem("DIMENSION_MISMATCH", f"dimension mismatch: expected {expected}, found {values.shape[1]} (item {i})")
