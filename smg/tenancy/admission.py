"""May this request start now? Slots, a bounded queue in order of arrival, and a rate (contract ADM-1 to ADM-3).

Owns the exact number of requests in flight and who waits. It never waits, wakes or sends anything: it hands out
tickets, the gateway parks the request on its ticket and wakes those that this machine names.

The life of a request:

    ticket = admission.enter(now)           raises GatewayError when it is refused
    if ticket is not None:                  park until the ticket is named by `leave`, `abandon` or `expire`
        on cancellation:                    wake(admission.abandon(ticket))
        ticket.state is EXPIRED:            raise admission.timeout_error()
    ...                                     exactly one slot is held here
    wake(admission.leave())                 exactly once

A slot is handed over, never dropped and fought for: whoever leaves names the next in line, who owns the slot from that
moment, before it runs. So nobody overtakes, and a waiting request exists only while all slots are taken.
"""

from __future__ import annotations

import sys
from collections import OrderedDict

from smg.errors import GatewayError
from smg.settings import Limits
from smg.tenancy.bucket import TokenBucket

WAITING = "waiting"
ADMITTED = "admitted"
EXPIRED = "expired"
LEFT = "left"

RETRY_AFTER_S = 2.0
"""`Retry-After` when the queue is full or was too slow; what the existing system says."""


RATE_KEY = b"requests per second"
"""The request rate of the whole gateway among the limits of a cluster. Keys of tenants have zero bytes in them."""


class Ticket:
    """A request that waits. `waiter` belongs to the gateway: whatever it wakes the request by."""

    __slots__ = ("deadline_s", "state", "waiter")

    def __init__(self, deadline_s: float) -> None:
        self.deadline_s = deadline_s
        self.state = WAITING
        self.waiter: object = None


class Admission:
    """The one door of all inference requests. `in_flight_max` None = no limit; `bucket` None = no rate."""

    __slots__ = (
        "_bucket",
        "_max",
        "_queue",
        "_queue_size",
        "_queue_timeout_s",
        "admitted_total",
        "in_flight",
        "rejected_total",
    )

    def __init__(
        self,
        in_flight_max: int | None,
        queue_size: int,
        queue_timeout_s: float,
        bucket: TokenBucket | None = None,
    ) -> None:
        self._max = sys.maxsize if in_flight_max is None else in_flight_max
        self._queue_size = queue_size
        self._queue_timeout_s = queue_timeout_s
        self._bucket = bucket
        # Invariant: not empty only while in_flight == _max. Deadlines rise from front to back.
        self._queue: OrderedDict[Ticket, None] = OrderedDict()
        self.in_flight = 0
        self.admitted_total = 0
        self.rejected_total = 0

    @property
    def waiting(self) -> int:
        """Requests in the queue."""
        return len(self._queue)

    @property
    def rate_limit(self) -> TokenBucket | None:
        """The bucket of the request rate, which the nodes of a cluster share."""
        return self._bucket

    def enter(self, now: float) -> Ticket | None:
        """A request arrives: None = it holds a slot, a ticket = it waits.

        Raises GatewayError, and nothing has changed: 429 `admission_queue_full` (ERR-12), 429 `rate_limit_exceeded`
        (ERR-13).
        """
        if self.in_flight < self._max and self._bucket is None:
            self.in_flight += 1
            self.admitted_total += 1
            return None
        return self._enter_checked(now)

    def leave(self) -> Ticket | None:
        """A request that held a slot is over. Returns the ticket to wake, which owns the slot already, or None."""
        if self._queue:
            ticket, _ = self._queue.popitem(last=False)
            ticket.state = ADMITTED
            self.admitted_total += 1
            return ticket
        self.in_flight -= 1
        assert self.in_flight >= 0, "a slot came back twice"
        return None

    def abandon(self, ticket: Ticket) -> Ticket | None:
        """The client of a parked request left. Returns the ticket to wake when the place it had was a slot.

        Right in every state: still waiting, admitted but not awake yet, or expired.
        """
        state = ticket.state
        ticket.state = LEFT
        if state == WAITING:
            del self._queue[ticket]
        elif state == ADMITTED:
            return self.leave()
        return None

    def expire(self, now: float) -> list[Ticket]:
        """Takes those who waited too long out of the queue; wake them, they answer with `timeout_error`."""
        expired: list[Ticket] = []
        queue = self._queue
        while queue:
            ticket = next(iter(queue))
            if ticket.deadline_s > now:
                break
            del queue[ticket]
            ticket.state = EXPIRED
            self.rejected_total += 1
            expired.append(ticket)
        return expired

    def next_deadline_s(self) -> float | None:
        """When `expire` has something to do, or None."""
        return next(iter(self._queue)).deadline_s if self._queue else None

    def timeout_error(self) -> GatewayError:
        """What a request that waited too long is told (ERR-14)."""
        return GatewayError(
            503,
            "admission_queue_timeout",
            "The request waited too long in the admission queue",
            retry_after_s=RETRY_AFTER_S,
        )

    def _enter_checked(self, now: float) -> Ticket | None:
        """`enter` when the slots are taken or a rate is set; refuses before it takes a token."""
        is_full = self.in_flight >= self._max
        if is_full and len(self._queue) >= self._queue_size:
            self.rejected_total += 1
            raise GatewayError(
                429, "admission_queue_full", "The admission queue is full", retry_after_s=RETRY_AFTER_S
            )
        bucket = self._bucket
        if bucket is not None and not bucket.take(now):
            self.rejected_total += 1
            raise GatewayError(
                429,
                "rate_limit_exceeded",
                "The request rate limit is exceeded",
                retry_after_s=bucket.next_at_s(now) - now,
            )
        if is_full:
            ticket = Ticket(now + self._queue_timeout_s)
            self._queue[ticket] = None
            return ticket
        self.in_flight += 1
        self.admitted_total += 1
        return None


def admission_of(limits: Limits, cores: int, now: float, *, has_scheduler: bool = False) -> Admission:
    """The door that the command line asks for: burst of the rate is max(1, rate), never above the slots (ADM-3).

    `has_scheduler`: slots and queues are the scheduler's; the rate stays here.
    """
    in_flight_max = limits.in_flight_max(cores)
    rate_per_s = limits.requests_per_second()
    bucket = None
    if rate_per_s is not None:
        burst = max(1.0, rate_per_s)
        burst = burst if in_flight_max is None else min(burst, in_flight_max)
        bucket = TokenBucket(rate_per_s, burst, now, RATE_KEY)
    return Admission(
        None if has_scheduler else in_flight_max, limits.queue_size, limits.queue_timeout_secs, bucket
    )
