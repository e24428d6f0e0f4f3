"""`--routing-key-override`: any policy, obeying routing keys as `manual` does (contract RT-5, RT-6).

Wraps a policy of the table: the inner policy places new keys and calls without one, the sticky map keeps keys where
they are. Not in the table itself: nobody asks for it by name.
"""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

from smg.api.call import Call
from smg.fleet.worker import Worker
from smg.policies.candidates import ById
from smg.policies.policy import Around, Policy, Wants
from smg.policies.shared_keys import OWN_KEYS, SharedKeys
from smg.policies.sticky_map import StickyMap

KEYED = frozenset({"manual", "consistent_hashing", "prefix_hash"})
"""Policies that read routing keys by themselves (RT-5)."""


class StickyKey(Around):
    """`inner`, with keys that stick; it answers to the name of `inner`."""

    def __init__(self, inner: Policy, idle_max_s: float, shared: SharedKeys = OWN_KEYS) -> None:
        super().__init__(inner)
        self.wants = inner.wants | Wants.KEY
        self._map = StickyMap(idle_max_s, shared)
        self._by_id = ById()

    @property
    def entries(self) -> int:
        """Keys remembered."""
        return len(self._map)

    def choose(self, call: Call, workers: Sequence[Worker], now: float, rng: Random) -> Worker | None:
        """The worker the key sticks to, else the choice of `inner`."""
        key = call.routing_key
        if key and len(self._map):
            worker = self._map.worker_of(key, self._by_id.of(workers), now)
            if worker is not None:
                return worker
        return self.inner.choose(call, workers, now, rng)

    def placed(self, call: Call, worker: Worker, now: float) -> None:
        """Remembers the key's worker. A call that named its worker (RT-4) leaves the key where it is."""
        if call.routing_key and not call.target:
            self._map.place(call.routing_key, worker, now)
        self.inner.placed(call, worker, now)

    def heard_key(self, position: int, worker: Worker, now: float) -> None:
        """Another node has put this key onto `worker`."""
        self._map.heard(position, worker, now)

    def removed(self, worker: Worker) -> None:
        """Its keys are homeless."""
        self._map.forget(worker)
        self.inner.removed(worker)


def inner_of(policy: Policy) -> Policy:
    """The policy of the table, without what is put around it (keys, a receipt)."""
    while (inner := getattr(policy, "inner", None)) is not None:
        policy = inner
    return policy


def obeys_key(policy: Policy) -> bool:
    """Whether a routing key decides, where a call has one."""
    return isinstance(policy, StickyKey) or policy.name in KEYED
