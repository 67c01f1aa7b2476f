"""Models: a network and a tokenizer that onnxruntime and tokenizers read, damaged one at a time, and what our loading makes of it.

The libraries are others', and the files the operator's own. Ours is that whatever they raise over a file is CorruptData that names it, and
that what a network answers is checked. A file that kills the process is a finding too: the runner writes down what was tried.

The network is written by hand: protocol buffers need twenty lines, and the package `onnx` would be a heavy dependency for one file. It
answers each position with [token id, attention mask, token type, attended positions of the text], so a test reads from the output
exactly what was fed.
"""

from __future__ import annotations

import importlib.util
import json
import struct
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from random import Random

import numpy as np

from engine.encoding.onnx import OnnxEncoder

from .models import scratch_folder
from .mutation import mutated, mutated_json
from .target import Target, Wrong, stored

# The files


def _varint(value: int) -> bytes:
    out = b""
    while value > 0x7F:
        out += bytes([value & 0x7F | 0x80])
        value >>= 7
    return out + bytes([value])


def _field(number: int, value: int | bytes | str) -> bytes:
    if isinstance(value, int):
        return _varint(number << 3) + _varint(value)
    data = value.encode() if isinstance(value, str) else value
    return _varint(number << 3 | 2) + _varint(len(data)) + data


def _node(op: str, inputs: Sequence[str], output: str, **attributes: int) -> bytes:
    made = b"".join(_field(1, name) for name in inputs) + _field(2, output) + _field(3, output) + _field(4, op)
    for name, value in attributes.items():
        made += _field(5, _field(1, name) + _field(3, value) + _field(20, 2))
    return _field(1, made)


def _value(number: int, name: str, element_type: int, dims: Sequence[str | int]) -> bytes:
    shape = b"".join(_field(1, _field(2, dim) if isinstance(dim, str) else _field(1, dim)) for dim in dims)
    return _field(number, _field(1, name) + _field(2, _field(1, _field(1, element_type) + _field(2, shape))))


def tiny_network(token_types: bool = True) -> bytes:
    names = ["input_ids", "attention_mask", *(["token_type_ids"] if token_types else [])]
    graph = b""
    for name in names:
        graph += _node("Cast", [name], f"{name}_f", to=1) + _node("Unsqueeze", [f"{name}_f", "last"], f"{name}_3")
    third = "token_type_ids_3" if token_types else "attention_mask_3"
    graph += _node("ReduceSum", ["attention_mask_f", "last_int"], "total", keepdims=1) + _node("Unsqueeze", ["total", "last"], "total_3")
    graph += _node("Mul", ["attention_mask_3", "zero"], "nothing") + _node("Add", ["nothing", "total_3"], "totals")
    graph += _node("Concat", ["input_ids_3", "attention_mask_3", third, "totals"], "output", axis=2)
    graph += _field(2, "tiny")
    graph += _field(5, _field(1, 1) + _field(2, 7) + _field(8, "last") + _field(9, struct.pack("<q", 2)))
    graph += _field(5, _field(1, 1) + _field(2, 7) + _field(8, "last_int") + _field(9, struct.pack("<q", 1)))
    graph += _field(5, _field(1, 1) + _field(2, 1) + _field(8, "zero") + _field(9, struct.pack("<f", 0.0)))
    for name in names:
        graph += _value(11, name, 7, ["batch", "length"])
    graph += _value(12, "output", 1, ["batch", "length", 4])
    return _field(1, 8) + _field(8, _field(1, "") + _field(2, 17)) + _field(7, graph)


VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[Q]", "[D]", "the", "bee", "finds", "a", "flower", ".", ","]
IDS = {word: i for i, word in enumerate(VOCABULARY)}


def tiny_tokenizer(pad_to: int | None = None) -> str:
    """The text of a tokenizer.json of VOCABULARY."""
    import tokenizers

    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(IDS, unk_token="[UNK]"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    made.post_processor = tokenizers.processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    if pad_to:
        made.enable_padding(length=pad_to, pad_id=0, pad_token="[PAD]")
    return str(made.to_str())


# The target

IS_INSTALLED = all(importlib.util.find_spec(name) for name in ("onnxruntime", "tokenizers"))
"""The extra `encoder`. Without it the target refuses everything."""
NETWORK, TOKENIZER, SETTINGS = range(3)
_FILES = {NETWORK: "model.onnx", TOKENIZER: "tokenizer.json", SETTINGS: "onnx_config.json"}
_SETTINGS = {"embedding_dim": 4, "query_length": 8, "document_length": 12, "do_query_expansion": True, "skiplist_words": [".", ","]}
_TEXTS = ("the bee finds a flower", "", "bee " * 40, "\0é unknown .")


@cache
def _sound() -> dict[int, bytes]:
    return {NETWORK: tiny_network(), TOKENIZER: tiny_tokenizer().encode(), SETTINGS: json.dumps(_SETTINGS).encode()}


def open_and_encode(data: bytes) -> bool:
    """The first byte says which file the others are; the two other files are sound."""
    if not data or not IS_INSTALLED:
        return False
    folder = _folder()
    for file, content in {**_sound(), data[0] % 3: data[1:]}.items():
        (folder / _FILES[file]).write_bytes(content)
    return _taken(folder, may_refuse_settings=data[0] % 3 == SETTINGS)


def _taken(folder: Path, may_refuse_settings: bool) -> bool:
    from engine.errors import InvalidRequest

    try:
        accepted, encoder = stored(lambda: OnnxEncoder(folder, n_threads=1))
    except Wrong as wrong:  # limits of lengths in the settings are refused like arguments
        if may_refuse_settings and isinstance(wrong.__cause__, InvalidRequest):
            return False
        raise
    if not accepted:
        return False
    for encode in (encoder.encode_queries, encoder.encode_documents):
        accepted, found = stored(lambda encode=encode: encode(_TEXTS))  # type: ignore[misc]
        if not accepted:
            return False
        tokens, offsets = found
        if tokens.dtype != np.float32 or tokens.shape != (offsets[-1], encoder.info.embedding_dim) or not np.isfinite(tokens).all():
            raise Wrong(f"vectors {tokens.dtype} {tokens.shape} of {len(_TEXTS)} texts")
    return True


@cache
def _folder() -> Path:
    import onnxruntime  # type: ignore[import-untyped]

    onnxruntime.set_default_logger_severity(4)  # it writes what it thinks of each network to stderr
    folder = scratch_folder() / "encoder"
    folder.mkdir()
    return folder


def _seeds() -> list[bytes]:
    return [bytes([file]) + content for file, content in _sound().items()] if IS_INSTALLED else [b"\0"]


def _mutate(data: bytes, rng: Random, others: Sequence[bytes], tokens: Sequence[bytes]) -> bytes:
    if data[:1] == bytes([NETWORK]):
        return data[:1] + mutated(data[1:], rng, [data[1:]], tokens)
    return data[:1] + mutated_json(data[1:], rng, (), tokens)


_OPERATORS = ("Cast", "Unsqueeze", "ReduceSum", "Mul", "Add", "Concat", "Loop", "If", "Gather", "Reshape", "Expand", "Log", "Div", "Range")
_TOKENS = (*(_field(4, name) for name in _OPERATORS), *(name.encode() for name in _OPERATORS), b"output", b"input_ids", b"\xff", b"[UNK]")
ENCODER = Target("encoder", "networks (ONNX), tokenizer.json and settings of a model", open_and_encode, _seeds, _TOKENS, _mutate)
