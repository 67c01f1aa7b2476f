"""The codec: unit token vectors to (code, two scalars, packed residual), and back.

A token x (after one fixed random rotation of the space) becomes

    y = inv * centroid[code] + b * levels[bucket]        a vector of norm 1, as close in angle to x as we find

so a search computes q.y = inv * q.centroid + b * q.levels, the first from the query x centroid table. The rotation spreads what is
left after the centroid evenly over all dimensions, whose distribution is then near Gaussian: levels are constants, centroids are trained.

Arrays only: no I/O, no environment. engine/format writes and reads these arrays; engine/scoring never imports this module.
"""

from __future__ import annotations

import math
from functools import cache, cached_property
from typing import Literal

import msgspec
import numpy as np

from engine.codec import bitpack, kmeans
from engine.codec.shaping import Rounder, Shaping, residual_moment, round_shaped, shaping_of
from engine.config import NBITS
from engine.errors import InvalidRequest

LevelKind = Literal["uniform", "lloyd"]

BLOCK_TOKENS = 8192
"""Tokens of one encoding block: with D = 128, 4 MiB a temporary array."""

SHAPED_TOKENS = 2048
"""Tokens quantised together: their errors, float32 (D, 2048), stay in a 2 MiB second-level cache."""

CONSTANTS_TOKENS = 65_536
"""About so many sample tokens give residual_moment and the ranges of the scalars."""

INV_TABLE_TOP = 2.0
"""inv is near 1 where a centroid is near its tokens; the table leaves room for collections that drift."""

SCALE_FACTORS = {1: (1.0,), 2: (1.0,), 4: (0.9, 1.0, 1.1), 8: (0.8, 0.9, 1.0, 1.1)}
"""Scales tried for each token, in root mean squares of its residual."""

REFINEMENTS = {1: 2, 2: 2, 4: 1, 8: 0}
"""How often the levels' plain rounding is repeated with better scalars before the last, shaped one."""

TINY = np.float32(1e-6)
"""Below this a norm or a scale is nothing: unit tokens are rounded at about 1e-7."""


class Codec(msgspec.Struct, frozen=True, dict=True):
    """Everything that turns tokens into bytes and back; trained once, never changed.

    rotation          float32 (D, D), orthogonal; x @ rotation is the space of all that follows, queries included
    coarse            float32 (M, D), coarse centroids along a path on which neighbours are alike
    cell_offsets      int64 (M + 1,), cell m owns the codes cell_offsets[m]:cell_offsets[m + 1]
    centroids_i8      int8 (K, D), centroid_scales float32 (K,): centroid = scale * int8, exactly what residuals are taken against
    cutoffs           float32 (2^nbits - 1,), rising: bucket = how many cutoffs lie below a residual in units of the token's scale
    levels            float32 (2^nbits,), rising
    inv_table, scale_table   float32 (256,), rising, starting at 0: what the two scalar bytes of a token mean
    residual_moment   float32 (D, D) for shaping the rounding errors (shaping.py), or None: then rounding is to the nearest. Only encoding
                      reads it; what was encoded either way decodes alike
    """

    dim: int
    nbits: int
    seed: int
    rotation: np.ndarray
    coarse: np.ndarray
    cell_offsets: np.ndarray
    centroids_i8: np.ndarray
    centroid_scales: np.ndarray
    cutoffs: np.ndarray
    levels: np.ndarray
    inv_table: np.ndarray
    scale_table: np.ndarray
    residual_moment: np.ndarray | None = None

    @cached_property
    def centroids(self) -> np.ndarray:
        """float32 (K, D), made once."""
        centroids: np.ndarray = self.centroids_i8.astype(np.float32) * self.centroid_scales[:, None]
        return centroids

    @cached_property
    def cells(self) -> kmeans.Cells:
        """The stored centroids as kmeans.assign wants them."""
        return kmeans.Cells(self.coarse, self.cell_offsets, self.centroids)

    @cached_property
    def centroid_squares(self) -> np.ndarray:
        """float32 (K,): squared norms."""
        return _dots(self.centroids, self.centroids)

    @cached_property
    def rounder(self) -> Rounder:
        return Rounder(self.cutoffs, self.levels)

    @cached_property
    def shaping(self) -> Shaping | None:
        return None if self.residual_moment is None else shaping_of(self.residual_moment, self.centroids)

    @property
    def row_bytes(self) -> int:
        """Bytes of one token's packed residual."""
        return bitpack.row_bytes(self.dim, self.nbits)

    @property
    def n_centroids(self) -> int:
        return len(self.centroids_i8)


class Encoded(msgspec.Struct, frozen=True):
    """T encoded tokens: codes uint16 (T,), scalars uint8 (T, 2) = (inv, scale), residuals uint8 (T, row_bytes)."""

    codes: np.ndarray
    scalars: np.ndarray
    residuals: np.ndarray

    def __len__(self) -> int:
        return len(self.codes)


def rotation(dim: int, seed: int) -> np.ndarray:
    """A random orthogonal matrix, float32 (dim, dim), the same for the same seed.

    PCG64(seed) fills a (dim, dim) matrix of standard normals in float64; Q of its QR decomposition, columns signed so that R's diagonal is
    positive, is Haar distributed. The sign rule makes the answer the same up to rounding whatever LAPACK does; the codec stores the matrix
    nevertheless, so that nothing read back depends on LAPACK's last bit.
    """
    gaussian = np.random.Generator(np.random.PCG64(seed)).standard_normal((dim, dim))
    q, r = np.linalg.qr(gaussian)
    return np.ascontiguousarray(q * np.where(np.diag(r) < 0, -1.0, 1.0), dtype=np.float32)


@cache
def _lloyd_max(nbits: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Cutoffs and levels that minimise the squared error of a standard normal variable (Lloyd 1957, Max 1960)."""
    from statistics import NormalDist  # only training wants it, and it takes 5 ms to import

    n_levels = 1 << nbits
    normal = NormalDist()
    # Start at the asymptotically optimal density, p^(1/3): a normal law of variance 3.
    levels = np.array([math.sqrt(3) * normal.inv_cdf((i + 0.5) / n_levels) for i in range(n_levels)])
    for _ in range(1000):
        cuts = (levels[1:] + levels[:-1]) / 2
        density = np.r_[0.0, np.exp(-cuts * cuts / 2) / math.sqrt(2 * math.pi), 0.0]
        mass = np.r_[0.0, [0.5 * math.erfc(-c / math.sqrt(2)) for c in cuts], 1.0]
        levels = -np.diff(density) / np.diff(mass)
        levels = (levels - levels[::-1]) / 2
    return tuple(((levels[1:] + levels[:-1]) / 2).tolist()), tuple(levels.tolist())


UNIFORM_STEP = {1: 1.5958, 2: 0.9957, 4: 0.3352, 8: 0.0308}
"""Steps of the uniform quantiser with least squared error for a standard normal variable (Max 1960, table II; 8 bits computed)."""


def quantiser(nbits: int, kind: LevelKind) -> tuple[np.ndarray, np.ndarray]:
    """Cutoffs float32 (2^nbits - 1,) and levels float32 (2^nbits,) for a variable of unit variance.

    "lloyd": Gaussian Lloyd-Max. "uniform": levels in equal steps, so that level = step * (bucket - middle) and a search decodes with
    one conversion from integer to float.
    """
    if nbits not in NBITS:
        raise InvalidRequest("nbits is 1, 2, 4 or 8", nbits=nbits)
    if kind == "lloyd":
        cutoffs, levels = (np.asarray(values) for values in _lloyd_max(nbits))
    elif kind == "uniform":
        n_levels = 1 << nbits
        levels = (np.arange(n_levels) - (n_levels - 1) / 2) * UNIFORM_STEP[nbits]
        cutoffs = (levels[1:] + levels[:-1]) / 2
    else:
        raise InvalidRequest("levels are uniform or lloyd", levels=kind)
    return cutoffs.astype(np.float32), levels.astype(np.float32)


def train(
    sample: np.ndarray,
    n_tokens_total: int,
    nbits: int = 4,
    seed: int = 42,
    *,
    levels: LevelKind | None = None,
    n_clusters: int | None = None,
    iterations: int = kmeans.ITERATIONS,
    shaped: bool | None = None,
    n_threads: int = 1,
) -> Codec:
    """Train a codec.

    sample          float32 or float16 (n, D), n >= 1, unit rows (zero rows are allowed): a random sample of the collection,
                    best kmeans.n_sample_tokens(n_tokens_total) of it; more is used in full
    n_tokens_total  tokens of the whole collection; gives the number of centroids
    levels          "lloyd" or "uniform", which decodes a little faster; None: "lloyd" at 4 bits, where it is better, else "uniform" (README)
    shaped          keep residual_moment, so that rounding errors are shaped; None: at 1 and 2 bits, where it helps (README)
    returns         Codec; the same for the same arguments on the same machine

    Raises InvalidRequest for an empty sample or a bad nbits.
    """
    if sample.ndim != 2 or not sample.size:
        raise InvalidRequest("a codec is trained on at least one token", shape=sample.shape)
    dim = sample.shape[1]
    cutoffs, level_values = quantiser(nbits, levels or ("lloyd" if nbits == 4 else "uniform"))
    turn = rotation(dim, seed)
    rotated = np.asarray(sample, np.float32) @ turn
    wanted = n_clusters or kmeans.n_centroids(max(n_tokens_total, len(sample)))
    cells = kmeans.train_cells(rotated, wanted, seed=seed, iterations=iterations, n_threads=n_threads)
    scales = np.maximum(np.abs(cells.centroids).max(1), 1e-12).astype(np.float32) / np.float32(127)
    draft = Codec(
        dim=dim,
        nbits=nbits,
        seed=seed,
        rotation=turn,
        coarse=cells.coarse,
        cell_offsets=cells.cell_offsets,
        centroids_i8=np.rint(cells.centroids / scales[:, None]).astype(np.int8),
        centroid_scales=scales,
        cutoffs=cutoffs,
        levels=level_values,
        inv_table=np.zeros(256, np.float32),
        scale_table=np.zeros(256, np.float32),
    )
    return _with_trained_constants(draft, rotated[:: max(1, len(rotated) // CONSTANTS_TOKENS)], nbits <= 2 if shaped is None else shaped)


def _with_trained_constants(draft: Codec, rotated: np.ndarray, shaped: bool) -> Codec:
    """Fill in residual_moment and the scalar tables, from the residuals that some rotated sample tokens leave."""
    codes, _ = kmeans.assign_block(rotated, draft.cells, kmeans.N_CELLS_SEARCHED)
    if shaped:
        draft = msgspec.structs.replace(draft, residual_moment=residual_moment(rotated - np.take(draft.centroids, codes, axis=0)))
    _, inv, scale = quantise_residuals(draft, rotated, codes)
    return msgspec.structs.replace(draft, inv_table=_scalar_table(inv, INV_TABLE_TOP), scale_table=_scalar_table(scale, 0.0))


def _scalar_table(values: np.ndarray, top: float) -> np.ndarray:
    """256 rising values from 0: 192 where the middle 99 % of `values` lie, 64 over all that other tokens may need."""
    low, high = np.quantile(values, (0.005, 0.995))
    wide = np.linspace(0.0, max(top, 2 * float(values.max()), float(TINY)), 64)
    narrow = np.linspace(low, max(high, low + float(TINY)), 192 + 2)[1:-1]
    return np.sort(np.concatenate([wide, narrow])).astype(np.float32)


def encode(codec: Codec, tokens: np.ndarray, *, n_threads: int = 1) -> Encoded:
    """Encode tokens.

    tokens   float32 or float16 (T, D), unit rows or zero rows; T may be 0
    returns  Encoded

    Cost: blocks of BLOCK_TOKENS on `n_threads` threads. Raises InvalidRequest if the dimension differs.
    """
    if tokens.ndim != 2 or tokens.shape[1] != codec.dim:
        raise InvalidRequest(
            "tokens have another dimension than the codec", code="dimension-mismatch", expected=codec.dim, found=tokens.shape
        )
    n_tokens = len(tokens)
    codes = np.empty(n_tokens, np.uint16)
    scalars = np.empty((n_tokens, 2), np.uint8)
    residuals = np.empty((n_tokens, codec.row_bytes), np.uint8)

    def one_block(start: int) -> None:
        block = slice(start, start + BLOCK_TOKENS)
        rotated = np.asarray(tokens[block], np.float32) @ codec.rotation
        codes[block], _ = kmeans.assign_block(rotated, codec.cells, kmeans.N_CELLS_SEARCHED)
        for first in range(0, len(rotated), SHAPED_TOKENS):
            part = slice(first, first + SHAPED_TOKENS)
            buckets, inv, scale = quantise_residuals(codec, rotated[part], codes[block][part])
            scalars[block][part, 0] = _nearest(codec.inv_table, inv)
            scalars[block][part, 1] = _nearest(codec.scale_table, scale)
            residuals[block][part] = bitpack.pack(buckets, codec.nbits)

    for _ in kmeans.map_blocks(one_block, n_tokens, BLOCK_TOKENS, n_threads):
        pass
    return Encoded(codes, scalars, residuals)


def decode(codec: Codec, encoded: Encoded) -> np.ndarray:
    """The tokens again, float32 (T, D), in the space they came from (not rotated)."""
    tokens: np.ndarray = decode_rotated(codec, encoded) @ codec.rotation.T
    return tokens


def decode_rotated(codec: Codec, encoded: Encoded) -> np.ndarray:
    """The tokens again, float32 (T, D), in the codec's rotated space, where queries are q @ codec.rotation."""
    inv = np.take(codec.inv_table, encoded.scalars[:, 0])
    scale = np.take(codec.scale_table, encoded.scalars[:, 1])
    tokens = np.take(codec.centroids, encoded.codes, axis=0)
    tokens *= inv[:, None]
    tokens += np.take(codec.levels, bitpack.unpack(encoded.residuals, codec.dim, codec.nbits)) * scale[:, None]
    return tokens


def _nearest(table: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Index of the table entry nearest to each value, uint8."""
    return np.searchsorted((table[1:] + table[:-1]) / 2, values).astype(np.uint8)


def quantise_residuals(codec: Codec, tokens: np.ndarray, codes: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Quantise rotated tokens against the centroids that `codes` names.

    tokens   float32 (T, D), rotated; codes integer (T,)
    returns  buckets uint8 (T, D), inv float32 (T,), scale float32 (T,), the scalars not yet quantised

    First the scale, then the two scalars that bring the reconstruction nearest to the token in angle; then what these leave of the token is
    rounded, the errors shaped; then the scalars once more for the buckets as they came out.
    """
    centroids = np.take(codec.centroids, codes, axis=0)
    centroid_square = np.take(codec.centroid_squares, codes)
    inv, scale = _first_scalars(codec, tokens, centroids, centroid_square)
    values = _left_over(tokens, centroids, inv, scale)
    buckets = np.empty(values.shape, np.uint8)
    shaping = codec.shaping
    if shaping is None:
        codec.rounder(values, buckets)
    else:
        buckets = np.ascontiguousarray(round_shaped(np.ascontiguousarray(values.T), shaping.feedback, codec.rounder).T)
        np.take(codec.levels, buckets, out=values, mode="clip")
    cross, square = _dots(centroids, values), _dots(values, values)
    if shaping is None:
        inv, scale = _best_scalars(_dots(tokens, centroids), _dots(tokens, values), centroid_square, cross, square)
    else:
        inv, scale = _best_shaped_scalars(shaping, tokens, codes, values)
    return buckets, *_normalised(inv, scale, centroid_square, cross, square)


def _first_scalars(codec: Codec, tokens: np.ndarray, centroids: np.ndarray, centroid_square: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(inv, scale) float32 (T,) of the best of several plain roundings: at the scales SCALE_FACTORS, then REFINEMENTS times again."""
    xc = _dots(tokens, centroids)
    buckets = np.empty(tokens.shape, np.uint8)

    def scalars_of(values: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        codec.rounder(values, buckets)
        xv = _dots(tokens, values)
        inv, scale = _best_scalars(xc, xv, centroid_square, _dots(centroids, values), _dots(values, values))
        # Of a least squares projection y of x, x.y = |y|^2: the greater, the nearer in angle.
        return inv * xc + scale * xv, inv, scale

    residuals = tokens - centroids
    rms = np.maximum(np.sqrt(_dots(residuals, residuals) / np.float32(codec.dim)), TINY)
    tried = [scalars_of(residuals * (1 / (rms * np.float32(factor)))[:, None]) for factor in SCALE_FACTORS[codec.nbits]]
    best = np.argmax([fit for fit, _, _ in tried], axis=0)
    inv, scale = (np.choose(best, [one[part] for one in tried]) for part in (1, 2))
    for _ in range(REFINEMENTS[codec.nbits]):
        _, inv, scale = scalars_of(_left_over(tokens, centroids, inv, scale))
    return inv, scale


def _left_over(tokens: np.ndarray, centroids: np.ndarray, inv: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """(x - inv * c) / scale: what the levels have to make up for, in their units, float32 (T, D)."""
    values: np.ndarray = np.multiply(centroids, -inv[:, None])
    values += tokens
    values *= (1 / np.maximum(scale, TINY))[:, None]
    return values


def _best_shaped_scalars(shaping: Shaping, tokens: np.ndarray, codes: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """_best_scalars, near by the measure of `shaping`."""
    weighted = values @ shaping.metric
    centroids = np.take(shaping.weighted_centroids, codes, axis=0)
    centroid_square = np.take(shaping.centroid_squares, codes)
    return _best_scalars(
        _dots(tokens, centroids), _dots(tokens, weighted), centroid_square, _dots(centroids, values), _dots(weighted, values)
    )


def _dots(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Dot product of each row of `left` with the same row of `right`, float32 (T,)."""
    dots: np.ndarray = np.einsum("ij,ij->i", left, right)
    return dots


def _best_scalars(xc: np.ndarray, xv: np.ndarray, cc: np.ndarray, cv: np.ndarray, vv: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The (inv, scale), both >= 0, for which inv * c + scale * v is nearest to x, from dot products of token x, centroid c and levels v.

    The least squares solution of two unknowns. Where there is none (c and v parallel) or it is negative, one goes without the other.
    """
    determinant = cc * vv - cv * cv
    regular = determinant > TINY * cc * vv
    safe = np.where(regular, determinant, 1)
    inv = np.where(regular, (xc * vv - xv * cv) / safe, xc / np.maximum(cc, TINY))
    scale = np.where(regular, (xv * cc - xc * cv) / safe, 0)
    inv = np.where(scale < 0, xc / np.maximum(cc, TINY), inv)
    scale = np.where(inv < 0, xv / np.maximum(vv, TINY), scale)
    return np.maximum(inv, 0).astype(np.float32), np.maximum(scale, 0).astype(np.float32)


def _normalised(inv: np.ndarray, scale: np.ndarray, cc: np.ndarray, cv: np.ndarray, vv: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(inv, scale) multiplied so that inv * c + scale * v has norm 1; both 0 where it has none (a zero token)."""
    norm = np.sqrt(np.maximum(inv * inv * cc + 2 * inv * scale * cv + scale * scale * vv, 0))
    factor = np.where(norm > TINY, 1 / np.maximum(norm, TINY), 0)
    return (inv * factor).astype(np.float32), (scale * factor).astype(np.float32)
