"""An S3Server of some kind in a process of its own, which the death of others does not touch and which takes no time of theirs."""

from __future__ import annotations

import subprocess
import sys
import urllib.request
from pathlib import Path

from s3_server import S3Server

ROOT = Path(__file__).resolve().parent.parent


class S3Process:
    """The process, seen from outside. Its objects live as long as it does.

    module  whose `main` calls `run`
    """

    def __init__(self, module: str, *arguments: str) -> None:
        command = [sys.executable, "-m", module, *arguments]
        environment = {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "PATH": "/usr/bin:/bin", "OPENBLAS_NUM_THREADS": "1"}
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment)
        assert self.process.stdout is not None
        self.url = self.process.stdout.readline().decode().strip()

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()


def run(server: S3Server, bucket: str) -> None:
    """In the process: make the bucket, print the server's URL, and end when standard input does."""
    make_bucket(server.url, bucket)
    print(server.url, flush=True)
    sys.stdin.read()


def make_bucket(url: str, bucket: str) -> None:
    """Of an S3 server that asks for no signature; one that is there stays."""
    urllib.request.urlopen(urllib.request.Request(f"{url}/{bucket}", method="PUT")).close()
