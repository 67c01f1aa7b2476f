"""Rounding a residual so that its error falls where no query looks: error feedback, coordinate after coordinate.

Rounding each coordinate to its nearest level minimises |e|^2 of the error e. But a search sees e only through dot products with query
tokens, and those that matter lie near the token: they differ from it as the tokens of one centroid differ among themselves. So we
minimise e' H e, where H is the second moment of residuals. With H = U' U, U upper triangular,

    e' H e = sum over k of U_kk^2 * (e_k + sum_{j > k} U_kj / U_kk * e_j)^2

and going from the last coordinate to the first, the bracket is made small by rounding r_k + sum_{j > k} U_kj / U_kk * e_j instead of r_k.
Nothing changes for the reader of the bytes. Same idea as error-feedback (LDLQ) rounding of neural networks' weights (QuIP, arXiv
2307.13304) and noise shaping in audio. What it buys: README, measurements.

Unsatisfying: H is the same for all tokens of an index, and costs the codec a D x D section that only writers read.
"""

from __future__ import annotations

import math

import msgspec
import numpy as np

WHITE_SHARE = 0.1
"""Identity mixed into H (whose mean eigenvalue is 1), so that no direction is given up. 0.03, 0.1, 0.3 and 1 differed by noise on SciFact."""

SMALLEST_MOMENT = 1e-12
"""Residuals of a mean square below this are rounding errors."""

STRIP = 16
"""Coordinates rounded one by one before their errors are applied to all the others by one GEMM."""


class Shaping(msgspec.Struct, frozen=True):
    """metric float32 (D, D) = H; feedback float32 (D, D) = U with unit diagonal; weighted_centroids float32 (K, D) = centroids @ H;
    centroid_squares float32 (K,) = c' H c."""

    metric: np.ndarray
    feedback: np.ndarray
    weighted_centroids: np.ndarray
    centroid_squares: np.ndarray


def residual_moment(residuals: np.ndarray) -> np.ndarray:
    """What a codec remembers of its training residuals (float32 (n, D)): their second moment, float32 (D, D), with mean eigenvalue 1.

    The identity where nothing is known: no residual at all, as with one centroid on top of every token.
    """
    dim = residuals.shape[1]
    moment = (residuals.T @ residuals).astype(np.float64) / max(len(residuals), 1)
    mean_eigenvalue = np.trace(moment) / dim
    return (moment / mean_eigenvalue if mean_eigenvalue > SMALLEST_MOMENT else np.eye(dim)).astype(np.float32)


def shaping_of(moment: np.ndarray, centroids: np.ndarray) -> Shaping:
    """Shaping from `residual_moment` and the centroids, float32 (K, D). Cost: a Cholesky decomposition and one GEMM, once for a codec."""
    metric = moment.astype(np.float64) + WHITE_SHARE * np.eye(len(moment))
    upper = np.linalg.cholesky((metric + metric.T) / 2).T
    weighted = centroids @ metric.astype(np.float32)
    return Shaping(
        metric=metric.astype(np.float32),
        feedback=np.ascontiguousarray(upper / np.diag(upper)[:, None], dtype=np.float32),
        weighted_centroids=weighted,
        centroid_squares=np.einsum("ij,ij->i", weighted, centroids),
    )


class Rounder:
    """Nearest level of each number. Levels in equal steps are found by arithmetic, others through a table of small cells.

    A cell is narrower than the distance of two cutoffs, so it holds at most one: the table gives the bucket at the cell's lower end, and
    one comparison decides whether the number lies above the next cutoff. Four times as fast as np.searchsorted, and as exact.
    """

    def __init__(self, cutoffs: np.ndarray, levels: np.ndarray) -> None:
        self.levels = levels
        self.step = float(levels[-1] - levels[0]) / (len(levels) - 1)
        self.is_uniform = bool(np.allclose(np.diff(levels), self.step, rtol=1e-4, atol=0))
        if self.is_uniform:
            return
        reach = float(np.abs(cutoffs).max())
        n_cells = math.ceil(2 * reach / (float(np.diff(cutoffs).min()) / 2)) + 2
        self.cells_per_unit = np.float32(n_cells / (2 * reach))
        lower_ends = np.arange(n_cells + 2) / float(self.cells_per_unit) - reach
        # A quarter of a cell lower: float32 may put a number that lies just above a cell's lower end into it from just below.
        self.bucket_of_cell = np.searchsorted(cutoffs, lower_ends - 0.25 / float(self.cells_per_unit)).astype(np.uint8)
        self.middle = np.float32(reach * float(self.cells_per_unit))
        self.next_cutoff = np.append(cutoffs, np.inf).astype(np.float32)

    def __call__(self, values: np.ndarray, buckets: np.ndarray) -> np.ndarray:
        """Write bucket numbers into `buckets` (uint8, any shape), overwrite `values` (float32, same shape) with their levels, return it."""
        if self.is_uniform:
            return self._round_uniform(values, buckets)
        cells = values * self.cells_per_unit
        cells += self.middle
        np.clip(cells, 0, len(self.bucket_of_cell) - 1, out=cells)
        np.take(self.bucket_of_cell, cells.astype(np.uint16), out=buckets, mode="clip")
        np.take(self.next_cutoff, buckets, out=cells, mode="clip")
        buckets += values > cells
        np.take(self.levels, buckets, out=values, mode="clip")
        return values

    def _round_uniform(self, values: np.ndarray, buckets: np.ndarray) -> np.ndarray:
        top = len(self.levels) - 1
        values *= np.float32(1 / self.step)
        values += np.float32(top / 2)
        np.rint(values, out=values)
        np.maximum(values, np.float32(0), out=values)
        np.minimum(values, np.float32(top), out=values)
        np.copyto(buckets, values, casting="unsafe")
        values -= np.float32(top / 2)
        values *= np.float32(self.step)
        return values


def round_shaped(wanted: np.ndarray, feedback: np.ndarray, rounder: Rounder) -> np.ndarray:
    """Round residuals coordinate after coordinate, the last first, each corrected by the errors of those already rounded.

    wanted    float32 (D, n), a token a column, in units of the levels; overwritten with the errors (wanted - level)
    feedback  Shaping.feedback
    rounder   see Rounder
    returns   uint8 (D, n), bucket numbers

    Cost: D * D / 2 multiply-adds a token, most of them in GEMMs of STRIP rows, and some eight passes over n numbers a coordinate.
    """
    dim, n_tokens = wanted.shape
    buckets = np.empty((dim, n_tokens), np.uint8)
    target = np.empty(n_tokens, np.float32)
    errors = wanted
    for end in range(dim, 0, -STRIP):
        start = max(end - STRIP, 0)
        from_later = feedback[start:end, end:] @ errors[end:]
        for k in range(end - 1, start - 1, -1):
            np.dot(feedback[k, k + 1 : end], errors[k + 1 : end], out=target)
            target += from_later[k - start]
            target += errors[k]
            errors[k] -= rounder(target, buckets[k])
    return buckets
