"""Retries: what is tried again, after how long, and how often at most (RTY-1 to RTY-4, CB-1)."""

from __future__ import annotations

from collections import deque
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from smg.errors import UpstreamError
from smg.fleet.retry import RetryBudget, RetryRules, is_failure, retry_rules
from smg.fleet.worker import ResilienceOverrides
from smg.settings import Retries
from tests.smg.fleet.builders import workers_of


@pytest.mark.parametrize("status", [408, 429, 500, 502, 503, 504])
def test_these_answers_are_retried_and_blame_the_worker(status: int):
    assert RetryRules().is_retryable(status)
    assert is_failure(status, workers_of(1)[0])


@pytest.mark.parametrize("status", [200, 201, 301, 400, 401, 403, 404, 409, 413, 422, 501, 505, 529])
def test_no_other_answer_is(status: int):
    assert not RetryRules().is_retryable(status)
    assert not is_failure(status, workers_of(1)[0])


def test_a_workers_own_codes_feed_its_breaker_and_not_the_retries():
    worker = workers_of(1, resilience=ResilienceOverrides(retryable_status_codes=(529,)))[0]
    assert is_failure(529, worker) and not is_failure(500, worker)
    assert not RetryRules().is_retryable(529)


def test_a_timeout_is_not_retried_and_lost_connections_are():
    rules = RetryRules()
    assert rules.is_retryable_kind(UpstreamError.REFUSED)
    assert rules.is_retryable_kind(UpstreamError.RESET)
    assert not rules.is_retryable_kind(UpstreamError.TIMEOUT)
    assert not rules.is_retryable_kind(UpstreamError.BROKEN_STREAM)


@pytest.mark.parametrize("status", [500, 502, 503, 504])
def test_the_only_worker_is_asked_again_unless_it_asked_for_rest(status: int):
    assert RetryRules().is_repeatable(status, has_retry_after=False)
    assert not RetryRules().is_repeatable(status, has_retry_after=True)


@pytest.mark.parametrize("status", [408, 429])
def test_the_only_worker_is_not_asked_again_after_these(status: int):
    assert not RetryRules().is_repeatable(status, has_retry_after=False)


def test_backoff_grows_by_the_multiplier_up_to_the_maximum():
    rules = RetryRules(initial_backoff_s=0.05, max_backoff_s=1.0, backoff_multiplier=2.0, jitter_ratio=0.0)
    assert [rules.backoff_s(k, Random(1)) for k in range(6)] == pytest.approx([0.05, 0.1, 0.2, 0.4, 0.8, 1.0])
    assert rules.backoff_s(10**6, Random(1)) == 1.0


@given(st.integers(0, 50), st.integers(0, 2**32), st.floats(0.0, 1.0))
def test_jitter_stays_within_its_ratio(k: int, seed: int, jitter: float):
    rules = RetryRules(jitter_ratio=jitter)
    plain = min(0.05 * 1.5**k, 30.0)
    assert plain * (1 - jitter) - 1e-9 <= rules.backoff_s(k, Random(seed)) <= plain * (1 + jitter) + 1e-9


def test_disabled_retries_are_one_attempt():
    assert retry_rules(Retries(disable_retries=True)).attempts_max == 1
    rules = retry_rules(Retries(retry_max_retries=7, retry_initial_backoff_ms=20))
    assert rules.attempts_max == 7 and rules.initial_backoff_s == 0.02


def test_the_budget_ends_at_ratio_times_requests_plus_the_floor():
    budget = RetryBudget(ratio=0.2, min_per_sec=1.0)
    for _ in range(100):
        budget.requested(5.0)
    granted = sum(budget.may_retry(5.0) for _ in range(100))
    assert granted == 30  # 0.2 x 100 + 1 x 10


def test_the_budget_comes_back_when_the_window_has_passed():
    budget = RetryBudget(ratio=0.0, min_per_sec=0.1)
    assert budget.may_retry(100.0)
    assert not budget.may_retry(109.9)
    assert budget.may_retry(110.0)


def test_a_long_silence_costs_nothing():
    budget = RetryBudget(ratio=1.0, min_per_sec=0.0)
    budget.requested(1.0)
    budget.requested(1e15)  # would not end if every second were gone through
    assert budget.may_retry(1e15) and not budget.may_retry(1e15)


def test_no_ratio_and_no_floor_is_no_retry():
    budget = RetryBudget(ratio=0.0, min_per_sec=0.0)
    budget.requested(0.0)
    assert not budget.may_retry(0.0)


@given(
    st.lists(st.tuples(st.sampled_from("qr"), st.floats(0.0, 4.0) | st.floats(8.0, 13.0)), max_size=300),
    st.floats(0.0, 1.0),
    st.sampled_from([0.0, 0.1, 0.5]),
)
def test_the_budget_agrees_with_a_list_of_everything(steps, ratio: float, floor: float):
    budget = RetryBudget(ratio, floor)
    requests: deque[int] = deque()
    retries: deque[int] = deque()
    now = 1000.0
    for what, later in steps:
        now += later
        second = int(now)
        for seen in (requests, retries):
            while seen and seen[0] <= second - 10:
                seen.popleft()
        if what == "q":
            budget.requested(now)
            requests.append(second)
        else:
            expected = len(retries) + 1 <= ratio * len(requests) + floor * 10
            assert budget.may_retry(now) == expected
            if expected:
                retries.append(second)
