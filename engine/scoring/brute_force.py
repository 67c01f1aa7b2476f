"""MaxSim of every document over plain vectors: for flat segments, which are small and not worth an index."""

from __future__ import annotations

import numpy as np

from engine.errors import InvalidRequest
from engine.scoring.maxsim import SMALL_PRODUCT, multiply
from engine.scoring.scratch import scratch

RUN_TOKENS = 2_048


def maxsim(query: np.ndarray, tokens: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """Score documents by MaxSim: every query token finds its best document token; the bests are summed.

    query    float32 (Q, D), used as given
    tokens   float16 or float32 (T, D), finite, the tokens of all documents, end to end
    offsets  int64 (N + 1,), document n owns tokens[offsets[n]:offsets[n + 1]]
    returns  float32 (N,); a document without tokens scores -inf

    Cost: Q·T·D multiply-adds (86 ns a token for 32 x 128) and 29 ns a token for the maxima; float16 is widened run by run, which costs
    another 50. Scratch memory: a run of 2,048 tokens or the longest document, whichever is more. Raises InvalidRequest if the dimensions differ.
    Source: Khattab and Zaharia 2020, ColBERT, late interaction (arXiv 2004.12832).
    """
    n_query, dim = query.shape
    if tokens.shape[1] != dim:
        raise InvalidRequest(
            "query and documents have different dimensions", code="dimension-mismatch", query=dim, documents=tokens.shape[1]
        )
    width = -(-n_query // 16) * 16
    matrix = np.zeros((dim, width), dtype=np.float32)
    matrix[:, :n_query] = query.T
    piece = max(16, SMALL_PRODUCT // matrix.size // 16 * 16)
    counts = np.diff(offsets)
    result = np.full(len(counts), -np.inf, dtype=np.float32)
    for first, last in _runs(offsets, RUN_TOKENS):
        begin, end = int(offsets[first]), int(offsets[last])
        full = first + np.flatnonzero(counts[first:last])
        if not len(full):
            continue
        block = tokens[begin:end]
        if block.dtype == np.float16:
            block = widened(block, scratch("brute_force.widened", block.shape, np.float32))
        similarities = scratch("brute_force.similarities", (end - begin, width), np.float32)
        multiply(block, matrix, piece, similarities)
        best = np.maximum.reduceat(similarities, offsets[full] - begin, axis=0)
        result[full] = best[:, :n_query].sum(axis=1, dtype=np.float32)
    return result


def widened(half: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
    """float16 (t, D), finite, as float32, exactly. numpy's own conversion takes five times as long.

    Shifted left by 13, exponent and mantissa of a float16 lie where a float32 has them, and only the exponent's bias is wrong, by 112; that holds for
    subnormal numbers and zero too. The shift carries copies of the sign into the bits in between, so they are masked.
    """
    out = np.empty(half.shape, dtype=np.float32) if out is None else out
    bits = out.view(np.int32)
    np.copyto(bits, half.view(np.int16))
    np.left_shift(bits, 13, out=bits)
    np.bitwise_and(bits, np.int32(-0x70002000), out=bits)  # 0x8FFFE000: the sign, and the 15 bits that moved
    np.multiply(out, np.float32(2.0**112), out=out)
    return out


def _runs(offsets: np.ndarray, limit: int) -> list[tuple[int, int]]:
    """Cut documents into runs of at most `limit` tokens (a longer document alone): half-open index pairs."""
    n = len(offsets) - 1
    runs, first = [], 0
    while first < n:
        last = max(first + 1, int(np.searchsorted(offsets, offsets[first] + limit, side="right")) - 1)
        runs.append((first, min(last, n)))
        first = last
    return runs
