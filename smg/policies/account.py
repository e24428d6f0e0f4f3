"""What waits on one worker, in seconds: our own requests, and what is known of everybody else's.

This room owns the expected wait on one worker, out of three sources. Our own requests are exact: we
see them leave and we see their first byte. The engine's load report counts everybody's, some hundred
milliseconds late. Peers tell what they placed, after a delay. The last two fill one leaking bucket
(`level`): a worker computes one second of prefill per second, so news of age d is worth its seconds
minus d, which is what makes old news usable (docs/routing.md). While nobody else sends to the worker,
our own account alone counts. It decides nothing and never reads a clock; the policy above feeds it.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import deque

import msgspec

from smg.fleet.service_model import CacheCapacity, PrefillModel
from smg.fleet.worker import LoadReport, Worker
from smg.policies.neighbours import Question

RECENT_MAX = 64
"""Placements on a worker remembered with their seconds: they tell what a report's waiting requests cost."""
PEERS_SENT_MAX = 16
"""Placements of peers on a worker whose times are remembered: those on the way when a report was made are fewer."""
LATE_NEWS = 4
"""Placements of a worker that may not have been heard of yet, when its queue is matched with what was heard."""
SILENT_S = 60.0
"""How long an engine that told of no queue where there was one is not believed to have none: some count requests that
wait for their prefill as running, some work at several prefills at once. What was placed there then counts in full."""
ON_THE_WAY_S = 0.05
"""A request sent so shortly before a report may not have reached the engine when it told."""
ATTENTION_MAX = 4.0
"""Bound of how much longer than its tokens alone a queue may take."""
SLOTS = 64
"""Assumed size of a decode batch: how much a request in flight slows a prefill."""
SLOWDOWN = 0.5
"""A prefill beside a full decode batch takes 1 + this times as long."""
KV_FULL = 0.95
"""Above this KV usage a prompt that does not fit waits until a running request ends."""


FULL = object()
"""Stands for a report that tells of a full KV cache."""


class Open(msgspec.Struct, gc=False, eq=False):
    """One of our requests on a worker, from its placement to its end."""

    call: object
    """Kept alive, for its id is a key."""
    seconds: float
    sent_s: float
    is_stream: bool
    predicted_tokens: int
    """Cached tokens that the index predicted."""
    question: Question
    home_blocks: int = 0
    """Blocks that its worker was believed to hold for being the first home of an unknown session."""
    is_clean: bool = True
    """Whether its time to first byte, or the gap to the one before, will be its own prefill."""
    is_queued: bool = False
    """Whether it waited for one of ours."""
    is_bound: bool = False
    """Whether `observed_s` is only the most that its prefill can have taken."""
    observed_s: float | None = None
    """Seconds its prefill took, when that could be seen."""
    slowdown: float = 1.0
    """How much the worker's other requests slowed it, as far as known."""


class Account:
    """The account of one worker. `open` holds requests whose first byte has not come, in order of sending.

    `is_shared`: peers tell what they send to it. Else what others do is known from reports alone, and the level begins with
    the first one that tells of them.
    """

    __slots__ = (
        "_is_shared",
        "_level_at_s",
        "_level_s",
        "_peers_sent",
        "_queued_s",
        "_recent",
        "_reported_s",
        "blocked_s",
        "busy_until_s",
        "capacity",
        "empty_s",
        "fit",
        "has_others",
        "head_until_s",
        "last_first_s",
        "no_cache_until_s",
        "open",
        "placed",
        "report",
        "seconds",
        "silent_until_s",
        "sized_blocks",
        "usual_report",
    )

    def __init__(self, fit: PrefillModel, *, is_shared: bool = True) -> None:
        self.fit = fit
        self._is_shared = is_shared
        self.sized_blocks = 0
        """The bound of the worker's blocks as the index last heard it from here, 0 when it may have another."""
        self.capacity: CacheCapacity | None = None
        self.no_cache_until_s = float("-inf")
        """Until then the worker is taken to have no prefix cache."""
        self.silent_until_s = float("-inf")
        """Until then a report without waiting requests does not tell that there are none."""
        self.placed: dict[object, Open] = {}
        """All of ours that are not finished, by the id of the call; kept by the policy above."""
        self.open: dict[object, Open] = {}
        self.seconds = 0.0  # invariant: the sum over `open`
        self.last_first_s = float("-inf")
        self.head_until_s = float("-inf")
        """When the prefill of the oldest in `open` should be over; until then `own_s` is `busy_until_s - now`."""
        self.busy_until_s = float("-inf")
        """When all of `open` should be over, seen from the start of the oldest."""
        self.blocked_s = float("-inf")
        """When a report last told that all of ours wait and none is in prefill: slots or memory are full."""
        self.report: LoadReport | None = None
        self.has_others = False
        """Whether the last report, or news since, told of requests that are not ours."""
        self.usual_report: object = None
        """The last report, unless it told of a KV cache that is full: then nothing that a worker's report could be."""
        self._level_s = 0.0  # everybody's prefill seconds at `_level_at_s`, as far as known
        self._level_at_s = float("-inf")
        self._reported_s = 0.0  # the level at `report`, and how much of it was queue
        self._queued_s = 0.0
        self._peers_sent: deque[float] = deque(
            maxlen=PEERS_SENT_MAX
        )  # when peers placed something here, lately
        self._recent: list[tuple[float, float]] = []  # (sent, seconds) of everybody, in order of sending
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

    def level_s(self, now: float) -> float:
        """Seconds of everybody's prefill that are left, as far as known."""
        left = self._level_s - (now - self._level_at_s)
        return left if left > 0.0 else 0.0

    def wait_s(self, worker: Worker, report: LoadReport | None, now: float, mean_s: float) -> float:
        """Seconds until a request sent now would start its prefill.

        `report` is the worker's while it counts, else None; `mean_s` the usual prefill of this model.
        """
        if report is not None and report is not self.report:
            self.note(worker, report, mean_s)
        own = self.own_s(now) if self.open else 0.0
        if not self.has_others:
            return own
        level = self.level_s(now)
        return level if level > own else own

    def note(self, worker: Worker, report: LoadReport, mean_s: float) -> None:
        """Take a new report in. Must come before any other change: our own state is still that of its moment."""
        self.report = report
        self.usual_report = FULL if report.kv_usage is not None and report.kv_usage > KV_FULL else report
        waiting = report.waiting
        if self.open and waiting >= len(self.open):
            self.blocked_s = report.at_s
        level = own = self.own_s(report.at_s)
        if not (self._is_shared or self.has_others):
            self._level_s, self._level_at_s = own, report.at_s
            self._recent = [(request.sent_s, request.seconds) for request in self.open.values()]
        on_the_way = self._on_the_way(report.at_s)
        self.has_others = (
            report.running + waiting > worker.in_flight - worker.sent_since_report or on_the_way > 0
        )
        if self.has_others:
            recent = [seconds for sent_s, seconds in self._recent if sent_s <= report.at_s]
            self._queued_s = self._queue_s(report, recent, mean_s) if waiting else 0.0
            current = max(self.level_s(report.at_s) - self._queued_s, 0.0)
            begun = len(self.placed) - len(self.open)  # those of ours whose first byte has come
            count = max(0, report.running - begun) + on_the_way
            if not waiting and count <= len(recent):
                # Whatever is in front belongs to requests that are there and not begun, at most the latest ones: what was booked
                # too dear, or is over without our knowing, ends here even if the engine tells of no queue.
                current = min(current, sum(recent[-count:]) if count else 0.0)
            if not waiting and self._are_two_in_prefill(report.at_s):
                self.silent_until_s = report.at_s + SILENT_S
            # One request is in prefill, most likely the one sent before those that wait; news may be missing.
            in_front = max(recent[-waiting - 1 - LATE_NEWS :], default=mean_s)
            if self.silent_until_s <= report.at_s:
                current = min(current, in_front)
            if waiting and not current:
                current = 0.5 * mean_s
            level = max(own, self._queued_s + current)
        self._reported_s = self._level_s = level
        self._level_at_s = report.at_s

    def _on_the_way(self, at_s: float) -> int:
        """Requests of peers, sent so shortly before a report of `at_s` that it may not have counted them."""
        return sum(at_s - ON_THE_WAY_S < sent_s <= at_s for sent_s in self._peers_sent)

    def _are_two_in_prefill(self, at_s: float) -> bool:
        """Whether two streams of ours had been sent well before `at_s` and still waited for their first bytes."""
        count = 0
        for request in self.open.values():
            if request.sent_s > at_s - ON_THE_WAY_S:
                break
            count += request.is_stream
            if count == 2:
                return True
        return False

    def _queue_s(self, report: LoadReport, recent: list[float], mean_s: float) -> float:
        """Seconds of the requests that a report tells to be waiting."""
        waiting, fit, tokens = report.waiting, self.fit, report.waiting_tokens
        queue = recent[-waiting:]
        known = sum(queue)
        if tokens is None:
            seconds = known + (waiting - len(queue)) * mean_s
        else:
            told = waiting * fit.base_s + tokens * fit.per_token_s
            # Tokens tell nothing of attention, which is most of a very long prompt: at least that of equally
            # long ones, or as much as for those that we know.
            straight = sum(map(fit.linear_s, queue))
            ratio = min(known / straight, ATTENTION_MAX) if straight > 0.0 else 1.0
            seconds = max(told * ratio, told + fit.per_pair_s * tokens * tokens / (2.0 * waiting))
        return seconds * slowdown(report.running)

    def place(self, key: object, request: Open) -> None:
        """A request of ours goes to the worker."""
        sent_s, seconds = request.sent_s, request.seconds
        open_ = self.open
        if open_ and self.head_until_s <= sent_s:
            self.settle(sent_s)
        if self.has_others:
            # Its first byte will tell its own prefill if nobody is in front whose end we would not see.
            report = self.report
            request.is_clean = (
                report is not None and not report.waiting and not open_ and self.level_s(sent_s) <= 0.0
            )
        if open_:
            self.seconds += seconds
            self.busy_until_s += seconds
        else:
            since_s = self.last_first_s
            self.seconds = seconds
            self.head_until_s = self.busy_until_s = (sent_s if sent_s > since_s else since_s) + seconds
        open_[key] = request
        if self._is_shared or self.has_others:
            self._pour(sent_s, seconds)

    def _pour(self, sent_s: float, seconds: float) -> None:
        """A request of ours comes into the level, and is remembered."""
        recent, at_s = self._recent, self._level_at_s
        if sent_s < at_s or (recent and recent[-1][0] > sent_s):
            self._add(sent_s, seconds)
            self._remember(sent_s, seconds)
            return
        # The same for what was sent just now: nothing is late.
        left = self._level_s - (sent_s - at_s)
        report = self.report
        more = seconds if report is None else seconds * slowdown(report.running)
        self._level_s = left + more if left > 0.0 else more
        self._level_at_s = sent_s
        recent.append((sent_s, seconds))
        if len(recent) > 2 * RECENT_MAX:
            del recent[:RECENT_MAX]

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
        elif now - request.sent_s < request.seconds:
            # Whatever it waited for, its prefill was no longer than this, and that is less than we thought. Where peers
            # send too, a fit that is much too slow sees no other lesson: by it nobody's work is ever done.
            request.is_bound = True
            request.observed_s = now - request.sent_s
            request.slowdown = slower
        self._drop(request)
        self.last_first_s = max(self.last_first_s, now)
        self._mark()
        if self.has_others:
            self.passed(request.sent_s, now)

    def passed(self, sent_s: float, now: float) -> None:
        """The prefill of a request sent at `sent_s` is over, and so is that of all that was sent before it."""
        later = 0.0
        for other_s, seconds in reversed(self._recent):
            if other_s <= sent_s:
                break
            later += seconds
        self._level_s, self._level_at_s = later, now

    def end(self, key: object, now: float) -> None:
        """A request of ours ended, perhaps before its first byte."""
        request = self.open.pop(key, None)
        if request is not None:
            seconds = request.seconds
            # Float dust must not outlive the work.
            self.seconds = self.seconds - seconds if self.open else 0.0
            if not request.is_stream:
                over_s = request.sent_s + seconds
                if over_s > now:
                    over_s = now
                if over_s > self.last_first_s:
                    self.last_first_s = over_s
            self._mark()

    def peer_placed(self, seconds: float, sent_s: float) -> None:
        """A peer told that it sent `seconds` of prefill at `sent_s` of our clock."""
        self.has_others = True
        self._peers_sent.append(sent_s)
        report = self.report
        if report is None or sent_s > report.at_s - ON_THE_WAY_S or self.silent_until_s > report.at_s:
            self._add(sent_s, seconds)
            self._remember(sent_s, seconds)
            return
        self._remember(sent_s, seconds)
        behind = len(self._recent) - 1 - bisect_left(self._recent, (sent_s, seconds))
        if behind > report.waiting:
            return  # it is over
        # The report has counted it if it was waiting. If it was in prefill, no report tells how long that takes.
        waiting, tokens = report.waiting, report.waiting_tokens
        is_too_long = tokens is not None and self.fit.linear_s(seconds) > (
            waiting * self.fit.base_s + tokens * self.fit.per_token_s
        )
        if behind == waiting or is_too_long:
            told = seconds - (report.at_s - sent_s) + self._queued_s
            if told > self._reported_s:
                if self._level_s > 0.0:
                    self._level_s += told - self._reported_s
                else:
                    self._level_s = max(0.0, told - (self._level_at_s - report.at_s))
                self._reported_s = told

    def others_done(self, now: float) -> None:
        """Peers told that they have nothing on this worker any more: what is left is ours."""
        self.has_others = False
        self._level_s = min(self.level_s(now), self.own_s(now))
        self._level_at_s = max(self._level_at_s, now)

    def _add(self, sent_s: float, seconds: float) -> None:
        report = self.report
        if report is not None:
            seconds *= slowdown(report.running)
        at_s = max(self._level_at_s, sent_s)
        level = self.level_s(at_s)
        if level <= 0.0:  # late news of a worker that had nothing else to do
            seconds_left = max(0.0, seconds - (at_s - sent_s))
        else:
            seconds_left = seconds
        self._level_s, self._level_at_s = level + seconds_left, at_s

    def _remember(self, sent_s: float, seconds: float) -> None:
        recent = self._recent
        if not recent or recent[-1][0] <= sent_s:
            recent.append((sent_s, seconds))
        else:
            insort(recent, (sent_s, seconds))
        if len(recent) > 2 * RECENT_MAX:
            del recent[:RECENT_MAX]

    def rescale(self, ratio: float) -> None:
        """The fit has learned that prefill takes `ratio` times what was booked with it: what is still in front does too."""
        for request in self.placed.values():
            request.seconds *= ratio
        self.seconds = sum(request.seconds for request in self.open.values())
        self._recent = [(sent_s, seconds * ratio) for sent_s, seconds in self._recent]
        self._level_s *= ratio
        self._reported_s *= ratio
        self._queued_s *= ratio
        self._mark()

    def settle(self, now: float) -> None:
        """Close plain requests whose prefill must be over by now: nothing tells when it is."""
        while self.open:
            key, request = next(iter(self.open.items()))
            start = max(request.sent_s, self.last_first_s)
            if request.is_stream or now - start < request.seconds:
                break
            del self.open[key]
            self._drop(request)
            self.last_first_s = start + request.seconds
        self._mark()

    def _mark(self) -> None:
        """Says anew when the oldest and all of `open` should be over: something has changed at the front."""
        for request in self.open.values():
            since_s, sent_s = self.last_first_s, request.sent_s
            start_s = sent_s if sent_s > since_s else since_s
            self.head_until_s = start_s + request.seconds
            self.busy_until_s = start_s + self.seconds
            return
        self.head_until_s = self.busy_until_s = float("-inf")

    def _drop(self, request: Open) -> None:
        self.seconds -= request.seconds
        if not self.open:
            self.seconds = 0.0  # float dust must not outlive the work


SLOWDOWNS = tuple(1.0 + SLOWDOWN * in_flight / SLOTS for in_flight in range(SLOTS + 1))
"""`slowdown` of 0 to SLOTS requests."""


def slowdown(in_flight: int) -> float:
    """How much longer a prefill takes beside the decoding of so many requests."""
    return SLOWDOWNS[in_flight if in_flight < SLOTS else SLOTS]
