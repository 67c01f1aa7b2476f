"""What an index remembers about itself, what a search and a write may be told, and the only home of defaults.

IndexConfig is stored in the manifest; SearchParams and WriteParams come with each call. All are frozen and validated when made.
"""

from __future__ import annotations

import math
import re
from typing import Literal

import msgspec

from engine.errors import InvalidRequest

NBITS = (1, 2, 4, 8)
MAX_DIM = 4096
MAX_QUERY_TOKENS = 1024
MAX_QUERY_VALUE = 1e15
"""Of a query's vectors, which are used as given: squares of such values, summed over 4,096 dimensions and 1,024 tokens, stay far from the end of float32."""
MAX_DOCUMENT_TOKENS = 65_535
MAX_SEGMENT_DOCUMENTS = 65_536
"""A posting is a uint16 ordinal, so a quantised segment holds at most this many documents."""

INDEX_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
FtsTokenizer = Literal["unicode61", "trigram"]


def check_index_name(name: str) -> str:
    """Return `name` if it can name an index, else raise InvalidRequest."""
    if not isinstance(name, str) or not INDEX_NAME.fullmatch(name):
        raise InvalidRequest("an index name is 1 to 128 letters, digits, dots, dashes or underscores", name=repr(name)[:140])
    return name


class IndexConfig(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=False):
    """Settings of one index, kept in its manifest. batch_size and start_from_scratch are echoed to clients and bind nothing."""

    nbits: int = 4
    seed: int | None = None
    max_documents: int | None = None
    fts_tokenizer: FtsTokenizer = "unicode61"
    batch_size: int = 50_000
    start_from_scratch: int = 999

    def __post_init__(self) -> None:
        if self.nbits not in NBITS:
            raise InvalidRequest("nbits is 1, 2, 4 or 8", nbits=self.nbits)
        if self.max_documents is not None and self.max_documents < 1:
            raise InvalidRequest("max_documents is at least 1, or absent for no limit", max_documents=self.max_documents)
        if self.fts_tokenizer not in ("unicode61", "trigram"):
            raise InvalidRequest("fts_tokenizer is unicode61 or trigram", fts_tokenizer=self.fts_tokenizer)


class SearchParams(msgspec.Struct, frozen=True, kw_only=True):
    """How hard one search tries. Bounds: at least `k` documents are reranked where there are that many candidates.

    k                         hits wanted; 0 gives none
    n_probe                   centroids probed per query token where a segment is too large to look at every document
    n_candidates              documents of a segment whose centroid MaxSim is computed; up to twice as many where choosing among them would
                              cost more than looking at all of them
    n_rerank                  upper bound of documents scored exactly; the cascade stops earlier where the answer no longer changes
    centroid_score_threshold  probed centroids whose best score over the query is below it are dropped; None drops nothing
    """

    k: int = 10
    n_probe: int = 8
    n_candidates: int = 4096
    n_rerank: int = 1024
    centroid_score_threshold: float | None = None

    def __post_init__(self) -> None:
        for name in ("k", "n_probe", "n_candidates", "n_rerank"):
            value = getattr(self, name)
            if value < 0 or (value < 1 and name != "k"):
                raise InvalidRequest(f"{name} is a positive integer", **{name: value})
        if self.centroid_score_threshold is not None and not math.isfinite(self.centroid_score_threshold):
            raise InvalidRequest("centroid_score_threshold is a finite number", centroid_score_threshold=self.centroid_score_threshold)


EVERY_DOCUMENT = 1 << 40
"""As n_candidates or n_rerank: more documents than an index has."""

Preset = Literal["fast", "balanced", "exact"]
PRESETS: dict[Preset, dict[str, int]] = {
    "fast": {"n_probe": 8, "n_candidates": 1024, "n_rerank": 256},
    "balanced": {"n_probe": 8, "n_candidates": 4096, "n_rerank": 1024},
    "exact": {"n_probe": 8, "n_candidates": EVERY_DOCUMENT, "n_rerank": EVERY_DOCUMENT},
}
"""Named sets of SearchParams; docs/tuning.md has what each finds and costs.

balanced  the defaults
exact     every document is a candidate and may be scored exactly, until it is all but certain that no other could be a hit: what is lost then
          is what the codec has lost
They say how an index in memory is searched; from a store that is far away ColdParams does, so `exact` brings the index into memory first.
"""


class ColdParams(msgspec.Struct, frozen=True, kw_only=True):
    """How a search reads a segment that is not in memory, straight from the object store (engine/cold.py; benchmarks/README.md has what
    other settings cost and find). CURRENT is not counted.

    max_gets         range requests for one segment, those for its codec included; what cells leave over goes to records
    max_bytes        bytes of them, and likewise; records get a quarter of it at least
    max_cell_gets    requests for posting lists, and as many for centroids; gaps are read through to keep to it
    max_cell_bytes   centroids and posting lists read, those of the best coarse cells first; small segments are read whole
    n_probe          centroids probed per query token, of those that were read
    n_rerank         documents whose records are wanted; neighbours that come along in the same request are scored too
    """

    max_gets: int = 15
    max_bytes: int = 7_900_000
    max_cell_gets: int = 2
    max_cell_bytes: int = 5_500_000
    n_probe: int = 128
    n_rerank: int = 128


class CommitParams(msgspec.Struct, frozen=True, kw_only=True):
    """How a commit behaves under contention.

    max_attempts      tries before Conflict; with full jitter 24 tries outlast 16 busy writers of one index (test_commit.py)
    first_delay_s, max_delay_s   the back-off doubles between these, with full jitter
    max_upload_age_s  a commit whose uploads are older gives up, because garbage collection may soon take them for rubbish;
                      must be well under MaintenanceParams.grace_s
    """

    max_attempts: int = 24
    first_delay_s: float = 0.02
    max_delay_s: float = 2.0
    max_upload_age_s: float = 600.0


class MaintenanceParams(msgspec.Struct, frozen=True, kw_only=True):
    """When compaction acts and what garbage collection keeps.

    min_quantise_documents  an index with fewer live documents stays flat: exact search over them is as fast as any other
    max_flat_tokens         flat tokens that compaction leaves alone; above it they are folded into quantised segments
    max_flat_segments       more flat segments than this are merged even if they are small
    max_segment_documents, max_segment_bytes   upper size of a quantised segment
    merge_factor            this many segments of about one size become one
    retrain_growth          the codec is trained again when the index has grown by this factor since (DESIGN: about fourfold)
    grace_s                 a superseded generation is kept at least this long
    """

    min_quantise_documents: int = 1000
    max_flat_tokens: int = 100_000
    max_flat_segments: int = 32
    max_segment_documents: int = MAX_SEGMENT_DOCUMENTS
    max_segment_bytes: int = 256 << 20
    merge_factor: int = 8
    retrain_growth: float = 4.0
    max_tombstone_share: float = 0.2
    grace_s: float = 3600.0
