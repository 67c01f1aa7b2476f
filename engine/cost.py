"""What requests, seconds and bytes cost on AWS. Pure arithmetic over one table of prices; the only file that holds a price.

    usage of one call -> dollars          explain (handler/routes/search.py), benchmarks/cold_query.py
    a month of a workload -> lines        `tartan cost` (handler/cli/cost.py)

List prices in US dollars as public tables had them on PRICES_AS_OF, first tier, without free tier, discounts, savings plans or tax. They were
written down by hand and change: check them against AWS's own pages before a decision hangs on them, and pass your own with `Prices`.
What a query takes stands in `MEASURED`, with the command that measured it.
"""

from __future__ import annotations

import math
from typing import Literal

import msgspec

from engine.errors import InvalidRequest

PRICES_AS_OF = "2026-11-23"
DEFAULT_REGION = "us-east-1"
HOURS_PER_MONTH = 730.0
DAYS_PER_MONTH = HOURS_PER_MONTH / 24
GB = 1e9
MILLION = 1e6
FREE_EPHEMERAL_MB = 512
Architecture = Literal["arm64", "x86_64"]


class Prices(msgspec.Struct, frozen=True):
    """One region. The defaults are us-east-1.

    s3_*            per request (PUT also stands for LIST), and a GB-month of standard storage; GETs from within the region carry free transfer
    lambda_*        per GB-second by architecture, per invocation, per GB-second of ephemeral storage above 512 MB
    http_api        per request of an HTTP API of API Gateway (a REST API costs 3.5 times as much)
    express_*       Step Functions Express: per execution and per GB-second (billed in steps of 64 MB and 100 ms)
    standard_step   Step Functions Standard: per state transition
    fargate_*       per hour of a vCPU and of a GB, Linux
    alb_hour, lcu_hour   application load balancer: by the hour, and by the hour and capacity unit
    data_out_gb     to the internet
    """

    region: str = DEFAULT_REGION
    s3_get: float = 0.4e-6
    s3_put: float = 5e-6
    s3_list: float = 5e-6
    s3_gb_month: float = 0.023
    lambda_arm64_gb_s: float = 1.33334e-5
    lambda_x86_64_gb_s: float = 1.66667e-5
    lambda_request: float = 0.2e-6
    lambda_ephemeral_gb_s: float = 3.09e-8
    http_api: float = 1e-6
    express_request: float = 1e-6
    express_gb_s: float = 1.667e-5
    standard_step: float = 25e-6
    fargate_arm64_vcpu_hour: float = 0.03238
    fargate_arm64_gb_hour: float = 0.00356
    fargate_x86_64_vcpu_hour: float = 0.04048
    fargate_x86_64_gb_hour: float = 0.004445
    alb_hour: float = 0.0225
    lcu_hour: float = 0.008
    data_out_gb: float = 0.09

    def lambda_gb_s(self, architecture: Architecture) -> float:
        return self.lambda_arm64_gb_s if architecture == "arm64" else self.lambda_x86_64_gb_s

    def fargate_hour(self, vcpu: float, memory_gb: float, architecture: Architecture) -> float:
        if architecture == "arm64":
            return vcpu * self.fargate_arm64_vcpu_hour + memory_gb * self.fargate_arm64_gb_hour
        return vcpu * self.fargate_x86_64_vcpu_hour + memory_gb * self.fargate_x86_64_gb_hour


_US_EAST_1 = Prices()
PRICES: dict[str, Prices] = {
    row.region: row
    for row in (
        _US_EAST_1,
        msgspec.structs.replace(_US_EAST_1, region="us-east-2"),
        msgspec.structs.replace(_US_EAST_1, region="us-west-2"),
        msgspec.structs.replace(_US_EAST_1, region="eu-west-1", http_api=1.11e-6, alb_hour=0.0252),
        msgspec.structs.replace(
            _US_EAST_1,
            region="eu-central-1",
            s3_get=0.43e-6,
            s3_put=5.4e-6,
            s3_list=5.4e-6,
            s3_gb_month=0.0245,
            http_api=1.2e-6,
            fargate_arm64_vcpu_hour=0.03725,
            fargate_arm64_gb_hour=0.00409,
            fargate_x86_64_vcpu_hour=0.04656,
            fargate_x86_64_gb_hour=0.00511,
            alb_hour=0.027,
        ),
        msgspec.structs.replace(
            _US_EAST_1,
            region="ap-northeast-1",
            s3_get=0.37e-6,
            s3_put=4.7e-6,
            s3_list=4.7e-6,
            s3_gb_month=0.025,
            http_api=1.29e-6,
            fargate_arm64_vcpu_hour=0.04045,
            fargate_arm64_gb_hour=0.00442,
            fargate_x86_64_vcpu_hour=0.05056,
            fargate_x86_64_gb_hour=0.00553,
            alb_hour=0.0243,
            data_out_gb=0.114,
        ),
    )
}


def prices(region: str) -> Prices:
    """The prices of a region. Raises InvalidRequest if they are not in the table."""
    found = PRICES.get(region)
    if found is None:
        raise InvalidRequest("no prices of this region are known", region=region, known=", ".join(PRICES))
    return found


def prices_near(region: str) -> Prices:
    """The same, or those of DEFAULT_REGION: for figures that should not fail a search."""
    return PRICES.get(region, PRICES[DEFAULT_REGION])


# One call


class Usage(msgspec.Struct, frozen=True):
    """What something took. memory_mb 0 means that seconds are paid by the hour elsewhere (a container)."""

    n_gets: float = 0.0
    n_puts: float = 0.0
    n_lists: float = 0.0
    seconds: float = 0.0
    memory_mb: float = 0.0
    ephemeral_mb: float = 0.0
    invocations: float = 0.0
    http_requests: float = 0.0
    express_executions: float = 0.0
    express_gb_s: float = 0.0
    standard_steps: float = 0.0
    bytes_out: float = 0.0

    def items(self, at: Prices, architecture: Architecture = "arm64") -> dict[str, float]:
        """Dollars by item; those of nothing are left out. Lambda's GB and milliseconds: memory_mb / 1024, rounded up to 1 ms a call."""
        calls = max(self.invocations, 1.0)
        billed_s = math.ceil(round(self.seconds / calls * 1000, 6)) / 1000 * calls
        ephemeral_gb = max(self.ephemeral_mb - FREE_EPHEMERAL_MB, 0.0) / 1024
        lines = {
            "S3 GET": self.n_gets * at.s3_get,
            "S3 PUT": self.n_puts * at.s3_put,
            "S3 LIST": self.n_lists * at.s3_list,
            "Lambda compute": billed_s * self.memory_mb / 1024 * at.lambda_gb_s(architecture),
            "Lambda requests": self.invocations * at.lambda_request,
            "Lambda ephemeral storage": billed_s * ephemeral_gb * at.lambda_ephemeral_gb_s,
            "HTTP API": self.http_requests * at.http_api,
            "Step Functions Express": self.express_executions * at.express_request + self.express_gb_s * at.express_gb_s,
            "Step Functions Standard": self.standard_steps * at.standard_step,
            "data out": self.bytes_out / GB * at.data_out_gb,
        }
        return {name: usd for name, usd in lines.items() if usd}

    def usd(self, at: Prices, architecture: Architecture = "arm64") -> float:
        return sum(self.items(at, architecture).values())

    def times(self, n: float) -> Usage:
        """n calls like this one."""
        names = [name for name in self.__struct_fields__ if name not in ("memory_mb", "ephemeral_mb")]
        return msgspec.structs.replace(self, **{name: n * getattr(self, name) for name in names})


# A month


class Measured(msgspec.Struct, frozen=True):
    """What queries took where they were measured; every field can be given on the command line (docs/cost.md, docs/sizing.md).

    bytes_per_token      stored, by nbits, centroids included: benchmarks.sizing
    warm_ms, warm_ms_per_million_tokens   p50 of a warm search = warm_ms + the other per million tokens: benchmarks.sizing
    cold_ms, cold_gets   p50 and requests of a cold search of one segment: benchmarks.cold_query; each further segment of 256 MiB asks
                         for cold_segment_gets more, side by side with the first
    overhead_ms          what a warm invocation adds to the engine's time
    answer_bytes         of an answer that leaves AWS
    utilisation          share of a container's measured throughput that it is planned for
    """

    bytes_per_token: tuple[tuple[int, float], ...] = ((1, 22.0), (2, 38.0), (4, 70.0), (8, 134.0))
    warm_ms: float = 8.0
    warm_ms_per_million_tokens: float = 2.0
    cold_ms: float = 390.0
    cold_gets: float = 16.0
    cold_segment_gets: float = 14.0
    overhead_ms: float = 5.0
    answer_bytes: float = 4000.0
    utilisation: float = 0.6

    def stored_bytes(self, n_tokens: float, nbits: int) -> float:
        return n_tokens * dict(self.bytes_per_token)[nbits]

    def warm_search_ms(self, n_tokens: float) -> float:
        return self.warm_ms + self.warm_ms_per_million_tokens * n_tokens / MILLION

    def warm_query(self, n_tokens: float, memory_mb: float, ephemeral_mb: float = 0.0) -> Usage:
        """One request to a function that has the index in memory: one conditional GET."""
        seconds = (self.warm_search_ms(n_tokens) + self.overhead_ms) / 1000
        return Usage(n_gets=1, seconds=seconds, memory_mb=memory_mb, ephemeral_mb=ephemeral_mb, invocations=1, http_requests=1)

    def cold_query(self, stored_bytes: float, memory_mb: float, ephemeral_mb: float = 0.0) -> Usage:
        """One request to a warm function that has not."""
        more_segments = max(math.ceil(stored_bytes / SEGMENT_BYTES) - 1, 0)
        n_gets = self.cold_gets + more_segments * self.cold_segment_gets
        seconds = (self.cold_ms + self.overhead_ms) / 1000
        return Usage(n_gets=n_gets, seconds=seconds, memory_mb=memory_mb, ephemeral_mb=ephemeral_mb, invocations=1, http_requests=1)


MEASURED = Measured()
SEGMENT_BYTES = 256 << 20


class Workload(msgspec.Struct, frozen=True):
    """What is asked. hit_rate: share of queries that meet a process with the index in memory; the others are read cold.
    adds_per_day: requests that add documents (three PUTs each). peak: busiest hour over the average."""

    n_documents: int
    tokens_per_document: float
    nbits: int = 4
    queries_per_day: float = 10_000.0
    hit_rate: float = 0.9
    adds_per_day: float = 0.0
    memory_mb: int = 2048
    ephemeral_mb: int = 512
    peak: float = 4.0
    architecture: Architecture = "arm64"
    vcpu: float = 1.0
    min_tasks: int = 2

    def __post_init__(self) -> None:
        if self.n_documents < 1 or self.tokens_per_document <= 0:
            raise InvalidRequest("documents and their tokens are positive numbers")
        if self.nbits not in (1, 2, 4, 8):
            raise InvalidRequest("nbits is 1, 2, 4 or 8", nbits=self.nbits)
        if not 0 <= self.hit_rate <= 1 or self.queries_per_day < 0 or self.adds_per_day < 0:
            raise InvalidRequest("hit rate is between 0 and 1, and rates are not negative")
        if not 128 <= self.memory_mb <= 10_240 or not 512 <= self.ephemeral_mb <= 10_240:
            raise InvalidRequest("a function has 128 to 10240 MB of memory and 512 to 10240 MB of ephemeral storage")
        if self.vcpu not in FARGATE_GB or self.min_tasks < 1 or self.peak < 1:
            raise InvalidRequest("vcpu is one that Fargate has, tasks and peak are at least 1", vcpu=", ".join(map(str, FARGATE_GB)))

    @property
    def n_tokens(self) -> float:
        return self.n_documents * self.tokens_per_document


class Container(msgspec.Struct, frozen=True):
    """Fargate tasks behind a load balancer. max_queries_per_day: what they carry at the workload's peak."""

    n_tasks: int
    vcpu: float
    memory_gb: float
    max_queries_per_day: float
    usd_items: dict[str, float]

    @property
    def usd(self) -> float:
        return sum(self.usd_items.values())


class Month(msgspec.Struct, frozen=True):
    """The estimate. cheaper_from: queries a day from which the container costs less; None if it never does. fits: whether the
    function's memory holds the index, without which no query is warm."""

    stored_bytes: float
    memory_bytes: float
    fits: bool
    usd_items: dict[str, float]
    usd_per_million_warm: float
    usd_per_million_cold: float
    container: Container
    cheaper_from: float | None
    cheaper_with_tasks: int | None

    @property
    def usd(self) -> float:
        return sum(self.usd_items.values())


FARGATE_GB: dict[float, tuple[int, ...]] = {
    0.25: (1, 2),
    0.5: (1, 2, 3, 4),
    1.0: tuple(range(2, 9)),
    2.0: tuple(range(4, 17)),
    4.0: tuple(range(8, 31)),
    8.0: tuple(range(16, 61, 4)),
    16.0: tuple(range(32, 121, 8)),
}
"""Memory that Fargate gives to so many vCPUs, whole GB."""


def memory_needed(stored_bytes: float, n_tokens: float) -> float:
    """Bytes of a process while it brings an index into memory, when it needs most: PROCESS_BYTES, what is stored twice (as it arrives and as
    it is kept), and postings decoded and inverted. Afterwards it is about 1.2 times what is stored (docs/sizing.md)."""
    return PROCESS_BYTES + 2.0 * stored_bytes + BYTES_PER_TOKEN_DECODED * n_tokens


PROCESS_BYTES = 150e6
"""Python, numpy and the HTTP application, with nothing loaded."""
BYTES_PER_TOKEN_DECODED = 25.0


def estimate(work: Workload, at: Prices, measured: Measured = MEASURED) -> Month:
    """A month of a workload, by item, and the container that would do the same."""
    stored = measured.stored_bytes(work.n_tokens, work.nbits)
    needed = memory_needed(stored, work.n_tokens)
    fits = needed <= work.memory_mb * 2**20
    warm = measured.warm_query(work.n_tokens, work.memory_mb, work.ephemeral_mb)
    cold = measured.cold_query(stored, work.memory_mb, work.ephemeral_mb)
    hit_rate = work.hit_rate if fits else 0.0
    per_query = _mixed_items(warm, cold, hit_rate, measured.answer_bytes, at, work.architecture)
    fixed = _storage_items(work, stored, at)
    per_month = work.queries_per_day * DAYS_PER_MONTH
    items = fixed | {name: usd * per_month for name, usd in per_query.items()}
    out = Usage(bytes_out=measured.answer_bytes).usd(at)
    cheaper = _break_even(work, stored, needed, sum(per_query.values()), sum(fixed.values()), at, measured)
    return Month(
        stored_bytes=stored,
        memory_bytes=needed,
        fits=fits,
        usd_items={name: usd for name, usd in items.items() if usd},
        usd_per_million_warm=MILLION * (warm.usd(at, work.architecture)),
        usd_per_million_cold=MILLION * (cold.usd(at, work.architecture)),
        container=container(work, needed, work.queries_per_day, at, measured, per_query_usd=out, fixed=fixed),
        cheaper_from=cheaper[0] if cheaper else None,
        cheaper_with_tasks=cheaper[1] if cheaper else None,
    )


def container(
    work: Workload,
    memory_bytes: float,
    queries_per_day: float,
    at: Prices,
    measured: Measured,
    *,
    per_query_usd: float = 0.0,
    fixed: dict[str, float] | None = None,
    n_tasks: int | None = None,
) -> Container:
    """The tasks that carry a load at its peak, at least work.min_tasks, each with the whole index in memory."""
    vcpu, memory_gb = _fargate_size(work.vcpu, memory_bytes)
    task_qps = vcpu * 1000 / (measured.warm_search_ms(work.n_tokens) + measured.overhead_ms) * measured.utilisation
    tasks = n_tasks or max(work.min_tasks, math.ceil(queries_per_day / 86_400 * work.peak / task_qps))
    carried = tasks * task_qps / work.peak * 86_400
    new_connections_s = min(queries_per_day, carried) / 86_400
    items = {
        "Fargate tasks": tasks * at.fargate_hour(vcpu, memory_gb, work.architecture) * HOURS_PER_MONTH,
        "load balancer": (at.alb_hour + max(new_connections_s / 25, 0.0) * at.lcu_hour) * HOURS_PER_MONTH,
        "S3 GET": queries_per_day * DAYS_PER_MONTH * at.s3_get,
        "data out": queries_per_day * DAYS_PER_MONTH * per_query_usd,
    }
    return Container(tasks, vcpu, memory_gb, carried, (fixed or {}) | items)


def _mixed_items(
    warm: Usage, cold: Usage, hit_rate: float, answer_bytes: float, at: Prices, architecture: Architecture
) -> dict[str, float]:
    """Dollars of an average query, by item."""
    parts = [warm.times(hit_rate).items(at, architecture), cold.times(1 - hit_rate).items(at, architecture)]
    parts.append(Usage(bytes_out=answer_bytes).items(at, architecture))
    return {name: sum(part.get(name, 0.0) for part in parts) for name in dict.fromkeys(name for part in parts for name in part)}


def _storage_items(work: Workload, stored_bytes: float, at: Prices) -> dict[str, float]:
    items = {"S3 storage": stored_bytes / GB * at.s3_gb_month}
    if work.adds_per_day:
        items["S3 PUT"] = 3 * work.adds_per_day * DAYS_PER_MONTH * at.s3_put
    return items


def _fargate_size(vcpu: float, memory_bytes: float) -> tuple[float, float]:
    """The least memory that holds the index, with more vCPUs where Fargate wants them."""
    for cpus, sizes in FARGATE_GB.items():
        for size in sizes:
            if cpus >= vcpu and size * 2**30 >= memory_bytes:
                return cpus, float(size)
    cpus = max(FARGATE_GB)
    return cpus, float(FARGATE_GB[cpus][-1])


def _break_even(
    work: Workload, stored_bytes: float, memory_bytes: float, usd_per_query: float, usd_fixed: float, at: Prices, measured: Measured
) -> tuple[float, int] | None:
    """(queries a day, tasks) from which the container costs less: functions cost by the query, tasks by the step."""
    out = Usage(bytes_out=measured.answer_bytes).usd(at)
    for n_tasks in range(work.min_tasks, 1000):
        idle = container(work, memory_bytes, 0.0, at, measured, n_tasks=n_tasks)
        full = container(work, memory_bytes, idle.max_queries_per_day, at, measured, per_query_usd=out, n_tasks=n_tasks)
        per_query = (full.usd - idle.usd) / (idle.max_queries_per_day * DAYS_PER_MONTH)
        if usd_per_query <= per_query:
            return None
        queries_per_day = idle.usd / (usd_per_query - per_query) / DAYS_PER_MONTH
        if queries_per_day <= idle.max_queries_per_day:
            return queries_per_day, n_tasks
    return None
