"""Fault plans: what happens to a simulated cluster, drawn from a seed as a list that can be shortened.

Owns the plan only. Checkers never see it, except its `calm` mark. A plan is a list of `Fault`s with times; `shrink`
tries to leave faults out one by one while the run still fails.
"""

from __future__ import annotations

from collections.abc import Callable
from random import Random

import msgspec

from tests.sim.network import Cut
from tests.sim.world import World

FAULTS_BEGIN_S = 5.0
FAULTS_END_S = 75.0
RUN_S = 120.0
SKEW_S = 150.0
CLOCK_BEHIND_S = 400.0
"""Together below the 600 s a clock may be ahead of another, beyond which members rightly refuse each other."""


class Fault(msgspec.Struct, frozen=True):
    """One thing done to the cluster at `at_s`; undone by itself after `for_s` where that makes sense."""

    at_s: float
    kind: str
    for_s: float = 0.0
    names: tuple[str, ...] = ()
    amount: float = 0.0


class Plan(msgspec.Struct, frozen=True):
    seed: int
    members: int
    faults: tuple[Fault, ...]
    skew_s: tuple[float, ...]
    """Clock offset of each member at the start."""
    drift: tuple[float, ...]


KINDS = (
    "loss",
    "delay",
    "duplicate",
    "reorder",
    "cut",
    "cut_one_way",
    "isolate",
    "udp_block",
    "pause",
    "freeze",
    "crash",
    "lose_host",
    "restart",
    "restart_elsewhere",
    "restart_clock_behind",
    "leave",
    "impostor",
    "flap",
)


def draw(seed: int) -> Plan:
    """The plan of a seed: 3 to 10 members, up to a dozen faults of the kinds above."""
    rng = Random(seed * 2 + 1)
    members = rng.randint(3, 10)
    names = tuple(f"n{number:04d}" for number in range(members))
    # Each seed favours a few kinds, so that rare mixes come up often enough.
    kinds = rng.sample(KINDS, rng.randint(1, 6))
    faults = []
    for _ in range(rng.randint(1, 12)):
        at_s = rng.uniform(FAULTS_BEGIN_S, FAULTS_END_S - 5)
        for_s = min(rng.choice((1.0, 4.0, 12.0, 40.0)) * rng.uniform(0.5, 1.5), FAULTS_END_S - at_s)
        chosen = tuple(rng.sample(names, rng.randint(1, max(1, members // 2))))
        faults.append(Fault(at_s, rng.choice(kinds), for_s, chosen, rng.random()))
    faults.sort(key=lambda fault: fault.at_s)
    skew_s = tuple(rng.uniform(-SKEW_S, SKEW_S) for _ in names)
    drift = tuple(rng.uniform(-1e-3, 1e-3) for _ in names)
    return Plan(seed, members, tuple(faults), skew_s, drift)


class Player:
    """Performs a plan on a world. The first seed always comes back: with all seeds gone for ever nobody can join."""

    def __init__(self, plan: Plan, world: World) -> None:
        self.plan = plan
        self.world = world
        self.rng = Random(plan.seed * 2)
        self.names = [f"n{number:04d}" for number in range(plan.members)]
        self.clock: dict[str, tuple[float, float]] = {}
        self.impostors: set[str] = set()
        """Names that were claimed twice: left alone afterwards, or the impostor would become the rightful one."""

    def begin(self) -> None:
        """Start all members (the first three are seeds of all) and put the faults on the clock."""
        world = self.world
        for place, name in enumerate(self.names):
            self.clock[name] = (self.plan.skew_s[place], self.plan.drift[place])
            world.loop.at(self.rng.random() * 2, self._start, name)
        for fault in self.plan.faults:
            world.loop.at(fault.at_s, getattr(self, "_" + fault.kind), fault)

    def end_faults(self) -> None:
        """From now on the network is well and nobody is hurt any more."""
        self.world.mend()
        weather = self.world.network.weather
        weather.loss = weather.duplication = weather.reorder = 0.0
        weather.delay_min_s, weather.delay_mean_s = 0.0002, 0.0005

    def _seeds(self) -> list[str]:
        # by name: a seed that moves takes its name along, and an address would be nobody's then
        return [f"{name}:7946" for name in self.names[:3]]

    def _start(self, name: str, host: int | None = None) -> None:
        offset_s, drift = self.clock[name]
        if name not in self.world.nodes:
            self.world.start(name, self._seeds(), host, offset_s, drift)

    def _alive(self, fault: Fault) -> list[str]:
        spared = self.world.left | self.impostors
        return [name for name in fault.names if name in self.world.nodes and name not in spared]

    def _later(self, fault: Fault, action: Callable[..., None], *args: object) -> None:
        self.world.loop.at(self.world.loop.now + fault.for_s, action, *args)

    def _hosts(self, names: tuple[str, ...] | list[str]) -> set[int]:
        return {self.world.nodes[name].host for name in names if name in self.world.nodes}

    # -- weather

    def _loss(self, fault: Fault) -> None:
        self.world.network.weather.loss = 0.3 * fault.amount
        self._later(fault, self._calm_loss)

    def _calm_loss(self) -> None:
        self.world.network.weather.loss = 0.0

    def _delay(self, fault: Fault) -> None:
        weather = self.world.network.weather
        weather.delay_min_s, weather.delay_mean_s = 0.001, 0.001 + 0.08 * fault.amount
        self._later(fault, self._calm_delay)

    def _calm_delay(self) -> None:
        weather = self.world.network.weather
        weather.delay_min_s, weather.delay_mean_s = 0.0002, 0.0005

    def _duplicate(self, fault: Fault) -> None:
        self.world.network.weather.duplication = 0.5 * fault.amount

    def _reorder(self, fault: Fault) -> None:
        weather = self.world.network.weather
        weather.reorder, weather.reorder_s = 0.5 * fault.amount, 0.3 * fault.amount

    # -- cuts

    def _cut_for(self, fault: Fault, cut: Cut) -> None:
        self.world.cut(cut)
        self._later(fault, self.world.mend, cut)

    def _cut(self, fault: Fault) -> None:
        self._cut_for(fault, Cut(self._hosts(fault.names)))

    def _cut_one_way(self, fault: Fault) -> None:
        self._cut_for(fault, Cut(self._hosts(fault.names), is_one_way=True))

    def _isolate(self, fault: Fault) -> None:
        self._cut_for(fault, Cut(self._hosts(fault.names[:1])))

    def _udp_block(self, fault: Fault) -> None:
        self._cut_for(fault, Cut(self._hosts(fault.names), is_udp_only=True, inner=fault.amount < 0.5))

    def _flap(self, fault: Fault) -> None:
        for number in range(5):
            self.world.loop.at(self.world.loop.now + 3 * number, self._flap_once, fault)

    def _flap_once(self, fault: Fault) -> None:
        if self.world.loop.now < FAULTS_END_S - 2:
            cut = self.world.cut(Cut(self._hosts(fault.names)))
            self.world.loop.at(self.world.loop.now + 0.5 + 2 * fault.amount, self.world.mend, cut)

    # -- processes

    def _pause(self, fault: Fault) -> None:
        for name in self._alive(fault):
            self.world.pause(name, min(fault.for_s, 0.2 + 8 * fault.amount))

    def _freeze(self, fault: Fault) -> None:
        for name in self._alive(fault)[:1]:
            self.world.pause(name, 0.5)

    def _crash(self, fault: Fault) -> None:
        for name in self._alive(fault):
            host = self.world.nodes[name].host
            self.world.crash(name)
            if fault.amount < 0.6 or name == self.names[0]:
                self._later(fault, self._start, name, host)

    def _lose_host(self, fault: Fault) -> None:
        for name in self._alive(fault)[:2]:
            self.world.crash(name, host_lost=True)
            if fault.amount < 0.5 or name == self.names[0]:
                self._later(fault, self._start, name)

    def _restart(self, fault: Fault) -> None:
        for name in self._alive(fault):
            self.world.restart(name, self._seeds(), self.clock[name][0])

    def _restart_elsewhere(self, fault: Fault) -> None:
        for name in self._alive(fault)[:1]:
            self.world.restart(name, self._seeds(), self.clock[name][0], new_address=True)

    def _restart_clock_behind(self, fault: Fault) -> None:
        for name in self._alive(fault)[:1]:
            offset_s = -CLOCK_BEHIND_S * fault.amount
            self.clock[name] = (offset_s, 0.0)
            self.world.restart(name, self._seeds(), offset_s)

    def _leave(self, fault: Fault) -> None:
        for name in self._alive(fault)[:1]:
            if len(self.world.nodes) > 2:
                host = self.world.nodes[name].host
                self.world.leave(name)
                if fault.amount < 0.5 or name == self.names[0]:
                    self.world.loop.at(self.world.loop.now + max(3.0, fault.for_s), self._start, name, host)

    def _impostor(self, fault: Fault) -> None:
        """A second process with a living member's name, on another host: it must stop, the first must stay."""
        for name in self._alive(fault)[:1]:
            if len(self.impostors) < 2:
                self.impostors.add(name)
                first, address = self.world.nodes[name], self.world.names[name]
                self.world.start(name, self._seeds(), None, self.clock[name][0] + 5.0)
                self.world.nodes[name], self.world.names[name] = first, address


def shrink(plan: Plan, fails: Callable[[Plan], bool], tries_max: int = 60) -> Plan:
    """The shortest plan found that still fails, leaving faults out one by one."""
    tries = 0
    place = 0
    while place < len(plan.faults) and tries < tries_max:
        tries += 1
        faults = plan.faults[:place] + plan.faults[place + 1 :]
        shorter = msgspec.structs.replace(plan, faults=faults)
        if fails(shorter):
            plan = shorter
        else:
            place += 1
    return plan
