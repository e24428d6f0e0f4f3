"""Nodes that divide one limit, on a network that is late, loses words, and can be cut; in virtual time.

Owns the delivery of words as the mesh does it (the newest of each owner wins, and is said again after a while), the news of who
is there, which come late as well, and the books of what was let in. The machines are the real ones.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable
from random import Random

from smg.tenancy.bucket import TokenBucket
from smg.tenancy.share_book import WHOLE, Told
from smg.tenancy.shares import DIVIDE, OneLimit, Shares

KEY = b"k"
STEP_S = 0.1
REPEAT_S = 2.0
REFUSED_KNOWN_S = 0.4
SILENT_KNOWN_S = 2.5


class SimNode:
    """One node: its bucket, its shares, what it was asked and what it let in."""

    def __init__(self, world: World, name: str, mode: str) -> None:
        self.name = name
        self.peer = name.encode()
        self.world = world
        self.bucket = TokenBucket(world.rate, world.burst, world.now, KEY)
        self.shares = Shares(
            self.peer, [OneLimit(self.bucket)], mode, world.rng.randrange(1 << 30), world.now
        )
        self.alive = True
        self.demand_per_s = 0.0
        self.admitted: list[float] = []
        self.word: tuple[int, Told | None] = (0, None)
        self.heard: dict[bytes, int] = {}
        self.words_told = 0
        self.live: set[str] = set()
        self.silent: set[str] = set()

    def held(self) -> float:
        row = self.shares.row(KEY)
        return row.held if row is not None else 0.0

    def fraction(self) -> float:
        return self.bucket.burst / self.bucket.capacity

    def beat(self) -> None:
        if not self.alive:
            return
        world = self.world
        live, silent = ([world.nodes[name].peer for name in names] for names in (self.live, self.silent))
        self.shares.meet(live, silent, world.now)
        for _, told in self.shares.step(world.now):
            self.words_told += 1
            self.word = (self.word[0] + 1, told)
            world.tell(self)
        world.after(STEP_S, self.beat)

    def repeat(self) -> None:
        if self.alive:
            self.world.tell(self)
            self.world.after(REPEAT_S, self.repeat)

    def ask(self) -> None:
        if not self.alive:
            return
        world = self.world
        if self.demand_per_s > 0.0:
            if self.bucket.take(world.now):
                self.admitted.append(world.now)
            world.after(world.rng.expovariate(self.demand_per_s), self.ask)
        else:
            world.after(0.05, self.ask)

    def receive(self, sender: SimNode, number: int, told: Told | None) -> None:
        if not self.alive or self.heard.get(sender.peer, -1) >= number:
            return
        self.heard[sender.peer] = number
        if told is None:
            self.shares.hear_end(sender.peer, KEY)
        else:
            self.shares.hear(sender.peer, KEY, told, self.world.now)


class World:
    """See the module. `delay_s` gives the time of one word's way, `loss` the share that never arrives."""

    def __init__(
        self,
        seed: int,
        *,
        rate: float = 20.0,
        burst: float = 20.0,
        loss: float = 0.0,
        delay_s: Callable[[Random], float] = lambda rng: rng.uniform(0.001, 0.06),
    ) -> None:
        self.rng = Random(seed)
        self.rate, self.burst, self.loss, self.delay_s = rate, burst, loss, delay_s
        self.now = 1000.0
        self.nodes: dict[str, SimNode] = {}
        self.cuts: set[frozenset[str]] = set()
        self._due: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()
        self.checks: list[Callable[[World], None]] = []

    def after(self, delay_s: float, call: Callable[[], None]) -> None:
        heapq.heappush(self._due, (self.now + delay_s, next(self._order), call))

    def run(self, seconds: float) -> None:
        end_s = self.now + seconds
        while self._due and self._due[0][0] <= end_s:
            self.now, _, call = heapq.heappop(self._due)
            call()
            for check in self.checks:
                check(self)
        self.now = end_s

    def tell(self, sender: SimNode) -> None:
        number, told = sender.word
        for other in self.nodes.values():
            pair = frozenset((sender.name, other.name))
            if other is sender or pair in self.cuts or self.rng.random() < self.loss:
                continue
            self.after(self.delay_s(self.rng), lambda to=other: to.receive(sender, number, told))

    def start(self, name: str, mode: str = DIVIDE) -> SimNode:
        """A node joins; everybody who is not cut off knows it within half a second."""
        node = self.nodes[name] = SimNode(self, name, mode)
        for other in self.nodes.values():
            if other is not node and other.alive and frozenset((name, other.name)) not in self.cuts:
                self.after(self.rng.uniform(0.05, 0.5), lambda a=node, b=other: self.introduce(a, b))
        self.after(self.rng.uniform(0, STEP_S), node.beat)
        self.after(self.rng.uniform(0, REPEAT_S), node.repeat)
        self.after(0.01, node.ask)
        return node

    def introduce(self, one: SimNode, other: SimNode) -> None:
        if one.alive and other.alive and frozenset((one.name, other.name)) not in self.cuts:
            for a, b in ((one, other), (other, one)):
                a.live.add(b.name)
                a.silent.discard(b.name)
                self.after(self.delay_s(self.rng), lambda to=a, by=b: to.receive(by, *by.word))

    def kill(self, name: str) -> None:
        """A process dies: its port refuses."""
        self.nodes[name].alive = False
        for other in self.nodes.values():
            if other.name != name:
                self.after(REFUSED_KNOWN_S * self.rng.uniform(0.5, 1), lambda to=other: self._gone(to, name))

    def _gone(self, to: SimNode, name: str) -> None:
        if frozenset((to.name, name)) in self.cuts:
            return  # nobody there can see that its port refuses
        to.live.discard(name)
        to.silent.discard(name)
        to.shares.hear_end(name.encode(), KEY)

    def cut(self, *sides: str) -> None:
        """Names of nodes, a side as one string of letters."""
        for one, other in itertools.combinations(sides, 2):
            for a, b in itertools.product(one, other):
                self.cuts.add(frozenset((a, b)))
                for x, y in ((a, b), (b, a)):
                    self.after(
                        SILENT_KNOWN_S * self.rng.uniform(0.6, 1), lambda x=x, y=y: self._silence(x, y)
                    )

    def _silence(self, to: str, name: str) -> None:
        if frozenset((to, name)) in self.cuts and name in self.nodes[to].live:
            self.nodes[to].live.discard(name)
            self.nodes[to].silent.add(name)
            self.nodes[to].shares.hear_end(name.encode(), KEY)

    def heal(self) -> None:
        pairs, self.cuts = self.cuts, set()
        for pair in sorted(pairs, key=sorted):
            one, other = (self.nodes[name] for name in sorted(pair))
            for a, b in ((one, other), (other, one)):
                if not b.alive:
                    self.after(self.rng.uniform(0.1, 2.0), lambda to=a, name=b.name: self._gone(to, name))
            self.after(self.rng.uniform(0.1, 2.0), lambda a=one, b=other: self.introduce(a, b))

    # -- what is measured

    def living(self) -> list[SimNode]:
        return [node for node in self.nodes.values() if node.alive]

    def held(self) -> float:
        return sum(node.held() for node in self.living())

    def given_out(self) -> float:
        return sum(node.fraction() for node in self.living())

    def admitted(self, since_s: float) -> int:
        return sum(at_s > since_s for node in self.nodes.values() for at_s in node.admitted)

    def demand(self, **per_s: float) -> None:
        for name, demand in per_s.items():
            self.nodes[name].demand_per_s = demand

    def whole(self) -> float:
        return sum(WHOLE * node.held() for node in self.living()) / WHOLE
