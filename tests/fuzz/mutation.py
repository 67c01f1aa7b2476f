"""Mutations: bytes to nearly the same bytes, JSON to nearly the same JSON. Seeded: the same random numbers give the same input."""

from __future__ import annotations

import json
import struct
from collections.abc import Sequence
from random import Random
from typing import Any

MAX_BYTES = 1 << 20
_NUMBERS = (0, 1, 2, 0x7F, 0x80, 0xFF, 0x7FFF, 0x8000, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, (1 << 63) - 1, 1 << 63, (1 << 64) - 1)
_WIDTHS = (("<B", 0xFF), ("<H", 0xFFFF), ("<I", 0xFFFFFFFF), ("<Q", (1 << 64) - 1), (">I", 0xFFFFFFFF))


def mutated(data: bytes, rng: Random, others: Sequence[bytes] = (), tokens: Sequence[bytes] = ()) -> bytes:
    """One change of a byte string."""
    found = bytearray(data)
    at = rng.randrange(len(found) + 1)
    length = rng.choice((1, 1, 2, 4, 8, 16, 64))
    kind = rng.randrange(10)
    if kind == 0 and found:
        at = min(at, len(found) - 1)
        found[at] ^= 1 << rng.randrange(8)
    elif kind == 1 and found:
        found[min(at, len(found) - 1)] = rng.choice((0, 0x7F, 0x80, 0xFF, rng.randrange(256)))
    elif kind in (2, 3):
        form, mask = rng.choice(_WIDTHS)
        word = struct.pack(form, (rng.choice(_NUMBERS) + rng.choice((0, 0, -1, 1))) & mask)
        found[at : at + len(word)] = word
    elif kind == 4:
        del found[at : at + length]
    elif kind == 5:
        found[at:at] = found[at : at + length] * rng.choice((1, 2, 9))
    elif kind == 6:
        found[at:at] = rng.choice(tokens) if tokens else rng.randbytes(length)
    elif kind == 7:
        found[at : at + length] = rng.choice(tokens) if tokens else rng.randbytes(length)
    elif kind == 8:
        del found[at:]
    elif others:
        other = rng.choice(others)
        start = rng.randrange(len(other) + 1)
        found[at : at + length] = other[start : start + rng.choice((length, len(other)))]
    return bytes(found[:MAX_BYTES])


# JSON


_STRANGE: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2, 255, 1 << 31, (1 << 63) - 1, 1 << 63, -(1 << 63) - 1, 1 << 64, 10**30, 10**400),
    *(0.5, -0.0, 1e-320, 1e38, 3e38, 1e308, float("nan"), float("inf"), -1e308),
    *("", " ", "\0", "a\0b", "\ud800", "é", "\u202e", "../..", "a" * 300, "1", "true", "%00", "{}", "=" * 9, "AAAA", "\n", "'", '"'),
    *([], {}, [[]], [None], [0], [1.0], [[0.0]], {"": 0}, {"a": {"b": []}}),
)


def strange_value(rng: Random) -> Any:
    """A JSON value that decoders do not expect."""
    kind = rng.randrange(12)
    if kind == 0:
        value: Any = rng.choice(_STRANGE)
        for _ in range(rng.choice((2, 30, 600))):
            value = [value] if rng.random() < 0.7 else {"a": value}
        return value
    if kind == 1:
        return [rng.choice(_STRANGE)] * rng.choice((2, 17, 1000))
    if kind == 2:
        return "".join(chr(rng.choice((0, 9, 32, 65, 128, 0x3A9, 0xD800, 0x1F600))) for _ in range(rng.randrange(9)))
    return rng.choice(_STRANGE)


def mutated_json(data: bytes, rng: Random, others: Sequence[bytes] = (), tokens: Sequence[bytes] = ()) -> bytes:
    """One change of a JSON text: of its tree if it parses (usually), else, and sometimes, of its bytes."""
    tree = _parsed(data)
    if tree is None or rng.random() < 0.15:
        return mutated(data, rng, others, tokens)
    other = _parsed(rng.choice(others)) if others else None
    return dumped(changed(tree[0], rng, other[0] if other else None, tokens))


def dumped(tree: Any) -> bytes:
    """JSON with unpaired surrogates as escapes, NaN as NaN: what a hostile client would send."""
    try:
        return json.dumps(tree).encode()[:MAX_BYTES]
    except (RecursionError, ValueError):  # too deep; an integer of too many digits
        return b"[" * 2000


def _parsed(data: bytes) -> tuple[Any] | None:
    try:
        return (json.loads(data),)
    except (ValueError, RecursionError):
        return None


def changed(tree: Any, rng: Random, other: Any = None, tokens: Sequence[bytes] = ()) -> Any:
    """The tree with one node changed; the path down to it is copied, the rest shared."""
    if isinstance(tree, dict | list) and tree and rng.random() < 0.85:
        copy: Any = tree.copy()
        place = rng.choice(list(copy) if isinstance(copy, dict) else range(len(copy)))
        kind = rng.randrange(14)
        if kind == 0:
            del copy[place]
        elif kind == 1 and isinstance(copy, list):
            copy[place:place] = [copy[place]] * rng.choice((1, 2, 40))
        elif kind == 1:
            copy[rng.choice(("x", "", "\0", place.upper(), "a" * 300))] = copy[place]
        else:
            copy[place] = changed(copy[place], rng, _below(other, rng), tokens)
        return copy
    if other is not None and rng.random() < 0.3:
        return other
    if isinstance(tree, str) and rng.random() < 0.6:
        return mutated(tree.encode(errors="replace"), rng, (), tokens).decode("latin-1" if rng.random() < 0.2 else "utf-8", "replace")
    if isinstance(tree, int | float) and rng.random() < 0.4:
        return rng.choice((tree + 1, tree - 1, -tree, tree * 2, float(tree) if abs(tree) < 1e300 else 0, str(tree)[:300]))
    return strange_value(rng)


def _below(other: Any, rng: Random) -> Any:
    if isinstance(other, dict | list) and other:
        return rng.choice(list(other.values()) if isinstance(other, dict) else other)
    return other
