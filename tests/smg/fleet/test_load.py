"""Load: counting in one place, and the expected wait that comes out (RT-3, WRK-16)."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from smg.fleet import load
from smg.fleet.load import ReportRules, WaitRules, expected_wait_s
from smg.fleet.worker import LoadReport
from smg.settings import LoadPolls, Routing
from tests.smg.fleet.builders import reported, workers_of

RULES = WaitRules(kv_pressure_weight=0.15, default_throughput_tps=2000.0, mean_prefill_tokens=1024.0)


@given(st.lists(st.integers(0, 10_000), max_size=50), st.randoms(use_true_random=False))
def test_counts_come_back_to_zero_in_any_order(sizes: list[int], rng):
    worker = workers_of(1)[0]
    for chars in sizes:
        load.begin(worker, chars)
    assert worker.in_flight == worker.sent_since_report == len(sizes)
    assert worker.chars_in_flight == worker.chars_since_report == sum(sizes)
    rng.shuffle(sizes)
    for chars in sizes:
        load.end(worker, chars)
    assert worker.in_flight == 0 and worker.chars_in_flight == 0
    assert worker.chars_since_report == sum(sizes)  # a finished request was sent all the same


def test_ending_twice_is_a_bug():
    worker = workers_of(1)[0]
    load.begin(worker)
    load.end(worker)
    with pytest.raises(AssertionError):
        load.end(worker)


def test_a_report_starts_the_count_of_what_was_sent_anew_and_keeps_what_is_in_flight():
    worker = workers_of(1)[0]
    load.begin(worker, 10)
    load.report(worker, LoadReport(5.0), ReportRules())
    assert (worker.sent_since_report, worker.chars_since_report, worker.in_flight) == (0, 0, 1)


def test_a_report_counts_for_three_intervals():
    worker = workers_of(1)[0]
    assert load.fresh_report(worker, 0.0) is None
    load.report(worker, LoadReport(10.0), ReportRules(interval_s=0.5))
    assert load.fresh_report(worker, 11.4) is not None
    assert load.fresh_report(worker, 11.5) is None


@pytest.mark.parametrize(
    ("told", "is_over"),
    [
        ({"waiting": 7}, False),
        ({"waiting": 8}, True),
        ({"kv_usage": 0.79}, False),
        ({"kv_usage": 0.8}, True),
    ],
)
def test_overload_is_many_waiting_or_a_full_cache(told, is_over: bool):
    worker = workers_of(1)[0]
    assert load.report(worker, LoadReport(0.0, **told), ReportRules()) is is_over
    assert not load.report(worker, LoadReport(0.0, **told), ReportRules(is_protected=False))


def test_the_wait_is_the_formula_of_the_contract():
    worker = workers_of(1)[0]
    reported(worker, waiting_tokens=3000, kv_usage=0.5, throughput_tps=1000.0)
    assert expected_wait_s(worker, 1.0, RULES) == pytest.approx(3.0 + 0.15 * 1.0)
    load.begin(worker, 4000)
    assert expected_wait_s(worker, 1.0, RULES) == pytest.approx(4.0 + 0.15)


def test_counts_stand_in_for_tokens_that_were_not_told():
    worker = workers_of(1)[0]
    reported(worker, waiting=2, kv_usage=0.0)
    load.begin(worker)
    assert expected_wait_s(worker, 1.0, RULES) == pytest.approx(3 * 1024 / 2000)


def test_a_full_cache_costs_much_but_not_everything():
    worker = workers_of(1)[0]
    reported(worker, kv_usage=1.0)
    assert 100.0 < expected_wait_s(worker, 1.0, RULES) < 200.0


def test_cost_multiplies_the_wait_with_and_without_a_report():
    plain, dear = workers_of(1)[0], workers_of(1, cost=2.0)[0]
    for worker in (plain, dear):
        load.begin(worker)
    assert expected_wait_s(dear, 1.0, RULES) == 2 * expected_wait_s(plain, 1.0, RULES) > 0
    for worker in (plain, dear):
        reported(worker, waiting=1, kv_usage=0.3)
    assert expected_wait_s(dear, 1.0, RULES) == pytest.approx(2 * expected_wait_s(plain, 1.0, RULES))


def test_an_engine_that_tells_no_kv_usage_is_not_idle_while_calls_are_open():
    worker = workers_of(1)[0]
    for _ in range(3):
        load.begin(worker)
    reported(worker, waiting=0)
    assert expected_wait_s(worker, 1.0, RULES) == pytest.approx(3 * 1024 / 2000)


def test_an_old_report_is_not_believed():
    worker = workers_of(1)[0]
    reported(worker, until_s=10.0, waiting_tokens=10**6, kv_usage=0.9)
    assert expected_wait_s(worker, 10.0, RULES) == 0.0


def test_the_mean_throughput_is_of_those_who_told_it():
    workers = workers_of(3)
    assert load.mean_throughput_tps(workers, 1.0, RULES) == 2000.0
    reported(workers[0], throughput_tps=5000.0)
    reported(workers[1], throughput_tps=0.0)
    assert load.mean_throughput_tps(workers, 1.0, RULES) == pytest.approx(3500.0)


def test_rules_come_from_the_command_line():
    rules = load.report_rules(Routing(policy="round_robin"), LoadPolls())
    assert rules.interval_s == 10.0 and rules.is_protected
    assert load.report_rules(Routing(policy="least_load"), LoadPolls()).interval_s == 0.25
    assert load.wait_rules(Routing()) == RULES
