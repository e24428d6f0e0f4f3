"""What leaves a pipe by whom, and in which order: the writer, or at once whoever has a frame that somebody waits for."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import trio
import trio.testing
from hypothesis import given
from hypothesis import strategies as st

from mesh.frames import Frame, FrameType
from mesh.keyring import Keyring
from mesh.pipe import Pipe
from mesh.seal import Sealer
from mesh.stream_seal import StreamSeal

SECRET = b"a secret of the mesh, 32 bytes.."


class Raw:
    """A connection with a socket buffer of `room` bytes, emptied by `read`; see `mesh.transport.ByteStream`."""

    local_address = peer_address = ("10.0.0.1", 7946)
    is_protected = False

    def __init__(self, room: int) -> None:
        self.room = room
        self.sent = bytearray()
        self.at_once: list[int] = []
        """Bytes that each call of `send_nowait` took."""
        self._has_room = trio.Event()
        self._is_closed = trio.Event()

    async def start(self) -> None:
        await trio.lowlevel.checkpoint()

    def read(self, count: int) -> None:
        self.room += count
        self._has_room.set()

    def send_nowait(self, data: bytes) -> int:
        taken = min(len(data), self.room)
        self.at_once.append(taken)
        return self._take(data[:taken])

    async def send_all(self, data: bytes) -> None:
        await trio.lowlevel.checkpoint()
        while data:
            data = data[self._take(data[: self.room]) :]
            if data:
                self._has_room = trio.Event()
                await self._has_room.wait()

    def _take(self, data: bytes) -> int:
        self.sent += data
        self.room -= len(data)
        return len(data)

    async def receive_some(self, bytes_max: int) -> bytes:
        await self._is_closed.wait()
        return b""

    async def aclose(self) -> None:
        self._is_closed.set()


class Ears:
    """Hears nothing, has no state to send."""

    def __init__(self) -> None:
        self.noted: list[tuple[int, str, int]] = []
        self.state: list[Frame] = []

    def on_frame(self, pipe: Pipe, frame: Frame) -> None:
        raise AssertionError("nothing comes")

    def on_batch(self, pipe: Pipe) -> None:
        raise AssertionError("nothing comes")

    def state_for(self, pipe: Pipe, bytes_max: int) -> list[Frame]:
        state, self.state = self.state, []
        return state

    def note(self, kind: int, direction: str, size_bytes: int) -> None:
        self.noted.append((kind, direction, size_bytes))


def ends(*, is_sealed: bool) -> tuple[StreamSeal, StreamSeal]:
    """The seals of both ends, open."""
    ring = Keyring.of(SECRET) if is_sealed else Keyring.of()
    dialer = StreamSeal(Sealer(b"dialer__", keyring=ring), bytes(16), is_dialer=True)
    acceptor = StreamSeal(Sealer(b"acceptor", keyring=ring), bytes(range(16)), is_dialer=False)
    acceptor.feed(dialer.opening())
    dialer.feed(acceptor.opening())
    assert dialer.is_open and acceptor.is_open and dialer.is_sealed == is_sealed
    return dialer, acceptor


class Play:
    """One running pipe and what the other end makes of its bytes."""

    def __init__(self, room: int, *, is_sealed: bool = True, queue_frames_max: int = 64) -> None:
        seal, self._peer = ends(is_sealed=is_sealed)
        self.raw, self.ears = Raw(room), Ears()
        self.pipe = Pipe(self.raw, seal, self.ears, is_dialer=True, queue_frames_max=queue_frames_max)
        self._read = 0

    def arrived(self) -> list[bytes]:
        """Bodies of the frames that arrived since the last look; a frame out of its order does not authenticate."""
        data = bytes(self.raw.sent[self._read :])
        self._read = len(self.raw.sent)
        return [frame.body for frame in self._peer.feed(data)]


def played(
    play: Callable[[], Play], act: Callable[[Play], object] | None = None, *later: Callable[[Play], object]
) -> Play:
    """Run a pipe; between the acts all tasks come to rest."""

    async def run() -> Play:
        made = play()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(made.pipe.run)
            for each in (act, *later):
                await trio.testing.wait_all_tasks_blocked()
                if each is not None:
                    each(made)
            await trio.testing.wait_all_tasks_blocked()
            nursery.cancel_scope.cancel()
        return made

    return trio.run(run)


def ask(body: bytes) -> Frame:
    return Frame(FrameType.ASK, body)


@pytest.mark.parametrize("is_sealed", [True, False])
def test_a_frame_that_somebody_waits_for_has_left_before_any_task_runs(is_sealed: bool) -> None:
    def act(play: Play) -> None:
        play.pipe.send_now(ask(b"one"))
        play.pipe.send_now(ask(b"two"))
        assert play.arrived() == [b"one", b"two"]
        assert play.ears.noted == [(FrameType.ASK, "out", 3)] * 2

    play = played(lambda: Play(10_000, is_sealed=is_sealed), act)
    assert play.arrived() == [] and len(play.raw.at_once) == 2


def test_of_a_frame_that_was_taken_in_part_the_writer_sends_the_rest_before_all_others() -> None:
    def act(play: Play) -> None:
        play.pipe.send_now(ask(b"cut in two"))
        play.pipe.send_now(ask(b"after it"))
        play.pipe.send(ask(b"at last"))
        assert play.raw.at_once == [7] and play.arrived() == []

    play = played(lambda: Play(7), act, lambda play: play.raw.read(1), lambda play: play.raw.read(1000))
    assert play.arrived() == [b"cut in two", b"after it", b"at last"]
    assert play.ears.noted == [
        (FrameType.ASK, "out", len(b)) for b in (b"cut in two", b"after it", b"at last")
    ]


def test_nothing_overtakes_what_waits_nor_what_the_writer_is_sending() -> None:
    def queued(play: Play) -> None:
        play.pipe.send(ask(b"first"))
        play.pipe.send_now(ask(b"second"))  # the writer was woken and has not run

    def under_way(play: Play) -> None:
        assert play.arrived() == []
        play.pipe.send_now(ask(b"third"))

    play = played(lambda: Play(5), queued, under_way, lambda play: play.raw.read(1000))
    assert play.arrived() == [b"first", b"second", b"third"] and play.raw.at_once == []


def test_where_nothing_can_go_at_once_the_writer_sends_all() -> None:
    def act(play: Play) -> None:
        play.raw.room, room = 0, play.raw.room
        play.pipe.send_now(ask(b"as over TLS"))
        play.raw.room = room

    play = played(lambda: Play(10_000), act)
    assert play.raw.at_once == [0] and play.arrived() == [b"as over TLS"]


def test_state_that_waits_for_the_writer_does_not_hold_up_a_question() -> None:
    def act(play: Play) -> None:
        play.ears.state.append(Frame(FrameType.DELTA, b"state"))
        play.pipe.wake()
        play.pipe.send_now(ask(b"question"))
        assert play.arrived() == [b"question"]

    assert played(lambda: Play(10_000), act).arrived() == [b"state"]


def test_what_waits_behind_a_full_connection_is_bounded_and_the_rest_of_a_frame_stays() -> None:
    def act(play: Play) -> None:
        for number in range(20):
            play.pipe.send_now(ask(b"%d" % number))

    play = played(lambda: Play(3, queue_frames_max=4), act, lambda play: play.raw.read(10_000))
    assert play.arrived() == [b"0", b"16", b"17", b"18", b"19"] and play.pipe.dropped == 15


def test_a_pipe_that_closes_sends_what_was_cut_and_takes_no_short_cut_any_more() -> None:
    def act(play: Play) -> None:
        play.pipe.send_now(ask(b"cut"))
        play.pipe.close(Frame(FrameType.REFUSED, b"bye"))
        play.raw.read(1000)

    play = played(lambda: Play(3), act)
    assert play.arrived() == [b"cut", b"bye"] and len(play.raw.at_once) == 1
    play.pipe.send_now(ask(b"too late"))
    assert play.arrived() == []


@given(
    room=st.integers(0, 120),
    acts=st.lists(
        st.one_of(st.sampled_from(["send", "now", "rest"]), st.integers(1, 150)), min_size=1, max_size=40
    ),
)
def test_whoever_sends_frames_arrive_whole_and_in_order(room: int, acts: list[str | int]) -> None:
    async def run() -> None:
        play, sent = Play(room), list[bytes]()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(play.pipe.run)
            await trio.testing.wait_all_tasks_blocked()
            for act in acts:
                if isinstance(act, int):
                    play.raw.read(act)
                elif act == "rest":
                    await trio.testing.wait_all_tasks_blocked()
                else:
                    sent.append(b"frame %d" % len(sent))
                    (play.pipe.send if act == "send" else play.pipe.send_now)(ask(sent[-1]))
            play.raw.read(1_000_000)
            await trio.testing.wait_all_tasks_blocked()
            nursery.cancel_scope.cancel()
        assert play.arrived() == sent

    trio.run(run)
