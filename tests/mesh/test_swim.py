"""The machine as a whole: joining, telling, restarting, freezing, and the face a shell sees."""

from __future__ import annotations

from random import Random

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mesh.errors import SettingsError
from mesh.member import Accusation, Status
from mesh.messages import Ack, Gossip, MemberUp, Nack, Packet, Ping, PingReq, Source, TablePull, TablePush
from mesh.settings import SwimSettings
from mesh.swim import Swim
from tests.mesh.swim_play import WALL_S, Table, events, gossip, kinds, machine, mesh_of, record


def test_a_joiner_learns_all_and_all_learn_it() -> None:
    table, swims = mesh_of(5)
    joiner = machine("new", 50, now=table.now)
    table.swims[joiner.own.address] = joiner
    joiner.join(["first"], table.now)
    table.run(0.5)
    assert table.agree()
    assert {swim.fingerprint for swim in table.swims.values()} == {joiner.fingerprint}
    assert all(kinds(table.events[swim.own.name]) == ["MemberUp"] for swim in swims)


def test_an_update_reaches_all_and_is_a_change() -> None:
    table, swims = mesh_of(5)
    swims[0].update_own(table.now, meta=b"v2", key_ids=(1, 2), features=4, address=("10.0.0.77", 7000))
    table.swims[("10.0.0.77", 7000)] = table.swims.pop(("10.0.0.1", 7946))
    table.run(0.3)
    for swim in swims[1:]:
        member = swim.member("n0")
        assert member is not None
        assert (member.record.meta, member.record.key_ids, member.record.features) == (b"v2", (1, 2), 4)
        assert member.address == ("10.0.0.77", 7000)
        assert kinds(table.events[swim.own.name]) == ["MemberChanged"]


def test_an_update_that_changes_nothing_says_nothing_and_a_bad_one_is_refused() -> None:
    swim = machine("me")
    before = swim.own
    swim.update_own(0.0, meta=before.meta)
    assert swim.own is before
    with pytest.raises(SettingsError):
        swim.update_own(0.0, address=("0.0.0.0", 1))
    assert swim.own is before


def test_a_restart_outranks_its_dead_self_at_once() -> None:
    table, swims = mesh_of(3)
    table.kill(swims[2])
    for swim in swims[:2]:
        swim.stream_closed("n2", swims[2].own.boot, table.now)
    table.run(1.0)
    assert table.status(swims[0], "n2") == Status.DEAD
    again = machine("n2", 3, now=table.now, wall_s=WALL_S + 3, boot=b"again---")
    table.refuses.clear()
    table.swims[again.own.address] = again
    again.join(["first"], table.now)
    table.run(0.5)
    assert table.agree()
    ups = [event for event in table.events["n0"] if isinstance(event, MemberUp)]
    assert [event.is_restart for event in ups] == [True]


@pytest.mark.parametrize("is_dead_first", [False, True])
def test_a_restart_with_a_clock_behind_its_former_life_takes_known_plus_one(is_dead_first: bool) -> None:
    table, swims = mesh_of(3)
    table.kill(swims[2])
    if is_dead_first:
        for swim in swims[:2]:
            swim.stream_closed("n2", swims[2].own.boot, table.now)
        table.run(1.0)
    again = machine("n2", 3, now=table.now, wall_s=WALL_S - 90, boot=b"again---")
    table.refuses.clear()
    table.swims[again.own.address] = again
    again.join(["first"], table.now)
    table.run(2.0)
    assert table.agree()
    assert again.own.incarnation > swims[2].own.incarnation
    member = swims[0].member("n2")
    assert member is not None and member.record.boot == b"again---"


def test_a_frozen_node_kills_nobody_when_it_wakes() -> None:
    table, swims = mesh_of(5)
    sleeper = swims[0]
    del table.swims[sleeper.own.address]
    table.run(1.5)
    table.swims[sleeper.own.address] = sleeper
    table.run(5.0)
    assert not {"MemberDown"} & set(kinds(table.events["n0"]))
    assert table.agree()
    assert all("MemberDown" not in kinds(found) for found in table.events.values())


def test_a_stranger_who_gossips_is_asked_who_it_is_once_a_second() -> None:
    swim = machine("me")
    source = Source("stranger", b"s" * 8, record("stranger").incarnation, 0)
    for now in (0.0, 0.1, 0.2, 1.1):
        swim.receive(gossip(source=source), ("10.0.0.9", 7946), now)
    asked = [packet.body for _, packet in swim.packets_to_send(1.1)]
    assert [body.target_name for body in asked if isinstance(body, Ping)] == ["stranger"] * 2


def test_a_pinger_we_do_not_know_is_told_so_and_introduces_itself() -> None:
    one, other = machine("one", 1), machine("other", 2)
    table = Table(one, other)
    one.receive(
        Packet(Source("other", other.own.boot, other.own.incarnation, 0), Ping(7, "one", b"", 0)),
        other.own.address,
        0.0,
    )
    table.deliver()
    assert table.status(one, "other") == Status.ALIVE
    assert table.status(other, "one") == Status.ALIVE


def test_a_ping_for_another_name_is_not_answered() -> None:
    swim = machine("me")
    source = Source("peer", b"p" * 8, record("peer").incarnation, 0)
    swim.receive(Packet(source, Ping(7, "former tenant", b"", 0)), ("10.0.0.9", 7946), 0.0)
    assert not [packet for _, packet in swim.packets_to_send(0.0) if isinstance(packet.body, Ack)]


def test_our_own_echo_is_ignored() -> None:
    swim = machine("me")
    own = swim.own
    source = Source(own.name, own.boot, own.incarnation, 0)
    swim.receive(Packet(source, Ping(7, "me", b"", 0)), own.address, 0.0)
    assert swim.packets_to_send(0.0) == []


def test_no_message_is_answered_by_its_own_type() -> None:
    table, swims = mesh_of(3)
    peer, swim = swims[1].own, swims[0]
    swim.packets_to_send(table.now), swim.effects()
    source = Source("n1", peer.boot, peer.incarnation, 0)
    doubt = Accusation("n0", swim.own.boot, swim.own.incarnation, Status.SUSPECT, "n1")
    bodies = (
        Ping(7, "n0", b"", 0),
        Ack(7, peer.boot, 0, 0),
        PingReq(7, "n2", b"", 0, "10.0.0.3", 7946, True),
        Nack(7, True),
        Gossip(),
    )
    for by_stream in (False, True):
        for body in bodies:
            swim.receive(Packet(source, body, (doubt,)), peer.address, table.now, by_stream)
            back = [packet.body for _, packet in swim.packets_to_send(table.now) if _ == peer.address]
            back += [effect.message.body for effect in swim.effects() if hasattr(effect, "message")]  # type: ignore[union-attr]
            assert not any(type(each) is type(body) for each in back), body
    swim.receive(TablePush(source, (peer,)), peer.address, table.now, True)
    assert {type(effect.message) for effect in swim.effects()} == {TablePull}  # type: ignore[union-attr]
    swim.receive(TablePull(source, (peer,)), peer.address, table.now, True)
    assert swim.effects() == []


def test_a_tick_before_its_time_does_nothing() -> None:
    table, swims = mesh_of(3)
    before = swims[0].deadline()
    swims[0].tick(table.now)
    assert swims[0].deadline() == before > table.now
    assert swims[0].packets_to_send(table.now) == []


def test_two_machines_with_one_seed_do_the_same() -> None:
    def trace() -> list[object]:
        table, swims = mesh_of(4)
        table.kill(swims[3], refuses=False)
        table.run(20.0)
        return list(table.sent)

    assert trace() == trace()


def test_an_idle_mesh_of_three_sends_less_than_a_kilobyte_a_second_each() -> None:
    from mesh.codec import encode

    table, _ = mesh_of(3)
    table.sent.clear()
    table.run(60.0)
    spent = sum(len(encode(message)) + 92 for _, _, message, _ in table.sent)
    assert spent / 60 / 3 < 1000


NAMES = st.sampled_from(["me", "a", "b", "c", "d"])
BOOTS = st.sampled_from([b"me------", b"a-------", b"otherboo"])
INCARNATIONS = st.integers(-3, 40).map(lambda plus: record("x").incarnation + plus) | st.integers(
    0, (1 << 48) - 1
)
STATUSES = st.sampled_from(list(Status))
RECORDS = st.builds(
    lambda name, boot, incarnation, number, status, down_s: msgspec.structs.replace(
        record(name, number), boot=boot, incarnation=incarnation, status=status, down_s=down_s
    ),
    NAMES,
    BOOTS,
    INCARNATIONS,
    st.integers(1, 4),
    STATUSES,
    st.integers(0, 100_000),
)
ALIVE = RECORDS.map(lambda each: msgspec.structs.replace(each, status=Status.ALIVE))
ACCUSATIONS = st.builds(
    Accusation, NAMES, BOOTS, INCARNATIONS, st.sampled_from([Status.SUSPECT, Status.DEAD, Status.LEFT]), NAMES
)
SEQS = st.integers(0, 0xFFFFFFFF)
BODIES = st.one_of(
    st.builds(Ping, SEQS, NAMES, BOOTS | st.just(b""), INCARNATIONS),
    st.builds(Ack, SEQS, BOOTS, st.integers(0, 9999), INCARNATIONS),
    st.builds(
        PingReq,
        SEQS,
        NAMES,
        BOOTS | st.just(b""),
        INCARNATIONS,
        st.just("10.0.0.2"),
        st.integers(1, 9),
        st.booleans(),
    ),
    st.builds(Nack, SEQS, st.booleans()),
    st.just(Gossip()),
)
SOURCES = st.builds(Source, NAMES, BOOTS, INCARNATIONS, st.integers(0, 9))
INPUTS = st.one_of(
    st.builds(Packet, SOURCES, BODIES, st.lists(ALIVE | ACCUSATIONS, max_size=4).map(tuple)),
    st.builds(TablePush, SOURCES, st.lists(RECORDS, max_size=4).map(tuple), st.booleans()),
    st.builds(TablePull, SOURCES, st.lists(RECORDS, max_size=4).map(tuple)),
    st.floats(0.0, 3.0),
    st.tuples(st.sampled_from(["closed", "refused", "lag"]), NAMES, BOOTS),
)


def _feed(swim: Swim, item: object, now: float) -> None:
    address = ("10.0.0.2", 7946)
    if isinstance(item, Packet | TablePush | TablePull):
        swim.receive(item, address, now, isinstance(item, TablePush | TablePull))
    elif isinstance(item, tuple):
        verb, name, boot = item
        if verb == "closed":
            swim.stream_closed(name, boot, now)
        elif verb == "refused":
            swim.dial_failed(address, True, now)
        else:
            swim.loop_lag(0.7, now)


@given(st.lists(INPUTS, max_size=40))
@settings(max_examples=300)
def test_no_key_holder_can_break_the_machine_with_well_formed_lies(items: list[object]) -> None:
    swim = Swim(SwimSettings(members_max=4), record("me"), Random(1), 0.0, WALL_S)
    ranks: dict[str, tuple[int, bytes, int]] = {}
    own, now = swim.own.rank(), 0.0
    for item in items:
        if isinstance(item, float):
            now += item
        else:
            _feed(swim, item, now)
        swim.tick(now)
        for _, packet in swim.packets_to_send(now):
            assert all(not hasattr(news, "host") or news.status == Status.ALIVE for news in packet.news)
        swim.effects()
        for event in events(swim):
            if type(event).__name__ == "Forgotten":
                ranks.pop(event.record.name, None)  # type: ignore[union-attr]
        assert swim.own.rank() >= own
        own = swim.own.rank()
        for member in swim.members():
            assert member.record.rank() >= ranks.get(member.name, member.record.rank())
            ranks[member.name] = member.record.rank()
        counts = swim.counts()
        assert counts["members"] <= 4 and counts["rumors"] <= 5 and counts["suspicions"] <= 4
        assert counts["suspicions"] == sum(member.status == Status.SUSPECT for member in swim.members())
