"""The simulation in small: some thousands of steps are clean, a seed repeats itself, and planted mistakes are caught. `make simulate` is the long run."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from simulation.mutations import MUTATIONS, planted, try_mutation
from simulation.runner import run_episode, settings_of, shrink, simulate

ROOT = Path(__file__).resolve().parent.parent
QUICKLY_CAUGHT = (
    "the replaced generation is not archived",
    "CURRENT is written before the uploads",
    "CURRENT is replaced whatever it holds",
    "a retry does not apply the change again",
    "a group loses its fourth call",
    "new tombstones forget the old",
    "next_id falls on a rollback",
)


@pytest.mark.parametrize("seed", range(4))
def test_no_promise_is_broken_in_some_thousand_steps(seed: int) -> None:
    outcome = simulate(seed, 5_000)
    assert outcome.violation is None, f"{outcome.violation}; {outcome.settings}"
    assert outcome.steps >= 5_000
    assert outcome.counts["generations"] > 50


def test_the_same_seed_gives_the_same_trace_in_other_processes() -> None:
    """Also under another hash seed: nothing hangs on the order of a set."""
    hashes = set()
    for hash_seed in ("1", "2"):
        environment = {**os.environ, "PYTHONHASHSEED": hash_seed}
        command = [sys.executable, "-m", "tests.simulation", "--seed", "5", "--steps", "1500"]
        run = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
        assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
        hashes.add(run.stdout)
    assert len(hashes) == 1


def test_listings_that_lag_hurt_nothing_but_what_lists() -> None:
    """S3's listings do not lag. If they did, documents would be safe: commits, reads, compaction, rollback and pins list nothing that matters to them."""
    for seed in range(2):
        settings = settings_of(seed, 0, 2_500)
        lists = ("sweep", "collect", "drop", "remake", "part", "chain", "branch", "build", "resume")
        outcome = run_episode(replace(settings, lag_s=60.0, weights={**settings.weights, **dict.fromkeys(lists, 0.0)}))
        assert outcome.violation is None, f"{outcome.violation}; {outcome.settings}"


@pytest.mark.parametrize("name", QUICKLY_CAUGHT)
def test_a_planted_mistake_is_caught(name: str) -> None:
    [mutation] = [mutation for mutation in MUTATIONS if mutation.name == name]
    assert try_mutation(mutation, 4_000, 1).caught


def test_every_planted_mistake_still_finds_the_text_it_changes() -> None:
    for mutation in MUTATIONS:
        with planted(mutation):
            pass


def test_a_failing_trace_is_made_smaller() -> None:
    [mutation] = [mutation for mutation in MUTATIONS if mutation.name == "new tombstones forget the old"]
    with planted(mutation):
        whole = simulate(1, 10_000, episode_steps=1_000)
        assert whole.violation is not None
        assert whole.settings is not None
        small = shrink(whole.settings, whole.violation, max_runs=12)
    assert small.violation is not None
    assert small.violation.kind == whole.violation.kind
    assert small.steps <= 1_000
