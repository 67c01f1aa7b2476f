"""NextPlaid's terms into the engine's, and a configuration back: search parameters, subsets, times, rows.

NextPlaid's n_full_scores is translated here and nowhere else.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Any

import numpy as np
from msgspec import UNSET, UnsetType

from engine.config import PRESETS, IndexConfig, SearchParams
from handler.problems import bad_request
from handler.wire.answers import Config, Row
from handler.wire.requests import CreateConfig, Params

DEFAULT_PARAMS = SearchParams()
"""Only for k, which the wire calls top_k."""
_DEFAULT_FULL_SCORES = 4096
"""NextPlaid's; the other defaults are those of SearchParams."""

_NO_SCORE = 1e30


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
    """The stored configuration as it is answered."""
    return Config(
        nbits=config.nbits,
        batch_size=config.batch_size,
        seed=config.seed,
        start_from_scratch=config.start_from_scratch,
        max_documents=config.max_documents,
        fts_tokenizer=config.fts_tokenizer,
    )
