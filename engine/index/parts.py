"""The pieces that a manifest names, fetched, verified, decoded, and kept in memory while they fit.

Everything here is immutable and known by id, so nothing is ever stale. Functions that read what a draft has not uploaded yet take its
uploads; those are never kept. Arithmetic of more than a millisecond goes to the executor.
"""

from __future__ import annotations

import asyncio
import mmap
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

import msgspec
import numpy as np

from engine.codec.bitpack import row_bytes
from engine.codec.residual import Codec, Encoded, decode
from engine.errors import CorruptData, NotFound
from engine.format import names
from engine.format.codec_object import read_codec
from engine.format.envelope import Section, checksum
from engine.format.fields import decode_fields
from engine.format.keys import Keys
from engine.format.manifest import CodecRef, Column, Manifest, ObjectRef, SegmentRef
from engine.format.patch import read_patch
from engine.format.records import Records, Sizes
from engine.format.segment import Flat, QuantisedReader, find_ids, read_flat
from engine.format.tombstones import read_tombstones
from engine.index.build import column_pairs
from engine.index.memory import Memory
from engine.scoring.arrays import Decoder, Postings
from engine.scoring.arrays import Records as ScoringRecords
from engine.scoring.brute_force import widened
from engine.scoring.forward import Forward
from engine.store.base import Buffer, ObjectStore, Range
from engine.store.ranges import DEFAULT_POLICY, ReadPolicy, plan_reads

if TYPE_CHECKING:
    from engine.metadata.database import Database

P = ParamSpec("P")
T = TypeVar("T")
Uploads = Mapping[str, Buffer]
NO_UPLOADS: Uploads = {}
MAX_GET_BYTES = 16 << 20
"""Long sections are fetched in pieces of this size side by side: one connection to S3 brings about 80 MB/s."""


class Hot(msgspec.Struct, frozen=True):
    """What a search needs of a quantised segment before it looks at single documents; everything but the records.

    postings and forward serve stages 2 and 3; sizes says where each record lies; ids int64 (N,) whole document ids
    """

    reader: QuantisedReader
    postings: Postings
    forward: Forward
    sizes: Sizes
    ids: np.ndarray


class Parts:
    """Loads and keeps the pieces of all indices of a store. policy: which ranges share a request (read_ranges)."""

    def __init__(
        self, store: ObjectStore, memory: Memory, executor: ThreadPoolExecutor | None = None, policy: ReadPolicy = DEFAULT_POLICY
    ) -> None:
        self.store, self.memory, self.executor, self.policy = store, memory, executor, policy

    async def compute(self, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Run arithmetic on the executor's threads, so that the event loop stays free."""
        return await asyncio.get_running_loop().run_in_executor(self.executor, lambda: work(*args, **kwargs))

    # Deleted and changed documents

    async def tombstones(self, index: str, segment: SegmentRef, uploads: Uploads = NO_UPLOADS) -> np.ndarray:
        """Deleted ordinals, int64, rising."""
        ref = segment.tombstones
        if ref is None:
            return np.empty(0, np.int64)
        name = names.tombstones(ref.home or index, ref.id)
        if name in uploads:
            return read_tombstones(uploads[name], ref, segment.n_documents, name=name)

        async def load() -> tuple[np.ndarray, int]:
            ordinals = read_tombstones(await self._named(name), ref, segment.n_documents, name=name)
            return ordinals, ordinals.nbytes

        return await self.memory.get(("tombstones", ref.id), load)

    async def alive(self, index: str, segment: SegmentRef) -> np.ndarray | None:
        """bool (N,): documents that are not deleted; None if none is."""
        if segment.tombstones is None:
            return None
        mask = np.ones(segment.n_documents, bool)
        mask[await self.tombstones(index, segment)] = False
        return mask

    async def patches(self, index: str, segment: SegmentRef, uploads: Uploads = NO_UPLOADS) -> dict[int, dict[str, Any]]:
        """Changed fields by ordinal, all patches folded into one."""
        folded: dict[int, dict[str, Any]] = {}
        for ref in segment.patches:
            name = names.patch(ref.home or index, ref.id)

            async def load(name: str = name) -> tuple[Buffer, int]:
                data = await self._named(name)
                return data, len(data)

            data = uploads[name] if name in uploads else await self.memory.get(("patch", ref.id), load)
            for ordinal, row in read_patch(data, ref, segment.n_documents, name=name).items():
                folded[ordinal] = {**folded.get(ordinal, {}), **row}
        return folded

    # Ids

    async def ids(self, index: str, segment: SegmentRef) -> np.ndarray:
        """Document ids by ordinal, int64 (N,)."""
        if not any(ref.id == Section.IDS for ref in segment.sections):
            return np.arange(segment.n_documents, dtype=np.int64) + segment.base
        if segment.kind == "flat":
            return (await self.flat(index, segment)).ids
        hot = self.memory.peek(("hot", segment.id, segment.base))
        if hot is not None:
            return hot.ids

        async def load() -> tuple[np.ndarray, int]:
            ref = segment.section(Section.IDS)
            reader = self._quantised_reader(index, segment)
            ids = reader.ids(await self._range(reader.name, (ref.offset, ref.end)))
            return ids, ids.nbytes

        return await self.memory.get(("ids", segment.id, segment.base), load)

    async def live_ids(self, index: str, segment: SegmentRef, uploads: Uploads = NO_UPLOADS) -> np.ndarray:
        """Ids of the documents that are not deleted, int64, by ordinal."""
        ids = await self.ids(index, segment)
        return ids if segment.tombstones is None else np.delete(ids, await self.tombstones(index, segment, uploads))

    async def live_ordinals_of(self, index: str, segment: SegmentRef, wanted: np.ndarray, uploads: Uploads = NO_UPLOADS) -> np.ndarray:
        """Ordinals of the wanted ids (int64) that this segment holds and that are not deleted, in the order wanted."""
        wanted = wanted[(wanted >= segment.first_id) & (wanted <= segment.last_id)]
        if not len(wanted):
            return np.empty(0, np.int64)
        ordinals = find_ids(await self.ids(index, segment), wanted)
        ordinals = ordinals[ordinals >= 0]
        dead = await self.tombstones(index, segment, uploads)
        return ordinals[~np.isin(ordinals, dead)] if len(dead) else ordinals

    async def lowest_live_ids(self, index: str, manifest: Manifest, n: int, uploads: Uploads = NO_UPLOADS) -> np.ndarray:
        """The n least ids of live documents, int64 ascending. Reads only segments that can hold one of them."""
        lowest = np.empty(0, np.int64)
        for segment in sorted(manifest.segments, key=lambda segment: segment.first_id):
            if len(lowest) >= n and segment.first_id > lowest[n - 1]:
                break
            lowest = np.sort(np.concatenate([lowest, await self.live_ids(index, segment, uploads)]))[:n]
        return lowest

    async def ids_of_keys(self, index: str, manifest: Manifest, keys: Sequence[str], uploads: Uploads = NO_UPLOADS) -> np.ndarray:
        """Ids of the live documents with one of these external ids, int64."""
        found = await asyncio.gather(*(self._ids_of_keys(index, segment, keys, uploads) for segment in manifest.segments))
        return np.concatenate([np.empty(0, np.int64), *found])

    async def _ids_of_keys(self, index: str, segment: SegmentRef, keys: Sequence[str], uploads: Uploads) -> np.ndarray:
        if not segment.has_keys:
            return np.empty(0, np.int64)
        ordinals = (await self.keys(index, segment, uploads)).find(keys)
        ordinals = ordinals[ordinals >= 0]
        ids = (await self.ids(index, segment))[ordinals] if len(ordinals) else ordinals
        return ids[~np.isin(ordinals, await self.tombstones(index, segment, uploads))]

    async def keys(self, index: str, segment: SegmentRef, uploads: Uploads = NO_UPLOADS) -> Keys:
        """External ids of a segment that has some."""
        name = names.segment(segment.home or index, segment.id)
        if segment.kind == "flat":
            flat = self._read_flat(segment, uploads[name], name) if name in uploads else await self.flat(index, segment)
            assert flat.keys is not None
            return flat.keys

        async def load() -> tuple[Keys, int]:
            ref = segment.section(Section.KEYS)
            reader = self._quantised_reader(index, segment)
            return reader.keys(await self._range(reader.name, (ref.offset, ref.end))), ref.length

        return await self.memory.get(("keys", segment.id), load)

    # Segments and codecs

    async def codec(self, index: str, ref: CodecRef) -> Codec:
        """A whole codec, its centroids as float32."""

        async def load() -> tuple[Codec, int]:
            name = names.codec(ref.home or index, ref.id)
            data = await self._whole(name, ref.size_bytes)
            codec = await self.compute(read_codec, data, name=name, ref=ref)
            await self.compute(lambda: codec.centroids)
            return codec, ref.size_bytes + codec.centroids.nbytes

        return await self.memory.get(("codec", ref.id), load)

    async def flat(self, index: str, segment: SegmentRef) -> Flat:
        """A whole flat segment."""

        async def load() -> tuple[Flat, int]:
            name = names.segment(segment.home or index, segment.id)
            data = await self._whole(name, segment.size_bytes)
            return await self.compute(self._read_flat, segment, data, name), segment.size_bytes

        return await self.memory.get(("flat", segment.id, segment.base), load)

    async def widened(self, index: str, segment: SegmentRef) -> np.ndarray:
        """The tokens of a flat segment as float32 (T, D): widening them for each search would cost it half as much again."""

        async def load() -> tuple[np.ndarray, int]:
            tokens = (await self.flat(index, segment)).tokens
            wide = await self.compute(widened, tokens)
            return wide, wide.nbytes

        return await self.memory.get(("widened", segment.id), load)

    @staticmethod
    def _read_flat(segment: SegmentRef, data: Buffer, name: str) -> Flat:
        dim = segment.section(Section.TOKENS).length // 2 // max(segment.n_tokens, 1)
        return read_flat(segment, data, dim, name=name)

    async def hot(self, index: str, segment: SegmentRef, codec: CodecRef) -> Hot:
        """Everything of a quantised segment but its records, decoded."""

        async def load() -> tuple[Hot, int]:
            reader = self._quantised_reader(index, segment, codec)
            data = await self._span(reader.name, reader.hot_range)
            hot = await self.compute(_read_hot, reader, data)
            return hot, 3 * len(data)  # postings, their inversion, and the rest

        return await self.memory.get(("hot", segment.id, segment.base), load)

    def known_hot(self, segment: SegmentRef) -> Hot | None:
        """What `hot` would give, if it is in memory."""
        return self.memory.peek(("hot", segment.id, segment.base))

    async def records(self, index: str, segment: SegmentRef, codec: CodecRef) -> Records:
        """All records of a quantised segment: mapped, where the store has a file, else in memory."""

        async def load() -> tuple[Records, int]:
            hot = await self.hot(index, segment, codec)
            ref = segment.section(Section.RECORDS)
            data, size_bytes = await self._mapped_or_read(hot.reader.name, (ref.offset, ref.end))
            return await self.compute(hot.reader.records, data, hot.sizes), size_bytes

        return await self.memory.get(("records", segment.id), load)

    def known_records(self, segment: SegmentRef) -> Records | None:
        """What `records` would give, if it is in memory."""
        return self.memory.peek(("records", segment.id))

    @staticmethod
    def quantised_reader(index: str, segment: SegmentRef, codec: CodecRef) -> QuantisedReader:
        """The reader of a quantised segment's bytes."""
        return Parts._quantised_reader(index, segment, codec)

    @staticmethod
    def _quantised_reader(index: str, segment: SegmentRef, codec: CodecRef | None = None) -> QuantisedReader:
        """Without a codec only ids and keys can be read."""
        cell_offsets = codec.cell_offsets_array() if codec else np.zeros(1, np.int64)
        width = row_bytes(codec.dim, codec.nbits) if codec else 0
        return QuantisedReader(segment, cell_offsets, width, names.segment(segment.home or index, segment.id))

    # Fields

    async def fields(
        self, index: str, segment: SegmentRef, ordinals: np.ndarray, codec: CodecRef | None = None
    ) -> list[tuple[str | None, dict[str, Any] | None]]:
        """External id and fields of documents by ordinal, with patches applied. Reads the records of just those documents."""
        name = names.segment(segment.home or index, segment.id)
        if segment.kind == "flat":
            blobs = (await self.flat(index, segment)).blobs
            assert blobs is not None, "the whole object was read"
            section, wanted = int(Section.FIELDS), [blobs[n] for n in ordinals.tolist()]
        else:
            section, wanted = int(Section.RECORDS), await self._record_blobs(index, segment, ordinals, codec)
        found = [decode_fields(blob, name=name, section=section) for blob in wanted]
        return apply_patches(found, ordinals, await self.patches(index, segment))

    async def _record_blobs(self, index: str, segment: SegmentRef, ordinals: np.ndarray, codec: CodecRef | None) -> list[Buffer]:
        records = self.known_records(segment)
        if records is not None:
            return [records.blobs[n] for n in ordinals.tolist()]
        assert codec is not None, "the fields of a quantised segment need its codec's reference"
        some = await self.some_records(index, segment, codec, ordinals)
        return [some.blobs[n] for n in range(len(ordinals))]

    async def some_records(self, index: str, segment: SegmentRef, codec: CodecRef, ordinals: np.ndarray) -> Records:
        """The records of these ordinals (int64, any order), fetched by ranges and verified one by one."""
        reader = self._quantised_reader(index, segment, codec)
        sizes = await self.sizes(index, segment, codec)
        pieces = await self.read_ranges(reader.name, reader.record_ranges(ordinals, sizes))
        return await self.compute(reader.some_records, ordinals, pieces, sizes)

    async def sizes(self, index: str, segment: SegmentRef, codec: CodecRef) -> Sizes:
        """Where each record lies."""
        hot = self.known_hot(segment)
        if hot is not None:
            return hot.sizes

        async def load() -> tuple[Sizes, int]:
            ref = segment.section(Section.SIZES)
            reader = self._quantised_reader(index, segment, codec)
            return reader.sizes(await self._range(reader.name, (ref.offset, ref.end))), 2 * ref.length

        return await self.memory.get(("sizes", segment.id), load)

    def known_sizes(self, segment: SegmentRef) -> Sizes | None:
        """What `sizes` would give, if it is in memory."""
        hot = self.known_hot(segment)
        return self.memory.peek(("sizes", segment.id)) if hot is None else hot.sizes

    async def keep_sizes(self, segment: SegmentRef, sizes: Sizes) -> None:
        """Remember the sizes that somebody has read and verified along with other things."""

        async def load() -> tuple[Sizes, int]:
            return sizes, sizes.starts.nbytes + sizes.n_tokens.nbytes

        await self.memory.get(("sizes", segment.id), load)

    async def database(self, index: str, segment: SegmentRef, columns: Sequence[Column], tokenizer: str = "unicode61") -> Database:
        """The segment's metadata, patches applied, open for questions. Fetched when first asked for; sqlite3 is imported only then.

        tokenizer  of the index, for a segment that has no metadata but patches
        """
        from engine.metadata import database, database_file

        pairs = column_pairs(columns)

        async def load() -> tuple[Database, int]:
            patches = await self.patches(index, segment)
            if segment.metadata is None:
                stored_ids = await self.ids(index, segment) - segment.base
                source: bytes | str = await self.compute(database_file.empty, stored_ids, tokenizer)
            else:
                source = await self._database_source(index, segment, segment.metadata)
            size_bytes = len(source) if isinstance(source, bytes) else 0
            return await self.compute(database.Database, source, pairs, segment.base, patches or None), size_bytes

        patch_ids = tuple(ref.id for ref in segment.patches)
        return await self.memory.get(("database", segment.id, segment.base, patch_ids, pairs), load)

    async def _database_source(self, index: str, segment: SegmentRef, ref: ObjectRef) -> bytes | str:
        """The SQLite file's bytes, verified."""
        name = names.metadata(segment.home or index, segment.id)
        data = await self._whole(name, ref.size_bytes)
        found = await self.compute(checksum, data)
        if found != ref.checksum:
            raise CorruptData("not the metadata that the manifest names", object=name, expected=ref.checksum, found=found)
        return bytes(data)

    async def tokens(
        self, index: str, segment: SegmentRef, ordinals: np.ndarray, codec_ref: CodecRef | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Token vectors of some documents, decoded: float32 (T, D), offsets int64 (n + 1,)."""
        if codec_ref is None:
            flat = await self.flat(index, segment)
            runs = [flat.tokens[flat.offsets[n] : flat.offsets[n + 1]].astype(np.float32) for n in ordinals.tolist()]
            return np.concatenate(runs), np.cumsum([0, *map(len, runs)])
        codec = await self.codec(index, codec_ref)
        known = self.known_records(segment)
        if known is not None:
            return await self.compute(decode_records, codec, known, ordinals)
        some = await self.some_records(index, segment, codec_ref, ordinals)
        return await self.compute(decode_records, codec, some, np.arange(len(ordinals)))

    # Bytes

    async def local_path(self, index: str, segment: SegmentRef) -> str | None:
        """The file that holds a segment, if the store has one on this machine."""
        return await self.store.local_path(names.segment(segment.home or index, segment.id))

    async def read_ranges(self, name: str, ranges: Sequence[Range]) -> list[Buffer]:
        """The bytes of each range; neighbours share a request where that is cheaper (ranges.py)."""
        plan = plan_reads(ranges, self.policy)
        return plan.slice(await self.read_exactly(name, plan.gets))

    async def read_exactly(self, name: str, ranges: Sequence[Range]) -> list[Buffer]:
        """The bytes of each range, one request each, all in flight together."""
        try:
            return await self.store.get_ranges(name, ranges)
        except NotFound as error:
            raise missing(name) from error

    async def _range(self, name: str, wanted: Range) -> Buffer:
        return (await self.read_ranges(name, [wanted]))[0]

    async def _named(self, name: str) -> Buffer:
        """A small object, whole."""
        try:
            return (await self.store.get(name)).data
        except NotFound as error:
            raise missing(name) from error

    async def _whole(self, name: str, size_bytes: int) -> Buffer:
        return await self._span(name, (0, size_bytes))

    async def _span(self, name: str, span: Range) -> Buffer:
        """One long range as one buffer; long ones travel in pieces side by side."""
        start, end = span
        pieces = [(at, min(at + MAX_GET_BYTES, end)) for at in range(start, end, MAX_GET_BYTES)]
        found = await self.read_exactly(name, pieces)
        return found[0] if len(found) == 1 else b"".join(found)

    async def _mapped_or_read(self, name: str, span: Range) -> tuple[Buffer, int]:
        """(bytes, what they weigh in memory): mapped bytes belong to the page cache and weigh nothing here."""
        path = await self.store.local_path(name)
        if path is not None:
            try:
                return (await self.compute(_mapped, path))[span[0] : span[1]], 0
            except (OSError, ValueError):
                pass  # gone from the cache meanwhile
        data = await self._span(name, span)
        return data, len(data)


def _mapped(path: str) -> memoryview:
    with open(path, "rb") as file:
        return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))


def missing(name: str) -> CorruptData:
    """A manifest names an object that is not there."""
    return CorruptData("an object that the manifest names is gone", code="missing-object", object=name)


def apply_patches(
    rows: list[tuple[str | None, dict[str, Any] | None]], ordinals: np.ndarray, patches: Mapping[int, Mapping[str, Any]]
) -> list[tuple[str | None, dict[str, Any] | None]]:
    """Stored (key, fields) with changed fields over them."""
    if not patches:
        return rows
    return [
        (key, {**(fields or {}), **patches[ordinal]}) if ordinal in patches else (key, fields)
        for ordinal, (key, fields) in zip(ordinals.tolist(), rows, strict=True)
    ]


def decode_records(codec: Codec, records: Records, which: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Token vectors of the documents `which` (int64): float32 (T, D), unrotated, and offsets int64 (n + 1,)."""
    offsets = np.concatenate([[0], np.cumsum(records.n_tokens[which])])
    within = np.arange(offsets[-1]) - np.repeat(offsets[:-1], records.n_tokens[which])

    def at(starts: np.ndarray) -> np.ndarray:
        return within + np.repeat(starts[which], records.n_tokens[which])

    encoded = Encoded(
        records.codes[at(records.code_start)], records.scalars[at(records.scalar_start)], records.rows[at(records.residual_start)]
    )
    return decode(codec, encoded), offsets


def scoring_records(records: Records) -> ScoringRecords:
    """The arrays that the kernels read, under the kernels' names."""
    return ScoringRecords(
        rows=records.rows,
        codes=records.codes,
        scalars=records.scalars,
        residual_start=records.residual_start,
        code_start=records.code_start,
        scalar_start=records.scalar_start,
        n_tokens=records.n_tokens,
    )


def decoder_of(codec: Codec) -> Decoder:
    """How the kernels turn a codec's bytes back into numbers."""
    return Decoder(codec.levels, codec.inv_table, codec.scale_table, codec.dim, codec.nbits)


def _read_hot(reader: QuantisedReader, data: Buffer) -> Hot:
    sections = reader.cut_hot(data)
    stored = reader.postings(sections[Section.POSTINGS], verify=False)
    postings = Postings(stored.offsets, stored.ordinals)
    return Hot(
        reader=reader,
        postings=postings,
        forward=Forward.from_postings(postings, reader.ref.n_documents),
        sizes=reader.sizes(sections[Section.SIZES], verify=False),
        ids=reader.ids(sections[Section.IDS], verify=False),
    )
