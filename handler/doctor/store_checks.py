"""Checks of the store: can it be reached, does it keep its promises, is it set up as it should be, in what order are its indices?"""

from __future__ import annotations

import secrets
import stat
import time
from pathlib import Path
from urllib.parse import unquote, urlsplit

from engine.config import INDEX_NAME, MaintenanceParams
from engine.errors import EngineError, Unavailable
from engine.index.commit import Head
from engine.index.indices import survey
from engine.index.plan import backlog_tokens
from engine.index.sweep import sweep
from engine.store.objects import probe_conditional_writes
from handler.doctor.examination import Case, Findings
from handler.runtime import open_at, store_options

MAX_INDICES_SWEPT = 20
SLOW_STORE_MS = 500.0
MAX_SKEW_S, FATAL_SKEW_S = 2.0, 60.0
"""A clock that is off makes times of generations wrong for people; S3 refuses signatures that are off by 15 minutes."""
BACKLOG_FOLDS = 5
"""So many times what a compactor leaves alone has piled up: nobody compacts."""
GARBAGE_SHARE = 0.5


async def reachable(case: Case, findings: Findings, heads: dict[str, Head]) -> None:
    """Lists the store and opens every index; fills `heads` for the checks that follow."""
    store = case.store  # made before the clock runs: it imports what a store needs
    began = time.monotonic()
    folders = [folder async for folder in store.list_folders("") if INDEX_NAME.fullmatch(folder)]
    ms = (time.monotonic() - began) * 1000
    where = case.store_url
    findings.judged(
        "store reachable",
        ms < SLOW_STORE_MS,
        f"{where} answers in {ms:.0f} ms, {len(folders)} names",
        "run where the store is: same region",
    )
    found = await survey(store)
    heads |= found.heads
    unreadable = [f"{name}: {error.message}" for name, error in found.unreadable.items()]
    todo = "unsupported-format: upgrade this release (readers first); otherwise tartan undelete or tartan restore"
    said = f"{len(heads)} indices can be opened" if not unreadable else "; ".join(unreadable)
    findings.judged("format readable", not unreadable, said, todo, otherwise="fail")


async def conditional_writes(case: Case, findings: Findings, heads: dict[str, Head]) -> None:
    check = "conditional writes"
    if not case.may_write:
        return findings.skipped(check, "would write a probe")
    try:
        await probe_conditional_writes(case.store, "")
    except Unavailable as error:
        if error.code == "store-denied" and case.settings.read_only:
            return findings.passed(check, "this identity may not write, as a read-only server should not")
        todo = (
            "choose a store that honours If-Match and If-None-Match"
            if error.code == "store-unsuitable"
            else "give s3:PutObject, s3:DeleteObject"
        )
        return findings.failed(check, str(error), todo)
    if case.settings.read_only:
        return findings.warned(
            check, "honoured; but this read-only server's identity can write", "take s3:PutObject and s3:DeleteObject from it"
        )
    findings.passed(check, "If-Match and If-None-Match are honoured")


async def permissions(case: Case, findings: Findings, heads: dict[str, Head]) -> None:
    """What this identity can do and does not need."""
    check = "permissions least"
    if not case.is_s3:
        return _directory_mode(case, findings, check)
    from engine.store.bucket import open_bucket

    bucket = open_bucket(case.store_url, store_options(case.settings))
    asked = {"list all buckets": ("list_buckets", {}), "read the bucket's policy": ("get_bucket_policy", {"Bucket": bucket.bucket})}
    extra = [what for what, (call, arguments) in asked.items() if await bucket.allows(call, **arguments)]
    if bucket.prefix and case.may_write and await _can_write_outside(case, bucket.bucket):
        extra.append(f"write outside {bucket.prefix}")
    said = "none beyond the prefix that were tried" if not extra else f"this identity can also {', '.join(extra)}"
    findings.judged(check, not extra, said, "the least policy is in docs/backup.md: Get, Put, Delete and List below the prefix")


def _directory_mode(case: Case, findings: Findings, check: str) -> None:
    mode = _directory(case.store_url).stat().st_mode
    is_open = bool(mode & (stat.S_IWOTH | stat.S_IROTH))
    findings.judged(
        check,
        not is_open,
        f"the directory has mode {stat.S_IMODE(mode):o}",
        "chmod o-rwx: other users of the machine have no business there",
    )


def _directory(url: str) -> Path:
    parts = urlsplit(url)
    return Path(unquote(parts.path) if parts.scheme == "file" else url).expanduser()


async def _can_write_outside(case: Case, bucket: str) -> bool:
    outside = open_at(f"s3://{bucket}", case.settings)
    name = f"tartan-doctor-{secrets.token_hex(8)}"
    try:
        await outside.put_if_absent(name, b"a probe of tartan doctor; may be deleted")
    except EngineError:
        return False
    await outside.delete([name])
    return True


async def bucket_settings(case: Case, findings: Findings, heads: dict[str, Head]) -> None:
    checks = ("bucket versioned", "bucket encrypted", "bucket private")
    if not case.is_s3:
        for check in checks:
            findings.skipped(check, "a directory: use the file system's snapshots, encryption and rights")
        return
    from engine.store.bucket import open_bucket

    found = await open_bucket(case.store_url, store_options(case.settings)).settings()
    denied = "this identity may not ask; ask with one that may"
    if found.is_versioned is None:
        findings.skipped(checks[0], denied)
    else:
        said = "on" if found.is_versioned else "off: what is deleted behind the engine's back is gone"
        findings.judged(checks[0], found.is_versioned, said, "aws s3api put-bucket-versioning; then tartan undelete can bring objects back")
    if found.is_versioned and found.expires_days == 0:
        findings.warned(
            "old versions expire", "never: every compaction is paid for twice", "a lifecycle rule with NoncurrentVersionExpiration, 30 days"
        )
    elif found.is_versioned and found.expires_days:
        findings.passed("old versions expire", f"after {found.expires_days} days: so long can tartan undelete reach back")
    if found.encryption is None:
        findings.skipped(checks[1], denied)
    else:
        findings.judged(checks[1], bool(found.encryption), found.encryption or "no default encryption", "aws s3api put-bucket-encryption")
    if found.is_private is None:
        findings.skipped(checks[2], denied)
    else:
        said = "not open to the public" if found.is_private else "a policy or ACL opens it to everybody"
        findings.judged(checks[2], found.is_private, said, "aws s3api put-public-access-block, all four", otherwise="fail")


async def clock(case: Case, findings: Findings, heads: dict[str, Head]) -> None:
    check = "clock"
    if not case.may_write:
        return findings.skipped(check, "would write a probe")
    name = f"probe-{secrets.token_hex(8)}"
    before_s = time.time()
    try:
        await case.store.put_if_absent(name, name.encode())
    except Unavailable as error:
        if error.code == "store-denied":
            return findings.skipped(check, "this identity may not write a probe")
        raise
    after_s = time.time()
    try:
        [stamp_s] = [listed.modified_s async for listed in case.store.list(name)]
    finally:
        await case.store.delete([name])
    # the store's stamp may be cut to whole seconds; only what lies outside of the request counts
    skew_s = max(before_s - (stamp_s + 1.0), stamp_s - after_s, 0.0)
    said = "agrees with the store's" if not skew_s else f"{skew_s:.1f} s off the store's"
    findings.judged(
        check, skew_s <= MAX_SKEW_S, said, "run chrony or systemd-timesyncd", otherwise="fail" if skew_s > FATAL_SKEW_S else "warn"
    )


async def backlog(case: Case, findings: Findings, heads: dict[str, Head]) -> None:
    check = "compaction backlog"
    params = MaintenanceParams()
    tokens = {name: backlog_tokens(head.manifest) for name, head in heads.items()}
    behind = [name for name, n in tokens.items() if n > BACKLOG_FOLDS * params.max_flat_tokens]
    behind += [name for name, head in heads.items() if len(head.manifest.segments) > BACKLOG_FOLDS * params.max_flat_segments]
    said = (
        f"{sum(tokens.values()):,} tokens wait in {len(heads)} indices"
        if not behind
        else f"nobody compacts {', '.join(sorted(set(behind)))}"
    )
    findings.judged(check, not behind, said, "let a server compact (TARTAN_COMPACT), or schedule tartan compact")


async def garbage(case: Case, findings: Findings, heads: dict[str, Head]) -> None:
    """What a sweep would delete of the first indices; asks the store for its time with a marker that it deletes again."""
    check = "garbage"
    if not case.may_write:
        return findings.skipped(check, "would write a marker")
    total = live = 0
    for name in list(heads)[:MAX_INDICES_SWEPT]:
        try:
            total += (await sweep(case.store, name, dry_run=True)).deleted_bytes
        except Unavailable as error:
            if error.code == "store-denied":
                return findings.skipped(check, "this identity may not write a marker")
            raise
        live += sum(segment.size_bytes for segment in heads[name].manifest.segments)
    is_little = total <= max(GARBAGE_SHARE * live, 1 << 20)
    findings.judged(
        check,
        is_little,
        f"{total / 1e6:,.1f} MB that nothing names, beside {live / 1e6:,.1f} MB",
        "schedule tartan gc, or let a server compact",
    )


CHECKS = (
    ("store reachable", reachable),
    ("conditional writes", conditional_writes),
    ("permissions least", permissions),
    ("bucket settings", bucket_settings),
    ("clock", clock),
    ("compaction backlog", backlog),
    ("garbage", garbage),
)
