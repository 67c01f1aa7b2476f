"""The engine that is always there: hypothesis draws numbers, each stands for a mutation of a seed; and plain bytes, and text."""

from __future__ import annotations

import time
from collections.abc import Callable

from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

from .target import Target, judge

BATCH = 400
Tried = Callable[[bytes, bool], None]


def inputs(target: Target) -> st.SearchStrategy[bytes]:
    """What is tried: mostly mutations."""
    variants = st.integers(0, 2**48).map(target.variant)
    return st.one_of(variants, variants, variants, variants, st.binary(max_size=300), st.text(max_size=60).map(lambda text: text.encode()))


def run_batch(target: Target, number: int, n_inputs: int, tried: Tried) -> None:
    """n_inputs inputs, the same for the same number. Raises what the first finding raised, with hypothesis's note of the input."""

    @seed(number)
    @settings(max_examples=n_inputs, deadline=None, database=None, suppress_health_check=list(HealthCheck), report_multiple_bugs=False)
    @given(inputs(target))
    def one(data: bytes) -> None:
        tried(data, judge(target, data))

    one()


def run(target: Target, seconds: float, first_seed: int, tried: Tried) -> None:
    """Seeds, then batches until so much processor time is used."""
    for data in target.seeds:
        tried(data, judge(target, data))
    deadline, number = time.process_time() + seconds, first_seed
    while time.process_time() < deadline:
        run_batch(target, number, BATCH, tried)
        number += 1
