"""Start the image's server as its user on a read-only root, without a shell, and ask it; `make image-test`. Needs buildah, and root.

buildah's chroot isolation has no read-only root, so the image is mounted and the parts of a container that matter here are made by hand: a
mount namespace, the root bound read-only, one writable volume, user 10001, no new privileges, the image's own environment and command.
That is not a test of isolation.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path
from typing import Any

SHELLS = ("sh", "bash", "dash", "ash", "busybox")
INSIDE = """
set -e
mount --make-rprivate /
mount --bind "$1" "$1"
mount --rbind /dev "$1/dev"
mount --bind /proc "$1/proc"
mount --bind "$2" "$1$3"
mount --bind /etc/resolv.conf "$1/etc/resolv.conf" 2>/dev/null || true
mount -o remount,ro,bind "$1"
root=$1; shift 3
exec setpriv --no-new-privs /usr/sbin/chroot --userspec=10001:10001 --groups= "$root" "$@"
"""


def out(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


class Container:
    """The mounted image and its volume, a folder of this machine that is its one writable place, at `writable`."""

    def __init__(self, image: str, volume: Path, writable: str = "/var/cache/tartan") -> None:
        self.writable = writable
        self.name = out("buildah", "from", image)
        self.config: dict[str, Any] = json.loads(out("buildah", "inspect", "--type", "container", self.name))["Docker"]["config"]
        self.root, self.volume = Path(out("buildah", "mount", self.name)), volume
        for folder in ("bin", "usr/bin"):
            for shell in SHELLS:
                (self.root / folder / shell).unlink(missing_ok=True)

    def start(self, *command: str, **environment: str) -> subprocess.Popen[bytes]:
        inherited = dict(variable.split("=", 1) for variable in self.config["Env"])
        wrapped = ["unshare", "--mount", "bash", "-c", INSIDE, "container", str(self.root), str(self.volume), self.writable, *command]
        return subprocess.Popen(wrapped, env={"PATH": os.environ["PATH"], **inherited, **environment})

    def run(self, *command: str, **environment: str) -> int:
        return self.start(*command, **environment).wait(120)

    def close(self) -> None:
        out("buildah", "umount", self.name)
        out("buildah", "rm", self.name)


def main(image: str) -> int:
    with tempfile.TemporaryDirectory(dir="/var/tmp") as folder:
        os.chown(folder, 10001, 10001)
        container = Container(image, Path(folder))
        try:
            check_configuration(container.config)
            check_server(container)
        finally:
            container.close()
    print("the image is good")
    return 0


def check_configuration(config: dict[str, Any]) -> None:
    assert config["User"] == "10001:10001", config["User"]
    assert list(config["Volumes"]) == ["/var/cache/tartan"], config["Volumes"]
    assert config["Entrypoint"][0] == "/opt/tartan/bin/python", config["Entrypoint"]
    assert config["Healthcheck"]["Test"][:2] == ["CMD", "/opt/tartan/bin/python"], config["Healthcheck"]


def check_server(container: Container) -> None:
    python = container.config["Entrypoint"][0]
    assert container.run(python, "-c", "import os; assert os.getuid() == 10001") == 0
    assert container.run(python, "-c", "open('/opt/tartan/x', 'w')") != 0, "the root can be written to"
    assert container.run(python, "-c", "import os; os.execv('/bin/sh', ['sh'])") != 0, "there is a shell"
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    own = {"TARTAN_PORT": port, "TARTAN_INDEX_DIR": "/var/cache/tartan/indices", "TARTAN_DRAIN_S": "0.2", "TARTAN_LOG_LEVEL": "warning"}
    server = container.start(*container.config["Entrypoint"], *container.config["Cmd"], **own)
    try:
        wait_until_ready(server, port)
        assert container.run(*container.config["Healthcheck"]["Test"][1:], **own) == 0
        assert container.run(*container.config["Entrypoint"], "smoke", f"http://127.0.0.1:{port}") == 0
    finally:
        server.send_signal(signal.SIGTERM)  # exec all the way down: this is the server itself
        code = server.wait(30)
    assert code == 0, f"the server ended with {code}"
    assert container.run(*container.config["Healthcheck"]["Test"][1:], **own) != 0


def wait_until_ready(server: subprocess.Popen[bytes], port: str) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and server.poll() is None:
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/readyz", timeout=10).close()
            return
        except OSError:
            time.sleep(0.1)
    raise AssertionError("the server did not start")


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
