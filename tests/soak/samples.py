"""Every second: what each replica's processes hold of memory, files and threads, how full its caches are, and what lies in the store."""

from __future__ import annotations

import asyncio
import re
import time
from contextlib import suppress
from pathlib import Path

from soak.stage import Stage
from soak.wire import Wire

_SCRAPED = {
    "memory_cache_mib": re.compile(rb"^tartan_memory_bytes(?:{[^}]*})? (\S+)", re.M),
    "disk_cache_mib": re.compile(rb"^tartan_cache_size_bytes(?:{[^}]*})? (\S+)", re.M),
    "generation": re.compile(rb"^tartan_index_generation(?:{[^}]*})? (\S+)", re.M),
}
MIB = 1 << 20


class Sampler:
    """Rows of numbers, one a second; `t_s` is the monotonic clock. A value that could not be had is absent."""

    def __init__(self, stage: Stage) -> None:
        self.stage, self.rows = stage, list[dict[str, float]]()
        self._wires = [Wire(replica.url) for replica in stage.replicas]

    async def run(self, every_s: float = 1.0) -> None:
        """Until cancelled."""
        try:
            while True:
                began_s = time.monotonic()
                self.rows.append(await self._sample())
                await asyncio.sleep(max(0.0, began_s + every_s - time.monotonic()))
        finally:
            for wire in self._wires:
                wire.close()

    async def _sample(self) -> dict[str, float]:
        row = {"t_s": time.monotonic()}
        for n, (replica, wire) in enumerate(zip(self.stage.replicas, self._wires, strict=True)):
            row |= {f"{name}.{n}": value for name, value in processes(replica.process.pid).items()}
            with suppress(OSError, EOFError):
                page = (await wire.ask("GET", "/metrics")).body
                for name, pattern in _SCRAPED.items():
                    if found := pattern.search(page):
                        row[f"{name}.{n}"] = float(found[1]) / (MIB if name.endswith("_mib") else 1)
        with suppress(OSError, EOFError):
            row |= {f"store_{name}": value for name, value in (await self.stage.place.stats()).items()}
        return row


def processes(pid: int) -> dict[str, float]:
    """A server's main process and its worker together, and apart from them the maintenance child, which comes and goes."""
    workers = children_of(pid)
    row: dict[str, float] = {}
    for one in (pid, *workers):
        _add(row, "", one)
    for child in (child for worker in workers for child in children_of(worker)):
        _add(row, "maintenance_", child)
    return row


def _add(row: dict[str, float], prefix: str, pid: int) -> None:
    """rss_mib as the system counts it; anon_mib without pages of files; cpu_s used so far."""
    with suppress(OSError, KeyError):  # it has ended, or is just ending
        status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines() if ":" in line)
        times = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        facts = {
            "rss_mib": int(status["VmRSS"].split()[0]) / 1024,
            "anon_mib": int(status["RssAnon"].split()[0]) / 1024,
            "threads": int(status["Threads"]),
            "fds": len(list(Path(f"/proc/{pid}/fd").iterdir())),
            "cpu_s": (int(times[11]) + int(times[12])) / 100,
        }
        for name, value in facts.items():
            row[prefix + name] = row.get(prefix + name, 0.0) + value


def children_of(pid: int) -> list[int]:
    try:
        return [int(text) for text in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []
