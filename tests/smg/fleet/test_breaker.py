"""The breaker: CB-1 to CB-5, its permits, and what it never does."""

from __future__ import annotations

from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from smg.fleet.breaker import AVOID_MAX_S, CLOSED, HALF_OPEN, OPEN, Breaker, BreakerRules, breaker_rules
from smg.fleet.worker import ResilienceOverrides
from smg.settings import Breaker as BreakerSettings

RULES = BreakerRules(failure_threshold=3, success_threshold=2, timeout_s=10.0, window_s=20.0)


def fail(breaker: Breaker, now: float, times: int = 1) -> None:
    for _ in range(times):
        breaker.failed(now, breaker.started(now))


def succeed(breaker: Breaker, now: float, times: int = 1) -> None:
    for _ in range(times):
        breaker.succeeded(now, breaker.started(now))


def opened(now: float = 0.0) -> Breaker:
    breaker = Breaker(RULES)
    fail(breaker, now, 3)
    assert breaker.state == OPEN
    return breaker


def test_it_opens_after_failures_in_a_row_and_not_one_earlier():
    breaker = Breaker(RULES)
    fail(breaker, 0.0, 2)
    assert breaker.state == CLOSED and breaker.permits(0.0)
    fail(breaker, 0.0)
    assert breaker.state == OPEN and not breaker.permits(0.0)
    assert breaker.transitions == {(CLOSED, OPEN): 1}


def test_any_success_clears_the_count():
    breaker = Breaker(RULES)
    fail(breaker, 0.0, 2)
    succeed(breaker, 0.0)
    fail(breaker, 0.0, 2)
    assert breaker.state == CLOSED and breaker.consecutive_failures == 2


def test_failures_older_than_the_window_do_not_count():
    breaker = Breaker(RULES)
    fail(breaker, 0.0, 2)
    fail(breaker, 20.5)
    assert breaker.state == CLOSED and breaker.consecutive_failures == 1
    fail(breaker, 40.0, 2)
    assert breaker.state == OPEN


def test_it_stays_open_until_the_timeout_and_is_half_open_after_it():
    breaker = opened(0.0)
    assert not breaker.permits(9.99)
    assert breaker.state_at(9.99) == OPEN
    assert breaker.permits(10.0)
    assert breaker.state_at(10.0) == HALF_OPEN
    assert breaker.state == OPEN  # looking changes nothing


def test_half_open_lets_exactly_the_success_threshold_through_at_once():
    breaker = opened(0.0)
    first = breaker.started(10.0)
    assert breaker.permits(10.0)
    breaker.started(10.0)
    assert not breaker.permits(10.0)
    breaker.abandoned(first)
    assert breaker.permits(10.0)


def test_that_many_successes_close_it():
    breaker = opened(0.0)
    succeed(breaker, 10.0)
    assert breaker.state == HALF_OPEN
    succeed(breaker, 10.0)
    assert breaker.state == CLOSED
    assert breaker.transitions == {(CLOSED, OPEN): 1, (OPEN, HALF_OPEN): 1, (HALF_OPEN, CLOSED): 1}


def test_one_failure_in_half_open_opens_it_again_for_the_full_time():
    breaker = opened(0.0)
    succeed(breaker, 12.0)
    fail(breaker, 13.0)
    assert breaker.state == OPEN
    assert not breaker.permits(22.9)
    assert breaker.permits(23.0)


def test_a_client_that_leaves_gives_its_trial_back_and_judges_nothing():
    breaker = opened(0.0)
    for _ in range(5):
        breaker.abandoned(breaker.started(10.0))
    assert breaker.state == HALF_OPEN and breaker.permits(10.0)
    assert breaker.successes_total == 0 and breaker.failures_total == 3


def test_late_news_from_before_the_outage_neither_closes_nor_opens_it():
    breaker = Breaker(RULES)
    early = [breaker.started(0.0) for _ in range(6)]
    fail(breaker, 0.0, 3)
    trial = breaker.started(10.0)
    for permit in early[:3]:
        breaker.succeeded(11.0, permit)
    assert breaker.state == HALF_OPEN
    for permit in early[3:]:
        breaker.failed(11.0, permit)
    assert breaker.state == HALF_OPEN
    breaker.succeeded(12.0, trial)
    succeed(breaker, 12.0)
    assert breaker.state == CLOSED


def test_a_trial_of_an_earlier_half_open_period_judges_nothing_but_holds_its_permit():
    breaker = opened(0.0)
    hung = breaker.started(10.0)
    fail(breaker, 11.0)
    assert breaker.state == OPEN
    current = breaker.started(21.0)
    assert breaker.state == HALF_OPEN
    assert not breaker.permits(21.0)  # the hung one is still on the worker
    breaker.failed(22.0, hung)
    assert breaker.state == HALF_OPEN and breaker.permits(22.0)
    breaker.succeeded(22.0, current)
    succeed(breaker, 22.0)
    assert breaker.state == CLOSED


def test_a_disabled_breaker_never_opens_but_counts():
    breaker = Breaker(BreakerRules(failure_threshold=1, is_disabled=True))
    fail(breaker, 0.0, 50)
    assert breaker.state == CLOSED and breaker.permits(0.0) and breaker.failures_total == 50


def test_rest_is_honoured_up_to_a_minute_and_never_shortened():
    breaker = Breaker(RULES)
    breaker.avoid(100.0, 86_400.0)
    assert breaker.avoid_until_s == 100.0 + AVOID_MAX_S
    breaker.avoid(101.0, 1.0)
    assert breaker.avoid_until_s == 100.0 + AVOID_MAX_S
    assert breaker.permits(101.0)  # rest is no verdict


def test_new_rules_keep_the_state_and_switching_off_closes():
    breaker = opened(0.0)
    breaker.set_rules(BreakerRules(failure_threshold=5))
    assert breaker.state == OPEN
    breaker.set_rules(BreakerRules(is_disabled=True))
    assert breaker.state == CLOSED and breaker.permits(0.0)


def test_a_lower_threshold_does_not_open_by_itself():
    breaker = Breaker(BreakerRules(failure_threshold=10))
    fail(breaker, 0.0, 7)
    breaker.set_rules(BreakerRules(failure_threshold=3))
    assert breaker.state == CLOSED
    fail(breaker, 0.0)
    assert breaker.state == OPEN


def test_a_permit_that_comes_back_twice_is_a_bug():
    breaker = opened(0.0)
    permit = breaker.started(10.0)
    breaker.abandoned(permit)
    with pytest.raises(AssertionError):
        breaker.abandoned(permit)


def test_every_change_that_is_not_time_is_told():
    told = []
    breaker = Breaker(RULES)
    breaker.on_change = lambda: told.append(breaker.state)
    fail(breaker, 0.0, 3)
    assert told == [OPEN]
    permit = breaker.started(10.0)
    assert told == [OPEN, HALF_OPEN]
    breaker.abandoned(permit)
    assert told == [OPEN, HALF_OPEN, HALF_OPEN]  # one more may start
    breaker.failed(10.0, breaker.started(10.0))
    assert told[-1] == OPEN
    assert breaker.next_change_s(10.0) == 20.0


def test_a_workers_own_numbers_win():
    rules = breaker_rules(
        BreakerSettings(cb_failure_threshold=10),
        ResilienceOverrides(cb_failure_threshold=2, disable_circuit_breaker=True),
    )
    assert rules.failure_threshold == 2 and rules.is_disabled
    assert rules.success_threshold == BreakerSettings().cb_success_threshold


def test_a_worker_may_switch_its_breaker_on_again():
    settings = BreakerSettings(disable_circuit_breaker=True)
    assert breaker_rules(settings, ResilienceOverrides()).is_disabled
    assert not breaker_rules(settings, ResilienceOverrides(disable_circuit_breaker=False)).is_disabled


OPS = st.lists(st.sampled_from(["start", "ok", "fail", "leave", "second", "minute"]), max_size=200)


@given(OPS, st.integers(0, 2**32))
def test_under_any_sequence_trials_are_bounded_and_permits_balance(ops: list[str], seed: int):
    rng = Random(seed)
    rules = BreakerRules(failure_threshold=1, success_threshold=2, timeout_s=10.0)
    breaker = Breaker(rules)
    changes = 0

    def changed() -> None:
        nonlocal changes
        changes += 1

    breaker.on_change = changed
    now = 0.0
    open_permits: list[int] = []
    for op in ops:
        before, seen, at = breaker.permits(now), changes, breaker.state
        if op == "start":
            if breaker.permits(now):
                open_permits.append(breaker.started(now))
        elif op in ("second", "minute"):
            now += 1.0 if op == "second" else 60.0
            continue
        elif open_permits:
            permit = open_permits.pop(rng.randrange(len(open_permits)))
            if op == "ok":
                breaker.succeeded(now, permit)
            elif op == "fail":
                breaker.failed(now, permit)
            else:
                breaker.abandoned(permit)
        trials = sum(1 for permit in open_permits if permit)
        assert trials <= rules.success_threshold
        if breaker.state == CLOSED:
            assert breaker.permits(now)
        if breaker.permits(now) != before:
            assert changes > seen, f"{op} in {at} changed permits without a word"
    for permit in open_permits:
        breaker.abandoned(permit)
    # Whatever happened, a worker that answers well comes back.
    now += 1000.0
    for _ in range(rules.success_threshold):
        assert breaker.permits(now)
        succeed(breaker, now)
    assert breaker.state == CLOSED
