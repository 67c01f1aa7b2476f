"""Token vectors from a ColBERT model in NextPlaid's folder form: a fast tokenizer, an ONNX network, a JSON of settings.

The rules of text preparation are NextPlaid's to the letter, so that an index made by the one is searched by the other: prefix id at
position 1, truncation that keeps the last token, skiplist for documents only, expansion with attended mask tokens for queries. The
network projects and normalises; nothing is done to its output but the choice of rows. onnxruntime and tokenizers are an extra and
imported when a model is opened. This module does not fetch models (folder.py) and does not merge requests (batching.py).

Layout of the network: inputs input_ids, attention_mask and, if the settings say so, token_type_ids, all int64 (batch, length);
output `output` float32 (batch, length, D).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from engine.config import MAX_DIM, MAX_DOCUMENT_TOKENS, MAX_QUERY_TOKENS
from engine.encoding.encoder import ModelInfo, flatten
from engine.encoding.folder import CONFIG_FILE, TOKENIZER_FILE, check_folder, model_file
from engine.encoding.pooling import pool_tokens
from engine.errors import CorruptData, EngineError, InvalidRequest

DEFAULT_BATCH_SIZE = 32
"""Texts per run of a float32 network on a CPU (NextPlaid's value). An int8 network scales its activations by the whole batch, so there a
neighbour changes a text's vectors (mean cosine 0.99 for queries); and batches were not faster. README.md has the numbers."""

MAX_BATCH_TOKENS = 4096
"""Padded tokens per run: 32 texts of 128. Longer texts go in smaller batches, so that memory does not grow with their length."""

MIN_LENGTH = 3
"""[CLS], prefix, [SEP]: shorter limits leave no room for a word."""

MAX_TOKEN_ID = (1 << 31) - 1
"""Of ids in the settings; tokenizers' own are 32-bit."""

MAX_REASON = 400
"""Characters of what a library says of a file; it may quote much of it."""


class OnnxConfig(msgspec.Struct, frozen=True, kw_only=True):
    """onnx_config.json with NextPlaid's defaults. Unknown keys are ignored; attend_to_expansion_tokens has no effect, as there."""

    query_prefix: str = "[Q] "
    document_prefix: str = "[D] "
    query_length: int = 48
    document_length: int = 300
    do_query_expansion: bool = True
    embedding_dim: int = 128
    uses_token_type_ids: bool = True
    mask_token_id: int = 103
    pad_token_id: int = 0
    skiplist_words: list[str] = []
    do_lower_case: bool = False
    query_prefix_id: int | None = None
    document_prefix_id: int | None = None
    model_name: str | None = None
    model_class: str | None = None
    model_type: str | None = "ColBERT"
    attend_to_expansion_tokens: bool = False


def read_config(path: Path) -> OnnxConfig:
    """Parse onnx_config.json. Raises CorruptData (malformed) with the parser's words."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=OnnxConfig)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as wrong:
        raise CorruptData(f"{CONFIG_FILE} does not parse: {wrong}", code="malformed", object=str(path)) from wrong


class OnnxEncoder:
    """One loaded model; an Encoder. One session serves all threads: onnxruntime runs it from several at once without a lock."""

    def __init__(
        self,
        folder: Path,
        *,
        int8: bool = False,
        name: str | None = None,
        query_length: int | None = None,
        document_length: int | None = None,
        batch_size: int | None = None,
        n_threads: int = 0,
    ) -> None:
        """Open the model in `folder`.

        int8                           load exactly model_int8.onnx, otherwise exactly model.onnx
        query_length, document_length  override the settings' token limits
        batch_size                     texts per run of the network; None is 1 for int8, so that a text has the same vectors in any company,
                                       and DEFAULT_BATCH_SIZE otherwise
        n_threads                      intra-op threads; 0 lets onnxruntime take every core

        Raises NotFound for a missing file, CorruptData (malformed) for files that contradict each other, InvalidRequest for impossible
        arguments or if the packages of the extra `encoder` are not installed. Took 0.4 s for 23 MB.
        """
        check_folder(folder, int8)
        config = read_config(folder / CONFIG_FILE)
        self._query_length = _checked_length("query_length", query_length or config.query_length, MAX_QUERY_TOKENS)
        self._document_length = _checked_length("document_length", document_length or config.document_length, MAX_DOCUMENT_TOKENS)
        if not 1 <= config.embedding_dim <= MAX_DIM:
            raise _contradiction("embedding_dim is no dimension of a vector", f"1 to {MAX_DIM}", config.embedding_dim)
        if batch_size is None:
            batch_size = 1 if int8 else DEFAULT_BATCH_SIZE
        if batch_size < 1 or n_threads < 0:
            raise InvalidRequest("batch_size is at least 1 and n_threads at least 0", batch_size=batch_size, n_threads=n_threads)
        self._config = config
        self._tokenizer = _open_tokenizer(folder / TOKENIZER_FILE)
        self._session = _open_session(folder / model_file(int8), n_threads)
        with _libraries(f"{model_file(int8)} does not describe itself", object=str(folder)):
            _check_graph(self._session, config)
        self._query_prefix_id = self._prefix_id("query", config.query_prefix_id, config.query_prefix)
        self._document_prefix_id = self._prefix_id("document", config.document_prefix_id, config.document_prefix)
        self._mask_id = self._special_id(config.mask_token_id, OnnxConfig().mask_token_id, ("[MASK]", "<mask>"))
        self._pad_id = self._special_id(config.pad_token_id, OnnxConfig().pad_token_id, ("[PAD]", "<pad>"))
        skipped = (self._tokenizer.token_to_id(word) for word in config.skiplist_words)
        self._skiplist = np.array(sorted({i for i in skipped if i is not None}), np.int64)
        self.info = ModelInfo(
            name=name or config.model_name,
            path=str(folder),
            quantized=int8,
            embedding_dim=config.embedding_dim,
            batch_size=batch_size,
            num_sessions=1,
            query_prefix=config.query_prefix,
            document_prefix=config.document_prefix,
            query_length=self._query_length,
            document_length=self._document_length,
            do_query_expansion=config.do_query_expansion,
            uses_token_type_ids=config.uses_token_type_ids,
            mask_token_id=self._mask_id,
            pad_token_id=self._pad_id,
            kind="onnx",
        )

    def encode_documents(self, texts: Sequence[str], pool_factor: int | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Rows of the real positions ([CLS], prefix, words, [SEP]) whose token is not in the skiplist; see Encoder."""
        inputs = self._token_ids(texts, self._document_prefix_id, self._document_length)
        outputs = self._run(inputs, [len(ids) for ids in inputs])
        kept = [rows[~np.isin(ids, self._skiplist)] for ids, rows in zip(inputs, outputs, strict=True)]
        return pool_tokens(*flatten(kept, self.info.embedding_dim), pool_factor)

    def encode_queries(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Rows of the real positions, or with expansion always query_length rows, filled up with attended mask tokens; see Encoder."""
        inputs = self._token_ids(texts, self._query_prefix_id, self._query_length)
        if self._config.do_query_expansion:
            inputs = [np.pad(ids, (0, self._query_length - len(ids)), constant_values=self._mask_id) for ids in inputs]
        return flatten(self._run(inputs, [len(ids) for ids in inputs]), self.info.embedding_dim)

    def _token_ids(self, texts: Sequence[str], prefix_id: int, max_length: int) -> list[np.ndarray]:
        """Each text's input ids, int64 (<= max_length,): its tokens with the prefix at position 1."""
        prepared = [text.strip() for text in texts]
        if self._config.do_lower_case:
            prepared = [text.lower() for text in prepared]
        found = []
        with _libraries(f"{TOKENIZER_FILE} cannot cut texts into tokens", object=self.info.path):
            encodings = self._tokenizer.encode_batch(prepared)
        for encoding in encodings:
            # A tokenizer.json may carry its own padding; only the leading run of attended tokens is the text.
            ids = list(itertools.compress(encoding.ids, itertools.takewhile(bool, encoding.attention_mask)))
            if len(ids) > max_length - 1:
                ids = ids[: max_length - 2] + ids[-1:]
            found.append(np.array([*ids[:1], prefix_id, *ids[1:]], np.int64))
        return found

    def _run(self, inputs: list[np.ndarray], lengths: list[int]) -> list[np.ndarray]:
        """The network's rows of each input, float32 (length, D), in the order of the inputs; like lengths share a batch."""
        outputs: list[np.ndarray] = [np.empty(0)] * len(inputs)
        for batch in _batches(lengths, self.info.batch_size):
            width = lengths[batch[0]]
            ids = np.full((len(batch), width), self._pad_id, np.int64)
            mask = np.zeros_like(ids)
            for row, i in enumerate(batch):
                ids[row, : lengths[i]] = inputs[i]
                mask[row, : lengths[i]] = 1
            feeds = {"input_ids": ids, "attention_mask": mask}
            if self._config.uses_token_type_ids:
                feeds["token_type_ids"] = np.zeros_like(ids)
            with _libraries("the network does not run", object=self.info.path):
                vectors = self._session.run(["output"], feeds)[0]
            _check_output(vectors, (len(batch), width, self._config.embedding_dim))
            for row, i in enumerate(batch):
                outputs[i] = vectors[row, : lengths[i]]
        return outputs

    def _prefix_id(self, role: str, token_id: int | None, prefix: str) -> int:
        """The prefix's token id: from the settings, else the vocabulary's (as written, else without its blanks)."""
        if token_id is not None:
            return _checked_id(f"{role}_prefix_id", token_id)
        for candidate in (prefix, prefix.strip()):
            found = self._tokenizer.token_to_id(candidate)
            if found is not None:
                return int(found)
        raise CorruptData(
            f"the tokenizer has no token for the {role} prefix: set {role}_prefix_id in {CONFIG_FILE}",
            code="malformed",
            expected=repr(prefix),
        )

    def _special_id(self, configured: int, default: int, names: tuple[str, ...]) -> int:
        """An id that equals NextPlaid's default may just not have been set: then the tokenizer's own wins."""
        if configured != default:
            return _checked_id(names[0], configured)
        found = (self._tokenizer.token_to_id(name) for name in names)
        return next((int(i) for i in found if i is not None), configured)


def _batches(lengths: list[int], batch_size: int) -> Iterator[list[int]]:
    """Positions of the inputs in batches, longest first, so that padding is small and the first batch has the highest memory."""
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    start = 0
    while start < len(order):
        size = min(batch_size, max(1, MAX_BATCH_TOKENS // lengths[order[start]]))
        yield order[start : start + size]
        start += size


def _checked_length(name: str, value: int, most: int) -> int:
    if not MIN_LENGTH <= value <= most:
        raise InvalidRequest(f"{name} is {MIN_LENGTH} to {most} tokens", length=value)
    return value


def _checked_id(name: str, value: int) -> int:
    if not 0 <= value <= MAX_TOKEN_ID:
        raise _contradiction(f"an id in {CONFIG_FILE} is none", name, value)
    return value


def _check_output(vectors: Any, expected: tuple[int, int, int]) -> None:
    """What a network returned, which may be anything. Raises CorruptData (malformed)."""
    if not isinstance(vectors, np.ndarray) or vectors.shape != expected:
        found = getattr(vectors, "shape", type(vectors).__name__)
        raise _contradiction("the network's output has another shape than its settings promise", expected, found)
    if vectors.dtype != np.float32 or not np.isfinite(vectors).all():
        raise _contradiction("the network's output is not what vectors are", "finite float32", vectors.dtype)


@contextmanager
def _libraries(message: str, **facts: object) -> Iterator[None]:
    """CorruptData (malformed) for whatever onnxruntime or tokenizers raise over a file that they opened.

    Their exceptions share no base class, and a panic of Rust code is not even an Exception.
    """
    try:
        yield
    except (EngineError, MemoryError, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:
        raise CorruptData(f"{message}: {str(error)[:MAX_REASON]}", code="malformed", **facts) from error


def _contradiction(message: str, expected: object, found: object) -> CorruptData:
    return CorruptData(message, code="malformed", expected=expected, found=found)


def _open_tokenizer(path: Path) -> Any:
    try:
        from tokenizers import Tokenizer
    except ImportError as missing:
        raise InvalidRequest("this model needs the package tokenizers: install tartan[encoder]") from missing
    with _libraries(f"{TOKENIZER_FILE} does not parse", object=str(path)):
        return Tokenizer.from_file(str(path))


def _open_session(path: Path, n_threads: int) -> Any:
    try:
        import onnxruntime  # type: ignore[import-untyped]
    except ImportError as missing:
        raise InvalidRequest("this model needs the package onnxruntime: install tartan[encoder]") from missing
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = n_threads
    options.inter_op_num_threads = 1
    # Idle threads that spin take the processor from scoring, which runs in the same process.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    with _libraries(f"{path.name} is not a network that onnxruntime can open", object=str(path)):
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def _check_graph(session: Any, config: OnnxConfig) -> None:
    """Hold the network against the settings, as far as it declares its shapes. Raises CorruptData (malformed)."""
    expected = {"input_ids", "attention_mask"} | ({"token_type_ids"} if config.uses_token_type_ids else set())
    inputs = {item.name for item in session.get_inputs()}
    if inputs != expected:
        raise _contradiction("the network's inputs differ from what its settings promise", sorted(expected), sorted(inputs))
    outputs = {item.name: item.shape for item in session.get_outputs()}
    if "output" not in outputs:
        raise _contradiction("the network has no output of the right name", "output", sorted(outputs))
    declared = outputs["output"][-1] if outputs["output"] else None
    if isinstance(declared, int) and declared != config.embedding_dim:
        raise _contradiction("the network's dimension differs from embedding_dim", config.embedding_dim, declared)
