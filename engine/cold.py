"""Searching a quantised segment that is not in memory: two dependent rounds of range reads after CURRENT.

    known from CURRENT    coarse centroids, where each cell's centroids and posting lists lie, their checksums
    round                 centroids and posting lists of the cells that the query's tokens fall into, and the sizes of all records: two
                          requests where a segment is small enough to read all cells
    compute               documents reached, ranked by probing (stage 2 of the cascade, with more probes: there is no stage 3 here)
    round                 records of the best of them, with the requests and bytes that are left
    compute               exact scores of those; a centroid that was not read is taken for the coarse centroid of its cell, which costs little,
                          because a token so far from the query is hardly ever the best answer to one of its tokens

The codec's cells are fetched once for all segments of the codec. What is read here goes through the store's cache like everything else.
"""

from __future__ import annotations

import asyncio
import time
from bisect import bisect_right
from collections.abc import Awaitable, Sequence
from itertools import pairwise

import msgspec
import numpy as np

from engine.config import ColdParams, SearchParams
from engine.format import names
from engine.format.codec_object import CodecHead, cell_ranges, head_range, read_cells, read_head
from engine.format.envelope import Section, corrupt
from engine.format.manifest import CodecRef, Manifest, SegmentRef
from engine.format.records import Records, Sizes, ids_of_records
from engine.format.segment import QuantisedReader
from engine.index.parts import Parts, scoring_records
from engine.scoring.arrays import Decoder, Postings
from engine.scoring.candidates import choose_candidates, distinct, probe, rank_documents
from engine.scoring.cascade import StageStats
from engine.scoring.centroid_scores import CentroidScores, score_some_centroids
from engine.scoring.maxsim import exact_ordinals
from engine.scoring.topk import top_k
from engine.store.base import Buffer, Range
from engine.store.ranges import ReadPlan, ReadPolicy, plan_reads

NEGLIGIBLE_GAP_BYTES = 32 << 10
"""A gap this small is read through even while there are requests left: three documents or so."""
MAX_CELL_GET_BYTES = 4 << 20
SAMPLED_SEGMENTS = 4


class CodecCells(msgspec.Struct, frozen=True):
    """What a query has read of a codec: the cells its tokens fall into, and how to decode."""

    ref: CodecRef
    cells: np.ndarray
    codes: np.ndarray
    centroids: np.ndarray
    head: CodecHead

    def scores(self, query: np.ndarray) -> CentroidScores:
        """The centroids that were read, scored; the others are unknown. query float32 (Q, D), not rotated."""
        return score_some_centroids(query @ self.head.rotation, self.centroids, self.codes, self.ref.n_centroids)

    def completed(self, scores: CentroidScores, query: np.ndarray) -> CentroidScores:
        """The same, with the coarse centroid of its cell standing in for each centroid that was not read."""
        if scores.known is None:
            return scores
        sizes = np.diff(self.ref.cell_offsets_array())
        coarse = np.repeat(self.ref.coarse_array() @ query.T, sizes, axis=0)
        table = scores.table.copy()
        unknown = ~scores.known
        table[unknown, : len(query)] = coarse[unknown]
        return msgspec.structs.replace(scores, table=table, known=None)

    @property
    def decoder(self) -> Decoder:
        head = self.head
        return Decoder(head.levels, head.inv_table, head.scale_table, self.ref.dim, self.ref.nbits)


class ColdHits(msgspec.Struct, frozen=True):
    """The best documents of one segment, best first: ids int64 (n,), scores float32 (n,), ordinals int64 (n,); hit i is records[rows[i]]."""

    ids: np.ndarray
    scores: np.ndarray
    ordinals: np.ndarray
    rows: np.ndarray
    records: Records


def cells_to_read(query: np.ndarray, ref: CodecRef, segments: Sequence[SegmentRef], cold: ColdParams) -> np.ndarray:
    """The coarse cells that a query reads of a codec and its segments: int64, ascending.

    All of them if max_cell_bytes a segment pays for that; else as many of the best as it pays for, gaps included, at least one. The
    centroids are shared by all segments of the codec.
    """
    if _cell_bytes(np.arange(ref.n_cells), ref, segments, cold) <= cold.max_cell_bytes * len(segments):
        return np.arange(ref.n_cells)
    order = rank_cells(query, ref)
    low, high = 1, ref.n_cells - 1
    while low < high:
        middle = (low + high + 1) // 2
        if _cell_bytes(np.sort(order[:middle]), ref, segments, cold) <= cold.max_cell_bytes * len(segments):
            low = middle
        else:
            high = middle - 1
    return np.sort(order[:low])


def rank_cells(query: np.ndarray, ref: CodecRef) -> np.ndarray:
    """All cells, the most promising first, int64 (M,).

    A cell counts by its best rank among the cells of any query token, so every token's best comes first, then every token's second.
    """
    table = query @ ref.coarse_array().T
    best_rank = np.argsort(np.argsort(-table, axis=1, kind="stable"), axis=1).min(axis=0)
    return np.lexsort((-table.max(axis=0), best_rank))


def _cell_bytes(cells: np.ndarray, ref: CodecRef, segments: Sequence[SegmentRef], cold: ColdParams) -> int:
    """Bytes that reading these cells takes, of the codec and of all segments. More than a few segments are judged by the first of them."""
    policy = _policy(cold.max_cell_gets)
    sample = segments[:SAMPLED_SEGMENTS]
    postings = 0
    for segment in sample:
        at = segment.posting_cells_array()
        postings += plan_reads(list(zip(at[cells].tolist(), at[cells + 1].tolist(), strict=True)), policy).n_bytes
    return plan_reads(cell_ranges(ref, cells), policy).n_bytes + postings * len(segments) // max(len(sample), 1)


async def read_codec_cells(parts: Parts, index: str, ref: CodecRef, cells: np.ndarray, cold: ColdParams) -> CodecCells:
    """Fetch the head and some cells of a codec: one round."""
    name = names.codec(ref.home or index, ref.id)
    plan = plan_codec(ref, cells, cold)
    blocks = plan.slice(await parts.read_exactly(name, plan.gets))
    return await parts.compute(_read_codec_cells, ref, cells, blocks, name)


def plan_codec(ref: CodecRef, cells: np.ndarray, cold: ColdParams) -> ReadPlan:
    """What to ask for of a codec: its head, then its cells."""
    return plan_reads([head_range(ref), *cell_ranges(ref, cells)], _policy(cold.max_cell_gets))


def _read_codec_cells(ref: CodecRef, cells: np.ndarray, blocks: Sequence[Buffer], name: str) -> CodecCells:
    head = read_head(ref, blocks[0], name=name)
    codes, centroids = read_cells(ref, cells, blocks[1:], name=name)
    return CodecCells(ref, cells, codes, centroids, head)


def reads_ahead(manifest: Manifest, index: str, cold: ColdParams, max_bytes: int) -> list[tuple[str, list[Range]]]:
    """What every search of an index that is not in memory reads, whatever is asked, in the same requests: names of objects, and the ranges
    of each (none: the whole object).

    Flat and small segments whole, tombstones, and of other segments the cells with their codec, as long as all cells are read. The rest depends on the
    query. In the order of the manifest, until max_bytes are reached.
    """
    reads: dict[str, list[Range]] = {}
    left = max_bytes
    for segment in manifest.segments:
        for name, ranges in _reads_of(manifest, index, segment, cold).items():
            n_bytes = sum(end - start for start, end in ranges)
            if name not in reads and n_bytes <= left:
                reads[name], left = ranges, left - n_bytes
    return list(reads.items())


def _reads_of(manifest: Manifest, index: str, segment: SegmentRef, cold: ColdParams) -> dict[str, list[Range]]:
    name, dead = names.segment(segment.home or index, segment.id), segment.tombstones
    reads: dict[str, list[Range]] = {} if dead is None else {names.tombstones(dead.home or index, dead.id): []}
    if segment.kind == "flat":
        return {**reads, name: [(0, segment.size_bytes)]}
    codec = manifest.codec_of(segment)
    of_codec = names.codec(codec.home or index, codec.id)
    reader = Parts.quantised_reader(index, segment, codec)
    if segment.size_bytes + codec.size_bytes <= cold.max_bytes:
        records = segment.section(Section.RECORDS)
        return {**reads, of_codec: [(0, codec.size_bytes)], name: [reader.hot_range, (records.offset, records.end)]}
    cells = np.arange(codec.n_cells)
    own = [ref for ref in manifest.segments if ref.codec == codec.id]
    if _cell_bytes(cells, codec, own, cold) > cold.max_cell_bytes * len(own):
        return reads
    return {**reads, of_codec: list(plan_codec(codec, cells, cold).gets), name: list(plan_postings(reader, cells, cold, True).gets)}


class PostingBlocks(msgspec.Struct, frozen=True):
    """Posting lists of some cells as they were fetched, not decoded: block i is that of cells[i]."""

    reader: QuantisedReader
    cells: np.ndarray
    blocks: Sequence[Buffer]

    def decoded(self, codes: np.ndarray, n_centroids: int) -> Postings:
        """The lists of these codes, int64, as far as their cells were fetched; all other lists are empty.

        Cost: 9 ns a posting, 2 ns one of another list of the same cells, and 20 us a cell.
        """
        holders = distinct(np.searchsorted(self.reader.cell_offsets, codes, side="right") - 1)
        places = np.searchsorted(self.cells, holders)
        wanted = np.zeros(n_centroids, bool)
        wanted[codes] = True
        stored = self.reader.posting_cells(holders, [self.blocks[place] for place in places.tolist()], wanted)
        counts = np.zeros(n_centroids, np.int64)
        counts[stored.codes] = np.diff(stored.offsets)
        return Postings(np.concatenate([[0], np.cumsum(counts)]), stored.ordinals)


async def read_posting_blocks(
    parts: Parts, index: str, segment: SegmentRef, ref: CodecRef, cells: np.ndarray, cold: ColdParams
) -> tuple[PostingBlocks, Sizes, ReadPlan]:
    """Fetch the posting lists of some cells, and where each record lies unless that is known: one round."""
    reader = parts.quantised_reader(index, segment, ref)
    sizes = parts.known_sizes(segment)
    plan = plan_postings(reader, cells, cold, sizes is None)
    found = plan.slice(await parts.read_exactly(reader.name, plan.gets))
    if sizes is None:
        sizes = await parts.compute(reader.sizes, found.pop(0))
        await parts.keep_sizes(segment, sizes)
    return PostingBlocks(reader, cells, found), sizes, plan


def plan_postings(reader: QuantisedReader, cells: np.ndarray, cold: ColdParams, with_sizes: bool) -> ReadPlan:
    """What to ask for of a segment: where its records lie, if that is not known, then the posting lists of the cells."""
    section = reader.ref.section(Section.SIZES)
    place = [(section.offset, section.end)] if with_sizes else []
    return plan_reads([*place, *reader.posting_ranges(cells)], _policy(cold.max_cell_gets))


class Window(msgspec.Struct, frozen=True):
    """A run of neighbouring documents that one request brings: ordinals first to last, half-open."""

    first: int
    last: int


async def search_segment(
    parts: Parts,
    index: str,
    segment: SegmentRef,
    codec: Awaitable[CodecCells],
    ref: CodecRef,
    cells: np.ndarray,
    query: np.ndarray,
    params: SearchParams,
    cold: ColdParams,
    mask: np.ndarray | None,
    stats: StageStats,
) -> ColdHits:
    """The best k documents of a segment.

    codec  still being read, perhaps: its cells belong to the same round as the posting lists
    cells  int64, of choose_cells
    query  float32 (Q, D), not rotated
    mask   bool (N,) or None: None allows all
    """
    (postings, sizes, plan), known = await asyncio.gather(read_posting_blocks(parts, index, segment, ref, cells, cold), codec)
    left = _left_for_records(plan, plan_codec(ref, cells, cold), cold)
    began = time.perf_counter()
    scores, windows = await parts.compute(_plan, known, postings, sizes, query, params, cold, left, mask, stats)
    stats.add_time("rank", began)
    ordinals = np.concatenate([np.empty(0, np.int64), *(np.arange(window.first, window.last) for window in windows)])
    reader = postings.reader
    pieces = await parts.read_exactly(reader.name, [window_range(reader, sizes, window) for window in windows])
    began = time.perf_counter()
    records = await parts.compute(reader.some_records, ordinals, pieces, sizes)
    hits = await parts.compute(_score, scores, known.decoder, records, ordinals, params, mask, segment, stats)
    stats.add_time("exact", began)
    return hits


def window_range(reader: QuantisedReader, sizes: Sizes, window: Window) -> Range:
    """Bytes of a window in the segment's object."""
    start = reader.ref.section(Section.RECORDS).offset
    return start + int(sizes.starts[window.first]), start + int(sizes.starts[window.last])


class Allowance(msgspec.Struct, frozen=True):
    """What a segment's records may still cost."""

    max_gets: int
    max_bytes: int


def _left_for_records(postings: ReadPlan, codec: ReadPlan, cold: ColdParams) -> Allowance:
    n_gets = cold.max_gets - len(postings.gets) - len(codec.gets)
    return Allowance(max(n_gets, 1), max(cold.max_bytes - postings.n_bytes - codec.n_bytes, cold.max_bytes // 4))


def _plan(
    known: CodecCells,
    blocks: PostingBlocks,
    sizes: Sizes,
    query: np.ndarray,
    params: SearchParams,
    cold: ColdParams,
    left: Allowance,
    mask: np.ndarray | None,
    stats: StageStats,
) -> tuple[CentroidScores, list[Window]]:
    """Rank the documents that the cells reach, and choose which records to read. Only cells with a probed centroid are decoded."""
    scores = known.scores(query)
    probes = probe(scores, max(cold.n_probe, params.n_probe), params.centroid_score_threshold)
    sums = rank_documents(probes, blocks.decoded(probes.unique_codes(), known.ref.n_centroids), len(sizes))
    candidates = choose_candidates(sums, max(min(cold.n_rerank, params.n_rerank), params.k), mask)
    stats.n_candidates += len(candidates)
    ranked = candidates[np.argsort(-sums[candidates].astype(np.int64), kind="stable")]
    return known.completed(scores, query), choose_windows(ranked, sizes.starts, left)


def choose_windows(ranked: np.ndarray, starts: np.ndarray, left: Allowance) -> list[Window]:
    """Which runs of records to read for documents ranked best first: int64 ordinals; starts int64 (N + 1,) in bytes.

    Documents are taken in order of rank. Each becomes a window of its own while there are requests left; after that a request is freed by
    joining the two windows with the least between them (the new one included), as long as max_bytes pays for it; a document
    that cannot be paid for is passed over. Returns windows by ascending ordinal, at least one if there is a document.
    An optimal choice (dynamic programming over the chance of each rank to be a hit) finds no more hits: measured on arXiv, 0.913 for 0.912.
    """
    windows: list[Window] = []
    n_bytes = 0
    for ordinal in ranked.tolist():
        place = bisect_right(windows, ordinal, key=lambda window: window.first)
        if place and ordinal < windows[place - 1].last:
            continue
        tried = [*windows[:place], Window(ordinal, ordinal + 1), *windows[place:]]
        price = int(starts[ordinal + 1] - starts[ordinal])
        gaps = [int(starts[after.first] - starts[before.last]) for before, after in pairwise(tried)]
        closest = min(range(len(gaps)), key=gaps.__getitem__, default=-1)
        if closest >= 0 and (len(tried) > left.max_gets or gaps[closest] <= NEGLIGIBLE_GAP_BYTES):
            tried[closest : closest + 2] = [Window(tried[closest].first, tried[closest + 1].last)]
            price += gaps[closest]
        if windows and n_bytes + price > left.max_bytes:
            continue
        windows, n_bytes = tried, n_bytes + price
    return windows


def _score(
    scores: CentroidScores,
    decoder: Decoder,
    records: Records,
    ordinals: np.ndarray,
    params: SearchParams,
    mask: np.ndarray | None,
    segment: SegmentRef,
    stats: StageStats,
) -> ColdHits:
    """Exact scores of all documents that were read."""
    rows = np.arange(len(ordinals)) if mask is None else np.flatnonzero(mask[ordinals])
    ids = _ids(records, segment) if len(ordinals) else np.empty(0, np.int64)
    exact = exact_ordinals(scores, scoring_records(records), decoder, rows)
    stats.n_reranked += len(rows)
    stats.n_tokens_scored += int(records.n_tokens[rows].sum())
    best = top_k(exact, params.k, ids[rows])
    best = best[np.isfinite(exact[best])]
    return ColdHits(ids[rows[best]], exact[best], ordinals[rows[best]], rows[best], records)


def _ids(records: Records, segment: SegmentRef) -> np.ndarray:
    """Document ids as the records say them, int64 (n,). CorruptData if one is none of the segment's."""
    ids, expected = ids_of_records(records) + segment.base, (segment.first_id, segment.last_id)
    if ids.min() < segment.first_id or ids.max() > segment.last_id:
        raise corrupt("ids that the segment does not have", name=segment.id, section=Section.RECORDS, expected=expected, found=ids.min())
    return ids


def _policy(max_gets: int) -> ReadPolicy:
    """Cells lie along a path on which neighbours are alike, so gaps are small and reading through them is cheap. A GET of all cells of a
    segment of 20,000 documents is 3 MB; in two it would come 19 ms sooner and cost what 15 ms of a 2 GB function cost."""
    return ReadPolicy(request_cost_bytes=1 << 20, max_get_bytes=MAX_CELL_GET_BYTES, max_gets=max_gets)
