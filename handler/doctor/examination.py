"""An examination of a deployment: checks, what they found, and what is to be done.

    store_checks      the store: reachable, conditions honoured, permissions, the bucket's settings, clock, formats, backlog, garbage
    process_checks    this machine and its settings: limits, keys, memory, cache volume, threads, versions, log
    server_checks     a running server: health, release, metrics, access, clock
    recovery_checks   backups, drills, rollback, load test

A check never changes what it looks at; two of them write a probe object and delete it. A check that cannot be made is skipped with the
reason, never passed. `tartan doctor` is the caller.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

import msgspec

from engine.errors import EngineError
from engine.index.commit import Head
from engine.store.base import ObjectStore
from handler.runtime import Runtime
from handler.settings import Settings

Verdict = Literal["pass", "warn", "fail", "skip"]


class Finding(msgspec.Struct, frozen=True, kw_only=True):
    """What one check says. `todo` says what to do about a warning or a failure."""

    group: str
    check: str
    verdict: Verdict
    said: str
    todo: str = ""


@dataclass(frozen=True)
class Case:
    """What is examined.

    url        of a running server, or none
    key        API key for that server
    backups    URL of where backups lie, or none
    may_write  whether probes may be written to the store
    load_test  file that the load test leaves
    lock       file with the versions that were tested
    """

    runtime: Runtime
    store_url: str
    url: str | None = None
    key: str | None = None
    backups: str | None = None
    max_backup_days: float = 2.0
    max_drill_days: float = 90.0
    max_load_test_days: float = 90.0
    may_write: bool = True
    load_test: Path = Path("data/load-test.json")
    lock: Path = Path(__file__).resolve().parents[2] / "infra" / "requirements.lock"

    @property
    def settings(self) -> Settings:
        return self.runtime.settings

    @property
    def store(self) -> ObjectStore:
        """Beneath any cache: what is examined is the store itself."""
        return self.runtime.counting

    @property
    def is_s3(self) -> bool:
        return urlsplit(self.store_url).scheme == "s3"


class Findings:
    """Collects what the checks of one group say."""

    def __init__(self, group: str) -> None:
        self.group = group
        self.found: list[Finding] = []

    def passed(self, check: str, said: str) -> None:
        self._add(check, "pass", said, "")

    def warned(self, check: str, said: str, todo: str) -> None:
        self._add(check, "warn", said, todo)

    def failed(self, check: str, said: str, todo: str) -> None:
        self._add(check, "fail", said, todo)

    def skipped(self, check: str, said: str) -> None:
        self._add(check, "skip", said, "")

    def judged(self, check: str, is_good: bool, said: str, todo: str, *, otherwise: Verdict = "warn") -> None:
        """Passed, or `otherwise`."""
        self._add(check, "pass" if is_good else otherwise, said, "" if is_good else todo)

    def _add(self, check: str, verdict: Verdict, said: str, todo: str) -> None:
        self.found.append(Finding(group=self.group, check=check, verdict=verdict, said=said, todo=todo))


Check = Callable[[Case, Findings, dict[str, Head]], Awaitable[None]]
"""A check gets the heads of the indices that can be opened, by name; the first of all fills them in."""


async def examine(case: Case) -> list[Finding]:
    """Run every check. One that ends in an error of the engine has failed with it; the others go on."""
    from handler.doctor import process_checks, recovery_checks, server_checks, store_checks

    found: list[Finding] = []
    heads: dict[str, Head] = {}
    for group, checks in (
        ("store", store_checks.CHECKS),
        ("process", process_checks.CHECKS),
        ("server", server_checks.CHECKS),
        ("recovery", recovery_checks.CHECKS),
    ):
        findings = Findings(group)
        for name, check in checks:
            try:
                await check(case, findings, heads)
            except (EngineError, OSError, ValueError) as error:
                findings.failed(name, f"the check ended in an error: {error}", "see to the error, then ask again")
        found += findings.found
    return found
