"""What a hundred million documents would take, from what a run of benchmarks/scale.py has measured: arithmetic, and a manifest of so many segments.

    python -m benchmarks.outlook --work DIR [--documents 100000000] [--json FILE]

Measured here: bytes and milliseconds of a manifest with as many segments (copies of the run's own references under fresh ids), and the plan of a fan-out over it.
Everything else is multiplied from the run's figures (tasks, bytes, cold reads of a segment) and priced by engine/cost.py. Nothing was run on AWS.
"""

from __future__ import annotations

import argparse
import json
import math
import resource
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from rich.console import Console

from benchmarks.scale import INDEX, Bench, Figures
from benchmarks.scale import summary as summary_of
from engine.config import MaintenanceParams, SearchParams
from engine.cost import Usage, prices
from engine.fanout import messages
from engine.fanout.plan import make_plan
from engine.format import names
from engine.format.manifest import Manifest, decode_manifest, encode_manifest
from engine.index.plan import next_step
from engine.index.reader import Reader, Snapshot
from engine.store.objects import open_store
from handler.fanout import StateMachine

MAP_CONCURRENCY = 200
"""Of the distributed Map in infra/build.asl.json."""
BUILD_MB, VCPU_MB = 4096, 1769
"""Memory of a build task in template.yaml, and what one vCPU comes with."""
SHARD_MB, SHARD_BYTES = 3008, 256 << 20
STEPS_PER_INPUT = 5
"""State transitions of one input: its execution, Input, IsDone, Done, and the Map's item."""
FIRST_BYTE_S, STORE_BYTES_PER_S = 0.063, 80e6
"""Of S3, as docs/sizing.md has them."""


def widened(manifest: Manifest, n_segments: int) -> Manifest:
    """The manifest of an index of n_segments segments like these, with ids that go on."""
    segments, base = [], 0
    for number in range(n_segments):
        segment = manifest.segments[number % len(manifest.segments)]
        span = segment.last_id - segment.base + 1
        segments.append(msgspec.structs.replace(segment.rebased(base), id=names.fresh_id()))
        base += span
    return msgspec.structs.replace(manifest, segments=tuple(segments), next_id=base)


def timed_ms(work: Callable[[], Any], times: int = 5) -> float:
    """Median CPU milliseconds."""
    spent = []
    for _ in range(times):
        began = time.process_time()
        work()
        spent.append(1000 * (time.process_time() - began))
    return round(statistics.median(spent), 1)


def resident_mib() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 2**20


def manifest_line(manifest: Manifest, n_segments: int) -> Figures:
    """What a manifest of so many segments weighs, and what whoever reads, plans and fans out spends on it."""
    wide = widened(manifest, n_segments)
    data = encode_manifest(wide)
    before = resident_mib()
    kept = [decode_manifest(data, name="CURRENT") for _ in range(5)]
    held = (resident_mib() - before) / len(kept)
    shards = fan_out_plan(wide)
    return {
        "segments": n_segments,
        "current_bytes": len(data),
        "bytes_per_segment": round(len(data) / n_segments),
        "encode_ms": timed_ms(lambda: encode_manifest(wide)),
        "decode_ms": timed_ms(lambda: decode_manifest(data, name="CURRENT")),
        "decoded_mib": round(held, 1),
        "next_step_ms": timed_ms(lambda: next_step(wide, MaintenanceParams())),
        **shards,
    }


def fan_out_plan(wide: Manifest) -> Figures:
    """The plan of one search through the state machine: 16 query tokens, k = 100."""
    snapshot = Snapshot(Reader(open_store("memory://")), INDEX, wide)
    query = np.random.default_rng(0).standard_normal((16, wide.dim or 1)).astype(np.float32)
    plan = make_plan(snapshot, query, SearchParams(k=100), StateMachine("", SHARD_BYTES))
    return {
        "plan_bytes": len(messages.encode(plan)),
        "shards": len(plan.shards),
        "segments_per_shard": max(len(shard.segments) for shard in plan.shards),
    }


def building(figures: Figures, documents: int) -> Figures:
    """Tasks, time and dollars of the build machine. A task has the threads of its vCPUs, but one core's rate is taken: encoding alone uses them."""
    steps, share = figures["steps"], figures["steps"]["shards"]
    n_inputs = math.ceil(documents / (figures["documents"] / share["tasks"]))
    task_s = share["cpu_s"] / share["tasks"] - share["median_stages_s"]["generate"]  # an input is read instead
    read_s = share["n_tokens"] / share["tasks"] * 256 / STORE_BYTES_PER_S
    waves = math.ceil(n_inputs / MAP_CONCURRENCY)
    prepare_s, finish_s = steps["prepare"]["cpu_s"] + SAMPLED_READ_S, finishing_s(n_inputs)
    usage = Usage(
        n_gets=n_inputs * 8,
        n_puts=n_inputs * 4,
        seconds=n_inputs * (task_s + read_s),
        memory_mb=BUILD_MB,
        invocations=n_inputs,
        standard_steps=STEPS_PER_INPUT * n_inputs,
    )
    return {
        "inputs": n_inputs,
        "objects": n_inputs * 2 + 3,
        "stored_gb": round(steps["finish"]["stored_bytes"] / figures["documents"] * documents / 1e9, 1),
        "task_cpu_s": round(task_s, 1),
        "task_read_s": round(read_s, 1),
        "task_peak_mib": round(share["peak_mib"]),
        "waves": waves,
        "map_s": round(waves * (task_s + read_s)),
        "prepare_s": round(prepare_s),
        "finish_s": round(finish_s),
        "usd": {name: round(usd, 2) for name, usd in usage.items(prices("us-east-1")).items()},
        "usd_together": round(usage.usd(prices("us-east-1")), 2),
    }


SAMPLED_READ_S = 30.0
"""Eight inputs are opened, and read whole: 8 x 256 MB at the store's rate, and unpacked."""


def finishing_s(n_inputs: int) -> float:
    """Two records an input, 32 at a time (engine/index/joint.py)."""
    return 2 * n_inputs / 32 * FIRST_BYTE_S


def searching(figures: Figures, line: Figures) -> Figures:
    """One search that reads cold, by one process and through the state machine; and what peers would hold."""
    cold, n_now = figures["steps"]["cold"]["k=100"], figures["steps"]["finish"]["segments"]
    n, shards = line["segments"], line["shards"]
    gets, cpu_s, megabytes = ((cold[name] - own) / n_now for name, own in (("gets", 1), ("cpu_ms", 0), ("mb", 0)))
    cpu_s = cpu_s / 1000
    each = line["segments_per_shard"]
    shard_s = each * cpu_s + each * gets / 256 * FIRST_BYTE_S + each * megabytes * 1e6 / (8 * STORE_BYTES_PER_S)
    usage = Usage(
        n_gets=n * gets + shards,
        seconds=shards * shard_s,
        memory_mb=SHARD_MB,
        invocations=shards + 1,
        http_requests=1,
        express_executions=1,
        express_gb_s=0.0625 * shard_s,
    )
    return {
        "gets": round(n * gets),
        "gb": round(n * megabytes / 1000, 1),
        "cpu_s": round(n * cpu_s, 1),
        "shard_gets": round(each * gets),
        "shard_mib": round(each * statistics.mean(figures["steps"]["finish"]["segment_bytes"]) / 2**20),
        "shard_s": round(shard_s, 1),
        "usd": {name: round(usd, 5) for name, usd in usage.items(prices("us-east-1")).items()},
        "usd_together": round(usage.usd(prices("us-east-1")), 4),
    }


def outlook(bench: Bench, documents: int) -> Figures:
    figures = summary_of(bench)
    path = bench.work / "store" / INDEX / "CURRENT"
    manifest = decode_manifest(path.read_bytes(), name="CURRENT")
    per_segment = figures["documents"] / figures["steps"]["finish"]["segments"]
    wanted = math.ceil(documents / per_segment)
    sizes = sorted({len(manifest.segments), 160, wanted, 4 * wanted})
    lines = [manifest_line(manifest, n) for n in sizes]
    line = next(line for line in lines if line["segments"] == wanted)
    return {"manifests": lines, "build": building(figures, documents), "search": searching(figures, line)}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.outlook", description="what more documents would take")
    parser.add_argument("--work", type=Path, required=True, help="of a finished run of benchmarks.scale")
    parser.add_argument("--documents", type=int, default=100_000_000)
    parser.add_argument("--json", type=Path)
    a = parser.parse_args(arguments)
    mark = json.loads((a.work / "scale.json").read_text())
    found = outlook(Bench(a.work, mark["documents"], mark["nbits"], mark["queries"]), a.documents)
    Console().print(found)
    if a.json:
        a.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
