"""Seeded histories of several replicas: crashes, restarts, leaves, partitions, and networks worse than any stream.

Each seed is one history; `World(seed, ...)` with the same arguments replays it. CI runs some hundreds; more with
MESH_SEEDS=10000.
"""

from __future__ import annotations

import os

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.mesh.replica_world import CONF, LOAD, PREFIX, REG, World

SEEDS = int(os.environ.get("MESH_SEEDS", "600"))
CHUNK = 50


def history(seed: int) -> World:
    """Parameters drawn from the seed."""
    world = World(
        seed,
        2 + seed % 4,
        is_relay=seed % 3 == 0,
        skew_s=float(seed % 2),
        loss=0.1 * (seed % 5 == 0),
        duplicate=0.1 * (seed % 5 == 0),
        reorder=seed % 5 == 0,
    )
    world.chaos(50)
    world.settle(25.0)
    return world


@pytest.mark.parametrize("first", range(0, SEEDS, CHUNK))
def test_all_agree_when_quiet(first: int) -> None:
    for seed in range(first, first + CHUNK):
        history(seed).check()


@pytest.mark.parametrize("seed", range(10))
def test_all_agree_also_without_a_source_of_snapshots(seed: int) -> None:
    world = World(seed, 3, has_source=False)
    world.chaos(60)
    world.settle()
    world.check()


@pytest.mark.parametrize("seed", range(10))
def test_bounds_hold_all_the_time_in_a_namespace_that_is_too_small(seed: int) -> None:
    world = World(seed, 4, cap_bytes=4000, ring_bytes=700, is_relay=seed % 2 == 0)
    for _ in range(100):
        try:
            world.chaos(1)
        except Exception as error:
            from mesh.errors import BoundError

            if not isinstance(error, BoundError):
                raise
        world.check_bounds()


@pytest.mark.parametrize("seed", range(12))
def test_nothing_comes_back_after_a_deletion(seed: int) -> None:
    """One node sleeps through the deletion and the forgetting of it."""
    world = World(seed, 4, tombstone_s=30.0, is_relay=seed % 3 == 0)
    for name in world.names:
        for key in (b"x", b"y", name.encode()):
            world.nodes[name].replica.put(REG, key, b"v", world.now)
            world.nodes[name].replica.put(CONF, key, b"v", world.now)
            world.nodes[name].conf[key] = b"v"
        world.pump(world.nodes[name])
    world.settle(5.0)
    sleeper = world.rng.choice(world.names)
    world.cut([sleeper])
    for name in world.names:
        if name != sleeper:
            world.nodes[name].replica.remove(REG, b"x", world.now)
            world.pump(world.nodes[name])
    deleter = world.rng.choice([name for name in world.names if name != sleeper])
    world.nodes[deleter].replica.remove(CONF, b"x", world.now)
    world.nodes[deleter].conf.pop(b"x", None)
    world.pump(world.nodes[deleter])
    world.run(world.rng.choice((1.0, 20.0, 90.0)))
    if seed % 4 == 0:
        world.crash(deleter)
        world.restart(deleter)
    world.settle(30.0)
    world.check()
    for node in world.nodes.values():
        assert node.replica.get(CONF, b"x") is None
        assert {owner for owner, key, _ in node.replica.items(REG) if key == b"x"} <= {sleeper}


def test_quiet_worlds_say_nothing_but_vectors() -> None:
    world = history(4)
    for node in world.nodes.values():
        for key in [k for _, k, _ in node.replica.items(LOAD, node.name)]:
            node.replica.remove(LOAD, key, world.now)
        world.pump(node)
    world.run(20.0)
    world.frames = world.bytes = 0
    world.run(100.0)
    nodes = len(world.nodes)
    assert world.frames <= nodes * 6 * (100.0 / 1.5 + 1)


def test_corrupted_users_and_maps_are_repaired() -> None:
    for seed in range(6):
        world = World(seed, 3)
        world.chaos(60, faults=False)
        world.settle(5.0)
        for node in world.nodes.values():
            for owner, keys in node.index.known.items():
                if owner != node.name and keys:
                    keys.popitem()
            store = node.replica._stores[REG]
            for log in store.logs.values():  # type: ignore[union-attr]
                if log.owner != node.name and log.entries:  # type: ignore[union-attr]
                    key = next(iter(log.entries))  # type: ignore[union-attr]
                    if log.get(key) is not None:  # type: ignore[union-attr]
                        store.bytes -= log.drop(key)  # type: ignore[union-attr]
                        del node.maps[(REG, log.owner, key)]
        world.settle(40.0)
        world.check()


Step = st.tuples(
    st.sampled_from(["act", "act", "act", "act", "crash", "restart", "leave", "cut", "heal", "wait"]),
    st.integers(0, 7),
    st.sampled_from([0.0, 0.01, 0.3, 2.0]),
)


@given(st.integers(0, 2**32), st.booleans(), st.lists(Step, max_size=50))
@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
def test_any_list_of_operations_converges(
    seed: int, is_relay: bool, steps: list[tuple[str, int, float]]
) -> None:
    """Hypothesis shrinks the list to the shortest history that breaks a promise."""
    world = World(seed, 4, is_relay=is_relay, loss=0.05 * (seed % 2), reorder=bool(seed % 2))
    for what, which, pause in steps:
        live = sorted(world.nodes)
        dead = sorted(set(world.names) - set(live))
        match what:
            case "act":
                world.act(live[which % len(live)])
            case "crash" if len(live) > 1:
                world.crash(live[which % len(live)])
            case "leave" if len(live) > 1:
                world.leave(live[which % len(live)])
            case "restart" if dead:
                world.restart(dead[which % len(dead)])
            case "cut":
                world.cut(world.names[: 1 + which % 3])
            case "heal":
                world.heal()
            case _:
                pass
        world.run(pause)
    world.settle()
    world.check()


def test_streams_of_a_thousand_appends_a_second_arrive() -> None:
    world = World(7, 3, ring_bytes=200_000)
    node = world.nodes["n0"]
    for number in range(1000):
        payload = b"k" + number.to_bytes(4, "big")
        node.index.apply("n0", payload)
        node.replica.append(PREFIX, payload, world.now)
        world.pump(node)
        world.run(0.001)
    world.run(0.3)
    for other in world.nodes.values():
        assert other.index.view() == node.index.view()
