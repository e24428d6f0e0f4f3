"""Whole agents in virtual time: they join, part, heal, die and leave, and share state on the way."""

from __future__ import annotations

from typing import Any

import pytest
import trio

from mesh import Agent, AgentSettings, BoundError, Ephemeral, Lww, Put, Removed, SettingsError, WeatherError
from mesh.hooks import Hooks
from mesh.keyring import Keyring
from mesh.seal import Sealer
from mesh.switchboard import Switchboard
from tests.mesh.agent_world import CONF, LOAD, OWNED, AgentWorld, in_virtual_time, virtual_run, world
from tests.mesh.memory_net import MemoryStream, MemoryTransport

SECRET = b"a secret of the mesh, 32 bytes.."


def equal_digests(play: AgentWorld) -> bool:
    return len({node.agent.state.digest() for node in play.nodes.values()}) == 1


@in_virtual_time
async def test_three_agents_see_each_other_within_a_second() -> None:
    async with world() as play:
        first = await play.start("a")
        seeds = [f"{first.host}:7946"]
        await play.start("b", seeds)
        await play.start("c", seeds)
        assert await play.until(play.all_alive, 5.0) <= 0.2


@in_virtual_time
async def test_agents_that_list_each_other_and_start_at_once_have_one_stream_per_pair() -> None:
    async with world() as play:
        seeds = [f"10.0.0.{number}" for number in (1, 2, 3, 4)]
        for name in "abcd":
            await play.start(name, seeds)
        assert await play.until(play.all_alive, 5.0) <= 1.0
        await trio.sleep(15)  # errands and duplicates are over
        for node in play.nodes.values():
            assert node.agent.status().streams == 3
            assert len(node.agent._transport.streams) == 3  # type: ignore[attr-defined]
            assert "Suspected" not in node.kinds()


@in_virtual_time
async def test_a_put_is_on_every_peer_after_one_hop() -> None:
    async with world() as play:
        a, b, c = await play.mesh("abc")
        await trio.sleep(1)
        put_s = trio.current_time()
        a.agent.state.put(CONF, b"key", b"value")
        await play.until(lambda: bool(b.changes and c.changes), 1.0)
        for node in (b, c):
            when_s, change = node.changes[0]
            assert change == Put(CONF, "a", b"key", b"value")
            assert when_s - put_s <= 0.003
            assert node.agent.state.get(CONF, b"key") == b"value"


@in_virtual_time
async def test_what_was_put_before_the_start_is_shared_too() -> None:
    async with world() as play:
        a = await play.start("a")
        a.agent.state.put(CONF, b"early", b"1")
        b = await play.start("b", [f"{a.host}:7946"])
        await play.until(lambda: b.agent.state.get(CONF, b"early") == b"1", 1.0)


@in_virtual_time
async def test_a_killed_agent_is_dead_everywhere_within_a_second_and_its_load_is_gone() -> None:
    async with world() as play:
        nodes = await play.mesh("abcd")
        nodes[3].agent.state.put(LOAD, b"w", b"7")
        nodes[3].agent.state.put(OWNED, b"url", b"1")
        await play.until(lambda: nodes[0].agent.state.get(LOAD, b"w", "d") == b"7", 1.0)
        await play.kill("d")
        assert await play.until(lambda: all(node.sees()["d"] == "dead" for node in nodes[:3]), 5.0) <= 1.0
        await trio.sleep(0.01)
        for node in nodes[:3]:
            assert node.agent.state.get(LOAD, b"w", "d") is None
            assert node.agent.state.get(OWNED, b"url", "d") == b"1"


@in_virtual_time
async def test_the_last_of_two_is_dead_within_a_second_too() -> None:
    async with world() as play:
        a, _ = await play.mesh("ab")
        await play.kill("b")
        assert await play.until(lambda: a.sees()["b"] == "dead", 5.0) <= 1.0


@in_virtual_time
async def test_a_restart_under_the_same_name_is_alive_within_a_second() -> None:
    async with world() as play:
        a, b, c = await play.mesh("abc")
        c.agent.state.put(OWNED, b"url", b"old")
        a.agent.state.put(OWNED, b"other", b"kept")
        await trio.sleep(5)
        host = (await play.kill("c")).host
        again = await play.start("c", [f"{a.host}:7946"], host=host)
        again.agent.state.put(OWNED, b"url", b"new")
        # Its first words come before membership has told its new life to the others; they must not be lost.
        assert await play.until(lambda: again.agent.state.get(OWNED, b"other", "a") == b"kept", 5.0) <= 0.5

        def is_back() -> bool:
            rows = [node.agent.member("c") for node in (a, b)]
            return all(
                row is not None and row.record.boot == again.agent.own.boot and row.is_live for row in rows
            )

        assert await play.until(is_back, 5.0) <= 1.0
        assert await play.until(lambda: a.agent.state.get(OWNED, b"url", "c") == b"new", 5.0) <= 0.1
        await trio.sleep(10)
        assert play.all_alive()
        await play.until(lambda: equal_digests(play), 1.0)


@in_virtual_time
async def test_a_partition_of_45_seconds_heals_and_both_sides_writes_survive() -> None:
    async with world() as play:
        a, b, c = await play.mesh("abc")
        await trio.sleep(2)
        play.net.cut(c.host)
        assert await play.until(lambda: a.sees()["c"] == b.sees()["c"] == "dead", 10.0) <= 4.0
        await play.until(lambda: c.sees() == {"a": "dead", "b": "dead"}, 10.0)
        a.agent.state.put(CONF, b"a", b"1")
        c.agent.state.put(CONF, b"c", b"2")
        c.agent.state.put(OWNED, b"url", b"3")
        await trio.sleep(45)
        assert c.agent.standing.is_minority and a.agent.state.get(CONF, b"c") is None
        play.net.mend()
        assert await play.until(play.all_alive, 15.0) <= 15.0
        await play.until(lambda: equal_digests(play), 10.0)
        assert b.agent.state.get(CONF, b"c") == b"2" and c.agent.state.get(CONF, b"a") == b"1"
        assert b.agent.state.get(OWNED, b"url", "c") == b"3"


@in_virtual_time
async def test_a_leave_is_known_at_once_is_never_suspected_and_takes_what_is_owned_along() -> None:
    async with world() as play:
        a, b, c = await play.mesh("abc")
        c.agent.state.put(OWNED, b"url", b"1")
        c.agent.state.put(CONF, b"stays", b"1")
        await play.until(lambda: all(n.agent.state.get(OWNED, b"url", "c") == b"1" for n in (a, b)), 1.0)
        start_s = trio.current_time()
        await c.agent.leave()
        assert trio.current_time() - start_s <= 1.0
        assert a.sees()["c"] == b.sees()["c"] == "left"
        await c.ended.wait()
        assert c.agent.status().state == "left"
        await trio.sleep(30)
        for node in (a, b):
            assert node.sees()["c"] == "left"
            assert "Suspected" not in node.kinds() and "MemberDown" not in node.kinds()
            assert node.agent.state.get(OWNED, b"url", "c") is None
            assert Removed(OWNED, "c", b"url") in [change for _, change in node.changes]
            assert node.agent.state.get(CONF, b"stays") == b"1"
        await c.agent.leave()  # again: nothing


@in_virtual_time
async def test_udp_blocked_means_streams_and_no_suspicion() -> None:
    async with world() as play:
        play.net.is_udp_blocked = True
        nodes = await play.mesh("abc")
        await trio.sleep(120)
        assert play.all_alive()
        for node in nodes:
            assert "Suspected" not in node.kinds()
            assert {peer.transport for peer in node.agent.status().peers} == {"tcp"}
            assert "udp_blocked" in [event for event, _ in node.logs]
        play.net.is_udp_blocked = False
        await trio.sleep(10)
        assert {peer.transport for peer in nodes[0].agent.status().peers} == {"udp"}


@in_virtual_time
async def test_where_only_streams_are_protected_no_datagram_is_sent() -> None:
    async with world() as play:
        seen: list[bytes] = []
        play.net.tap = lambda _from, _to, data: seen.append(data)
        first = await play.start("a", is_protected=True)
        for node in (first, await play.start("b", [f"{first.host}:7946"], is_protected=True)):
            node.agent._board.is_by_stream = True
        third = await play.start("c", [f"{first.host}:7946"], is_protected=True)
        third.agent._board.is_by_stream = True
        seen.clear()
        assert await play.until(play.all_alive, 5.0) <= 1.0
        await trio.sleep(60)
        assert not seen
        assert play.all_alive() and "Suspected" not in first.kinds()
        await play.kill("c")
        assert await play.until(lambda: first.sees()["c"] == "dead", 5.0) <= 1.0


@in_virtual_time
async def test_a_dead_first_seed_a_name_and_ones_own_address_stop_no_join() -> None:
    async with world() as play:
        a = await play.start("a")
        play.net.names["mesh.example"] = ["10.9.9.9", a.host]
        seeds = ["10.8.8.8:7946", "nowhere.example:7946", "mesh.example:7946", "10.0.0.2:7946"]
        b = await play.start("b", seeds)
        assert b.host == "10.0.0.2"
        assert await play.until(play.all_alive, 5.0) <= 1.0
        assert "seed_unresolved" in [event for event, _ in b.logs]


@in_virtual_time
async def test_a_seed_that_comes_late_by_name_is_joined_within_five_seconds() -> None:
    async with world() as play:
        b = await play.start("b", ["late.example:7946"])
        await trio.sleep(47)
        a = await play.start("a")
        play.net.names["late.example"] = [a.host]
        assert await play.until(play.all_alive, 10.0) <= 5.0
        assert b.sees() == {"a": "alive"}


@in_virtual_time
async def test_the_younger_of_two_with_one_name_stops_and_says_why() -> None:
    async with world() as play:
        a, elder = await play.mesh("ab")
        await trio.sleep(3)
        younger = await play.start("b", [f"{a.host}:7946"])
        with trio.fail_after(5):
            await younger.ended.wait()
        assert younger.conflict is not None
        assert elder.host in str(younger.conflict) and younger.host in str(younger.conflict)
        assert younger.agent.status().state == "conflict"
        await trio.sleep(5)
        assert a.sees() == {"b": "alive"} and elder.conflict is None
        row = a.agent.member("b")
        assert row is not None and row.address == elder.agent.address
        a.agent.state.put(CONF, b"k", b"v")
        await play.until(lambda: elder.agent.state.get(CONF, b"k") == b"v", 1.0)


@in_virtual_time
async def test_garbage_and_strangers_change_nothing() -> None:
    async with world() as play:
        a, b = await play.mesh("ab", secrets=(SECRET,), label="one")
        stranger = MemoryTransport(play.net, "10.66.6.6")
        await stranger.open()
        for number in range(2000):
            stranger.send(play.rng.randbytes(number % 1400), a.agent.address)
        for number in range(50):
            stream = await stranger.dial(a.agent.address)
            await stream.send_all(play.rng.randbytes(1 + number * 30))
        other_seal = Sealer(b"stranger", "one", Keyring.of(SECRET[::-1]))
        for _ in range(100):
            stranger.send(other_seal.seal(b"let me in"), a.agent.address)
        other_key = await play.start("x", [f"{a.host}:7946"], secrets=(SECRET[::-1],), label="one")
        other_label = await play.start("y", [f"{a.host}:7946"], secrets=(SECRET,), label="two")
        plain = await play.start("z", [f"{a.host}:7946"], label="one")
        await trio.sleep(30)
        assert a.sees() == {"b": "alive"} and b.sees() == {"a": "alive"}
        for node in (other_key, other_label, plain):
            assert node.sees() == {}
        assert "unknown_key" in [event for event, _ in a.logs]
        assert len([event for event, _ in a.logs if event == "unknown_key"]) == 1
        counts = a.agent.counts()
        assert counts["seal_garbage"] > 1900 and counts["seal_unknown_key"] == 100
        assert counts["stream_strangers"] >= 50
        assert "Suspected" not in a.kinds()


@in_virtual_time
async def test_two_plain_meshes_of_different_labels_never_merge() -> None:
    async with world() as play:
        a = await play.start("a", label="one")
        b = await play.start("b", [f"{a.host}:7946"], label="two")
        await trio.sleep(20)
        assert a.sees() == {} and b.sees() == {}


@in_virtual_time
async def test_keys_rotate_without_a_suspicion() -> None:
    async with world() as play:
        nodes = await play.mesh("abc", secrets=(SECRET,))
        new = Keyring.of(SECRET[::-1]).ids[0]
        assert nodes[0].agent.key_holders(new) == (0, 3)
        for node in nodes:
            node.agent.set_keyring(node.agent.keyring.adding(SECRET[::-1]))
        await play.until(lambda: all(node.agent.key_holders(new) == (3, 3) for node in nodes), 2.0)
        for node in nodes:
            node.agent.set_keyring(node.agent.keyring.using(new))
            await trio.sleep(2)
        old = Keyring.of(SECRET).ids[0]
        for node in nodes:
            node.agent.set_keyring(node.agent.keyring.removing(old))
        await trio.sleep(20)
        late = await play.start("d", [f"{nodes[0].host}:7946"], secrets=(SECRET[::-1],))
        assert await play.until(play.all_alive, 5.0) <= 1.0
        for node in (*nodes, late):
            assert "Suspected" not in node.kinds()


@in_virtual_time
async def test_plain_becomes_sealed_by_two_rolling_restarts() -> None:
    async with world() as play:
        nodes = await play.mesh("abc")
        hosts = {node.agent.name: node.host for node in nodes}
        for settings in ({"accepts_plain": True}, {"accepts_plain": False}):
            for name in "abc":
                await play.nodes[name].agent.leave()
                await play.nodes[name].ended.wait()
                seeds = [f"{host}:7946" for host in hosts.values()]
                await play.start(name, seeds, host=hosts[name], secrets=(SECRET,), **settings)
                await play.until(play.all_alive, 5.0)
        await trio.sleep(10)
        assert play.all_alive()
        assert all(peer.is_protected for node in play.nodes.values() for peer in node.agent.status().peers)


@in_virtual_time
async def test_a_large_mesh_keeps_few_streams_and_relays() -> None:
    async with world() as play:
        first = await play.start("n00", full_mesh_max=8, neighbours=4)
        for number in range(1, 30):
            await play.start(f"n{number:02d}", [f"{first.host}:7946"], full_mesh_max=8, neighbours=4)
        await play.until(play.all_alive, 30.0)
        await trio.sleep(60)
        counts = [node.agent.status().streams for node in play.nodes.values()]
        assert max(counts) <= 14 and sum(counts) / len(counts) <= 8, counts
        first.agent.state.put(CONF, b"key", b"value")
        others = list(play.nodes.values())[1:]
        took_s = await play.until(
            lambda: all(node.agent.state.get(CONF, b"key") == b"value" for node in others), 15.0
        )
        assert took_s <= 0.5
        assert equal_digests(play)


@in_virtual_time
async def test_a_question_is_answered_and_fails_when_it_cannot_be() -> None:
    async with world() as play:
        a, b, c = await play.mesh("abc")
        await trio.sleep(1)
        b.agent.answer_with(lambda peer, question: peer.encode() + question)
        start_s = trio.current_time()
        assert await a.agent.ask("b", b"?") == b"a?"
        assert trio.current_time() - start_s <= 0.003
        with pytest.raises(WeatherError, match="does not answer"):
            await a.agent.ask("c", b"?")
        with pytest.raises(WeatherError, match="no stream"):
            await a.agent.ask("nobody", b"?")
        with pytest.raises(BoundError):
            await a.agent.ask("b", bytes(65 * 1024))
        with trio.move_on_after(0) as scope:
            await a.agent.ask("b", b"too late")
        assert scope.cancelled_caught and a.agent.counts()["agent_questions"] == 0

        play.net.cut(b.host)
        with pytest.raises(WeatherError, match="closed"), trio.fail_after(15):
            await a.agent.ask("b", b"?")
        assert a.sees()["b"] == "dead" and a.sees()["c"] == "alive" and c.sees()["a"] == "alive"


@in_virtual_time
async def test_an_answer_leaves_in_the_step_that_read_the_question_and_no_machine_turns_for_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with world() as play:
        a, b = await play.mesh("ab")
        await trio.sleep(1)
        events: list[tuple[str, object]] = []
        send, turn = MemoryStream.send_nowait, Switchboard.turn

        def noted_send(stream: MemoryStream, data: bytes) -> int:
            events.append((stream.owner.host, trio.lowlevel.current_task()))
            return send(stream, data)

        def noted_turn(board: Switchboard) -> None:
            events.append(("turn", board))
            turn(board)

        def answer(_peer: str, _question: bytes) -> bytes:
            events.append(("answer", trio.lowlevel.current_task()))
            return b"!"

        b.agent.answer_with(answer)
        monkeypatch.setattr(MemoryStream, "send_nowait", noted_send)
        monkeypatch.setattr(Switchboard, "turn", noted_turn)
        for _ in range(3):
            events.clear()
            await a.agent.ask("b", b"?")
            if all(what != "turn" for what, _ in events):  # else a deadline was due meanwhile
                break
        (asking, asker), (_, reader), (answering, sender) = events
        assert (asking, asker) == (a.host, trio.lowlevel.current_task())
        assert answering == b.host and sender is reader


@in_virtual_time
async def test_a_peer_that_does_not_read_costs_no_memory_and_gets_the_newest() -> None:
    async with world() as play:
        a, b, c = await play.mesh("abc")
        await trio.sleep(1)
        streams = [
            stream
            for stream in b.agent._transport.streams  # type: ignore[attr-defined]
            if a.host in (stream.peer_address[0], stream.other.owner.host)
        ]
        for stream in streams:
            stream.stall(True)
        b.changes.clear()
        value = bytes(20_000)
        for number in range(300):
            for key in range(10):
                a.agent.state.put(CONF, b"%d" % key, b"%d" % number + value)
            await trio.sleep(0.001)
        on_the_way = sum(stream.other.in_flight for stream in streams)
        assert on_the_way < 1_200_000, "60 MB were written"
        for stream in streams:
            stream.stall(False)
        await play.until(lambda: equal_digests(play), 5.0)
        assert len(b.changes) < 200 <= len(c.changes)
        assert b.agent.state.get(CONF, b"9") == b"299" + value


@in_virtual_time
async def test_three_idle_agents_send_little_and_answer_nothing_by_its_own_kind() -> None:
    async with world() as play:
        nodes = await play.mesh("abc", secrets=(SECRET,))
        await trio.sleep(40)
        play.net.sent_bytes.clear()
        before = [dict(node.messages) for node in nodes]
        await trio.sleep(120)
        for sent in play.net.sent_bytes.values():
            assert sent / 120 <= 1500
        for node, old in zip(nodes, before, strict=True):
            grown = {key: count - old.get(key, 0) for key, count in node.messages.items()}
            assert grown["keepalive", "out"] <= 2 * 120 / 5 + 2
            assert grown["datagram", "out"] <= 120 * 2 * 3
            assert sum(count for (kind, _), count in grown.items() if kind != "datagram") <= 400
            assert node.agent.status().is_converged


@in_virtual_time
async def test_a_dead_process_refuses_and_a_node_beyond_a_cut_does_not() -> None:
    async with world() as play:
        a, _, c = await play.mesh("abc")
        await trio.sleep(2)
        assert not a.agent.is_refusing("b")
        assert not a.agent.is_refusing("nobody")
        play.net.cut(c.host)
        await play.kill("b")
        await play.until(lambda: a.sees()["b"] == a.sees()["c"] == "dead", 10.0)
        assert a.agent.is_refusing("b")
        assert not a.agent.is_refusing("c")
        await trio.sleep(12)  # both are dialled again, in vain
        assert (a.agent.is_refusing("b"), a.agent.is_refusing("c")) == (True, False)
        await play.start("b", [f"{a.host}:7946"])
        await play.until(lambda: a.sees()["b"] == "alive", 5.0)
        play.net.mend()
        await play.until(play.all_alive, 15.0)
        assert not a.agent.is_refusing("b")
        assert not a.agent.is_refusing("c")


@in_virtual_time
async def test_a_mesh_under_loss_kills_nobody() -> None:
    async with world(seed=5) as play:
        nodes = await play.mesh("abcde")
        play.net.loss = 0.05
        await trio.sleep(600)
        assert all("MemberDown" not in node.kinds() for node in nodes)


@in_virtual_time
async def test_a_bug_in_a_callback_ends_the_agent_loudly() -> None:
    async def play_it() -> None:
        async with world() as play:
            a, b = await play.mesh("ab")

            def broken(_change: Any) -> None:
                raise ZeroDivisionError

            b.agent.on_change(CONF, broken)
            a.agent.state.put(CONF, b"k", b"v")
            await trio.sleep(5)

    with pytest.RaisesGroup(ZeroDivisionError, flatten_subgroups=True):
        await play_it()


@in_virtual_time
async def test_watches_are_bounded_and_end_with_the_agent() -> None:
    async with world() as play:
        a, b = await play.mesh("ab")
        watch = b.agent.watch_changes(CONF, waiting_max=3)
        members = b.agent.watch_members()
        for number in range(10):
            a.agent.state.put(CONF, b"%d" % number, b"v")
            await trio.sleep(0.01)
        await play.kill("b")
        await trio.sleep(0.1)
        assert [change.key async for change in watch if isinstance(change, Put)] == [b"7", b"8", b"9"]
        assert watch.lost == 7
        assert [event async for event in members] == []


@in_virtual_time
async def test_a_changed_record_reaches_all() -> None:
    async with world() as play:
        a, b = await play.mesh("ab")
        a.agent.update(meta=b"version 2", features=5)
        row = b.agent.member("a")
        assert row is not None
        await play.until(lambda: row.record.meta == b"version 2" and row.record.features == 5, 1.0)
        assert "MemberChanged" in b.kinds()


@in_virtual_time
async def test_seeds_can_be_added_later() -> None:
    async with world() as play:
        a = await play.start("a")
        b = await play.start("b")
        await trio.sleep(3)
        b.agent.join([f"{a.host}:7946"])
        assert await play.until(play.all_alive, 5.0) <= 0.5


@pytest.mark.parametrize(
    "settings",
    [
        AgentSettings(name=""),
        AgentSettings(name="a:b"),
        AgentSettings(name="a", port=70000),
        AgentSettings(name="a", seeds=("not an address",)),
        AgentSettings(name="a", seeds=("host",), port=0),
        AgentSettings(name="a", secrets=(b"short",)),
        AgentSettings(name="a", accepts_plain=True),
        AgentSettings(name="a", label="x" * 256),
        AgentSettings(name="a", silent_s=1.0),
    ],
)
@in_virtual_time
async def test_impossible_settings_are_refused(settings: AgentSettings) -> None:
    with pytest.raises(SettingsError):
        Agent(settings)


@pytest.mark.parametrize("advertise", ["0.0.0.0", "0.0.0.0:7946", "[::]:1", "nowhere.example"])
@in_virtual_time
async def test_an_address_that_nobody_can_dial_is_not_advertised(advertise: str) -> None:
    async with world() as play:
        agent = Agent(
            AgentSettings(name="a", advertise=advertise), transport=MemoryTransport(play.net, "10.0.0.1")
        )
        with pytest.raises(SettingsError):
            await agent.run()


@in_virtual_time
async def test_ephemeral_values_of_a_living_owner_stay() -> None:
    async with world() as play:
        a, b = await play.mesh("ab", namespaces=(Ephemeral(name=LOAD, ttl_s=3.0), Lww(name=CONF)))
        a.agent.state.put(LOAD, b"w", b"1")
        await trio.sleep(20)
        assert b.agent.state.get(LOAD, b"w", "a") == b"1"


@in_virtual_time
async def test_hooks_hear_of_every_message() -> None:
    assert Hooks().message("ping", "in", 1) is None  # type: ignore[func-returns-value]
    async with world() as play:
        a, b = await play.mesh("ab")
        await trio.sleep(5)
        assert a.messages["datagram", "out"] > 0 and b.messages["datagram", "in"] > 0
        assert a.messages["vector", "in"] > 0


def test_the_same_seed_gives_the_same_play() -> None:
    async def play_it() -> list[Any]:
        async with world(seed=3) as play:
            seen: list[Any] = []
            play.net.tap = lambda source, target, data: seen.append(
                (trio.current_time(), source, target, data)
            )
            play.net.loss = 0.1
            await play.mesh("abc", secrets=(SECRET,))
            await trio.sleep(20)
            await play.kill("c")
            await trio.sleep(10)
            return seen

    first = virtual_run(play_it)
    assert len(first) > 100 and first == virtual_run(play_it)
