"""`consistent_hashing`: keys stay, move when they must, and then stay there (RT-6)."""

from __future__ import annotations

from collections import Counter
from random import Random

import pytest

from smg.fleet.worker import Status, WorkerSpec
from smg.policies import consistent_hash
from smg.policies.consistent_hash import ConsistentHash
from smg.settings import Routing
from tests.smg.fleet.builders import call, fleet, url_of

KEYS = [f"session-{i}" for i in range(600)]


def serve(policy: ConsistentHash, workers, keys=KEYS, now: float = 1.0) -> dict[str, int]:
    """Places one call per key; worker order by key."""
    homes = {}
    for key in keys:
        worker = policy.choose(call(key=key), workers, now, Random(1))
        policy.placed(call(key=key), worker, now)
        homes[key] = worker.order
    return homes


def setup(count: int = 5):
    registry, _ = fleet(count)
    return registry, registry.pool("m"), ConsistentHash(Routing())


def test_a_key_goes_where_it_went_and_keys_spread():
    _, pool, policy = setup()
    homes = serve(policy, pool.candidates(1.0))
    assert serve(policy, pool.candidates(2.0)) == homes
    counts = Counter(homes.values())
    assert len(counts) == 5 and min(counts.values()) > 0.5 * 120


def test_another_node_places_keys_alike():
    _, pool, one = setup()
    _, other_pool, other = setup()
    assert serve(one, pool.candidates(1.0)) == serve(other, other_pool.candidates(1.0))


def test_a_new_worker_takes_its_share_and_no_other_key_moves():
    registry, pool, policy = setup()
    before = serve(policy, pool.candidates(1.0))
    new = registry.add(WorkerSpec(url_of(9), model_id="m"), 2.0)
    after = serve(policy, pool.candidates(2.0), now=2.0)
    moved = [key for key in KEYS if before[key] != after[key]]
    assert {after[key] for key in moved} == {new.order}
    assert len(moved) / len(KEYS) == pytest.approx(1 / 6, abs=0.07)


def test_only_keys_of_the_lost_worker_move_and_they_stay_when_it_comes_back():
    registry, pool, policy = setup()
    before = serve(policy, pool.candidates(1.0))
    lost = registry.workers()[2]
    registry.set_status(lost, Status.NOT_READY, 2.0)
    during = serve(policy, pool.candidates(2.0), now=2.0)
    for key in KEYS:
        assert (before[key] != during[key]) == (before[key] == lost.order)
    registry.set_status(lost, Status.READY, 3.0)
    assert serve(policy, pool.candidates(3.0), now=3.0) == during
    # A key that was not asked for meanwhile finds its worker again.
    quiet = [f"quiet-{i}" for i in range(200)]
    other = ConsistentHash(Routing())
    homes = serve(other, pool.candidates(3.0), quiet)
    registry.set_status(lost, Status.NOT_READY, 4.0)
    registry.set_status(lost, Status.READY, 5.0)
    assert serve(other, pool.candidates(5.0), quiet, now=5.0) == homes


def test_a_moved_key_moves_on_when_its_new_worker_is_lost_too():
    registry, pool, policy = setup(3)
    before = serve(policy, pool.candidates(1.0))
    registry.set_status(registry.workers()[0], Status.NOT_READY, 2.0)
    serve(policy, pool.candidates(2.0), now=2.0)
    registry.set_status(registry.workers()[0], Status.READY, 3.0)
    registry.set_status(registry.workers()[1], Status.NOT_READY, 3.0)
    after = serve(policy, pool.candidates(3.0), now=3.0)
    assert 1 not in after.values()
    assert all(after[key] == 2 for key in KEYS if before[key] == 2)


def test_a_retry_elsewhere_does_not_move_the_key():
    _, pool, policy = setup()
    key = KEYS[0]
    home = policy.choose(call(key=key), pool.candidates(1.0), 1.0, Random(1))
    policy.placed(call(key=key), home, 1.0)
    others = [worker for worker in pool.candidates(1.0) if worker is not home]
    second = policy.choose(call(key=key), others, 1.0, Random(1))
    policy.placed(call(key=key), second, 1.0)
    assert policy.choose(call(key=key), pool.candidates(1.0), 1.0, Random(1)) is home


def test_a_named_worker_does_not_move_the_key():
    registry, pool, policy = setup()
    before = serve(policy, pool.candidates(1.0), KEYS[:50])
    for key in KEYS[:50]:
        policy.placed(call(key=key, target="0"), registry.workers()[0], 1.0)
    assert serve(policy, pool.candidates(1.0), KEYS[:50]) == before


def test_keys_that_moved_to_a_removed_worker_are_free():
    registry, pool, policy = setup(3)
    workers = registry.workers()
    serve(policy, pool.candidates(1.0))
    registry.set_status(workers[0], Status.NOT_READY, 1.0)
    serve(policy, pool.candidates(1.0))
    assert workers[1].id in policy._moved.values()
    policy.removed(workers[1])
    assert workers[1].id not in policy._moved.values()
    assert workers[1].id not in policy._members.ring


def test_without_a_key_chance_decides():
    _, pool, policy = setup(4)
    rng = Random(2)
    counts = Counter(policy.choose(call(), pool.candidates(1.0), 1.0, rng).order for _ in range(4000))
    assert all(900 < counts[order] < 1100 for order in range(4))


def test_moved_keys_are_bounded(monkeypatch):
    monkeypatch.setattr(consistent_hash, "MOVED_MAX", 20)
    registry, pool, policy = setup(2)
    serve(policy, pool.candidates(1.0))
    registry.set_status(registry.workers()[0], Status.NOT_READY, 1.0)
    serve(policy, pool.candidates(1.0))
    assert len(policy._moved) == 20


def test_branches_count_what_decided():
    registry, pool, policy = setup(2)
    worker = registry.workers()[0]
    policy.placed(call(key="k"), policy.choose(call(key="k"), pool.candidates(1.0), 1.0, Random(1)), 1.0)
    policy.placed(call(), worker, 1.0)
    policy.placed(call(target="0"), worker, 1.0)
    assert policy.branches == {"target_worker_hit": 1, "routing_key_hit": 1, "random_fallback": 1}
