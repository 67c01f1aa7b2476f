"""The checklist for production: each check with a deployment that passes it and one that does not."""

from __future__ import annotations

import json
import os
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import msgspec
import numpy as np
import pytest
from typer.testing import CliRunner

from conftest import BUCKET, s3_options
from corpus import make_corpus
from engine.config import IndexConfig
from engine.index.commit import create
from engine.index.reader import Reader
from engine.store.base import Listed, ObjectStore
from engine.store.bucket import open_bucket
from engine.store.objects import StoreOptions, open_store
from engine.store.wrappers import AroundStore
from engine.transfer.backup import BackupRecord, backup, newest_record, write_record
from engine.transfer.drill import DrillRecord, drill
from handler.auth import mint_key
from handler.cli import app
from handler.doctor.examination import Case, Finding, examine
from handler.runtime import Runtime
from handler.settings import Settings
from s3_server import REGION, S3Server
from serving import serving

CORPUS = make_corpus(20, dim=8)
RUNNER = CliRunner()
CHECKS = {
    *("store reachable", "format readable", "conditional writes", "permissions least", "bucket versioned", "bucket encrypted"),
    *("bucket private", "clock", "compaction backlog", "garbage", "limits", "open files", "memory", "API keys", "cache volume"),
    *("BLAS threads", "versions pinned", "log format", "user", "health route", "metrics scraped", "access", "backup", "recovery drill"),
    *("rollback tested", "load test"),
}


@pytest.fixture(autouse=True)
def _no_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("TARTAN_") or name == "INDEX_DIR"]:
        monkeypatch.delenv(name)


@pytest.fixture
async def folder(tmp_path: Path) -> Path:
    """A store with the index x."""
    where = tmp_path / "store"
    store = open_store(str(where), StoreOptions(fsync=False))
    await create(store, "x", IndexConfig())
    await Reader(store).writer("x").add(*CORPUS.part(0, 20))
    where.chmod(0o700)
    return where


async def found(
    where: object, *, store: ObjectStore | None = None, settings: dict[str, Any] | None = None, **case: Any
) -> dict[str, Finding]:
    """Findings by check."""
    runtime = Runtime(Settings(**{"index_dir": str(where), "fsync": False, "memory_bytes": 1 << 26, **(settings or {})}), store=store)
    try:
        case = {"load_test": Path("/nonexistent"), **case}
        return {finding.check: finding for finding in await examine(Case(runtime, str(where), **case))}
    finally:
        runtime.close()


async def test_every_check_says_something_and_what_is_not_passed_says_what_to_do(folder: Path) -> None:
    findings = await found(folder)
    assert set(findings) >= CHECKS
    for finding in findings.values():
        assert finding.said, finding
        assert bool(finding.todo) == (finding.verdict in ("warn", "fail")), finding
    for check in (
        "store reachable",
        "format readable",
        "conditional writes",
        "permissions least",
        "clock",
        "garbage",
        "compaction backlog",
    ):
        assert findings[check].verdict == "pass", findings[check]
    assert {name for name in os.listdir(folder) if not name.startswith(".")} == {"x"}  # probes are gone


async def test_without_writes_no_probe_is_written(folder: Path) -> None:
    class Refuses(AroundStore):
        async def put_if_absent(self, name: str, data: object) -> str:
            raise AssertionError(name)

    findings = await found(folder, store=Refuses(open_store(str(folder))), may_write=False)
    assert {findings[check].verdict for check in ("conditional writes", "clock", "garbage")} == {"skip"}


async def test_a_store_that_cannot_be_reached_fails_and_the_other_checks_go_on(tmp_path: Path) -> None:
    nobody = {"endpoint": "http://127.0.0.1:9", "region": REGION, "access_key_id": "a", "secret_access_key": "b", "attempts": 1}
    store = open_store(f"s3://{BUCKET}/x", StoreOptions(**nobody))  # type: ignore[arg-type]
    findings = await found(f"s3://{BUCKET}/x", store=store, settings={"s3_endpoint": nobody["endpoint"]}, may_write=False)
    assert findings["store reachable"].verdict == "fail"
    assert findings["limits"].verdict == "warn"


async def test_an_index_that_this_release_cannot_read_is_named(folder: Path) -> None:
    (folder / "newer").mkdir()
    current = bytearray((folder / "x/CURRENT").read_bytes())
    current[10] = 99  # the format version
    (folder / "newer/CURRENT").write_bytes(current)
    finding = (await found(folder))["format readable"]
    assert finding.verdict == "fail"
    assert "newer" in finding.said
    assert "readers first" in finding.todo


async def test_a_store_that_ignores_conditions_fails(s3: S3Server, s3_url: str, s3_store: ObjectStore) -> None:
    with s3.fault("PUT", "unconditional", times=1000):
        findings = await found(s3_url, store=s3_store, settings={"s3_endpoint": s3.url, "aws_profile": ""})
    assert findings["conditional writes"].verdict == "fail"


async def test_a_clock_that_is_off_is_measured_against_the_stores(folder: Path) -> None:
    class Ahead(AroundStore):
        def __init__(self, inner: ObjectStore, by_s: float) -> None:
            super().__init__(inner)
            self.by_s = by_s

        async def list(self, prefix: str, *, after: str | None = None) -> AsyncIterator[Listed]:
            async for listed in self.inner.list(prefix, after=after):
                yield Listed(listed.name, listed.size_bytes, listed.modified_s + self.by_s)

    for by_s, verdict in ((0.5, "pass"), (30.0, "warn"), (-30.0, "warn"), (3600.0, "fail")):
        finding = (await found(folder, store=Ahead(open_store(str(folder)), by_s)))["clock"]
        assert finding.verdict == verdict, finding


async def test_a_buckets_settings_are_looked_at(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("AWS_ACCESS_KEY_ID", "key"), ("AWS_SECRET_ACCESS_KEY", "secret"), ("AWS_REGION", REGION)):
        monkeypatch.setenv(name, value)
    name = f"doctor-{uuid4().hex}"
    client = open_bucket(f"s3://{name}", s3_options(s3)).client
    client.create_bucket(Bucket=name)
    client.delete_bucket_encryption(Bucket=name)
    where, settings = f"s3://{name}/indices", {"s3_endpoint": s3.url}
    findings = await found(where, settings=settings)
    assert [findings[check].verdict for check in ("bucket versioned", "bucket encrypted", "bucket private")] == ["warn", "warn", "pass"]
    extra = findings["permissions least"]
    assert (extra.verdict, "list all buckets" in extra.said, "write outside indices/" in extra.said) == ("warn", True, True)
    assert "Contents" not in client.list_objects_v2(Bucket=name)
    client.put_bucket_versioning(Bucket=name, VersioningConfiguration={"Status": "Enabled"})
    rule = {"ServerSideEncryptionConfiguration": {"Rules": [{"ApplyServerSideEncryptionByDefault": {"SSEAlgorithm": "aws:kms"}}]}}
    client.put_bucket_encryption(Bucket=name, **rule)
    expiry = {"ID": "old", "Status": "Enabled", "Filter": {"Prefix": ""}, "NoncurrentVersionExpiration": {"NoncurrentDays": 30}}
    findings = await found(where, settings=settings)
    assert findings["old versions expire"].verdict == "warn"
    client.put_bucket_lifecycle_configuration(Bucket=name, LifecycleConfiguration={"Rules": [expiry]})
    client.put_bucket_acl(Bucket=name, ACL="public-read")
    findings = await found(where, settings=settings)
    verdicts = {
        check: findings[check].verdict for check in ("bucket versioned", "bucket encrypted", "bucket private", "old versions expire")
    }
    assert list(verdicts.values()) == ["pass", "pass", "fail", "pass"]
    assert "aws:kms" in findings["bucket encrypted"].said
    block = dict.fromkeys(("BlockPublicAcls", "IgnorePublicAcls", "BlockPublicPolicy", "RestrictPublicBuckets"), True)
    client.put_public_access_block(Bucket=name, PublicAccessBlockConfiguration=block)
    assert (await found(where, settings=settings))["bucket private"].verdict == "pass"


async def test_a_directory_that_everybody_may_read_is_a_warning(folder: Path) -> None:
    os.chmod(folder, 0o755)
    assert (await found(folder))["permissions least"].verdict == "warn"


async def test_settings_of_the_process_are_judged(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENBLAS_NUM_THREADS", "1")
    _, record = mint_key(["admin"])
    keys = msgspec.json.encode([record]).decode()
    lock = tmp_path / "lock"
    hashed = " \\\n    --hash=sha256:00\n"
    pins = (
        f"numpy=={np.__version__} ; python_full_version < '4'",
        "numpy==99 ; python_full_version >= '4'",
        "msgspec==0.0.1 ; sys_platform == 'win32'",
    )
    lock.write_text("".join(pin + hashed for pin in pins))
    good = {"rate_limit_enabled": True, "api_keys": keys, "cache_dir": str(tmp_path / "cache"), "cache_bytes": 1 << 20}
    findings = await found(folder, settings=good, lock=lock)
    for check in ("limits", "memory", "API keys", "cache volume", "BLAS threads", "versions pinned", "log format"):
        assert findings[check].verdict == "pass", findings[check]

    monkeypatch.setenv("OMP_NUM_THREADS", "8")
    lock.write_text("numpy==1.0.0 \\\n")
    bad = {"memory_bytes": 1 << 45, "cache_dir": str(tmp_path / "cache"), "cache_bytes": 1 << 60, "log_level": "error"}
    findings = await found(folder, settings=bad, lock=lock)
    for check in ("limits", "memory", "API keys", "BLAS threads", "versions pinned", "log format"):
        assert findings[check].verdict == "warn", findings[check]
    assert findings["cache volume"].verdict == "fail"
    assert "OMP_NUM_THREADS=8" in findings["BLAS threads"].said
    assert "numpy" in findings["versions pinned"].said
    assert (await found(folder, lock=tmp_path / "none"))["versions pinned"].verdict == "skip"
    with pytest.raises(ValueError, match="key records"):
        _ = Runtime(Settings(api_keys="[1]")).gate
    assert (await found(folder, settings={"api_keys": "[1]"}))["API keys"].verdict == "fail"


async def test_backups_and_drills_are_judged_by_their_age_and_outcome(folder: Path, tmp_path: Path) -> None:
    reader, where = Reader(open_store(str(folder), StoreOptions(fsync=False))), str(tmp_path / "backups")
    backups = open_store(where, StoreOptions(fsync=False))
    none = await found(folder)
    assert (none["backup"].verdict, none["recovery drill"].verdict) == ("warn", "skip")
    empty = await found(folder, backups=where)
    assert (empty["backup"].verdict, empty["recovery drill"].verdict, empty["rollback tested"].verdict) == ("fail", "warn", "warn")

    await drill(reader, "x", Reader(backups), n_queries=3)
    fresh = await found(folder, backups=where)
    assert [fresh[check].verdict for check in ("backup", "recovery drill", "rollback tested")] == ["pass", "pass", "pass"]
    assert "RTO" in fresh["recovery drill"].said

    record = await newest_record(backups, "backups", "x", BackupRecord)
    assert record is not None
    await write_record(backups, "backups", "x", msgspec.structs.replace(record, started_s=time.time() - 9 * 86_400))
    assert (await found(folder, backups=where))["backup"].verdict == "pass"  # old, and nothing has changed since
    await reader.writer("x").delete(np.array([3]))
    late = (await found(folder, backups=where))["backup"]
    assert (late.verdict, "9.0 days" in late.said) == ("fail", True)
    await backup(reader.store, "x", backups)
    assert (await found(folder, backups=where))["backup"].verdict == "pass"

    tried = await newest_record(backups, "drills", "x", DrillRecord)
    assert tried is not None
    await write_record(backups, "drills", "x", msgspec.structs.replace(tried, started_s=tried.started_s - 200 * 86_400, n_different=0))
    assert (await found(folder, backups=where))["recovery drill"].verdict == "warn"
    await write_record(backups, "drills", "x", msgspec.structs.replace(tried, n_different=1, rolled_back=False))
    failed = await found(folder, backups=where)
    assert (failed["recovery drill"].verdict, failed["rollback tested"].verdict) == ("fail", "fail")


async def test_the_load_tests_result_is_judged(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "load-test.json"
    result = {"at": "2026-11-01T10:00:00+00:00", "url": "http://x", "seconds": 30, "requests": 1000, "failures": 0, "p50_ms": 9}
    result |= {"p95_ms": 20, "p99_ms": 40, "requests_per_s": 33.3}
    now = {"at": time.time() - 60}
    for change, verdict in (({}, "pass"), ({"failures": 5}, "fail"), ({"p99_ms": 900}, "warn"), ({"requests": 0}, "fail")):
        path.write_text(json.dumps(result | now | change))
        assert (await found(folder, load_test=path))["load test"].verdict == verdict
    path.write_text(json.dumps(result | {"at": "2020-01-01T00:00:00+00:00"}))
    assert (await found(folder, load_test=path))["load test"].verdict == "warn"
    path.write_text("{}")
    assert (await found(folder, load_test=path))["load test"].verdict == "fail"


async def test_a_running_server_is_examined(folder: Path) -> None:
    key, record = mint_key(["search"])
    keys = msgspec.json.encode([record]).decode()
    with serving(index_dir=str(folder), api_keys=keys, open_areas=("health", "metrics")) as server:
        first = await found(folder, url=server.url)
        again = await found(folder, url=server.url, key=key)
    for check in ("health route", "release", "server's clock", "access"):
        assert first[check].verdict == "pass", first[check]
    assert (first["metrics scraped"].verdict, again["metrics scraped"].verdict) == ("warn", "pass")
    gone = await found(folder, url=server.url)
    assert {gone[check].verdict for check in ("health route", "metrics scraped")} == {"fail"}


def test_the_command_prints_a_table_or_json_and_its_exit_code_is_for_machines(folder: Path, tmp_path: Path) -> None:
    usual = ["doctor", "--store", str(folder), "--load-test", str(tmp_path / "none")]
    shown = RUNNER.invoke(app, usual)
    assert shown.exit_code == 0, shown.output
    assert "conditional writes" in shown.stdout
    strict = RUNNER.invoke(app, [*usual, "--strict", "--json"])
    assert strict.exit_code == 1
    document = json.loads(strict.stdout)
    assert (document["good"], document["counts"]["fail"]) == (False, 0)
    assert {line["check"] for line in document["checks"]} >= CHECKS
    failing = RUNNER.invoke(app, [*usual, "--backups", str(tmp_path / "no backups")])
    assert failing.exit_code == 1
