"""Queries made of an index's own documents, for measuring an index whose users' queries are not at hand."""

from __future__ import annotations

import numpy as np

from engine.index.reader import Snapshot
from engine.transfer.export import blocks


async def sampled_queries(snapshot: Snapshot, ids: np.ndarray, n_queries: int, query_tokens: int, seed: int) -> list[np.ndarray]:
    """float32 (q, D) each, 1 <= q <= query_tokens: random tokens, in order, of random documents of `ids` int64; documents without tokens give none.

    Easier than real queries: each has a document that contains it. Cost: the chosen documents are decoded, their segments read.
    """
    rng = np.random.Generator(np.random.PCG64(seed))
    chosen = rng.choice(ids, min(n_queries, len(ids)), replace=False)
    queries = []
    async for block in blocks(snapshot, chosen):
        tokens, offsets = await block.tokens()
        for start, end in zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True):
            which = np.sort(rng.choice(end - start, min(query_tokens, end - start), replace=False))
            if len(which):
                queries.append(tokens[start:end][which])
    return queries
