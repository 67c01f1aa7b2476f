"""The header of an .npy file, read so that only one exception can come of it. Callers: vectors.py, nextplaid.py."""

from __future__ import annotations

from typing import Any, BinaryIO

import numpy as np


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
