"""Slow twins of engine/scoring: plain loops that say what the kernels mean. Only tests import this."""

from __future__ import annotations

import itertools

import numpy as np


def unpack_row(row: np.ndarray, dim: int, nbits: int) -> list[int]:
    """Bucket numbers of one packed row: field f of byte j is dimension f * B' + j."""
    n_payload = -(-dim * nbits // 8)
    buckets = [0] * (n_payload * (8 // nbits))
    for byte in range(n_payload):
        for field in range(8 // nbits):
            buckets[field * n_payload + byte] = (int(row[byte]) >> (field * nbits)) & ((1 << nbits) - 1)
    return buckets[:dim]


def token_similarities(query, centroids, decoder, code, scalars, row):
    """q . (inv * centroid + scale * levels[buckets]) for every query token: float64 (Q,)."""
    levels = np.array([decoder.levels[b] for b in unpack_row(row, decoder.dim, decoder.nbits)], dtype=np.float64)
    token = float(decoder.inv_table[scalars[0]]) * centroids[code].astype(np.float64) + float(decoder.scale_table[scalars[1]]) * levels
    return query.astype(np.float64) @ token


def document_similarities(query, centroids, decoder, records, ordinal, known=None):
    """All known tokens of a document against the query: float64 (t, Q), and their positions."""
    rows, positions = [], []
    for j in range(int(records.n_tokens[ordinal])):
        code = int(records.codes[records.code_start[ordinal] + j])
        if known is not None and not known[code]:
            continue
        scalars = records.scalars[records.scalar_start[ordinal] + j]
        rows.append(token_similarities(query, centroids, decoder, code, scalars, records.rows[records.residual_start[ordinal] + j]))
        positions.append(j)
    return np.array(rows).reshape(-1, len(query)), positions


def exact_maxsim(query, centroids, decoder, records, ordinals, known=None):
    """MaxSim of documents, token by token: float64 (n,), -inf without tokens."""
    out = []
    for ordinal in ordinals:
        similarities, _ = document_similarities(query, centroids, decoder, records, ordinal, known)
        out.append(sum(max(similarities[:, q]) for q in range(len(query))) if len(similarities) else -np.inf)
    return np.array(out)


def maxsim(query, tokens, offsets):
    """MaxSim over plain vectors."""
    out = []
    for begin, end in itertools.pairwise(offsets):
        total = 0.0 if end > begin else -np.inf
        for q in query.astype(np.float64):
            if end > begin:
                total += max(float(q @ t) for t in tokens[begin:end].astype(np.float64))
        out.append(total)
    return np.array(out)


def document_codes(postings, n_documents):
    """The set of codes of every document."""
    codes = [set() for _ in range(n_documents)]
    for code in range(len(postings.offsets) - 1):
        for ordinal in postings.ordinals[postings.offsets[code] : postings.offsets[code + 1]]:
            codes[int(ordinal)].add(code)
    return codes


def centroid_lanes(scores, postings, n_documents, ordinals):
    """Per document and query token the best lane over the document's codes: int (n, Q)."""
    codes = document_codes(postings, n_documents)
    flat = np.concatenate(list(scores.lanes), axis=1)[:, : scores.n_tokens]  # (K, Q)
    out = np.zeros((len(ordinals), scores.n_tokens), dtype=np.int64)
    for i, ordinal in enumerate(ordinals):
        for code in codes[int(ordinal)]:
            for q in range(scores.n_tokens):
                out[i, q] = max(out[i, q], int(flat[code, q]))
    return out


def probes(table, n_tokens, n_probe, threshold=None, known=None):
    """The probed (token, code) pairs and the best score not probed, by sorting everything."""
    n_codes = len(table)
    pairs, missing = [], []
    usable = [c for c in range(n_codes) if known is None or known[c]]
    for q in range(n_tokens):
        ranked = sorted(usable, key=lambda c: -table[c, q])
        chosen = ranked[:n_probe]
        missing.append(table[ranked[min(n_probe, len(ranked) - 1)], q] if ranked else 0.0)
        for code in chosen:
            if threshold is None or max(table[code, :n_tokens]) >= threshold:
                pairs.append((q, code))
    return set(pairs), np.array(missing)


def rank_documents(probed, postings, n_documents):
    """Sum over query tokens of the best grade among the probed lists that hold a document: int (N,)."""
    best = np.zeros((len(probed.missing), n_documents), dtype=np.int64)
    for token, code, grade in zip(probed.tokens, probed.codes, probed.grades, strict=True):
        for ordinal in postings.ordinals[postings.offsets[code] : postings.offsets[code + 1]]:
            best[token, ordinal] = max(best[token, ordinal], int(grade))
    return best.sum(axis=0)


def top_k(scores, k, ids=None):
    """Sort everything: finite first, score falling, then id rising."""
    ids = range(len(scores)) if ids is None else ids
    rows = [(-float(s) if np.isfinite(s) else np.inf, int(i), n) for n, (s, i) in enumerate(zip(scores, ids, strict=True))]
    return [n for _, _, n in sorted(rows)][:k]


def fuse(method, semantic, keyword, alpha, k):
    """Fusion of two lists of (id, score), by dictionary."""

    def parts(items):
        if method == "rrf":
            return {i: 1 / (60 + rank) for rank, (i, _) in enumerate(items, 1)}
        scores = [s for _, s in items]
        return {i: (s - min(scores)) / (max(scores) - min(scores)) if max(scores) > min(scores) else 1.0 for i, s in items}

    first, second = parts(semantic), parts(keyword)
    rank = {i: n for n, (i, _) in enumerate(semantic)}
    fused = {i: alpha * first.get(i, 0.0) + (1 - alpha) * second.get(i, 0.0) for i in {**first, **second}}
    return sorted(fused.items(), key=lambda item: (-item[1], rank.get(item[0], len(rank)), item[0]))[:k]
