"""Cold starts of the function: what importing its handler costs, and how long a fresh process takes to its first correct answer.

    python -m benchmarks.cold_start --store FOLDER --index NAME [--runs 9] [--no-warm]
    python -m benchmarks.cold_start                      (makes a small synthetic collection first)

import        CPU and wall time of `import handler.lambda_http` in a new process (application made, routes registered), against
              `import numpy, litestar` alone; the two take turns, so that a busy machine troubles both alike
first answer  from the start of the process until the handler has returned the answer to an HTTP API event, which must name the right
              document; once the index is named in TARTAN_WARM (CURRENT, then what every search reads, is asked for while modules
              load), once not. Requests and bytes are those of the process, rounds those of the invocation
warm          an invocation with the index in memory and the store in a folder beside it, less the engine's own time (explain): what handler,
              application and Mangum add; and the same through the runtime emulator, which adds itself, where it is installed

The store is slow where a real one is: a server in another process answers S3's GETs of a folder after a first-byte time drawn from a lognormal
distribution (p50 63 ms, p99 200 ms) and then sends at 80 MB/s on each connection. So the client, its connections and its threads are
the real ones, and nothing in the process under test knows of the delay. The /tmp cache is on and empty.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import os
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
from email.utils import formatdate
from hashlib import md5
from pathlib import Path
from typing import Any

import numpy as np

from infra.local.lambda_gateway import Emulator, find_emulator

ROOT = Path(__file__).resolve().parent.parent
P50_S, P99_S, BYTES_PER_S = 0.063, 0.2, 80e6
_CHUNK = 256 << 10
_IMPORT = "import time; began = time.perf_counter(); {what}; print(time.perf_counter() - began, time.process_time())"
_ANSWER = """
import json, sys, time
from handler.lambda_http import handler
event = json.load(open(sys.argv[1]))
with handler.runtime.counting.window() as cost:
    answer = handler(event, None)
first = time.time()
total = handler.runtime.counting.total
told = {"rounds": cost.rounds, "requests": total.n_requests, "bytes": total.bytes_read}
print(json.dumps({"ended": first, "status": answer["statusCode"], "found": json.loads(answer["body"]), "cost": told}))
"""
_WARM = """
import json, sys, time
from handler.lambda_http import handler
search, warm = json.load(open(sys.argv[1]))
assert handler(warm, None)["statusCode"] == 200
lines = []
for _ in range(int(sys.argv[2])):
    began = time.perf_counter()
    answer = handler(search, None)
    took = time.perf_counter() - began
    lines.append((took, json.loads(answer["body"])["results"][0]["explain"]["cost"]["stages_ms"]["total"] / 1000))
print(json.dumps(lines))
"""


class SlowFiles:
    """S3's GET over a folder, slow as S3. Only what a search asks: whole objects, ranges, If-None-Match."""

    def __init__(self, folder: Path, seed: int, scale: float = 1.0) -> None:
        self._folder, self._random, self._scale = folder, random.Random(seed), scale
        self._sigma = math.log(P99_S / P50_S) / 2.3263478740408398

    async def serve(self) -> None:
        server = await asyncio.start_server(self._connection, "127.0.0.1", 0, backlog=1024)
        print(server.sockets[0].getsockname()[1], flush=True)
        await server.serve_forever()

    async def _connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
                await asyncio.sleep(self._scale * self._random.lognormvariate(math.log(P50_S), self._sigma))
                status, headers, body = self._answer(head)
                lines = [f"HTTP/1.1 {status}", *(f"{name}: {value}" for name, value in headers.items()), "\r\n"]
                writer.write("\r\n".join(lines).encode())
                for start in range(0, len(body), _CHUNK):
                    writer.write(body[start : start + _CHUNK])
                    await writer.drain()
                    await asyncio.sleep(self._scale * min(_CHUNK, len(body) - start) / BYTES_PER_S)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    def _answer(self, head: str) -> tuple[str, dict[str, Any], bytes]:
        path = head.split(" ", 2)[1].partition("?")[0].removeprefix("/bucket/")
        file = self._folder / path
        if not file.is_file():
            error = b"<Error><Code>NoSuchKey</Code></Error>"
            return "404 Not Found", {"Content-Length": len(error), "Content-Type": "application/xml"}, error
        status = file.stat()
        etag = f'"{md5(f"{status.st_size} {status.st_mtime_ns}".encode()).hexdigest()}"'
        headers: dict[str, Any] = {"ETag": etag, "Last-Modified": formatdate(status.st_mtime, usegmt=True)}
        asked = re.search(r"(?i)\r\nif-none-match: *([^\r]+)", head)
        if asked and asked[1].strip('"') == etag.strip('"'):
            return "304 Not Modified", headers, b""
        wanted = re.search(r"(?i)\r\nrange: bytes=(\d+)-(\d+)", head)
        start, end = (int(wanted[1]), min(int(wanted[2]) + 1, status.st_size)) if wanted else (0, status.st_size)
        with file.open("rb") as opened:
            opened.seek(start)
            data = opened.read(end - start)
        headers["Content-Length"] = len(data)
        if wanted is None:
            return "200 OK", headers, data
        return "206 Partial Content", headers | {"Content-Range": f"bytes {start}-{end - 1}/{status.st_size}"}, data


def environment(port: int, index: str, scratch: str, *, warm: bool) -> dict[str, str]:
    kept = {name: value for name, value in compiled_environment().items() if not name.startswith(("AWS_", "TARTAN_"))}
    return kept | {
        "PYTHONPATH": str(ROOT),
        "OPENBLAS_NUM_THREADS": "1",
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_REGION": "us-east-1",
        "AWS_LAMBDA_FUNCTION_MEMORY_SIZE": "2048",
        "TARTAN_INDEX_DIR": "s3://bucket",
        "TARTAN_S3_ENDPOINT": f"http://127.0.0.1:{port}",
        "TARTAN_LOG_LEVEL": "off",
        "TARTAN_CACHE_DIR": scratch,
        "TARTAN_WARM": index if warm else "",
    }


def compiled_environment() -> dict[str, str]:
    """An environment in which modules are compiled once, as they are in a deployed function, whatever this shell forbids."""
    return {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}


def timed_import(what: str) -> tuple[float, float]:
    """(wall seconds of the import, CPU seconds of the process)."""
    command = [sys.executable, "-c", _IMPORT.format(what=what)]
    run = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT, env=compiled_environment())
    wall, cpu = run.stdout.split()[-2:]
    return float(wall), float(cpu)


def measure_imports(n_runs: int) -> dict[str, Any]:
    kinds = {"nothing": "pass", "numpy and litestar": "import numpy, litestar", "the handler": "import handler.lambda_http"}
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in kinds}
    for what in kinds.values():
        timed_import(what)
    for _ in range(n_runs):
        for name, what in kinds.items():
            taken[name].append(timed_import(what))
    bare = min(cpu for _, cpu in taken["nothing"])
    least = {name: min(cpu for _, cpu in runs) - bare for name, runs in taken.items()}
    wall = {name: min(own for own, _ in runs) for name, runs in taken.items()}
    return {
        "cpu_ms": {name: round(1000 * value) for name, value in least.items()},
        "wall_ms": {name: round(1000 * value) for name, value in wall.items()},
        "ratio_cpu": round(least["the handler"] / least["numpy and litestar"], 2),
        "ratio_wall": round(wall["the handler"] / wall["numpy and litestar"], 2),
    }


def search_event(index: str, query: np.ndarray, *, explain: bool = False) -> dict[str, Any]:
    event: dict[str, Any] = json.loads((ROOT / "tests/events/http_v2.json").read_text())
    path = f"/indices/{index}/search"
    event["rawPath"] = event["requestContext"]["http"]["path"] = path
    event["body"] = json.dumps({"queries": [{"embeddings": query.tolist()}], "params": {"top_k": 10}, "explain": explain})
    return event


def first_answer(folder: Path, index: str, event: Path, expected: int, seed: int, *, warm: bool, scale: float = 1.0) -> dict[str, Any]:
    """One fresh process. Seconds to its first answer and what that cost; RuntimeError if the answer is wrong."""
    command = [sys.executable, "-m", "benchmarks.cold_start", "--serve", str(folder), "--seed", str(seed), "--scale", str(scale)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as server, tempfile.TemporaryDirectory() as scratch:
        try:
            assert server.stdout is not None
            port = int(server.stdout.readline())
            began = time.time()
            run = subprocess.run(
                [sys.executable, "-c", _ANSWER, str(event)],
                env=environment(port, index, scratch, warm=warm), capture_output=True, text=True, cwd=ROOT,
            )  # fmt: skip
        finally:
            server.kill()
    if run.returncode:
        raise RuntimeError(run.stderr[-2000:])
    told = json.loads(run.stdout.splitlines()[-1])
    result = told["found"]["results"][0] if told["status"] == 200 else None
    if result is None or result["document_ids"][0] != expected:
        raise RuntimeError(f"a wrong first answer: {told}")
    return {"s": told["ended"] - began, **told["cost"]}


def warm_overheads(folder: Path, index: str, query: np.ndarray, n_calls: int) -> dict[str, Any]:
    """Median milliseconds of warm invocations, of the engine within, and of the difference."""
    search = search_event(index, query, explain=True)
    warm = json.loads(json.dumps(search))
    warm["rawPath"] = warm["requestContext"]["http"]["path"] = f"/indices/{index}/warm"
    told: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as scratch:
        events = Path(scratch) / "events.json"
        events.write_text(json.dumps([search, warm]))
        variables = environment(0, index, scratch, warm=False) | {"TARTAN_INDEX_DIR": str(folder)}
        run = subprocess.run(
            [sys.executable, "-c", _WARM, str(events), str(n_calls)], env=variables, capture_output=True, text=True, check=True, cwd=ROOT
        )
        told["in process"] = _overhead(json.loads(run.stdout.splitlines()[-1]))
        if (binary := find_emulator()) is not None:
            emulator = Emulator(binary, variables)
            try:
                assert emulator.invoke(warm)["statusCode"] == 200
                told["through the emulator"] = _overhead([_timed(emulator, search) for _ in range(n_calls)])
            finally:
                emulator.close()
    return told


def _timed(emulator: Emulator, event: dict[str, Any]) -> tuple[float, float]:
    began = time.perf_counter()
    answer = emulator.invoke(event)
    took = time.perf_counter() - began
    return took, json.loads(answer["body"])["results"][0]["explain"]["cost"]["stages_ms"]["total"] / 1000


def _overhead(lines: list[tuple[float, float]]) -> dict[str, float]:
    took, engine = zip(*lines, strict=True)
    added = [whole - own for whole, own in lines]
    return {
        f"{name}_ms": round(1000 * statistics.median(times), 2) for name, times in (("whole", took), ("engine", engine), ("added", added))
    }


def question(folder: Path, index: str) -> tuple[np.ndarray, int]:
    """(query float32 (Q, D), document id): the first tokens of a document, of which that document is the best answer."""
    from engine.index.reader import Reader
    from engine.searcher import Searcher
    from engine.store.objects import open_store
    from engine.transfer.export import blocks

    async def find() -> tuple[np.ndarray, int]:
        reader = Reader(open_store(str(folder)))
        snapshot = await reader.snapshot(index)
        chosen = (await snapshot.live_ids())[[snapshot.n_documents // 3]]
        async for documents in blocks(snapshot, chosen):
            tokens, _ = await documents.tokens()
            query = np.ascontiguousarray(tokens[:32], np.float32)
            answer = (await Searcher(reader).search(snapshot, [query]))[0]
            return query, int(answer.ids[0])
        raise RuntimeError("the index is empty")

    return asyncio.run(find())


def make_index(folder: Path) -> str:
    """A synthetic collection of 4,000 documents, quantised."""
    from benchmarks.collections import synthetic
    from engine.config import IndexConfig
    from engine.index.commit import create
    from engine.index.compact import compact
    from engine.index.reader import Reader
    from engine.store.objects import StoreOptions, open_store

    async def build() -> None:
        reader = Reader(open_store(str(folder), StoreOptions(fsync=False)))
        made = synthetic(4000)
        await create(reader.store, "synthetic", IndexConfig())
        await reader.writer("synthetic").add(made.tokens, made.offsets)
        await compact(reader, "synthetic", force=True)

    asyncio.run(build())
    return "synthetic"


def summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    times = sorted(run["s"] for run in runs)
    return {
        "min_ms": round(1000 * times[0]),
        "median_ms": round(1000 * statistics.median(times)),
        "max_ms": round(1000 * times[-1]),
        "rounds": max(run["rounds"] for run in runs),
        "requests": max(run["requests"] for run in runs),
        "megabytes": round(max(run["bytes"] for run in runs) / 1e6, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="cold starts of the Lambda function")
    parser.add_argument("--store", type=Path, help="a directory store; without it a synthetic collection is made")
    parser.add_argument("--index", default="")
    parser.add_argument("--runs", type=int, default=9)
    parser.add_argument("--serve", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--seed", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--scale", type=float, default=1.0, help="how slow the store is, as a multiple of the figures above")
    own = parser.parse_args()
    if own.serve is not None:
        asyncio.run(SlowFiles(own.serve, own.seed, own.scale).serve())
        return
    with tempfile.TemporaryDirectory() as scratch:
        print(json.dumps({"import": measure_imports(own.runs)}), flush=True)
        folder = own.store or Path(scratch) / "store"
        index = own.index or make_index(folder)
        query, expected = question(folder, index)
        event = Path(scratch) / "event.json"
        event.write_text(json.dumps(search_event(index, query)))
        taken: dict[str, list[dict[str, Any]]] = {"named in TARTAN_WARM": [], "not named": []}
        for seed in range(own.runs):
            for name, runs in taken.items():
                runs.append(first_answer(folder, index, event, expected, seed, warm=name != "not named", scale=own.scale))
        print(json.dumps({"first answer": {name: summary(runs) for name, runs in taken.items()}}))
        print(json.dumps({"warm": warm_overheads(folder, index, query, 40)}))


if __name__ == "__main__":
    main()
