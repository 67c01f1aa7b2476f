"""What a soak found: slopes after the warm-up, first quarter against last, and a verdict by thresholds.

The slope of a noisy, slowly wandering figure is fitted to means over BLOCKS equal spans of time, because samples a second apart say nearly
the same twice; its confidence interval is that of a least-squares line through those means (Student's t).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from scipy import stats

from soak.load import Done

BLOCKS = 24
MAX_GROWTH_MIB = 16.0
"""Of memory that is certain to be growth (lower end of the 95 % interval, times the hours measured): an hour's leak of 5 KiB a second."""
MAX_FILLING_MIB, FILLING_H = 64.0, 0.1
"""What is allowed where less than six minutes were measured: caches, and what is kept of their content, are still filling."""
MAX_GROWTH_FDS = 8.0
MAX_P50_RATIO, MAX_P95_RATIO = 1.5, 2.0
"""Last quarter against first, all searches together. A machine with other work on it varies by less."""
MAX_STORE_RATIO = 1.5
"""Objects in the store, last quarter against the second: what is collected keeps pace with what is written."""
MIN_RECALL = 0.995
MIN_CALLS = 100
"""In each quarter, for a ratio to mean anything."""


@dataclass(frozen=True)
class Slope:
    """Per hour, with the 95 % interval, and over how many hours it was measured."""

    per_hour: float
    low: float
    high: float
    hours: float

    @property
    def sure_growth(self) -> float:
        return max(0.0, self.low * self.hours)

    def __str__(self) -> str:
        return f"{self.per_hour:+.2f} ({self.low:+.2f} to {self.high:+.2f})"


def slope(times_s: Sequence[float], values: Sequence[float]) -> Slope:
    """Needs at least three blocks with samples."""
    t, y = np.asarray(times_s, float), np.asarray(values, float)
    n_blocks = min(BLOCKS, len(t) // 2)
    blocks = np.minimum(((t - t[0]) / (t[-1] - t[0]) * n_blocks).astype(int), n_blocks - 1)
    filled = np.unique(blocks)
    hours = np.array([t[blocks == n].mean() for n in filled]) / 3600
    means = np.array([y[blocks == n].mean() for n in filled])
    line = stats.linregress(hours, means)
    half = float(stats.t.ppf(0.975, len(filled) - 2) * line.stderr) if np.ptp(means) else 0.0
    return Slope(float(line.slope), float(line.slope) - half, float(line.slope) + half, float((t[-1] - t[0]) / 3600))


@dataclass
class Report:
    """A run's facts. `failures` is empty if it passed."""

    settings: dict[str, Any]
    seconds: float
    paused_s: float
    warm_up_s: float
    calls: dict[str, int]
    errors: list[str]
    errors_in_pauses: int
    wrong: list[str]
    recall: float
    slopes: dict[str, Slope] = field(default_factory=dict)
    quarters: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    """Latencies by kind of call: p50 and p95, ms, of each quarter; and how many calls."""
    levels: dict[str, list[float]] = field(default_factory=dict)
    """Means of each quarter."""
    failures: list[str] = field(default_factory=list)

    def document(self) -> dict[str, Any]:
        slopes = {
            name: {"per_hour": one.per_hour, "low": one.low, "high": one.high, "hours": one.hours} for name, one in self.slopes.items()
        }
        return {**self.__dict__, "slopes": slopes}


def measured(done: Iterable[Done], began_s: float, ended_s: float) -> dict[str, list[list[float]]]:
    """Milliseconds of the calls that succeeded, by kind and quarter of the span. "all searches" are those with vectors."""
    found: dict[str, list[list[float]]] = {}
    for call in done:
        quarter = int((call.began_s - began_s) / (ended_s - began_s) * 4)
        if call.problem or call.began_s < began_s or quarter > 3:
            continue
        names = [call.kind]
        if call.kind.startswith(("search", "filtered", "hybrid")):
            names.append("all searches")
        for name in names:
            found.setdefault(name, [[], [], [], []])[quarter].append((call.ended_s - call.began_s) * 1000)
    return found


def quarters_of(found: dict[str, list[list[float]]]) -> dict[str, dict[str, list[float]]]:
    return {
        kind: {
            "n": [len(quarter) for quarter in quarters],
            **{f"p{p}": [float(np.percentile(quarter, p)) if quarter else float("nan") for quarter in quarters] for p in (50, 95)},
        }
        for kind, quarters in sorted(found.items())
    }


def fit(report: Report, rows: Sequence[dict[str, float]]) -> None:
    """Slopes and levels of everything that was sampled, out of the rows after the warm-up."""
    for name in sorted({name for row in rows for name in row} - {"t_s"}):
        some = [(row["t_s"], row[name]) for row in rows if name in row]
        if len(some) < 12:
            continue
        times_s, values = zip(*some, strict=True)
        report.slopes[name] = slope(times_s, values)
        edges = np.linspace(times_s[0], times_s[-1], 5)
        of = np.clip(np.searchsorted(edges, times_s, side="right") - 1, 0, 3)
        report.levels[name] = [float(np.mean(np.asarray(values)[of == n])) if (of == n).any() else float("nan") for n in range(4)]


def judge(report: Report) -> None:
    """Fill in the failures."""
    failures = [f"wrong: {text}" for text in report.wrong] + [f"error: {text}" for text in report.errors]
    if report.recall < MIN_RECALL:
        failures.append(f"recall of known documents is {report.recall:.4f}, at least {MIN_RECALL} wanted")
    for name, one in report.slopes.items():
        if name.startswith(("rss_mib", "anon_mib")) and one.sure_growth > (MAX_GROWTH_MIB if one.hours >= FILLING_H else MAX_FILLING_MIB):
            failures.append(f"{name} grew by {one} MiB an hour, for {one.hours:.2f} hours")
        if name.startswith(("fds", "threads")) and one.sure_growth > MAX_GROWTH_FDS:
            failures.append(f"{name} grew by {one} an hour, for {one.hours:.2f} hours")
    found = report.quarters.get("all searches")
    if found is not None and min(found["n"]) >= MIN_CALLS:
        for name, most in (("p50", MAX_P50_RATIO), ("p95", MAX_P95_RATIO)):
            if found[name][3] > most * found[name][0]:
                failures.append(f"{name} of searches went from {found[name][0]:.1f} to {found[name][3]:.1f} ms")
    objects = report.levels.get("store_objects")
    if objects is not None and objects[3] > MAX_STORE_RATIO * objects[1]:
        failures.append(f"objects in the store went from {objects[1]:.0f} to {objects[3]:.0f}")
    report.failures = failures


def table(report: Report) -> str:
    """For people."""
    lines = [
        f"{sum(report.calls.values()):,} calls in {report.seconds:.0f} s, of which it stood still for {report.paused_s:.0f} s; "
        f"the first {report.warm_up_s:.0f} s are warm-up",
        f"errors {len(report.errors)} ({report.errors_in_pauses} more where it stood still), wrong answers {len(report.wrong)}, "
        f"recall of known documents {report.recall:.4f}",
        "",
        f"{'':24s} {'first quarter':>14s} {'last quarter':>14s}   slope an hour (95 %)",
    ]
    for name, levels in report.levels.items():
        if not name.startswith("maintenance_"):
            lines.append(f"{name:24s} {levels[0]:14.1f} {levels[3]:14.1f}   {report.slopes[name]}")
    lines += ["", f"{'latency, ms':24s} {'calls':>7s} {'p50 first':>10s} {'last':>7s} {'p95 first':>10s} {'last':>7s}"]
    for kind, found in report.quarters.items():
        p50, p95 = found["p50"], found["p95"]
        lines.append(f"{kind:24s} {sum(found['n']):7.0f} {p50[0]:10.1f} {p50[3]:7.1f} {p95[0]:10.1f} {p95[3]:7.1f}")
    lines += ["", *(f"FAILED {text}" for text in report.failures[:20])] if report.failures else ["", "passed"]
    return "\n".join(lines)


def calls_of(done: Iterable[Done]) -> dict[str, int]:
    return dict(sorted(Counter(call.kind for call in done).items()))
