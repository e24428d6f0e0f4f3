"""The last decisions, for a page that somebody looks at: who got a request, by which rule, and what that was believed to cost.

Owns a small ring and the moment when it is filled: only while it is switched on, and then of a sample of the requests, so that
neither the number of requests nor that of the workers makes watching dear. While it is off nothing stands in the way of a
request: lanes are made without it, and `on_switch` has them made anew. It holds served model names, ids of workers and numbers;
never an id of a request, a key, a tenant or a text. It never changes a choice.
"""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Callable, Sequence
from random import Random
from typing import Any

import msgspec

from smg.api.call import Call
from smg.fleet.worker import Worker
from smg.gateway.receipts import Watched
from smg.gateway.tallies import Lane, PairLane
from smg.policies.policy import Around, Policy

KEPT_MAX = 50
"""More than fits on a screen."""
NOTED_PER_S = 4.0
"""What a reader can follow; explaining one decision among 1,000 workers takes milliseconds, which is then no load."""
BURST_MAX = float(KEPT_MAX)
"""After some quiet, so many are noted without a gap: whoever sends a few requests by hand sees them all."""


class Decision(msgspec.Struct, frozen=True, kw_only=True):
    """One placement. `number` counts them; `at_s` is the clock of dispatch; `receipt` as in the header of an answer."""

    number: int
    at_s: float
    model: str
    endpoint: str
    leg: str
    receipt: dict[str, Any]


class Decisions:
    """See the module. `now_s` is the clock of dispatch."""

    def __init__(self, now_s: Callable[[], float]) -> None:
        self.is_on = False
        self._now_s = now_s
        self._ring: deque[Decision] = deque(maxlen=KEPT_MAX)
        self._number = 0
        self._allowed = BURST_MAX
        self._filled_s = 0.0
        self._on_switch: list[Callable[[], None]] = []

    def on_switch(self, callback: Callable[[], None]) -> None:
        """Call `callback` whenever `is_on` has changed."""
        self._on_switch.append(callback)

    def switch(self, is_on: bool) -> None:
        """Begin to note, or stop and forget."""
        if is_on == self.is_on:
            return
        self.is_on = is_on
        if is_on:
            self._allowed, self._filled_s = BURST_MAX, self._now_s()
        else:
            self._ring.clear()
        for callback in self._on_switch:
            callback()

    def last(self) -> Sequence[Decision]:
        """What is kept, newest first."""
        return tuple(reversed(self._ring))

    def watched(self, lane: Lane, endpoint: str) -> Lane:
        """The lane with its policies watched; for lanes that are made while this is on."""
        seen = copy.copy(lane)
        seen.policy = _Noted(lane.policy, self, lane.model, endpoint, "")
        seen.tells_placed = True
        if isinstance(seen, PairLane):
            prefill = copy.copy(seen.prefill)
            prefill.policy = _Noted(prefill.policy, self, lane.model, endpoint, "prefill")
            prefill.tells_placed = True
            seen.prefill = prefill
        return seen

    def may_note(self, now: float) -> bool:
        """Whether the next decision is one of the sample."""
        if now > self._filled_s:
            self._allowed = min(BURST_MAX, self._allowed + (now - self._filled_s) * NOTED_PER_S)
            self._filled_s = now
        return self.is_on and self._allowed >= 1.0

    def note(self, model: str, endpoint: str, leg: str, receipt: dict[str, Any]) -> None:
        """Keep one; the oldest goes when there are too many."""
        self._allowed -= 1.0
        self._number += 1
        self._ring.append(
            Decision(
                number=self._number,
                at_s=self._now_s(),
                model=model,
                endpoint=endpoint,
                leg=leg,
                receipt=receipt,
            )
        )


class _Noted(Around):
    """A policy of which a sample of decisions is noted."""

    def __init__(self, inner: Policy, decisions: Decisions, model: str, endpoint: str, leg: str) -> None:
        super().__init__(inner)
        self._decisions = decisions
        self._model = model
        self._endpoint = endpoint
        self._watched = Watched(inner, self, leg)
        self._has_passed = (
            False  # the last choice was not watched: its placement is not to be noted as one without
        )

    def write(self, leg: str, receipt: dict[str, Any]) -> None:
        """See `receipts.Teller`."""
        self._decisions.note(self._model, self._endpoint, leg, receipt)

    def choose(self, call: Call, workers: Sequence[Worker], now: float, rng: Random) -> Worker | None:
        """As `inner` does."""
        self._has_passed = not self._decisions.may_note(now)
        return (self.inner if self._has_passed else self._watched).choose(call, workers, now, rng)

    def placed(self, call: Call, worker: Worker, now: float) -> None:
        """As `inner` does; a decision that was watched is noted, and a placement that needed none."""
        is_noted = self._watched.has_decided or (not self._has_passed and self._decisions.may_note(now))
        self._has_passed = False
        (self._watched if is_noted else self.inner).placed(call, worker, now)
