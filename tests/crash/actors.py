"""The processes that are killed. Each is run as `python -m crash.actors KIND CONFIG`, works until it dies, and keeps a journal.

    writer     the engine itself: adds, replaces by external id, updates and deletes its own documents
    client     the same over HTTP, through whichever server answers
    asker      searches over HTTP: an answer has the sentinel in front, or is an error that says so; never empty
    compactor  compaction and garbage collection with a short grace period
    builder    `tartan index` on sources of its own, killed and given again until it succeeds (not killed itself)

Every document's label gives its vectors, so that an auditor knows them.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import subprocess
import sys
import time
import zlib
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import httpx
import msgspec
import numpy as np

import engine.index.reader
from crash.journal import REFUSED, UNKNOWN, Journal
from engine.config import MaintenanceParams
from engine.errors import EngineError, Unavailable
from engine.index.compact import compact
from engine.index.reader import Reader
from engine.index.sweep import sweep
from engine.store.objects import StoreOptions, open_store

DIM = 16
SENTINEL = "sentinel"
BUILT = "b"
"""The index that is built in bulk; the others are written to."""


class Config(msgspec.Struct, frozen=True, kw_only=True):
    """What a process is told."""

    name: str
    folder: str
    store: str
    s3_url: str = ""
    servers: tuple[str, ...] = ()
    grace_s: float = 100.0
    patience_s: float = 5.0

    def open(self, **more: Any) -> Reader:
        """The indices, for a process or, with `more` options, for an auditor that must not give up."""
        options = StoreOptions(fsync=False)
        if self.s3_url:
            keys = {"endpoint": self.s3_url, "region": "us-east-1", "access_key_id": "key", "secret_access_key": "secret"}
            options = StoreOptions(**{**keys, "retry_budget_s": self.patience_s, **more})  # type: ignore[arg-type]
        return Reader(open_store(self.store, options), memory_bytes=64 << 20)


def vectors_of(label: str) -> np.ndarray:
    """float32 (t, DIM): two to four unit rows near some of six directions, so that a codec trained on a few documents knows the next ones."""
    rng = np.random.default_rng(zlib.crc32(label.encode()))
    n_tokens = int(rng.integers(2, 5))
    rows = np.eye(6, DIM, dtype=np.float32)[rng.integers(0, 6, n_tokens)] + 0.05 * rng.standard_normal((n_tokens, DIM)).astype(np.float32)
    unit: np.ndarray = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    return unit


Outcome = tuple[str, Any, str]
"""(outcome, result, error) for the journal."""


class _Author:
    """Makes documents, changes some of its own, deletes some. How it is done is in the subclasses; what was done is in the journal."""

    def __init__(self, config: Config) -> None:
        self.config, self.rng = config, random.Random(f"{config.name} {os.getpid()}")
        self.journal = Journal(Path(config.folder), config.name)
        self.own: list[list[str]] = []
        self.n_made = 0

    async def run(self) -> None:
        while True:
            await asyncio.gather(*(self._step() for _ in range(self.rng.choice((1, 1, 3)))))
            await asyncio.sleep(self.rng.uniform(0, 0.1))

    async def _step(self) -> None:
        choice = self.rng.random()
        if choice < 0.55 or not self.own:
            labels = [f"{self.config.name}-{os.getpid()}-{self.n_made + n}" for n in range(self.rng.randint(1, 5))]
            self.n_made += len(labels)
            keys = [f"key-{label}" for label in labels] if self.rng.random() < 0.4 else None
            if await self._tell("add", lambda: self.add(labels, keys), labels=labels, keys=keys):
                self.own.append(labels)
            return
        labels = self.own.pop(self.rng.randrange(len(self.own)))
        if choice < 0.8:
            await self._tell("delete", lambda: self.delete(labels), labels=labels)
            return
        revision = self.rng.randrange(1, 1000)
        if await self._tell("update", lambda: self.update(labels, revision), labels=labels, revision=revision):
            self.own.append(labels)

    async def _tell(self, kind: str, work: Callable[[], Awaitable[Outcome]], **args: Any) -> bool:
        call = self.journal.begin(kind, "a", **args)
        outcome, result, error = await work()
        self.journal.end(call, outcome, result, error)
        return outcome == "done"

    async def add(self, labels: list[str], keys: list[str] | None) -> Outcome:
        raise NotImplementedError

    async def delete(self, labels: list[str]) -> Outcome:
        raise NotImplementedError

    async def update(self, labels: list[str], revision: int) -> Outcome:
        raise NotImplementedError


class Writer(_Author):
    """Through the engine."""

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.writer = config.open().writer("a")
        self.ids: dict[str, int] = {}

    async def add(self, labels: list[str], keys: list[str] | None) -> Outcome:
        runs = [vectors_of(label) for label in labels]
        fields: list[dict[str, object]] = [{"label": label, "revision": 0} for label in labels]

        async def work() -> list[int]:
            added = await self.writer.add(np.concatenate(runs), np.cumsum([0, *map(len, runs)]), fields=fields, keys=keys)
            self.ids.update(zip(labels, added.ids.tolist(), strict=True))
            return [int(n) for n in added.ids]

        return await _outcome(work())

    async def delete(self, labels: list[str]) -> Outcome:
        return await _outcome(self.writer.delete(np.array([self.ids[label] for label in labels])))

    async def update(self, labels: list[str], revision: int) -> Outcome:
        return await _outcome(self.writer.update(np.array([self.ids[label] for label in labels]), {"revision": revision}))


async def _outcome(work: Awaitable[Any]) -> Outcome:
    try:
        return "done", await work, ""
    except Unavailable as error:
        return UNKNOWN, None, str(error)
    except EngineError as error:
        return REFUSED, None, f"{error.code}: {error}"


class Client(_Author):
    """Over HTTP. An answer that is neither a success nor an error of the contract is something wrong."""

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.http = httpx.AsyncClient(timeout=30)

    async def add(self, labels: list[str], keys: list[str] | None) -> Outcome:
        body: dict[str, Any] = {
            "documents": [{"embeddings": vectors_of(label).tolist()} for label in labels],
            "metadata": [{"label": label, "revision": 0} for label in labels],
        }
        return await self._ask("POST", "/indices/a/update", body | ({"ids": keys} if keys else {}))

    async def delete(self, labels: list[str]) -> Outcome:
        return await self._ask("DELETE", "/indices/a/documents", _where(labels))

    async def update(self, labels: list[str], revision: int) -> Outcome:
        return await self._ask("POST", "/indices/a/metadata/update", _where(labels) | {"updates": {"revision": revision}})

    async def _ask(self, method: str, path: str, body: dict[str, Any]) -> Outcome:
        try:
            answer = await self.http.request(method, self.rng.choice(self.config.servers) + path, json=body)
        except httpx.HTTPError as error:
            await asyncio.sleep(0.2)
            return UNKNOWN, None, type(error).__name__
        self.journal.count(f"HTTP {answer.status_code}")
        if answer.status_code in (200, 202):
            ids = answer.headers.get("x-tartan-document-ids")
            return "done", _range(ids) if ids else None, ""
        if answer.status_code in (503, 408) or '"READ_ONLY"' in answer.text:
            return UNKNOWN, None, answer.text
        if answer.status_code != 409:
            self.journal.wrong(f"{method} {path} was answered with {answer.status_code} {answer.text[:300]}")
        return REFUSED, None, answer.text


def _where(labels: list[str]) -> dict[str, Any]:
    return {"condition": f"label IN ({', '.join('?' * len(labels))})", "parameters": labels}


def _range(text: str) -> list[int]:
    first, _, last = text.partition("-")
    return list(range(int(first), int(last) + 1))


async def ask(config: Config) -> None:
    """Searches for the sentinel, without end."""
    journal, rng = Journal(Path(config.folder), config.name), random.Random(os.getpid())
    body = {"queries": [{"embeddings": vectors_of(SENTINEL).tolist()}], "params": {"top_k": 1}}
    async with httpx.AsyncClient(timeout=30) as http:
        while True:
            await asyncio.sleep(rng.uniform(0.02, 0.15))
            kind = rng.choice(("search", "query"))
            try:
                if kind == "search":
                    answer = await http.post(rng.choice(config.servers) + "/indices/a/search", json=body)
                else:
                    answer = await http.post(rng.choice(config.servers) + "/indices/a/metadata/query", json=_where([SENTINEL]))
            except httpx.HTTPError:
                journal.count("search: no answer")
                continue
            journal.count(f"search: HTTP {answer.status_code}")
            if answer.status_code == 200:
                found = answer.json()["results"][0]["document_ids"] if kind == "search" else answer.json()["document_ids"]
                if found != [0]:
                    journal.wrong(f"a {kind} for the sentinel found {found}")
            elif answer.status_code not in (503, 408):
                journal.wrong(f"a {kind} was answered with {answer.status_code} {answer.text[:300]}")


async def keep_house(config: Config) -> None:
    """Compaction and garbage collection, in small bites."""
    journal, rng = Journal(Path(config.folder), config.name), random.Random(os.getpid())
    params = MaintenanceParams(
        min_quantise_documents=30, max_flat_tokens=200, max_flat_segments=6, merge_factor=3, retrain_growth=2.0, grace_s=config.grace_s
    )
    reader = config.open()
    while True:
        await asyncio.sleep(rng.uniform(0, 0.3))
        index = rng.choice(("a", "a", BUILT))
        try:
            report = await compact(reader, index, params=params, max_steps=3)
            for kind, n in report.steps.items():
                for _ in range(n):
                    journal.count(f"compaction: {kind}")
            if rng.random() < 0.2:
                swept = await sweep(reader.store, index, params=params)
                journal.count("sweep that deleted" if swept.n_deleted else "sweep that found nothing")
        except Unavailable as error:
            journal.count(f"maintenance: {error.code}")
        except EngineError as error:
            if error.code != "commit-conflict":
                journal.wrong(f"maintenance of {index}: {error.code}: {error}")


def build(config: Config) -> None:
    """Source after source into BUILT; each command is killed two times out of three, and given again until it has succeeded."""
    journal, rng = Journal(Path(config.folder), config.name), random.Random(os.getpid())
    source, n_sources = Path(config.folder) / f"{config.name}-{os.getpid()}.source", 0
    command = [sys.executable, "-m", "handler.cli", "index", str(source), "--name", BUILT, "--store", config.store]
    environment = {**os.environ, "AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_REGION": "us-east-1"}
    if config.s3_url:
        environment["TARTAN_S3_ENDPOINT"] = config.s3_url
    while True:
        n_sources += 1
        labels = [f"{config.name}-{os.getpid()}-{n_sources}-{n}" for n in range(24)]
        lines = [{"id": label, "embeddings": vectors_of(label).tolist(), "metadata": {"label": label, "revision": 0}} for label in labels]
        source.write_text("\n".join(map(json.dumps, lines)))
        call, code, n_runs = journal.begin("build", BUILT, labels=labels, keys=labels), None, 0
        while code != 0:
            process = subprocess.Popen(
                [*command, "--segment-documents", "8", "--json"], env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
            )
            n_runs += 1
            try:
                patience_s = rng.uniform(0.5, 4.0) if rng.random() < 0.67 and n_runs < 6 else 60.0
                _, problem = process.communicate(timeout=patience_s)
            except subprocess.TimeoutExpired:
                process.kill()
                process.communicate()
                journal.count("tartan index: killed")
                continue
            code = process.returncode
            journal.count(f"tartan index: exit {code}")
            if code not in (0, 1) or (code == 1 and not _may_fail(problem)):
                journal.wrong(f"tartan index ended with {code}: {problem.decode()[-300:]}")
            time.sleep(0.2)
        journal.end(call, "done")


def _may_fail(problem: bytes) -> bool:
    return b'"store-unavailable"' in problem or b'"commit-conflict"' in problem


def main() -> None:
    kind, config = sys.argv[1], msgspec.json.decode(sys.argv[2], type=Config)
    engine.index.reader.MAX_HEAD_AGE_S = config.grace_s / 10
    if kind == "builder":
        build(config)
    else:
        work = {"writer": lambda: Writer(config).run(), "client": lambda: Client(config).run(), "asker": lambda: ask(config)}
        asyncio.run(work.get(kind, lambda: keep_house(config))())


if __name__ == "__main__":
    main()
