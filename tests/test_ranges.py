"""Which wanted ranges become which GETs: properties over random ranges and policies, and the examples behind the defaults."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.errors import InvalidRequest
from engine.store.base import Range
from engine.store.ranges import KIB, MIB, ReadPlan, ReadPolicy, plan_reads

OBJECT = np.random.default_rng(20261123).integers(0, 256, 4096, dtype=np.uint8).tobytes()
settings.register_profile("tartan", deadline=None, derandomize=True)
settings.load_profile("tartan")

one_range = st.tuples(st.integers(0, len(OBJECT)), st.integers(0, 400)).map(lambda pair: (pair[0], min(sum(pair), len(OBJECT))))
some_ranges = st.lists(one_range, max_size=30)
policies = st.builds(
    ReadPolicy,
    max_gap_bytes=st.integers(0, 300),
    request_cost_bytes=st.integers(0, 300),
    max_get_bytes=st.integers(1, 600),
    max_gets=st.none() | st.integers(1, 8),
)


def answers(plan: ReadPlan) -> list[bytes]:
    return [OBJECT[start:end] for start, end in plan.gets]


@given(some_ranges, policies)
def test_slices_of_the_answers_are_exactly_what_was_wanted(wanted: list[Range], policy: ReadPolicy) -> None:
    plan = plan_reads(wanted, policy)
    assert [bytes(data) for data in plan.slice(answers(plan))] == [OBJECT[start:end] for start, end in wanted]


@given(some_ranges, policies)
def test_gets_ascend_without_overlap_and_none_is_empty(wanted: list[Range], policy: ReadPolicy) -> None:
    gets = plan_reads(wanted, policy).gets
    assert all(start < end for start, end in gets)
    assert all(before[1] <= after[0] for before, after in pairwise(gets))


@given(some_ranges, policies)
def test_gets_begin_and_end_at_wanted_bytes_and_read_through_no_gap_that_costs_more_than_a_get(
    wanted: list[Range], policy: ReadPolicy
) -> None:
    if policy.max_gets is not None:
        return
    is_wanted = np.zeros(len(OBJECT) + 2, dtype=bool)
    for start, end in wanted:
        is_wanted[start + 1 : end + 1] = True
    limit = min(policy.max_gap_bytes, policy.request_cost_bytes)
    for start, end in plan_reads(wanted, policy).gets:
        inside = is_wanted[start + 1 : end + 1]
        assert inside[0]
        assert inside[-1]
        edges = np.flatnonzero(np.diff(inside.astype(np.int8)))
        assert all(end_of_gap - gap <= limit for gap, end_of_gap in zip(edges[::2], edges[1::2], strict=True))


@given(some_ranges, policies)
def test_the_limits_of_the_policy_hold(wanted: list[Range], policy: ReadPolicy) -> None:
    gets = plan_reads(wanted, policy).gets
    if policy.max_gets is not None:
        assert len(gets) <= policy.max_gets
    else:
        assert all(end - start <= policy.max_get_bytes for start, end in gets)


@given(some_ranges)
def test_without_gaps_to_read_through_no_unwanted_byte_is_fetched(wanted: list[Range]) -> None:
    plan = plan_reads(wanted, ReadPolicy(max_gap_bytes=0))
    assert plan.n_bytes == len({at for start, end in wanted for at in range(start, end)})


def test_a_gap_is_read_through_when_it_costs_no_more_than_a_get() -> None:
    policy = ReadPolicy(request_cost_bytes=100, max_gap_bytes=1000)
    assert plan_reads([(0, 10), (110, 120), (221, 230)], policy).gets == ((0, 120), (221, 230))


def test_a_dear_request_still_reads_through_no_gap_above_the_maximum() -> None:
    policy = ReadPolicy(request_cost_bytes=10 * MIB, max_gap_bytes=100)
    assert plan_reads([(0, 10), (111, 120)], policy).gets == ((0, 10), (111, 120))


def test_a_long_read_is_cut_between_wanted_ranges_where_it_can_be() -> None:
    wanted = [(at * 300, at * 300 + 300) for at in range(5)]
    plan = plan_reads(wanted, ReadPolicy(max_get_bytes=1000))
    assert plan.gets == ((0, 900), (900, 1500))


def test_one_range_longer_than_a_get_becomes_equal_parts() -> None:
    plan = plan_reads([(100, 100 + 20 * MIB)])
    assert len(plan.gets) == 3
    sizes = [end - start for start, end in plan.gets]
    assert max(sizes) - min(sizes) <= 2


def test_a_maximum_of_gets_closes_the_smallest_gaps_first() -> None:
    wanted = [(0, 10), (1000, 1010), (1100, 1110), (3000, 3010)]
    assert plan_reads(wanted, ReadPolicy(request_cost_bytes=0, max_gets=3)).gets == ((0, 10), (1000, 1110), (3000, 3010))


def test_default_policy_fetches_far_records_apart_and_near_ones_together() -> None:
    plan = plan_reads([(0, 20 * KIB), (220 * KIB, 240 * KIB), (2 * MIB, 2 * MIB + 20 * KIB)])
    assert plan.gets == ((0, 240 * KIB), (2 * MIB, 2 * MIB + 20 * KIB))


def test_nothing_wanted_is_no_get() -> None:
    plan = plan_reads([(5, 5)])
    assert plan.gets == ()
    assert plan.slice([]) == [b""]


def test_slices_copy_nothing_when_a_get_holds_them_whole() -> None:
    plan = plan_reads([(0, 100), (100, 200)])
    answer = OBJECT[:200]
    assert [memoryview(data).obj is answer for data in plan.slice([answer])] == [True, True]


@pytest.mark.parametrize("wanted", [(-1, 3), (4, 3)])
def test_an_impossible_range_is_refused(wanted: Range) -> None:
    with pytest.raises(InvalidRequest):
        plan_reads([wanted])


@given(some_ranges, st.integers(0, 300))
def test_a_plan_has_no_more_requests_than_ranges_and_costs_no_more_than_the_naive_ones(
    wanted: list[Range], request_cost_bytes: int
) -> None:
    """Naive: a GET for each range, or one from the first byte to the last."""
    policy = ReadPolicy(max_gap_bytes=len(OBJECT), request_cost_bytes=request_cost_bytes, max_get_bytes=2 * len(OBJECT))
    asked = [(start, end) for start, end in wanted if start < end]
    plan = plan_reads(wanted, policy)
    assert len(plan.gets) <= len(asked)
    if asked:
        span = (min(start for start, _ in asked), max(end for _, end in asked))
        assert policy.cost_bytes(plan.gets) <= min(policy.cost_bytes(asked), policy.cost_bytes([span]))


def test_the_price_of_memory_decides_how_large_a_gap_is_read_through() -> None:
    """At 2 GB on arm64 a GET costs 15 ms, in which a connection brings 1.2 MB; with more memory waiting is dearer, so gaps are smaller."""
    small, large = (ReadPolicy.priced(usd_per_get=0.4e-6, usd_per_s=gb * 1.33334e-5) for gb in (2, 8))
    assert small.request_cost_bytes == pytest.approx(1_200_000, rel=0.01)
    assert large.request_cost_bytes == pytest.approx(300_000, rel=0.01)
    gap = 500_000
    wanted = [(0, 1000), (1000 + gap, 2000 + gap)]
    assert len(plan_reads(wanted, small).gets) == 1
    assert len(plan_reads(wanted, large).gets) == 2


def test_a_price_that_is_not_positive_is_refused() -> None:
    with pytest.raises(InvalidRequest):
        ReadPolicy.priced(usd_per_get=0.4e-6, usd_per_s=0.0)
