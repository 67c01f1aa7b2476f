"""A soak from start to end: stage, load, samples, audit, report."""

from __future__ import annotations

import argparse
import asyncio
import json
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from soak.load import Done, Load
from soak.pauses import Pauses
from soak.plot import draw
from soak.report import Report, calls_of, fit, judge, measured, quarters_of, table
from soak.samples import Sampler
from soak.stage import MEMORY_BYTES, Hurry, Kind, Stage, staged

WARM_UP_SHARE, MAX_WARM_UP_S = 0.25, 600.0


@dataclass
class Outcome:
    """A report and what it was made of."""

    report: Report
    rows: list[dict[str, float]]
    done: list[Done]
    began_s: float


async def soak(stage: Stage, seconds: float, *, per_s: float, n_documents: int, seed: int) -> Outcome:
    load, sampler, pauses = Load([replica.url for replica in stage.replicas], n_documents, seed=seed), Sampler(stage), Pauses()
    await load.prepare()
    began_s = time.monotonic()
    watching = [asyncio.create_task(sampler.run()), asyncio.create_task(pauses.watch())]
    try:
        await load.run(seconds, per_s)
        ended_s = time.monotonic()
    finally:
        await asyncio.sleep(0.3)  # a pause just before the end is noticed
        ended = [task for task in watching if task.done()]
        for task in watching:
            task.cancel()
        await asyncio.gather(*watching, return_exceptions=True)
        load.model.wrong += [f"a watcher ended: {task.exception()!r}" for task in ended]
    await load.audit()
    load.close()
    for replica in stage.replicas:
        if replica.process.poll() is not None:
            load.model.complain(f"{replica.name} ended by itself")
        if '"level":"error"' in replica.log or "Traceback" in replica.log:
            load.model.complain(f"the log of {replica.name} has errors: {replica.log[-1000:]}")
    return _outcome(load, sampler.rows, pauses, began_s, ended_s)


def _outcome(load: Load, rows: list[dict[str, float]], pauses: Pauses, began_s: float, ended_s: float) -> Outcome:
    warm_up_s = min(WARM_UP_SHARE * (ended_s - began_s), MAX_WARM_UP_S)
    done = [call for call in load.done if not pauses.touch(call.began_s, call.ended_s)]
    rows = [row for row in rows if not pauses.touch(row["t_s"], row["t_s"])]
    looked = load.recalled + load.missed
    report = Report(
        settings={},
        seconds=ended_s - began_s,
        paused_s=pauses.total_s,
        warm_up_s=warm_up_s,
        calls=calls_of(load.done),
        errors=[f"{call.kind} at {call.began_s - began_s:.1f} s: {call.problem}" for call in done if call.problem],
        errors_in_pauses=sum(bool(call.problem) for call in load.done) - sum(bool(call.problem) for call in done),
        wrong=load.model.wrong,
        recall=load.recalled / looked if looked else 1.0,
        quarters=quarters_of(measured(done, began_s + warm_up_s, ended_s)),
    )
    fit(report, [row for row in rows if began_s + warm_up_s <= row["t_s"] <= ended_s])
    judge(report)
    return Outcome(report, rows, done, began_s)


def hurry_for(seconds: float) -> Hurry:
    """A grace that passes ten times in a run, so that what is collected can be seen to keep pace, and that is no shorter than a busy machine's writes take."""
    grace_s = min(400.0, max(20.0, seconds / 10))
    return Hurry(grace_s=grace_s, sweep_s=grace_s / 6, interval_s=grace_s / 20)


def run(kind: Kind, seconds: float, folder: Path, *, per_s: float, n_documents: int, seed: int = 1) -> Outcome:
    hurry = hurry_for(seconds)
    with staged(kind, folder, hurry=hurry, memory_bytes=MEMORY_BYTES) as stage:
        outcome = asyncio.run(soak(stage, seconds, per_s=per_s, n_documents=n_documents, seed=seed))
    outcome.report.settings = {"store": kind, "per_s": per_s, "documents": n_documents, "seed": seed, **hurry.__dict__}
    return outcome


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m soak", description="mixed load on two replicas: nothing wrong, nothing grows")
    parser.add_argument("--store", choices=("directory", "s3"), default="s3")
    parser.add_argument("--seconds", type=float, default=3600.0)
    parser.add_argument("--per-s", type=float, default=12.0, help="calls a second")
    parser.add_argument("--documents", type=int, default=1500, help="kept in the index")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", type=Path, help="report and samples go there")
    parser.add_argument("--plot", type=Path, help="a picture (.png, .svg); needs matplotlib")
    args = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="tartan-soak-") as folder:
        outcome = run(args.store, args.seconds, Path(folder), per_s=args.per_s, n_documents=args.documents, seed=args.seed)
    print(table(outcome.report))
    if args.json:
        samples = [{**row, "t_s": row["t_s"] - outcome.began_s} for row in outcome.rows]
        args.json.write_text(json.dumps({**outcome.report.document(), "samples": samples}))
    if args.plot and not draw(args.plot, outcome.report, outcome.rows, outcome.done, outcome.began_s):
        print("no plot: matplotlib is not installed")
    return 1 if outcome.report.failures else 0
