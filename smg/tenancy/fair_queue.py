"""Whose turn is it among the tenants of one class? Start-time fair queueing over estimated seconds of prefill.

Owns who waits, in which order they came, and what each tenant has been given lately. It decides the order and nothing else:
whether somebody may start at all is `tenancy/scheduler`'s business.

Goyal, Vin and Cheng, "Start-time Fair Queueing" (SIGCOMM 1996), section 2. A request of tenant f gets a start tag
S = max(v, F_f) and moves F_f to S + cost / weight; the smallest S goes next, and v is the S of the last one that went. So two
tenants who both wait get service in proportion to their weights up to one request each, and one who comes back after a pause
is next, without credit for the pause. Deviations: a request is tagged when it becomes the first of its tenant's, not when
it comes (equal while it waits, and one that leaves costs its tenant nothing), and requests that need not wait are charged as
well, so that a tenant who holds the engines pays for it as soon as another one comes.
"""

from __future__ import annotations

from collections import OrderedDict
from heapq import heapify, heappop, heappush
from typing import Generic, Protocol, TypeVar

FLOWS_MAX = 8_192
"""Tenants whose last service is remembered. Above it all start again as equals: so many are too many for anybody to notice."""


class Queued(Protocol):
    """What waits: who pays, how many seconds it is expected to cost divided by its weight, and since when."""

    tenant: str
    weighted_s: float
    entered_s: float


Q = TypeVar("Q", bound=Queued)


class _Flow(Generic[Q]):
    """One waiting tenant: its requests in order of arrival, and the number of its valid entry in the heap."""

    __slots__ = ("queue", "turn")

    def __init__(self) -> None:
        self.turn = 0
        self.queue: OrderedDict[Q, None] = OrderedDict()


class FairQueue(Generic[Q]):
    """The waiting requests of one class at one gate."""

    __slots__ = ("_finish", "_flows", "_heap", "_order", "_turns", "_virtual", "last", "last_s", "owed_s")

    def __init__(self) -> None:
        self._flows: dict[str, _Flow[Q]] = {}
        self._finish: dict[str, float] = {}  # tag F of each tenant that was given something in this busy time
        # (start tag, turn, tenant). An entry is valid while its flow has this turn; at most one per flow is.
        self._heap: list[tuple[float, int, str]] = []
        self._order: OrderedDict[Q, None] = OrderedDict()
        self._turns = 0
        self._virtual = 0.0
        self.last: str | None = None
        """Who was charged last. While it is nobody else's turn, what it owes is added up here and booked when it matters."""
        self.owed_s = 0.0
        self.last_s = 0.0  # the last part of it

    def __len__(self) -> int:
        return len(self._order)

    @property
    def oldest(self) -> Q:
        """Who has waited longest; there must be somebody."""
        return next(iter(self._order))

    @property
    def head(self) -> Q:
        """Whose turn it is; there must be somebody."""
        heap = self._heap
        while not self._is_valid(heap[0]):
            heappop(heap)
        return next(iter(self._flows[heap[0][2]].queue))

    def everybody(self) -> list[Q]:
        """All who wait, in order of arrival."""
        return list(self._order)

    def charge(self, tenant: str, weighted_s: float, is_first: bool = False) -> None:
        """A request goes without having waited; `is_first` begins a new busy time, in which nobody owes anything yet.

        Before that nobody waited and nothing was under way.
        """
        if is_first:
            self._finish = {}
            self._virtual = 0.0
        elif self.last is not None:
            self._book()
        self.last = tenant
        self.owed_s = self.last_s = weighted_s

    def _book(self) -> None:
        """Writes down what the last tenant owes: one charge of them all moves the tags as these did one by one."""
        tenant, self.last = self.last, None
        if tenant is None:
            return
        start = self._finish.get(tenant, 0.0)
        if start < self._virtual:
            start = self._virtual
        self._finish[tenant] = finish = start + self.owed_s
        self._virtual = max(start, finish - self.last_s)
        if len(self._finish) > FLOWS_MAX:
            self._prune()

    def push(self, request: Q) -> None:
        """`request` waits from now on."""
        self._book()
        flow = self._flows.get(request.tenant)
        if flow is None:
            flow = self._flows[request.tenant] = _Flow()
            self._enter(request.tenant, flow)
        flow.queue[request] = None
        self._order[request] = None

    def pop(self) -> Q:
        """Takes out whose turn it is; there must be somebody."""
        self._book()
        request = self.head
        start, _, tenant = heappop(self._heap)
        flow = self._flows[tenant]
        del flow.queue[request]
        del self._order[request]
        self._virtual = max(self._virtual, start)
        self._finish[tenant] = start + request.weighted_s
        if flow.queue:
            self._enter(tenant, flow)
        else:
            del self._flows[tenant]
        if len(self._finish) > FLOWS_MAX:
            self._prune()
        return request

    def remove(self, request: Q) -> None:
        """`request` waits no more, and was not served: its tenant owes nothing for it."""
        del self._order[request]
        flow = self._flows[request.tenant]
        del flow.queue[request]
        if not flow.queue:
            del self._flows[request.tenant]
            if len(self._heap) > 2 * len(self._flows) + 64:  # entries of those who left are many
                self._heap = [entry for entry in self._heap if self._is_valid(entry)]
                heapify(self._heap)

    def _enter(self, tenant: str, flow: _Flow[Q]) -> None:
        self._turns += 1
        flow.turn = self._turns
        heappush(self._heap, (max(self._virtual, self._finish.get(tenant, 0.0)), self._turns, tenant))

    def _is_valid(self, entry: tuple[float, int, str]) -> bool:
        flow = self._flows.get(entry[2])
        return flow is not None and flow.turn == entry[1]

    def _prune(self) -> None:
        """Forgets who owes nothing by now, and if these are too few, all debts; who waits keeps the tag it has."""
        self._finish = {tenant: tag for tenant, tag in self._finish.items() if tag > self._virtual}
        if len(self._finish) > FLOWS_MAX // 2:
            self._finish.clear()
