"""The ring: shares, movement, and that nothing depends on the order of arrival."""

from __future__ import annotations

from collections import Counter
from uuid import NAMESPACE_URL, uuid5

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from smg.fleet import hash_ring
from smg.fleet.hash_ring import POINTS, HashRing, position_of

KEYS = [position_of(f"key-{i}") for i in range(10_000)]


def ids(count: int) -> list[str]:
    return [str(uuid5(NAMESPACE_URL, f"http://w{i}")) for i in range(count)]


def ring_of(names: list[str]) -> HashRing:
    ring = HashRing()
    ring.add(names)
    return ring


@pytest.mark.parametrize("count", [2, 5, 10, 20])
def test_every_worker_gets_about_its_share(count: int):
    names = ids(count)
    ring = ring_of(names)
    shares = Counter(ring.owner(key, set(names)) for key in KEYS)
    mean = len(KEYS) / count
    assert set(shares) == set(names)
    assert min(shares.values()) > 0.65 * mean
    assert max(shares.values()) < 1.4 * mean


@pytest.mark.parametrize("count", [3, 10, 20])
def test_one_worker_more_takes_about_its_share_and_moves_no_other_key(count: int):
    names = ids(count + 1)
    old, new = ring_of(names[:-1]), ring_of(names)
    moved = 0
    for key in KEYS:
        before, after = old.natural_owner(key), new.natural_owner(key)
        if before != after:
            assert after == names[-1]
            moved += 1
    assert 0.6 / (count + 1) < moved / len(KEYS) < 1.5 / (count + 1)


@given(
    st.lists(st.sampled_from(ids(8)), unique=True, min_size=1),
    st.lists(st.sampled_from(ids(8)), unique=True),
    st.randoms(use_true_random=False),
)
@settings(max_examples=50, deadline=None)
def test_who_owns_a_key_depends_only_on_who_is_there(members: list[str], gone: list[str], rng):
    one = ring_of(members)
    for name in gone:
        one.discard(name)
    left = [name for name in members if name not in gone]
    rng.shuffle(left)
    other = HashRing()
    for name in left:
        other.add([name])
    assert len(one) == len(other) == len(left)
    for key in KEYS[:200]:
        assert one.natural_owner(key) == other.natural_owner(key)
        # Stepping over somebody is the same as his not being there.
        assert ring_of(members).owner(key, set(left)) == one.natural_owner(key)


def test_the_walk_goes_once_around_and_begins_with_the_owner():
    names = ids(4)
    ring = ring_of(names)
    for key in (0, KEYS[0], 2**64 - 1):
        walk = list(ring.clockwise(key))
        assert len(walk) == 4 * POINTS
        assert set(walk) == set(names)
        assert walk[0] == ring.natural_owner(key) == ring.owner(key, set(names))


def test_nobody_owns_anything_on_an_empty_ring_or_when_nobody_is_allowed():
    assert HashRing().owner(1, {"a"}) is None
    assert HashRing().natural_owner(1) is None
    assert ring_of(ids(3)).owner(1, set()) is None


def test_two_workers_on_one_point_are_told_apart_by_name_not_by_arrival(monkeypatch):
    monkeypatch.setattr(hash_ring, "xxh3_64_intdigest", lambda name, seed=0: seed)
    for order in (["a", "b"], ["b", "a"]):
        ring = HashRing()
        for name in order:
            ring.add([name])
        assert {ring.natural_owner(position) for position in range(POINTS)} == {"a"}


def test_adding_twice_and_taking_off_strangers_change_nothing():
    names = ids(3)
    ring = ring_of(names)
    ring.add(names)
    ring.discard("stranger")
    assert len(list(ring.clockwise(0))) == 3 * POINTS
    assert names[0] in ring and "stranger" not in ring
