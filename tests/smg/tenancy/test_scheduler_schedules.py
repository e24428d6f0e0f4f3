"""The scheduler under every schedule: tasks that run, wait, are woken and run later, and are cancelled at any of these points."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from smg.errors import GatewayError
from smg.tenancy.admission import ADMITTED, EXPIRED, WAITING
from smg.tenancy.priorities import RANKS, ClassRules, Rules, TenantRules
from smg.tenancy.scheduler import PREEMPTED, Scheduler, Ticket
from smg.tenancy.slots import Gate, Slots, size_of

WHAT = (
    *["enter"] * 6,
    "finish",
    "first_byte",
    "leave_waiting",
    "cancel_woken",
    "wake",
    "second",
    "resize",
    "widen",
    "reload",
    "block",
)
ACTIONS = st.lists(st.tuples(st.sampled_from(WHAT), st.integers(0, 10**6)), max_size=150)


@st.composite
def rules_of(draw) -> Rules:
    classes = tuple(
        ClassRules(
            reserved_floor=draw(st.integers(0, 3)),
            queue_size=draw(st.integers(0, 5)),
            queue_timeout_s=draw(st.sampled_from([2.0, 8.0])),
            starvation_s=draw(st.sampled_from([1.0, 4.0])),
            can_preempt=draw(st.booleans()),
        )
        for _ in RANKS
    )
    return Rules(
        classes=classes,
        tenants={"b": TenantRules(weight=draw(st.sampled_from([0.5, 3.0])))},
        prefill_ahead_s=draw(st.sampled_from([None, 0.0, 0.25])),
    )


class Shell:
    """Tasks in miniature: who is parked, who was named and has not run yet, who runs."""

    def __init__(self, rules: Rules, capacity: int, workers: list[int]) -> None:
        self.blocked: set[int] = set()
        self.scheduler = Scheduler(rules, lambda waiter: waiter not in self.blocked)
        self.slots = Slots()
        self.scheduler.add(self.slots)
        self.gates = [Gate(self.slots) for _ in workers]
        self.now = 0.0
        self.number = 0
        self.has_shrunk = False
        self.has_swept = False
        self.parked: list[Ticket] = []
        self.woken: list[Ticket] = []
        self.running: list[Ticket] = []
        for gate, count in zip(self.gates, workers, strict=True):
            gate.widen(count, rules.prefill_ahead_s is not None)
        self.scheduler.resize(self.slots, capacity, 0.0)

    def act(self, tickets) -> None:
        for ticket in tickets:
            if ticket.state is PREEMPTED and ticket in self.running:
                self.running.remove(ticket)  # its task raises, and leaves in the end
                self.act(self.scheduler.leave(ticket, self.now))
            elif ticket.state is PREEMPTED:
                assert ticket in self.woken, "named before it gave way, and not run yet"
            else:
                assert ticket.state in (ADMITTED, EXPIRED)
                self.parked.remove(ticket)  # exactly once: or this raises
                self.woken.append(ticket)

    def do(self, what: str, pick: int) -> None:
        scheduler = self.scheduler
        self.has_swept = what == "second"
        if what == "enter":
            self.enter(pick)
        elif what == "finish" and self.running:
            ticket = self.running.pop(pick % len(self.running))
            self.act(scheduler.leave(ticket, self.now, pick % 2 == 0))
        elif what == "first_byte" and self.running:
            ticket = self.running[pick % len(self.running)]
            self.blocked.add(ticket.waiter)
            self.act(scheduler.first_byte(ticket, self.now))
        elif what == "leave_waiting" and self.parked:
            self.act(scheduler.abandon(self.parked.pop(pick % len(self.parked)), self.now))
        elif what == "cancel_woken" and self.woken:
            self.act(scheduler.abandon(self.woken.pop(pick % len(self.woken)), self.now))
        elif what == "wake" and self.woken:
            ticket = self.woken.pop(pick % len(self.woken))
            if ticket.state is ADMITTED:
                self.running.append(ticket)
            elif ticket.state is PREEMPTED:
                self.act(scheduler.leave(ticket, self.now))
        elif what == "second":
            self.now += (0.1, 1.0, 3.0)[pick % 3]
            self.act(scheduler.expire(self.now))
        elif what == "resize":
            self.has_shrunk = True
            self.act(scheduler.resize(self.slots, 1 + pick % 6, self.now))
        elif what == "widen":
            self.gates[pick % len(self.gates)].widen(pick % 4, scheduler.rules.prefill_ahead_s is not None)
            self.act(scheduler.resize(self.slots, self.slots.capacity, self.now))
        elif what == "reload":
            classes = scheduler.rules.classes
            rules = msgspec.structs.replace(scheduler.rules, classes=classes[1:] + classes[:1])
            self.act(scheduler.configure(rules, self.now))
        elif what == "block":
            self.blocked ^= {pick % (self.number + 1)}
        self.check()

    def enter(self, pick: int) -> None:
        rank, gate = pick % 4, self.gates[pick // 4 % len(self.gates)]
        cost_s = (0.0, 0.01, 0.1, 3.0)[pick // 16 % 4]
        tenant = "abc"[pick // 64 % 3]
        if not gate.waiting:
            gate.release_due(self.now)  # as whoever arrives does
        is_stream = pick % 2 == 0
        ahead_s = self.scheduler.rules.prefill_ahead_s
        pace = 1.0 if is_stream else min(gate.pace, 1.0)
        size = size_of(cost_s * pace, 0.25 if ahead_s is None else ahead_s)
        room = gate.open + size <= gate.places + 1e-9 and self.slots.free_for(rank) > 0
        waiting = self.scheduler.waiting[rank]
        self.number += 1
        try:
            ticket = self.scheduler.enter(gate, rank, tenant, cost_s, is_stream, self.number, self.now)
        except GatewayError as error:
            assert error.code == "scheduler_queue_full"
            assert (not room or gate.waiting) and waiting >= self.scheduler.rules.classes[rank].queue_size
            return
        others = self.scheduler.take_others()
        assert not self.scheduler.others
        if ticket.state is ADMITTED:
            assert room or others[0].state is PREEMPTED
            self.running.append(ticket)
        else:
            assert ticket.state is WAITING and (not room or gate.waiting > 1)
            self.parked.append(ticket)
        for victim in others:
            if victim.state is PREEMPTED:
                assert victim.rank < rank and victim.waiter not in self.blocked
        self.act(others)

    def check(self) -> None:
        slots, scheduler = self.slots, self.scheduler
        holders = self.running + [ticket for ticket in self.woken if ticket.state is ADMITTED]
        assert all(ticket.state is ADMITTED for ticket in self.running)
        assert all(ticket.state is WAITING for ticket in self.parked), "somebody was not woken"
        assert slots.total == len(holders)
        assert self.has_shrunk or slots.total <= slots.capacity
        for rank in RANKS:
            assert slots.used(rank) == scheduler.in_flight[rank] == sum(each.rank == rank for each in holders)
            assert scheduler.waiting[rank] == sum(ticket.rank == rank for ticket in self.parked)
            assert slots.waiting[rank] == scheduler.waiting[rank]
        for gate in self.gates:
            shares = sum(ticket.share for ticket in holders if ticket.gate is gate)
            assert gate.open == pytest.approx(shares, abs=1e-6)
            assert gate.waiting == sum(ticket.gate is gate for ticket in self.parked)
            self.check_nobody_could_go(gate)

    def check_nobody_could_go(self, gate: Gate) -> None:
        slots, classes = self.slots, self.scheduler.rules.classes
        for rank in reversed(RANKS):
            if gate.queues[rank]:
                if not gate.fits(gate.queues[rank].head):
                    return  # it keeps lower classes from filling up the room that it waits for
                bound_s = classes[rank].starvation_s
                if any(
                    gate.queues[other] and slots.promoted_s[other] + classes[other].starvation_s <= self.now
                    for other in RANKS
                ):
                    return  # as may a class that has been given nothing for long
                assert slots.free_for(rank) <= 0, "somebody waits who could go"
                if self.has_swept and slots.total < slots.capacity:
                    assert gate.queues[rank].oldest.entered_s > self.now - bound_s

    def end(self) -> None:
        """Everybody goes home, in an order that wakes others on the way."""
        while self.running or self.woken or self.parked:
            for what in ("finish", "wake", "cancel_woken", "leave_waiting"):
                self.do(what, self.number)
        assert self.slots.total == 0 and self.scheduler.waiting == [0] * 4
        assert all(gate.open == 0.0 and gate.is_idle for gate in self.gates)
        counts = self.scheduler.counts
        assert sum(counts.preempted) == sum(counts.preemptions.values())


@given(rules_of(), st.integers(1, 6), st.lists(st.integers(0, 3), min_size=1, max_size=3), ACTIONS)
@settings(max_examples=250, deadline=None)
def test_counts_are_exact_and_no_wake_is_lost(rules, capacity, workers, actions):
    shell = Shell(rules, capacity, workers)
    for what, pick in actions:
        shell.do(what, pick)
    shell.end()


@given(
    st.integers(1, 3),
    st.lists(st.tuples(st.integers(0, 3), st.sampled_from([0.02, 0.3, 2.0])), min_size=1, max_size=60),
    st.sampled_from([None, 0.25]),
)
@settings(max_examples=150, deadline=None)
def test_starvation_is_bounded_whatever_comes_above(capacity, arrivals, ahead_s):
    """A waiting class gets a slot within its bound, one turn of the running requests and one sweep, for ever."""
    bound_s, run_s = 3.0, 1.0
    classes = tuple(ClassRules(queue_size=10_000, queue_timeout_s=1e6, starvation_s=bound_s) for _ in RANKS)
    scheduler = Scheduler(Rules(classes=classes, prefill_ahead_s=ahead_s), lambda waiter: False)
    slots = Slots()
    scheduler.add(slots)
    gate = Gate(slots)
    gate.widen(1, ahead_s is not None)
    scheduler.resize(slots, capacity, 0.0)
    running: list[tuple[float, Ticket]] = []
    served_s = {}
    waits_since = dict.fromkeys(RANKS, 0.0)
    now, step = 0.0, 0.1
    for tick in range(400):
        now = tick * step
        changed = list(scheduler.expire(now))
        for ends_s, ticket in list(running):
            if ends_s <= now:
                running.remove((ends_s, ticket))
                changed += scheduler.first_byte(ticket, now)
                changed += scheduler.leave(ticket, now, True)
        rank, cost_s = arrivals[tick % len(arrivals)]
        for each in (rank, 3):  # the highest class floods all the time
            ticket = scheduler.enter(gate, each, "t", cost_s, True, None, now)
            if ticket.state is ADMITTED:
                changed.append(ticket)
            changed += scheduler.take_others()
        for ticket in changed:
            running.append((now + run_s, ticket))
            served_s[ticket.rank] = now
        for each in RANKS:
            if not scheduler.waiting[each] or served_s.get(each) == now:
                waits_since[each] = now
            # Up to three classes may be overdue at once, and each takes its turn.
            assert now - waits_since[each] <= bound_s + 4 * run_s + 2 * step, f"class {each} starves"
