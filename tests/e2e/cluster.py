"""Several gateway nodes in this process, over real sockets, with a mesh whose network a test can cut.

Owns the life of the nodes (start, crash, start again under the same name and port) and `Network`, which drops what goes
between two addresses as a firewall does: no error, only silence.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import trio

from mesh import Address
from mesh.transport import ByteStream, NetTransport
from tests.e2e.fake_worker import FakeWorker
from tests.e2e.gateway import Gateway, eventually, running_gateway

LOOPBACK = "127.0.0.1"
LOOK_S = 0.01


class Network:
    """Which pairs of nodes hear each other, by name."""

    def __init__(self) -> None:
        self._cut: set[frozenset[str]] = set()
        self._names: dict[Address, str] = {}

    def know(self, name: str, address: Address) -> None:
        self._names[address] = name

    def cut(self, one: str, *others: str) -> None:
        self._cut |= {frozenset((one, other)) for other in others}

    def heal(self) -> None:
        self._cut.clear()

    def is_cut(self, name: str, address: Address) -> bool:
        return frozenset((name, self._names.get(address, ""))) in self._cut


class CuttableStream:
    """A dialled stream that stands still while its pair is cut; the other end sees silence."""

    def __init__(self, stream: ByteStream, network: Network, name: str, target: Address) -> None:
        self._stream = stream
        self._network = network
        self._name = name
        self._target = target
        self.local_address = stream.local_address
        self.peer_address = stream.peer_address
        self.is_protected = stream.is_protected

    async def _wait_open(self) -> None:
        while self._network.is_cut(self._name, self._target):
            await trio.sleep(LOOK_S)

    async def start(self) -> None:
        await self._stream.start()

    async def send_all(self, data: bytes) -> None:
        await self._wait_open()
        await self._stream.send_all(data)

    def send_nowait(self, data: bytes) -> int:
        return 0 if self._network.is_cut(self._name, self._target) else self._stream.send_nowait(data)

    async def receive_some(self, bytes_max: int) -> bytes:
        data = await self._stream.receive_some(bytes_max)
        await self._wait_open()
        return data

    async def aclose(self) -> None:
        await self._stream.aclose()


class CuttableTransport(NetTransport):
    """The real network of one node, as far as `Network` lets it through."""

    def __init__(self, network: Network, name: str, port: int) -> None:
        super().__init__(LOOPBACK, port)
        self._network = network
        self._name = name
        self.address: Address | None = None

    async def open(self) -> Address:
        self.address = await super().open()
        self._network.know(self._name, self.address)
        return self.address

    def send(self, data: bytes, address: Address) -> bool:
        return self._network.is_cut(self._name, address) or super().send(data, address)

    def receive_nowait(self, most: int) -> list[tuple[bytes, Address]]:
        got = super().receive_nowait(most)
        return [(data, address) for data, address in got if not self._network.is_cut(self._name, address)]

    async def dial(self, address: Address) -> ByteStream:
        if self._network.is_cut(self._name, address):
            await trio.sleep_forever()
        return CuttableStream(await super().dial(address), self._network, self._name, address)


class Cluster:
    """Nodes by name; the first one started is everybody's seed."""

    def __init__(self, nursery: trio.Nursery, flags: Sequence[str]) -> None:
        self._nursery = nursery
        self._flags = flags
        self._scopes: dict[str, trio.CancelScope] = {}
        self._ends: dict[str, trio.Event] = {}
        self.network = Network()
        self.nodes: dict[str, Gateway] = {}
        self.ports: dict[str, int] = {}

    def __getitem__(self, name: str) -> Gateway:
        return self.nodes[name]

    async def start(self, name: str, *flags: str, workers: Sequence[FakeWorker] = ()) -> Gateway:
        """Start a node, or start it again where it was; returns when its HTTP port answers."""
        transport = CuttableTransport(self.network, name, self.ports.get(name, 0))
        seeds = [f"{LOOPBACK}:{port}" for other, port in self.ports.items() if other != name]
        scope = self._scopes[name] = trio.CancelScope()
        self._ends[name] = trio.Event()
        arguments = ("--ha-mesh", "--node-name", name, *self._flags, *flags)
        if seeds:
            arguments = (*arguments, "--seeds", *seeds)
        gateway: Gateway = await self._nursery.start(self._hold, name, arguments, workers, transport, scope)
        assert transport.address is not None
        self.ports[name] = transport.address[1]
        self.nodes[name] = gateway
        return gateway

    async def _hold(
        self,
        name: str,
        arguments: tuple[str, ...],
        workers: Sequence[FakeWorker],
        transport: CuttableTransport,
        scope: trio.CancelScope,
        *,
        task_status: trio.TaskStatus[Gateway],
    ) -> None:
        with scope:
            async with running_gateway(
                *arguments, workers=workers, ready=False, is_quiet=False, transport=transport
            ) as gateway:
                task_status.started(gateway)
                await trio.sleep_forever()
        self._ends[name].set()

    async def crash(self, name: str) -> None:
        """End a node without a word; its ports refuse from now on."""
        self._scopes[name].cancel()
        await self._ends[name].wait()
        del self.nodes[name]

    def states(self, name: str) -> dict[str, str]:
        """How a node sees the members."""
        mesh = self.nodes[name].node.mesh
        assert mesh is not None
        return {row["name"]: row["state"] for row in mesh.members()}

    def all_alive(self) -> bool:
        """Does every running node see every running node alive?"""
        return all(
            all(self.states(name).get(other) == "alive" for other in self.nodes) for name in self.nodes
        )

    def all_ready(self, count: int) -> bool:
        """Has every node so many ready workers?"""
        return all(gateway.ready_count == count for gateway in self.nodes.values())

    async def settled(self, workers: int, within_s: float = 5.0) -> None:
        """Wait until all see all and all workers are ready everywhere."""
        await eventually(lambda: self.all_alive() and self.all_ready(workers), within_s)

    def mesh(self, name: str) -> Any:
        """The bridge of a node."""
        mesh = self.nodes[name].node.mesh
        assert mesh is not None
        return mesh


@asynccontextmanager
async def cluster(
    *names: str, workers: Sequence[FakeWorker] = (), flags: Sequence[str] = (), everywhere: bool = False
) -> AsyncIterator[Cluster]:
    """Nodes that see each other; `workers` are given to the first, or `everywhere`, and ready on all."""
    async with trio.open_nursery() as nursery:
        found = Cluster(nursery, flags)
        for place, name in enumerate(names):
            await found.start(name, workers=workers if everywhere or not place else ())
        await found.settled(len(workers))
        yield found
        faults = [fault for gateway in found.nodes.values() for fault in gateway.faults]
        assert not faults, faults
        nursery.cancel_scope.cancel()
