"""Replicated state on the simulated streams: the real replica behind the world's hook, a workload, and its checkers.

Each node writes a little of everything until the faults are over; then one node deletes every shared key. Checked at
the end: digests agree, a counter is the sum of what living processes added, nothing deleted came back, entries of the
dead and left are gone where their rule says so.
"""

from __future__ import annotations

from random import Random

from mesh.frames import Frame
from mesh.member import Record
from mesh.messages import Event, Forgotten, Left, MemberDown, MemberUp, OwnOutranked
from mesh.namespace import Counter, Ephemeral, Lww, Owned, Stream
from mesh.replica import Replica, ReplicaSettings, life_above, life_number
from tests.sim.node import EPOCH_S, Node
from tests.sim.world import World

CONF, REG, LOAD, HITS, PREFIX = "conf", "reg", "load", "hits", "prefix"
CHECKED = (CONF, REG, LOAD, HITS)
WRITE_EVERY_S = 2.0
WRITES_END_S = 90.0
DELETE_AT_S = 102.0
KEYS = [bytes((97 + number,)) for number in range(6)]


def _life(record: Record) -> int:
    return life_number(record.born_s, record.boot)


class State:
    """One node's replica and its user."""

    def __init__(self, node: Node, book: Book) -> None:
        self.node = node
        self.book = book
        own = node.swim.own
        self.life = _life(own)
        self.rng = Random(node.rng.getrandbits(64))
        self.replica = Replica(
            node.name,
            self.life,
            [
                Lww(name=CONF),
                Owned(name=REG, restart_grace_s=1.0),
                Ephemeral(name=LOAD, coalesce_s=0.05, ttl_s=3.0, refresh_s=1.0),
                Counter(name=HITS, coalesce_s=0.1),
                Stream(name=PREFIX, coalesce_s=0.1, ring_bytes_max=4000, bytes_max=64_000),
            ],
            node.clock(),
            Random(node.rng.getrandbits(64)),
            wall_offset_s=EPOCH_S,
            settings=ReplicaSettings(anti_entropy_interval_s=4.0),
        )
        book.states.append(self)
        loop = node.world.loop
        loop.at(loop.now + WRITE_EVERY_S * self.rng.random(), self._write)

    # -- the hook

    def peer_up(self, peer: str, record: Record, now: float) -> None:
        self.replica.peer_up(peer, _life(record), now)

    def peer_down(self, peer: str, now: float) -> None:
        self.replica.peer_down(peer, now)

    def member_event(self, event: Event, now: float) -> None:
        if isinstance(event, MemberUp):
            self.replica.owner_restarted(event.record.name, _life(event.record), now)
        elif isinstance(event, MemberDown):
            self.replica.owner_died(event.record.name, _life(event.record), now)
        elif isinstance(event, Left):
            self.replica.owner_left(event.record.name, _life(event.record), now)
        elif isinstance(event, OwnOutranked):
            self.replica.own_outranked(life_above(event.incarnation), now)
        elif isinstance(event, Forgotten):
            self.replica.owner_forgotten(event.record.name, now)

    def receive(self, peer: str, data: bytes, now: float) -> None:
        self.replica.receive(peer, Frame(data[0], data[1:]), now)

    def tick(self, now: float) -> None:
        self.replica.tick(now)

    def deadline(self) -> float:
        return self.replica.deadline()

    def frames(self, now: float) -> list[tuple[str, bytes]]:
        replica, found = self.replica, []
        while replica.next_change() is not None:
            pass
        if now >= replica.deadline():
            replica.tick(now)
        for peer in replica.peers_to_send():
            for frame in replica.frames_to_send(peer, now):
                found.append((peer, bytes((frame.type,)) + frame.body))
        return found

    # -- the user

    def _write(self) -> None:
        node, rng = self.node, self.rng
        loop = node.world.loop
        if not node.is_up or loop.now >= WRITES_END_S:
            return
        loop.at(loop.now + WRITE_EVERY_S * rng.random(), self._write)
        if node.is_paused or not node.swim.is_running:
            return
        now, key, value = node.clock(), rng.choice(KEYS), rng.randbytes(6)
        match rng.randrange(6):
            case 0:
                self.replica.put(CONF, key, value, now)
            case 1:
                self.replica.remove(CONF, key, now)
            case 2:
                self.replica.put(REG, key, value, now)
            case 3:
                self.replica.put(LOAD, key, value, now)
            case 4:
                self.replica.add(HITS, key, 1, now)
                self.book.adds[(self.life, key)] = self.book.adds.get((self.life, key), 0) + 1
            case _:
                self.replica.append(PREFIX, key + value, now)
        node.drain()


class Book:
    """What was really done in one run, and the checks of state."""

    def __init__(self) -> None:
        self.states: list[State] = []
        self.adds: dict[tuple[int, bytes], int] = {}
        self.has_deleted = False

    def make(self, node: Node) -> State:
        """For `World(make_replica=...)`."""
        return State(node, self)

    def _living(self, world: World) -> list[State]:
        return [state for state in self.states if world.nodes.get(state.node.name) is state.node]

    def step(self, world: World) -> None:
        """At DELETE_AT_S one node deletes every shared key: all writes were over and known long before."""
        living = self._living(world)
        if world.loop.now >= DELETE_AT_S and not self.has_deleted and living:
            self.has_deleted = True
            for key in KEYS:
                living[0].replica.remove(CONF, key, living[0].node.clock())
            living[0].node.drain()

    def problems(self, world: World, has_deaths: bool) -> list[str]:
        """What is wrong at the end. Positions in streams are compared only where every producer lived on: what a
        dead producer said last may have reached some nodes only, and nobody is left to ask."""
        living = self._living(world)
        found = []
        for namespace in CHECKED if has_deaths else (*CHECKED, PREFIX):
            digests = {state.node.name: state.replica.digest(namespace) for state in living}
            if len(set(digests.values())) > 1:
                found.append(f"digests of {namespace} differ: {digests}")
        for key in KEYS:
            sure = sum(self.adds.get((state.life, key), 0) for state in living)
            most = sum(count for (_, each), count in self.adds.items() if each == key)
            for state in living:
                total = state.replica.total(HITS, key, state.node.clock())
                if not sure <= total <= most:
                    found.append(f"{state.node.name} counts {total} of {key!r}, not {sure} to {most}")
                if state.replica.get(CONF, key) is not None:
                    found.append(f"{state.node.name} holds {key!r} again after its deletion")
        names = {state.node.name for state in living}
        for state in living:
            for owner, _, _ in state.replica.items(LOAD):
                if owner not in names:
                    found.append(f"{state.node.name} holds a load of {owner}, which is gone")
        return found
