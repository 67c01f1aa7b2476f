"""A target: one decoder, what it may do with bytes, and how an input is judged.

A target's `run` takes an input and returns True if the decoder took it, False if it refused it as documented (an EngineError of the
right kind, an HTTP answer below 500 in the contract's form). Anything else that it raises is a finding: another exception, or Wrong,
where what was taken does not come back equal. `judge` adds the bounds on time and memory.
"""

from __future__ import annotations

import resource
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from random import Random
from typing import Any

from engine.errors import CorruptData, EngineError, UnsupportedFormat
from handler.problems import Problem

from .mutation import mutated

MAX_CPU_S = 5.0
"""Of one input: far above what any takes. Processor time, so that a busy machine finds nothing."""
MAX_GROWTH_BYTES = 192 << 20
MAX_GROWTH_FACTOR = 64
"""Resident memory may rise by this much, plus this many times the input, while one input is at work. 64: a line of JSON with a number in
two bytes becomes a Python float in a list (32) and two arrays."""


class Wrong(AssertionError):
    """The decoder took the input and what it says of it is wrong."""


def is_equal(found: object, expected: object, what: str) -> None:
    if found != expected:
        raise Wrong(f"{what}: {str(found)[:300]} and not {str(expected)[:300]}")


@dataclass(frozen=True)
class Target:
    """name   of `--target`
    what   is decoded, in words
    run    see the module's head
    seeds  made when first needed: inputs that the decoder takes, or nearly
    tokens of the input's language, for mutations
    mutate (input, random numbers, other seeds, tokens) -> input
    """

    name: str
    what: str
    run: Callable[[bytes], bool]
    make_seeds: Callable[[], Sequence[bytes]]
    tokens: tuple[bytes, ...] = ()
    mutate: Callable[[bytes, Random, Sequence[bytes], Sequence[bytes]], bytes] = mutated
    ignored_warnings: tuple[str, ...] = field(default=())

    @cached_property
    def seeds(self) -> tuple[bytes, ...]:
        return tuple(self.make_seeds())

    def variant(self, number: int) -> bytes:
        """The mutation of a seed that this number stands for."""
        rng = Random(number)
        data = rng.choice(self.seeds)
        for _ in range(rng.choice((1, 1, 1, 2, 3, 6))):
            data = self.mutate(data, rng, self.seeds, self.tokens)
        return data


def judge(target: Target, data: bytes) -> bool:
    """Run one input within the bounds; what is raised is a finding."""
    peak, began_s = _peak_bytes(), time.process_time()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for message in target.ignored_warnings:
            warnings.filterwarnings("ignore", message=message)
        accepted = target.run(data)
    took_s = time.process_time() - began_s
    if took_s > MAX_CPU_S:
        raise Wrong(f"took {took_s:.1f} s of processor time")
    grown = _peak_bytes() - peak
    if grown > MAX_GROWTH_BYTES + MAX_GROWTH_FACTOR * len(data):
        raise Wrong(f"memory grew by {grown >> 20} MiB over an input of {len(data)} bytes")
    return accepted


def _peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


_open: list[Callable[[], None]] = []


def closed_later(close: Callable[[], None]) -> None:
    """Have something that targets share closed by `close_all`."""
    _open.append(close)


def close_all() -> None:
    """Close what targets have opened; they cannot be used afterwards. For tests, whose warnings are errors."""
    while _open:
        _open.pop()()


# Accepted ways to refuse


def stored(read: Callable[[], Any]) -> tuple[bool, Any]:
    """(True, what was read), or (False, None) if stored bytes were refused: as damage or as another format, never by blaming the caller."""
    try:
        return True, read()
    except (CorruptData, UnsupportedFormat):
        return False, None
    except EngineError as error:
        raise Wrong(f"a reader of stored bytes raises {type(error).__name__} {error.code}") from error


def asked(read: Callable[[], Any]) -> tuple[bool, Any]:
    """(True, answer), or (False, None) if what somebody asked for was refused: an EngineError, or a Problem below 500."""
    try:
        return True, read()
    except Problem as problem:
        if problem.status >= 500 and problem.status != 503:
            raise
        return False, None
    except EngineError:
        return False, None
