"""A network of our own for real processes: namespaces on a private bridge, with cuts, loss and byte counts.

Owns every namespace, rule, file and process it makes, and removes them whatever happens. Nothing in the host's own
namespace is touched, except that their names can be listed there. Needs root, iproute2 and iptables.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from itertools import count
from pathlib import Path
from typing import Any

import trio

PREFIX = "smgmesh"
PORT = 7946
SECRET = "a secret of the mesh, 32 bytes.."
HOSTS = Path("/etc/netns")
TICKS_PER_S = os.sysconf("SC_CLK_TCK")
_numbers = count()
starting = trio.CapacityLimiter(2)
"""Interpreters that start at once, so that scenarios which run side by side do not starve each other's timing."""


def _run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, (command, done.stderr)
    return done.stdout


def remove_leftovers() -> None:
    """Namespaces of test runs that were killed."""
    for line in _run("ip", "netns", "list").splitlines():
        name = line.split()[0] if line.split() else ""
        owner = name.split("-")[1] if name.startswith(f"{PREFIX}-") else ""
        if owner.isdigit() and not Path(f"/proc/{owner}").exists():
            subprocess.run(["ip", "netns", "del", name], capture_output=True)
            shutil.rmtree(HOSTS / name, ignore_errors=True)


class Node:
    """One bare agent in its namespace. Lines carry `seen_s`, the time at which this test read them."""

    def __init__(
        self, lab: Lab, name: str, process: trio.Process, flags: tuple[str, ...], place: int
    ) -> None:
        self.lab = lab
        self.name = name
        self.process = process
        self.flags = flags
        self.place = place
        self.lines: list[dict[str, Any]] = []
        self.members: dict[str, str] = {}
        self.boots: dict[str, str] = {}
        self.boot = ""
        self.ready_s = 0.0

    async def read(self) -> None:
        left = b""
        assert self.process.stdout is not None
        async for data in self.process.stdout:
            now = trio.current_time()
            *lines, left = (left + data).split(b"\n")
            for text in lines:
                self._note({**json.loads(text), "seen_s": now})
            self.lab.changed.set()
            self.lab.changed = trio.Event()

    def _note(self, line: dict[str, Any]) -> None:
        self.lines.append(line)
        states = {
            "member_up": "alive",
            "suspected": "suspect",
            "cleared": "alive",
            "member_down": "dead",
            "left": "left",
        }
        state = states.get(line["event"])
        if state is not None and "name" in line:
            self.members[line["name"]] = state
            self.boots[line["name"]] = line["incarnation"]
        if line["event"] == "listening":
            self.ready_s = line["seen_s"]

    def kinds(self, name: str | None = None) -> list[str]:
        return [line["event"] for line in self.lines if name is None or line.get("name") == name]

    def status(self) -> dict[str, dict[str, Any]]:
        """The newest row per peer (agents print them when started with --status-interval)."""
        return {line["name"]: line for line in self.lines if line["event"] == "peer"}

    def cpu_s(self) -> float:
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / TICKS_PER_S

    def sent_bytes(self) -> int:
        """Bytes this host has sent, Ethernet headers included."""
        space = self.lab.space(self.place)
        return int(_run("ip", "netns", "exec", space, "cat", "/sys/class/net/eth0/statistics/tx_bytes"))


class Lab:
    """Up to 20 hosts, 10.77.0.1 and on, on one bridge."""

    def __init__(self, nursery: trio.Nursery) -> None:
        self.nursery = nursery
        self.key = f"{PREFIX}-{os.getpid()}-{next(_numbers)}"
        self.nodes: dict[str, Node] = {}
        self.changed = trio.Event()
        self._spaces: list[str] = []
        self._places = count(1)
        self._all: list[Node] = []
        self._add_space(self.key)
        _run("ip", "-n", self.key, "link", "add", "bridge0", "type", "bridge")
        _run("ip", "-n", self.key, "link", "set", "bridge0", "up")

    # -- hosts

    def space(self, place: int) -> str:
        return f"{self.key}-{place}"

    def ip(self, place: int) -> str:
        return f"10.77.0.{place}"

    def _add_space(self, name: str) -> None:
        _run("ip", "netns", "add", name)
        self._spaces.append(name)
        _run("ip", "-n", name, "link", "set", "lo", "up")

    def add_host(self) -> int:
        place = next(self._places)
        space = self.space(place)
        (HOSTS / space).mkdir(parents=True)
        (HOSTS / space / "hosts").write_text("127.0.0.1 localhost\n")
        (HOSTS / space / "resolv.conf").write_text("nameserver 127.0.0.1\noptions timeout:1 attempts:1\n")
        self._add_space(space)
        link = ("ip", "-n", space, "link", "add", "eth0", "type", "veth")
        _run(*link, "peer", "name", f"port{place}", "netns", self.key)
        _run("ip", "-n", space, "address", "add", f"{self.ip(place)}/24", "dev", "eth0")
        _run("ip", "-n", space, "link", "set", "eth0", "up")
        _run("ip", "-n", self.key, "link", "set", f"port{place}", "master", "bridge0", "up")
        return place

    def name_host(self, name: str, place: int) -> None:
        """From now on every host resolves this name."""
        for space in self._spaces[1:]:
            with (HOSTS / space / "hosts").open("a") as file:  # in place: the file is bind-mounted
                file.write(f"{self.ip(place)} {name}\n")

    def rule(self, place: int, *rule: str) -> None:
        _run("ip", "netns", "exec", self.space(place), "iptables", "-w", "5", *rule)

    def cut(self, node: Node) -> None:
        """Nothing enters or leaves this host."""
        for chain, way in (("INPUT", "-i"), ("OUTPUT", "-o")):
            self.rule(node.place, "-A", chain, way, "eth0", "-j", "DROP")

    def mend(self, node: Node) -> None:
        self.rule(node.place, "-F")

    def lose(self, place: int, share: float) -> None:
        """Arriving packets are lost with this probability."""
        chance = ("-m", "statistic", "--mode", "random", "--probability", str(share))
        self.rule(place, "-A", "INPUT", "-i", "eth0", *chance, "-j", "DROP")

    def block_udp(self, place: int) -> None:
        for chain in ("INPUT", "OUTPUT"):
            self.rule(place, "-A", chain, "-p", "udp", "-j", "DROP")

    # -- processes

    def command(self, place: int, *command: str) -> list[str]:
        return ["ip", "netns", "exec", self.space(place), *command]

    async def start(
        self, name: str, *flags: str, place: int | None = None, secret: str = SECRET, port: int = PORT
    ) -> Node:
        """A bare agent, once it listens."""
        if place is None:
            place = self.add_host()
        agent = [sys.executable, "-m", "mesh", "--name", name, "--port", str(port), "--json"]
        if secret:
            agent += ["--secret", secret]
        async with starting:
            process = await trio.lowlevel.open_process(
                self.command(place, *agent, *flags), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
            )
            node = Node(self, name, process, flags, place)
            self._all.append(node)
            self.nursery.start_soon(node.read)
            await self.until(lambda: node.ready_s > 0, 20.0)
        self.nodes[name] = node
        return node

    async def mesh(self, names: str, *flags: str) -> list[Node]:
        """One agent per letter, the first is the seed of all; returns when all see all."""
        first = await self.start(names[0], *flags)
        seeds = ("--seeds", f"{self.ip(first.place)}:{PORT}")
        nodes = [first] + [await self.start(name, *seeds, *flags) for name in names[1:]]
        await self.until(self.all_alive, 10.0)
        return nodes

    async def restart(self, node: Node, *flags: str) -> Node:
        """The same name on the same host again."""
        return await self.start(node.name, *(flags or node.flags), place=node.place)

    def signal(self, node: Node, number: int) -> None:
        node.process.send_signal(number)

    async def kill(self, node: Node) -> None:
        self.signal(node, signal.SIGKILL)
        await node.process.wait()
        self.nodes.pop(node.name, None)

    # -- watching

    def all_alive(self) -> bool:
        return all(
            node.members.get(other) == "alive"
            for name, node in self.nodes.items()
            for other in self.nodes
            if other != name
        )

    async def until(
        self, condition: Callable[[], bool], limit_s: float, since_s: float | None = None
    ) -> float:
        """Seconds since `since_s` (default now) until the condition held; fails after `limit_s`."""
        start_s = trio.current_time()
        while not condition():
            left_s = start_s + limit_s - trio.current_time()
            views = {name: node.members for name, node in self.nodes.items()}
            assert left_s > 0, f"not within {limit_s} s: {views}"
            with trio.move_on_after(left_s):
                await self.changed.wait()
        return trio.current_time() - (start_s if since_s is None else since_s)

    async def aclose(self) -> None:
        for node in self._all:
            if node.process.poll() is None:
                with suppress(ProcessLookupError):
                    node.process.kill()
        for node in self._all:
            await node.process.wait()
        for space in reversed(self._spaces):
            subprocess.run(["ip", "netns", "del", space], capture_output=True)
            shutil.rmtree(HOSTS / space, ignore_errors=True)
        with suppress(OSError):
            HOSTS.rmdir()


@asynccontextmanager
async def lab() -> AsyncIterator[Lab]:
    """A lab that leaves nothing behind."""
    async with trio.open_nursery() as nursery:
        made: Lab | None = None
        try:
            made = Lab(nursery)
            yield made
        finally:
            with trio.CancelScope(deadline=trio.current_time() + 20, shield=True):
                if made is not None:
                    await made.aclose()
            nursery.cancel_scope.cancel()
