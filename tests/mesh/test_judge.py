"""What becomes true: transitions of the member table by rumor, by table and by our own observation."""

from __future__ import annotations

from random import Random

import msgspec
import pytest

from mesh.awareness import Awareness
from mesh.codec import news_bytes
from mesh.judge import Judge, Outcome
from mesh.member import Accusation, Member, Record, Status, first_incarnation
from mesh.messages import ClockAhead, Forgotten, Left, MemberChanged, MemberDown, MemberUp, OwnOutranked
from mesh.own import Own
from mesh.roster import Roster
from mesh.rumors import Rumors
from mesh.settings import SwimSettings
from mesh.timers import Timers
from tests.mesh.swim_play import WALL_S, kinds, record


class Court:
    """A judge with its rooms around it."""

    def __init__(self, settings: SwimSettings | None = None, others: int = 0) -> None:
        self.settings = settings or SwimSettings()
        self.own = Own(record("me"))
        self.roster = Roster(self.settings.members_max, self.own.record, Random(1))
        self.rumors = Rumors("me", news_bytes)
        self.awareness = Awareness(self.settings)
        self.timers = Timers()
        self.judge = Judge(
            self.settings, self.own, self.roster, self.rumors, self.awareness, self.timers, WALL_S
        )
        for number in range(others):
            self.judge.hear(record(f"o{number}", 100 + number), 0.0)
        self.judge.events.clear()

    def hears(self, *news: Record | Accusation, now: float = 1.0) -> list[Outcome]:
        return [self.judge.hear(each, now) for each in news]

    def status(self, name: str) -> Status:
        return self.member(name).status

    def member(self, name: str) -> Member:
        member = self.roster.get(name)
        assert member is not None
        return member

    def kinds(self) -> list[str]:
        found = kinds(list(self.judge.events))
        self.judge.events.clear()
        return found


def doubt(about: Record, accuser: str = "a", status: Status = Status.SUSPECT, plus: int = 0) -> Accusation:
    return Accusation(about.name, about.boot, about.incarnation + plus, status, accuser)


def raised(about: Record, plus: int = 1, **changes: object) -> Record:
    return msgspec.structs.replace(about, incarnation=about.incarnation + plus, **changes)


X = record("x", 7)
X_REBORN = record("x", 7, WALL_S + 60, b"reborn--")


def test_a_life_runs_up_suspect_cleared_suspect_down_and_up_again() -> None:
    court = Court()
    assert court.hears(X, X) == [Outcome.NEWS, Outcome.STALE]
    assert court.hears(doubt(X)) == [Outcome.NEWS]
    assert court.hears(X) == [Outcome.STALE]
    assert court.hears(raised(X)) == [Outcome.NEWS]
    assert court.hears(doubt(X), doubt(X, status=Status.DEAD)) == [Outcome.STALE] * 2
    assert court.hears(doubt(X, plus=1), doubt(X, plus=1, status=Status.DEAD)) == [Outcome.NEWS] * 2
    assert court.hears(doubt(X, plus=1), raised(X)) == [Outcome.STALE] * 2
    assert court.hears(X_REBORN) == [Outcome.NEWS]
    assert court.kinds() == ["MemberUp", "Suspected", "Cleared", "Suspected", "MemberDown", "MemberUp"]
    assert court.status("x") == Status.ALIVE


def test_a_suspicion_that_nobody_refutes_becomes_a_death_by_its_timer() -> None:
    court = Court()
    court.hears(X, doubt(X), now=1.0)
    court.timers.run(2.0)
    assert court.status("x") == Status.SUSPECT
    court.timers.run(3.0)
    assert court.status("x") == Status.DEAD
    assert court.judge.suspicion_count() == 0
    (down,) = [event for event in court.judge.events if isinstance(event, MemberDown)]
    assert down.accuser == "me"


def test_confirmations_shorten_the_timer_and_are_told_on() -> None:
    court = Court(others=9)
    court.hears(X, doubt(X, "o1"), now=0.0)
    assert court.hears(doubt(X, "o2"), doubt(X, "o2"), doubt(X, "o3"), doubt(X, "o4")) == [
        Outcome.NEWS,
        Outcome.STALE,
        Outcome.NEWS,
        Outcome.STALE,
    ]
    court.timers.run(2.0)
    assert court.status("x") == Status.DEAD


def test_after_a_freeze_of_our_own_nobody_is_declared_dead_for_a_second() -> None:
    court = Court()
    court.hears(X, doubt(X), now=0.0)
    court.awareness.note_lag(3.0, 5.0)
    court.timers.run(5.0)
    assert court.status("x") == Status.SUSPECT
    court.timers.run(6.0)
    assert court.status("x") == Status.DEAD


def test_a_refusing_port_brings_the_death_forward() -> None:
    court = Court()
    court.hears(X, now=0.0)
    court.judge.accuse(court.member("x"), 0.1, has_eof=True)
    court.judge.condemn(court.member("x"), 0.4, 0.1)
    court.timers.run(0.39)
    assert court.status("x") == Status.SUSPECT
    court.timers.run(0.4)
    assert court.status("x") == Status.DEAD


def test_left_is_final_for_its_life_and_told_once() -> None:
    court = Court()
    court.hears(X)
    farewell = doubt(X, "x", Status.LEFT)
    assert court.hears(farewell, farewell) == [Outcome.NEWS, Outcome.STALE]
    assert court.hears(doubt(X), doubt(X, status=Status.DEAD), X) == [Outcome.STALE] * 3
    assert court.kinds() == ["MemberUp", "Left"]
    court.hears(X_REBORN)
    assert isinstance(court.judge.events[-1], MemberUp) and court.judge.events[-1].is_restart


def test_a_farewell_heard_after_the_death_still_counts() -> None:
    court = Court()
    court.hears(X, doubt(X, status=Status.DEAD), doubt(X, "x", Status.LEFT))
    assert court.status("x") == Status.LEFT
    assert isinstance(court.judge.events[-1], Left)


def test_accusations_of_strangers_and_of_lives_never_met_say_nothing() -> None:
    court = Court()
    assert court.hears(doubt(X)) == [Outcome.STALE]
    court.hears(X)
    assert court.hears(doubt(X_REBORN)) == [Outcome.STALE]
    assert court.hears(doubt(X_REBORN, status=Status.DEAD)) == [Outcome.NEWS]
    assert court.status("x") == Status.DEAD and court.member("x").record.boot == X_REBORN.boot


def test_a_restart_on_the_same_address_wins_at_once() -> None:
    court = Court()
    court.hears(X)
    assert court.hears(X_REBORN) == [Outcome.NEWS]
    assert court.kinds() == ["MemberUp", "MemberUp"]


def test_a_second_life_elsewhere_is_contested_while_the_first_seems_alive() -> None:
    court = Court()
    court.hears(X)
    elsewhere = msgspec.structs.replace(X_REBORN, host="10.0.9.9")
    assert court.hears(elsewhere) == [Outcome.CONTESTED]
    assert court.member("x").record == X
    assert court.judge.hear_record(elsewhere, 1.0, is_uncontested=True) is Outcome.NEWS
    court = Court()
    court.hears(X, doubt(X, status=Status.DEAD))
    assert court.hears(elsewhere) == [Outcome.NEWS]


def test_news_within_a_life_is_a_change_not_a_rise() -> None:
    court = Court()
    court.hears(X)
    court.kinds()
    court.hears(raised(X, 1, meta=b"v2"))
    assert isinstance(court.judge.events[-1], MemberChanged)
    court.judge.events.clear()
    court.hears(raised(X, 2, meta=b"v2"))
    assert court.kinds() == []


def test_we_refute_what_is_said_of_us_and_only_doubt_counts_against_our_health() -> None:
    court = Court()
    own = court.own.record
    assert court.hears(doubt(own)) == [Outcome.OWN_REFUTED]
    assert court.own.record.incarnation == own.incarnation + 1
    assert court.awareness.score == 1
    assert court.hears(doubt(own)) == [Outcome.STALE]
    assert court.hears(doubt(court.own.record, status=Status.DEAD)) == [Outcome.OWN_REFUTED]
    assert court.awareness.score == 1
    assert court.hears(doubt(court.own.record, status=Status.LEFT)) == [Outcome.OWN_REFUTED]
    assert "me" in court.rumors


def test_incarnation_does_not_increase_for_a_stale_suspicion() -> None:
    court = Court()
    own = court.own.record
    assert court.hears(doubt(own, plus=-1)) == [Outcome.STALE]
    assert court.own.record == own


def test_we_outrank_a_former_life_of_ours_that_had_a_faster_clock() -> None:
    court = Court()
    former = record("me", 1, WALL_S + 100, b"former--")
    assert court.hears(former) == [Outcome.OWN_REFUTED]
    assert court.own.record.incarnation == former.incarnation + 1
    elsewhere = msgspec.structs.replace(record("me", 1, WALL_S + 200, b"other---"), host="10.0.9.9")
    assert court.hears(elsewhere) == [Outcome.OWN_CONTESTED]


def test_a_life_from_the_future_is_refused_and_reported_once_a_minute() -> None:
    court = Court()
    future = record("f", 9, WALL_S + 700)
    assert court.hears(future, future) == [Outcome.REFUSED] * 2
    (complaint,) = court.judge.events
    assert isinstance(complaint, ClockAhead)
    assert complaint.their_s == int(WALL_S + 700) and complaint.our_s == WALL_S + 1.0
    assert court.judge.counts["refused_clock"] == 2
    court.hears(X)
    late = Accusation("x", X.boot, first_incarnation(WALL_S + 700), Status.DEAD, "a")
    own = Accusation("me", b"whatever", first_incarnation(WALL_S + 700), Status.DEAD, "a")
    assert court.hears(late, own) == [Outcome.REFUSED] * 2
    assert court.status("x") == Status.ALIVE
    court.judge.set_wall_offset(WALL_S + 200)
    assert court.hears(future) == [Outcome.NEWS]


@pytest.mark.parametrize("host", ["0.0.0.0", "::", ""])
def test_an_address_nobody_can_dial_is_refused(host: str) -> None:
    court = Court()
    assert court.hears(msgspec.structs.replace(X, host=host)) == [Outcome.REFUSED]
    assert court.judge.counts["refused_host"] == 1


def test_a_full_table_gives_up_its_oldest_tombstone_and_then_refuses() -> None:
    court = Court(SwimSettings(members_max=3))
    names = [record(name, number) for number, name in enumerate("abc", 1)]
    court.hears(*names)
    court.hears(doubt(names[1], status=Status.DEAD), now=2.0)
    court.hears(doubt(names[0], status=Status.DEAD), now=3.0)
    assert court.hears(record("d", 8)) == [Outcome.NEWS]
    assert court.roster.get("b") is None
    assert any(isinstance(event, Forgotten) and event.record.name == "b" for event in court.judge.events)
    assert "b" not in court.rumors
    assert court.hears(record("e", 9), record("f", 10)) == [Outcome.NEWS, Outcome.REFUSED]
    assert court.judge.counts["refused_full"] == 1
    assert len(court.roster) == 3


def test_tombstones_are_forgotten_at_their_age() -> None:
    court = Court()
    court.hears(X, doubt(X, status=Status.DEAD), now=10.0)
    court.judge.forget_old(10.0 + 24 * 3600 - 1)
    assert court.roster.get("x") is not None
    court.judge.forget_old(10.0 + 24 * 3600)
    assert court.roster.get("x") is None


# -- tables


def entry(about: Record, status: Status, down_s: int = 0) -> Record:
    return msgspec.structs.replace(about, status=status, down_s=down_s)


def test_their_dead_are_not_dead_here_but_doubted() -> None:
    court = Court()
    court.hears(X)
    assert court.judge.hear_entry(entry(X, Status.DEAD), "a", 1.0) is Outcome.DOUBTED
    assert court.status("x") == Status.ALIVE
    assert court.judge.hear_entry(entry(raised(X, -1), Status.DEAD), "a", 1.0) is Outcome.STALE


def test_their_dead_confirm_our_own_doubt() -> None:
    court = Court(others=5)
    court.hears(X, doubt(X, "o1"), now=0.0)
    for sender in ("o2", "o3"):
        assert court.judge.hear_entry(entry(X, Status.DEAD), sender, 0.0) is Outcome.DOUBTED
    court.timers.run(2.0)
    assert court.status("x") == Status.DEAD


def test_hearsay_of_a_doubt_does_not_confirm_it() -> None:
    court = Court(others=9)
    court.hears(X, doubt(X, "o1"), now=0.0)
    for sender in ("o2", "o3"):
        assert court.judge.hear_entry(entry(X, Status.SUSPECT), sender, 0.0) is Outcome.STALE
    court.timers.run(5.0)
    assert court.status("x") == Status.SUSPECT


def test_their_suspect_and_their_left_are_ours() -> None:
    court = Court()
    court.judge.hear_entry(entry(X, Status.SUSPECT), "a", 1.0)
    assert court.kinds() == ["MemberUp", "Suspected"]
    court.judge.hear_entry(entry(X, Status.LEFT), "a", 1.0)
    assert court.status("x") == Status.LEFT


def test_tombstones_of_strangers_are_learned_quietly_with_their_age() -> None:
    court = Court()
    assert court.judge.hear_entry(entry(X, Status.DEAD, 3600), "a", 10.0) is Outcome.NEWS
    assert court.kinds() == [] and len(court.rumors) == 0
    assert court.member("x").since_s == 10.0 - 3600
    old = entry(record("y", 8), Status.LEFT, 24 * 3600)
    assert court.judge.hear_entry(old, "a", 10.0) is Outcome.STALE
    assert court.roster.get("y") is None


def test_our_own_death_in_a_table_is_refuted() -> None:
    court = Court()
    assert court.judge.hear_entry(entry(court.own.record, Status.DEAD), "a", 1.0) is Outcome.OWN_REFUTED


# -- what a speaker must hear


def test_whoever_claims_an_outranked_life_is_told_so() -> None:
    court = Court()
    court.hears(X)
    tell = court.judge.accusation_for
    assert tell("x", X.boot, X.incarnation) is None
    assert tell("y", X.boot, 1) is None
    assert tell("x", b"older---", X.incarnation - 5) == X
    court.hears(doubt(X, status=Status.DEAD))
    assert tell("x", X.boot, X.incarnation) == doubt(X, "me", Status.DEAD)
    assert tell("x", X.boot, X.incarnation + 1) is None


def test_the_end_of_a_life_never_met_is_told_as_up_and_down_with_its_birth() -> None:
    court = Court()
    court.hears(X)
    court.kinds()
    court.hears(doubt(X_REBORN, status=Status.DEAD))
    up, down = court.judge.events
    assert isinstance(up, MemberUp) and up.is_restart and isinstance(down, MemberDown)
    assert up.record.boot == down.record.boot == X_REBORN.boot
    assert up.record.born_s == down.record.born_s == X_REBORN.born_s
    assert (up.record.status, down.record.status) == (Status.ALIVE, Status.DEAD)


def test_a_farewell_of_a_stranger_in_a_table_is_told_because_what_it_kept_must_go() -> None:
    court = Court()
    court.judge.hear_entry(entry(X, Status.LEFT, 60), "a", 100.0)
    assert court.kinds() == ["Left"]


def test_who_was_outranked_by_another_life_says_so() -> None:
    court = Court()
    former = record("me", 1, WALL_S + 100, b"former--")
    court.hears(former, doubt(court.own.record, plus=1 << 30))
    (event,) = [each for each in court.judge.events if isinstance(each, OwnOutranked)]
    assert event == OwnOutranked(b"former--", former.incarnation + 1)
