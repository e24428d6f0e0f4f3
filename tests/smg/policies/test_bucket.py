"""`bucket`: ranges of prompt length with equal shares of characters, in every mode."""

from __future__ import annotations

from collections import Counter
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from smg.policies import bucket as bucket_module
from smg.policies.bucket import Bucket, Ranges
from smg.settings import Routing
from tests.smg.fleet.builders import call, workers_of

HALVES = [*[10] * 50, 500]  # half of the characters in short prompts, half in a long one
CALM = Routing(balance_abs_threshold=10**9)  # never out of balance: ranges alone decide


def place(policy: Bucket, workers, chars: int, now: float, rng: Random):
    prompt = call("x" * chars)
    worker = policy.choose(prompt, workers, now, rng)
    policy.placed(prompt, worker, now)
    return worker


def run(policy: Bucket, workers, lengths, per_second: float = 50.0, start: float = 0.0):
    rng = Random(1)
    return [
        (chars, place(policy, workers, chars, start + i / per_second, rng)) for i, chars in enumerate(lengths)
    ]


def skewed(count: int, seed: int = 1) -> list[int]:
    rng = Random(seed)
    return [int(rng.lognormvariate(6.0, 1.3)) + 1 for _ in range(count)]


@given(st.lists(st.integers(1, 5000), min_size=1, max_size=200), st.integers(1, 9), st.integers(0, 6000))
@settings(max_examples=200, deadline=None)
def test_ranges_rise_with_the_length_cover_everything_and_leave_nobody_out(lengths, count, asked):
    ranges = Ranges(lengths)
    first, last = ranges.owners(asked, count)
    assert 0 <= first <= last < count
    longer_first, longer_last = ranges.owners(asked + 1, count)
    assert longer_first >= first and longer_last >= last
    owned = {
        index
        for length in lengths
        for index in range(ranges.owners(length, count)[0], ranges.owners(length, count)[1] + 1)
    }
    assert owned == set(range(count))


def test_one_length_for_all_belongs_to_all():
    assert Ranges([700] * 50).owners(700, 4) == (0, 3)


def test_shares_of_characters_are_equal_by_ranges_alone():
    policy, workers = Bucket(CALM), workers_of(4)
    placed = run(policy, workers, skewed(6000))[1000:]
    sent = Counter()
    for chars, worker in placed:
        sent[worker.order] += chars
    mean = sum(sent.values()) / 4
    assert all(0.75 * mean < sent[order] < 1.3 * mean for order in range(4))


def test_short_prompts_do_not_meet_long_ones():
    policy, workers = Bucket(CALM), workers_of(4)
    placed = run(policy, workers, skewed(3000))[1000:]
    longest_of_first = max(chars for chars, worker in placed if worker.order == 0)
    shortest_of_last = min(chars for chars, worker in placed if worker.order == 3)
    assert longest_of_first < shortest_of_last


def test_before_anything_was_seen_work_is_spread_and_not_for_one():
    policy, workers = Bucket(Routing()), workers_of(4)
    placed = run(policy, workers, [500] * 8)
    assert set(Counter(worker.order for _, worker in placed).values()) == {2}


def test_the_first_ranges_come_after_a_few_prompts_and_not_only_after_the_interval():
    policy, workers = Bucket(CALM), workers_of(2)
    run(policy, workers, [*[16] * 31, 496], per_second=1000.0)
    assert policy._ranges is not None
    assert place(policy, workers, 10, 0.1, Random(1)).order == 0
    assert place(policy, workers, 500, 0.1, Random(1)).order == 1


def test_ranges_follow_what_is_seen_each_interval():
    policy, workers = Bucket(CALM), workers_of(2)
    run(policy, workers, [10, 20] * 200)
    assert place(policy, workers, 500, 8.1, Random(1)).order == 1
    run(policy, workers, [5000] * 4000, start=9.0)
    assert place(policy, workers, 500, 90.0, Random(1)).order == 0


def test_any_number_of_workers_may_come_and_go():
    policy, workers = Bucket(CALM), workers_of(6)
    run(policy, workers[:2], skewed(500))
    for count in (6, 3, 1, 5):
        used = {worker.order for _, worker in run(policy, workers[:count], skewed(500), start=10.0)}
        assert used == set(range(count))


def test_out_of_balance_the_least_burdened_takes_it_whatever_its_range():
    policy, workers = Bucket(Routing(balance_abs_threshold=100, balance_rel_threshold=1.5)), workers_of(3)
    run(policy, workers, skewed(300))
    now = 100.0
    for chars in (900, 900):
        policy.placed(call("x" * chars), workers[2], now)
    policy.placed(call("x" * 500), workers[0], now)
    assert {place(policy, workers, 5000, now, Random(i)).order for i in range(1)} == {1}


def test_within_the_thresholds_the_range_decides():
    policy, workers = Bucket(Routing(balance_abs_threshold=5000, balance_rel_threshold=1.5)), workers_of(2)
    run(policy, workers, [*[10] * 75, 500] * 10)
    for _ in range(10):  # 5,000 characters more on one worker are not more than the threshold
        assert place(policy, workers, 500, 50.0, Random(1)).order == 1
    assert place(policy, workers, 500, 50.0, Random(1)).order == 1
    assert place(policy, workers, 500, 50.0, Random(1)).order == 0


def test_what_was_sent_before_the_window_does_not_count():
    policy, workers = Bucket(Routing(balance_abs_threshold=100)), workers_of(2)
    run(policy, workers, HALVES * 10)
    policy.placed(call("x" * 100), workers[0], 100.0)
    policy.placed(call("x" * 201), workers[1], 100.0)
    assert policy.choose(call("x" * 500), workers, 104.9, Random(1)).order == 0
    assert policy.choose(call("x" * 500), workers, 105.1, Random(1)).order == 1


def test_prompts_without_text_are_spread_and_token_ids_have_a_length():
    policy, workers = Bucket(Routing()), workers_of(3)
    counts = Counter(worker.order for _, worker in run(policy, workers, [0] * 300))
    assert all(count == pytest.approx(100, abs=30) for count in counts.values()) and len(counts) == 3
    from smg.api.call import Call
    from smg.api.endpoints import GENERATE

    assert bucket_module._chars(Call(GENERATE, "m", b"", {"input_ids": [1] * 25})) == 100


def test_the_window_is_bounded_and_its_sums_are_exact(monkeypatch):
    monkeypatch.setattr(bucket_module, "WINDOW_MAX", 50)
    policy, workers = Bucket(Routing()), workers_of(3)
    run(policy, workers, skewed(400), per_second=1000.0)
    assert len(policy._window) == 50
    sums = Counter()
    for _, worker_id, chars in policy._window:
        sums[worker_id] += chars
    assert policy._sent == dict(sums)


def test_a_removed_worker_was_sent_nothing():
    policy, workers = Bucket(Routing()), workers_of(2)
    run(policy, workers, skewed(100))
    policy.removed(workers[0])
    assert workers[0].id not in policy._sent
    run(policy, workers, skewed(100), start=30.0)  # the window still adds up


def test_explain_tells_characters_and_range():
    policy, workers = Bucket(CALM), workers_of(2)
    run(policy, workers, HALVES * 10)
    rows = policy.terms(call("x" * 500), workers, 1.0, Random(1))
    assert "owns this length" in rows[1].reason and "owns" not in rows[0].reason
