"""The simulated cluster: hosts, names, processes, and the verbs of a fault plan.

Everything is decided by the seed. The machines inside the processes are the real ones (`node.Node`); a world may be
given a `make_replica`, and then their streams carry replicated state too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from random import Random

from mesh.member import Address, Status
from mesh.messages import Event, TablePull
from mesh.settings import SwimSettings
from tests.sim.network import Cut, Endpoint, Loop, Network
from tests.sim.node import PORT, Node, ReplicaHook


class World:
    """The cluster and the verbs of a fault plan."""

    def __init__(
        self,
        seed: int,
        settings: SwimSettings | None = None,
        make_replica: Callable[[Node], ReplicaHook] | None = None,
        meta: bytes = b"1.0.0",
        keeps_streams: bool = True,
    ) -> None:
        self.seed = seed
        self.rng = Random(seed)
        self.settings = settings or SwimSettings()
        self.make_replica = make_replica
        self.meta = meta
        self.keeps_streams = keeps_streams
        """False: a stream per exchange, closed at once, and no hint when it ends (memberlist)."""
        self.loop = Loop()
        self.network = Network(self.loop, Random(self.rng.getrandbits(64)))
        self.hosts: dict[Address, int] = {}
        self.on_host: dict[int, Node | None] = {}
        self.nodes: dict[str, Node] = {}
        self.left: set[str] = set()
        self.names: dict[str, list[str]] = {}
        self.log: list[tuple[float, Node, Event]] = []
        self.complaints: list[str] = []
        self.tables_pushed = 0
        self._next_host = 0
        self.on_events: Callable[[Node], None] | None = None

    # -- what nodes need

    def address(self, host: int) -> Address:
        return (f"10.{host >> 16}.{host >> 8 & 255}.{host & 255}", PORT)

    def resolve(self, seed: str) -> list[Address]:
        """A seed is `host:port`; names stand for the addresses the world maps them to, maybe none."""
        host, _, port = seed.rpartition(":")
        addresses = [host] if host.startswith("10.") else self.names.get(host, [])
        return [(address, int(port)) for address in addresses]

    def arrive(self, data: bytes, host: int, address: Address) -> None:
        node = self.on_host.get(host)
        if node is not None:
            node.datagram(data, address)

    def dial(self, end: Endpoint, address: Address, done: Callable[[bool, bool], None]) -> None:
        host = self.hosts.get(address)

        def accept(other: Endpoint) -> Endpoint | None:
            node = self.on_host.get(host) if host is not None else None
            if node is None:
                return None
            accepted = Endpoint(node.host, node)
            accepted.other, other.other = other, accepted
            if other.owner is not node:
                node.adopt(accepted)
            return accepted

        self.network.dial(end, host, accept, done)

    def complain(self, text: str) -> None:
        """A checker that lives on the path found something wrong."""
        if len(self.complaints) < 100:
            self.complaints.append(f"t={self.loop.now:.3f} {text}")

    def note_events(self, node: Node) -> None:
        if self.on_events is not None:
            self.on_events(node)

    # -- verbs

    def start(
        self,
        name: str,
        seeds: Iterable[str] = (),
        host: int | None = None,
        clock_offset_s: float = 0.0,
        drift: float = 0.0,
    ) -> Node:
        """Start a process for this name, on its own new host unless one is given."""
        if host is None:
            host = self._next_host
            self._next_host += 1
            self.hosts[self.address(host)] = host
        node = Node(self, name, host, clock_offset_s, drift)
        self.on_host[host] = node
        self.nodes[name] = node
        self.names[name] = [self.address(host)[0]]
        self.left.discard(name)
        node.swim.join(seeds, node.clock())
        node.drain()
        return node

    def crash(self, name: str, host_lost: bool = False) -> None:
        """kill -9, or the whole host gone without a word."""
        self.exit(self.nodes.pop(name), host_lost)

    def exit(self, node: Node, host_lost: bool = False) -> None:
        """End a process; its kernel closes its streams unless the host is lost."""
        if not node.is_up:
            return
        node.is_up = False
        self.on_host[node.host] = None
        if self.nodes.get(node.name) is node:
            del self.nodes[node.name]
        if host_lost:
            self.network.lost_hosts.add(node.host)
        for end in [*node.streams.values(), *node.extra]:
            self.network.close(end, says_so=not host_lost)
        node.streams.clear()

    def restart(
        self, name: str, seeds: Iterable[str], clock_offset_s: float = 0.0, new_address: bool = False
    ) -> Node:
        """Kill if alive and start a new life of the name, at once."""
        old = self.nodes.get(name)
        host = None
        if old is not None:
            host = None if new_address else old.host
            self.exit(old)
        return self.start(name, seeds, host, clock_offset_s)

    def pause(self, name: str, pause_s: float) -> None:
        """SIGSTOP for a while."""
        node = self.nodes[name]
        if not node.is_paused:
            node.is_paused = True
            self.loop.at(self.loop.now + pause_s, node.resume)

    def leave(self, name: str) -> None:
        """SIGTERM: farewell, then exit."""
        node = self.nodes[name]
        self.left.add(name)
        node._run(node.swim.leave)
        self.loop.at(self.loop.now + 1.5, self.exit, node)

    def cut(self, cut: Cut) -> Cut:
        self.network.cuts.append(cut)
        return cut

    def mend(self, cut: Cut | None = None) -> None:
        """End one cut, or all."""
        if cut is None:
            self.network.cuts.clear()
        elif cut in self.network.cuts:
            self.network.cuts.remove(cut)

    def run(self, seconds: float) -> None:
        self.loop.run_until(self.loop.now + seconds)

    def seed_of(self, name: str) -> str:
        """The seed text of a node."""
        host, port = self.nodes[name].swim.own.address
        return f"{host}:{port}"

    # -- views

    def all_see_all(self) -> bool:
        """Every process sees exactly the others alive."""
        names = sorted(self.nodes)
        for node in self.nodes.values():
            if node.swim.live_count != len(names) - 1:
                return False
            for name in names:
                if name != node.name:
                    member = node.swim.member(name)
                    if member is None or member.status != Status.ALIVE:
                        return False
        return True

    def run_until(self, condition: Callable[[], bool], limit_s: float, step_s: float = 0.01) -> float | None:
        """Seconds until the condition held, or None."""
        start_s = self.loop.now
        while self.loop.now - start_s < limit_s:
            if condition():
                return self.loop.now - start_s
            self.run(step_s)
        return None


def grow(world: World, count: int, settle_s: float = 3.0) -> list[str]:
    """Start `count` nodes that share the first as seed, and wait until all see all.

    Above 200 they are given each other's records instead: a thousand joins at once take minutes to simulate.
    """
    names = [f"n{number:04d}" for number in range(count)]
    if count > 200:
        nodes = [world.start(name) for name in names]
        source = nodes[0].swim.tables(0.0)[0].source
        records = tuple(node.swim.own for node in nodes)
        for node in nodes:
            node.swim.merge_table(TablePull(source, records), ("10.0.0.0", PORT), node.clock())
            node.swim._rumors.clear()
            while node.swim.next_event() is not None:
                pass
            node.drain()
        world.run(settle_s)
        assert world.all_see_all()
        return names
    first = world.start(names[0])
    host, port = first.swim.own.address
    for name in names[1:]:
        world.start(name, [f"{host}:{port}"])
    took_s = world.run_until(world.all_see_all, 30.0, 0.1)
    assert took_s is not None, f"seed {world.seed}: {count} nodes never saw each other"
    world.run(settle_s)
    return names
