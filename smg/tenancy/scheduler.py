"""May this request go to a worker now, or who goes first? Classes, tenants, slots and prefill (contract ADM-6, ADM-7).

Owns who holds a slot, who waits and who has to give way, exactly, whatever is cancelled when. Like `tenancy/admission` it never
waits, wakes or sends anything: it hands out tickets and names those whose state has changed. It must never look at a request.

The life of a request:

    ticket = scheduler.enter(...)              raises GatewayError when it is refused (429)
    act on each of scheduler.take_others()     if there are any: who gives way, who goes because of that
    if ticket.state is WAITING:                park until the ticket is named
        on cancellation:                       act on each of scheduler.abandon(ticket, now)
        ticket.state is EXPIRED:               raise scheduler.timeout_error()
    ...                                        exactly one slot is held here
    act on each of scheduler.first_byte(ticket, now)   when the answer begins
    act on each of scheduler.leave(ticket, now, ...)   exactly once

To act on a ticket is to wake it when it is ADMITTED or EXPIRED, and to interrupt it with `preempted_error()` when it is
PREEMPTED; its slot is somebody else's by then. `expire(now)` does what time alone does, several times a second.

Invariant: after every call, nobody waits who could go (docs/decisions/0008). Who is next at a gate and needs more room than
there is keeps the others there from filling it up.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import islice

import msgspec

from smg.errors import GatewayError
from smg.tenancy.admission import ADMITTED, EXPIRED, LEFT, RETRY_AFTER_S, WAITING
from smg.tenancy.priorities import CLASS_NAMES, DEFAULT, PREFILL_AHEAD_S, RANKS, Rules
from smg.tenancy.slots import SIZE_MIN, Gate, Slots, size_of

PREEMPTED = "preempted"
RETRY_PREEMPTED_S = 1.0
"""`Retry-After` of a preempted request (ERR-20)."""

PREEMPT_LOOKS_MAX = 64
"""Running requests of a class that are looked at for one that can give way: newest first, so the first ones usually can."""

PREEMPT_SCANNED_MAX = 4_096
"""Running requests of any class among which these are searched."""

NOBODY: Sequence[Ticket] = ()


class Ticket(msgspec.Struct, eq=False):
    """A request at the scheduler. `waiter` belongs to the gateway: whatever it wakes and interrupts the request by.

    `size` is what it needs of its gate and `share` what it holds of it; `is_sorted`: the gate knows until when. `weighted_s` and `deadline_s` are set when it waits.
    """

    gate: Gate
    rank: int
    tenant: str
    cost_s: float
    size: float
    is_stream: bool
    waiter: object
    entered_s: float
    admitted_s: float
    share: float
    state: str = ADMITTED
    is_sorted: bool = False
    weighted_s: float = 0.0
    deadline_s: float = 0.0


class Counts:
    """What has happened so far, by rank: the counters of section 19."""

    __slots__ = (
        "cancelled",
        "preempted",
        "preemptions",
        "promoted",
        "refused_full",
        "refused_late",
    )

    def __init__(self) -> None:
        self.refused_full = [0 for _ in RANKS]
        self.refused_late = [0 for _ in RANKS]
        self.preempted = [0 for _ in RANKS]
        self.cancelled = [0 for _ in RANKS]
        self.promoted = [0 for _ in RANKS]
        self.preemptions: dict[tuple[int, int], int] = {}  # (victim's class, class it gave way to)


class Scheduler:
    """The scheduler of one node.

    `may_preempt(waiter)` tells whether a running request could be told now that it has to give way: it has sent no byte
    and waits where an interrupt reaches it.
    """

    __slots__ = (
        "_admitted_before",
        "_ahead_s",
        "_may_preempt",
        "_slots",
        "_waiting",
        "counts",
        "default_rank",
        "others",
        "rules",
    )

    def __init__(self, rules: Rules, may_preempt: Callable[[object], bool]) -> None:
        self.rules = rules
        self.default_rank = min(DEFAULT, rules.default_max_rank)
        """The class of a request of somebody without rules of their own that names none."""
        self._ahead_s = _ahead_s(rules)
        self.counts = Counts()
        self.others: list[Ticket] = []
        """Whom the last `enter` has changed beside its own ticket; for `take_others`."""
        self._may_preempt = may_preempt
        self._slots: list[Slots] = []
        self._admitted_before = [0 for _ in RANKS]  # through slots that are no more
        self._waiting = [0 for _ in RANKS]

    @property
    def in_flight(self) -> list[int]:
        """Requests that hold a slot, by rank."""
        return [sum(slots.used(rank) for slots in self._slots) for rank in RANKS]

    @property
    def admitted(self) -> list[int]:
        """Requests that were given a slot so far, by rank."""
        return [
            dropped + sum(slots.entered[rank] for slots in self._slots)
            for rank, dropped in enumerate(self._admitted_before)
        ]

    @property
    def waiting(self) -> list[int]:
        """Requests that wait, by rank."""
        return list(self._waiting)

    @property
    def slots(self) -> Sequence[Slots]:
        """All slots there are."""
        return self._slots

    def add(self, slots: Slots) -> None:
        """A fleet has come."""
        self._slots.append(slots)

    def drop(self, gate: Gate) -> None:
        """Nobody comes through `gate` any more, and nobody waits there; its slots go with their last gate."""
        assert not gate.waiting
        gate.slots.gates.remove(gate)
        if not gate.slots.gates:
            self._slots.remove(gate.slots)
            for rank, entered in enumerate(gate.slots.entered):
                self._admitted_before[rank] += entered

    def enter(
        self, gate: Gate, rank: int, tenant: str, cost_s: float, is_stream: bool, waiter: object, now: float
    ) -> Ticket:
        """A request of class `rank` arrives, expected to take `cost_s` seconds of prefill.

        The ticket is ADMITTED or WAITING. Raises GatewayError 429 `scheduler_queue_full` (ERR-12), and nothing has changed.
        """
        slots, ahead_s = gate.slots, self._ahead_s
        needed_s = cost_s if is_stream or gate.pace > 1.0 else cost_s * gate.pace
        # As `size_of`, `_start` and `_admit`, without their calls: this is the way of every request that finds room.
        size = 1.0 if needed_s >= ahead_s else needed_s / ahead_s if needed_s > 0.0 else SIZE_MIN
        ticket = Ticket(gate, rank, tenant, cost_s, size, is_stream, waiter, now, now, size)
        open_ = gate.open + size
        if (
            gate.waiting
            or open_ > gate.places
            or (slots.total >= slots.free_total and slots.free_for(rank) <= 0)
        ):
            self._enter_tight(ticket, gate, slots, now)
            return ticket
        rules = self.rules
        weighted_s = cost_s / rules.weight(tenant) if rules.tenants else cost_s
        queue = gate.queues[rank]
        if queue.last == tenant and gate.holders:  # as `charge`
            queue.owed_s += weighted_s
            queue.last_s = weighted_s
        else:
            queue.charge(tenant, weighted_s, not gate.holders)
        slots.entered[rank] += 1
        slots.total += 1
        slots.silent[ticket] = None
        if slots.waiting_total:
            slots.promoted_s[rank] = now
        gate.open = open_
        gate.holders += 1
        return ticket

    def take_others(self) -> Sequence[Ticket]:
        """Whom to act on because of the last `enter`, once."""
        others, self.others = self.others, []
        return others

    def _enter_tight(self, ticket: Ticket, gate: Gate, slots: Slots, now: float) -> None:
        """`enter` where there may be no room."""
        ticket.state, ticket.share = WAITING, 0.0
        if not gate.waiting:
            gate.release_due(now)
            if gate.fits(ticket) and (slots.total < slots.free_total or slots.free_for(ticket.rank) > 0):
                self._start(ticket, gate, slots, now)
                return
        self._enter_full(ticket, now)

    def _enter_full(self, ticket: Ticket, now: float) -> None:
        """`enter` where there is no room, or others wait for it."""
        rules, rank, gate = self.rules, ticket.rank, ticket.gate
        slots = gate.slots
        if rules.classes[rank].can_preempt and not any(slots.waiting[rank:]):
            victim = self._victim(ticket)
            if victim is not None:
                self._give_way(victim, rank)
                self._start(ticket, gate, slots, now)
                self.others += (victim, *self._fill(slots, now))
                return
        if self._waiting[rank] >= rules.classes[rank].queue_size:
            self.counts.refused_full[rank] += 1
            raise GatewayError(
                429,
                "scheduler_queue_full",
                f"The queue of class {CLASS_NAMES[rank]} is full",
                retry_after_s=RETRY_AFTER_S,
            )
        ticket.weighted_s = ticket.cost_s / rules.weight(ticket.tenant)
        ticket.deadline_s = now + rules.classes[rank].queue_timeout_s
        gate.queues[rank].push(ticket)
        gate.waiting += 1
        slots.waiting[rank] += 1
        slots.waiting_total += 1
        self._waiting[rank] += 1
        if gate.waiting > 1:  # those who were there may wait for more room than this one needs
            self.others += (each for each in self._fill(slots, now) if each is not ticket)

    def first_byte(self, ticket: Ticket, now: float) -> Sequence[Ticket]:
        """The answer begins: its prefill is over, and it can give way to nobody any more. Returns whom to act on."""
        if ticket.state is not ADMITTED:
            return NOBODY
        gate = ticket.gate
        gate.slots.silent.pop(ticket, None)
        gate.release(ticket)
        return self._fill(gate.slots, now) if gate.slots.waiting_total else NOBODY

    def leave(self, ticket: Ticket, now: float, is_answered: bool = False) -> Sequence[Ticket]:
        """A request that held a slot is over; `is_answered` when a worker did what it asked for. Returns whom to act on."""
        if ticket.state is not ADMITTED:
            assert ticket.state is PREEMPTED, "only who holds a slot can leave it"
            ticket.state = LEFT  # its slot went to another
            return NOBODY
        ticket.state = LEFT
        gate = ticket.gate
        slots = gate.slots
        rank = ticket.rank
        slots.gone[rank] += 1  # as `give_back`: the way of every request
        slots.total -= 1
        slots.silent.pop(ticket, None)
        share = ticket.share
        if share:
            if is_answered and not ticket.is_stream and now - ticket.admitted_s < gate.pace * ticket.cost_s:
                gate.learn(ticket, now - ticket.admitted_s)
            if gate.holders > 1:  # as `release`
                ticket.share = 0.0
                gate.open -= share
                gate.holders -= 1
            else:
                gate.release(ticket)
        return self._fill(slots, now) if slots.waiting_total else NOBODY

    def abandon(self, ticket: Ticket, now: float) -> Sequence[Ticket]:
        """The client of a parked request left. Right in every state. Returns whom to act on."""
        if ticket.state is WAITING:
            self._unqueue(ticket, LEFT)
            self.counts.cancelled[ticket.rank] += 1
        elif ticket.state is ADMITTED or ticket.state is PREEMPTED:
            return self.leave(ticket, now)
        return NOBODY

    def expire(self, now: float) -> list[Ticket]:
        """What time alone does: shares end, waits end, waits grow long. Returns whom to act on."""
        changed: list[Ticket] = []
        for slots in self._slots:
            for gate in slots.gates:
                gate.release_due(now)
                for rank in RANKS:
                    queue = gate.queues[rank]
                    while queue:
                        ticket = queue.oldest
                        if ticket.deadline_s > now:
                            break
                        self._unqueue(ticket, EXPIRED)
                        self.counts.refused_late[rank] += 1
                        changed.append(ticket)
            changed += self._fill(slots, now)
            changed += self._preempt_for_waiting(slots, now)
        return changed

    def next_deadline_s(self) -> float | None:
        """When `expire` has a wait to end, or None."""
        found = [
            queue.oldest.deadline_s
            for slots in self._slots
            for gate in slots.gates
            for queue in gate.queues
            if queue
        ]
        return min(found, default=None)

    def resize(self, slots: Slots, capacity: int, now: float) -> Sequence[Ticket]:
        """The fleet behind `slots` has changed. Returns whom to act on; call it after the gates' places were set."""
        slots.resize(capacity, self.rules.classes)
        return self._fill(slots, now)

    def configure(self, rules: Rules, now: float) -> list[Ticket]:
        """Other rules hold from now on; who waits goes on waiting, until the new deadlines. Returns whom to act on.

        A queue that has become too small keeps whom it has. Tenants' debts stay.
        """
        self.rules = rules
        self.default_rank = min(DEFAULT, rules.default_max_rank)
        self._ahead_s = _ahead_s(rules)
        changed: list[Ticket] = []
        for slots in self._slots:
            for gate in slots.gates:
                gate.widen(gate.workers, rules.prefill_ahead_s is not None)
                for rank, queue in enumerate(gate.queues):
                    for ticket in queue.everybody():
                        ticket.deadline_s = ticket.entered_s + rules.classes[rank].queue_timeout_s
                        pace = 1.0 if ticket.is_stream else min(gate.pace, 1.0)
                        ticket.size = size_of(ticket.cost_s * pace, self._ahead_s)
                        ticket.weighted_s = ticket.cost_s / rules.weight(ticket.tenant)
            changed += self.resize(slots, slots.capacity, now)
        return changed

    def timeout_error(self) -> GatewayError:
        """What a request that waited too long is told (ERR-14)."""
        return GatewayError(
            503,
            "scheduler_queue_timeout",
            "The request waited too long for its turn",
            retry_after_s=RETRY_AFTER_S,
        )

    def preempted_error(self) -> GatewayError:
        """What a request that gave way is told (ERR-20)."""
        return GatewayError(
            503,
            "scheduler_preempted",
            "The request gave way to one of a higher class",
            retry_after_s=RETRY_PREEMPTED_S,
            headers=(("x-smg-preempted", "true"),),
        )

    # -- who goes

    def _start(self, ticket: Ticket, gate: Gate, slots: Slots, now: float) -> None:
        """`ticket` goes at once, without having waited."""
        rules = self.rules
        weighted_s = ticket.cost_s / rules.weight(ticket.tenant) if rules.tenants else ticket.cost_s
        gate.queues[ticket.rank].charge(ticket.tenant, weighted_s, not (gate.holders or gate.waiting))
        self._admit(ticket, gate, slots, now)

    def _admit(self, ticket: Ticket, gate: Gate, slots: Slots, now: float) -> None:
        rank = ticket.rank
        ticket.state = ADMITTED
        slots.entered[rank] += 1
        slots.total += 1
        slots.silent[ticket] = None
        if slots.waiting_total:
            slots.promoted_s[rank] = now  # while nobody waits it says nothing
        gate.take(ticket)

    def _fill(self, slots: Slots, now: float) -> Sequence[Ticket]:
        """Lets everybody go who can; those who went."""
        if not slots.waiting_total:
            return NOBODY
        gone = []
        while slots.total < slots.capacity:
            # Gates where somebody is next who needs more room than there is: nobody may fill that up meanwhile.
            blocked: set[Gate] = set()
            gate_and_rank = self._overdue(slots, blocked, now) or self._next(slots, blocked, now)
            if gate_and_rank is None:
                break
            gate, rank = gate_and_rank
            ticket = gate.queues[rank].pop()
            gate.waiting -= 1
            slots.waiting[rank] -= 1
            slots.waiting_total -= 1
            self._waiting[rank] -= 1
            ticket.admitted_s = now
            self._admit(ticket, gate, slots, now)
            gone.append(ticket)
        return gone

    def _next(self, slots: Slots, blocked: set[Gate], now: float) -> tuple[Gate, int] | None:
        """The highest class that may go, and the gate where somebody has waited longest for it."""
        for rank in reversed(RANKS):
            if not slots.waiting[rank]:
                continue
            since_s = now - self.rules.classes[rank].starvation_s
            # Who has waited for too long may use what is reserved for others.
            gate = _gate_of(slots, rank, now if slots.free_for(rank) > 0 else since_s, blocked)
            if gate is not None:
                return gate, rank
        return None

    def _overdue(self, slots: Slots, blocked: set[Gate], now: float) -> tuple[Gate, int] | None:
        """The class that was given nothing for its whole bound goes before all others; of several, the one due first.

        Once per bound: else a lower class with an endless queue would turn the order upside down.
        """
        due = []
        for rank in RANKS:
            if slots.waiting[rank]:
                bound_s = self.rules.classes[rank].starvation_s
                came_s = min(gate.queues[rank].oldest.entered_s for gate in slots.gates if gate.queues[rank])
                due_s = max(slots.promoted_s[rank], came_s) + bound_s
                if due_s <= now:
                    due.append((due_s, rank, now - bound_s))
        for _, rank, since_s in sorted(due):
            gate = _gate_of(slots, rank, since_s, blocked)
            if gate is not None:
                if any(slots.waiting[rank + 1 :]):
                    self.counts.promoted[rank] += 1
                return gate, rank
        return None

    # -- who has to give way

    def _victim(self, ticket: Ticket) -> Ticket | None:
        """The newest request of the lowest class below the ticket's that can give way, if that lets the ticket go at once.

        Where prefill is the bound and not the slots, nobody gives way: a place is free at the next first byte, and whoever
        kills a long prefill for each short question gets no long one done at all.
        """
        gate, slots = ticket.gate, ticket.gate.slots
        if slots.free_for(ticket.rank) != 0:
            return None
        for rank in range(ticket.rank):
            newest = islice(reversed(slots.silent), PREEMPT_SCANNED_MAX)
            held = (silent for silent in newest if silent.rank == rank)
            for candidate in islice(held, PREEMPT_LOOKS_MAX):
                share = candidate.share if candidate.gate is gate else 0.0
                if gate.fits(ticket, share) and self._may_preempt(candidate.waiter):
                    return candidate
        return None

    def _give_way(self, victim: Ticket, rank: int) -> None:
        victim.state = PREEMPTED
        victim.gate.slots.give_back(victim)
        victim.gate.release(victim)
        counts = self.counts
        counts.preempted[victim.rank] += 1
        counts.preemptions[victim.rank, rank] = counts.preemptions.get((victim.rank, rank), 0) + 1

    def _preempt_for_waiting(self, slots: Slots, now: float) -> Iterable[Ticket]:
        """Somebody may have become able to give way since a request that may preempt came; one per class and call."""
        changed: list[Ticket] = []
        for rank in reversed(RANKS):
            if not slots.waiting[rank] or not self.rules.classes[rank].can_preempt:
                continue
            gates = [gate for gate in slots.gates if gate.queues[rank]]
            gate = min(gates, key=lambda gate: gate.queues[rank].oldest.entered_s)
            victim = self._victim(gate.queues[rank].head)
            if victim is not None:
                self._give_way(victim, rank)
                changed.append(victim)
                changed += self._fill(slots, now)
        return changed

    def _unqueue(self, ticket: Ticket, state: str) -> None:
        ticket.state = state
        ticket.gate.queues[ticket.rank].remove(ticket)
        ticket.gate.waiting -= 1
        ticket.gate.slots.waiting[ticket.rank] -= 1
        ticket.gate.slots.waiting_total -= 1
        self._waiting[ticket.rank] -= 1


def _gate_of(slots: Slots, rank: int, until_s: float, blocked: set[Gate]) -> Gate | None:
    """The gate where the longest waiting request of a class came first, and by `until_s`, and where the next one has room.

    Gates where the next one has no room are added to `blocked`.
    """
    found, came_s = None, until_s
    for gate in slots.gates:
        queue = gate.queues[rank]
        if queue and queue.oldest.entered_s <= until_s and gate not in blocked:
            if not gate.fits(queue.head):
                blocked.add(gate)
            elif queue.oldest.entered_s <= came_s:
                found, came_s = gate, queue.oldest.entered_s
    return found


def _ahead_s(rules: Rules) -> float:
    """The estimated seconds that make a place; without a bound they still tell whether prefill is under way."""
    return PREFILL_AHEAD_S if rules.prefill_ahead_s is None else rules.prefill_ahead_s
