"""The store of a soak and what lies in it: a directory, or an S3 server in a process of its own whose objects can be counted without listing.

Run as `python -m soak.store` (s3_process.py) it is that server. GET /_stats gives {"objects", "mib", "manifests"}.
"""

from __future__ import annotations

import json
import os
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moto.s3.models import s3_backends

from s3_process import S3Process, run
from s3_server import Environ, S3Server
from soak.wire import Wire

BUCKET = "soak"


class CountedS3(S3Server):
    """As S3Server, for hours: what was asked is not remembered, what is stored can be asked for."""

    def __init__(self) -> None:
        super().__init__(deque(maxlen=1))  # type: ignore[arg-type]

    def _serve(self, environ: Environ, start: Callable[..., Any]) -> Iterable[bytes]:
        if environ["PATH_INFO"] != "/_stats":
            return super()._serve(environ, start)
        with self._changes:
            sizes = [(name, key.size) for name, key in s3_backends["123456789012"]["aws"].buckets[BUCKET].keys.items()]
        stats = {
            "objects": len(sizes),
            "mib": sum(size for _, size in sizes) / (1 << 20),
            "manifests": sum("/manifests/" in name for name, _ in sizes),
        }
        body = json.dumps(stats).encode()
        start("200 OK", [("Content-Type", "application/json"), ("Content-Length", str(len(body)))])
        return [body]


@dataclass
class DirectoryPlace:
    folder: Path
    environment: dict[str, str]

    @property
    def store_url(self) -> str:
        return str(self.folder)

    async def stats(self) -> dict[str, float]:
        sizes = []
        for path, _, files in os.walk(self.folder):
            for name in files:
                try:
                    sizes.append((path, os.stat(f"{path}/{name}").st_size))
                except FileNotFoundError:  # deleted or renamed meanwhile
                    continue
        manifests = sum("/manifests" in path for path, _ in sizes)
        return {"objects": len(sizes), "mib": sum(size for _, size in sizes) / (1 << 20), "manifests": manifests}

    def close(self) -> None:
        pass


class S3Place(S3Process):
    """The server's process, seen from outside."""

    store_url = f"s3://{BUCKET}/indices"

    def __init__(self) -> None:
        super().__init__("soak.store")
        keys = {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_REGION": "us-east-1"}
        self.environment = {**keys, "TARTAN_S3_ENDPOINT": self.url}
        self._wire = Wire(self.url)

    async def stats(self) -> dict[str, float]:
        found: dict[str, float] = (await self._wire.ask("GET", "/_stats")).json()
        return found

    def close(self) -> None:
        self._wire.close()
        super().close()


if __name__ == "__main__":
    run(CountedS3(), BUCKET)
