"""What a quantised segment gives to scoring: plain arrays under five names. Built by engine/index from format and codec objects.

Ordinals are document rows of one segment, codes are centroid numbers of one codec, both start at 0. Nothing here checks the arrays' content:
the format layer has verified checksums and ranges before they get here, and the kernels gather with mode="clip", which cannot leave an array.
"""

from __future__ import annotations

from functools import cached_property

import msgspec
import numpy as np

AFFINE_TOLERANCE = 1e-6


class Postings(msgspec.Struct, frozen=True):
    """Code -> the documents that carry it.

    offsets   int64 (K + 1,), code c owns ordinals[offsets[c]:offsets[c + 1]]
    ordinals  uint16 (P,), rising and without repeats inside a list
    """

    offsets: np.ndarray
    ordinals: np.ndarray


class Records(msgspec.Struct, frozen=True):
    """The tokens of the documents. Token j of ordinal n has code codes[code_start[n] + j], scalars[scalar_start[n] + j] and row
    rows[residual_start[n] + j]. The starts allow for gaps, so the arrays may be views of a whole section (or of a memory map).

    rows            uint8 (R, B), packed bucket numbers
    codes           uint16 (.,)
    scalars         uint8 (., 2): indices into Decoder.inv_table and Decoder.scale_table
    residual_start, code_start, scalar_start, n_tokens   int64 (N,)
    """

    rows: np.ndarray
    codes: np.ndarray
    scalars: np.ndarray
    residual_start: np.ndarray
    code_start: np.ndarray
    scalar_start: np.ndarray
    n_tokens: np.ndarray


class Decoder(msgspec.Struct, frozen=True, dict=True):
    """How packed rows become vectors: token = inv_table[s0] * centroid[code] + scale_table[s1] * levels[bucket].

    levels       float32 (2^nbits,)
    inv_table    float32 (256,), scale_table  float32 (256,)
    dim          D
    nbits        1, 2, 4 or 8
    """

    levels: np.ndarray
    inv_table: np.ndarray
    scale_table: np.ndarray
    dim: int
    nbits: int

    @property
    def payload_bytes(self) -> int:
        """B', the bytes of a row that carry buckets; byte j holds in bit field f the bucket of dimension f * B' + j."""
        return -(-self.dim * self.nbits // 8)

    @cached_property
    def affine(self) -> tuple[float, float] | None:
        """(a, step) if level = a + step * bucket within AFFINE_TOLERANCE of the levels' size, else None. One bit always is."""
        levels = self.levels.astype(np.float64)
        step = (levels[-1] - levels[0]) / (len(levels) - 1)
        error = np.abs(levels[0] + step * np.arange(len(levels)) - levels).max()
        return (float(levels[0]), float(step)) if error <= AFFINE_TOLERANCE * max(1.0, np.abs(levels).max()) else None

    @cached_property
    def byte_table(self) -> np.ndarray:
        """float32 (256, 8 / nbits): the levels that a byte stands for, lowest field first."""
        shifts = np.arange(0, 8, self.nbits)
        buckets = (np.arange(256)[:, None] >> shifts) & ((1 << self.nbits) - 1)
        return np.ascontiguousarray(self.levels.astype(np.float32)[buckets])
