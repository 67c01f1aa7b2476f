"""Every object name of an index, spelt here and nowhere else. Names are relative to the root that the store was opened with."""

from __future__ import annotations

import re
from typing import Final, Literal

CURRENT: Final = "CURRENT"
GENERATION_DIGITS: Final = 16
_ULID = re.compile(r"[0-9A-HJKMNP-TV-Z]{26}")
_PIN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


def fresh_id() -> str:
    """A new ULID: 26 characters, sorts by creation time, never repeats."""
    from ulid import ULID  # asks importlib.metadata for its version: 30 ms, which a reader need not pay

    return str(ULID())


def is_id(text: str) -> bool:
    return _ULID.fullmatch(text) is not None


def is_pin_name(text: str) -> bool:
    return _PIN.fullmatch(text) is not None


def current(index: str) -> str:
    return f"{index}/{CURRENT}"


def manifests(index: str) -> str:
    return f"{index}/manifests/"


def manifest(index: str, index_id: str, generation: int) -> str:
    """A superseded generation. `index_id` keeps an index apart from an earlier one of the same name that is still being deleted."""
    return f"{index}/manifests/{generation:0{GENERATION_DIGITS}d}-{index_id}"


def generation_of(name: str) -> tuple[str, int]:
    """(index_id, generation) that the object name of a manifest spells; ValueError if it is not one."""
    head, _, last = name.rpartition("/")
    digits, _, index_id = last.partition("-")
    if not head.endswith("/manifests") or len(digits) != GENERATION_DIGITS or not digits.isdigit() or not is_id(index_id):
        raise ValueError(f"not the name of a manifest: {name}")
    return index_id, int(digits)


def codec(index: str, codec_id: str) -> str:
    return f"{index}/codecs/{codec_id}"


def segments(index: str) -> str:
    return f"{index}/segments/"


def segment(index: str, segment_id: str) -> str:
    return f"{index}/segments/{segment_id}/data"


def metadata(index: str, segment_id: str) -> str:
    return f"{index}/segments/{segment_id}/metadata.sqlite"


def tombstones(index: str, tombstones_id: str) -> str:
    return f"{index}/tombstones/{tombstones_id}"


def patch(index: str, patch_id: str) -> str:
    return f"{index}/patches/{patch_id}"


def pins(index: str) -> str:
    return f"{index}/pins/"


def pin(index: str, name: str) -> str:
    return f"{index}/pins/{name}"


def branches(index: str) -> str:
    return f"{index}/branches/"


def branch(index: str, name: str) -> str:
    """Marker in the home index: the index `name` refers to objects of `index`."""
    return f"{index}/branches/{name}"


def sweeps(index: str) -> str:
    return f"{index}/sweeps/"


def sweep(index: str, sweep_id: str) -> str:
    """Marker of a garbage collection under way: what it is about to delete."""
    return f"{index}/sweeps/{sweep_id}"


def builds(index: str) -> str:
    return f"{index}/builds/"


def build(index: str, build_id: str, part: int) -> str:
    """Progress of a resumable bulk build: one record for each finished segment, numbered."""
    return f"{index}/builds/{build_id}/{part:08d}"


def uploads(index: str) -> str:
    return f"{index}/uploads/"


def upload(index: str, upload_id: str, part: Literal["data", "claim", "receipt"]) -> str:
    """A presigned upload: what the client put there, the generation from which on its commit must be looked for, and what came of it."""
    return f"{index}/uploads/{upload_id}/{part}"


def download(index: str, download_id: str) -> str:
    """A large answer that a client fetches by a presigned address. Among the uploads: both are forgotten after a day."""
    return f"{index}/uploads/{download_id}/answer"


def aliases() -> str:
    return "_aliases/"


def alias(name: str) -> str:
    """An alias may not be mistaken for an index: no index name starts with an underscore."""
    return f"_aliases/{name}"


def records(kind: str, index: str) -> str:
    """What was done to an index from outside: kind is "backups" or "drills". Like an alias, outside every index."""
    return f"_records/{kind}/{index}/"


def record(kind: str, index: str, record_id: str) -> str:
    return f"_records/{kind}/{index}/{record_id}"


def of_index(index: str) -> str:
    """Prefix of everything an index owns."""
    return f"{index}/"
