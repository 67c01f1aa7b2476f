"""Every answer body as a structure; bodies.py writes them. A field that is UNSET does not appear in the JSON."""

from __future__ import annotations

from typing import Any

from msgspec import UNSET, Struct, UnsetType

Row = dict[str, Any]
"""A document's metadata."""


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


class UploadAddress(Struct):
    """Where to PUT the documents (as application/json or application/octet-stream, no other header), until when, and how many bytes at most."""

    upload_id: str
    url: str
    method: str
    expires_at: str
    max_bytes: int


class DownloadAddress(Struct):
    """Where an answer lies: GET it until then. `content_type` is what the answer would have had."""

    download_url: str
    size_bytes: int
    content_type: str
    expires_at: str
