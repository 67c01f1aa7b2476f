"""Import of NextPlaid and FastPlaid directories. The directories are written here, by a small writer of their layout."""

from __future__ import annotations

import json
import os
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engine.config import IndexConfig, SearchParams
from engine.errors import Conflict, CorruptData, InvalidRequest, NotFound, UnsupportedFormat
from engine.index.bulk import BulkBuild
from engine.index.commit import create
from engine.index.reader import Reader
from engine.searcher import Searcher
from engine.store.objects import open_store
from engine.transfer.nextplaid.index import PlaidIndex, byte_weights
from engine.transfer.nextplaid.opening import read
from engine.transfer.nextplaid.source import PlaidSource

DIM = 16
CENTROIDS = 12
Rows = list[dict[str, Any]]


def packed(buckets: np.ndarray, nbits: int) -> np.ndarray:
    """Bucket numbers (t, D) -> bytes, bit by bit: lowest bit of a number first, each byte from its highest bit down."""
    out = np.zeros((len(buckets), buckets.shape[1] * nbits // 8), np.uint8)
    for token, row in enumerate(buckets.tolist()):
        for dimension, bucket in enumerate(row):
            for bit in range(nbits):
                place = dimension * nbits + bit
                out[token, place // 8] |= ((bucket >> bit) & 1) << (7 - place % 8)
    return out


class Peer:
    """A small index in memory: what a peer would have on disk, and what a reader must find in it."""

    def __init__(self, chunks: list[list[int]], nbits: int = 4, seed: int = 5) -> None:
        rng = np.random.default_rng(seed)
        self.chunks, self.nbits = chunks, nbits
        n_tokens = sum(map(sum, chunks))
        centroids = rng.standard_normal((CENTROIDS, DIM))
        self.centroids = (centroids / np.linalg.norm(centroids, axis=1, keepdims=True)).astype(np.float16)
        self.weights = np.sort(rng.standard_normal(1 << nbits) * 0.1).astype(np.float32)
        self.codes = rng.integers(0, CENTROIDS, n_tokens)
        self.buckets = rng.integers(0, 1 << nbits, (n_tokens, DIM))
        self.residuals = packed(self.buckets, nbits)

    @property
    def doclens(self) -> list[int]:
        return [n for chunk in self.chunks for n in chunk]

    def tokens(self) -> np.ndarray:
        """Decoded by plain loops, float64."""
        out = np.zeros((len(self.codes), DIM))
        for t, code in enumerate(self.codes):
            for d in range(DIM):
                out[t, d] = float(self.centroids[code, d]) + float(self.weights[self.buckets[t, d]])
            out[t] /= np.linalg.norm(out[t])
        return out

    def bounds(self) -> np.ndarray:
        return np.cumsum([0, *map(sum, self.chunks)])

    def write_base(self, root: Path, **extra: Any) -> None:
        root.mkdir(parents=True, exist_ok=True)
        np.save(root / "centroids.npy", self.centroids)
        np.save(root / "bucket_weights.npy", self.weights)
        for i, chunk in enumerate(self.chunks):
            (root / f"doclens.{i}.json").write_text(json.dumps(chunk))
        counts = {"num_documents": len(self.doclens), "num_embeddings": len(self.codes), "num_partitions": 64}
        self.describe(root, **counts, nbits=self.nbits, num_chunks=len(self.chunks), **extra)

    def describe(self, root: Path, **content: Any) -> None:
        (root / "metadata.json").write_text(json.dumps({"avg_doclen": 3.5, "unknown": [1], **content}))

    def write_chunks(self, root: Path, only: list[int] | None = None) -> None:
        for i, (start, stop) in enumerate(zip(self.bounds()[:-1], self.bounds()[1:], strict=True)):
            if only is None or i in only:
                np.save(root / f"{i}.codes.npy", self.codes[start:stop].astype("<i8"))
                np.save(root / f"{i}.residuals.npy", self.residuals[start:stop])

    def write_merged(self, root: Path, padding: int = 3, manifest: bool = True) -> None:
        rubbish = np.full(padding, 9999, "<i8")  # after a deletion padding rows may hold old data, or anything
        np.save(root / "merged_codes.npy", np.concatenate([self.codes.astype("<i8"), rubbish]))
        np.save(root / "merged_residuals.npy", np.concatenate([self.residuals, np.full((padding, self.residuals.shape[1]), 7, np.uint8)]))
        for payload in ("codes", "residuals") if manifest else ():
            rows = {f"{i}.{payload}.npy": {"rows": sum(chunk), "merged": True, "mtime": None} for i, chunk in enumerate(self.chunks)}
            (root / f"merged_{payload}.manifest.json").write_text(json.dumps(rows))

    def write_fastplaid(self, root: Path) -> Path:
        """FastPlaid 1.7: the merged files are the only copy."""
        self.write_base(root, frozen=True, mutable=True, compress_only=False)
        self.write_merged(root)
        return root

    def write_nextplaid(self, root: Path) -> Path:
        self.write_base(root, next_plaid_compatible=True, embedding_dim=DIM)
        self.write_chunks(root)
        return root


CHUNKS = [[3, 0, 5, 1], [], [2, 2, 0], [9]]


@pytest.fixture
def peer() -> Peer:
    return Peer(CHUNKS)


def check(index: PlaidIndex, peer: Peer, **bounds: int) -> None:
    """Everything the reader gives, in one piece, is what the loops give."""
    blocks = list(index.blocks(**bounds))
    np.testing.assert_array_equal(np.concatenate([block.ids for block in blocks]), np.arange(len(peer.doclens)))
    np.testing.assert_array_equal(np.concatenate([block.doclens for block in blocks]), peer.doclens)
    tokens = np.concatenate([block.tokens for block in blocks])
    assert tokens.dtype == np.float32
    np.testing.assert_allclose(tokens, peer.tokens(), atol=2e-6)
    assert all(len(block.tokens) == block.doclens.sum() for block in blocks)


def test_bucket_numbers_run_left_to_right_with_their_bits_reversed() -> None:
    for nbits, buckets in ((1, [1, 0, 1, 1, 0, 1, 0, 0]), (2, [1, 3, 2, 0]), (4, [13, 2]), (8, [0b00101101])):
        weights = np.arange(1 << nbits, dtype=np.float32)
        assert byte_weights(weights)[0xB4].tolist() == buckets


@pytest.mark.parametrize("nbits", [1, 2, 4, 8])
def test_decoding_equals_plain_loops_in_both_layouts(tmp_path: Path, nbits: int) -> None:
    peer = Peer(CHUNKS, nbits)
    check(read(peer.write_fastplaid(tmp_path / "fp")), peer)
    check(read(peer.write_nextplaid(tmp_path / "np")), peer)


def test_reading_gives_the_facts_of_the_index(tmp_path: Path, peer: Peer) -> None:
    index = read(peer.write_fastplaid(tmp_path))
    assert (index.n_documents, index.n_tokens, index.dim, index.nbits) == (8, 22, DIM, 4)
    assert not index.nextplaid
    assert not index.has_fields
    assert not index.exact
    assert index.notes == []
    assert list(index.fields()) == []
    assert index.config.nbits == 4


@pytest.mark.parametrize(("n_documents", "max_tokens"), [(1, 100), (2, 100), (3, 4), (100, 1), (100, 100)])
def test_blocks_keep_both_bounds_and_lose_no_document(tmp_path: Path, peer: Peer, n_documents: int, max_tokens: int) -> None:
    index = read(peer.write_nextplaid(tmp_path))
    check(index, peer, n_documents_per_block=n_documents, max_tokens=max_tokens)
    for block in index.blocks(n_documents, max_tokens=max_tokens):
        assert 1 <= len(block.ids) <= n_documents
        assert len(block.tokens) <= max_tokens or (block.doclens > 0).sum() == 1


def test_a_block_has_at_least_one_document(tmp_path: Path, peer: Peer) -> None:
    index = read(peer.write_nextplaid(tmp_path))
    with pytest.raises(InvalidRequest):
        next(index.blocks(0))


def test_chunks_are_in_numeric_order(tmp_path: Path) -> None:
    peer = Peer([[1]] * 12)
    check(read(peer.write_nextplaid(tmp_path / "np")), peer)
    check(read(peer.write_fastplaid(tmp_path / "fp")), peer)


def test_an_index_emptied_by_deletions_has_no_documents(tmp_path: Path) -> None:
    peer = Peer([[], []])
    peer.write_base(tmp_path)
    index = read(tmp_path)
    assert index.n_documents == 0
    assert list(index.blocks()) == []


def test_documents_without_tokens_only_need_no_payload(tmp_path: Path) -> None:
    peer = Peer([[0, 0], []])
    peer.write_base(tmp_path)
    (block,) = read(tmp_path).blocks()
    assert block.tokens.shape == (0, DIM)
    assert block.ids.tolist() == [0, 1]


def test_a_merged_file_without_manifest_is_cut_by_document_lengths(tmp_path: Path, peer: Peer) -> None:
    peer.write_base(tmp_path)
    peer.write_merged(tmp_path, manifest=False)
    check(read(tmp_path), peer)


def test_a_chunk_file_is_newer_than_the_merged_file_and_those_behind_it_lie_where_they_were(tmp_path: Path) -> None:
    before = Peer([[3, 4], [5], [2]])
    before.write_fastplaid(tmp_path)
    after = Peer([[4], [5], [2]])
    kept = np.arange(3, len(before.codes))  # the first document was deleted
    after.codes, after.buckets, after.residuals = before.codes[kept], before.buckets[kept], before.residuals[kept]
    after.write_base(tmp_path, frozen=True, mutable=True)
    after.write_chunks(tmp_path, only=[0])
    check(read(tmp_path), after)


def test_codes_and_residuals_may_come_from_different_copies(tmp_path: Path, peer: Peer) -> None:
    peer.write_fastplaid(tmp_path)
    peer.write_chunks(tmp_path)
    for i in range(len(CHUNKS)):
        (tmp_path / f"{i}.codes.npy").unlink()
    (tmp_path / "merged_residuals.npy").unlink()
    check(read(tmp_path), peer)


def test_nextplaid_ignores_stale_merged_files(tmp_path: Path, peer: Peer) -> None:
    peer.write_nextplaid(tmp_path)
    Peer([[1]], seed=9).write_merged(tmp_path)
    check(read(tmp_path), peer)


def test_numbers_come_in_any_of_the_types_that_were_written(tmp_path: Path, peer: Peer) -> None:
    peer.write_nextplaid(tmp_path)
    np.save(tmp_path / "centroids.npy", peer.centroids.astype("<f4"))
    np.save(tmp_path / "0.codes.npy", np.load(tmp_path / "0.codes.npy").astype("<i4"))
    check(read(tmp_path), peer)
    peer.weights = peer.weights.astype(np.float16)
    np.save(tmp_path / "bucket_weights.npy", peer.weights)
    check(read(tmp_path), peer)


def unaligned(path: Path) -> None:
    """Write an array again so that its data starts at 1 modulo 64, as NextPlaid's writers do."""
    array = np.load(path)
    text = repr({"descr": array.dtype.str, "fortran_order": False, "shape": array.shape}).encode()
    header = text + b" " * (129 - 10 - len(text) - 1) + b"\n"
    path.write_bytes(b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + array.tobytes())


def test_unaligned_data_is_read(tmp_path: Path, peer: Peer) -> None:
    peer.write_fastplaid(tmp_path)
    for name in ("merged_codes.npy", "merged_residuals.npy", "centroids.npy"):
        unaligned(tmp_path / name)
    check(read(tmp_path), peer)


def test_blocks_can_start_at_any_document(tmp_path: Path, peer: Peer) -> None:
    index = read(peer.write_nextplaid(tmp_path))
    offsets = np.cumsum([0, *peer.doclens])
    for first in range(len(peer.doclens) + 2):
        blocks = list(index.blocks(2, first_document=first))
        assert [id_ for block in blocks for id_ in block.ids.tolist()] == list(range(first, len(peer.doclens)))
        tokens = np.concatenate([np.empty((0, DIM), np.float32), *(block.tokens for block in blocks)])
        np.testing.assert_allclose(tokens, peer.tokens()[offsets[min(first, 8)] :], atol=2e-6)


def test_a_sample_is_whole_documents_and_as_large_as_asked(tmp_path: Path) -> None:
    peer = Peer([[4] * 30, [0] * 5, [6] * 20])
    index = read(peer.write_fastplaid(tmp_path))
    sample = index.sample(50)
    assert 50 <= len(sample) < 56
    distance = np.abs(sample[:, None].astype(np.float64) - peer.tokens()).max(axis=2).min(axis=1)
    assert distance.max() < 1e-3, "float16 of tokens of the index"
    assert len(index.sample(10**6)) == index.n_tokens


def test_a_source_brings_vectors_and_rows_together(tmp_path: Path, peer: Peer) -> None:
    peer.write_nextplaid(tmp_path)
    write_database(tmp_path, lambda database: write_v0(database, ROWS[:3], start=4))
    source = PlaidSource(read(tmp_path), without=["tags"])
    assert (source.n_documents, source.n_tokens) == (8, 22)
    for first in (0, 5):
        blocks = list(source.blocks(first))
        fields = [row for block in blocks for row in block.fields or []]
        expected = [{}] * 4 + [{name: row[name] for name in ("title", "year", "order")} for row in ROWS[:3]] + [{}]
        assert fields == expected[first:]
        lengths = [n for block in blocks for n in np.diff(block.offsets).tolist()]
        assert lengths == [max(n, 1) for n in peer.doclens[first:]], "a document without tokens comes with one zero vector"
    assert PlaidSource(read(tmp_path)).fingerprint == source.fingerprint
    os.utime(tmp_path / "metadata.db", (1, 1))
    assert PlaidSource(read(tmp_path)).fingerprint != source.fingerprint


async def test_imported_documents_keep_their_ids_and_metadata_and_are_found(tmp_path: Path) -> None:
    peer = Peer([[4, 0, 3, 5], [6, 2, 3, 4]], nbits=4)
    peer.write_nextplaid(tmp_path)
    write_database(tmp_path, lambda database: write_v0(database, ROWS[:3], start=4))
    reader = Reader(open_store("memory://"))
    await create(reader.store, "peer", IndexConfig(nbits=8))
    report = await BulkBuild(reader, "peer", PlaidSource(read(tmp_path))).run()
    assert report.n_documents == 8
    snapshot = await reader.snapshot("peer")
    assert (await snapshot.live_ids()).tolist() == list(range(8))
    assert [row and row["title"] for row in await snapshot.rows([4, 5, 0])] == [ROWS[0]["title"], ROWS[1]["title"], None]
    tokens, bounds = peer.tokens().astype(np.float32), np.cumsum([0, *peer.doclens])
    queries = [tokens[bounds[n] : bounds[n + 1]] for n in (0, 3, 7)]
    answers = await Searcher(reader).search(snapshot, queries, SearchParams(k=1))
    assert [answer.ids.tolist() for answer in answers] == [[0], [3], [7]]
    assert [float(answer.scores[0]) for answer in answers] == pytest.approx([4, 5, 4], abs=0.05)


# What is refused.


def drop(name: str) -> Callable[[Path], None]:
    return lambda root: (root / name).unlink()


def save(name: str, array: np.ndarray) -> Callable[[Path], None]:
    return lambda root: np.save(root / name, array)


def put(name: str, text: str) -> Callable[[Path], None]:
    def write(root: Path) -> None:
        (root / name).write_text(text)

    return write


def cut(name: str) -> Callable[[Path], None]:
    return lambda root: os.truncate(root / name, (root / name).stat().st_size - 1)


DAMAGE = {
    "a chunk's lengths are gone": drop("doclens.2.json"),
    "lengths sum to more than a chunk has": put("doclens.0.json", "[3, 0, 5, 2]"),
    "lengths sum to less": put("doclens.0.json", "[3, 0, 5]"),
    "negative length": put("doclens.0.json", "[3, -1, 6, 1]"),
    "lengths that overflow": put("doclens.0.json", f"[{2**62}, {2**62}, {2**62}, {2**62}, 9]"),
    "lengths beyond any integer": put("doclens.0.json", f"[{2**80}]"),
    "lengths are text": put("doclens.0.json", '["3"]'),
    "lengths are cut": put("doclens.0.json", "[3, 0"),
    "no centroids": drop("centroids.npy"),
    "centroids are not finite": save("centroids.npy", np.full((CENTROIDS, DIM), np.nan, np.float32)),
    "centroids have one axis": save("centroids.npy", np.ones(DIM, np.float32)),
    "centroids lie in columns": save("centroids.npy", np.asfortranarray(np.ones((CENTROIDS, DIM), np.float32))),
    "centroids of another dimension": save("centroids.npy", np.ones((CENTROIDS, DIM + 8), np.float32)),
    "residuals would not fill bytes": save("centroids.npy", np.ones((CENTROIDS, DIM + 1), np.float32)),
    "centroids are integers": save("centroids.npy", np.ones((CENTROIDS, DIM), np.int32)),
    "centroids are cut": cut("centroids.npy"),
    "not an array file": put("centroids.npy", "rubbish"),
    "an empty array file": put("centroids.npy", ""),
    "weights of another nbits": save("bucket_weights.npy", np.ones(4, np.float32)),
    "nbits is 3": put("metadata.json", '{"nbits": 3, "num_chunks": 4}'),
    "nbits is a number in quotes": put("metadata.json", '{"nbits": "4", "num_chunks": 4}'),
    "no number of chunks": put("metadata.json", '{"nbits": 4}'),
    "metadata is not JSON": put("metadata.json", '{"nbits": 4'),
    "metadata is a list": put("metadata.json", "[]"),
    "config is not JSON": put("config.json", "?"),
}
NEXTPLAID_DAMAGE = {
    "a code without centroid": save("3.codes.npy", np.full(9, CENTROIDS)),
    "a negative code": save("3.codes.npy", np.full(9, -1)),
    "codes are cut": cut("3.codes.npy"),
    "a chunk's codes are gone": drop("3.codes.npy"),
    "a chunk's residuals are gone": drop("3.residuals.npy"),
    "codes are floats": save("3.codes.npy", np.ones(9)),
    "residuals are wide": save("3.residuals.npy", np.ones((9, DIM // 2), np.uint16)),
    "residuals are narrow": save("3.residuals.npy", np.ones((9, DIM // 4), np.uint8)),
}
FASTPLAID_DAMAGE = {
    "a code without centroid": save("merged_codes.npy", np.full(30, CENTROIDS)),
    "no codes": drop("merged_codes.npy"),
    "no residuals": drop("merged_residuals.npy"),
    "too few codes": save("merged_codes.npy", np.zeros(21, np.int64)),
    "too few residuals": save("merged_residuals.npy", np.zeros((21, DIM // 2), np.uint8)),
    "codes without axis": save("merged_codes.npy", np.array(1)),
    "residuals are narrow": save("merged_residuals.npy", np.zeros((30, DIM // 4), np.uint8)),
    "the manifest counts other rows": put("merged_codes.manifest.json", '{"0.codes.npy": {"rows": 8}, "2.codes.npy": {"rows": 4}}'),
    "the manifest has no such chunk": put("merged_codes.manifest.json", '{"0.codes.npy": {"rows": 9}, "2.codes.npy": {"rows": 4}}'),
    "the manifest is rubbish": put("merged_codes.manifest.json", '{"0.codes.npy": 9}'),
    "the manifest says not merged": put("merged_codes.manifest.json", '{"0.codes.npy": {"rows": 9, "merged": false}}'),
}


@pytest.mark.parametrize(
    ("layout", "damage"),
    [
        *(pytest.param(layout, damage, id=f"{layout}: {name}") for layout in ("np", "fp") for name, damage in DAMAGE.items()),
        *(pytest.param("np", damage, id=f"np: {name}") for name, damage in NEXTPLAID_DAMAGE.items()),
        *(pytest.param("fp", damage, id=f"fp: {name}") for name, damage in FASTPLAID_DAMAGE.items()),
    ],
)
def test_damage_is_said_and_never_decoded(tmp_path: Path, peer: Peer, layout: str, damage: Callable[[Path], None]) -> None:
    (peer.write_nextplaid if layout == "np" else peer.write_fastplaid)(tmp_path)
    damage(tmp_path)
    with pytest.raises(CorruptData) as caught:
        list(read(tmp_path).blocks())
    assert caught.value.details["object"]


def test_what_is_no_index_is_not_found(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="no such directory"):
        read(tmp_path / "nowhere")
    with pytest.raises(NotFound, match=r"no metadata\.json"):
        read(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(NotFound, match="declared but holds no documents"):
        read(tmp_path)


def test_an_index_that_lost_its_payload_in_a_conversion_is_told_so(tmp_path: Path, peer: Peer) -> None:
    peer.write_base(tmp_path, next_plaid_compatible=True)
    with pytest.raises(CorruptData, match="NextPlaid converted a FastPlaid index"):
        read(tmp_path)


def test_pickles_are_never_loaded(tmp_path: Path, peer: Peer) -> None:
    peer.write_fastplaid(tmp_path)
    pickled = np.array([np.ones(3), None], dtype=object)
    np.save(tmp_path / "embeddings.npy", pickled, allow_pickle=True)
    check(read(tmp_path), peer)
    np.save(tmp_path / "centroids.npy", pickled, allow_pickle=True)
    with pytest.raises(UnsupportedFormat, match="pickle"):
        read(tmp_path)


def test_an_index_of_sign_bits_is_refused(tmp_path: Path, peer: Peer) -> None:
    peer.write_nextplaid(tmp_path)
    (tmp_path / "config.json").write_text('{"nbits": 4, "binary": true}')
    with pytest.raises(UnsupportedFormat, match="binary"):
        read(tmp_path)


def test_counts_in_metadata_are_hearsay_and_a_difference_is_noted(tmp_path: Path, peer: Peer) -> None:
    peer.write_fastplaid(tmp_path)
    peer.describe(tmp_path, nbits=4, num_chunks=4, num_documents=7, num_embeddings=22)
    index = read(tmp_path)
    check(index, peer)
    assert index.notes == ["metadata.json says num_documents is 7, the files hold 8"]
    peer.describe(tmp_path, nbits=4, num_chunks=4, num_documents=0)  # FastPlaid's older form
    assert read(tmp_path).notes == []


def test_what_encoding_again_costs_is_noted_where_it_costs_something(tmp_path: Path) -> None:
    peer = Peer(CHUNKS, nbits=2)
    index = read(peer.write_nextplaid(tmp_path))
    assert "at 4 they lose none" in index.notes[0]
    write_raw(tmp_path, peer, peer.doclens)
    assert read(tmp_path).notes == [], "the original vectors are there"


@pytest.mark.parametrize("name", ["metadata.json", "merged_codes.npy", "doclens.2.json"])
def test_a_directory_that_changes_while_it_is_read_is_refused(tmp_path: Path, peer: Peer, name: str) -> None:
    peer.write_fastplaid(tmp_path)
    blocks = read(tmp_path).blocks(1)
    next(blocks)
    content = (tmp_path / name).read_bytes()
    (tmp_path / "new").write_bytes(content)
    os.replace(tmp_path / "new", tmp_path / name)
    with pytest.raises(Conflict, match="changed while it was read"):
        list(blocks)


def test_a_file_removed_while_it_is_read_is_refused(tmp_path: Path, peer: Peer) -> None:
    index = read(peer.write_nextplaid(tmp_path))
    blocks = index.blocks(1)
    next(blocks)
    (tmp_path / "3.residuals.npy").unlink()
    with pytest.raises(Conflict):
        list(blocks)


# The vectors as they came.


def write_raw(root: Path, peer: Peer, lengths: list[int]) -> np.ndarray:
    raw = np.random.default_rng(8).standard_normal((sum(lengths), DIM)).astype(np.float32) * 3
    np.save(root / "embeddings.npy", raw)
    (root / "embeddings_lengths.json").write_text(json.dumps(lengths))
    return raw


def test_original_vectors_are_taken_where_they_cover_every_document(tmp_path: Path, peer: Peer) -> None:
    peer.write_nextplaid(tmp_path)
    raw = write_raw(tmp_path, peer, peer.doclens)
    index = read(tmp_path)
    assert index.exact
    tokens = np.concatenate([block.tokens for block in index.blocks(2)])
    np.testing.assert_allclose(tokens, raw / np.linalg.norm(raw, axis=1, keepdims=True), atol=1e-6)
    decoded = np.concatenate([block.tokens for block in index.blocks(2, reconstruct=True)])
    np.testing.assert_allclose(decoded, peer.tokens(), atol=2e-6)


@pytest.mark.parametrize("lengths", [[3, 0, 5, 1], [3, 0, 5, 1, 2, 2, 0, 8], [22]])
def test_original_vectors_of_other_documents_are_left_aside(tmp_path: Path, peer: Peer, lengths: list[int]) -> None:
    peer.write_nextplaid(tmp_path)
    write_raw(tmp_path, peer, lengths)
    index = read(tmp_path)
    assert not index.exact
    assert "left aside" in index.notes[0]
    check(index, peer)


def test_an_original_vector_that_is_not_finite_is_refused(tmp_path: Path, peer: Peer) -> None:
    peer.write_nextplaid(tmp_path)
    raw = write_raw(tmp_path, peer, peer.doclens)
    raw[20, 3] = np.inf
    np.save(tmp_path / "embeddings.npy", raw)
    with pytest.raises(CorruptData, match="not finite"):
        list(read(tmp_path).blocks())


# Settings.


def test_settings_come_from_the_servers_config(tmp_path: Path, peer: Peer) -> None:
    peer.write_nextplaid(tmp_path)
    settings = {"nbits": 2, "batch_size": 10, "seed": 3, "start_from_scratch": 5, "max_documents": 50, "fts_tokenizer": "trigram"}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    config = read(tmp_path).config
    assert config.nbits == 4, "what the payload has, not what a setting says"
    assert (config.batch_size, config.seed, config.start_from_scratch) == (10, 3, 5)
    assert (config.max_documents, config.fts_tokenizer) == (50, "trigram")


def test_settings_that_we_do_not_have_are_noted(tmp_path: Path, peer: Peer) -> None:
    peer.write_nextplaid(tmp_path)
    (tmp_path / "config.json").write_text('{"max_documents": 0, "seed": null, "fts_tokenizer": "identifier_aware"}')
    index = read(tmp_path)
    assert index.config.max_documents is None
    assert index.config.fts_tokenizer == "unicode61"
    assert len(index.notes) == 2


# Metadata rows.

ROWS: Rows = [{"title": f"Nº {n}", "year": 1990 + n if n % 3 else None, "order": n / 4, "tags": '["a", 1]'} for n in range(8)]
TYPES = {"title": "TEXT", "year": "INTEGER", "order": "REAL", "tags": "BLOB"}


def declared(names: list[str]) -> str:
    return ", ".join(f'"{name}" {TYPES[name]}' for name in names)


def write_v0(database: sqlite3.Connection, rows: Rows, start: int = 0, subset: str = "INTEGER PRIMARY KEY") -> None:
    database.execute(f"CREATE TABLE METADATA (_subset_ {subset}, {declared(list(TYPES))})")
    database.executemany("INSERT INTO METADATA VALUES (?, ?, ?, ?, ?)", [(start + n, *row.values()) for n, row in enumerate(rows)])


def write_v1(database: sqlite3.Connection, rows: Rows) -> None:
    write_v0(database, rows[::-1], subset="INTEGER NOT NULL")
    database.execute("UPDATE METADATA SET _subset_ = ? - _subset_", (len(rows) - 1,))
    database.execute("CREATE INDEX idx_metadata_subset ON METADATA (_subset_)")
    database.execute("PRAGMA user_version = 1")


def write_v2(database: sqlite3.Connection, rows: Rows, shift: int = 3) -> None:
    """Content ids are not document ids: they stay where they were when documents before them are deleted."""
    database.execute("CREATE TABLE METADATA (_subset_ INTEGER NOT NULL, _content_id_ INTEGER NOT NULL, language TEXT)")
    database.execute(f"CREATE TABLE METADATA_CONTENT (_content_id_ INTEGER PRIMARY KEY, {declared(list(TYPES))})")
    for n, row in enumerate(rows):
        database.execute("INSERT INTO METADATA VALUES (?, ?, ?)", (n, n + shift, row.get("language")))
        database.execute("INSERT INTO METADATA_CONTENT VALUES (?, ?, ?, ?, ?)", (n + shift, *(row[name] for name in TYPES)))
    database.execute("CREATE TABLE _FTS_SETTINGS_ (key TEXT, value TEXT)")
    database.execute("INSERT INTO _FTS_SETTINGS_ VALUES ('tokenizer', 'trigram')")
    database.execute("PRAGMA user_version = 2")


def write_database(root: Path, write: Callable[[sqlite3.Connection], None]) -> None:
    database = sqlite3.connect(root / "metadata.db")
    with database:
        write(database)
    database.close()


@pytest.mark.parametrize("write", [write_v0, write_v1])
def test_rows_of_the_one_table_layouts_come_by_document(tmp_path: Path, peer: Peer, write: Callable[..., None]) -> None:
    peer.write_fastplaid(tmp_path)
    write_database(tmp_path, lambda database: write(database, ROWS))
    assert list(read(tmp_path).fields()) == list(enumerate(ROWS))


def test_rows_of_the_two_table_layout_are_joined_by_content(tmp_path: Path, peer: Peer) -> None:
    peer.write_nextplaid(tmp_path)
    rows: Rows = [{"language": "en" if n % 2 else None, **row} for n, row in enumerate(ROWS)]
    write_database(tmp_path, lambda database: write_v2(database, rows))
    index = read(tmp_path)
    assert list(index.fields()) == list(enumerate(rows))
    assert index.config.fts_tokenizer == "trigram"


def test_columns_can_be_left_out(tmp_path: Path, peer: Peer) -> None:
    peer.write_fastplaid(tmp_path)
    write_database(tmp_path, lambda database: write_v0(database, ROWS))
    assert next(iter(read(tmp_path).fields(without=["tags", "order"]))) == (0, {"title": "Nº 0", "year": None})


def test_nextplaid_documents_added_without_metadata_have_no_row(tmp_path: Path, peer: Peer) -> None:
    peer.write_nextplaid(tmp_path)
    write_database(tmp_path, lambda database: write_v0(database, ROWS[:3], start=4))
    assert [id_ for id_, _ in read(tmp_path).fields()] == [4, 5, 6]


def test_rows_still_in_the_wal_are_read_and_the_directory_is_left_as_it_was(tmp_path: Path, peer: Peer) -> None:
    peer.write_nextplaid(tmp_path)
    server = sqlite3.connect(tmp_path / "metadata.db")  # stays open, so that the WAL is not folded in
    server.execute("PRAGMA journal_mode = WAL")
    with server:
        write_v0(server, ROWS)
    with server:
        server.execute("UPDATE METADATA SET title = 'newer' WHERE _subset_ = 7")
    assert (tmp_path / "metadata.db-wal").stat().st_size > 0
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir() if not path.name.endswith("-shm")}
    rows = dict(read(tmp_path).fields())
    assert rows[7]["title"] == "newer"
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir() if not path.name.endswith("-shm")} == before
    server.close()


def test_a_wal_database_without_wal_is_read_in_place(tmp_path: Path, peer: Peer) -> None:
    peer.write_nextplaid(tmp_path)
    server = sqlite3.connect(tmp_path / "metadata.db")
    server.execute("PRAGMA journal_mode = WAL")
    with server:
        write_v0(server, ROWS)
    server.close()
    assert len(list(read(tmp_path).fields())) == 8
    assert not (tmp_path / "metadata.db-shm").exists()


def test_metadata_that_changes_while_it_is_read_is_refused(tmp_path: Path, peer: Peer) -> None:
    peer.write_nextplaid(tmp_path)
    write_database(tmp_path, lambda database: write_v0(database, ROWS))
    rows = read(tmp_path).fields()
    next(rows)
    os.utime(tmp_path / "metadata.db", (1, 1))
    with pytest.raises(Conflict):
        list(rows)


def repeat_row(database: sqlite3.Connection) -> None:
    write_v1(database, ROWS)
    database.execute("UPDATE METADATA SET _subset_ = 1 WHERE _subset_ = 2")


def orphan_row(database: sqlite3.Connection) -> None:
    write_v2(database, ROWS)
    database.execute("DELETE FROM METADATA_CONTENT WHERE _content_id_ = 5")


def text_id(database: sqlite3.Connection) -> None:
    write_v1(database, ROWS)
    database.execute("UPDATE METADATA SET _subset_ = 'x' WHERE _subset_ = 2")


@pytest.mark.parametrize(
    ("layout", "write"),
    [
        ("fp", lambda database: write_v0(database, ROWS[:7])),
        ("fp", lambda database: write_v0(database, [*ROWS, ROWS[0]])),
        ("np", lambda database: write_v0(database, ROWS, start=1)),
        ("np", lambda database: write_v0(database, ROWS, start=-1)),
        ("np", repeat_row),
        ("np", orphan_row),
        ("np", text_id),
        ("np", lambda database: database.execute("CREATE TABLE OTHER (x)")),
        ("np", lambda database: database.execute('CREATE TABLE METADATA (_subset_ INTEGER, "a"" b" TEXT)')),
    ],
    ids=["too few", "too many", "beyond the last", "before the first", "twice", "no content", "not a number", "no table", "odd column"],
)
def test_rows_that_do_not_belong_to_the_documents_are_refused(
    tmp_path: Path, peer: Peer, layout: str, write: Callable[[sqlite3.Connection], None]
) -> None:
    (peer.write_nextplaid if layout == "np" else peer.write_fastplaid)(tmp_path)
    write_database(tmp_path, write)
    index = read(tmp_path)
    check(index, peer)
    with pytest.raises(CorruptData):
        list(index.fields())


def test_a_file_that_is_no_database_is_refused_for_its_rows_only(tmp_path: Path, peer: Peer) -> None:
    peer.write_nextplaid(tmp_path)
    (tmp_path / "metadata.db").write_text("not a database, and long enough to have been one once" * 10)
    index = read(tmp_path)
    check(index, peer)
    assert "SQLite cannot read it" in index.notes[0]
    with pytest.raises(CorruptData):
        list(index.fields())


def test_binary_values_are_text_or_refused(tmp_path: Path, peer: Peer) -> None:
    peer.write_fastplaid(tmp_path)
    write_database(tmp_path, lambda database: write_v0(database, [{**row, "tags": b'{"a": 1}'} for row in ROWS]))
    assert next(iter(read(tmp_path).fields()))[1]["tags"] == '{"a": 1}'
    (tmp_path / "metadata.db").unlink()
    write_database(tmp_path, lambda database: write_v0(database, [{**row, "tags": b"\xff"} for row in ROWS]))
    with pytest.raises(InvalidRequest, match="leave the column out"):
        list(read(tmp_path).fields())
    assert len(list(read(tmp_path).fields(without=["tags"]))) == 8
