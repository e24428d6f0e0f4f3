"""Slots and gates follow the fleet: labels, status, models that share workers, pairs, fleets that go (ADM-6)."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from smg.fleet.load import ReportRules
from smg.fleet.registry import Registry
from smg.fleet.worker import LoadReport, ModelCard, Status, Worker, WorkerSpec
from smg.services.fleet_slots import FleetSlots, slots_of
from smg.tenancy.admission import ADMITTED, WAITING
from smg.tenancy.priorities import CLASSES, DEFAULT, INTERACTIVE, ClassRules, Rules
from smg.tenancy.scheduler import Scheduler, Ticket
from smg.tenancy.slots import NO_BOUND
from tests.smg.services.fakes import FakeLog, make_registry

LONG_S = 5.0


class House:
    def __init__(self, limit: int | None = None, rules: Rules | None = None, is_pair: bool = False) -> None:
        self.registry: Registry = make_registry()
        self.scheduler = Scheduler(rules or Rules(), lambda waiter: False)
        self.log = FakeLog()
        self.fleet = FleetSlots(self.registry, self.scheduler, limit=limit, is_pair=is_pair, log=self.log)

    def worker(
        self, url: str, *models: str, ready: bool = True, kind: str = "regular", **labels: str
    ) -> Worker:
        worker = self.registry.add(WorkerSpec(f"http://{url}:1", labels=labels, worker_type=kind), 0.0)
        self.registry.set_models(worker, tuple(map(ModelCard, models)))
        if ready:
            self.registry.set_status(worker, Status.READY, 0.0)
        return worker

    def refit(self) -> Sequence[Ticket]:
        assert self.fleet.is_stale
        return self.fleet.refit(0.0)

    def enter(self, model: str, cost_s: float = LONG_S) -> Ticket:
        pool = self.registry.pool(model)
        assert pool is not None
        return self.scheduler.enter(self.fleet.gate_of(pool), DEFAULT, "t", cost_s, True, None, 0.0)

    def numbers(self, model: str) -> tuple[int, float]:
        """Slots and places behind a model."""
        pool = self.registry.pool(model)
        assert pool is not None
        gate = self.fleet.gate_of(pool)
        return gate.slots.capacity, gate.places


@pytest.mark.parametrize(
    ("label", "slots"),
    [
        (None, 64),
        ("8", 8),
        (" 12 ", 12),
        ("0", 1),
        ("-3", 64),
        ("many", 64),
        ("", 64),
        ("9" * 30, 64),
        ("³", 64),
    ],
)
def test_the_label_tells_a_workers_slots(label, slots):
    house = House()
    labels = {} if label is None else {"max_running_requests": label}
    assert slots_of(house.worker("a", "m", **labels)) == slots


def test_slots_are_those_of_the_ready_workers_and_follow_them():
    house = House()
    house.worker("a", "m", max_running_requests="10")
    second = house.worker("b", "m", ready=False)
    house.refit()
    assert house.numbers("m") == (10, 1)
    house.registry.set_status(second, Status.READY, 0.0)
    house.refit()
    assert house.numbers("m") == (74, 2)
    house.registry.update(second, WorkerSpec(second.spec.url, labels={"max_running_requests": "5"}), 0.0)
    house.refit()
    assert house.numbers("m") == (15, 2)
    house.registry.remove(second)
    house.refit()
    assert house.numbers("m") == (10, 1)


def test_a_worker_that_comes_lets_the_waiting_go():
    house = House()
    house.worker("a", "m")
    house.refit()
    assert [house.enter("m").state for _ in range(3)] == [ADMITTED, WAITING, WAITING]
    house.worker("b", "m")
    assert len(house.refit()) == 1


def test_without_a_ready_worker_all_pass():
    house = House()
    house.worker("a", "m", ready=False)
    house.refit()
    assert house.numbers("m") == (NO_BOUND, float("inf"))
    assert all(house.enter("m").state == ADMITTED for _ in range(5))


def test_models_of_the_same_workers_share_a_gate_and_others_do_not():
    house = House()
    house.worker("a", "base", "adapter")
    house.worker("b", "other")
    house.refit()
    assert house.enter("base").state == ADMITTED
    assert house.enter("adapter").state == WAITING
    assert house.enter("other").state == ADMITTED


def test_a_fleet_keeps_its_gate_when_a_model_joins_or_leaves_it():
    house = House()
    worker = house.worker("a", "base", "adapter")
    house.refit()
    first = house.enter("adapter")
    house.registry.set_models(worker, (ModelCard("adapter"), ModelCard("new")))
    house.refit()
    assert house.enter("new").state == WAITING
    assert len(house.scheduler.first_byte(first, 0.0)) == 1


def test_what_waits_before_a_fleet_that_is_gone_goes_on_and_the_gate_is_dropped():
    house = House()
    worker = house.worker("a", "m")
    house.worker("b", "n")
    house.refit()
    running, waiting = house.enter("m"), house.enter("m")
    house.registry.remove(worker)
    assert list(house.refit()) == [waiting]  # dispatch will tell it that nobody is there
    house.fleet.tidy()
    assert len(house.scheduler.slots) == 2
    house.scheduler.leave(running, 0.0)
    house.scheduler.leave(waiting, 0.0)
    house.fleet.tidy()
    assert len(house.scheduler.slots) == 1


def test_a_request_whose_fleet_has_just_gone_passes():
    house = House()
    worker = house.worker("a", "m")
    house.refit()
    pool = house.registry.pool("m")
    house.registry.remove(worker)
    house.refit()
    assert pool is not None
    gate = house.fleet.gate_of(pool)
    ticket = house.scheduler.enter(gate, DEFAULT, "t", LONG_S, True, None, 0.0)
    assert ticket.state == ADMITTED
    house.scheduler.leave(ticket, 0.0)
    house.fleet.tidy()
    assert house.scheduler.slots == []


def test_one_limit_is_for_all_fleets_and_each_has_its_own_prefill():
    house = House(limit=3)
    house.worker("a", "m")
    house.worker("b", "n")
    house.refit()
    assert house.numbers("m") == house.numbers("n") == (3, 1)
    assert [house.enter("m").state for _ in range(2)] == [ADMITTED, WAITING]
    assert [house.enter("n", 0.01).state for _ in range(3)] == [ADMITTED, ADMITTED, WAITING]
    house.registry.remove(house.registry.workers()[0])
    house.refit()
    house.fleet.tidy()
    assert len(house.scheduler.slots) == 1


def test_no_limit_means_none():
    house = House(limit=0)
    house.worker("a", "m")
    house.refit()
    assert house.numbers("m") == (NO_BOUND, 1)


def test_pairs_prefill_on_one_kind_and_hold_slots_of_the_other():
    house = House(is_pair=True)
    for url in ("p1", "p2", "p3"):
        house.worker(url, "m", kind="prefill")
    house.worker("d", "m", kind="decode", max_running_requests="7")
    house.refit()
    gate = house.fleet.gates["m"]
    assert (gate.slots.capacity, gate.places) == (7, 3)


def test_models_nobody_told_share_the_workers_that_tell_none():
    house = House()
    house.worker("a")
    house.refit()
    assert house.enter("x").state == ADMITTED and house.enter("y").state == WAITING


def test_estimates_stand_still_where_engines_say_that_work_waits():
    house = House()
    workers = [house.worker("a", "m"), house.worker("b", "m")]
    house.refit()
    pool = house.registry.pool("m")
    assert pool is not None
    gate = house.fleet.gate_of(pool)
    house.scheduler.enter(gate, DEFAULT, "t", LONG_S, False, None, 0.0)
    house.fleet.observe(0.0)
    assert gate.due_s == LONG_S
    rules = ReportRules(interval_s=1.0)
    for worker, waiting in zip(workers, (3, 0), strict=True):
        house.registry.reported(worker, LoadReport(at_s=0.0, waiting=waiting), rules)
    house.fleet.observe(0.5)
    assert gate.due_s == pytest.approx(LONG_S + 0.25)  # one of two
    house.fleet.observe(100.0)  # both reports are too old to say anything
    assert gate.due_s == pytest.approx(LONG_S + 0.25)


def test_reservations_that_do_not_fit_are_told_once_and_again_after_a_reload():
    classes = list(CLASSES)
    classes[INTERACTIVE] = ClassRules(reserved_floor=128, queue_size=1, queue_timeout_s=1, starvation_s=1)
    house = House(rules=Rules(classes=tuple(classes)))
    house.worker("a", "m")
    house.refit()
    house.worker("b", "n")
    house.refit()
    assert [(level, fields["slots"]) for level, _, fields in house.log.lines] == [("warn", 64)]
    house.fleet.warn_if_shrunk(is_new=True)
    assert len(house.log.lines) == 2
