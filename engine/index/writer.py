"""Adds, deletes and updates of one index: each call is part of one atomic commit, and what a call returned is durable and visible.

Calls that wait for the same index in one process share a commit (group commit): one task commits for all that wait, again and again
until nobody waits. A caller that is cancelled does not take the others' commit with it; its own change may or may not be made.
A call that cannot work (wrong dimension, bad column) fails alone; the others of its group go through.
An add becomes one flat segment; compaction folds it later (compact.py). Nothing is queued beyond the call: when it returns, it is done.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence
from typing import Protocol

import numpy as np

from engine.config import CommitParams
from engine.errors import EngineError
from engine.format.manifest import Manifest
from engine.index.clock import Clock, SystemClock
from engine.index.commit import Draft, Head, commit
from engine.index.operations import Add, Added, Configure, Delete, Operation, Update
from engine.index.parts import Parts
from engine.store.base import ObjectStore

MAX_GROUP_OPERATIONS = 256
MAX_GROUP_TOKENS = 200_000
"""A group larger than this is committed in several rounds: about 50 MB of float16 at 128 dimensions."""

INLINE_BYTES = 64 << 10
"""Vectors up to this size are normalised on the event loop: a thread would cost more than it frees."""


class _HeadCache(Protocol):
    """Where the writer looks for, and leaves, the newest generation it knows of (reader.py)."""

    def known_head(self, index: str) -> Head | None: ...

    def forget_head(self, index: str) -> None: ...

    def remember_head(self, index: str, head: Head, *, asked_s: float | None = None) -> None: ...


class Writer:
    """Writes one index. One per index and process; safe to share between tasks of one event loop."""

    def __init__(
        self,
        store: ObjectStore,
        index: str,
        parts: Parts,
        heads: _HeadCache,
        *,
        params: CommitParams | None = None,
        clock: Clock | None = None,
        rng: random.Random | None = None,
    ) -> None:
        self._store, self._index, self._parts, self._heads = store, index, parts, heads
        self._params, self._clock, self._rng = params or CommitParams(), clock or SystemClock(), rng or random.Random()
        self._waiting: list[_Ticket] = []
        self._committing: asyncio.Task[None] | None = None

    async def add(
        self,
        tokens: np.ndarray,
        offsets: np.ndarray,
        *,
        fields: Sequence[dict[str, object]] | None = None,
        keys: Sequence[str] | None = None,
    ) -> Added:
        """Add documents and return their ids, in order.

        tokens   float (T, D), finite; rows are L2-normalised here, zero rows stay zero
        offsets  int64 (N + 1,); document n owns tokens[offsets[n]:offsets[n + 1]], at least one
        fields   one mapping per document, or None for none
        keys     one external id per document: a document that carries the same key is replaced in the same commit

        Raises InvalidRequest (`dimension-mismatch` among others) before anything is written.
        """
        if np.asarray(tokens).nbytes > INLINE_BYTES:
            operation = await self._parts.compute(Add.of, tokens, offsets, fields, keys)
        else:
            operation = Add.of(tokens, offsets, fields, keys)
        await self._submit(operation)
        return operation.added

    async def delete(self, ids: np.ndarray) -> int:
        """Delete documents by id (int64); unknown ids are ignored. Returns how many were there."""
        operation = Delete(np.unique(np.asarray(ids, np.int64)))
        await self._submit(operation)
        return operation.n_deleted

    async def update(self, ids: np.ndarray, updates: dict[str, object]) -> int:
        """Set fields of documents by id; unknown ids are ignored. Columns must exist. Returns how many were there."""
        operation = Update(np.unique(np.asarray(ids, np.int64)), updates)
        await self._submit(operation)
        return operation.n_updated

    async def configure(self, *, max_documents: int | None) -> Head:
        """Change the limit on documents; it acts at the next add."""
        operation = Configure(max_documents)
        return await self._submit(operation)

    async def _submit(self, operation: Operation) -> Head:
        ticket = _Ticket(operation, asyncio.get_running_loop().create_future())
        self._waiting.append(ticket)
        if self._committing is None or self._committing.done():
            self._committing = asyncio.create_task(self._commit_waiting())
        return await ticket.fate

    async def _commit_waiting(self) -> None:
        while self._waiting:
            await self._commit_group(self._take_group())

    def _take_group(self) -> list[_Ticket]:
        n_tokens = 0
        group: list[_Ticket] = []
        while self._waiting and len(group) < MAX_GROUP_OPERATIONS and n_tokens < MAX_GROUP_TOKENS:
            ticket = self._waiting.pop(0)
            n_tokens += ticket.operation.n_tokens
            group.append(ticket)
        return group

    async def _commit_group(self, group: list[_Ticket]) -> None:
        """Commit what a group asks for and tell each ticket its fate. A failure of the commit itself is everybody's."""

        async def apply(manifest: Manifest) -> Draft | None:
            draft = Draft(manifest)
            await self._apply_all(draft, group)
            return None if draft.manifest is manifest else draft

        began_s = self._clock.monotonic_s()
        try:
            head = await commit(
                self._store,
                self._index,
                apply,
                cause=_cause([ticket.operation for ticket in group]),
                head=self._heads.known_head(self._index),
                params=self._params,
                rng=self._rng,
                clock=self._clock,
            )
        except BaseException as error:
            self._heads.forget_head(self._index)
            for ticket in group:
                ticket.settle(error)  # not its own error: that may rest on a generation that is in force no more
            if not isinstance(error, Exception):
                raise
            return
        self._heads.remember_head(self._index, head, asked_s=began_s)
        for ticket in group:
            ticket.settle(ticket.error or head)

    async def _apply_all(self, draft: Draft, group: list[_Ticket]) -> None:
        for ticket in group:
            ticket.error = None
        for run in _runs(group):
            if len(run) > 1 and await self._apply_merged(draft, run):
                continue
            for ticket in run:
                try:
                    await self._apply(draft, ticket.operation)
                except EngineError as error:
                    ticket.error = error

    async def _apply_merged(self, draft: Draft, run: list[_Ticket]) -> bool:
        """Several adds as one segment; False, with the draft untouched, if they cannot go together."""
        try:
            merged = Add.merged([ticket.operation for ticket in run if isinstance(ticket.operation, Add)])
            await self._apply(draft, merged)
        except EngineError:
            return False
        merged.share_out()
        return True

    async def _apply(self, draft: Draft, operation: Operation) -> None:
        """Apply one operation whole or not at all."""
        before, uploads = draft.manifest, dict(draft.uploads)
        try:
            await operation.apply(draft, self._index, self._parts)
        except EngineError:
            draft.manifest, draft.uploads = before, uploads
            raise


class _Ticket:
    """One call waiting for its commit."""

    def __init__(self, operation: Operation, fate: asyncio.Future[Head]) -> None:
        self.operation = operation
        self.fate = fate
        self.error: EngineError | None = None

    def settle(self, fate: Head | BaseException) -> None:
        if self.fate.done():
            return
        if isinstance(fate, BaseException):
            self.fate.set_exception(fate)
        else:
            self.fate.set_result(fate)


def _runs(group: Sequence[_Ticket]) -> list[list[_Ticket]]:
    """Neighbouring adds of different keys together, everything else alone; the order of arrival is kept."""
    runs: list[list[_Ticket]] = []
    for ticket in group:
        operation = ticket.operation
        if runs and isinstance(operation, Add) and all(isinstance(t.operation, Add) and operation.may_join(t.operation) for t in runs[-1]):
            runs[-1].append(ticket)
        else:
            runs.append([ticket])
    return runs


def _cause(operations: Sequence[Operation]) -> str:
    """What a generation's line in the history says."""
    return "; ".join(operation.cause for operation in operations[:4]) + ("; ..." if len(operations) > 4 else "")
