"""`cache_aware` among several gateways: news, homes, owners, and who counted what."""

from __future__ import annotations

import pytest

from smg.fleet.block_hashes import ROOT
from smg.fleet.prefix_index import Placement
from smg.policies.cache_aware import CacheAware
from smg.policies.neighbours import News
from tests.smg.fleet.builders import reported, workers_of
from tests.smg.policies.site import Site, call, text_of


class Mesh:
    """Two gateways; what one tells waits until `deliver`."""

    def __init__(self, delay_s: float = 1.0) -> None:
        self._delay_s = delay_s
        self.told: list[tuple[News, float]] = []

    def count(self) -> int:
        return 2

    def delay_s(self) -> float:
        return self._delay_s

    def tell(self, news: News, now: float) -> None:
        self.told.append((news, now))

    def deliver(self, policy: CacheAware, now: float) -> None:
        for news, sent_s in self.told:
            policy.heard(news, sent_s, now)
        self.told.clear()


def test_news_of_a_long_prefill_counts_although_the_last_report_saw_no_queue():
    site = Site(workers_of(1), CacheAware("m", neighbours=Mesh()))
    worker = site.workers[0]
    site.rows("x")
    reported(worker, site.now + 0.5, running=1, waiting=0)
    site.now += 1.0
    news = News(Placement(worker.id, ROOT, (5, 6, 7)), 12.0)
    site.policy.heard(news, site.now - 0.8, site.now)  # sent before the report, in prefill when it came
    assert site.rows("x")[worker.id].wait == pytest.approx(11.2)


def test_news_that_a_report_has_counted_is_not_counted_twice():
    site = Site(workers_of(1), CacheAware("m", neighbours=Mesh()))
    worker = site.workers[0]
    site.rows("x")
    reported(worker, site.now + 0.5, running=1, waiting=2, waiting_tokens=24_000)
    site.now += 1.0
    before = site.rows("x")[worker.id].wait
    news = News(Placement(worker.id, ROOT, (5, 6, 7)), 1.0)
    site.policy.heard(news, site.now - 0.8, site.now)
    assert site.rows("x")[worker.id].wait == pytest.approx(before)


def test_our_own_first_byte_ends_what_others_had_sent_before():
    site = Site(workers_of(1), CacheAware("m", neighbours=Mesh()))
    worker = site.workers[0]
    site.rows("x")
    site.policy.heard(News(Placement(worker.id, ROOT, (5,)), 20.0), site.now, site.now)
    site.now += 0.1
    asked, _ = site.send(text_of(1, 4))
    assert site.rows("x")[worker.id].wait > 19.0
    site.now += 2.0
    site.policy.first_byte(asked, worker, 2.0, site.now)
    assert site.rows("x")[worker.id].wait == 0.0


def test_a_peer_that_heard_of_a_placement_follows_it():
    mesh = Mesh()
    here, there = Site(workers_of(8), CacheAware("m", neighbours=mesh)), Site(workers_of(8))
    history = text_of(1, 20)
    worker = here.serve(history)
    mesh.deliver(there.policy, there.now)
    there.now += 60.0
    assert there.chosen(history).order == worker.order


def test_gateways_that_have_not_heard_prefer_the_same_two_homes():
    chosen = set()
    for seed in range(12):
        site = Site(workers_of(16), CacheAware("m", neighbours=Mesh(float("inf"))), seed)
        chosen.add(site.chosen(text_of(1, 20)).order)
    assert len(chosen) <= 2


def test_a_peers_placement_counts_as_wait_and_drains():
    site = Site(workers_of(2), CacheAware("m", neighbours=Mesh()))
    site.rows("x")
    sender, mesh = Site(workers_of(2), CacheAware("m", neighbours=Mesh())), Mesh()
    sender.policy._neighbours = mesh
    worker = sender.serve(text_of(1, 100))
    mesh.deliver(site.policy, site.now)
    waits = [site.rows("x")[one.id].wait for one in site.workers]
    assert waits[worker.order] > 0.5
    assert waits[1 - worker.order] == 0.0
    site.now += 60.0
    assert {site.rows("x")[one.id].wait for one in site.workers} == {0.0}


def test_an_owner_decides_books_and_tells_and_the_asker_follows():
    mesh = Mesh()
    owner = Site(workers_of(4), CacheAware("m", neighbours=mesh))
    asker = Site(workers_of(4), CacheAware("m", neighbours=Mesh()), seed=9)
    history = text_of(1, 20)
    owner.serve(history, to=owner.workers[2])
    mesh.told.clear()
    owner.now += 60.0
    asked = call(history + text_of(2, 3))
    question = asker.policy.question(asked)
    assert asker.policy.session(question) is not None
    assert asker.policy.uncached_s(question) > 0.05
    decision = owner.policy.decide(question, owner.workers, owner.now, owner.rng)
    assert decision is not None
    assert decision.worker_id == owner.workers[2].id
    assert decision.matched_blocks == 20
    assert len(mesh.told) == 1
    asker.policy.follow(asked, decision)
    worker = asker.policy.choose(asked, asker.workers, asker.now, asker.rng)
    assert worker is asker.workers[2]
    asker.policy.placed(asked, worker, asker.now)
    assert asker.policy._neighbours.told == []  # the owner has told everybody


def test_siblings_decided_by_one_owner_stay_together():
    owner = Site(workers_of(8), CacheAware("m", neighbours=Mesh()))
    context = text_of(1, 60)
    homes = set()
    for seed in range(6):
        asker = Site(workers_of(8), CacheAware("m", neighbours=Mesh()))
        question = asker.policy.question(call(context + text_of(50 + seed, 2)))
        decision = owner.policy.decide(question, owner.workers, owner.now, owner.rng)
        assert decision is not None
        homes.add(decision.worker_id)
    assert len(homes) == 1


def test_an_answer_that_names_no_candidate_is_not_followed():
    site = Site(workers_of(4))
    asked = call(text_of(1, 20))
    decision = site.policy.decide(site.policy.question(asked), site.workers, site.now, site.rng)
    assert decision is not None
    site.policy.follow(asked, decision)
    others = tuple(worker for worker in site.workers if worker.id != decision.worker_id)
    assert site.policy.choose(asked, others, site.now, site.rng) in others


def test_what_the_owner_told_of_our_own_request_is_not_taken_for_cached():
    """Its owner tells everybody, and that news often overtakes the answer; our index then holds the very prompt."""
    mesh = Mesh()
    owner, asker = CacheAware("m", neighbours=mesh), CacheAware("m", neighbours=Mesh())
    site = Site(workers_of(2), asker)
    asked = call(text_of(7, 40))
    decision = owner.decide(owner.question(asked), site.workers, site.now, site.rng)
    assert decision is not None
    (worker,) = (worker for worker in site.workers if worker.id == decision.worker_id)
    asker._index.apply(mesh.told[0][0].placement)  # all that the bridge takes in of what was decided for us
    asker.follow(asked, decision)
    assert asker.choose(asked, site.workers, site.now, site.rng) is worker
    asker.placed(asked, worker, site.now)
    assert asker.owed_s(worker.id, site.now) == pytest.approx(decision.seconds)
    assert asker.matched_chars == 0
