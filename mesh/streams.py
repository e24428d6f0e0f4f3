"""The streams of one node: at most one per life of each member, dialled by the smaller name, a few in a large mesh.

Owns which connections exist, who dials whom, what happens when two dial at once, and which of a name's streams carries
state. It must never look into membership or state: the agent says who lives and hears what comes.

Up to `full_mesh_max` members every pair keeps a stream; above, each node dials half of `neighbours` at random, and
other streams live as long as their errand.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from random import Random
from typing import Protocol

import trio

from mesh.address import format_address, parse_address
from mesh.errors import DecodeError, DialError, EchoError, SealError, SettingsError, WeatherError
from mesh.frames import Frame
from mesh.greeting import BUSY, DUPLICATE, IDLE, KEPT, Hello, Refused, goodbye, refusal
from mesh.member import Address, Member
from mesh.pipe import Ears, End, Pipe, RefusedError
from mesh.seal import Sealer
from mesh.settings import AgentSettings
from mesh.stream_seal import SALT_BYTES, StreamSeal
from mesh.transport import ByteStream, Transport

DIALS_MAX = 1024
"""Dials under way or waiting for their turn; more fail at once, and are asked for again by who needs them."""
DIAL_FRAMES_MAX = 64
"""Frames that wait for one dial."""
FRESH_S = 2.0
"""Two streams of one pair opened within this time are a simultaneous open; a later one replaces a dead one."""
LARGER_DIALS_AFTER = 3
"""The larger name dials too when the smaller has not for so many rounds: perhaps it may not, through its firewall."""
ERRORS_MAX = 512
"""Addresses whose last error is remembered."""
TRIMMED_PER_ROUND = 4
"""Streams closed per round of maintenance because there are too many: slowly, so that relaying never breaks."""
STRANGER_LOG_S = 10.0
"""Who could not greet us is logged once per so long, with the count."""


class Owner(Ears, Protocol):
    """What the agent must be to the streams."""

    def hello(self, flags: int) -> Hello:
        """Our greeting now."""
        ...

    def holds_our_key(self, address: Address) -> bool:
        """Does the member there hold the key we send with?"""
        ...

    def life_of(self, name: str) -> bytes | None:
        """The boot id membership knows for this name; None if it knows no such name."""
        ...

    def on_bound(self, pipe: Pipe) -> None:
        """State of this peer now goes over this stream."""
        ...

    def on_unbound(self, name: str) -> None:
        """No stream carries this peer's state any more."""
        ...

    def on_closed(self, name: str, boot: bytes) -> None:
        """The peer's end closed without a word."""
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


class _Dial:
    """One dial under way."""

    __slots__ = ("address", "frames", "is_connected", "is_kept", "salt", "seeds")

    def __init__(self, address: Address) -> None:
        self.address = address
        self.frames: list[Frame] = []
        self.seeds: list[_Seed] = []
        self.is_kept = False
        self.is_connected = False
        self.salt = b""


class _Seed:
    """One asking for a seed: it has failed when all its addresses have."""

    __slots__ = ("is_answered", "left", "text")

    def __init__(self, text: str, left: int) -> None:
        self.text = text
        self.left = left
        self.is_answered = False


class Streams:
    """See the module. `run` must be running; all other methods are plain calls."""

    def __init__(
        self,
        settings: AgentSettings,
        transport: Transport,
        sealer: Sealer,
        owner: Owner,
        rng: Random,
        entropy: Callable[[int], bytes],
    ) -> None:
        self._settings = settings
        self._transport = transport
        self._sealer = sealer
        self._owner = owner
        self._rng = rng
        self._entropy = entropy
        self._pipes: dict[str, dict[bytes, Pipe]] = {}
        """name → boot → stream, greeted ones."""
        self._bound: dict[str, Pipe] = {}
        self._dials: dict[Address, _Dial] = {}
        self._echoes: set[bytes] = set()
        """Salts of dials of ours that arrived at our own port."""
        self._missing: dict[str, int] = {}
        self._greeting: dict[int, trio.CancelScope] = {}
        self._greeting_count = 0
        self._is_large = False
        self._stranger_logged_s = float("-inf")
        self._jobs, self._jobs_in = trio.open_memory_channel[_Dial | str](DIALS_MAX)
        self.errors: dict[Address, str] = {}
        """What went wrong last with a stream to this address."""
        self.counts: dict[str, int] = {}

    # -- views

    def bound(self) -> Iterable[Pipe]:
        """The streams that carry state, one per peer."""
        return list(self._bound.values())

    def of(self, name: str) -> Pipe | None:
        """The stream of a peer that carries state, else any open one."""
        pipe = self._bound.get(name)
        if pipe is None:
            pipe = next((each for each in self._pipes.get(name, {}).values() if each.is_open), None)
        return pipe

    def is_bound(self, pipe: Pipe) -> bool:
        """Is this the stream that carries its peer's state?"""
        return pipe.peer is not None and self._bound.get(pipe.peer.name) is pipe

    @property
    def count(self) -> int:
        """Open streams."""
        return sum(len(lives) for lives in self._pipes.values())

    # -- what the agent asks for

    def deliver(self, peer: str | None, address: Address, frame: Frame) -> None:
        """Send on the stream of this peer or address; dial if there is none. `on_dial_failed` follows a failure."""
        pipe = self._find(peer, address)
        if pipe is not None:
            pipe.send(frame)
        else:
            self._dial(address).frames.append(frame)

    def dial_seed(self, text: str) -> None:
        """Resolve the seed, dial all its addresses; `on_seed` follows."""
        try:
            self._jobs.send_nowait(text)
        except trio.WouldBlock:
            self._owner.on_seed(text, None, b"", None)

    def rebind(self, name: str) -> None:
        """Membership changed its mind about this name: choose again which of its streams carries state."""
        wanted = self._wanted(name)
        former = self._bound.get(name)
        if wanted is former:
            return
        if former is not None:
            del self._bound[name]
            self._owner.on_unbound(name)
        if wanted is not None:
            self._bound[name] = wanted
            self._owner.on_bound(wanted)
            wanted.wake()

    def drop(self, name: str) -> None:
        """This member is dead or left: close its streams, what is queued goes first."""
        for pipe in list(self._pipes.get(name, {}).values()):
            pipe.close()
        self._missing.pop(name, None)
        self.rebind(name)

    def set_large(self, is_large: bool) -> None:
        """Is the mesh too large for a stream per pair?"""
        if is_large != self._is_large:
            self._is_large = is_large
            for name in list(self._pipes):
                self.rebind(name)

    def welcome_member(self, name: str, address: Address) -> None:
        """A member appeared: in a small mesh the smaller name dials at once."""
        if not self._is_large and self._owner.hello(0).name < name and not self._has(name):
            self._dial(address).is_kept = True

    def maintain(self, live: list[Member], now: float) -> None:
        """Once per round: dial what is missing, close what is not needed or silent."""
        silent_ticks = self._settings.silent_s / self._settings.maintain_interval_s
        for lives in list(self._pipes.values()):
            for pipe in list(lives.values()):
                pipe.silent_ticks += 1
                if pipe.silent_ticks > silent_ticks:
                    self._count("silent")
                    pipe.error = "silent"
                    pipe.close(at_once=True)
        if self._is_large:
            self._keep_neighbours(live, now)
        else:
            self._keep_all(live)

    def close_all(self) -> None:
        """We are leaving: last words, then nothing."""
        for lives in list(self._pipes.values()):
            for pipe in list(lives.values()):
                pipe.close()

    # -- who dials

    def _has(self, name: str) -> bool:
        return any(pipe.is_open for pipe in self._pipes.get(name, {}).values())

    def _keep_all(self, live: list[Member]) -> None:
        own_name = self._owner.hello(0).name
        missing: dict[str, int] = {}
        for member in live:
            if not self._has(member.name):
                rounds = missing[member.name] = self._missing.get(member.name, 0) + 1
                if own_name < member.name or rounds > LARGER_DIALS_AFTER:
                    self._dial(member.address).is_kept = True
        self._missing = missing

    def _keep_neighbours(self, live: list[Member], now: float) -> None:
        pipes = [pipe for lives in self._pipes.values() for pipe in lives.values() if pipe.is_open]
        dialled = [pipe for pipe in pipes if pipe.is_dialer and pipe.is_kept]
        wanted = (self._settings.neighbours + 1) // 2
        if len(dialled) < wanted and live:
            member = live[self._rng.randrange(len(live))]
            if not self._has(member.name):
                self._dial(member.address).is_kept = True
        for pipe in dialled[wanted:][:TRIMMED_PER_ROUND]:
            self._bid_goodbye(pipe, IDLE)
        # A seed was dialled by everyone while they knew nobody else: it sends the surplus to other neighbours.
        accepted = [pipe for pipe in pipes if not pipe.is_dialer and pipe.is_kept]
        surplus = len(accepted) - self._settings.neighbours
        for pipe in self._rng.sample(accepted, max(0, min(surplus, TRIMMED_PER_ROUND))):
            self._bid_goodbye(pipe, BUSY)
        for pipe in pipes:
            idle_s = now - max(pipe.sent_s, pipe.received_s)
            if not pipe.is_kept and pipe.is_dialer and idle_s > self._settings.errand_s:
                self._bid_goodbye(pipe, IDLE)

    def _bid_goodbye(self, pipe: Pipe, code: str) -> None:
        own = self._owner.hello(0)
        pipe.close(goodbye(code, "", own.name, own.boot))

    def _find(self, peer: str | None, address: Address) -> Pipe | None:
        if peer is None:
            return self._at(address)
        lives = self._pipes.get(peer)
        if not lives:
            return None
        boot = self._owner.life_of(peer)
        pipe = lives.get(boot) if boot is not None else None
        if pipe is None or not pipe.is_open:
            pipe = self._at(address)
        return pipe if pipe is not None and pipe.is_open else None

    def _at(self, address: Address) -> Pipe | None:
        for lives in self._pipes.values():
            for pipe in lives.values():
                if pipe.is_open and pipe.peer is not None and pipe.peer.address == address:
                    return pipe
        return None

    def _wanted(self, name: str) -> Pipe | None:
        lives = self._pipes.get(name, {})
        if name == self._owner.hello(0).name:
            return None  # a namesake: membership will settle it
        boot = self._owner.life_of(name)
        if boot is not None:
            pipes = [lives[boot]] if boot in lives else []
        else:
            pipes = list(lives.values())
        pipes = [pipe for pipe in pipes if pipe.is_open and (pipe.is_kept or not self._is_large)]
        return pipes[-1] if pipes else None

    # -- dialling

    def _dial(self, address: Address) -> _Dial:
        dial = self._dials.get(address)
        if dial is None:
            dial = _Dial(address)
            try:
                self._jobs.send_nowait(dial)
            except trio.WouldBlock:
                self._count("dials_dropped")
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
            self._owner.log("seed_unresolved", seed=text, error=error)
            self._owner.on_seed(text, None, b"", None)
            return
        seed = _Seed(text, len(addresses))
        for address in addresses:
            pipe = self._at(address)
            if pipe is not None and pipe.peer is not None:
                self._answered(seed, pipe.peer.name, pipe.peer.boot, pipe)
                continue
            dial = self._dial(address)
            if self._dials.get(address) is dial:
                dial.seeds.append(seed)
            else:
                self._unanswered(seed)

    def _answered(self, seed: _Seed, name: str, boot: bytes, pipe: Pipe | None) -> None:
        seed.is_answered = True
        seed.left -= 1
        self._owner.on_seed(seed.text, name, boot, pipe)

    def _unanswered(self, seed: _Seed) -> None:
        seed.left -= 1
        if seed.left == 0 and not seed.is_answered:
            self._owner.on_seed(seed.text, None, b"", None)

    async def _dialled(self, dial: _Dial) -> None:
        """One dial, and the life of the stream it opens."""
        raw: ByteStream | None = None
        pipe: Pipe | None = None
        error, is_refused = "no answer", False
        try:
            with trio.move_on_after(self._settings.dial_s):
                raw = await self._transport.dial(dial.address)
            if self._end_needless(dial):
                return
            if raw is not None:
                pipe = await self._greeted(dial, raw)
        except DialError as caught:
            error, is_refused = str(caught), caught.is_refused
        except EchoError:
            self._end_echo(dial)
            return
        except RefusedError as caught:
            if self._end_refused(dial, caught.refused):
                return
            error = str(caught)
        except (WeatherError, DecodeError, SealError) as caught:
            if dial.salt in self._echoes:
                self._end_echo(dial)
                return
            error = str(caught)
        finally:
            if raw is not None and pipe is None:
                await raw.aclose()
            self._echoes.discard(dial.salt)
        if pipe is None:
            self._end_failed(dial, error, is_refused)
        else:
            await self._live(pipe, dial)

    async def _greeted(self, dial: _Dial, raw: ByteStream) -> Pipe:
        dial.is_connected = True
        dial.salt = self._entropy(SALT_BYTES)
        pipe = self._pipe(raw, dial.salt, True, self._owner.holds_our_key(dial.address))
        pipe.is_kept = dial.is_kept or not self._is_large
        with trio.move_on_after(self._settings.greeting_s) as scope:
            await pipe.greet(self._owner.hello(KEPT if pipe.is_kept else 0))
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
        return Pipe(raw, seal, self._owner, is_dialer=is_dialer, queue_frames_max=queue_max)

    def _end_dial(self, dial: _Dial) -> list[_Seed]:
        if self._dials.get(dial.address) is dial:
            del self._dials[dial.address]
        return dial.seeds

    def _end_needless(self, dial: _Dial) -> bool:
        """True if the peer reached us while we dialled."""
        pipe = self._at(dial.address)
        if pipe is None or pipe.peer is None:
            return False
        for seed in self._end_dial(dial):
            self._answered(seed, pipe.peer.name, pipe.peer.boot, pipe)
        for frame in dial.frames:
            pipe.send(frame)
        return True

    def _end_echo(self, dial: _Dial) -> None:
        own = self._owner.hello(0)
        for seed in self._end_dial(dial):
            self._answered(seed, own.name, own.boot, None)

    def _end_refused(self, dial: _Dial, refused: Refused) -> bool:
        """True if the refusal is no failure: we have a stream with that peer, or soon shall."""
        self._count(f"refused_{refused.code}" if refused.code in (DUPLICATE, BUSY) else "refused_by_peer")
        if refused.code != DUPLICATE:
            self._owner.log("stream_refused", address=format_address(dial.address), error=refused.text)
            return False
        pipe = self.of(refused.name)
        for seed in self._end_dial(dial):
            self._answered(seed, refused.name, refused.boot, pipe)
        if pipe is not None:
            for frame in dial.frames:
                pipe.send(frame)
        return True

    def _end_failed(self, dial: _Dial, error: str, is_refused: bool) -> None:
        seeds = self._end_dial(dial)
        self._note_error(dial.address, error)
        self._owner.on_dial_failed(dial.address, is_refused)
        for seed in seeds:
            self._unanswered(seed)

    def _note_error(self, address: Address, error: str) -> None:
        if self.errors.pop(address, None) != error:
            self._owner.log("stream_failed", address=format_address(address), error=error)
        while len(self.errors) >= ERRORS_MAX:
            del self.errors[next(iter(self.errors))]
        self.errors[address] = error

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
            self._count("greetings_dropped")
            self._greeting.pop(next(iter(self._greeting))).cancel()
        pipe: Pipe | None = None
        try:
            with trio.move_on_after(self._settings.greeting_s) as scope:
                self._greeting[number] = scope
                pipe = await self._let_in(raw)
        except EchoError:
            pass
        except (WeatherError, DecodeError, SealError) as error:
            self._note_stranger(raw.peer_address[0], str(error))
        finally:
            self._greeting.pop(number, None)
            if pipe is None:
                await raw.aclose()
        if pipe is not None:
            await self._live(pipe, None)

    def _note_stranger(self, host: str, error: str) -> None:
        """Counted always, logged seldom: strangers may be many."""
        self._count("strangers")
        now = trio.current_time()
        if now - self._stranger_logged_s >= STRANGER_LOG_S:
            self._stranger_logged_s = now
            self._owner.log("stranger", host=host, error=error, so_far=self.counts["strangers"])

    async def _let_in(self, raw: ByteStream) -> Pipe | None:
        pipe = self._pipe(raw, self._entropy(SALT_BYTES), False)
        try:
            hello = await pipe.hear_greeting()
        except EchoError:
            # The dialer, which is we, will see no more than a closed stream; its salt tells it why.
            self._echoes |= {dial.salt for dial in self._dials.values() if dial.salt == pipe.heard_salt}
            raise
        own = self._owner.hello(0)
        refused = refusal(own, hello) or self._unwanted(own, hello)
        if refused is not None:
            self._count(f"turned_away_{refused.code}")
            if refused.code not in (DUPLICATE, BUSY):
                self._owner.log(
                    "stream_turned_away", peer=hello.name, address=raw.peer_address[0], error=refused.text
                )
            await pipe.refuse(refused)
            return None
        pipe.is_kept = hello.is_kept
        await pipe.welcome(own, hello)
        return pipe

    def _unwanted(self, own: Hello, hello: Hello) -> Refused | None:
        """Of two streams opened at once both sides keep the one dialled by the smaller name (of namesakes: boot)."""
        if (own.name, own.boot) < (hello.name, hello.boot):
            dial = self._dials.get(hello.address)
            pipe = self._pipes.get(hello.name, {}).get(hello.boot)
            is_fresh = pipe is not None and pipe.is_open and pipe.is_dialer
            is_fresh = is_fresh and pipe is not None and trio.current_time() - pipe.opened_s < FRESH_S
            if is_fresh or (dial is not None and dial.is_connected):
                return Refused(DUPLICATE, "", own.name, own.boot)
        if self._is_large and hello.is_kept:
            kept = sum(1 for pipe in self._bound.values() if not pipe.is_dialer)
            if kept >= self._settings.neighbours:
                return Refused(BUSY, "enough neighbours", own.name, own.boot)
        return None

    # -- the life of a stream

    async def _live(self, pipe: Pipe, dial: _Dial | None) -> None:
        peer = pipe.peer
        assert peer is not None
        try:
            lives = self._pipes.setdefault(peer.name, {})
            former = lives.get(peer.boot)
            if former is not None:
                former.close(at_once=True)
            lives[peer.boot] = pipe
            self._missing.pop(peer.name, None)
            self.errors.pop(peer.address, None)
            self.rebind(peer.name)
            if dial is not None:
                for frame in dial.frames:
                    pipe.send(frame)
                for seed in self._end_dial(dial):
                    self._answered(seed, peer.name, peer.boot, pipe)
            await pipe.run()
        finally:
            await pipe.aclose()
            self._gone(pipe, peer)

    def _gone(self, pipe: Pipe, peer: Hello) -> None:
        lives = self._pipes.get(peer.name, {})
        if lives.get(peer.boot) is not pipe:
            return  # replaced: its successor speaks for it
        del lives[peer.boot]
        if not lives:
            del self._pipes[peer.name]
        if pipe.end not in (End.OURS, None):
            self._note_error(peer.address, pipe.error or "closed")
        if pipe.end is not None:
            self.rebind(peer.name)
            if pipe.end is End.CLOSED:
                self._owner.on_closed(peer.name, peer.boot)

    def _count(self, what: str) -> None:
        self.counts[what] = self.counts.get(what, 0) + 1
