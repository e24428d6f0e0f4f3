"""Bytes for the fuzzers of replicated state: a replica with something in every namespace, real frames of a running
pair, and mutations of them. Used by hypothesis tests and by the coverage-guided target."""

from __future__ import annotations

from functools import cache
from random import Random

from mesh.errors import DecodeError
from mesh.frames import STATE_TYPES, Frame
from mesh.replica import Replica
from tests.mesh.replica_world import CONF, HITS, LOAD, PREFIX, REG, TOKENS, World


@cache
def corpus() -> tuple[Frame, ...]:
    """Frames of every type, taken from a short history."""
    taken: list[Frame] = []
    for seed in (3, 5):
        world = World(seed, 3, is_relay=seed == 3, ring_bytes=300)
        send = world._send

        def record(source: str, target: str, frame: Frame) -> None:
            taken.append(frame)
            send(source, target, frame)  # noqa: B023

        world._send = record  # type: ignore[method-assign]
        world.chaos(60)
        world.settle(5.0)
        slept, *rest = sorted(world.nodes)
        world.cut([slept])
        for number in range(200):
            world.nodes[rest[0]].replica.append(PREFIX, b"k%04d" % number, world.now)
        world.settle(5.0)
    kinds: dict[int, list[Frame]] = {}
    for frame in taken:
        kinds.setdefault(frame.type, []).append(frame)
    return tuple(frame for frames in kinds.values() for frame in frames[:40])


def target() -> Replica:
    """A replica with entries of its own and a peer that has been heard."""
    world = World(1, 2)
    world.act("n0")
    replica = world.nodes["n0"].replica
    for namespace in (CONF, REG, LOAD):
        replica.put(namespace, b"k", b"v", world.now)
    replica.add(HITS, b"k", 1, world.now)
    replica.add(TOKENS, b"k", 1, world.now)
    replica.append(PREFIX, b"k0001", world.now)
    world.pump(world.nodes["n0"])
    world.run(1.0)
    return replica


NOW = 1001.0


def feed(replica: Replica, frame: Frame) -> bool:
    """Give a frame; True if it was refused. Raises whatever else comes, and if a refusal changed anything."""
    before = snapshot(replica)
    try:
        replica.receive("n1", frame, NOW)
    except DecodeError:
        assert snapshot(replica) == before, "a refused frame changed something"
        return True
    return False


def snapshot(replica: Replica) -> tuple[object, ...]:
    """All that a refused frame must not change."""
    return (
        replica.digest(),
        tuple(sorted(replica.stats().items())),
        tuple(replica.peers_to_send()),
        replica.deadline(),
    )


def drain(replica: Replica, now: float) -> None:
    """Whatever was taken in must not hurt later: tick, send, tell."""
    replica.tick(now)
    for peer in replica.peers_to_send():
        replica.frames_to_send(peer, now)
    while replica.next_change() is not None:
        pass


def mutate(rng: Random, frame: Frame) -> Frame:
    """One to three small changes."""
    body = bytearray(frame.body)
    for _ in range(rng.randrange(1, 4)):
        at = rng.randrange(len(body) + 1)
        match rng.randrange(6):
            case 0 if body:
                body[at % len(body)] = rng.randrange(256)
            case 1:
                del body[at:]
            case 2:
                body[at:at] = rng.choice(
                    (
                        b"\xc0",
                        b"\x90",
                        b"\xdd\xff\xff\xff\xff",
                        b"\xcf" + b"\xff" * 8,
                        b"\xc6\x7f\xff\xff\xff",
                    )
                )
            case 3 if body:
                body[at % len(body)] ^= 1 << rng.randrange(8)
            case 4:
                other = rng.choice(corpus()).body
                body[at : at + rng.randrange(20)] = other[rng.randrange(len(other) + 1) :][:20]
            case _:
                del body[at : at + rng.randrange(1, 5)]
    return Frame(rng.choice(sorted(STATE_TYPES)) if rng.random() < 0.1 else frame.type, bytes(body))
