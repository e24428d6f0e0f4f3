"""A small world of replicas for tests: seeded network, virtual time, crashes, partitions; and its checkers.

Owns the network (in order and lossless like TCP, or lossy, duplicating and reordering), an oracle in place of the
membership machine, and a model user at each node that believes only what `next_change` tells. The checkers compare
the nodes with each other and with the model; the workload knows nothing of them. Replays: `World(seed, ...)`.
"""

from __future__ import annotations

import hashlib
import heapq
import math
from collections.abc import Iterable, Iterator
from random import Random

from mesh.frames import Frame
from mesh.namespace import (
    Appended,
    Counted,
    Counter,
    Ended,
    Ephemeral,
    Lost,
    Lww,
    Namespace,
    Owned,
    Put,
    Removed,
    Restarted,
    Restored,
    Stream,
)
from mesh.replica import Replica, ReplicaSettings

CONF, REG, LOAD, HITS, TOKENS, PREFIX = "conf", "reg", "load", "hits", "tokens", "prefix"
TTL_S = 3.0


def digest8(item: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(item, digest_size=8).digest(), "big")


class Index:
    """The model user's prefix index: per origin, per one-byte key, a set of four-byte items. A delta is the key and
    an item, or the key alone, which clears it."""

    def __init__(self) -> None:
        self.known: dict[str, dict[bytes, set[bytes]]] = {}

    def apply(self, origin: str, payload: bytes) -> None:
        key, item = payload[:1], payload[1:]
        if item:
            self.known.setdefault(origin, {}).setdefault(key, set()).add(item)
        else:
            self.known.setdefault(origin, {}).pop(key, None)

    def fingerprints(self, origin: str) -> Iterable[tuple[bytes, int, int]]:
        for key, items in self.known.get(origin, {}).items():
            xor = 0
            for item in items:
                xor ^= digest8(item)
            yield key, len(items), xor

    def snapshot(self, origin: str, key: bytes | None) -> Iterator[bytes] | None:
        known = self.known.get(origin, {})
        rows = [k + item for k in sorted(known) if key in (None, k) for item in sorted(known[k])]
        return iter([b"".join(rows[i : i + 8]) for i in range(0, len(rows), 8)])

    def restore(self, change: Restored) -> None:
        if change.is_first:
            if change.key is None:
                self.known[change.owner] = {}
            else:
                self.known.setdefault(change.owner, {}).pop(change.key, None)
        for i in range(0, len(change.chunk), 5):
            self.apply(change.owner, change.chunk[i : i + 5])

    def view(self) -> dict[str, dict[bytes, set[bytes]]]:
        found = {o: {k: set(v) for k, v in keys.items() if v} for o, keys in self.known.items()}
        return {o: keys for o, keys in found.items() if keys}


class Node:
    """One life of one member with its model user."""

    def __init__(self, world: World, name: str, life: int) -> None:
        self.name = name
        self.life = life
        self.index = Index()
        self.maps: dict[tuple[str, str, bytes], bytes] = {}
        self.conf: dict[bytes, bytes] = {}
        self.counted: dict[tuple[str, bytes, int], int] = {}
        self.lost = 0
        self.due = 0.0
        """The replica's deadline after the last pump; every call of the replica is followed by one."""
        self.replica = Replica(
            name,
            life,
            world.namespaces(self.index),
            world.now,
            Random(f"{world.seed}/{name}/{life}"),
            wall_offset_s=world.skew[name],
            settings=world.settings,
        )
        self.replica.set_relay(world.is_relay)

    def drain(self) -> None:
        while (change := self.replica.next_change()) is not None:
            match change:
                case Put(namespace, owner, key, value):
                    if namespace == CONF:
                        self.conf[key] = value
                    else:
                        assert self.maps.get((namespace, owner, key)) != value, "told twice"
                        self.maps[(namespace, owner, key)] = value
                case Removed(namespace, owner, key):
                    if namespace == CONF:
                        del self.conf[key]
                    else:
                        del self.maps[(namespace, owner, key)]
                case Counted(namespace, key, window, total):
                    self.counted[(namespace, key, window)] = total
                case Appended(_, owner, _, payload):
                    self.index.apply(owner, payload)
                case Restored():
                    self.index.restore(change)
                case Ended(_, owner) | Restarted(_, owner):
                    self.index.known.pop(owner, None)
                case Lost():
                    self.lost += 1
                case _:
                    pass


class World:
    """`names` nodes; `loss` etc. above zero make the network worse than TCP ever is."""

    def __init__(
        self,
        seed: int,
        names: int = 3,
        *,
        loss: float = 0.0,
        duplicate: float = 0.0,
        reorder: bool = False,
        is_relay: bool = False,
        skew_s: float = 0.0,
        tombstone_s: float = 3600.0,
        has_source: bool = True,
        ring_bytes: int = 1500,
        cap_bytes: int = 1 << 20,
    ) -> None:
        self.seed = seed
        self.rng = Random(seed)
        self.now = 1000.0
        self.loss, self.duplicate, self.reorder = loss, duplicate, reorder
        self.is_relay = is_relay
        self.tombstone_s = tombstone_s
        self.has_source = has_source
        self.ring_bytes = ring_bytes
        self.cap_bytes = cap_bytes
        self.settings = ReplicaSettings(anti_entropy_interval_s=2.0, want_timeout_s=0.5, snapshot_idle_s=1.0)
        self.names = [f"n{i}" for i in range(names)]
        self.skew = {name: self.rng.uniform(-skew_s, skew_s) for name in self.names}
        self.nodes: dict[str, Node] = {}
        self.lives: dict[str, int] = {}
        self.left: set[str] = set()
        self.links: set[frozenset[str]] = set()
        self.cuts: set[frozenset[str]] = set()
        self.queue: list[tuple[float, int, str, int, str, int, Frame, int]] = []
        self.sequence = 0
        self.arrival: dict[tuple[str, str], float] = {}
        self.epoch: dict[frozenset[str], int] = {}
        self.frames = 0
        self.bytes = 0
        self.adds: dict[tuple[str, int, bytes], int] = {}
        for name in self.names:
            self.start(name)
        self.reconnect()

    def namespaces(self, index: Index) -> list[Namespace]:
        cap = self.cap_bytes
        return [
            Lww(name=CONF, tombstone_s=self.tombstone_s, bytes_max=cap),
            Owned(name=REG, tombstone_s=self.tombstone_s, restart_grace_s=1.0, bytes_max=cap),
            Ephemeral(name=LOAD, coalesce_s=0.05, ttl_s=TTL_S, refresh_s=1.0, bytes_max=cap),
            Counter(name=HITS, coalesce_s=0.1, bytes_max=cap),
            Counter(name=TOKENS, coalesce_s=0.1, window_s=10.0, bytes_max=cap),
            Stream(
                name=PREFIX,
                coalesce_s=0.1,
                ring_bytes_max=self.ring_bytes,
                bytes_max=4 * self.ring_bytes,
                source=index if self.has_source else None,
            ),
        ]

    # ---- life and death ---------------------------------------------------------------------------------

    def start(self, name: str) -> Node:
        self.lives[name] = self.lives.get(name, 0) + 1
        self.left.discard(name)
        node = self.nodes[name] = Node(self, name, self.lives[name])
        return node

    def crash(self, name: str) -> None:
        del self.nodes[name]
        self._unlink(name)
        self.membership()

    def restart(self, name: str) -> None:
        self.start(name)
        self.reconnect()

    def leave(self, name: str) -> None:
        node = self.nodes[name]
        node.replica.leave(self.now)
        self.pump(node)
        del self.nodes[name]
        self.left.add(name)
        self._unlink(name)
        self.membership()

    def _unlink(self, name: str) -> None:
        for pair in [p for p in self.links if name in p]:
            self._down(pair)

    def _wanted(self) -> set[frozenset[str]]:
        live = sorted(self.nodes)
        pairs = {frozenset((a, b)) for i, a in enumerate(live) for b in live[:i]}
        if self.is_relay and len(live) > 3:  # a ring with one chord
            pairs = {frozenset((live[i], live[i - 1])) for i in range(len(live))} | {
                frozenset((live[0], live[2]))
            }
        return {p for p in pairs if p not in self.cuts}

    def _down(self, pair: frozenset[str]) -> None:
        self.links.discard(pair)
        self.epoch[pair] = self.epoch.get(pair, 0) + 1
        a, b = sorted(pair)
        for me, other in ((a, b), (b, a)):
            if me in self.nodes:
                self.nodes[me].replica.peer_down(other, self.now)

    def reconnect(self) -> None:
        wanted = self._wanted()
        for pair in [p for p in self.links if p not in wanted]:
            self._down(pair)
        for pair in sorted(wanted - self.links, key=sorted):
            self.links.add(pair)
            a, b = sorted(pair)
            self.nodes[a].replica.peer_up(b, self.lives[b], self.now)
            self.nodes[b].replica.peer_up(a, self.lives[a], self.now)
        self.membership()

    def membership(self) -> None:
        """What the membership machine would tell. Who is cut off hears of nobody, until the cut is healed."""
        for node in self.nodes.values():
            for name in self.names:
                if name == node.name or frozenset((name, node.name)) in self.cuts:
                    continue
                life = self.lives[name]
                if name in self.nodes:
                    node.replica.owner_restarted(name, life, self.now)
                elif name in self.left:
                    node.replica.owner_left(name, life, self.now)
                else:
                    node.replica.owner_died(name, life, self.now)
        for node in list(self.nodes.values()):
            self.pump(node)

    def cut(self, side: Iterable[str]) -> None:
        inside = set(side)
        self.cuts = {frozenset((a, b)) for a in inside for b in self.names if b not in inside}
        self.reconnect()

    def heal(self) -> None:
        self.cuts = set()
        self.reconnect()

    # ---- the network ------------------------------------------------------------------------------------

    def pump(self, node: Node) -> None:
        replica = node.replica
        for _ in range(50):
            if self.now >= replica.deadline():
                replica.tick(self.now)
            for peer in replica.peers_to_send():
                for frame in replica.frames_to_send(peer, self.now):
                    self._send(node.name, peer, frame)
            node.drain()
            node.due = replica.deadline()
            if self.now < node.due and not replica.peers_to_send():
                return
        raise AssertionError(f"seed {self.seed}: {node.name} never comes to rest")

    def _send(self, source: str, target: str, frame: Frame) -> None:
        self.frames += 1
        self.bytes += len(frame.body) + 5
        if self.rng.random() < self.loss:
            return
        for _ in range(2 if self.rng.random() < self.duplicate else 1):
            when = self.now + self.rng.uniform(0.0005, 0.005)
            if self.reorder:
                when += self.rng.choice((0.0, 0.0, 0.3))
            else:
                when = max(when, self.arrival.get((source, target), 0.0))
                self.arrival[(source, target)] = when
            self.sequence += 1
            pair = frozenset((source, target))
            item = (when, self.sequence, source, self.lives[source], target, self.lives[target], frame)
            heapq.heappush(self.queue, (*item, self.epoch.get(pair, 0)))

    def run(self, seconds: float) -> None:
        """Advance virtual time."""
        end = self.now + seconds
        while True:
            due, name = min(((n.due, n.name) for n in self.nodes.values()), default=(math.inf, ""))
            arrives = self.queue[0][0] if self.queue else math.inf
            when = max(self.now, min(due, arrives))
            if when > end:
                break
            self.now = when
            if arrives <= due:
                self._deliver()
            else:
                self.pump(self.nodes[name])
        self.now = end

    def _deliver(self) -> None:
        _, _, source, source_life, target, life, frame, epoch = heapq.heappop(self.queue)
        pair = frozenset((source, target))
        node = self.nodes.get(target)
        if node is None or node.life != life or self.epoch.get(pair, 0) != epoch or pair not in self.links:
            return
        assert self.lives[source] == source_life
        node.replica.receive(source, frame, self.now)
        self.pump(node)

    # ---- the workload -----------------------------------------------------------------------------------

    def act(self, name: str) -> None:
        """One random write at a node."""
        rng, node = self.rng, self.nodes[name]
        replica = node.replica
        key = bytes((97 + rng.randrange(6),))
        value = rng.randbytes(rng.randrange(1, 12))
        match rng.randrange(9):
            case 0:
                replica.put(CONF, key, value, self.now)
                node.conf[key] = value
            case 1:
                replica.remove(CONF, key, self.now)
                node.conf.pop(key, None)
            case 2 | 3:
                replica.put(REG, key, value, self.now)
            case 4:
                replica.remove(REG, key, self.now)
            case 5:
                replica.put(LOAD, key, value, self.now)
            case 6:
                replica.remove(LOAD, key, self.now)
            case 7:
                amount = rng.randrange(-3, 10)
                for namespace in (HITS, TOKENS):
                    replica.add(namespace, key, amount, self.now)
                at = (name, node.life, key)
                self.adds[at] = self.adds.get(at, 0) + amount
            case _:
                for _ in range(rng.choice((1, 1, 1, 40))):
                    payload = key if rng.random() < 0.05 else key + rng.randbytes(4)
                    node.index.apply(name, payload)
                    replica.append(PREFIX, payload, self.now)
        self.pump(node)

    def chaos(self, steps: int, *, faults: bool = True) -> None:
        """Random writes and faults."""
        rng = self.rng
        for _ in range(steps):
            kind = rng.random() if faults else 1.0
            live = sorted(self.nodes)
            dead = sorted(set(self.names) - set(live))
            if kind < 0.04 and len(live) > 2:
                self.crash(rng.choice(live))
            elif kind < 0.05 and len(live) > 2:
                self.leave(rng.choice(live))
            elif kind < 0.10 and dead:
                self.restart(rng.choice(dead))
            elif kind < 0.15:
                self.cut(rng.sample(self.names, rng.randrange(1, len(self.names))))
            elif kind < 0.20:
                self.heal()
            else:
                self.act(rng.choice(live))
            self.run(rng.choice((0.0, 0.01, 0.2)))

    def settle(self, seconds: float = 40.0) -> None:
        """No more faults; long enough for every repair."""
        self.loss = self.duplicate = 0.0
        self.reorder = False
        self.heal()
        self.run(seconds)

    # ---- the checkers -----------------------------------------------------------------------------------

    def check(self) -> None:
        """At quiescence: everybody agrees, and the user was told so."""
        self.check_digests()
        self.check_users()
        self.check_owners()
        self.check_counters()
        self.check_streams()
        self.check_bounds()

    def check_digests(self) -> None:
        for namespace in (CONF, REG, LOAD, HITS, PREFIX):
            digests = {name: node.replica.digest(namespace) for name, node in self.nodes.items()}
            assert len(set(digests.values())) == 1, (self.seed, namespace, digests)

    def check_users(self) -> None:
        for node in self.nodes.values():
            told = {(ns, o, k): v for (ns, o, k), v in node.maps.items()}
            held = {
                (ns, o, k): v for ns in (REG, LOAD) for o, k, v in node.replica.items(ns) if o != node.name
            }
            assert told == held, (self.seed, node.name)
            assert node.conf == {k: v for _, k, v in node.replica.items(CONF)}, (self.seed, node.name)

    def check_owners(self) -> None:
        for node in self.nodes.values():
            for owner in self.names:
                for namespace in (REG, LOAD):
                    seen = {k: v for _, k, v in node.replica.items(namespace, owner)}
                    if owner in self.nodes:
                        truth = {k: v for _, k, v in self.nodes[owner].replica.items(namespace, owner)}
                        assert seen == truth, (self.seed, node.name, owner, namespace)
                    elif owner in self.left or namespace == LOAD:
                        assert not seen, (self.seed, node.name, owner, namespace)

    def check_counters(self) -> None:
        for key in {key for _, _, key in self.adds}:
            totals = {node.replica.total(HITS, key, self.now) for node in self.nodes.values()}
            assert len(totals) == 1, (self.seed, key)
            if all(
                life == self.lives[name] and name in self.nodes for name, life, k in self.adds if k == key
            ):
                assert totals == {sum(v for (_, _, k), v in self.adds.items() if k == key)}, (self.seed, key)

    def check_streams(self) -> None:
        if not self.has_source:
            return
        for node in self.nodes.values():
            for owner, other in self.nodes.items():
                mine = node.index.view().get(owner, {})
                truth = other.index.view().get(owner, {})
                assert mine == truth, (self.seed, node.name, owner)

    def check_bounds(self) -> None:
        for node in self.nodes.values():
            stats = node.replica.stats()
            for namespace in (REG, LOAD, HITS, TOKENS):
                assert stats[f"{namespace}.bytes"] <= self.cap_bytes
                assert stats[f"{namespace}.bytes"] >= 0
            assert stats[f"{CONF}.bytes"] <= 2 * self.cap_bytes
            assert stats[f"{PREFIX}.bytes"] <= 4 * self.ring_bytes
