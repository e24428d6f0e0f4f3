"""Builds the priority scheduler of a node, when there is one: its rules out of flags and file, its shell, its reload.

Owns the wiring of ADM-6 for the composition root: who stands before dispatch, which door remains before it, what is counted.
Starts nothing. A file that is wrong ends the start, and never a running node.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import trio

from smg.api.call import Call
from smg.errors import SettingsError
from smg.fleet.pool import Pool
from smg.fleet.registry import Registry
from smg.fleet.service_model import PrefillModel, PrefillModels
from smg.gateway.gates import Tenants
from smg.gateway.turns import Turns, may_preempt
from smg.net.readiness import Readiness
from smg.services.fleet_slots import FleetSlots
from smg.services.reload import Change, Part
from smg.settings import Settings
from smg.telemetry import log as logs
from smg.telemetry.metrics import Metrics
from smg.tenancy.admission import Admission, admission_of
from smg.tenancy.priorities import PriorityFile, Rules, differences
from smg.tenancy.scheduler import Scheduler
from smg.yaml_config import load_yaml

FLAG = "--priority-scheduler-config"

BODY_READ_BYTES_MIN = 4_096
"""Below this the length of a body is estimate enough: its prompt takes a tenth of a second at most."""

Sample = tuple[str, tuple[str, ...], float]


class Scheduling:
    """Admission of one node: the door (`admission`), and behind it the scheduler with `--priority-scheduler-enabled`.

    Raises `SettingsError` when the scheduler's file cannot be used.
    """

    def __init__(
        self,
        settings: Settings,
        registry: Registry,
        fits: PrefillModels,
        tenants: Tenants,
        readiness: Readiness,
        metrics: Metrics,
    ) -> None:
        limits = settings.limits
        self._limits = limits
        self._registry = registry
        self._fits = fits
        self._tenants = tenants
        self._readiness = readiness
        self._metrics = metrics
        self._is_pair = settings.pd.pd_disaggregation
        self._scheduler: Scheduler | None = None
        self._turns: Turns | None = None
        self._model = ""  # of the last estimate, and its fit
        self._fit: PrefillModel | None = None
        self.admission: Admission = admission_of(
            limits, os.cpu_count() or 1, trio.current_time(), has_scheduler=limits.priority_scheduler_enabled
        )
        if limits.priority_scheduler_enabled:
            self._scheduler = Scheduler(self._read_rules(), may_preempt)
        metrics.add_source(self._samples)

    def turns(self) -> Turns | None:
        """The scheduler's shell, to be made once; None without a scheduler."""
        scheduler = self._scheduler
        if scheduler is None:
            return None
        limit = self._limits.max_concurrent_requests
        fleet = FleetSlots(
            self._registry,
            scheduler,
            limit=None if limit < 0 else limit,
            is_pair=self._is_pair,
            log=logs.logger("smg.scheduler"),
        )
        self._turns = Turns(scheduler, fleet, self._tenants, self._estimate, self._readiness, self._metrics)
        self._metrics.add_source(self._turns.samples)
        return self._turns

    def parts(self) -> list[Part]:
        """What of these rooms can be reloaded."""
        path = self._limits.priority_scheduler_config
        if self._scheduler is None or path is None:
            return []
        return [Part("priority scheduler", (path,), self._prepare)]

    def _estimate(self, call: Call, pool: Pool) -> float:
        """Seconds of prefill that a call is expected to take with nothing cached."""
        fit = self._fit
        if fit is None or pool.model != self._model:
            self._model, self._fit = pool.model, (fit := self._fits.get(pool.model))
        size = len(call.body)
        if size < BODY_READ_BYTES_MIN:
            return fit.base_s + (size >> 2) * fit.per_token_s  # what pairs of so few tokens cost is nothing
        return fit.seconds(call.prompt_tokens_estimate(), 0)

    def _read_rules(self) -> Rules:
        """Flags and file together; without a file what is built in holds. Reads the file. Raises `SettingsError`."""
        path = self._limits.priority_scheduler_config
        told = PriorityFile()
        if path is not None:
            told = load_yaml(path, PriorityFile, FLAG)
            if told == PriorityFile():  # such as one that is being written
                raise SettingsError(
                    FLAG, repr(path), "says nothing; give classes or tenant_policies", is_combination=True
                )
        return told.rules(self._limits.priority_scheduler_default_max_class)

    def _prepare(self) -> Change | None:
        """See `Part.prepare`: the file is read whole before anything changes; who waits goes on waiting."""
        scheduler, turns = self._scheduler, self._turns
        assert scheduler is not None and turns is not None, "without a scheduler there is no such part"
        rules = self._read_rules()
        lines = differences(scheduler.rules, rules)
        return Change(tuple(lines), lambda: turns.configure(rules)) if lines else None

    def load(self) -> tuple[int, int]:
        """(requests in flight, requests that wait for a slot or their turn)."""
        admission, scheduler = self.admission, self._scheduler
        if scheduler is None:
            return admission.in_flight, admission.waiting
        return sum(scheduler.in_flight), sum(scheduler.waiting)

    def _samples(self) -> Iterator[Sample]:
        """What the door counts, or with a scheduler the scheduler: then the door only refuses what is over the rate."""
        admission, scheduler = self.admission, self._scheduler
        admitted, rejected = admission.admitted_total, admission.rejected_total
        if scheduler is not None:
            counts = scheduler.counts
            admitted = sum(scheduler.admitted)
            rejected += sum(counts.refused_full) + sum(counts.refused_late)
        yield "smg_admission_inflight", (), float(self.load()[0])
        yield "smg_http_rate_limit_total", ("allowed",), float(admitted)
        yield "smg_http_rate_limit_total", ("rejected",), float(rejected)
