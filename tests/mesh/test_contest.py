"""One name, two lives, two addresses: the elder stays while it answers."""

from __future__ import annotations

import msgspec

from mesh.contest import CONTESTS_MAX
from mesh.messages import NameConflict, Packet, Ping, SendByStream
from tests.mesh.swim_play import WALL_S, Table, gossip, kinds, machine, mesh_of, record


def _newcomer(table: Table, number: int = 50, wall_s: float = WALL_S + 30):  # type: ignore[no-untyped-def]
    newcomer = machine("n1", number, now=table.now, wall_s=wall_s, boot=b"newcomer")
    table.swims[newcomer.own.address] = newcomer
    newcomer.join(["first"], table.now)
    return newcomer


def test_the_newcomer_is_told_to_stop_while_the_elder_answers() -> None:
    table, swims = mesh_of(3)
    newcomer = _newcomer(table)
    table.run(5.0)
    assert not newcomer.is_running
    (conflict,) = [event for event in table.events["n1"] if isinstance(event, NameConflict)]
    assert conflict.elder.address == swims[1].own.address
    assert conflict.own.address == newcomer.own.address
    assert swims[1].is_running
    member = swims[0].member("n1")
    assert member is not None and member.record.boot == swims[1].own.boot
    assert "MemberDown" not in kinds(table.events["n0"])


def test_the_newcomer_wins_where_the_old_address_fails_one_probe() -> None:
    table, swims = mesh_of(3)
    table.kill(swims[1], refuses=False)
    newcomer = _newcomer(table)
    table.run(1.0)
    for swim in (swims[0], swims[2]):
        member = swim.member("n1")
        assert member is not None and member.record.boot == newcomer.own.boot
    assert newcomer.is_running


def test_a_refusing_old_address_settles_it_at_once() -> None:
    table, swims = mesh_of(3)
    table.kill(swims[1], refuses=True)
    newcomer = _newcomer(table)
    table.run(0.05)
    member = swims[0].member("n1")
    assert member is not None and member.record.boot == newcomer.own.boot


def test_after_a_partition_the_elder_wins_although_the_younger_is_known_on_the_other_side() -> None:
    table, swims = mesh_of(4)
    elder = swims[1]
    table.cut(elder.own.address, swims[3].own.address)
    table.run(10.0)
    younger = _newcomer(table)
    table.run(5.0)
    assert younger.is_running
    table.lost = lambda source, target, by_stream: False
    table.run(30.0)
    assert elder.is_running and not younger.is_running
    for swim in (swims[0], swims[2], swims[3]):
        member = swim.member("n1")
        assert member is not None and member.record.boot == elder.own.boot and member.is_live


def test_checks_under_way_are_bounded_and_one_per_name() -> None:
    swim = machine("me")
    for number in range(CONTESTS_MAX + 10):
        swim.receive(gossip(record(f"x{number}", 100 + number)), ("10.0.0.9", 7946), 0.0)
    swim.packets_to_send(0.0)
    for _ in range(2):
        for number in range(CONTESTS_MAX + 10):
            other = record(f"x{number}", 150 + number, WALL_S + 5, b"other---")
            swim.receive(gossip(other), ("10.0.0.9", 7946), 0.0)
    checks = [
        packet.body.target_name
        for _, packet in swim.packets_to_send(0.0)
        if isinstance(packet, Packet)
        and isinstance(packet.body, Ping)
        and packet.body.target_name != "stranger"
    ]
    assert len(checks) == len(set(checks)) == CONTESTS_MAX


def test_a_conflict_that_is_not_about_us_stops_nobody() -> None:
    from mesh.messages import Conflict
    from tests.mesh.swim_play import NEWS_HEAD

    swim = machine("me", wall_s=WALL_S)
    own = swim.own
    older = record("me", 9, WALL_S - 50, b"older---")
    younger = record("me", 9, WALL_S + 50, b"younger-")
    lies = [
        Conflict(older, younger),
        Conflict(younger, own),
        Conflict(own, own),
        Conflict(msgspec.structs.replace(older, name="you"), own),
    ]
    for lie in lies:
        swim.receive(Packet(NEWS_HEAD, lie), ("10.0.0.9", 7946), 0.0)
        assert swim.is_running
    swim.receive(Packet(NEWS_HEAD, Conflict(older, own)), ("10.0.0.9", 7946), 0.0)
    assert not swim.is_running
    assert swim.deadline() == float("inf")


def test_a_namesake_with_a_slower_clock_is_answered_on_its_own_stream_and_stops() -> None:
    """Its record outranks nothing, so it hears of the elder only by the answer to its table."""
    table, swims = mesh_of(3)
    swims[1].update_own(table.now, meta=b"x")
    table.run(1.0)
    newcomer = machine("n1", 50, now=table.now, wall_s=WALL_S - 30, boot=b"newcomer")
    swims[0].merge_table(newcomer.tables(table.now)[0], newcomer.own.address, table.now)
    (reply,) = swims[0].effects()
    assert isinstance(reply, SendByStream)
    assert (reply.peer, reply.address) == (None, newcomer.own.address)
