"""The slots and gates of the scheduler: what is taken, what is kept free for whom, and how much prefill is under way.

Owns the arithmetic of two bounds. *Slots* bound the requests that are with the workers, with a reservation per class. A *gate*
stands before a set of workers and bounds the prefill that they have not answered yet, in places: one per worker, of which a
long prompt takes the whole and a short one its share. Who waits, and who may pass when, is `tenancy/scheduler`'s business.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from heapq import heapify, heappop, heappush
from typing import TYPE_CHECKING

from smg.tenancy.fair_queue import FairQueue
from smg.tenancy.priorities import RANKS, ClassRules, fitted

if TYPE_CHECKING:
    from smg.tenancy.scheduler import Ticket

NO_BOUND = sys.maxsize
"""Slots where nobody set a limit."""

_ROUNDING = 1e-9
SIZE_MIN = 1 / 1024
"""Smallest share of a place: what costs nothing by the estimate still is one more request."""


def size_of(cost_s: float, ahead_s: float) -> float:
    """The part of a place that a prefill of `cost_s` takes, when `ahead_s` fill a place: the whole at most."""
    return 1.0 if cost_s >= ahead_s else max(cost_s / ahead_s, SIZE_MIN)


PACE_MIN, PACE_MAX = 1 / 16, 4.0
"""Bounds of the pace: what an estimate may be wrong by."""
_PACE_LEARNED = 0.1
"""Share of the way to an answer that came sooner than the estimate: one odd answer must not count for much."""
_PACE_UP, _PACE_DOWN = 0.5, 0.025
"""Per second; down for prompts that take a whole place, and faster for shorter ones, whose queue in an engine is soon gone. A
pace that is three times too slow is right after five to fifty seconds."""
_PACE_RETURN = 0.005
"""Per second, the way back to the estimate where engines tell nothing."""


class Slots:
    """Slots of the requests that are with workers; those of one fleet, or one number for all (`--max-concurrent-requests`).

    Invariant: `total` is the sum of `used`, over all ranks, and the number of requests that hold a slot. It is above `capacity` only after
    the capacity has shrunk. `promoted_s` says when a class last got a slot. Below `free_total` in all, any class may take one.
    """

    __slots__ = (
        "capacity",
        "entered",
        "free_total",
        "gates",
        "gone",
        "is_shrunk",
        "promoted_s",
        "reserved",
        "silent",
        "total",
        "waiting",
        "waiting_total",
    )

    def __init__(self) -> None:
        self.capacity = self.free_total = NO_BOUND
        self.reserved: Sequence[int] = [0 for _ in RANKS]
        self.is_shrunk = False
        self.entered = [0 for _ in RANKS]
        """Slots taken so far, by rank."""
        self.gone = [0 for _ in RANKS]
        """Those of them that came back."""
        self.total = 0
        self.waiting = [0 for _ in RANKS]
        self.waiting_total = 0
        self.promoted_s = [-math.inf for _ in RANKS]
        self.gates: list[Gate] = []
        self.silent: dict[Ticket, None] = {}
        """Who has sent no byte yet as far as known, in order of admission."""

    def resize(self, capacity: int, classes: tuple[ClassRules, ...]) -> None:
        """The fleet or the rules have changed."""
        self.capacity = capacity
        self.reserved, self.is_shrunk = (
            ([0 for _ in RANKS], False) if capacity == NO_BOUND else fitted(classes, capacity)
        )
        self.free_total = capacity - sum(self.reserved)

    def used(self, rank: int) -> int:
        """Requests of a class that hold a slot."""
        return self.entered[rank] - self.gone[rank]

    def free_for(self, rank: int) -> int:
        """Slots that a class may take now: all free ones but those that higher classes reserve and do not use."""
        free = self.capacity - self.total
        reserved = self.reserved
        for higher in range(rank + 1, len(RANKS)):
            unused = reserved[higher] - self.used(higher)
            if unused > 0:
                free -= unused
        return free

    def sort(self) -> None:
        """Tells the gates of the shares that came since this was last called and that end by the estimate."""
        for ticket in reversed(self.silent):
            if ticket.is_sorted:
                break
            ticket.is_sorted = True
            if ticket.share and not ticket.is_stream:
                ticket.gate.hold(ticket)

    def give_back(self, ticket: Ticket) -> None:
        """`ticket` holds its slot no more."""
        rank = ticket.rank
        self.gone[rank] += 1
        self.total -= 1
        assert self.used(rank) >= 0, "a slot came back twice"
        self.silent.pop(ticket, None)


class Gate:
    """The way to one set of workers.

    `places` is the number of workers, or without bound when there is none (dispatch knows what to tell them) or none is
    wanted. `open` is the prefill under way, in places, of `holders` requests; `waiting` the requests in the queues. `pace` corrects
    the estimates of answers that are no streams.
    """

    __slots__ = (
        "_holds",
        "_sequence",
        "_stalled_s",
        "holders",
        "open",
        "pace",
        "places",
        "queues",
        "slots",
        "waiting",
        "workers",
    )

    def __init__(self, slots: Slots) -> None:
        self.slots = slots
        slots.gates.append(self)
        self.workers = 0
        self.places = math.inf
        self.open = 0.0
        self.queues: tuple[FairQueue[Ticket], ...] = tuple(FairQueue() for _ in RANKS)
        self.waiting = 0
        self.pace = 1.0
        self.holders = 0
        # Shares of answers that are no streams: nothing tells when their prefill ends, so they end by the estimate.
        self._holds: list[tuple[float, int, Ticket]] = []
        self._stalled_s = 0.0  # what the clock of these estimates is behind
        self._sequence = 0

    @property
    def is_idle(self) -> bool:
        """Whether no prefill is under way."""
        return not self.holders

    def widen(self, workers: int, is_bounded: bool) -> None:
        """So many workers stand behind the gate now; `is_bounded`: prefill is bounded at all."""
        self.workers = workers
        self.places = float(workers) if workers and is_bounded else math.inf

    def fits(self, ticket: Ticket, less: float = 0.0) -> bool:
        """Whether the prefill of `ticket` may be sent now, if `less` were not under way."""
        return self.open - less + ticket.size <= self.places + _ROUNDING

    def take(self, ticket: Ticket) -> None:
        """The prefill of `ticket` is under way."""
        ticket.share = ticket.size
        self.open += ticket.size
        self.holders += 1

    def release(self, ticket: Ticket) -> None:
        """The prefill of `ticket` is over; nothing when that was known already."""
        if ticket.share:
            self.open -= ticket.share
            ticket.share = 0.0
            self.holders -= 1
            if not self.holders:
                self.open = 0.0  # rounding must not add up over weeks
                self._holds.clear()

    def release_due(self, now: float) -> None:
        """Lets go of the shares whose estimated time is over."""
        self._sort()
        holds = self._holds
        by_s = now - self._stalled_s
        while holds and holds[0][0] <= by_s:
            self.release(heappop(holds)[2])

    @property
    def due_s(self) -> float:
        """When the next share ends by the estimate."""
        self._sort()
        held = (due_s for due_s, _, ticket in self._holds if ticket.share)
        return min(held, default=math.inf) + self._stalled_s

    @property
    def has_estimates(self) -> bool:
        """Whether a share may be held whose end only the estimate tells."""
        self._sort()
        return bool(self._holds)

    def observe(self, seconds: float, waiting: Sequence[int]) -> None:
        """For so long the engines behind the gate, those that tell, have had so many requests waiting each.

        Where a place's worth of work waits no estimate of ours runs off: without this one that is too short by a hundredth
        adds up, prefill by prefill, to a queue in the engines. And the pace follows, while it is what requests wait for:
        slower where work waits, a little faster where none does, so that it settles where work waits a twentieth of the time.
        """
        self._sort()
        if not self.holders or not self._holds:
            return
        if not waiting:
            if self.pace < 1.0:
                self.pace *= 1.0 + _PACE_RETURN * seconds
            return
        size = max(self.open / self.holders, 0.1)
        backed_up_ratio = sum(count * size + _ROUNDING >= 1.0 for count in waiting) / len(waiting)
        self._stalled_s += seconds * backed_up_ratio
        if self.waiting and self.open + 1.0 > self.places:
            slower, faster = _PACE_UP * backed_up_ratio, _PACE_DOWN / size * (1.0 - backed_up_ratio)
            self.pace = min(max(self.pace * (1.0 + (slower - faster) * seconds), PACE_MIN), PACE_MAX)

    def hold(self, ticket: Ticket) -> None:
        """The share of `ticket` ends by the estimate."""
        self._sequence += 1
        due_s = ticket.admitted_s - self._stalled_s + ticket.cost_s * self.pace
        heappush(self._holds, (due_s, self._sequence, ticket))

    def _sort(self) -> None:
        """Takes in the shares that came since, and forgets those that are over: most answers end before anybody looks."""
        self.slots.sort()
        if len(self._holds) > self.holders:
            self._holds = [hold for hold in self._holds if hold[2].share]
            heapify(self._holds)

    def learn(self, ticket: Ticket, seconds: float) -> None:
        """An answer that is no stream came whole so long after its request was let through: no prefill took longer."""
        ratio = seconds / ticket.cost_s if ticket.cost_s > 0 else 1.0
        if ratio < self.pace and self.pace > PACE_MIN:
            self.pace += _PACE_LEARNED * (max(ratio, PACE_MIN) - self.pace)
