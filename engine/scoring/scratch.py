"""Scratch: buffers that one thread uses again and again, so that hot loops neither allocate nor share.

Every kernel of this package that works in blocks takes its blocks from here. A buffer's content is rubbish when it is handed out, and it
belongs to the caller until the same name is asked for again *by the same thread*; so a name is used by one function only, and nothing
that came from here is ever returned to a caller outside the package. There is no limit on size: the kernels bound their blocks.
"""

from __future__ import annotations

import math
import threading

import numpy as np

_LOCAL = threading.local()


def scratch(name: str, shape: tuple[int, ...], dtype: type[np.generic]) -> np.ndarray:
    """Return an uninitialised C-contiguous array of this shape and type, carved from this thread's buffer `name`.

    A buffer grows by doubling at least, so that a rising sequence of sizes does not allocate each time. New pages cost a fault per 4 KiB, which
    is as much as the arithmetic done on them; that is the whole reason for this function.
    """
    buffers: dict[str, np.ndarray] | None = getattr(_LOCAL, "buffers", None)
    if buffers is None:
        buffers = _LOCAL.buffers = {}
    n_bytes = math.prod(shape) * np.dtype(dtype).itemsize
    buffer = buffers.get(name)
    if buffer is None or buffer.nbytes < n_bytes:
        size = max(n_bytes, 2 * buffer.nbytes if buffer is not None else 0, 64)
        buffer = buffers[name] = np.empty(size, dtype=np.uint8)
    return buffer[:n_bytes].view(dtype).reshape(shape)


def release() -> None:
    """Give this thread's buffers back to the allocator (a worker that goes idle, a test that counts memory)."""
    _LOCAL.buffers = {}
