"""What replicated state and its seal cost, in microseconds: `python -m tests.bench.replica_cost`.

Each line has a budget; a line over it is marked. Best of several runs. Not part of the test run: a time is no assertion
on a shared machine.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from random import Random

from mesh.errors import MeshError
from mesh.keyring import Keyring
from mesh.namespace import Counter, Ephemeral, Lww, Owned, Stream
from mesh.replica import Replica
from mesh.seal import Sealer

RUNS = 5
COUNT = 1000
DELTA = bytes(22 + 8 * 18)
"""A prefix placement of 18 new blocks."""

NAMESPACES = (
    Lww(name="conf"),
    Owned(name="reg"),
    Ephemeral(name="load"),
    Counter(name="hits"),
    Stream(name="prefix", coalesce_s=0.1),
)


class Cluster:
    """One replica that writes, and its peers."""

    def __init__(self, peers: int) -> None:
        self.now = 1000.0
        names = ["a", *(f"p{number}" for number in range(peers))]
        self.nodes = {name: Replica(name, 1, NAMESPACES, self.now, Random(name)) for name in names}
        self.writer = self.nodes["a"]
        for name in names[1:]:
            self.writer.peer_up(name, 1, self.now)
            self.nodes[name].peer_up("a", 1, self.now)
        self.settle()

    def settle(self) -> None:
        """Everything due is said and heard."""
        is_busy = True
        while is_busy:
            is_busy = False
            for name, node in self.nodes.items():
                if self.now >= node.deadline():
                    node.tick(self.now)
                for peer in node.peers_to_send():
                    for frame in node.frames_to_send(peer, self.now):
                        is_busy = True
                        self.nodes[peer].receive(name, frame, self.now)
                while node.next_change() is not None:
                    pass

    def append(self) -> None:
        """A second of a thousand appends, sent to all; nobody receives."""
        writer = self.writer
        for _ in range(COUNT):
            self.now += 0.001
            writer.append("prefix", DELTA, self.now)
            if self.now >= writer.deadline():
                writer.tick(self.now)
                for peer in writer.peers_to_send():
                    writer.frames_to_send(peer, self.now)

    def relay(self) -> None:
        """The same, received and told."""
        for _ in range(COUNT):
            self.writer.append("prefix", DELTA, self.now)
        self.now += 0.2
        self.settle()

    def put(self) -> None:
        """A thousand changed loads of 16 workers."""
        for number in range(COUNT):
            self.writer.put("load", b"w%d" % (number % 16), b"%d" % number, self.now)

    def add(self) -> None:
        """A thousand counted requests."""
        for number in range(COUNT):
            self.writer.add("hits", b"tenant %d" % (number % 16), 1, self.now)


def reject(sealer: Sealer, packets: list[bytes]) -> None:
    """Every packet is turned away."""
    for packet in packets:
        try:
            sealer.open(packet, 1.0)
        except MeshError:
            continue
        raise AssertionError("a packet of nobody was let in")


def measure(what: str, budget_us: float, work: Callable[[], None]) -> None:
    """Print one line."""
    best = float("inf")
    for _ in range(RUNS):
        start = time.perf_counter()
        work()
        best = min(best, (time.perf_counter() - start) / COUNT * 1e6)
    print(f"{what:44} {best:8.2f} us  (budget {budget_us:g}){'  OVER' if best > budget_us else ''}")


def main() -> None:
    """All lines."""
    for peers in (2, 7, 31):
        measure(f"append, encode, frames for {peers} peers", 20.0, Cluster(peers).append)
    measure("append to told at one peer", 10.0, Cluster(1).relay)
    measure("put an ephemeral entry", 5.0, Cluster(2).put)
    measure("add to a counter", 5.0, Cluster(2).add)
    ring = Keyring.of(bytes(16))
    ours, theirs = Sealer(b"boot---a", "c", ring), Sealer(b"boot---b", "c", ring)
    packets = iter([theirs.seal(bytes(100)) for _ in range(COUNT * RUNS)])
    measure("seal 100 bytes", 5.0, lambda: [theirs.seal(bytes(100)) for _ in range(COUNT)].clear())
    measure("open 100 bytes", 5.0, lambda: [ours.open(next(packets), 1.0) for _ in range(COUNT)].clear())
    genuine = theirs.seal(bytes(100))
    forged = [genuine[:8] + os.urandom(8) + genuine[16:] for _ in range(COUNT)]
    measure("turn away garbage", 3.0, lambda: reject(ours, [os.urandom(60)] * COUNT))
    measure("turn away a forged sender", 5.0, lambda: reject(ours, forged))


if __name__ == "__main__":
    main()
