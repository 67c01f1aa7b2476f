"""What one call wants of an index, as a change of its manifest.

An operation is applied to a draft: it reads what it needs through Parts, replaces the draft's manifest and adds uploads to it. It may be
applied several times, each time to a newer manifest (commit.py), and keeps its result from the last time.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Protocol

import msgspec
import numpy as np

from engine.config import MAX_DIM, MAX_DOCUMENT_TOKENS
from engine.errors import InvalidRequest
from engine.format import names
from engine.format.manifest import Column, Manifest, SegmentRef
from engine.format.patch import write_patch
from engine.format.tombstones import write_tombstones
from engine.index.build import NewSegment, column_pairs, column_refs, flat_segment
from engine.index.commit import Draft
from engine.index.parts import Parts
from engine.index.turns import in_turns
from engine.metadata import schema

MAX_ADD_DOCUMENTS = 65_536
MAX_KEY_BYTES = 512
SEGMENTS_AT_ONCE = 64
"""Of an index of thousands of segments so many are looked through side by side; the ids of one are up to half a megabyte."""
_BLOCK_VALUES = 1 << 16
_SAFE_SQUARES = (1e-20, 1e20)
"""Sums of squares between these have lost nothing to float32's range; a block with any other row is scaled by its rows' peaks first."""


class Operation(Protocol):
    """A change that can be applied to a draft. `cause` is its line in the history; n_tokens its weight in a group."""

    @property
    def n_tokens(self) -> int: ...

    @property
    def cause(self) -> str: ...

    async def apply(self, draft: Draft, index: str, parts: Parts) -> None:
        """Change the draft; leave its manifest alone if there is nothing to do. On an error the caller restores the draft."""
        ...


class Added(msgspec.Struct, frozen=True):
    """What an add made: document ids int64 (N,), and how many older documents of the same keys or beyond max_documents went."""

    ids: np.ndarray
    n_replaced: int = 0
    n_evicted: int = 0


class Add(msgspec.Struct):
    """New documents: tokens float16 (T, D) of unit rows, offsets int64 (N + 1,), and per document fields and key (or None for all)."""

    tokens: np.ndarray
    offsets: np.ndarray
    fields: Sequence[Mapping[str, object]] | None
    keys: Sequence[str] | None
    added: Added = msgspec.field(default_factory=lambda: Added(np.empty(0, np.int64)))
    parts_of: Sequence[Add] = ()
    _made: tuple[NewSegment, tuple[Column, ...], tuple[Column, ...]] | None = None

    @classmethod
    def of(cls, tokens: np.ndarray, offsets: np.ndarray, fields: Sequence[Mapping[str, object]] | None, keys: Sequence[str] | None) -> Add:
        """Check everything that can be checked without the index, and normalise the vectors. Raises InvalidRequest."""
        with np.errstate(over="ignore"):  # what float32 cannot hold becomes infinite, and is refused below
            tokens = np.asarray(tokens)
            tokens = tokens.astype(np.float32) if tokens.dtype == np.float64 else tokens
        offsets = _checked_offsets(tokens, offsets)
        n_documents = len(offsets) - 1
        if fields is not None and len(fields) != n_documents:
            raise InvalidRequest("fields and documents differ in number", expected=n_documents, found=len(fields))
        if keys is not None:
            _check_keys(keys, n_documents)
        return cls(unit_rows(tokens), offsets, fields, keys)

    @classmethod
    def merged(cls, adds: Sequence[Add]) -> Add:
        """Several adds as one. They must agree in dimension, and share no key (may_join)."""
        lengths = np.concatenate([np.diff(add.offsets) for add in adds])
        some_fields = any(add.fields is not None for add in adds)
        some_keys = any(add.keys is not None for add in adds)
        assert not some_keys or all(add.keys is not None for add in adds)
        return cls(
            np.concatenate([add.tokens for add in adds]),
            np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
            [row for add in adds for row in (add.fields if add.fields is not None else [{}] * len(add))] if some_fields else None,
            [key for add in adds for key in add.keys or ()] if some_keys else None,
            parts_of=adds,
        )

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def n_tokens(self) -> int:
        return len(self.tokens)

    @property
    def cause(self) -> str:
        return f"add {len(self)} documents"

    def may_join(self, other: Operation) -> bool:
        """Whether this and `other` can be one segment with the same outcome as one after the other."""
        if not isinstance(other, Add) or other.tokens.shape[1] != self.tokens.shape[1] or (self.keys is None) != (other.keys is None):
            return False
        return self.keys is None or set(self.keys).isdisjoint(other.keys or ())

    def share_out(self) -> None:
        """Give each of the adds that were merged its own ids."""
        start = 0
        for add in self.parts_of:
            add.added = Added(self.added.ids[start : start + len(add)], self.added.n_replaced, self.added.n_evicted)
            start += len(add)

    async def apply(self, draft: Draft, index: str, parts: Parts) -> None:
        manifest = draft.manifest
        if manifest.dim is not None and manifest.dim != self.tokens.shape[1]:
            raise InvalidRequest(
                "vectors have another dimension than the index",
                code="dimension-mismatch",
                expected=manifest.dim,
                found=self.tokens.shape[1],
            )
        written, columns = await self._write(manifest, parts)
        first_id = manifest.next_id
        draft.uploads.update(written.uploads(index))
        n_replaced = 0
        if self.keys is not None:
            n_replaced = await bury(draft, index, parts, await parts.ids_of_keys(index, draft.manifest, self.keys, draft.uploads))
        draft.manifest = msgspec.structs.replace(
            draft.manifest,
            dim=self.tokens.shape[1],
            next_id=first_id + len(self),
            segments=(*draft.manifest.segments, written.segment.rebased(first_id)),
            columns=columns,
        )
        n_evicted = await _evict(draft, index, parts)
        self.added = Added(np.arange(first_id, first_id + len(self), dtype=np.int64), n_replaced, n_evicted)

    async def _write(self, manifest: Manifest, parts: Parts) -> tuple[NewSegment, tuple[Column, ...]]:
        """The new segment and the columns after it; made once, and again only if another writer has changed the columns meanwhile."""
        if self._made is None or self._made[2] != manifest.columns:
            self._made = (*await parts.compute(self._build, manifest), manifest.columns)
        return self._made[:2]

    def _build(self, manifest: Manifest) -> tuple[NewSegment, tuple[Column, ...]]:
        columns = manifest.columns
        rows, texts = None, None
        if self.fields is not None:
            pairs, rows, texts = schema.extend(column_pairs(manifest.columns), self.fields)
            columns = column_refs(pairs)
        segment = flat_segment(self.tokens, self.offsets, rows=rows, texts=texts, keys=self.keys, columns=columns, config=manifest.config)
        return segment, columns


class Delete(msgspec.Struct):
    """Documents to delete: ids int64, unique, ascending; unknown ones are ignored."""

    ids: np.ndarray
    n_deleted: int = 0
    n_tokens: int = 0

    @property
    def cause(self) -> str:
        return f"delete {len(self.ids)} documents"

    async def apply(self, draft: Draft, index: str, parts: Parts) -> None:
        self.n_deleted = await bury(draft, index, parts, self.ids)


class Update(msgspec.Struct):
    """Fields to set on documents: ids int64, unique, ascending; unknown ids are ignored, unknown columns are an error."""

    ids: np.ndarray
    updates: Mapping[str, object]
    n_updated: int = 0
    n_tokens: int = 0

    @property
    def cause(self) -> str:
        return f"update {len(self.ids)} documents"

    async def apply(self, draft: Draft, index: str, parts: Parts) -> None:
        self.n_updated = 0
        values = schema.changed_values(column_pairs(draft.manifest.columns), self.updates)
        if not values:
            return
        segments = []
        found = await _live_ordinals(draft, index, parts, self.ids)
        for segment, ordinals in zip(draft.manifest.segments, found, strict=True):
            self.n_updated += len(ordinals)
            segments.append(await _patched(draft, index, parts, segment, ordinals, values) if len(ordinals) else segment)
        if self.n_updated:
            draft.manifest = msgspec.structs.replace(draft.manifest, segments=tuple(segments))


class Configure(msgspec.Struct):
    """A new limit on the number of documents; None lifts it."""

    max_documents: int | None
    n_tokens: int = 0

    @property
    def cause(self) -> str:
        return f"set max_documents to {self.max_documents}"

    async def apply(self, draft: Draft, index: str, parts: Parts) -> None:
        if draft.manifest.config.max_documents != self.max_documents:
            config = msgspec.structs.replace(draft.manifest.config, max_documents=self.max_documents)
            draft.manifest = msgspec.structs.replace(draft.manifest, config=config)


async def bury(draft: Draft, index: str, parts: Parts, ids: np.ndarray) -> int:
    """Mark documents as deleted, by id; a segment without live documents leaves the manifest. Returns how many were alive."""
    n_buried, segments = 0, []
    found = await _live_ordinals(draft, index, parts, ids)
    for segment, ordinals in zip(draft.manifest.segments, found, strict=True):
        n_buried += len(ordinals)
        if len(ordinals) == segment.n_live:
            continue
        segments.append(await _with_tombstones(draft, index, parts, segment, ordinals) if len(ordinals) else segment)
    if n_buried:
        draft.manifest = msgspec.structs.replace(draft.manifest, segments=tuple(segments))
    return n_buried


async def _live_ordinals(draft: Draft, index: str, parts: Parts, ids: np.ndarray) -> list[np.ndarray]:
    """Of each segment the ordinals of those ids that it holds and that are not deleted, int64."""
    found: list[np.ndarray] = []
    for some in in_turns(draft.manifest.segments, SEGMENTS_AT_ONCE):
        found += await asyncio.gather(*(parts.live_ordinals_of(index, segment, ids, draft.uploads) for segment in some))
    return found


async def _with_tombstones(draft: Draft, index: str, parts: Parts, segment: SegmentRef, ordinals: np.ndarray) -> SegmentRef:
    before = await parts.tombstones(index, segment, draft.uploads)
    data, ref = write_tombstones(np.union1d(before, ordinals), names.fresh_id())
    draft.uploads[names.tombstones(index, ref.id)] = data
    return msgspec.structs.replace(segment, tombstones=ref)


async def _patched(
    draft: Draft, index: str, parts: Parts, segment: SegmentRef, ordinals: np.ndarray, values: Mapping[str, object]
) -> SegmentRef:
    """The segment with one patch that holds what earlier patches said, and the new values."""
    rows = {ordinal: dict(row) for ordinal, row in (await parts.patches(index, segment, draft.uploads)).items()}
    for ordinal in ordinals.tolist():
        rows[ordinal] = {**rows.get(ordinal, {}), **values}
    data, ref = write_patch(rows, names.fresh_id())
    draft.uploads[names.patch(index, ref.id)] = data
    return msgspec.structs.replace(segment, patches=(ref,))


async def _evict(draft: Draft, index: str, parts: Parts) -> int:
    """Delete the lowest live ids beyond max_documents."""
    limit = draft.manifest.config.max_documents
    excess = 0 if limit is None else draft.manifest.n_documents - limit
    if excess <= 0:
        return 0
    lowest = await parts.lowest_live_ids(index, draft.manifest, excess, draft.uploads)
    return await bury(draft, index, parts, lowest)


def _checked_offsets(tokens: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """Offsets as int64, or InvalidRequest for anything that is not documents of finite vectors."""
    offsets = np.asarray(offsets)
    if tokens.ndim != 2 or not 1 <= tokens.shape[1] <= MAX_DIM:
        raise InvalidRequest(f"vectors form an array of tokens x 1 to {MAX_DIM} dimensions", found=tokens.shape)
    if tokens.dtype.kind != "f" or offsets.dtype.kind not in "iu" or offsets.ndim != 1:
        raise InvalidRequest("vectors are floats and offsets integers", vectors=tokens.dtype, offsets=offsets.dtype)
    if not 2 <= len(offsets) <= MAX_ADD_DOCUMENTS + 1:
        raise InvalidRequest(f"an add brings 1 to {MAX_ADD_DOCUMENTS} documents", found=max(len(offsets) - 1, 0))
    lengths = np.diff(offsets.astype(np.int64))
    if offsets[0] != 0 or offsets[-1] != len(tokens) or (lengths < 0).any():
        raise InvalidRequest("offsets rise from 0 to the number of tokens", tokens=len(tokens), last=int(offsets[-1]))
    if (lengths < 1).any() or (lengths > MAX_DOCUMENT_TOKENS).any():
        bad = int(np.flatnonzero((lengths < 1) | (lengths > MAX_DOCUMENT_TOKENS))[0])
        raise InvalidRequest(f"a document has 1 to {MAX_DOCUMENT_TOKENS} tokens", document=bad, found=int(lengths[bad]))
    with np.errstate(over="ignore", invalid="ignore"):
        may_be_infinite = not np.isfinite(tokens.sum(dtype=np.float32))  # one number tells, unless the sum itself overflowed
    if may_be_infinite and not np.isfinite(tokens).all():
        bad = int(np.searchsorted(offsets, np.flatnonzero(~np.isfinite(tokens).all(1))[0], "right")) - 1
        raise InvalidRequest("a vector has a value that is not finite", document=bad)
    return offsets.astype(np.int64)


def _check_keys(keys: Sequence[str], n_documents: int) -> None:
    if len(keys) != n_documents:
        raise InvalidRequest("ids and documents differ in number", expected=n_documents, found=len(keys))
    for key in keys:
        if not isinstance(key, str) or not key or len(key.encode(errors="replace")) > MAX_KEY_BYTES:
            raise InvalidRequest(f"an external id is text of 1 to {MAX_KEY_BYTES} bytes", found=repr(key)[:140])
    if len(set(keys)) != len(keys):
        twice = next(key for key in keys if list(keys).count(key) > 1)
        raise InvalidRequest("an external id comes twice in one request", id=repr(twice)[:140])


def unit_rows(tokens: np.ndarray) -> np.ndarray:
    """float16 (T, D): rows scaled to length 1; zero rows stay zero. Takes float16, float32 or float64.

    In blocks that stay in the L2 cache: half the time of whole arrays, whose pages are new to the process each time.
    """
    rows = np.empty(tokens.shape, np.float16)
    step = max(1, _BLOCK_VALUES // tokens.shape[1])
    with np.errstate(over="ignore", under="ignore"):
        for start in range(0, len(tokens), step):
            wide = tokens[start : start + step].astype(np.float32)
            squares = np.einsum("ij,ij->i", wide, wide)
            if not (squares.min() > _SAFE_SQUARES[0] and squares.max() < _SAFE_SQUARES[1]):
                peak = np.abs(wide).max(axis=1, keepdims=True)
                wide /= np.where(peak > 0, peak, 1)
                squares = np.einsum("ij,ij->i", wide, wide)
                squares[squares == 0] = 1
            wide /= np.sqrt(squares)[:, None]
            rows[start : start + step] = wide
    return rows
