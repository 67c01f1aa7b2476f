"""What the encoders are worth: nDCG@10 and recall@100 of exhaustive MaxSim on collections in BEIR's form, beside BM25.

usage: python -m benchmarks.encoders --data FOLDER [--data FOLDER ...] [--vectors FOLDER ...] [--model FOLDER --int8] [--limit N]

--data      corpus.jsonl (or .gz, .xz) with _id, title, text; queries.jsonl with _id, text; qrels.tsv with query-id, corpus-id, score
--vectors   per --data in the same order: token vectors made before (doc_emb.npy, doclens.npy, query_emb.npy, query_lens.npy, ids.json,
            query_ids.json), scored as they are; saves encoding a collection for minutes
--model     an ONNX model folder to encode with
BM25 needs the package bm25s (extra `bench`) and is left out without it. Prints one Markdown row per collection and encoder.
"""

from __future__ import annotations

import argparse
import gzip
import json
import lzma
import math
import time
from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from engine.encoding.encoder import Encoder
from engine.encoding.hashing import LexicalEncoder
from engine.encoding.words import stem, words

BLOCK_TOKENS = 8192


class Collection:
    """Documents, queries that have a judged document, and judgements by row number."""

    def __init__(self, folder: Path, limit: int | None) -> None:
        self.name = folder.name
        rows = read_jsonl(folder / "corpus.jsonl")[:limit]
        self.ids = [row["_id"] for row in rows]
        self.texts = [f"{row.get('title', '')} {row['text']}".strip() for row in rows]
        place = {document: i for i, document in enumerate(self.ids)}
        judged: dict[str, dict[int, float]] = {}
        for line in (folder / "qrels.tsv").read_text().splitlines()[1:]:
            query, document, grade = line.split("\t")
            if document in place and float(grade) > 0:
                judged.setdefault(query, {})[place[document]] = float(grade)
        kept = [row for row in read_jsonl(folder / "queries.jsonl") if row["_id"] in judged]
        self.query_ids = [row["_id"] for row in kept]
        self.queries = [row["text"] for row in kept]
        self.judgements = [judged[query] for query in self.query_ids]


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    for opener, suffix in ((open, ""), (gzip.open, ".gz"), (lzma.open, ".xz")):
        candidate = Path(f"{path}{suffix}")
        if candidate.exists():
            file: TextIO
            with opener(candidate, "rt", encoding="utf-8") as file:
                return [json.loads(line) for line in file]
    raise SystemExit(f"no {path}, .gz or .xz")


def ndcg(ranking: Sequence[int], grades: dict[int, float], k: int) -> float:
    gain = sum((2 ** grades.get(document, 0.0) - 1) / math.log2(rank + 2) for rank, document in enumerate(ranking[:k]))
    ideal = sum((2**grade - 1) / math.log2(rank + 2) for rank, grade in enumerate(sorted(grades.values(), reverse=True)[:k]))
    return gain / ideal


def recall(ranking: Sequence[int], grades: dict[int, float], k: int) -> float:
    return len(set(ranking[:k]) & set(grades)) / len(grades)


def rankings_by_maxsim(tokens: np.ndarray, offsets: np.ndarray, query_tokens: np.ndarray, query_offsets: np.ndarray) -> list[list[int]]:
    """The best 100 documents of each query by exhaustive MaxSim. Each block of documents is read once, for all queries."""
    n_documents = len(offsets) - 1
    scores = np.full((len(query_offsets) - 1, n_documents), -np.inf, np.float32)
    first = 0
    while first < n_documents:
        last = max(first + 1, int(np.searchsorted(offsets, offsets[first] + BLOCK_TOKENS, "right")) - 1)
        block = tokens[offsets[first] : offsets[last]].astype(np.float32)
        starts = offsets[first:last] - offsets[first]
        held = np.flatnonzero(np.diff(offsets[first : last + 1]))
        best = np.maximum.reduceat(query_tokens @ block.T, starts[held], axis=1)
        scores[:, first + held] = np.add.reduceat(best, query_offsets[:-1], axis=0)
        first = last
    return [np.argsort(-row, kind="stable")[:100].tolist() for row in scores]


def rankings_by_bm25(collection: Collection) -> list[list[int]] | None:
    try:
        import bm25s  # type: ignore[import-not-found,import-untyped,unused-ignore]
    except ImportError:
        return None
    index = bm25s.BM25()
    index.index([[stem(word) for word in words(text)] for text in collection.texts], show_progress=False)
    queries = [[stem(word) for word in words(text)] for text in collection.queries]
    return [[int(i) for i in index.retrieve([query], k=100, show_progress=False)[0][0]] for query in queries]


def rankings_by_encoder(encoder: Encoder, collection: Collection) -> tuple[list[list[int]], str]:
    start = time.perf_counter()
    tokens, offsets = encoder.encode_documents(collection.texts)
    seconds = time.perf_counter() - start
    query_tokens, query_offsets = encoder.encode_queries(collection.queries)
    note = f"{len(tokens) / len(collection.texts):.0f} tokens a document, {len(tokens) / seconds:,.0f} tokens/s"
    return rankings_by_maxsim(tokens, offsets, query_tokens, query_offsets), note


def rankings_by_vectors(folder: Path, collection: Collection) -> list[list[int]]:
    ids = json.loads((folder / "ids.json").read_text())
    if ids[: len(collection.ids)] != collection.ids:
        raise SystemExit(f"{folder} was made from other documents than {collection.name}")
    offsets = np.concatenate([[0], np.cumsum(np.load(folder / "doclens.npy"), dtype=np.int64)])[: len(collection.ids) + 1]
    query_ids = json.loads((folder / "query_ids.json").read_text())
    bounds = list(pairwise(np.concatenate([[0], np.cumsum(np.load(folder / "query_lens.npy"), dtype=np.int64)])))
    all_queries = np.load(folder / "query_emb.npy").astype(np.float32)
    wanted = [bounds[query_ids.index(query)] for query in collection.query_ids]
    query_offsets = np.concatenate([[0], np.cumsum([end - start for start, end in wanted])])
    query_tokens = np.concatenate([all_queries[start:end] for start, end in wanted])
    return rankings_by_maxsim(np.load(folder / "doc_emb.npy", mmap_mode="r"), offsets, query_tokens, query_offsets)


def report(collection: Collection, name: str, rankings: Iterable[list[int]], note: str = "") -> None:
    pairs = list(zip(rankings, collection.judgements, strict=True))
    quality = np.mean([ndcg(ranking, grades, 10) for ranking, grades in pairs])
    found = np.mean([recall(ranking, grades, 100) for ranking, grades in pairs])
    print(f"| {collection.name} | {name} | {quality:.4f} | {found:.4f} | {note} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, action="append", required=True)
    parser.add_argument("--vectors", type=Path, action="append", default=[])
    parser.add_argument("--model", type=Path)
    parser.add_argument("--int8", action="store_true")
    parser.add_argument("--limit", type=int)
    arguments = parser.parse_args()
    print("| collection | encoder | nDCG@10 | recall@100 | |\n|---|---|---|---|---|")
    for i, folder in enumerate(arguments.data):
        collection = Collection(folder, arguments.limit)
        ranked = rankings_by_bm25(collection)
        if ranked is not None:
            report(collection, "BM25 (bm25s, same words and stems)", ranked)
        for dim in (128, 256):
            report(collection, f"lexical, D = {dim}", *rankings_by_encoder(LexicalEncoder(dim), collection))
        if i < len(arguments.vectors):
            report(collection, "vectors made before", rankings_by_vectors(arguments.vectors[i], collection))
        if arguments.model:
            from engine.encoding.onnx import OnnxEncoder

            encoder = OnnxEncoder(arguments.model, int8=arguments.int8)
            report(collection, encoder.info.name or "onnx", *rankings_by_encoder(encoder, collection))


if __name__ == "__main__":
    main()
