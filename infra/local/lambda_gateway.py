"""The function on this machine, as behind an HTTP API: a gateway on a port, AWS's own runtime emulator behind it, the handler in that.

    client -> this gateway (HTTP to API Gateway v2 events and back) -> aws-lambda-rie -> awslambdaric -> handler.lambda_http.handler

It stands in for `sam local start-api` where no container engine is at hand: `make lambda-local`. The emulator ships in the wheel of
aws-sam-cli (samcli/local/rapid); it is looked for in TARTAN_RIE, on PATH, and in the installation of the `sam` on PATH. It runs one
invocation at a time and panics at a second one, so each emulator is one execution environment, and --environments starts several:
as in AWS, each has a process, caches and a /tmp share of its own, and the gateway gives a request to whichever is free.

Not emulated: throttling, authorizers, billing, the freeze between invocations. Limits that are: 10 MB a request, 6 MB an event, the
function's time.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import http.client
import json
import os
import platform
import queue
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent
HANDLER = "handler.lambda_http.handler"
MAX_REQUEST_BYTES = 10 << 20
MAX_EVENT_BYTES = 6_291_456
START_S = 60.0
TEXT_TYPES = ("text/", "application/json", "application/javascript", "application/xml")
"""What an HTTP API passes on as text; everything else comes in base64."""


def find_emulator() -> str | None:
    """Path of the emulator's binary, None if there is none on this machine."""
    name = f"aws-lambda-rie-{'arm64' if platform.machine() in ('aarch64', 'arm64') else 'x86_64'}"
    candidates = [os.environ.get("TARTAN_RIE"), shutil.which("aws-lambda-rie"), shutil.which(name)]
    own = Path(__file__).resolve().parents[2] / "build/venv-sam/bin/sam"  # of make sam-validate
    if sam := shutil.which("sam") or (str(own) if own.exists() else None):
        candidates += [
            str(path) for path in Path(sam).resolve().parent.parent.glob(f"lib/python3*/site-packages/samcli/local/rapid/{name}")
        ]
    return next((path for path in candidates if path and os.access(path, os.X_OK)), None)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class FunctionError(Exception):
    """The function raised, died or ran out of time; the message is Lambda's JSON."""


class Emulator:
    """One execution environment: the emulator, and in it Python with the handler from the first invocation on.

    environment  variables of the function; of this process's own, those that name no AWS and no Tartan thing are passed on
    """

    def __init__(
        self,
        binary: str,
        environment: dict[str, str],
        *,
        memory_mb: int = 2048,
        timeout_s: int = 30,
        handler: str = HANDLER,
        log: Any = None,
    ) -> None:
        self.port = free_port()
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(("AWS_", "TARTAN_"))}
        own = {
            "PYTHONPATH": str(ROOT),
            "OPENBLAS_NUM_THREADS": "1",
            "AWS_LAMBDA_FUNCTION_MEMORY_SIZE": str(memory_mb),
            "AWS_LAMBDA_FUNCTION_TIMEOUT": str(timeout_s),
            "AWS_LAMBDA_FUNCTION_NAME": "tartan",
        }
        command = [
            binary,
            "--runtime-interface-emulator-address",
            f"127.0.0.1:{self.port}",
            "--runtime-api-address",
            f"127.0.0.1:{free_port()}",
        ]
        self.process = subprocess.Popen(
            [*command, sys.executable, "-m", "awslambdaric", handler],
            env=inherited | own | environment,
            cwd=ROOT,
            stdout=log or subprocess.DEVNULL,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        self._turn = threading.Lock()
        self._wait_until_listening()

    def _wait_until_listening(self) -> None:
        deadline = time.monotonic() + START_S
        while True:
            try:
                socket.create_connection(("127.0.0.1", self.port), timeout=1).close()
                return
            except OSError:
                if time.monotonic() > deadline or self.process.poll() is not None:
                    self.close()
                    raise RuntimeError("the runtime emulator does not listen") from None
                time.sleep(0.02)

    def invoke(self, event: dict[str, Any]) -> Any:
        """The handler's answer to one event; others wait their turn. FunctionError if it has none."""
        body = json.dumps(event).encode()
        with self._turn:
            connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=900)
            try:
                connection.request("POST", "/2015-03-31/functions/function/invocations", body, {"Content-Type": "application/json"})
                text = connection.getresponse().read().decode()
            finally:
                connection.close()
        try:
            answer = json.loads(text)
        except ValueError:
            raise FunctionError(text) from None
        if not isinstance(answer, dict) or "errorMessage" in answer:
            raise FunctionError(text)
        return answer

    def runtime_pids(self) -> list[int]:
        """Processes of the Python runtime inside; the emulator starts it at the first invocation."""
        listed = [path.read_text() for path in Path(f"/proc/{self.process.pid}/task").glob("*/children")]
        return [int(pid) for pids in listed for pid in pids.split()]

    def close(self) -> None:
        """End the emulator and what it started, which is in a process group of its own."""
        with contextlib.suppress(FileNotFoundError):
            for pid in self.runtime_pids():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, 9)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, 9)
        self.process.wait()


def event_of(method: str, target: str, headers: dict[str, str], body: bytes, source_ip: str) -> dict[str, Any]:
    """An HTTP API's event (payload format 2.0) of a request. target: path and query as they came."""
    path, _, query = target.partition("?")
    content_type = headers.get("content-type", "")
    is_text = not body or any(content_type.startswith(kind) for kind in TEXT_TYPES)
    cookies = [cookie.strip() for cookie in headers.pop("cookie", "").split(";") if cookie.strip()]
    http = {"method": method, "path": path, "protocol": "HTTP/1.1", "sourceIp": source_ip, "userAgent": headers.get("user-agent", "")}
    event: dict[str, Any] = {
        "version": "2.0",
        "routeKey": "$default",
        "rawPath": path,
        "rawQueryString": query,
        "headers": headers,
        "requestContext": {
            "accountId": "000000000000",
            "apiId": "local",
            "domainName": headers.get("host", "localhost"),
            "http": http,
            "requestId": uuid.uuid4().hex[:16],
            "routeKey": "$default",
            "stage": "$default",
            "timeEpoch": int(time.time() * 1000),
        },
        "isBase64Encoded": not is_text,
    }
    if cookies:
        event["cookies"] = cookies
    if body:
        event["body"] = body.decode() if is_text else base64.b64encode(body).decode()
    return event


class _Request(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Gateway

    def _serve(self) -> None:
        n_bytes = int(self.headers.get("content-length") or 0)
        if n_bytes > MAX_REQUEST_BYTES:
            self.close_connection = True
            self._send(413, {"content-type": "application/json"}, b'{"message":"Request Entity Too Large"}')
            return
        body = self.rfile.read(n_bytes)
        headers = {name.lower(): value for name, value in self.headers.items()}
        event = event_of(self.command, self.path, headers, body, self.client_address[0])
        if len(json.dumps(event)) > MAX_EVENT_BYTES:
            self._send(413, {"content-type": "application/json"}, b'{"message":"Request Entity Too Large"}')
            return
        try:
            answer = self.server.invoke(event)
        except FunctionError as error:
            print(f"function error: {error}", file=sys.stderr)
            self._send(500, {"content-type": "application/json"}, b'{"message":"Internal Server Error"}')
            return
        text = answer.get("body") or ""
        payload = base64.b64decode(text) if answer.get("isBase64Encoded") else text.encode()
        self._send(answer["statusCode"], answer.get("headers") or {}, payload, answer.get("cookies") or [])

    do_GET = do_POST = do_PUT = do_DELETE = do_OPTIONS = do_PATCH = _serve

    def _send(self, status: int, headers: dict[str, str], body: bytes, cookies: list[str] | None = None) -> None:
        self.send_response(status)
        for name, value in headers.items():
            if name.lower() not in ("content-length", "connection"):
                self.send_header(name, value)
        for cookie in cookies or []:
            self.send_header("Set-Cookie", cookie)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """The function logs each request itself."""


class Gateway(ThreadingHTTPServer):
    """The gateway before some environments. A request waits until one is free, as the 1001st would wait in AWS."""

    daemon_threads = True

    def __init__(self, emulators: list[Emulator], port: int = 0, host: str = "127.0.0.1") -> None:
        self._free: queue.LifoQueue[Emulator] = queue.LifoQueue()
        for emulator in emulators:
            self._free.put(emulator)
        super().__init__((host, port), _Request)
        self.url = f"http://{host}:{self.server_port}"

    def invoke(self, event: dict[str, Any]) -> dict[str, Any]:
        emulator = self._free.get()
        try:
            return dict(emulator.invoke(event))
        finally:
            self._free.put(emulator)


@contextlib.contextmanager
def gateway(environment: dict[str, str], *, n_environments: int = 1, port: int = 0, **more: Any) -> Iterator[Gateway]:
    """A gateway for the time of the block. RuntimeError if there is no emulator."""
    binary = find_emulator()
    if binary is None:
        raise RuntimeError(
            "no aws-lambda-rie: pip install aws-sam-cli in an environment of its own and put its bin folder on PATH, or set TARTAN_RIE"
        )
    emulators: list[Emulator] = []
    try:
        for _ in range(n_environments):
            emulators.append(Emulator(binary, environment, **more))
        serving = Gateway(emulators, port)
        thread = threading.Thread(target=serving.serve_forever, daemon=True)
        thread.start()
        try:
            yield serving
        finally:
            serving.shutdown()
            serving.server_close()
            thread.join()
    finally:
        for emulator in emulators:
            emulator.close()


def main() -> None:
    parser = argparse.ArgumentParser(description="serve the Lambda function on this machine, through AWS's runtime emulator")
    parser.add_argument("--port", type=int, default=3000)
    parser.add_argument("--environments", type=int, default=1, help="execution environments: requests that can run at once")
    parser.add_argument("--memory-mb", type=int, default=2048, help="what the function is told that it has")
    parser.add_argument("--timeout-s", type=int, default=30, help="the function's time limit")
    own = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    passed = {name: value for name, value in os.environ.items() if name.startswith(("TARTAN_", "AWS_"))}
    try:
        with gateway(
            passed, n_environments=own.environments, port=own.port, memory_mb=own.memory_mb, timeout_s=own.timeout_s, log=sys.stdout
        ) as serving:
            print(f"the function is served on {serving.url}; Ctrl-C ends it", flush=True)
            threading.Event().wait()
    except KeyboardInterrupt:
        pass
    except RuntimeError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
