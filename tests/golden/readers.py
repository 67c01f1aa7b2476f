"""What reads each golden object: as a whole, the way a process does that trusts nothing but the manifest."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from engine.format import codec_object, manifest, markers, patch, tombstones
from engine.format.verify import verify_segment

HERE = Path(__file__).parent / "v1"
MARKERS = {
    "pin": markers.Pin,
    "branch": markers.Branch,
    "sweep": markers.Sweep,
    "alias": markers.Alias,
    "build": markers.BuildProgress,
    "upload_receipt": markers.Upload,
    "deletion": markers.Deletion,
}


def golden_readers() -> dict[str, Callable[[bytes], object]]:
    """By file name."""
    current = manifest.decode_manifest((HERE / "manifest").read_bytes(), name="manifest")
    flat, flat_ids, quantised = current.segments
    assert quantised.tombstones is not None
    graves, changed, codec = quantised.tombstones, quantised.patches[0], current.codecs[0]
    return {
        "manifest": lambda data: manifest.decode_manifest(data, name="x"),
        "codec": lambda data: codec_object.read_codec(data, name="x", ref=codec),
        "segment_flat": lambda data: verify_segment(data, flat, None, 10, name="x"),
        "segment_flat_ids": lambda data: verify_segment(data, flat_ids, None, 10, name="x"),
        "segment_quantised": lambda data: verify_segment(data, quantised, codec, 10, name="x"),
        "tombstones": lambda data: tombstones.read_tombstones(data, graves, 5, name="x"),
        "patch": lambda data: patch.read_patch(data, changed, 5, name="x"),
        **{name: lambda data, kind=kind: markers.read_marker(data, kind, name="x") for name, kind in MARKERS.items()},
    }
