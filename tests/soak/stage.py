"""Two replicas of the server over one store, with caches that are soon full and maintenance that is always at work."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from crash.arena import is_ready
from handler.settings import Settings
from s3_process import ROOT
from serving import free_port
from soak.store import DirectoryPlace, S3Place

Kind = Literal["directory", "s3"]
START_S = 120.0
MEMORY_BYTES, CACHE_BYTES = 8 << 20, 32 << 20
"""Little, so that both caches are full, and what is in them replaced all the time, long before the warm-up is over."""
_SERVE = """
import sys
import engine.index.reader, handler.maintenance
from handler.settings import Settings
from handler.server import serve
engine.index.reader.MAX_HEAD_AGE_S = float(sys.argv[1])
handler.maintenance.SWEEP_INTERVAL_S = float(sys.argv[2])
settings = Settings.from_environment()
sys.exit(serve(settings.host, settings.port, settings))
"""


@dataclass(frozen=True)
class Hurry:
    """How short the times of maintenance are. grace_s must be longer than anything may stand still, the machine included."""

    grace_s: float = 400.0
    sweep_s: float = 65.0
    interval_s: float = 20.0


class Replica:
    """One server: a main process, a worker, now and then a maintenance child."""

    def __init__(self, name: str, place: DirectoryPlace | S3Place, folder: Path, hurry: Hurry, **settings: object) -> None:
        self.name = name
        self.settings = Settings(
            **{
                "host": "127.0.0.1",
                "port": free_port(),
                "index_dir": place.store_url,
                "fsync": False,
                "drain_s": 0.0,
                "log_level": "warning",
                "maintenance_interval_s": hurry.interval_s,
                **settings,
            }  # type: ignore[arg-type]
        )
        self.url = f"http://127.0.0.1:{self.settings.port}"
        paths = (ROOT, ROOT / "tests", ROOT / "tests" / "soak" / "short")
        own = {
            "PATH": os.environ["PATH"],
            "PYTHONPATH": os.pathsep.join(map(str, paths)),
            "OPENBLAS_NUM_THREADS": "1",
            "SOAK_GRACE_S": str(hurry.grace_s),
        }
        self.log_path = folder / f"{name}.log"
        with open(self.log_path, "ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-c", _SERVE, str(hurry.grace_s / 10), str(hurry.sweep_s)],
                env={**own, **self.settings.to_environment(), **place.environment},
                cwd=ROOT,
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )

    def wait_until_ready(self) -> None:
        deadline_s = time.monotonic() + START_S
        while not is_ready(self.settings.port):
            if time.monotonic() > deadline_s or self.process.poll() is not None:
                raise AssertionError(f"{self.name} did not start:\n{self.log_path.read_text(errors='replace')[-3000:]}")
            time.sleep(0.05)

    @property
    def log(self) -> str:
        return self.log_path.read_text(errors="replace")

    def close(self) -> int:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(60)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            return self.process.wait()


@dataclass
class Stage:
    place: DirectoryPlace | S3Place
    replicas: list[Replica]


@contextlib.contextmanager
def staged(kind: Kind, folder: Path, *, n_replicas: int = 2, hurry: Hurry | None = None, **settings: object) -> Iterator[Stage]:
    """Store and replicas for the time of the block. `folder` gets the directory store, caches and logs."""
    place = S3Place() if kind == "s3" else DirectoryPlace(folder / "indices", {})
    replicas: list[Replica] = []
    try:
        for n in range(n_replicas):
            own = {"cache_dir": str(folder / f"cache{n}"), "cache_bytes": CACHE_BYTES} if kind == "s3" else {}
            replicas.append(Replica(f"replica{n}", place, folder, hurry or Hurry(), **own, **settings))
        for replica in replicas:
            replica.wait_until_ready()
        yield Stage(place, replicas)
    finally:
        for replica in replicas:
            replica.close()
        place.close()
