"""What an encoder is: texts to token vectors, synchronously, as arrays.

Implemented by onnx.py (a user's ColBERT model) and hashing.py (embedded, needs no download). batching.py puts either behind `await`.
An encoder does not normalise, store or score: documents are normalised by the index writer, queries are used as given.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, Protocol

import msgspec
import numpy as np


class ModelInfo(msgspec.Struct, frozen=True, kw_only=True):
    """What an encoder says of itself; the fields of `model` in GET /health, in its order, and the kind.

    kind "onnx" understands what the model learnt; "lexical" matches words and their forms and nothing else.
    Lengths are upper bounds in tokens; num_sessions is the number of model instances that may run side by side.
    """

    name: str | None
    path: str
    quantized: bool
    embedding_dim: int
    batch_size: int
    num_sessions: int
    query_prefix: str
    document_prefix: str
    query_length: int
    document_length: int
    do_query_expansion: bool
    uses_token_type_ids: bool
    mask_token_id: int
    pad_token_id: int
    kind: Literal["onnx", "lexical"]


class Encoder(Protocol):
    """Texts to token vectors. Safe to call from several threads at once.

    Both methods return (tokens, offsets): tokens float32 (T, D), all texts end to end; offsets int64 (n + 1,), text i owns
    tokens[offsets[i]:offsets[i + 1]]. Every text, even an empty one, has at least one token. No texts give (0, D) and [0].
    """

    @property
    def info(self) -> ModelInfo: ...

    def encode_documents(self, texts: Sequence[str], pool_factor: int | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Vectors of documents; `pool_factor` above 1 keeps about one token in so many (pooling.py)."""
        ...

    def encode_queries(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Vectors of queries. A row's norm is its weight in MaxSim."""
        ...


def flatten(rows: Sequence[np.ndarray], dim: int) -> tuple[np.ndarray, np.ndarray]:
    """Join the tokens of single texts, float32 (t_i, dim) each, into (tokens float32 (T, dim), offsets int64 (n + 1,))."""
    offsets = np.zeros(len(rows) + 1, np.int64)
    np.cumsum([len(own) for own in rows], out=offsets[1:])
    tokens = np.concatenate(rows) if rows else np.empty((0, dim), np.float32)
    return np.ascontiguousarray(tokens, np.float32), offsets
