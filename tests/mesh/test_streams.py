"""The door of an agent: who is let in, who is told why not, and what of two streams stays. In virtual time."""

from __future__ import annotations

from random import Random

import pytest
import trio

from mesh.errors import DecodeError, WeatherError
from mesh.frames import Frame, FrameType
from mesh.greeting import (
    KEPT,
    Asked,
    Hello,
    Keepalive,
    Refused,
    decode_asked,
    decode_hello,
    decode_keepalive,
    decode_refused,
    encode,
    goodbye,
    refusal,
)
from mesh.keyring import Keyring
from mesh.pipe import End, Pipe, RefusedError
from mesh.seal import Sealer
from mesh.stream_seal import StreamSeal
from tests.mesh.agent_world import AgentWorld, in_virtual_time, world
from tests.mesh.memory_net import MemoryStream, MemoryTransport

SECRET = b"a secret of the mesh, 32 bytes.."


def hello_of(name: str, boot: bytes, host: str = "10.7.7.7", label: str = "", flags: int = KEPT) -> Hello:
    return Hello(1, 1, name, boot, 1_700_000_000, host, 7946, label, 0, flags)


class Stranger:
    """A hand-made peer: hears frames, sends what the test says."""

    def __init__(self, play: AgentWorld, name: str, host: str, boot: bytes, **seal: object) -> None:
        self.hello = hello_of(name, boot, host)
        self.heard: list[Frame] = []
        self.sealer = Sealer(boot, **seal)  # type: ignore[arg-type]
        self.transport = MemoryTransport(play.net, host)
        self.rng = Random(1)
        self.state: list[Frame] = []

    def on_frame(self, pipe: Pipe, frame: Frame) -> None:
        self.heard.append(frame)

    def on_batch(self, pipe: Pipe) -> None:
        pass

    def state_for(self, pipe: Pipe, bytes_max: int) -> list[Frame]:
        state, self.state = self.state, []
        return state

    def note(self, kind: int, direction: str, size_bytes: int) -> None:
        pass

    async def dial(self, address: tuple[str, int]) -> tuple[MemoryStream, Pipe]:
        raw = await self.transport.dial(address)
        seal = StreamSeal(self.sealer, self.rng.randbytes(16), is_dialer=True)
        return raw, Pipe(raw, seal, self, is_dialer=True, queue_frames_max=8)

    async def greeted(self, address: tuple[str, int], nursery: trio.Nursery) -> tuple[MemoryStream, Pipe]:
        raw, pipe = await self.dial(address)
        await pipe.greet(self.hello)
        nursery.start_soon(pipe.run)
        return raw, pipe


# -- the words


def test_greetings_survive_the_wire_and_longer_ones_of_later_versions_too() -> None:
    hello = hello_of("a", b"12345678", flags=0)
    assert decode_hello(encode(hello)) == hello and not hello.is_kept and hello.address == ("10.7.7.7", 7946)
    longer = encode([*encode_fields(hello), "new", {"more": 1}])
    assert decode_hello(longer) == hello
    assert decode_hello(encode(encode_fields(hello)[:8])) == hello


def encode_fields(hello: Hello) -> list[object]:
    return [getattr(hello, field) for field in Hello.__struct_fields__]


@pytest.mark.parametrize(
    "bad",
    [
        hello_of("", b"12345678"),
        hello_of("a:b", b"12345678"),
        hello_of("a" * 129, b"12345678"),
        hello_of("ü" * 100, b"12345678"),
        hello_of("a", b"1234567"),
        hello_of("a", b"12345678", host=""),
        hello_of("a", b"12345678", label="x" * 300),
        Refused("x"),
        Keepalive(b"", 0),
        None,
        17,
    ],
)
def test_a_bad_greeting_is_garbage(bad: object) -> None:
    with pytest.raises(DecodeError):
        decode_hello(encode(bad))


def test_cut_and_mutated_words_raise_nothing_but_decode_errors() -> None:
    rng = Random(3)
    words = [
        (decode_hello, encode(hello_of("a", b"12345678"))),
        (decode_refused, encode(Refused("label", "text", "a", b"12345678"))),
        (decode_keepalive, encode(Keepalive(b"12345678", 5))),
        (decode_asked, encode(Asked(5, b"question"))),
    ]
    for decode, good in words:
        decode(good)  # type: ignore[operator]
        for number in range(3000):
            data = bytearray(good[: rng.randrange(len(good) + 1)] if number % 2 else good)
            for _ in range(rng.randrange(3)):
                if data:
                    data[rng.randrange(len(data))] = rng.randrange(256)
            try:
                decode(bytes(data))  # type: ignore[operator]
            except DecodeError:
                pass


def test_label_and_protocol_decide_who_may_talk() -> None:
    own = hello_of("a", b"12345678")
    assert refusal(own, hello_of("b", b"87654321")) is None
    other = refusal(own, hello_of("b", b"87654321", label="x"))
    assert other is not None and other.code == "label" and "'x'" in other.text
    newer = Hello(2, 3, "b", b"87654321", 0, "h", 1, "")
    version = refusal(own, newer)
    assert version is not None and version.code == "version" and "1 to 1" in version.text


# -- the door


@in_virtual_time
async def test_a_stranger_with_our_label_and_key_is_welcomed() -> None:
    async with world() as play, trio.open_nursery() as nursery:
        a = await play.start("a", secrets=(SECRET,), label="one")
        peer = Stranger(play, "b", "10.7.7.7", b"b-boot-1", label="one", keyring=Keyring.of(SECRET))
        peer.hello = hello_of("b", b"b-boot-1", label="one")
        _, pipe = await peer.greeted(a.agent.address, nursery)
        await trio.sleep(0.1)
        assert pipe.peer is not None and pipe.peer.name == "a" and pipe.is_protected and pipe.is_open
        assert FrameType.VECTOR in [frame.type for frame in peer.heard]
        assert a.sees() == {}, "a stream makes no member"
        nursery.cancel_scope.cancel()


@in_virtual_time
async def test_another_label_is_told_in_words() -> None:
    async with world() as play:
        a = await play.start("a", label="one")
        peer = Stranger(play, "b", "10.7.7.7", b"b-boot-1", label="one")
        peer.hello = hello_of("b", b"b-boot-1", label="two")  # as if the label's 32 bits had collided
        _, pipe = await peer.dial(a.agent.address)
        with pytest.raises(RefusedError, match="this is cluster 'one', you are of 'two'"):
            await pipe.greet(peer.hello)
        assert [fields["error"] for event, fields in a.logs if event == "stream_turned_away"]


@in_virtual_time
async def test_a_greeting_in_anothers_name_is_closed() -> None:
    async with world() as play:
        a = await play.start("a")
        peer = Stranger(play, "b", "10.7.7.7", b"b-boot-1")
        _, pipe = await peer.dial(a.agent.address)
        with pytest.raises(WeatherError):
            await pipe.greet(hello_of("b", b"b-boot-2"))
        assert a.agent.counts()["stream_strangers"] == 1


@in_virtual_time
async def test_who_does_not_greet_is_closed_after_a_while_and_many_of_them_keep_nobody_out() -> None:
    async with world() as play:
        a = await play.start("a", greetings_max=8)
        silent = MemoryTransport(play.net, "10.66.0.1")
        start_s = trio.current_time()
        first = await silent.dial(a.agent.address)
        assert await first.receive_some(100) == b""
        assert 2.5 <= trio.current_time() - start_s <= 3.5
        for _ in range(40):
            await silent.dial(a.agent.address)
            await trio.sleep(0.01)
        assert len(a.agent._transport.streams) <= 9  # type: ignore[attr-defined]
        await play.start("b", [f"{a.host}:7946"])
        assert await play.until(play.all_alive, 5.0) <= 0.2
        assert a.agent.counts()["stream_greetings_dropped"] >= 32


@in_virtual_time
async def test_garbage_on_an_open_stream_ends_the_stream_only() -> None:
    async with world() as play, trio.open_nursery() as nursery:
        a, b = await play.mesh("ab")
        for number, body in enumerate((b"", b"garbage", b"\x91")):
            kinds = (
                FrameType.MEMBERS,
                FrameType.PING,
                FrameType.NEWS,
                FrameType.ASK,
                FrameType.VECTOR,
                FrameType.DELTA,
            )
            for kind in kinds:
                boot = b"boot%02d%02d" % (number, kind)
                peer = Stranger(play, "x", "10.7.7.7", boot)
                _, pipe = await peer.greeted(a.agent.address, nursery)
                pipe.send(Frame(kind, body))
                await trio.sleep(0.1)
                assert pipe.end is End.CLOSED, kind
        await trio.sleep(5)
        assert a.sees() == {"b": "alive"} == {"b": b.agent.own.status.name.lower()}
        assert "Suspected" not in a.kinds()
        nursery.cancel_scope.cancel()


@in_virtual_time
async def test_unknown_frames_are_skipped() -> None:
    async with world() as play, trio.open_nursery() as nursery:
        a = await play.start("a")
        peer = Stranger(play, "x", "10.7.7.7", b"x-boot-1")
        _, pipe = await peer.greeted(a.agent.address, nursery)
        for kind in (99, 200, 47):
            pipe.send(Frame(kind, b"of a later version"))
        pipe.send(Frame(FrameType.ASK, encode(Asked(7, b"?"))))
        await trio.sleep(0.1)
        assert pipe.is_open
        assert [decode_asked(f.body) for f in peer.heard if f.type == FrameType.ANSWER] == [Asked(7, None)]
        nursery.cancel_scope.cancel()


@in_virtual_time
async def test_a_second_stream_of_the_same_life_replaces_the_first() -> None:
    async with world() as play, trio.open_nursery() as nursery:
        a = await play.start("a")
        peer = Stranger(play, "b", "10.7.7.7", b"b-boot-1")
        _, first = await peer.greeted(a.agent.address, nursery)
        await trio.sleep(3)
        peer.heard.clear()
        _, second = await peer.greeted(a.agent.address, nursery)
        await trio.sleep(0.1)
        assert first.end is End.CLOSED and second.is_open
        assert FrameType.VECTOR in [frame.type for frame in peer.heard], "state starts anew"
        assert a.agent.status().streams == 1
        nursery.cancel_scope.cancel()


@in_virtual_time
async def test_a_stream_on_which_nothing_comes_is_closed() -> None:
    async with world() as play, trio.open_nursery() as nursery:
        a = await play.start("a", silent_s=12.0)
        peer = Stranger(play, "b", "10.7.7.7", b"b-boot-1")
        raw, pipe = await peer.greeted(a.agent.address, nursery)
        pipe.send(Frame(FrameType.KEEPALIVE, encode(Keepalive(b"12345678", 1))))
        await trio.sleep(11)
        assert pipe.is_open and FrameType.KEEPALIVE in [frame.type for frame in peer.heard]
        await trio.sleep(3)
        assert pipe.end is End.CLOSED
        assert raw is not None and a.agent.counts()["stream_silent"] == 1
        nursery.cancel_scope.cancel()


@in_virtual_time
async def test_a_goodbye_is_no_sign_of_death() -> None:
    async with world() as play, trio.open_nursery() as nursery:
        a = await play.start("a")
        peer = Stranger(play, "b", "10.7.7.7", b"b-boot-1")
        _, pipe = await peer.greeted(a.agent.address, nursery)
        pipe.close(goodbye("idle", "", "b", b"b-boot-1"))
        await trio.sleep(0.1)
        assert pipe.end is End.OURS
        assert a.agent.status().streams == 0
        nursery.cancel_scope.cancel()


@in_virtual_time
async def test_the_queue_of_a_pipe_is_bounded_and_drops_the_oldest() -> None:
    async with world() as play, trio.open_nursery() as nursery:
        a = await play.start("a")
        seen: list[bytes] = []
        a.agent.answer_with(lambda _peer, question: seen.append(question) or b"")
        peer = Stranger(play, "b", "10.7.7.7", b"b-boot-1")
        _, pipe = await peer.greeted(a.agent.address, nursery)
        for number in range(20):
            pipe.send(Frame(FrameType.ASK, encode(Asked(number, b"%d" % number))))
        await trio.sleep(0.1)
        assert seen == [b"%d" % number for number in range(12, 20)] and pipe.dropped == 12
        nursery.cancel_scope.cancel()


@in_virtual_time
async def test_ourselves_among_the_seeds_are_recognized_sealed_and_plain() -> None:
    for secrets in ((), (SECRET,)):
        async with world() as play:
            a = await play.start("a", ["10.0.0.1:7946"], secrets=secrets)
            assert a.host == "10.0.0.1"
            await trio.sleep(100)
            assert a.sees() == {}
            assert a.agent.counts().get("seal_stream_own", 0) <= 6, "tried seldom"
            assert not [event for event, _ in a.logs if event == "stream_failed"]
            assert not a.agent._board.streams._doors._echoes


@in_virtual_time
async def test_two_that_dial_each_other_at_the_same_moment_keep_the_smaller_names_stream() -> None:
    async with world() as play:
        a = await play.start("a", ["10.0.0.2:7946"])
        b = await play.start("b", ["10.0.0.1:7946"])
        await play.until(play.all_alive, 5.0)
        await trio.sleep(3)
        (of_a,), (of_b,) = a.agent._board.streams.bound(), b.agent._board.streams.bound()
        assert of_a.is_dialer is not of_b.is_dialer
        assert len(a.agent._transport.streams) == 1  # type: ignore[attr-defined]


@in_virtual_time
async def test_the_larger_name_dials_when_the_smaller_cannot() -> None:
    async with world() as play:
        a, b = await play.mesh("ab")
        dial = a.agent._transport.dial

        async def no_way_out(address: tuple[str, int]) -> MemoryStream:
            await trio.sleep_forever()
            return await dial(address)  # type: ignore[return-value]

        a.agent._transport.dial = no_way_out  # type: ignore[method-assign]
        for pipe in a.agent._board.streams.bound():
            pipe.close(goodbye("idle", "", "a", a.agent.own.boot))
        await trio.sleep(10)
        (of_b,) = b.agent._board.streams.bound()
        assert of_b.is_dialer and play.all_alive()


@in_virtual_time
async def test_who_advertises_an_address_that_nobody_can_dial_is_told() -> None:
    async with world() as play:
        a = await play.start("a")
        await trio.sleep(1)
        b = await play.start("b", [f"{a.host}:7946"], advertise="10.9.9.9:7946")
        play.net.cut("10.9.9.9")
        await play.until(lambda: any(event == "notice" for event, _ in b.logs), 5.0)
        (told,) = [fields for event, fields in b.logs if event == "notice"]
        assert told["code"] == "unreachable" and told["peer"] == "a"
        assert "a cannot reach b at its advertised address 10.9.9.9:7946" in told["text"]
        await trio.sleep(20)
        assert a.sees() == {"b": "alive"}, "its stream serves it"
        c = await play.start("c", [f"{a.host}:7946"])
        await trio.sleep(10)
        assert not [event for event, _ in c.logs if event == "notice"]


@in_virtual_time
async def test_a_look_whether_we_can_be_reached_is_no_stranger() -> None:
    async with world() as play:
        a = await play.start("a")
        prober = MemoryTransport(play.net, "10.66.0.1")
        for _ in range(5):
            await (await prober.dial(a.agent.address)).aclose()
        await trio.sleep(1)
        counts = a.agent.counts()
        assert counts["stream_knocks"] == 5 and "stream_strangers" not in counts and not a.logs


@in_virtual_time
async def test_a_newcomer_finds_a_place_though_all_neighbours_are_taken() -> None:
    async with world() as play:
        sizes = {"full_mesh_max": 4, "neighbours": 2}
        first = await play.start("n00", **sizes)
        for number in range(1, 14):
            await play.start(f"n{number:02d}", [f"{first.host}:7946"], **sizes)
        await trio.sleep(30)
        assert play.all_alive()
        for number in range(14, 17):
            await play.start(f"n{number:02d}", [f"{first.host}:7946"], **sizes)
            assert await play.until(play.all_alive, 10.0) <= 1.0


@in_virtual_time
async def test_the_queue_of_a_pipe_is_bounded_in_bytes_too() -> None:
    async with world() as play, trio.open_nursery() as nursery:
        a = await play.start("a")
        peer = Stranger(play, "b", "10.7.7.7", b"b-boot-1")
        _, pipe = await peer.greeted(a.agent.address, nursery)
        for _ in range(7):
            pipe.send(Frame(99, bytes(1_000_000)))
        assert pipe.dropped == 3
        nursery.cancel_scope.cancel()


@in_virtual_time
async def test_a_port_that_takes_the_last_dial_of_a_dying_process_still_counts_as_refusing() -> None:
    async with world() as play:
        nodes = await play.mesh("abc")
        await trio.sleep(3)
        victim = nodes[2].agent._transport
        assert isinstance(victim, MemoryTransport)
        victim.send = lambda data, address: True  # type: ignore[method-assign]
        victim.backlog, nobody_reads = trio.open_memory_channel[MemoryStream](9)
        for stream in list(victim.streams):
            stream.shut()  # the kernel closes the streams of a killed process first ...
        await trio.sleep(0.003)
        await play.kill("c")  # ... dials that came meanwhile are dropped, and then the port refuses
        took_s = await play.until(lambda: all(node.sees()["c"] == "dead" for node in nodes[:2]), 5.0)
        assert took_s <= 0.5
        nobody_reads.close()
