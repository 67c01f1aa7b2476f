"""What the time of a refusal tells about a key: nothing that this can measure.

    python -m benchmarks.key_timing [--rounds 20000] [--records 16] [--json FILE]

Keys take turns in random order: unknown ones, ones that share all but the last character with the first and with the last record, and the known
keys themselves. Of each kind the median of the gate's time, the 95 % interval of the median (bootstrap), and its difference to unknown keys.
A comparison that ended at the first difference would show in `nearly the first`; a search that ended at the match, in `the first` against `the last`.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from handler.auth import Gate, mint_key
from handler.problems import Problem

N_BOOTSTRAP = 400


def keys_of(n_records: int) -> tuple[Gate, dict[str, Callable[[], str]]]:
    """A gate, and for each kind of key what makes one of it."""
    minted = [mint_key(["search"]) for _ in range(n_records)]
    first, last = minted[0][0], minted[-1][0]

    def nearly(key: str) -> str:
        return key[:-1] + ("A" if key[-1] != "A" else "B")

    makers: dict[str, Callable[[], str]] = {
        "unknown": lambda: mint_key(["search"])[0],
        "nearly the first": lambda: nearly(first),
        "nearly the last": lambda: nearly(last),
        "the first": lambda: "".join(first),
        "the last": lambda: "".join(last),
    }
    return Gate([record for _, record in minted], frozenset()), makers


def measure(gate: Gate, makers: Mapping[str, Callable[[], str]], rounds: int, seed: int) -> dict[str, np.ndarray]:
    """Nanoseconds of each kind, `rounds` of them, in an order that changes with every round."""
    order = random.Random(seed)
    kinds = list(makers)
    ready = {kind: [make() for _ in range(rounds)] for kind, make in makers.items()}  # all made before: making one leaves its marks in the caches
    took: dict[str, list[int]] = {kind: [] for kind in kinds}
    for number in range(rounds):
        order.shuffle(kinds)
        for kind in kinds:
            headers = {"authorization": f"Bearer {ready[kind][number]}"}
            began = time.perf_counter_ns()
            try:
                gate.caller(headers)
            except Problem:
                pass
            took[kind].append(time.perf_counter_ns() - began)
    return {kind: np.array(values) for kind, values in took.items()}


def report(took: Mapping[str, np.ndarray], seed: int) -> list[dict[str, object]]:
    """Median, its interval and the difference to `unknown`, in microseconds."""
    rng = np.random.default_rng(seed)
    lines: list[dict[str, object]] = []
    for kind, values in took.items():
        medians = [float(np.median(rng.choice(values, len(values)))) for _ in range(N_BOOTSTRAP)]
        low, high = np.percentile(medians, [2.5, 97.5])
        lines.append(
            {
                "key": kind,
                "median_us": round(float(np.median(values)) / 1000, 3),
                "interval_us": [round(low / 1000, 3), round(high / 1000, 3)],
                "against_unknown_us": round(float(np.median(values) - np.median(took["unknown"])) / 1000, 3),
            }
        )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20_000)
    parser.add_argument("--records", type=int, default=16)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    gate, makers = keys_of(arguments.records)
    measure(gate, makers, 500, arguments.seed)  # warms up
    lines = report(measure(gate, makers, arguments.rounds, arguments.seed), arguments.seed)
    print(f"{'key':18}{'median µs':>11}{'95 % interval':>20}{'against unknown':>18}")
    for line in lines:
        low, high = line["interval_us"]  # type: ignore[misc]
        print(f"{line['key']:18}{line['median_us']:11.3f}{f'{low:.3f} to {high:.3f}':>20}{line['against_unknown_us']:18.3f}")
    if arguments.json:
        arguments.json.write_text(json.dumps({"records": arguments.records, "rounds": arguments.rounds, "lines": lines}, indent=1) + "\n")


if __name__ == "__main__":
    main()
