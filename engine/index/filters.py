"""Conditions and keyword queries over a snapshot: every segment is asked by itself, and the answers are put together by document id.

Imported only when a search has a condition or a keyword query, because it brings sqlite3 with it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import numpy as np

from engine.format.manifest import SegmentRef
from engine.index.build import column_pairs
from engine.index.reader import Snapshot
from engine.index.turns import in_turns
from engine.metadata.bm25 import Matches, combine
from engine.metadata.condition import Condition, parse
from engine.metadata.keyword_query import KeywordQuery, compile_query
from engine.metadata.matching import match, match_nothing

SEGMENTS_AT_ONCE = 32
"""A segment's SQLite file may be many megabytes, and the memory budget counts only what has been loaded."""


async def select(snapshot: Snapshot, text: str, parameters: Sequence[object]) -> np.ndarray:
    """Ids of the live documents that meet a condition, int64 ascending. Raises InvalidRequest (`invalid-condition`)."""
    condition = parse(text, list(parameters), column_pairs(snapshot.columns))
    found: list[np.ndarray] = []
    for some in in_turns(snapshot.segments, SEGMENTS_AT_ONCE):
        found += await asyncio.gather(*(_select_in(snapshot, segment, condition) for segment in some))
    return np.sort(np.concatenate([np.empty(0, np.int64), *found]))


async def _select_in(snapshot: Snapshot, segment: SegmentRef, condition: Condition) -> np.ndarray:
    database, ids, alive = await asyncio.gather(
        snapshot.parts.database(snapshot.index, segment, snapshot.columns, snapshot.manifest.config.fts_tokenizer),
        snapshot.parts.ids(snapshot.index, segment),
        snapshot.parts.alive(snapshot.index, segment),
    )
    ordinals = await snapshot.parts.compute(database.select, condition)
    return ids[ordinals if alive is None else ordinals[alive[ordinals]]]


async def keyword(
    snapshot: Snapshot, queries: Sequence[str], k: int, subset: np.ndarray | None = None
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Per query the best k documents: ids int64 and scores float32, best first.

    subset  ids of documents that may be hits, None for all; it never changes a score
    Raises InvalidRequest for a query that is no text or too long.
    """
    wanted = None if subset is None else np.unique(np.asarray(subset, np.int64))
    tokenizer = snapshot.manifest.config.fts_tokenizer
    compiled = [await snapshot.parts.compute(compile_query, text, tokenizer) for text in queries]
    per_segment: list[list[Matches]] = []
    for some in in_turns(snapshot.segments, SEGMENTS_AT_ONCE):
        per_segment += await asyncio.gather(*(_match_in(snapshot, segment, compiled, wanted) for segment in some))
    answers = []
    for number, query in enumerate(compiled):
        ranking = combine(query, [matches[number] for matches in per_segment], k)
        answers.append((ranking.ids, ranking.scores))
    return answers


async def _match_in(snapshot: Snapshot, segment: SegmentRef, queries: Sequence[KeywordQuery], wanted: np.ndarray | None) -> list[Matches]:
    """What one segment contributes to each query. A segment without words contributes the number of its documents."""
    parts, index = snapshot.parts, snapshot.index
    if segment.metadata is None and not segment.patches:
        return [match_nothing(query, segment.n_live) for query in queries]
    tokenizer = snapshot.manifest.config.fts_tokenizer
    database, alive = await asyncio.gather(parts.database(index, segment, snapshot.columns, tokenizer), parts.alive(index, segment))
    mask = None
    if wanted is not None:
        mask = np.zeros(segment.n_documents, bool)
        mask[await parts.live_ordinals_of(index, segment, wanted)] = True
    return await parts.compute(lambda: [match(query, database, alive, mask) for query in queries])
