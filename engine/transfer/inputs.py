"""Many inputs as one build: what lies under a prefix, which source each is, and a sample of all.

    name.jsonl              vectors or texts, see input_kind.py
    name.npz                arrays `tokens` and `doclens`; optionally name.fields.jsonl and name.ids.txt
    name.npy                array of tokens, with name.doclens.npy (or name.lengths.npy); optionally fields and ids as above

Callers: the build tasks (handler/lambda_tasks.py). Nothing here writes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from typing import Any

import msgspec
import numpy as np

from engine.errors import Conflict, InvalidRequest, LimitExceeded
from engine.index.bulk import Block, Source
from engine.index.joint import MAX_INPUTS
from engine.store.base import Listed, ObjectStore
from engine.transfer.arrays import open_npy
from engine.transfer.content import Content
from engine.transfer.input_kind import kind_of
from engine.transfer.npz import open_npz
from engine.transfer.text_lines import Encode, TextLines
from engine.transfer.vector_lines import VectorLines

LENGTHS = (".doclens.npy", ".lengths.npy")
FIELDS, KEYS = ".fields.jsonl", ".ids.txt"
SAMPLE_INPUTS = 8
"""Inputs that a codec's sample is drawn from: opening one reads it whole."""
SAMPLE_ROWS = 256


class Input(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One input: names of objects relative to the prefix; size and age (by the store's clock) of the first, by which a changed input is noticed."""

    name: str
    size_bytes: int
    modified_s: float
    lengths: str | None = None
    fields: str | None = None
    keys: str | None = None


async def inputs_under(store: ObjectStore, *, prefix: str = "") -> list[Input]:
    """Every input of a store (opened at the prefix), by name. InvalidRequest if there is none, or an array has no lengths beside it."""
    listing = {listed.name: listed async for listed in store.list(prefix)}
    found = []
    for name in sorted(listing):
        if not name.endswith((".jsonl", ".npz", ".npy")) or name.endswith((FIELDS, *LENGTHS)):
            continue
        found.append(_input(name, listing))
    if not found:
        raise InvalidRequest("no inputs", expected=".jsonl, .npz or .npy", found=sorted(listing)[:8])
    if len(found) > MAX_INPUTS:
        raise LimitExceeded("too many inputs: join some files", limit=MAX_INPUTS, found=len(found))
    return found


async def check_unchanged(store: ObjectStore, one: Input) -> None:
    """Raise Conflict if the input is not the one that was planned. One request."""
    async for listed in store.list(one.name):
        if listed.name == one.name and (listed.size_bytes, listed.modified_s) == (one.size_bytes, one.modified_s):
            return
        break
    raise Conflict("the input has changed since the build was prepared", object=one.name)


def _input(name: str, listing: dict[str, Listed]) -> Input:
    stem, _, kind = name.rpartition(".")
    own = listing[name]
    if kind == "jsonl":
        return Input(name=name, size_bytes=own.size_bytes, modified_s=own.modified_s)
    beside = {ending: stem + ending for ending in (*LENGTHS, FIELDS, KEYS) if stem + ending in listing}
    lengths = next((beside[ending] for ending in LENGTHS if ending in beside), None)
    if kind == "npy" and lengths is None:
        raise InvalidRequest("an array of tokens has no document lengths beside it", object=name, expected=stem + LENGTHS[0])
    return Input(
        name=name,
        size_bytes=own.size_bytes,
        modified_s=own.modified_s,
        lengths=lengths if kind == "npy" else None,
        fields=beside.get(FIELDS),
        keys=beside.get(KEYS),
    )


def open_input(
    one: Input, content: Callable[[str], Content], encode: Encode | None, *, encoder: str = "", without: Sequence[str] = ()
) -> Source:
    """The source that an input is. Reads it whole once, and waits: call it on a thread.

    content  opens an object by name; encode: for texts, with `encoder` as its name and settings
    Raises InvalidRequest for whatever cannot be indexed.
    """
    opened = content(one.name)
    lengths, fields, keys = (None if name is None else content(name) for name in (one.lengths, one.fields, one.keys))
    kind = kind_of(opened)
    if kind == "npy":
        assert lengths is not None
        return open_npy(opened, lengths, fields=fields, keys=keys, without=without)
    if kind == "npz":
        return open_npz(opened, fields=fields, keys=keys, without=without)
    if kind == "vectors":
        return VectorLines(opened, without=without)
    if encode is None:
        raise InvalidRequest("texts need an encoder", object=opened.label)
    return TextLines(opened, encode, encoder=encoder, without=without)


def sampled_of(inputs: Sequence[Input]) -> list[Input]:
    """Those whose documents the sample comes from: spread over all by place."""
    n = min(SAMPLE_INPUTS, len(inputs))
    return [inputs[place] for place in np.unique(np.linspace(0, len(inputs) - 1, n).round().astype(int)).tolist()]


class Sampled:
    """Some sources that stand for all inputs of a build: what a codec is trained on.

    n_tokens  of all inputs, by the bytes of those that were opened
    """

    def __init__(self, sources: Sequence[Source], opened: Sequence[Input], inputs: Sequence[Input]) -> None:
        self._sources = sources
        share = sum(one.size_bytes for one in inputs) / max(sum(one.size_bytes for one in opened), 1)
        self.n_tokens = round(sum(source.n_tokens for source in sources) * share)
        self.n_documents = round(sum(source.n_documents for source in sources) * share)
        self.fingerprint = ""

    def sample(self, n_tokens: int) -> np.ndarray:
        """About n_tokens random vectors, as many of each source as its share of tokens."""
        own = sum(source.n_tokens for source in self._sources)
        parts = [source.sample(max(1, round(n_tokens * source.n_tokens / max(own, 1)))) for source in self._sources]
        parts = [part for part in parts if len(part)]
        dims = {part.shape[1] for part in parts}
        if len(dims) > 1:
            raise InvalidRequest("inputs have vectors of different dimensions", code="dimension-mismatch", found=sorted(dims))
        return np.concatenate(parts) if parts else np.empty((0, 1), np.float32)

    def rows(self) -> list[dict[str, Any]]:
        """Fields of the first documents of each source: they decide the types of new columns."""
        found: list[dict[str, Any]] = []
        for source in self._sources:
            with suppress(StopIteration):
                found += list(next(source.blocks(0)).fields or ())[:SAMPLE_ROWS]
        return found

    def blocks(self, first_document: int) -> Iterator[Block]:
        raise AssertionError("a sample has no blocks")
