"""JSON lines of texts as a source of documents; an encoder makes the vectors when a block is read. input_kind.py has the form of a line."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import msgspec
import numpy as np
import xxhash

from engine.errors import InvalidRequest
from engine.index.bulk import Block
from engine.transfer.blocks import SAMPLE_SEED, cut_lines, some_documents
from engine.transfer.content import Content, Line, LineMap, lines
from engine.transfer.json_lines import ANY_OBJECT, decoded, refuse, without_names
from engine.transfer.keys import SeenKeys, checked_key, key_text

TEXT_BLOCK_DOCUMENTS = 256
_ESTIMATE_TEXTS = 64
"""Texts that are encoded to guess how many tokens all have."""
Encode = Callable[[Sequence[str]], tuple[np.ndarray, np.ndarray]]
"""Texts to (tokens float32 (T, D), offsets int64 (n + 1,)), at least one token each."""


class TextLines:
    """JSON lines of texts, encoded block by block. "title" and "text" are encoded together and kept as fields, like every other key.

    encode   the encoder's documents side; encoder: its name and settings, part of the fingerprint
    without  fields to leave out (they are encoded all the same)
    n_tokens is a guess from a few texts: only an encoder knows.
    """

    def __init__(self, content: Content, encode: Encode, *, encoder: str, without: Collection[str] = ()) -> None:
        self._content, self._encode, self._without = content, encode, without
        self._map = LineMap(content)
        seen = SeenKeys(lambda n: decoded(content, Line(0, 0, self._map.read([n])[0]), _TEXT_LINE).key)
        state = xxhash.xxh3_128(repr((encoder, sorted(without))).encode())
        for line in lines(content):
            parsed = decoded(content, line, _TEXT_LINE)
            if parsed.text is None and parsed.title is None:
                found = sorted(decoded(content, line, ANY_OBJECT))[:8]
                refuse(content, line, "a document has a text or a title", found=found)
            seen.note(None if parsed.key is None else checked_key(parsed.key, content, line))
            self._map.note(line)
            state.update(line.data)
        if not len(self._map):
            raise InvalidRequest("the source holds no documents", file=content.label)
        seen.check(self._map)
        self._has_keys = bool(seen)
        self.n_documents = len(self._map)
        self.fingerprint = state.hexdigest()
        self._mean_tokens = self._guess()
        self.n_tokens = round(self._mean_tokens * self.n_documents)

    def sample(self, n_tokens: int) -> np.ndarray:
        """float32 (about n_tokens, D): whole documents, drawn at random, encoded."""
        chosen = some_documents(np.full(self.n_documents, self._mean_tokens), n_tokens).tolist()
        found = []
        for start in range(0, len(chosen), TEXT_BLOCK_DOCUMENTS):
            found.append(self._encode([_text(data) for data in self._map.read(chosen[start : start + TEXT_BLOCK_DOCUMENTS])])[0])
        return np.concatenate(found)

    def blocks(self, first_document: int) -> Iterator[Block]:
        for first, last in cut_lines(self._map, np.ones(self.n_documents, np.int64), first_document, TEXT_BLOCK_DOCUMENTS):
            data = self._map.run(first, last)
            tokens, offsets = self._encode([_text(line) for line in data])
            keys = [_TEXT_LINE.decode(line).key for line in data] if self._has_keys else None
            yield Block(tokens, offsets, [self._fields(line, first + n) for n, line in enumerate(data)], keys)

    def _guess(self) -> float:
        rng = np.random.Generator(np.random.PCG64(SAMPLE_SEED))
        chosen = np.sort(rng.choice(self.n_documents, min(_ESTIMATE_TEXTS, self.n_documents), replace=False)).tolist()
        tokens, _ = self._encode([_text(data) for data in self._map.read(chosen)])
        return max(1.0, len(tokens) / len(chosen))

    def _fields(self, data: bytes, document: int) -> dict[str, Any]:
        """Every key but the id; what stands in an object called metadata counts as if it stood beside the text."""
        try:
            row: dict[str, Any] = ANY_OBJECT.decode(data)
        except (msgspec.MsgspecError, RecursionError) as error:  # of keys that nobody has looked at until now
            facts: dict[str, Any] = {"file": self._content.label, "document": document, "found": str(error)[:140]}
            raise InvalidRequest("fields of a document are not as expected", **facts) from error
        row.pop("id" if row.get("id") is not None else "_id", None)
        if isinstance(row.get("metadata"), dict):
            row = row.pop("metadata") | row
        return without_names(row, self._without)


def _text(data: bytes) -> str:
    """What is encoded: title and text."""
    parsed = _TEXT_LINE.decode(data)
    return ". ".join(part for part in (parsed.title, parsed.text) if part)


class _TextLine(msgspec.Struct):
    """What is checked of a text; its other keys are fields."""

    text: str | None = None
    title: str | None = None
    id: str | int | None = None
    other_id: str | int | None = msgspec.field(default=None, name="_id")
    metadata: Any = None

    @property
    def key(self) -> str | None:
        return key_text(self.id if self.id is not None else self.other_id)


_TEXT_LINE = msgspec.json.Decoder(_TextLine)
