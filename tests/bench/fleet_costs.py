"""What the machines of a request cost, in microseconds: `python -m tests.bench.fleet_costs`.

Each line has a budget; a line over it is marked. Best of several runs, so that a busy machine does not look like slow
code. Not part of the test run: a time is no assertion on a shared machine.
"""

from __future__ import annotations

import timeit
from collections.abc import Callable
from random import Random

from smg.fleet import load
from smg.fleet.retry import RetryBudget
from smg.policies import POLICIES
from smg.policies.routing_table import PolicyTable
from smg.policies.sticky_key import StickyKey
from smg.settings import Routing
from smg.tenancy.admission import Admission
from smg.tenancy.bucket import TokenBucket
from tests.smg.fleet.builders import call, fleet, reported

RUNS = 7

POLICY_BUDGETS_US = {
    "round_robin": 0.5,
    "random": 0.5,
    "passthrough": 0.5,
    "power_of_two": 2.0,
    "least_load": 3.0,
    "consistent_hashing": 3.0,
    "prefix_hash": 4.0,
    "manual": 4.0,
    "bucket": 6.0,
}
"""choose and placed together, 4 workers. The first comes from the plan of the hot path, the others from it too: a
policy may cost a tenth of a request, not more."""


def microseconds(work: Callable[[], object], number: int) -> float:
    """Best time of one call, without the empty call around it."""
    empty = min(timeit.repeat(lambda: None, number=number, repeat=3)) / number
    return (min(timeit.repeat(work, number=number, repeat=RUNS)) / number - empty) * 1e6


def line(name: str, work: Callable[[], object], budget_us: float | None = None, number: int = 50_000) -> None:
    """Measures and prints."""
    us = microseconds(work, number)
    verdict = (
        "" if budget_us is None else f"  budget {budget_us:5.2f}" + ("" if us <= budget_us else "  OVER")
    )
    print(f"{name:44} {us:8.3f} us{verdict}")


def machines() -> None:
    """Registry, pool, breaker, load, admission, budget."""
    registry, workers = fleet(4)
    pool, worker = registry.pool("m"), workers[0]
    assert pool is not None
    breaker = worker.breaker
    line("registry.pool", lambda: registry.pool("m"), 0.1)
    line("registry.resolve", lambda: registry.resolve("m"), 0.1)
    line("pool.candidates, nothing changed", lambda: pool.candidates(1.0), 0.1)
    line("breaker.started + succeeded, closed", lambda: breaker.succeeded(1.0, breaker.started(1.0)), 0.4)

    def carried() -> None:
        load.begin(worker, 100)
        load.end(worker, 100)

    line("load.begin + end, with characters", carried, 0.4)
    admission = Admission(4096, 100, 60.0)

    def admitted() -> None:
        admission.enter(1.0)
        admission.leave()

    line("admission.enter + leave", admitted, 0.5)
    rated = Admission(4096, 100, 60.0, TokenBucket(1e9, 1e9))

    def admitted_by_rate() -> None:
        rated.enter(1.0)
        rated.leave()

    line("admission.enter + leave, with a rate", admitted_by_rate, 2.0)
    budget = RetryBudget(0.2, 10.0)
    line("retry budget.requested", lambda: budget.requested(1.0), 0.3)
    table = PolicyTable(Routing(), registry)
    line("policy table.policy_for", lambda: table.policy_for("m"), 0.15)


def policies(count: int, budgets_us: dict[str, float]) -> None:
    """choose and placed of every policy over `count` workers, without and with reports."""
    rng = Random(1)
    for name, make in POLICIES.items():
        for has_reports in (False, True):
            registry, workers = fleet(count)
            if has_reports:
                if name not in ("least_load", "power_of_two"):
                    continue
                for worker in workers:
                    reported(worker, waiting=1, kv_usage=rng.random())
            pool = registry.pool("m")
            assert pool is not None
            policy = make(Routing())
            question = call("a prompt of some length " * 40, key="session-17")
            question.text()

            def routed(policy=policy, pool=pool, question=question) -> None:  # type: ignore[no-untyped-def]  # the defaults bind the loop's variables
                worker = policy.choose(question, pool.candidates(1.0), 1.0, rng)
                policy.placed(question, worker, 1.0)

            shown = f"{name}, {count} workers" + (", reports" if has_reports else "")
            line(shown, routed, budgets_us.get(name), 20_000 if count < 100 else 500)


def main() -> None:
    """Prints all lines."""
    machines()
    policies(4, POLICY_BUDGETS_US)
    registry, _ = fleet(4)
    pool = registry.pool("m")
    assert pool is not None
    sticky = StickyKey(POLICIES["round_robin"](Routing()), 3600.0)
    question = call(key="session-17")
    rng = Random(1)

    def stuck() -> None:
        worker = sticky.choose(question, pool.candidates(1.0), 1.0, rng)
        if worker is not None:
            sticky.placed(question, worker, 1.0)

    line("round_robin under override, 4 workers", stuck, 4.0)
    policies(1000, {})
    registry, _ = fleet(1000)
    pool = registry.pool("m")
    assert pool is not None

    def judged() -> None:
        pool.invalidate()
        pool.candidates(1.0)

    line("pool judged anew, 1000 workers", judged, None, 200)


if __name__ == "__main__":
    main()
