"""Tables on their way: push-pull, repair by fingerprint, and the re-dial that heals partitions of any length."""

from __future__ import annotations

import pytest

from mesh.codec import TABLE_RECORDS_MAX
from mesh.exchange import REPAIR_SLOWEST_S
from mesh.member import Status
from mesh.messages import TablePull, TablePush
from mesh.settings import SwimSettings
from tests.mesh.swim_play import WALL_S, Table, gossip, machine, mesh_of, record


def _tables(table: Table, kind: type = TablePush) -> list[tuple[float, tuple[str, int], tuple[str, int]]]:
    return [(0.0, source, target) for source, target, message, _ in table.sent if isinstance(message, kind)]


def test_a_table_is_pushed_every_half_minute_and_answered() -> None:
    table, swims = mesh_of(3)
    table.sent.clear()
    table.run(300.0)
    pushes = [target for _, source, target in _tables(table) if source == swims[0].own.address]
    assert 8 <= len(pushes) <= 12
    assert len(_tables(table, TablePull)) == len(_tables(table))


def test_what_rumors_missed_is_repaired_soon_after_an_ack_shows_another_fingerprint() -> None:
    table, swims = mesh_of(3)
    table.run(3.0)
    swims[0].receive(gossip(record("late", 50)), ("10.0.0.50", 7946), table.now)
    swims[0]._rumors.clear()
    swims[0].packets_to_send(table.now)
    table.run(4.0)
    assert all(swim.member("late") is not None for swim in swims)


def test_a_difference_that_stays_is_asked_about_ever_more_rarely() -> None:
    """n0 holds a life from what is the future for the others: they refuse it, whatever it sends."""
    table, swims = mesh_of(3)
    swims[0].clock(1_700_001_000.0, 0.0)
    swims[0].receive(gossip(record("future", 50, 1_700_001_500.0)), ("10.0.0.50", 7946), table.now)
    assert swims[0].member("future") is not None
    table.lost = lambda source, target, by_stream: target == ("10.0.0.50", 7946)
    swims[0]._judge.condemn(swims[0].member("future"), 1e9, table.now)  # type: ignore[arg-type]
    table.run(60.0)
    table.sent.clear()
    start_s = table.now
    table.run(300.0)
    pushes = len(_tables(table))
    assert pushes <= 3 * (300.0 / REPAIR_SLOWEST_S + 300.0 / 25.0 + 300.0 / 5.0)
    assert swims[1].member("future") is None
    assert table.now == start_s + 300.0


@pytest.mark.parametrize("cut_s", [20.0, 3600.0])
def test_a_partition_of_any_length_heals(cut_s: float) -> None:
    table, swims = mesh_of(4)
    table.cut(swims[0].own.address, swims[1].own.address)
    # each side still hears itself
    side = {swims[0].own.address, swims[1].own.address}
    table.lost = lambda source, target, by_stream: (source in side) != (target in side)
    table.run(cut_s)
    assert table.status(swims[0], "n3") == Status.DEAD == table.status(swims[3], "n0")
    assert table.status(swims[0], "n1") == Status.ALIVE == table.status(swims[3], "n2")
    table.lost = lambda source, target, by_stream: False
    table.run(10.0)
    assert table.agree()
    assert all(swim.health == 0 for swim in swims)


def test_without_a_re_dial_a_partition_never_heals() -> None:
    swims = [machine(f"n{number}", number + 1, SwimSettings(redial_interval_s=0.0)) for number in range(4)]
    table = Table(*swims)
    for swim in swims[1:]:
        swim.merge_table(
            swims[0].tables(0.0)[0], swims[0].own.address, 0.0
        )  # no seeds: nobody is dialled for ever
    table.run(2.0)
    assert table.agree()
    side = {swims[0].own.address, swims[1].own.address}
    table.lost = lambda source, target, by_stream: (source in side) != (target in side)
    table.run(30.0)
    table.lost = lambda source, target, by_stream: False
    table.run(60.0)
    assert not table.agree()


def test_many_tombstones_are_all_dialled_within_a_minute_and_no_faster_than_ten_a_second() -> None:
    swim = machine("me")
    from tests.mesh.test_judge import doubt

    dead = [record(f"d{number}", number % 250 + 2) for number in range(40)]
    for each in dead:
        swim.receive(gossip(each, doubt(each, status=Status.DEAD)), ("10.0.0.99", 7946), 0.0)
    dialled: set[str] = set()
    while swim.deadline() <= 66.0:
        swim.tick(swim.deadline())
        dialled.update(effect.peer for effect in swim.effects() if effect.peer)  # type: ignore[union-attr]
        swim.packets_to_send(0.0)
    assert dialled == {each.name for each in dead}


def test_nobody_is_dialled_where_someone_else_lives_now() -> None:
    swim = machine("me")
    from tests.mesh.test_judge import doubt

    gone = record("gone", 9)
    swim.receive(gossip(gone, doubt(gone, status=Status.DEAD)), ("10.0.0.9", 7946), 0.0)
    swim.receive(gossip(record("heir", 9)), ("10.0.0.9", 7946), 0.0)
    while swim.deadline() <= 20.0:
        now = swim.deadline()
        swim.tick(now)
        swim.packets_to_send(now)
        assert all(getattr(effect, "peer", None) != "gone" for effect in swim.effects())
        swim.receive(
            gossip(record("heir", 9, WALL_S + 1 + now)), ("10.0.0.9", 7946), now
        )  # it refutes all doubt


def test_a_large_table_travels_in_slices_and_only_the_last_wants_a_reply() -> None:
    swim = machine("me")
    for number in range(TABLE_RECORDS_MAX + 10):
        swim.receive(gossip(record(f"x{number}", number % 250 + 2)), ("10.0.0.2", 7946), 0.0)
    tables = swim.tables(1.0)
    assert [len(table.records) for table in tables] == [TABLE_RECORDS_MAX, 11]
    assert [table.wants_reply for table in tables] == [False, True]


def test_tombstones_travel_with_their_age() -> None:
    from tests.mesh.test_judge import doubt

    swim, other = machine("me", 1), machine("other", 2)
    gone = record("gone", 9)
    swim.receive(gossip(gone, doubt(gone, status=Status.DEAD)), ("10.0.0.9", 7946), 0.0)
    for table in swim.tables(1000.0):
        other.merge_table(table, swim.own.address, 50.0)
    member = other.member("gone")
    assert member is not None and member.status == Status.DEAD
    assert member.since_s == 50.0 - 1000.0


def test_a_newborn_that_others_find_first_asks_for_a_table_at_once() -> None:
    table, swims = mesh_of(8)
    newborn = machine("new", 50, now=table.now)
    table.swims[newborn.own.address] = newborn
    swims[0].receive(gossip(newborn.own), newborn.own.address, table.now)
    table.run(1.0)
    assert table.agree()
