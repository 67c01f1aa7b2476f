"""Encoders: the ONNX path with a tiny network made here byte by byte, the lexical encoder, pooling, batching, the demo collection."""

from __future__ import annotations

import asyncio
import hashlib
import json
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engine import demo
from engine.encoding import folder, hashing
from engine.encoding.batching import BatchingEncoder
from engine.encoding.commonness import weight
from engine.encoding.encoder import ModelInfo, flatten
from engine.encoding.hashing import LexicalEncoder
from engine.encoding.onnx import OnnxEncoder
from engine.encoding.pooling import pool_document, pool_tokens
from engine.encoding.words import stem, words
from engine.errors import CorruptData, InvalidRequest, NotFound, Unavailable
from fuzz.encoders import IDS, VOCABULARY, tiny_network, tiny_tokenizer

# --- a model folder of a network written by hand (fuzz/encoders.py) ---------------------------------------------------------------------------


def write_tokenizer(path: Path, pad_to: int | None = None) -> None:
    pytest.importorskip("tokenizers", reason="the extra `encoder` is not installed")
    path.write_text(tiny_tokenizer(pad_to))


def write_model(path: Path, *, int8: bool = False, network: bytes | None = None, pad_to: int | None = None, **config: object) -> Path:
    pytest.importorskip("onnxruntime", reason="the extra `encoder` is not installed")
    path.mkdir(parents=True, exist_ok=True)
    write_tokenizer(path / "tokenizer.json", pad_to)
    (path / folder.model_file(int8)).write_bytes(tiny_network() if network is None else network)
    settings = {"embedding_dim": 4, "query_length": 8, "document_length": 8, "do_query_expansion": False, **config}
    (path / "onnx_config.json").write_text(json.dumps(settings))
    return path


def split(encoded: tuple[np.ndarray, np.ndarray]) -> list[np.ndarray]:
    tokens, offsets = encoded
    assert tokens.dtype == np.float32
    assert offsets.dtype == np.int64
    return [tokens[start:end] for start, end in pairwise(offsets)]


def fed(rows: np.ndarray) -> list[str]:
    return [VOCABULARY[int(i)] for i in rows[:, 0]]


# --- onnx --------------------------------------------------------------------------------------------------------------------------------


def test_prefix_token_stands_at_position_1_and_comes_from_the_vocabulary(tmp_path: Path) -> None:
    encoder = OnnxEncoder(write_model(tmp_path), n_threads=1)
    assert fed(split(encoder.encode_documents([" the bee "]))[0]) == ["[CLS]", "[D]", "the", "bee", "[SEP]"]
    assert fed(split(encoder.encode_queries(["the bee"]))[0]) == ["[CLS]", "[Q]", "the", "bee", "[SEP]"]


def test_prefix_id_of_the_settings_wins_over_the_vocabulary(tmp_path: Path) -> None:
    encoder = OnnxEncoder(write_model(tmp_path, document_prefix_id=IDS["a"]), n_threads=1)
    assert fed(split(encoder.encode_documents(["bee"]))[0]) == ["[CLS]", "a", "bee", "[SEP]"]


def test_prefix_that_is_in_no_vocabulary_is_an_error_that_says_what_to_set(tmp_path: Path) -> None:
    with pytest.raises(CorruptData, match="query_prefix_id") as caught:
        OnnxEncoder(write_model(tmp_path, query_prefix="[nowhere]"))
    assert caught.value.code == "malformed"


@pytest.mark.parametrize(("n_words", "n_rows"), [(4, 7), (5, 8), (6, 8), (20, 8)])
def test_truncation_keeps_the_head_and_the_final_token(tmp_path: Path, n_words: int, n_rows: int) -> None:
    encoder = OnnxEncoder(write_model(tmp_path), n_threads=1)
    rows = fed(split(encoder.encode_documents(["bee " * n_words]))[0])
    assert rows == ["[CLS]", "[D]", *["bee"] * (n_rows - 3), "[SEP]"]


def test_skiplist_drops_rows_of_documents_but_not_of_queries(tmp_path: Path) -> None:
    encoder = OnnxEncoder(write_model(tmp_path, skiplist_words=[".", ",", "not in the vocabulary"]), n_threads=1)
    document = split(encoder.encode_documents(["bee , flower ."]))[0]
    assert fed(document) == ["[CLS]", "[D]", "bee", "flower", "[SEP]"]
    assert document[0, 3] == 7, "skipped tokens are attended"
    assert "," in fed(split(encoder.encode_queries(["bee , flower"]))[0])


def test_query_expansion_fills_up_with_attended_mask_tokens(tmp_path: Path) -> None:
    encoder = OnnxEncoder(write_model(tmp_path, do_query_expansion=True), n_threads=1)
    for rows, n_real in zip(split(encoder.encode_queries(["bee", "the bee finds a flower ."])), (4, 8), strict=True):
        assert fed(rows)[n_real:] == ["[MASK]"] * (8 - n_real)
        assert (rows[:, 1] == 1).all()
        assert (rows[:, 3] == 8).all()
    assert len(split(encoder.encode_documents(["bee"]))[0]) == 4, "documents are never expanded"


def test_default_mask_and_pad_ids_are_resolved_from_the_tokenizer_and_set_ones_are_kept(tmp_path: Path) -> None:
    assert OnnxEncoder(write_model(tmp_path)).info.mask_token_id == IDS["[MASK]"]
    info = OnnxEncoder(write_model(tmp_path, mask_token_id=11, pad_token_id=12)).info
    assert (info.mask_token_id, info.pad_token_id) == (11, 12)


def test_padding_of_the_batch_is_not_attended_and_order_is_kept(tmp_path: Path) -> None:
    encoder = OnnxEncoder(write_model(tmp_path), n_threads=1)
    texts = ["bee", "the bee finds a flower", "", "a flower", "the the the"]
    together = split(encoder.encode_documents(texts))
    for text, rows in zip(texts, together, strict=True):
        assert fed(rows) == ["[CLS]", "[D]", *text.split(), "[SEP]"]
        assert (rows[:, 3] == len(rows)).all(), "padding is not attended"
        assert np.array_equal(rows, split(encoder.encode_documents([text]))[0])


def test_padding_done_by_the_tokenizer_itself_is_not_text(tmp_path: Path) -> None:
    encoder = OnnxEncoder(write_model(tmp_path, pad_to=30), n_threads=1)
    assert fed(split(encoder.encode_documents(["a bee"]))[0]) == ["[CLS]", "[D]", "a", "bee", "[SEP]"]


def test_lower_casing_follows_the_settings(tmp_path: Path) -> None:
    assert fed(split(OnnxEncoder(write_model(tmp_path)).encode_queries(["BEE"]))[0])[2] == "[UNK]"
    assert fed(split(OnnxEncoder(write_model(tmp_path, do_lower_case=True)).encode_queries(["BEE"]))[0])[2] == "bee"


def test_token_types_are_zero_and_are_fed_only_where_the_settings_say_so(tmp_path: Path) -> None:
    with_types = OnnxEncoder(write_model(tmp_path / "with"), n_threads=1)
    assert (with_types.encode_documents(["a bee"])[0][:, 2] == 0).all()
    without = OnnxEncoder(
        write_model(tmp_path / "without", network=tiny_network(token_types=False), uses_token_type_ids=False), n_threads=1
    )
    assert len(without.encode_documents(["a bee"])[0]) == 5
    with pytest.raises(CorruptData, match="inputs"):
        OnnxEncoder(write_model(tmp_path / "wrong", uses_token_type_ids=False))


def test_lengths_can_be_overridden_and_are_checked(tmp_path: Path) -> None:
    path = write_model(tmp_path)
    encoder = OnnxEncoder(path, query_length=4, document_length=5)
    assert (encoder.info.query_length, encoder.info.document_length) == (4, 5)
    assert len(encoder.encode_queries(["bee bee bee bee"])[0]) == 4
    with pytest.raises(InvalidRequest, match="query_length"):
        OnnxEncoder(path, query_length=2)


def test_int8_loads_exactly_its_own_file(tmp_path: Path) -> None:
    path = write_model(tmp_path, int8=True)
    encoder = OnnxEncoder(path, int8=True)
    assert encoder.info.quantized
    assert encoder.info.batch_size == 1, "an int8 text must not depend on its neighbours"
    with pytest.raises(NotFound, match="switch int8 on"):
        OnnxEncoder(path)
    with pytest.raises(NotFound, match=r"onnx_config\.json, tokenizer\.json, model\.onnx"):
        OnnxEncoder(tmp_path / "nothing")


def test_files_that_contradict_each_other_are_named(tmp_path: Path) -> None:
    with pytest.raises(CorruptData, match="embedding_dim"):
        OnnxEncoder(write_model(tmp_path / "declared", embedding_dim=128))
    with pytest.raises(CorruptData, match="not a network"):
        OnnxEncoder(write_model(tmp_path / "broken", network=b"not a network"))
    path = write_model(tmp_path / "settings")
    (path / "onnx_config.json").write_text('{"query_length": "long"}')
    with pytest.raises(CorruptData, match="query_length"):
        OnnxEncoder(path)


def test_network_that_does_not_declare_its_dimension_is_checked_when_it_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engine.encoding.onnx._check_graph", lambda *_: None)
    encoder = OnnxEncoder(write_model(tmp_path, embedding_dim=128))
    with pytest.raises(CorruptData, match="another shape"):
        encoder.encode_queries(["bee"])


def test_no_texts_give_no_tokens(tmp_path: Path) -> None:
    for encoder in (OnnxEncoder(write_model(tmp_path)), LexicalEncoder()):
        tokens, offsets = encoder.encode_documents([])
        assert tokens.shape == (0, encoder.info.embedding_dim)
        assert offsets.tolist() == [0]


# --- where models come from --------------------------------------------------------------------------------------------------------------


@dataclass
class Stored:
    data: bytes
    etag: str


class OneModelStore:
    def __init__(self, objects: dict[str, bytes]) -> None:
        self.objects = objects
        self.calls: list[str] = []

    async def get(self, name: str) -> Stored:
        self.calls.append(f"get {name}")
        if name not in self.objects:
            raise NotFound("no such object", object=name)
        return Stored(self.objects[name], hashlib.sha256(self.objects[name]).hexdigest())

    async def get_if_changed(self, name: str, etag: str) -> Stored | None:
        self.calls.append(f"ask {name}")
        found = Stored(self.objects[name], hashlib.sha256(self.objects[name]).hexdigest())
        return None if found.etag == etag else found


MODEL = {"m/onnx_config.json": b"{}", "m/tokenizer.json": b"tokens", "m/model.onnx": b"network", "m/model_int8.onnx": b"small"}


async def test_model_from_the_store_is_fetched_once_and_then_only_asked_about(tmp_path: Path) -> None:
    store = OneModelStore(dict(MODEL))
    path = await folder.load_from_store(store, "m/", tmp_path)
    assert store.calls == ["get m/onnx_config.json", "get m/tokenizer.json", "get m/model.onnx"], "the other precision is not fetched"
    assert (path / "model.onnx").read_bytes() == b"network"
    store.calls.clear()
    assert await folder.load_from_store(store, "m", tmp_path) == path
    assert store.calls == ["ask m/onnx_config.json", "ask m/tokenizer.json", "ask m/model.onnx"]


async def test_model_file_that_changed_in_the_store_or_broke_on_disk_is_fetched_again(tmp_path: Path) -> None:
    store = OneModelStore(dict(MODEL))
    path = await folder.load_from_store(store, "m", tmp_path, int8=True)
    store.objects["m/tokenizer.json"] = b"tokens, second edition"
    (path / "model_int8.onnx").write_bytes(b"smalL")
    store.calls.clear()
    await folder.load_from_store(store, "m", tmp_path, int8=True)
    assert (path / "tokenizer.json").read_bytes() == b"tokens, second edition"
    assert (path / "model_int8.onnx").read_bytes() == b"small"
    assert store.calls == ["ask m/onnx_config.json", "ask m/tokenizer.json", "get m/model_int8.onnx"]
    assert sorted(p.name for p in path.iterdir()) == ["fetched.json", "model_int8.onnx", "onnx_config.json", "tokenizer.json"]


async def test_model_that_is_not_in_the_store_is_not_found(tmp_path: Path) -> None:
    with pytest.raises(NotFound):
        await folder.load_from_store(OneModelStore({}), "m", tmp_path)


def test_hub_name_that_is_a_local_folder_needs_no_hub(tmp_path: Path) -> None:
    for name in folder.model_files(False):
        (tmp_path / name).touch()
    assert folder.load_from_hub(str(tmp_path)) == tmp_path
    with pytest.raises(NotFound, match="switch int8 off"):
        folder.load_from_hub(str(tmp_path), int8=True)


def test_hub_is_asked_only_for_the_needed_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = pytest.importorskip("huggingface_hub", reason="the extra `encoder` is not installed")
    asked: dict[str, Any] = {}

    def snapshot_download(name: str, **options: Any) -> str:
        asked.update(options, name=name)
        for file in options["allow_patterns"]:
            (tmp_path / file).touch()
        return str(tmp_path)

    monkeypatch.setattr(hub, "snapshot_download", snapshot_download)
    assert folder.load_from_hub("owner/model", int8=True, revision="v2") == tmp_path
    assert asked["allow_patterns"] == ["onnx_config.json", "tokenizer.json", "model_int8.onnx"]
    assert (asked["name"], asked["revision"]) == ("owner/model", "v2")


def test_the_hubs_own_code_finds_a_model_in_its_local_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """huggingface_hub itself, offline, on a cache folder in its layout: what a machine has that downloaded the model before."""
    pytest.importorskip("huggingface_hub", reason="the extra `encoder` is not installed")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    revision = "0123456789abcdef0123456789abcdef01234567"
    snapshot = tmp_path / "models--owner--model" / "snapshots" / revision
    snapshot.mkdir(parents=True)
    for name in folder.model_files(False):
        (snapshot / name).touch()
    refs = tmp_path / "models--owner--model" / "refs"
    refs.mkdir()
    (refs / "main").write_text(revision)
    assert folder.load_from_hub("owner/model", cache_dir=tmp_path) == snapshot
    assert folder.load_from_hub("owner/model", cache_dir=tmp_path, revision=revision) == snapshot
    with pytest.raises(NotFound, match="switch int8 off"):
        folder.load_from_hub("owner/model", cache_dir=tmp_path, int8=True)
    with pytest.raises(Unavailable, match="not in the local cache"):
        folder.load_from_hub("owner/model", cache_dir=tmp_path, revision="v2")


def test_hub_failures_say_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("huggingface_hub", reason="the extra `encoder` is not installed")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(Unavailable, match="not in the local cache"):
        folder.load_from_hub("owner/model", cache_dir=tmp_path)
    with pytest.raises(InvalidRequest, match="owner/name"):
        folder.load_from_hub("not/a/model/name")


# --- words -------------------------------------------------------------------------------------------------------------------------------


def test_words_are_folded_and_split_at_what_is_no_letter_or_digit() -> None:
    assert words("Bees' Café №5 — don't; bee's MULTI-vector foo_bar") == [
        *("bees", "cafe", "no5", "dont", "bee"),
        *("multi", "vector", "foo", "bar"),
    ]
    assert words("日本語 ok") == ["日本", "本語", "ok"]
    assert words("!?") == []
    assert words("x" * 1000) == ["x" * 64]


@pytest.mark.parametrize(
    ("forms", "expected"),
    [
        ("connect connected connecting connection connections", "connect"),
        ("hop hopping hopped hops", "hop"),
        ("file filed filing files", "file"),
        ("generalize generalization generalizations", "gener"),
        ("happy happiness", "happi"),
        ("agreed agree", "agre"),
        ("yes", "ye"),
    ],
)
def test_forms_of_a_word_have_one_stem(forms: str, expected: str) -> None:
    assert {stem(form) for form in forms.split()} == {expected}


def test_words_that_are_not_english_letters_are_not_stemmed() -> None:
    assert [stem(word) for word in ("m3s", "is", "größe", "日本")] == ["m3s", "is", "größe", "日本"]


def test_weights_fall_with_commonness() -> None:
    shares = [weight(stem(word)) for word in ("the", "often", "method", "bridge", "capsaicin")]
    assert shares == sorted(shares)
    assert (shares[0], shares[-1]) == (0.05, 1.0)


# --- lexical encoder ---------------------------------------------------------------------------------------------------------------------


def test_vectors_are_the_golden_ones_on_every_machine_and_release() -> None:
    """A failure here means that stored indexes would no longer match: give the encoder a new NAME instead of new values."""
    encoder = LexicalEncoder()
    texts = ["How do bees find flowers, and why?", "The bridge collapsed; the wind did it. Café №5, 日本語", ""]
    documents, _ = encoder.encode_documents(texts)
    queries, _ = encoder.encode_queries(texts)
    assert hashlib.sha256(documents.tobytes()).hexdigest() == GOLDEN_DOCUMENTS
    assert hashlib.sha256(queries.tobytes()).hexdigest() == GOLDEN_QUERIES
    assert hashlib.sha256(hashing.word_vector("bee", 300).tobytes()).hexdigest() == GOLDEN_WIDE_WORD


GOLDEN_DOCUMENTS = "da87008cb61df153f9684b9ba80bc8ddb233d37c598d68f896abe0b13bbd1899"
GOLDEN_QUERIES = "b93c05d583e4975eeda8bc2ecab8d241e7fb647248ab9f047284a7ec60f51cf3"
GOLDEN_WIDE_WORD = "f6d589330057b267730404639d1821557cb522d09f41c79980a5dbdd2199a1af"


def lexical_scores(query: str, documents: Sequence[str], encoder: LexicalEncoder) -> np.ndarray:
    tokens, offsets = encoder.encode_documents(documents)
    similarities = encoder.encode_queries([query])[0] @ tokens.T
    best: np.ndarray = np.maximum.reduceat(similarities, offsets[:-1], axis=1)
    scores: np.ndarray = best.sum(axis=0)
    return scores


def test_lexical_documents_are_unit_rows_without_repeats() -> None:
    rows = split(LexicalEncoder().encode_documents(["bee bees BEE flower"]))[0]
    assert rows.shape == (2, 128)
    assert np.allclose(np.linalg.norm(rows, axis=1), 1, atol=1e-6)


def test_equal_words_match_fully_forms_wholly_look_alikes_partly_and_strangers_by_chance() -> None:
    def cosine(one: str, other: str) -> float:
        return float(hashing.word_vector(stem(one), 127) @ hashing.word_vector(stem(other), 127))

    look_alikes = [("aluminium", "aluminum"), ("penicillin", "penicilin"), ("millennium", "millenium"), ("centre", "center")]
    strangers = [("bee", "bridge"), ("penicillin", "orbit"), ("aluminium", "kitchen"), ("centre", "whale")]
    assert cosine("bee", "bees") == pytest.approx(1, abs=1e-6)
    assert np.mean([cosine(*pair) for pair in look_alikes]) > 0.3
    assert all(abs(cosine(*pair)) < 0.35 for pair in strangers)


def test_match_counts_more_in_a_shorter_text_and_where_the_word_is_repeated() -> None:
    encoder = LexicalEncoder()
    filler = "completely unrelated padding sentences mention penguins granite violins and sailing " * 10
    once_long, once_short, twice_short = lexical_scores("bees", [f"bees {filler}", "bees sleep", "bees sleep, bees eat"], encoder)
    assert once_long < once_short < twice_short <= hashing.FULL_WEIGHT * weight("bee") + 1e-4


def test_function_words_do_not_drown_the_subject() -> None:
    scores = lexical_scores("what is the purpose of a resonator", ["What is the purpose of a day?", "A resonator."], LexicalEncoder())
    assert scores[1] > scores[0]


def test_real_match_passes_the_clients_default_threshold_even_in_a_long_text() -> None:
    long_text = " ".join(f"word{i}" for i in range(1000)) + " resonator"
    encoder = LexicalEncoder()
    best = (encoder.encode_queries(["resonator"])[0] @ encoder.encode_documents([long_text])[0].T).max()
    assert best > 0.4


def test_text_without_words_matches_nothing_and_still_has_a_token() -> None:
    encoder = LexicalEncoder()
    assert np.array_equal(lexical_scores("bee", ["", "?!"], encoder), [0, 0])
    assert np.array_equal(lexical_scores("...", ["bee", ""], encoder), [0, 0])


def test_lexical_vectors_do_not_depend_on_what_was_encoded_before_or_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [f"alpha{i} beta{i % 7} gamma delta{i * 3}" for i in range(60)]
    expected = split(LexicalEncoder().encode_documents(texts))
    monkeypatch.setattr(hashing, "MAX_REMEMBERED_WORDS", 10)
    forgetful = LexicalEncoder()
    for i in reversed(range(60)):
        assert np.array_equal(split(forgetful.encode_documents([texts[i]]))[0], expected[i])


def test_lexical_encoder_may_be_used_from_many_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hashing, "MAX_REMEMBERED_WORDS", 50)
    texts = [" ".join(f"w{(i * 31 + j) % 400}" for j in range(20)) for i in range(100)]
    expected = LexicalEncoder().encode_documents(texts)[0]
    shared = LexicalEncoder()
    found: list[np.ndarray] = []
    threads = [threading.Thread(target=lambda: found.append(shared.encode_documents(texts)[0])) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4
    assert all(np.array_equal(tokens, expected) for tokens in found)


def test_lexical_dimension_is_checked() -> None:
    assert LexicalEncoder(96).encode_queries(["bee"])[0].shape == (1, 96)
    with pytest.raises(InvalidRequest):
        LexicalEncoder(8)


# --- pooling -----------------------------------------------------------------------------------------------------------------------------


def rows_as_a_set(rows: np.ndarray) -> np.ndarray:
    return rows[np.lexsort(rows.T)]


@pytest.mark.parametrize("pool_factor", [2, 3, 7])
@pytest.mark.parametrize("n_tokens", [3, 8, 41])
def test_pooling_is_scipys_ward_linkage_on_cosine_distances(pool_factor: int, n_tokens: int) -> None:
    from scipy.cluster.hierarchy import fcluster, linkage  # type: ignore[import-untyped]

    tokens = np.random.default_rng(n_tokens).normal(size=(n_tokens, 16)).astype(np.float32)
    rest = tokens[1:].astype(np.float64)
    unit = rest / np.linalg.norm(rest, axis=1, keepdims=True)
    condensed = (1 - unit @ unit.T)[np.triu_indices(len(rest), 1)]
    labels = fcluster(linkage(condensed, "ward"), max(len(rest) // pool_factor, 1), criterion="maxclust")
    expected = np.array([rest[labels == label].mean(axis=0) for label in np.unique(labels)])
    pooled = pool_document(tokens, pool_factor)
    assert np.array_equal(pooled[0], tokens[0])
    assert np.allclose(rows_as_a_set(pooled[1:]), rows_as_a_set(expected), atol=1e-6)


def test_pooling_leaves_alone_what_it_cannot_shorten() -> None:
    tokens = np.random.default_rng(0).normal(size=(5, 4)).astype(np.float32)
    offsets = np.array([0, 0, 1, 5])
    for factor in (None, 0, 1):
        assert pool_tokens(tokens, offsets, factor)[0] is tokens
    pooled, cut = pool_tokens(tokens, offsets, 100)
    assert cut.tolist() == [0, 0, 1, 3], "no rows, only [CLS], [CLS] and one cluster"
    assert np.array_equal(pooled[0], tokens[0])


def test_pooling_takes_zero_and_equal_rows() -> None:
    tokens = np.zeros((9, 4), np.float32)
    tokens[5:] = [1, 0, 0, 0]
    pooled = pool_document(tokens, 2)
    assert np.isfinite(pooled).all()
    assert len(pooled) <= 5


def test_encoders_pool_documents() -> None:
    tokens, offsets = LexicalEncoder().encode_documents(["one bee finds many fine flowers in spring"], 2)
    assert len(tokens) == offsets[-1] == 1 + 7 // 2


# --- batching ----------------------------------------------------------------------------------------------------------------------------


class SlowEncoder:
    """Vectors are text lengths; the text `bad` cannot be encoded; `gate` holds the worker."""

    def __init__(self) -> None:
        self.calls: list[tuple[list[str], int | None]] = []
        self.gate = threading.Event()
        self.gate.set()
        self.entered = threading.Event()
        self.info: ModelInfo = LexicalEncoder().info

    def encode_documents(self, texts: Sequence[str], pool_factor: int | None = None) -> tuple[np.ndarray, np.ndarray]:
        self.calls.append((list(texts), pool_factor))
        self.entered.set()
        assert self.gate.wait(10)
        if "bad" in texts:
            raise ValueError("a bad text")
        return flatten([np.full((len(text), 1), len(text), np.float32) for text in texts], 1)

    def encode_queries(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        return self.encode_documents(texts, -1)


def is_answer(answer: tuple[np.ndarray, np.ndarray], texts: Sequence[str]) -> bool:
    tokens, offsets = answer
    return bool(np.array_equal(np.diff(offsets), [len(text) for text in texts]) and len(tokens) == offsets[-1])


async def test_requests_that_arrive_together_share_a_run_and_get_their_own_rows() -> None:
    slow = SlowEncoder()
    encoder = BatchingEncoder(slow)
    requests = [["x" * (i + 1), "yy"] for i in range(10)]
    answers = await asyncio.gather(*(encoder.encode_queries(texts) for texts in requests))
    assert len(slow.calls) == 1
    assert all(is_answer(answer, texts) for answer, texts in zip(answers, requests, strict=True))
    encoder.close()


async def test_requests_that_arrive_during_a_run_share_the_next_one_by_pool_factor() -> None:
    slow = SlowEncoder()
    encoder = BatchingEncoder(slow)
    slow.gate.clear()
    first = asyncio.create_task(encoder.encode_documents(["first"]))
    await asyncio.to_thread(slow.entered.wait, 10)
    later = [asyncio.create_task(encoder.encode_documents(["x" * (i + 1)], i % 2 * 3)) for i in range(8)]
    query = asyncio.create_task(encoder.encode_queries(["q"]))
    await asyncio.sleep(0.01)
    slow.gate.set()
    await asyncio.gather(first, query, *later)
    documents = sorted((pool or 0, len(texts)) for texts, pool in slow.calls if pool != -1)
    assert documents == [(0, 1), (0, 4), (3, 4)]
    assert (["q"], -1) in slow.calls
    encoder.close()


async def test_a_search_does_not_queue_behind_an_ingest() -> None:
    slow = SlowEncoder()
    encoder = BatchingEncoder(slow)
    slow.gate.clear()
    ingest = asyncio.create_task(encoder.encode_documents(["text"] * 5))
    await asyncio.to_thread(slow.entered.wait, 10)
    slow.entered.clear()
    query = asyncio.create_task(encoder.encode_queries(["q"]))
    assert await asyncio.to_thread(slow.entered.wait, 10), "the query began while the ingest was still running"
    slow.gate.set()
    await asyncio.gather(ingest, query)
    encoder.close()


async def test_groups_end_at_max_texts_and_long_requests_go_in_pieces() -> None:
    slow = SlowEncoder()
    encoder = BatchingEncoder(slow, max_texts=4)
    await asyncio.gather(*(encoder.encode_queries(["a", "b", "c"]) for _ in range(3)))
    assert [len(texts) for texts, _ in slow.calls] == [3, 3, 3]
    texts = [str(10**i) for i in range(10)]
    assert is_answer(await encoder.encode_documents(texts), texts)
    assert [len(sent) for sent, _ in slow.calls[3:]] == [4, 4, 2]
    encoder.close()


async def test_an_error_goes_to_its_own_caller_only() -> None:
    encoder = BatchingEncoder(SlowEncoder())
    good, bad, also_good = await asyncio.gather(
        encoder.encode_queries(["fine"]), encoder.encode_queries(["bad"]), encoder.encode_queries(["too"]), return_exceptions=True
    )
    assert isinstance(bad, ValueError)
    assert isinstance(good, tuple)
    assert is_answer(good, ["fine"])
    assert isinstance(also_good, tuple)
    assert is_answer(also_good, ["too"])
    encoder.close()


async def test_a_full_queue_refuses_and_comes_free_again() -> None:
    slow = SlowEncoder()
    encoder = BatchingEncoder(slow, max_waiting_texts=3)
    slow.gate.clear()
    waiting = [asyncio.create_task(encoder.encode_queries(["a"])) for _ in range(3)]
    await asyncio.to_thread(slow.entered.wait, 10)
    with pytest.raises(Unavailable, match="too many texts") as refused:
        await encoder.encode_queries(["b"])
    assert refused.value.retry_after_s > 0
    slow.gate.set()
    await asyncio.gather(*waiting)
    assert is_answer(await encoder.encode_queries(["a", "b", "c", "d"]), "abcd"), "alone, any size is let in"
    encoder.close()


async def test_a_cancelled_caller_disturbs_nobody_and_its_texts_are_not_encoded() -> None:
    slow = SlowEncoder()
    encoder = BatchingEncoder(slow, max_waiting_texts=4)
    slow.gate.clear()
    running = asyncio.create_task(encoder.encode_queries(["running"]))
    await asyncio.to_thread(slow.entered.wait, 10)
    gone = asyncio.create_task(encoder.encode_queries(["gone"]))
    kept = asyncio.create_task(encoder.encode_queries(["kept"]))
    await asyncio.sleep(0.01)
    gone.cancel()
    running.cancel()
    await asyncio.sleep(0)
    slow.gate.set()
    assert is_answer(await kept, ["kept"])
    assert slow.calls[1][0] == ["kept"]
    assert (await asyncio.gather(gone, running, return_exceptions=True)).count is not None
    assert is_answer(await encoder.encode_queries(["abcd"] * 4), ["abcd"] * 4), "the queue's count went back to zero"
    encoder.close()


def test_one_batching_encoder_serves_one_event_loop_after_another() -> None:
    encoder = BatchingEncoder(SlowEncoder())
    for _ in range(3):
        assert is_answer(asyncio.run(encoder.encode_queries(["text"])), ["text"])
    encoder.close()


# --- demo collection ---------------------------------------------------------------------------------------------------------------------


def test_demo_documents_have_the_fields_that_the_guide_filters_by() -> None:
    documents = demo.documents()
    assert len(documents) >= 280
    assert all(set(document) == {"title", "topic", "year", "text"} for document in documents)
    assert all(isinstance(document["year"], int) or document["year"] is None for document in documents)
    assert len({document["title"] for document in documents}) == len(documents)
    assert len({document["topic"] for document in documents}) >= 8
    documents[0]["title"] = "changed by a caller"
    assert demo.documents()[0]["title"] != "changed by a caller"


@pytest.mark.parametrize(
    ("query", "title"),
    [
        ("how do bees find flowers", "How bees find flowers"),
        ("bridge that collapsed in the wind", "The Tacoma Narrows Bridge"),
        ("why does bread rise", "Why bread rises"),
        ("who invented the printing press", "Gutenberg's printing press"),
        ("why is the sky blue", "Why the sky is blue"),
        ("first people to walk on the moon", "The first walk on the Moon"),
        ("what makes chillies hot", "The heat of chillies"),
        ("how vaccines work", "How vaccines work"),
    ],
)
def test_embedded_encoder_answers_questions_about_the_demo_collection(query: str, title: str) -> None:
    documents = demo.documents()
    scores = lexical_scores(query, [demo.text(document) for document in documents], LexicalEncoder())
    best = [documents[i]["title"] for i in np.argsort(-scores, kind="stable")[:3]]
    assert title in best
