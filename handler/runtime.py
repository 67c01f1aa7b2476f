"""Runtime: what lives as long as the process, each part made when first needed.

Nothing here runs in the ASGI lifespan: under Mangum that would be every invocation.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import platform
import tempfile
from collections.abc import Callable, Mapping
from functools import cached_property
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from engine.config import MaintenanceParams
from engine.errors import EngineError
from engine.format import names
from engine.store.base import ObjectStore
from engine.store.wrappers import CountingStore
from handler import tracing
from handler.auth import Gate, parse_records
from handler.logs import Logger, make_logger
from handler.settings import LEXICAL_MODEL, Settings, shared_metrics
from handler.threads import Threads

if TYPE_CHECKING:  # no numpy at module scope: lambda_http.py asks the store for CURRENT before it imports numpy
    from engine.encoding.batching import BatchingEncoder
    from engine.encoding.encoder import Encoder, ModelInfo
    from engine.fanout.search import FanOut
    from engine.format.manifest import Manifest
    from engine.index.aliases import Aliases
    from engine.index.reader import Reader
    from engine.searcher import Searcher
    from engine.store.objects import StoreOptions
    from engine.store.ranges import ReadPolicy
    from handler.emf import Emf
    from handler.fanout import Peers, StateMachine
    from handler.index_facts import IndexFacts
    from handler.metrics import Metrics
    from handler.recall_sampler import RecallSampler


_MODEL_INFO_WAIT_S = 5.0
COUNT_INTERVAL_S = 5.0
"""How old the figures of a process may be when they are scraped: a third of Prometheus's usual interval."""
FOLD_TOKENS, FOLD_SEGMENTS = 20_000, 8
"""What a server leaves flat: as much as adds 2 to 3 ms to a search. Smaller than the engine's own bounds, which suit an occasional compactor: here one is at
hand, and a fold costs as many requests as two adds."""
MERGE_FACTOR = 3
"""How many folded segments of about one size a server lets stand before it makes one of them. Every segment costs a search about 2 ms, merging
records again next to nothing: over 14 folds of 130 documents a search took 18.3 ms of CPU on average instead of 20.8 with the engine's 8,
maintenance 0.34 s a fold instead of 0.31."""


class Runtime:
    """What a process holds: settings, store, caches, reader, searcher, encoder, gate, metrics, log. One event loop at a time.

    `store` replaces the one that the settings name, for tests and for embedding.
    `is_draining` is asked by health and readiness, `on_write` told of every generation that a request made; the server sets both.
    """

    def __init__(self, settings: Settings, *, store: ObjectStore | None = None) -> None:
        self.settings = settings
        self._given_store = store
        self._loading: asyncio.Future[BatchingEncoder] | None = None
        self._is_warming = False
        self.is_draining: Callable[[], bool] = lambda: False
        self.on_write: Callable[[str, Manifest], None] = lambda index, manifest: None
        self.maintenance = MaintenanceParams(max_flat_tokens=FOLD_TOKENS, max_flat_segments=FOLD_SEGMENTS, merge_factor=MERGE_FACTOR)

    @cached_property
    def counting(self) -> CountingStore:
        """The paid-for requests pass here, beneath the cache."""
        from handler.observed import ObservedStore

        return CountingStore(ObservedStore(self._given_store or open_at(self.settings.index_dir, self.settings), self.metrics))

    @cached_property
    def store(self) -> ObjectStore:
        if not self.settings.cache_dir:
            return self.counting
        from engine.store.cache import CachedStore

        return CachedStore(self.counting, self.settings.cache_dir, budget_bytes=self.settings.cache_bytes, cacheable=_never_changes)

    @cached_property
    def executor(self) -> Threads:
        return Threads(self.settings.search_threads or n_cores())

    @cached_property
    def reader(self) -> Reader:
        from engine.index.reader import Reader

        policy = self.read_policy
        return Reader(self.store, memory_bytes=self.settings.memory_bytes, executor=self.executor, counter=self.counting, policy=policy)

    @cached_property
    def read_policy(self) -> ReadPolicy:
        """Which gaps to read through: in a function as its memory and the store are priced, in a server, whose time is paid for anyway, the default."""
        from engine.store.ranges import DEFAULT_POLICY, ReadPolicy

        if not self.settings.function_mb:
            return DEFAULT_POLICY
        from engine.cost import prices_near

        at = prices_near(self.settings.region)
        usd_per_s = self.settings.function_mb / 1024 * at.lambda_gb_s(architecture())
        return ReadPolicy.priced(usd_per_get=at.s3_get, usd_per_s=usd_per_s)

    @cached_property
    def searcher(self) -> Searcher:
        from engine.searcher import Searcher

        return Searcher(self.reader)

    @cached_property
    def transport(self) -> StateMachine | Peers | None:
        """Who else scores large indices; None for nobody."""
        if not self.settings.fanout_machine and not self.settings.fanout_peers:
            return None
        from handler.fanout import make_transport

        return make_transport(self.settings)

    def fan_out(self, headers: Mapping[str, str]) -> FanOut | None:
        """Search by many processes on behalf of a caller; None if it is not configured."""
        if self.transport is None:
            return None
        from handler.fanout import make_fan_out

        return make_fan_out(self.searcher, self.transport, self.settings, headers)

    @cached_property
    def aliases(self) -> Aliases:
        from engine.index.aliases import Aliases

        return Aliases(self.store)

    @cached_property
    def gate(self) -> Gate:
        """Access control. ValueError if the configured records cannot be read: better no server than an open one."""
        text = self.settings.api_keys
        if self.settings.api_keys_file:
            text = Path(self.settings.api_keys_file).read_text(encoding="utf-8")
        return Gate(parse_records(text), frozenset(self.settings.open_areas))

    @cached_property
    def metrics(self) -> Metrics | None:
        if not self.settings.metrics:
            return None
        from handler.metrics import Metrics

        metrics = Metrics(folder=shared_metrics(), release=release())
        metrics.backlog_limit.set(self.maintenance.max_flat_tokens)
        metrics.age_limit.set(self.settings.max_index_age_s)
        return metrics

    @cached_property
    def emf(self) -> Emf | None:
        """Metrics embedded in the log, for CloudWatch."""
        if not self.settings.emf_namespace:
            return None
        from handler.emf import Emf

        return Emf(self.settings.emf_namespace)

    @cached_property
    def exporter(self) -> tracing.Exporter | None:
        """Where spans go. ImportError if they are wanted and the extra is not there."""
        return tracing.Exporter(self.settings.otlp_endpoint, release=release()) if self.settings.otlp_endpoint else None

    def begin_trace(self, traceparent: str | None, tracestate: str | None, request_id: str) -> tracing.Trace:
        """The trace that a request belongs to; its spans are kept if they are to be sent."""
        trace = tracing.begin(traceparent, tracestate, request_id=request_id, sample=self.settings.trace_sample if self.exporter else 0.0)
        if self.exporter is not None and trace.is_sampled:
            trace.spans = []
        return trace

    @cached_property
    def recall_sampler(self) -> RecallSampler | None:
        """Measures recall in the background. None unless it is wanted and there are metrics to show it."""
        if not self.settings.recall_sample or self.metrics is None:
            return None
        from handler.recall_sampler import RecallSampler

        return RecallSampler(self.searcher, self.metrics, self.settings.recall_sample)

    def saw(self, index: str, manifest: Manifest) -> IndexFacts | None:
        """Tell the metrics of a generation that a request met; its facts if embedded metrics want them."""
        wants = self.emf is not None and self.emf.is_news(index, manifest)
        if not wants and (self.metrics is None or self.metrics.knows(index, manifest.generation)):
            return None
        from handler.index_facts import IndexFacts

        facts = IndexFacts.of(manifest)
        if self.metrics is not None:
            self.metrics.saw_index(index, facts)
        return facts if wants else None

    @cached_property
    def log(self) -> Logger:
        return make_logger(self.settings.log_level)

    @property
    def has_model(self) -> bool:
        return self.settings.model not in ("", "none")

    async def encoder(self) -> BatchingEncoder:
        """The encoder, loaded on first use; concurrent first uses share the load. A failed load is tried again by the next caller."""
        if self._loading is None:
            self._loading = asyncio.ensure_future(load_encoder(self.settings))
        try:
            return await asyncio.shield(self._loading)
        except Exception:
            self._loading = None
            raise

    async def model_info(self) -> ModelInfo | None:
        """What the model says of itself; None without a model, or if it takes longer to load than health may wait."""
        if not self.has_model:
            return None
        try:
            async with asyncio.timeout(_MODEL_INFO_WAIT_S):
                return (await self.encoder()).info
        except (TimeoutError, EngineError):
            return None

    async def warm_up(self) -> None:
        """Load the model and the indices that the settings name; readiness waits for it. A failure is logged, not fatal."""
        self._is_warming = True
        try:
            if self.has_model:
                await self.encoder()
            for name in self.settings.warm:
                snapshot = await self.reader.snapshot(name)
                await self.searcher.warm(snapshot)
                self.log.info("warmed", index=name, generation=snapshot.manifest.generation)
        except EngineError as error:
            self.log.error("warm-up failed", error=str(error))
        finally:
            self._is_warming = False

    def is_warm(self) -> bool:
        return not self._is_warming

    def count_process(self) -> None:
        """Bring the process's own counts into the metrics."""
        if self.metrics is None:
            return
        from handler.host import look

        memory = self.reader.parts.memory
        self.metrics.set_process(self.counting.total, memory.used_bytes, memory.budget_bytes, look())
        if self.settings.cache_dir:
            cache: Any = self.store
            self.metrics.set_cache(cache.stats, cache.held_bytes, self.settings.cache_bytes)
        if self._loading is not None and self._loading.done() and not self._loading.exception():
            for kind, n_texts in self._loading.result().waiting_texts().items():
                self.metrics.waiting_texts.labels(kind).set(n_texts)

    async def keep_counting(self) -> None:
        """`count_process` again and again, until cancelled: a scrape reaches one of several workers and shows what all of them wrote."""
        while True:
            self.count_process()
            await asyncio.sleep(COUNT_INTERVAL_S)

    async def aclose(self) -> None:
        """`close`, and the connections to whoever else scores large indices, which belong to the event loop that used them."""
        if (transport := self.__dict__.get("transport")) is not None:
            await transport.close()
        self.close()

    def close(self) -> None:
        """Let go of threads. The store needs no closing."""
        if self.__dict__.get("exporter") is not None:
            self.__dict__["exporter"].close()
        if "executor" in self.__dict__:
            self.executor.shutdown(wait=False, cancel_futures=True)


def open_at(url: str, settings: Settings) -> ObjectStore:
    """The store behind a URL, reached as the settings say."""
    from engine.store.objects import open_store

    return open_store(url, store_options(settings))


def store_options(settings: Settings) -> StoreOptions:
    """How the settings say that stores are reached."""
    from engine.store.objects import StoreOptions

    return StoreOptions(endpoint=settings.s3_endpoint or None, profile=settings.aws_profile or None, fsync=settings.fsync)


async def load_encoder(settings: Settings) -> BatchingEncoder:
    """The encoder that the settings name. Imports and loading happen on a thread; onnxruntime only where it is used."""
    from engine.encoding.batching import BatchingEncoder

    encoder = await asyncio.to_thread(_open_encoder, settings, await _model_folder(settings))
    return BatchingEncoder(encoder, max_texts=settings.max_batch_texts)


async def _model_folder(settings: Settings) -> Path | None:
    """Where the model's files are, fetched if need be; None for the built-in encoder."""
    model = settings.model
    if model == LEXICAL_MODEL:
        return None
    from engine.encoding import folder

    cache = Path(settings.cache_dir or tempfile.gettempdir()) / "tartan-models"
    if "://" in model:
        own = cache / hashlib.sha256(model.encode()).hexdigest()[:16]
        store: Any = open_at(model, settings)
        return await folder.load_from_store(store, "", own, int8=settings.model_int8)
    return await asyncio.to_thread(folder.load_from_hub, model, int8=settings.model_int8, cache_dir=cache)


def _open_encoder(settings: Settings, path: Path | None) -> Encoder:
    if path is None:
        from engine.encoding.hashing import LexicalEncoder

        return LexicalEncoder()
    from engine.encoding.onnx import OnnxEncoder

    return OnnxEncoder(
        path,
        int8=settings.model_int8,
        n_threads=settings.encoder_threads or 0,
        query_length=settings.query_length,
        document_length=settings.document_length,
    )


def _never_changes(name: str) -> bool:
    """Whether an object of this name may be kept on disk: those with an id of their own, but for markers, which come and go."""
    index, *rest = name.split("/")
    return any(names.is_id(part) for part in rest) and not name.startswith((names.sweeps(index), names.builds(index), names.uploads(index)))


def architecture() -> Literal["arm64", "x86_64"]:
    """As Lambda and Fargate call this machine's."""
    return "arm64" if platform.machine() in ("arm64", "aarch64") else "x86_64"


def n_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def release() -> str:
    """The version of Tartan that runs."""
    try:
        return version("tartan")
    except PackageNotFoundError:
        return "0.1.0"
