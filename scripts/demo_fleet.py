"""What the demo puts up: simulated engines, nodes alone or as a mesh, a balancer before them, and how each is asked.

Owns their flags and what they are waited for. Everything here is done as a person with a shell would do it: commands
of smg and its HTTP routes. It must never decide what the story is.
"""

from __future__ import annotations

import json
import os
import secrets
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import trio
from demo_client import fetch
from demo_processes import LOOPBACK, SMG, Process, Processes, free_ports

MODEL = "sim"
ENGINES = 6
BLOCK_TOKENS = 16
PREFILL_TOKENS_PER_S = 9_000
READY_S = 20.0
LOOK_S = 0.05
WARM_RATIO = 0.5
"""A node that knows more of a conversation than this has heard of it: system prompts, which all share, are shorter."""


class NotReady(Exception):
    """Something that should have come about did not."""


@dataclass
class Node:
    """A node, where it is found, and how it is started again in the same place."""

    name: str
    port: int
    process: Process
    command: tuple[str, ...]


class Fleet:
    """Engines and nodes of the demo; `engine_tokens` is what the KV cache of one engine holds."""

    def __init__(self, processes: Processes, folder: Path, engine_tokens: int) -> None:
        self._processes = processes
        self._engine_tokens = engine_tokens
        self._secret = folder / "mesh-secret"
        self.engines: list[int] = []
        folder.mkdir(parents=True, exist_ok=True)
        with os.fdopen(os.open(self._secret, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as sink:
            sink.write(secrets.token_hex(16))

    async def start_engines(self) -> None:
        """All engines, on ports that the system chooses."""
        command = (
            *SMG, "engine", "--port", "0", "--count", str(ENGINES), "--model", MODEL,
            "--kv-blocks", str(self._engine_tokens // BLOCK_TOKENS), "--block-tokens", str(BLOCK_TOKENS),
            "--prefill-tokens-per-second", str(PREFILL_TOKENS_PER_S),
        )  # fmt: skip
        _, said = await self._processes.start("engines", lambda: command, "listening on http://", ENGINES)
        self.engines = [int(line.rpartition(":")[2]) for line in said]

    async def empty_caches(self) -> None:
        """The engines forget all prompts, so that each run begins alike."""
        for port in self.engines:
            status, _ = await fetch(port, "POST", "/flush_cache")
            if status != 200:
                raise NotReady(f"an engine did not empty its cache: status {status}")

    async def start_alone(self, count: int) -> list[Node]:
        """Nodes that know the engines and nothing of each other."""
        return await self._start_all(count, lambda number: self._engine_flags())

    async def start_mesh(self, count: int) -> list[Node]:
        """Nodes that know each other. Only the first is told where the engines are; the others hear it from it."""
        ports = free_ports(count)
        seeds = [f"{LOOPBACK}:{port}" for port in ports]

        def flags(number: int) -> tuple[str, ...]:
            return (
                "--ha-mesh", "--mesh-host", LOOPBACK, "--mesh-port", str(ports[number - 1]),
                "--node-name", f"node-{number}", "--mesh-secret", f"@{self._secret}", "--seeds", *seeds,
                *(self._engine_flags() if number == 1 else ()),
            )  # fmt: skip

        nodes = await self._start_all(count, flags)
        for node in nodes:
            await self.wait_members(node, count)
        return nodes

    async def start_again(self, node: Node) -> None:
        """A node that was killed, with the same flags and in the same place."""
        name = f"{node.name} again"
        node.process, _ = await self._processes.start(name, lambda: node.command, "smg listening on")

    async def start_balancer(self, nodes: Sequence[Node]) -> tuple[Process, int]:
        """The one address that clients know."""
        command = (sys.executable, "-m", "smg.lab.balancer", *(f"{LOOPBACK}:{node.port}" for node in nodes))
        process, said = await self._processes.start("balancer", lambda: command, "listening on http://")
        return process, int(said[0].rpartition(":")[2])

    async def wait_members(self, node: Node, count: int) -> None:
        """Returns when a node sees so many alive, itself among them."""
        await _until(node.port, "/mesh/status", lambda status: status["alive"] == count)

    async def wait_engines(self, node: Node) -> None:
        """Returns when all engines are ready on a node."""

        def are_ready(document: Any) -> bool:
            return [worker["status"] for worker in document["workers"]] == ["ready"] * ENGINES

        await _until(node.port, "/workers", are_ready)

    async def wait_warm(self, node: Node, body: dict[str, Any]) -> tuple[int, int]:
        """Returns when a node knows where most of a prompt is cached: the blocks it knows of, and all of them."""
        with trio.move_on_after(READY_S):
            while True:
                answer = await _asked(node.port, "POST", "/route/explain", json.dumps(body).encode())
                if answer is not None:
                    blocks = int(answer["prompt"]["blocks"])
                    matched = max(int(each["matched_blocks"]) for each in answer["workers"])
                    if matched >= WARM_RATIO * blocks:
                        return matched, blocks
                await trio.sleep(LOOK_S)
        raise NotReady(f"{node.name} did not learn in {READY_S:.0f} s what is cached where")

    async def in_flight(self, node: Node) -> int:
        """Requests that a node still counts."""
        _, body = await fetch(node.port, "GET", "/workers")
        return sum(worker["load"] for worker in json.loads(body)["workers"])

    def _engine_flags(self) -> tuple[str, ...]:
        return ("--worker-urls", *(f"http://{LOOPBACK}:{port}" for port in self.engines))

    async def _start_all(self, count: int, flags: Callable[[int], tuple[str, ...]]) -> list[Node]:
        nodes: dict[int, Node] = {}

        async def start(number: int) -> None:
            nodes[number] = await self._start(f"node {number}", flags(number))

        async with trio.open_nursery() as nursery:
            for number in range(1, count + 1):
                nursery.start_soon(start, number)
        for node in nodes.values():
            await self.wait_engines(node)
        return [nodes[number] for number in sorted(nodes)]

    async def _start(self, name: str, flags: tuple[str, ...]) -> Node:
        tried: list[tuple[int, tuple[str, ...]]] = []

        def command() -> tuple[str, ...]:
            port, metrics_port = free_ports(2)
            command = (
                *SMG, "--host", LOOPBACK, "--port", str(port), "--prometheus-host", LOOPBACK,
                "--prometheus-port", str(metrics_port),
                # Nobody needs time to notice that a node ends: when it ends, the run is over.
                "--shutdown-grace-period-secs", "1", *flags,
            )  # fmt: skip
            tried.append((port, command))
            return command

        process, _ = await self._processes.start(name, command, "smg listening on")
        port, last = tried[-1]
        return Node(name, port, process, last)


async def _until(port: int, path: str, is_so: Callable[[Any], Any]) -> None:
    with trio.move_on_after(READY_S):
        while True:
            document = await _asked(port, "GET", path)
            if document is not None and is_so(document):
                return
            await trio.sleep(LOOK_S)
    raise NotReady(f"{path} on port {port} did not come to what it should in {READY_S:.0f} s")


async def _asked(port: int, method: str, path: str, body: bytes = b"") -> Any:
    """What a node answers, decoded; None while it cannot."""
    try:
        status, answer = await fetch(port, method, path, body)
    except OSError:
        return None  # it has just been started, or ends
    return json.loads(answer) if status == 200 else None
