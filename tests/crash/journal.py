"""What a process meant to do and what it was told: a line of JSON before each call and one after it, each in one write.

A line is in the kernel when os.write returns, so the journal of a killed process is whole except for the call it was in. Times are of
the machine's monotonic clock, which all processes share.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

REFUSED = "refused"
"""The outcome of a call that was told, definitely, that it changed nothing."""
UNKNOWN = "unknown"


@dataclass
class Call:
    """One call: `outcome` is "done", REFUSED or UNKNOWN (also when the process died before it knew)."""

    kind: str
    index: str
    began_s: float
    args: dict[str, Any]
    outcome: str = UNKNOWN
    ended_s: float = float("inf")
    result: Any = None
    error: str = ""


@dataclass
class Told:
    """The journals of all processes: calls in no order, things that a process found wrong, and counts."""

    calls: list[Call] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=dict)


class Journal:
    """One process's journal."""

    def __init__(self, folder: Path, name: str) -> None:
        self._file = os.open(folder / f"{name}-{os.getpid()}.jsonl", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        self._n_calls = 0

    def _line(self, **facts: Any) -> None:
        os.write(self._file, json.dumps({"at": time.monotonic(), **facts}).encode() + b"\n")

    def begin(self, kind: str, index: str, **args: Any) -> int:
        self._n_calls += 1
        self._line(call=self._n_calls, kind=kind, index=index, args=args)
        return self._n_calls

    def end(self, call: int, outcome: str, result: Any = None, error: str = "") -> None:
        self._line(end=call, outcome=outcome, result=result, error=error)

    def wrong(self, text: str) -> None:
        self._line(wrong=text)

    def count(self, what: str) -> None:
        self._line(count=what)


def read_all(folder: Path) -> Told:
    told = Told()
    for path in sorted(folder.glob("*.jsonl")):
        calls: dict[int, Call] = {}
        for line in _lines(path):
            if "call" in line:
                calls[line["call"]] = Call(line["kind"], line["index"], line["at"], line["args"])
            elif "end" in line:
                call = calls[line["end"]]
                call.outcome, call.ended_s, call.result, call.error = line["outcome"], line["at"], line["result"], line["error"]
            elif "wrong" in line:
                told.wrong.append(f"{path.stem}: {line['wrong']}")
            else:
                told.counts[line["count"]] = told.counts.get(line["count"], 0) + 1
        told.calls.extend(calls.values())
    return told


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    for line in path.read_bytes().split(b"\n")[:-1]:
        yield json.loads(line)
