"""A soak as a picture; needs matplotlib."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from soak.load import Done
from soak.report import Report

PANELS = (
    ("resident memory, MiB", ("rss_mib", "anon_mib", "maintenance_rss_mib")),
    ("files and threads", ("fds", "threads")),
    ("caches, MiB", ("memory_cache_mib", "disk_cache_mib")),
    ("objects in the store", ("store_objects", "store_manifests")),
)
_BIN_S = 20.0


def draw(path: Path, report: Report, rows: Sequence[dict[str, float]], done: Sequence[Done], began_s: float) -> bool:
    """Write the picture; False if there is no matplotlib."""
    try:
        import matplotlib
    except ImportError:
        return False
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(len(PANELS) + 1, 1, figsize=(8, 10), sharex=True, layout="constrained")
    for axis, (title, names) in zip(axes, PANELS, strict=False):
        for full in sorted({name for row in rows for name in row if name.partition(".")[0] in names}):
            some = [((row["t_s"] - began_s) / 60, row[full]) for row in rows if full in row]
            axis.plot(*zip(*some, strict=True), linewidth=0.8, label=full)
        axis.set_ylabel(title, fontsize=8)
        axis.set_ylim(bottom=0)
    _draw_latencies(axes[-1], done, began_s)
    for axis in axes:
        axis.axvspan(0, report.warm_up_s / 60, color="0.92")
        axis.tick_params(labelsize=8)
        axis.legend(fontsize=6, loc="lower right", ncols=4)
    axes[-1].set_xlabel("minutes (grey: warm-up)", fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=80)
    plt.close(figure)
    return True


def _draw_latencies(axis: Any, done: Sequence[Done], began_s: float) -> None:
    searches = [call for call in done if call.kind.startswith(("search", "filtered", "hybrid")) and not call.problem]
    if not searches:
        return
    minutes = np.array([call.began_s - began_s for call in searches])
    took_ms = np.array([(call.ended_s - call.began_s) * 1000 for call in searches])
    bins = (minutes // _BIN_S).astype(int)
    for p in (50, 95):
        points = [((n + 0.5) * _BIN_S / 60, np.percentile(took_ms[bins == n], p)) for n in np.unique(bins)]
        axis.plot(*zip(*points, strict=True), linewidth=0.8, label=f"p{p} of searches")
    axis.set_ylabel("latency, ms", fontsize=8)
    axis.set_ylim(bottom=0)
