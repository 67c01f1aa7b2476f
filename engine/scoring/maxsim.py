"""Exact MaxSim over decoded tokens of a quantised segment: stage 4 of the cascade. Over plain vectors: brute_force.py.

    score(document) = sum over query tokens q of  max over its tokens t of  inv_t * S[code_t, q] + b_t * (levels[buckets_t] . q)

The first part is a lookup in the query x centroid table, the second a matrix product of unpacked rows. With 32 query tokens on one core the product is
40 % of the cost per token, so the work around it goes in passes over contiguous arrays that stay in the L2 cache.

Most tokens are never unpacked. ExactScorer takes two looks at a document: the first at the tokens whose centroid is the document's best for some query
token (one in ten), which gives a score much better than the centroids' alone. The second look, for documents that are still promising,
takes the other tokens that may plausibly beat the *exact* bests of the first. rerank.py decides who gets one.
"""

from __future__ import annotations

import numpy as np

from engine.errors import InvalidRequest
from engine.scoring.arrays import Decoder, Records
from engine.scoring.centroid_scores import TOP_LANE, CentroidScores
from engine.scoring.scratch import scratch
from engine.scoring.selection import QUAD, Selection, all_tokens, best_lanes, first_tokens, second_tokens
from engine.scoring.unpack import Operand, unpack

SMALL_PRODUCT = 1_000_000
"""OpenBLAS multiplies without first copying its operands if M·N·K is at most this (interface/gemm.c, small matrix path, AVX-512 machines): 51
instead of 77 ns a token for 32 query tokens of 128 dimensions, measured. So blocks are multiplied in pieces of that size, in one matmul call."""
BLOCK_BYTES = 1 << 20
"""Unpacked floats of one block, half of a 2 MiB L2 cache; measured: half or double costs 2 to 5 % more."""
STEP_ROWS = 20
"""Segmented maxima go position by position if a step has this many rows on average: less does not pay for two calls into numpy."""


class ExactScorer:
    """Scores documents of one segment for one query. Between calls it keeps constants only; one thread at a time.

    n_tokens_scored counts the tokens unpacked so far.
    """

    def __init__(self, scores: CentroidScores, records: Records, decoder: Decoder) -> None:
        self.scores, self.records, self.decoder = scores, records, decoder
        self.operand = Operand.of(scores.query, decoder)
        self.n_tokens_scored = 0
        self._reaches: dict[float, np.ndarray] = {}
        width = len(scores.query)
        self._inv = np.repeat(decoder.inv_table[:, None].astype(np.float32), width, axis=1)
        self._scale = np.repeat(decoder.scale_table[:, None].astype(np.float32), width, axis=1)
        self._piece = max(16, SMALL_PRODUCT // self.operand.matrix.size // 16 * 16)
        self._block = self._piece * max(1, BLOCK_BYTES // (4 * max(self.operand.matrix.shape) * self._piece))
        self._bias = np.repeat(self.operand.bias[None], self._block, axis=0) if self.operand.bias.any() else None

    def all_tokens(self, ordinals: np.ndarray) -> np.ndarray:
        """Best similarity per query token over all (known) tokens: float32 (n, Q), rows of -inf for documents without tokens."""
        order = self._by_length(ordinals)
        return self._best(order, all_tokens(self.scores, self.records, ordinals[order]))

    def first_look(self, ordinals: np.ndarray, lanes: np.ndarray) -> np.ndarray:
        """As all_tokens, over selection.first_tokens only. lanes uint8 (G, n, width) of centroid_maxsim for these documents."""
        order = self._by_length(ordinals)
        return self._best(order, first_tokens(self.scores, self.records, ordinals[order], self._ordered(lanes, order)))

    def second_look(self, ordinals: np.ndarray, lanes: np.ndarray, best: np.ndarray, spreads: float) -> np.ndarray:
        """Improve `best`, float32 (n, Q), of a first look by the tokens left out that may plausibly be better.

        spreads  how many residual spreads better than its centroid a token may plausibly be; its spread is its own scale, because levels have unit
                 variance, times the length of the query token
        """
        order = self._by_length(ordinals)
        lanes, floors = self._ordered(lanes, order), self._lanes_of(best[order])
        chosen = second_tokens(self.scores, self.records, ordinals[order], lanes, floors, self._reach(spreads))
        return np.asarray(np.maximum(best, self._best(order, chosen)))

    def _ordered(self, lanes: np.ndarray, order: np.ndarray) -> np.ndarray:
        """lanes in this order, with padding columns set to 255, which no lane of a padding column reaches."""
        ordered = np.take(lanes, order, axis=1)
        ordered[-1, :, self.scores.n_tokens - (len(lanes) - 1) * self.scores.width :] = 255
        return ordered

    def _reach(self, spreads: float) -> np.ndarray:
        """uint8 (G, 256, width): by scale byte, how many steps a token may be better than its centroid; padding columns 0."""
        scores = self.scores
        if self._reaches.get(spreads) is None:
            lengths = np.linalg.norm(scores.query, axis=1)
            steps = np.ceil(np.outer(self.decoder.scale_table, lengths * np.float32(spreads / scores.step)))
            reach = np.minimum(steps, 255 - TOP_LANE).astype(np.uint8)
            self._reaches[spreads] = np.ascontiguousarray(reach.reshape(256, len(scores.lanes), scores.width).transpose(1, 0, 2))
        return self._reaches[spreads]

    def _by_length(self, ordinals: np.ndarray) -> np.ndarray:
        """The order in which selection.py wants documents: by falling number of tokens."""
        order: np.ndarray = np.argsort(-self.records.n_tokens[ordinals], kind="stable")
        return order

    def _lanes_of(self, similarities: np.ndarray) -> np.ndarray:
        """Quantise float32 (n, Q) upwards to lanes uint8 (G, n, width), padding columns 255."""
        scores = self.scores
        n_groups, width = len(scores.lanes), scores.width
        lanes = np.full((len(similarities), n_groups * width), 255, dtype=np.uint8)
        steps = np.ceil((similarities - np.float32(scores.low)) * np.float32(1 / scores.step))
        lanes[:, : scores.n_tokens] = np.clip(steps, 0, 255)
        return np.ascontiguousarray(lanes.reshape(-1, n_groups, width).transpose(1, 0, 2))

    def _best(self, order: np.ndarray, selection: Selection) -> np.ndarray:
        """Best similarities of documents whose tokens were selected in this order; in the order of the caller: float32 (n, Q)."""
        self.n_tokens_scored += selection.n_tokens
        best = np.full((len(order), self.scores.n_tokens), -np.inf, dtype=np.float32)
        full = np.flatnonzero(selection.counts)
        if len(full):
            folded = self._folded(selection)
            best[order[full]] = segment_maxima(folded, selection.counts[full] // QUAD)[:, : self.scores.n_tokens]
        return best

    def _folded(self, selection: Selection) -> np.ndarray:
        """Similarities of selected tokens with every QUAD of them folded into its maximum: float32 (t / QUAD, W) in scratch memory.

        Within a block the tokens go as QUAD planes, the first of every quad, the second, ..., so that folding is a maximum of whole planes: 6 ns a
        token. Quads as neighbouring rows cost 16, leaving all to maximum.reduceat 24.
        """
        n, width = len(selection.codes), self.scores.table.shape[1]
        out = scratch("maxsim.folded", (n // QUAD, width), np.float32)
        buffers = self._buffers(min(n, self._block))
        for first in range(0, n, self._block):
            last = min(n, first + self._block)
            rows, scalars, codes = (
                a[first:last].reshape(-1, QUAD).T.reshape(-1) for a in (selection.rows, selection.scalars, selection.codes)
            )
            planes = self._similarities(rows, scalars, codes, buffers).reshape(QUAD, -1, width)
            np.maximum(planes[0], planes[1], out=planes[0])
            np.maximum(planes[2], planes[3], out=planes[2])
            np.maximum(planes[0], planes[2], out=out[first // QUAD : last // QUAD])
        return out

    def similarities(self, selection: Selection) -> np.ndarray:
        """Similarity of each selected token to every query token: float32 (t, W)."""
        n = len(selection.codes)
        out = np.empty((n, self.scores.table.shape[1]), dtype=np.float32)
        buffers = self._buffers(min(n, self._block))
        for first in range(0, n, self._block):
            part = slice(first, min(n, first + self._block))
            out[part] = self._similarities(selection.rows[part], selection.scalars[part], selection.codes[part], buffers)
        return out

    def _buffers(self, n: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Three float32 (n, W) of scratch memory."""
        stack = scratch("maxsim.block", (3, n, self.scores.table.shape[1]), np.float32)
        return stack[0], stack[1], stack[2]

    def _similarities(
        self, rows: np.ndarray, scalars: np.ndarray, codes: np.ndarray, buffers: tuple[np.ndarray, np.ndarray, np.ndarray]
    ) -> np.ndarray:
        """Similarities of one block of tokens, given as Selection gives them: float32 (block, W), the first of the buffers.

        scale * (unpacked . query + bias) + inv * table[code]. Per-token factors are gathered as rows as wide as the block and multiplied
        contiguously: half of what broadcasting a column costs. Methods instead of numpy's functions, because a call of np.take costs as much as
        its work on a few hundred tokens.
        """
        n = len(rows)
        out, factor, centroid_part = buffers[0][:n], buffers[1][:n], buffers[2][:n]
        multiply(unpack(self.records.rows, rows, self.decoder), self.operand.matrix, self._piece, out)
        pairs = self.records.scalars.take(scalars, axis=0, mode="clip")
        if self._bias is not None:
            np.add(out, self._bias[:n], out=out)
        self._scale.take(pairs[:, 1], axis=0, out=factor, mode="clip")
        np.multiply(out, factor, out=out)
        self.scores.table.take(codes, axis=0, out=centroid_part, mode="clip")
        self._inv.take(pairs[:, 0], axis=0, out=factor, mode="clip")
        np.multiply(centroid_part, factor, out=centroid_part)
        np.add(out, centroid_part, out=out)
        return out


def multiply(unpacked: np.ndarray, matrix: np.ndarray, piece: int, out: np.ndarray) -> None:
    """out = unpacked @ matrix, in pieces of SMALL_PRODUCT, all but the last in one call."""
    n = len(unpacked)
    whole = n // piece * piece
    if whole:
        pieces = unpacked[:whole].reshape(-1, piece, unpacked.shape[1])
        np.matmul(pieces, matrix, out=out[:whole].reshape(-1, piece, matrix.shape[1]))
    if whole < n:
        np.matmul(unpacked[whole:], matrix, out=out[whole:])


def segment_maxima(rows: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Maxima over runs of rows: float32 (t, W), counts int64 (n,), all positive -> float32 (n, W).

    Position by position over documents by falling count, as stage 3 does; 10 ns a row where reduceat along the slow axis costs 24 and 0.3 µs a run. A run much
    longer than the others would make many short steps, so then reduceat it is.
    """
    begins = np.cumsum(counts) - counts
    longest = int(counts.max())
    if longest * STEP_ROWS > len(rows):
        return np.asarray(np.maximum.reduceat(rows, begins, axis=0))
    order = np.argsort(-counts, kind="stable")
    falling, begins = counts[order], begins[order]
    n_at = np.searchsorted(-falling, -np.arange(longest), side="left")
    best = rows.take(begins, axis=0, mode="clip")
    step = np.empty_like(best)
    for position, n in enumerate(n_at[1:].tolist(), 1):
        rows.take(begins[:n] + position, axis=0, out=step[:n], mode="clip")
        np.maximum(best[:n], step[:n], out=best[:n])
    out: np.ndarray = np.empty_like(best)
    out[order] = best
    return out


def exact_ordinals(
    scores: CentroidScores, records: Records, decoder: Decoder, ordinals: np.ndarray, spreads: float | None = None
) -> np.ndarray:
    """Score the given documents exactly: float32 (n,), aligned with ordinals; -inf for a document without (known) tokens.

    Where scores.known is set, tokens of unknown codes are left out. `spreads` leaves out tokens as
    ExactScorer's two looks do; None scores all.
    """
    scorer = ExactScorer(scores, records, decoder)
    if spreads is None:
        return np.asarray(scorer.all_tokens(ordinals).sum(axis=1))
    lanes = best_lanes(scores, records, ordinals)
    return np.asarray(scorer.second_look(ordinals, lanes, scorer.first_look(ordinals, lanes), spreads).sum(axis=1))


def best_tokens(scores: CentroidScores, records: Records, decoder: Decoder, ordinal: int) -> tuple[np.ndarray, np.ndarray]:
    """For explaining a hit: which token of the document answered each query token.

    returns  position in the document int64 (Q,), similarity float32 (Q,); ties go to the earlier token. The similarities add up to the score.
    Raises InvalidRequest for a document without (known) tokens.
    """
    selection = all_tokens(scores, records, np.array([ordinal]))
    if selection.n_tokens == 0:
        raise InvalidRequest("the document has no tokens to explain", ordinal=ordinal)
    similarities = ExactScorer(scores, records, decoder).similarities(selection)[: selection.n_tokens, : scores.n_tokens]
    winners = similarities.argmax(axis=0)
    return selection.rows[winners] - records.residual_start[ordinal], similarities[winners, np.arange(scores.n_tokens)].copy()
