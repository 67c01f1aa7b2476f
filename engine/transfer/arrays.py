"""Documents in an array of tokens and an array of document lengths: the source that .npy files and .npz archives become.

Callers: whoever builds from files (input_kind.py has the list of inputs); npz.py finds the same arrays in an archive. Vectors are read by
place, a block at a time; an array is mapped nowhere.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np
import xxhash

from engine.config import MAX_DIM, MAX_DOCUMENT_TOKENS
from engine.errors import InvalidRequest
from engine.index.bulk import Block
from engine.transfer.blocks import SAMPLE_READS, cut_rows, first_not_finite, plain_floats, some_documents
from engine.transfer.content import WHOLE_FINGERPRINT_BYTES, Content, LineMap, fingerprint, lines
from engine.transfer.json_lines import ANY_OBJECT, decoded, without_names
from engine.transfer.keys import KeyLines
from engine.transfer.npy import NpyArray


def open_npy(
    tokens: Content, lengths: Content, *, fields: Content | None = None, keys: Content | None = None, without: Collection[str] = ()
) -> ArraySource:
    """A source of tokens.npy and lengths.npy. Raises InvalidRequest for whatever does not fit together; input_kind.py has the cost.

    fields  JSON lines, one object a document; keys: text lines, one external id a document; without: fields to leave out
    """
    return source_of(NpyArray.open(tokens), NpyArray.open(lengths), fields, keys, without)


def source_of(tokens: NpyArray, lengths: NpyArray, fields: Content | None, keys: Content | None, without: Collection[str]) -> ArraySource:
    """The source of two opened arrays, after they were compared with each other. Reads all lengths. Errors as open_npy."""
    if len(tokens.shape) != 2 or tokens.dtype.kind != "f" or not 1 <= tokens.shape[1] <= MAX_DIM:
        expected = f"float16 or float32, tokens x 1 to {MAX_DIM} dimensions"
        raise InvalidRequest("not an array of token vectors", file=tokens.content.label, expected=expected, found=_form(tokens))
    if len(lengths.shape) != 1 or lengths.dtype.kind not in "iu":
        raise InvalidRequest("not an array of document lengths", file=lengths.content.label, expected="integers (N,)", found=_form(lengths))
    [counts] = lengths.runs([(0, lengths.shape[0])])
    counts = counts.astype(np.int64)
    if not len(counts):
        raise InvalidRequest("the source holds no documents", file=lengths.content.label)
    bad = np.flatnonzero((counts < 1) | (counts > MAX_DOCUMENT_TOKENS))
    if len(bad):
        facts = {"file": lengths.content.label, "document": int(bad[0]), "found": int(counts[bad[0]])}
        raise InvalidRequest(f"a document has 1 to {MAX_DOCUMENT_TOKENS} tokens", code=None, **facts)
    if int(counts.sum()) != tokens.shape[0]:
        raise InvalidRequest(
            "document lengths do not add up to the number of tokens",
            file=lengths.content.label,
            expected=tokens.shape[0],
            found=int(counts.sum()),
        )
    return ArraySource(tokens, counts, _FieldLines.open(fields, without) if fields else None, KeyLines.open(keys) if keys else None)


def _form(found: NpyArray) -> str:
    return f"{found.dtype} {found.shape}"


class ArraySource:
    """Documents in an array of tokens and an array of lengths. Made by open_npy and open_npz."""

    def __init__(self, tokens: NpyArray, lengths: np.ndarray, fields: _FieldLines | None, keys: KeyLines | None) -> None:
        self._tokens, self._fields, self._keys = tokens, fields, keys
        self._offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        self.n_documents, self.n_tokens = len(lengths), int(self._offsets[-1])
        for extra in (fields, keys):
            if extra is not None and len(extra.map) != self.n_documents:
                facts = {"file": extra.map.content.label, "expected": self.n_documents, "found": len(extra.map)}
                raise InvalidRequest("one line for each document was expected", code=None, **facts)
        self.fingerprint = self._checked()

    def sample(self, n_tokens: int) -> np.ndarray:
        """float16 or float32 (about n_tokens, D): whole documents, drawn at random."""
        chosen = some_documents(np.diff(self._offsets), n_tokens)
        found: list[np.ndarray] = [np.empty((0, self._tokens.shape[1]), np.float16)]
        for start in range(0, len(chosen), SAMPLE_READS):
            group = chosen[start : start + SAMPLE_READS]
            found += self._tokens.runs([(int(self._offsets[n]), int(self._offsets[n + 1])) for n in group])
        return plain_floats(np.concatenate(found))

    def blocks(self, first_document: int) -> Iterator[Block]:
        for first, last in cut_rows(self._offsets, self._tokens.row_bytes, first_document):
            [tokens] = self._tokens.runs([(int(self._offsets[first]), int(self._offsets[last]))])
            yield Block(
                plain_floats(tokens),
                self._offsets[first : last + 1] - self._offsets[first],
                self._fields.rows(first, last) if self._fields else None,
                self._keys.keys(first, last) if self._keys else None,
            )

    def _checked(self) -> str:
        """The fingerprint; on the way, if the tokens are read whole, every value is checked to be finite."""
        state = xxhash.xxh3_128(repr((self._tokens.shape, self._tokens.dtype.str)).encode())
        state.update(np.ascontiguousarray(self._offsets).data)
        for extra in (self._fields, self._keys):
            state.update(b"-" if extra is None else extra.fingerprint.encode())
        if self._tokens.content.size_bytes > WHOLE_FINGERPRINT_BYTES:
            state.update(fingerprint(self._tokens.content).encode())
            return state.hexdigest()
        for first, last in cut_rows(self._offsets, self._tokens.row_bytes, 0):
            [tokens] = self._tokens.runs([(int(self._offsets[first]), int(self._offsets[last]))])
            state.update(np.ascontiguousarray(tokens).data)
            bad = first_not_finite(tokens)
            if bad is not None:
                row = int(self._offsets[first]) + bad
                document = int(np.searchsorted(self._offsets, row, side="right")) - 1
                raise InvalidRequest(
                    "a vector has a value that is not finite",
                    code=None,
                    file=self._tokens.content.label,
                    **self._named(document),
                    token=row,
                )
        return state.hexdigest()

    def _named(self, document: int) -> dict[str, object]:
        if self._keys is None:
            return {"document": document}
        return {"document": document, "id": repr(self._keys.keys(document, document + 1)[0])}


@dataclass(frozen=True)
class _FieldLines:
    """One JSON object a line."""

    map: LineMap
    fingerprint: str
    without: Collection[str]

    @classmethod
    def open(cls, content: Content, without: Collection[str]) -> _FieldLines:
        map_ = LineMap(content)
        for line in lines(content):
            decoded(content, line, ANY_OBJECT)
            map_.note(line)
        return cls(map_, f"{fingerprint(content)} {sorted(without)}", without)

    def rows(self, first: int, last: int) -> list[dict[str, Any]]:
        return [without_names(msgspec.json.decode(data), self.without) for data in self.map.run(first, last)]
