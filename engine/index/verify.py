"""Reading everything that an index names, and checking every checksum and every reference. Writes nothing.

`expected_objects` says how each object of a generation is recognised; copying and recovery (engine/transfer, undelete.py) ask it too.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from functools import partial

import numpy as np

from engine.errors import CorruptData, EngineError, NotFound
from engine.format import names
from engine.format.codec_object import read_codec
from engine.format.envelope import checksum
from engine.format.manifest import CodecRef, Manifest, ObjectRef, SegmentRef
from engine.format.patch import read_patch
from engine.format.tombstones import read_tombstones
from engine.format.verify import verify_segment
from engine.index.parts import missing
from engine.index.reader import Reader, Snapshot
from engine.index.snapshots import generations, manifest_at
from engine.store.base import Buffer

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Expected:
    """An object that a generation names.

    part   of the manifest, for people: "segment 01..."
    check  takes the whole object's bytes; raises CorruptData or UnsupportedFormat if they are not what was written. Arithmetic only.
    """

    name: str
    part: str
    size_bytes: int
    check: Callable[[Buffer], object]
    n_documents: int = 0
    n_tokens: int = 0

    def verify(self, data: Buffer) -> None:
        """Raises CorruptData or UnsupportedFormat."""
        if len(data) != self.size_bytes:
            raise CorruptData("object has another size", code="malformed", object=self.name, expected=self.size_bytes, found=len(data))
        self.check(data)


def expected_objects(manifest: Manifest, index: str) -> Iterator[Expected]:
    """Every object that a reader of this generation may fetch, in the manifest's order; as many as references.objects_of names."""
    for codec in manifest.codecs:
        yield _codec(codec, index)
    for segment in manifest.segments:
        home, part = segment.home or index, f"segment {segment.id}"
        name = names.segment(home, segment.id)
        codec_ref = None if segment.kind == "flat" else manifest.codec_of(segment)
        check = partial(_check_segment, ref=segment, codec=codec_ref, dim=manifest.dim or 0, name=name)
        yield Expected(name, part, segment.size_bytes, check, segment.n_documents, segment.n_tokens)
        if segment.metadata is not None:
            name = names.metadata(home, segment.id)
            yield Expected(name, part, segment.metadata.size_bytes, partial(_check_metadata, ref=segment.metadata, name=name))
        if (dead := segment.tombstones) is not None:
            name = names.tombstones(dead.home or index, dead.id)
            yield Expected(name, part, dead.size_bytes, partial(read_tombstones, ref=dead, n_documents=segment.n_documents, name=name))
        for patch in segment.patches:
            name = names.patch(patch.home or index, patch.id)
            yield Expected(name, part, patch.size_bytes, partial(read_patch, ref=patch, n_documents=segment.n_documents, name=name))


def _codec(ref: CodecRef, index: str) -> Expected:
    name = names.codec(ref.home or index, ref.id)
    return Expected(name, f"codec {ref.id}", ref.size_bytes, partial(read_codec, name=name, ref=ref))


def _check_segment(data: Buffer, *, ref: SegmentRef, codec: CodecRef | None, dim: int, name: str) -> None:
    verify_segment(data, ref, codec, dim, name=name)


def _check_metadata(data: Buffer, *, ref: ObjectRef, name: str) -> None:
    if (found := checksum(data)) != ref.checksum:
        raise CorruptData("metadata differ from what was written", object=name, expected=ref.checksum, found=found)


@dataclass
class VerifyReport:
    """What was read and what is wrong with it. problems: one line each, with the object's name; none means all is well."""

    n_generations: int = 0
    n_objects: int = 0
    n_bytes: int = 0
    n_documents: int = 0
    n_tokens: int = 0
    problems: list[str] = field(default_factory=list)


class Verifier:
    """One verification of one index. Objects that several generations share are read once."""

    def __init__(self, reader: Reader, index: str, progress: Progress | None = None) -> None:
        self.reader, self.index = reader, index
        self.progress = progress or (lambda *_: None)
        self.report = VerifyReport()
        self._seen: set[str] = set()

    async def run(self, *, all_generations: bool = False) -> VerifyReport:
        """Verify the generation in force, or all that are kept. Raises NotFound if there is no such index."""
        head = await self.reader.head(self.index)
        wanted = [head.manifest.generation]
        if all_generations:
            wanted = [line.generation for line in await generations(self.reader.store, self.index)]
        for number in wanted:
            await self._check(f"generation {number}", self._verify_generation(number))
        return self.report

    async def _check(self, what: str, work: Awaitable[None]) -> bool:
        try:
            await work
        except (CorruptData, NotFound) as error:
            self.report.problems.append(f"{what}: {error}")
            return False
        except EngineError as error:
            self.report.problems.append(f"{what}: could not be read: {error}")
            return False
        return True

    async def _verify_generation(self, generation: int) -> None:
        manifest = await manifest_at(self.reader.store, self.index, generation)
        self.report.n_generations += 1
        wanted = list(expected_objects(manifest, self.index))
        for number, expected in enumerate(wanted):
            self.progress("verify", number, len(wanted))
            if expected.name not in self._seen:
                await self._check(expected.part, self._verify_object(expected))
        await self._check("ids", self._verify_ids(manifest))

    async def _verify_object(self, expected: Expected) -> None:
        """The whole object, straight from the store."""
        try:
            data = (await self.reader.store.get(expected.name)).data
        except NotFound as error:
            raise missing(expected.name) from error
        await self.reader.parts.compute(expected.verify, data)
        self._seen.add(expected.name)
        self.report.n_objects += 1
        self.report.n_bytes += len(data)
        self.report.n_documents += expected.n_documents
        self.report.n_tokens += expected.n_tokens

    async def _verify_ids(self, manifest: Manifest) -> None:
        """No document twice, none beyond next_id."""
        ids = await Snapshot(self.reader, self.index, manifest).live_ids()
        if len(np.unique(ids)) != len(ids):
            raise CorruptData("a document id occurs twice", code="malformed", generation=manifest.generation)
        if len(ids) and ids[-1] >= manifest.next_id:
            raise CorruptData("a document id is beyond next_id", code="malformed", found=int(ids[-1]), expected=manifest.next_id)


async def verify(reader: Reader, index: str, *, all_generations: bool = False, progress: Progress | None = None) -> VerifyReport:
    """Verify an index. Cost: everything it names is read once."""
    return await Verifier(reader, index, progress).run(all_generations=all_generations)
