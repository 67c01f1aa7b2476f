"""Reading everything that an index names, and checking every checksum and every reference. Writes nothing."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

import numpy as np

from engine.errors import CorruptData, EngineError, NotFound
from engine.format import names
from engine.format.codec_object import read_codec
from engine.format.envelope import checksum
from engine.format.manifest import CodecRef, Manifest, SegmentRef
from engine.format.verify import verify_segment
from engine.index.parts import Parts, missing
from engine.index.reader import Reader, Snapshot
from engine.index.snapshots import generations, manifest_at

Progress = Callable[[str, int, int], None]


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
        self.parts: Parts = reader.parts
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
        for codec in manifest.codecs:
            await self._check(f"codec {codec.id}", self._verify_codec(codec))
        for number, segment in enumerate(manifest.segments):
            self.progress("verify", number, len(manifest.segments))
            if await self._check(f"segment {segment.id}", self._verify_segment(manifest, segment)):
                await self._check(f"segment {segment.id}", self._verify_additions(manifest, segment))
        await self._check("ids", self._verify_ids(manifest))

    async def _once(self, name: str, size_bytes: int) -> bytes | None:
        """The whole object, straight from the store; None if it was verified already."""
        if name in self._seen:
            return None
        try:
            data = (await self.parts.store.get(name)).data
        except NotFound as error:
            raise missing(name) from error
        if len(data) != size_bytes:
            raise CorruptData("object has another size", code="malformed", object=name, expected=size_bytes, found=len(data))
        self._seen.add(name)
        self.report.n_objects += 1
        self.report.n_bytes += len(data)
        return data  # type: ignore[return-value]

    async def _verify_codec(self, ref: CodecRef) -> None:
        name = names.codec(ref.home or self.index, ref.id)
        data = await self._once(name, ref.size_bytes)
        if data is not None:
            await self.parts.compute(read_codec, data, name=name, ref=ref)

    async def _verify_segment(self, manifest: Manifest, segment: SegmentRef) -> None:
        name = names.segment(segment.home or self.index, segment.id)
        data = await self._once(name, segment.size_bytes)
        if data is None:
            return
        self.report.n_documents += segment.n_documents
        self.report.n_tokens += segment.n_tokens
        codec = None if segment.kind == "flat" else manifest.codec_of(segment)
        await self.parts.compute(verify_segment, data, segment, codec, manifest.dim or 0, name=name)

    async def _verify_additions(self, manifest: Manifest, segment: SegmentRef) -> None:
        """Tombstones, patches and metadata of a segment."""
        dead = await self.parts.tombstones(self.index, segment)
        patches = await self.parts.patches(self.index, segment)
        self.report.n_objects += (segment.tombstones is not None) + len(segment.patches)
        del dead, patches
        if segment.metadata is not None:
            name = names.metadata(segment.home or self.index, segment.id)
            data = await self._once(name, segment.metadata.size_bytes)
            if data is not None and checksum(data) != segment.metadata.checksum:
                raise CorruptData(
                    "metadata differ from what was written", object=name, expected=segment.metadata.checksum, found=checksum(data)
                )

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
