"""Size: what takes memory or rounds with the number of segments, generations and keys is bounded; the benchmark of it runs."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import numpy as np
import pytest

from benchmarks import scale
from benchmarks.shards import Synthetic
from engine import near
from engine.config import IndexConfig, MaintenanceParams, SearchParams
from engine.errors import Conflict
from engine.index import joint
from engine.index.bulk import Block
from engine.index.commit import create
from engine.index.reader import Reader
from engine.index.snapshots import generations, pin
from engine.index.sweep import MANIFESTS_AT_ONCE, sweep
from engine.scoring import cascade
from engine.scoring.candidates import probe
from engine.searcher import Searcher
from engine.store.objects import open_store
from engine.store.wrappers import AroundStore, Call, CountingStore

T = TypeVar("T")
DIM = 8


class Crowded(AroundStore):
    """Knows how many manifests were under way at the same time, and which were read."""

    n_now = n_most = 0

    def __init__(self, inner: AroundStore) -> None:
        super().__init__(inner)
        self.read: set[str] = set()

    async def _around(self, call: Call, run: Callable[[], Awaitable[T]]) -> T:
        if call.kind != "get" or "/manifests/" not in call.name:
            return await run()
        self.read.add(call.name)
        self.n_now += 1
        self.n_most = max(self.n_most, self.n_now)
        try:
            await asyncio.sleep(0.001)
            return await run()
        finally:
            self.n_now -= 1


def vectors(n: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """n documents of one token."""
    return np.random.default_rng(seed).standard_normal((n, DIM), np.float32), np.arange(n + 1)


async def with_generations(n: int) -> Crowded:
    store = Crowded(AroundStore(open_store("memory://")))
    await create(store, "a", IndexConfig())
    writer = Reader(store).writer("a")
    for _ in range(n):
        await writer.add(*vectors(1))
    return store


async def test_history_reads_a_few_manifests_at_a_time_however_long_it_is() -> None:
    store = await with_generations(3 * MANIFESTS_AT_ONCE)
    lines = await generations(store, "a")
    assert [line.generation for line in lines] == list(range(3 * MANIFESTS_AT_ONCE, -1, -1))
    assert [line.is_current for line in lines] == [True] + [False] * (len(lines) - 1)
    assert store.n_most <= MANIFESTS_AT_ONCE


async def test_sweep_reads_a_few_manifests_at_a_time_and_only_those_that_may_be_kept() -> None:
    store = await with_generations(2 * MANIFESTS_AT_ONCE + 2)
    await pin(store, "a", "early", generation=3)
    await sweep(store, "a", dry_run=True)
    assert len(store.read) == 2 * MANIFESTS_AT_ONCE + 2, "within the grace period all are kept"
    assert store.n_most <= MANIFESTS_AT_ONCE
    store.read.clear()
    report = await sweep(store, "a", params=msgspec.structs.replace(MaintenanceParams(), grace_s=-1.0))
    assert {int(name.rpartition("/")[2].partition("-")[0]) for name in store.read} == {3}, "the others are too old to matter"
    assert report.n_deleted == 2 * MANIFESTS_AT_ONCE + 1
    assert [line.generation for line in await generations(store, "a")] == [2 * MANIFESTS_AT_ONCE + 2, 3]


async def test_deletes_and_updates_look_through_all_segments_in_one_round() -> None:
    inner = AroundStore(open_store("memory://"))
    await create(inner, "a", IndexConfig())
    writer = Reader(inner).writer("a")
    for seed in range(12):
        await writer.add(*vectors(3, seed), fields=[{"n": seed}] * 3)
    for change in (lambda w: w.delete(np.arange(0, 36, 3)), lambda w: w.update(np.arange(1, 36, 3), {"n": 7})):
        store = CountingStore(inner)
        with store.window() as cost:
            assert await change(Reader(store).writer("a")) == 12
        assert cost.rounds <= 6, "CURRENT, a round for the segments (and their tombstones), two of PUTs; not one for each segment"


class Keyed:
    """An input of a build: documents of one token with these external ids."""

    def __init__(self, keys: list[str]) -> None:
        self._keys = keys
        self.fingerprint, self.n_documents, self.n_tokens = repr(keys), len(keys), len(keys)

    def sample(self, n_tokens: int) -> np.ndarray:
        return vectors(len(self._keys))[0][:n_tokens]

    def blocks(self, first_document: int) -> list[Block]:
        tokens, offsets = vectors(len(self._keys))
        return [Block(tokens, offsets, keys=self._keys)]


class Plain(Keyed):
    """n documents of one token."""

    def __init__(self, n: int, seed: int) -> None:
        self.tokens, self.offsets = vectors(n, seed)
        self.fingerprint, self.n_documents, self.n_tokens = str(seed), n, n

    def sample(self, n_tokens: int) -> np.ndarray:
        return self.tokens[:n_tokens]

    def blocks(self, first_document: int) -> list[Block]:
        return [Block(self.tokens, self.offsets)]


@pytest.mark.parametrize("is_twice", [False, True])
async def test_finish_finds_external_ids_of_two_inputs_by_their_hashes(is_twice: bool) -> None:
    store = AroundStore(open_store("memory://"))
    await create(store, "a", IndexConfig())
    reader = Reader(store)
    shares = [Keyed([f"{share}-{n}" for n in range(40)]) for share in range(3)]
    if is_twice:
        shares[2] = Keyed(["new", "0-17"])
    build = (await joint.prepare(reader, "a", "plan", shares[0])).build
    for number, share in enumerate(shares):
        await joint.build_share(reader, "a", build, number, share)
    if is_twice:
        with pytest.raises(Conflict, match="0-17"):
            await joint.finish(reader, "a", build, 3)
    else:
        assert (await joint.finish(reader, "a", build, 3)).n_documents == 120


async def test_segments_of_a_codec_are_probed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    store = AroundStore(open_store("memory://"))
    await create(store, "a", IndexConfig())
    reader = Reader(store)
    shares = [Plain(2_100, seed) for seed in range(3)]
    build = (await joint.prepare(reader, "a", "plan", shares[0])).build
    for number, share in enumerate(shares):
        await joint.build_share(reader, "a", build, number, share)
    await joint.finish(reader, "a", build, 3)
    snapshot, query = await reader.snapshot("a"), vectors(4, seed=9)[0]
    n_probed = 0

    def counted(*arguments: Any) -> Any:
        nonlocal n_probed
        n_probed += 1
        return probe(*arguments)

    monkeypatch.setattr(near, "probe", counted)
    monkeypatch.setattr(cascade, "probe", counted)
    for subset, n_expected in ((None, 1), (np.arange(90), 1)):
        await Searcher(reader).search(snapshot, [query], SearchParams(k=5, n_candidates=64), subset=subset, mode="warm")
        assert n_probed == n_expected, "once for three segments; and not at all where few documents are allowed"


def test_shards_are_the_same_whoever_makes_them_and_wherever_one_begins() -> None:
    one, other = Synthetic(20_000), Synthetic(20_000)
    blocks = list(one.blocks(3))
    assert sum(map(len, blocks)) == one.span(3)[1] - one.span(3)[0] == 2_500
    [rest] = other.blocks(3, 2_300)
    assert np.array_equal(rest.tokens, blocks[1].behind(2_300 - len(blocks[0])).tokens)
    assert len(rest) == 200 and rest.offsets[-1] == len(rest.tokens)
    assert np.allclose(np.linalg.norm(rest.tokens.astype(np.float32), axis=1), 1, atol=2e-3)
    assert np.array_equal(one.queries(2), other.queries(2))
    assert not np.array_equal(rest.years, next(one.blocks(2, 2_300)).years)


async def test_scale_goes_through_all_steps(tmp_path: Path) -> None:
    bench = scale.Bench(tmp_path, documents=400, nbits=4, n_queries=2)
    for step in ["prepare", *(f"{name}:{n}" for name in scale.PER_SHARD for n in range(bench.collection.n_shards)), *scale.STEPS]:
        if not bench.figures(step).exists():
            await scale.child(bench, step)
    figures = scale.summary(bench)["steps"]
    assert figures["finish"]["documents_live"] == 400
    assert figures["compact"]["documents_live"] == figures["truth"]["alive"] < 300
    assert figures["warm"]["exact k=100 threads=1"]["recall_100"] > 0.9
    assert figures["warm-left"]["exact k=100 threads=1"]["recall_100"] > 0.9
