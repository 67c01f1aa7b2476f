"""What travels: every request and answer body as a strict structure, and vectors out of their two wire forms.

Strict means that "3" or 3.0 is no integer (422) and broken JSON is 400; unknown keys are ignored, as clients expect. Where a check must
come after another one (API.md orders them), the structure is lenient and the route checks. NextPlaid's n_full_scores is translated here
and nowhere else. Nothing here knows HTTP or the store. Extensions are the optional keys that NextPlaid's clients never send.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from datetime import datetime
from typing import Annotated, Any, Literal, TypeVar

import msgspec
import numpy as np
from msgspec import UNSET, Meta, Struct, UnsetType

from engine.config import MAX_DIM, MAX_DOCUMENT_TOKENS, MAX_QUERY_TOKENS, PRESETS, IndexConfig, Preset, SearchParams
from engine.errors import InvalidRequest
from handler.problems import Problem, bad_request

_INT64_MAX = 2**63 - 1
UInt = Annotated[int, Meta(ge=0, le=_INT64_MAX)]
Int = Annotated[int, Meta(ge=-(2**63), le=_INT64_MAX)]
Row = dict[str, Any]
T = TypeVar("T")


# Requests


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


class _Extensions(Struct, kw_only=True):
    """consistency "eventual" may answer from a generation that was in force at most max_age_s ago; as_of is a generation or a time
    (RFC 3339); explain adds token-level matches and costs; with_ids adds the external ids of hits; allow_partial: where a search is fanned out,
    a part of the index that cannot be searched is named in the answer (failed_shards) instead of failing it."""

    consistency: Literal["strong", "eventual"] = "strong"
    max_age_s: Annotated[float, Meta(ge=0)] = 5.0
    as_of: UInt | str | None = None
    explain: bool = False
    with_ids: bool = False
    allow_partial: bool = False


class SearchRequest(_Extensions, kw_only=True):
    queries: list[Vectors] | None = None
    params: Params = msgspec.field(default_factory=Params)
    subset: list[Int] | None = None
    text_query: list[str] | None = None
    alpha: float | None = None
    fusion: str | None = None
    filter_condition: str | None = None
    filter_parameters: list[Any] | None = None


class FilteredSearchRequest(_Extensions, kw_only=True):
    queries: list[Vectors]
    filter_condition: str
    params: Params = msgspec.field(default_factory=Params)
    filter_parameters: list[Any] = []


class TextSearchRequest(_Extensions, kw_only=True):
    queries: list[str]
    params: Params = msgspec.field(default_factory=Params)
    subset: list[Int] | None = None
    text_query: list[str] | None = None
    alpha: float | None = None
    fusion: str | None = None


class FilteredTextSearchRequest(_Extensions, kw_only=True):
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


# Answers


class ErrorBody(Struct, omit_defaults=True):
    code: str
    message: str
    retry_after_seconds: int | UnsetType = UNSET


class IndexSummary(Struct):
    name: str
    num_documents: int
    num_embeddings: int
    num_partitions: int
    dimension: int
    nbits: int
    avg_doclen: float
    has_metadata: bool
    max_documents: int | UnsetType = UNSET


class Health(Struct):
    status: str
    version: str
    loaded_indices: int
    index_dir: str
    memory_usage_bytes: int
    indices: list[IndexSummary]
    updates: list[Any]
    model: dict[str, Any] | UnsetType = UNSET


class Alive(Struct):
    status: str


class Config(Struct):
    nbits: int
    batch_size: int
    seed: int | None
    start_from_scratch: int
    max_documents: int | None
    fts_tokenizer: str
    binary: bool = False


class Configured(Struct):
    name: str
    config: Config
    message: str


class IndexInfo(Struct):
    name: str
    num_documents: int
    num_embeddings: int
    num_partitions: int
    avg_doclen: float
    dimension: int
    has_metadata: bool
    metadata_count: int | None
    max_documents: int | UnsetType = UNSET


class Deleted(Struct):
    deleted: bool
    name: str


class QueryCost(Struct):
    """What one query cost. The estimate (engine/cost.py) counts requests of the object store and, in a function, its time; list prices."""

    stages_ms: dict[str, float]
    candidates: int
    reranked: int
    tokens_scored: int
    rounds: int
    requests: int
    bytes: int
    cold: bool
    estimated_usd: float


class Explanation(Struct):
    """matches[i] belongs to document_ids[i]: for every query token [document token, similarity]; null for hits of the keyword side."""

    generation: int
    cost: QueryCost
    matches: list[list[tuple[int, float]] | None]


class FailedShard(Struct):
    """A part of the index that was not searched, the kind of failure, and why."""

    shard: int
    error: str
    cause: str


class QueryResult(Struct):
    query_id: int
    document_ids: list[int]
    scores: list[float]
    metadata: list[Row | None]
    ids: list[str | None] | UnsetType = UNSET
    explain: Explanation | UnsetType = UNSET
    failed_shards: list[FailedShard] | UnsetType = UNSET


class SearchAnswer(Struct):
    results: list[QueryResult]
    num_queries: int


class MetadataRows(Struct):
    metadata: list[Row]
    count: int


class MetadataCount(Struct):
    count: int
    has_metadata: bool


class MetadataChecked(Struct):
    existing_ids: list[int]
    missing_ids: list[int]
    existing_count: int
    missing_count: int


class MetadataIds(Struct):
    document_ids: list[int]
    count: int


class MetadataUpdated(Struct):
    updated: int


class Encoded(Struct):
    """Either `embeddings`, or (header X-Embeddings-Format: base64) `embeddings_b64` and `shapes`."""

    num_texts: int
    embeddings: list[list[list[float]]] | UnsetType = UNSET
    embeddings_b64: list[str] | UnsetType = UNSET
    shapes: list[tuple[int, int]] | UnsetType = UNSET


class RerankLine(Struct):
    index: int
    score: float


class Reranked(Struct):
    results: list[RerankLine]
    num_documents: int


class GenerationLine(Struct):
    generation: int
    created_at: str
    cause: str
    num_documents: int
    num_segments: int
    pins: list[str]
    current: bool


class Generations(Struct):
    generations: list[GenerationLine]


class PinLine(Struct):
    pin: str
    generation: int
    created_at: str
    note: str


class Pins(Struct):
    pins: list[PinLine]


class MovedTo(Struct):
    """An index after a rollback or a branch."""

    name: str
    generation: int
    num_documents: int


class AliasLine(Struct):
    alias: str
    index: str


class AliasLines(Struct):
    aliases: list[AliasLine]


class Warmed(Struct):
    name: str
    generation: int
    memory_usage_bytes: int


class RecallAnswer(Struct):
    """recall: share of the exhaustive top k that a search returned, averaged over the queries; worst: of the worst query."""

    num_queries: int
    top_k: int
    recall: float
    worst: float
    generation: int


# Reading


def read_body(body: bytes | bytearray, kind: type[T]) -> T:
    """A request out of its JSON. Problem BAD_REQUEST (400) if it is no JSON, UNPROCESSABLE (422) if it has the wrong shape."""
    try:
        try:
            return msgspec.json.decode(body, type=kind, strict=True)
        except msgspec.ValidationError as error:
            if not str(error).startswith(_BAD_BASE64):
                raise
            return msgspec.convert(_without_bad_base64(msgspec.json.decode(body)), kind, strict=True)
    except msgspec.ValidationError as error:
        raise Problem("UNPROCESSABLE", f"the body does not fit: {error}") from error
    except InvalidRequest as error:
        raise bad_request(str(error)) from error
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise Problem("BAD_REQUEST", f"the body is no JSON: {error}") from error


_BAD_BASE64 = "Invalid base64"


def _without_bad_base64(body: Any) -> Any:
    """The body with texts that are no base64 emptied. No shape fits nothing, so `matrix` refuses them where API.md has vectors checked,
    and ignores them where they are not used."""
    if isinstance(body, dict):
        for holder in (body, *_dicts_in(body.get("documents")), *_dicts_in(body.get("queries"))):
            for name in ("embeddings_b64", "query_b64"):
                if isinstance(holder.get(name), str) and not _is_base64(holder[name]):
                    holder[name] = ""
    return body


def _dicts_in(value: Any) -> list[dict[str, Any]]:
    return [item for item in value if isinstance(item, dict)] if isinstance(value, list) else []


def _is_base64(text: str) -> bool:
    try:
        msgspec.convert(text, bytes)
    except msgspec.ValidationError:
        return False
    return True


def matrix(item: Vectors, what: str, max_rows: int = MAX_DOCUMENT_TOKENS) -> np.ndarray:
    """float32 or float16 (rows, D) out of either wire form; `what` names it in errors. Problem BAD_REQUEST if it is none.

    The bytes of a base64 form are viewed, not copied.
    """
    if item.embeddings_b64 is not None and item.shape is not None:
        return _from_bytes(item.embeddings_b64, item.shape, item.dtype, what, max_rows)
    if item.embeddings is not None:
        return _from_lists(item.embeddings, what, max_rows)
    raise bad_request(f"{what} has neither embeddings nor embeddings_b64 with shape")


def _from_bytes(data: bytes, shape: tuple[int, int], dtype: str, what: str, max_rows: int) -> np.ndarray:
    n_rows, dim = _checked_shape(shape[0], shape[1], what, max_rows)
    little_endian = np.dtype("<f2" if dtype == "float16" else "<f4")
    n_bytes = n_rows * dim * little_endian.itemsize
    if len(data) != n_bytes:
        found = f"holds {len(data)} bytes" if data else "is empty or no base64"
        raise bad_request(f"{what}: embeddings_b64 {found}, and {n_rows} x {dim} values of {dtype} need {n_bytes}")
    return _checked_finite(np.frombuffer(data, little_endian).reshape(n_rows, dim), what)


def _from_lists(rows: list[list[float]], what: str, max_rows: int) -> np.ndarray:
    _, dim = _checked_shape(len(rows), len(rows[0]) if rows else 0, what, max_rows)
    if any(len(row) != dim for row in rows):
        raise bad_request(f"{what}: rows differ in length")
    with np.errstate(over="ignore"):  # beyond float32 becomes infinite and is refused below
        return _checked_finite(np.array(rows, np.float64).astype(np.float32), what)


def _checked_shape(n_rows: int, dim: int, what: str, max_rows: int) -> tuple[int, int]:
    if n_rows < 1 or dim < 1:
        raise bad_request(f"{what} is empty: at least one row and one column are needed, found {n_rows} x {dim}")
    if n_rows > max_rows:
        raise bad_request(f"{what} has {n_rows} rows, at most {max_rows} are possible")
    if dim > MAX_DIM:
        raise bad_request(f"{what} has {dim} dimensions, at most {MAX_DIM} are possible")
    return n_rows, dim


def _checked_finite(values: np.ndarray, what: str) -> np.ndarray:
    """`values` if all are finite. The sum tells at once; only if it overflowed must each value be looked at."""
    with np.errstate(over="ignore", invalid="ignore"):
        is_finite = math.isfinite(values.sum(dtype=np.float32)) or bool(np.isfinite(values).all())
    if not is_finite:
        raise bad_request(f"{what} has a value that is not finite")
    return values


def query_matrix(item: Vectors, what: str) -> np.ndarray:
    """float32 (Q, D) of one query, used as given."""
    return np.ascontiguousarray(matrix(item, what, MAX_QUERY_TOKENS), np.float32)


def query_matrices(items: Sequence[Vectors]) -> list[np.ndarray]:
    return [query_matrix(item, f"query {i}") for i, item in enumerate(items)]


def document_arrays(items: Sequence[Vectors]) -> list[np.ndarray]:
    return [matrix(item, f"document {i}") for i, item in enumerate(items)]


def joined(matrices: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """(tokens (T, D), offsets int64 (N + 1,)) of documents that have one dimension."""
    offsets = np.zeros(len(matrices) + 1, np.int64)
    np.cumsum([len(values) for values in matrices], out=offsets[1:])
    return np.concatenate(matrices), offsets


def check_dimensions(matrices: Sequence[np.ndarray], dim: int | None) -> None:
    """Problem DIMENSION_MISMATCH unless all have `dim` columns (None: as many as the first)."""
    expected = dim if dim is not None else matrices[0].shape[1]
    for i, values in enumerate(matrices):
        if values.shape[1] != expected:
            raise Problem("DIMENSION_MISMATCH", f"dimension mismatch: expected {expected}, found {values.shape[1]} (item {i})")


def metadata_rows(metadata: list[Any] | UnsetType, n_documents: int) -> list[Row] | None:
    """One object per document; None if the request has none. `_subset_` of rows that were read before is dropped."""
    if metadata is UNSET:
        return None
    assert isinstance(metadata, list)
    if len(metadata) != n_documents:
        raise bad_request(f"metadata has {len(metadata)} entries for {n_documents} documents")
    if not all(isinstance(row, dict) for row in metadata):
        raise bad_request("metadata holds one object per document")
    return [{name: value for name, value in row.items() if name != "_subset_"} for row in metadata]


def index_config(config: CreateConfig, default_start_from_scratch: int) -> IndexConfig:
    """The stored configuration. InvalidRequest (400) for values that cannot work."""
    start = config.start_from_scratch
    return IndexConfig(
        nbits=config.nbits,
        seed=config.seed,
        max_documents=config.max_documents,
        fts_tokenizer=config.fts_tokenizer,  # type: ignore[arg-type]  # checked when made
        batch_size=config.batch_size,
        start_from_scratch=default_start_from_scratch if isinstance(start, UnsetType) else start,
    )


def config_answer(config: IndexConfig) -> Config:
    return Config(
        nbits=config.nbits,
        batch_size=config.batch_size,
        seed=config.seed,
        start_from_scratch=config.start_from_scratch,
        max_documents=config.max_documents,
        fts_tokenizer=config.fts_tokenizer,
    )


DEFAULT_PARAMS = SearchParams()
"""Only for k, which the wire calls top_k."""
_DEFAULT_FULL_SCORES = 4096
"""NextPlaid's; the other defaults are those of SearchParams."""


def search_params(params: Params, n_documents: int) -> SearchParams:
    """What the engine is told. No more hits than documents, and, as on the peer, none beyond n_full_scores."""
    top_k = DEFAULT_PARAMS.k if params.top_k is None else params.top_k
    preset = PRESETS[params.preset or "balanced"]
    most = max(n_documents, 1)
    if params.preset is not None and params.n_full_scores is None:
        k = min(top_k, n_documents)
        n_candidates, n_rerank = preset["n_candidates"], max(preset["n_rerank"], k)
    else:
        n_full_scores = _DEFAULT_FULL_SCORES if params.n_full_scores is None else params.n_full_scores
        k = min(top_k, n_full_scores, n_documents)
        n_candidates, n_rerank = max(1, min(n_full_scores, most)), max(min(n_full_scores, 4 * most) // 4, k, 1)
    return SearchParams(
        k=k,
        n_probe=max(1, preset["n_probe"] if params.n_ivf_probe is None else min(params.n_ivf_probe, 1 << 20)),
        n_candidates=n_candidates,
        n_rerank=n_rerank,
        centroid_score_threshold=_threshold(params.centroid_score_threshold),
    )


def _threshold(value: float | None) -> float | None:
    """Beyond any score is beyond any score: 1e308 is none that arithmetic in float32 could compare with."""
    return None if value is None else max(-_NO_SCORE, min(value, _NO_SCORE))


_NO_SCORE = 1e30


def subset_ids(subset: Sequence[int]) -> np.ndarray:
    """int64 ascending without repeats; ids that nothing can have are left to the engine, which finds nothing under them."""
    return np.unique(np.array(subset, np.int64))


def parse_time(text: str) -> float:
    """Unix seconds of an RFC 3339 time. Problem BAD_REQUEST if it is none, or has no zone."""
    try:
        moment = datetime.fromisoformat(text)
    except ValueError as error:
        raise bad_request("as_of is a generation or a time like 2026-11-23T08:00:00Z") from error
    if moment.tzinfo is None:
        raise bad_request("as_of needs a time zone, such as Z")
    return moment.timestamp()


# Writing

_encoder = msgspec.json.Encoder(decimal_format="number")


def encode(answer: object) -> bytes:
    return _encoder.encode(answer)
