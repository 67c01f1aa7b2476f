"""Collections to measure on: folders of token vectors made by any encoder, and a seeded generator for sizes beyond them.

A folder of vectors holds

    doc_emb.npy    float16 (T, D), unit rows, documents end to end      doclens.npy     int (N,)
    query_emb.npy  float16 or float32, queries end to end               query_lens.npy  int (queries,)
    ids.json, query_ids.json   the collection's own names of both       qrels.tsv       query-id, corpus-id, score (optional)

qrels.tsv may also lie in the BEIR folder that the vectors were made from. Documents are numbered 0..N-1 here, as every engine will.

    python -m benchmarks.collections FOLDER --documents 100000 --seed 7        writes a synthetic folder
"""

from __future__ import annotations

import argparse
import csv
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from engine.evaluate import Qrels


@dataclass(frozen=True)
class Vectors:
    """tokens float16 (T, D), may be a memory map; offsets int64 (N + 1,); queries float32; query_offsets int64; qrels or None."""

    name: str
    tokens: np.ndarray
    offsets: np.ndarray
    queries: np.ndarray
    query_offsets: np.ndarray
    qrels: Qrels | None

    @property
    def n_documents(self) -> int:
        return len(self.offsets) - 1

    @property
    def n_tokens(self) -> int:
        return int(self.offsets[-1])

    @property
    def n_queries(self) -> int:
        return len(self.query_offsets) - 1

    @property
    def dim(self) -> int:
        return int(self.tokens.shape[1])

    @property
    def doclens(self) -> np.ndarray:
        return np.diff(self.offsets)

    def query(self, i: int) -> np.ndarray:
        """float32 (Q, D)"""
        return self.queries[self.query_offsets[i] : self.query_offsets[i + 1]]


def load(folder: Path, *, n_documents: int | None = None, n_queries: int | None = None, beir: Path | None = None) -> Vectors:
    """The first n_documents and n_queries of a folder; judgements of documents that are left out are left out too."""
    offsets = np.concatenate([[0], np.cumsum(np.load(folder / "doclens.npy")[:n_documents])]).astype(np.int64)
    query_offsets = np.concatenate([[0], np.cumsum(np.load(folder / "query_lens.npy")[:n_queries])]).astype(np.int64)
    tokens = np.load(folder / "doc_emb.npy", mmap_mode="r")[: offsets[-1]]
    queries = np.load(folder / "query_emb.npy")[: query_offsets[-1]].astype(np.float32)
    qrels = None
    for place in (folder, beir):
        if place is not None and (place / "qrels.tsv").exists():
            ids = json.loads((folder / "ids.json").read_text())[:n_documents]
            query_ids = json.loads((folder / "query_ids.json").read_text())[:n_queries]
            qrels = read_qrels(place / "qrels.tsv", ids, query_ids)
            break
    return Vectors(folder.name, tokens, offsets, queries, query_offsets, qrels)


def read_qrels(path: Path, ids: list[str], query_ids: list[str]) -> Qrels:
    """BEIR's form with or without its header line; documents become their numbers."""
    number = {str(id_): n for n, id_ in enumerate(ids)}
    row = {str(id_): i for i, id_ in enumerate(query_ids)}
    judged: list[dict[int, float]] = [{} for _ in query_ids]
    with path.open(newline="") as file:
        for query, document, gain in csv.reader(file, delimiter="\t"):
            if query in row and document in number:
                judged[row[query]][number[document]] = float(gain)
    return Qrels.of(judged)


# Synthetic collections.


@dataclass(frozen=True)
class Geometry:
    """How tokens lie. Defaults were fitted to SciFact under a 128-d ColBERT encoder; README.md compares the two.

    A token is the normalised sum of: the mean of the whole space (real token spaces are a cone, not a ball), its word (Zipf-like
    frequencies, words of a topic are drawn more often in its documents), its topic (a document has two, in any proportion), its
    document (context bends every token of a document the same way), and noise that is its alone. All of them live mostly in leading
    directions: variances fall by a power law.
    """

    n_words: int = 6_000
    n_topics: int = 60
    words_per_topic: int = 120
    zipf: float = 1.0
    spectrum: float = 0.32
    mean: float = 0.33
    word: float = 1.0
    topic: float = 0.45
    document: float = 0.35
    noise: float = 0.32
    query_noise: float = 0.55
    query_share: float = 0.45
    mean_length: float = 160.0
    longest: int = 180
    query_length: int = 23


def synthetic(
    n_documents: int, *, n_queries: int = 200, dim: int = 128, seed: int = 0, geometry: Geometry | None = None, out: Path | None = None
) -> Vectors:
    """Topics -> documents -> tokens, and queries: noisy tokens, a share of them from one document (their judgement), the others from
    its topic.

    out  folder to write; doc_emb.npy is then a memory map, so that collections larger than memory can be made

    The same seed and sizes give the same vectors on one numpy release.
    """
    g = geometry or Geometry()
    rng = np.random.default_rng(seed)
    scales = np.arange(1, dim + 1) ** -g.spectrum
    scales /= np.sqrt((scales**2).mean())

    def directions(n: int) -> np.ndarray:
        """About unit length, float32 (n, dim), with the falling spectrum."""
        return np.asarray(rng.standard_normal((n, dim), dtype=np.float32) * (scales / np.sqrt(dim)), np.float32)

    mean, words, topics = directions(1), directions(g.n_words), directions(g.n_topics)
    doclens = np.clip(rng.normal(g.mean_length, g.mean_length / 6, n_documents), 4, g.longest).astype(np.int64)
    offsets = np.concatenate([[0], np.cumsum(doclens)]).astype(np.int64)
    frequent = _zipf(g.n_words, g.zipf)
    topic_words = rng.permuted(np.arange(g.n_words)[None].repeat(g.n_topics, 0), axis=1)[:, : g.words_per_topic]
    in_topic = _zipf(g.words_per_topic, g.zipf)
    topic_of, second_of = rng.choice(g.n_topics, (2, n_documents), p=_zipf(g.n_topics, 0.5))
    share_of = rng.uniform(0.4, 1.0, n_documents)
    tokens = _document_array(out, int(offsets[-1]), dim)
    for start in range(0, n_documents, 512):
        stop = min(start + 512, n_documents)
        lengths = doclens[start:stop]
        owner = np.repeat(np.arange(len(lengths)), lengths)
        first = rng.random(len(owner)) < share_of[start:stop][owner]
        topic = np.where(first, topic_of[start:stop][owner], second_of[start:stop][owner])
        word = np.where(
            rng.random(len(owner)) < 0.6,
            topic_words[topic, rng.choice(g.words_per_topic, len(owner), p=in_topic)],
            rng.choice(g.n_words, len(owner), p=frequent),
        )
        context = directions(len(lengths))
        block = (
            g.mean * mean + g.word * words[word] + g.topic * topics[topic] + g.document * context[owner] + g.noise * directions(len(owner))
        )
        tokens[offsets[start] : offsets[stop]] = _unit(block)
    chosen = rng.choice(n_documents, n_queries, replace=n_queries > n_documents)
    by_topic = np.argsort(topic_of, kind="stable")
    first_of_topic = np.searchsorted(topic_of[by_topic], np.arange(g.n_topics + 1))
    picks = np.empty((n_queries, g.query_length), np.int64)
    for i, n in enumerate(chosen):
        low, high = first_of_topic[topic_of[n] : topic_of[n] + 2]
        source = by_topic[rng.integers(low, high, g.query_length)]
        source[: int(g.query_share * g.query_length)] = n
        picks[i] = rng.integers(offsets[source], offsets[source + 1])
    rows = np.stack([tokens[row] for row in picks.ravel()]).astype(np.float32)
    queries = _unit(rows + g.query_noise * directions(len(rows)))
    query_offsets = np.arange(n_queries + 1, dtype=np.int64) * g.query_length
    qrels = Qrels.of([{int(n): 1.0} for n in chosen])
    made = Vectors(f"synthetic-{n_documents}", tokens, offsets, queries.astype(np.float16).astype(np.float32), query_offsets, qrels)
    if out is not None:
        _save(made, out, chosen)
    return made


def _zipf(n: int, exponent: float) -> np.ndarray:
    weights = np.arange(1, n + 1, dtype=np.float64) ** -exponent
    return np.asarray(weights / weights.sum())


def _unit(rows: np.ndarray) -> np.ndarray:
    return np.asarray(rows / np.linalg.norm(rows, axis=1, keepdims=True))


def _document_array(out: Path | None, n_tokens: int, dim: int) -> np.ndarray:
    if out is None:
        return np.empty((n_tokens, dim), np.float16)
    out.mkdir(parents=True, exist_ok=True)
    return np.lib.format.open_memmap(out / "doc_emb.npy", mode="w+", dtype=np.float16, shape=(n_tokens, dim))


def _save(vectors: Vectors, out: Path, answers: np.ndarray) -> None:
    assert isinstance(vectors.tokens, np.memmap)
    vectors.tokens.flush()
    np.save(out / "doclens.npy", vectors.doclens)
    np.save(out / "query_emb.npy", vectors.queries.astype(np.float16))
    np.save(out / "query_lens.npy", np.diff(vectors.query_offsets))
    (out / "ids.json").write_text(json.dumps([f"d{n}" for n in range(vectors.n_documents)]))
    (out / "query_ids.json").write_text(json.dumps([f"q{i}" for i in range(vectors.n_queries)]))
    lines = [f"q{i}\td{n}\t1" for i, n in enumerate(answers.tolist())]
    (out / "qrels.tsv").write_text("\n".join(["query-id\tcorpus-id\tscore", *lines]) + "\n")


def main() -> None:
    arguments = argparse.ArgumentParser(description="write a synthetic folder of vectors")
    arguments.add_argument("folder", type=Path)
    arguments.add_argument("--documents", type=int, required=True)
    arguments.add_argument("--queries", type=int, default=200)
    arguments.add_argument("--seed", type=int, default=0)
    given = arguments.parse_args()
    made = synthetic(given.documents, n_queries=given.queries, seed=given.seed, out=given.folder)
    print(f"{made.n_documents} documents, {made.n_tokens} tokens, {made.n_queries} queries in {given.folder}")


if __name__ == "__main__":
    main()
