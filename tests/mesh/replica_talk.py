"""Replicas that talk at one instant: for tests of single rules, where the network does not matter.

Owns a handful of replicas, all connected unless told otherwise, and one clock that the test moves.
"""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

from mesh.frames import Frame
from mesh.namespace import Change, Namespace
from mesh.replica import Replica, ReplicaSettings


class Talk:
    """`now` is moved by `run`; frames pass at once, in order."""

    def __init__(
        self,
        namespaces: Sequence[Namespace],
        names: str = "ab",
        *,
        settings: ReplicaSettings | None = None,
        is_connected: bool = True,
        is_relay: bool = False,
    ) -> None:
        self.now = 1000.0
        self.namespaces = namespaces
        self.settings = settings or ReplicaSettings()
        self.is_relay = is_relay
        self.lives = dict.fromkeys(names, 1)
        self.replicas = {name: self.new(name) for name in names}
        self.links: set[frozenset[str]] = set()
        self.told: dict[str, list[Change]] = {name: [] for name in names}
        self.log: list[tuple[str, str, Frame]] = []
        if is_connected:
            for i, a in enumerate(names):
                for b in names[:i]:
                    self.connect(a, b)
            self.settle()

    def new(self, name: str) -> Replica:
        replica = Replica(
            name, self.lives[name], self.namespaces, self.now, Random(name), settings=self.settings
        )
        replica.set_relay(self.is_relay)
        return replica

    def __getitem__(self, name: str) -> Replica:
        return self.replicas[name]

    def connect(self, a: str, b: str) -> None:
        self.links.add(frozenset((a, b)))
        self[a].peer_up(b, self.lives[b], self.now)
        self[b].peer_up(a, self.lives[a], self.now)

    def cut(self, a: str, b: str) -> None:
        self.links.discard(frozenset((a, b)))
        self[a].peer_down(b, self.now)
        self[b].peer_down(a, self.now)

    def restart(self, name: str, life: int | None = None) -> None:
        """Crash and come back, connected to the same peers. Does not settle."""
        peers = [next(iter(pair - {name})) for pair in self.links if name in pair]
        for peer in peers:
            self.cut(name, peer)
        self.lives[name] = self.lives[name] + 1 if life is None else life
        self.replicas[name] = self.new(name)
        for peer in peers:
            self.connect(name, peer)

    def take(self, name: str, change: Change) -> None:
        """The model user of a node: remembers what it is told."""
        self.told[name].append(change)

    def settle(self) -> list[Frame]:
        """Everything that is due now is said and heard; the frames it took."""
        start = len(self.log)
        for _ in range(1000):
            is_quiet = True
            for name, replica in self.replicas.items():
                if self.now >= replica.deadline():
                    replica.tick(self.now)
                for peer in replica.peers_to_send():
                    for frame in replica.frames_to_send(peer, self.now):
                        is_quiet = False
                        self.log.append((name, peer, frame))
                        if frozenset((name, peer)) in self.links:
                            self.replicas[peer].receive(name, frame, self.now)
                while (change := replica.next_change()) is not None:
                    self.take(name, change)
            if is_quiet:
                return [frame for _, _, frame in self.log[start:]]
        raise AssertionError("they never stop talking")

    def run(self, seconds: float) -> list[Frame]:
        """Move the clock from deadline to deadline."""
        start = len(self.log)
        end = self.now + seconds
        self.settle()
        while (due := min(replica.deadline() for replica in self.replicas.values())) <= end:
            self.now = max(self.now, due)
            self.settle()
        self.now = end
        return [frame for _, _, frame in self.log[start:]]

    def changes(self, name: str) -> list[Change]:
        """What was told since the last call."""
        told, self.told[name] = self.told[name], []
        return told

    def is_equal(self) -> bool:
        """Do all digests agree?"""
        return len({replica.digest() for replica in self.replicas.values()}) == 1
