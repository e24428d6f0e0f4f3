"""The shelf of routing policies: the literal table, nothing else. The contract is in `policy.py`."""

from __future__ import annotations

from collections.abc import Callable

from smg.policies.bucket import Bucket
from smg.policies.cache_aware import CacheAware
from smg.policies.consistent_hash import ConsistentHash
from smg.policies.least_load import LeastLoad
from smg.policies.manual import Manual
from smg.policies.passthrough import Passthrough
from smg.policies.policy import Policy
from smg.policies.power_of_two import PowerOfTwo
from smg.policies.prefix_hash import PrefixHash
from smg.policies.random_choice import RandomChoice
from smg.policies.round_robin import RoundRobin
from smg.policies.shared_keys import SharedKeys
from smg.settings import Routing

POLICIES: dict[str, Callable[[Routing], Policy]] = {
    "bucket": Bucket,
    "cache_aware": CacheAware.alone,
    "consistent_hashing": ConsistentHash,
    "least_load": LeastLoad,
    "manual": Manual,
    "passthrough": Passthrough,
    "power_of_two": PowerOfTwo,
    "prefix_hash": PrefixHash,
    "random": RandomChoice,
    "round_robin": RoundRobin,
}

KEYED: dict[str, Callable[[Routing, SharedKeys], Policy]] = {
    "consistent_hashing": ConsistentHash,
    "manual": Manual,
}
"""Those that remember routing keys, made so that the keys are shared with other nodes (RT-6)."""
