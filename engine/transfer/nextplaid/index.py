"""An opened index directory of a peer: its documents' vectors in blocks, and their metadata rows. Made by opening.py.

Bits: bucket numbers are written lowest bit first into bytes that are filled from the highest bit down.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from engine.config import IndexConfig
from engine.errors import InvalidRequest
from engine.transfer.nextplaid.files import Slice, Watch, malformed
from engine.transfer.nextplaid.rows import DATABASE, Value, check_rows, columns_of, database_of, json_value

BLOCK_DOCUMENTS = 1024
BLOCK_TOKENS = 131_072
"""float32 at D = 128: 64 MiB, and about as much again while a block is being decoded."""

_SMALLEST_NORM = 1e-12


@dataclass(frozen=True, slots=True)
class Block:
    """Consecutive documents. tokens float32 (t, D) unit rows (zero rows stay zero), doclens int64 (n,), ids int64 (n,) ascending."""

    tokens: np.ndarray
    doclens: np.ndarray
    ids: np.ndarray


@dataclass(slots=True)
class PlaidIndex:
    """An opened index directory; made by `read`.

    nbits       bits per dimension in the peer's residuals
    centroids   float32 (K, D)          weights  float32 (2^nbits,)
    doclens     per chunk int64 (n,)
    nextplaid   True if NextPlaid made or converted it, False if it is FastPlaid's
    config      settings to create an index of ours with; what the peer does not say has our default
    notes       sentences about what is odd, but harmless or decided; for the user of an import to read
    payload     per chunk its codes and residuals (payload.py), None for a chunk without tokens
    raw         the vectors as they came, of all documents end to end, where they are still there
    watch       over the files that were consulted
    """

    directory: Path
    nbits: int
    centroids: np.ndarray
    weights: np.ndarray
    doclens: list[np.ndarray]
    nextplaid: bool
    watch: Watch
    config: IndexConfig = field(default_factory=IndexConfig)
    notes: list[str] = field(default_factory=list)
    payload: list[tuple[Slice | None, Slice | None]] = field(default_factory=list)
    raw: Slice | None = None

    @property
    def n_documents(self) -> int:
        return sum(len(lengths) for lengths in self.doclens)

    @property
    def n_tokens(self) -> int:
        return sum(int(lengths.sum()) for lengths in self.doclens)

    @property
    def dim(self) -> int:
        return int(self.centroids.shape[1])

    @property
    def has_fields(self) -> bool:
        return (self.directory / DATABASE).exists()

    @property
    def exact(self) -> bool:
        """True if the directory still holds every document's own vectors, so that `blocks` need not reconstruct them."""
        return self.raw is not None

    def blocks(
        self,
        n_documents_per_block: int = BLOCK_DOCUMENTS,
        *,
        max_tokens: int = BLOCK_TOKENS,
        first_document: int = 0,
        reconstruct: bool = False,
    ) -> Iterator[Block]:
        """All documents from first_document on in the order of their ids, in blocks within both bounds (a longer document is one alone).

        reconstruct  decode codes and residuals even where the original vectors are there; scores are then the peer's own

        Cost: one sequential read of the payload; memory is that of a block, whatever the index's size.
        Raises CorruptData for a code without centroid or a file cut short, Conflict if the directory changes meanwhile.
        """
        if n_documents_per_block < 1 or max_tokens < 1:
            raise InvalidRequest("a block has at least one document and one token", n_documents_per_block=n_documents_per_block)
        first_id = 0
        for chunk, lengths in enumerate(self.doclens):
            skipped = min(max(first_document - first_id, 0), len(lengths))
            for start, stop in _cuts(lengths[skipped:], n_documents_per_block, max_tokens):
                documents = slice(skipped + start, skipped + stop)
                tokens = self._tokens(chunk, documents, reconstruct)
                self.watch.check()
                yield Block(tokens, lengths[documents], np.arange(first_id + documents.start, first_id + documents.stop, dtype=np.int64))
            first_id += len(lengths)

    def sample(self, n_tokens: int, seed: int = 0) -> np.ndarray:
        """All tokens of random documents, until there are about n_tokens: float16 (n, D), unit rows. Cost: three reads a document."""
        chunk_of = np.repeat(np.arange(len(self.doclens)), [len(lengths) for lengths in self.doclens])
        place = np.concatenate([np.arange(len(lengths)) for lengths in self.doclens])
        shuffled = np.random.default_rng(seed).permutation(self.n_documents)
        gathered = np.cumsum(np.concatenate(self.doclens)[shuffled])
        chosen = np.sort(shuffled[: int(np.searchsorted(gathered, n_tokens)) + 1])
        parts = [self._tokens(int(chunk_of[n]), slice(int(place[n]), int(place[n]) + 1), False).astype(np.float16) for n in chosen]
        return np.concatenate([np.empty((0, self.dim), np.float16), *parts])

    def _tokens(self, chunk: int, documents: slice, reconstruct: bool) -> np.ndarray:
        """float32 (t, D), normalised: tokens of consecutive documents of a chunk."""
        ends = np.cumsum(self.doclens[chunk][: documents.stop])
        rows = (int(ends[documents.start] - self.doclens[chunk][documents.start]), int(ends[-1]))
        codes, residuals = self.payload[chunk]
        if self.raw is not None and not reconstruct:
            before = sum(int(lengths.sum()) for lengths in self.doclens[:chunk])
            tokens = self.raw.read(before + rows[0], before + rows[1]).astype(np.float32)
            if not np.isfinite(tokens).all():
                raise malformed("a vector is not finite", self.raw.name, rows=rows)
        elif rows[0] == rows[1] or codes is None or residuals is None:
            tokens = np.zeros((0, self.dim), np.float32)
        else:
            tokens = self._decode(codes.read(*rows), residuals.read(*rows), codes.name, rows[0])
        return _normalised(tokens)

    def fields(self, *, without: Collection[str] = (), first_document: int = 0) -> Iterator[tuple[int, dict[str, Value]]]:
        """(document id, metadata row) in the order of ids from first_document on; no line for a document without a row, None for NULL.

        without  columns to leave out, where a value has no form here

        Booleans come as 0 and 1, nested values as JSON text: that is how the peers keep them. No metadata.db gives no rows.
        Raises CorruptData if rows do not belong to the documents, InvalidRequest for a binary value that is not text, Conflict if
        the database changes meanwhile. A metadata.db with uncommitted or unfolded changes (-journal, -wal) is copied first.
        """
        if not self.has_fields:
            return
        with database_of(self.directory) as database:
            columns, source = columns_of(database)
            check_rows(database, source, self.n_documents, every=not self.nextplaid)
            wanted = [name for name in columns if name not in without]
            names = "".join(f', {columns[name]}."{name}"' for name in wanted)
            question = f"SELECT t._subset_{names} FROM {source} WHERE t._subset_ >= ? ORDER BY t._subset_"
            for id_, *values in database.execute(question, (first_document,)):
                yield id_, {name: json_value(value, id_, name) for name, value in zip(wanted, values, strict=True)}
        self.watch.check()

    def _decode(self, codes: np.ndarray, packed: np.ndarray, name: str, first_row: int) -> np.ndarray:
        """codes int64 (t,), packed uint8 (t, B) -> float32 (t, D): centroid + weight of each dimension's bucket."""
        if codes.min() < 0 or codes.max() >= len(self.centroids):
            at = int(np.argmax((codes < 0) | (codes >= len(self.centroids))))
            facts = {"row": first_row + at, "expected": f"0..{len(self.centroids) - 1}", "found": int(codes[at])}
            raise malformed("a code has no centroid", name, **facts)
        tokens: np.ndarray = byte_weights(self.weights)[packed].reshape(len(codes), self.dim)
        tokens += self.centroids[codes]
        return tokens

    def compare_counts(self, description: dict[str, Any]) -> None:
        """Counts in metadata.json are hearsay: document lengths and payload rows decide, a difference is only noted."""
        for key, found in (("num_documents", self.n_documents), ("num_embeddings", self.n_tokens)):
            said = description.get(key, found)
            if said != found and not (key == "num_documents" and said == 0 and not self.nextplaid):  # 0: FastPlaid's older form
                self.notes.append(f"metadata.json says {key} is {said}, the files hold {found}")


def byte_weights(weights: np.ndarray) -> np.ndarray:
    """float32 (2^nbits,) -> float32 (256, 8 / nbits): what each byte of a packed residual adds to its dimensions."""
    nbits = len(weights).bit_length() - 1
    bits = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1).reshape(256, 8 // nbits, nbits)
    buckets = bits @ (1 << np.arange(nbits))
    return np.asarray(weights[buckets])


def _normalised(tokens: np.ndarray) -> np.ndarray:
    norms = np.sqrt(np.einsum("td,td->t", tokens, tokens))
    tokens /= np.maximum(norms, _SMALLEST_NORM)[:, None]
    return tokens


def _cuts(lengths: np.ndarray, n_documents: int, max_tokens: int) -> Iterator[tuple[int, int]]:
    """Half-open runs of documents with at most n_documents and, unless one alone has more, max_tokens."""
    ends = np.cumsum(lengths)
    start = 0
    while start < len(lengths):
        before = int(ends[start] - lengths[start])
        fitting = int(np.searchsorted(ends, before + max_tokens, side="right"))
        stop = max(start + 1, min(start + n_documents, fitting))
        yield start, stop
        start = stop
