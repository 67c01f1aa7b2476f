"""Arenas: small indices by whose side a changed segment or codec is searched, warm and cold, as a service would.

Nothing here knows what was changed. What a search may do with it is in `searched`: refuse it as damage, or give hits whose scores are
numbers, falling, of documents that the segment can have.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, Future
from dataclasses import dataclass
from functools import cache
from typing import Any

import msgspec
import numpy as np

from engine.config import EVERY_DOCUMENT, ColdParams, IndexConfig, MaintenanceParams, SearchParams
from engine.errors import NotFound
from engine.format import names
from engine.format.codec_object import read_codec
from engine.format.envelope import Kind, Section, build_body
from engine.format.manifest import MAX_ID, CodecRef, Manifest, SegmentRef, decode_manifest
from engine.format.segment import describe
from engine.index.commit import create, load_head
from engine.index.compact import compact
from engine.index.parts import decode_records
from engine.index.reader import Reader, Snapshot
from engine.scoring.brute_force import maxsim
from engine.searcher import Answer, Searcher
from engine.store.objects import open_store

from .objects import golden, golden_manifest
from .sealing import Contents, with_sections
from .target import Wrong, closed_later, stored

INDEX = "papers"
MUTANT = "01KATR000000000000000000ZZ"
EXACT = SearchParams(k=7, n_candidates=EVERY_DOCUMENT, n_rerank=EVERY_DOCUMENT)
TIGHT = SearchParams(k=3, n_probe=2, n_candidates=5, n_rerank=4)
THRESHOLD = SearchParams(k=4, n_probe=1, n_candidates=9, n_rerank=9, centroid_score_threshold=0.1)
NARROW = ColdParams(max_gets=5, max_bytes=4000, max_cell_gets=1, max_cell_bytes=900, n_probe=2, n_rerank=4)
TOLERANCE = 2e-3
"""Of a score of queries of unit tokens: what the cascade's float32 and the codec's decoding differ by, and more."""


@dataclass(frozen=True)
class Arena:
    """An index: its manifest, the bytes of the objects that it names."""

    manifest: Manifest
    objects: dict[str, bytes]

    @property
    def segment(self) -> bytes:
        """Of the manifest's first segment."""
        return self.objects[names.segment(INDEX, self.manifest.segments[0].id)]

    @property
    def codec(self) -> bytes:
        return self.objects[names.codec(INDEX, self.manifest.codecs[0].id)]


SHAPES = {"narrow": (40, 3, 4, 4), "wide": (120, 5, 16, 2), "bits": (90, 6, 8, 1), "bytes": (60, 4, 10, 8)}
"""Documents, mean tokens of a document, dimensions, bits."""


@cache
def arena(name: str, quantised: bool = True) -> Arena:
    """One of SHAPES; with texts, keys and numbers as fields. Flat ones have a quarter of the documents."""
    return runner().run(_made(*SHAPES[name], quantised))


async def _made(n_documents: int, n_tokens: int, dim: int, nbits: int, quantised: bool) -> Arena:
    store, rng = open_store("memory://"), np.random.default_rng(n_documents)
    reader = Reader(store)
    await create(store, INDEX, IndexConfig(nbits=nbits, seed=1))
    n_documents = n_documents if quantised else n_documents // 4
    offsets = np.concatenate([[0], np.cumsum(rng.integers(1, 2 * n_tokens, n_documents))])
    fields = [{"title": f"word{n} loom", "n": n, "share": n / 8} for n in range(n_documents)]
    keys = [f"key{n}" for n in range(n_documents)]
    await reader.writer(INDEX).add(rng.standard_normal((offsets[-1], dim)).astype(np.float32), offsets, fields=fields, keys=keys)
    if quantised:
        await compact(reader, INDEX, force=True, params=MaintenanceParams(min_quantise_documents=10))
    manifest = (await load_head(store, INDEX)).manifest
    manifest = msgspec.structs.replace(manifest, segments=tuple(msgspec.structs.replace(ref, metadata=None) for ref in manifest.segments))
    wanted = [names.segment(INDEX, ref.id) for ref in manifest.segments] + [names.codec(INDEX, ref.id) for ref in manifest.codecs]
    return _renamed(manifest, {name: bytes((await store.get(name)).data) for name in wanted}, n_documents)


def _renamed(manifest: Manifest, objects: dict[str, bytes], number: int) -> Arena:
    """Under ids that are the same each time, so that an input that was kept finds its codec again."""
    codec_id, segment_id = (f"01KATR0000000000000{kind}{number:06}" for kind in "CS")
    [segment] = manifest.segments
    data = objects[names.segment(INDEX, segment.id)]
    if not manifest.codecs:
        renamed = msgspec.structs.replace(segment, id=segment_id)
        return Arena(msgspec.structs.replace(manifest, segments=(renamed,)), {names.segment(INDEX, segment_id): data})

    def change(contents: Contents) -> None:
        meta = msgspec.msgpack.decode(contents[Section.META]) | {"codec": codec_id}
        contents[Section.META] = msgspec.msgpack.encode(meta)

    [codec], data = manifest.codecs, with_sections(data, change)
    made = msgspec.structs.replace(
        manifest, segments=(describe(data, segment_id, name=segment_id),), codecs=(msgspec.structs.replace(codec, id=codec_id),)
    )
    return Arena(made, {names.segment(INDEX, segment_id): data, names.codec(INDEX, codec_id): objects[names.codec(INDEX, codec.id)]})


@cache
def runner() -> asyncio.Runner:
    made = asyncio.Runner()
    closed_later(made.close)
    return made


def home_of(codec_id: str) -> Arena | None:
    """The arena whose codec a segment names."""
    homes = [_golden(), *map(arena, SHAPES)]
    return next((home for home in homes if home.manifest.codecs[0].id == codec_id), None)


@cache
def _golden() -> Arena:
    """The codec of the golden objects, and no segment."""
    found = golden_manifest()
    return Arena(msgspec.structs.replace(found, segments=(), columns=()), {names.codec(INDEX, found.codecs[0].id): golden("codec")})


# Searching


class _AtOnce(Executor):
    """Does the arithmetic where it is asked for: no threads, so that an input does the same each time."""

    def submit(self, work: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        done: Future[Any] = Future()
        try:
            done.set_result(work(*args, **kwargs))
        except BaseException as error:
            done.set_exception(error)
        return done


@dataclass(frozen=True)
class _Found:
    data: bytes


class _Objects:
    """The part of a store that a search uses, over bytes in memory."""

    def __init__(self, objects: dict[str, bytes]) -> None:
        self._objects = objects

    async def get(self, name: str) -> _Found:
        if name not in self._objects:
            raise NotFound("no such object", object=name)
        return _Found(self._objects[name])

    async def get_ranges(self, name: str, ranges: Sequence[tuple[int, int]]) -> list[memoryview]:
        data = memoryview((await self.get(name)).data)
        return [data[start:end] for start, end in ranges]

    async def local_path(self, name: str) -> None:
        return None


def index_of(home: Arena, segment: SegmentRef, data: bytes, codec: CodecRef | None, codec_data: bytes, with_sibling: bool) -> tuple[Manifest, dict[str, bytes]] | None:  # fmt: skip
    """A manifest of this segment and codec, beside the arena's own segment if wanted, and all objects; None if its rules refuse it."""
    siblings = home.manifest.segments if with_sibling else ()
    made = msgspec.structs.replace(
        home.manifest, segments=(*siblings, segment), codecs=() if codec is None else (codec,), next_id=MAX_ID, columns=()
    )
    accepted, manifest = stored(lambda: decode_manifest(build_body(Kind.MANIFEST, made), name="CURRENT"))
    if not accepted:
        return None
    objects = {**home.objects, names.segment(INDEX, segment.id): data}
    if codec is not None:
        objects[names.codec(INDEX, codec.id)] = codec_data
    return manifest, objects


def searched(home: Arena, segment: SegmentRef, data: bytes, codec: CodecRef | None, codec_data: bytes = b"") -> dict[str, bool]:
    """Which kinds of search took a segment, read with a codec: warm and cold, each thorough and hasty; and warm beside a sibling.

    Empty if the manifest that would name them breaks its rules.
    """
    alone = index_of(home, segment, data, codec, codec_data, False)
    if alone is None:
        return {}
    siblings = [ref.id for ref in home.manifest.segments]
    beside = None if segment.id in siblings or not siblings else index_of(home, segment, data, codec, codec_data, True)
    dim = home.manifest.dim or 1
    short, long = query(dim, 3), query(dim, 20)
    taken = {
        "warm": _search(alone, "warm", short, EXACT, ColdParams(), explain=True),
        "hasty": _search(alone, "warm", long, TIGHT, ColdParams()),
        "cold": _search(alone, "cold", short, EXACT, ColdParams(), explain=True),
        "narrow": _search(alone, "cold", long, THRESHOLD, NARROW),
    }
    if beside is not None:
        taken["beside"] = _search(beside, "warm", short, THRESHOLD, ColdParams())
    taken["lookups"] = stored(lambda: runner().run(_looked_up(*alone)))[0]
    return taken


def query(dim: int, n_tokens: int) -> np.ndarray:
    """Unit tokens, the same each time: float32 (n_tokens, dim)."""
    tokens = np.random.default_rng(n_tokens).standard_normal((n_tokens, dim))
    return np.asarray(tokens / np.linalg.norm(tokens, axis=1, keepdims=True), np.float32)


def _searcher(objects: dict[str, bytes], cold: ColdParams) -> Searcher:
    return Searcher(Reader(_Objects(objects), executor=_AtOnce()), cold_params=cold)  # type: ignore[arg-type]


def _search(
    index: tuple[Manifest, dict[str, bytes]], mode: Any, tokens: np.ndarray, params: SearchParams, cold: ColdParams, explain: bool = False
) -> bool:
    manifest, objects = index
    made = _searcher(objects, cold)
    snapshot = Snapshot(made.reader, INDEX, manifest)
    taken, answers = stored(lambda: runner().run(made.search(snapshot, [tokens], params, mode=mode, explain=explain)))
    if taken:
        check_answer(answers[0], manifest, params)
    return taken


def check_answer(answer: Answer, manifest: Manifest, params: SearchParams) -> None:
    """Hits that a caller can be given, whatever a segment holds."""
    scores = answer.scores.tolist()
    if len(scores) > params.k or not np.isfinite(answer.scores).all() or scores != sorted(scores, reverse=True):
        raise Wrong(f"scores {scores}")
    for found in answer.ids.tolist():
        if not any(ref.first_id <= found <= ref.last_id for ref in manifest.segments):
            raise Wrong(f"a hit {found} that no segment has")
    for matches in answer.matches or ():
        if not all(np.isfinite(similarity) for _, similarity in matches):
            raise Wrong("a match that is no number")


async def _looked_up(manifest: Manifest, objects: dict[str, bytes]) -> None:
    """What other calls than a search read: keys, ids, fields of some documents, tokens."""
    parts = _searcher(objects, ColdParams()).parts
    ref = manifest.segments[-1]
    codec = manifest.codec_of(ref) if ref.codec else None
    await parts.ids_of_keys(INDEX, manifest, ["key1", "key7", "missing"])
    await parts.lowest_live_ids(INDEX, manifest, 3)
    await parts.live_ordinals_of(INDEX, ref, np.array([ref.first_id, ref.last_id, 5]))
    some = np.unique([0, ref.n_documents // 2, ref.n_documents - 1])
    await parts.fields(INDEX, ref, some, codec)
    await parts.tokens(INDEX, ref, some, codec)


# What the scores must be


def check_scores(home: Arena, segment: SegmentRef, data: bytes, codec: CodecRef | None) -> None:
    """A segment that deep verification passes: the hits of thorough searches have the scores of its decoded tokens.

    A warm search may miss a token whose residual outweighs its centroid, which forged residuals do, so there the score may be less.
    """
    made = index_of(home, segment, data, codec, home.codec if codec else b"", False)
    assert made is not None
    manifest, objects = made
    asked = query(home.manifest.dim or 1, 3)
    tokens, offsets, ids = runner().run(_decoded(manifest, objects))
    expected = dict(zip(ids.tolist(), maxsim(asked, tokens, offsets).tolist(), strict=True))
    for mode in ("warm", "cold"):
        searcher = _searcher(objects, ColdParams())
        [answer] = runner().run(searcher.search(Snapshot(searcher.reader, INDEX, manifest), [asked], EXACT, mode=mode))  # type: ignore[arg-type]
        for found, score in zip(answer.ids.tolist(), answer.scores.tolist(), strict=True):
            slack = TOLERANCE * max(1.0, abs(score))
            if score > expected[found] + slack or (mode == "cold" and score < expected[found] - slack):
                raise Wrong(f"{mode}: document {found} scores {score} and its tokens {expected[found]}")


async def _decoded(manifest: Manifest, objects: dict[str, bytes]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    parts, ref = _searcher(objects, ColdParams()).parts, manifest.segments[0]
    ids = await parts.ids(INDEX, ref)
    if ref.kind == "flat":
        flat = await parts.flat(INDEX, ref)
        return flat.tokens.astype(np.float32), flat.offsets, ids
    codec_ref = manifest.codec_of(ref)
    records = await parts.records(INDEX, ref, codec_ref)
    codec = read_codec(objects[names.codec(INDEX, codec_ref.id)], name="x")
    return *decode_records(codec, records, np.arange(ref.n_documents)), ids
