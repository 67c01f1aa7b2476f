"""Starts the processes, kills them with SIGKILL at random moments, starts them again, and has everything audited: in between and at the end."""

from __future__ import annotations

import argparse
import asyncio
import http.client
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from crash.actors import BUILT, SENTINEL, Config, vectors_of
from crash.audit import audit
from crash.journal import Journal, read_all
from crash.s3 import BUCKET, MoodyProcess
from engine.config import IndexConfig
from engine.format.names import fresh_id
from engine.index.commit import create
from handler.settings import Settings
from s3_process import ROOT, make_bucket
from serving import free_port

_SERVE = """
import sys
import engine.index.reader
from handler.settings import Settings
from handler.server import serve
engine.index.reader.MAX_HEAD_AGE_S = float(sys.argv[1])
settings = Settings.from_environment()
sys.exit(serve(settings.host, settings.port, settings))
"""
CASTS = {
    "small": {"server": 1, "client": 1, "writer": 1, "compactor": 1},
    "full": {"server": 2, "client": 2, "asker": 1, "writer": 2, "compactor": 1, "builder": 1},
}


@dataclass
class Report:
    """What happened: kills by kind, what the processes counted, and everything that was found wrong."""

    kills: Counter[str] = field(default_factory=Counter)
    counts: dict[str, int] = field(default_factory=dict)
    outcomes: Counter[str] = field(default_factory=Counter)
    n_audits: int = 0
    wrong: list[str] = field(default_factory=list)


class Arena:
    """One run over one store.

    folder    holds journals and, for the directory store, the indices
    endpoint  of an S3 server that runs already; "": one of our own, whose moods can be set
    """

    def __init__(self, folder: Path, kind: str, cast: dict[str, int], *, seed: int = 1, grace_s: float = 100.0, endpoint: str = "") -> None:
        self.folder, self.cast, self.rng, self.grace_s = folder, cast, random.Random(seed), grace_s
        self.journals = folder / "journals"
        self.journals.mkdir(parents=True)
        self.s3 = MoodyProcess() if kind == "s3" and not endpoint else None
        self.s3_url = self.s3.url if self.s3 else endpoint
        self.store = f"s3://{BUCKET}/indices-{fresh_id().lower()}" if self.s3_url else str(folder / "indices")
        self.disk_mood = folder / "mood"
        self.disk_mood.write_text("well")
        self.ports = [free_port() for _ in range(cast["server"])]
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self.report = Report()

    @property
    def config(self) -> Config:
        return Config(
            name="arena",
            folder=str(self.journals),
            store=self.store,
            s3_url=self.s3_url,
            servers=tuple(f"http://127.0.0.1:{port}" for port in self.ports),
            grace_s=self.grace_s,
        )

    @property
    def names(self) -> list[str]:
        return [f"{kind}{n}" for kind, number in self.cast.items() for n in range(number)]

    async def run(self, seconds: float, *, kill_every_s: tuple[float, float], audit_every_s: float = 10.0) -> Report:
        await self.prepare()
        victims = [name for name in self.names if not name.startswith(("asker", "builder"))]
        for name in self.names:
            self.start(name)
        ends_s = time.monotonic() + seconds
        next_audit_s = time.monotonic() + audit_every_s
        while time.monotonic() < ends_s:
            await asyncio.sleep(self.rng.uniform(*kill_every_s))
            self.kill_and_start_again(self.rng.choice(victims))
            self._note_who_ended()
            if time.monotonic() > next_audit_s:
                next_audit_s = time.monotonic() + audit_every_s
                await self._audit()
        for name in list(self.processes):
            self._kill(name)
        await self._audit(final=True)
        told = read_all(self.journals)
        self.report.counts = dict(sorted(told.counts.items()))
        self.report.outcomes = Counter(f"{call.kind}: {call.outcome}" for call in told.calls)
        return self.report

    async def prepare(self) -> None:
        """Both indices, and document 0 of the first: what askers look for."""
        reader = self.config.open()
        for index in ("a", BUILT):
            await create(reader.store, index, IndexConfig(nbits=8))
        journal = Journal(self.journals, "arena")
        tokens = vectors_of(SENTINEL)
        call = journal.begin("add", "a", labels=[SENTINEL], keys=None)
        added = await reader.writer("a").add(tokens, [0, len(tokens)], fields=[{"label": SENTINEL, "revision": 0}])  # type: ignore[arg-type]
        journal.end(call, "done", added.ids.tolist())

    async def _audit(self, *, final: bool = False) -> None:
        self.report.n_audits += 1
        reader = self.config.open(max_in_flight=8, timeout_s=60.0, retry_budget_s=120.0)
        self.report.wrong += [text for text in await audit(reader, self.journals, final=final) if text not in self.report.wrong]

    # Processes

    def start(self, name: str) -> None:
        kind, number = name[:-1], int(name[-1])
        environment = {"PATH": os.environ["PATH"], "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "OPENBLAS_NUM_THREADS": "1"}
        config = msgspec.structs.replace(self.config, name=name)
        if kind == "server":
            command = [sys.executable, "-c", _SERVE, str(self.grace_s / 10)]
            environment |= self._server_environment(self.ports[number])
            environment["PYTHONPATH"] += f":{ROOT / 'tests' / 'crash' / 'disk'}"
            environment |= {"CRASH_DISK_ROOT": "" if self.s3_url else self.store, "CRASH_DISK_MOOD": str(self.disk_mood)}
        else:
            command = [sys.executable, "-m", "crash.actors", kind, msgspec.json.encode(config).decode()]
        with open(self.folder / f"{name}.log", "ab") as log:
            self.processes[name] = subprocess.Popen(
                command, env=environment, stdout=log, stderr=log, stdin=subprocess.DEVNULL, start_new_session=True
            )

    async def wait_for_servers(self, timeout_s: float = 120.0) -> None:
        deadline_s = time.monotonic() + timeout_s
        for port in self.ports:
            while not await asyncio.to_thread(is_ready, port):
                if time.monotonic() > deadline_s:
                    raise AssertionError(f"the server on port {port} did not start")
                await asyncio.sleep(0.05)

    def _server_environment(self, port: int) -> dict[str, str]:
        own = {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_REGION": "us-east-1"} if self.s3_url else {}
        settings = Settings(
            host="127.0.0.1",
            port=port,
            index_dir=self.store,
            s3_endpoint=self.s3_url,
            fsync=False,
            maintenance_interval_s=2.0,
            log_level="error",
        )
        return own | settings.to_environment()

    @contextmanager
    def mood(self, kind: str, **more: float) -> Iterator[None]:
        """The store in a bad mood for the time of the block: of s3.py for S3, of disk/ for a directory. Servers only, of a directory."""
        if self.s3 is not None:
            with self.s3.mood(kind, **more):
                yield
            return
        self.disk_mood.write_text(kind)
        try:
            yield
        finally:
            self.disk_mood.write_text("well")

    def _kill(self, name: str) -> None:
        """The process and its children: a machine that lost its power."""
        process = self.processes.pop(name)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()

    def kill_and_start_again(self, name: str) -> None:
        children = _children(self.processes[name].pid) if name.startswith("server") else []
        if children and self.rng.random() < 0.3:  # the worker alone: its parent starts another
            self.report.kills["server's child"] += 1
            _kill_if_there(self.rng.choice(children))
            return
        self.report.kills[name[:-1]] += 1
        self._kill(name)
        self.start(name)

    def _note_who_ended(self) -> None:
        for name, process in list(self.processes.items()):
            if process.poll() is not None:
                log = (self.folder / f"{name}.log").read_text(errors="replace")[-1500:]
                if name.startswith("server") and "crash loop" in log:  # its child was killed twice in a row: it leaves it to a supervisor
                    self.report.kills["server, by killing its child twice"] += 1
                else:
                    self.report.wrong.append(f"{name} ended by itself with {process.returncode}: {log}")
                self.start(name)

    def close(self) -> None:
        for name in list(self.processes):
            self._kill(name)
        if self.s3:
            self.s3.close()


def is_ready(port: int) -> bool:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    try:
        connection.request("GET", "/readyz")
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def _children(pid: int) -> list[int]:
    try:
        return [int(text) for text in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


def _kill_if_there(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        pass


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m crash", description="kill real processes at random and audit what is left")
    parser.add_argument("--store", choices=("directory", "s3"), default="directory")
    parser.add_argument("--endpoint", default="", metavar="URL", help="with --store s3: a server that runs already, such as LocalStack or MinIO")
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--grace-s", type=float, default=100.0, help="of garbage collection; no process may be frozen for as long")
    parser.add_argument("--folder", type=Path, help="a new folder for journals and logs, to be kept")
    args = parser.parse_args(arguments)
    if args.endpoint:
        if args.store != "s3":
            parser.error("an endpoint needs --store s3")
        make_bucket(args.endpoint, BUCKET)
    with tempfile.TemporaryDirectory(prefix="tartan-crash-") as folder:
        arena = Arena(args.folder or Path(folder), args.store, CASTS["full"], seed=args.seed, grace_s=args.grace_s, endpoint=args.endpoint)
        try:
            report = asyncio.run(arena.run(args.seconds, kill_every_s=(0.3, 2.5)))
        finally:
            arena.close()
    for title, counts in (("killed", report.kills), ("calls", report.outcomes), ("counted", report.counts)):
        print(title)
        for name, n in sorted(counts.items()):
            print(f"{n:8d}  {name}")
    print(f"{report.n_audits} audits over {args.endpoint or args.store}, {args.seconds:.0f} s, seed {args.seed}: {len(report.wrong)} things wrong")
    print("\n".join(report.wrong[:20]))
    return 1 if report.wrong else 0
