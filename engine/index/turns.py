"""Many of something, some at a time: what is asked for together bounds both the requests in flight and the memory of their answers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TypeVar

T = TypeVar("T")


def in_turns(items: Sequence[T], at_once: int) -> Iterator[Sequence[T]]:
    """Slices of at most `at_once` items, in order. (itertools.batched is of Python 3.12.)"""
    return (items[start : start + at_once] for start in range(0, len(items), at_once))
