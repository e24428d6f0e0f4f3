"""A request waits for its turn: the shell around the priority scheduler, which `generate` asks before dispatch (ADM-6, ADM-7).

Owns what the scheduler must not know: headers, tenants, tasks that park and are woken or interrupted, and the counts by tenant.
Who goes when is the scheduler's word alone. It must never touch an answer: a preempted request raises its error where it
waits, and is answered like any other (ERR-20).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial

from smg.api.call import Call
from smg.fleet.pool import Pool
from smg.gateway.gates import Tenants
from smg.net.exchange import Exchange
from smg.net.readiness import Readiness
from smg.services.fleet_slots import FleetSlots
from smg.telemetry.metrics import OTHER, Histogram, Metrics
from smg.tenancy.admission import ADMITTED, EXPIRED
from smg.tenancy.priorities import CLASS_NAMES, DEFAULT, Rules, rank_of
from smg.tenancy.scheduler import PREEMPTED, Scheduler, Ticket
from smg.tenancy.slots import NO_BOUND

HEADER = b"x-smg-priority"


def may_preempt(waiter: object) -> bool:
    """Whether a request could give way now: no byte of its answer was sent, and an interrupt finds it waiting."""
    return isinstance(waiter, Exchange) and not waiter.has_begun_answer and waiter.parking.is_waiting


class Turns:
    """Tells calls when it is their turn: `enter`, perhaps `wait`, and `leave` exactly once after every `enter` that did not raise.

    `estimate` gives the expected seconds of a call's prefill.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        fleet: FleetSlots,
        tenants: Tenants,
        estimate: Callable[[Call, Pool], float],
        readiness: Readiness,
        metrics: Metrics,
    ) -> None:
        self._scheduler = scheduler
        self._fleet = fleet
        self._tenants = tenants
        self._estimate = estimate
        self._readiness = readiness
        self._metrics = metrics
        self._waits: list[Histogram] = [
            metrics.histogram("smg_scheduler_queue_wait_seconds", class_=name) for name in CLASS_NAMES
        ]
        readiness.add_sweeper(self._sweep)

    def enter(self, exchange: Exchange, call: Call, pool: Pool) -> Ticket:
        """The call's ticket: whose state is WAITING has to `wait`. Raises `GatewayError` 429 of the scheduler (ERR-12)."""
        scheduler, fleet = self._scheduler, self._fleet
        now = self._readiness.now_s
        if fleet.is_stale:
            self._act(fleet.refit(now))
        head = exchange.head
        tenant = head.tenant or self._tenants.of(exchange)
        rules = scheduler.rules
        if HEADER in head.fields or rules.tenants:
            rank = self._rank(exchange, tenant, rules)
        else:
            rank = scheduler.default_rank
        is_stream = call.is_stream
        ticket = scheduler.enter(
            fleet.gates.get(pool.model) or fleet.gate_of(pool),
            rank,
            tenant,
            self._estimate(call, pool),
            is_stream,
            exchange,
            now,
        )
        if scheduler.others:
            self._act(scheduler.take_others())
        if is_stream:
            call.begun = partial(self._first_byte, ticket)
        return ticket

    async def wait(self, exchange: Exchange, call: Call, ticket: Ticket) -> None:
        """Waits for the turn. Raises `GatewayError` 503 of the scheduler (ERR-14, ERR-20)."""
        await exchange.parking.wait_woken()
        if ticket.state is EXPIRED:
            raise self._scheduler.timeout_error()
        # Nobody is preempted between its turn and its waking: `may_preempt` wants tasks that are parked.
        call.queued_s = queued_s = ticket.admitted_s - ticket.entered_s
        self._waits[ticket.rank].observe(queued_s)

    def leave(self, ticket: Ticket, is_answered: bool) -> None:
        """The call is over, whatever became of it; `is_answered`: a worker did what it asked for."""
        now = self._readiness.now_s
        if ticket.state is ADMITTED:
            changed = self._scheduler.leave(ticket, now, is_answered)
        else:
            changed = self._scheduler.abandon(ticket, now)
        if changed:
            self._act(changed)

    def configure(self, rules: Rules) -> None:
        """Other rules hold from now on (reload)."""
        self._act(self._scheduler.configure(rules, self._readiness.now_s))
        self._fleet.is_stale = True
        self._fleet.warn_if_shrunk(is_new=True)

    def samples(self) -> Iterable[tuple[str, tuple[str, ...], float]]:
        """What the scheduler has counted and what it holds, read when somebody scrapes (MET-7)."""
        scheduler = self._scheduler
        counts = scheduler.counts
        in_flight, waiting = scheduler.in_flight, scheduler.waiting
        for rank, name in enumerate(CLASS_NAMES):
            for outcome, values in (
                ("admitted", scheduler.admitted),
                ("rejected_queue_full", counts.refused_full),
                ("rejected_queue_timeout", counts.refused_late),
                ("preempted", counts.preempted),
                ("client_cancelled", counts.cancelled),
            ):
                yield "smg_scheduler_admit_total", (name, outcome), float(values[rank])
            yield "smg_scheduler_starvation_promotion_total", (name,), float(counts.promoted[rank])
            yield "smg_scheduler_inflight", (name,), float(in_flight[rank])
            yield "smg_scheduler_queue_depth", (name,), float(waiting[rank])
            yield "smg_scheduler_queue_size_limit", (name,), float(scheduler.rules.classes[rank].queue_size)
            yield "smg_scheduler_class_capacity_pressure", (name,), self._pressure(rank)
        for (victim, by), count in counts.preemptions.items():
            yield "smg_scheduler_preemption_total", (CLASS_NAMES[victim], CLASS_NAMES[by]), float(count)
        slots = [each for each in scheduler.slots if each.capacity < NO_BOUND]
        capacity = sum(each.capacity for each in slots)
        used = sum(each.total for each in slots)
        yield "smg_scheduler_utilization", (), used / capacity if capacity else 0.0
        gates = [gate for each in scheduler.slots for gate in each.gates if gate.workers]
        workers = sum(gate.workers for gate in gates)
        prefill = sum(gate.open for gate in gates)
        yield "smg_scheduler_prefill_utilization", (), prefill / workers if workers else 0.0

    def _pressure(self, rank: int) -> float:
        """The fullest fleet's share of a class: 1 means that it gets no further slot there."""
        shares = [0.0]
        for slots in self._scheduler.slots:
            used = slots.used(rank)
            room = used + max(slots.free_for(rank), 0)
            shares.append(used / room if room else 1.0)
        return max(shares)

    def _rank(self, exchange: Exchange, tenant: str, rules: Rules) -> int:
        """The class of a request: what its header names, never above what its tenant may have."""
        value = exchange.head.fields.get(HEADER)
        highest = rules.max_rank(tenant)
        if value is None:
            return DEFAULT if highest >= DEFAULT else highest
        asked = rank_of(value)
        if asked is None:
            self._metrics.counter(
                "smg_scheduler_unknown_priority_value_total", tenant=self._shown(tenant)
            ).value += 1
            asked = DEFAULT
        if asked <= highest:
            return asked
        self._metrics.counter(
            "smg_scheduler_clamp_total",
            tenant=self._shown(tenant),
            requested_class=CLASS_NAMES[asked],
            effective_class=CLASS_NAMES[highest],
        ).value += 1
        return highest

    def _shown(self, tenant: str) -> str:
        """The tenant as a label: those that the file names, so that clients cannot grow the series."""
        return tenant if tenant in self._scheduler.rules.tenants else OTHER

    def _first_byte(self, ticket: Ticket, now: float) -> None:
        changed = self._scheduler.first_byte(ticket, now)
        if changed:
            self._act(changed)

    def _act(self, tickets: Iterable[Ticket]) -> None:
        for ticket in tickets:
            exchange = ticket.waiter
            assert isinstance(exchange, Exchange)
            if ticket.state is PREEMPTED:
                exchange.parking.interrupt(self._scheduler.preempted_error())
            else:
                exchange.parking.wake()

    def _sweep(self, now: float) -> None:
        fleet = self._fleet
        if fleet.is_stale:
            self._act(fleet.refit(now))
        fleet.observe(now)
        changed = self._scheduler.expire(now)
        if changed:
            self._act(changed)
        fleet.tidy()
