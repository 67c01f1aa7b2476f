"""Settings, read once from the environment, and Runtime: what lives as long as the process, each part made when first needed.

This is the only module that reads the environment (numeric libraries and obstore read OMP_*, AWS_* and the like on their own). Nothing here
runs in the ASGI lifespan: under Mangum that would be every invocation.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import platform
import shutil
import tempfile
from collections.abc import Callable, Mapping
from functools import cached_property
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import msgspec

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # read when numpy is imported: one BLAS thread a worker, threads are across segments

from engine.config import MaintenanceParams
from engine.errors import EngineError
from engine.format import names
from engine.store.base import ObjectStore
from engine.store.wrappers import CountingStore
from handler import tracing
from handler.auth import Gate, parse_records
from handler.logs import Logger, make_logger
from handler.threads import Threads

if TYPE_CHECKING:  # no numpy at module scope: lambda_http.py asks the store for CURRENT before it imports numpy
    from engine.encoding.batching import BatchingEncoder
    from engine.encoding.encoder import Encoder, ModelInfo
    from engine.fanout import FanOut
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


LEXICAL_MODEL = "hashing"
"""The model setting that chooses the built-in encoder."""
_MODEL_INFO_WAIT_S = 5.0
_SHARED_METRICS = "PROMETHEUS_MULTIPROC_DIR"
COUNT_INTERVAL_S = 5.0
"""How old the figures of a process may be when they are scraped: a third of Prometheus's usual interval."""
FOLD_TOKENS, FOLD_SEGMENTS = 20_000, 8
"""What a server leaves flat: as much as adds 2 to 3 ms to a search. Smaller than the engine's own bounds, which suit an occasional compactor: here one is at
hand, and a fold costs as many requests as two adds."""
MERGE_FACTOR = 3
"""How many folded segments of about one size a server lets stand before it makes one of them. Every segment costs a search about 2 ms, merging
records again next to nothing: over 14 folds of 130 documents a search took 18.3 ms of CPU on average instead of 20.8 with the engine's 8,
maintenance 0.34 s a fold instead of 0.31."""


class Setting(msgspec.Struct, frozen=True):
    """One line of the table: the field of Settings, its environment variables (the first that is set wins), its meaning."""

    field: str
    variables: tuple[str, ...]
    meaning: str
    parse: Callable[[str], Any]

    @property
    def default(self) -> Any:
        return _DEFAULTS[self.field]


def _bool(text: str) -> bool:
    value = text.strip().lower()
    if value in ("true", "1", "yes", "on"):
        return True
    if value in ("false", "0", "no", "off", ""):
        return False
    raise ValueError("expected true or false")


def _positive(text: str) -> int:
    if (value := int(text)) < 1:
        raise ValueError("expected a positive integer")
    return value


def _natural(text: str) -> int:
    if (value := int(text)) < 0:
        raise ValueError("expected an integer that is not negative")
    return value


def _seconds(text: str) -> float:
    if not 0 <= (value := float(text)) < float("inf"):
        raise ValueError("expected seconds")
    return value


def _share(text: str) -> float:
    if not 0 <= (value := float(text)) <= 1:
        raise ValueError("expected a share from 0 to 1")
    return value


def _optional(parse: Callable[[str], Any]) -> Callable[[str], Any]:
    return lambda text: parse(text) if text.strip() else None


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())


def _areas(text: str) -> tuple[str, ...]:
    """`none` closes all: a blank variable counts as not set here as everywhere."""
    found = _names(text)
    unknown = set(found) - {"health", "docs", "metrics"}
    if found != ("none",) and unknown:
        raise ValueError(f"not an area: {', '.join(sorted(unknown))} (health, docs, metrics; or none alone)")
    return tuple(name for name in found if name != "none")


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """A deployment's choices. Defaults stand here; SETTINGS has names and meanings."""

    index_dir: str = "./data/indices"
    s3_endpoint: str = ""
    region: str = "us-east-1"
    function_mb: int = 0
    aws_profile: str = ""
    fsync: bool = True
    host: str = "0.0.0.0"
    port: int = 8080
    workers: int = 1
    model: str = ""
    model_int8: bool = False
    query_length: int | None = None
    document_length: int | None = None
    encoder_threads: int | None = None
    max_batch_texts: int = 64
    start_from_scratch: int = 999
    rate_limit_enabled: bool = False
    rate_limit_per_second: float = 50.0
    rate_limit_burst: int = 100
    concurrency_limit: int = 100
    queue_limit: int = 0
    queue_wait_s: float = 5.0
    short_timeout_s: float = 30.0
    timeout_s: float = 300.0
    max_body_bytes: int = 100 << 20
    max_bodies_bytes: int = 512 << 20
    max_queries: int = 1000
    memory_bytes: int = 512 << 20
    cache_dir: str = ""
    cache_bytes: int = 2 << 30
    search_threads: int = 0
    path_prefix: str = ""
    api_keys: str = ""
    api_keys_file: str = ""
    open_areas: tuple[str, ...] = ("health", "docs")
    cors: bool = True
    gzip_min_bytes: int = 1024
    metrics: bool = True
    log_level: str = "info"
    emf_namespace: str = ""
    otlp_endpoint: str = ""
    trace_sample: float = 1.0
    recall_sample: float = 0.0
    max_index_age_s: float = 0.0
    warm: tuple[str, ...] = ()
    compact: bool = True
    maintenance_interval_s: float = 30.0
    drain_s: float = 5.0
    trust_proxy: bool = False
    presume: bool = False
    ephemeral_mb: int = 0
    max_upload_bytes: int = 256 << 20
    read_only: bool = False
    fanout_machine: str = ""
    fanout_peers: tuple[str, ...] = ()
    fanout_bytes: int = 2 << 30
    fanout_shard_bytes: int = 256 << 20
    sfn_endpoint: str = ""
    tls_cert: str = ""
    tls_key: str = ""

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] | None = None, **overrides: Any) -> Settings:
        """Settings from the environment; `overrides` (a command line) win, those that are None do not count.

        Raises ValueError naming the variable that cannot be read. A variable that is set but blank counts as not set.
        """
        environment = os.environ if environment is None else environment
        values: dict[str, Any] = {}
        for setting in SETTINGS:
            for variable in setting.variables:
                text = environment.get(variable, "")
                if not text.strip():
                    continue
                try:
                    values[setting.field] = setting.parse(text)
                except ValueError as error:
                    raise ValueError(f"{variable}={text!r}: {error}") from error
                break
        values.update({name: value for name, value in overrides.items() if value is not None})
        return cls(**values)

    @classmethod
    def for_lambda(cls, environment: Mapping[str, str] | None = None) -> Settings:
        """Settings of a function: what the environment says, and for what it does not say, defaults that suit a process which is frozen
        between requests and has the memory and the /tmp that the function was given. ValueError as above."""
        environment = os.environ if environment is None else environment
        given = {setting.field for setting in SETTINGS if any(environment.get(name, "").strip() for name in setting.variables)}
        ephemeral_mb = int(environment.get("TARTAN_EPHEMERAL_MB", "").strip() or 0)
        defaults: dict[str, Any] = _LAMBDA_DEFAULTS | _cache_in_tmp(ephemeral_mb)
        memory_mb = environment.get("AWS_LAMBDA_FUNCTION_MEMORY_SIZE", "").strip()
        if memory_mb:
            defaults["memory_bytes"] = int(max(_LAMBDA_LEAST_BYTES, _LAMBDA_SHARE * ((int(memory_mb) << 20) - _LAMBDA_OWN_BYTES)))
        return cls.from_environment(environment, **{name: value for name, value in defaults.items() if name not in given})

    def to_environment(self) -> dict[str, str]:
        """The variables that would give these settings; for child processes."""
        spelled = {setting.variables[0]: _spell(getattr(self, setting.field)) for setting in SETTINGS}
        return spelled | ({} if self.open_areas else {"TARTAN_OPEN_AREAS": "none"})  # blank would be the default


def _spell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "true" if value else "false"
    return ",".join(value) if isinstance(value, tuple) else str(value)


_DEFAULTS: dict[str, Any] = msgspec.structs.asdict(Settings())

_LAMBDA_DEFAULTS: dict[str, Any] = {
    "compact": False,  # nothing runs between invocations
    "metrics": False,  # of one environment among many; the log carries them instead
    "presume": True,
    "timeout_s": 28.0,  # API Gateway waits 30 s for an HTTP API
    "max_body_bytes": 6 << 20,
    "max_bodies_bytes": 64 << 20,
}
_LAMBDA_OWN_BYTES, _LAMBDA_SHARE, _LAMBDA_LEAST_BYTES = 256 << 20, 0.6, 64 << 20
"""Of a function's memory: what interpreter, libraries and one search take, the share of the rest that decoded segments may fill (the remainder is for
building them and for bodies), and what they get at least."""
_TMP_SHARE, _TMP_LEAST_BYTES, _TMP_MOST_BYTES = 0.8, 64 << 20, 8 << 30
"""Of /tmp: the share for the cache of the store's bytes, and bounds; with less there is no cache."""


def _cache_in_tmp(ephemeral_mb: int) -> dict[str, Any]:
    """Cache settings for ephemeral storage of a size that is known, or else found out by asking how much is free."""
    folder = Path(tempfile.gettempdir()) / "tartan-cache"
    try:
        free_bytes = ephemeral_mb << 20 or shutil.disk_usage(folder.parent).free
    except OSError:
        return {}
    budget = min(int(free_bytes * _TMP_SHARE), _TMP_MOST_BYTES)
    return {"cache_dir": str(folder), "cache_bytes": budget} if budget >= _TMP_LEAST_BYTES else {}


SETTINGS: tuple[Setting, ...] = (
    Setting("index_dir", ("TARTAN_INDEX_DIR", "INDEX_DIR"), "where indices lie: a directory or s3://bucket/prefix", str),
    Setting("s3_endpoint", ("TARTAN_S3_ENDPOINT", "AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL"), "URL of an S3-compatible server", str),
    Setting("region", ("TARTAN_REGION", "AWS_REGION", "AWS_DEFAULT_REGION"), "whose prices `explain` and `tartan cost` reckon with", str),
    Setting(
        "function_mb",
        ("TARTAN_FUNCTION_MB", "AWS_LAMBDA_FUNCTION_MEMORY_SIZE"),
        "MB of the Lambda function this runs in, whose time `explain` then prices; 0 for a server",
        _natural,
    ),
    Setting("aws_profile", ("TARTAN_AWS_PROFILE",), "profile whose credentials to use; needs the extra `aws`", str),
    Setting("fsync", ("TARTAN_FSYNC",), "directories: an acknowledged write survives a power failure", _bool),
    Setting("host", ("TARTAN_HOST",), "address to listen on", str),
    Setting("port", ("TARTAN_PORT",), "port to listen on", _positive),
    Setting("workers", ("TARTAN_WORKERS",), "server processes; each has caches of its own", _positive),
    Setting("model", ("TARTAN_MODEL",), "encoder: a folder, s3://, a hub name, or 'hashing' (built in, lexical); empty for none", str),
    Setting("model_int8", ("TARTAN_MODEL_INT8",), "load model_int8.onnx instead of model.onnx", _bool),
    Setting("query_length", ("TARTAN_QUERY_LENGTH",), "tokens of a query; empty leaves it to the model", _optional(_positive)),
    Setting("document_length", ("TARTAN_DOCUMENT_LENGTH",), "tokens of a document; empty leaves it to the model", _optional(_positive)),
    Setting(
        "encoder_threads",
        ("TARTAN_ENCODER_THREADS", "NEXT_PLAID_TOKENIZER_THREADS"),
        "threads of the encoder; empty lets it choose",
        _optional(_positive),
    ),
    Setting("max_batch_texts", ("MAX_BATCH_TEXTS",), "texts of concurrent requests that are encoded together", _positive),
    Setting(
        "start_from_scratch", ("INDEX_DEFAULT_START_FROM_SCRATCH",), "echoed in the configuration of new indices; binds nothing", _natural
    ),
    Setting("rate_limit_enabled", ("RATE_LIMIT_ENABLED",), "limit requests per client address and process", _bool),
    Setting("rate_limit_per_second", ("RATE_LIMIT_PER_SECOND",), "requests a second that a client gains", _seconds),
    Setting("rate_limit_burst", ("RATE_LIMIT_BURST_SIZE",), "requests that a client may save up", _positive),
    Setting("concurrency_limit", ("CONCURRENCY_LIMIT",), "most requests at work in each group of routes; more wait", _positive),
    Setting(
        "queue_limit",
        ("TARTAN_QUEUE_LIMIT",),
        "requests of the groups search and metadata that may wait for a place; one more is an overrun, and who waits gets 503; 0 for 12 per thread",
        _natural,
    ),
    Setting("queue_wait_s", ("TARTAN_QUEUE_WAIT_S",), "longest wait for a place before 503", _seconds),
    Setting("short_timeout_s", ("TARTAN_SHORT_TIMEOUT_S",), "time limit of health and of listing and describing indices", _seconds),
    Setting("timeout_s", ("TARTAN_TIMEOUT_S",), "time limit of everything else", _seconds),
    Setting("max_body_bytes", ("TARTAN_MAX_BODY_BYTES",), "largest request body (DELETE: 2 MiB)", _positive),
    Setting("max_bodies_bytes", ("TARTAN_MAX_BODIES_BYTES",), "request bodies held at once; more wait", _positive),
    Setting("max_queries", ("TARTAN_MAX_QUERIES",), "most queries in one request", _positive),
    Setting("memory_bytes", ("TARTAN_MEMORY_BYTES",), "decoded segments and codecs kept in memory, per process", _natural),
    Setting("cache_dir", ("TARTAN_CACHE_DIR",), "folder for a cache of the store's bytes; empty for none", str),
    Setting("cache_bytes", ("TARTAN_CACHE_BYTES",), "size of that cache", _positive),
    Setting("search_threads", ("TARTAN_SEARCH_THREADS",), "threads for arithmetic, per process; 0 for one per core", _natural),
    Setting(
        "path_prefix", ("TARTAN_PATH_PREFIX",), "path in front of every route, such as an API Gateway stage; also served without it", str
    ),
    Setting("api_keys", ("TARTAN_API_KEYS",), "JSON list of key records; access control is on when there is one", str),
    Setting("api_keys_file", ("TARTAN_API_KEYS_FILE",), "file with such a list", str),
    Setting("open_areas", ("TARTAN_OPEN_AREAS",), "of health, docs and metrics, those that need no key; none for none", _areas),
    Setting("cors", ("TARTAN_CORS",), "let browsers of any origin call", _bool),
    Setting(
        "gzip_min_bytes",
        ("TARTAN_GZIP_MIN_BYTES",),
        "answers from this size are compressed for clients that accept it; 0 for never",
        _natural,
    ),
    Setting("metrics", ("TARTAN_METRICS",), "serve /metrics", _bool),
    Setting("log_level", ("TARTAN_LOG_LEVEL", "RUST_LOG"), "debug, info, warning, error or off", str),
    Setting(
        "emf_namespace", ("TARTAN_EMF_NAMESPACE",), "CloudWatch namespace of metrics embedded in the log (Lambda); empty for none", str
    ),
    Setting(
        "otlp_endpoint", ("TARTAN_OTLP_ENDPOINT",), "base URL of an OpenTelemetry collector (OTLP over HTTP); needs the extra `otel`", str
    ),
    Setting("trace_sample", ("TARTAN_TRACE_SAMPLE",), "share of requests whose spans are sent, where the caller has not decided", _share),
    Setting("recall_sample", ("TARTAN_RECALL_SAMPLE",), "share of searches whose recall is measured in the background", _share),
    Setting("max_index_age_s", ("TARTAN_MAX_INDEX_AGE_S",), "an index without a commit for longer raises an alarm; 0 for never", _seconds),
    Setting("warm", ("TARTAN_WARM",), "indices to bring into memory when a server starts, by name", _names),
    Setting("compact", ("TARTAN_COMPACT",), "let a server compact and collect garbage in the background", _bool),
    Setting("maintenance_interval_s", ("TARTAN_MAINTENANCE_INTERVAL_S",), "how often it looks for work", _seconds),
    Setting("drain_s", ("TARTAN_DRAIN_S",), "on SIGTERM, how long health says 503 before the server stops listening", _seconds),
    Setting("trust_proxy", ("TARTAN_TRUST_PROXY",), "take a client's address from X-Forwarded-For", _bool),
    Setting(
        "presume",
        ("TARTAN_PRESUME",),
        "search the generation known last while the store is asked whether it is still in force, and again if it is not; on Lambda the default",
        _bool,
    ),
    Setting(
        "ephemeral_mb",
        ("TARTAN_EPHEMERAL_MB",),
        "Lambda: size of /tmp, whose greater part becomes the cache; 0 to look how much is free",
        _natural,
    ),
    Setting(
        "max_upload_bytes", ("TARTAN_MAX_UPLOAD_BYTES",), "largest presigned upload, and largest answer as a presigned download", _positive
    ),
    Setting(
        "read_only",
        ("TARTAN_READ_ONLY",),
        "refuse every change with 403 READ_ONLY and do no maintenance: a replica that only searches",
        _bool,
    ),
    Setting(
        "fanout_machine", ("TARTAN_FANOUT_MACHINE",), "ARN of the Express state machine that scores large indices (docs/serverless.md)", str
    ),
    Setting(
        "fanout_peers",
        ("TARTAN_FANOUT_PEERS",),
        "URLs of servers that each score a share of large indices; this one may be among them",
        _names,
    ),
    Setting("fanout_bytes", ("TARTAN_FANOUT_BYTES",), "size of an index from which its searches are fanned out", _natural),
    Setting("fanout_shard_bytes", ("TARTAN_FANOUT_SHARD_BYTES",), "bytes of segments that one task of the state machine scores", _positive),
    Setting("sfn_endpoint", ("TARTAN_SFN_ENDPOINT", "AWS_ENDPOINT_URL_SFN"), "URL of another Step Functions than Amazon's", str),
    Setting("tls_cert", ("TARTAN_TLS_CERT",), "file with the certificate (chain) to serve TLS with; empty for plain HTTP", str),
    Setting("tls_key", ("TARTAN_TLS_KEY",), "file with its private key", str),
)
"""Every setting, in the order of the manual. Tests compare it with template.yaml, infra/ and the README."""


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

        metrics = Metrics(folder=os.environ.get(_SHARED_METRICS), release=release())
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


def share_metrics(folder: str) -> None:
    """Let the workers of this process put their metrics into files of a folder: prometheus_client reads the variable when imported."""
    os.environ[_SHARED_METRICS] = folder


def child_environment(settings: Settings) -> dict[str, str]:
    """The environment of a maintenance child: this process's, the settings, one numeric thread, this source tree importable."""
    root = str(Path(__file__).resolve().parent.parent)
    paths = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
    threads = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMEXPR_MAX_THREADS"), "1")
    kept = {name: value for name, value in os.environ.items() if name != _SHARED_METRICS}
    return {**kept, **threads, **settings.to_environment(), "PYTHONPATH": paths}


def _never_changes(name: str) -> bool:
    """Whether an object of this name may be kept on disk: those with an id of their own, but for markers, which come and go."""
    index, *rest = name.split("/")
    return any(names.is_id(part) for part in rest) and not name.startswith((names.sweeps(index), names.builds(index), names.uploads(index)))


def numeric_threads() -> dict[str, str]:
    """What the environment tells numeric libraries about threads, by variable; "" for nothing."""
    return {name: os.environ.get(name, "") for name in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS")}


def is_started_ahead() -> bool:
    """Whether Lambda made this process before anybody asked for it (provisioned concurrency, SnapStart), so that preparing costs no one time."""
    return os.environ.get("AWS_LAMBDA_INITIALIZATION_TYPE", "on-demand") not in ("on-demand", "")


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
