"""`manual`, the sticky map, and `--routing-key-override` (RT-5, RT-6)."""

from __future__ import annotations

from collections import Counter
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from smg.fleet.worker import Status
from smg.policies import POLICIES, sticky_map
from smg.policies.manual import Manual
from smg.policies.round_robin import RoundRobin
from smg.policies.sticky_key import StickyKey
from smg.policies.sticky_map import HIT, MISS, VACANT, StickyMap
from smg.settings import Routing
from tests.smg.fleet.builders import call, fleet, workers_of


class Shop:
    """A fleet with a policy in front, served call by call."""

    def __init__(self, policy, count: int = 3, seed: int = 1) -> None:
        self.registry, self.workers = fleet(count)
        self.pool = self.registry.pool("m")
        self.policy = policy
        self.rng = Random(seed)
        self.now = 1.0

    def serve(self, key: str | None, candidates=None, text: str = "hello") -> int:
        given = self.pool.candidates(self.now) if candidates is None else candidates
        worker = self.policy.choose(call(text, key=key), given, self.now, self.rng)
        self.policy.placed(call(text, key=key), worker, self.now)
        return worker.order

    def lose(self, order: int) -> None:
        self.registry.set_status(self.workers[order], Status.NOT_READY, self.now)

    def regain(self, order: int) -> None:
        self.registry.set_status(self.workers[order], Status.READY, self.now)


def sticky_policies():
    return [Manual(Routing()), *(StickyKey(POLICIES[name](Routing()), 3600.0) for name in POLICIES)]


@pytest.mark.parametrize(
    "policy", sticky_policies(), ids=lambda policy: f"{type(policy).__name__}-{policy.name}"
)
def test_a_key_moves_only_when_its_worker_is_no_candidate_and_then_stays_where_it_went(policy):
    shop = Shop(policy)
    keys = [f"key-{i}" for i in range(30)]
    homes = {key: shop.serve(key, text=f"prompt of {key}") for key in keys}
    for round_ in range(3):
        assert {key: shop.serve(key, text=f"another prompt {round_}") for key in keys} == homes
    lost = homes[keys[0]]
    shop.lose(lost)
    moved = {key: shop.serve(key, text="x") for key in keys}
    for key in keys:
        assert moved[key] != lost
        if homes[key] != lost:
            assert moved[key] == homes[key]
    shop.regain(lost)
    assert {key: shop.serve(key, text="y") for key in keys} == moved


def test_a_key_prefers_the_worker_it_had_before_when_it_must_move_again():
    shop = Shop(Manual(Routing()), count=5)
    first = shop.serve("k")
    shop.lose(first)
    second = shop.serve("k")
    shop.regain(first)
    shop.lose(second)
    assert shop.serve("k") == first
    shop.regain(second)
    assert shop.serve("k") == first


def test_a_new_worker_moves_no_key():
    shop = Shop(Manual(Routing()), count=2)
    homes = {f"k{i}": shop.serve(f"k{i}") for i in range(20)}
    shop.registry.add(type(shop.workers[0].spec)("http://new:1", model_id="m"), 2.0)
    assert {key: shop.serve(key) for key in homes} == homes


def test_a_retry_elsewhere_does_not_move_the_key():
    shop = Shop(Manual(Routing()))
    home = shop.serve("k")
    others = [worker for worker in shop.workers if worker.order != home]
    assert shop.serve("k", others) != home
    assert shop.serve("k") == home


def test_a_named_worker_does_not_move_the_key():
    shop = Shop(Manual(Routing()))
    home = shop.serve("k")
    other = shop.workers[(home + 1) % 3]
    shop.policy.placed(call(key="k", target=other.id), other, shop.now)
    assert shop.serve("k") == home


def test_a_call_without_a_key_is_not_remembered():
    shop = Shop(Manual(Routing()))
    counts = Counter(shop.serve(None) for _ in range(300))
    assert set(counts) == {0, 1, 2} and shop.policy.entries == 0


def test_random_assignment_spreads_new_keys():
    shop = Shop(Manual(Routing(assignment_mode="random")))
    counts = Counter(shop.serve(f"k{i}") for i in range(3000))
    assert all(850 < counts[order] < 1150 for order in range(3))


def test_min_load_gives_a_new_key_to_the_least_loaded():
    shop = Shop(Manual(Routing(assignment_mode="min_load")))
    for worker, in_flight in zip(shop.workers, (2, 1, 3), strict=True):
        worker.in_flight = in_flight
    assert {shop.serve(f"k{i}") for i in range(10)} == {1}
    shop.workers[1].in_flight = 9
    assert shop.serve("k0") == 1  # known keys stay


def test_min_group_gives_every_worker_as_many_keys():
    shop = Shop(Manual(Routing(assignment_mode="min_group")), count=4)
    counts = Counter(shop.serve(f"k{i}") for i in range(40))
    assert set(counts.values()) == {10}
    shop.lose(0)
    for i in range(40):
        shop.serve(f"k{i}")
    keys = [shop.policy._map.keys_of(worker) for worker in shop.workers]
    assert keys[0] == 0 and sum(keys) == 40 and max(keys) - min(keys[1:]) <= 1


def test_idle_keys_are_forgotten():
    shop = Shop(Manual(Routing(max_idle_secs=10.0)), count=20)
    homes = {f"k{i}": shop.serve(f"k{i}") for i in range(50)}
    shop.now += 9.0
    assert shop.serve("k0") == homes["k0"]
    shop.now += 9.0
    assert shop.serve("k0") == homes["k0"]  # used within the time
    for i in range(60):
        shop.serve(f"new{i}")
    assert shop.policy.entries == 61
    shop.now += 100.0
    assert shop.policy._map.worker_of("k0", {w.id: w for w in shop.workers}, shop.now) is None


def test_an_idle_key_starts_anew_where_it_is_sent():
    workers = workers_of(2)
    members = {worker.id: worker for worker in workers}
    keys = StickyMap(10.0)
    for i in range(5):
        keys.place(f"older{i}", workers[0], 0.0)
    keys.place("k", workers[0], 0.0)
    assert keys.place("k", workers[1], 50.0) == VACANT
    assert keys.worker_of("k", members, 50.0) is workers[1]


def test_the_map_is_bounded_and_drops_the_longest_unused(monkeypatch):
    monkeypatch.setattr(sticky_map, "KEYS_MAX", 3)
    workers = workers_of(2)
    members = {worker.id: worker for worker in workers}
    keys = StickyMap(1e9)
    for key in ("a", "b", "c"):
        keys.place(key, workers[0], 1.0)
    keys.place("a", workers[0], 2.0)
    keys.place("d", workers[1], 3.0)
    assert len(keys) == 3
    assert keys.worker_of("b", members, 3.0) is None
    assert keys.worker_of("a", members, 3.0) is workers[0]
    assert (keys.keys_of(workers[0]), keys.keys_of(workers[1])) == (2, 1)


def test_a_removed_worker_owns_no_key_even_when_it_comes_back():
    shop = Shop(Manual(Routing()), count=2)
    keys = [f"k{i}" for i in range(40)]
    for key in keys:
        shop.serve(key)
    old = shop.workers[0]
    shop.policy.removed(old)
    members = {worker.id: worker for worker in (workers_of(1)[0], shop.workers[1])}
    assert next(iter(members)) == old.id
    owners = {shop.policy._map.worker_of(key, members, 2.0) for key in keys}
    assert owners == {None, shop.workers[1]}


def test_a_forgotten_worker_owns_nothing_under_the_same_record_either():
    workers = workers_of(2)
    members = {worker.id: worker for worker in workers}
    keys = StickyMap(100.0)
    keys.place("k", workers[0], 0.0)
    keys.forget(workers[0])
    assert keys.worker_of("k", members, 0.0) is None and keys.keys_of(workers[0]) == 0
    assert keys.place("k", workers[1], 0.0) == MISS
    assert keys.worker_of("k", members, 0.0) is workers[1]


def test_a_flush_leaves_keys_where_they_are():
    shop = Shop(Manual(Routing()))
    home = shop.serve("k")
    shop.policy.flushed(shop.workers[home])
    assert shop.serve("k") == home


def test_branches_count_what_decided():
    shop = Shop(Manual(Routing()))
    home = shop.serve("k")
    shop.serve("k")
    shop.serve(None)
    shop.lose(home)
    shop.serve("k")
    assert shop.policy.branches == {HIT: 1, MISS: 1, VACANT: 1, "no_routing_id": 1}
    assert shop.policy.entries == 1


def test_explain_marks_the_keys_worker():
    shop = Shop(Manual(Routing()))
    home = shop.serve("k")
    rows = shop.policy.terms(call(key="k"), shop.workers, 1.0, Random(1))
    assert [("holds" in row.reason) for row in rows] == [order == home for order in range(3)]


def test_under_override_calls_without_a_key_follow_the_inner_policy():
    shop = Shop(StickyKey(RoundRobin(Routing()), 60.0))
    assert [shop.serve(None) for _ in range(6)] == [0, 1, 2, 0, 1, 2]
    assert shop.policy.entries == 0


STEPS = st.lists(
    st.tuples(
        st.sampled_from(["place", "place", "down", "up", "forget", "later"]),
        st.integers(0, 4),
        st.integers(0, 3),
    ),
    max_size=120,
)


@given(STEPS)
@settings(max_examples=60, deadline=None)
def test_under_any_history_counts_of_keys_are_exact(steps):
    workers = list(workers_of(4))
    keys = StickyMap(20.0)
    now = 0.0
    for what, key, index in steps:
        worker = workers[index]
        if what == "place":
            keys.place(f"k{key}", worker, now)
        elif what == "down":
            worker.status = Status.NOT_READY
        elif what == "up":
            worker.status = Status.READY
        elif what == "forget":
            keys.forget(worker)
            workers[index] = workers_of(4)[index]
        else:
            now += 7.0 * (key + 1)
        entries = keys._entries.values()
        for current in workers:
            held = sum(entry.holder.worker is current and not entry.holder.is_gone for entry in entries)
            assert keys.keys_of(current) == held
        used = [entry.used_s for entry in entries]
        assert used == sorted(used)
