"""What every worker carries: the one choke point where load is counted (contract RT-3).

Owns the arithmetic of in-flight counts, load reports and their age, and the expected wait that comes out of them.
Nothing else in the house writes these fields of a `Worker`. It never decides who gets a request.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from smg.fleet.worker import LoadReport, Worker
from smg.settings import LoadPolls, Routing

REPORT_INTERVALS_MAX = 3
"""A report older than this many poll intervals does not count (contract section 12, `least_load`): one lost poll is
weather, three are silence."""

KV_USAGE_MAX = 0.999
"""KV usage is clamped here, so that the pressure k / (1 - k) stays finite."""

CHARS_PER_TOKEN = 4
"""Characters of prompt per token where only characters are known; the estimate of ADM-4 as well."""


class ReportRules(msgspec.Struct, frozen=True):
    """How reports are judged: poll interval, and the limits of `--worker-overload-*`.

    `overload_waiting` requests or more waiting, or `overload_kv_usage` or more of the KV cache in use, is overload.
    `is_protected` is False with `--disable-worker-overload-protection`: then nobody is ever overloaded.
    """

    interval_s: float = 0.25
    overload_waiting: int = 8
    overload_kv_usage: float = 0.8
    is_protected: bool = True


class WaitRules(msgspec.Struct, frozen=True):
    """The numbers of the expected wait (`--least-load-*`)."""

    kv_pressure_weight: float = 0.15
    default_throughput_tps: float = 2000.0
    mean_prefill_tokens: float = 1024.0


def report_rules(routing: Routing, polls: LoadPolls) -> ReportRules:
    """The rules that the command line gives."""
    return ReportRules(
        interval_s=polls.interval_secs(routing.policy),
        overload_waiting=routing.worker_overload_waiting_requests,
        overload_kv_usage=routing.worker_overload_token_usage,
        is_protected=routing.protects_from_overload(),
    )


def wait_rules(routing: Routing) -> WaitRules:
    """The rules that the command line gives."""
    return WaitRules(
        kv_pressure_weight=routing.least_load_kv_pressure_weight,
        default_throughput_tps=float(routing.least_load_default_throughput),
        mean_prefill_tokens=float(routing.least_load_mean_prefill_tokens),
    )


def begin(worker: Worker, chars: int = 0) -> None:
    """A request goes to `worker`, with so many characters of prompt (0 where nobody asked for text)."""
    worker.in_flight += 1
    worker.sent_since_report += 1
    if chars:
        worker.chars_in_flight += chars
        worker.chars_since_report += chars


def end(worker: Worker, chars: int = 0) -> None:
    """The request is over, however it ended. `chars` must be what `begin` was given."""
    worker.in_flight -= 1
    if chars:
        worker.chars_in_flight -= chars
    assert worker.in_flight >= 0, "a request ended twice"


def report(worker: Worker, told: LoadReport, rules: ReportRules) -> bool:
    """`worker` told its load. Returns whether it is overloaded now; `Registry.reported` passes that on to the pools."""
    worker.report = told
    worker.report_until_s = told.at_s + REPORT_INTERVALS_MAX * rules.interval_s
    worker.sent_since_report = 0
    worker.chars_since_report = 0
    worker.peers_at_report = worker.peers_in_flight
    if not rules.is_protected:
        return False
    if told.waiting >= rules.overload_waiting:
        return True
    return told.kv_usage is not None and told.kv_usage >= rules.overload_kv_usage


def note_peers(worker: Worker, in_flight: int) -> None:
    """Other nodes of the mesh have so many requests in flight on `worker`, by their last word."""
    assert in_flight >= 0
    worker.peers_in_flight = in_flight
    if in_flight < worker.peers_at_report:
        worker.peers_at_report = in_flight  # those that ended are not made up for by new ones


def everybodys(worker: Worker) -> int:
    """Requests in flight on `worker`, ours and those of the mesh."""
    return worker.in_flight + worker.peers_in_flight


def fresh_report(worker: Worker, now: float) -> LoadReport | None:
    """The last report while it counts, else None."""
    return worker.report if worker.report_until_s > now else None


def throughput_tps(told: LoadReport, rules: WaitRules) -> float:
    """Tokens per second of the worker that told so, or the default."""
    tps = told.throughput_tps
    return tps if tps is not None and tps > 0.0 else rules.default_throughput_tps


def reported_wait_s(worker: Worker, told: LoadReport, rules: WaitRules) -> float:
    """Expected wait in seconds after the report `told`, times the worker's cost (WRK-16).

    (queued tokens + sent since the poll) / throughput + w k / (1 - k), the row `least_load` of contract section 12.
    An engine that tells no KV usage tells nothing of what it is computing, so there the requests in flight are a lower
    bound of its work.
    """
    waiting = told.waiting_tokens
    tokens = told.waiting * rules.mean_prefill_tokens if waiting is None else float(waiting)
    if worker.chars_since_report:
        tokens += worker.chars_since_report / CHARS_PER_TOKEN
    else:
        tokens += worker.sent_since_report * rules.mean_prefill_tokens
    peers = worker.peers_in_flight
    if peers > worker.peers_at_report:  # sent by other nodes since the poll, as far as heard
        tokens += (peers - worker.peers_at_report) * rules.mean_prefill_tokens
    usage = told.kv_usage
    if usage is None:
        tokens = max(tokens, (worker.in_flight + peers) * rules.mean_prefill_tokens)
        return tokens / throughput_tps(told, rules) * worker.spec.cost
    if usage > KV_USAGE_MAX:
        usage = KV_USAGE_MAX
    wait_s = tokens / throughput_tps(told, rules) + rules.kv_pressure_weight * usage / (1.0 - usage)
    return wait_s * worker.spec.cost


def mean_throughput_tps(workers: Sequence[Worker], now: float, rules: WaitRules) -> float:
    """Mean throughput of the workers whose report counts; the default when none does."""
    total, count = 0.0, 0
    for worker in workers:
        told = fresh_report(worker, now)
        if told is not None:
            total += throughput_tps(told, rules)
            count += 1
    return total / count if count else rules.default_throughput_tps


def unreported_wait_s(worker: Worker, rules: WaitRules, fleet_tps: float) -> float:
    """Expected wait in seconds without a report: requests in flight at the mean prompt, times cost.

    `fleet_tps` is the mean throughput of the workers that did report, so that both kinds compare in seconds.
    """
    return everybodys(worker) * worker.spec.cost * rules.mean_prefill_tokens / fleet_tps


def expected_wait_s(worker: Worker, now: float, rules: WaitRules) -> float:
    """Seconds a new request is expected to wait on `worker`, by report while it counts, else by requests in flight."""
    told = fresh_report(worker, now)
    if told is None:
        return unreported_wait_s(worker, rules, rules.default_throughput_tps)
    return reported_wait_s(worker, told, rules)
