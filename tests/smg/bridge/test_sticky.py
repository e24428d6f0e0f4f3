"""A key that one node has placed is found, followed and forgotten by the others."""

from __future__ import annotations

from random import Random

import trio

from mesh import Lww, Put
from smg.bridge import words
from smg.bridge.sticky import STICKY, SharedKeys, scope_of
from smg.fleet.worker import Kind, Status
from smg.policies import KEYED
from smg.policies.manual import Manual
from smg.settings import Routing
from tests.smg.bridge.wire import Wire
from tests.smg.fleet.builders import call, fleet

IDLE_S = 100.0


class Node:
    def __init__(self, wire: Wire, name: str, policy_name: str = "manual") -> None:
        self.registry, self.workers = fleet(3)
        self.wall_s = 1_000.0
        self.is_first = name == "a"
        by_ref = {words.worker_ref(worker.id): worker for worker in self.workers}
        self.keys = SharedKeys(
            wire[name].state,
            name=name,
            idle_max_s=IDLE_S,
            wall=lambda: self.wall_s + trio.current_time(),
            worker_of=by_ref.get,
            policy_of=lambda model, kind: self.policy if (model, kind) == ("m", Kind.REGULAR) else None,
            models=self.registry.served_models,
            is_first=lambda: self.is_first,
        )
        self.policy = KEYED[policy_name](Routing(max_idle_secs=IDLE_S), self.keys.of("m", Kind.REGULAR))
        wire[name].hear[STICKY] = lambda change: self.keys.on_change(change, trio.current_time())

    def send(self, key: str, among: slice = slice(None)) -> int:
        asked = call("hi", key=key)
        now = trio.current_time()
        worker = self.policy.choose(asked, self.workers[among], now, Random(key))
        assert worker is not None
        self.policy.placed(asked, worker, now)
        return self.workers.index(worker)


def pair(policy: str = "manual") -> tuple[Wire, Node, Node]:
    wire = Wire(**{name: [Lww(name=STICKY)] for name in "ab"})
    nodes = Node(wire, "a", policy), Node(wire, "b", policy)
    wire.run()
    return wire, *nodes


async def test_a_key_is_found_on_a_node_that_never_saw_it(autojump_clock):
    wire, a, b = pair()
    placed = {f"k{number}": a.send(f"k{number}") for number in range(20)}
    wire.run()
    assert {key: b.send(key) for key in placed} == placed
    assert isinstance(b.policy, Manual)
    assert b.policy.branches["vacant"] == 0
    assert b.policy.branches["occupied_hit"] == 20


async def moved(node: Node, key: str, old: int) -> int:
    """The worker of a key is no candidate on `node`, and so the key moves; to which worker."""
    node.registry.set_status(node.workers[old], Status.NOT_READY, trio.current_time())
    asked = call("hi", key=key)
    others = tuple(worker for worker in node.workers if worker is not node.workers[old])
    worker = node.policy.choose(asked, others, trio.current_time(), Random(1))
    assert worker is not None
    node.policy.placed(asked, worker, trio.current_time())
    return node.workers.index(worker)


async def test_a_key_that_moved_is_followed_by_nodes_that_knew_it(autojump_clock):
    wire, a, b = pair()
    old = a.send("k")
    wire.run()
    assert b.send("k") == old
    wire.run()
    await trio.sleep(1)
    new = await moved(a, "k", old)
    wire.run()
    assert b.send("k") == new != old  # although its old worker is well here


async def test_a_key_off_the_ring_is_followed_too(autojump_clock):
    wire, a, b = pair("consistent_hashing")
    natural = a.send("k")
    assert b.send("k") == natural
    assert not list(wire["a"].state.items(STICKY))  # the ring needs no telling
    new = await moved(a, "k", natural)
    wire.run()
    assert b.send("k") == new != natural


async def test_a_key_in_use_is_told_again_now_and_then_only(autojump_clock):
    wire, a, _ = pair()
    a.send("k")
    wire.run()
    before = wire["a"].state.get(STICKY, next(key for _, key, _ in wire["a"].state.items(STICKY)))
    for _ in range(10):
        await trio.sleep(1)
        a.send("k")
    ((_, key, value),) = list(wire["a"].state.items(STICKY))
    assert value == before
    await trio.sleep(IDLE_S / 8)
    a.send("k")
    assert wire["a"].state.get(STICKY, key) != before


async def test_an_idle_key_is_new_again_and_forgotten_by_the_first_node(autojump_clock):
    wire, a, b = pair()
    a.send("k")
    wire.run()
    await trio.sleep(IDLE_S + 2)
    assert b.keys.of("m", Kind.REGULAR).worker_of(0) is None
    key = next(key for _, key, _ in wire["b"].state.items(STICKY))
    assert b.keys.find(key) is None
    await trio.sleep(IDLE_S + 2)
    b.keys.refresh(trio.current_time())
    assert list(wire["b"].state.items(STICKY))
    a.keys.refresh(trio.current_time())
    wire.run()
    assert not list(wire["b"].state.items(STICKY))


async def test_models_and_legs_have_keys_of_their_own():
    scopes = {scope_of(model, kind) for model in ("m", "n", "") for kind in Kind}
    assert len(scopes) == 9


async def test_a_full_namespace_refuses_and_is_counted(autojump_clock):
    wire = Wire(**{name: [Lww(name=STICKY, bytes_max=2_000)] for name in "ab"})
    a, b = Node(wire, "a"), Node(wire, "b")
    for number in range(50):
        a.send(f"k{number}")
    assert a.keys.refused > 0
    b.keys.on_change(Put(STICKY, "a", b"x" * 13, b"garbage"), 0.0)
    assert b.keys.garbage == 1
