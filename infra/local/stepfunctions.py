"""The state machines of infra/ for real: LocalStack's Step Functions, and our functions as processes under AWS's runtime emulator. `make sfn-local` runs it.

    build    four inputs in S3, by build-plain-map.asl.json and by build.asl.json; then `verify`
    search   the API fans queries out over eight shards by StartSyncExecution and answers as one process does, in ids and scores
    damage   a segment is deleted: the search fails and says so, or names the shards in a partial answer

LocalStack has no TLS and no IAM here; nothing leaves this machine.
"""

from __future__ import annotations

import asyncio
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
import zipfile
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from corpus import Corpus, make_corpus  # noqa: E402
from engine.config import SearchParams  # noqa: E402
from engine.errors import CorruptData  # noqa: E402
from engine.fanout.search import FanOut  # noqa: E402
from engine.format import names  # noqa: E402
from engine.index.reader import Reader, Snapshot  # noqa: E402
from engine.index.verify import verify  # noqa: E402
from engine.searcher import Searcher  # noqa: E402
from handler.fanout import StateMachine  # noqa: E402
from handler.runtime import open_at  # noqa: E402
from handler.settings import Settings  # noqa: E402
from serving import free_port  # noqa: E402

BUCKET, REGION = "tartan-local", "us-east-1"
KEYS = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": REGION, "AWS_REGION": REGION}
FUNCTIONS = {"Shard": "shard", "Coordinate": "coordinate", "Build": "build"}
SERVICES = "s3,stepfunctions,sts,iam,lambda,logs,events"
START_S = 90.0
Say = Callable[[str], None]


@dataclass(frozen=True)
class Needs:
    """What must be installed: LocalStack's Python, the emulator, a Python 3.13 with awslambdaric, the functions' content."""

    localstack: Path
    emulator: Path
    python: Path
    code: Path

    @classmethod
    def found(cls) -> Needs:
        """As `make sfn-local` sets them up, or where TARTAN_LOCAL_* say. FileNotFoundError names what is missing."""
        build = ROOT / "build"
        places = {
            "localstack": build / "venv-localstack/bin/python",
            "emulator": next(
                iter(build.glob("venv-sam/lib/python*/site-packages/samcli/local/rapid/aws-lambda-rie-x86_64")), build / "venv-sam"
            ),
            "python": build / "venv-lambda/bin/python",
            "code": build / "lambda-x86_64",
        }
        for name, place in places.items():
            places[name] = Path(os.environ.get(f"TARTAN_LOCAL_{name.upper()}", place))
            if not places[name].exists() or (name == "emulator" and places[name].is_dir()):
                raise FileNotFoundError(f"{name} is not set up at {places[name]}: make sfn-local")
        return cls(**places)


@contextmanager
def localstack(needs: Needs, folder: Path) -> Iterator[str]:
    """A running LocalStack; its URL. Everything that it started ends with it."""
    port = free_port()
    own = {
        "GATEWAY_LISTEN": f"127.0.0.1:{port}", "LOCALSTACK_HOST": f"127.0.0.1:{port}", "DISABLE_EVENTS": "1", "SKIP_SSL_CERT_DOWNLOAD": "1",
        "DNS_ADDRESS": "0", "USE_SSL": "0", "STRICT_SERVICE_LOADING": "1", "FILESYSTEM_ROOT": str(folder / "root"), "SERVICES": SERVICES,
        "TARTAN_LOCAL_RIE": str(needs.emulator), "TARTAN_LOCAL_PYTHON": str(needs.python), "TARTAN_LOCAL_CODE": str(needs.code),
        "TARTAN_LOCAL_LOGS": str(folder), "HOME": str(folder), "PATH": f"{needs.localstack.parent}:/usr/bin:/bin",
    }  # fmt: skip
    url = f"http://127.0.0.1:{port}"
    with (folder / "localstack.log").open("wb") as log:
        command = [str(needs.localstack), str(ROOT / "infra/local/lambda_processes.py")]
        process = subprocess.Popen(command, env=own, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            _wait(url, process, folder)
            yield url
        finally:
            _end(process)


def _end(process: subprocess.Popen[bytes]) -> None:
    """The process and all that it started. The emulator puts functions into groups of their own, but they stay in the session."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
    with suppress(subprocess.TimeoutExpired):
        process.wait(20)
    for entry in Path("/proc").iterdir():
        with suppress(ProcessLookupError, PermissionError):
            if entry.name.isdigit() and os.getsid(int(entry.name)) == process.pid:
                os.kill(int(entry.name), signal.SIGKILL)
    process.wait()


def _wait(url: str, process: subprocess.Popen[bytes], folder: Path) -> None:
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline and process.poll() is None:
        try:
            urllib.request.urlopen(f"{url}/_localstack/health", timeout=2).close()
            return
        except OSError:
            time.sleep(0.2)
    raise RuntimeError("LocalStack did not start:\n" + (folder / "localstack.log").read_text()[-2000:])


class Cloud:
    """Bucket, functions and state machines in a LocalStack."""

    def __init__(self, url: str) -> None:
        import boto3
        from botocore.config import Config

        def client(service: str) -> Any:
            credentials = {"aws_access_key_id": "test", "aws_secret_access_key": "test", "region_name": REGION}
            return boto3.client(service, endpoint_url=url, config=Config(inject_host_prefix=False), **credentials)

        self.url, self.s3, self.states, functions = url, client("s3"), client("stepfunctions"), client("lambda")
        self.s3.create_bucket(Bucket=BUCKET)
        variables = {**KEYS, "TARTAN_INDEX_DIR": f"s3://{BUCKET}/indices", "TARTAN_S3_ENDPOINT": url, "TARTAN_LOG_LEVEL": "info"}
        variables |= {"OPENBLAS_NUM_THREADS": "1", "TARTAN_EPHEMERAL_MB": "1", "TARTAN_FANOUT_SHARD_BYTES": "1048576"}
        empty = io.BytesIO()
        with zipfile.ZipFile(empty, "w") as archive:
            archive.writestr("empty.txt", "")
        self.arns: dict[str, str] = {}
        for name, task in FUNCTIONS.items():
            made = functions.create_function(
                FunctionName=name, Runtime="python3.13", Role="arn:aws:iam::000000000000:role/r", Handler=f"handler.lambda_tasks.{task}",
                Code={"ZipFile": empty.getvalue()}, Timeout=120, MemorySize=2048, Environment={"Variables": variables},
            )  # fmt: skip
            self.arns[name] = made["FunctionArn"]
            functions.get_waiter("function_active_v2").wait(FunctionName=name)
        self.machines = {file: self._machine(file, kind) for file, kind in _MACHINES.items()}

    def _machine(self, file: str, kind: str) -> str:
        text = re.sub(r"\$\{(\w+)FunctionArn\}", lambda found: self.arns[found[1]], (ROOT / "infra" / file).read_text())
        name = file.split(".")[0]
        made = self.states.create_state_machine(name=name, definition=text, roleArn="arn:aws:iam::000000000000:role/r", type=kind)
        return str(made["stateMachineArn"])

    def execute(self, file: str, content: dict[str, Any], timeout_s: float = 180.0) -> dict[str, Any]:
        """A Standard execution to its end."""
        arn = self.states.start_execution(stateMachineArn=self.machines[file], input=json.dumps(content))["executionArn"]
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            found: dict[str, Any] = self.states.describe_execution(executionArn=arn)
            if found["status"] != "RUNNING":
                return found
            time.sleep(0.1)
        raise TimeoutError(f"{file} did not end")

    def execute_sync(self, content: dict[str, Any]) -> dict[str, Any]:
        """An Express execution."""
        found: dict[str, Any] = self.states.start_sync_execution(
            stateMachineArn=self.machines["search.asl.json"], input=json.dumps(content)
        )
        return found


_MACHINES = {"search.asl.json": "EXPRESS", "build-plain-map.asl.json": "STANDARD", "build.asl.json": "STANDARD"}


def put_inputs(cloud: Cloud, corpus: Corpus, prefix: str, n_inputs: int) -> None:
    """The corpus as JSON lines and .npz, in turns."""
    bounds = np.linspace(0, len(corpus), n_inputs + 1).astype(int).tolist()
    for n, (first, last) in enumerate(pairwise(bounds)):
        tokens, offsets = corpus.part(first, last)
        if n % 2:
            buffer = io.BytesIO()
            np.savez(buffer, tokens=tokens.astype(np.float16), doclens=np.diff(offsets))
            cloud.s3.put_object(Bucket=BUCKET, Key=f"{prefix}/p{n}.npz", Body=buffer.getvalue())
            rows = "\n".join(json.dumps({"n": i}) for i in range(first, last))
            cloud.s3.put_object(Bucket=BUCKET, Key=f"{prefix}/p{n}.fields.jsonl", Body=rows.encode())
            continue
        lines = [
            json.dumps({"embeddings": tokens[offsets[i] : offsets[i + 1]].tolist(), "metadata": {"n": first + i}})
            for i in range(last - first)
        ]
        cloud.s3.put_object(Bucket=BUCKET, Key=f"{prefix}/p{n}.jsonl", Body="\n".join(lines).encode())


async def check_build(cloud: Cloud, reader: Reader, file: str, index: str, corpus: Corpus, say: Say) -> None:
    began = time.perf_counter()
    request = {"index": index, "inputs": f"s3://{BUCKET}/inputs", "segment_documents": 2100}
    done = await asyncio.to_thread(cloud.execute, file, {"request": request})
    assert done["status"] == "SUCCEEDED", done
    report = json.loads(done["output"])
    assert report["n_documents"] == len(corpus)
    snapshot = await reader.snapshot(index)
    assert (snapshot.n_documents, snapshot.manifest.generation) == (len(corpus), 1)
    found = await verify(reader, index)
    assert not found.problems, found.problems
    seconds = time.perf_counter() - began
    say(f"{file}: {snapshot.n_documents} documents of {report['n_segments']} segments in one commit, verified, {seconds:.1f} s")


async def check_search(cloud: Cloud, reader: Reader, snapshot: Snapshot, corpus: Corpus, settings: Settings, say: Say) -> None:
    machine = StateMachine(cloud.machines["search.asl.json"], 1, cloud.url)
    machine.shard_count = lambda size_bytes: 8  # type: ignore[method-assign]
    params = SearchParams(k=10)
    try:
        for mode in ("cold", "warm"):
            machine.mode = mode
            fan = FanOut(Searcher(reader), machine, min_bytes=0)
            expected = [(await Searcher(reader).search(snapshot, [query], params, mode=mode))[0] for query in corpus.queries]
            began = time.perf_counter()
            answers = [(await fan.search(snapshot, [query], params))[0] for query in corpus.queries]
            ms = (time.perf_counter() - began) * 1000 / len(answers)
            for one, other in zip(expected, answers, strict=True):
                assert one.ids.tolist() == other.ids.tolist()
                assert one.scores.tobytes() == other.scores.tobytes()
                assert one.rows == other.rows
            say(f"search.asl.json, 8 shards, {mode}: {len(answers)} queries, ids, scores and rows of one process; {ms:.0f} ms a query here")
    finally:
        await machine.close()
    request = {"index": snapshot.index, "query": corpus.queries[0].tolist(), "params": {"k": 5}}
    done = await asyncio.to_thread(cloud.execute_sync, {"request": request})
    assert done["status"] == "SUCCEEDED", done
    say(f"search.asl.json, asked directly: {json.loads(done['output'])['document_ids']}")


async def check_damage(cloud: Cloud, settings: Settings, snapshot: Snapshot, corpus: Corpus, say: Say) -> None:
    lost = names.segment(snapshot.index, snapshot.segments[2].id)
    await open_at(settings.index_dir, settings).delete([lost])
    machine = StateMachine(cloud.machines["search.asl.json"], 1, cloud.url)
    machine.shard_count = lambda size_bytes: 8  # type: ignore[method-assign]
    fan = FanOut(Searcher(Reader(open_at(settings.index_dir, settings))), machine, min_bytes=0)
    try:
        lost_it = await _failure(fan.search(snapshot, corpus.queries[:1], SearchParams(k=10)))
        assert lost_it.code == "missing-object", lost_it
        say(f"a lost segment fails the search: {lost_it}")
        [answer] = await fan.search(snapshot, corpus.queries[:1], SearchParams(k=10), allow_partial=True)
        assert len(answer.failed) == 1
        assert len(answer.ids) == 10
        say(f"or is named in a partial answer: shard {answer.failed[0]['shard']}, {answer.failed[0]['error']}")
    finally:
        await machine.close()


async def _failure(search: Awaitable[Any]) -> CorruptData:
    """What a search failed with; an answer is the failure here."""
    try:
        answer = await search
    except CorruptData as error:
        return error
    raise AssertionError(f"a search over a lost segment gave an answer: {answer}")


async def check_all(cloud: Cloud, say: Say) -> None:
    corpus = make_corpus(900, dim=32, n_queries=2, seed=21)
    settings = Settings(index_dir=f"s3://{BUCKET}/indices", s3_endpoint=cloud.url, log_level="off")
    reader = Reader(open_at(settings.index_dir, settings))
    put_inputs(cloud, corpus, "inputs", 9)
    await check_build(cloud, reader, "build-plain-map.asl.json", "plain", corpus, say)
    await check_build(cloud, reader, "build.asl.json", "distributed", corpus, say)
    snapshot = await reader.snapshot("plain")
    await check_search(cloud, reader, snapshot, corpus, settings, say)
    await check_damage(cloud, settings, snapshot, corpus, say)


def main(say: Say = print) -> None:
    needs = Needs.found()
    os.environ.update(KEYS)
    folder = Path(tempfile.mkdtemp(prefix="tartan-localstack-"))
    try:
        with localstack(needs, folder) as url:
            cloud = Cloud(url)
            asyncio.run(check_all(cloud, say))
    except BaseException:
        for log in sorted(folder.glob("*.log")):
            sys.stderr.write(f"== {log.name}\n{log.read_text(errors='replace')[-3000:]}\n")
        raise
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    main()
