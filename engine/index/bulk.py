"""Building a large index from a source of vectors: quantised segments directly, bounded memory, one commit, resumable.

    1. a codec, trained on a sample of the source (or the index's newest, if it has one that is large enough)
    2. block after block: encode, collect, and whenever a segment is full, order, write and upload it
    3. one commit that names all segments

After each upload a progress record says how far the source is consumed. A build that was killed is run again with the same source and goes
on behind the last record; garbage collection keeps what the records name. Nothing is visible before the commit, and everything after it.
If the kill fell between the commit and the removal of the records, the next run finds its segments in the index's history and only tidies.
After a week without progress garbage collection takes the records, and then what they name. A run that takes up what is about that old races with it
as a pin does (snapshots.py): it writes a record, which makes the build young again, and then looks whether it is doomed already.

The other run may be only slow and not dead: two runs of one build meet at a record, which one of them writes first, and at the latest at the
commit, before which each looks whether the other has committed. The first record is removed first, so whoever misses it has lost.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Protocol

import msgspec
import numpy as np
import xxhash

from engine.codec.bitpack import row_bytes
from engine.codec.kmeans import n_sample_tokens
from engine.codec.residual import Codec, train
from engine.config import MAX_DOCUMENT_TOKENS, MaintenanceParams
from engine.errors import Conflict, InvalidRequest, NotFound, Unavailable
from engine.format import names
from engine.format.codec_object import write_codec
from engine.format.manifest import CodecRef, Column, Manifest, SegmentRef, decode_manifest
from engine.format.markers import BuildProgress, read_marker, write_marker
from engine.index.build import NewSegment, Part, column_pairs, column_refs, encode_part, quantised_segment
from engine.index.commit import Draft, Head, commit
from engine.index.operations import bury, unit_rows
from engine.index.plan import newest_codec
from engine.index.reader import Reader
from engine.index.snapshots import archived
from engine.index.sweep import doomed_by_sweeps
from engine.metadata import schema
from engine.store.base import Buffer, same_bytes

Progress = Callable[[str, int, int], None]
"""Called with (what is being done, documents done, documents in all or 0 if unknown)."""


@dataclass(frozen=True)
class Block:
    """Some documents of a source: tokens float16 or float32 (T, D), offsets int64 (n + 1,), and per document fields and external id."""

    tokens: np.ndarray
    offsets: np.ndarray
    fields: Sequence[dict[str, Any]] | None = None
    keys: Sequence[str | None] | None = None

    def __len__(self) -> int:
        return len(self.offsets) - 1


class Source(Protocol):
    """Where the vectors come from. Reading it twice gives the same documents in the same order."""

    @property
    def fingerprint(self) -> str:
        """Changes if the content does; names the build that may be resumed."""
        ...

    @property
    def n_documents(self) -> int:
        """In all; 0 if unknown."""
        ...

    @property
    def n_tokens(self) -> int:
        """In all, at least roughly."""
        ...

    def sample(self, n_tokens: int) -> np.ndarray:
        """About n_tokens random token vectors, float16 or float32 (n, D)."""
        ...

    def blocks(self, first_document: int) -> Iterator[Block]:
        """All documents from `first_document` on, in blocks of bounded size."""
        ...


@dataclass
class BuildReport:
    """What a bulk build did. n_resumed documents were already there from an earlier run."""

    n_documents: int = 0
    n_tokens: int = 0
    n_segments: int = 0
    n_resumed: int = 0
    n_replaced: int = 0
    generation: int = 0
    was_committed_before: bool = False


@dataclass
class _State:
    """How far a build has come."""

    codec_ref: CodecRef | None = None
    segments: list[SegmentRef] = field(default_factory=list)
    columns: tuple[Column, ...] = ()
    n_documents: int = 0
    n_parts: int = 0


def follows(state: _State, record: BuildProgress) -> bool:
    """Whether the record goes on where the others have come to: the next one, and behind the same documents."""
    n_new = 0 if record.segment is None else record.segment.n_documents
    return record.part == state.n_parts and record.n_documents == state.n_documents + n_new


class BulkBuild:
    """One build of one index from one source."""

    def __init__(
        self,
        reader: Reader,
        index: str,
        source: Source,
        *,
        params: MaintenanceParams | None = None,
        n_threads: int = 1,
        progress: Progress | None = None,
    ) -> None:
        self.reader, self.parts, self.store, self.index, self.source = reader, reader.parts, reader.store, index, source
        self.params, self.n_threads, self.progress = params or MaintenanceParams(), n_threads, progress or (lambda *_: None)
        self.build_id = ""
        self.state = _State()
        self._first_record: Buffer = b""
        self._began_at = 0
        self._records: dict[str, bool] = {}
        """Names of our progress records, and whether each brought a segment."""
        self._stray: set[str] = set()
        """Segments of records behind one that is gone."""
        self._without_us: set[int] = set()

    async def run(self) -> BuildReport:
        """Build and commit. Raises InvalidRequest for documents that cannot be indexed; what was built before stays for a resumed run."""
        head = await self.reader.head(self.index)
        self._began_at = head.manifest.generation
        life = head.manifest.index_id  # of an index of this name that was deleted and made again nothing is resumed
        self.build_id = xxhash.xxh3_128_hexdigest(f"{self.index}\n{life}\n{self.source.fingerprint}".encode())
        self._check_dimension(head.manifest)
        self.state.columns = head.manifest.columns
        is_whole = await self._load_progress()
        manifest = head.manifest if is_whole else (await self.reader.head(self.index)).manifest  # who removed records may have committed just now
        if await self._is_committed(manifest):
            await self._tidy()
            return BuildReport(n_resumed=self.state.n_documents, generation=manifest.generation, was_committed_before=True)
        if self._records and not (is_whole and await self._goes_on()):
            await self._begin_anew(_State(columns=head.manifest.columns))
        n_resumed = self.state.n_documents
        codec = await self._codec(head.manifest)
        await self._build_segments(codec, head.manifest)
        if not self.state.segments:
            raise InvalidRequest("the source holds no documents", source=self.source.fingerprint)
        head, n_replaced, was_committed_before = await self._commit(life)
        await self._tidy()
        return BuildReport(
            n_documents=self.state.n_documents,
            n_tokens=sum(segment.n_tokens for segment in self.state.segments),
            n_segments=len(self.state.segments),
            n_resumed=n_resumed,
            n_replaced=n_replaced,
            generation=head.manifest.generation,
            was_committed_before=was_committed_before,
        )

    # Progress

    async def _load_progress(self) -> bool:
        """Take up what earlier runs have noted; False if some of it is gone, because a run that had committed or garbage collection was removing it."""
        prefix = names.build(self.index, self.build_id, 0).rpartition("/")[0] + "/"
        is_whole = True
        async for listed in self.store.list(prefix):
            try:
                data = (await self.store.get(listed.name)).data
            except NotFound as error:
                raise self._other_run() from error
            record = read_marker(data, BuildProgress, name=listed.name)
            self._records[listed.name] = record.segment is not None
            is_whole = is_whole and follows(self.state, record)
            if not is_whole:
                self._stray |= {record.segment.id} if record.segment is not None else set()
                continue
            if not record.part:
                self._first_record = data
            self.state.n_parts += 1
            self.state.codec_ref = record.codec or self.state.codec_ref
            if record.segment is not None:
                self.state.segments.append(record.segment)
                self.state.columns, self.state.n_documents = record.columns, record.n_documents
        return is_whole

    async def _goes_on(self) -> bool:
        """Say that an earlier run is taken up; False if garbage collection was faster."""
        await self._note([])
        if self._records.keys() & await doomed_by_sweeps(self.store, self.index):
            return False
        await self._check_no_other_run_finished()
        return True

    async def _begin_anew(self, state: _State) -> None:
        """Forget what is left of earlier runs, of which not all is there, or will be. state: of a build that has done nothing yet."""
        await self.store.delete(list(self._records))
        self._records.clear()
        self._stray.clear()
        self.state = state

    async def _note(self, objects: Iterable[str], *, segment: SegmentRef | None = None, codec: CodecRef | None = None) -> None:
        record = BuildProgress(
            id=self.build_id,
            part=self.state.n_parts,
            source=self.source.fingerprint,
            n_documents=self.state.n_documents,
            objects=tuple(objects),
            segment=segment,
            codec=codec,
            columns=self.state.columns,
            created_s=self.reader.clock.now_s(),
        )
        data = write_marker(record)
        try:
            await self.store.put_if_absent(names.build(self.index, self.build_id, self.state.n_parts), data)
        except Conflict as error:
            raise self._other_run() from error
        if not self.state.n_parts:
            self._first_record = data
        self._records[names.build(self.index, self.build_id, self.state.n_parts)] = segment is not None
        self.state.n_parts += 1

    def _other_run(self) -> Conflict:
        return Conflict("the same source is being built by another process", index=self.index, build=self.build_id)

    async def _is_committed(self, current: Manifest) -> bool:
        """Whether some run committed these segments; compaction may have replaced them since, so the kept history is asked too.

        Raises Conflict if a run of the same source that shares no segment with ours has committed since we began.
        """
        ours = {segment.id for segment in self.state.segments} | self._stray
        if self._shows(current, ours):
            return True
        if not ours and current.generation == self._began_at:
            return False
        async for generation, _ in archived(self.store, self.index, current.index_id):
            if generation in self._without_us or (not ours and generation <= self._began_at):
                continue
            name = names.manifest(self.index, current.index_id, generation)
            try:
                manifest = decode_manifest((await self.store.get(name)).data, name=name)
            except NotFound:
                continue
            if self._shows(manifest, ours):
                return True
            self._without_us.add(generation)
        return False

    def _shows(self, manifest: Manifest, ours: set[str]) -> bool:
        if any(segment.id in ours for segment in manifest.segments):
            return True
        if manifest.generation > self._began_at and manifest.cause.endswith(self.build_id):
            raise self._other_run()
        return False

    async def _check_no_other_run_finished(self) -> None:
        """Conflict if our first record is not there any more: another run of this build, of other segments, has committed and tidied."""
        try:
            found = await self.store.get(names.build(self.index, self.build_id, 0))
        except NotFound as error:
            raise self._other_run() from error
        if not same_bytes(found.data, self._first_record):
            raise self._other_run()

    async def _tidy(self) -> None:
        """Remove the progress records: the first one first, and last those of segments, by which the commit is known. The build is
        committed, so a store that fails now changes no answer: the rest is left to rot."""
        first = names.build(self.index, self.build_id, 0)
        others = {name: brought for name, brought in self._records.items() if name != first}
        with suppress(Unavailable):
            await self.store.delete([first])
            await self.store.delete([name for name, brought in others.items() if not brought])
            await self.store.delete([name for name, brought in others.items() if brought])

    # Building

    def _check_dimension(self, manifest: Manifest) -> None:
        sample = self.source.sample(1)
        if manifest.dim is not None and len(sample) and sample.shape[1] != manifest.dim:
            raise InvalidRequest(
                "vectors have another dimension than the index", code="dimension-mismatch", expected=manifest.dim, found=sample.shape[1]
            )

    async def _codec(self, manifest: Manifest) -> Codec:
        """The codec of an earlier run; else the index's, if it was trained on enough; else a new one."""
        newest = newest_codec(manifest)
        if (
            self.state.codec_ref is None
            and newest is not None
            and self.params.retrain_growth * newest.n_tokens_trained >= self.source.n_tokens
        ):
            await self._note(
                [names.codec(newest.home or self.index, newest.id)], codec=newest
            )  # or it may be collected, and a resumed run choose another
            self.state.codec_ref = newest
        if self.state.codec_ref is None:
            self.state.codec_ref = await self._train(manifest)
        return await self.parts.codec(self.index, self.state.codec_ref)

    async def _train(self, manifest: Manifest) -> CodecRef:
        config, n_tokens = manifest.config, max(self.source.n_tokens, 1)
        self.progress("train", 0, self.source.n_documents)
        sample = await self.parts.compute(lambda: unit_rows(self.source.sample(n_sample_tokens(n_tokens))))
        if not len(sample):
            raise InvalidRequest("the source holds no documents", source=self.source.fingerprint)
        seed = 42 if config.seed is None else config.seed
        codec = await self.parts.compute(train, sample, n_tokens, config.nbits, seed, n_threads=self.n_threads)
        data, ref = write_codec(codec, names.fresh_id(), n_tokens_trained=n_tokens)
        name = names.codec(self.index, ref.id)
        await self.store.put_if_absent(name, data)
        await self._note([name], codec=ref)
        return ref

    async def _build_segments(self, codec: Codec, manifest: Manifest) -> None:
        bytes_per_token = row_bytes(codec.dim, codec.nbits) + 8
        waiting: list[Part] = []
        n_documents = n_bytes = 0
        for block in self.source.blocks(self.state.n_documents):
            for piece in self._cut(block):
                waiting.append(await self.parts.compute(self._encode, codec, piece, self.state.n_documents + n_documents))
                n_documents += len(piece)
                n_bytes += len(piece.tokens) * bytes_per_token
                self.progress("build", self.state.n_documents + n_documents, self.source.n_documents)
                full = n_bytes >= self.params.max_segment_bytes or n_documents + PIECE_DOCUMENTS > self.params.max_segment_documents
                if full:
                    await self._finish_segment(codec, manifest, waiting)
                    n_documents = n_bytes = 0
        if waiting:
            await self._finish_segment(codec, manifest, waiting)

    def _cut(self, block: Block) -> Iterator[Block]:
        """Pieces of at most PIECE_DOCUMENTS documents and about PIECE_TOKENS tokens, so that memory is bounded whatever a source yields."""
        start = 0
        while start < len(block):
            by_tokens = int(np.searchsorted(block.offsets, block.offsets[start] + PIECE_TOKENS, side="right")) - 1
            end = min(len(block), start + PIECE_DOCUMENTS, max(start + 1, by_tokens))
            first, last = block.offsets[start], block.offsets[end]
            yield Block(
                block.tokens[first:last],
                block.offsets[start : end + 1] - first,
                None if block.fields is None else block.fields[start:end],
                None if block.keys is None else block.keys[start:end],
            )
            start = end

    def _encode(self, codec: Codec, block: Block, first_id: int) -> Part:
        _check_block(block, codec.dim, first_id)
        rows: Sequence[dict[str, Any]] | None = None
        texts: Sequence[str] | None = None
        if block.fields is not None:
            pairs, rows, texts = schema.extend(column_pairs(self.state.columns), block.fields)
            self.state.columns = column_refs(pairs)
        ids = np.arange(first_id, first_id + len(block), dtype=np.int64)
        tokens = unit_rows(block.tokens)
        return encode_part(codec, tokens, block.offsets, ids, keys=block.keys, rows=rows, texts=texts, n_threads=self.n_threads)

    async def _finish_segment(self, codec: Codec, manifest: Manifest, waiting: list[Part]) -> None:
        """Write and upload what waits as one segment, and note it. Ids count from 0 through the whole build; the commit gives the base."""
        assert self.state.codec_ref is not None
        parts, n_documents = list(waiting), sum(len(part) for part in waiting)
        waiting.clear()
        self.progress("write", self.state.n_documents + n_documents, self.source.n_documents)
        made: NewSegment = await self.parts.compute(
            quantised_segment, parts, codec, self.state.codec_ref, columns=self.state.columns, config=manifest.config
        )
        del parts
        uploads = made.uploads(self.index)
        for name, data in uploads.items():
            await self.store.put_if_absent(name, data)
        self.state.n_documents += n_documents
        self.state.segments.append(made.segment)
        await self._note(uploads, segment=made.segment)

    # Committing

    async def _commit(self, life: str) -> tuple[Head, int, bool]:
        """The generation that has the documents, how many older ones they replaced, and whether another run had committed them."""
        state, codec_ref = self.state, self.state.codec_ref
        assert codec_ref is not None
        n_replaced, was_committed_before = 0, False

        async def apply(manifest: Manifest) -> Draft | None:
            nonlocal n_replaced, was_committed_before
            if manifest.index_id != life:
                raise Conflict("the index was deleted and made again meanwhile", index=self.index)
            if await self._is_committed(manifest):
                was_committed_before = True
                return None
            await self._check_no_other_run_finished()
            if manifest.dim is not None and manifest.dim != codec_ref.dim:
                raise Conflict("the index has got another dimension meanwhile", expected=codec_ref.dim, found=manifest.dim)
            columns = schema.adopt(column_pairs(manifest.columns), column_pairs(state.columns))
            if columns is None:
                raise Conflict("another writer has made columns of other types meanwhile", index=self.index)
            draft = Draft(manifest)
            n_replaced = await self._bury_replaced(draft)
            known = {codec.id for codec in manifest.codecs}
            draft.manifest = msgspec.structs.replace(
                draft.manifest,
                dim=codec_ref.dim,
                next_id=manifest.next_id + state.n_documents,
                codecs=manifest.codecs if codec_ref.id in known else (*manifest.codecs, codec_ref),
                segments=(*draft.manifest.segments, *(segment.rebased(manifest.next_id + segment.base) for segment in state.segments)),
                columns=column_refs(columns),
            )
            return draft

        began_s = self.reader.clock.monotonic_s()
        cause = f"build {state.n_documents} documents of {self.build_id}"
        head = await commit(self.store, self.index, apply, cause=cause, clock=self.reader.clock)
        self.reader.remember_head(self.index, head, asked_s=began_s)
        return head, n_replaced, was_committed_before

    async def _bury_replaced(self, draft: Draft) -> int:
        """Delete the documents of the index that carry a key of the new ones."""
        if not any(segment.has_keys for segment in draft.manifest.segments):
            return 0
        n_buried = 0
        for segment in self.state.segments:
            if segment.has_keys:
                keys = await self.parts.keys(self.index, segment)
                new_keys = [keys.raw(row).decode() for row in range(len(keys))]
                old = await self.parts.ids_of_keys(self.index, draft.manifest, new_keys, draft.uploads)
                n_buried += await bury(draft, self.index, self.parts, old)
        return n_buried


PIECE_DOCUMENTS = 2048
PIECE_TOKENS = 1 << 17
"""131,072 tokens of 128 dimensions are 64 MiB as float32: the largest array of a build beside the segment itself."""


def _check_block(block: Block, dim: int, first_document: int) -> None:
    """Raise InvalidRequest for what cannot be indexed, naming the document."""
    if block.tokens.ndim != 2 or block.tokens.shape[1] != dim:
        raise InvalidRequest(
            "vectors have another dimension than the rest", code="dimension-mismatch", expected=dim, found=block.tokens.shape
        )
    lengths = np.diff(block.offsets)
    bad = np.flatnonzero((lengths < 1) | (lengths > MAX_DOCUMENT_TOKENS))
    if len(bad):
        raise InvalidRequest(
            f"a document has 1 to {MAX_DOCUMENT_TOKENS} tokens", document=first_document + int(bad[0]), found=int(lengths[bad[0]])
        )
    finite = np.isfinite(block.tokens).all(axis=1)
    if not finite.all():
        row = int(np.flatnonzero(~finite)[0])
        document = first_document + int(np.searchsorted(block.offsets, row, side="right")) - 1
        raise InvalidRequest("a vector has a value that is not finite", document=document)
