"""Which objects a manifest names. Garbage collection, verification and copying all ask here."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import msgspec

from engine.format import names
from engine.format.manifest import CodecRef, Manifest, SegmentRef


def objects_of(manifest: Manifest, index: str) -> set[str]:
    """Names of all objects that a reader of this generation may fetch, wherever their home is."""
    found = {names.codec(codec.home or index, codec.id) for codec in manifest.codecs}
    for segment in manifest.segments:
        found.update(_of_segment(segment, index))
    return found


def _of_segment(segment: SegmentRef, index: str) -> Iterator[str]:
    home = segment.home or index
    yield names.segment(home, segment.id)
    if segment.metadata is not None:
        yield names.metadata(home, segment.id)
    if segment.tombstones is not None:
        yield names.tombstones(segment.tombstones.home or index, segment.tombstones.id)
    for patch in segment.patches:
        yield names.patch(patch.home or index, patch.id)


def homes_of(manifest: Manifest, index: str) -> set[str]:
    """The other indices whose prefixes hold objects of this generation."""
    return {name.partition("/")[0] for name in objects_of(manifest, index)} - {index}


def rehomed(manifest: Manifest, index: str) -> Manifest:
    """The same documents as seen from another index: every reference says whose prefix it lies under."""
    return _settled(manifest, lambda home: home or index)


def standalone(manifest: Manifest) -> Manifest:
    """The same documents as they are named where every object lies under the index's own prefix: in a copy. Itself if they do already."""
    return manifest if not homes_of(manifest, "") else _settled(manifest, lambda home: "")


def _settled(manifest: Manifest, home_of: Callable[[str], str]) -> Manifest:
    """Every home replaced."""

    def settle(ref: CodecRef | SegmentRef) -> CodecRef | SegmentRef:
        changes: dict[str, object] = {"home": home_of(ref.home)}
        if isinstance(ref, SegmentRef):
            if ref.tombstones is not None:
                changes["tombstones"] = msgspec.structs.replace(ref.tombstones, home=home_of(ref.tombstones.home))
            changes["patches"] = tuple(msgspec.structs.replace(patch, home=home_of(patch.home)) for patch in ref.patches)
        return msgspec.structs.replace(ref, **changes)

    return msgspec.structs.replace(
        manifest, codecs=tuple(settle(ref) for ref in manifest.codecs), segments=tuple(settle(ref) for ref in manifest.segments)
    )
