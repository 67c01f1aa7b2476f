"""Compaction: fold flat segments into quantised ones, merge small ones, drop deleted documents, train codecs. One commit per step.

Readers and writers are never blocked: a step reads immutable objects, writes new ones, and replaces the references of its sources in one
commit. What others did to the sources meanwhile (deletes, changed fields) is carried over to the new segment inside that commit; if a
source itself is gone, another compactor was faster and the step is given up. A compactor can be killed anywhere: rubbish, no damage.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec
import numpy as np

from engine.codec.kmeans import n_sample_tokens
from engine.codec.residual import Codec, train
from engine.config import MaintenanceParams
from engine.format import names
from engine.format.codec_object import write_codec
from engine.format.envelope import Buffer
from engine.format.fields import encode_fields
from engine.format.manifest import CodecRef, Manifest, SegmentRef
from engine.format.patch import write_patch
from engine.format.records import Records
from engine.format.tombstones import write_tombstones
from engine.index.build import NewSegment, Part, encode_part, flat_segment, quantised_segment
from engine.index.commit import Draft, commit
from engine.index.parts import Parts, decode_records
from engine.index.plan import Step, newest_codec, next_step
from engine.index.reader import Reader

MAX_STEPS = 10_000
SAMPLE_SEED = 7
Progress = Callable[[str, int, int], None]
"""Called with (what is being done, documents done, documents in all)."""


@dataclass
class CompactReport:
    """What compaction did: steps by kind, documents and tokens rewritten, commits lost to a faster compactor."""

    steps: dict[str, int] = field(default_factory=dict)
    n_documents: int = 0
    n_tokens: int = 0
    n_given_up: int = 0


@dataclass(frozen=True)
class _Source:
    """One segment as a step found it: its reference, deleted ordinals and patches then."""

    ref: SegmentRef
    dead: np.ndarray
    patches: Mapping[int, Mapping[str, Any]]

    @property
    def alive(self) -> np.ndarray:
        return np.setdiff1d(np.arange(self.ref.n_documents), self.dead, assume_unique=True)


async def compact(
    reader: Reader,
    index: str,
    *,
    params: MaintenanceParams | None = None,
    force: bool = False,
    max_steps: int = MAX_STEPS,
    n_threads: int = 1,
    progress: Progress | None = None,
) -> CompactReport:
    """Bring an index into good order, step by step, until there is nothing left to do.

    force      fold flat segments however few they are
    max_steps  stop after so many, for callers with little time
    Raises NotFound if there is no such index.
    """
    params = params or MaintenanceParams()
    report = CompactReport()
    for _ in range(max_steps):
        head = await reader.head(index)
        step = next_step(head.manifest, params, force=force)
        if step is None:
            break
        work = _Work(reader, index, head.manifest, step, n_threads, progress)
        if await work.run():
            report.steps[step.kind] = report.steps.get(step.kind, 0) + 1
            if step.kind != "train":
                report.n_documents += sum(source.n_live for source in step.sources)
                report.n_tokens += sum(source.n_tokens for source in step.sources)
        else:
            report.n_given_up += 1
    return report


class _Work:
    """One step under way."""

    def __init__(self, reader: Reader, index: str, manifest: Manifest, step: Step, n_threads: int, progress: Progress | None) -> None:
        self.reader, self.parts, self.index, self.manifest = reader, reader.parts, index, manifest
        self.step, self.n_threads, self.progress = step, n_threads, progress

    async def run(self) -> bool:
        """Do the step; False if somebody else was faster."""
        if self.step.kind == "train":
            return await self._train()
        sources = [await self._open(ref) for ref in self.step.sources]
        made = await self._flatten(sources) if self.step.kind == "flatten" else await self._rewrite(sources)
        ids = np.concatenate([(await self.parts.ids(self.index, source.ref))[source.alive] for source in sources])
        return await self._replace(sources, made, ids)

    async def _open(self, ref: SegmentRef) -> _Source:
        dead, patches = await asyncio.gather(self.parts.tombstones(self.index, ref), self.parts.patches(self.index, ref))
        return _Source(ref, dead, patches)

    # Training

    async def _train(self) -> bool:
        n_tokens = sum(segment.n_tokens for segment in self.manifest.segments)
        sample = await sample_tokens(self.parts, self.index, self.manifest, n_sample_tokens(n_tokens))
        config = self.manifest.config
        seed = 42 if config.seed is None else config.seed
        codec = await self.parts.compute(train, sample, n_tokens, config.nbits, seed, n_threads=self.n_threads)
        codec_id = names.fresh_id()
        data, ref = write_codec(codec, codec_id, n_tokens_trained=n_tokens)
        known = {codec.id for codec in self.manifest.codecs}

        async def apply(manifest: Manifest) -> Draft | None:
            if (
                manifest.index_id != self.manifest.index_id
                or {codec.id for codec in manifest.codecs} != known
                or manifest.dim != self.manifest.dim
            ):
                return None
            uploads: dict[str, Buffer] = {names.codec(self.index, codec_id): data}
            return Draft(msgspec.structs.replace(manifest, codecs=(*manifest.codecs, ref)), uploads)

        return await self._commit(apply, f"train a codec of {ref.n_centroids} centroids on {n_tokens} tokens")

    # Building

    async def _flatten(self, sources: Sequence[_Source]) -> NewSegment:
        flats = [await self.parts.flat(self.index, source.ref) for source in sources]
        runs = [
            flat.tokens[flat.offsets[n] : flat.offsets[n + 1]]
            for flat, source in zip(flats, sources, strict=True)
            for n in source.alive.tolist()
        ]
        contents = [await self._contents(source) for source in sources]
        living = [(content, n) for content, source in zip(contents, sources, strict=True) for n in source.alive.tolist()]
        return await self.parts.compute(
            flat_segment,
            np.concatenate(runs),
            np.cumsum([0, *map(len, runs)]),
            ids=np.concatenate([flat.ids[source.alive] for flat, source in zip(flats, sources, strict=True)]),
            keys=[content.keys[n] for content, n in living] if any(source.ref.has_keys for source in sources) else None,
            rows=[content.rows[n] for content, n in living],
            texts=[content.texts[n] for content, n in living],
            columns=self.manifest.columns,
            config=self.manifest.config,
        )

    async def _rewrite(self, sources: Sequence[_Source]) -> NewSegment:
        ref = newest_codec(self.manifest)
        assert ref is not None
        codec = await self.parts.codec(self.index, ref)
        parts = []
        n_all, n_done = sum(source.ref.n_documents for source in sources), 0
        for source in sources:
            parts.append(await self._part(source, codec, ref))
            n_done += source.ref.n_documents
            if self.progress is not None:
                self.progress(self.step.kind, n_done, n_all)
        return await self.parts.compute(quantised_segment, parts, codec, ref, columns=self.manifest.columns, config=self.manifest.config)

    async def _part(self, source: _Source, codec: Codec, ref: CodecRef) -> Part:
        """The documents of one source, encoded by the newest codec: as they are if it is theirs, else encoded (again)."""
        content = await self._contents(source)
        ids = await self.parts.ids(self.index, source.ref)
        extras: dict[str, Any] = {"keys": content.keys, "rows": content.rows, "texts": content.texts}
        if source.ref.codec == ref.id:
            records = await self.parts.records(self.index, source.ref, ref)
            part = Part(ids, msgspec.structs.replace(records, blobs=_patched_blobs(records, content, source)), alive=source.alive, **extras)
            self.parts.memory.forget(("records", source.ref.id))
            return part
        if source.ref.kind == "flat":
            flat = await self.parts.flat(self.index, source.ref)
            tokens, offsets = flat.tokens, flat.offsets
        else:
            old_ref = self.manifest.codec_of(source.ref)
            old = await self.parts.codec(self.index, old_ref)
            records = await self.parts.records(self.index, source.ref, old_ref)
            tokens, offsets = await self.parts.compute(decode_records, old, records, np.arange(source.ref.n_documents))
        return await self.parts.compute(encode_part, codec, tokens, offsets, ids, alive=source.alive, n_threads=self.n_threads, **extras)

    async def _contents(self, source: _Source) -> _Contents:
        """Keys, fields and keyword texts of a source's documents, patches applied."""
        codec = self.manifest.codec_of(source.ref) if source.ref.codec else None
        if codec is not None:
            await self.parts.records(self.index, source.ref, codec)
        stored = await self.parts.fields(self.index, source.ref, np.arange(source.ref.n_documents), codec)
        texts: Sequence[str | None] = [None] * len(stored)
        if source.ref.metadata is not None:
            database = await self.parts.database(self.index, source.ref, self.manifest.columns)
            texts = await self.parts.compute(database.texts)
        return _Contents([key for key, _ in stored], [row for _, row in stored], texts)

    # Committing

    async def _replace(self, sources: Sequence[_Source], made: NewSegment, ids: np.ndarray) -> bool:
        """Swap the sources for the new segment, carrying over what happened to them meanwhile."""

        async def apply(manifest: Manifest) -> Draft | None:
            now = {segment.id: segment for segment in manifest.segments}
            if manifest.index_id != self.manifest.index_id or any(source.ref.id not in now for source in sources):
                return None
            pairs = [(source, now[source.ref.id]) for source in sources]
            if await self._is_undone(manifest, made.segment, pairs):
                return None
            draft = Draft(manifest, dict(made.uploads(self.index)))
            carried = await self._carry_over(draft, made.segment, made.ids, pairs)
            gone = {source.ref.id for source in sources}
            segments = tuple(segment for segment in manifest.segments if segment.id not in gone)
            segments += (carried,) if carried is not None else ()
            draft.manifest = msgspec.structs.replace(manifest, segments=segments, codecs=_codecs_in_use(manifest, segments))
            return draft

        what = f"{self.step.kind} {len(sources)} segments of {len(ids)} documents"
        return await self._commit(apply, what)

    async def _is_undone(self, manifest: Manifest, made: SegmentRef, pairs: Sequence[tuple[_Source, SegmentRef]]) -> bool:
        """Whether a rollback (or another compactor) took back what the new segment rests on: its codec, a column, a delete, a changed field."""
        if made.codec and made.codec not in {codec.id for codec in manifest.codecs}:
            return True
        if not set(self.manifest.columns) <= set(manifest.columns):
            return True
        for source, now in pairs:
            patches = await self.parts.patches(self.index, now)
            if np.setdiff1d(source.dead, await self.parts.tombstones(self.index, now)).size:
                return True
            if any(row.keys() - patches.get(n, {}).keys() for n, row in source.patches.items() if n not in source.dead):
                return True
        return False

    async def _carry_over(
        self, draft: Draft, made: SegmentRef, new_ids: np.ndarray, pairs: Sequence[tuple[_Source, SegmentRef]]
    ) -> SegmentRef | None:
        """The new segment with tombstones for documents deleted since, and a patch for those changed since; None if all are deleted."""
        rank = np.argsort(new_ids)
        dead: list[np.ndarray] = [np.empty(0, np.int64)]
        changed: dict[int, dict[str, Any]] = {}
        for source, now in pairs:
            ids = await self.parts.ids(self.index, source.ref)
            late = np.setdiff1d(await self.parts.tombstones(self.index, now), source.dead)
            dead.append(rank[np.searchsorted(new_ids, ids[late], sorter=rank)])
            for ordinal, row in (await self.parts.patches(self.index, now)).items():
                if source.patches.get(ordinal) != row and ordinal not in source.dead:
                    changed[int(rank[np.searchsorted(new_ids, ids[ordinal], sorter=rank)])] = row
        buried = np.unique(np.concatenate(dead))
        if len(buried) == made.n_documents:
            return None
        if len(buried):
            data, ref = write_tombstones(buried, names.fresh_id())
            draft.uploads[names.tombstones(self.index, ref.id)] = data
            made = msgspec.structs.replace(made, tombstones=ref)
        if changed:
            patch_data, patch_ref = write_patch(changed, names.fresh_id())
            draft.uploads[names.patch(self.index, patch_ref.id)] = patch_data
            made = msgspec.structs.replace(made, patches=(patch_ref,))
        return made

    async def _commit(self, apply: Callable[[Manifest], Any], cause: str) -> bool:
        """Commit; False if `apply` gave up."""
        gave_up = False

        async def noting(manifest: Manifest) -> Draft | None:
            nonlocal gave_up
            draft: Draft | None = await apply(manifest)
            gave_up = draft is None
            return draft

        began_s = self.reader.clock.monotonic_s()
        head = await commit(
            self.reader.store, self.index, noting, cause=cause, head=self.reader.known_head(self.index), clock=self.reader.clock
        )
        self.reader.remember_head(self.index, head, asked_s=began_s)
        return not gave_up


@dataclass(frozen=True)
class _Contents:
    """Of all documents of a segment, by ordinal."""

    keys: list[str | None]
    rows: list[dict[str, Any] | None]
    texts: Sequence[str | None]


def _patched_blobs(records: Records, content: _Contents, source: _Source) -> Sequence[Buffer]:
    """The stored blobs, written anew only where a patch has changed them."""
    if not source.patches:
        return records.blobs
    return [encode_fields(content.keys[n], content.rows[n]) if n in source.patches else records.blobs[n] for n in range(len(records))]


def _codecs_in_use(manifest: Manifest, segments: Sequence[SegmentRef]) -> tuple[CodecRef, ...]:
    """The codecs that segments need, and the newest, which the next ones will need."""
    newest = newest_codec(manifest)
    used = {segment.codec for segment in segments} | ({newest.id} if newest else set())
    return tuple(codec for codec in manifest.codecs if codec.id in used)


async def sample_tokens(parts: Parts, index: str, manifest: Manifest, n_tokens: int) -> np.ndarray:
    """About n_tokens random token vectors of an index, float16 (n, D): whole documents, drawn over all segments alike."""
    n_all = sum(segment.n_tokens for segment in manifest.segments)
    share = min(1.0, n_tokens / max(n_all, 1))
    rng = np.random.Generator(np.random.PCG64(SAMPLE_SEED))
    blocks = []
    for segment in manifest.segments:
        n_documents = max(1, round(share * segment.n_documents))
        chosen = np.sort(rng.choice(segment.n_documents, n_documents, replace=False))
        codec = manifest.codec_of(segment) if segment.codec else None
        tokens, _ = await parts.tokens(index, segment, chosen, codec)
        blocks.append(tokens.astype(np.float16))
    return np.concatenate(blocks)
