"""`least_load`: the candidate with the lowest expected wait.

The wait is the row of contract section 12, in seconds (`fleet/load.py` has the formula): queued tokens and what was
sent since the poll over throughput, plus the pressure of the KV cache, times the worker's cost. A worker without a
report that counts is weighed by its requests in flight, at the throughput of those that have one. Equal waits go to the
higher priority, then to chance (WRK-16).
"""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

from smg.api.call import Call
from smg.fleet.load import mean_throughput_tps, reported_wait_s, unreported_wait_s, wait_rules
from smg.fleet.worker import Worker
from smg.policies.policy import Stateless, Terms
from smg.settings import Routing


class LeastLoad(Stateless):
    """The least expected wait."""

    name = "least_load"

    def __init__(self, settings: Routing) -> None:
        self._rules = wait_rules(settings)

    def choose(self, call: Call, workers: Sequence[Worker], now: float, rng: Random) -> Worker | None:
        """The worker that is expected to begin soonest."""
        best: Worker | None = None
        best_s = 0.0
        ties = 0
        fleet_tps = 0.0
        rules = self._rules
        for worker in workers:
            if worker.report_until_s > now and (told := worker.report) is not None:
                wait_s = reported_wait_s(worker, told, rules)
            else:
                fleet_tps = fleet_tps or mean_throughput_tps(workers, now, rules)
                wait_s = unreported_wait_s(worker, rules, fleet_tps)
            if best is None or wait_s < best_s:
                best, best_s, ties = worker, wait_s, 1
            elif wait_s == best_s:
                rank = worker.spec.priority - best.spec.priority
                if rank > 0:
                    best, ties = worker, 1
                elif rank == 0:
                    ties += 1
                    if rng.random() * ties < 1.0:
                        best = worker
        return best

    def terms(self, call: Call, workers: Sequence[Worker], now: float, rng: Random) -> list[Terms]:
        """The expected waits in seconds."""
        fleet_tps = mean_throughput_tps(workers, now, self._rules)
        rows = []
        for worker in workers:
            told = worker.report if worker.report_until_s > now else None
            if told is None:
                wait_s = unreported_wait_s(worker, self._rules, fleet_tps)
                reason = f"{worker.in_flight} in flight, no load report"
            else:
                wait_s = reported_wait_s(worker, told, self._rules)
                reason = f"{told.waiting} waiting, {worker.sent_since_report} sent since the poll"
            rows.append(Terms(worker.id, cost=wait_s, wait=wait_s, reason=reason))
        return rows
