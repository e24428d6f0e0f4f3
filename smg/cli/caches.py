"""What one node keeps about the caches of its workers: index, hashes, fits, engines' events, a recorded trace.

Owns how these rooms are built out of the settings and which of them run. They belong together because `cache_aware`
shares them over all models of the node, and because all of them speak in the same block hashes.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable
from typing import Any
from weakref import WeakSet

from smg.fleet.block_hashes import BlockHasher, block_settings
from smg.fleet.prefix_index import IndexSettings, PrefixIndex
from smg.fleet.registry import Registry
from smg.fleet.service_model import PrefillModels
from smg.fleet.worker import Worker
from smg.policies import POLICIES
from smg.policies.cache_aware import CacheAware, cache_aware_settings
from smg.policies.neighbours import Neighbours
from smg.policies.policy import Policy
from smg.services.index_upkeep import IndexUpkeep
from smg.services.kv_events import KvEvents
from smg.services.trace_recorder import Recorded, TraceRecorder
from smg.settings import Routing
from smg.telemetry import log as logs
from smg.telemetry.metrics import OTHER

Sample = tuple[str, tuple[str, ...], float]


class Caches:
    """The rooms of one node that know about caches.

    Raises `SettingsError` when `--kv-events` lacks its library or `--record-trace` its file.
    """

    def __init__(self, routing: Routing, registry: Registry, cluster_seed: int) -> None:
        self._routing = routing
        self._registry = registry
        self._dials = cache_aware_settings(routing)
        self.index = PrefixIndex(IndexSettings(bytes_max=routing.max_tree_size))
        self.hasher = BlockHasher(block_settings(routing.block_size, cluster_seed))
        self.fits = PrefillModels()
        self._policies: WeakSet[CacheAware] = WeakSet()
        self._text_prompts = 0
        self._upkeep = IndexUpkeep(
            registry, self.index, interval_s=routing.eviction_interval_secs, ttl_s=routing.cache_ttl_secs
        )
        self._recorder: TraceRecorder | None = None
        if routing.record_trace is not None:
            self._recorder = TraceRecorder(routing.record_trace, self.hasher, log=logs.logger("smg.trace"))
        self._events: KvEvents | None = None
        if routing.kv_events is not None:
            self._events = KvEvents(
                registry,
                self.index,
                self.hasher,
                routing.kv_events,
                log=logs.logger("smg.kv_events"),
                measured=self._measured,
                speaks_ids=self._speaks_ids,
            )

    def make_policy(self, name: str, model: str, neighbours: Neighbours | None = None) -> Policy:
        """A policy off the shelf; those of `cache_aware` share index, hashes and fits over all models."""
        policy: Policy
        if name == CacheAware.name:
            policy = made = CacheAware(model, self._dials, self.index, self.hasher, self.fits, neighbours)
            self._policies.add(made)
        else:
            policy = POLICIES[name](self._routing)
        return policy if self._recorder is None else Recorded(policy, self._recorder)

    def services(self) -> Iterable[Callable[..., Awaitable[Any]]]:
        """What runs beside the servers."""
        yield self._upkeep.run
        if self._recorder is not None:
            yield self._recorder.run
        if self._events is not None:
            yield self._events.run

    def samples(self) -> Iterable[Sample]:
        """What they have counted, read when somebody scrapes (MET-9)."""
        yield "smg_cache_index_entries", (), float(self.index.entries)
        yield "smg_cache_index_bytes", (), float(self.index.bytes_used)
        totals: dict[tuple[str, str], int] = {}
        served = self._registry.served_models()
        for policy in self._policies:
            model = policy.model if policy.model in served else OTHER
            for name, count in (
                ("smg_cache_prompt_chars_total", policy.prompt_chars),
                ("smg_cache_matched_chars_total", policy.matched_chars),
                ("smg_cache_predicted_tokens_total", policy.predicted_tokens),
                ("smg_cache_actual_tokens_total", policy.cached_tokens),
            ):
                totals[name, model] = totals.get((name, model), 0) + count
        for (name, model), count in totals.items():
            yield name, (model,), float(count)
        if self._events is not None:
            for what, count in self._events.counts.items():
                yield "smg_kv_events_total", (what,), float(count)
        if self._recorder is not None:
            yield "smg_trace_lines_total", ("written",), float(self._recorder.written)
            yield "smg_trace_lines_total", ("dropped",), float(self._recorder.dropped)

    def _measured(self, worker: Worker, tokens: int) -> None:
        for policy in self._policies:
            policy.sized(worker, tokens)

    def _speaks_ids(self) -> bool:
        """Whether no prompt came as text since this was last asked."""
        before, self._text_prompts = self._text_prompts, sum(policy.text_prompts for policy in self._policies)
        return self._text_prompts == before
