"""S3 over HTTP for one machine: the tests' server (moto made atomic) with an empty bucket `tartan`. In memory: it forgets when it ends.

Prints its URL. `python infra/local/s3.py [PORT]`; needs the development set-up (`make test` makes it).
"""

from __future__ import annotations

import signal
import sys
import urllib.request
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from s3_server import S3Server  # noqa: E402


def main() -> None:
    server = S3Server()
    urllib.request.urlopen(urllib.request.Request(f"{server.url}/tartan", method="PUT")).close()
    print(server.url, flush=True)
    signal.sigwait({signal.SIGTERM, signal.SIGINT})


if __name__ == "__main__":
    main()
