"""Sources of documents for a bulk build (engine/index/bulk.py): arrays of vectors, vectors in JSON lines, texts in JSON lines.

    npy pair   tokens float (T, D) and document lengths int (N,), end to end; optionally fields (JSON lines) and ids (text lines)
    npz        the same arrays as members `tokens` (or `embeddings`) and `doclens` (or `lengths`)
    vectors    {"embeddings": [[...], ...]} or {"embeddings_b64": "...", "shape": [t, D], "dtype": "float32"}, with "id" and "metadata"
    texts      {"text": ..., "title": ..., "id": ...}; every key but the id is a field; an encoder makes the vectors

Opening a source reads it once: everything that can be wrong with it is found then, before an index is touched, and the same pass gives
the fingerprint by which an interrupted build is resumed. (Inputs above content.WHOLE_FINGERPRINT_BYTES are only probed; a bad number
far inside is then found by the build.) Memory is that of a block, and 24 to 40 bytes a document. Nothing here writes or unpickles.

`tartan index` calls this. A line of `tartan export` is a line of `vectors`.
"""

from __future__ import annotations

import base64
import binascii
import io
import math
import shutil
import struct
import tempfile
import zipfile
import zlib
from array import array
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NoReturn

import msgspec
import numpy as np
import xxhash

from engine.config import MAX_DIM, MAX_DOCUMENT_TOKENS
from engine.errors import InvalidRequest, LimitExceeded
from engine.index.bulk import Block
from engine.index.operations import MAX_KEY_BYTES
from engine.transfer.content import (
    WHOLE_FINGERPRINT_BYTES,
    AsFile,
    Content,
    FileContent,
    Line,
    LineMap,
    PartContent,
    chunks,
    fingerprint,
    lines,
)
from engine.transfer.npy import read_header

BLOCK_DOCUMENTS = 2048
BLOCK_TOKENS = 1 << 17
BLOCK_BYTES = 64 << 20
"""A block ends at the first of the three: 131,072 tokens of 128 dimensions are 64 MiB as float32."""
TEXT_BLOCK_DOCUMENTS = 256
SAMPLE_SEED = 7
_SAMPLE_READS = 1024
_ESTIMATE_TEXTS = 64
"""Texts that are encoded to guess how many tokens all have."""
_HEADER_BYTES = 1 << 16
_TOKEN_MEMBERS = ("tokens", "embeddings")
_LENGTH_MEMBERS = ("doclens", "lengths")

Kind = Literal["npy", "npz", "vectors", "texts"]
Encode = Callable[[Sequence[str]], tuple[np.ndarray, np.ndarray]]
"""Texts to (tokens float32 (T, D), offsets int64 (n + 1,)), at least one token each."""


def kind_of(content: Content) -> Kind:
    """What an input is, by its first bytes. InvalidRequest if it is none of the four."""
    head = bytes(content.read([(0, min(8, content.size_bytes))])[0])
    if head.startswith(b"\x93NUMPY"):
        return "npy"
    if head.startswith(b"PK\x03\x04"):
        return "npz"
    if not content.size_bytes:
        raise InvalidRequest("the input is empty", file=content.label)
    first = next(lines(content), None)
    keys = _decoded(content, first, _ANY_OBJECT).keys() if first else ()
    if "embeddings" in keys or "embeddings_b64" in keys:
        return "vectors"
    if "text" in keys or "title" in keys:
        return "texts"
    expected = ".npy, .npz, or JSON lines with embeddings, embeddings_b64, text or title"
    raise InvalidRequest("not an input that can be indexed", file=content.label, expected=expected, found=sorted(keys)[:8])


# Arrays


@dataclass(frozen=True)
class NpyArray:
    """An .npy array in C order inside a content: rows are read by place. Object arrays are pickles and are refused."""

    content: Content
    start: int
    dtype: np.dtype[Any]
    shape: tuple[int, ...]

    @classmethod
    def open(cls, content: Content) -> NpyArray:
        """Read the header and compare it with the size. InvalidRequest for anything but a whole array of plain numbers."""
        header = io.BytesIO(bytes(content.read([(0, min(_HEADER_BYTES, content.size_bytes))])[0]))
        try:
            shape, is_fortran, dtype = read_header(header)
        except ValueError as error:
            raise InvalidRequest("not an .npy array", file=content.label, found=str(error)) from error
        if dtype.hasobject:
            raise InvalidRequest("an array of objects is a pickle and is not read; save plain numbers", file=content.label, found=dtype)
        if is_fortran and len(shape) > 1:
            raise InvalidRequest("an array in C order was expected", file=content.label, found="Fortran order")
        found = cls(content, header.tell(), dtype, shape)
        expected = found.start + dtype.itemsize * math.prod(shape)
        if content.size_bytes != expected:
            what = "the array is cut short" if content.size_bytes < expected else "bytes follow the array"
            raise InvalidRequest(what, file=content.label, expected=f"{expected} bytes", found=f"{content.size_bytes} bytes")
        return found

    @property
    def row_bytes(self) -> int:
        return self.dtype.itemsize * math.prod(self.shape[1:])

    def runs(self, runs: Sequence[tuple[int, int]]) -> list[np.ndarray]:
        """Rows first to last of each run, native byte order."""
        ranges = [(self.start + first * self.row_bytes, self.start + last * self.row_bytes) for first, last in runs]
        pieces = self.content.read(ranges)
        native = self.dtype.newbyteorder("=")
        return [np.frombuffer(data, self.dtype).reshape(-1, *self.shape[1:]).astype(native, copy=False) for data in pieces]


class ArraySource:
    """Documents in an array of tokens and an array of lengths. Made by open_npy and open_npz."""

    def __init__(self, tokens: NpyArray, lengths: np.ndarray, fields: _Fields | None, keys: _Keys | None) -> None:
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
        chosen = _some_documents(np.diff(self._offsets), n_tokens)
        found: list[np.ndarray] = [np.empty((0, self._tokens.shape[1]), np.float16)]
        for start in range(0, len(chosen), _SAMPLE_READS):
            group = chosen[start : start + _SAMPLE_READS]
            found += self._tokens.runs([(int(self._offsets[n]), int(self._offsets[n + 1])) for n in group])
        return _plain_floats(np.concatenate(found))

    def blocks(self, first_document: int) -> Iterator[Block]:
        for first, last in self._cuts(first_document):
            [tokens] = self._tokens.runs([(int(self._offsets[first]), int(self._offsets[last]))])
            yield Block(
                _plain_floats(tokens),
                self._offsets[first : last + 1] - self._offsets[first],
                self._fields.rows(first, last) if self._fields else None,
                self._keys.keys(first, last) if self._keys else None,
            )

    def _cuts(self, first: int) -> Iterator[tuple[int, int]]:
        """Half-open runs of documents, each within the bounds of a block unless one document alone is larger."""
        most_tokens = max(1, min(BLOCK_TOKENS, BLOCK_BYTES // max(self._tokens.row_bytes, 1)))
        while first < self.n_documents:
            fitting = int(np.searchsorted(self._offsets, self._offsets[first] + most_tokens, side="right")) - 1
            last = max(first + 1, min(first + BLOCK_DOCUMENTS, fitting))
            yield first, last
            first = last

    def _checked(self) -> str:
        """The fingerprint; on the way, if the tokens are read whole, every value is checked to be finite."""
        state = xxhash.xxh3_128(repr((self._tokens.shape, self._tokens.dtype.str)).encode())
        state.update(np.ascontiguousarray(self._offsets).data)
        for extra in (self._fields, self._keys):
            state.update(b"-" if extra is None else extra.fingerprint.encode())
        if self._tokens.content.size_bytes > WHOLE_FINGERPRINT_BYTES:
            state.update(fingerprint(self._tokens.content).encode())
            return state.hexdigest()
        for first, last in self._cuts(0):
            [tokens] = self._tokens.runs([(int(self._offsets[first]), int(self._offsets[last]))])
            state.update(np.ascontiguousarray(tokens).data)
            bad = _first_not_finite(tokens)
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


def open_npy(
    tokens: Content, lengths: Content, *, fields: Content | None = None, keys: Content | None = None, without: Collection[str] = ()
) -> ArraySource:
    """A source of tokens.npy and lengths.npy. Raises InvalidRequest for whatever does not fit together; see the module's head for cost.

    fields  JSON lines, one object a document; keys: text lines, one external id a document; without: fields to leave out
    """
    return _arrays(NpyArray.open(tokens), NpyArray.open(lengths), fields, keys, without)


def open_npz(
    content: Content,
    *,
    fields: Content | None = None,
    keys: Content | None = None,
    without: Collection[str] = (),
    max_member_bytes: int | None = None,
) -> ArraySource:
    """As open_npy, both arrays in one archive. A compressed member is unpacked into a temporary file first; checksums are compared.

    max_member_bytes  of a member once unpacked: an archive of a kilobyte can stand for gigabytes. LimitExceeded beyond it
    """
    try:
        archive = zipfile.ZipFile(io.BufferedReader(AsFile(content)))
    except _ZIP_ERRORS as error:
        raise InvalidRequest("the .npz archive is damaged or cut short", file=content.label, found=str(error)[:140]) from error
    with archive:
        tokens, lengths = (_member(content, archive, names, max_member_bytes) for names in (_TOKEN_MEMBERS, _LENGTH_MEMBERS))
        return _arrays(NpyArray.open(tokens), NpyArray.open(lengths), fields, keys, without)


def _lzma_errors() -> tuple[type[Exception], ...]:
    """None where Python was built without lzma: then zipfile refuses such members."""
    try:
        from lzma import LZMAError
    except ImportError:
        return ()
    return (LZMAError,)


_ZIP_ERRORS: tuple[type[Exception], ...] = (zipfile.BadZipFile, EOFError, RuntimeError, ValueError, OverflowError, struct.error, zlib.error, *_lzma_errors())
"""What zipfile raises over a damaged archive; NotImplementedError, for an unknown method or version, is a RuntimeError."""


def _member(content: Content, archive: zipfile.ZipFile, names: Sequence[str], max_bytes: int | None) -> Content:
    """The bytes of the first member of one of these names: in place if it is stored, from a temporary file if it is compressed."""
    found = next((info for name in names for info in archive.infolist() if info.filename == f"{name}.npy"), None)
    if found is None:
        there = [info.filename.removesuffix(".npy") for info in archive.infolist()][:8]
        raise InvalidRequest("the .npz archive lacks an array", file=content.label, expected=" or ".join(names), found=there)
    label = f"{content.label}:{found.filename}"
    if max_bytes is not None and found.file_size > max_bytes:
        raise LimitExceeded("a member of the .npz archive is too large", file=label, limit_bytes=max_bytes, size_bytes=found.file_size)
    if found.compress_type == zipfile.ZIP_STORED:
        return _stored_member(content, archive, found, label)
    with tempfile.NamedTemporaryFile(prefix="tartan-") as unpacked:
        try:
            with archive.open(found) as member:
                shutil.copyfileobj(member, unpacked, 1 << 20)
            unpacked.flush()
        except _ZIP_ERRORS as error:
            raise InvalidRequest("a member of the .npz archive cannot be unpacked", file=label, found=str(error)[:140]) from error
        except OSError as error:  # bzip2's complaint has no number, the file system's has
            if error.errno is None:
                raise InvalidRequest("a member of the .npz archive cannot be unpacked", file=label, found=str(error)[:140]) from error
            raise LimitExceeded(
                "a member of the .npz archive does not fit into the temporary folder", file=label, found=error.strerror
            ) from error
        return FileContent(unpacked.name, label=label)  # keeps it open; its name goes now, its bytes with the source


def _stored_member(content: Content, archive: zipfile.ZipFile, found: zipfile.ZipInfo, label: str) -> Content:
    """A member in its place, after its checksum was compared (one more pass, unless it is too large to be read whole)."""
    try:
        archive.open(found).close()  # its own header must be there and name the same member
    except _ZIP_ERRORS as error:
        raise InvalidRequest("the .npz archive is damaged or cut short", file=label, found=str(error)[:140]) from error
    header = bytes(content.read([(found.header_offset, found.header_offset + 30)])[0])
    name_bytes, extra_bytes = struct.unpack("<HH", header[26:30])
    start = found.header_offset + 30 + name_bytes + extra_bytes
    if start + found.file_size > content.size_bytes or found.compress_size != found.file_size:
        raise InvalidRequest(
            "the .npz archive is damaged or cut short", file=label, expected=start + found.file_size, found=content.size_bytes
        )
    part = PartContent(content, start, found.file_size, label)
    if part.size_bytes <= WHOLE_FINGERPRINT_BYTES:
        checksum = 0
        for chunk in chunks(part):
            checksum = zlib.crc32(chunk, checksum)
        if checksum != found.CRC:
            raise InvalidRequest("a member of the .npz archive is damaged", file=label, expected=found.CRC, found=checksum)
    return part


def _arrays(tokens: NpyArray, lengths: NpyArray, fields: Content | None, keys: Content | None, without: Collection[str]) -> ArraySource:
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
    return ArraySource(tokens, counts, _Fields.open(fields, without) if fields else None, _Keys.open(keys) if keys else None)


def _form(found: NpyArray) -> str:
    return f"{found.dtype} {found.shape}"


# Lines that go with arrays: fields and ids


@dataclass(frozen=True)
class _Fields:
    """One JSON object a line."""

    map: LineMap
    fingerprint: str
    without: Collection[str]

    @classmethod
    def open(cls, content: Content, without: Collection[str]) -> _Fields:
        map_ = LineMap(content)
        for line in lines(content):
            _decoded(content, line, _ANY_OBJECT)
            map_.note(line)
        return cls(map_, f"{fingerprint(content)} {sorted(without)}", without)

    def rows(self, first: int, last: int) -> list[dict[str, Any]]:
        return [_without(msgspec.json.decode(data), self.without) for data in self.map.run(first, last)]


@dataclass(frozen=True)
class _Keys:
    """One external id a line."""

    map: LineMap
    fingerprint: str

    @classmethod
    def open(cls, content: Content) -> _Keys:
        map_, seen = LineMap(content), _Seen(lambda n: map_.read([n])[0].decode().strip())
        for line in lines(content):
            seen.note(_checked_key(line.data.decode().strip(), content, line))
            map_.note(line)
        seen.check(map_)
        return cls(map_, fingerprint(content))

    def keys(self, first: int, last: int) -> list[str]:
        return [data.decode().strip() for data in self.map.run(first, last)]


@dataclass
class _Seen:
    """External ids met so far, 8 bytes each; finds the one that comes twice. key_of gives the key of the n-th document again."""

    key_of: Callable[[int], str | None]
    _hashes: array[int] = field(default_factory=lambda: array("Q"))
    _documents: array[int] = field(default_factory=lambda: array("q"))
    _n_documents: int = 0

    def note(self, key: str | None) -> None:
        """The key of the next document."""
        if key is not None:
            self._hashes.append(xxhash.xxh3_64_intdigest(key.encode()))
            self._documents.append(self._n_documents)
        self._n_documents += 1

    def __bool__(self) -> bool:
        return len(self._hashes) > 0

    def check(self, map_: LineMap) -> None:
        """Raise InvalidRequest, naming id and lines, if a key came twice."""
        hashes = np.frombuffer(self._hashes, np.uint64)
        order = np.argsort(hashes, kind="stable")
        for n in np.flatnonzero(hashes[order[1:]] == hashes[order[:-1]]).tolist():
            one, other = self._documents[order[n]], self._documents[order[n + 1]]
            key = self.key_of(one)
            if key == self.key_of(other):
                facts = {"id": repr(key)[:140], "lines": f"{map_.number(one)} and {map_.number(other)}"}
                raise InvalidRequest("an external id comes twice", file=map_.content.label, **facts)


def _checked_key(key: str, content: Content, line: Line) -> str:
    if not 1 <= len(key.encode()) <= MAX_KEY_BYTES:
        _refuse(content, line, f"an external id is text of 1 to {MAX_KEY_BYTES} bytes", found=repr(key)[:80])
    return key


# JSON lines


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


class _TextLine(msgspec.Struct):
    """What is checked of a text; its other keys are fields."""

    text: str | None = None
    title: str | None = None
    id: str | int | None = None
    other_id: str | int | None = msgspec.field(default=None, name="_id")
    metadata: Any = None

    @property
    def key(self) -> str | None:
        return _key_text(self.id if self.id is not None else self.other_id)


_ANY_OBJECT = msgspec.json.Decoder(dict[str, Any])
_VECTOR_LINE = msgspec.json.Decoder(_VectorLine)
_TEXT_LINE = msgspec.json.Decoder(_TextLine)
_NUMBERS = msgspec.json.Decoder(list[list[float]])
_STRING = msgspec.json.Decoder(str)


class VectorLines:
    """JSON lines of vectors; see the module's head. Raises InvalidRequest, naming the line, for whatever cannot be a document."""

    def __init__(self, content: Content, *, without: Collection[str] = ()) -> None:
        self._content, self._without = content, without
        self._map, self._has_fields, self._dim = LineMap(content), False, 0
        seen, counts = _Seen(lambda n: self._parse(n)[2]), array("q")
        is_read_whole = content.size_bytes <= WHOLE_FINGERPRINT_BYTES
        state = xxhash.xxh3_128(repr(sorted(without)).encode())
        for line in lines(content):
            parsed = _decoded(content, line, _VECTOR_LINE)
            if is_read_whole or not self._dim:
                tokens = self._tokens(parsed, line)
                self._dim = tokens.shape[1]
                counts.append(len(tokens))
            else:
                counts.append(_claimed_tokens(parsed))
            key = _key_text(parsed.id)
            seen.note(None if key is None else _checked_key(key, content, line))
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
        chosen = _some_documents(self._lengths, n_tokens).tolist()
        found = [np.empty((0, self._dim), np.float32)]
        for start in range(0, len(chosen), _SAMPLE_READS):
            group = chosen[start : start + _SAMPLE_READS]
            found += [self._parse(n, data)[0] for n, data in zip(group, self._map.read(group), strict=True)]
        return np.concatenate(found)

    def blocks(self, first_document: int) -> Iterator[Block]:
        for first, last in _cut_lines(self._map, self._lengths, first_document, BLOCK_DOCUMENTS):
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
        parsed = _decoded(self._content, line, _VECTOR_LINE)
        return self._tokens(parsed, line), _without(parsed.metadata or {}, self._without), _key_text(parsed.id)

    def _tokens(self, parsed: _VectorLine, line: Line) -> np.ndarray:
        """float32 (t, D), finite, of the first line's dimension."""
        if bool(parsed.numbers) == bool(parsed.base64):
            found = "both" if parsed.numbers else "neither"
            _refuse(self._content, line, "a document has embeddings or embeddings_b64", found=found)
        tokens = self._from_numbers(parsed, line) if parsed.numbers else self._from_base64(parsed, line)
        if not 1 <= len(tokens) <= MAX_DOCUMENT_TOKENS:
            _refuse(self._content, line, f"a document has 1 to {MAX_DOCUMENT_TOKENS} tokens", found=len(tokens))
        if not 1 <= tokens.shape[1] <= MAX_DIM or (self._dim and tokens.shape[1] != self._dim):
            expected = self._dim or f"1 to {MAX_DIM}"
            facts = {"expected": expected, "found": tokens.shape[1]}
            _refuse(self._content, line, "vectors have another dimension", code="dimension-mismatch", **facts)
        bad = _first_not_finite(tokens)
        if bad is not None:
            facts = {"token": bad} | ({} if parsed.id is None else {"id": repr(parsed.id)})
            _refuse(self._content, line, "a vector has a value that is not finite", **facts)
        return tokens

    def _from_numbers(self, parsed: _VectorLine, line: Line) -> np.ndarray:
        rows = _decoded(self._content, line, _NUMBERS, parsed.numbers, "embeddings")
        if not rows:
            return np.empty((0, self._dim or 1), np.float32)
        ragged = next((n for n, row in enumerate(rows) if len(row) != len(rows[0])), None)
        if ragged is not None:
            rows_found = {"expected": len(rows[0]), "found": len(rows[ragged])}
            _refuse(self._content, line, "the vectors of a document differ in length", code=None, token=ragged, **rows_found)
        with np.errstate(over="ignore"):  # beyond float32 is infinite, and refused as such
            return np.array(rows, np.float32)

    def _from_base64(self, parsed: _VectorLine, line: Line) -> np.ndarray:
        text = _decoded(self._content, line, _STRING, parsed.base64, "embeddings_b64")
        if parsed.shape is None or min(parsed.shape) < 0:
            _refuse(self._content, line, "embeddings_b64 needs a shape [tokens, dimensions]", found=parsed.shape)
        try:
            data = base64.b64decode(text, validate=True)
        except (binascii.Error, ValueError) as error:
            _refuse(self._content, line, "embeddings_b64 is not base64", found=str(error))
        dtype = np.dtype("<f4" if parsed.dtype == "float32" else "<f2")
        expected = parsed.shape[0] * parsed.shape[1] * dtype.itemsize
        if len(data) != expected:
            facts = {"expected": f"{expected} bytes for {parsed.shape} {parsed.dtype}", "found": f"{len(data)} bytes"}
            _refuse(self._content, line, "embeddings_b64 does not have its shape", **facts)
        return np.frombuffer(data, dtype).reshape(parsed.shape).astype(np.float32)


class TextLines:
    """JSON lines of texts, encoded block by block. "title" and "text" are encoded together and kept as fields, like every other key.

    encode   the encoder's documents side; encoder: its name and settings, part of the fingerprint
    without  fields to leave out (they are encoded all the same)
    n_tokens is a guess from a few texts: only an encoder knows.
    """

    def __init__(self, content: Content, encode: Encode, *, encoder: str, without: Collection[str] = ()) -> None:
        self._content, self._encode, self._without = content, encode, without
        self._map = LineMap(content)
        seen = _Seen(lambda n: _decoded(content, Line(0, 0, self._map.read([n])[0]), _TEXT_LINE).key)
        state = xxhash.xxh3_128(repr((encoder, sorted(without))).encode())
        for line in lines(content):
            parsed = _decoded(content, line, _TEXT_LINE)
            if parsed.text is None and parsed.title is None:
                found = sorted(_decoded(content, line, _ANY_OBJECT))[:8]
                _refuse(content, line, "a document has a text or a title", found=found)
            seen.note(None if parsed.key is None else _checked_key(parsed.key, content, line))
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
        chosen = _some_documents(np.full(self.n_documents, self._mean_tokens), n_tokens).tolist()
        found = []
        for start in range(0, len(chosen), TEXT_BLOCK_DOCUMENTS):
            found.append(self._encode([_text(data) for data in self._map.read(chosen[start : start + TEXT_BLOCK_DOCUMENTS])])[0])
        return np.concatenate(found)

    def blocks(self, first_document: int) -> Iterator[Block]:
        for first, last in _cut_lines(self._map, np.ones(self.n_documents, np.int64), first_document, TEXT_BLOCK_DOCUMENTS):
            data = self._map.run(first, last)
            tokens, offsets = self._encode([_text(line) for line in data])
            keys = [_TEXT_LINE.decode(line).key for line in data] if self._has_keys else None
            yield Block(tokens, offsets, [self._fields(line) for line in data], keys)

    def _guess(self) -> float:
        rng = np.random.Generator(np.random.PCG64(SAMPLE_SEED))
        chosen = np.sort(rng.choice(self.n_documents, min(_ESTIMATE_TEXTS, self.n_documents), replace=False)).tolist()
        tokens, _ = self._encode([_text(data) for data in self._map.read(chosen)])
        return max(1.0, len(tokens) / len(chosen))

    def _fields(self, data: bytes) -> dict[str, Any]:
        """Every key but the id; what stands in an object called metadata counts as if it stood beside the text."""
        row = msgspec.json.decode(data, type=dict[str, Any])
        row.pop("id" if row.get("id") is not None else "_id", None)
        if isinstance(row.get("metadata"), dict):
            row = row.pop("metadata") | row
        return _without(row, self._without)


def _text(data: bytes) -> str:
    """What is encoded: title and text."""
    parsed = _TEXT_LINE.decode(data)
    return ". ".join(part for part in (parsed.title, parsed.text) if part)


# Small steps


def _decoded(content: Content, line: Line, decoder: msgspec.json.Decoder[Any], data: bytes | None = None, part: str = "") -> Any:
    """A line, or a part of it, as JSON of the expected form; else InvalidRequest with the line's number."""
    try:
        return decoder.decode(line.data if data is None else data)
    except (msgspec.MsgspecError, RecursionError) as error:
        _refuse(content, line, f"{part or 'the line'} is not as expected", found=str(error)[:140])


def _refuse(content: Content, line: Line, message: str, *, code: str | None = None, **facts: object) -> NoReturn:
    raise InvalidRequest(message, code=code, file=content.label, line=line.number, **facts)


def _claimed_tokens(parsed: _VectorLine) -> int:
    """Tokens of a line that is not decoded yet."""
    if parsed.numbers:
        return max(1, parsed.numbers.count(b"[") - 1)
    return max(1, parsed.shape[0]) if parsed.shape else 1


def _key_text(key: str | int | None) -> str | None:
    return None if key is None else str(key)


def _without(row: dict[str, Any], names: Collection[str]) -> dict[str, Any]:
    return {name: value for name, value in row.items() if name not in names} if names else row


def _some_documents(lengths: np.ndarray, n_tokens: int) -> np.ndarray:
    """Random documents, int64 ascending, that have about n_tokens tokens together; at least one."""
    shuffled = np.random.Generator(np.random.PCG64(SAMPLE_SEED)).permutation(len(lengths))
    gathered = np.cumsum(lengths[shuffled])
    return np.sort(shuffled[: int(np.searchsorted(gathered, n_tokens)) + 1])


def _cut_lines(map_: LineMap, lengths: np.ndarray, first: int, n_documents: int) -> Iterator[tuple[int, int]]:
    """Half-open runs of documents within n_documents, BLOCK_TOKENS and BLOCK_BYTES of text; one alone may be larger."""
    while first < len(map_):
        last, n_tokens = first, 0
        while last < min(first + n_documents, len(map_)):
            n_tokens += int(lengths[last])
            if last > first and (n_tokens > BLOCK_TOKENS or map_.size_bytes(first, last + 1) > BLOCK_BYTES):
                break
            last += 1
        yield first, last
        first = last


def _plain_floats(tokens: np.ndarray) -> np.ndarray:
    """float16 and float32 as they are, anything wider as float32."""
    return tokens if tokens.dtype in (np.float16, np.float32) else tokens.astype(np.float32)


def _first_not_finite(tokens: np.ndarray) -> int | None:
    """The first row with a value that is not finite, or None."""
    if tokens.dtype == np.float16:  # an exponent of ones; numpy's own test of float16 is ten times slower
        bad = (tokens.view(np.uint16) & 0x7C00) == 0x7C00
        return int(bad.any(axis=1).argmax()) if bad.any() else None
    with np.errstate(over="ignore"):
        finite = np.isfinite(tokens.astype(np.float32, copy=False))
    return None if finite.all() else int((~finite.all(axis=1)).argmax())
