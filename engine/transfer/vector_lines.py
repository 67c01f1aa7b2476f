"""JSON lines of vectors as a source of documents; input_kind.py has the form of a line. A line of `tartan export` is one.

A line is parsed each time it is read, and its vectors are kept nowhere.
"""

from __future__ import annotations

import base64
import binascii
from array import array
from collections.abc import Collection, Iterator
from typing import Any, Literal

import msgspec
import numpy as np
import xxhash

from engine.config import MAX_DIM, MAX_DOCUMENT_TOKENS
from engine.errors import InvalidRequest
from engine.index.bulk import Block
from engine.transfer.blocks import BLOCK_DOCUMENTS, SAMPLE_READS, cut_lines, first_not_finite, some_documents
from engine.transfer.content import WHOLE_FINGERPRINT_BYTES, Content, Line, LineMap, lines
from engine.transfer.json_lines import decoded, refuse, without_names
from engine.transfer.keys import SeenKeys, checked_key, key_text


class VectorLines:
    """JSON lines of vectors. Raises InvalidRequest, naming the line, for whatever cannot be a document."""

    def __init__(self, content: Content, *, without: Collection[str] = ()) -> None:
        self._content, self._without = content, without
        self._map, self._has_fields, self._dim = LineMap(content), False, 0
        seen, counts = SeenKeys(lambda n: self._parse(n)[2]), array("q")
        is_read_whole = content.size_bytes <= WHOLE_FINGERPRINT_BYTES
        state = xxhash.xxh3_128(repr(sorted(without)).encode())
        for line in lines(content):
            parsed = decoded(content, line, _VECTOR_LINE)
            if is_read_whole or not self._dim:
                tokens = self._tokens(parsed, line)
                self._dim = tokens.shape[1]
                counts.append(len(tokens))
            else:
                counts.append(_claimed_tokens(parsed))
            key = key_text(parsed.id)
            seen.note(None if key is None else checked_key(key, content, line))
            self._has_fields = self._has_fields or bool(parsed.metadata)
            self._map.note(line)
            state.update(line.data)
        if not len(self._map):
            raise InvalidRequest("the source holds no documents", file=content.label)
        seen.check(self._map)
        self._has_keys = bool(seen)
        self._lengths = np.frombuffer(counts, np.int64)
        self.n_documents, self.n_tokens = len(self._map), int(self._lengths.sum())
        self.fingerprint = state.hexdigest()

    def sample(self, n_tokens: int) -> np.ndarray:
        """float32 (about n_tokens, D): whole documents, drawn at random."""
        chosen = some_documents(self._lengths, n_tokens).tolist()
        found = [np.empty((0, self._dim), np.float32)]
        for start in range(0, len(chosen), SAMPLE_READS):
            group = chosen[start : start + SAMPLE_READS]
            found += [self._parse(n, data)[0] for n, data in zip(group, self._map.read(group), strict=True)]
        return np.concatenate(found)

    def blocks(self, first_document: int) -> Iterator[Block]:
        for first, last in cut_lines(self._map, self._lengths, first_document, BLOCK_DOCUMENTS):
            parsed = [self._parse(n, data) for n, data in zip(range(first, last), self._map.run(first, last), strict=True)]
            yield Block(
                np.concatenate([tokens for tokens, _, _ in parsed]),
                np.cumsum([0, *(len(tokens) for tokens, _, _ in parsed)]),
                [fields for _, fields, _ in parsed] if self._has_fields else None,
                [key for _, _, key in parsed] if self._has_keys else None,
            )

    def _parse(self, n: int, data: bytes | None = None) -> tuple[np.ndarray, dict[str, Any], str | None]:
        """Tokens float32, fields and key of the n-th document."""
        line = Line(self._map.number(n), 0, self._map.read([n])[0] if data is None else data)
        parsed = decoded(self._content, line, _VECTOR_LINE)
        return self._tokens(parsed, line), without_names(parsed.metadata or {}, self._without), key_text(parsed.id)

    def _tokens(self, parsed: _VectorLine, line: Line) -> np.ndarray:
        """float32 (t, D), finite, of the first line's dimension."""
        if bool(parsed.numbers) == bool(parsed.base64):
            found = "both" if parsed.numbers else "neither"
            refuse(self._content, line, "a document has embeddings or embeddings_b64", found=found)
        tokens = self._from_numbers(parsed, line) if parsed.numbers else self._from_base64(parsed, line)
        if not 1 <= len(tokens) <= MAX_DOCUMENT_TOKENS:
            refuse(self._content, line, f"a document has 1 to {MAX_DOCUMENT_TOKENS} tokens", found=len(tokens))
        if not 1 <= tokens.shape[1] <= MAX_DIM or (self._dim and tokens.shape[1] != self._dim):
            expected = self._dim or f"1 to {MAX_DIM}"
            facts = {"expected": expected, "found": tokens.shape[1]}
            refuse(self._content, line, "vectors have another dimension", code="dimension-mismatch", **facts)
        bad = first_not_finite(tokens)
        if bad is not None:
            facts = {"token": bad} | ({} if parsed.id is None else {"id": repr(parsed.id)})
            refuse(self._content, line, "a vector has a value that is not finite", **facts)
        return tokens

    def _from_numbers(self, parsed: _VectorLine, line: Line) -> np.ndarray:
        rows = decoded(self._content, line, _NUMBERS, parsed.numbers, "embeddings")
        if not rows:
            return np.empty((0, self._dim or 1), np.float32)
        ragged = next((n for n, row in enumerate(rows) if len(row) != len(rows[0])), None)
        if ragged is not None:
            rows_found = {"expected": len(rows[0]), "found": len(rows[ragged])}
            refuse(self._content, line, "the vectors of a document differ in length", code=None, token=ragged, **rows_found)
        with np.errstate(over="ignore"):  # beyond float32 is infinite, and refused as such
            return np.array(rows, np.float32)

    def _from_base64(self, parsed: _VectorLine, line: Line) -> np.ndarray:
        text = decoded(self._content, line, _STRING, parsed.base64, "embeddings_b64")
        if parsed.shape is None or min(parsed.shape) < 0:
            refuse(self._content, line, "embeddings_b64 needs a shape [tokens, dimensions]", found=parsed.shape)
        try:
            data = base64.b64decode(text, validate=True)
        except (binascii.Error, ValueError) as error:
            refuse(self._content, line, "embeddings_b64 is not base64", found=str(error))
        dtype = np.dtype("<f4" if parsed.dtype == "float32" else "<f2")
        expected = parsed.shape[0] * parsed.shape[1] * dtype.itemsize
        if len(data) != expected:
            facts = {"expected": f"{expected} bytes for {parsed.shape} {parsed.dtype}", "found": f"{len(data)} bytes"}
            refuse(self._content, line, "embeddings_b64 does not have its shape", **facts)
        return np.frombuffer(data, dtype).reshape(parsed.shape).astype(np.float32)


_ABSENT = msgspec.Raw(b"null")


class _VectorLine(msgspec.Struct, forbid_unknown_fields=True):
    """One document. document_id is written by exports and means nothing here."""

    embeddings: msgspec.Raw = _ABSENT
    embeddings_b64: msgspec.Raw = _ABSENT
    shape: tuple[int, int] | None = None
    dtype: Literal["float32", "float16"] = "float32"
    id: str | int | None = None
    metadata: dict[str, Any] | None = None
    document_id: int | None = None

    @property
    def numbers(self) -> bytes:
        """The embeddings as they stand in the line; empty if they are absent or null."""
        return b"" if self.embeddings == _ABSENT else bytes(self.embeddings)

    @property
    def base64(self) -> bytes:
        return b"" if self.embeddings_b64 == _ABSENT else bytes(self.embeddings_b64)


_VECTOR_LINE = msgspec.json.Decoder(_VectorLine)
_NUMBERS = msgspec.json.Decoder(list[list[float]])
_STRING = msgspec.json.Decoder(str)


def _claimed_tokens(parsed: _VectorLine) -> int:
    """Tokens of a line that is not decoded yet."""
    if parsed.numbers:
        return max(1, parsed.numbers.count(b"[") - 1)
    return max(1, parsed.shape[0]) if parsed.shape else 1
