"""Packed rows to floats that can be multiplied with a query: the scoring side of the codec's bit order.

Affine levels (level = a + step * bucket) need no table. With s = 2^nbits let y_f = byte & (s^(f+1) - 1), the lowest f + 1 fields of a byte; then
bucket_f = (y_f - y_(f-1)) / s^f, and therefore

    sum over f of bucket_f . q_f  =  sum over f of y_f . (q_f / s^f - q_(f+1) / s^(f+1)),      q_F = 0

so the query is rearranged once, and the rows need a mask per field and never a shift; the highest field is the byte itself. Four bits go one better: the
byte times 0x1010 in 16 bits is a pair of bytes, y_0 = 16 * low nibble and y_1 = y_0 + high nibble, so there one multiplication replaces all masks and

    low . q_0 + high . q_1  =  y_0 . (q_0 / 16 - q_1) + y_1 . q_1

Other levels go through a table of 256 entries of 8 / nbits floats, which is two to three times slower. Called by maxsim.py; engine/codec owns the
bit order.
"""

from __future__ import annotations

import msgspec
import numpy as np

from engine.scoring.arrays import Decoder
from engine.scoring.scratch import scratch


class Operand(msgspec.Struct, frozen=True):
    """A query made ready to be multiplied with unpacked rows.

    matrix  float32 (8 / nbits * B', W), rows in the order in which unpack lays the columns
    bias    float32 (W,): a * the query's sum for affine levels, else 0
    """

    matrix: np.ndarray
    bias: np.ndarray

    @classmethod
    def of(cls, query: np.ndarray, decoder: Decoder) -> Operand:
        """Prepare a padded, rotated query float32 (W, D), as CentroidScores.query. Cost: a few passes over the query."""
        n_fields, n_payload = 8 // decoder.nbits, decoder.payload_bytes
        by_field = np.zeros((n_fields + 1, n_payload, len(query)), dtype=np.float32)  # one field more, of zeros: q_F
        by_field[:n_fields].reshape(n_fields * n_payload, -1)[: decoder.dim] = query.T
        if decoder.affine is None:
            matrix = by_field[:n_fields].transpose(1, 0, 2)  # byte_table gives all fields of a byte together
            bias = np.zeros(len(query), dtype=np.float32)
        else:
            first_level, step = decoder.affine
            by_field *= np.float32(step)
            if n_fields == 2:
                matrix = np.stack([by_field[0] / 16 - by_field[1], by_field[1]], axis=1)
            else:
                by_field *= (2.0 ** (-decoder.nbits * np.arange(n_fields + 1, dtype=np.float32)))[:, None, None]
                matrix = by_field[:-1] - by_field[1:]
            bias = (first_level * query.sum(axis=1, dtype=np.float64)).astype(np.float32)
        return cls(np.ascontiguousarray(matrix).reshape(n_fields * n_payload, -1), bias)


def unpack(rows: np.ndarray, chosen: np.ndarray, decoder: Decoder) -> np.ndarray:
    """Gather and unpack rows: float32 (n, 8 / nbits * B') in scratch memory, columns in the order of Operand.matrix.

    rows    uint8 (R, B)
    chosen  int64 (n,)

    Affine levels give the y_f of the module docstring, others the levels themselves. Cost, D = 128, 4 bits: 10 ns a row to gather from memory,
    21 to unpack affine levels, 60 to look levels up.
    """
    n, n_payload = len(chosen), decoder.payload_bytes
    gathered = scratch("unpack.gathered", (n, rows.shape[1]), np.uint8)
    rows.take(chosen, axis=0, out=gathered, mode="clip")
    packed = gathered if rows.shape[1] == n_payload else np.ascontiguousarray(gathered[:, :n_payload])
    out = scratch("unpack.out", (n, 8 // decoder.nbits * n_payload), np.float32)
    if decoder.affine is None:
        _by_table(packed, decoder, out)
    elif decoder.nbits == 8:
        np.copyto(out, packed)
    elif decoder.nbits == 4:
        _nibbles(packed, out)
    else:
        _fields(packed, decoder.nbits, out)
    return out


def _nibbles(packed: np.ndarray, out: np.ndarray) -> None:
    """out (n, 2B'): y_0 and y_1 of byte 0, of byte 1, ... Interleaved, because then every pass is one contiguous run."""
    pairs = scratch("unpack.pairs", packed.shape, np.uint16)
    np.copyto(pairs, packed)
    np.multiply(pairs, np.uint16(0x1010), out=pairs)  # little-endian: y_0 comes first
    np.copyto(out, pairs.view(np.uint8))


def _fields(packed: np.ndarray, nbits: int, out: np.ndarray) -> None:
    """out (n, F·B'): plane f holds the lowest f + 1 fields of every byte."""
    n, n_payload = packed.shape
    fields = scratch("unpack.fields", (n, 8 // nbits, n_payload), np.uint8)
    for field in range(8 // nbits):
        mask = (1 << nbits * (field + 1)) - 1
        np.bitwise_and(packed, np.uint8(mask), out=fields[:, field])
    np.copyto(out, fields.reshape(n, -1))


def _by_table(packed: np.ndarray, decoder: Decoder, out: np.ndarray) -> None:
    """out (n, F·B'): all levels of byte 0, then of byte 1, ...; one take moves all floats of a byte."""
    item = {1: np.float32, 2: np.uint64, 4: np.complex128}[8 // decoder.nbits]
    np.take(decoder.byte_table.view(item).reshape(-1), packed, out=out.view(item), mode="clip")
