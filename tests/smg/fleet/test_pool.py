"""Candidates: who may get a request now, and why others may not (RT-1, CB-4, EXP-2, ERR-19)."""

from __future__ import annotations

import math

from smg.fleet.breaker import BreakerRules
from smg.fleet.load import ReportRules
from smg.fleet.worker import LoadReport, Status, WorkerSpec
from tests.smg.fleet.builders import PROBED, fleet, registry, url_of

RULES = ReportRules(interval_s=1.0)


def opened(worker, now: float = 0.0) -> None:
    for _ in range(worker.breaker.rules.failure_threshold):
        worker.breaker.failed(now, worker.breaker.started(now))
    assert worker.breaker.state == "open"


def test_while_nothing_changes_the_same_tuple_comes_back():
    registry_, workers = fleet(3)
    pool = registry_.pool("m")
    assert pool.candidates(1.0) == workers
    assert pool.candidates(2.0) is pool.candidates(1e9)


def test_a_judgement_with_the_same_outcome_keeps_the_same_tuple():
    registry_, workers = fleet(3)
    pool = registry_.pool("m")
    before = pool.candidates(1.0)
    workers[0].breaker.failed(1.0, workers[0].breaker.started(1.0))
    pool.invalidate()
    assert pool.candidates(1.0) is before


def test_only_ready_workers_are_candidates():
    registry_ = registry(health=PROBED)
    one, two = (registry_.add(WorkerSpec(url_of(i), model_id="m"), 0.0) for i in range(2))
    pool = registry_.pool("m")
    assert pool.candidates(0.0) == ()
    assert pool.excluded_by(one, 0.0) == "status"
    registry_.set_status(two, Status.READY, 1.0)
    assert pool.candidates(1.0) == (two,)
    registry_.set_status(one, Status.READY, 1.0)
    assert pool.candidates(1.0) == (one, two)  # in order of registration, not of readiness
    registry_.set_status(one, Status.NOT_READY, 2.0)
    assert pool.candidates(2.0) == (two,)


def test_a_draining_worker_gets_nothing():
    registry_, workers = fleet(2)
    pool = registry_.pool("m")
    registry_.drain(workers[0], 1.0)
    assert pool.candidates(1.0) == (workers[1],)
    assert pool.excluded_by(workers[0], 1.0) == "draining"
    assert pool.workers == workers  # still listed


def test_an_open_circuit_excludes_until_its_time_is_over():
    registry_, workers = fleet(2)
    pool = registry_.pool("m")
    pool.candidates(0.0)
    opened(workers[0])
    assert pool.candidates(1.0) == (workers[1],)
    assert pool.excluded_by(workers[0], 1.0) == "circuit"
    assert pool.candidates(59.9) == (workers[1],)
    assert pool.candidates(60.0) == workers


def test_half_open_shows_in_the_candidates_as_permits_come_and_go():
    registry_, workers = fleet(2)
    pool = registry_.pool("m")
    opened(workers[0])
    breaker = workers[0].breaker
    permits = []
    while workers[0] in pool.candidates(60.0):
        permits.append(breaker.started(60.0))
        assert len(permits) <= 3
    assert len(permits) == 3
    breaker.abandoned(permits[0])
    assert workers[0] in pool.candidates(60.0)


def test_with_every_circuit_open_nobody_is_a_candidate():
    registry_ = registry(breaker=BreakerRules(failure_threshold=1))
    worker = registry_.add(WorkerSpec(url_of(0), model_id="m"), 0.0)
    opened(worker)
    assert registry_.pool("m").candidates(1.0) == ()
    assert not registry_.pool("m").is_overloaded(1.0)


def test_a_worker_at_rest_is_left_out_while_another_is_there():
    registry_, workers = fleet(2)
    pool = registry_.pool("m")
    pool.candidates(0.0)
    workers[0].breaker.avoid(1.0, 5.0)
    assert pool.candidates(1.0) == (workers[1],)
    assert pool.excluded_by(workers[0], 1.0) == "circuit"
    assert pool.candidates(6.0) == workers


def test_a_worker_at_rest_alone_goes_on_getting_requests():
    registry_, workers = fleet(2)
    pool = registry_.pool("m")
    workers[0].breaker.avoid(1.0, 5.0)
    registry_.set_status(workers[1], Status.NOT_READY, 1.0)
    assert pool.candidates(1.0) == (workers[0],)
    assert pool.excluded_by(workers[0], 1.0) is None


def test_all_at_rest_are_all_candidates():
    registry_, workers = fleet(2)
    for worker in workers:
        worker.breaker.avoid(1.0, 5.0)
    assert registry_.pool("m").candidates(1.0) == workers


def test_an_overloaded_worker_is_left_out_unless_all_are():
    registry_, workers = fleet(2)
    pool = registry_.pool("m")
    registry_.reported(workers[0], LoadReport(0.0, waiting=50), RULES)
    assert pool.candidates(0.5) == (workers[1],)
    assert pool.excluded_by(workers[0], 0.5) == "overload"
    assert not pool.is_overloaded(0.5)
    registry_.reported(workers[1], LoadReport(0.0, kv_usage=0.95), RULES)
    assert pool.candidates(0.5) == workers
    assert pool.is_overloaded(0.5)
    registry_.reported(workers[1], LoadReport(0.0), RULES)
    assert pool.candidates(0.5) == (workers[1],)


def test_overload_lapses_with_its_report_and_lasts_with_a_new_one():
    registry_, workers = fleet(2)
    pool = registry_.pool("m")
    registry_.reported(workers[0], LoadReport(0.0, waiting=50), RULES)
    assert pool.candidates(2.9) == (workers[1],)
    assert pool.candidates(3.0) == workers
    assert pool._valid_until_s == math.inf  # a lapsed report is no reason to judge every time
    registry_.reported(workers[0], LoadReport(4.0, waiting=50), RULES)
    assert pool.candidates(4.0) == (workers[1],)
    registry_.reported(workers[0], LoadReport(5.0, waiting=50), RULES)
    assert pool.candidates(7.5) == (workers[1],)


def test_rest_goes_before_overload():
    registry_, workers = fleet(2)
    pool = registry_.pool("m")
    workers[0].breaker.avoid(0.0, 50.0)
    registry_.reported(workers[1], LoadReport(0.0, waiting=50), RULES)
    assert pool.candidates(0.5) == (workers[1],)
    assert pool.is_overloaded(0.5)


def test_version_tells_of_membership_and_of_nothing_else():
    registry_, workers = fleet(2)
    pool = registry_.pool("m")
    version = pool.version
    registry_.set_status(workers[0], Status.NOT_READY, 1.0)
    workers[1].breaker.avoid(1.0, 5.0)
    pool.candidates(1.0)
    assert pool.version == version
    registry_.add(WorkerSpec(url_of(9), model_id="m"), 1.0)
    assert pool.version > version


def test_every_worker_that_is_no_candidate_has_a_reason_and_no_candidate_has_one():
    registry_, workers = fleet(6)
    pool = registry_.pool("m")
    opened(workers[0])
    workers[1].breaker.avoid(0.0, 9.0)
    registry_.drain(workers[2], 0.0)
    registry_.set_status(workers[3], Status.NOT_READY, 0.0)
    registry_.reported(workers[4], LoadReport(0.0, waiting=50), RULES)
    reasons = [pool.excluded_by(worker, 1.0) for worker in workers]
    assert reasons == ["circuit", "circuit", "draining", "status", "overload", None]
    assert pool.candidates(1.0) == (workers[5],)
