"""What waits on a worker is asked for at every decision: what is remembered for that must be what the sum says."""

from __future__ import annotations

from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from smg.fleet.service_model import PrefillModel
from smg.fleet.worker import LoadReport
from smg.policies.account import Account, Open
from smg.policies.neighbours import Question
from tests.smg.fleet.builders import workers_of
from tests.smg.policies.site import Site, text_of

QUESTION = Question((), 100, 1.0, None, 400)


def sent(seconds: float, now: float, is_stream: bool) -> Open:
    return Open(object(), seconds, now, is_stream, 0, QUESTION)


@given(st.integers(0, 2**32), st.booleans())
@settings(max_examples=100, deadline=None)
def test_until_the_oldest_should_be_over_the_wait_is_the_end_of_all_less_now(seed, is_shared):
    rng = Random(seed)
    account = Account(PrefillModel(), is_shared=is_shared)
    now, keys = 10.0, []
    for key in range(60):
        now += rng.choice([0.0, 0.01, 0.3])
        step = rng.randrange(5)
        if step < 2 or not keys:
            request = account.placed[key] = sent(rng.choice([0.0, 0.05, 0.5]), now, rng.random() < 0.5)
            account.place(key, request)
            keys.append(key)
        elif step == 4:
            before = account.seconds
            account.rescale(0.5)
            assert account.seconds == pytest.approx(before / 2)
        else:
            gone = keys.pop(rng.randrange(len(keys)))
            if step == 2:
                account.first_byte(gone, 1.0, now)
            account.end(gone, now)
            del account.placed[gone]
        if now < account.head_until_s:
            assert account.busy_until_s - now == pytest.approx(account.own_s(now), abs=1e-9)
        if not account.open:
            assert account.seconds == 0.0
            assert account.own_s(now) == 0.0
            assert not now < account.head_until_s


def test_without_peers_the_level_begins_with_the_first_report_of_others():
    (worker,) = workers_of(1)
    account = Account(PrefillModel(), is_shared=False)
    account.place(1, sent(2.0, 10.0, is_stream=True))
    account.place(2, sent(3.0, 10.5, is_stream=True))
    worker.in_flight = 2
    account.note(worker, LoadReport(11.0, running=4, waiting=0), 1.0)
    assert account.has_others
    assert account.level_s(11.0) == pytest.approx(4.0)
    account.place(3, sent(1.0, 12.0, is_stream=True))
    assert account.level_s(12.0) > account.own_s(12.0) - 1e-9


def test_what_was_booked_with_a_wrong_pace_is_corrected_with_it():
    """At first a fit may be ten times too slow; what waits by it must not be believed for as long as that."""
    site = Site(workers_of(2))
    asked, worker = site.send(text_of(1, 40))
    site.send(text_of(2, 40), to=worker)
    before = site.rows("x")[worker.id].wait
    site.answer(asked, worker, after_s=before / 100, prompt_tokens=asked_tokens(asked, site), cached_tokens=0)
    after = site.rows("x")[worker.id].wait
    assert after < 0.8 * before / 2


def asked_tokens(asked, site):
    return site.policy.question(asked).tokens


def test_what_waits_is_never_more_than_the_requests_that_the_worker_tells_of():
    """Peers told of work by a pace that was ten times too slow; nothing of ours is there whose first byte would tell."""
    (worker,) = workers_of(1)
    account = Account(PrefillModel())
    account.silent_until_s = float(
        "inf"
    )  # this engine counts requests that wait for their prefill as running
    for number in range(6):
        account.peer_placed(2.0 if number < 4 else 0.5, 10.0 + number / 10)
    assert account.level_s(10.5) > 8.0
    account.note(worker, LoadReport(11.0, running=2, waiting=0), 1.0)
    assert account.level_s(11.0) == pytest.approx(1.0)
    account.note(worker, LoadReport(11.5, running=0, waiting=0), 1.0)
    assert account.level_s(11.5) == 0.0


def test_a_report_does_not_end_what_a_peer_had_sent_just_before_it():
    (worker,) = workers_of(1)
    account = Account(PrefillModel())
    account.peer_placed(1.0, 10.99)
    account.note(worker, LoadReport(11.0, running=0, waiting=0), 1.0)
    assert account.has_others
    assert account.level_s(11.0) == pytest.approx(0.99)
    account.note(worker, LoadReport(11.2, running=0, waiting=0), 1.0)
    assert account.level_s(11.2) == 0.0


def test_late_news_counts_where_the_engine_tells_of_no_queue():
    """Its reports say that nothing waits, whatever waits: that two were sent since does not mean that the first is over."""
    (worker,) = workers_of(1)
    account = Account(PrefillModel())
    account.silent_until_s = float("inf")
    account.note(worker, LoadReport(9.0, running=1, waiting=0), 1.0)
    account.place(1, sent(0.5, 10.5, is_stream=True))
    account.place(2, sent(0.5, 10.6, is_stream=True))
    worker.in_flight = 2
    account.note(worker, LoadReport(10.7, running=3, waiting=0), 1.0)
    before = account.level_s(10.7)
    account.peer_placed(3.0, 10.4)
    assert account.level_s(10.7) >= before + 3.0


def test_what_we_have_sent_and_seen_end_just_before_a_report_is_nobody_elses():
    (worker,) = workers_of(1)
    account = Account(PrefillModel(), is_shared=True)
    for key in range(20):
        account.place(key, sent(0.01, 10.0 + key / 1000, is_stream=True))
        account.first_byte(key, 1.0, 10.0 + key / 1000)
        account.end(key, 10.0 + key / 1000)
    account.note(worker, LoadReport(10.03, running=0, waiting=0), 1.0)
    assert not account.has_others
