"""`least_load`: the row of the contract, with and without reports."""

from __future__ import annotations

from collections import Counter
from random import Random

import pytest

from smg.fleet import load
from smg.fleet.worker import WorkerSpec
from smg.policies.least_load import LeastLoad
from smg.settings import Routing
from tests.smg.fleet.builders import call, registry, reported, url_of, workers_of

CALL = call()


def shares(workers, now: float = 1.0, count: int = 3000) -> Counter[int]:
    policy, rng = LeastLoad(Routing()), Random(5)
    return Counter(policy.choose(CALL, workers, now, rng).order for _ in range(count))


def specs(*fields: dict) -> tuple:
    built = registry()
    return tuple(
        built.add(WorkerSpec(url_of(i), model_id="m", **given), 0.0) for i, given in enumerate(fields)
    )


def test_without_reports_the_fewest_in_flight_times_cost_wins():
    workers = specs({}, {"cost": 2.0}, {})
    workers[0].in_flight, workers[1].in_flight, workers[2].in_flight = 3, 1, 4
    assert shares(workers) == {1: 3000}
    workers[1].in_flight = 2
    assert shares(workers) == {0: 3000}


def test_equal_costs_tie_exactly_also_when_they_are_made_differently():
    workers = specs({}, {"cost": 3.0})
    workers[0].in_flight, workers[1].in_flight = 3, 1
    assert 1350 < shares(workers)[0] < 1650


def test_equal_ones_share_by_chance():
    counts = shares(workers_of(3))
    assert all(850 < counts[order] < 1150 for order in range(3))


def test_equal_ones_go_to_the_higher_priority():
    assert shares(specs({}, {"priority": 60}, {"priority": 60}, {"priority": 40})).keys() == {1, 2}


def test_with_reports_queue_throughput_and_cache_pressure_decide():
    workers = workers_of(3)
    reported(workers[0], waiting_tokens=4000, kv_usage=0.1, throughput_tps=4000.0)  # 1.02 s
    reported(workers[1], waiting_tokens=1000, kv_usage=0.1, throughput_tps=500.0)  # 2.02 s
    reported(workers[2], waiting_tokens=0, kv_usage=0.95, throughput_tps=500.0)  # 2.85 s
    assert shares(workers) == {0: 3000}


def test_what_was_sent_since_the_poll_counts_at_once():
    workers = workers_of(2)
    for worker in workers:
        reported(worker, waiting=0, kv_usage=0.2)
    load.begin(workers[0])
    assert shares(workers) == {1: 3000}
    load.begin(workers[1], 100_000)
    assert shares(workers) == {0: 3000}


def test_old_reports_do_not_count():
    workers = workers_of(2)
    reported(workers[0], until_s=5.0, waiting=90, kv_usage=0.9)
    reported(workers[1], until_s=5.0, waiting=0, kv_usage=0.1)
    workers[1].in_flight = 1
    assert shares(workers, now=4.9) == {1: 3000}
    assert shares(workers, now=5.0) == {0: 3000}


def test_workers_with_and_without_a_report_compare_at_the_fleets_throughput():
    workers = workers_of(2)
    reported(workers[0], waiting_tokens=10_000, kv_usage=0.0, throughput_tps=10_000.0)  # 1 s
    workers[1].in_flight = 5  # 5 x 1024 / 10,000 = 0.5 s; at the default throughput 2.6 s
    assert shares(workers) == {1: 3000}
    workers[1].in_flight = 11
    assert shares(workers) == {0: 3000}


def test_it_explains_the_waits_it_compares():
    workers = workers_of(2)
    reported(workers[0], waiting_tokens=2000, kv_usage=0.5, throughput_tps=1000.0)
    workers[1].in_flight = 2
    rows = LeastLoad(Routing()).terms(CALL, workers, 1.0, Random(1))
    assert rows[0].cost == rows[0].wait == pytest.approx(2.15)
    assert rows[1].cost == pytest.approx(2 * 1024 / 1000)
    assert "no load report" in rows[1].reason
