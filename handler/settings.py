"""Settings, read once from the environment: each with its variables, its meaning and its default.

This is the only module that reads the environment (numeric libraries and obstore read OMP_*, AWS_* and the like on their own).
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import msgspec

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # read when numpy is imported: one BLAS thread a worker, threads are across segments

LEXICAL_MODEL = "hashing"
"""The model setting that chooses the built-in encoder."""
_SHARED_METRICS = "PROMETHEUS_MULTIPROC_DIR"


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


def share_metrics(folder: str) -> None:
    """Let the workers of this process put their metrics into files of a folder: prometheus_client reads the variable when imported."""
    os.environ[_SHARED_METRICS] = folder


def shared_metrics() -> str | None:
    """The folder of `share_metrics`, in a worker."""
    return os.environ.get(_SHARED_METRICS)


def child_environment(settings: Settings) -> dict[str, str]:
    """The environment of a maintenance child: this process's, the settings, one numeric thread, this source tree importable."""
    root = str(Path(__file__).resolve().parent.parent)
    paths = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
    threads = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMEXPR_MAX_THREADS"), "1")
    kept = {name: value for name, value in os.environ.items() if name != _SHARED_METRICS}
    return {**kept, **threads, **settings.to_environment(), "PYTHONPATH": paths}


def numeric_threads() -> dict[str, str]:
    """What the environment tells numeric libraries about threads, by variable; "" for nothing."""
    return {name: os.environ.get(name, "") for name in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS")}


def is_started_ahead() -> bool:
    """Whether Lambda made this process before anybody asked for it (provisioned concurrency, SnapStart), so that preparing costs no one time."""
    return os.environ.get("AWS_LAMBDA_INITIALIZATION_TYPE", "on-demand") not in ("on-demand", "")
