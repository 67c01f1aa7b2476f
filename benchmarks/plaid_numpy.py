"""PLAID as NextPlaid 1.6 builds and searches it, in numpy: the baseline that every ratio of ours is against.

Faithful in what is computed: sample sizes, number of centroids, k-means iterations, quantile cutoffs and weights pooled over
dimensions, inverted lists, probing, threshold, centroid MaxSim of every candidate, n_full_scores // 4 exact scores on decoded and
normalised tokens. Free, and competent, in how: each stage is arranged for numpy as well as we can, so that a ratio says something about
the method and not about carelessness. In particular
* candidates' centroid MaxSim runs over the distinct codes of a document (same maximum, a third fewer of them), position by position over
  documents by falling number of codes, so that it is a few long `take` and `maximum` calls, in blocks that stay in cache;
* exact scoring decodes byte by byte through a table, in blocks, and divides similarities by the norm instead of vectors.

The index is kept on disk in NextPlaid's own layout, so sizes are the peer's sizes, and `engine.transfer.nextplaid` can read it.
Not here: updates, filters, more than 100,000 centroids (the peer's batched variant: the same numbers, less memory).
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks.collections import Vectors
from engine.transfer.nextplaid.index import byte_weights

_ASSIGN_VALUES = 1 << 21
"""float32 values of a block's similarity table while assigning: 8 MiB, so that the pass for the maximum finds it in cache."""
_EXACT_TOKENS = 1024
_CANDIDATES_PER_BLOCK = 1024
CHUNK_DOCUMENTS = 50_000


@dataclass
class Codec:
    """centroids float32 (K, D) unit rows, cutoffs float32 (2^nbits - 1,), weights float32 (2^nbits,)"""

    centroids: np.ndarray
    cutoffs: np.ndarray
    weights: np.ndarray
    avg_residual: np.ndarray
    cluster_threshold: float


def nearest(tokens: np.ndarray, centroids: np.ndarray, bias: np.ndarray | None = None) -> np.ndarray:
    """The row of `centroids` with the largest dot product (plus bias (K,)); tokens (T, D) float16/32 -> int32 (T,)."""
    codes = np.empty(len(tokens), np.int32)
    columns = np.ascontiguousarray(centroids.T)
    step = max(1, _ASSIGN_VALUES // len(centroids))
    table = np.empty((step, len(centroids)), np.float32)
    for start in range(0, len(tokens), step):
        block = np.ascontiguousarray(tokens[start : start + step], np.float32)
        similarities = np.matmul(block, columns, out=table[: len(block)])
        if bias is not None:
            similarities += bias
        codes[start : start + step] = similarities.argmax(axis=1)
    return codes


def n_sampled(n_documents: int) -> int:
    return int(min(1 + 16 * np.sqrt(120 * n_documents), n_documents))


def train_centroids(vectors: Vectors, seed: int = 42, iterations: int = 4) -> np.ndarray:
    """K-means on the tokens of a sample of documents; K = 2^floor(log2(16 sqrt(T))). Does not depend on nbits."""
    rng = np.random.default_rng(seed)
    sampled = rng.permutation(vectors.n_documents)[: n_sampled(vectors.n_documents)]
    doclens = vectors.doclens
    n_expected = doclens[sampled].mean() * vectors.n_documents
    n_sample_tokens = int(doclens[sampled].sum())
    k = min(1 << int(np.floor(np.log2(16 * np.sqrt(n_expected)))), n_sample_tokens)
    rows = token_rows(vectors, np.sort(sampled))
    if len(rows) > 256 * k:
        rows = np.sort(rng.permutation(rows)[: 256 * k])
    return kmeans(vectors.tokens, rows, k, rng, iterations)


def train_codec(vectors: Vectors, centroids: np.ndarray, nbits: int, seed: int = 42) -> Codec:
    """Cutoffs and weights: quantiles of the residuals of a held-out part, pooled over dimensions."""
    held_out = _held_out(vectors, np.random.default_rng(seed))
    tokens = vectors.tokens[held_out].astype(np.float32)
    residuals = tokens - centroids[nearest(tokens, centroids)]
    n = 1 << nbits
    if len(residuals) == 0:
        return Codec(centroids, np.zeros(n - 1, np.float32), np.zeros(n, np.float32), np.zeros(vectors.dim, np.float32), 0.0)
    cutoffs = np.quantile(residuals, np.arange(1, n) / n).astype(np.float32)
    weights = np.quantile(residuals, (np.arange(n) + 0.5) / n).astype(np.float32)
    threshold = float(np.quantile(np.linalg.norm(residuals, axis=1), 0.75))
    return Codec(centroids, cutoffs, weights, np.abs(residuals).mean(axis=0), threshold)


def token_rows(vectors: Vectors, documents: np.ndarray) -> np.ndarray:
    """int64, the rows of the documents' tokens."""
    starts, lengths = vectors.offsets[documents], vectors.doclens[documents]
    return np.asarray(np.repeat(starts - np.concatenate([[0], np.cumsum(lengths)[:-1]]), lengths) + np.arange(lengths.sum()))


def _held_out(vectors: Vectors, rng: np.random.Generator) -> np.ndarray:
    """Rows of the sample's last documents, 5 % of all tokens and at most 50,000."""
    m = max(1, min(int(16 * np.sqrt(120 * vectors.n_documents)), vectors.n_documents))
    rows = token_rows(vectors, rng.permutation(vectors.n_documents)[:m][::-1])
    return rows[: min(int(0.05 * vectors.n_tokens), 50_000)]


def kmeans(tokens: np.ndarray, rows: np.ndarray, k: int, rng: np.random.Generator, iterations: int) -> np.ndarray:
    """Lloyd's iterations by squared distance over tokens[rows]; empty clusters start again at a random row; unit rows at the end."""
    centroids = tokens[np.sort(rng.choice(rows, k, replace=False))].astype(np.float32)
    for _ in range(iterations):
        sums, counts = np.zeros_like(centroids), np.zeros(k, np.int64)
        bias = -0.5 * np.einsum("kd,kd->k", centroids, centroids)
        for start in range(0, len(rows), 1 << 17):
            block = tokens[rows[start : start + (1 << 17)]].astype(np.float32)
            codes = nearest(block, centroids, bias)
            order = np.argsort(codes, kind="stable")
            present, first = np.unique(codes[order], return_index=True)
            sums[present] += np.add.reduceat(block[order], first, axis=0)
            counts += np.bincount(codes, minlength=k)
        empty = np.flatnonzero(counts == 0)
        sums[empty] = tokens[rng.choice(rows, len(empty))]
        centroids = sums / np.maximum(counts, 1)[:, None]
    return np.asarray(centroids / np.maximum(np.linalg.norm(centroids, axis=1, keepdims=True), 1e-12), np.float32)


def encode(codec: Codec, nbits: int, tokens: np.ndarray, codes: np.ndarray) -> np.ndarray:
    """Packed residuals uint8 (T, D·nbits/8): a value's bucket is the number of cutoffs strictly below it, lowest bit written first."""
    out = np.empty((len(tokens), tokens.shape[1] * nbits // 8), np.uint8)
    bits = (np.arange(1 << nbits)[:, None] >> np.arange(nbits)).astype(np.uint8) & 1
    for start in range(0, len(tokens), 1 << 15):
        block = tokens[start : start + (1 << 15)].astype(np.float32) - codec.centroids[codes[start : start + (1 << 15)]]
        buckets = np.searchsorted(codec.cutoffs, block.ravel(), side="left")
        out[start : start + (1 << 15)] = np.packbits(bits[buckets].reshape(len(block), -1), axis=1)
    return out


def write(vectors: Vectors, folder: Path, nbits: int, seed: int = 42, like: Path | None = None) -> dict[str, float]:
    """Build and write an index directory; returns seconds spent.

    like  an index of the same vectors and seed with other nbits: its centroids and codes are the same, so they are copied, and the
          seconds they took are counted as if they had been spent here
    """
    started = time.perf_counter()
    before = json.loads((like / "times.json").read_text()) if like else {"centroids_s": 0.0, "codes_s": 0.0}
    centroids = np.load(like / "centroids.npy") if like else train_centroids(vectors, seed)
    spent = {"centroids_s": time.perf_counter() - started + before["centroids_s"], "codes_s": before["codes_s"]}
    codec = train_codec(vectors, centroids, nbits, seed)
    folder.mkdir(parents=True, exist_ok=True)
    np.save(folder / "centroids.npy", codec.centroids)
    np.save(folder / "bucket_weights.npy", codec.weights)
    np.save(folder / "bucket_cutoffs.npy", codec.cutoffs)
    np.save(folder / "avg_residual.npy", codec.avg_residual)
    np.save(folder / "cluster_threshold.npy", np.array([codec.cluster_threshold], np.float32))
    pairs = []
    starts = range(0, vectors.n_documents, CHUNK_DOCUMENTS)
    for i, start in enumerate(starts):
        offsets = vectors.offsets[start : start + CHUNK_DOCUMENTS + 1]
        tokens = vectors.tokens[offsets[0] : offsets[-1]]
        assigning = time.perf_counter()
        codes = np.load(like / f"{i}.codes.npy").astype(np.int32) if like else nearest(tokens, codec.centroids)
        spent["codes_s"] += time.perf_counter() - assigning
        np.save(folder / f"{i}.codes.npy", codes.astype("<i8"))
        np.save(folder / f"{i}.residuals.npy", encode(codec, nbits, tokens, codes))
        (folder / f"doclens.{i}.json").write_text(json.dumps(np.diff(offsets).tolist()))
        owner = np.repeat(np.arange(start, start + len(offsets) - 1), np.diff(offsets))
        pairs.append(np.unique(codes.astype(np.int64) * vectors.n_documents + owner))
    pair = np.unique(np.concatenate(pairs))
    np.save(folder / "ivf.npy", pair % vectors.n_documents)
    lengths = np.bincount(pair // vectors.n_documents, minlength=len(codec.centroids))
    np.save(folder / "ivf_lengths.npy", lengths.astype("<i4"))
    counts = {"num_documents": vectors.n_documents, "num_embeddings": vectors.n_tokens, "num_partitions": len(codec.centroids)}
    shape = {"num_chunks": len(starts), "nbits": nbits, "embedding_dim": vectors.dim, "avg_doclen": vectors.n_tokens / vectors.n_documents}
    (folder / "metadata.json").write_text(json.dumps({**counts, **shape, "next_plaid_compatible": True}))
    spent["build_s"] = time.perf_counter() - started + before["centroids_s"] + before["codes_s"]
    (folder / "times.json").write_text(json.dumps(spent))
    return spent


class PlaidEngine:
    """Peer `plaid`: an index directory in memory. Parameters have NextPlaid's names and defaults."""

    def __init__(
        self,
        folder: Path,
        nbits: int = 4,
        *,
        n_ivf_probe: int = 8,
        n_full_scores: int = 4096,
        centroid_score_threshold: float | None = None,
    ) -> None:
        self.folder, self.nbits, self.name = folder, nbits, f"plaid-{nbits}bit"
        self.n_ivf_probe, self.n_full_scores = n_ivf_probe, n_full_scores
        self.centroid_score_threshold = centroid_score_threshold

    def build(self, vectors: Vectors, like: Path | None = None) -> dict[str, float]:
        """Build the directory if it is not there, and load it. Returns the seconds of the build, also of an earlier one."""
        times = self.folder / "times.json"
        if not times.exists():
            write(vectors, self.folder, self.nbits, like=like)
        self.load()
        found: dict[str, float] = json.loads(times.read_text())
        return found

    def load(self) -> None:
        folder = self.folder
        description = json.loads((folder / "metadata.json").read_text())
        chunks = range(description["num_chunks"])
        self._centroids = np.load(folder / "centroids.npy").astype(np.float32)
        self._codes = np.concatenate([np.load(folder / f"{i}.codes.npy").astype(np.int32) for i in chunks])
        self._residuals = np.concatenate([np.load(folder / f"{i}.residuals.npy") for i in chunks])
        doclens = np.concatenate([json.loads((folder / f"doclens.{i}.json").read_text()) for i in chunks]).astype(np.int64)
        self._lengths, self._offsets = doclens, np.concatenate([[0], np.cumsum(doclens)])
        self._ivf = np.load(folder / "ivf.npy").astype(np.int32)
        self._ivf_offsets = np.concatenate([[0], np.cumsum(np.load(folder / "ivf_lengths.npy")[: len(self._centroids)])]).astype(np.int64)
        self._wide_table = _wide(byte_weights(np.load(folder / "bucket_weights.npy").astype(np.float32)))
        self._invert()

    def _invert(self) -> None:
        """Distinct codes of each document from the lists: padded (codes, documents), documents by falling number of codes."""
        n = len(self._lengths)
        code_of = np.repeat(np.arange(len(self._centroids), dtype=np.int32), np.diff(self._ivf_offsets))
        by_document = np.argsort(self._ivf, kind="stable")
        counts = np.bincount(self._ivf, minlength=n)
        self._by_count = np.argsort(-counts, kind="stable")
        self._rank = np.empty(n, np.int64)
        self._rank[self._by_count] = np.arange(n)
        self._n_codes = counts[self._by_count]
        owner = self._rank[self._ivf[by_document]]
        position = np.arange(len(by_document)) - np.repeat(np.cumsum(counts) - counts, counts)
        self._forward = np.zeros((max(1, int(counts.max())), n), np.int32)
        self._forward[position, owner] = code_of[by_document]

    def sweep(self) -> tuple[dict[str, int], list[dict[str, int]]]:
        """The default, and settings from hasty to thorough."""
        probes_and_scores = [(2, 256), (4, 512), (4, 1024), (8, 1024), (8, 2048), (8, 4096), (16, 4096), (32, 8192)]
        return {"n_ivf_probe": 8, "n_full_scores": 4096}, [{"n_ivf_probe": p, "n_full_scores": n} for p, n in probes_and_scores]

    def configure(self, n_ivf_probe: int, n_full_scores: int) -> None:
        self.n_ivf_probe, self.n_full_scores = n_ivf_probe, n_full_scores

    @property
    def stored_bytes(self) -> int:
        return sum(path.stat().st_size for path in self.folder.iterdir() if path.name != "times.json")

    def search(self, query: np.ndarray, k: int) -> np.ndarray:
        """query float32 (Q, D), used as given -> int64 (<= k,), best first."""
        similarities = self._centroids @ query.T
        candidates = self._candidates(similarities)
        if len(candidates) == 0:
            return np.empty(0, np.int64)
        approximate = self._centroid_maxsim(similarities, candidates)
        n_exact = min(max(self.n_full_scores // 4, k), self.n_full_scores)
        best = _best(approximate, candidates, n_exact)
        exact = self._exact(query, best)
        return _best(exact, best, k)

    def _candidates(self, similarities: np.ndarray) -> np.ndarray:
        """Documents in the lists of each query token's best centroids, ascending."""
        by_token = np.ascontiguousarray(similarities.T)
        n_probe = min(self.n_ivf_probe, by_token.shape[1])
        probed = np.unique(np.argpartition(by_token, -n_probe, axis=1)[:, -n_probe:])
        if self.centroid_score_threshold is not None:
            probed = probed[similarities[probed].max(axis=1) >= self.centroid_score_threshold]
        seen = np.zeros(len(self._lengths), bool)
        for code in probed:
            seen[self._ivf[self._ivf_offsets[code] : self._ivf_offsets[code + 1]]] = True
        return np.flatnonzero(seen)

    def _centroid_maxsim(self, similarities: np.ndarray, candidates: np.ndarray) -> np.ndarray:
        """Sum over query tokens of the best centroid score among the document's codes; float32 (candidates,)."""
        ranks = np.sort(self._rank[candidates])
        scores = np.empty(len(ranks), np.float32)
        n_query = similarities.shape[1]
        taken = np.empty((_CANDIDATES_PER_BLOCK, n_query), np.float32)
        for start in range(0, len(ranks), _CANDIDATES_PER_BLOCK):
            block = ranks[start : start + _CANDIDATES_PER_BLOCK]
            codes = self._forward[: self._n_codes[block[0]], block]
            alive = np.searchsorted(-self._n_codes[block], -np.arange(1, len(codes)), side="left")  # with more than j codes
            best = similarities.take(codes[0], axis=0)
            for position, n in enumerate(alive, 1):
                row = np.take(similarities, codes[position, :n], axis=0, out=taken[:n], mode="clip")
                np.maximum(best[:n], row, out=best[:n])
            best.sum(axis=1, out=scores[start : start + len(block)])
        in_order = np.empty(len(self._lengths), np.float32)
        in_order[self._by_count[ranks]] = scores
        return np.asarray(in_order[candidates])

    def _exact(self, query: np.ndarray, documents: np.ndarray) -> np.ndarray:
        """MaxSim on decoded, normalised tokens; float32 (documents,).

        By rising length, a block padded with copies of last tokens to its longest document, position by position: so the maximum over a
        document's tokens is one reduction of a table in cache. Buffers are made once, larger ones would come from the system each time.
        """
        columns = np.ascontiguousarray(query.T)
        order = np.argsort(self._lengths[documents], kind="stable")
        order = order[np.searchsorted(self._lengths[documents[order]], 1) :]
        scores = np.full(len(documents), -np.inf, np.float32)
        lengths = self._lengths[documents]
        n_rows = _EXACT_TOKENS + int(lengths.max(initial=0))
        tokens, decoded = np.empty((2, n_rows, self._centroids.shape[1]), np.float32)
        similarities = np.empty((n_rows, len(query)), np.float32)
        start = 0
        while start < len(order):
            block = order[start : start + max(1, _EXACT_TOKENS // int(lengths[order[start]]))]
            while len(block) > 1 and len(block) * int(lengths[block[-1]]) > n_rows:
                block = block[: len(block) // 2]
            longest, n = int(lengths[block[-1]]), len(block)
            rows = (np.minimum(np.arange(longest)[:, None], lengths[block] - 1) + self._offsets[documents[block]]).ravel()
            decoded_tokens = self._decode(rows, tokens[: len(rows)], decoded[: len(rows)])
            norms = np.sqrt(np.einsum("td,td->t", decoded_tokens, decoded_tokens))
            table = np.matmul(decoded_tokens, columns, out=similarities[: len(rows)])
            table /= np.maximum(norms, 1e-12)[:, None]
            best = table.reshape(longest, n * len(query)).max(axis=0)
            scores[block] = best.reshape(n, len(query)).sum(axis=1)
            start += n
        return scores

    def _decode(self, rows: np.ndarray, tokens: np.ndarray, decoded: np.ndarray) -> np.ndarray:
        """Tokens of global rows into `tokens` (t, D): two or four dimensions of a residual are one wide number of the table."""
        np.take(self._centroids, self._codes.take(rows), axis=0, out=tokens, mode="clip")
        np.take(self._wide_table, self._residuals.take(rows, axis=0), out=decoded.view(self._wide_table.dtype), mode="clip")
        tokens += decoded
        return tokens


def _best(scores: np.ndarray, documents: np.ndarray, n: int) -> np.ndarray:
    """The n documents with the best scores, best first; documents ascend or come in an order that ties keep."""
    return documents[np.argsort(-scores, kind="stable")[:n]]


def _wide(table: np.ndarray) -> np.ndarray:
    """float32 (256, dimensions per byte) as one number per byte, so that `take` moves it in one go."""
    table = np.ascontiguousarray(table)
    return table.view(f"V{4 * table.shape[1]}" if table.shape[1] == 8 else {1: "f4", 2: "c8", 4: "c16"}[table.shape[1]])[:, 0]
