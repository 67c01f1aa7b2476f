"""A process that tries inputs of one target for a while, and what it leaves behind: a record of counts, or of a finding.

The runner starts it, waits a bounded time, and reads the record; an input that hangs or kills the process is then known too, because
it is written down before it is tried.
"""

from __future__ import annotations

import argparse
import mmap
import os
import sys
import time
import traceback
from pathlib import Path
from typing import Any, NoReturn

import msgspec

INPUT_BYTES = 1 << 20


class Outcome(msgspec.Struct):
    """Inputs tried, taken and refused; the finding, if there was one, as text."""

    target: str
    engine: str
    n_inputs: int = 0
    n_accepted: int = 0
    seconds: float = 0.0
    finding: str = ""


def arguments() -> Any:
    parser = argparse.ArgumentParser(prog="tests.fuzz worker")
    parser.add_argument("--target", required=True)
    parser.add_argument("--engine", required=True)
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--folder", type=Path, required=True)
    return parser.parse_args()


class Record:
    """Counts of one process, and the input that is being tried, in files of `folder`."""

    def __init__(self, work: Any) -> None:
        self.outcome = Outcome(work.target, work.engine)
        self._folder: Path = work.folder
        self._began_s = time.process_time()
        self._seconds: float = work.seconds
        with open(self._folder / "trying", "wb+") as file:
            file.truncate(INPUT_BYTES + 8)
            self._trying = mmap.mmap(file.fileno(), INPUT_BYTES + 8)

    def trying(self, data: bytes) -> None:
        kept = data[:INPUT_BYTES]
        self._trying[: 8 + len(kept)] = len(kept).to_bytes(8, "little") + kept

    def tried(self, data: bytes, accepted: bool) -> None:
        self.outcome.n_inputs += 1
        self.outcome.n_accepted += accepted

    def found(self, error: BaseException) -> None:
        self.outcome.finding = "".join(traceback.format_exception(error))[-6000:]

    def is_over(self) -> bool:
        """By processor time: a machine that is busy or stopped tries as much as an idle one."""
        return time.process_time() - self._began_s > self._seconds

    def write(self) -> None:
        self.outcome.seconds = time.process_time() - self._began_s
        (self._folder / "outcome.json").write_bytes(msgspec.json.encode(self.outcome))


def input_being_tried(folder: Path) -> bytes:
    data = (folder / "trying").read_bytes() if (folder / "trying").exists() else bytes(8)
    return data[8 : 8 + int.from_bytes(data[:8], "little")]


def leave(record: Record) -> NoReturn:
    """End the process at once: libFuzzer has handlers of its own at exit."""
    record.write()
    sys.stdout.flush()
    os._exit(1 if record.outcome.finding else 0)


def main() -> None:
    """The process that draws its inputs with hypothesis."""
    from . import drawn, target
    from .table import TARGETS

    work = arguments()
    record = Record(work)
    judge = target.judge

    def noted(tried: target.Target, data: bytes) -> bool:
        record.trying(data)
        return judge(tried, data)

    drawn.judge = noted
    try:
        drawn.run(TARGETS[work.target], work.seconds, work.seed * 1_000_000, record.tried)
    except BaseException as error:
        record.found(error)
    leave(record)


if __name__ == "__main__":
    main()
