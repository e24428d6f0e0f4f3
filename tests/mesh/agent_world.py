"""Agents on the network in memory, and the words in which plays about them are written.

Owns starting, killing and observing agents under virtual time. A killed agent's kernel closes its streams and its port
refuses; a host that is cut off says nothing.
"""

from __future__ import annotations

import functools
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from random import Random
from typing import Any

import trio
import trio.testing
from trio._core import _run as scheduler

from mesh import (
    Agent,
    AgentSettings,
    ConflictError,
    Ephemeral,
    Event,
    Hooks,
    Lww,
    Namespace,
    Owned,
    SwimSettings,
)
from tests.mesh.memory_net import MemoryNet, MemoryTransport

CONF, OWNED, LOAD = "conf", "owned", "load"
NAMESPACES: Sequence[Namespace] = (Lww(name=CONF), Owned(name=OWNED), Ephemeral(name=LOAD))
EPOCH_S = 1_700_000_000.0


def virtual_run(function: Callable[..., Any], *arguments: Any, clock: Any = None, **options: Any) -> Any:
    """`trio.run` in virtual time and with the same scheduling each time, so that a failure is the same again.

    The private names are those of trio 0.30 to 0.35; `test_the_same_seed_gives_the_same_play` notices when they go.
    """
    assert clock is None
    scheduler._ALLOW_DETERMINISTIC_SCHEDULING = True
    scheduler._r.seed(7)
    try:
        clock = trio.testing.MockClock(autojump_threshold=0)
        return trio.run(function, *arguments, clock=clock, **options)
    finally:
        scheduler._ALLOW_DETERMINISTIC_SCHEDULING = False


def in_virtual_time(test: Callable[..., Any]) -> Callable[..., None]:
    """Makes a plain test of an async one."""

    @functools.wraps(test)
    def run(**arguments: Any) -> None:
        virtual_run(functools.partial(test, **arguments))

    return run


class Node:
    """One life of an agent, with all that it said."""

    def __init__(self, agent: Agent, host: str) -> None:
        self.agent = agent
        self.host = host
        self.scope = trio.CancelScope()
        self.events: list[tuple[float, Event]] = []
        self.changes: list[tuple[float, Any]] = []
        self.logs: list[tuple[str, dict[str, Any]]] = []
        self.messages: dict[tuple[str, str], int] = {}
        self.conflict: ConflictError | None = None
        self.ended = trio.Event()

    def sees(self) -> dict[str, str]:
        return {member.name: member.status.name.lower() for member in self.agent.members}

    def kinds(self) -> list[str]:
        return [type(event).__name__ for _, event in self.events]


class AgentWorld:
    """See the module."""

    def __init__(self, nursery: trio.Nursery, seed: int = 0) -> None:
        self.nursery = nursery
        self.rng = Random(seed)
        self.net = MemoryNet(self.rng.getrandbits(32))
        self.nodes: dict[str, Node] = {}
        self._hosts = 0

    def host_of(self, name: str) -> str:
        return self.nodes[name].host

    async def start(
        self,
        name: str,
        seeds: Sequence[str] = (),
        host: str | None = None,
        swim: SwimSettings | None = None,
        is_protected: bool = False,
        namespaces: Sequence[Namespace] = NAMESPACES,
        **settings: Any,
    ) -> Node:
        if host is None:
            self._hosts += 1
            host = f"10.0.{self._hosts >> 8}.{self._hosts & 255}"
        made: list[Node] = []

        def message(kind: str, way: str, size: int) -> None:
            made[0].messages[kind, way] = made[0].messages.get((kind, way), 0) + 1

        agent = Agent(
            AgentSettings(name=name, seeds=tuple(seeds), **settings),
            namespaces,
            swim=swim,
            transport=MemoryTransport(self.net, host, is_protected=is_protected),
            hooks=Hooks(
                log=lambda event, fields: made[0].logs.append((event, dict(fields))), message=message
            ),
            wall=lambda: EPOCH_S + trio.current_time(),
            entropy=Random(self.rng.getrandbits(64)).randbytes,
        )
        node = Node(agent, host)
        made.append(node)
        agent.on_member(lambda event: node.events.append((trio.current_time(), event)))
        for namespace in namespaces:
            agent.on_change(namespace.name, lambda change: node.changes.append((trio.current_time(), change)))
        self.nodes[name] = node
        await self.nursery.start(self._run, node)
        return node

    async def _run(self, node: Node, task_status: trio.TaskStatus[Any]) -> None:
        try:
            with node.scope:
                await node.agent.run(task_status)
        except ConflictError as error:
            node.conflict = error
        finally:
            node.ended.set()

    async def kill(self, name: str) -> Node:
        node = self.nodes.pop(name)
        node.scope.cancel()
        await node.ended.wait()
        return node

    async def mesh(self, names: str, **settings: Any) -> list[Node]:
        """Start one agent per letter, the first is the seed of all; return when all see all alive."""
        first = await self.start(names[0], **settings)
        nodes = [first] + [await self.start(name, [f"{first.host}:7946"], **settings) for name in names[1:]]
        await self.until(self.all_alive, 5.0)
        return nodes

    def all_alive(self) -> bool:
        return all(
            node.sees().get(other) == "alive"
            for name, node in self.nodes.items()
            for other in self.nodes
            if other != name
        )

    async def until(self, condition: Callable[[], bool], limit_s: float) -> float:
        """Seconds until the condition held; fails when it does not."""
        start_s = trio.current_time()
        while not condition():
            took_s = trio.current_time() - start_s
            assert took_s < limit_s, {name: node.sees() for name, node in self.nodes.items()}
            await trio.sleep(0.001 if took_s < 1 else 0.02)
        return trio.current_time() - start_s


@asynccontextmanager
async def world(seed: int = 0) -> AsyncIterator[AgentWorld]:
    """A world whose agents all end with the block."""
    async with trio.open_nursery() as nursery:
        made = AgentWorld(nursery, seed)
        nursery.start_soon(made.net.run)
        yield made
        nursery.cancel_scope.cancel()
