"""How a source's documents are cut into blocks, which of them are a sample, and what is checked of a block's vectors."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from engine.format import half
from engine.transfer.content import LineMap

BLOCK_DOCUMENTS = 2048
BLOCK_TOKENS = 1 << 17
BLOCK_BYTES = 64 << 20
"""A block ends at the first of the three: 131,072 tokens of 128 dimensions are 64 MiB as float32."""
SAMPLE_SEED = 7
SAMPLE_READS = 1024
"""Documents of a sample that are read together."""


def some_documents(lengths: np.ndarray, n_tokens: int) -> np.ndarray:
    """Random documents, int64 ascending, that have about n_tokens tokens together; at least one."""
    shuffled = np.random.Generator(np.random.PCG64(SAMPLE_SEED)).permutation(len(lengths))
    gathered = np.cumsum(lengths[shuffled])
    return np.sort(shuffled[: int(np.searchsorted(gathered, n_tokens)) + 1])


def cut_rows(offsets: np.ndarray, row_bytes: int, first: int) -> Iterator[tuple[int, int]]:
    """Half-open runs of documents from `first` on, each within the bounds of a block unless one document alone is larger.

    offsets    int64 (N + 1,), document n owns rows offsets[n]:offsets[n + 1]
    row_bytes  of one token as it is stored
    """
    most_tokens = max(1, min(BLOCK_TOKENS, BLOCK_BYTES // max(row_bytes, 1)))
    while first < len(offsets) - 1:
        fitting = int(np.searchsorted(offsets, offsets[first] + most_tokens, side="right")) - 1
        last = max(first + 1, min(first + BLOCK_DOCUMENTS, fitting))
        yield first, last
        first = last


def cut_lines(map_: LineMap, lengths: np.ndarray, first: int, n_documents: int) -> Iterator[tuple[int, int]]:
    """Half-open runs of documents within n_documents, BLOCK_TOKENS and BLOCK_BYTES of text; one alone may be larger."""
    while first < len(map_):
        last, n_tokens = first, 0
        while last < min(first + n_documents, len(map_)):
            n_tokens += int(lengths[last])
            if last > first and (n_tokens > BLOCK_TOKENS or map_.size_bytes(first, last + 1) > BLOCK_BYTES):
                break
            last += 1
        yield first, last
        first = last


def plain_floats(tokens: np.ndarray) -> np.ndarray:
    """float16 and float32 as they are, anything wider as float32."""
    return tokens if tokens.dtype in (np.float16, np.float32) else tokens.astype(np.float32)


def first_not_finite(tokens: np.ndarray) -> int | None:
    """The first row with a value that is not finite, or None."""
    if tokens.dtype == np.float16 and half.is_finite(tokens):
        return None
    with np.errstate(over="ignore"):
        finite = np.isfinite(tokens.astype(np.float32, copy=False))
    return None if finite.all() else int((~finite.all(axis=1)).argmax())
