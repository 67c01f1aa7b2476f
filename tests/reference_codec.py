"""Slow twins of the codec: loops that a reader can check against the text, for tests only."""

from __future__ import annotations

import numpy as np

from engine.codec.residual import Codec, Encoded


def pack_slowly(buckets: np.ndarray, nbits: int) -> np.ndarray:
    """Byte j of a row holds, in bit field f, the bucket of dimension f * B' + j; the row is padded to a multiple of four bytes."""
    n_tokens, dim = buckets.shape
    n_payload = (dim * nbits + 7) // 8
    rows = np.zeros((n_tokens, (n_payload + 3) // 4 * 4), np.uint8)
    for token in range(n_tokens):
        for dimension in range(dim):
            field, byte = divmod(dimension, n_payload)
            rows[token, byte] |= int(buckets[token, dimension]) << (field * nbits)
    return rows


def unpack_slowly(rows: np.ndarray, dim: int, nbits: int) -> np.ndarray:
    """The inverse of pack_slowly."""
    n_payload = (dim * nbits + 7) // 8
    buckets = np.zeros((len(rows), dim), np.uint8)
    for token in range(len(rows)):
        for dimension in range(dim):
            field, byte = divmod(dimension, n_payload)
            buckets[token, dimension] = int(rows[token, byte]) >> (field * nbits) & ((1 << nbits) - 1)
    return buckets


def decode_slowly(codec: Codec, encoded: Encoded) -> np.ndarray:
    """token = (inv * centroid + scale * levels[bucket]) turned back, one token after another, in float64."""
    tokens = np.zeros((len(encoded), codec.dim))
    buckets = unpack_slowly(encoded.residuals, codec.dim, codec.nbits)
    for token, code in enumerate(encoded.codes.tolist()):
        centroid = float(codec.centroid_scales[code]) * codec.centroids_i8[code].astype(np.float64)
        inv = float(codec.inv_table[encoded.scalars[token, 0]])
        scale = float(codec.scale_table[encoded.scalars[token, 1]])
        tokens[token] = (inv * centroid + scale * codec.levels[buckets[token]]) @ codec.rotation.T.astype(np.float64)
    return tokens


def nearest_slowly(tokens: np.ndarray, centroids: np.ndarray) -> np.ndarray:
    """Brute force: each token's centroid with the greatest dot product, the first of equals."""
    return np.asarray([int(np.argmax(centroids @ token)) for token in tokens])


def round_shaped_slowly(wanted: np.ndarray, feedback: np.ndarray, levels: np.ndarray) -> np.ndarray:
    """Bucket numbers (D, n) by the sum in shaping.py's docstring, in float64."""
    dim, n_tokens = wanted.shape
    buckets = np.zeros((dim, n_tokens), np.uint8)
    for token in range(n_tokens):
        errors = np.zeros(dim)
        for k in range(dim - 1, -1, -1):
            target = wanted[k, token] + sum(feedback[k, j] * errors[j] for j in range(k + 1, dim))
            buckets[k, token] = np.argmin(np.abs(levels - target))
            errors[k] = wanted[k, token] - levels[buckets[k, token]]
    return buckets
