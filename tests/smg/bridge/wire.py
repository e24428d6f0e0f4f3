"""Replicas of several nodes with a wire between them, without agents: what one room writes, the others hear.

Owns the shuttling of frames in virtual time (tests use `autojump_clock`) and fakes of what rooms ask of a mesh.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from random import Random

import trio

from mesh import Change, Namespace, State
from mesh.replica import Replica, life_number

Hears = Callable[[Change], None]


class Wired:
    """One node's state. `hear[namespace]` is called with each change that others made."""

    def __init__(self, name: str, namespaces: Sequence[Namespace], number: int) -> None:
        self.name = name
        self.replica = Replica(
            name, life_number(number, b"bootboot"), namespaces, trio.current_time(), Random(number)
        )
        self.state = State(self.replica, lambda: None)
        self.hear: dict[str, Hears] = {}

    @property
    def life(self) -> int:
        return self.replica._home.life

    def tell(self) -> int:
        told = 0
        while (change := self.replica.next_change()) is not None:
            told += 1
            if change.namespace in self.hear:
                self.hear[change.namespace](change)
        return told


class Wire:
    """All pairs connected."""

    def __init__(self, **namespaces_of: Sequence[Namespace]) -> None:
        self.nodes = {
            name: Wired(name, namespaces, number)
            for number, (name, namespaces) in enumerate(namespaces_of.items())
        }
        self.lost = 0
        for one in self.nodes.values():
            for other in self.nodes.values():
                if one is not other:
                    one.replica.peer_up(other.name, other.life, trio.current_time())

    def __getitem__(self, name: str) -> Wired:
        return self.nodes[name]

    def run(self, is_lossy: bool = False) -> None:
        """Until nobody has anything to say at this moment. `is_lossy`: what is said now does not arrive."""
        now = trio.current_time()
        for _ in range(1_000):
            said = 0
            for node in self.nodes.values():
                if node.replica.deadline() <= now:
                    node.replica.tick(now)
                for peer in node.replica.peers_to_send():
                    for frame in node.replica.frames_to_send(peer, now):
                        said += 1
                        if is_lossy:
                            self.lost += 1
                        else:
                            self.nodes[peer].replica.receive(node.name, frame, now)
                            self.nodes[peer].tell()
            if not said:
                return
        raise AssertionError("they never fall silent")

    async def pause(self, seconds: float) -> None:
        """Let time pass, a tenth of a second at a time."""
        for _ in range(round(seconds * 10)):
            self.run()
            await trio.sleep(0.1)
        self.run()


class FakeMembers:
    """What `bridge.workers` asks of the mesh."""

    def __init__(self, name: str, *live: str) -> None:
        self.name = name
        self.alive = list(live)
        self.died_s: dict[str, float] = {}

    def live(self) -> list[str]:
        return self.alive

    def dead_for_s(self, name: str, now: float) -> float | None:
        return now - self.died_s[name] if name in self.died_s else None


class FakePeers:
    """What the other rooms ask of `bridge.peers.Peers`."""

    def __init__(self, name: str, *live: str) -> None:
        self.name = name
        self.live_names: tuple[str, ...] = live
        self.strangers: set[str] = set()
        self.unwell: set[str] = set()
        self.timings: list[float] = []
        self.delay_s = 0.05

    @property
    def count(self) -> int:
        return 1 + len(self.live_names)

    def live(self) -> tuple[str, ...]:
        return self.live_names

    def is_live(self, name: str) -> bool:
        return name in self.live_names

    def is_well(self, name: str) -> bool:
        return name in self.live_names and name not in self.unwell

    def hashes_meet(self, name: str) -> bool:
        return name not in self.strangers

    def timed(self, name: str, age_s: float) -> None:
        self.timings.append(age_s)
