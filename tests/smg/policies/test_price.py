"""The loop of a decision and the arithmetic that explains it are two texts of one rule: they must never part."""

from __future__ import annotations

import math
from random import Random

from hypothesis import given, settings
from hypothesis import strategies as st

from smg.api.call import Call
from smg.api.endpoints import CHAT
from smg.fleet import load
from smg.fleet.worker import LoadReport, Worker
from smg.policies.cache_aware import CacheAware
from smg.policies.neighbours import Alone, News
from smg.policies.policy import Outcome
from smg.policies.price import TIE_S
from tests.smg.fleet.builders import workers_of


class Peers:
    """Two other gateways, some seconds away."""

    def __init__(self, delay_s: float) -> None:
        self._delay_s = delay_s

    def count(self) -> int:
        return 3

    def delay_s(self) -> float:
        return self._delay_s

    def tell(self, news: News, now: float) -> None:
        pass


def call(text: str, is_stream: bool) -> Call:
    return Call(CHAT, "m", b"", {"messages": [{"role": "user", "content": text}]}, is_stream=is_stream)


def text_of(rng: Random) -> str:
    family = rng.randrange(4)
    return "".join(f"{family}-{number:06d} " * 64 for number in range(rng.randrange(12))) + str(rng.random())


def reported(worker: Worker, rng: Random, now: float) -> None:
    told = LoadReport(
        now,
        running=rng.randrange(20),
        waiting=rng.randrange(4),
        waiting_tokens=rng.choice([None, rng.randrange(20_000)]),
        kv_usage=rng.choice([None, 0.2, 0.97, 1.0]),
        kv_capacity_tokens=rng.choice([None, 0, 1_000, 500_000]),
    )
    load.report(worker, told, load.ReportRules(is_protected=False))


@given(st.integers(0, 2**32), st.sampled_from([None, 0.1, 5.0, math.inf]))
@settings(max_examples=80, deadline=None)
def test_the_choice_is_the_cheapest_of_what_is_explained(seed, delay_s):
    rng = Random(seed)
    workers = tuple(
        workers_of(rng.randrange(2, 6), cost=rng.choice([1.0, 1.0, 2.0]), labels={"class": rng.choice("ab")})
    )
    policy = CacheAware("m", neighbours=Alone() if delay_s is None else Peers(delay_s))
    running: list[tuple[Call, Worker]] = []
    now = 100.0
    for _ in range(30):
        now += rng.choice([0.0, 1e-3, 0.1, 2.0])
        for worker in workers:
            if rng.random() < 0.2:
                reported(worker, rng, now)
            if rng.random() < 0.05:
                worker.peers_in_flight = rng.randrange(5)
        asked = call(text_of(rng), rng.random() < 0.5)
        costs = {row.worker_id: row.cost for row in policy.terms(asked, workers, now, Random(1))}
        chosen = policy.choose(asked, workers, now, Random(1))
        assert chosen is not None
        assert costs[chosen.id] <= min(costs.values()) + 2 * TIE_S
        load.begin(chosen)
        policy.placed(asked, chosen, now)
        running.append((asked, chosen))
        while running and rng.random() < 0.4:
            ended, worker = running.pop(rng.randrange(len(running)))
            if ended.is_stream:
                policy.first_byte(ended, worker, 0.1, now)
            load.end(worker)
            policy.finished(ended, worker, Outcome(200, True, 0.1, 0.2, 500, rng.randrange(500), 9), now)


def test_equal_costs_are_dealt_by_chance_and_not_to_the_first():
    workers = workers_of(4)
    policy = CacheAware("m")
    rng = Random(5)
    chosen = {policy.choose(call(f"{number}", False), workers, 1.0, rng).order for number in range(60)}
    assert chosen == {0, 1, 2, 3}
