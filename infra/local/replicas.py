"""The replicated pattern on one machine without a container engine: nginx, three servers over one store, S3 over HTTP.

    make replicas                               on 127.0.0.1:8080, until Ctrl-C; an S3 server of its own, in memory
    make replicas STORE=s3://bucket/prefix      on a bucket, with the usual AWS_* variables

The same files as in compose.yaml: infra/nginx.conf with everything that it includes, but for addresses and the flags' folder. A server
that dies is started again. Signals to the process make the changes that docs/production.md describes:

    SIGHUP    rolling update: every server is replaced, the writer's role moves, no request fails
    SIGUSR1   blue-green: a green set is started, tried (`tartan smoke`), and gets all requests
    SIGUSR2   back to the blue set

Callers: the Makefile, tests/test_replicas.py. Not for production: one machine, and the S3 server forgets.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
INFRA = ROOT / "infra"
START_S = 180.0
SETTLE_S = 0.3
"""Between leaving a replica out and stopping it: requests that were on their way to it arrive."""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@dataclass
class Server:
    """One `tartan serve` in a process of its own."""

    name: str
    port: int
    environment: Mapping[str, str]
    log: Path
    process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def is_read_only(self) -> bool:
        return self.environment.get("TARTAN_READ_ONLY") == "true"

    def start(self, **changed: str) -> None:
        """Start it, with some variables changed from last time."""
        self.environment = {**self.environment, **changed}
        with self.log.open("ab") as log:
            command = [sys.executable, "-m", "handler.cli", "serve", "--host", "127.0.0.1", "--port", str(self.port)]
            self.process = subprocess.Popen(command, env=dict(self.environment), cwd=ROOT, stdout=log, stderr=subprocess.STDOUT)

    def wait_until_ready(self) -> None:
        deadline = time.monotonic() + START_S
        while time.monotonic() < deadline and self.process is not None and self.process.poll() is None:
            if status_of(self.port, "/readyz") == 200:
                return
            time.sleep(0.05)
        raise RuntimeError(f"server {self.name} did not start:\n{self.log.read_text(errors='replace')[-4000:]}")

    def end(self, how: signal.Signals = signal.SIGTERM) -> int:
        """Send a signal, wait, return the exit code."""
        assert self.process is not None
        if self.process.poll() is None:
            self.process.send_signal(how)
        return self.process.wait(180)


def status_of(port: int, path: str) -> int | None:
    """The status of a GET, None if nobody answers."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    try:
        connection.request("GET", path)
        return connection.getresponse().status
    except (OSError, http.client.HTTPException):
        return None
    finally:
        connection.close()


@dataclass
class Balancer:
    """nginx over some servers. `folder` gets infra's own files with the addresses of this machine, and nginx's logs.

    variant  the file of infra/ that it runs: nginx.conf, nginx-tls.conf or nginx-basic.conf
    flags    the folder whose files decide where requests go (infra/nginx/servers.conf)
    """

    folder: Path
    servers: Mapping[str, Server]
    flags: Path
    port: int = field(default_factory=free_port)
    variant: str = "nginx.conf"
    green: Server | None = None
    process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"{'http' if self.variant == 'nginx.conf' else 'https'}://127.0.0.1:{self.port}"

    def start(self) -> None:
        self.configure()
        with (self.folder / "nginx.log").open("ab") as log:
            self.process = subprocess.Popen([nginx(), *self.arguments()], stdout=log, stderr=subprocess.STDOUT)
        deadline = time.monotonic() + START_S
        while not _listens(self.port):
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"nginx did not start:\n{(self.folder / 'nginx.log').read_text()}")
            time.sleep(0.02)

    def stop(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(signal.SIGQUIT)
            self.process.wait(180)

    def arguments(self) -> list[str]:
        user = "user root; " if os.geteuid() == 0 else ""
        return ["-p", f"{self.folder}/", "-c", str(self.folder / self.variant), "-g", f"{user}daemon off;"]

    def configure(self) -> None:
        target = self.folder / "nginx"
        target.mkdir(parents=True, exist_ok=True)
        for path in (INFRA / "nginx").glob("*.conf"):
            (target / path.name).write_text(path.read_text().replace("/dev/stdout", "access.log"))
        servers = (INFRA / "nginx" / "servers.conf").read_text().replace("/run/tartan/flags", str(self.flags))
        for name, server in self.servers.items():
            servers = servers.replace(f"server {name}:8080", f"server 127.0.0.1:{server.port}")
        if self.green is not None:
            servers += (INFRA / "nginx" / "green.conf").read_text().replace("green:8080", f"127.0.0.1:{self.green.port}")
        (target / "servers.conf").write_text(servers)
        text = re.sub(r"listen (8080|8443)", f"listen 127.0.0.1:{self.port}", (INFRA / self.variant).read_text())
        (self.folder / self.variant).write_text(text.replace("worker_processes auto", "worker_processes 2"))

    def reload(self) -> None:
        """Take over a changed configuration. Connections that wait for their next request are closed, so rolling does without."""
        assert self.process is not None
        self.configure()
        self.process.send_signal(signal.SIGHUP)
        time.sleep(1.0)


def nginx() -> str:
    """The program; Debian has it outside an ordinary user's path. FileNotFoundError without it."""
    found = shutil.which("nginx", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/local/sbin")
    if found is None:
        raise FileNotFoundError("nginx is needed: apt-get install nginx-light")
    return found


@dataclass
class Replicas:
    """nginx and three servers; `folder` holds configuration, flags and logs.

    store        where indices lie, given to every server
    environment  more variables for every server: credentials, settings
    sharded      the three score a share of every search each (TARTAN_FANOUT_PEERS), however small the index
    """

    folder: Path
    store: str
    environment: Mapping[str, str] = field(default_factory=dict)
    sharded: bool = False
    port: int = field(default_factory=free_port)
    drain_s: float = 0.2
    servers: dict[str, Server] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.flags = self.folder / "flags"
        self.balancer = Balancer(self.folder, self.servers, self.flags, self.port)
        self.url = self.balancer.url

    # Starting and ending

    def __enter__(self) -> Replicas:
        try:
            self.start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        self.stop()

    def start(self) -> None:
        self.flags.mkdir(parents=True, exist_ok=True)
        for flag in self.flags.iterdir():
            flag.unlink()
        for name in "abc":
            self.servers[name] = self._server(name, read_only=name != "a")
        shards = {"TARTAN_FANOUT_PEERS": ",".join(server.url for server in self.servers.values()), "TARTAN_FANOUT_BYTES": "0"}
        for server in self.servers.values():
            server.start(**(shards if self.sharded else {}))
        for server in self.servers.values():
            server.wait_until_ready()
        self.balancer.start()

    def stop(self) -> None:
        self.balancer.stop()
        known = [*self.servers.values(), *filter(None, [self.balancer.green])]
        running = [server.process for server in known if server.process is not None]
        for process in running:
            process.send_signal(signal.SIGINT)  # no drain: nobody asks any more
        for process in running:
            process.wait(180)

    def _server(self, name: str, *, read_only: bool) -> Server:
        inherited = {variable: value for variable, value in os.environ.items() if not variable.startswith("TARTAN_")}
        own = {
            "PYTHONPATH": str(ROOT),
            "OPENBLAS_NUM_THREADS": "1",
            "TARTAN_INDEX_DIR": self.store,
            "TARTAN_DRAIN_S": str(self.drain_s),
            "TARTAN_TRUST_PROXY": "true",
            "TARTAN_READ_ONLY": str(read_only).lower(),
        }
        return Server(name, free_port(), {**inherited, **own, **self.environment}, self.folder / f"{name}.log")

    def flag(self, name: str, *, up: bool) -> None:
        """Raise or lower a flag, and give requests that are on their way the time to arrive."""
        if up:
            (self.flags / name).touch()
        else:
            (self.flags / name).unlink(missing_ok=True)
        time.sleep(SETTLE_S)

    # Updates

    def restart(self, name: str, **changed: str) -> None:
        """Replace one server while the others serve."""
        server = self.servers[name]
        self.flag(f"down-{name}", up=True)
        code = server.end()
        if code != 0:
            raise RuntimeError(f"server {name} ended with {code}")
        server.start(**changed)
        server.wait_until_ready()
        self.flag(f"down-{name}", up=False)

    def roll(self) -> None:
        """Replace all three. The second server becomes a writer before the first stops being one: there always is one."""
        is_moved = (self.flags / "write-b").exists()
        writer, other = ("b", "a") if is_moved else ("a", "b")
        self.restart(other, TARTAN_READ_ONLY="false")
        self.flag("write-b", up=not is_moved)
        self.restart(writer, TARTAN_READ_ONLY="true")
        self.restart("c")

    def start_green(self) -> str:
        """A new set beside the old one, known to nginx, not asked yet. One server here; its URL is returned, to be tried."""
        green = self._server("green", read_only=False)
        green.start()
        self.balancer.green = green
        green.wait_until_ready()
        self.balancer.reload()
        return green.url

    def switch(self, *, green: bool) -> None:
        """All requests that come from now on go to one set. Takes effect at once, back as well as forth."""
        self.flag("green", up=green)

    def end_green(self) -> None:
        assert self.balancer.green is not None
        self.switch(green=False)
        self.balancer.green.end()
        self.balancer.green = None

    def revive(self) -> list[str]:
        """Start again what has died; the names of those."""
        dead = [server for server in self.servers.values() if server.process is not None and server.process.poll() is not None]
        for server in dead:
            server.start()
        return [server.name for server in dead]


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


# As a program


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--port", type=int, default=8080)
    parser.add_argument("--folder", type=Path, default=ROOT / "data" / "replicas", help="configuration, flags, logs")
    parser.add_argument("--store", default="", help="s3://bucket/prefix or a directory; otherwise an S3 server in memory")
    parser.add_argument("--model", default="hashing")
    parser.add_argument("--sharded", action="store_true", help="every search is scored by all three together")
    options = parser.parse_args()
    try:
        nginx()
    except FileNotFoundError as error:
        print(error, file=sys.stderr)
        return 2
    environment = {"TARTAN_MODEL": options.model}
    store = options.store or "s3://tartan/indices"
    asked: list[signal.Signals] = []
    for number in (signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM):
        signal.signal(number, lambda sent, frame: asked.append(signal.Signals(sent)))
    options.folder.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(KeyboardInterrupt), contextlib.ExitStack() as stack:
        if not options.store:
            environment |= stack.enter_context(local_s3())
        replicas = stack.enter_context(Replicas(options.folder.resolve(), store, environment, sharded=options.sharded, port=options.port))
        _say(replicas, store, environment)
        stack.callback((options.folder / "running.json").unlink)
        _supervise(replicas, asked)
    return 0


def _say(replicas: Replicas, store: str, environment: Mapping[str, str]) -> None:
    """Where everything is, also as a file for other programs."""
    servers = {server.name: server.url for server in replicas.servers.values()}
    facts = {"pid": os.getpid(), "url": replicas.url, "store": store, "s3": environment.get("TARTAN_S3_ENDPOINT"), "servers": servers}
    (replicas.folder / "running.json").write_text(json.dumps(facts, indent=1) + "\n")
    print(json.dumps(facts), flush=True)


def _supervise(replicas: Replicas, asked: list[signal.Signals]) -> None:
    """Until SIGTERM."""
    while True:
        time.sleep(0.2)
        for name in replicas.revive():
            print(f"server {name} died and was started again", flush=True)
        if not asked:
            continue
        wish = asked.pop(0)
        if wish == signal.SIGTERM:
            return
        if wish == signal.SIGHUP:
            replicas.roll()
            print("rolled", flush=True)
        elif wish == signal.SIGUSR1:
            _go_green(replicas)
        elif replicas.balancer.green is not None:
            replicas.end_green()
            print("back on blue", flush=True)


def _go_green(replicas: Replicas) -> None:
    if replicas.balancer.green is not None:
        return
    url = replicas.start_green()
    tried = subprocess.run([sys.executable, "-m", "handler.cli", "smoke", url], cwd=ROOT, check=False)
    if tried.returncode:
        replicas.end_green()
        print("green failed its smoke test; blue goes on", flush=True)
        return
    replicas.switch(green=True)
    print("green serves", flush=True)


@contextlib.contextmanager
def local_s3() -> Iterator[dict[str, str]]:
    """The S3 server of the tests in a process of its own, with an empty bucket `tartan`; the variables with which servers reach it."""
    process = subprocess.Popen([sys.executable, str(INFRA / "local" / "s3.py")], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        url = process.stdout.readline().strip()
        yield {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_REGION": "us-east-1", "TARTAN_S3_ENDPOINT": url}
    finally:
        process.terminate()
        process.wait()


if __name__ == "__main__":
    sys.exit(main())
