"""What must hold in every run, whatever the plan did. Checkers read the world; they never touch it.

While it runs: no message is answered by its own type, records about a life never go back, queues stay bounded. At
the end, with the faults over for `HEAL_S`: every process sees exactly the others alive, fingerprints agree, the idle
mesh is quiet, an impostor has stopped.
"""

from __future__ import annotations

from mesh.member import Status
from tests.sim.node import Node
from tests.sim.world import World

HEAL_S = 35.0
"""Time from the last fault to the check: p95 of a heal is 15 s, the rest is for the tail of 10,000 seeds."""
QUIET_S = 8.0
IDLE_BYTES_PER_S = 1_500 + 100 * 10
"""Idle bound per node of up to 10 (mesh.md 4.10: 1.5 KB/s at 3, 3 KB/s at 16), plus re-dials of tombstones."""
STATE_BYTES_PER_S = 12_000
"""Replicated state at rest among ten: vectors, and each node's load said again every second."""
TIMERS_PER_MEMBER = 40
STEP_S = 0.5


class Checker:
    """All checks of one run. `problems` is empty when all is well."""

    def __init__(self, world: World, has_state: bool = False) -> None:
        self.world = world
        self.idle_bytes_per_s = IDLE_BYTES_PER_S + (STATE_BYTES_PER_S if has_state else 0)
        self.problems: list[str] = []
        self._ranks: dict[tuple[int, str], tuple[int, bytes, int]] = {}
        self._bytes: dict[int, int] = {}
        self._quiet_since_s = 0.0

    def say(self, text: str) -> None:
        if len(self.problems) < 20:
            self.problems.append(f"t={self.world.loop.now:.2f} {text}")

    def step(self) -> None:
        """Called every STEP_S."""
        for name in sorted(self.world.nodes):
            node = self.world.nodes[name]
            self._check_ranks(node)
            self._check_bounds(node)

    def _check_ranks(self, node: Node) -> None:
        """What a node holds of a name only ever rises (within one life of the observer)."""
        for member in node.swim.members():
            key = (id(node), member.name)
            rank = member.record.rank()
            if rank < self._ranks.get(key, rank):
                self.say(f"{node.name} went back on {member.name}: {self._ranks[key]} -> {rank}")
            self._ranks[key] = rank
        key = (id(node), node.name)
        rank = node.swim.own.rank()
        if rank < self._ranks.get(key, rank):
            self.say(f"{node.name} lowered its own incarnation")
        self._ranks[key] = rank

    def _check_bounds(self, node: Node) -> None:
        counts = node.swim.counts()
        members = counts["members"] + 1
        if counts["rumors"] > members or counts["suspicions"] > members or counts["doubts"] > members:
            self.say(f"{node.name} queues {counts}")
        if counts["timers"] > 1100 + TIMERS_PER_MEMBER * members:
            self.say(f"{node.name} has {counts['timers']} timers for {members} members")
        if counts["outbox_dropped"] or counts["events_dropped"]:
            self.say(f"{node.name} dropped {counts}")

    def begin_quiet(self) -> None:
        """The idle measurement begins."""
        self._bytes = dict(self.world.network.bytes_sent)
        self._quiet_since_s = self.world.loop.now

    def end(self) -> None:
        """The final checks."""
        world = self.world
        for complaint in world.complaints:
            self.say(complaint)
        names = sorted(world.nodes)
        prints = {world.nodes[name].swim.fingerprint for name in names}
        for name in names:
            node = world.nodes[name]
            self._check_view(node, names)
            spent_s = world.loop.now - self._quiet_since_s
            sent = world.network.bytes_sent.get(node.host, 0) - self._bytes.get(node.host, 0)
            if spent_s > 1 and sent / spent_s > self.idle_bytes_per_s:
                self.say(f"{name} sends {sent / spent_s:.0f} B/s at idle")
        if len(prints) > 1:
            self.say(f"fingerprints differ: {sorted(prints)}")
        # an impostor is a process of a name that is not the one the world keeps for it
        for node in world.on_host.values():
            if node is not None and node.is_up and world.nodes.get(node.name) is not node:
                self.say(f"a second {node.name} still runs on host {node.host}")

    def _check_view(self, node: Node, names: list[str]) -> None:
        if not node.swim.is_running:
            self.say(f"{node.name} stopped: {node.conflict}")
            return
        for name in names:
            if name == node.name:
                continue
            member = node.swim.member(name)
            if member is None or member.status != Status.ALIVE:
                self.say(f"{node.name} sees {name} as {member}, but it lives")
            elif member.record.boot != self.world.nodes[name].swim.own.boot:
                self.say(f"{node.name} sees an old life of {name}")
        for member in node.swim.live():
            if member.name not in self.world.nodes:
                self.say(f"{node.name} sees {member}, but it is gone")
