"""Sources of `tartan index`: every form gives the same documents, any document can be the first, and what is wrong is named."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from corpus import Corpus, make_corpus
from engine.encoding.hashing import LexicalEncoder
from engine.errors import Conflict, InvalidRequest, NotFound
from engine.store.base import ObjectStore
from engine.transfer import content as contents
from engine.transfer.arrays import open_npy
from engine.transfer.content import Background, FileContent, ObjectContent, fingerprint, lines
from engine.transfer.input_kind import kind_of
from engine.transfer.npz import open_npz
from engine.transfer.text_lines import TextLines
from engine.transfer.vector_lines import VectorLines

CORPUS = make_corpus(120, 16)
LENGTHS = np.diff(CORPUS.offsets)


def write_npy(folder: Path, corpus: Corpus = CORPUS, dtype: Any = np.float32) -> tuple[FileContent, FileContent]:
    np.save(folder / "tokens.npy", corpus.tokens.astype(dtype))
    np.save(folder / "doclens.npy", np.diff(corpus.offsets))
    return FileContent(folder / "tokens.npy"), FileContent(folder / "doclens.npy")


def write_lines(path: Path, documents: list[Any]) -> FileContent:
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in documents) + "\n")
    return FileContent(path)


def as_numbers(n: int, corpus: Corpus = CORPUS) -> dict[str, Any]:
    return {"embeddings": corpus.part(n, n + 1)[0].tolist()}


def as_base64(n: int, dtype: str = "float32") -> dict[str, Any]:
    tokens = CORPUS.part(n, n + 1)[0].astype(dtype)
    return {"embeddings_b64": base64.b64encode(tokens.tobytes()).decode(), "shape": tokens.shape, "dtype": dtype}


def source_of(kind: str, folder: Path) -> Any:
    if kind == "npy":
        return open_npy(*write_npy(folder))
    if kind == "npy float16":
        return open_npy(*write_npy(folder, dtype=np.float16))
    if kind == "npy float64, big-endian":
        return open_npy(*write_npy(folder, dtype=">f8"))
    if kind == "npz":
        np.savez(folder / "both.npz", tokens=CORPUS.tokens, doclens=LENGTHS)
        return open_npz(FileContent(folder / "both.npz"))
    if kind == "npz, compressed":
        np.savez_compressed(folder / "both.npz", embeddings=CORPUS.tokens, lengths=LENGTHS)
        return open_npz(FileContent(folder / "both.npz"))
    make = {"numbers": as_numbers, "base64": as_base64, "base64 float16": lambda n: as_base64(n, "float16")}[kind]
    return VectorLines(write_lines(folder / "vectors.jsonl", [make(n) for n in range(len(CORPUS))]))


KINDS = ["npy", "npy float16", "npy float64, big-endian", "npz", "npz, compressed", "numbers", "base64", "base64 float16"]


@pytest.mark.parametrize("kind", KINDS)
def test_every_form_gives_the_same_documents_from_any_document_on(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engine.transfer.blocks.BLOCK_TOKENS", 200)
    source = source_of(kind, tmp_path)
    assert (source.n_documents, source.n_tokens) == (len(CORPUS), len(CORPUS.tokens))
    for first in (0, 1, 77, len(CORPUS)):
        blocks = list(source.blocks(first))
        assert all(len(block.tokens) <= 200 for block in blocks)
        tokens = np.concatenate([np.empty((0, 16), np.float32), *(block.tokens for block in blocks)])
        lengths = np.concatenate([np.empty(0, np.int64), *(np.diff(block.offsets) for block in blocks)])
        np.testing.assert_allclose(tokens, CORPUS.part(first, len(CORPUS))[0], atol=1e-3)
        np.testing.assert_array_equal(lengths, LENGTHS[first:])
    assert all(block.tokens.dtype in (np.float16, np.float32) for block in source.blocks(0))


@pytest.mark.parametrize("kind", ["npy", "npz", "numbers"])
def test_a_sample_is_whole_documents_and_the_same_each_time(kind: str, tmp_path: Path) -> None:
    source = source_of(kind, tmp_path)
    sample = source.sample(300)
    assert 300 <= len(sample) < 300 + LENGTHS.max()
    np.testing.assert_array_equal(sample, source.sample(300))
    known = {row.tobytes() for row in CORPUS.tokens}
    assert all(row.tobytes() in known for row in sample.astype(np.float32))
    assert len(source.sample(10**9)) == len(CORPUS.tokens)


def test_a_fingerprint_follows_the_content_and_not_the_place(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    one, other = open_npy(*write_npy(tmp_path)).fingerprint, open_npy(*write_npy(tmp_path / "elsewhere")).fingerprint
    assert one == other
    tokens = CORPUS.tokens.copy()
    tokens[500, 3] += 1e-3
    assert open_npy(*write_npy(tmp_path, Corpus(tokens, CORPUS.offsets, []))).fingerprint != one


def test_a_fingerprint_of_a_huge_input_reads_both_ends_and_probes_between(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contents, "WHOLE_FINGERPRINT_BYTES", 1000)
    monkeypatch.setattr(contents, "_PROBE_BYTES", 16)
    data = bytearray(np.random.default_rng(1).bytes(100_000))
    found = set()
    for at in (None, 0, len(data) - 1):
        if at is not None:
            data[at] ^= 1
        (tmp_path / "data").write_bytes(data)
        found.add(fingerprint(FileContent(tmp_path / "data")))
    assert len(found) == 3


def test_fields_and_ids_come_with_their_documents(tmp_path: Path) -> None:
    rows = [{"n": n, "word": f"w{n}"} for n in range(len(CORPUS))]
    fields = write_lines(tmp_path / "rows.jsonl", rows)
    keys = write_lines(tmp_path / "ids.txt", [f"id {n} ü" for n in range(len(CORPUS))])
    source = open_npy(*write_npy(tmp_path), fields=fields, keys=keys, without=["word"])
    [block] = source.blocks(100)
    assert block.fields == [{"n": n} for n in range(100, 120)]
    assert block.keys == [f"id {n} ü" for n in range(100, 120)]


def test_lines_may_mix_forms_ids_and_blank_lines(tmp_path: Path) -> None:
    documents = [{**as_numbers(0), "id": 7, "metadata": {"a": 1}}, "  ", {**as_base64(1), "document_id": 9, "metadata": None}, as_base64(2)]
    source = VectorLines(write_lines(tmp_path / "v.jsonl", documents))
    [block] = source.blocks(0)
    assert block.keys == ["7", None, None]
    assert block.fields == [{"a": 1}, {}, {}]
    np.testing.assert_allclose(block.tokens, CORPUS.part(0, 3)[0], atol=1e-6)


def test_texts_are_encoded_and_their_keys_are_fields(tmp_path: Path) -> None:
    documents = [{"_id": "a", "title": "Rain", "text": "It rains.", "metadata": {"year": 1}}, {"text": "Snow", "year": 2}]
    encoder = LexicalEncoder(64)
    source = TextLines(write_lines(tmp_path / "t.jsonl", documents), encoder.encode_documents, encoder="lexical", without=["title"])
    [block] = source.blocks(0)
    expected, offsets = encoder.encode_documents(["Rain. It rains.", "Snow"])
    np.testing.assert_array_equal(block.tokens, expected)
    np.testing.assert_array_equal(block.offsets, offsets)
    assert block.fields == [{"year": 1, "text": "It rains."}, {"text": "Snow", "year": 2}]
    assert block.keys == ["a", None]
    assert len(source.sample(1)) >= 1
    other = TextLines(FileContent(tmp_path / "t.jsonl"), encoder.encode_documents, encoder="another")
    assert other.fingerprint != source.fingerprint


async def test_an_object_of_a_store_is_read_by_ranges(memory_store: ObjectStore, tmp_path: Path) -> None:
    tokens, lengths = write_npy(tmp_path)
    for name in ("tokens.npy", "doclens.npy"):
        await memory_store.put_if_absent(f"in/{name}", (tmp_path / name).read_bytes())
    with Background() as background:
        remote = open_npy(*(ObjectContent(memory_store, f"in/{name}", background) for name in ("tokens.npy", "doclens.npy")))
        local = open_npy(tokens, lengths)
        assert remote.fingerprint == local.fingerprint
        np.testing.assert_array_equal(remote.sample(200), local.sample(200))
        np.testing.assert_array_equal(next(remote.blocks(3)).tokens, next(local.blocks(3)).tokens)
        with pytest.raises(NotFound, match=r"no such object .*in/tokens"):
            ObjectContent(memory_store, "in/tokens", background)


def test_lines_are_found_wherever_chunks_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "lines"
    path.write_bytes("\ufefferste\r\n\n  \nzweite ü\ndritte".encode())
    for chunk_bytes in (1, 2, 3, 5, 100):
        monkeypatch.setattr(contents, "CHUNK_BYTES", chunk_bytes)
        found = [(line.number, line.data.decode().strip()) for line in lines(FileContent(path))]
        assert found == [(1, "erste"), (4, "zweite ü"), (5, "dritte")]


def test_a_file_that_changes_while_it_is_read_is_noticed(tmp_path: Path) -> None:
    source = open_npy(*write_npy(tmp_path))
    with (tmp_path / "tokens.npy").open("ab") as file:
        file.write(b"more")
    with pytest.raises(Conflict, match="changed while it was read"):
        next(source.blocks(0))


# What is wrong is named: (how to make it, what the message says)

Make = Callable[[Path], Any]


def _arrays(tokens: np.ndarray = CORPUS.tokens, lengths: np.ndarray = LENGTHS, **extra: list[Any]) -> Make:
    def make(folder: Path) -> Any:
        np.save(folder / "tokens.npy", tokens, allow_pickle=True)
        np.save(folder / "doclens.npy", lengths, allow_pickle=True)
        more = {name: write_lines(folder / name, documents) for name, documents in extra.items()}
        return open_npy(FileContent(folder / "tokens.npy"), FileContent(folder / "doclens.npy"), **more)

    return make


def _cut(folder: Path) -> Any:
    write_npy(folder)
    data = (folder / "tokens.npy").read_bytes()
    (folder / "tokens.npy").write_bytes(data[:-100])
    return open_npy(FileContent(folder / "tokens.npy"), FileContent(folder / "doclens.npy"))


def _vectors(*documents: Any) -> Make:
    return lambda folder: VectorLines(write_lines(folder / "v.jsonl", list(documents)))


def _bytes(data: bytes) -> Make:
    def make(folder: Path) -> Any:
        (folder / "v.jsonl").write_bytes(data)
        return VectorLines(FileContent(folder / "v.jsonl"))

    return make


def _kind(data: bytes) -> Make:
    def make(folder: Path) -> Any:
        (folder / "x").write_bytes(data)
        return kind_of(FileContent(folder / "x"))

    return make


def _texts(*documents: Any) -> Make:
    encode = LexicalEncoder(64).encode_documents
    return lambda folder: TextLines(write_lines(folder / "t.jsonl", list(documents)), encode, encoder="lexical")


def _zip(**arrays: np.ndarray) -> Make:
    def make(folder: Path) -> Any:
        np.savez(folder / "a.npz", **arrays)
        return open_npz(FileContent(folder / "a.npz"))

    return make


def _cut_zip(folder: Path) -> Any:
    np.savez(folder / "a.npz", tokens=CORPUS.tokens, doclens=LENGTHS)
    (folder / "a.npz").write_bytes((folder / "a.npz").read_bytes()[:-50])
    return open_npz(FileContent(folder / "a.npz"))


def _with(value: float) -> np.ndarray:
    tokens = CORPUS.tokens.copy()
    tokens[CORPUS.offsets[17] + 1, 2] = value
    return tokens


def _with_length(n: int, value: int) -> np.ndarray:
    lengths = LENGTHS.copy()
    lengths[n] = value
    return lengths


WRONG: dict[str, tuple[Make, str]] = {
    "npy cut short": (_cut, r"cut short file=.*tokens.npy expected=\d+ bytes found=\d+ bytes"),
    "npy of objects": (_arrays(np.array([{}], object)), r"array of objects is a pickle .*tokens.npy"),
    "npy of integers": (_arrays(np.ones((5, 3), np.int32)), r"not an array of token vectors .*found=int32 \(5, 3\)"),
    "npy of one axis": (_arrays(np.ones(5, np.float32)), r"not an array of token vectors .*found=float32 \(5,\)"),
    "npy in Fortran order": (_arrays(np.asfortranarray(CORPUS.tokens)), r"expected .*found=Fortran order"),
    "lengths of floats": (_arrays(lengths=LENGTHS.astype(float)), r"not an array of document lengths .*found=float64"),
    "lengths do not add up": (_arrays(lengths=LENGTHS[:-1]), r"do not add up .*expected=\d+ found=\d+"),
    "no tokens": (_arrays(lengths=_with_length(3, 0)), r"1 to 65535 tokens .*document=3 found=0"),
    "negative length": (_arrays(lengths=_with_length(3, -2)), r"document=3 found=-2"),
    "no documents": (_arrays(lengths=LENGTHS[:0]), "holds no documents"),
    "NaN": (_arrays(_with(np.nan)), r"not finite .*document=17"),
    "infinity in float16": (_arrays(_with(np.inf).astype(np.float16)), r"not finite .*document=17"),
    "too large for float32": (_arrays(_with(1.0).astype(float) * 1e300), r"not finite .*document=0"),
    "too few rows": (_arrays(fields=[{}] * 119), r"one line for each document .*expected=120 found=119"),
    "a row that is no object": (_arrays(fields=[{}] * 50 + [[1]] + [{}] * 69), r"not as expected file=.*fields line=51"),
    "an id twice": (_arrays(keys=[f"k{n % 119}" for n in range(120)]), r"comes twice .*id='k0' lines=1 and 120"),
    "an id too long": (_arrays(keys=["x" * 600] * 120), r"1 to 512 bytes .*line=1"),
    "zip lacks an array": (_zip(tokens=CORPUS.tokens), r"lacks an array .*expected=doclens or lengths found=\['tokens'\]"),
    "zip cut short": (_cut_zip, r"damaged or cut short .*a.npz"),
    "ragged": (_vectors(as_numbers(0), {"embeddings": [[1.0, 2.0], [1.0]]}), r"differ in length .*line=2 token=1 expected=2 found=1"),
    "another dimension": (_vectors(as_numbers(0), {"embeddings": [[1.0, 2.0]]}), r"another dimension .*line=2 expected=16 found=2"),
    "no vectors": (_vectors(as_numbers(0), {"embeddings": []}), r"1 to 65535 tokens .*line=2 found=0"),
    "neither form": (_vectors({"id": "a"}), r"embeddings or embeddings_b64 .*line=1 found=neither"),
    "both forms": (_vectors({**as_numbers(0), **as_base64(0)}), r"found=both"),
    "NaN in JSON": (_vectors('{"embeddings": [[NaN]]}'), r"not as expected .*line=1"),
    "infinite in JSON": (_vectors({"embeddings": [[1e39]], "id": "far"}), r"not finite .*line=1 token=0 id='far'"),
    "words for numbers": (_vectors({"embeddings": [["1"]]}), r"embeddings is not as expected .*line=1"),
    "not base64": (_vectors({"embeddings_b64": "!!", "shape": [1, 2]}), r"not base64 .*line=1"),
    "base64 of another shape": (_vectors({**as_base64(0), "shape": [1, 2]}), r"does not have its shape .*expected=8 bytes"),
    "base64 without shape": (_vectors({"embeddings_b64": "AAAA"}), r"needs a shape"),
    "an unknown key": (_vectors({**as_numbers(0), "meta": {}}), r"unknown field `meta`"),
    "a line id twice": (_vectors(*({**as_numbers(n), "id": f"k{n % 2}"} for n in range(3))), r"twice .*id='k0' lines=1 and 3"),
    "broken JSON": (_vectors(as_numbers(0), "{"), r"not as expected .*line=2"),
    "not UTF-8": (_bytes(b'{"embeddings": [[1]]}\n{"id": "\xff"}\n'), r"UTF-8 was expected .*line=2 found=0xff at byte"),
    "only blank lines": (_bytes(b"\n\n"), "holds no documents"),
    "an empty file": (_kind(b""), "is empty"),
    "something else": (_kind(b'{"a": 1}\n'), r"not an input that can be indexed .*found=\['a'\]"),
    "a text file": (_kind(b"hello\n"), r"not as expected .*line=1"),
    "neither text nor title": (_texts({"text": "a"}, {"body": "b"}), r"a text or a title .*line=2 found=\['body'\]"),
    "a text that is none": (_texts({"text": 1}), r"not as expected .*line=1"),
    "a text id twice": (_texts({"text": "a", "id": 1}, {"text": "b", "_id": "1"}), r"twice .*id='1' lines=1 and 2"),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_is_wrong_with_an_input_is_named_in_one_line(what: str, tmp_path: Path) -> None:
    make, message = WRONG[what]
    with pytest.raises(InvalidRequest, match=message) as caught:
        make(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="no such file"):
        FileContent(tmp_path / "nothing")
    with pytest.raises(InvalidRequest, match="regular file"):
        FileContent(tmp_path)
    with pytest.raises(InvalidRequest, match="regular file"):
        FileContent("/dev/null")
