"""What one worker owes us: prefill seconds sent to it and not yet answered, and what others sent it.

This room owns the expected wait on one worker, in seconds, out of three sources: our own requests
(exact: we see them leave and we see their first byte), the engine's last load report (everybody's
requests, but some hundred milliseconds old) and what peers told of their placements since. It decides
nothing and never reads a clock; the policy above feeds it and asks it.

Work drains by itself: a worker computes one second of prefill per second. A report or a peer's word
of age d is therefore worth its seconds minus d, which is what makes old news usable (docs/routing.md).
"""

from __future__ import annotations

from collections import deque

from smg.fleet.service_model import CacheCapacity, PrefillModel
from smg.fleet.worker import LoadReport, Worker
from smg.policies.neighbours import Question

PEER_NEWS_MAX = 1_024
"""Peers' placements remembered since the last report; more than that in one poll interval is noise."""
PEER_NEWS_S = 10.0
"""Peers' placements older than this have been prefilled or are in the next report, if there ever is one."""
SLOTS = 64
"""Assumed size of a decode batch: how much a request in flight slows a prefill."""
SLOWDOWN = 0.5
"""A prefill beside a full decode batch takes 1 + this times as long."""


class Open:
    """One of our requests on a worker, from its placement to its end."""

    __slots__ = (
        "is_clean",
        "is_queued",
        "is_stream",
        "observed_s",
        "predicted_tokens",
        "question",
        "seconds",
        "sent_s",
        "slowdown",
    )

    def __init__(
        self, seconds: float, sent_s: float, is_stream: bool, predicted_tokens: int, question: Question
    ) -> None:
        self.seconds = seconds
        self.sent_s = sent_s
        self.is_stream = is_stream
        self.predicted_tokens = predicted_tokens
        """Cached tokens that the index predicted."""
        self.question = question
        self.is_clean = False
        """Whether its time to first byte, or the gap to the one before, will be its own prefill."""
        self.is_queued = False
        """Whether it waited for one of ours."""
        self.observed_s: float | None = None
        """Seconds its prefill took, when that could be seen."""
        self.slowdown = 1.0
        """How much the worker's other requests slowed it, as far as known."""


class Account:
    """The account of one worker. `open` holds requests whose first byte has not come, in order of sending."""

    __slots__ = (
        "blocked_s",
        "capacity",
        "empty_s",
        "fit",
        "is_shared",
        "last_first_s",
        "open",
        "own_since_s",
        "peer_news",
        "peer_since_s",
        "report",
        "reported_s",
        "seconds",
    )

    def __init__(self, fit: PrefillModel) -> None:
        self.fit = fit
        self.capacity: CacheCapacity | None = None
        self.open: dict[object, Open] = {}
        self.seconds = 0.0  # invariant: the sum over `open`
        self.last_first_s = float("-inf")
        self.blocked_s = float("-inf")
        """When a report last told that all of ours wait and none is in prefill: slots or memory are full."""
        self.report: LoadReport | None = None
        self.reported_s = 0.0  # everybody's backlog when `report` came
        self.is_shared = False  # whether `report` told of requests that are not ours
        self.own_since_s = 0.0  # sent by us since `report`
        self.peer_since_s = 0.0  # sent by peers since `report`, as far as heard
        self.peer_news: deque[tuple[float, float]] = deque()
        self.empty_s = float("-inf")
        """When the worker will have nothing left, if nothing more comes; kept by the policy above for its order."""

    def own_s(self, now: float) -> float:
        """Seconds of our own prefill that are left, event by event: exact while nobody else sends."""
        left = self.seconds
        at_s = self.last_first_s
        for request in self.open.values():
            start = request.sent_s if request.sent_s > at_s else at_s
            spent = now - start
            if spent < request.seconds or request.is_stream:
                # A stream is prefilling until its first byte, however late that is.
                if spent > 0.0:
                    left -= min(spent, request.seconds)
                break
            left -= request.seconds
            at_s = start + request.seconds
        return left if left > 0.0 else 0.0

    def wait_s(self, worker: Worker, report: LoadReport | None, now: float, mean_s: float) -> float:
        """Seconds until a request sent now would start its prefill.

        `report` is the worker's while it counts, else None; `mean_s` the usual prefill of this model.
        """
        own = self.own_s(now) if self.open else 0.0
        if report is None:
            return own + self._peers_s(now) if self.peer_news else own
        if report is not self.report:
            self.note(worker, report, mean_s)
        if not self.is_shared:
            return own + self._peers_s(now) if self.peer_news else own
        left = self.reported_s - (now - report.at_s)
        total = (left if left > 0.0 else 0.0) + self.own_since_s + self._peers_s(now)
        return total if total > own else own

    def note(self, worker: Worker, report: LoadReport, mean_s: float) -> None:
        """Take a new report in. Must come before any other change: our own state is still that of its moment."""
        self.report = report
        own = self.own_s(report.at_s)
        fit = self.fit
        waiting = report.waiting
        if self.open and waiting >= len(self.open):
            self.blocked_s = report.at_s
        if waiting and report.waiting_tokens is not None:
            backlog = waiting * fit.base_s + report.waiting_tokens * fit.per_token_s
        else:
            backlog = waiting * mean_s
        if waiting:
            backlog += 0.5 * mean_s  # somebody is in front of those who wait
        ours = worker.in_flight - worker.sent_since_report
        self.is_shared = report.running + waiting > ours
        self.reported_s = backlog if backlog > own else own
        self.own_since_s = 0.0
        news = self.peer_news
        while news and news[0][0] <= report.at_s:
            self.peer_since_s -= news.popleft()[1]
        if not news:
            self.peer_since_s = 0.0

    def place(self, key: object, request: Open) -> None:
        """A request of ours goes to the worker."""
        self.settle(request.sent_s)
        report = self.report
        # Its first byte will tell its own prefill if nobody is in front whose end we would not see.
        request.is_clean = not self.is_shared or (
            report is not None and report.waiting == 0 and not self.open and not self.own_since_s
        )
        self.open[key] = request
        self.seconds += request.seconds
        self.own_since_s += request.seconds

    def first_byte(self, key: object, slower: float, now: float) -> None:
        """The first byte of a request of ours came: its prefill is over, and so is that of those before it."""
        request = self.open.pop(key, None)
        if request is None:
            return
        if self.blocked_s >= request.sent_s:
            request.is_clean = False
        if request.is_clean and (not self.open or request.sent_s <= next(iter(self.open.values())).sent_s):
            request.is_queued = self.last_first_s > request.sent_s
            request.observed_s = now - max(request.sent_s, self.last_first_s)
            request.slowdown = slower
        self._drop(request)
        self.last_first_s = max(self.last_first_s, now)

    def end(self, key: object, now: float) -> None:
        """A request of ours ended, perhaps before its first byte."""
        request = self.open.pop(key, None)
        if request is not None:
            self._drop(request)
            if not request.is_stream:
                self.last_first_s = max(self.last_first_s, min(now, request.sent_s + request.seconds))

    def peer_placed(self, seconds: float, sent_s: float) -> None:
        """A peer told that it sent `seconds` of prefill at `sent_s` of our clock."""
        if self.report is not None and sent_s <= self.report.at_s:
            return  # the report has counted it
        news = self.peer_news
        news.append((sent_s, seconds))
        self.peer_since_s += seconds
        if len(news) > PEER_NEWS_MAX or news[0][0] < sent_s - PEER_NEWS_S:
            self.peer_since_s -= news.popleft()[1]

    def settle(self, now: float) -> None:
        """Close plain requests whose prefill must be over by now: nothing tells when it is."""
        while self.open:
            key, request = next(iter(self.open.items()))
            start = max(request.sent_s, self.last_first_s)
            if request.is_stream or now - start < request.seconds:
                return
            del self.open[key]
            self._drop(request)
            self.last_first_s = start + request.seconds

    def _drop(self, request: Open) -> None:
        self.seconds -= request.seconds
        if not self.open:
            self.seconds = 0.0  # float dust must not outlive the work

    def _peers_s(self, now: float) -> float:
        """What peers sent since the report and is left, if all of it came at once when the first of it did."""
        if not self.peer_news:
            return 0.0
        if self.is_shared:
            return max(0.0, self.peer_since_s)
        return max(0.0, self.peer_since_s - (now - self.peer_news[0][0]))


def slowdown(in_flight: int) -> float:
    """How much longer a prefill takes beside the decoding of so many requests."""
    return 1.0 + SLOWDOWN * (in_flight if in_flight < SLOTS else SLOTS) / SLOTS
