"""A prefill and a decode worker for one call, from two policies (contract section 18).

Owns the pairing, not the choices: each leg has a policy of its own, so that keys, counters and prefixes of the legs
never mix.
"""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

from smg.api.call import Call
from smg.fleet.worker import Kind, Worker
from smg.policies.policy import Policy, Wants


class Pair:
    """The policies of both legs of one model."""

    def __init__(self, prefill: Policy, decode: Policy) -> None:
        self.prefill = prefill
        self.decode = decode

    @property
    def wants(self) -> Wants:
        """What either leg wants."""
        return self.prefill.wants | self.decode.wants

    def leg(self, kind: Kind) -> Policy:
        """The policy of one leg."""
        return self.decode if kind is Kind.DECODE else self.prefill

    def choose(
        self, call: Call, prefills: Sequence[Worker], decodes: Sequence[Worker], now: float, rng: Random
    ) -> tuple[Worker, Worker] | None:
        """A prefill and a decode worker, or None when a leg has nobody (PD-2); changes nothing but `rng`."""
        if not prefills or not decodes:
            return None
        prefill = self.prefill.choose(call, prefills, now, rng)
        decode = self.decode.choose(call, decodes, now, rng)
        if prefill is None or decode is None:
            return None
        return prefill, decode

    def placed(self, call: Call, prefill: Worker, decode: Worker, now: float) -> None:
        """The call goes to these two."""
        self.prefill.placed(call, prefill, now)
        self.decode.placed(call, decode, now)

    def removed(self, worker: Worker) -> None:
        """`worker` left the fleet."""
        self.leg(worker.kind).removed(worker)

    def flushed(self, worker: Worker) -> None:
        """`worker` failed or flushed."""
        self.leg(worker.kind).flushed(worker)
