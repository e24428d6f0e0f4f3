"""Admission: exact counts, order of arrival, bounds; under every schedule, also of clients that leave (ADM-1 to ADM-3)."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from smg.errors import GatewayError
from smg.settings import Limits
from smg.tenancy.admission import ADMITTED, EXPIRED, WAITING, Admission, Ticket, admission_of
from smg.tenancy.bucket import TokenBucket


def refused(admission: Admission, now: float = 0.0) -> GatewayError:
    with pytest.raises(GatewayError) as error:
        admission.enter(now)
    return error.value


def test_up_to_the_limit_everybody_enters_at_once():
    admission = Admission(2, 10, 60.0)
    assert admission.enter(0.0) is None
    assert admission.enter(0.0) is None
    assert admission.in_flight == 2
    assert isinstance(admission.enter(0.0), Ticket)
    assert (admission.in_flight, admission.waiting) == (2, 1)


def test_who_leaves_hands_the_slot_to_the_one_who_came_first():
    admission = Admission(1, 10, 60.0)
    admission.enter(0.0)
    first, second = admission.enter(1.0), admission.enter(2.0)
    assert admission.leave() is first
    assert first.state == ADMITTED and second.state == WAITING
    assert admission.in_flight == 1  # handed over, not freed
    assert isinstance(admission.enter(3.0), Ticket)  # nobody overtakes
    assert admission.leave() is second


def test_the_last_to_leave_frees_the_slot():
    admission = Admission(1, 10, 60.0)
    admission.enter(0.0)
    assert admission.leave() is None
    assert admission.in_flight == 0


def test_a_full_queue_refuses_at_once_and_a_queue_of_none_always_does():
    admission = Admission(1, 1, 60.0)
    admission.enter(0.0)
    admission.enter(0.0)
    error = refused(admission)
    assert (error.status, error.code) == (429, "admission_queue_full")
    assert error.retry_after_s is not None and error.retry_after_s >= 1
    none = Admission(1, 0, 60.0)
    none.enter(0.0)
    assert refused(none).code == "admission_queue_full"
    assert none.rejected_total == 1 and none.admitted_total == 1


def test_who_waits_too_long_is_told_so_and_its_place_is_free():
    admission = Admission(1, 1, 60.0)
    admission.enter(0.0)
    ticket = admission.enter(5.0)
    assert admission.next_deadline_s() == 65.0
    assert admission.expire(64.9) == []
    assert admission.expire(65.0) == [ticket]
    assert ticket.state == EXPIRED and admission.next_deadline_s() is None
    error = admission.timeout_error()
    assert (error.status, error.code) == (503, "admission_queue_timeout") and error.retry_after_s
    assert isinstance(admission.enter(65.0), Ticket)
    assert admission.abandon(ticket) is None  # its task may say goodbye all the same
    assert admission.in_flight == 1


def test_a_waiting_client_that_leaves_frees_its_place():
    admission = Admission(1, 1, 60.0)
    admission.enter(0.0)
    ticket = admission.enter(0.0)
    assert admission.abandon(ticket) is None
    assert admission.waiting == 0 and admission.in_flight == 1
    assert isinstance(admission.enter(0.0), Ticket)


def test_a_client_that_leaves_between_admission_and_waking_passes_its_slot_on():
    admission = Admission(1, 5, 60.0)
    admission.enter(0.0)
    first, second = admission.enter(0.0), admission.enter(0.0)
    assert admission.leave() is first
    assert admission.abandon(first) is second
    assert admission.in_flight == 1
    assert admission.abandon(second) is None
    assert admission.in_flight == 0


def test_without_a_limit_nobody_waits():
    admission = Admission(None, 0, 60.0)
    for _ in range(10_000):
        assert admission.enter(0.0) is None
    assert admission.in_flight == 10_000


def test_the_rate_is_a_limit_of_its_own():
    admission = Admission(100, 100, 60.0, TokenBucket(2.0, 2.0))
    admission.enter(0.0)
    admission.enter(0.0)
    error = refused(admission)
    assert (error.status, error.code) == (429, "rate_limit_exceeded")
    assert error.retry_after_s == pytest.approx(0.5)
    assert admission.in_flight == 2
    assert admission.enter(0.5) is None


def test_a_full_queue_costs_no_token():
    bucket = TokenBucket(1.0, 5.0)
    admission = Admission(1, 0, 60.0, bucket)
    admission.enter(0.0)
    assert refused(admission).code == "admission_queue_full"
    assert bucket.tokens(0.0) == 4.0


def test_a_slot_that_comes_back_twice_is_a_bug():
    admission = Admission(1, 0, 60.0)
    with pytest.raises(AssertionError):
        admission.leave()


def test_the_command_line_makes_the_door():
    assert admission_of(Limits(), 1, 0.0)._max == 4096
    assert admission_of(Limits(), 8, 0.0)._max == 8192
    assert admission_of(Limits(max_concurrent_requests=0), 8, 0.0).enter(0.0) is None
    slow = admission_of(Limits(rate_limit_tokens_per_second=0.5), 1, 0.0)
    assert slow.enter(0.0) is None
    assert refused(slow).retry_after_s == pytest.approx(2.0)
    capped = admission_of(Limits(rate_limit_tokens_per_second=50.0, max_concurrent_requests=2), 1, 0.0)
    capped.enter(0.0)
    capped.enter(0.0)
    assert capped.leave() is None
    assert refused(capped).code == "rate_limit_exceeded"  # the burst is never above the slots


ACTIONS = st.lists(
    st.tuples(
        st.sampled_from(["enter", "enter", "finish", "leave_waiting", "cancel_woken", "wake", "second"]),
        st.integers(0, 10**6),
    ),
    max_size=200,
)


@given(ACTIONS, st.integers(1, 4), st.integers(0, 4), st.sampled_from([None, 1.0, 20.0]))
@settings(max_examples=200, deadline=None)
def test_under_every_schedule_the_count_is_exactly_those_who_hold_a_slot(actions, limit, size, rate):
    """Shell in miniature: tasks run, wait, are woken and run later, are cancelled at any of these points."""
    bucket = TokenBucket(rate, max(1.0, rate)) if rate else None
    admission = Admission(limit, size, 5.0, bucket)
    now = 0.0
    running = 0
    waiting: list[Ticket] = []  # parked, in order of arrival
    woken: list[Ticket] = []  # named by the machine, not run yet

    def wake(ticket: Ticket | None) -> None:
        if ticket is not None:
            assert ticket is waiting[0], "somebody overtook"
            woken.append(waiting.pop(0))

    for action, pick in actions:
        if action == "enter":
            free = limit - running - sum(ticket.state == ADMITTED for ticket in woken)
            try:
                ticket = admission.enter(now)
            except GatewayError as error:
                if error.code == "admission_queue_full":
                    assert free == 0 and len(waiting) == size
                else:
                    assert error.code == "rate_limit_exceeded" and bucket is not None
            else:
                if ticket is None:
                    assert free > 0
                    running += 1
                else:
                    assert free == 0 and len(waiting) < size
                    waiting.append(ticket)
        elif action == "finish" and running:
            running -= 1
            wake(admission.leave())
        elif action == "leave_waiting" and waiting:
            assert admission.abandon(waiting.pop(pick % len(waiting))) is None
        elif action == "cancel_woken" and woken:
            wake(admission.abandon(woken.pop(pick % len(woken))))
        elif action == "wake" and woken:
            ticket = woken.pop(pick % len(woken))
            if ticket.state == ADMITTED:
                running += 1
            else:
                assert ticket.state == EXPIRED
        elif action == "second":
            now += 1.0
            for ticket in admission.expire(now):
                assert ticket.deadline_s <= now
                assert ticket is waiting[0]
                woken.append(waiting.pop(0))
        holders = running + sum(ticket.state == ADMITTED for ticket in woken)
        assert admission.in_flight == holders <= limit
        assert admission.waiting == len(waiting) <= size
        assert not waiting or admission.in_flight == limit
        assert all(ticket.deadline_s > now for ticket in waiting) or action != "second"
    for ticket in list(waiting):
        waiting.remove(ticket)
        assert admission.abandon(ticket) is None
    for ticket in list(woken):
        woken.remove(ticket)
        wake(admission.abandon(ticket))
    for _ in range(running):
        assert admission.leave() is None
    assert admission.in_flight == 0 and admission.waiting == 0
