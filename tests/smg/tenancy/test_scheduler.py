"""The scheduler, played: classes, reservations, tenants, prefill, preemption, reload (ADM-6, ADM-7, ERR-12, ERR-14, ERR-20)."""

from __future__ import annotations

from itertools import pairwise

import msgspec
import pytest

from smg.errors import GatewayError
from smg.tenancy.admission import ADMITTED, EXPIRED, LEFT, WAITING
from smg.tenancy.priorities import BULK, CLASSES, DEFAULT, INTERACTIVE, SYSTEM, ClassRules, Rules, TenantRules
from smg.tenancy.scheduler import PREEMPTED, Scheduler, Ticket
from smg.tenancy.slots import NO_BOUND, Gate, Slots

PLAIN_CLASS = ClassRules(queue_size=100, queue_timeout_s=60.0, starvation_s=30.0)
PLAIN = Rules(classes=(PLAIN_CLASS,) * 4, prefill_ahead_s=None)
SHORT_S, LONG_S = 0.01, 5.0


def with_class(rules: Rules, rank: int, **members) -> Rules:
    classes = list(rules.classes)
    classes[rank] = msgspec.structs.replace(classes[rank], **members)
    return msgspec.structs.replace(rules, classes=tuple(classes))


class Play:
    """A scheduler with one fleet, and requests by name."""

    def __init__(self, capacity: int = 2, workers: int = 0, rules: Rules = PLAIN) -> None:
        self.begun: set[str] = set()
        self.now = 0.0
        self.scheduler = Scheduler(rules, lambda waiter: waiter not in self.begun)
        self.slots = Slots()
        self.scheduler.add(self.slots)
        self.gate = self.add_gate(workers)
        self.scheduler.resize(self.slots, capacity, 0.0)
        self.tickets: dict[str, Ticket] = {}

    def add_gate(self, workers: int) -> Gate:
        gate = Gate(self.slots)
        gate.widen(workers, self.scheduler.rules.prefill_ahead_s is not None)
        return gate

    def enter(
        self, name: str, rank: int = DEFAULT, tenant: str = "t", cost_s: float = SHORT_S, **more
    ) -> Ticket:
        gate = more.get("gate", self.gate)
        ticket = self.scheduler.enter(gate, rank, tenant, cost_s, more.get("is_stream", True), name, self.now)
        self.tickets[name] = ticket
        return ticket

    def leave(self, name: str) -> list[str]:
        return names(self.scheduler.leave(self.tickets[name], self.now, True))

    def first_byte(self, name: str) -> list[str]:
        self.begun.add(name)
        return names(self.scheduler.first_byte(self.tickets[name], self.now))

    def after(self, seconds: float) -> list[str]:
        self.now += seconds
        return names(self.scheduler.expire(self.now))

    def refused(self, *arguments, **more) -> GatewayError:
        with pytest.raises(GatewayError) as error:
            self.enter("refused", *arguments, **more)
        return error.value

    def states(self) -> dict[str, str]:
        return {name: ticket.state for name, ticket in self.tickets.items()}


def names(tickets) -> list[str]:
    return [ticket.waiter for ticket in tickets]


def test_who_finds_room_goes_at_once_and_who_leaves_hands_the_slot_on():
    play = Play(capacity=2)
    assert play.enter("a").state == play.enter("b").state == ADMITTED
    assert play.enter("c").state == play.enter("d").state == WAITING
    assert play.leave("a") == ["c"]
    assert play.tickets["c"].state == ADMITTED and play.tickets["a"].state == LEFT
    assert play.scheduler.in_flight[DEFAULT] == 2 and play.scheduler.waiting[DEFAULT] == 1
    assert play.leave("b") == ["d"] and play.leave("c") == [] and play.leave("d") == []
    assert play.scheduler.in_flight == [0] * 4 and play.scheduler.admitted[DEFAULT] == 4


def test_the_higher_class_goes_first_whoever_came_first():
    play = Play(capacity=1)
    play.enter("running")
    for name, rank in (("b", BULK), ("d", DEFAULT), ("i", INTERACTIVE), ("s", SYSTEM), ("s2", SYSTEM)):
        play.enter(name, rank)
    order = []
    last = "running"
    while woken := play.leave(last):
        order += woken
        last = woken[0]
    assert order == ["s", "s2", "i", "d", "b"]


def test_a_reservation_is_kept_free_from_lower_classes_and_not_from_its_own():
    rules = with_class(PLAIN, INTERACTIVE, reserved_floor=2)
    play = Play(capacity=4, rules=rules)
    assert [play.enter(f"d{n}").state for n in range(3)] == [ADMITTED, ADMITTED, WAITING]
    assert [play.enter(f"i{n}", INTERACTIVE).state for n in range(3)] == [ADMITTED, ADMITTED, WAITING]
    assert play.leave("i0") == ["i2"]  # the higher class first, of whichever slot
    assert play.leave("i1") == []  # i2 uses one of two reserved: the other one stays free
    assert play.leave("d0") == ["d2"]


def test_what_does_not_fit_shrinks_in_proportion_and_leaves_something_to_the_rest():
    rules = with_class(with_class(PLAIN, SYSTEM, reserved_floor=32), INTERACTIVE, reserved_floor=128)
    play = Play(capacity=40, rules=rules)
    assert play.slots.is_shrunk and list(play.slots.reserved) == [0, 0, 24, 6]
    assert sum(play.enter(f"b{n}", BULK).state == ADMITTED for n in range(20)) == 10
    woken = play.scheduler.resize(play.slots, 400, 0.0)
    assert not play.slots.is_shrunk and list(play.slots.reserved) == [0, 0, 128, 32]
    assert len(woken) == 10  # a larger fleet lets the waiting go


@pytest.mark.parametrize("capacity", [1, 2, 3, 4, 7, 64, 512, 4096])
def test_the_built_in_reservations_fit_every_fleet(capacity):
    slots = Slots()
    slots.resize(capacity, CLASSES)
    assert not slots.is_shrunk
    assert slots.free_for(BULK) >= 0.6 * capacity and slots.free_for(DEFAULT) >= 0.7 * capacity


def test_a_smaller_fleet_lets_nobody_go_until_there_is_room_again():
    play = Play(capacity=4)
    for n in range(4):
        play.enter(f"a{n}")
    play.enter("b")
    assert names(play.scheduler.resize(play.slots, 2, 0.0)) == []
    assert play.leave("a0") == [] and play.leave("a1") == []
    assert play.leave("a2") == ["b"]


def test_without_a_bound_of_slots_nobody_waits_for_one():
    play = Play(capacity=NO_BOUND, rules=with_class(PLAIN, SYSTEM, reserved_share=1.0))
    assert all(play.enter(f"{n}", BULK).state == ADMITTED for n in range(1000))


# -- queues


def test_err_12_a_full_queue_refuses_only_its_class():
    play = Play(capacity=1, rules=with_class(PLAIN, BULK, queue_size=1))
    play.enter("running")
    play.enter("b", BULK)
    error = play.refused(BULK)
    assert (error.status, error.code) == (429, "scheduler_queue_full") and error.retry_after_s >= 1
    assert play.enter("d").state == WAITING
    assert play.scheduler.counts.refused_full[BULK] == 1 and play.scheduler.waiting[BULK] == 1


def test_a_queue_of_none_refuses_at_once():
    play = Play(capacity=1, rules=with_class(PLAIN, DEFAULT, queue_size=0))
    play.enter("running")
    assert play.refused().code == "scheduler_queue_full"


def test_err_14_who_waits_too_long_is_told_so():
    play = Play(capacity=1, rules=with_class(PLAIN, BULK, queue_timeout_s=10.0))
    play.enter("running")
    play.enter("b", BULK)
    play.enter("d")
    assert play.scheduler.next_deadline_s() == 10.0
    assert play.after(9.9) == []
    assert play.after(0.1) == ["b"] and play.tickets["b"].state == EXPIRED
    error = play.scheduler.timeout_error()
    assert (error.status, error.code) == (503, "scheduler_queue_timeout") and error.retry_after_s >= 1
    assert play.scheduler.next_deadline_s() == 60.0
    assert names(play.scheduler.abandon(play.tickets["b"], play.now)) == []
    assert play.scheduler.counts.refused_late[BULK] == 1
    assert play.leave("running") == ["d"]


def test_a_waiting_client_that_leaves_frees_its_place():
    play = Play(capacity=1, rules=with_class(PLAIN, DEFAULT, queue_size=1))
    play.enter("running")
    waiting = play.enter("a")
    assert names(play.scheduler.abandon(waiting, 0.0)) == []
    assert play.scheduler.counts.cancelled[DEFAULT] == 1
    assert play.enter("b").state == WAITING
    assert play.leave("running") == ["b"]


def test_a_client_that_leaves_between_its_turn_and_its_waking_passes_the_slot_on():
    play = Play(capacity=1)
    for name in "abc":
        play.enter(name)
    assert play.leave("a") == ["b"]
    assert names(play.scheduler.abandon(play.tickets["b"], 0.0)) == ["c"]


def test_a_slot_that_comes_back_twice_is_a_bug():
    play = Play()
    play.enter("a")
    play.leave("a")
    with pytest.raises(AssertionError):
        play.leave("a")


# -- starvation


def test_who_waited_past_the_bound_ignores_reservations():
    rules = with_class(with_class(PLAIN, INTERACTIVE, reserved_floor=2), BULK, starvation_s=20.0)
    play = Play(capacity=2, rules=rules)
    assert play.enter("b0", BULK).state == play.enter("b1", BULK).state == WAITING
    assert play.after(19.9) == []
    play.enter("young", BULK)
    assert sorted(play.after(0.1)) == ["b0", "b1"]  # by time alone, without any other event


def test_a_class_that_gets_nothing_goes_first_once_per_bound_and_not_more():
    rules = with_class(PLAIN, BULK, starvation_s=10.0, queue_timeout_s=1000.0)
    play = Play(capacity=1, rules=rules)
    play.enter("running")
    for n in range(5):
        play.enter(f"b{n}", BULK)
    order, last = [], "running"
    for n in range(40):  # an endless stream of a higher class, one second each
        play.enter(f"d{n}")
        play.now += 1.0
        last = play.leave(last)[0]
        order.append(last)
    places = [place for place, name in enumerate(order) if name.startswith("b")]
    assert [order[place] for place in places] == ["b0", "b1", "b2", "b3"]
    assert all(9 <= after - before <= 11 for before, after in pairwise(places))
    assert play.scheduler.counts.promoted[BULK] == 4


# -- tenants


def test_two_tenants_of_a_class_take_turns_by_seconds_and_weight():
    rules = msgspec.structs.replace(PLAIN, tenants={"heavy": TenantRules(weight=3.0)})
    play = Play(capacity=1, rules=rules)
    play.enter("running", tenant="x")
    for n in range(9):
        play.enter(f"light{n}", tenant="light", cost_s=1.0)
    for n in range(9):
        play.enter(f"heavy{n}", tenant="heavy", cost_s=1.0)
    order, last = [], "running"
    for _ in range(8):
        last = play.leave(last)[0]
        order.append(last[:5])
    assert order.count("heavy") == 6 and order.count("light") == 2


def test_a_flood_does_not_stand_before_another_tenants_first_request():
    play = Play(capacity=1)
    for n in range(50):
        play.enter(f"flood{n}", tenant="flood", cost_s=LONG_S)
    play.enter("short", tenant="other")
    assert play.leave("flood0") == ["short"]


# -- prefill


WINDOW = msgspec.structs.replace(PLAIN, prefill_ahead_s=0.25)


def test_one_long_prefill_per_worker_is_under_way_and_the_next_goes_at_its_first_byte():
    play = Play(capacity=64, workers=2, rules=WINDOW)
    states = [play.enter(f"f{n}", tenant="flood", cost_s=LONG_S).state for n in range(5)]
    assert states == [ADMITTED, ADMITTED, WAITING, WAITING, WAITING]
    play.enter("short", tenant="other")
    # The short one is next. The long one behind it waits until its place is whole: sent now, it might come first.
    assert play.first_byte("f0") == ["short"]
    assert (
        play.enter("again", tenant="flood").state == WAITING
    )  # nor does its tenant's next short one fill that up
    assert play.first_byte("short") == ["f2"]
    assert play.leave("f0") == []  # its slot was not what others waited for
    assert play.first_byte("f1") == ["f3"]


def test_short_prefills_share_a_place():
    play = Play(capacity=64, workers=1, rules=WINDOW)
    states = [play.enter(f"{n}", cost_s=0.05).state for n in range(7)]
    assert states.count(ADMITTED) == 5  # 0.25 s


def test_a_bound_of_nothing_means_one_at_a_time():
    play = Play(capacity=64, workers=1, rules=msgspec.structs.replace(PLAIN, prefill_ahead_s=0.0))
    assert [play.enter(f"{n}", cost_s=0.001).state for n in range(3)] == [ADMITTED, WAITING, WAITING]


def test_prefill_of_a_plain_answer_ends_by_the_estimate_or_with_the_answer():
    play = Play(capacity=64, workers=1, rules=WINDOW)
    play.enter("a", cost_s=2.0, is_stream=False)
    play.enter("b", cost_s=2.0, is_stream=False)
    play.enter("c", cost_s=2.0, is_stream=False)
    assert play.after(1.9) == []
    assert play.after(0.1) == ["b"]
    assert play.leave("a") == []
    play.now += 0.5
    assert play.leave("b") == ["c"]


def test_the_estimate_of_plain_answers_learns_from_answers_that_come_sooner():
    play = Play(capacity=64, workers=1, rules=WINDOW)
    for n in range(60):
        play.enter(f"{n}", cost_s=4.0, is_stream=False)
        play.now += 1.0
        play.leave(f"{n}")
    assert play.gate.pace == pytest.approx(0.25, abs=0.05)
    play.enter("a", cost_s=4.0, is_stream=False)
    play.enter("b", cost_s=4.0, is_stream=False)
    assert play.after(1.1) == ["b"]


def test_where_work_waits_in_the_engines_no_estimate_runs_off_and_the_pace_slows():
    play = Play(capacity=64, workers=1, rules=WINDOW)
    for name in "abc":
        play.enter(name, cost_s=2.0, is_stream=False)
    for _ in range(20):
        play.gate.observe(0.1, [1])
        assert play.after(0.1) == []
    assert 2.0 < play.gate.pace < 3.0
    for _ in range(19):
        play.gate.observe(0.1, [0])
        assert play.after(0.1) == []
    assert play.after(0.11) == ["b"]
    pace = play.gate.pace
    play.gate.observe(1.0, [0])
    assert 0.9 * pace < play.gate.pace < pace  # nobody had to wait there: a little faster


def test_without_reports_a_pace_that_was_learned_returns_to_the_estimate():
    play = Play(capacity=64, workers=1, rules=WINDOW)
    play.gate.pace = 0.5
    play.enter("a", cost_s=1000.0, is_stream=False)
    for _ in range(1000):
        play.gate.observe(1.0, [])
    assert 0.99 < play.gate.pace < 1.01


def test_a_gate_without_workers_lets_all_pass():
    play = Play(capacity=64, workers=0, rules=WINDOW)
    assert all(play.enter(f"{n}", cost_s=LONG_S).state == ADMITTED for n in range(10))


def test_one_fleets_flood_does_not_hold_up_another_fleet():
    play = Play(capacity=64, workers=1, rules=WINDOW)
    other = play.add_gate(1)
    for n in range(5):
        play.enter(f"f{n}", cost_s=LONG_S)
    assert play.enter("elsewhere", gate=other).state == ADMITTED


def test_a_worker_that_comes_or_goes_moves_the_bound():
    play = Play(capacity=64, workers=1, rules=WINDOW)
    for n in range(4):
        play.enter(f"f{n}", cost_s=LONG_S)
    play.gate.widen(3, True)
    assert names(play.scheduler.resize(play.slots, 64, 0.0)) == ["f1", "f2"]
    play.gate.widen(1, True)
    assert play.first_byte("f0") == [] and play.first_byte("f1") == [] and play.first_byte("f2") == ["f3"]


# -- preemption


BOSS = with_class(PLAIN, INTERACTIVE, can_preempt=True)


def test_adm_7_the_newest_of_the_lowest_class_gives_way():
    play = Play(capacity=4, rules=BOSS)
    for name, rank in (("b0", BULK), ("b1", BULK), ("d0", DEFAULT), ("d1", DEFAULT)):
        play.enter(name, rank)
    ticket = play.enter("i", INTERACTIVE)
    assert ticket.state == ADMITTED and names(play.scheduler.take_others()) == ["b1"]
    assert play.tickets["b1"].state == PREEMPTED
    assert play.scheduler.in_flight == [1, 2, 1, 0]
    error = play.scheduler.preempted_error()
    assert (error.status, error.code, error.retry_after_s) == (503, "scheduler_preempted", 1)
    assert ("x-smg-preempted", "true") in error.headers
    assert play.leave("b1") == []  # it has no slot to give back
    assert play.scheduler.in_flight == [1, 2, 1, 0] and play.slots.total == 4
    assert play.scheduler.counts.preemptions == {(BULK, INTERACTIVE): 1}


def test_who_has_sent_a_byte_or_cannot_be_told_gives_way_to_nobody():
    play = Play(capacity=2, rules=BOSS)
    play.enter("a", BULK)
    play.enter("b", BULK)
    play.first_byte("b")
    play.begun.add("a")
    assert play.enter("i", INTERACTIVE).state == WAITING
    play.begun.discard("a")  # now it waits where it can be told
    assert play.after(0.1) == ["a", "i"]
    assert play.tickets["a"].state == PREEMPTED and play.tickets["i"].state == ADMITTED


@pytest.mark.parametrize("running", [INTERACTIVE, SYSTEM])
def test_nobody_gives_way_to_an_equal_or_lower_class(running):
    play = Play(capacity=1, rules=BOSS)
    play.enter("a", running)
    assert play.enter("i", INTERACTIVE).state == WAITING


def test_a_class_that_may_not_preempt_waits():
    play = Play(capacity=1, rules=BOSS)
    play.enter("a", BULK)
    assert play.enter("d", DEFAULT).state == WAITING
    assert play.after(1.0) == []


def test_nobody_gives_way_when_that_helps_nobody():
    play = Play(capacity=1, rules=with_class(BOSS, SYSTEM, reserved_floor=1))
    rules = with_class(BOSS, SYSTEM, reserved_floor=0)
    play.scheduler.configure(rules, 0.0)
    play.enter("a", BULK)
    play.scheduler.configure(with_class(BOSS, SYSTEM, reserved_floor=1), 0.0)
    assert play.enter("i", INTERACTIVE).state == WAITING  # the slot would be the system's
    assert play.tickets["a"].state == ADMITTED


def test_nobody_gives_way_where_prefill_is_the_bound():
    play = Play(capacity=64, workers=1, rules=msgspec.structs.replace(BOSS, prefill_ahead_s=0.25))
    play.enter("b", BULK, cost_s=LONG_S)
    assert play.enter("i", INTERACTIVE).state == WAITING
    assert play.after(1.0) == [] and play.tickets["b"].state == ADMITTED
    assert play.first_byte("b") == ["i"]


def test_a_preempted_client_that_leaves_gives_back_nothing():
    play = Play(capacity=1, rules=BOSS)
    play.enter("b", BULK)
    play.enter("i", INTERACTIVE)
    assert names(play.scheduler.abandon(play.tickets["b"], 0.0)) == []
    assert play.slots.total == 1


# -- reload


def test_a_reload_keeps_who_waits_and_gives_new_deadlines():
    play = Play(capacity=1)
    play.enter("running")
    play.enter("a")
    play.now = 5.0
    assert names(play.scheduler.configure(with_class(PLAIN, DEFAULT, queue_timeout_s=10.0), 5.0)) == []
    assert play.scheduler.next_deadline_s() == 10.0
    assert play.after(4.9) == [] and play.leave("running") == ["a"]


def test_a_reload_that_frees_reserved_slots_lets_the_waiting_go():
    play = Play(capacity=2, rules=with_class(PLAIN, SYSTEM, reserved_floor=2))
    assert play.enter("a").state == WAITING
    assert names(play.scheduler.configure(PLAIN, 0.0)) == ["a"]


def test_a_reload_that_lifts_the_bound_on_prefill_lets_the_waiting_go():
    play = Play(capacity=64, workers=1, rules=WINDOW)
    for n in range(4):
        play.enter(f"{n}", cost_s=LONG_S)
    assert names(play.scheduler.configure(PLAIN, 0.0)) == ["1", "2", "3"]
    play.scheduler.configure(WINDOW, 0.0)
    assert play.enter("again", cost_s=LONG_S).state == WAITING
    for n in range(4):
        assert play.first_byte(f"{n}") == (["again"] if n == 3 else [])


def test_a_gate_that_nobody_uses_is_dropped_with_its_slots():
    play = Play()
    other = play.add_gate(1)
    play.scheduler.drop(other)
    assert play.scheduler.slots == [play.slots]
    play.scheduler.drop(play.gate)
    assert play.scheduler.slots == []
