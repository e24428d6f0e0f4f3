"""Bad news travels, makes others look, and decides nothing."""

from __future__ import annotations

import trio

from mesh import Ephemeral
from smg.bridge.health import HEALTH, LOOK_AGAIN_S, SharedHealth
from smg.bridge.words import BREAKS, FAILS, REFUSES
from smg.fleet.breaker import BreakerRules
from smg.fleet.health import HealthRules
from smg.fleet.worker import Status, WorkerSpec
from tests.smg.bridge.wire import Wire
from tests.smg.fleet.builders import registry


class Node:
    def __init__(self, wire: Wire, name: str, *peers: str) -> None:
        self.registry = registry(health=HealthRules(), breaker=BreakerRules(failure_threshold=1))
        self.worker = self.registry.add(WorkerSpec(url="http://w:1"), 0.0)
        self.registry.set_status(self.worker, Status.READY, 0.0)
        self.probed: list[float] = []
        self.peers = list(peers)
        self.health = SharedHealth(
            wire[name].state,
            self.registry,
            name=name,
            probe=lambda worker: self.probed.append(trio.current_time()),
            live=lambda: self.peers,
        )
        wire[name].hear[HEALTH] = lambda change: self.health.on_change(change, trio.current_time())

    def become(self, status: Status) -> None:
        self.registry.set_status(self.worker, status, trio.current_time())
        self.health.refresh(trio.current_time())


def pair() -> tuple[Wire, Node, Node]:
    wire = Wire(**{name: [Ephemeral(name=HEALTH, coalesce_s=0.0)] for name in "ab"})
    nodes = Node(wire, "a", "b"), Node(wire, "b", "a")
    wire.run()
    return wire, *nodes


async def test_bad_news_makes_the_other_look_and_good_news_ends_it(autojump_clock):
    wire, a, b = pair()
    a.become(Status.NOT_READY)
    wire.run()
    assert b.health.of(b.worker.id) == {"a": REFUSES}
    assert len(b.probed) == 1
    assert b.worker.status is Status.READY
    a.become(Status.FAILED)
    wire.run()
    assert b.health.of(b.worker.id) == {"a": FAILS}
    a.become(Status.READY)
    wire.run()
    assert b.health.of(b.worker.id) == {}


async def test_a_flapping_peer_makes_us_look_once_a_second(autojump_clock):
    wire, a, b = pair()
    for _ in range(20):
        for status in (Status.NOT_READY, Status.READY):
            a.become(status)
            wire.run()
            await trio.sleep(LOOK_AGAIN_S / 10)
    assert 3 <= len(b.probed) <= 5
    assert b.health.asked == len(b.probed)


async def test_a_worker_that_is_bad_here_too_is_not_looked_at_again(autojump_clock):
    wire, a, b = pair()
    b.become(Status.NOT_READY)
    a.become(Status.NOT_READY)
    wire.run()
    assert (a.probed, b.probed) == ([], [])


async def test_an_open_breaker_is_told_until_it_closes(autojump_clock):
    wire, a, b = pair()
    now = trio.current_time()
    a.worker.breaker.failed(now, a.worker.breaker.started(now))
    a.health.refresh(now)
    wire.run()
    assert b.health.of(b.worker.id) == {"a": BREAKS}
    assert len(b.probed) == 1
    await trio.sleep(61)  # half open: it is being tried
    a.health.refresh(trio.current_time())
    wire.run()
    assert b.health.of(b.worker.id) == {}


async def test_bad_everywhere_is_said_by_all_live_peers(autojump_clock):
    wire, a, b = pair()
    assert not b.health.bad_everywhere(b.worker.id)
    a.become(Status.NOT_READY)
    wire.run()
    assert b.health.bad_everywhere(b.worker.id)
    b.peers.append("c")
    assert not b.health.bad_everywhere(b.worker.id)
    b.peers.clear()
    assert b.health.bad_everywhere(b.worker.id)


async def test_news_goes_with_the_worker_and_with_the_node(autojump_clock):
    wire, a, b = pair()
    a.become(Status.NOT_READY)
    wire.run()
    a.registry.remove(a.worker)
    wire.run()
    assert b.health.of(b.worker.id) == {}
    b.become(Status.NOT_READY)
    wire.run()
    wire["a"].replica.owner_died("b", wire["b"].life, trio.current_time())
    wire["a"].tell()
    assert a.health.of(a.worker.id) == {}
