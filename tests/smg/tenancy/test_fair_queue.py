"""Start-time fair queueing: shares in proportion to weights, no credit for pauses, no cost for who leaves."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from smg.tenancy import fair_queue
from smg.tenancy.fair_queue import FairQueue


class Request:
    def __init__(self, tenant: str, cost_s: float = 1.0, weight: float = 1.0, entered_s: float = 0.0) -> None:
        self.tenant = tenant
        self.weighted_s = cost_s / weight
        self.entered_s = entered_s

    def __repr__(self) -> str:
        return f"{self.tenant}:{self.weighted_s:g}"


def filled(*requests: Request) -> FairQueue[Request]:
    queue: FairQueue[Request] = FairQueue()
    for request in requests:
        queue.push(request)
    return queue


def order(queue: FairQueue[Request], count: int = 10**6) -> str:
    return "".join(queue.pop().tenant for _ in range(min(count, len(queue))))


def test_one_tenant_is_served_in_order_of_arrival():
    requests = [Request("a", cost) for cost in (3, 1, 2)]
    queue = filled(*requests)
    assert queue.oldest is requests[0]
    assert [queue.pop() for _ in requests] == requests
    assert not queue


def test_equal_requests_of_two_tenants_alternate():
    assert order(filled(*(Request(name) for name in "aaabbb"))) == "ababab"


def test_what_counts_is_seconds_and_not_requests():
    queue = filled(*(Request("a", 4.0) for _ in range(3)), *(Request("b", 1.0) for _ in range(8)))
    assert order(queue) == "abbbbabbbba"


def test_a_weight_of_three_gets_three_times_as_much():
    queue = filled(*(Request("a", weight=3.0) for _ in range(30)), *(Request("b") for _ in range(30)))
    assert order(queue, 20).count("a") == 15


def test_who_comes_back_after_a_pause_is_next_and_has_no_credit():
    queue = filled(*(Request("a") for _ in range(20)))
    order(queue, 10)
    for _ in range(3):
        queue.push(Request("b"))
    assert order(queue, 6) in ("bababa", "ababab")


def test_what_went_without_waiting_is_charged():
    queue: FairQueue[Request] = FairQueue()
    queue.charge("a", 5.0)
    queue.push(Request("a", 5.0))
    queue.push(Request("b", 0.1))
    assert order(queue) == "ba"


def test_what_leaves_costs_its_tenant_nothing():
    dear = Request("a", 100.0)
    queue = filled(dear, Request("a"), Request("b"), Request("b"))
    queue.remove(dear)
    assert order(queue) == "abb"


def test_debts_end_with_the_busy_time():
    queue: FairQueue[Request] = FairQueue()
    queue.charge("a", 50.0)
    queue.charge("c", 1.0, is_first=True)
    queue.push(Request("a"))
    queue.push(Request("b"))
    assert order(queue) == "ab"


def test_tenants_that_come_and_go_do_not_fill_the_memory(monkeypatch):
    monkeypatch.setattr(fair_queue, "FLOWS_MAX", 16)
    queue: FairQueue[Request] = FairQueue()
    waiting = Request("waits")
    queue.push(waiting)
    for number in range(500):
        queue.charge(f"t{number}", 1.0)
        request = Request(f"u{number}")
        queue.push(request)
        queue.remove(request)
    assert len(queue._finish) <= 17 and len(queue._flows) == 1 and len(queue._heap) <= 200
    assert queue.pop() is waiting


def test_many_who_come_and_leave_leave_nothing_behind():
    queue = filled(Request("b"))
    for _ in range(1000):
        request = Request("a")
        queue.push(request)
        queue.remove(request)
    assert len(queue._heap) <= 2 * 2 + 65
    assert order(queue) == "b"


STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("push"), st.sampled_from("abc"), st.floats(0.01, 5.0)),
        st.tuples(st.just("charge"), st.sampled_from("abc"), st.floats(0.01, 5.0)),
        st.tuples(st.just("pop"), st.just(""), st.just(0.0)),
        st.tuples(st.just("remove"), st.just(""), st.floats(0, 0.99)),
    ),
    max_size=150,
)


@given(STEPS)
@settings(max_examples=200, deadline=None)
def test_nobody_is_lost_or_served_twice(steps):
    queue: FairQueue[Request] = FairQueue()
    waiting: list[Request] = []
    for what, tenant, number in steps:
        if what == "push":
            waiting.append(Request(tenant, number))
            queue.push(waiting[-1])
        elif what == "charge":
            queue.charge(tenant, number)
        elif what == "pop" and waiting:
            request = queue.pop()
            assert request is next(each for each in waiting if each.tenant == request.tenant)
            waiting.remove(request)
        elif what == "remove" and waiting:
            queue.remove(waiting.pop(int(number * len(waiting))))
        assert len(queue) == len(waiting)
        assert queue.everybody() == waiting
        assert not waiting or queue.oldest is waiting[0]
    assert sorted(map(id, (queue.pop() for _ in range(len(queue))))) == sorted(map(id, waiting))


@given(
    st.lists(st.floats(0.01, 3.0), min_size=20, max_size=60),
    st.lists(st.floats(0.01, 3.0), min_size=20, max_size=60),
    st.floats(0.2, 5.0),
    st.data(),
)
@settings(max_examples=150, deadline=None)
def test_two_who_both_wait_differ_by_one_request_each_at_most(first, second, weight, data):
    """Goyal et al., theorem 1: |W_f/r_f - W_m/r_m| <= l_f/r_f + l_m/r_m over every time in which both wait."""
    queue = filled(*(Request("a", cost, weight) for cost in first), *(Request("b", cost) for cost in second))
    left = {"a": len(first), "b": len(second)}
    served = {"a": 0.0, "b": 0.0}
    skip = data.draw(st.integers(0, 10))
    bound = max(first) / weight + max(second)
    for number in range(len(queue)):
        request = queue.pop()
        left[request.tenant] -= 1
        if number >= skip:
            served[request.tenant] += request.weighted_s
            assert abs(served["a"] - served["b"]) <= bound + 1e-9
        if not all(left.values()):
            break
    else:
        pytest.fail("somebody is served to the end before the other one begins")
