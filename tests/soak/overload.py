"""One server, offered four times what it can do: it refuses the rest at once and serves what it takes nearly as fast as when it is alone.

    capacity    a closed loop of CLIENTS clients: searches a second; none of them may be refused
    unloaded    an open loop at a quarter of that: p50, p99
    overload    an open loop at `times` the capacity, a few adds among it: what is accepted, how fast; what is refused, and how
    recovery    at once after it an open loop at a quarter again: when the last refusal or slow answer was seen
    audit       every add that was acknowledged is there

An open loop sends at random moments of a fixed rate, whatever the answers do, as many users do. Latency counts from the sending of the request
to its last byte. The load generator is one process on the same cores: its share of them is reported and not counted out.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from engine.config import IndexConfig, MaintenanceParams
from engine.index.commit import create
from engine.index.compact import compact
from engine.index.indices import list_indices
from engine.index.reader import Reader
from engine.store.objects import StoreOptions, open_store
from soak.pauses import Pauses
from soak.stage import Kind, Stage, staged
from soak.wire import Wire, vectors

INDEX = "overload"
TOPICS = np.random.default_rng(0).standard_normal((512, 128), dtype=np.float32)
TOPICS /= np.linalg.norm(TOPICS, axis=1, keepdims=True)
CLIENTS = 8
UNLOADED_SHARE = 0.25
MAX_P99_RATIO, MAX_RECOVERY_S = 2.0, 5.0
BLOCK = 500
ADDS_PER_S = 2.0
MAX_AT_ONCE = 1000
"""Requests in flight beyond which the generator sends no more: a server that does not refuse would have it open connections without end."""


@dataclass(frozen=True)
class Sent:
    """began_s on the monotonic clock; lag_s how late the generator was; retry_after what a refusal said."""

    kind: str
    began_s: float
    took_s: float
    status: int
    lag_s: float = 0.0
    retry_after: str = ""


@dataclass
class Phase:
    """What was sent in one phase, in figures."""

    name: str
    seconds: float = 0.0
    cpu_s: float = 0.0
    sent: list[Sent] = field(default_factory=list)
    n_not_sent: int = 0

    def latencies_ms(self, kind: str = "search") -> np.ndarray:
        return np.array([one.took_s * 1000 for one in self.sent if one.kind == kind and one.status in (200, 202)] or [np.nan])

    def p(self, percent: float) -> float:
        return float(np.percentile(self.latencies_ms(), percent))

    @property
    def accepted(self) -> int:
        return sum(one.status in (200, 202) for one in self.sent)

    @property
    def refused(self) -> list[Sent]:
        return [one for one in self.sent if one.status == 503]

    def figures(self) -> dict[str, Any]:
        refused_ms = [one.took_s * 1000 for one in self.refused] or [0.0]
        return {
            "offered_per_s": (len(self.sent) + self.n_not_sent) / self.seconds,
            "accepted_per_s": self.accepted / self.seconds,
            "refused": len(self.refused),
            "statuses": dict(Counter(one.status for one in self.sent)),
            "p50_ms": self.p(50),
            "p95_ms": self.p(95),
            "p99_ms": self.p(99),
            "max_ms": float(self.latencies_ms().max()),
            "refused_p50_ms": float(np.percentile(refused_ms, 50)),
            "refused_p99_ms": float(np.percentile(refused_ms, 99)),
            "lag_p99_ms": float(np.percentile([one.lag_s * 1000 for one in self.sent] or [0.0], 99)),
            "generator_cores": self.cpu_s / self.seconds,
            "not_sent": self.n_not_sent,
        }


class Generator:
    """Sends prepared requests to one server."""

    def __init__(self, url: str, n_documents: int, *, query_tokens: int, seed: int = 1) -> None:
        self.wire, self.rng = Wire(url), random.Random(seed)
        bodies = []
        for number in self.rng.sample(range(n_documents), min(200, n_documents)):
            rows = np.resize(vectors_of(number), (query_tokens, TOPICS.shape[1]))
            bodies.append({"queries": [vectors(rows)], "params": {"top_k": 10}})
        self.requests = [self.wire.request("POST", f"/indices/{INDEX}/search", body) for body in bodies]
        self.next_number = n_documents
        self.acknowledged: set[str] = set()

    async def closed_loop(self, name: str, seconds: float, n_clients: int) -> Phase:
        phase = Phase(name)
        ends_s = time.monotonic() + seconds

        async def client() -> None:
            while time.monotonic() < ends_s:
                await self._search(phase, time.monotonic())

        with _timed(phase):
            await asyncio.gather(*(client() for _ in range(n_clients)))
        return phase

    async def open_loop(self, name: str, seconds: float, per_s: float, *, adds_per_s: float = 0.0) -> Phase:
        phase, tasks = Phase(name), set[asyncio.Task[None]]()
        ends_s = time.monotonic() + seconds
        due_s = time.monotonic()
        with _timed(phase):
            while (due_s := due_s + self.rng.expovariate(per_s + adds_per_s)) < ends_s:
                if (wait_s := due_s - time.monotonic()) > 0:
                    await asyncio.sleep(wait_s)
                elif len(phase.sent) % 8 == 0:
                    await asyncio.sleep(0)  # answers are read even by a generator that is late
                if len(tasks) >= MAX_AT_ONCE:
                    phase.n_not_sent += 1
                    continue
                is_add = self.rng.random() < adds_per_s / (per_s + adds_per_s)
                task = asyncio.ensure_future(self._add(phase, due_s) if is_add else self._search(phase, due_s))
                tasks.add(task)
                task.add_done_callback(tasks.discard)
            sent_s = time.monotonic()
            await asyncio.gather(*tasks)
        phase.seconds -= time.monotonic() - sent_s
        return phase

    async def _search(self, phase: Phase, due_s: float) -> None:
        await self._send("search", self.rng.choice(self.requests), phase, due_s)

    async def _add(self, phase: Phase, due_s: float) -> None:
        label, rows = f"d{self.next_number}", vectors_of(self.next_number)
        self.next_number += 1
        body = {"documents": [vectors(rows)], "metadata": [{"label": label}]}
        if await self._send("add", self.wire.request("POST", f"/indices/{INDEX}/update", body), phase, due_s) == 202:
            self.acknowledged.add(label)

    async def _send(self, kind: str, request: bytes, phase: Phase, due_s: float) -> int:
        began_s = time.monotonic()
        retry_after = ""
        try:
            answer = await self.wire.send(request)
            status, retry_after = answer.status, answer.headers.get("retry-after", "")
        except (OSError, EOFError):
            status = 0
        phase.sent.append(Sent(kind, began_s, time.monotonic() - began_s, status, began_s - due_s, retry_after))
        return status

    async def lost(self) -> set[str]:
        """Labels of acknowledged documents that are not there."""
        answer = await self.wire.ask("POST", f"/indices/{INDEX}/metadata/get", {})
        assert answer.status == 200, answer
        return self.acknowledged - {row["label"] for row in answer.json()["metadata"]}


class _timed:
    """Wall and CPU time of a phase; no garbage collection of the generator's meanwhile."""

    def __init__(self, phase: Phase) -> None:
        self.phase = phase

    def __enter__(self) -> None:
        gc.collect()
        gc.disable()
        self.began_s, self.cpu_s = time.monotonic(), time.process_time()

    def __exit__(self, *_: object) -> None:
        gc.enable()
        self.phase.seconds, self.phase.cpu_s = time.monotonic() - self.began_s, time.process_time() - self.cpu_s


async def build(stage: Stage, n_documents: int) -> None:
    """The index, in good order, written past the server. One that is there is taken as it is."""
    keys: dict[str, Any] = {}
    if "TARTAN_S3_ENDPOINT" in stage.place.environment:
        keys = {"endpoint": stage.place.environment["TARTAN_S3_ENDPOINT"], "region": "us-east-1"}
        keys |= {"access_key_id": "key", "secret_access_key": "secret"}
    reader = Reader(open_store(stage.place.store_url, StoreOptions(fsync=False, **keys)))
    if INDEX not in await list_indices(reader.store):
        await create(reader.store, INDEX, IndexConfig(nbits=4))
        for start in range(0, n_documents, BLOCK):
            runs = [vectors_of(number) for number in range(start, min(start + BLOCK, n_documents))]
            fields: list[dict[str, object]] = [{"label": f"d{start + n}"} for n in range(len(runs))]
            await reader.writer(INDEX).add(np.concatenate(runs), np.cumsum([0, *map(len, runs)]), fields=fields)
    await compact(reader, INDEX, params=MaintenanceParams(max_flat_tokens=0))


async def overload(stage: Stage, *, n_documents: int, query_tokens: int, seconds: float, times: float) -> dict[str, Any]:
    await build(stage, n_documents)
    generator, pauses = Generator(stage.replicas[0].url, n_documents, query_tokens=query_tokens), Pauses()
    watching = asyncio.create_task(pauses.watch())
    await generator.closed_loop("warm-up", 0.1 * seconds, CLIENTS)
    capacity = await generator.closed_loop("capacity", 0.2 * seconds, CLIENTS)
    per_s = capacity.accepted / capacity.seconds
    alone = await generator.closed_loop("one client", 0.1 * seconds, 1)
    unloaded = await generator.open_loop("unloaded", 0.4 * seconds, UNLOADED_SHARE * per_s, adds_per_s=ADDS_PER_S)
    overloaded = await generator.open_loop("overload", seconds, times * per_s, adds_per_s=ADDS_PER_S)
    recovery = await generator.open_loop("recovery", 2 * MAX_RECOVERY_S, UNLOADED_SHARE * per_s)
    lost = await generator.lost()
    watching.cancel()
    generator.wire.close()
    phases = [capacity, alone, unloaded, overloaded, recovery]
    found = {phase.name: phase.figures() for phase in phases}
    found |= {"acknowledged": len(generator.acknowledged), "lost": len(lost), "paused_s": pauses.total_s}
    found["recovery_s"] = _recovery_s(recovery, MAX_P99_RATIO * unloaded.p(99))
    found["p99_ratio"] = overloaded.p(99) / unloaded.p(99)
    found["failures"] = _failures(found, phases)
    return found


def vectors_of(number: int) -> np.ndarray:
    """float32 (80 to 240, 128): a document of the length of an abstract, about eight of TOPICS."""
    rng = np.random.default_rng(number)
    rows = TOPICS[rng.choice(rng.choice(len(TOPICS), 8), int(rng.integers(80, 241)))]
    rows = rows + 0.06 * rng.standard_normal(rows.shape, dtype=np.float32)
    unit: np.ndarray = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    return unit


def _recovery_s(phase: Phase, slow_ms: float) -> float:
    """How long after the load's end the last request was begun that was refused, or slow more often than one in a hundred."""
    began_s = min(one.began_s for one in phase.sent)
    bad = sorted(one.began_s - began_s for one in phase.sent if one.status != 200 or one.took_s * 1000 > slow_ms)
    spare = len(phase.sent) // 100
    return bad[-1 - spare] if len(bad) > spare else 0.0


def _failures(found: dict[str, Any], phases: Sequence[Phase]) -> list[str]:
    failures = []
    for phase in phases:
        strange = {status: n for status, n in found[phase.name]["statuses"].items() if status not in (200, 202, 503)}
        if strange:
            failures.append(f"{phase.name}: statuses {strange}")
        if any(not one.retry_after for one in phase.refused):
            failures.append(f"{phase.name}: a 503 without Retry-After")
        if phase.name not in ("overload", "recovery") and phase.refused:
            failures.append(f"{phase.name}: {len(phase.refused)} requests were refused")
    if found["lost"]:
        failures.append(f"{found['lost']} acknowledged documents are lost")
    if not found["overload"]["refused"]:
        failures.append("nothing was refused: that was no overload")
    if not found["p99_ratio"] < MAX_P99_RATIO:
        failures.append(f"p99 of what was accepted is {found['p99_ratio']:.2f} times the unloaded p99")
    if found["recovery_s"] > MAX_RECOVERY_S:
        failures.append(f"recovery took {found['recovery_s']:.1f} s")
    return failures


def table(found: dict[str, Any]) -> str:
    columns = ("offered_per_s", "accepted_per_s", "p50_ms", "p95_ms", "p99_ms", "max_ms", "refused", "refused_p50_ms", "generator_cores")
    lines = [f"{'':12s}" + "".join(f"{name.replace('_', ' '):>17s}" for name in columns)]
    for name, figures in found.items():
        if isinstance(figures, dict):
            lines.append(f"{name:12s}" + "".join(f"{figures[column]:17.1f}" for column in columns))
    lines += [
        f"p99 under overload is {found['p99_ratio']:.2f} times the unloaded one; recovered after {found['recovery_s']:.1f} s; "
        f"{found['acknowledged']} adds acknowledged, {found['lost']} lost; stood still for {found['paused_s']:.0f} s",
        *(f"FAILED {text}" for text in found["failures"]),
    ]
    return "\n".join(lines if found["failures"] else [*lines, "passed"])


def run(kind: Kind, folder: Path, *, n_documents: int, query_tokens: int, seconds: float, times: float, **settings: Any) -> dict[str, Any]:
    with staged(kind, folder, n_replicas=1, **settings) as stage:
        return asyncio.run(overload(stage, n_documents=n_documents, query_tokens=query_tokens, seconds=seconds, times=times))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m soak.overload", description=__doc__.partition("\n")[0])
    parser.add_argument("--store", choices=("directory", "s3"), default="directory")
    parser.add_argument("--seconds", type=float, default=50.0, help="of the overload; half a minute more for the rest")
    parser.add_argument("--times", type=float, default=4.0, help="the capacity")
    parser.add_argument("--documents", type=int, default=5_000)
    parser.add_argument("--query-tokens", type=int, default=32)
    parser.add_argument("--folder", type=Path, help="where the index (of a directory store) is kept for the next run")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(arguments)
    if args.folder:
        args.folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="tartan-overload-") as folder:
        found = run(
            args.store,
            args.folder or Path(folder),
            n_documents=args.documents,
            query_tokens=args.query_tokens,
            seconds=args.seconds,
            times=args.times,
        )
    print(table(found))
    if args.json:
        args.json.write_text(json.dumps(found))
    return 1 if found["failures"] else 0


if __name__ == "__main__":
    sys.exit(main())
