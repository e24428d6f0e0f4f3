"""Which policy decides for which model (contract RT-2, RT-8).

Owns the policy instances, one per model, so that models never influence each other. The label `policy` of the first
worker of a model chooses its policy, else `--policy`. Instances go when their model goes. Tells policies what became of
workers; never chooses a worker itself.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator

from smg.fleet.pool import Pool
from smg.fleet.registry import Change, Flushed, Registry, Removed, StatusChanged
from smg.fleet.worker import Kind, Status, Worker
from smg.policies import KEYED, POLICIES
from smg.policies.pair import Pair
from smg.policies.policy import Policy
from smg.policies.shared_keys import OWN_KEYS, SharedKeys
from smg.policies.sticky_key import StickyKey
from smg.settings import Routing

LABEL = "policy"
"""The worker label that chooses a policy."""

UNCLAIMED_MAX = 256
"""Policy instances for model names that only wildcard workers serve (MOD-3). Clients invent such names, so the least
recently used go; a real fleet has a handful."""

STICKY = frozenset({"manual", "consistent_hashing"})
"""Policies that obey routing keys themselves; `--routing-key-override` adds nothing to them."""

Make = Callable[[str, str], Policy]
"""Makes the policy of a name for a model: (policy name, model)."""

Keys = Callable[[str, Kind], SharedKeys]
"""The routing keys of a model and leg as all nodes know them."""


class PolicyTable:
    """The policy of every model. `make` may stand in for the shelf's constructors; `keys` are those of a mesh."""

    def __init__(
        self, routing: Routing, registry: Registry, make: Make | None = None, keys: Keys | None = None
    ) -> None:
        self._routing = routing
        self._registry = registry
        self._make = make or self._from_shelf
        self._keys = keys
        self._claimed: dict[str, Policy] = {}  # names that regular workers told
        self._unclaimed: OrderedDict[str, Policy] = OrderedDict()
        self._pairs: OrderedDict[str, Pair] = OrderedDict()
        registry.subscribe(self._changed)

    def policy_for(self, model: str) -> Policy:
        """The policy for the regular workers of a canonical model name."""
        policy = self._claimed.get(model)
        if policy is not None:
            return policy
        return self._new_policy(model)

    def pair_for(self, model: str) -> Pair:
        """The policies for both legs of a canonical model name (section 18)."""
        pair = self._pairs.get(model)
        if pair is None:
            routing = self._routing
            pair = self._pairs[model] = Pair(
                self._made(routing.prefill_policy or routing.policy, Kind.PREFILL, model),
                self._made(routing.decode_policy or routing.policy, Kind.DECODE, model),
            )
        self._pairs.move_to_end(model)
        if len(self._pairs) > UNCLAIMED_MAX:
            self._pairs.popitem(last=False)
        return pair

    def policies(self) -> Iterator[tuple[str, Policy]]:
        """Every (model, policy) there is, legs included: for metrics and the mesh."""
        yield from self._claimed.items()
        yield from self._unclaimed.items()
        for model, pair in self._pairs.items():
            yield model, pair.prefill
            yield model, pair.decode

    def known(self, model: str, kind: Kind) -> Policy | None:
        """The policy of a model and leg if there is one already; makes none."""
        if kind is Kind.REGULAR:
            return self._claimed.get(model) or self._unclaimed.get(model)
        pair = self._pairs.get(model)
        return None if pair is None else pair.leg(kind)

    def _new_policy(self, model: str) -> Policy:
        pool = self._registry.pool(model)
        if pool is not None and pool.model == model:
            policy = self._claimed[model] = self._made(self._routing.policy, Kind.REGULAR, model)
            return policy
        known = self._unclaimed.get(model)
        if known is None:
            known = self._unclaimed[model] = self._made(self._routing.policy, Kind.REGULAR, model)
        self._unclaimed.move_to_end(model)
        if len(self._unclaimed) > UNCLAIMED_MAX:
            self._unclaimed.popitem(last=False)
        return known

    def _made(self, default: str, kind: Kind, model: str) -> Policy:
        name = self._label(kind, model) or default
        keys = OWN_KEYS if self._keys is None else self._keys(model, kind)
        if self._keys is not None and name in KEYED:
            return KEYED[name](self._routing, keys)
        policy = self._make(name, model)
        if self._routing.routing_key_override and name not in STICKY:
            return StickyKey(policy, self._routing.max_idle_secs, keys)
        return policy

    def _label(self, kind: Kind, model: str) -> str | None:
        """The policy that the first worker's label names; None when it names none that exists."""
        pool = self._registry.pool_of(model, kind)
        if pool is None:
            return None
        name = pool.workers[0].spec.labels.get(LABEL)
        return name if name in POLICIES else None

    def _from_shelf(self, name: str, model: str) -> Policy:
        return POLICIES[name](self._routing)

    def _changed(self, change: Change) -> None:
        """Passes on what became of a worker; drops policies whose model or label went."""
        worker = change.worker
        if isinstance(change, StatusChanged):
            if worker.status is Status.FAILED:
                self._flush(worker)
            return
        if isinstance(change, Flushed):
            self._flush(worker)
            return
        if isinstance(change, Removed):
            for _, policy in self.policies():
                policy.removed(worker)
        self._drop_outdated()

    def _flush(self, worker: Worker) -> None:
        for _, policy in self.policies():
            policy.flushed(worker)

    def _drop_outdated(self) -> None:
        """Forgets policies of names that changed hands, and those whose label says another name now."""
        registry, routing = self._registry, self._routing
        for model in list(self._claimed):
            if not self._is_current(registry.pool(model), model, self._claimed[model]):
                del self._claimed[model]
        for model in list(self._unclaimed):
            if not self._is_current(registry.pool(model), "", self._unclaimed[model]):
                del self._unclaimed[model]
        for model, pair in list(self._pairs.items()):
            if all(registry.pool_of(model, kind) is None for kind in (Kind.PREFILL, Kind.DECODE)):
                del self._pairs[model]
                continue
            for kind, default in (
                (Kind.PREFILL, routing.prefill_policy or routing.policy),
                (Kind.DECODE, routing.decode_policy or routing.policy),
            ):
                if pair.leg(kind).name != (self._label(kind, model) or default):
                    self._pairs.pop(model, None)

    def _is_current(self, pool: Pool | None, claimed_as: str, policy: Policy) -> bool:
        if pool is None or pool.model != claimed_as:
            return False
        return policy.name == (self._label(Kind.REGULAR, pool.model) or self._routing.policy)
