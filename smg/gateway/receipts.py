"""A receipt on demand: who got a request, and why, in a header of its answer (`x-smg-explain: 1`).

Owns the header and what is in it: the worker's id, the policy, which rule decided, how much of the prompt was believed to
be cached there and what the choice cost, in compact JSON. It stands between dispatch and the policy for requests that ask
for it and for no others; those that do not ask pay for one look into their headers. The same words are told of a sample of
requests to whoever watches (`gateway/decisions.py`). A receipt never holds an address of a worker, a key or a text, and it
never changes a choice.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from random import Random
from typing import Any, Protocol

import msgspec

from smg.api.call import Call
from smg.fleet.worker import Worker
from smg.gateway.tallies import Lane, PairLane
from smg.net.exchange import Exchange
from smg.policies.policy import Around, Policy, Terms
from smg.policies.sticky_key import inner_of, obeys_key

HEADER = b"x-smg-explain"
"""Asked for in the request, answered in the answer."""
VALUE_BYTES_MAX = 2_048
"""Proxies refuse longer lines, and an id and a dozen numbers are a tenth of it."""


def receipted(lane: Lane, exchange: Exchange) -> Lane:
    """The lane of a request that asks for a receipt: what its policies decide is written to the answer's head."""
    writer = _Writer(exchange)
    told = copy.copy(lane)
    told.policy = Watched(lane.policy, writer, "")
    told.tells_placed = told.tells_finished = True
    if isinstance(told, PairLane):
        prefill = copy.copy(told.prefill)
        prefill.policy = Watched(told.prefill.policy, writer, "prefill")
        prefill.tells_placed = prefill.tells_finished = True
        told.prefill = prefill
    return told


def blocks_of(policy: Policy, call: Call, block_chars: int) -> int:
    """Blocks of a call's prompt as the policy counts them; policies without an index count begun blocks of text."""
    count = getattr(inner_of(policy), "blocks_of", None)
    if count is not None:
        return int(count(call))
    return -(-len(call.text()) // block_chars)


class Teller(Protocol):
    """Who is told what a policy decided."""

    def write(self, leg: str, receipt: dict[str, Any]) -> None:
        """The receipt of one placement; `leg` is `prefill` for the first leg of a pair, else empty."""
        ...


class _Writer:
    """Puts the receipt of the last decision into the head of the answer that is to come."""

    def __init__(self, exchange: Exchange) -> None:
        self._exchange = exchange
        self._others = exchange.extra_lines
        self._told: dict[str, Any] = {}

    def write(self, leg: str, receipt: dict[str, Any]) -> None:
        if leg:
            self._told[leg] = receipt
        else:
            self._told = {
                **receipt,
                **{name: self._told[name] for name in ("prefill",) if name in self._told},
            }
        value = msgspec.json.encode(self._told)
        if value.isascii() and len(value) <= VALUE_BYTES_MAX:
            self._exchange.extra_lines = b"%b%b: %b\r\n" % (self._others, HEADER, value)


class Watched(Around):
    """A policy, and what it decided for one call, told to `teller` when the call is placed.

    Between `choose` and `placed` of a call no other call comes (dispatch waits for nothing there), so that one of these may
    serve many calls.
    """

    def __init__(self, inner: Policy, teller: Teller, leg: str) -> None:
        super().__init__(inner)
        self._teller = teller
        self._leg = leg
        self._decided: tuple[Worker, Terms | None, str] | None = None
        self._owner: str | None = None

    @property
    def has_decided(self) -> bool:
        """Whether a choice waits for its `placed`."""
        return self._decided is not None

    def choose(self, call: Call, workers: Sequence[Worker], now: float, rng: Random) -> Worker | None:
        """The inner policy's choice; what it weighed is remembered."""
        state = rng.getstate()
        by = decided_by(self.inner, call)
        follows = getattr(inner_of(self.inner), "follows", None)
        decision = follows(call) if follows is not None else None
        worker = self.inner.choose(call, workers, now, rng)
        self._owner = None
        if decision is not None and worker is not None:
            if worker.id == decision.worker_id:
                self._owner = decision.owner
            else:
                by = "policy"  # the owner's worker is no candidate here
        if worker is not None:
            spare = Random()
            spare.setstate(state)
            rows = self.inner.terms(call, workers, now, spare)
            self._decided = worker, next((row for row in rows if row.worker_id == worker.id), None), by
        return worker

    def placed(self, call: Call, worker: Worker, now: float) -> None:
        """The receipt is written; then the inner policy is told."""
        decided, self._decided = self._decided, None
        if decided is not None and decided[0] is worker:
            self._write(call, worker, decided[1], decided[2])
        else:
            rows = self.inner.terms(call, (worker,), now, Random(0))
            self._write(
                call, worker, rows[0] if rows else None, "target" if call.target else "only_candidate"
            )
        self.inner.placed(call, worker, now)

    def _write(self, call: Call, worker: Worker, terms: Terms | None, by: str) -> None:
        count = getattr(inner_of(self.inner), "blocks_of", None)
        receipt: dict[str, Any] = {"chosen": worker.id, "policy": self.name, "decided_by": by}
        if by == "owner" and self._owner:
            receipt["owner"] = self._owner
        if count is not None:
            receipt["matched_blocks"] = terms.matched_blocks if terms is not None else 0
            receipt["blocks"] = int(count(call))
        if terms is not None and terms.cost is not None:
            receipt["cost"] = _rounded(terms.cost)
            parts = {"wait": terms.wait, "prefill": terms.prefill, "penalty": terms.penalty}
            receipt["terms"] = {name: _rounded(part) for name, part in parts.items() if part is not None}
        self._teller.write(self._leg, receipt)


def decided_by(policy: Policy, call: Call) -> str:
    """Which rule decides when the policy is asked about this call: `owner`, `routing_key` or `policy` (EXP-3)."""
    follows = getattr(inner_of(policy), "follows", None)
    if follows is not None and follows(call) is not None:
        return "owner"
    return "routing_key" if call.routing_key is not None and obeys_key(policy) else "policy"


def _rounded(seconds: float) -> float | None:
    return round(seconds, 6) if math.isfinite(seconds) else None
