"""State machines of infra/ executed by moto's interpreter (a port of LocalStack's), their Lambda functions being the real handlers in this process."""

from __future__ import annotations

import asyncio
import io
import json
import re
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock
from uuid import uuid4

import boto3
from moto import mock_aws
from moto.awslambda_simple.models import LambdaSimpleBackend

from engine.store.base import ObjectStore
from handler.lambda_tasks import Tasks, portable
from handler.runtime import Runtime
from handler.settings import Settings

INFRA = Path(__file__).resolve().parent.parent / "infra"
REGION = "us-east-1"
FUNCTIONS = ("Shard", "Coordinate", "Build")
Event = dict[str, Any]
Fault = Callable[[str, Event], BaseException | None]


def definition(name: str) -> str:
    """A state machine's text with function names in place of the template's substitutions."""
    return re.sub(r"\$\{(\w+)FunctionArn\}", r"\1", (INFRA / name).read_text())


def in_seconds(text: str) -> str:
    """The same with retries that do not wait: moto sleeps for real."""
    document = json.loads(text)

    def hurry(node: Any) -> None:
        if isinstance(node, dict):
            if "IntervalSeconds" in node:
                node.update(IntervalSeconds=1, BackoffRate=1.0)
                node.pop("JitterStrategy", None)
                node.pop("MaxDelaySeconds", None)
            for value in node.values():
                hurry(value)
        elif isinstance(node, list):
            for value in node:
                hurry(value)

    hurry(document)
    return json.dumps(document)


class Lambda:
    """Functions as Lambda runs them: each invocation has a process to itself, which it leaves to the next one, memory and all.

    fault  asked before each invocation; what it returns is raised, with the handler's work done first if `effect_first`
    """

    def __init__(self, store: ObjectStore, **settings: Any) -> None:
        self.store, self.settings = store, Settings(index_dir="memory://", log_level="off", **settings)
        self.calls: list[tuple[str, Event]] = []
        self.fault: Fault = lambda name, event: None
        self.late_fault: Fault = lambda name, event: None
        self.remaining_s = 900.0
        self._idle: dict[str, list[tuple[asyncio.Runner, Tasks]]] = {name: [] for name in FUNCTIONS}
        self._all: list[asyncio.Runner] = []
        self._lock = threading.Lock()
        self._busy = self.peak = 0

    def __call__(self, name: str, event: Event) -> Event:
        with self._lock:
            self.calls.append((name, event))
            self._busy += 1
            self.peak = max(self.peak, self._busy)
            runner, tasks = (
                self._idle[name].pop() if self._idle[name] else (asyncio.Runner(), Tasks(Runtime(self.settings, store=self.store)))
            )
            if runner not in self._all:
                self._all.append(runner)
        try:
            if error := self.fault(name, event):
                raise error
            works = {"Shard": tasks.shard, "Coordinate": tasks.coordinate, "Build": lambda event: tasks.build(event, self.remaining_s)}
            answer = runner.run(works[name](event))
            if error := self.late_fault(name, event):
                raise error
            return json.loads(json.dumps(answer))
        finally:
            with self._lock:
                self._busy -= 1
                self._idle[name].append((runner, tasks))

    def close(self) -> None:
        for idle in self._idle.values():
            for runner, tasks in idle:
                tasks.runtime.close()
                runner.close()


class Machines:
    """A region with our functions and state machines."""

    def __init__(self, functions: Lambda) -> None:
        self.functions = functions
        client = boto3.client("iam", region_name=REGION)
        self.role = client.create_role(RoleName="tartan", AssumeRolePolicyDocument="{}")["Role"]["Arn"]
        self.client = boto3.client("stepfunctions", region_name=REGION)
        code = io.BytesIO()
        with zipfile.ZipFile(code, "w") as archive:
            archive.writestr("h.py", "")
        for name in FUNCTIONS:
            settings = {"Runtime": "python3.13", "Handler": "h.h", "Code": {"ZipFile": code.getvalue()}}
            boto3.client("lambda", region_name=REGION).create_function(FunctionName=name, Role=self.role, **settings)
        self.arns: dict[str, str] = {}

    def execute(self, name: str, content: Event, timeout_s: float = 60.0) -> Event:
        """Run a machine to its end: {status, output} or {status, error, cause}. moto has no synchronous executions; the states are the same."""
        if name not in self.arns:
            made = self.client.create_state_machine(name=name.replace(".", "-"), definition=in_seconds(definition(name)), roleArn=self.role)
            self.arns[name] = made["stateMachineArn"]
        text = json.dumps(content)
        assert len(text) <= 256 << 10
        execution = self.client.start_execution(stateMachineArn=self.arns[name], input=text, name=uuid4().hex)["executionArn"]
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            found = self.client.describe_execution(executionArn=execution)
            if found["status"] != "RUNNING":
                break
            time.sleep(0.02)
        answer = {key: found[key] for key in ("status", "error", "cause") if key in found}
        return answer | ({"output": json.loads(found["output"])} if "output" in found else {})


@contextmanager
def machines(store: ObjectStore, **settings: Any) -> Iterator[Machines]:
    """A region whose functions work on a store. `functions` may be exchanged for others between executions."""

    def invoke(self: Any, function_name: str, qualifier: Any, body: Any, headers: Any, response_headers: dict[str, str]) -> bytes:
        name = next(part for part in reversed(function_name.split(":")) if part in FUNCTIONS)
        try:
            return json.dumps(region[0].functions(name, json.loads(body or "null"))).encode()
        except Exception as error:
            short = portable(error)
            response_headers["x-amz-function-error"] = "Unhandled"
            return json.dumps({"errorType": type(short).__name__, "errorMessage": str(short)}).encode()

    region: list[Machines] = []
    config = {"stepfunctions": {"execute_state_machine": True}, "lambda": {"use_docker": False}}
    keys = {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_DEFAULT_REGION": REGION}
    with mock.patch.dict("os.environ", keys), mock.patch.object(LambdaSimpleBackend, "invoke", invoke), _region(config):
        region.append(Machines(Lambda(store, **settings)))
        try:
            yield region[0]
        finally:
            region[0].functions.close()


@contextmanager
def _region(config: Any) -> Iterator[None]:
    """moto's mock_aws, but leaving its state alone: the S3 server of the tests lives in the same process and would lose its bucket."""
    mocked = mock_aws(config=config)
    mocked.start(reset=False)
    try:
        yield
    finally:
        mocked.stop(remove_data=False)
