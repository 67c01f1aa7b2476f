"""Fixtures that more than one test file uses: stores to work on. Everything is local; S3 is a moto server on loopback."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from uuid import uuid4

import pytest

from engine.store.base import ObjectStore
from engine.store.objects import StoreOptions, open_store
from s3_process import make_bucket
from s3_server import REGION, S3Server

BUCKET = "tartan-tests"


@pytest.fixture(scope="session", autouse=True)
def _no_aws_settings() -> None:
    """obstore reads AWS_* by itself: a developer's endpoint or profile must not reach the tests."""
    for key in [key for key in os.environ if key.startswith("AWS_")]:
        del os.environ[key]


@pytest.fixture(scope="session")
def s3(_no_aws_settings: None) -> Iterator[S3Server]:
    server = S3Server()
    make_bucket(server.url, BUCKET)
    yield server
    server.close()


def s3_options(server: S3Server, **more: object) -> StoreOptions:
    """Short backoffs and timeouts: the server is next door."""
    settings: dict[str, object] = {
        "endpoint": server.url,
        "region": REGION,
        "access_key_id": "key",
        "secret_access_key": "secret",
        "first_backoff_s": 0.001,
        "timeout_s": 5.0,
    }
    return StoreOptions(**{**settings, **more})  # type: ignore[arg-type]


@pytest.fixture
def s3_url() -> str:
    """A prefix of its own for each test."""
    return f"s3://{BUCKET}/{uuid4().hex}"


@pytest.fixture
def s3_store(s3: S3Server, s3_url: str) -> ObjectStore:
    return open_store(s3_url, s3_options(s3))


@pytest.fixture
def memory_store() -> ObjectStore:
    return open_store("memory://")


@pytest.fixture
def directory_store(tmp_path: Path) -> ObjectStore:
    return open_store(str(tmp_path / "store"), StoreOptions(fsync=False))
