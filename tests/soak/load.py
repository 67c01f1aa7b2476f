"""The mix of calls, sent at random moments of a given rate whatever the answers do, each answer held against the model."""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from soak.model import Document, Model, vectors_of
from soak.wire import Answer, Wire, vectors

INDEX = "soak"
TOP_K = 10
MAX_AGE_S = 3.0
MAX_AT_WORK = 64
"""Calls under way at once; a call that would be one more is not sent, and counted."""
BATCH = 5
FIRST_BATCH = 100
MIX = {"search": 34, "filtered": 14, "keyword": 12, "hybrid": 5, "ids": 10, "rows": 10, "write": 15}
"""Weights of the calls. A write is an add, a delete or an update; adds and deletes keep the number of documents where it is."""


@dataclass(frozen=True)
class Done:
    """One call: kind, when (monotonic), status; problem says what was wrong with an answer that is an error."""

    kind: str
    began_s: float
    ended_s: float
    status: int
    problem: str = ""


class Load:
    """One process's calls to all replicas."""

    def __init__(self, urls: list[str], n_documents: int, *, seed: int = 1) -> None:
        self.wires = [Wire(url) for url in urls]
        self.model, self.rng, self.n_documents = Model(seed), random.Random(seed), n_documents
        self.done: list[Done] = []
        self.counts: Counter[str] = Counter()
        self.recalled = self.missed = 0
        self._calls: dict[str, Callable[[], Awaitable[None]]] = {
            "search": lambda: self._search(None),
            "filtered": self._filtered,
            "keyword": self._keyword,
            "hybrid": self._hybrid,
            "ids": self._ids,
            "rows": self._rows,
            "write": self._write,
        }

    async def prepare(self) -> None:
        """The index and its first documents."""
        created = await self._ask("create", "POST", "/indices", {"name": INDEX, "config": {"nbits": 4}})
        assert created is not None and created.status == 200, created
        while self.model.n_alive < self.n_documents:
            await self._add(FIRST_BATCH)

    async def run(self, seconds: float, per_s: float) -> None:
        ends_s = time.monotonic() + seconds
        tasks: set[asyncio.Task[None]] = set()
        due_s = time.monotonic()
        while due_s < ends_s:
            due_s = max(due_s + self.rng.expovariate(per_s), time.monotonic() - 1.0)
            await asyncio.sleep(due_s - time.monotonic())
            if len(tasks) >= MAX_AT_WORK:
                self.counts["not sent: too many under way"] += 1
                continue
            kind = self.rng.choices(list(MIX), list(MIX.values()))[0]
            task: asyncio.Task[None] = asyncio.ensure_future(self._calls[kind]())
            tasks.add(task)
            task.add_done_callback(tasks.discard)
        await asyncio.gather(*tasks)

    def close(self) -> None:
        for wire in self.wires:
            wire.close()

    async def _ask(self, kind: str, method: str, path: str, body: object) -> Answer | None:
        """An answer that is a success; None, and noted, for anything else."""
        began_s = time.monotonic()
        try:
            answer = await self.rng.choice(self.wires).ask(method, path, body)
        except (OSError, EOFError) as error:
            self.done.append(Done(kind, began_s, time.monotonic(), 0, f"{type(error).__name__}: {error}"))
            return None
        problem = "" if answer.status in (200, 202) else f"{answer.status} {answer.body[:300].decode(errors='replace')}"
        self.done.append(Done(kind, began_s, time.monotonic(), answer.status, problem))
        return None if problem else answer

    # Reads

    def _some(self) -> Document | None:
        """A document that was acknowledged and is not being deleted."""
        for _ in range(20):
            if not self.model.alive:
                return None
            document = self.rng.choice(self.model.alive[self.rng.choice(list(self.model.alive))])
            if document.is_known and not document.is_busy:
                return document
        return None

    async def _searched(self, kind: str, body: dict[str, Any], target: Document) -> list[dict[str, Any]] | None:
        """Rows of the hits, checked for ghosts. The body gets a consistency."""
        is_eventual = self.rng.random() < 0.4
        if is_eventual:
            body |= {"consistency": "eventual", "max_age_s": MAX_AGE_S}
        began_s = time.monotonic()
        answer = await self._ask(f"{kind} (eventual)" if is_eventual else kind, "POST", f"/indices/{INDEX}/search", body)
        if answer is None:
            return None
        oldest_s, ended_s = began_s - MAX_AGE_S * is_eventual, time.monotonic()
        result = answer.json()["results"][0]
        rows: list[dict[str, Any]] = result["metadata"]
        what = f"{kind} for {target.label}"
        if not target.must_be_seen(oldest_s, ended_s):
            target = Document(-1, -1)  # it may be there or not
        self.model.check_hits(what, [row["label"] for row in rows], oldest_s)
        self.model.check_rows(what, rows, oldest_s, ended_s)
        if [row["_subset_"] for row in rows] != result["document_ids"]:
            self.model.complain(f"{what}: the rows are of other documents than the ids {result['document_ids']}")
        found = target.number < 0 or any(row["label"] == target.label for row in rows)
        if kind == "keyword" and not found:
            self.model.complain(f"{what} did not find it")
        elif target.number >= 0:
            self.recalled, self.missed = self.recalled + found, self.missed + (not found)
            if not found:
                await self._is_there(target)
        return rows

    async def _is_there(self, document: Document) -> None:
        """A search that missed a document is a loss of recall if the index has it, else of the document."""
        began_s = time.monotonic()
        body = {"condition": "label = ?", "parameters": [document.label]}
        answer = await self._ask("ids", "POST", f"/indices/{INDEX}/metadata/query", body)
        if answer is not None and document.must_be_seen(began_s, time.monotonic()) and answer.json()["document_ids"] != [document.id]:
            self.model.complain(f"{document.label} is gone: {answer.json()}")

    def _query(self, document: Document) -> dict[str, Any]:
        """Some of its tokens, a little off."""
        rows = vectors_of(document.number)[: self.rng.randint(6, 12)]
        noise = np.random.default_rng(self.rng.randrange(1 << 30)).standard_normal(rows.shape, dtype=np.float32)
        return vectors(rows + 0.02 * noise)

    async def _search(self, more: dict[str, Any] | None, kind: str = "search", target: Document | None = None) -> None:
        target = target or self._some()
        if target is not None:
            await self._searched(kind, {"queries": [self._query(target)], "params": {"top_k": TOP_K}, **(more or {})}, target)

    async def _filtered(self) -> None:
        target = self._some()
        if target is None:
            return
        low, high = target.batch - self.rng.randint(0, 20), target.batch + self.rng.randint(0, 20)
        more = {"filter_condition": "batch BETWEEN ? AND ?", "filter_parameters": [low, high]}
        body = {"queries": [self._query(target)], "params": {"top_k": TOP_K}, **more}
        rows = await self._searched("filtered", body, target)
        if rows is not None and any(not low <= row["batch"] <= high for row in rows):
            self.model.complain(f"a search of batches {low} to {high} showed {rows}")

    async def _keyword(self) -> None:
        target = self._some()
        if target is not None:
            rows = await self._searched("keyword", {"text_query": [target.label], "params": {"top_k": TOP_K}}, target)
            if rows is not None and any(row["label"] != target.label for row in rows):
                self.model.complain(f"a keyword search for {target.label} showed {rows}")

    async def _hybrid(self) -> None:
        target = self._some()
        if target is not None:
            await self._search({"text_query": [target.label]}, "hybrid", target)

    async def _ids(self) -> None:
        target = self._some()
        if target is None:
            return
        documents = list(self.model.alive[target.batch])
        began_s = time.monotonic()
        answer = await self._ask(
            "ids", "POST", f"/indices/{INDEX}/metadata/query", {"condition": "batch = ?", "parameters": [target.batch]}
        )
        if answer is not None:
            found, labels = answer.json()["document_ids"], {document.id: document.label for document in documents}
            self.model.check_all(
                f"ids of batch {target.batch}", documents, {labels.get(n, f"id {n}") for n in found}, began_s, time.monotonic()
            )

    async def _rows(self) -> None:
        target = self._some()
        if target is None:
            return
        documents = list(self.model.alive[target.batch])
        began_s = time.monotonic()
        body = {"condition": "batch = ? AND revision >= ?", "parameters": [target.batch, 0]}
        answer = await self._ask("rows", "POST", f"/indices/{INDEX}/metadata/get", body)
        if answer is not None:
            rows, ended_s = answer.json()["metadata"], time.monotonic()
            what = f"rows of batch {target.batch}"
            self.model.check_all(what, documents, {row["label"] for row in rows}, began_s, ended_s)
            self.model.check_rows(what, rows, began_s, ended_s)

    # Writes

    async def _write(self) -> None:
        choice = self.rng.random()
        if choice < 0.3:
            await self._update()
        elif (choice < 0.65) == (self.model.n_alive < self.n_documents * 1.02) or self.model.n_alive < self.n_documents * 0.95:
            await self._add(self.rng.randint(1, 2 * BATCH))
        else:
            await self._delete()

    async def _add(self, n_documents: int) -> None:
        documents = self.model.make(n_documents)
        body = {
            "documents": [vectors(vectors_of(document.number)) for document in documents],
            "metadata": [document.fields for document in documents],
        }
        answer = await self._ask("add", "POST", f"/indices/{INDEX}/update", body)
        if answer is None:
            self.model.lost(documents)
            return
        first, _, last = answer.headers["x-tartan-document-ids"].partition("-")
        self.model.added(documents, list(range(int(first), int(last or first) + 1)))

    async def _delete(self) -> None:
        documents = self.model.idle_batch()
        if documents is None:
            return
        documents = documents[: 2 * BATCH]
        self.model.deleting(documents)
        labels = [document.label for document in documents]
        body = {"condition": f"label IN ({', '.join('?' * len(labels))})", "parameters": labels}
        if await self._ask("delete", "DELETE", f"/indices/{INDEX}/documents", body) is None:
            self.model.lost(documents)
        else:
            self.model.deleted(documents)

    async def _update(self) -> None:
        documents = self.model.idle_batch()
        if documents is None:
            return
        revision = self.rng.randrange(1, 1 << 30)
        self.model.updating(documents, revision)
        body = {"condition": "batch = ?", "parameters": [documents[0].batch], "updates": {"revision": revision}}
        if await self._ask("update", "POST", f"/indices/{INDEX}/metadata/update", body) is None:
            self.model.lost(documents)
        else:
            self.model.updated(documents)

    # At the end

    async def audit(self) -> None:
        """Every document through every replica, when nothing is under way: exactly what the model has."""
        began_s = time.monotonic()
        documents = [document for batch in self.model.alive.values() for document in batch]
        for wire in self.wires:
            answer = await wire.ask("POST", f"/indices/{INDEX}/metadata/get", {})
            assert answer.status == 200, answer
            rows = answer.json()["metadata"]
            what = f"the audit of port {wire.port}"
            self.model.check_all(what, documents, {row["label"] for row in rows}, began_s, time.monotonic())
            self.model.check_rows(what, rows, began_s, time.monotonic())
            if len({row["_subset_"] for row in rows}) != len(rows):
                self.model.complain(f"{what} showed an id twice")
