"""Read an index directory of NextPlaid or FastPlaid: document token vectors, settings and metadata rows.

`tartan import` calls `read`, hands the blocks to the index's writer and the rows to its metadata. This module writes nothing, neither
into the directory (it may belong to a running server) nor into a Tartan index, and it keeps nothing of the peer's codes: what it
gives are unit vectors, reconstructed from centroid + residual as the peer itself does it before scoring. README.md says why.

The layout, as far as it binds here (NextPlaid 1.6, FastPlaid 1.7; both are relatives of one form, both without checksums):

    metadata.json           num_chunks, nbits, counts; `next_plaid_compatible` tells NextPlaid from FastPlaid
    centroids.npy           (K, D) float16 or float32
    bucket_weights.npy      (2^nbits,) the value that a bucket number adds to a dimension of the centroid
    doclens.{i}.json        tokens per document of chunk i; documents are numbered through the chunks in numeric order
    {i}.codes.npy           (t,) centroid numbers            merged_codes.npy      all chunks' rows, then padding rows
    {i}.residuals.npy       (t, D·nbits/8) packed buckets    merged_residuals.npy  likewise
    merged_*.manifest.json  how many rows each chunk has in the merged file
    embeddings.npy          NextPlaid, small indexes only: the vectors as they came
    metadata.db             SQLite, rows by document number; config.json: the server's settings

Which copy is true: the chunk's own file if it is there (NextPlaid always; FastPlaid until it has folded it in), else its slice of
the merged file. Bits: bucket numbers are written lowest bit first into bytes that are filled from the highest bit down.

Payload files are read with ordinary reads, not mapped: both peers truncate and rewrite these files in place, and a mapped page
behind a new end of file kills the process where a short read is only an error.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import sqlite3
import tempfile
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from engine.config import NBITS, IndexConfig
from engine.errors import Conflict, CorruptData, InvalidRequest, NotFound, UnsupportedFormat
from engine.index import bulk
from engine.transfer.npy import read_header

BLOCK_DOCUMENTS = 1024
BLOCK_TOKENS = 131_072
"""float32 at D = 128: 64 MiB, and about as much again while a block is being decoded."""

_LOSSLESS_NBITS = 4
"""Measured, see README.md: reconstructed 2-bit vectors keep their recall when encoded again at 4 bits, and lose 1.4 points at 2."""

_SMALLEST_NORM = 1e-12
_MOST_TOKENS = 1 << 31
"""Of one document: beyond it is rubbish, and sums of rubbish would overflow."""
_DATABASE = "metadata.db"
_RESERVED_COLUMNS = ("_subset_", "_content_id_")
Value = str | int | float | None


@dataclass(frozen=True, slots=True)
class Block:
    """Consecutive documents. tokens float32 (t, D) unit rows (zero rows stay zero), doclens int64 (n,), ids int64 (n,) ascending."""

    tokens: np.ndarray
    doclens: np.ndarray
    ids: np.ndarray


def read(directory: str | os.PathLike[str]) -> PlaidIndex:
    """Open an index directory and verify everything that can be verified without reading the payload.

    Cost: reads centroids, weights and document lengths (8 bytes a document are kept); headers only of the large files.
    Raises NotFound (no directory, no index in it, no payload), CorruptData (contradicting or impossible content), UnsupportedFormat
    (an object array, a one-bit `binary` index).
    """
    root = Path(directory)
    if not root.is_dir():
        raise NotFound("no such directory", directory=str(root))
    if not (root / "metadata.json").exists():
        declared = (root / "config.json").exists()
        reason = "the index is declared but holds no documents" if declared else "not an index directory: it has no metadata.json"
        raise NotFound(reason, directory=str(root))
    watch = _Watch(root)
    description = _object(watch, "metadata.json")
    settings = _object(watch, "config.json") if (root / "config.json").exists() else {}
    for kind in ("binary", "ternary"):
        if settings.get(kind) is True or description.get(kind) is True:
            raise UnsupportedFormat(f"a {kind} index holds signs instead of bucket numbers and is not read", directory=str(root))
    nbits = _count(description, "nbits", "metadata.json")
    if nbits not in NBITS:
        raise _malformed("nbits is 1, 2, 4 or 8", "metadata.json", expected=NBITS, found=nbits)
    centroids, weights = _codec(watch, nbits)
    doclens = [_lengths(watch, f"doclens.{i}.json") for i in range(_count(description, "num_chunks", "metadata.json"))]
    plaid = PlaidIndex(root, nbits, centroids, weights, doclens, description.get("next_plaid_compatible") is True, watch)
    plaid._payload = _payload(plaid)
    plaid._raw = _raw_vectors(plaid)
    plaid._compare_counts(description)
    plaid.config = _config(plaid, settings)
    if nbits < _LOSSLESS_NBITS and not plaid.exact:
        plaid.notes.append(
            f"{nbits}-bit vectors lose recall when they are encoded again at {nbits} bits; at {_LOSSLESS_NBITS} they lose none"
        )
    watch.check()
    return plaid


@dataclass(slots=True)
class PlaidIndex:
    """An opened index directory; made by `read`.

    nbits       bits per dimension in the peer's residuals
    centroids   float32 (K, D)          weights  float32 (2^nbits,)
    doclens     per chunk int64 (n,)
    nextplaid   True if NextPlaid made or converted it, False if it is FastPlaid's
    config      settings to create an index of ours with; what the peer does not say has our default
    notes       sentences about what is odd, but harmless or decided; for the user of an import to read
    """

    directory: Path
    nbits: int
    centroids: np.ndarray
    weights: np.ndarray
    doclens: list[np.ndarray]
    nextplaid: bool
    _watch: _Watch
    config: IndexConfig = field(default_factory=IndexConfig)
    notes: list[str] = field(default_factory=list)
    _payload: list[tuple[_Slice | None, _Slice | None]] = field(default_factory=list)
    _raw: _Slice | None = None

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
        return (self.directory / _DATABASE).exists()

    @property
    def exact(self) -> bool:
        """True if the directory still holds every document's own vectors, so that `blocks` need not reconstruct them."""
        return self._raw is not None

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
                self._watch.check()
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
        codes, residuals = self._payload[chunk]
        if self._raw is not None and not reconstruct:
            before = sum(int(lengths.sum()) for lengths in self.doclens[:chunk])
            tokens = self._raw.read(before + rows[0], before + rows[1]).astype(np.float32)
            if not np.isfinite(tokens).all():
                raise _malformed("a vector is not finite", self._raw.name, rows=rows)
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
        with _database(self.directory) as database:
            columns, source = _columns(database)
            _check_rows(database, source, self.n_documents, every=not self.nextplaid)
            wanted = [name for name in columns if name not in without]
            names = "".join(f', {columns[name]}."{name}"' for name in wanted)
            question = f"SELECT t._subset_{names} FROM {source} WHERE t._subset_ >= ? ORDER BY t._subset_"
            for id_, *values in database.execute(question, (first_document,)):
                yield id_, {name: _value(value, id_, name) for name, value in zip(wanted, values, strict=True)}
        self._watch.check()

    def _decode(self, codes: np.ndarray, packed: np.ndarray, name: str, first_row: int) -> np.ndarray:
        """codes int64 (t,), packed uint8 (t, B) -> float32 (t, D): centroid + weight of each dimension's bucket."""
        if codes.min() < 0 or codes.max() >= len(self.centroids):
            at = int(np.argmax((codes < 0) | (codes >= len(self.centroids))))
            facts = {"row": first_row + at, "expected": f"0..{len(self.centroids) - 1}", "found": int(codes[at])}
            raise _malformed("a code has no centroid", name, **facts)
        tokens: np.ndarray = byte_weights(self.weights)[packed].reshape(len(codes), self.dim)
        tokens += self.centroids[codes]
        return tokens

    def _compare_counts(self, description: dict[str, Any]) -> None:
        """Counts in metadata.json are hearsay: document lengths and payload rows decide, a difference is only noted."""
        for key, found in (("num_documents", self.n_documents), ("num_embeddings", self.n_tokens)):
            said = description.get(key, found)
            if said != found and not (key == "num_documents" and said == 0 and not self.nextplaid):  # 0: FastPlaid's older form
                self.notes.append(f"metadata.json says {key} is {said}, the files hold {found}")


class PlaidSource:
    """A PlaidIndex as a source of engine.index.bulk.BulkBuild: vectors and metadata rows together, in blocks.

    A document without tokens, which a peer allows, comes with one zero vector.

    without  metadata columns to leave out
    """

    def __init__(self, plaid: PlaidIndex, *, without: Collection[str] = ()) -> None:
        self.plaid, self._without = plaid, without
        self.n_documents, self.n_tokens = plaid.n_documents, plaid.n_tokens
        self.fingerprint = plaid._watch.fingerprint([_DATABASE] if plaid.has_fields else [])

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


# Files: JSON, arrays, and the watch over them.


class _Watch:
    """Identities of the files that were consulted: an index that changes under the reader would mix two states."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._seen: dict[str, tuple[int, int, int]] = {}

    def open(self, name: str) -> Path:
        """The path of `name`, from now on watched. CorruptData if it is not there."""
        try:
            seen = _identity(self.root / name)
        except FileNotFoundError as error:
            raise CorruptData("a file of the index is missing", code="missing-object", object=name) from error
        if self._seen.setdefault(name, seen) != seen:
            raise self._changed(name)
        return self.root / name

    def fingerprint(self, further: Sequence[str]) -> str:
        """Changes with the place, size or time of any watched or further file."""
        seen = {**self._seen, **{name: _identity(self.root / name) for name in further}}
        return hashlib.sha256(repr((str(self.root.resolve()), sorted(seen.items()))).encode()).hexdigest()

    def check(self) -> None:
        """Raise Conflict if a watched file is no longer what it was. One stat a file."""
        for name, seen in self._seen.items():
            try:
                now = _identity(self.root / name)
            except FileNotFoundError as error:
                raise self._changed(name) from error
            if now != seen:
                raise self._changed(name)

    def _changed(self, name: str) -> Conflict:
        reason = "the directory changed while it was read: stop its server, or import from a copy"
        return Conflict(reason, object=name, directory=str(self.root))


def _identity(path: Path) -> tuple[int, int, int]:
    status = path.stat()
    return status.st_ino, status.st_size, status.st_mtime_ns


def _malformed(message: str, name: str, **facts: object) -> CorruptData:
    return CorruptData(message, code="malformed", object=name, **facts)


def _object(watch: _Watch, name: str) -> dict[str, Any]:
    try:
        content = json.loads(watch.open(name).read_bytes())
    except (ValueError, RecursionError) as error:
        raise _malformed("not JSON", name, reason=str(error)) from error
    if not isinstance(content, dict):
        raise _malformed("a JSON object was expected", name, found=type(content).__name__)
    return content


def _count(content: dict[str, Any], key: str, name: str) -> int:
    value = content.get(key)
    if type(value) is not int or value < 0:
        raise _malformed("a count was expected", name, key=key, found=repr(value)[:80])
    return value


def _lengths(watch: _Watch, name: str) -> np.ndarray:
    """A JSON array of counts -> int64 (n,)."""
    try:
        lengths = np.array(msgspec.json.decode(watch.open(name).read_bytes(), type=list[int]), np.int64)
    except (msgspec.MsgspecError, OverflowError, ValueError, RecursionError) as error:
        raise _malformed("an array of token counts was expected", name, reason=str(error)) from error
    impossible = np.flatnonzero((lengths < 0) | (lengths > _MOST_TOKENS))
    if len(impossible):
        raise _malformed("an impossible number of tokens", name, row=int(impossible[0]), found=int(lengths[impossible[0]]))
    return lengths


@dataclass(frozen=True, slots=True)
class _Slice:
    """Rows of an .npy file, by their place. Reading copies, so that data at odd places comes out aligned."""

    watch: _Watch
    name: str
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    data_start: int
    first_row: int = 0

    def read(self, start: int, stop: int) -> np.ndarray:
        """Rows [start, stop) of the slice. CorruptData if the file ends before them."""
        row_bytes = self.dtype.itemsize * math.prod(self.shape[1:])
        wanted = np.empty((stop - start, *self.shape[1:]), self.dtype)
        view = wanted.reshape(-1).view(np.uint8).data
        with open(self.watch.open(self.name), "rb", buffering=0) as file:
            file.seek(self.data_start + (self.first_row + start) * row_bytes)
            done = 0
            while done < len(view):
                n = file.readinto(view[done:])
                if not n:
                    raise _malformed("the file ends before its rows do", self.name, expected=len(view), found=done)
                done += n
        return wanted

    def at(self, first_row: int) -> _Slice:
        return _Slice(self.watch, self.name, self.dtype, self.shape, self.data_start, first_row)


def _array(watch: _Watch, name: str, kinds: str) -> _Slice:
    """The header of an .npy file. kinds: letters of numpy's dtype kinds that are allowed. Object arrays are pickles, never read."""
    with open(watch.open(name), "rb") as file:
        try:
            shape, fortran, dtype = read_header(file)
        except ValueError as error:
            raise _malformed("not an .npy file", name, reason=str(error)) from error
        start = file.tell()
    if dtype.hasobject:
        raise UnsupportedFormat("an object array is a pickle and is not read", object=name)
    if fortran and len(shape) > 1:
        raise _malformed("rows must lie end to end", name, expected="C order", found="Fortran order")
    if dtype.kind not in kinds or dtype.fields is not None:
        raise _malformed("another type of number was expected", name, expected=kinds, found=str(dtype))
    size, found = start + dtype.itemsize * math.prod(shape), (watch.root / name).stat().st_size
    if found < size:
        raise _malformed("the file ends before its rows do", name, expected=size, found=found)
    return _Slice(watch, name, dtype, shape, start)


# The codec and the payload.


def _codec(watch: _Watch, nbits: int) -> tuple[np.ndarray, np.ndarray]:
    """centroids float32 (K, D) and weights float32 (2^nbits,), finite and of fitting shapes."""
    found = []
    for name, axes in (("centroids.npy", 2), ("bucket_weights.npy", 1)):
        header = _array(watch, name, "f")
        if len(header.shape) != axes:
            raise _malformed("another number of axes was expected", name, expected=axes, found=len(header.shape))
        values = header.read(0, header.shape[0]).astype(np.float32)
        if not np.isfinite(values).all():
            raise _malformed("a value is not finite", name)
        found.append(values)
    centroids, weights = found
    if len(weights) != 1 << nbits:
        raise _malformed("one weight per bucket was expected", "bucket_weights.npy", expected=1 << nbits, found=len(weights))
    if centroids.shape[1] == 0 or centroids.shape[1] * nbits % 8:
        raise _malformed("a residual does not fill whole bytes", "centroids.npy", dim=centroids.shape[1], nbits=nbits)
    return centroids, weights


def _payload(plaid: PlaidIndex) -> list[tuple[_Slice | None, _Slice | None]]:
    """Where each chunk's codes and residuals are; None for a chunk without tokens."""
    rows = [int(lengths.sum()) for lengths in plaid.doclens]
    width = plaid.dim * plaid.nbits // 8
    codes = _chunk_slices(plaid, "codes", "iu", rows, ())
    residuals = _chunk_slices(plaid, "residuals", "u", rows, (width,))
    for found in residuals:
        if found is not None and found.dtype.itemsize != 1:
            raise _malformed("residuals are bytes", found.name, found=str(found.dtype))
    return list(zip(codes, residuals, strict=True))


def _chunk_slices(plaid: PlaidIndex, payload: str, kinds: str, rows: list[int], row_shape: tuple[int, ...]) -> list[_Slice | None]:
    """For each chunk the slice with its rows[i] rows: its own file, else its part of the merged file."""
    watch, merged = plaid._watch, None
    found: list[_Slice | None] = []
    for i, n_rows in enumerate(rows):
        name = f"{i}.{payload}.npy"
        if n_rows == 0:
            found.append(None)
            continue
        if (watch.root / name).exists():
            own = _array(watch, name, kinds)
            if own.shape != (n_rows, *row_shape):
                raise _malformed("a chunk's rows and its document lengths differ", name, expected=(n_rows, *row_shape), found=own.shape)
            found.append(own)
            continue
        if merged is None:
            merged = _merged(plaid, payload, kinds, row_shape)
            first_rows = _first_rows(watch, payload, rows)
        first_row = first_rows(i)
        if first_row + n_rows > merged.shape[0]:
            facts = {"chunk": i, "expected": first_row + n_rows, "found": merged.shape[0]}
            raise _malformed("the merged file has fewer rows than the documents have tokens", merged.name, **facts)
        found.append(merged.at(first_row))
    return found


def _merged(plaid: PlaidIndex, payload: str, kinds: str, row_shape: tuple[int, ...]) -> _Slice:
    name = f"merged_{payload}.npy"
    if not (plaid.directory / name).exists():
        if plaid.nextplaid:
            reason = (
                f"the index has documents but no {payload}: NextPlaid converted a FastPlaid index whose only copy was the merged files,"
                " and removed them; restore the FastPlaid directory from a backup"
            )
        else:
            reason = f"the index has documents but neither chunk files nor a merged file of {payload}"
        raise CorruptData(reason, code="missing-object", object=name, n_documents=plaid.n_documents)
    merged = _array(plaid._watch, name, kinds)
    if len(merged.shape) != 1 + len(row_shape) or merged.shape[1:] != row_shape:
        raise _malformed("another form of rows was expected", name, expected=("rows", *row_shape), found=merged.shape)
    return merged


def _first_rows(watch: _Watch, payload: str, rows: list[int]) -> Callable[[int], int]:
    """A function from a chunk to its first row in the merged file. From the manifest, which counts what was merged; else from doclens.

    The two differ where a chunk was written again (then its own file wins) and those behind it still lie where they were.
    """
    name = f"merged_{payload}.manifest.json"
    if not (watch.root / name).exists():
        starts = np.concatenate([[0], np.cumsum(rows)])
        return lambda i: int(starts[i])
    content = _object(watch, name)
    entries = content.get("chunks", content)  # NextPlaid keeps them one level down

    def merged_rows(i: int) -> int:
        entry = entries.get(f"{i}.{payload}.npy") if isinstance(entries, dict) else None
        if entry is None or (isinstance(entry, dict) and entry.get("merged") is False):
            return 0
        return _count(entry if isinstance(entry, dict) else {}, "rows", name)

    def first_row(i: int) -> int:
        if merged_rows(i) != rows[i]:
            facts = {"chunk": i, "expected": rows[i], "found": merged_rows(i)}
            raise _malformed("the manifest and the document lengths differ, and the chunk has no file of its own", name, **facts)
        return sum(merged_rows(j) for j in range(i))

    return first_row


def _raw_vectors(plaid: PlaidIndex) -> _Slice | None:
    """NextPlaid's embeddings.npy if it holds every document as it came; None otherwise (FastPlaid's is a pickle: never read)."""
    names = ("embeddings.npy", "embeddings_lengths.json")
    if plaid.n_tokens == 0 or not all((plaid.directory / name).exists() for name in names):
        return None
    try:
        raw = _array(plaid._watch, names[0], "f")
    except UnsupportedFormat:
        return None
    lengths = _lengths(plaid._watch, names[1])
    if not np.array_equal(lengths, np.concatenate(plaid.doclens)) or raw.shape != (plaid.n_tokens, plaid.dim):
        plaid.notes.append("embeddings.npy does not cover every document and is left aside: vectors are reconstructed")
        return None
    return raw


# Settings and metadata rows.


def _config(plaid: PlaidIndex, settings: dict[str, Any]) -> IndexConfig:
    """IndexConfig from config.json; nbits from the payload; the tokenizer from the database where there is no config.json."""
    known: dict[str, object] = {"nbits": plaid.nbits}
    for key in ("seed", "batch_size", "start_from_scratch", "max_documents"):
        value = settings.get(key)
        if type(value) is int and (key != "max_documents" or value > 0):
            known[key] = value
        elif value is not None:
            plaid.notes.append(f"config.json says {key} is {value!r}: left at our default")
    tokenizer: object = settings.get("fts_tokenizer") or _tokenizer(plaid)
    if tokenizer not in ("unicode61", "trigram"):
        if tokenizer is not None:
            plaid.notes.append(f"the keyword tokenizer {tokenizer!r} is not known here: unicode61 instead")
        tokenizer = "unicode61"
    return msgspec.convert({**known, "fts_tokenizer": tokenizer}, IndexConfig)


def _tokenizer(plaid: PlaidIndex) -> str | None:
    """The keyword tokenizer that the database names. An unreadable database is no obstacle here: `fields` will say so."""
    if not plaid.has_fields:
        return None
    try:
        with _database(plaid.directory) as database:
            if "_FTS_SETTINGS_" not in _tables(database):
                return None
            row = database.execute("SELECT value FROM _FTS_SETTINGS_ WHERE key = 'tokenizer'").fetchone()
    except CorruptData as error:
        plaid.notes.append(str(error))
        return None
    return str(row[0]) if row else None


@contextmanager
def _database(directory: Path) -> Iterator[sqlite3.Connection]:
    """metadata.db, read-only. Where changes lie beside it that it does not hold yet, a copy of all of them is read instead:
    folding them in (a WAL's index, a journal's rollback) writes, and the directory is not ours to write.

    Raises CorruptData for what SQLite cannot read, Conflict if a file changes between opening and closing.
    """
    names = [_DATABASE, f"{_DATABASE}-wal", f"{_DATABASE}-journal"]
    present = {name: _identity(directory / name) for name in names if (directory / name).exists()}
    pending = any(size > 0 for name, (_, size, _) in present.items() if name != _DATABASE)
    with tempfile.TemporaryDirectory(prefix="tartan-import-") as scratch:
        uri = f"{(directory / _DATABASE).absolute().as_uri()}?mode=ro&immutable=1"
        if pending:
            for name in present:
                shutil.copyfile(directory / name, Path(scratch) / name)
            uri = f"{(Path(scratch) / _DATABASE).as_uri()}?mode=rw"
        try:
            connection = sqlite3.connect(uri, uri=True)
            try:
                connection.execute("PRAGMA trusted_schema = OFF")
                connection.execute("PRAGMA query_only = ON")
                yield connection
            finally:
                connection.close()
        except sqlite3.Error as error:
            raise _malformed("SQLite cannot read it", _DATABASE, reason=str(error)) from error
        now = {name: _identity(directory / name) for name in names if (directory / name).exists()}
        if now != present:
            raise Conflict("the metadata changed while it was read: stop the server, or import from a copy", object=_DATABASE)


def _tables(database: sqlite3.Connection) -> set[str]:
    return {name for (name,) in database.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}


def _columns(database: sqlite3.Connection) -> tuple[dict[str, str], str]:
    """Users' columns -> alias of their table, and the FROM clause. The form is told by its tables, not by its version number."""
    tables = _tables(database)
    if "METADATA" not in tables:
        raise _malformed("no table METADATA", _DATABASE, found=sorted(tables))
    source, parts = "METADATA AS t", [("t", "METADATA")]
    if "METADATA_CONTENT" in tables:
        source += " JOIN METADATA_CONTENT AS c ON c._content_id_ = t._content_id_"
        parts.append(("c", "METADATA_CONTENT"))
    columns: dict[str, str] = {}
    for alias, table in parts:
        for _, name, *_ in database.execute(f"PRAGMA table_info({table})"):
            if name in _RESERVED_COLUMNS:
                continue
            if name in columns or not name.isidentifier() or not name.isascii():
                raise _malformed("a column's name is repeated or impossible", _DATABASE, column=name)
            columns[name] = alias
    return columns, source


def _check_rows(database: sqlite3.Connection, source: str, n_documents: int, *, every: bool) -> None:
    """Rows belong to documents: numbers in range, none twice, each with its content. FastPlaid (`every`) has one for each document."""
    question = "SELECT count(*), count(DISTINCT _subset_), total(typeof(_subset_) = 'integer' AND _subset_ BETWEEN 0 AND ?) FROM METADATA"
    n_rows, n_distinct, n_in_range = database.execute(question, (n_documents - 1,)).fetchone()
    (n_joined,) = database.execute(f"SELECT count(*) FROM {source}").fetchone()
    facts = {"expected": n_documents, "found": n_rows}
    if n_in_range != n_rows or (every and n_rows != n_documents):
        reason = "rows without a document: the file may be left over from an older index, or a write was cut short; import without fields"
        raise _malformed(reason if n_rows else "no rows for the documents", _DATABASE, **facts, in_range=int(n_in_range))
    if n_distinct != n_rows:
        raise _malformed("a document has two rows", _DATABASE, **facts, distinct=n_distinct)
    if n_joined != n_rows:
        raise _malformed("a row has no content", _DATABASE, **facts, joined=n_joined)


def _value(value: object, id_: int, column: str) -> Value:
    if isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError as error:
            reason = "a binary value has no form in JSON: leave the column out"
            raise InvalidRequest(reason, object=_DATABASE, id=id_, column=column) from error
    assert value is None or isinstance(value, str | int | float)
    return value
