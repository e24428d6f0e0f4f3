"""How streams begin: dialling, resolving seeds, accepting, and the greeting at the door.

Owns everything that waits until a connection is greeted, and its bounds: dials under way, strangers that have not said
who they are. Which streams are wanted, and their life once greeted, is the table's matter (`streams`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import trio

from mesh.address import format_address, parse_address
from mesh.errors import DecodeError, DialError, EchoError, SealError, SettingsError, WeatherError
from mesh.frames import Frame
from mesh.greeting import DUPLICATE, KEPT, UNREACHABLE, Hello, Refused, notice, refusal
from mesh.member import Address
from mesh.pipe import Ears, KnockError, Pipe, RefusedError
from mesh.seal import Sealer
from mesh.settings import AgentSettings
from mesh.stream_seal import SALT_BYTES, StreamSeal
from mesh.transport import ByteStream, Transport

DIALS_MAX = 1024
"""Dials under way or waiting for their turn; more fail at once, and are asked for again by who needs them."""
DIAL_FRAMES_MAX = 64
"""Frames that wait for one dial."""
ERRORS_MAX = 512
"""Addresses whose last error is remembered."""
LOOK_AGAIN_S = 0.03
"""A dial that was taken and dropped without a byte is made once more after this long."""
STRANGER_LOG_S = 10.0
"""Who could not greet us is logged once per so long, with the count."""


class Host(Ears, Protocol):
    """What the agent must be to the doors."""

    def hello(self, flags: int) -> Hello:
        """Our greeting now."""
        ...

    def holds_our_key(self, address: Address) -> bool:
        """Does the member there hold the key we send with?"""
        ...

    def life_of(self, name: str) -> bytes | None:
        """The boot id membership knows for this name; None if it knows no such name."""
        ...

    def on_dial_failed(self, address: Address, is_refused: bool) -> None:
        """Nobody there, or nobody we could talk to."""
        ...

    def on_seed(self, seed: str, name: str | None, boot: bytes, pipe: Pipe | None) -> None:
        """A seed was reached (and by this stream, if there is one now), or nobody there (name None)."""
        ...

    def log(self, event: str, **fields: object) -> None:
        """Something an operator may want to know."""
        ...


class Table(Protocol):
    """What the doors ask of the table of streams."""

    is_large: bool

    def at(self, address: Address) -> Pipe | None:
        """The open stream to whoever advertises this address."""
        ...

    def of(self, name: str) -> Pipe | None:
        """The open stream of this peer."""
        ...

    def unwanted(self, own: Hello, hello: Hello) -> Refused | None:
        """Why this greeting is not let in, or None."""
        ...

    def keeps(self, hello: Hello) -> bool:
        """Shall the stream of this dialer stay and carry state?"""
        ...

    async def live(self, pipe: Pipe, dial: Dial | None) -> None:
        """The life of a greeted stream; `arrived` of the dial is called once it is in the table."""
        ...


class Dial:
    """One dial under way: what to send when it succeeds, and the seeds that hang on it."""

    __slots__ = ("address", "frames", "is_connected", "is_kept", "salt", "seeds")

    def __init__(self, address: Address) -> None:
        self.address = address
        self.frames: list[Frame] = []
        self.seeds: list[Seed] = []
        self.is_kept = False
        self.is_connected = False
        self.salt = b""


class Seed:
    """One asking for a seed: it has failed when all its addresses have."""

    __slots__ = ("is_answered", "left", "text")

    def __init__(self, text: str, left: int) -> None:
        self.text = text
        self.left = left
        self.is_answered = False


class Doors:
    """See the module. `run` must be running; `dial` and `dial_seed` are plain calls."""

    def __init__(
        self,
        settings: AgentSettings,
        transport: Transport,
        sealer: Sealer,
        host: Host,
        table: Table,
        entropy: Callable[[int], bytes],
    ) -> None:
        self._settings = settings
        self._transport = transport
        self._sealer = sealer
        self._host = host
        self._table = table
        self._entropy = entropy
        self._dials: dict[Address, Dial] = {}
        self._echoes: set[bytes] = set()
        """Salts of dials of ours that arrived at our own port."""
        self._greeting: dict[int, trio.CancelScope] = {}
        self._greeting_count = 0
        self._stranger_logged_s = float("-inf")
        self._jobs, self._jobs_in = trio.open_memory_channel[Dial | Pipe | str](DIALS_MAX)
        self.errors: dict[Address, str] = {}
        """What went wrong last with a stream to this address."""
        self.refusing: dict[Address, None] = {}
        """Addresses whose port refused at our last attempt; a set in order."""
        self.counts: dict[str, int] = {}

    def count(self, what: str) -> None:
        """Count something for metrics."""
        self.counts[what] = self.counts.get(what, 0) + 1

    def is_connected_to(self, address: Address) -> bool:
        """Is a dial of ours there beyond the network's part, in its greeting?"""
        dial = self._dials.get(address)
        return dial is not None and dial.is_connected

    def dial_seed(self, text: str) -> None:
        """Resolve the seed, dial all its addresses; `on_seed` follows."""
        try:
            self._jobs.send_nowait(text)
        except trio.WouldBlock:
            self._host.on_seed(text, None, b"", None)

    def note_error(self, address: Address, error: str) -> None:
        """Remember what went wrong last with this address; log it if that is new."""
        if self.errors.pop(address, None) != error:
            self._host.log("stream_failed", address=format_address(address), error=error)
        while len(self.errors) >= ERRORS_MAX:
            del self.errors[next(iter(self.errors))]
        self.errors[address] = error

    def _note_refusal(self, address: Address, is_refused: bool) -> None:
        self.refusing.pop(address, None)
        if is_refused:
            while len(self.refusing) >= ERRORS_MAX:
                del self.refusing[next(iter(self.refusing))]
            self.refusing[address] = None

    def arrived(self, dial: Dial, pipe: Pipe, peer: Hello) -> None:
        """The dial's stream is in the table: send what waited, tell the seeds."""
        seeds = self._end_dial(dial)
        for frame in dial.frames:
            pipe.send(frame)
        for seed in seeds:
            self._answered(seed, peer.name, peer.boot, pipe)

    # -- dialling

    def dial(self, address: Address) -> Dial:
        """The dial under way to this address, a new one if there is none; put frames into it."""
        dial = self._dials.get(address)
        if dial is None:
            dial = Dial(address)
            try:
                self._jobs.send_nowait(dial)
            except trio.WouldBlock:
                self.count("dials_dropped")
                return dial  # nobody will hear of it; the machines ask again
            self._dials[address] = dial
        del dial.frames[: max(0, len(dial.frames) + 1 - DIAL_FRAMES_MAX)]
        return dial

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Accept and dial until cancelled; every connection is closed on the way out."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._accept_all)
            task_status.started()
            async for job in self._jobs_in:
                if isinstance(job, str):
                    nursery.start_soon(self._resolve_seed, job)
                elif isinstance(job, Pipe):
                    nursery.start_soon(self._look_back, job)
                else:
                    nursery.start_soon(self._dialled, job)

    async def _resolve_seed(self, text: str) -> None:
        addresses: list[Address] = []
        error = "no address"
        try:
            host, port = parse_address(text, self._settings.port)
            with trio.move_on_after(self._settings.resolve_s) as scope:
                addresses = await self._transport.resolve(host, port)
            if scope.cancelled_caught:
                error = "resolution took too long"
        except (WeatherError, SettingsError) as caught:
            error = str(caught)
        if not addresses:
            self._host.log("seed_unresolved", seed=text, error=error)
            self._host.on_seed(text, None, b"", None)
            return
        seed = Seed(text, len(addresses))
        for address in addresses:
            pipe = self._table.at(address)
            if pipe is not None and pipe.peer is not None:
                self._answered(seed, pipe.peer.name, pipe.peer.boot, pipe)
                continue
            dial = self.dial(address)
            if self._dials.get(address) is dial:
                dial.seeds.append(seed)
            else:
                self._unanswered(seed)

    def _answered(self, seed: Seed, name: str, boot: bytes, pipe: Pipe | None) -> None:
        seed.is_answered = True
        seed.left -= 1
        self._host.on_seed(seed.text, name, boot, pipe)

    def _unanswered(self, seed: Seed) -> None:
        seed.left -= 1
        if seed.left == 0 and not seed.is_answered:
            self._host.on_seed(seed.text, None, b"", None)

    async def _dialled(self, dial: Dial) -> None:
        """One dial, and the life of the stream it opens."""
        pipe: Pipe | None = None
        error, is_refused = "no answer", False
        try:
            try:
                pipe = await self._connected(dial)
            except KnockError:
                if dial.salt in self._echoes:
                    raise
                # A process that is killed loses its streams a moment before its port; only the port's refusal tells.
                await trio.sleep(LOOK_AGAIN_S)
                pipe = await self._connected(dial)
        except DialError as caught:
            error, is_refused = str(caught), caught.is_refused
        except RefusedError as caught:
            if self._end_refused(dial, caught.refused):
                return
            error = str(caught)
        except (WeatherError, DecodeError, SealError) as caught:
            if dial.salt in self._echoes or isinstance(caught, EchoError):
                self._end_echo(dial)
                return
            error = str(caught)
        finally:
            self._echoes.discard(dial.salt)
        if pipe is not None:
            await self._table.live(pipe, dial)
        elif not self._end_needless(dial):
            self._end_failed(dial, error, is_refused)

    async def _connected(self, dial: Dial) -> Pipe | None:
        """The greeted stream; None if nobody answers, or if the peer reached us meanwhile."""
        raw: ByteStream | None = None
        pipe: Pipe | None = None
        with trio.move_on_after(self._settings.dial_s):
            raw = await self._transport.dial(dial.address)
        if raw is None:
            return None
        try:
            if self._table.at(dial.address) is None:
                pipe = await self._greeted(dial, raw)
        finally:
            if pipe is None:
                dial.is_connected = False
                await raw.aclose()
        return pipe

    async def _greeted(self, dial: Dial, raw: ByteStream) -> Pipe:
        dial.is_connected = True
        dial.salt = self._entropy(SALT_BYTES)
        pipe = self._pipe(raw, dial.salt, True, self._host.holds_our_key(dial.address))
        pipe.is_kept = dial.is_kept or not self._table.is_large
        with trio.move_on_after(self._settings.greeting_s) as scope:
            welcome = await pipe.greet(self._host.hello(KEPT if pipe.is_kept else 0))
            pipe.is_kept = pipe.is_kept and welcome.is_kept
        if scope.cancelled_caught:
            raise WeatherError("no greeting")
        return pipe

    def _pipe(self, raw: ByteStream, salt: bytes, is_dialer: bool, peer_holds_key: bool = False) -> Pipe:
        seal = StreamSeal(
            self._sealer,
            salt,
            is_dialer=is_dialer,
            is_protected=raw.is_protected,
            peer_holds_key=peer_holds_key,
        )
        queue_max = self._settings.queue_frames_max
        return Pipe(raw, seal, self._host, is_dialer=is_dialer, queue_frames_max=queue_max)

    def _end_dial(self, dial: Dial) -> list[Seed]:
        if self._dials.get(dial.address) is dial:
            del self._dials[dial.address]
        return dial.seeds

    def _end_needless(self, dial: Dial) -> bool:
        """True if the peer reached us while we dialled."""
        pipe = self._table.at(dial.address)
        if pipe is None or pipe.peer is None:
            return False
        self.arrived(dial, pipe, pipe.peer)
        return True

    def _end_echo(self, dial: Dial) -> None:
        own = self._host.hello(0)
        for seed in self._end_dial(dial):
            self._answered(seed, own.name, own.boot, None)

    def _end_refused(self, dial: Dial, refused: Refused) -> bool:
        """True if the refusal is no failure: we have a stream with that peer, or soon shall."""
        self.count("refused_duplicate" if refused.code == DUPLICATE else "refused_by_peer")
        if refused.code != DUPLICATE:
            self._host.log("stream_refused", address=format_address(dial.address), error=refused.text)
            return False
        pipe = self._table.of(refused.name)
        for seed in self._end_dial(dial):
            self._answered(seed, refused.name, refused.boot, pipe)
        if pipe is not None:
            for frame in dial.frames:
                pipe.send(frame)
        return True

    def _end_failed(self, dial: Dial, error: str, is_refused: bool) -> None:
        seeds = self._end_dial(dial)
        self.note_error(dial.address, error)
        self._note_refusal(dial.address, is_refused)
        self._host.on_dial_failed(dial.address, is_refused)
        for seed in seeds:
            self._unanswered(seed)

    # -- accepting

    async def _accept_all(self) -> None:
        async with trio.open_nursery() as nursery:
            while True:
                raw = await self._transport.accept()
                nursery.start_soon(self._accepted, raw)

    async def _accepted(self, raw: ByteStream) -> None:
        """One stranger at the door, and the life of the stream if it is let in."""
        number = self._greeting_count = self._greeting_count + 1
        while len(self._greeting) >= self._settings.greetings_max:
            self.count("greetings_dropped")
            self._greeting.pop(next(iter(self._greeting))).cancel()
        pipe: Pipe | None = None
        try:
            with trio.move_on_after(self._settings.greeting_s) as scope:
                self._greeting[number] = scope
                pipe = await self._let_in(raw)
        except EchoError:
            pass
        except KnockError:
            self.count("knocks")
        except (WeatherError, DecodeError, SealError) as error:
            self._note_stranger(raw.peer_address[0], str(error))
        finally:
            self._greeting.pop(number, None)
            if pipe is None:
                await raw.aclose()
        if pipe is not None:
            self._look_back_soon(pipe)
            await self._table.live(pipe, None)

    def _look_back_soon(self, pipe: Pipe) -> None:
        """A life we did not know: can it be reached where it says?"""
        peer = pipe.peer
        if peer is not None and self._host.life_of(peer.name) != peer.boot:
            try:
                self._jobs.send_nowait(pipe)
            except trio.WouldBlock:
                pass  # a courtesy; many join at once just now

    async def _look_back(self, pipe: Pipe) -> None:
        """Dial the newcomer where it says; if that fails tell it, since only its operator can put it right."""
        peer = pipe.peer
        assert peer is not None
        error = "no answer"
        try:
            with trio.move_on_after(self._settings.dial_s):
                raw = await self._transport.dial(peer.address)
                await raw.aclose()
                return
        except DialError as caught:
            error = str(caught)
        own = self._host.hello(0)
        text = f"{own.name} cannot reach {peer.name} at its advertised address {format_address(peer.address)}: {error}"
        pipe.send(notice(UNREACHABLE, text, own.name, own.boot))

    def _note_stranger(self, host: str, error: str) -> None:
        """Counted always, logged seldom: strangers may be many."""
        self.count("strangers")
        now = trio.current_time()
        if now - self._stranger_logged_s >= STRANGER_LOG_S:
            self._stranger_logged_s = now
            self._host.log("stranger", host=host, error=error, so_far=self.counts["strangers"])

    async def _let_in(self, raw: ByteStream) -> Pipe | None:
        pipe = self._pipe(raw, self._entropy(SALT_BYTES), False)
        try:
            hello = await pipe.hear_greeting()
        except EchoError:
            # The dialer, which is we, will see no more than a closed stream; its salt tells it why.
            self._echoes |= {dial.salt for dial in self._dials.values() if dial.salt == pipe.heard_salt}
            raise
        own = self._host.hello(0)
        refused = refusal(own, hello) or self._table.unwanted(own, hello)
        if refused is not None:
            self.count(f"turned_away_{refused.code}")
            if refused.code != DUPLICATE:
                self._host.log(
                    "stream_turned_away", peer=hello.name, address=raw.peer_address[0], error=refused.text
                )
            await pipe.refuse(refused)
            return None
        pipe.is_kept = self._table.keeps(hello)
        await pipe.welcome(self._host.hello(KEPT if pipe.is_kept else 0), hello)
        return pipe
