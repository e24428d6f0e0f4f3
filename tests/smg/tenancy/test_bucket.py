"""The token bucket: never more than burst plus rate, never less than promised."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from smg.tenancy.bucket import TokenBucket


def test_a_new_bucket_is_full_and_then_refills_at_its_rate():
    bucket = TokenBucket(2.0, 3.0)
    assert [bucket.take(0.0) for _ in range(4)] == [True, True, True, False]
    assert not bucket.take(0.49)
    assert bucket.take(0.5)
    assert bucket.tokens(100.0) == 3.0


def test_a_refusal_takes_nothing():
    bucket = TokenBucket(1.0, 2.0)
    assert not bucket.take(0.0, 2.5)
    assert bucket.tokens(0.0) == 2.0


def test_the_next_token_is_there_when_it_was_promised():
    bucket = TokenBucket(3.0, 1.0)
    bucket.take(10.0)
    at = bucket.next_at_s(10.1)
    assert at == pytest.approx(10.0 + 1 / 3)
    assert not bucket.take(at - 0.01)
    assert bucket.take(at)


def test_more_than_the_burst_never_fits():
    assert TokenBucket(1.0, 2.0).next_at_s(0.0, 3.0) == math.inf


def test_a_clock_that_goes_back_gives_nothing():
    bucket = TokenBucket(1.0, 1.0)
    assert bucket.take(100.0)
    assert not bucket.take(50.0)
    assert not bucket.take(100.5)
    assert bucket.take(101.0)


@pytest.mark.parametrize(("rate", "burst"), [(0.0, 1.0), (1.0, 0.0), (-1.0, 1.0), (float("nan"), 1.0)])
def test_a_bucket_without_rate_or_room_is_a_bug(rate: float, burst: float):
    with pytest.raises(ValueError):
        TokenBucket(rate, burst)


@given(
    st.floats(0.1, 1000.0),
    st.floats(1.0, 100.0),
    st.lists(st.tuples(st.floats(0.0, 3.0), st.integers(1, 5)), max_size=150),
)
def test_over_any_span_no_more_than_burst_plus_rate_goes_out_and_a_promise_is_kept(rate, burst, steps):
    bucket = TokenBucket(rate, burst)
    now, taken = 0.0, 0.0
    for later, amount in steps:
        now += later
        if bucket.take(now, amount):
            taken += amount
        elif amount <= burst:
            at = bucket.next_at_s(now, amount)
            assert at > now
            assert bucket.tokens(at) == pytest.approx(amount, abs=1e-6)
        assert taken <= burst + rate * now + 1e-6 * (1 + len(steps))
        assert 0.0 <= bucket.tokens(now) <= burst


def test_a_part_of_the_limit_has_a_part_of_rate_and_burst_and_keeps_the_balance():
    bucket = TokenBucket(10.0, 20.0)
    bucket.take(0.0, 5.0)
    bucket.set_share(0.0, 0.5)
    assert (bucket.burst, bucket.rate_per_s, bucket.tokens(0.0)) == (10.0, 5.0, 10.0)
    bucket.take(0.0, 4.0)
    bucket.set_share(0.0, 1.0)
    assert bucket.tokens(0.0) == 6.0
    assert bucket.tokens(1.0) == 16.0
    bucket.give_back(100.0, 1.0)
    assert bucket.tokens(1.0) == 20.0


def test_a_full_bucket_lets_in_what_is_larger_than_its_part_and_owes_the_rest():
    bucket = TokenBucket(10.0, 20.0)
    bucket.set_share(0.0, 0.01)
    assert bucket.take(0.0)
    assert bucket.tokens(0.0) == pytest.approx(-0.8)
    assert not bucket.take(5.0)
    at = bucket.next_at_s(5.0)
    assert at == pytest.approx(10.0)
    assert bucket.take(at)
    assert not bucket.take(100.0, 21.0)


def test_demand_is_what_was_asked_and_not_what_was_given():
    bucket = TokenBucket(1.0, 1.0)
    assert not bucket.was_asked
    for _ in range(5):
        bucket.take(0.0)
    assert bucket.was_asked
    assert [bucket.read_demand(), bucket.read_demand()] == [5.0, 0.0]


def test_without_a_part_nothing_is_promised():
    bucket = TokenBucket(1.0, 1.0)
    bucket.take(0.0)
    bucket.set_share(0.0, 0.0)
    bucket.give_back(-1.0, 0.0)
    assert bucket.next_at_s(0.0) == math.inf
