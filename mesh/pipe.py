"""One stream between two members, from its greeting to its end: a reader, a writer, and a short queue.

Owns the bytes of one connection. It must never decide whether the stream is wanted (`streams`) nor what frames mean
(`agent`). State is not queued here: the writer asks for it when the connection can take more, so a slow peer costs
nothing and gets the newest when it is ready.
"""

from __future__ import annotations

from collections import deque
from enum import Enum
from typing import Protocol

import trio

from mesh.errors import DecodeError, MeshError, SealError, WeatherError
from mesh.frames import Frame, FrameType
from mesh.greeting import Hello, Refused, decode_hello, decode_refused, encode
from mesh.stream_seal import StreamSeal
from mesh.transport import ByteStream

READ_BYTES = 64 * 1024
WRITE_BYTES = 256 * 1024
"""State asked for at a time: one large write, but small enough that membership frames wait behind little."""
QUEUE_BYTES_MAX = 4 * 1024 * 1024
"""Frames that wait in one queue have at most so many bytes together (a single longer one does not exist)."""
LAST_WORDS_S = 0.25
"""A stream we close in order gets this long to send what it has."""


class RefusedError(WeatherError):
    """The peer greeted us with a goodbye; `refused` says why."""

    code = "refused"

    def __init__(self, refused: Refused) -> None:
        super().__init__(f"refused: {refused.code}: {refused.text}" if refused.text else refused.code)
        self.refused = refused


class KnockError(WeatherError):
    """Somebody connected and left without a byte: a peer's or a load balancer's look whether we can be reached."""

    code = "knock"


class End(Enum):
    """How a stream ended."""

    CLOSED = "closed"
    """The peer's kernel closed or reset it without a word: perhaps its process died."""
    GOODBYE = "goodbye"
    """The peer said why."""
    LOST = "lost"
    """Our kernel gave it up."""
    GARBAGE = "garbage"
    """What came was not of this protocol, or did not authenticate."""
    OURS = "ours"
    """We closed it."""


class Ears(Protocol):
    """Who listens to a pipe and feeds it."""

    def on_frame(self, pipe: Pipe, frame: Frame) -> None:
        """A frame came. Raises DecodeError to end the stream."""
        ...

    def on_batch(self, pipe: Pipe) -> None:
        """All frames of one read have been given."""
        ...

    def state_for(self, pipe: Pipe, bytes_max: int) -> list[Frame]:
        """State frames for this peer now; empty if there is nothing."""
        ...

    def note(self, kind: int, direction: str, size_bytes: int) -> None:
        """For metrics: a frame of this type went `in` or `out`."""
        ...


class Pipe:
    """One connection. Greet first, then `run`; after the greeting `peer` says who is there."""

    __slots__ = (
        "_early",
        "_ears",
        "_has_heard",
        "_is_closing",
        "_is_goodbye",
        "_is_writing",
        "_queue",
        "_queue_bytes",
        "_queue_max",
        "_raw",
        "_rest",
        "_scope",
        "_seal",
        "_wake",
        "dropped",
        "early_state",
        "end",
        "equal_s",
        "error",
        "is_dialer",
        "is_kept",
        "opened_s",
        "peer",
        "peer_digest",
        "peer_fingerprint",
        "received_s",
        "sent_s",
        "silent_ticks",
        "told_digest",
    )

    def __init__(
        self, raw: ByteStream, seal: StreamSeal, ears: Ears, *, is_dialer: bool, queue_frames_max: int
    ):
        self._raw = raw
        self._seal = seal
        self._ears = ears
        self._queue: deque[Frame] = deque()
        self._queue_max = queue_frames_max
        self._queue_bytes = 0
        self._is_writing = True
        """The writer may have bytes under way; only while it sleeps may others send past it."""
        self._rest = b""
        """The end of a frame of which the connection took only the beginning: nothing may go before it."""
        self._early: list[Frame] = []
        """Frames that came in the same read as the greeting."""
        self.early_state: list[Frame] = []
        """State frames that came before this pipe was chosen to carry the peer's state."""
        self._wake = trio.Event()
        self._scope = trio.CancelScope()
        self._has_heard = False
        self._is_closing = False
        self._is_goodbye = False
        self.is_dialer = is_dialer
        self.is_kept = True
        self.peer: Hello | None = None
        self.peer_digest: bytes | None = None
        """The digest of the peer's state in its last keep-alive."""
        self.peer_fingerprint: int | None = None
        self.told_digest: bytes | None = None
        """The digest in our own last keep-alive."""
        self.opened_s = self.sent_s = self.received_s = self.equal_s = trio.current_time()
        """`equal_s`: when the peer last had the digest that we had."""
        self.silent_ticks = 0
        """Rounds of maintenance since anything came: counts our running time only, so a freeze is not silence."""
        self.dropped = 0
        self.end: End | None = None
        self.error = ""

    @property
    def is_open(self) -> bool:
        """Greeted, and nobody has ended it."""
        return self.peer is not None and self.end is None and not self._is_closing

    @property
    def is_protected(self) -> bool:
        """Nobody on the way can read or change it."""
        return self._raw.is_protected or self._seal.is_sealed

    @property
    def local_host(self) -> str:
        """Our end's address: the one that reaches this peer."""
        return self._raw.local_address[0]

    @property
    def heard_salt(self) -> bytes:
        """The salt in the peer's opening, as far as it came."""
        return self._seal.heard_salt

    def __repr__(self) -> str:
        name = self.peer.name if self.peer is not None else "?"
        return f"<Pipe {'to' if self.is_dialer else 'from'} {name} {self.end.value if self.end else 'open'}>"

    # -- greeting

    async def greet(self, hello: Hello) -> Hello:
        """As the dialer: say who we are, hear who is there. Raises RefusedError, WeatherError, DecodeError, SealError."""
        await self._raw.start()
        await self._raw.send_all(self._seal.opening())
        while not self._seal.is_open:
            self._early += self._seal.feed(await self._more())
        await self._raw.send_all(self._seal.seal(Frame(FrameType.HELLO, encode(hello))))
        first = await self._first()
        if first.type == FrameType.REFUSED:
            raise RefusedError(decode_refused(first.body))
        if first.type != FrameType.WELCOME:
            raise DecodeError("no welcome")
        return self._opened(decode_hello(first.body))

    async def hear_greeting(self) -> Hello:
        """As the acceptor: hear who is there; then `welcome` or `refuse`. Raises WeatherError, DecodeError, SealError."""
        await self._raw.start()
        while not self._seal.is_open:
            self._early += self._seal.feed(await self._more())
        await self._raw.send_all(self._seal.opening())
        first = await self._first()
        if first.type != FrameType.HELLO:
            raise DecodeError("no greeting")
        hello = decode_hello(first.body)
        if hello.boot != self._seal.peer_boot:
            raise DecodeError("a greeting in another's name")
        return hello

    async def welcome(self, own: Hello, hello: Hello) -> None:
        """Say who we are; the stream is open."""
        await self._raw.send_all(self._seal.seal(Frame(FrameType.WELCOME, encode(own))))
        self._opened(hello)

    async def refuse(self, refused: Refused) -> None:
        """Say why not."""
        await self._raw.send_all(self._seal.seal(Frame(FrameType.REFUSED, encode(refused))))

    def _opened(self, hello: Hello) -> Hello:
        if hello.boot != self._seal.peer_boot:
            raise DecodeError("a greeting in another's name")
        self.peer = hello
        self.opened_s = self.sent_s = self.received_s = trio.current_time()
        return hello

    async def _more(self) -> bytes:
        data = await self._raw.receive_some(READ_BYTES)
        if not data:
            raise WeatherError("closed before it was open") if self._has_heard else KnockError("nothing said")
        self._has_heard = True
        return data

    async def _first(self) -> Frame:
        while not self._early:
            self._early = self._seal.feed(await self._more())
        return self._early.pop(0)

    # -- talking

    def send(self, frame: Frame) -> None:
        """Queue a frame; when the queue is full the oldest goes, which by then says little."""
        self._queue.append(frame)
        self._queue_bytes += len(frame.body)
        while len(self._queue) > self._queue_max or self._queue_bytes > QUEUE_BYTES_MAX:
            self._queue_bytes -= len(self._queue.popleft().body)
            self.dropped += 1
        self._wake.set()

    def send_now(self, frame: Frame) -> None:
        """As `send`, for a frame that somebody waits for: it leaves before this returns, without a turn of the writer, where
        nothing waits before it and the connection takes it. What is not taken the writer sends."""
        if self._is_writing or self._rest or self._queue or self._is_closing or self.end is not None:
            self.send(frame)
            return
        data = self._seal.seal(frame)
        taken = self._raw.send_nowait(data)
        self.sent_s = trio.current_time()
        self._ears.note(frame.type, "out", len(frame.body))
        if taken < len(data):
            self._rest = data[taken:]
            self._wake.set()

    def wake(self) -> None:
        """There may be state to send."""
        self._wake.set()

    def close(self, last: Frame | None = None, *, at_once: bool = False) -> None:
        """End the stream: send what is queued, then `last` if given, and close; or close without a word."""
        if last is not None:
            self.send(last)
        if self.end is None and not self._is_closing:
            self._is_closing = True
            self._scope.deadline = trio.current_time() + (0.0 if at_once else LAST_WORDS_S)
            self._wake.set()

    async def run(self) -> None:
        """Talk until the end; `end` then says how it came. The connection is closed on return."""
        async with trio.open_nursery() as nursery:
            self._scope = nursery.cancel_scope
            if self._is_closing:
                self._scope.deadline = trio.current_time() + LAST_WORDS_S
            nursery.start_soon(self._write)
            self._finish(*await self._read())
        self._finish(End.OURS, "")

    async def aclose(self) -> None:
        """Close at once. Never raises."""
        await self._raw.aclose()

    def _finish(self, end: End, error: str) -> None:
        if self.end is None:
            self.end = End.OURS if self._is_closing else end
            self.error = error
        self._scope.cancel()

    async def _read(self) -> tuple[End, str]:
        try:
            if self._early:
                early, self._early = self._early, []
                self._give(early)
            while not self._is_goodbye:
                data = await self._raw.receive_some(READ_BYTES)
                if not data:
                    return End.CLOSED, "closed"
                self._give(self._seal.feed(data))
        except WeatherError as error:
            return End.LOST, str(error)
        except (DecodeError, SealError) as error:
            return End.GARBAGE, str(error)
        return End.GOODBYE, self.error

    def _give(self, frames: list[Frame]) -> None:
        self.received_s = trio.current_time()
        self.silent_ticks = 0
        for frame in frames:
            self._ears.note(frame.type, "in", len(frame.body))
            if frame.type == FrameType.REFUSED:
                refused = decode_refused(frame.body)
                self.error = refused.code
                self._is_goodbye = True
                break
            self._ears.on_frame(self, frame)
        self._ears.on_batch(self)

    async def _write(self) -> None:
        try:
            while True:
                data = self._take()
                if data:
                    self.sent_s = trio.current_time()
                    await self._raw.send_all(data)
                elif self._is_closing:
                    return self._finish(End.OURS, "")
                else:
                    self._wake = trio.Event()
                    self._is_writing = False
                    await self._wake.wait()
                    self._is_writing = True
        except MeshError as error:
            # A write that fails says no more than that the stream is gone; why, the reader will find first or never.
            with trio.move_on_after(LAST_WORDS_S):
                await trio.sleep_forever()
            return self._finish(End.LOST, str(error))

    def _take(self) -> bytes:
        """Bytes of all that waits: what is left of a frame, the queue, then state."""
        rest, self._rest = self._rest, b""
        frames = list(self._queue)
        self._queue.clear()
        self._queue_bytes = 0
        if not self._is_closing:
            frames += self._ears.state_for(self, WRITE_BYTES)
        for frame in frames:
            self._ears.note(frame.type, "out", len(frame.body))
        return rest + b"".join([self._seal.seal(frame) for frame in frames])
