"""Prices and what is made of them: sums that can be done by hand, monotony, the break-even, the command."""

from __future__ import annotations

import json

import pytest
from msgspec.structs import fields, replace
from typer.testing import CliRunner

from engine.cost import MEASURED, PRICES, Prices, Usage, Workload, container, estimate, memory_needed, prices, prices_near
from engine.errors import InvalidRequest
from handler.cli import app

US = prices("us-east-1")
SMALL = Workload(n_documents=20_000, tokens_per_document=150)


def test_a_million_gets_cost_forty_cents_and_a_million_puts_five_dollars() -> None:
    assert Usage(n_gets=1e6).usd(US) == pytest.approx(0.4)
    assert Usage(n_puts=1e6).usd(US) == pytest.approx(5.0)


def test_a_function_pays_for_memory_times_time_rounded_up_to_a_millisecond() -> None:
    one = Usage(seconds=0.1001, memory_mb=2048, invocations=1)
    assert one.items(US)["Lambda compute"] == pytest.approx(0.101 * 2 * 1.33334e-5)
    assert one.items(US, "x86_64")["Lambda compute"] == pytest.approx(0.101 * 2 * 1.66667e-5)
    assert one.items(US)["Lambda requests"] == pytest.approx(0.2e-6)


def test_only_ephemeral_storage_above_512_mb_costs() -> None:
    free = Usage(seconds=1, memory_mb=1024, ephemeral_mb=512, invocations=1)
    assert "Lambda ephemeral storage" not in free.items(US)
    paid = replace(free, ephemeral_mb=512 + 1024)
    assert paid.items(US)["Lambda ephemeral storage"] == pytest.approx(3.09e-8)


def test_n_calls_cost_n_times_one_call() -> None:
    one = Usage(
        n_gets=3, seconds=0.05, memory_mb=1024, ephemeral_mb=2048, invocations=1, http_requests=1, express_executions=1, bytes_out=10
    )
    assert one.times(1000).usd(US) == pytest.approx(1000 * one.usd(US))


def test_a_server_pays_for_requests_only() -> None:
    assert Usage(n_gets=2, seconds=5.0).items(US) == {"S3 GET": pytest.approx(0.8e-6)}


def test_every_region_has_every_price_and_none_is_far_from_the_others() -> None:
    for region, row in PRICES.items():
        assert row.region == region
        for field in fields(Prices):
            if field.name != "region":
                assert 0.5 <= getattr(row, field.name) / getattr(US, field.name) <= 2.0, (region, field.name)


def test_an_unknown_region_is_refused_by_name_but_does_not_fail_a_search() -> None:
    with pytest.raises(InvalidRequest, match="mars-1"):
        prices("mars-1")
    assert prices_near("mars-1") == US


def test_a_million_queries_cost_what_the_house_promises() -> None:
    """At most 3 dollars warm and 20 cold, 2 GB arm64, 20,000 abstracts."""
    month = estimate(SMALL, US)
    assert month.usd_per_million_warm <= 3.0
    assert month.usd_per_million_cold <= 20.0


def test_a_month_is_the_sum_of_its_items_and_an_idle_index_costs_its_storage() -> None:
    month = estimate(SMALL, US)
    assert month.usd == pytest.approx(sum(month.usd_items.values()))
    idle = estimate(replace(SMALL, queries_per_day=0.0), US)
    assert set(idle.usd_items) == {"S3 storage"}
    assert idle.usd == pytest.approx(idle.stored_bytes / 1e9 * 0.023)


def test_a_lower_hit_rate_more_queries_and_more_bits_cost_more() -> None:
    base = estimate(SMALL, US).usd
    for change in ({"hit_rate": 0.5}, {"queries_per_day": 20_000.0}, {"nbits": 8}, {"adds_per_day": 100.0}, {"memory_mb": 4096}):
        assert estimate(replace(SMALL, **change), US).usd > base, change


def test_an_index_larger_than_the_function_is_never_warm() -> None:
    large = replace(SMALL, n_documents=1_000_000, hit_rate=1.0)
    month = estimate(large, US)
    assert not month.fits
    assert month.usd == pytest.approx(estimate(replace(large, hit_rate=0.0), US).usd)


def test_at_the_break_even_both_ways_cost_the_same_and_beyond_it_the_container_costs_less() -> None:
    month = estimate(SMALL, US)
    assert month.cheaper_from is not None
    at = estimate(replace(SMALL, queries_per_day=month.cheaper_from), US)
    assert at.container.n_tasks == month.cheaper_with_tasks
    assert at.container.usd == pytest.approx(at.usd, rel=1e-6)
    beyond = estimate(replace(SMALL, queries_per_day=1.01 * month.cheaper_from), US)
    before = estimate(replace(SMALL, queries_per_day=0.99 * month.cheaper_from), US)
    assert beyond.container.usd < beyond.usd
    assert before.container.usd > before.usd


def test_containers_are_at_least_two_hold_the_index_and_carry_the_peak() -> None:
    for per_day in (0.0, 1e4, 1e7):
        box = container(replace(SMALL, queries_per_day=per_day), memory_needed(10e9, 100e6), per_day, US, MEASURED)
        assert box.n_tasks >= 2
        assert box.memory_gb * 2**30 >= memory_needed(10e9, 100e6)
        assert box.max_queries_per_day >= per_day


@pytest.mark.parametrize("wrong", [{"nbits": 3}, {"hit_rate": 1.5}, {"n_documents": 0}, {"memory_mb": 64}, {"vcpu": 3.0}])
def test_an_impossible_workload_is_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(InvalidRequest):
        replace(SMALL, **wrong)


def test_the_command_prints_a_table_or_json(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TARTAN_REGION", "eu-central-1")
    runner = CliRunner()
    shown = runner.invoke(app, ["cost", "--documents", "20000"])
    assert shown.exit_code == 0, shown.output
    assert "containers are cheaper from" in shown.output
    printed = json.loads(runner.invoke(app, ["cost", "-n", "20000", "--warm-ms", "10", "--json"]).output)
    assert printed["region"] == "eu-central-1"
    assert printed["measured"]["warm_ms"] == 10
    assert printed["usd_per_month"] == pytest.approx(sum(printed["usd_items"].values()))


def test_the_command_names_the_regions_it_knows() -> None:
    result = CliRunner().invoke(app, ["cost", "-n", "1", "--region", "mars-1"])
    assert result.exit_code == 1
    assert "us-east-1" in result.output
