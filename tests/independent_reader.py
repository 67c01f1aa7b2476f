"""A second reader of the format, written from engine/format/FORMAT.md and nothing else: no line of the engine is imported here.

If it and the engine disagree about golden bytes, the document or the code is wrong. It is slow, plain, and strict only where FORMAT.md is.
"""

from __future__ import annotations

import itertools
import struct
from typing import Any

import msgspec
import numpy as np
import xxhash

MANIFEST, CODEC, FLAT, QUANTISED, TOMBSTONES, PATCH, PIN, BRANCH, SWEEP, ALIAS, BUILD, UPLOAD, DELETION = range(1, 14)


def frame(data: bytes) -> tuple[int, dict[int, bytes]]:
    """FORMAT.md, The frame: the kind, and the bytes of each section by id."""
    assert data[:8] == b"TARTAN\r\n"
    kind, version, n_sections, size, header_checksum = struct.unpack("<HHIQQ", data[8:32])
    table = data[32 : 32 + 32 * n_sections]
    assert version == 1
    assert size == len(data)
    assert xxhash.xxh3_64_intdigest(data[:24] + table) == header_checksum
    sections = {}
    end = 32 + 32 * n_sections
    for row in range(n_sections):
        number, zero, offset, length, checksum = struct.unpack_from("<IIQQQ", table, 32 * row)
        assert zero == 0
        assert offset == (end + 63) // 64 * 64
        assert data[end:offset] == bytes(offset - end)
        sections[number] = data[offset : offset + length]
        assert xxhash.xxh3_64_intdigest(sections[number]) == checksum
        end = offset + length
    assert end == len(data)
    return kind, sections


def body(data: bytes, kind: int) -> Any:
    """FORMAT.md, Objects that are one structure."""
    found, sections = frame(data)
    assert found == kind
    assert list(sections) == [1]
    return msgspec.msgpack.decode(sections[1])


def keys(section: bytes) -> dict[str, int]:
    """FORMAT.md, keys: the ordinal of each key."""
    n, zero = struct.unpack_from("<II", section)
    assert zero == 0
    hashes = struct.unpack_from(f"<{n}Q", section, 8)
    ordinals = struct.unpack_from(f"<{n}I", section, 8 + 8 * n)
    ends = struct.unpack_from(f"<{n + 1}I", section, 8 + 12 * n)
    blob = section[12 + 16 * n :]
    raw = [blob[ends[i] : ends[i + 1]] for i in range(n)]
    assert list(hashes) == sorted(hashes)
    assert [xxhash.xxh3_64_intdigest(key) for key in raw] == list(hashes)
    return {key.decode(): ordinal for key, ordinal in zip(raw, ordinals, strict=True)}


def fields(blob: bytes) -> tuple[str | None, dict[str, Any] | None]:
    """FORMAT.md, fields of a document."""
    if not blob:
        return None, None
    key, values = msgspec.msgpack.decode(blob)
    return key, values


def flat(data: bytes, base: int) -> dict[str, Any]:
    """FORMAT.md, Flat segment."""
    kind, sections = frame(data)
    assert kind == FLAT
    meta = msgspec.msgpack.decode(sections[2])
    n = meta["n_documents"]
    lengths = struct.unpack(f"<{n}I", sections[10])
    ids = struct.unpack(f"<{n}q", sections[3]) if 3 in sections else range(n)
    at = struct.unpack(f"<{n + 1}Q", sections[12])
    return {
        "lengths": list(lengths),
        "ids": [base + number for number in ids],
        "tokens": np.frombuffer(sections[11], "<f2").reshape(-1, meta["dim"]).tolist(),
        "fields": [fields(sections[13][at[i] : at[i + 1]]) for i in range(n)],
        "keys": keys(sections[9]) if 9 in sections else {},
    }


def codec(data: bytes) -> dict[str, Any]:
    """FORMAT.md, Codec."""
    kind, sections = frame(data)
    assert kind == CODEC
    meta = msgspec.msgpack.decode(sections[2])
    dim, cells = meta["dim"], struct.unpack(f"<{meta['n_cells'] + 1}I", sections[36])
    checksums = struct.unpack(f"<{meta['n_cells']}Q", sections[37])
    centroids = []
    for cell, (first, last) in enumerate(itertools.pairwise(cells)):
        block = sections[40][(dim + 4) * first : (dim + 4) * last]
        assert xxhash.xxh3_64_intdigest(block) == checksums[cell]
        scales = struct.unpack_from(f"<{last - first}f", block)
        rows = np.frombuffer(block, "i1", offset=4 * (last - first)).reshape(last - first, dim)
        centroids += [[scale * number for number in row.tolist()] for scale, row in zip(scales, rows, strict=True)]
    return {
        **meta,
        "cell_offsets": list(cells),
        "centroids": np.array(centroids),
        "levels": np.frombuffer(sections[32], "<f4"),
        "cutoffs": np.frombuffer(sections[33], "<f4"),
        "inv_table": np.frombuffer(sections[34], "<f4"),
        "scale_table": np.frombuffer(sections[35], "<f4"),
        "rotation": np.frombuffer(sections[38], "<f4").reshape(dim, dim),
        "coarse": np.frombuffer(sections[39], "<f4").reshape(-1, dim),
    }


def bucket(row: bytes, dimension: int, dim: int, nbits: int) -> int:
    """FORMAT.md, Residual rows: the bucket number of one dimension."""
    payload = -(-dim * nbits // 8)
    field, byte = divmod(dimension, payload)
    return row[byte] >> (field * nbits) & ((1 << nbits) - 1)


def record(section: bytes, start: int, size: int, ordinal: int, codec: dict[str, Any]) -> dict[str, Any]:
    """FORMAT.md, Records: one document, its tokens decoded in the codec's space."""
    dim, nbits = codec["dim"], codec["nbits"]
    row_bytes = (-(-dim * nbits // 8) + 3) // 4 * 4
    data = section[start : start + size]
    checksum, number, n_tokens, n_fields = struct.unpack_from("<QqII", data)
    assert xxhash.xxh3_64_intdigest(data[8:], ordinal) == checksum
    codes = struct.unpack_from(f"<{n_tokens}H", data, 24)
    scalars = data[24 + 2 * n_tokens : 24 + 4 * n_tokens]
    residuals = -(-(24 + 4 * n_tokens + n_fields) // row_bytes) * row_bytes
    assert residuals + n_tokens * row_bytes == size
    assert start % row_bytes == 0
    decoded = []
    for token, code in enumerate(codes):
        row = data[residuals + token * row_bytes :][:row_bytes]
        inv, scale = codec["inv_table"][scalars[2 * token]], codec["scale_table"][scalars[2 * token + 1]]
        levels = np.array([codec["levels"][bucket(row, dimension, dim, nbits)] for dimension in range(dim)])
        decoded.append((inv * codec["centroids"][code] + scale * levels).tolist())
    return {
        "id": number,
        "codes": list(codes),
        "decoded": decoded,
        "fields": fields(data[24 + 4 * n_tokens : 24 + 4 * n_tokens + n_fields]),
    }


def posting_lists(block: bytes, n_codes: int) -> list[list[int]]:
    """FORMAT.md, postings: the ordinals of each code of one block."""
    if not n_codes:
        assert not block
        return []
    (n_postings,) = struct.unpack_from("<I", block)
    heads = block[4 : 4 + n_codes + n_postings]
    tails = 4 + len(heads)
    longs = tails + sum(240 <= head <= 254 for head in heads)
    numbers = []
    for head in heads:
        if head < 240:
            numbers.append(head)
        elif head < 255:
            numbers.append(240 + 256 * (head - 240) + block[tails])
            tails += 1
        else:
            numbers.append(4080 + struct.unpack_from("<H", block, longs)[0])
            longs += 2
    assert longs == len(block)
    gaps = iter(numbers[n_codes:])
    lists = []
    for count in numbers[:n_codes]:
        ordinals: list[int] = []
        for _ in range(count):
            ordinals.append((ordinals[-1] if ordinals else -1) + 1 + next(gaps))
        lists.append(ordinals)
    assert next(gaps, None) is None
    return lists


def quantised(data: bytes, codec: dict[str, Any], base: int) -> dict[str, Any]:
    """FORMAT.md, Quantised segment."""
    kind, sections = frame(data)
    assert kind == QUANTISED
    meta = msgspec.msgpack.decode(sections[2])
    n, cells = meta["n_documents"], codec["cell_offsets"]
    sizes = struct.unpack(f"<{2 * n}I", sections[4])
    starts = [sum(sizes[1 : 2 * i : 2]) for i in range(n)]
    records = [record(sections[5], start, sizes[2 * i + 1], i, codec) for i, start in enumerate(starts)]
    ids = struct.unpack(f"<{n}q", sections[3])
    assert [record["id"] for record in records] == list(ids)
    block_at = struct.unpack(f"<{len(cells)}I", sections[6])
    checksums = struct.unpack(f"<{len(cells) - 1}Q", sections[7])
    postings: list[list[int]] = []
    for cell in range(len(cells) - 1):
        block = sections[8][block_at[cell] : block_at[cell + 1]]
        assert xxhash.xxh3_64_intdigest(block) == checksums[cell]
        postings += posting_lists(block, cells[cell + 1] - cells[cell])
    return {
        "ids": [base + number for number in ids],
        "codes": [record["codes"] for record in records],
        "decoded": [record["decoded"] for record in records],
        "fields": [record["fields"] for record in records],
        "postings": postings,
        "keys": keys(sections[9]) if 9 in sections else {},
    }


def upload(data: bytes) -> tuple[str, int, range | None]:
    """FORMAT.md, Markers: the life of the index, the generation, and the documents that it made; None while it is only a claim."""
    found = body(data, UPLOAD)
    assert isinstance(found.pop("created_s"), float)
    assert set(found) == {"index_id", "generation", "first_id", "last_id"}
    assert (found["first_id"] is None) == (found["last_id"] is None)
    made = None if found["first_id"] is None else range(found["first_id"], found["last_id"] + 1)
    return found["index_id"], found["generation"], made


def tombstones(data: bytes) -> list[int]:
    """FORMAT.md, Tombstones."""
    kind, sections = frame(data)
    assert kind == TOMBSTONES
    return list(struct.unpack(f"<{len(sections[14]) // 4}I", sections[14]))
