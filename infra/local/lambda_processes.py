"""LocalStack 4.14.0 without containers: each Lambda environment is a process under AWS's own runtime emulator. Run by stepfunctions.py.

LocalStack starts functions through an executor; ours starts `aws-lambda-rie` and `awslambdaric`, which are what Lambda itself is tested with. Two things are put in
place before LocalStack is imported: that executor, and a listener that binds loopback only (the original binds every interface, whatever GATEWAY_LISTEN says).

    TARTAN_LOCAL_RIE    the emulator, from the aws-sam-cli wheel (samcli/local/rapid)
    TARTAN_LOCAL_PYTHON Python 3.13 with awslambdaric
    TARTAN_LOCAL_CODE   the functions' content (make build/lambda-x86_64/.stamp ARCH=x86_64); the archives given to LocalStack are empty
    TARTAN_LOCAL_LOGS   folder for the functions' output
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

from localstack.services.lambda_.invocation import runtime_executor
from localstack.services.lambda_.invocation.lambda_models import InvocationResult
from localstack.services.lambda_.invocation.runtime_executor import RuntimeExecutor
from twisted.internet import endpoints

START_S = 20.0


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class ProcessExecutor(RuntimeExecutor):
    """One Lambda environment. The emulator takes one invocation at a time; LocalStack starts another environment for the next."""

    def start(self, env_vars: dict[str, str]) -> None:
        self._turn = threading.Lock()
        version = self.function_version
        self._port, runtime_port = free_port(), free_port()
        code = os.environ["TARTAN_LOCAL_CODE"]
        own = {name: str(value) for name, value in env_vars.items() if value is not None}
        own |= {"PYTHONPATH": code, "LAMBDA_TASK_ROOT": code, "AWS_LAMBDA_FUNCTION_NAME": version.id.function_name}
        own |= {
            "AWS_LAMBDA_FUNCTION_TIMEOUT": str(version.config.timeout),
            "AWS_LAMBDA_FUNCTION_MEMORY_SIZE": str(version.config.memory_size),
        }
        emulator = [os.environ["TARTAN_LOCAL_RIE"], "--log-level", "error"]
        emulator += [
            "--runtime-interface-emulator-address",
            f"127.0.0.1:{self._port}",
            "--runtime-api-address",
            f"127.0.0.1:{runtime_port}",
        ]
        command = [*emulator, os.environ["TARTAN_LOCAL_PYTHON"], "-m", "awslambdaric", version.config.handler]
        self._log = (Path(os.environ["TARTAN_LOCAL_LOGS"]) / f"{version.id.function_name}-{self.id}.log").open("wb")
        self._process = subprocess.Popen(command, env={**os.environ, **own}, cwd=code, stdout=self._log, stderr=subprocess.STDOUT)
        deadline = time.monotonic() + START_S
        while time.monotonic() < deadline:
            try:
                socket.create_connection(("127.0.0.1", self._port), 0.2).close()
                return
            except OSError:
                time.sleep(0.05)
        raise TimeoutError("the runtime emulator did not start")

    def stop(self) -> None:
        self._process.terminate()
        self._process.wait(5)
        self._log.close()

    def get_address(self) -> str:
        return "127.0.0.1"

    def get_endpoint_from_executor(self) -> str:
        return "127.0.0.1"

    def get_runtime_endpoint(self) -> str:
        return ""

    def invoke(self, payload: dict[str, str]) -> InvocationResult:
        url = f"http://127.0.0.1:{self._port}/2015-03-31/functions/function/invocations"
        request = urllib.request.Request(url, data=payload["payload"].encode())
        with self._turn:
            try:
                with urllib.request.urlopen(request, timeout=900) as answer:
                    body = answer.read()
            except (urllib.error.URLError, ConnectionError) as error:
                body = json.dumps({"errorType": "Lambda.Unknown", "errorMessage": f"the environment died: {error}"}).encode()
        body, failed = _judged(body)
        return InvocationResult(request_id=payload["invoke-id"], payload=body, is_error=failed, logs="")

    def get_logs(self) -> str:
        return ""

    @classmethod
    def prepare_version(cls, function_version: Any) -> None:
        function_version.config.code.prepare_for_execution()

    @classmethod
    def cleanup_version(cls, function_version: Any) -> None:
        pass


def _judged(body: bytes) -> tuple[bytes, bool]:
    """The emulator answers 200 to everything: an error is an object that says so, a time-out is text."""
    try:
        answer = json.loads(body)
    except ValueError:
        return json.dumps({"errorType": "Sandbox.Timedout", "errorMessage": body.decode(errors="replace")}).encode(), True
    return body, isinstance(answer, dict) and {"errorMessage", "errorType"} <= set(answer)


class LoopbackEndpoint(endpoints.TCP4ServerEndpoint):
    def __init__(self, reactor: Any, port: int, backlog: int = 50, interface: str = "") -> None:
        super().__init__(reactor, port, backlog, interface or "127.0.0.1")


if __name__ == "__main__":
    runtime_executor.get_runtime_executor = lambda: ProcessExecutor
    endpoints.TCP4ServerEndpoint = LoopbackEndpoint
    from localstack.runtime.main import main

    main()
