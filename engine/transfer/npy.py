"""An .npy file: its header, read so that only one exception can come of it, and its rows, read by place.

Callers: arrays.py and npz.py, for whatever Content it lies in; nextplaid/files.py takes the header alone. Nothing is unpickled.
"""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np

from engine.errors import InvalidRequest
from engine.transfer.content import Content

_HEADER_BYTES = 1 << 16
"""Read at once to find the header: numpy writes 128 bytes, a structured dtype more."""


@dataclass(frozen=True)
class NpyArray:
    """An .npy array in C order inside a content: rows are read by place. Object arrays are pickles and are refused."""

    content: Content
    start: int
    dtype: np.dtype[Any]
    shape: tuple[int, ...]

    @classmethod
    def open(cls, content: Content) -> NpyArray:
        """Read the header and compare it with the size. InvalidRequest for anything but a whole array of plain numbers."""
        header = io.BytesIO(bytes(content.read([(0, min(_HEADER_BYTES, content.size_bytes))])[0]))
        try:
            shape, is_fortran, dtype = read_header(header)
        except ValueError as error:
            raise InvalidRequest("not an .npy array", file=content.label, found=str(error)) from error
        if dtype.hasobject:
            raise InvalidRequest("an array of objects is a pickle and is not read; save plain numbers", file=content.label, found=dtype)
        if is_fortran and len(shape) > 1:
            raise InvalidRequest("an array in C order was expected", file=content.label, found="Fortran order")
        found = cls(content, header.tell(), dtype, shape)
        expected = found.start + dtype.itemsize * math.prod(shape)
        if content.size_bytes != expected:
            what = "the array is cut short" if content.size_bytes < expected else "bytes follow the array"
            raise InvalidRequest(what, file=content.label, expected=f"{expected} bytes", found=f"{content.size_bytes} bytes")
        return found

    @property
    def row_bytes(self) -> int:
        return self.dtype.itemsize * math.prod(self.shape[1:])

    def runs(self, runs: Sequence[tuple[int, int]]) -> list[np.ndarray]:
        """Rows first to last of each run, native byte order."""
        ranges = [(self.start + first * self.row_bytes, self.start + last * self.row_bytes) for first, last in runs]
        pieces = self.content.read(ranges)
        native = self.dtype.newbyteorder("=")
        return [np.frombuffer(data, self.dtype).reshape(-1, *self.shape[1:]).astype(native, copy=False) for data in pieces]


def read_header(file: BinaryIO) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """(shape, whether in Fortran order, dtype); the file then stands where the array begins. Nothing is unpickled.

    Raises ValueError, in one line, whatever is wrong: numpy's parser also lets SyntaxError, tokenize.TokenError, TypeError, RecursionError
    and MemoryError out of a header that somebody has damaged, and takes negative lengths.
    """
    try:
        version = np.lib.format.read_magic(file)
        if version not in ((1, 0), (2, 0), (3, 0)):
            raise ValueError(f"format version {version}")
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, is_fortran, dtype = read(file)
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0][:120]
        raise ValueError(reason) from error
    if any(length < 0 for length in shape):
        raise ValueError(f"a negative length: {shape}"[:120])
    return shape, is_fortran, dtype
