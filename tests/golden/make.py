"""Makes tests/golden/v1: one small object of every kind, and what a reader must find in them (expected.json).

    python -m tests.golden.make                       writes files that are not there yet; refuses to change one that is
    python -m tests.golden.make --force-unreleased    writes all again: only before the release that first writes this format version

Released bytes are read for ever and never rewritten: a new format version gets a directory of its own and a copy of this script's recipe.
The content is arithmetic (no BLAS, no random generator of a library), so the script gives the same bytes on every machine.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from engine.codec import bitpack
from engine.codec.residual import Codec
from engine.config import IndexConfig
from engine.format import codec_object, fields, manifest, markers, patch, segment, tombstones
from engine.format.records import Records, records_of_tokens

HERE = Path(__file__).parent / "v1"
DIM, NBITS, N_CENTROIDS = 10, 2, 5
CELL_OFFSETS = np.array([0, 2, 2, 5])
"""Three cells, the middle one empty. 10 dimensions at 2 bits are 3 bytes in a row of 4; a block of 14-byte centroids is not aligned."""

IDS = {
    name: f"01J00000000000000000000{number:03d}"
    for number, name in enumerate(
        ["index", "writer", "codec", "flat", "flat_ids", "quantised", "tombstones", "patch", "pin", "alias", "build", "deletion"]
    )
}
LENGTHS = np.array([3, 0, 1, 4, 2])
KEYS: list[str | None] = ["alpha", None, "βeta", "gamma", None]
FIELDS: list[dict[str, Any] | None] = [
    {"title": "One", "year": 1999},
    None,
    {},
    {"tags": ["a", "b"], "score": -0.5, "note": None},
    {"ok": True},
]


def noise(seed: int, n: int) -> np.ndarray:
    """n well-mixed uint64 (splitmix64 of seed, seed + 1, ...)."""
    z = (np.arange(n, dtype=np.uint64) + np.uint64(seed << 32)) * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def eighths(seed: int, *shape: int) -> np.ndarray:
    """float32 multiples of 1/8 in -2..2: exact in float16, and sums of products are exact in any order."""
    return ((noise(seed, int(np.prod(shape))) % 33).astype(np.float32) - 16).reshape(shape) / 8


def offsets() -> np.ndarray:
    return np.r_[0, np.cumsum(LENGTHS)]


def blobs() -> list[bytes]:
    return [fields.encode_fields(key, values) for key, values in zip(KEYS, FIELDS, strict=True)]


def codec() -> Codec:
    rotation = np.zeros((DIM, DIM), np.float32)
    rotation[np.arange(DIM), (np.arange(DIM) * 3 + 1) % DIM] = np.where(np.arange(DIM) % 2, -1, 1)
    return Codec(
        dim=DIM,
        nbits=NBITS,
        seed=42,
        rotation=rotation,
        coarse=eighths(1, 3, DIM),
        cell_offsets=CELL_OFFSETS,
        centroids_i8=(noise(2, N_CENTROIDS * DIM) % 255).astype(np.int16).reshape(-1, DIM).__sub__(127).astype(np.int8),
        centroid_scales=np.array([1, 2, 3, 4, 5], np.float32) / 1024,
        cutoffs=np.array([-1, 0, 1], np.float32),
        levels=np.array([-1.5, -0.5, 0.5, 1.5], np.float32),
        inv_table=np.arange(256, dtype=np.float32) / 128,
        scale_table=np.arange(256, dtype=np.float32) / 256,
    )


def encoded() -> Records:
    n_tokens = int(LENGTHS.sum())
    codes = np.array([4, 0, 4, 1, 3, 3, 0, 4, 1, 1], np.uint16)
    scalars = (noise(3, 2 * n_tokens) % 256).astype(np.uint8).reshape(-1, 2)
    buckets = (noise(4, DIM * n_tokens) % (1 << NBITS)).astype(np.uint8).reshape(-1, DIM)
    return records_of_tokens(codes, scalars, bitpack.pack(buckets, NBITS), offsets(), blobs())


def objects() -> dict[str, bytes]:
    """Every golden object by file name."""
    tokens = eighths(5, int(LENGTHS.sum()), DIM).astype(np.float16)
    flat = segment.write_flat(IDS["flat"], tokens, offsets(), blobs=blobs(), keys=KEYS, base=100)
    flat_ids = segment.write_flat(IDS["flat_ids"], tokens, offsets(), ids=np.array([41, 7, 300, 8, 9]), base=5)
    codec_data, codec_ref = codec_object.write_codec(codec(), IDS["codec"], n_tokens_trained=1000)
    order = np.array([3, 0, 4, 1, 2])
    quantised = segment.write_quantised(
        IDS["quantised"],
        [(np.array([20, 21, 22, 25, 24]), encoded())],
        dim=DIM,
        nbits=NBITS,
        codec_id=IDS["codec"],
        cell_offsets=CELL_OFFSETS,
        order=order,
        keys=[KEYS[document] for document in order],
        base=20,
    )
    tombstones_data, tombstones_ref = tombstones.write_tombstones(np.array([4, 1]), IDS["tombstones"])
    patch_data, patch_ref = patch.write_patch({2: {"year": 2001, "title": None}, 0: {"title": "Une"}}, IDS["patch"], home="mother")
    amended = msgspec.structs.replace(
        quantised.ref,
        tombstones=tombstones_ref,
        patches=(patch_ref,),
        metadata=manifest.ObjectRef(id=IDS["quantised"], size_bytes=8192, checksum=(1 << 64) - 1),
    )
    current = manifest.Manifest(
        index_id=IDS["index"],
        generation=7,
        created_s=1764000000.25,
        cause="golden",
        writer=IDS["writer"],
        config=IndexConfig(nbits=NBITS, seed=42),
        dim=DIM,
        next_id=1000,
        codecs=(codec_ref,),
        segments=(flat.ref, flat_ids.ref, amended),
        columns=(manifest.Column(name="title", type="TEXT"), manifest.Column(name="year", type="INTEGER")),
    )
    index = "library"
    return {
        "manifest": manifest.encode_manifest(current),
        "codec": bytes(codec_data),
        "segment_flat": bytes(flat.data),
        "segment_flat_ids": bytes(flat_ids.data),
        "segment_quantised": bytes(quantised.data),
        "tombstones": tombstones_data,
        "patch": patch_data,
        "pin": markers.write_marker(
            markers.Pin(created_s=1764000000.5, index_id=IDS["index"], generation=7, id=IDS["pin"], note="before the move")
        ),
        "branch": markers.write_marker(markers.Branch(created_s=1764000000.5, index=index, generation=6)),
        "sweep": markers.write_marker(
            markers.Sweep(created_s=1764000000.5, writer=IDS["writer"], names=("library/segments/x/data",), generations=(1, 2))
        ),
        "alias": markers.write_marker(markers.Alias(created_s=1764000000.5, index=index, id=IDS["alias"])),
        "build": markers.write_marker(
            markers.BuildProgress(
                created_s=1764000000.5,
                id=IDS["build"],
                part=2,
                source="s3://bucket/corpus",
                n_documents=5,
                objects=("library/x",),
                segment=flat.ref,
            )
        ),
        "upload_claim": markers.write_marker(markers.Upload(created_s=1764000000.5, index_id=IDS["index"], generation=6)),
        "upload_receipt": markers.write_marker(
            markers.Upload(created_s=1764000000.5, index_id=IDS["index"], generation=7, first_id=995, last_id=999)
        ),
        "deletion": markers.write_marker(
            markers.Deletion(created_s=1764000000.5, index_id=IDS["index"], generation=8, id=IDS["deletion"])
        ),
    }


def expected() -> dict[str, Any]:
    """What is in them, from the same sources and past all writers: plain lists, floats exact."""
    trained, records = codec(), encoded()
    buckets = bitpack.unpack(records.rows, DIM, NBITS)
    decoded = trained.inv_table[records.scalars[:, :1]] * trained.centroids[records.codes]
    decoded = decoded + trained.scale_table[records.scalars[:, 1:]] * trained.levels[buckets]
    order = [3, 0, 4, 1, 2]
    codes = np.split(records.codes, offsets()[1:-1])
    return {
        "keys": KEYS,
        "fields": FIELDS,
        "lengths": LENGTHS.tolist(),
        "flat": {"ids": list(range(100, 105)), "tokens": eighths(5, int(LENGTHS.sum()), DIM).tolist()},
        "flat_ids": {"ids": [41, 7, 300, 8, 9]},
        "quantised": {
            "ids": [25, 20, 24, 21, 22],
            "documents": order,
            "codes": [codes[document].tolist() for document in order],
            "postings": [[n for n, document in enumerate(order) if code in codes[document]] for code in range(N_CENTROIDS)],
            "decoded": [part.tolist() for part in (np.split(decoded, offsets()[1:-1])[document] for document in order)],
        },
        "codec": {"coarse_in_query_space": (trained.coarse @ trained.rotation.T).tolist(), "cell_offsets": CELL_OFFSETS.tolist()},
        "tombstones": [1, 4],
        "patch": {"0": {"title": "Une"}, "2": {"year": 2001, "title": None}},
        "manifest": {"generation": 7, "next_id": 1000, "ids": IDS},
    }


def files() -> dict[str, bytes]:
    """Every file of the directory."""
    return {**objects(), "expected.json": (json.dumps(expected(), ensure_ascii=False, indent=1) + "\n").encode()}


def main(arguments: list[str]) -> int:
    HERE.mkdir(exist_ok=True)
    changed = [name for name, data in files().items() if (HERE / name).exists() and (HERE / name).read_bytes() != data]
    if changed and "--force-unreleased" not in arguments:
        print(f"refused: these golden files are there with other bytes: {' '.join(changed)}", file=sys.stderr)
        return 1
    for name, data in files().items():
        (HERE / name).write_bytes(data)
    print(f"{len(files())} files in {HERE.name}, {sum(map(len, files().values()))} bytes")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
