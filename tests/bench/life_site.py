"""What the lives and deaths of a cluster are played on: simulated engines, real nodes, the lab's balancer, and questions to them.

Owns the processes and where they listen. On the loopback all share one address; in a network of namespaces each node has a host of
its own, given as a `Host`. Everything ends with the `async with` block. It must never judge what it reads.
"""

from __future__ import annotations

import json
import signal
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import trio

from smg.lab.balancer import Balancer, Target
from tests.deploy.front import Program, answers, start
from tests.deploy.load import Browser
from tests.e2e.process import command, free_ports

ENGINES = 6
ENGINE_FLAGS = ("--prefill-tokens-per-second", "9000", "--kv-blocks", "1500", "--block-tokens", "16")
"""24,000 tokens of cache each: all open conversations one and a half times, so that a wrong turn costs a right one."""
SECRET = "a secret of the mesh, 32 bytes.."
WITHIN_S = 20.0
LOOK_S = 0.02


@dataclass(frozen=True)
class Host:
    """Where a node runs: its address, and what is put before a command so that it runs there."""

    address: str = "127.0.0.1"
    prefix: tuple[str, ...] = ()


@dataclass
class Node:
    """A node and how it is started again in the same place."""

    name: str
    host: Host
    port: int
    metrics_port: int
    mesh_port: int
    words: tuple[str, ...] = ()
    program: Program | None = None

    @property
    def pid(self) -> int:
        assert self.program is not None
        return self.program.process.pid

    def signal(self, number: int) -> None:
        """Sends a signal to the process."""
        assert self.program is not None
        self.program.process.send_signal(number)

    async def ends(self, within_s: float) -> int:
        """The exit code."""
        assert self.program is not None
        return await self.program.wait(within_s)

    @property
    def rss_kib(self) -> int:
        """Memory that the process holds."""
        for line in Path(f"/proc/{self.pid}/status").read_text().splitlines():
            if line.startswith("VmRSS:"):
                return int(line.split()[1])
        raise AssertionError("the kernel does not say")

    async def ask(self, method: str, path: str, document: Any = None, port: int = 0) -> bytes:
        """The body of an answer with status 200; `Failed` and AssertionError else."""
        browser = Browser(self.host.address, port or self.port)
        try:
            answer = await browser.ask(method, path, document)
        finally:
            browser.leave()
        assert answer.status == 200, (path, answer.status, answer.body[:300])
        return answer.body

    async def document(self, path: str, document: Any = None) -> Any:
        """The same, decoded; POST when there is something to send."""
        return json.loads(await self.ask("GET" if document is None else "POST", path, document))

    async def metrics(self, family: str) -> dict[str, float]:
        """The samples of a family, by what stands between the braces."""
        text = (await self.ask("GET", "/metrics", port=self.metrics_port)).decode()
        found = {}
        for line in text.splitlines():
            name, brace, rest = line.partition("{")
            if brace and name == family:
                labels, _, value = rest.rpartition("} ")
                found[labels] = float(value)
            elif line.startswith(f"{family} "):
                found[""] = float(line.rpartition(" ")[2])
        return found


_client_port: ContextVar[int] = ContextVar("client_port", default=0)


class NotingBalancer(Balancer):
    """The lab's balancer, which also remembers which node got whose connection."""

    def __init__(self, targets: Sequence[Target]) -> None:
        super().__init__(targets)
        self.holders: dict[int, tuple[str, int]] = {}
        """Address of the node by the client's port; the client takes its own out."""

    async def _carry(self, client: trio.SocketStream) -> None:
        _client_port.set(client.socket.getpeername()[1])
        await super()._carry(client)

    async def _connect(self) -> trio.SocketStream | None:
        stream = await super()._connect()
        if stream is not None:
            self.holders[_client_port.get()] = stream.socket.getpeername()[:2]
        return stream


class Site:
    """Engines, nodes by name, and a balancer in this process before them."""

    def __init__(self, folder: Path, nursery: trio.Nursery, hub: str = "127.0.0.1") -> None:
        self.folder = folder
        self.hub = hub
        self.nodes: dict[str, Node] = {}
        self.engines: list[str] = []
        self.balancer: NotingBalancer | None = None
        self.port = 0
        self._nursery = nursery
        self._programs: list[Program] = []

    def name_of(self, address: tuple[str, int] | None) -> str:
        """The node that listens there; empty when there is none."""
        for node in self.nodes.values():
            if address == (node.host.address, node.port):
                return node.name
        return ""

    async def start_engines(self, *flags: str) -> None:
        """All engines; returns when they answer."""
        ports = free_ports(ENGINES)
        words = ("engine", "--host", self.hub, "--port", *map(str, ports), *(flags or ENGINE_FLAGS))
        self._programs.append(start(self.folder, "engines", command(*words)))
        for port in ports:
            await answers(port, "/health", host=self.hub)
        self.engines = [f"http://{self.hub}:{port}" for port in ports]

    async def start_nodes(
        self, names: str, *flags: str, hosts: Sequence[Host] = (), everywhere: bool = False
    ) -> None:
        """A mesh, one node per letter; the engines are told to the first, or `everywhere`. Returns when all are ready."""
        ports = iter(free_ports(3 * len(names)))
        for place, name in enumerate(names):
            host = hosts[place] if hosts else Host()
            self.nodes[name] = Node(name, host, next(ports), next(ports), next(ports))
        seeds = [f"{node.host.address}:{node.mesh_port}" for node in self.nodes.values()]
        for place, node in enumerate(self.nodes.values()):
            address = node.host.address
            node.words = (
                *node.host.prefix, *command(),
                *("--host", address, "--port", str(node.port)),
                *("--prometheus-host", address, "--prometheus-port", str(node.metrics_port)),
                *("--ha-mesh", "--node-name", node.name, "--mesh-host", address),
                *("--mesh-port", str(node.mesh_port), "--mesh-secret", SECRET, "--seeds", *seeds, *flags),
                *(("--worker-urls", *self.engines) if everywhere or not place else ()),
            )  # fmt: skip
            self.launch(node)
        for node in self.nodes.values():
            await self.ready(node)

    def launch(self, node: Node) -> None:
        """Starts the process of a node, also once more after its end."""
        node.program = start(self.folder, node.name, node.words)
        self._programs.append(node.program)

    async def ready(self, node: Node) -> None:
        """Waits until a node sees all nodes alive and all engines ready."""
        await answers(node.port, "/readiness", host=node.host.address)
        with trio.fail_after(WITHIN_S):
            while not (
                (await node.document("/mesh/status"))["alive"] == len(self.nodes)
                and await workers_ready(node) == ENGINES
            ):
                await trio.sleep(LOOK_S)

    async def start_balancer(self) -> None:
        """Connections to `port` of the loopback go to the nodes in turn."""
        (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1", backlog=1024)
        self.port = listener.socket.getsockname()[1]
        self.balancer = NotingBalancer([Target(each.host.address, each.port) for each in self.nodes.values()])
        await self._nursery.start(self.balancer.serve, listener)

    def close(self) -> None:
        """Ends all processes, one that is stopped as well."""
        for program in reversed(self._programs):
            if program.process.poll() is None:
                program.process.send_signal(signal.SIGCONT)
            program.kill()


@asynccontextmanager
async def site(folder: Path, hub: str = "127.0.0.1") -> AsyncIterator[Site]:
    """A site that leaves no process behind."""
    async with trio.open_nursery() as nursery:
        made = Site(folder, nursery, hub)
        try:
            yield made
        finally:
            made.close()
            nursery.cancel_scope.cancel()


async def workers_ready(node: Node) -> int:
    """Workers that a node finds ready."""
    document = await node.document("/workers")
    return sum(worker["status"] == "ready" for worker in document["workers"])


async def matched_blocks(node: Node, body: dict[str, Any]) -> tuple[dict[str, int], int]:
    """What a node knows of a prompt: blocks that each worker holds, by worker, and the blocks of the prompt."""
    found = await node.document("/route/explain", body)
    rows = {str(row["worker_id"]): int(row["matched_blocks"]) for row in found["workers"]}
    return rows, int(found["prompt"]["blocks"])
