"""Checks of what has been tried before it is needed: backups, recovery drills, rollback, load."""

from __future__ import annotations

import time
from datetime import datetime

import msgspec

from engine.index.commit import Head
from engine.transfer.backup import BackupRecord, newest_record
from engine.transfer.drill import DrillRecord
from handler.doctor.examination import Case, Findings
from handler.runtime import open_at

DAY_S = 86_400.0
MAX_FAILURE_SHARE, MAX_P99_MS = 0.001, 500.0


class LoadTest(msgspec.Struct, frozen=True):
    """What `make load` leaves. `at` is when, as ISO 8601 or unix seconds."""

    at: str | float
    url: str
    seconds: float
    requests: int
    failures: int
    p50_ms: float
    p95_ms: float
    p99_ms: float
    requests_per_s: float

    @property
    def at_s(self) -> float:
        return datetime.fromisoformat(self.at).timestamp() if isinstance(self.at, str) else self.at


async def backups(case: Case, findings: Findings, heads: dict[str, Head]) -> None:
    """Each index has a backup that is young, or younger than its last change."""
    check = "backup"
    if case.backups is None:
        return findings.warned(check, "nobody said where backups lie", "tartan backup --to URL every day; then tartan doctor --backups URL")
    store, now_s = open_at(case.backups, case.settings), time.time()
    bad: list[str] = []
    oldest_days = 0.0
    for name, head in heads.items():
        if not head.manifest.n_documents:
            continue
        record = await newest_record(store, "backups", name, BackupRecord)
        if record is None or record.index_id != head.manifest.index_id:
            bad.append(f"{name} has none")
            continue
        days = (now_s - record.started_s) / DAY_S
        oldest_days = max(oldest_days, days)
        if days > case.max_backup_days and record.generation < head.manifest.generation:
            bad.append(f"{name}'s is {days:.1f} days old")
    said = ", ".join(bad[:5]) if bad else f"of {len(heads)} indices, the oldest {oldest_days:.1f} days old"
    findings.judged(check, not bad, said, f"tartan backup --to {case.backups}, every day", otherwise="fail")


async def drills(case: Case, findings: Findings, heads: dict[str, Head]) -> None:
    """Some index was recovered lately, and every index whose drill failed is named."""
    check = "recovery drill"
    if case.backups is None:
        findings.skipped(check, "--backups names where the records of drills lie")
        return findings.skipped("rollback tested", "a drill tries it")
    store = open_at(case.backups, case.settings)
    records = [record for name in heads if (record := await newest_record(store, "drills", name, DrillRecord)) is not None]
    todo = f"tartan drill INDEX --to {case.backups}"
    if not records:
        findings.warned(check, "never tried", todo)
        return findings.warned("rollback tested", "never tried", todo)
    failed = [record.index for record in records if not record.is_good]
    newest = max(records, key=lambda record: record.started_s)
    days = (time.time() - newest.started_s) / DAY_S
    rpo = "no backup before it" if newest.rpo_s is None else f"RPO {newest.rpo_s:.0f} s"
    said = f"{newest.index}, {days:.0f} days ago: {rpo}, RTO {newest.rto_s:.1f} s"
    if failed:
        findings.failed(check, f"failed: {', '.join(failed)}", "do not rely on that backup: tartan verify on it, then a new one")
    else:
        findings.judged(check, days <= case.max_drill_days, said, todo)
    findings.judged("rollback tested", newest.rolled_back, f"{days:.0f} days ago, in the drill", todo, otherwise="fail")


async def load_test(case: Case, findings: Findings, heads: dict[str, Head]) -> None:
    check = "load test"
    if not case.load_test.exists():
        return findings.warned(check, f"no result in {case.load_test}", "make load")
    found = msgspec.json.decode(case.load_test.read_bytes(), type=LoadTest, strict=False)
    days = (time.time() - found.at_s) / DAY_S
    said = f"{days:.0f} days ago: {found.requests_per_s:.0f} requests/s, p99 {found.p99_ms:.0f} ms, {found.failures} of {found.requests} failed"
    if not found.requests or found.failures > MAX_FAILURE_SHARE * found.requests:
        return findings.failed(check, said, "look at the server's log of that time")
    is_good = found.p99_ms <= MAX_P99_MS and days <= case.max_load_test_days
    findings.judged(check, is_good, said, "make load again; if p99 stays high, more replicas (docs/production.md)")


CHECKS = (("backup", backups), ("recovery drill", drills), ("load test", load_test))
