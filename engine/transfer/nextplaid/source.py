"""An opened index directory as a source of a bulk build (engine/index/bulk.py)."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any

import numpy as np

from engine.index import bulk
from engine.transfer.nextplaid.index import PlaidIndex
from engine.transfer.nextplaid.rows import DATABASE


class PlaidSource:
    """A PlaidIndex as a source of engine.index.bulk.BulkBuild: vectors and metadata rows together, in blocks.

    A document without tokens, which a peer allows, comes with one zero vector.

    without  metadata columns to leave out
    """

    def __init__(self, plaid: PlaidIndex, *, without: Collection[str] = ()) -> None:
        self.plaid, self._without = plaid, without
        self.n_documents, self.n_tokens = plaid.n_documents, plaid.n_tokens
        self.fingerprint = plaid.watch.fingerprint([DATABASE] if plaid.has_fields else [])

    def sample(self, n_tokens: int) -> np.ndarray:
        """float16 (n, D)"""
        return self.plaid.sample(n_tokens)

    def blocks(self, first_document: int) -> Iterator[bulk.Block]:
        """Errors as PlaidIndex.blocks and PlaidIndex.fields. A document without a row has no fields."""
        rows = self.plaid.fields(without=self._without, first_document=first_document)
        row = next(rows, None)
        for block in self.plaid.blocks(first_document=first_document):
            fields: list[dict[str, Any]] = [{} for _ in block.ids]
            while row is not None and row[0] <= block.ids[-1]:
                fields[row[0] - int(block.ids[0])] = row[1]
                row = next(rows, None)
            tokens, lengths = _with_a_token_each(block.tokens, block.doclens)
            offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
            yield bulk.Block(tokens, offsets, fields if self.plaid.has_fields else None)


def _with_a_token_each(tokens: np.ndarray, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A zero vector for each document without tokens: it keeps its id, which may not shift, and scores nothing."""
    empty = np.flatnonzero(lengths == 0)
    if not len(empty):
        return tokens, lengths
    starts = np.concatenate([[0], np.cumsum(lengths)])[empty]
    return np.insert(tokens, starts, 0, axis=0), np.maximum(lengths, 1)
