"""Prometheus metrics: NextPlaid's three names and our own beside them.

Labels come from fixed sets (endpoint names, statuses, stage names) except `index`, which is bounded: beyond MAX_INDICES the rest share
the label "(other)". With several workers the values go through files in PROMETHEUS_MULTIPROC_DIR, which server.py sets, so that a scrape
sees all workers whichever of them answers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from engine.store.wrappers import Cost

MAX_INDICES = 200
OTHER_INDEX = "(other)"
_LATENCY_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 100.0, 300.0)


class Metrics:
    """The metrics of one process, in a registry of their own. prometheus_client is imported here: 70 ms that Lambda need not pay."""

    def __init__(self, *, shared: bool = False) -> None:
        """`shared` says that the values go through files, for several workers."""
        from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

        self._registry = registry = CollectorRegistry()
        self._shared = shared
        self._indices: set[str] = set()
        self._shown: dict[str, int] = {}
        self._counted: dict[str, int] = {}
        self.duration = Histogram(
            "next_plaid_request_duration_seconds", "Time from request to answer", ["endpoint"], registry=registry, buckets=_LATENCY_BUCKETS
        )
        self.active = Gauge(
            "next_plaid_active_requests", "Requests being answered", ["endpoint"], registry=registry, multiprocess_mode="livesum"
        )
        self.documents = _gauge(Gauge, registry, "next_plaid_index_documents", "Live documents of an index, as last seen")
        self.requests = Counter("tartan_requests", "Answers by endpoint and status", ["endpoint", "status"], registry=registry)
        self.stages = Histogram(
            "tartan_search_stage_seconds", "Time of a search's stages", ["stage"], registry=registry, buckets=_LATENCY_BUCKETS
        )
        self.searches = Counter("tartan_searches", "Queries answered", ["index", "kind"], registry=registry)
        self.search_counts = Counter(
            "tartan_search_work", "Work of searches: candidates, reranked, tokens, rounds, requests, bytes", ["what"], registry=registry
        )
        self.cold = Counter("tartan_cold_searches", "Queries that found their index not in memory", registry=registry)
        self.added = Counter("tartan_documents_added", "Documents acknowledged", ["index"], registry=registry)
        self.deleted = Counter("tartan_documents_deleted", "Documents deleted", ["index"], registry=registry)
        self.generation = _gauge(Gauge, registry, "tartan_index_generation", "Generation of an index, as last seen")
        self.segments = _gauge(Gauge, registry, "tartan_index_segments", "Segments of an index, as last seen")
        self.tombstones = _gauge(Gauge, registry, "tartan_index_tombstones", "Deleted documents still stored, as last seen")
        self.backlog = _gauge(Gauge, registry, "tartan_index_flat_tokens", "Tokens waiting for compaction, as last seen")
        self.store_requests = Counter("tartan_store_requests", "Requests to the object store", ["method"], registry=registry)
        self.store_bytes = Counter("tartan_store_bytes", "Bytes read from the object store", registry=registry)
        self.cache = Counter("tartan_cache", "Lookups of the byte cache", ["result"], registry=registry)
        self.memory = Gauge("tartan_memory_bytes", "Decoded arrays kept in memory", registry=registry, multiprocess_mode="livesum")
        self.maintenance = Counter("tartan_maintenance_runs", "Background compactions by outcome", ["outcome"], registry=registry)

    def index_label(self, name: str) -> str:
        """The name, while there are few; a bounded set of labels whatever clients do. Callers pass only names of existing indices."""
        if name in self._indices:
            return name
        if len(self._indices) >= MAX_INDICES:
            return OTHER_INDEX
        self._indices.add(name)
        return name

    def is_news(self, name: str, generation: int) -> bool:
        """Whether the gauges of an index still show another generation."""
        if self._shown.get(name) == generation:
            return False
        if len(self._shown) > 4 * MAX_INDICES:
            self._shown.clear()
        self._shown[name] = generation
        return True

    def saw_index(self, name: str, *, documents: int, generation: int, segments: int, tombstones: int, flat_tokens: int) -> None:
        label = self.index_label(name)
        if label == OTHER_INDEX:
            return
        self.documents.labels(label).set(documents)
        self.generation.labels(label).set(generation)
        self.segments.labels(label).set(segments)
        self.tombstones.labels(label).set(tombstones)
        self.backlog.labels(label).set(flat_tokens)

    def forgot_index(self, name: str) -> None:
        """Drop the gauges of a deleted index."""
        self._shown.pop(name, None)
        if name not in self._indices or self._shared:
            return  # files cannot forget a label; the value of a deleted index stays until the server restarts
        self._indices.discard(name)
        for gauge in (self.documents, self.generation, self.segments, self.tombstones, self.backlog):
            gauge.remove(name)

    def searched(self, name: str, kind: str, n_queries: int, stages_ms: Mapping[str, float], work: Mapping[str, int], n_cold: int) -> None:
        """One search request: stage times are those of the whole request."""
        self.searches.labels(self.index_label(name), kind).inc(n_queries)
        for stage, ms in stages_ms.items():
            self.stages.labels(stage).observe(ms / 1000)
        for what, count in work.items():
            self.search_counts.labels(what).inc(count)
        if n_cold:
            self.cold.inc(n_cold)

    def answered(self, endpoint: str, status: int, took_s: float) -> None:
        """One request's answer is out."""
        self.duration.labels(endpoint).observe(took_s)
        self.requests.labels(endpoint, str(status)).inc()

    def set_process(self, store: Cost, used_memory_bytes: int, hits: int, misses: int) -> None:
        """Bring the counters of the process up to what it has counted itself."""
        self.memory.set(used_memory_bytes)
        for kind, n in store.requests.items():
            self._advance(self.store_requests.labels(kind), f"requests/{kind}", n)
        self._advance(self.store_bytes, "bytes", store.bytes_read)
        self._advance(self.cache.labels("hit"), "hit", hits)
        self._advance(self.cache.labels("miss"), "miss", misses)

    def _advance(self, counter: Any, name: str, value: int) -> None:
        counter.inc(value - self._counted.get(name, 0))
        self._counted[name] = value

    def render(self) -> bytes:
        """The exposition text."""
        from prometheus_client import CollectorRegistry, generate_latest, multiprocess

        if not self._shared:
            return generate_latest(self._registry)
        registry = CollectorRegistry()
        multiprocess.MultiProcessCollector(registry)  # type: ignore[no-untyped-call]
        return generate_latest(registry)


def _gauge(kind: Any, registry: Any, name: str, text: str) -> Any:
    return kind(name, text, ["index"], registry=registry, multiprocess_mode="mostrecent")
