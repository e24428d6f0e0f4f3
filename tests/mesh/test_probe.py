"""The failure detector in plays: ping, time-out, helpers, streams, evidence, and who must not be accused."""

from __future__ import annotations

from mesh.member import Status
from mesh.messages import Ack, Gossip, Nack, Packet, Ping, PingReq, SendByStream
from mesh.settings import SwimSettings
from tests.mesh.swim_play import Table, kinds, machine, mesh_of, record


def bodies(
    table: Table, kind: type, by_stream: bool | None = None
) -> list[tuple[tuple[str, int], tuple[str, int]]]:
    return [
        (source, target)
        for source, target, message, is_stream in table.sent
        if isinstance(message, Packet) and isinstance(message.body, kind) and by_stream in (None, is_stream)
    ]


def test_each_member_is_pinged_once_per_round_and_answers() -> None:
    table, swims = mesh_of(4)
    table.sent.clear()
    table.run(6.0)
    own = swims[0].own.address
    pings = [target for source, target in bodies(table, Ping) if source == own]
    assert 11 <= len(pings) <= 13
    assert {pings.count(swim.own.address) for swim in swims[1:]} <= {3, 4, 5}
    assert len(bodies(table, Ack)) == len(bodies(table, Ping))
    assert not bodies(table, PingReq)


def test_a_silent_member_is_asked_for_by_helpers_and_by_stream_before_it_is_suspected() -> None:
    table, swims = mesh_of(5)
    victim = swims[4].own.address
    table.kill(swims[4], refuses=False)
    table.sent.clear()
    table.run(1.0)
    first = next(source for source, target in bodies(table, PingReq))
    asked = [target for source, target in bodies(table, PingReq) if source == first]
    assert len(set(asked)) == 3 and victim not in asked
    assert (first, victim) in bodies(table, Ping, by_stream=True)
    assert bodies(table, Nack)
    assert "Suspected" in kinds(table.events["n0"])


def test_one_lost_direction_is_bridged_by_helpers() -> None:
    table, swims = mesh_of(4, SwimSettings(stream_probe=False))
    a, b = swims[0].own.address, swims[1].own.address
    table.lost = lambda source, target, by_stream: {source, target} == {a, b}
    table.run(30.0)
    assert table.agree()
    assert "Suspected" not in kinds(table.events["n0"] + table.events["n2"])


def test_with_udp_blocked_streams_carry_the_probes_and_nobody_is_suspected() -> None:
    table, swims = mesh_of(3)
    table.lost = lambda source, target, by_stream: not by_stream
    table.run(30.0)
    assert all("Suspected" not in kinds(found) for found in table.events.values())
    member = swims[0].member("n1")
    assert member is not None and member.stream_only
    table.sent.clear()
    table.run(5.0)
    assert not bodies(table, PingReq), "helpers cannot help where UDP is blocked"
    table.lost = lambda source, target, by_stream: False
    table.run(5.0)
    assert not member.stream_only, "the datagram that is still sent notices that the way is free"


def test_with_udp_blocked_a_ping_that_is_lost_with_its_stream_is_sent_again_before_anybody_is_suspected() -> (
    None
):
    table, _ = mesh_of(3)
    table.lost = lambda source, target, by_stream: not by_stream
    table.run(20.0)
    asked: set[int] = set()

    def first_is_lost(source: tuple[str, int], target: tuple[str, int], by_stream: bool) -> bool:
        message = table.sent[-1][2]
        if not by_stream or not isinstance(message, Packet) or not isinstance(message.body, Ping):
            return not by_stream
        is_first = message.body.seq not in asked
        asked.add(message.body.seq)
        return is_first

    table.lost = first_is_lost
    table.run(20.0)
    assert len(asked) > 60
    assert all("Suspected" not in kinds(found) for found in table.events.values())


def test_with_udp_blocked_rumors_go_by_stream_too() -> None:
    table, swims = mesh_of(3)
    table.lost = lambda source, target, by_stream: not by_stream
    table.run(20.0)
    table.sent.clear()
    swims[0].update_own(table.now, meta=b"news")
    table.run(0.2)
    assert bodies(table, Gossip, by_stream=True)
    assert all(swim.member("n0").record.meta == b"news" for swim in swims[1:])  # type: ignore[union-attr]


def test_the_end_of_a_stream_is_only_a_hint() -> None:
    table, swims = mesh_of(3)
    swims[0].stream_closed("n1", swims[1].own.boot, table.now)
    table.sent.clear()
    table.run(5.0)
    assert (swims[0].own.address, swims[1].own.address) in bodies(table, Ping, by_stream=True)
    assert "Suspected" not in kinds(table.events["n0"])
    swims[0].stream_closed("n1", b"old life", table.now)
    swims[0].stream_closed("nobody", b"old life", table.now)
    assert swims[0].packets_to_send(table.now) == []


def test_a_killed_process_whose_port_refuses_is_dead_within_half_a_second() -> None:
    for count in (2, 3, 5):
        table, swims = mesh_of(count)
        victim = swims[-1]
        table.kill(victim)
        for swim in swims[:-1]:
            swim.stream_closed(victim.own.name, victim.own.boot, table.now)
        table.run(0.5)
        assert [table.status(swim, victim.own.name) for swim in swims[:-1]] == [Status.DEAD] * (count - 1)


def test_one_node_to_whom_a_port_refuses_does_not_kill_alone() -> None:
    """A firewall that rejects one peer: the helper's dial is not refused."""
    table, swims = mesh_of(3)
    observer, other = swims[0], swims[1]
    observer.stream_closed("n1", other.own.boot, table.now)
    for effect in observer.effects():
        assert isinstance(effect, SendByStream)
        observer.dial_failed(effect.address, True, table.now)
    table.lost = lambda source, target, by_stream: (
        {source, target} == {observer.own.address, other.own.address}
    )
    table.run(5.0)
    assert "MemberDown" not in kinds(table.events["n0"])


def test_without_the_refused_rule_the_suspicion_runs_its_shorter_course() -> None:
    table, swims = mesh_of(3, SwimSettings(refused_rule=False))
    table.kill(swims[2])
    start_s = table.now
    for swim in swims[:2]:
        swim.stream_closed("n2", swims[2].own.boot, table.now)
    table.run(1.0)
    assert table.status(swims[0], "n2") == Status.SUSPECT
    table.run(1.0)
    assert table.status(swims[0], "n2") == Status.DEAD
    assert table.now - start_s <= 2.1


def test_missing_nacks_count_against_our_own_health_and_answers_heal_it() -> None:
    table, swims = mesh_of(4)
    lonely = swims[0]
    table.cut(lonely.own.address)
    table.run(4.0)
    assert lonely.health >= 3
    table.lost = lambda source, target, by_stream: False
    table.run(40.0)
    assert lonely.health == 0


def test_the_accused_is_told_by_whoever_pings_it() -> None:
    table, swims = mesh_of(3)
    accused = swims[2]
    swims[0]._judge.accuse(swims[0].member("n2"), table.now)  # type: ignore[arg-type]
    before = accused.own.incarnation
    table.run(0.6)
    assert accused.own.incarnation == before + 1
    assert table.status(swims[0], "n2") == Status.ALIVE


def test_a_round_during_which_our_loop_was_late_accuses_nobody() -> None:
    table, swims = mesh_of(3)
    sleeper = swims[0]
    late = sleeper.deadline() + 0.45
    table.now = late
    sleeper.tick(late)
    assert sleeper.health == 1
    assert sleeper.lag_ms(late) > 100
    assert "Suspected" not in kinds(table.events["n0"])


def test_helpers_are_bounded_and_a_request_about_ourselves_is_ignored() -> None:
    from mesh.probe import RELAYS_MAX

    swim = machine("me")
    peer = record("peer", 2)
    from tests.mesh.swim_play import NEWS_HEAD

    for seq in range(RELAYS_MAX + 50):
        request = PingReq(seq, "x", b"12345678", 1, "10.9.9.9", 7946, False)
        swim.receive(Packet(NEWS_HEAD, request), peer.address, 0.0)
    pings = [packet for _, packet in swim.packets_to_send(0.0) if isinstance(packet.body, Ping)]
    assert sum(packet.body.target_name == "x" for packet in pings) == RELAYS_MAX  # type: ignore[union-attr]
    about_us = PingReq(1, "me", b"12345678", 1, "10.0.0.1", 7946, True)
    swim.receive(Packet(NEWS_HEAD, about_us), peer.address, 0.0)
    assert not any(isinstance(effect, SendByStream) for effect in swim.effects())


def test_evidence_survives_a_loop_that_was_late() -> None:
    """Its stream ended while our loop was held up: the round is void, but asked again, and the port still refuses."""
    table, swims = mesh_of(3)
    victim, observer = swims[2], swims[0]
    table.kill(victim)
    start_s = table.now
    observer.stream_closed("n2", victim.own.boot, start_s)
    observer.packets_to_send(start_s)
    observer.effects()  # said, but no answer is there when the loop was late
    table.now = start_s + 0.2
    observer.loop_lag(0.15, table.now)
    table.run(0.5)
    assert table.status(observer, "n2") == Status.DEAD
    assert table.now - start_s <= 0.75
