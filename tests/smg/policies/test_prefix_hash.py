"""`prefix_hash`: alike beginnings together, within bounded load."""

from __future__ import annotations

from collections import Counter
from random import Random

from hypothesis import given, settings
from hypothesis import strategies as st

from smg.policies.prefix_hash import PrefixHash
from smg.settings import Routing
from tests.smg.fleet.builders import call, workers_of

RNG = Random(1)


def place(policy: PrefixHash, workers, text: str, key: str | None = None):
    worker = policy.choose(call(text, key=key), workers, 1.0, RNG)
    policy.placed(call(text, key=key), worker, 1.0)
    return worker


def test_only_the_beginning_counts():
    policy, workers = PrefixHash(Routing(prefix_token_count=4)), workers_of(5)
    heads = [f"{i:016d}" for i in range(60)]
    for head in heads:
        assert place(policy, workers, head + " one") is place(policy, workers, head + " another")
    assert len({place(policy, workers, head).order for head in heads}) == 5


def test_the_routing_key_goes_before_the_text():
    policy, workers = PrefixHash(Routing()), workers_of(5)
    for i in range(30):
        assert place(policy, workers, f"a {i}", key=f"k{i}") is place(policy, workers, f"b {i}", key=f"k{i}")


@given(st.lists(st.integers(0, 40), min_size=2, max_size=8), st.text(min_size=1, max_size=20))
@settings(max_examples=60, deadline=None)
def test_nobody_above_his_share_is_chosen(in_flight: list[int], text: str):
    workers = workers_of(len(in_flight))
    for worker, count in zip(workers, in_flight, strict=True):
        worker.in_flight = count
    chosen = place(PrefixHash(Routing(prefix_hash_load_factor=1.25)), workers, text)
    assert chosen.in_flight <= 1.25 * (sum(in_flight) + 1) / len(in_flight)


def test_a_burst_of_one_prefix_spills_over_in_ring_order_and_comes_back():
    policy, workers = PrefixHash(Routing()), workers_of(4)
    home = place(policy, workers, "hot")
    seen = []
    for _ in range(40):
        worker = place(policy, workers, "hot")
        worker.in_flight += 1
        seen.append(worker.order)
    assert seen[0] == home.order
    assert max(worker.in_flight for worker in workers) <= 14  # 1.25 x 41 / 4, and the one on top
    for worker in workers:
        worker.in_flight = 0
    assert place(policy, workers, "hot") is home


def test_other_prefixes_stay_when_a_worker_goes():
    policy, workers = PrefixHash(Routing()), workers_of(5)
    homes = {f"text {i}": place(policy, workers, f"text {i}") for i in range(200)}
    left = tuple(worker for worker in workers if worker.order != 2)
    for text, home in homes.items():
        moved = place(policy, left, text)
        assert (moved is home) == (home.order != 2)


def test_a_prompt_without_text_goes_to_the_least_burdened():
    policy, workers = PrefixHash(Routing()), workers_of(3)
    workers[0].in_flight = workers[2].in_flight = 1
    assert {place(policy, workers, "").order for _ in range(20)} == {1}


def test_branches_count_what_decided():
    policy, workers = PrefixHash(Routing()), workers_of(3)
    home = place(policy, workers, "text")
    home.in_flight = 50
    place(policy, workers, "text")
    place(policy, workers, "")
    policy.placed(call("text", target="0"), workers[0], 1.0)
    assert policy.branches == {"ring_hit": 1, "load_balanced": 1, "no_prefix": 1, "target_worker_hit": 1}


def test_it_explains_who_is_above_the_share():
    policy, workers = PrefixHash(Routing()), workers_of(2)
    workers[0].in_flight = 9
    rows = policy.terms(call("x"), workers, 1.0, RNG)
    assert "above 6.25" in rows[0].reason and "above" not in rows[1].reason


def test_load_is_weighed_by_cost():
    policy, workers = PrefixHash(Routing()), workers_of(2, cost=0.5)
    counts = Counter()
    for i in range(100):
        counts[place(policy, workers, f"text {i}").order] += 1
    assert set(counts) == {0, 1}
