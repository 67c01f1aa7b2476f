"""Opening the segments of a search: which documents may be hits, what is loaded into memory, what is left to be read cold, what is joined.

Everything that the arithmetic of engine/near.py needs is fetched here, before it starts.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Sequence
from typing import Any, Literal, TypeVar

import msgspec
import numpy as np

from engine.config import ColdParams
from engine.format.manifest import CodecRef, SegmentRef
from engine.index.parts import Parts, decoder_of, scoring_records
from engine.index.reader import Snapshot
from engine.near import Body, Segment, company
from engine.scoring.candidates import distinct
from engine.scoring.cascade import SegmentArrays
from engine.scoring.joined import join, size_bytes

T = TypeVar("T")
Mode = Literal["auto", "warm", "cold"]
MAX_COLD_QUERIES = 4
"""A batch of more queries than this loads segments whole: their cells would add up to most of the segment."""


async def together(work: Sequence[Coroutine[Any, Any, T]]) -> list[T]:
    """As asyncio.gather, but work that is alone is simply awaited: most indices have one segment, and tasks were half of a search's overhead."""
    return [await work[0]] if len(work) == 1 else list(await asyncio.gather(*work))


class Opened(msgspec.Struct, frozen=True):
    """The segments of a search that may have hits, by how they are searched."""

    flat: list[Segment]
    bodies: list[Body]
    cold: list[Segment]


class Opener:
    """Opens segments for one searcher. Remembers which small segments it joined last, to forget them when others take their place."""

    def __init__(self, parts: Parts, cold_params: ColdParams) -> None:
        self._parts, self._cold = parts, cold_params
        self._joined: dict[tuple[str, str], tuple[str, ...]] = {}

    async def open(self, snapshot: Snapshot, positions: Sequence[int], subset: np.ndarray | None, mode: Mode, n_queries: int) -> Opened:
        """The segments at these positions of the manifest. Other arguments as for Searcher.search; n_queries will be asked of what is opened."""
        wanted = None if subset is None else distinct(np.asarray(subset, np.int64))
        refs = [snapshot.segments[n] for n in positions]
        opened = await together([self._segment(snapshot, ref, wanted, mode, n_queries) for ref in refs])
        able = [segment for segment in opened if segment.mask is None or segment.mask.any()]
        near = [segment for segment in able if segment.arrays is not None]
        bodies = await self._bodies(snapshot, near, may_join=subset is None) if near else []
        return Opened([segment for segment in able if segment.tokens is not None], bodies, [segment for segment in able if segment.is_cold])

    async def _segment(self, snapshot: Snapshot, ref: SegmentRef, wanted: np.ndarray | None, mode: Mode, n_queries: int) -> Segment:
        mask = await self._mask(snapshot.index, ref, wanted)
        if mask is not None and not mask.any():
            return Segment(ref, None, mask)
        if ref.kind == "flat":
            flat = await self._parts.flat(snapshot.index, ref)
            return Segment(ref, None, mask, ids=flat.ids, tokens=await self._parts.widened(snapshot.index, ref), offsets=flat.offsets)
        codec = snapshot.manifest.codec_of(ref)
        if not await self._should_load(snapshot.index, ref, codec, mode, n_queries):
            return Segment(ref, codec, mask)
        return await self._loaded(snapshot.index, ref, codec, mask)

    async def _mask(self, index: str, ref: SegmentRef, wanted: np.ndarray | None) -> np.ndarray | None:
        if wanted is None:
            return await self._parts.alive(index, ref)
        mask = np.zeros(ref.n_documents, bool)
        mask[await self._parts.live_ordinals_of(index, ref, wanted)] = True
        return mask

    async def _should_load(self, index: str, ref: SegmentRef, codec: CodecRef, mode: Mode, n_queries: int) -> bool:
        if mode != "auto":
            return mode == "warm"
        if n_queries > MAX_COLD_QUERIES or (self._parts.known_hot(ref) and self._parts.known_records(ref)):
            return True
        if ref.size_bytes + codec.size_bytes <= self._cold.max_bytes:
            return True  # a cold search would read as much, in more requests, and keep nothing
        return await self._parts.local_path(index, ref) is not None

    async def _loaded(self, index: str, ref: SegmentRef, codec_ref: CodecRef, mask: np.ndarray | None) -> Segment:
        """A segment as the cascade wants it; each piece is kept in memory by itself, so the budget sees all of them."""
        parts = self._parts
        if not (parts.known_hot(ref) and parts.known_records(ref)):
            await asyncio.gather(parts.codec(index, codec_ref), parts.hot(index, ref, codec_ref), parts.records(index, ref, codec_ref))
        codec = await parts.codec(index, codec_ref)
        hot, records = await parts.hot(index, ref, codec_ref), await parts.records(index, ref, codec_ref)
        arrays = SegmentArrays(codec.centroids, hot.postings, hot.forward, scoring_records(records), decoder_of(codec))
        return Segment(ref, codec_ref, mask, arrays=arrays, rotation=codec.rotation, ids=hot.ids)

    async def _bodies(self, snapshot: Snapshot, segments: Sequence[Segment], *, may_join: bool) -> list[Body]:
        """A body for each segment, but one for all small ones of a codec that keep company.

        Not where only some documents are asked for: each such set would have others to join.
        """
        shared = [snapshot.segments[n].id for n in company(snapshot.segments)]
        small: dict[str, list[Segment]] = {}
        alone = []
        for segment in segments:
            if may_join and segment.ref.id in shared[1:]:
                small.setdefault(segment.ref.codec, []).append(segment)
            else:
                alone.append(segment)
        bodies = [_body([segment], segment.arrays, segment.ref.id in shared) for segment in alone if segment.arrays is not None]
        for codec, members in small.items():
            bodies.append(_body(members, await self._join(snapshot.index, codec, members), True))
        return bodies

    async def _join(self, index: str, codec: str, members: Sequence[Segment]) -> SegmentArrays:
        arrays = [member.arrays for member in members if member.arrays is not None]
        if len(arrays) == 1:
            return arrays[0]
        ids = tuple(member.ref.id for member in members)

        async def load() -> tuple[SegmentArrays, int]:
            made = await self._parts.compute(join, arrays)
            return made, size_bytes(made)

        joined = await self._parts.memory.get(("joined", *ids), load)
        before = self._joined.get((index, codec))
        if before != ids:
            self._joined[index, codec] = ids
            if before is not None:
                self._parts.memory.forget(("joined", *before))
        return joined


def _body(members: Sequence[Segment], arrays: SegmentArrays, is_kept_company: bool) -> Body:
    sizes = [member.ref.n_documents for member in members]
    masks = [member.mask for member in members]
    mask = None
    if any(own is not None for own in masks):
        mask = np.concatenate([np.ones(size, bool) if own is None else own for own, size in zip(masks, sizes, strict=True)])
    return Body(tuple(members), np.cumsum([0, *sizes]), arrays, mask, is_kept_company)
