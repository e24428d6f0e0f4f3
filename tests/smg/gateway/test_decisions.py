"""Decisions are noted while somebody watches, as a sample, and never change what is decided."""

from __future__ import annotations

from random import Random
from typing import Any

import pytest

from smg.api.call import Call
from smg.api.endpoints import CHAT
from smg.fleet.worker import Worker
from smg.gateway.decisions import BURST_MAX, KEPT_MAX, NOTED_PER_S, Decisions
from smg.gateway.tallies import Lane, PairLane, Tallies
from smg.policies import POLICIES
from smg.policies.cache_aware import CacheAware
from smg.policies.pair import Pair
from smg.policies.policy import Policy
from smg.policies.power_of_two import PowerOfTwo
from smg.settings import Routing
from smg.telemetry.metrics import Metrics
from tests.smg.fleet.builders import call, workers_of

TEXT = "prompt " * 400


class Desk:
    """A lane that is watched, and a clock."""

    def __init__(self, policy: Policy | None = None, workers: int = 3) -> None:
        self.now = 10.0
        self.workers = workers_of(workers)
        self.decisions = Decisions(lambda: self.now)
        self.decisions.switch(True)
        self.plain = Tallies(Metrics()).lane(CHAT, "m", policy or CacheAware("m"), True)
        self.lane: Lane = self.decisions.watched(self.plain, CHAT.path)
        self.rng = Random(1)

    def send(self, asked: Call | None = None) -> Worker:
        asked = asked or call(TEXT)
        worker = self.lane.policy.choose(asked, self.workers, self.now, self.rng)
        assert worker is not None
        self.lane.policy.placed(asked, worker, self.now)
        return worker


def test_a_decision_says_who_by_what_and_how_much_was_cached() -> None:
    desk = Desk()
    first = desk.send()
    desk.now += 1.0
    second = desk.send()
    newest, oldest = desk.decisions.last()
    assert (newest.number, oldest.number) == (2, 1)
    assert (newest.model, newest.endpoint, newest.leg, newest.at_s) == ("m", CHAT.path, "", 11.0)
    assert newest.receipt["chosen"] == second.id == first.id
    assert newest.receipt["policy"] == "cache_aware" and newest.receipt["decided_by"] == "policy"
    assert oldest.receipt["matched_blocks"] == 0
    assert newest.receipt["matched_blocks"] == newest.receipt["blocks"] > 0
    assert set(newest.receipt["terms"]) == {"wait", "prefill", "penalty"}


@pytest.mark.parametrize("name", sorted(POLICIES))
def test_watching_changes_no_choice(name: str) -> None:
    def run(is_watched: bool) -> list[str]:
        desk = Desk(POLICIES[name](Routing()), workers=4)
        if not is_watched:
            desk.lane = desk.plain
        texts = [f"{number % 5} {TEXT}" for number in range(40)]
        return [desk.send(call(text, key=str(number % 3))).url for number, text in enumerate(texts)]

    assert run(True) == run(False)


def test_a_policy_that_remembers_nothing_is_told_of_placements_to_note_them() -> None:
    desk = Desk(PowerOfTwo(Routing()))
    assert not desk.plain.tells_placed and desk.lane.tells_placed
    assert not desk.lane.tells_finished
    desk.send()
    (noted,) = desk.decisions.last()
    assert noted.receipt == {
        "chosen": noted.receipt["chosen"],
        "policy": "power_of_two",
        "decided_by": "policy",
    }


def test_a_placement_without_a_choice_is_noted_as_what_it_is() -> None:
    desk = Desk()
    desk.lane.policy.placed(call(TEXT), desk.workers[0], desk.now)
    desk.lane.policy.placed(call(TEXT, target="0"), desk.workers[0], desk.now)
    assert [noted.receipt["decided_by"] for noted in desk.decisions.last()] == ["target", "only_candidate"]


def test_a_burst_is_noted_and_then_a_sample() -> None:
    desk = Desk()
    for _ in range(1000):
        desk.send()
    assert desk.decisions.last()[0].number == BURST_MAX
    for _ in range(1000):
        desk.now += 0.01
        desk.send()
    assert desk.decisions.last()[0].number == pytest.approx(BURST_MAX + 10 * NOTED_PER_S, abs=1)
    assert len(desk.decisions.last()) == KEPT_MAX


def test_a_choice_that_was_not_watched_is_not_noted_by_its_placement() -> None:
    desk = Desk()
    for _ in range(int(BURST_MAX)):
        desk.send()
    asked = call(TEXT)
    worker = desk.lane.policy.choose(asked, desk.workers, desk.now, desk.rng)
    assert worker is not None
    desk.lane.policy.placed(asked, worker, desk.now + 10.0)
    assert desk.decisions.last()[0].number == BURST_MAX


def test_off_means_forgotten_and_lanes_made_anew() -> None:
    switched: list[bool] = []
    desk = Desk()
    desk.decisions.on_switch(lambda: switched.append(desk.decisions.is_on))
    desk.send()
    desk.decisions.switch(True)
    assert switched == []
    desk.decisions.switch(False)
    assert switched == [False] and desk.decisions.last() == ()
    desk.send()
    assert desk.decisions.last() == (), "a request that began before still has its old lane"


def test_both_legs_of_a_pair_are_noted() -> None:
    desk = Desk()
    pair = Pair(CacheAware("m"), CacheAware("m"))
    lane: Any = desk.decisions.watched(Tallies(Metrics()).pair_lane(CHAT, "m", pair, True), CHAT.path)
    assert isinstance(lane, PairLane)
    asked = call(TEXT)
    for leg in (lane.prefill, lane):
        worker = leg.policy.choose(asked, desk.workers, desk.now, desk.rng)
        leg.policy.placed(asked, worker, desk.now)
    assert [noted.leg for noted in desk.decisions.last()] == ["", "prefill"]
