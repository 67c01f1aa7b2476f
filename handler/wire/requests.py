"""Every request body as a strict structure.

Strict means that "3" or 3.0 is no integer (422); unknown keys are ignored, as clients expect. Where a check must come after another one
(API.md orders them), the structure is lenient and the route checks. Extensions are the optional keys that NextPlaid's clients never send.
Nothing here knows HTTP or the store: bodies.py reads these out of JSON, translation.py and matrices.py make of them what the engine is told.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from msgspec import UNSET, Meta, Struct, UnsetType

from engine.config import Preset

_INT64_MAX = 2**63 - 1
UInt = Annotated[int, Meta(ge=0, le=_INT64_MAX)]
Int = Annotated[int, Meta(ge=-(2**63), le=_INT64_MAX)]


class Vectors(Struct, omit_defaults=True):
    """A matrix of token vectors: nested lists, or base64 of little-endian rows with its shape. With both, base64 and shape win.

    Base64 is decoded with the JSON (msgspec does it three times as fast as binascii), so `embeddings_b64` holds the rows' bytes.
    """

    embeddings: list[list[float]] | None = None
    embeddings_b64: bytes | None = None
    shape: tuple[UInt, UInt] | None = None
    dtype: Literal["float32", "float16"] = "float32"


class CreateConfig(Struct):
    """Configuration of a new index. batch_size, start_from_scratch and binary are accepted for compatibility and bind nothing."""

    nbits: UInt = 4
    batch_size: UInt = 50_000
    seed: UInt | None = None
    start_from_scratch: UInt | UnsetType = UNSET
    max_documents: UInt | None = None
    fts_tokenizer: str = "unicode61"
    binary: bool = False


class CreateRequest(Struct):
    name: str
    config: CreateConfig = msgspec.field(default_factory=CreateConfig)


class ConfigRequest(Struct):
    """An absent or null limit removes it."""

    max_documents: UInt | None = None


class UpdateRequest(Struct):
    """Documents as vectors. Extension: `ids`, one string per document; a document with the same id is replaced."""

    documents: list[Vectors]
    metadata: list[Any] | UnsetType = UNSET
    ids: list[str] | None = None


class UpdateTextsRequest(Struct):
    """Documents as texts, which are encoded and not stored."""

    documents: list[str]
    metadata: list[Any] | UnsetType = UNSET
    pool_factor: UInt | None = None
    ids: list[str] | None = None


class DeleteRequest(Struct):
    condition: str
    parameters: list[Any] = []


class Params(Struct):
    """How hard to search. A threshold that is null or absent prunes nothing. Extension: `preset` stands for what is not given beside it."""

    top_k: UInt | None = None
    n_ivf_probe: UInt | None = None
    n_full_scores: UInt | None = None
    centroid_score_threshold: float | None = None
    preset: Preset | None = None


class SearchExtensions(Struct, kw_only=True):
    """consistency "eventual" may answer from a generation that was in force at most max_age_s ago; as_of is a generation or a time
    (RFC 3339); explain adds token-level matches and costs; with_ids adds the external ids of hits; allow_partial: where a search is fanned out,
    a part of the index that cannot be searched is named in the answer (failed_shards) instead of failing it."""

    consistency: Literal["strong", "eventual"] = "strong"
    max_age_s: Annotated[float, Meta(ge=0)] = 5.0
    as_of: UInt | str | None = None
    explain: bool = False
    with_ids: bool = False
    allow_partial: bool = False


class SearchRequest(SearchExtensions, kw_only=True):
    queries: list[Vectors] | None = None
    params: Params = msgspec.field(default_factory=Params)
    subset: list[Int] | None = None
    text_query: list[str] | None = None
    alpha: float | None = None
    fusion: str | None = None
    filter_condition: str | None = None
    filter_parameters: list[Any] | None = None


class FilteredSearchRequest(SearchExtensions, kw_only=True):
    queries: list[Vectors]
    filter_condition: str
    params: Params = msgspec.field(default_factory=Params)
    filter_parameters: list[Any] = []


class TextSearchRequest(SearchExtensions, kw_only=True):
    queries: list[str]
    params: Params = msgspec.field(default_factory=Params)
    subset: list[Int] | None = None
    text_query: list[str] | None = None
    alpha: float | None = None
    fusion: str | None = None


class FilteredTextSearchRequest(SearchExtensions, kw_only=True):
    queries: list[str]
    filter_condition: str
    params: Params = msgspec.field(default_factory=Params)
    filter_parameters: list[Any] = []
    text_query: list[str] | None = None
    alpha: float | None = None
    fusion: str | None = None


class MetadataCheckRequest(Struct):
    document_ids: list[Int]


class MetadataQueryRequest(Struct):
    condition: str
    parameters: list[Any] = []


class MetadataGetRequest(Struct):
    document_ids: list[Int] | None = None
    condition: str | None = None
    parameters: list[Any] = []
    limit: UInt | None = None


class MetadataUpdateRequest(Struct):
    condition: str
    updates: Any
    parameters: list[Any] = []


class EncodeRequest(Struct):
    texts: list[str]
    input_type: Literal["query", "document"]
    pool_factor: UInt | None = None


class RerankRequest(Struct):
    documents: list[Vectors]
    query: list[list[float]] | None = None
    query_b64: bytes | None = None
    query_shape: tuple[UInt, UInt] | None = None


class RerankTextsRequest(Struct):
    query: str
    documents: list[str]
    pool_factor: UInt | None = None


class PinRequest(Struct):
    pin: str
    generation: UInt | None = None
    note: str = ""


class RollbackRequest(Struct):
    """Exactly one of a generation and a pin."""

    generation: UInt | None = None
    pin: str | None = None


class BranchRequest(Struct):
    name: str
    generation: UInt | None = None


class AliasRequest(Struct):
    index: str


class RecallRequest(Struct):
    """A self test: sampled documents' own tokens are the queries, exhaustive search over the stored vectors the truth."""

    n_queries: Annotated[int, Meta(ge=1, le=100)] = 16
    top_k: Annotated[int, Meta(ge=1, le=100)] = 10
    params: Params = msgspec.field(default_factory=Params)
