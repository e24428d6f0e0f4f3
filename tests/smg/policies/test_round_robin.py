"""`round_robin`: each in turn, whatever comes and goes."""

from __future__ import annotations

from random import Random

from hypothesis import given
from hypothesis import strategies as st

from smg.policies.round_robin import RoundRobin
from smg.settings import Routing
from tests.smg.fleet.builders import call, workers_of

RNG = Random(1)


def served(policy: RoundRobin, workers, count: int, **fields) -> list[int]:
    orders = []
    for _ in range(count):
        worker = policy.choose(call(), workers, 0.0, RNG)
        policy.placed(call(**fields), worker, 0.0)
        orders.append(worker.order)
    return orders


@given(st.integers(1, 12), st.integers(0, 40))
def test_any_n_requests_in_a_row_touch_each_of_n_once(count: int, first: int):
    policy, workers = RoundRobin(Routing()), workers_of(count)
    served(policy, workers, first)
    assert sorted(served(policy, workers, count)) == list(range(count))


def test_the_turn_goes_on_behind_a_worker_that_left():
    policy, workers = RoundRobin(Routing()), workers_of(4)
    assert served(policy, workers, 2) == [0, 1]
    assert served(policy, (workers[0], workers[1], workers[3]), 2) == [3, 0]
    assert served(policy, workers, 3) == [1, 2, 3]


def test_a_retry_that_leaves_one_out_takes_the_next_turn():
    policy, workers = RoundRobin(Routing()), workers_of(3)
    assert served(policy, workers, 1) == [0]
    assert served(policy, list(workers[1:]), 1) == [1]
    assert served(policy, workers, 3) == [2, 0, 1]


def test_a_request_that_named_its_worker_takes_nobodys_turn():
    policy, workers = RoundRobin(Routing()), workers_of(3)
    served(policy, workers, 1)
    policy.placed(call(target=workers[1].id), workers[1], 0.0)
    assert served(policy, workers, 3) == [1, 2, 0]
