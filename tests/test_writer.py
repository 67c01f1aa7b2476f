"""What adds, deletes and updates promise, and how they refuse what cannot work."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest

from corpus import make_corpus
from engine.config import IndexConfig, SearchParams
from engine.errors import EngineError, InvalidRequest
from engine.index.commit import create, load_head
from engine.index.compact import compact
from engine.index.operations import Add, unit_rows
from engine.index.reader import Reader
from engine.index.verify import verify
from engine.searcher import Searcher
from engine.store.base import ObjectStore
from engine.store.objects import open_store

CORPUS = make_corpus(80, dim=16)


async def made(store: ObjectStore | None = None, **config: object) -> Reader:
    reader = Reader(store or open_store("memory://"))
    await create(reader.store, "x", IndexConfig(**config))  # type: ignore[arg-type]
    return reader


async def ids(reader: Reader) -> list[int]:
    return (await (await reader.snapshot("x")).live_ids()).tolist()


async def test_ids_count_from_zero_and_are_never_used_again() -> None:
    reader = await made()
    writer = reader.writer("x")
    assert (await writer.add(*CORPUS.part(0, 3))).ids.tolist() == [0, 1, 2]
    await writer.delete(np.array([2]))
    assert (await writer.add(*CORPUS.part(3, 5))).ids.tolist() == [3, 4]
    await writer.delete(np.arange(5))
    assert await ids(reader) == []
    assert (await writer.add(*CORPUS.part(5, 6))).ids.tolist() == [5]


async def test_a_document_with_a_known_key_replaces_the_old_one_in_the_same_commit() -> None:
    reader = await made()
    writer = reader.writer("x")
    await writer.add(*CORPUS.part(0, 4), keys=["a", "b", "c", "d"], fields=[{"v": 1}] * 4)
    for stage in ("flat", "quantised"):
        before = (await load_head(reader.store, "x")).manifest.generation
        added = await writer.add(*CORPUS.part(10, 12), keys=["b", "new" + stage], fields=[{"v": 2}] * 2)
        assert added.n_replaced == 1
        assert (await load_head(reader.store, "x")).manifest.generation == before + 1
        await compact(reader, "x", force=True)
    snapshot = await reader.snapshot("x")
    [answer] = await Searcher(reader).search(snapshot, [CORPUS.tokens[:3]], SearchParams(k=100))
    assert sorted(key or "" for key in answer.keys) == ["a", "b", "c", "d", "newflat", "newquantised"]


async def test_the_same_key_in_concurrent_adds_leaves_exactly_one_document() -> None:
    reader = await made()
    await asyncio.gather(*(reader.writer("x").add(*CORPUS.part(n, n + 1), keys=["same"]) for n in range(8)))
    assert len(await ids(reader)) == 1


async def test_the_lowest_ids_are_evicted_beyond_max_documents_and_configuring_evicts_nothing() -> None:
    reader = await made()
    writer = reader.writer("x")
    await writer.add(*CORPUS.part(0, 11))
    await writer.configure(max_documents=5)
    assert len(await ids(reader)) == 11
    added = await writer.add(*CORPUS.part(20, 22))
    assert added.n_evicted == 8
    assert await ids(reader) == [8, 9, 10, 11, 12]
    await compact(reader, "x", force=True)
    await writer.add(*CORPUS.part(30, 33))
    assert await ids(reader) == [11, 12, 13, 14, 15]


async def test_one_add_larger_than_max_documents_keeps_its_last_documents() -> None:
    reader = await made(max_documents=5)
    await reader.writer("x").add(*CORPUS.part(0, 11))
    assert await ids(reader) == [6, 7, 8, 9, 10]


async def test_updates_change_rows_before_and_after_compaction() -> None:
    reader = await made()
    writer = reader.writer("x")
    await writer.add(*CORPUS.part(0, 5), fields=[{"name": f"n{n}", "year": 2000 + n} for n in range(5)])
    assert await writer.update(np.array([1, 2, 99]), {"name": "changed"}) == 2
    assert await writer.update(np.array([2]), {"year": None}) == 1
    for _ in range(2):
        rows = await (await reader.snapshot("x")).rows([0, 1, 2])
        assert [row and (row["name"], row["year"]) for row in rows] == [("n0", 2000), ("changed", 2001), ("changed", None)]
        assert (await (await reader.snapshot("x")).select("name = ?", ["changed"])).tolist() == [1, 2]
        await compact(reader, "x", force=True)
    assert await writer.update(np.array([2]), {"year": 7}) == 1
    assert (await (await reader.snapshot("x")).select("year = ?", [7])).tolist() == [2]


async def test_keyword_scores_do_not_depend_on_compaction() -> None:
    reader = await made()
    words = ["red fox", "blue fox jumps", "green frog", "red red wine", "a fox"]
    for n, text in enumerate(words):
        await reader.writer("x").add(*CORPUS.part(n, n + 1), fields=[{"text": text, "flag": True}])
    before = await (await reader.snapshot("x")).keyword(["fox", "red OR frog"], 10)
    await compact(reader, "x", force=True)
    after = await (await reader.snapshot("x")).keyword(["fox", "red OR frog"], 10)
    for (ids_before, scores_before), (ids_after, scores_after) in zip(before, after, strict=True):
        assert ids_before.tolist() == ids_after.tolist()
        assert np.allclose(scores_before, scores_after, rtol=1e-6)


async def test_new_columns_come_with_later_documents_and_old_rows_read_null() -> None:
    reader = await made()
    writer = reader.writer("x")
    await writer.add(*CORPUS.part(0, 1))
    await writer.add(*CORPUS.part(1, 2), fields=[{"a": 1}])
    await writer.add(*CORPUS.part(2, 3), fields=[{"b": "x"}])
    snapshot = await reader.snapshot("x")
    assert await snapshot.rows([0, 1, 2]) == [
        {"_subset_": 0, "a": None, "b": None},
        {"_subset_": 1, "a": 1, "b": None},
        {"_subset_": 2, "a": None, "b": "x"},
    ]
    assert (await snapshot.select("b IS NULL")).tolist() == [0, 1]


async def test_vectors_are_normalised_and_zero_vectors_stay_zero() -> None:
    reader = await made()
    tokens = np.array([[3.0, 4.0], [0.0, 0.0], [1e-20, 0.0], [1e30, 1e30]], np.float32)
    await reader.writer("x").add(tokens, np.array([0, 1, 2, 3, 4]))
    [answer] = await Searcher(reader).search(await reader.snapshot("x"), [np.array([[1.0, 0.0]], np.float32)], SearchParams(k=4))
    assert answer.ids.tolist() == [2, 3, 0, 1]
    assert np.allclose(answer.scores, [1, 0.7071, 0.6, 0], atol=1e-3)


GOOD = CORPUS.tokens[:4]
BAD_ADDS = {
    "no documents": (np.empty((0, 16), np.float32), np.array([0])),
    "a document without tokens": (GOOD, np.array([0, 2, 2, 4])),
    "not a number": (np.full((2, 16), np.nan, np.float32), np.array([0, 2])),
    "infinite": (np.full((2, 16), np.inf, np.float32), np.array([0, 2])),
    "too large for float32": (np.full((2, 16), 1e300), np.array([0, 2])),
    "offsets that do not reach the end": (GOOD, np.array([0, 2])),
    "offsets that fall": (GOOD, np.array([0, 3, 2, 4])),
    "offsets that begin late": (GOOD, np.array([1, 4])),
    "integers": (np.ones((2, 16), np.int64), np.array([0, 2])),
    "three axes": (np.ones((2, 2, 16), np.float32), np.array([0, 2])),
    "no dimensions": (np.ones((2, 0), np.float32), np.array([0, 2])),
    "too many dimensions": (np.ones((1, 5000), np.float32), np.array([0, 1])),
    "too many tokens": (np.ones((70_000, 1), np.float32), np.array([0, 70_000])),
}


@pytest.mark.parametrize("what", BAD_ADDS)
async def test_an_add_that_cannot_work_says_why_and_writes_nothing(what: str) -> None:
    reader = await made()
    await reader.writer("x").add(*CORPUS.part(0, 1))
    before = [listed.name async for listed in reader.store.list("x/")]
    with pytest.raises(InvalidRequest) as failure:
        await reader.writer("x").add(*BAD_ADDS[what])
    assert "\n" not in str(failure.value)
    assert [listed.name async for listed in reader.store.list("x/")] == before


@pytest.mark.parametrize(
    "extra",
    [
        {"keys": ["a"]},
        {"keys": ["a", "a"]},
        {"keys": ["a", ""]},
        {"keys": ["a", "b" * 600]},
        {"fields": [{}]},
        {"fields": [{"bad name": 1}, {}]},
        {"fields": [{"a": 1, "A": 2}, {}]},
        {"fields": [{"a": object}, {}]},
    ],
    ids=str,
)
async def test_keys_and_fields_that_cannot_be_kept_are_refused(extra: dict) -> None:  # type: ignore[type-arg]
    reader = await made()
    with pytest.raises(EngineError):
        await reader.writer("x").add(*CORPUS.part(0, 2), **extra)
    assert await ids(reader) == []


async def test_changing_an_unknown_column_is_refused() -> None:
    reader = await made()
    await reader.writer("x").add(*CORPUS.part(0, 1), fields=[{"a": 1}])
    for updates in ({"b": 1}, {"_subset_": 3}):
        with pytest.raises(InvalidRequest):
            await reader.writer("x").update(np.array([0]), updates)


async def test_everything_works_on_s3_over_http(s3_store: ObjectStore) -> None:
    reader = await made(s3_store)
    writer = reader.writer("x")
    await asyncio.gather(*(writer.add(*CORPUS.part(n, n + 5), fields=[{"n": n}] * 5) for n in range(0, 60, 5)))
    await writer.delete(np.arange(3))
    await compact(reader, "x", force=True)
    fresh = Reader(s3_store)
    snapshot = await fresh.snapshot("x")
    assert snapshot.n_documents == 57
    for mode in ("cold", "warm"):
        [answer] = await Searcher(fresh).search(snapshot, [CORPUS.part(0, 60)[0][-6:]], SearchParams(k=1), mode=mode)
        assert len(answer.rows) == 1
    assert (await verify(fresh, "x", all_generations=True)).problems == []


async def test_many_processes_on_s3_lose_nothing(s3_store: ObjectStore) -> None:
    await made(s3_store)

    async def process(number: int) -> list[int]:
        writer = Reader(s3_store).writer("x")
        return [i for n in range(3) for i in (await writer.add(*CORPUS.part(number + n, number + n + 1))).ids.tolist()]

    results = await asyncio.gather(*(process(number) for number in range(5)))
    everything = sorted(i for result in results for i in result)
    assert everything == list(range(15))
    assert await ids(Reader(s3_store)) == everything


async def test_a_directory_keeps_what_was_acknowledged(directory_store: ObjectStore) -> None:
    reader = await made(directory_store)
    await reader.writer("x").add(*CORPUS.part(0, 20), keys=[f"k{n}" for n in range(20)])
    await compact(reader, "x", force=True)
    fresh = Reader(directory_store)
    [answer] = await Searcher(fresh).search(await fresh.snapshot("x"), [CORPUS.part(0, 1)[0]], SearchParams(k=1))
    assert answer.keys == ["k0"]


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_rows_are_scaled_to_length_one_whatever_their_size(dtype: type) -> None:
    """Also rows whose squares leave float32's range, next to ordinary ones, to zeros, and across blocks."""
    rng = np.random.default_rng(3)
    scales = [1e-3, 1.0, 1e4] if dtype is np.float16 else [1e-30, 1e-12, 1.0, 1e12, 1e37]
    rows = (rng.standard_normal((3000, 40)) * rng.choice(scales, (3000, 1))).astype(dtype)
    rows[::7] = 0
    exact = rows.astype(np.float64)
    lengths = np.linalg.norm(exact, axis=1, keepdims=True)
    expected = exact / np.where(lengths > 0, lengths, 1)
    found = unit_rows(rows)
    assert found.dtype == np.float16
    assert np.abs(found - expected).max() < 1e-3
    assert not found[::7].any()
    assert np.array_equal(unit_rows(rows[:1])[0], found[0])


def test_a_value_that_is_not_finite_is_refused_and_a_sum_that_overflows_is_not() -> None:
    vectors = np.full((2, 4), 3e38, np.float32)
    assert np.allclose(Add.of(vectors, np.array([0, 1, 2]), None, None).tokens, 0.5)
    vectors[1, 2] = np.nan
    with pytest.raises(InvalidRequest, match="not finite") as caught:
        Add.of(vectors, np.array([0, 1, 2]), None, None)
    assert caught.value.details["document"] == 1
