"""Load test: wrk searches through whatever is at a URL; the result is kept as JSON, where `tartan doctor` looks for it.

    make load                                            nginx and three replicas of its own on this machine
    make load URL=https://search.example.com INDEX=papers SECONDS=60 CONNECTIONS=32

Without --index an index is made for the test and deleted afterwards: --documents of 100 tokens of 128 dimensions, random, flat. Its figures
say what nginx, HTTP and small searches cost, not what your collection will: name an index for that, and pieces of its first documents are the
queries (people's are harder: `tartan recall`). TARTAN_API_KEY is sent if set; it needs the scope search.

The result has: at (UTC), url, index, connections, seconds, requests, failures, p50_ms, p95_ms, p99_ms, requests_per_s. Exit status 1 if any failed.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import itertools
import json
import os
import random
import secrets
import shutil
import struct
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from infra.local.replicas import Replicas, local_s3  # noqa: E402

DIM, DOCUMENT_TOKENS, QUERY_TOKENS, N_BODIES = 128, 100, 32, 64


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--url", default="", help="where to search; otherwise nginx and replicas are started here")
    parser.add_argument("--index", default="", help="an index that is there; otherwise one is made")
    parser.add_argument("--seconds", type=int, default=20)
    parser.add_argument("--connections", type=int, default=8)
    parser.add_argument("--documents", type=int, default=500)
    parser.add_argument("--result", type=Path, default=Path("data/load-test.json"))
    options = parser.parse_args()
    if shutil.which("wrk") is None:
        print("wrk is needed: apt-get install wrk", file=sys.stderr)
        return 2
    with contextlib.ExitStack() as stack:
        url = options.url.rstrip("/") or stack.enter_context(_own_replicas())
        api = Api(url)
        index = options.index or stack.enter_context(_own_index(api, options.documents))
        queries = _pieces(api, index) if options.index else [_random_vectors(random.Random(n), QUERY_TOKENS) for n in range(N_BODIES)]
        figures = _search(api, index, queries, options.seconds, options.connections)
    result = {
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
        "url": url,
        "index": index,
        "connections": options.connections,
        **figures,
    }
    options.result.parent.mkdir(parents=True, exist_ok=True)
    options.result.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))
    return int(figures["failures"] > 0)


class Api:
    """JSON over urllib."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.key = os.environ.get("TARTAN_API_KEY", "")

    def __call__(self, method: str, path: str, body: object = None) -> Any:
        with self.open(method, path, body) as answer:
            return json.load(answer)

    def open(self, method: str, path: str, body: object = None) -> Any:
        headers = {"Content-Type": "application/json"} | ({"X-API-Key": self.key} if self.key else {})
        data = None if body is None else json.dumps(body).encode()
        return urllib.request.urlopen(urllib.request.Request(self.url + path, data, headers, method=method), timeout=120)


@contextlib.contextmanager
def _own_replicas() -> Iterator[str]:
    with tempfile.TemporaryDirectory() as folder, local_s3() as environment:
        quiet = {**environment, "TARTAN_LOG_LEVEL": "warning"}
        with Replicas(Path(folder), "s3://tartan/indices", quiet) as replicas:
            yield replicas.url


@contextlib.contextmanager
def _own_index(api: Api, n_documents: int) -> Iterator[str]:
    name, rng = f"load-{secrets.token_hex(4)}", random.Random(0)
    api("POST", "/indices", {"name": name})
    try:
        for start in range(0, n_documents, 100):
            batch = [_random_vectors(rng, DOCUMENT_TOKENS) for _ in range(min(100, n_documents - start))]
            api("POST", f"/indices/{name}/update", {"documents": batch})
        yield name
    finally:
        api("DELETE", f"/indices/{name}")


def _random_vectors(rng: random.Random, n_tokens: int) -> dict[str, Any]:
    rows = [struct.pack(f"<{DIM}f", *(rng.gauss(0.0, 1.0) for _ in range(DIM))) for _ in range(n_tokens)]
    return _packed(rows)


def _packed(rows: Sequence[bytes]) -> dict[str, Any]:
    """Vectors of float32 as a body wants them."""
    return {"embeddings_b64": base64.b64encode(b"".join(rows)).decode(), "shape": [len(rows), len(rows[0]) // 4]}


def _pieces(api: Api, index: str) -> list[dict[str, Any]]:
    """Of each of the first documents, tokens from all over it."""
    with api.open("GET", f"/indices/{index}/export") as lines:
        documents = [json.loads(line) for line in itertools.islice(lines, N_BODIES)]
    return [_packed(_spread(document)) for document in documents if document["shape"][0]]


def _spread(document: dict[str, Any]) -> list[bytes]:
    n_tokens, dim = document["shape"]
    packed = base64.b64decode(document["embeddings_b64"])
    step = max(1, n_tokens // QUERY_TOKENS)
    return [packed[at * 4 * dim : (at + 1) * 4 * dim] for at in range(0, n_tokens, step)][:QUERY_TOKENS]


def _search(api: Api, index: str, queries: Sequence[dict[str, Any]], seconds: int, connections: int) -> dict[str, Any]:
    with tempfile.NamedTemporaryFile("w", suffix=".jsonl") as bodies:
        for query in queries:
            bodies.write(json.dumps({"queries": [query], "params": {"top_k": 10}}) + "\n")
        bodies.flush()
        threads = str(min(2, connections))
        command = [
            "wrk",
            f"-t{threads}",
            f"-c{connections}",
            f"-d{seconds}s",
            "--timeout",
            "30s",
            "-s",
            str(ROOT / "infra/load/search.lua"),
            api.url,
        ]
        ran = subprocess.run(
            [*command, "--", f"/indices/{index}/search", bodies.name, *filter(None, [api.key])], capture_output=True, text=True
        )
    if ran.returncode:
        raise SystemExit(ran.stderr or ran.stdout)
    figures: dict[str, Any] = json.loads(ran.stdout.strip().splitlines()[-1])
    return figures


if __name__ == "__main__":
    sys.exit(main())
