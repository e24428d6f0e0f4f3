"""`random`, `passthrough` and `power_of_two`."""

from __future__ import annotations

from collections import Counter
from random import Random

import pytest

from smg.policies.passthrough import Passthrough
from smg.policies.power_of_two import PowerOfTwo
from smg.policies.random_choice import RandomChoice
from smg.settings import Routing
from tests.smg.fleet.builders import call, fleet, reported, workers_of

CALL = call()


def shares(policy, workers, count: int = 4000, now: float = 1.0) -> Counter[int]:
    rng = Random(3)
    return Counter(policy.choose(CALL, workers, now, rng).order for _ in range(count))


def test_random_is_uniform():
    counts = shares(RandomChoice(Routing()), workers_of(4))
    assert all(900 < counts[order] < 1100 for order in range(4))


def test_passthrough_is_always_the_first():
    workers = workers_of(3)
    workers[0].in_flight = 99
    assert shares(Passthrough(Routing()), workers) == {0: 4000}
    assert shares(Passthrough(Routing()), workers[1:]) == {1: 4000}


def test_power_of_two_never_takes_the_most_loaded_of_all():
    workers = workers_of(4)
    for worker, in_flight in zip(workers, (1, 2, 3, 4), strict=True):
        worker.in_flight = in_flight
    counts = shares(PowerOfTwo(Routing()), workers)
    assert counts[3] == 0
    # The i-th least loaded wins against all above it: 3/6, 2/6, 1/6 of the pairs.
    assert counts[0] / 4000 == pytest.approx(3 / 6, abs=0.04)
    assert counts[1] / 4000 == pytest.approx(2 / 6, abs=0.04)
    assert counts[2] / 4000 == pytest.approx(1 / 6, abs=0.04)


def test_power_of_two_is_uniform_among_equals_and_draws_two_different_ones():
    counts = shares(PowerOfTwo(Routing()), workers_of(4))
    assert all(900 < counts[order] < 1100 for order in range(4))
    pair = workers_of(2)
    pair[0].in_flight = 1
    assert shares(PowerOfTwo(Routing()), pair) == {1: 4000}


def test_power_of_two_believes_reports_only_when_both_have_one():
    workers = workers_of(2)
    workers[0].in_flight, workers[1].in_flight = 1, 2
    reported(workers[0], waiting=50, kv_usage=0.5)
    assert shares(PowerOfTwo(Routing()), workers) == {0: 4000}
    reported(workers[1], waiting=1, kv_usage=0.5)
    assert shares(PowerOfTwo(Routing()), workers) == {1: 4000}
    assert shares(PowerOfTwo(Routing()), workers, now=2e9) == {0: 4000}  # both too old


def test_power_of_two_weighs_cost_and_breaks_ties_by_priority():
    registry, workers = fleet(2)
    workers[0].in_flight = workers[1].in_flight = 2
    registry.update(workers[1], type(workers[1].spec)(workers[1].spec.url, model_id="m", priority=60), 1.0)
    assert shares(PowerOfTwo(Routing()), workers) == {1: 4000}
    registry.update(workers[1], type(workers[1].spec)(workers[1].spec.url, model_id="m", cost=2.0), 1.0)
    assert shares(PowerOfTwo(Routing()), workers) == {0: 4000}


def test_power_of_two_explains_in_seconds_where_it_has_reports():
    workers = workers_of(2)
    reported(workers[0], waiting=2, kv_usage=0.0)
    rows = PowerOfTwo(Routing()).terms(CALL, workers, 1.0, Random(1))
    assert rows[0].cost == pytest.approx(2 * 1024 / 2000) and rows[1].cost is None
