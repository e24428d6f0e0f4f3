"""A pair is two choices that do not touch each other (section 18)."""

from __future__ import annotations

from random import Random

from smg.fleet.worker import WorkerSpec
from smg.policies.manual import Manual
from smg.policies.pair import Pair
from smg.policies.policy import Wants
from smg.policies.prefix_hash import PrefixHash
from smg.policies.round_robin import RoundRobin
from smg.settings import Routing
from tests.smg.fleet.builders import call, registry, url_of


def legs():
    reg = registry()
    kinds = ["prefill", "prefill", "decode", "decode", "decode"]
    workers = [
        reg.add(WorkerSpec(url_of(i), model_id="m", worker_type=kind), 0.0) for i, kind in enumerate(kinds)
    ]
    return tuple(workers[:2]), tuple(workers[2:])


def test_each_leg_follows_its_own_policy():
    prefills, decodes = legs()
    pair = Pair(RoundRobin(Routing()), RoundRobin(Routing()))
    chosen = []
    for _ in range(6):
        prefill, decode = pair.choose(call(), prefills, decodes, 1.0, Random(1))
        pair.placed(call(), prefill, decode, 1.0)
        chosen.append((prefill.order, decode.order))
    assert chosen == [(0, 2), (1, 3), (0, 4), (1, 2), (0, 3), (1, 4)]


def test_without_one_leg_there_is_no_pair():
    prefills, decodes = legs()
    pair = Pair(RoundRobin(Routing()), RoundRobin(Routing()))
    assert pair.choose(call(), (), decodes, 1.0, Random(1)) is None
    assert pair.choose(call(), prefills, (), 1.0, Random(1)) is None


def test_a_key_sticks_on_both_legs_and_a_lost_leg_moves_alone():
    prefills, decodes = legs()
    pair = Pair(Manual(Routing()), Manual(Routing()))
    first = pair.choose(call(key="k"), prefills, decodes, 1.0, Random(1))
    pair.placed(call(key="k"), *first, 1.0)
    assert pair.choose(call(key="k"), prefills, decodes, 1.0, Random(9)) == first
    pair.removed(first[1])
    left = tuple(worker for worker in decodes if worker is not first[1])
    second = pair.choose(call(key="k"), prefills, left, 2.0, Random(9))
    assert second[0] is first[0] and second[1] in left


def test_it_wants_what_either_leg_wants():
    assert Pair(RoundRobin(Routing()), PrefixHash(Routing())).wants == Wants.KEY | Wants.TEXT | Wants.CHARS
