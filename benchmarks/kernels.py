"""Micro benchmark of the scoring kernels: nanoseconds per unit of work, one thread, made-up data, no index and no I/O.

    python -m benchmarks.kernels [--tokens 32] [--nbits 4] [--dim 128] [--repeat 15] [--json]

The least of all repetitions counts (CPU time of this thread, so that a busy machine disturbs little). The lookups of random data miss caches more often than those of
real documents, whose tokens share centroids; so these figures are upper bounds. README.md in engine/scoring has the dated results.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable

import numpy as np

from engine.scoring.arrays import Decoder, Postings, Records
from engine.scoring.brute_force import maxsim
from engine.scoring.candidates import probe, rank_documents
from engine.scoring.centroid_scores import score_centroids
from engine.scoring.forward import Forward, centroid_maxsim
from engine.scoring.maxsim import ExactScorer
from engine.scoring.selection import first_tokens

N_CENTROIDS, N_DOCUMENTS, DOCUMENT_TOKENS, DOCUMENT_CODES = 8192, 5000, 160, 100


def measure(work: Callable[[], object], n_units: int, repeat: int) -> float:
    """Least CPU nanoseconds per unit of work over `repeat` runs, after one run that warms caches and buffers."""
    work()
    best = np.inf
    for _ in range(repeat):
        begin = time.thread_time_ns()
        work()
        best = min(best, time.thread_time_ns() - begin)
    return round(float(best) / n_units, 2)


def synthetic_records(rng: np.random.Generator, decoder: Decoder) -> Records:
    """Documents of DOCUMENT_TOKENS tokens, whose codes are drawn from DOCUMENT_CODES of their own."""
    n_tokens = N_DOCUMENTS * DOCUMENT_TOKENS
    own = rng.integers(0, N_CENTROIDS, (N_DOCUMENTS, DOCUMENT_CODES)).astype(np.uint16)
    codes = np.concatenate([own, own[:, : DOCUMENT_TOKENS - DOCUMENT_CODES]], axis=1).reshape(-1)
    row_bytes = -(-decoder.payload_bytes // 4) * 4
    starts = np.arange(N_DOCUMENTS) * DOCUMENT_TOKENS
    return Records(
        rng.integers(0, 256, (n_tokens, row_bytes), dtype=np.uint8),
        codes,
        rng.integers(0, 256, (n_tokens, 2), dtype=np.uint8),
        starts,
        starts,
        starts,
        np.full(N_DOCUMENTS, DOCUMENT_TOKENS),
    )


def synthetic_postings(records: Records) -> Postings:
    """The postings of these records."""
    pairs = np.unique(records.codes.astype(np.int64) * N_DOCUMENTS + np.repeat(np.arange(N_DOCUMENTS), DOCUMENT_TOKENS))
    offsets = np.searchsorted(pairs // N_DOCUMENTS, np.arange(N_CENTROIDS + 1))
    return Postings(offsets, (pairs % N_DOCUMENTS).astype(np.uint16))


def synthetic_decoder(dim: int, nbits: int, affine: bool) -> Decoder:
    """Levels evenly spaced, or not."""
    levels = np.linspace(-2.5, 2.5, 1 << nbits).astype(np.float32)
    if not affine:
        levels = (levels + 0.02 * levels**3).astype(np.float32)
    return Decoder(levels, np.linspace(0.95, 1.05, 256).astype(np.float32), np.linspace(0, 0.1, 256).astype(np.float32), dim, nbits)


def run(n_query: int, dim: int, nbits: int, repeat: int) -> dict[str, float]:
    """All figures, by name with its unit."""
    rng = np.random.default_rng(20261123)
    decoder = synthetic_decoder(dim, nbits, affine=True)
    records = synthetic_records(rng, decoder)
    postings = synthetic_postings(records)
    n_postings = len(postings.ordinals)
    centroids = unit_rows(rng, N_CENTROIDS, dim)
    query = unit_rows(rng, n_query, dim)
    scores = score_centroids(query, centroids)
    forward = Forward.from_postings(postings, N_DOCUMENTS)
    probes = probe(scores, 8)
    n_probed = int((postings.offsets[probes.codes + 1] - postings.offsets[probes.codes]).sum())
    some = np.sort(rng.permutation(N_DOCUMENTS)[:4096])
    n_some = int(np.diff(postings.offsets).sum() * len(some) / N_DOCUMENTS)
    few = rng.permutation(N_DOCUMENTS)[:256]
    n_few = len(few) * DOCUMENT_TOKENS
    _, lanes = centroid_maxsim(scores, forward, few)
    padded = lanes.copy()
    padded[-1, :, n_query - (len(lanes) - 1) * scores.width :] = 255
    scorer = ExactScorer(scores, records, decoder)
    results = {
        "stage 1: query x centroids, ns per centroid": measure(lambda: score_centroids(query, centroids), N_CENTROIDS, repeat),
        "stage 1: probe, ns per centroid": measure(lambda: probe(scores, 8), N_CENTROIDS, repeat),
        "stage 2: ns per posting scattered": measure(lambda: rank_documents(probes, postings, N_DOCUMENTS), n_probed, repeat),
        "forward: ns per posting inverted": measure(lambda: Forward.from_postings(postings, N_DOCUMENTS), n_postings, repeat),
        "stage 3: all documents, ns per code": measure(lambda: centroid_maxsim(scores, forward), n_postings, repeat),
        "stage 3: 4096 of them, ns per code": measure(lambda: centroid_maxsim(scores, forward, some), n_some, repeat),
        "stage 4: ns per token looked at": measure(lambda: first_tokens(scores, records, few, padded), n_few, repeat),
        "stage 4: affine levels, ns per token scored": measure(lambda: scorer.all_tokens(few), n_few, repeat),
    }
    if nbits > 1:
        table = ExactScorer(scores, records, synthetic_decoder(dim, nbits, affine=False))
        results["stage 4: other levels, ns per token scored"] = measure(lambda: table.all_tokens(few), n_few, repeat)
    for dtype in (np.float32, np.float16):
        tokens, offsets = unit_rows(rng, n_few, dim).astype(dtype), np.arange(len(few) + 1) * DOCUMENT_TOKENS
        name = f"flat {np.dtype(dtype).name}: ns per token"
        results[name] = measure(lambda t=tokens, o=offsets: maxsim(query, t, o), n_few, repeat)  # type: ignore[misc]
    return results


def unit_rows(rng: np.random.Generator, n: int, dim: int) -> np.ndarray:
    """Random unit vectors, float32 (n, dim)."""
    rows = rng.standard_normal((n, dim), dtype=np.float32)
    return np.asarray(rows / np.linalg.norm(rows, axis=1, keepdims=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=32, help="query tokens")
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--nbits", type=int, default=4, choices=(1, 2, 4, 8))
    parser.add_argument("--repeat", type=int, default=15)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    results = run(arguments.tokens, arguments.dim, arguments.nbits, arguments.repeat)
    if arguments.json:
        print(json.dumps({"tokens": arguments.tokens, "dim": arguments.dim, "nbits": arguments.nbits, "ns": results}))
        return
    for name, value in results.items():
        print(f"{value:9.2f}  {name}")


if __name__ == "__main__":
    main()
