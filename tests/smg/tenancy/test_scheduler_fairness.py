"""A flood before simulated engines, in virtual time: what another tenant waits, and what the order costs (issue: fairness)."""

from __future__ import annotations

from heapq import heappop, heappush

import pytest

from smg.lab.engine_model import EngineModel, EngineSettings, FirstToken
from smg.tenancy.admission import ADMITTED, EXPIRED
from smg.tenancy.priorities import BULK, CLASSES, DEFAULT, Rules
from smg.tenancy.scheduler import Scheduler, Ticket
from smg.tenancy.slots import Gate, Slots

ENGINE = EngineSettings()
WAY_S = 0.001
"""From the gateway to an engine, and from its first token back."""
LONG_TOKENS, SHORT_TOKENS = 32_000, 100
LONG_S = ENGINE.prefill_s(LONG_TOKENS, 0)
"""One prefill of the flood on an engine that does nothing else."""


class World:
    """Engines behind a scheduler. The router sends each request to the engine with the shortest wait, as smg's do."""

    def __init__(self, engines: int, rules: Rules, estimate: float = 1.0, is_stream: bool = True) -> None:
        self.engines = [EngineModel(ENGINE) for _ in range(engines)]
        self.scheduler = Scheduler(rules, lambda waiter: False)
        self.slots = Slots()
        self.scheduler.add(self.slots)
        self.gate = Gate(self.slots)
        self.gate.widen(engines, rules.prefill_ahead_s is not None)
        self.scheduler.resize(self.slots, 64 * engines, 0.0)
        self.estimate = estimate
        self.is_stream = is_stream
        self.agenda: list[tuple[float, int, str, object]] = []
        self.number = 0
        self.now = 0.0
        self.tickets: dict[str, tuple[Ticket, int, int]] = {}
        self.ttft_s: dict[str, list[float]] = {}
        self.output_tokens = 32
        self.reported_s = 0.0
        self.told: list[int] = []
        self.prefill_s = 0.0  # the longest of the flood's

    def at(self, when_s: float, what: str, about: object = None) -> None:
        self.number += 1
        heappush(self.agenda, (when_s, self.number, what, about))

    def arrive(self, tenant: str, tokens: int, rank: int = DEFAULT) -> None:
        self.number += 1
        name = f"{tenant}-{self.number}"
        cost_s = ENGINE.prefill_s(tokens, 0) * self.estimate
        ticket = self.scheduler.enter(self.gate, rank, tenant, cost_s, self.is_stream, name, self.now)
        self.tickets[name] = (ticket, tokens, self.number)
        if ticket.state is ADMITTED:
            self.at(self.now + WAY_S, "submit", name)
        self.act(self.scheduler.take_others())

    def act(self, tickets) -> None:
        for ticket in tickets:
            if ticket.state is ADMITTED:
                self.at(self.now + WAY_S, "submit", ticket.waiter)
            else:  # it waited too long; the client of a flood comes again
                assert ticket.state is EXPIRED
                del self.tickets[str(ticket.waiter)]
                self.ttft_s.setdefault(ticket.tenant, []).append(self.now - ticket.entered_s)
                if ticket.tenant == "flood":
                    self.at(self.now + 1.0, "flood")

    def submit(self, name: str) -> None:
        _, tokens, salt = self.tickets[name]
        engine = min(self.engines, key=lambda each: each.backlog_s(self.now))
        blocks = [salt * 1000 + block for block in range(tokens // ENGINE.block_tokens)]
        engine.submit(name, blocks, tokens, self.output_tokens, self.now)

    def run(self, until_s: float, short_every_s: float = 1.0, flood: int = 0) -> None:
        self.at(0.37, "short")
        for _ in range(flood):
            self.at(0.0, "flood")
        self.at(0.0, "sweep")
        while self.now < until_s:
            due = [(engine.deadline(), engine) for engine in self.engines]
            engine_s = min((when for when, _ in due if when is not None), default=until_s)
            self.now = min(engine_s, self.agenda[0][0], until_s)
            for engine in self.engines:
                for event in engine.advance(self.now):
                    if isinstance(event, FirstToken):
                        self.prefill_s = max(self.prefill_s, event.prefill_s)
                    self.at(
                        self.now + WAY_S,
                        "first" if isinstance(event, FirstToken) else "end",
                        event.request_id,
                    )
            while self.agenda and self.agenda[0][0] <= self.now:
                _, _, what, about = heappop(self.agenda)
                self.happen(what, about, short_every_s)

    def happen(self, what: str, about: object, short_every_s: float) -> None:
        if what == "short":
            self.arrive("other", SHORT_TOKENS)
            self.at(self.now + short_every_s, "short")
        elif what == "flood":
            self.arrive("flood", LONG_TOKENS)
        elif what == "sweep":
            # Engines tell four times a second how much waits; the shell looks ten times a second (services/fleet_slots).
            if self.now - self.reported_s >= 0.25:
                self.reported_s = self.now
                self.told = [engine.waiting for engine in self.engines]
            self.gate.observe(0.1, self.told)
            self.act(self.scheduler.expire(self.now))
            self.at(self.now + 0.1, "sweep")
        elif what == "submit":
            self.submit(str(about))
        elif what == "first":
            ticket, _, _ = self.tickets[str(about)]
            self.ttft_s.setdefault(ticket.tenant, []).append(self.now - ticket.entered_s)
            if self.is_stream:
                self.act(self.scheduler.first_byte(ticket, self.now))
        elif what == "end":
            ticket, _, _ = self.tickets.pop(str(about))
            self.act(self.scheduler.leave(ticket, self.now, True))
            if ticket.tenant == "flood":
                self.at(self.now, "flood")  # a closed loop: as many as before

    @property
    def busy_ratio(self) -> float:
        return sum(engine.busy_s for engine in self.engines) / len(self.engines) / self.now


def p99(values: list[float]) -> float:
    return sorted(values)[int(0.99 * (len(values) - 1))]


@pytest.mark.parametrize("engines", [1, 4])
@pytest.mark.parametrize("estimate", [0.3, 1.0, 3.0])
def test_one_short_prompt_a_second_waits_for_one_prefill_of_the_flood_at_most(engines, estimate):
    """However wrong the estimate is: what ends a prefill is its first byte."""
    alone = World(engines, Rules())
    alone.run(200.0)
    world = World(engines, Rules(), estimate)
    world.run(200.0, flood=48)
    assert len(world.ttft_s["other"]) >= 190
    assert LONG_S <= world.prefill_s <= 1.1 * LONG_S
    assert p99(world.ttft_s["other"]) <= p99(alone.ttft_s["other"]) + world.prefill_s
    assert max(world.ttft_s["other"]) <= max(alone.ttft_s["other"]) + world.prefill_s + 0.1
    assert world.busy_ratio >= 0.99  # and the engines are as busy as ever


@pytest.mark.parametrize("engines", [1, 4])
@pytest.mark.parametrize("estimate", [0.5, 1.0, 4.0])
def test_plain_answers_tell_nothing_of_their_prefill_so_that_it_is_a_little_more_than_one(engines, estimate):
    """The end of a prefill is estimated then, and the engines' load reports correct the estimate."""
    alone = World(engines, Rules(), is_stream=False)
    alone.run(300.0)
    world = World(engines, Rules(), estimate, is_stream=False)
    world.run(300.0, flood=48)
    assert p99(world.ttft_s["other"]) <= p99(alone.ttft_s["other"]) + 1.3 * world.prefill_s
    assert world.busy_ratio >= 0.92
    assert 0.6 / estimate <= world.gate.pace <= 1.8 / estimate


def test_slots_alone_put_the_flood_before_everybody():
    """Why there is a bound on prefill: without it the queue is inside the engine, where no order of ours holds."""
    world = World(1, Rules(prefill_ahead_s=None))
    world.run(400.0, flood=48)
    assert p99(world.ttft_s["other"]) > 20 * LONG_S


@pytest.mark.parametrize("tokens", [100, 500, 2_000])
@pytest.mark.parametrize("is_stream", [True, False], ids=["stream", "plain"])
def test_the_bound_costs_short_prompts_no_throughput(tokens, is_stream):
    """A closed loop of short prompts: as many are answered as without the bound, within a few percent."""

    def answered(rules: Rules) -> int:
        world = World(2, rules, is_stream=is_stream)
        world.output_tokens = 16
        for _ in range(96):
            world.at(0.0, "more")
        usual = world.happen

        def happen(what: str, about: object, short_every_s: float) -> None:
            if what == "more":
                world.arrive("t", tokens)
            elif what == "end":
                usual(what, about, short_every_s)
                world.at(world.now, "more")
            elif what != "short":
                usual(what, about, short_every_s)

        world.happen = happen  # type: ignore[method-assign]
        world.run(30.0)
        return len(world.ttft_s["t"])

    assert answered(Rules()) >= (0.98 if is_stream else 0.88) * answered(Rules(prefill_ahead_s=None))


def test_a_lower_class_gets_its_turn_beside_a_flood_of_a_higher_one():
    bulk_bound_s = CLASSES[BULK].starvation_s
    world = World(1, Rules())
    world.at(1.0, "bulk")
    usual = world.happen

    def happen(what: str, about: object, short_every_s: float) -> None:
        if what == "bulk":
            world.arrive("low", SHORT_TOKENS, BULK)
        else:
            usual(what, about, short_every_s)

    world.happen = happen  # type: ignore[method-assign]
    world.run(bulk_bound_s + 3 * LONG_S, flood=48)
    assert len(world.ttft_s["low"]) == 1 and world.ttft_s["low"][0] <= bulk_bound_s + 2 * LONG_S
