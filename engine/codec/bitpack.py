"""Bucket numbers to packed rows and back: the one owner of the bit order.

A row holds the D bucket numbers of one token in B' = ceil(D * nbits / 8) bytes, followed by zero bytes up to a multiple of
ROW_ALIGNMENT. Byte j of the row holds, in bit field f (f = 0 is the lowest `nbits` bits), the bucket of dimension f * B' + j:

    4 bits, D = 128, B' = 64          byte 0            byte 1       ...  byte 63
        low nibble  (row & 15)   dimension 0       dimension 1            dimension 63
        high nibble (row >> 4)   dimension 64      dimension 65           dimension 127

So each bit field of a whole row is one contiguous run of dimensions (a *plane*), and decoding is one mask or shift per plane
over all bytes, with no interleaving afterwards. At 8 bits byte j is dimension j. Dimensions from D on are padding, bucket 0.
"""

from __future__ import annotations

import numpy as np

from engine.config import NBITS
from engine.errors import InvalidRequest

ROW_ALIGNMENT = 4
"""Rows are a multiple of four bytes, so that a section of rows can be read as uint32 and a gather copies whole words."""


def payload_bytes(dim: int, nbits: int) -> int:
    """Bytes of one row that carry buckets: B' of the module docstring."""
    if nbits not in NBITS:
        raise InvalidRequest("nbits is 1, 2, 4 or 8", nbits=nbits)
    if dim < 1:
        raise InvalidRequest("a vector has at least one dimension", dim=dim)
    return -(-dim * nbits // 8)


def row_bytes(dim: int, nbits: int) -> int:
    """Bytes of one stored row: payload_bytes rounded up to a multiple of ROW_ALIGNMENT."""
    return -(-payload_bytes(dim, nbits) // ROW_ALIGNMENT) * ROW_ALIGNMENT


def pack(buckets: np.ndarray, nbits: int) -> np.ndarray:
    """Pack bucket numbers, a token a row.

    buckets  uint8 (T, D), each below 2^nbits
    returns  uint8 (T, row_bytes(D, nbits)), in the bit order of the module docstring
    """
    n_tokens, dim = buckets.shape
    n_payload = payload_bytes(dim, nbits)
    rows = np.zeros((n_tokens, row_bytes(dim, nbits)), np.uint8)
    for field in range(8 // nbits):
        plane = buckets[:, field * n_payload : (field + 1) * n_payload]
        if plane.shape[1]:
            rows[:, : plane.shape[1]] |= plane << np.uint8(field * nbits)
    return rows


def unpack(rows: np.ndarray, dim: int, nbits: int) -> np.ndarray:
    """The inverse of `pack`.

    rows     uint8 (T, row_bytes(dim, nbits))
    returns  uint8 (T, dim)

    Raises InvalidRequest if the rows have another width.
    """
    n_payload = payload_bytes(dim, nbits)
    if rows.ndim != 2 or rows.shape[1] != row_bytes(dim, nbits):
        raise InvalidRequest("rows have another width than dim and nbits give", expected=row_bytes(dim, nbits), found=rows.shape[-1])
    buckets = np.empty((len(rows), dim), np.uint8)
    mask = np.uint8((1 << nbits) - 1)
    for field in range(8 // nbits):
        plane = buckets[:, field * n_payload : (field + 1) * n_payload]
        if plane.shape[1]:
            plane[:] = (rows[:, : plane.shape[1]] >> np.uint8(field * nbits)) & mask
    return buckets
