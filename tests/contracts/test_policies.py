"""What every policy of the table keeps, whatever it is for. A new line in `POLICIES` runs here by itself."""

from __future__ import annotations

from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from smg.api.call import Call
from smg.fleet import load
from smg.fleet.worker import Worker
from smg.policies import POLICIES
from smg.policies.policy import Outcome, Policy, Terms, Wants
from smg.policies.sticky_key import StickyKey
from smg.settings import Routing
from tests.smg.fleet.builders import call, reported, workers_of

DONE = Outcome(200, True, duration_s=1.0)


def made(name: str, routing: Routing | None = None) -> Policy:
    """A policy by name; `sticky:x` is x under `--routing-key-override`."""
    plain = name.removeprefix("sticky:")
    policy = POLICIES[plain](routing or Routing())
    return policy if plain == name else StickyKey(policy, 3600.0)


NAMES = [*POLICIES, *(f"sticky:{name}" for name in POLICIES)]
every_policy = pytest.mark.parametrize("name", NAMES)

TEXTS = ["", "short", "x" * 300, "the quick brown fox " * 40]
KEYS = [None, "session-1", "session-2", "k" * 4000, "ключ"]
STEPS = st.lists(
    st.tuples(
        st.sampled_from(["call", "call", "call", "end", "report", "removed", "flushed", "other"]),
        st.integers(0, 10**6),
        st.sampled_from(TEXTS),
        st.sampled_from(KEYS),
    ),
    max_size=40,
)


class History:
    """Traffic on a small fleet: what a policy has lived through."""

    def __init__(self, policy: Policy, workers: tuple[Worker, ...]) -> None:
        self.policy = policy
        self.workers = workers
        self.rng = Random(7)
        self.now = 0.0
        self.open: list[tuple[Call, Worker]] = []

    def candidates(self, pick: int) -> tuple[Worker, ...]:
        """Some of the workers, at least one, in order of registration."""
        mask = pick % (2 ** len(self.workers) - 1) + 1
        return tuple(worker for i, worker in enumerate(self.workers) if mask >> i & 1)

    def run(self, steps) -> None:
        for what, pick, text, key in steps:
            self.now += pick % 7 * 0.3
            worker = self.workers[pick % len(self.workers)]
            if what in ("call", "other"):
                made_call = call(text, key=key, target=worker.id if what == "other" else None)
                if what == "call":
                    chosen = self.policy.choose(made_call, self.candidates(pick), self.now, self.rng)
                    assert chosen is not None
                    worker = chosen
                load.begin(worker, len(text))
                self.policy.placed(made_call, worker, self.now)
                self.open.append((made_call, worker))
            elif what == "end" and self.open:
                made_call, worker = self.open.pop(pick % len(self.open))
                load.end(worker, len(made_call.text()))
                self.policy.finished(made_call, worker, DONE, self.now)
            elif what == "report":
                reported(worker, self.now, self.now + 3.0, waiting=pick % 5, kv_usage=pick % 10 / 10)
            elif what == "removed":
                self.policy.removed(worker)
            elif what == "flushed":
                self.policy.flushed(worker)


@every_policy
@given(STEPS, st.integers(0, 10**6), st.sampled_from(TEXTS), st.sampled_from(KEYS))
@settings(max_examples=15, deadline=None)
def test_the_choice_is_a_candidate_and_none_only_without_any(name, steps, pick, text, key):
    history = History(made(name), workers_of(4))
    history.run(steps)
    candidates = history.candidates(pick)
    chosen = history.policy.choose(call(text, key=key), candidates, history.now, Random(pick))
    assert chosen in candidates
    assert history.policy.choose(call(text, key=key), (), history.now, Random(pick)) is None
    assert history.policy.choose(call(text, key=key), list(candidates), history.now, Random(pick)) is chosen


@every_policy
@given(STEPS, st.integers(0, 10**6), st.sampled_from(TEXTS), st.sampled_from(KEYS))
@settings(max_examples=15, deadline=None)
def test_equal_inputs_and_an_equal_seed_give_an_equal_choice(name, steps, pick, text, key):
    histories = [History(made(name), workers_of(4)) for _ in range(2)]
    chosen = []
    for history in histories:
        history.run(steps)
        worker = history.policy.choose(
            call(text, key=key), history.candidates(pick), history.now, Random(pick)
        )
        assert worker is not None
        chosen.append(worker.id)
    assert chosen[0] == chosen[1]


@every_policy
@given(STEPS, st.integers(0, 10**6), st.lists(st.sampled_from(TEXTS), min_size=1, max_size=6))
@settings(max_examples=15, deadline=None)
def test_choosing_and_explaining_change_nothing(name, steps, pick, asked):
    """Two policies live the same life, one of them is asked all the time: they go on alike."""
    quiet, asked_often = (History(made(name), workers_of(4)) for _ in range(2))
    quiet.run(steps)
    for step in steps:
        candidates = asked_often.candidates(step[1])
        question = call(step[2], key=step[3])
        asked_often.policy.choose(question, candidates, asked_often.now, Random(1))
        asked_often.policy.terms(question, candidates, asked_often.now, Random(1))
        asked_often.run([step])
    assert quiet.now == asked_often.now
    for text in asked:
        for key in KEYS:
            one, two = (
                history.policy.choose(
                    call(text, key=key), history.candidates(pick), history.now, Random(pick)
                )
                for history in (quiet, asked_often)
            )
            assert one is not None and two is not None and one.id == two.id


@every_policy
def test_choosing_leaves_the_load_alone(name):
    workers = workers_of(3)
    policy = made(name)
    for text in TEXTS:
        policy.choose(call(text, key="k"), workers, 1.0, Random(1))
    assert all(
        worker.in_flight == worker.sent_since_report == worker.chars_in_flight == 0 for worker in workers
    )


@every_policy
@pytest.mark.parametrize("in_flight", [0, 1, 5000])
def test_no_amount_in_flight_makes_a_policy_choose_nobody(name, in_flight):
    workers = workers_of(3)
    for worker in workers:
        worker.in_flight = in_flight
    for key in KEYS:
        for text in TEXTS:
            assert made(name).choose(call(text, key=key), workers, 1.0, Random(1)) in workers


@every_policy
def test_a_single_candidate_is_chosen_whatever_it_carries(name):
    (worker,) = workers_of(1)
    worker.in_flight = 10_000
    reported(worker, waiting=500, kv_usage=1.0)
    policy = made(name)
    for key in KEYS:
        for text in TEXTS:
            assert policy.choose(call(text, key=key), (worker,), 1.0, Random(1)) is worker


@every_policy
@given(STEPS, st.integers(0, 10**6), st.sampled_from(TEXTS), st.sampled_from(KEYS))
@settings(max_examples=10, deadline=None)
def test_terms_are_the_candidates_in_order_and_the_cheapest_is_chosen(name, steps, pick, text, key):
    history = History(made(name), workers_of(4))
    history.run(steps)
    candidates = history.candidates(pick)
    rows = history.policy.terms(call(text, key=key), candidates, history.now, Random(pick))
    assert [row.worker_id for row in rows] == [worker.id for worker in candidates]
    assert all(isinstance(row, Terms) for row in rows)
    assert history.policy.terms(call(text, key=key), candidates, history.now, Random(pick)) == rows
    costs = [row.cost for row in rows if row.cost is not None]
    if len(costs) == len(rows) and not history.policy.is_random and key is None:
        chosen = history.policy.choose(call(text, key=key), candidates, history.now, Random(pick))
        assert chosen is not None
        cost = next(row.cost for row in rows if row.worker_id == chosen.id)
        assert cost == min(costs)


@every_policy
def test_the_record_of_a_removed_worker_is_never_chosen_again(name):
    """Also not when a worker comes back under the same id, which makes a new record."""
    policy = made(name)
    old = workers_of(3)
    keys = [f"key-{i}" for i in range(60)]
    for key in keys:
        worker = policy.choose(call("text " + key, key=key), old, 1.0, Random(3))
        assert worker is not None
        policy.placed(call("text " + key, key=key), worker, 1.0)
        policy.finished(call("text " + key, key=key), worker, DONE, 1.5)
    policy.removed(old[1])
    left = (old[0], old[2])
    for key in keys:
        assert policy.choose(call("text " + key, key=key), left, 2.0, Random(3)) in left
    back = (old[0], workers_of(3)[1], old[2])
    for key in keys:
        worker = policy.choose(call("text " + key, key=key), back, 3.0, Random(3))
        assert worker in back and worker is not old[1]


@every_policy
@given(STEPS, STEPS, st.sampled_from(TEXTS), st.sampled_from(KEYS))
@settings(max_examples=10, deadline=None)
def test_models_never_influence_each_other(name, mine, others, text, key):
    """The same life, once beside a second model with the same texts and keys, once alone (RT-8)."""
    alone, beside = (History(made(name), workers_of(3)) for _ in range(2))
    stranger = History(made(name), workers_of(3))
    alone.run(mine)
    for index in range(max(len(mine), len(others))):
        beside.run(mine[index : index + 1])
        stranger.run(others[index : index + 1])
    one, two = (
        history.policy.choose(call(text, key=key), history.workers, history.now, Random(5))
        for history in (alone, beside)
    )
    assert one is not None and two is not None and one.id == two.id


@every_policy
def test_a_policy_knows_its_name_and_what_it_wants(name):
    policy = made(name)
    assert policy.name == name.removeprefix("sticky:")
    assert isinstance(policy.wants, Wants)
    if name.startswith("sticky:"):
        assert Wants.KEY in policy.wants


@every_policy
def test_who_does_not_want_text_never_reads_it(name):
    policy = made(name)
    if Wants.TEXT in policy.wants:
        return
    workers = workers_of(3)
    question = call("never read", key=None)
    for _ in range(5):
        worker = policy.choose(question, workers, 1.0, Random(1))
        assert worker is not None
        policy.placed(question, worker, 1.0)
        policy.finished(question, worker, DONE, 2.0)
    assert question._text is None
