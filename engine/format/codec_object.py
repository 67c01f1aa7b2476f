"""The codec object: everything of a trained codec, in an order that lets a cold query read two runs of it.

    section             type                content
    meta                msgpack             {dim, nbits, seed, n_centroids, n_cells, n_tokens_trained}
    levels              f32 (2^nbits,)
    cutoffs             f32 (2^nbits - 1,)
    inv_table           f32 (256,)
    scale_table         f32 (256,)
    cell_offsets        u32 (M + 1,)        cell m owns the codes cell_offsets[m]:cell_offsets[m + 1]
    centroid_checksums  u64 (M,)            xxh3_64 of each cell's block of centroids
    rotation            f32 (D, D)          x @ rotation is the codec's space
    coarse              f32 (M, D)          in the codec's space
    centroids           block per cell      n scales f32, then n centroids int8 (n, D): centroid = scale * int8
    residual_moment     f32 (D, D)          absent at most settings: second moment of residuals, by which an encoder shapes its errors

Block m of centroids starts at (D + 4) · cell_offsets[m], so a cell is one range. Everything before coarse is the *head*, one range.
In CodecRef the coarse centroids stand rotated back and as float16: a query chooses its cells before it has fetched the rotation.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import numpy as np

from engine.codec.residual import Codec
from engine.config import MAX_DIM, NBITS
from engine.format.envelope import Buffer, Header, Kind, Section, SectionRef, build, checksum, corrupt, cut, find_section, parse, unpack
from engine.format.manifest import CodecRef

MAX_FLOAT16 = 65504.0
MAX_CENTROIDS = 1 << 16
MAX_VALUE = 1e6
"""No float of a codec of unit vectors comes near it; beyond it a search would overflow without a word."""
HEAD = (
    Section.META,
    Section.LEVELS,
    Section.CUTOFFS,
    Section.INV_TABLE,
    Section.SCALE_TABLE,
    Section.CELL_OFFSETS,
    Section.CENTROID_CHECKSUMS,
    Section.ROTATION,
)


class CodecMeta(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The meta section."""

    dim: int
    nbits: int
    seed: int
    n_centroids: int
    n_cells: int
    n_tokens_trained: int


class CodecHead(msgspec.Struct, frozen=True):
    """What a cold query needs of a codec besides centroids: levels, inv_table, scale_table, rotation as in Codec."""

    dim: int
    nbits: int
    rotation: np.ndarray
    levels: np.ndarray
    cutoffs: np.ndarray
    inv_table: np.ndarray
    scale_table: np.ndarray


def write_codec(codec: Codec, codec_id: str, *, n_tokens_trained: int, home: str = "") -> tuple[memoryview, CodecRef]:
    """The bytes of a codec's object, and the reference for the manifest."""
    cell_offsets = codec.cell_offsets.astype("<u4")
    blocks = [
        codec.centroid_scales[first:last].astype("<f4").tobytes() + codec.centroids_i8[first:last].tobytes()
        for first, last in zip(codec.cell_offsets[:-1], codec.cell_offsets[1:], strict=True)
    ]
    checksums = np.array([checksum(block) for block in blocks], "<u8")
    meta = CodecMeta(
        dim=codec.dim,
        nbits=codec.nbits,
        seed=codec.seed,
        n_centroids=codec.n_centroids,
        n_cells=len(blocks),
        n_tokens_trained=n_tokens_trained,
    )
    data, sections = build(
        Kind.CODEC,
        [
            (Section.META, msgspec.msgpack.encode(meta)),
            (Section.LEVELS, codec.levels.astype("<f4")),
            (Section.CUTOFFS, codec.cutoffs.astype("<f4")),
            (Section.INV_TABLE, codec.inv_table.astype("<f4")),
            (Section.SCALE_TABLE, codec.scale_table.astype("<f4")),
            (Section.CELL_OFFSETS, cell_offsets),
            (Section.CENTROID_CHECKSUMS, checksums),
            (Section.ROTATION, codec.rotation.astype("<f4")),
            (Section.COARSE, codec.coarse.astype("<f4")),
            (Section.CENTROIDS, b"".join(blocks)),
            *([] if codec.residual_moment is None else [(Section.RESIDUAL_MOMENT, codec.residual_moment.astype("<f4"))]),
        ],
    )
    ref = _codec_ref(codec_id, home, meta, data.nbytes, sections, codec.coarse, codec.rotation, cell_offsets, checksums)
    return data, ref


def _codec_ref(
    codec_id: str,
    home: str,
    meta: CodecMeta,
    size_bytes: int,
    sections: tuple[SectionRef, ...],
    coarse: np.ndarray,
    rotation: np.ndarray,
    cell_offsets: np.ndarray,
    checksums: np.ndarray,
) -> CodecRef:
    return CodecRef(
        id=codec_id,
        home=home,
        dim=meta.dim,
        nbits=meta.nbits,
        n_centroids=meta.n_centroids,
        n_tokens_trained=meta.n_tokens_trained,
        size_bytes=size_bytes,
        sections=sections,
        coarse=np.clip(coarse @ rotation.T, -MAX_FLOAT16, MAX_FLOAT16).astype("<f2").tobytes(),
        cell_offsets=cell_offsets.astype("<u4").tobytes(),
        centroid_checksums=checksums.astype("<u8").tobytes(),
    )


def read_codec(data: Buffer, *, name: str, ref: CodecRef | None = None) -> Codec:
    """The codec in a whole object's bytes.

    ref  of the manifest, if there is one: then the object must be exactly the one that was committed

    Raises CorruptData or UnsupportedFormat. Cost: one pass over the bytes, which for 16,384 centroids of 128 dimensions are 2.2 MB.
    """
    header, parts = parse(data, name=name, kind=Kind.CODEC)
    if ref is not None and header.sections != ref.sections:
        raise corrupt("codec is not the one that the manifest names", name=name, expected=ref.id, found="another section table")
    if tuple(section.id for section in header.sections[: len(HEAD)]) != HEAD:
        raise corrupt("sections of a codec lie in another order", name=name, expected=HEAD, found=[ref.id for ref in header.sections])
    meta = _read_meta(header, parts, name)
    head = _read_head(meta.dim, meta.nbits, parts, name)
    cell_offsets = _array(parts, Section.CELL_OFFSETS, "<u4", (meta.n_cells + 1,), name).astype(np.int64)
    if cell_offsets[0] or cell_offsets[-1] != meta.n_centroids or (np.diff(cell_offsets) < 0).any():
        raise corrupt(
            "cell offsets are impossible", name=name, section=Section.CELL_OFFSETS, expected=meta.n_centroids, found=cell_offsets[-1]
        )
    checksums = _array(parts, Section.CENTROID_CHECKSUMS, "<u8", (meta.n_cells,), name)
    coarse = _array(parts, Section.COARSE, "<f4", (meta.n_cells, meta.dim), name)
    centroids = _array(parts, Section.CENTROIDS, "u1", (meta.n_centroids * (meta.dim + 4),), name)
    blocks = [centroids.data[a:b] for a, b in _cell_ranges(cell_offsets, meta.dim, range(meta.n_cells))]
    if any(checksum(block) != expected for block, expected in zip(blocks, checksums, strict=True)):
        raise corrupt("checksums of cells are not those of the centroids", name=name, section=Section.CENTROID_CHECKSUMS)
    scales, rows = _split_blocks(blocks, np.diff(cell_offsets), meta.dim, name)
    return Codec(
        dim=meta.dim,
        nbits=meta.nbits,
        seed=meta.seed,
        rotation=head.rotation,
        coarse=coarse,
        cell_offsets=cell_offsets,
        centroids_i8=rows,
        centroid_scales=scales,
        cutoffs=head.cutoffs,
        levels=head.levels,
        inv_table=head.inv_table,
        scale_table=head.scale_table,
        residual_moment=_read_moment(meta.dim, parts, name),
    )


def _read_moment(dim: int, parts: dict[int, memoryview], name: str) -> np.ndarray | None:
    """What an encoder needs to shape its errors, if the codec has it."""
    return _array(parts, Section.RESIDUAL_MOMENT, "<f4", (dim, dim), name) if Section.RESIDUAL_MOMENT in parts else None


def describe_codec(data: Buffer, codec_id: str, *, name: str, home: str = "") -> CodecRef:
    """The reference of a codec from its object alone: for repair."""
    codec = read_codec(data, name=name)
    header, parts = parse(data, name=name, kind=Kind.CODEC)
    meta = _read_meta(header, parts, name)
    checksums = np.frombuffer(parts[Section.CENTROID_CHECKSUMS], "<u8")
    size_bytes = memoryview(data).nbytes
    return _codec_ref(codec_id, home, meta, size_bytes, header.sections, codec.coarse, codec.rotation, codec.cell_offsets, checksums)


# Cold reading: parts of the object, verified by what the manifest says


def head_range(ref: CodecRef) -> tuple[int, int]:
    """Byte range of the sections that read_head wants: one request. CorruptData if they do not lie together."""
    start, end = ref.section(HEAD[0]).offset, ref.section(HEAD[-1]).end
    if not all(start <= ref.section(section).offset < end for section in HEAD):
        raise corrupt("sections of a codec lie in another order", name=ref.id, range=(start, max(start, end)), expected=HEAD)
    return start, end


def read_head(ref: CodecRef, data: Buffer, *, name: str) -> CodecHead:
    """The head from the bytes of head_range(ref). Raises CorruptData."""
    parts = cut(ref.sections, data, name=name, start=head_range(ref)[0])
    return _read_head(ref.dim, ref.nbits, parts, name)


def cell_ranges(ref: CodecRef, cells: Sequence[int] | np.ndarray) -> list[tuple[int, int]]:
    """Byte ranges in the object of the centroids of each of these cells."""
    start = ref.section(Section.CENTROIDS).offset
    return [(start + first, start + last) for first, last in _cell_ranges(ref.cell_offsets_array(), ref.dim, cells)]


def read_cells(ref: CodecRef, cells: Sequence[int] | np.ndarray, blocks: Sequence[Buffer], *, name: str) -> tuple[np.ndarray, np.ndarray]:
    """The centroids of a few cells from the bytes of cell_ranges(ref, cells), each verified.

    returns  codes int64 (C,), and centroids float32 (C, D), in the codec's space

    Raises CorruptData.
    """
    offsets, checksums = ref.cell_offsets_array(), ref.centroid_checksums_array()
    for cell, block, (first, last) in zip(cells, blocks, cell_ranges(ref, cells), strict=True):
        found = checksum(memoryview(block))
        if memoryview(block).nbytes != last - first or found != checksums[cell]:
            raise corrupt(
                f"centroids of cell {cell} are damaged",
                name=name,
                section=Section.CENTROIDS,
                range=(first, last),
                expected=int(checksums[cell]),
                found=found,
                code="checksum-mismatch",
            )
    codes = [np.arange(offsets[cell], offsets[cell + 1]) for cell in cells]
    scales, rows = _split_blocks(blocks, np.array([len(part) for part in codes], np.int64), ref.dim, name)
    return np.concatenate([np.empty(0, np.int64), *codes]), rows.astype(np.float32) * scales[:, None]


def _cell_ranges(cell_offsets: np.ndarray, dim: int, cells: Sequence[int] | np.ndarray) -> list[tuple[int, int]]:
    return [(int(cell_offsets[cell]) * (dim + 4), int(cell_offsets[cell + 1]) * (dim + 4)) for cell in cells]


def _split_blocks(blocks: Sequence[Buffer], counts: np.ndarray, dim: int, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Scales float32 (C,) and centroids int8 (C, D) of consecutive cell blocks. Raises CorruptData for scales that are not sane."""
    scales, rows = [np.empty(0, np.float32)], [np.empty((0, dim), np.int8)]
    for block, n in zip(blocks, counts.tolist(), strict=True):
        scales.append(np.frombuffer(block, "<f4", n))
        rows.append(np.frombuffer(block, np.int8, n * dim, 4 * n).reshape(n, dim))
    joined = np.concatenate(scales)
    if not _is_sane(joined):
        raise corrupt("scales of centroids are not sane numbers", name=name, section=Section.CENTROIDS, expected=f"at most {MAX_VALUE}")
    return joined, np.concatenate(rows)


def _read_meta(header: Header, parts: dict[int, memoryview], name: str) -> CodecMeta:
    find_section(header.sections, Section.META, name=name)
    meta: CodecMeta = unpack(parts[Section.META], CodecMeta, name=name, section=Section.META)
    sound = 1 <= meta.dim <= MAX_DIM and meta.nbits in NBITS and meta.n_cells >= 1 and 1 <= meta.n_centroids <= MAX_CENTROIDS
    if not sound or meta.n_tokens_trained < 0:
        raise corrupt("a codec's meta is impossible", name=name, section=Section.META, expected="FORMAT.md, codec", found=meta)
    return meta


def _read_head(dim: int, nbits: int, parts: dict[int, memoryview], name: str) -> CodecHead:
    return CodecHead(
        dim=dim,
        nbits=nbits,
        rotation=_array(parts, Section.ROTATION, "<f4", (dim, dim), name),
        levels=_array(parts, Section.LEVELS, "<f4", (1 << nbits,), name),
        cutoffs=_array(parts, Section.CUTOFFS, "<f4", ((1 << nbits) - 1,), name),
        inv_table=_array(parts, Section.INV_TABLE, "<f4", (256,), name),
        scale_table=_array(parts, Section.SCALE_TABLE, "<f4", (256,), name),
    )


def _array(parts: dict[int, memoryview], section: Section, dtype: str, shape: tuple[int, ...], name: str) -> np.ndarray:
    """A section as an array of exactly this shape, or CorruptData."""
    data = parts.get(section)
    expected = int(np.prod(shape)) * np.dtype(dtype).itemsize
    if data is None or len(data) != expected:
        found = "absent" if data is None else len(data)
        raise corrupt("a section has another length than meta gives", name=name, section=section, expected=expected, found=found)
    values = np.frombuffer(data, dtype).reshape(shape)
    if dtype == "<f4" and not _is_sane(values):
        raise corrupt("a section holds other than sane numbers", name=name, section=section, expected=f"at most {MAX_VALUE}")
    return values


def _is_sane(values: np.ndarray) -> bool:
    """Whether no value is so large that arithmetic would overflow, or not a number."""
    return bool((np.abs(values) <= MAX_VALUE).all())
