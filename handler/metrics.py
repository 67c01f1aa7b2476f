"""Prometheus metrics: NextPlaid's three names and our own beside them. docs/monitoring.md lists all of them; a test compares.

Labels come from fixed sets (endpoints, statuses, codes, stages) except `index`, which is bounded: the first MAX_INDICES names have a
label each, the others share "(other)", whose gauges are sums. With several workers the values go through files in a folder
(PROMETHEUS_MULTIPROC_DIR, which server.py sets), so that a scrape sees all workers whichever of them answers.

Nothing is measured here: routes, maintenance.py, observed.py and runtime.py report. On Lambda this module is not imported; emf.py
brings the same facts out with the log.
"""

from __future__ import annotations

import contextlib
import fcntl
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import astuple
from pathlib import Path
from typing import Any

from engine.store.extents import CacheStats
from engine.store.wrappers import Cost
from handler.host import HostFacts
from handler.index_facts import IndexFacts

MAX_INDICES = 200
OTHER_INDEX = "(other)"
MAX_FOLLOWED = 10_000
"""Indices whose latest numbers are remembered, to know what is news and to sum up the others."""
_LATENCY_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 100.0, 300.0)
_WORK_BUCKETS = (0.1, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600, 1800, 3600)
_COUNT_BUCKETS = (0, 16, 64, 256, 1024, 4096, 16384, 65536, 262144, 1048576)
_BYTE_BUCKETS = (0, 1 << 10, 1 << 14, 1 << 17, 1 << 20, 1 << 22, 1 << 24, 1 << 26, 1 << 28, 1 << 30)
_ROUND_BUCKETS = (0, 1, 2, 3, 4, 6, 10, 20)
_ALARMING_CODES = ("CORRUPT_DATA", "INTERNAL_ERROR", "SERVICE_UNAVAILABLE", "checksum-mismatch", "malformed", "missing-object")
_ALARMING_FAILURES = ("store-unavailable", "store-denied", "checksum-mismatch", "malformed")
"""These are there from the start, with 0: Prometheus sees no increase in a counter that first appears with 1."""
SEARCH_COUNTS = {"candidates": _COUNT_BUCKETS, "rounds": _ROUND_BUCKETS, "requests": _COUNT_BUCKETS, "bytes": _BYTE_BUCKETS}
"""What a search request spends, each a histogram."""


class Metrics:
    """The metrics of one process, in a registry of their own. prometheus_client is imported here: 44 ms that Lambda need not pay."""

    def __init__(self, *, folder: str | None = None, release: str = "") -> None:
        """`folder` is where several workers share their values; prometheus_client must see the same one in PROMETHEUS_MULTIPROC_DIR."""
        from prometheus_client import CollectorRegistry

        self.registry = CollectorRegistry()
        self._folder = folder
        self._names = _Names(folder)
        self._facts: dict[str, IndexFacts] = {}
        self._others: dict[str, IndexFacts] = {}
        self._others_changed = False
        self._counted: dict[str, float] = {}
        self._make_requests()
        self._make_searches()
        self._make_indices()
        self._make_store()
        self._make_process(release)
        for code in _ALARMING_CODES:
            self.errors.labels(code)
        for code in _ALARMING_FAILURES:
            self.store_failures.labels(code)
        for outcome in ("done", "failed"):
            self.maintenance.labels(outcome)
        for verb in ("compact", "sweep"):
            self.maintenance_s.labels(verb)

    # What there is

    def _make_requests(self) -> None:
        self.duration = self._histogram("next_plaid_request_duration_seconds", "Time from request to answer", ["endpoint"])
        self.active = self._gauge("next_plaid_active_requests", "Requests being answered", ["endpoint"], "livesum")
        self.requests = self._counter("tartan_requests", "Answers by endpoint and status", ["endpoint", "status"])
        self.seconds = self._histogram("tartan_request_seconds", "Time from request to answer, by class of status", ["endpoint", "status"])
        self.errors = self._counter("tartan_errors", "Answers that are errors, by their code", ["code"])
        self.usd = self._counter("tartan_cost_usd", "List price of the store requests that requests made, in dollars")

    def _make_searches(self) -> None:
        self.searches = self._counter("tartan_searches", "Queries answered", ["index", "kind"])
        self.cold = self._counter("tartan_cold_searches", "Search requests that found part of their index not in memory")
        self.stages = self._histogram("tartan_search_stage_seconds", "Time of a search request's stages", ["stage"])
        self.spent = {
            what: self._histogram(f"tartan_search_{what}", f"{what.capitalize()} of a search request", buckets=buckets)
            for what, buckets in SEARCH_COUNTS.items()
        }
        self.work = self._counter("tartan_search_work", "Work of searches: documents reranked, tokens scored", ["what"])
        self.added = self._counter("tartan_documents_added", "Documents acknowledged", ["index"])
        self.deleted = self._counter("tartan_documents_deleted", "Documents deleted", ["index"])
        self.recall = self._summary(
            "tartan_measured_recall", "Recall of sampled searches against a search of much greater effort", ["index"]
        )

    def _make_indices(self) -> None:
        self.documents = self._gauge("next_plaid_index_documents", "Live documents of an index, as last seen", ["index"])
        self.generation = self._gauge("tartan_index_generation", "Generation of an index, as last seen", ["index"])
        self.created = self._gauge("tartan_index_updated_timestamp_seconds", "When that generation was committed", ["index"])
        self.tokens = self._gauge("tartan_index_tokens", "Tokens stored", ["index"])
        self.bytes = self._gauge("tartan_index_bytes", "Bytes of the objects that the generation names", ["index"])
        self.segments = self._gauge("tartan_index_segments", "Segments of an index", ["index"])
        self.tombstones = self._gauge("tartan_index_tombstones", "Deleted documents still stored", ["index"])
        self.backlog = self._gauge(
            "tartan_index_flat_tokens", "Tokens waiting for compaction; 0 in an index so small that it stays flat", ["index"]
        )
        self.flat_segments = self._gauge("tartan_index_flat_segments", "Flat segments", ["index"])
        self.document_limit = self._gauge("tartan_index_document_limit", "max_documents of an index that has one", ["index"])
        self.indices = self._gauge("tartan_indices", "Indices in the store, as maintenance last saw")
        self.backlog_limit = self._gauge("tartan_backlog_limit_tokens", "Flat tokens of an index above which compaction folds them")
        self.age_limit = self._gauge("tartan_index_age_limit_seconds", "TARTAN_MAX_INDEX_AGE_S: how old an index may grow; 0 for any age")
        self.maintenance = self._counter("tartan_maintenance_runs", "Background compactions by outcome", ["outcome"])
        self.maintenance_s = self._histogram("tartan_maintenance_seconds", "Time of background work on an index", ["verb"], _WORK_BUCKETS)

    def _make_store(self) -> None:
        self.store_requests = self._counter("tartan_store_requests", "Requests to the object store", ["method"])
        self.store_bytes = self._counter("tartan_store_bytes", "Bytes read from the object store")
        self.store_written = self._counter("tartan_store_written_bytes", "Bytes written to the object store")
        self.store_s = self._histogram(
            "tartan_store_seconds", "Time of a call to the object store; ranges read together are one", ["method"]
        )
        self.store_failures = self._counter("tartan_store_failures", "Calls that the object store failed, by code of the error", ["code"])
        self.conflicts = self._counter("tartan_commit_conflicts", "Commits that lost a race and were repeated")
        self.cache = self._counter("tartan_cache", "Lookups of the byte cache on disk", ["result"])
        self.cache_bytes = self._counter("tartan_cache_bytes", "Bytes asked of the byte cache on disk", ["result"])
        self.cache_size = self._gauge("tartan_cache_size_bytes", "Bytes in the folder of the byte cache")
        self.cache_limit = self._gauge("tartan_cache_limit_bytes", "TARTAN_CACHE_BYTES, or 0 without a byte cache")

    def _make_process(self, release: str) -> None:
        self.memory = self._gauge("tartan_memory_bytes", "Decoded arrays kept in memory", mode="livesum")
        self.memory_limit = self._gauge("tartan_memory_limit_bytes", "TARTAN_MEMORY_BYTES: what each worker may keep", mode="livemax")
        self.waiting_texts = self._gauge("tartan_encoder_waiting_texts", "Texts accepted and not yet encoded", ["kind"], "livesum")
        self.resident = self._gauge("process_resident_memory_bytes", "Resident memory of the workers", mode="livesum")
        self.cpu = self._counter("process_cpu_seconds", "CPU time of the workers")
        self.host_used = self._gauge("tartan_host_memory_used_bytes", "Memory in use in the container, or on the machine")
        self.host_limit = self._gauge("tartan_host_memory_limit_bytes", "Memory of the container, or of the machine")
        self.host_cores = self._gauge("tartan_host_cores", "Cores of the container, or of the machine")
        self.build = self._gauge("tartan_build_info", "1; the release is in the label", ["release"])
        self.build.labels(release).set(1)

    def _counter(self, name: str, text: str, labels: list[str] | None = None) -> Any:
        from prometheus_client import Counter

        return Counter(name, text, labels or (), registry=self.registry)

    def _histogram(self, name: str, text: str, labels: list[str] | None = None, buckets: tuple[float, ...] = _LATENCY_BUCKETS) -> Any:
        from prometheus_client import Histogram

        return Histogram(name, text, labels or (), registry=self.registry, buckets=buckets)

    def _summary(self, name: str, text: str, labels: list[str]) -> Any:
        from prometheus_client import Summary

        return Summary(name, text, labels, registry=self.registry)

    def _gauge(self, name: str, text: str, labels: list[str] | None = None, mode: Any = "mostrecent") -> Any:
        from prometheus_client import Gauge

        return Gauge(name, text, labels or (), registry=self.registry, multiprocess_mode=mode)

    # Indices

    def index_label(self, name: str) -> str:
        """The name, while there are few; a bounded set of labels whatever clients do. Callers pass only names of existing indices."""
        return name if self._names.admit(name) else OTHER_INDEX

    def saw_index(self, name: str, facts: IndexFacts) -> None:
        """Bring the gauges of an index up to a generation; one that is older than what they show (an `as_of`) is passed over."""
        known = self._facts.get(name)
        if known is not None and (facts.created_s, facts.generation) <= (known.created_s, known.generation):
            return
        if known is None and len(self._facts) >= MAX_FOLLOWED:
            return
        self._facts[name] = facts
        if self.index_label(name) == OTHER_INDEX:
            self._others[name] = facts
            self._others_changed = True
        else:
            self._show(name, facts)

    def knows(self, name: str, generation: int) -> bool:
        """Whether the gauges of an index show this generation already: saves callers the reckoning."""
        known = self._facts.get(name)
        return known is not None and known.generation == generation

    def saw_all(self, found: Mapping[str, IndexFacts]) -> None:
        """Every index that there is: those not among them are gone."""
        for name in self._facts.keys() - found.keys():
            self.forgot_index(name)
        for name, facts in found.items():
            self.saw_index(name, facts)
        self.indices.set(len(found))

    def forgot_index(self, name: str) -> None:
        """Drop the gauges of a deleted index."""
        if self._facts.pop(name, None) is None:
            return
        if self._others.pop(name, None) is not None:
            self._others_changed = True
            return
        for gauge, _ in self._gauges(None):
            if self._folder:
                gauge.labels(name).set(math.nan)  # files cannot forget a label: `render` leaves NaN out
            else:
                with contextlib.suppress(KeyError):
                    gauge.remove(name)
        self._names.forget(name)

    def _show_others(self) -> None:
        """Sum up what has no label of its own: not with each change, which would take the square of their number."""
        if self._others_changed:
            self._others_changed = False
            self._show(OTHER_INDEX, _sum(self._others))

    def _show(self, label: str, facts: IndexFacts) -> None:
        for gauge, value in self._gauges(facts):
            gauge.labels(label).set(math.nan if value is None else value)

    def _gauges(self, facts: IndexFacts | None) -> Iterator[tuple[Any, float | None]]:
        """Each gauge of an index with its value."""
        gauges: list[Any] = [self.generation, self.created, self.documents, self.tokens, self.bytes, self.segments, self.tombstones]
        gauges += [self.backlog, self.flat_segments, self.document_limit]
        return zip(gauges, astuple(facts) if facts else (None,) * len(gauges), strict=True)

    # Events

    def searched(self, name: str, kind: str, n_queries: int, stages_ms: Mapping[str, float], facts: Mapping[str, int]) -> None:
        """One search request: stage times and counts are those of the whole request."""
        self.searches.labels(self.index_label(name), kind).inc(n_queries)
        for stage, ms in stages_ms.items():
            self.stages.labels(stage).observe(ms / 1000)
        for what, histogram in self.spent.items():
            histogram.observe(facts.get(what, 0))
        for what in ("reranked", "tokens"):
            self.work.labels(what).inc(facts.get(what, 0))
        if facts.get("cold_segments"):
            self.cold.inc()

    def answered(self, endpoint: str, status: int, took_s: float, *, code: str | None = None, usd: float = 0.0) -> None:
        """One request's answer is out."""
        self.duration.labels(endpoint).observe(took_s)
        self.requests.labels(endpoint, str(status)).inc()
        self.seconds.labels(endpoint, f"{status // 100}xx").observe(took_s)
        if code is not None:
            self.errors.labels(code).inc()
        if usd:
            self.usd.inc(usd)

    def set_process(self, store: Cost, used_memory_bytes: int, memory_limit_bytes: int, host: HostFacts) -> None:
        """Bring the counters of the process up to what it has counted itself."""
        self._show_others()
        self.memory.set(used_memory_bytes)
        self.memory_limit.set(memory_limit_bytes)
        for kind, n in list(store.requests.items()):
            self._advance(self.store_requests.labels(kind), f"requests/{kind}", n)
        self._advance(self.store_bytes, "bytes", store.bytes_read)
        self._advance(self.store_written, "written", store.bytes_written)
        self._advance(self.cpu, "cpu", host.cpu_s)
        self.resident.set(host.resident_bytes)
        self.host_used.set(host.used_bytes)
        self.host_limit.set(host.limit_bytes)
        self.host_cores.set(host.cores)

    def set_cache(self, stats: CacheStats, size_bytes: int | None, limit_bytes: int) -> None:
        """Bring the counters of the byte cache up to its own; its size is unknown until it has written something."""
        for result, lookups, n_bytes in (("hit", stats.hits, stats.hit_bytes), ("miss", stats.misses, stats.miss_bytes)):
            self._advance(self.cache.labels(result), result, lookups)
            self._advance(self.cache_bytes.labels(result), f"bytes/{result}", n_bytes)
        if size_bytes is not None:
            self.cache_size.set(size_bytes)
        self.cache_limit.set(limit_bytes)

    def _advance(self, counter: Any, name: str, value: float) -> None:
        counter.inc(max(0, value - self._counted.get(name, 0)))
        self._counted[name] = value

    def render(self) -> bytes:
        """The exposition text."""
        from prometheus_client import CollectorRegistry, generate_latest, multiprocess

        self._show_others()
        if self._folder is None:
            return generate_latest(_WithoutNan(self.registry))
        for pid in _dead_workers(Path(self._folder)):
            multiprocess.mark_process_dead(pid, self._folder)  # type: ignore[no-untyped-call]
        registry = CollectorRegistry()
        multiprocess.MultiProcessCollector(registry, self._folder)  # type: ignore[no-untyped-call]
        return generate_latest(_WithoutNan(registry))


class _Names:
    """The index names that have a label of their own. Workers agree through a file, so that the bound holds for all of them together."""

    def __init__(self, folder: str | None) -> None:
        self._path = Path(folder) / "labels" if folder else None
        self._admitted: set[str] = set()
        self._is_full = False

    def admit(self, name: str) -> bool:
        if name in self._admitted:
            return True
        if self._path is None:
            if len(self._admitted) < MAX_INDICES:
                self._admitted.add(name)
        elif not self._is_full:
            self._ask_file(name)
        return name in self._admitted

    def forget(self, name: str) -> None:
        if self._path is None:
            self._admitted.discard(name)

    def _ask_file(self, name: str) -> None:
        assert self._path is not None
        with open(self._path, "a+", encoding="utf-8") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            file.seek(0)
            self._admitted = set(file.read().split())
            self._is_full = len(self._admitted) >= MAX_INDICES
            if not self._is_full and name not in self._admitted:
                file.write(f"{name}\n")
                self._admitted.add(name)


class _WithoutNan:
    """A registry without the values that there are not: NaN stands for them."""

    def __init__(self, registry: Any) -> None:
        self._registry = registry

    def collect(self) -> Iterator[Any]:
        for metric in self._registry.collect():
            metric.samples = [sample for sample in metric.samples if not math.isnan(sample.value)]
            yield metric


def _sum(facts: Mapping[str, IndexFacts]) -> IndexFacts:
    """Many indices as one line; `created_s` is the oldest, so that a stale index among them shows."""
    rows = facts.values()
    return IndexFacts(
        generation=0,
        created_s=min((one.created_s for one in rows), default=math.nan),
        n_documents=sum(one.n_documents for one in rows),
        n_tokens=sum(one.n_tokens for one in rows),
        size_bytes=sum(one.size_bytes for one in rows),
        n_segments=sum(one.n_segments for one in rows),
        n_tombstones=sum(one.n_tombstones for one in rows),
        flat_tokens=sum(one.flat_tokens for one in rows),
        flat_segments=sum(one.flat_segments for one in rows),
        document_limit=None,
    )


def _dead_workers(folder: Path) -> set[int]:
    """Workers that left live gauges behind and are gone."""
    pids = {int(path.stem.rpartition("_")[2]) for path in folder.glob("gauge_live*_*.db")}
    return {pid for pid in pids if not _is_alive(pid)}


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True
