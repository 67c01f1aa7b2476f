"""Checks of this machine and of the settings that a server started here would have."""

from __future__ import annotations

import asyncio
import io
import json
import os
import re
import resource
import shutil
from importlib import metadata
from pathlib import Path

from engine.index.commit import Head
from handler.doctor.examination import Case, Findings
from handler.logs import make_logger
from handler.runtime import n_cores
from handler.settings import numeric_threads

MIN_FILES = 1024
"""A warm search of many segments and a hundred connections need some hundred descriptors."""
MEMORY_SHARE = 0.7
"""Of the machine's memory for decoded segments; the rest is for requests, the encoder and the interpreter."""
_CGROUP_LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))
_PIN = re.compile(r"^([A-Za-z0-9._-]+)(?:\[[^\]]*\])?==([^\s;\\]+)(\s*;[^\\]*)?", re.MULTILINE)


async def limits(case: Case, findings: Findings, heads: dict[str, Head]) -> None:
    settings = case.settings
    off = [] if settings.rate_limit_enabled else ["no rate limit per client"]
    off += [f"a request may take {settings.timeout_s:.0f} s"] if settings.timeout_s > 900 else []
    off += [f"{settings.max_body_bytes / 1e9:.1f} GB a body"] if settings.max_body_bytes > 1 << 30 else []
    said = "; ".join(off) or f"{settings.rate_limit_per_second:g} requests a second and client, {settings.concurrency_limit} at work"
    findings.judged("limits", not off, said, "RATE_LIMIT_ENABLED=true unless a gateway limits clients (infra/nginx.conf does)")
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    findings.judged("open files", soft >= MIN_FILES, f"at most {soft}", f"ulimit -n {MIN_FILES} or more")


async def memory(case: Case, findings: Findings, heads: dict[str, Head]) -> None:
    settings = case.settings
    wanted, there = settings.memory_bytes * settings.workers, _memory_bytes()
    said = f"{wanted / 1e9:.2g} GB for decoded segments ({settings.workers} workers) of {there / 1e9:.2g} GB"
    findings.judged("memory", wanted <= MEMORY_SHARE * there, said, "lower TARTAN_MEMORY_BYTES or TARTAN_WORKERS")


def _memory_bytes() -> int:
    """Of the machine, or of the container if that has less."""
    there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for path in _CGROUP_LIMITS:
        try:
            text = path.read_text().strip()
        except OSError:
            continue
        if text.isdigit():
            there = min(there, int(text))
    return there


async def api_keys(case: Case, findings: Findings, heads: dict[str, Head]) -> None:
    settings = case.settings
    is_on = bool(settings.api_keys.strip() or settings.api_keys_file)
    _ = case.runtime.gate  # ValueError if they cannot be read
    said = "configured and readable" if is_on else "off: whoever reaches the server may do everything"
    findings.judged("API keys", is_on, said, "tartan key mint, then TARTAN_API_KEYS or TARTAN_API_KEYS_FILE")


async def cache_volume(case: Case, findings: Findings, heads: dict[str, Head]) -> None:
    check, settings = "cache volume", case.settings
    if not settings.cache_dir:
        if not case.is_s3:
            return findings.skipped(check, "the store is a directory and needs none")
        return findings.warned(
            check, "none: every start reads the indices from S3 again", "TARTAN_CACHE_DIR on a local disk, TARTAN_CACHE_BYTES"
        )
    folder = Path(settings.cache_dir)
    there = _existing(folder)
    if not os.access(there, os.W_OK | os.X_OK):
        return findings.failed(check, f"{there} cannot be written", "give the server's user the folder")
    used = await asyncio.to_thread(_used_bytes, folder)
    lacking = settings.cache_bytes - used - shutil.disk_usage(there).free
    said = f"{folder}: {used / 1e9:.2g} of {settings.cache_bytes / 1e9:.2g} GB used, room for the rest"
    if lacking > 0:
        return findings.failed(
            check, f"{folder}: {lacking / 1e9:.2g} GB too little free for TARTAN_CACHE_BYTES", "a larger volume, or a smaller cache"
        )
    findings.passed(check, said)


def _existing(folder: Path) -> Path:
    """The folder, or the nearest above it that is there."""
    return next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())


def _used_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) if folder.exists() else 0


async def blas_threads(case: Case, findings: Findings, heads: dict[str, Head]) -> None:
    chosen = numeric_threads()
    many = {name: value for name, value in chosen.items() if value not in ("", "1")}
    is_one = chosen.get("OPENBLAS_NUM_THREADS") == "1" and not many
    said = f"one a worker; {case.settings.search_threads or n_cores()} search threads on {n_cores()} cores"
    if not is_one:
        said = ", ".join(f"{name}={value}" for name, value in many.items()) or "not set"
    findings.judged("BLAS threads", is_one, said, "OPENBLAS_NUM_THREADS=1 (and OMP_NUM_THREADS=1): searches already use every core")


async def versions(case: Case, findings: Findings, heads: dict[str, Head]) -> None:
    check = "versions pinned"
    if not case.lock.exists():
        return findings.skipped(check, f"no lock file {case.lock.name} here; --lock names one")
    pinned = _pins(case.lock.read_text())
    other = [f"{name} {found} ({', '.join(pins)})" for name, pins in pinned.items() if (found := _installed(name)) and found not in pins]
    said = (
        f"the {len(pinned)} packages of {case.lock.name} are as they were tested"
        if not other
        else f"others than tested: {', '.join(sorted(other)[:5])}"
    )
    more = f" and {len(other) - 5} more" if len(other) > 5 else ""
    findings.judged(check, bool(pinned) and not other, said + more, f"pip install --require-hashes -r {case.lock.name}")


def _pins(text: str) -> dict[str, list[str]]:
    """Package -> the versions that the lock names; it may name one for each Python."""
    found: dict[str, list[str]] = {}
    for name, version, condition in _PIN.findall(text):
        if "win32" not in condition:
            found.setdefault(name, []).append(version)
    return found


def _installed(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


async def log_format(case: Case, findings: Findings, heads: dict[str, Head]) -> None:
    """The level of the settings, and a line as a server would write it."""
    check, level = "log format", case.settings.log_level
    stream = io.StringIO()
    make_logger(level, stream=stream).info("doctor", probe=True)
    if not stream.getvalue():
        return findings.warned(check, f"level {level} leaves out the line of each request", "TARTAN_LOG_LEVEL=info")
    line = json.loads(stream.getvalue())
    is_complete = {"event", "level", "timestamp"} <= line.keys()
    findings.judged(check, is_complete and level.lower() != "debug", f"JSON lines, level {level}", "TARTAN_LOG_LEVEL=info")


async def user(case: Case, findings: Findings, heads: dict[str, Head]) -> None:
    is_root = hasattr(os, "geteuid") and os.geteuid() == 0
    findings.judged(
        "user",
        not is_root,
        "root" if is_root else f"user {os.geteuid()}",
        "run the server as a user without rights (infra/Dockerfile does)",
    )


CHECKS = (
    ("limits", limits),
    ("memory", memory),
    ("API keys", api_keys),
    ("cache volume", cache_volume),
    ("BLAS threads", blas_threads),
    ("versions pinned", versions),
    ("log format", log_format),
    ("user", user),
)
