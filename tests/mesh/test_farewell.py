"""Leaving: known to all at once, never suspected, silent afterwards."""

from __future__ import annotations

from mesh.member import Status
from mesh.messages import LeaveDone
from tests.mesh.swim_play import kinds, machine, mesh_of


def test_a_farewell_is_known_to_all_at_once_and_nobody_suspects() -> None:
    table, swims = mesh_of(5)
    leaver = swims[2]
    leaver.leave(table.now)
    leaver.leave(table.now)
    table.run(0.05)
    assert not leaver.is_running
    assert [event for event in table.events["n2"] if isinstance(event, LeaveDone)] == [LeaveDone(4, 4)]
    others = [swim for swim in swims if swim is not leaver]
    assert all(table.status(swim, "n2") == Status.LEFT for swim in others)
    table.run(60.0)
    for swim in others:
        assert kinds(table.events[swim.own.name]).count("Left") == 1
        assert not {"Suspected", "MemberDown"} & set(kinds(table.events[swim.own.name]))
        assert table.status(swim, "n2") == Status.LEFT


def test_a_lost_farewell_is_repeated_by_stream() -> None:
    table, swims = mesh_of(3)
    table.lost = lambda source, target, by_stream: not by_stream
    swims[2].leave(table.now)
    table.run(0.5)
    assert not swims[2].is_running
    assert table.status(swims[0], "n2") == table.status(swims[1], "n2") == Status.LEFT


def test_a_farewell_nobody_hears_ends_after_a_second() -> None:
    table, swims = mesh_of(3)
    table.cut(swims[2].own.address)
    swims[2].leave(table.now)
    table.run(0.9)
    assert swims[2].is_running
    table.run(0.2)
    assert not swims[2].is_running
    (done,) = [event for event in table.events["n2"] if isinstance(event, LeaveDone)]
    assert (done.told, done.acked) == (2, 0)


def test_alone_one_leaves_at_once() -> None:
    swim = machine("me")
    swim.leave(0.0)
    assert not swim.is_running
    assert swim.next_event() == LeaveDone(0, 0)
    assert swim.deadline() == float("inf")


def test_who_is_gone_hears_and_says_nothing_more() -> None:
    table, swims = mesh_of(3)
    swims[2].leave(table.now)
    table.run(0.1)
    table.sent.clear()
    table.run(30.0)
    assert all(source != swims[2].own.address for source, _, _, _ in table.sent)
    before = swims[2].members()
    swims[2].tick(table.now)
    swims[2].update_own(table.now, meta=b"x")
    assert swims[2].members() == before


def test_a_new_life_after_a_farewell_is_welcome() -> None:
    table, swims = mesh_of(3)
    swims[2].leave(table.now)
    table.run(1.0)
    again = machine("n2", 3, now=table.now, wall_s=1_700_000_009.0, boot=b"again---")
    table.swims[again.own.address] = again
    again.join(["first"], table.now)
    table.run(1.0)
    assert table.agree()
