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

from mesh.doors import Dial, Doors, Host
from mesh.frames import Frame
from mesh.greeting import BUSY, DUPLICATE, IDLE, Hello, Refused, goodbye
from mesh.member import Address, Member
from mesh.pipe import End, Pipe
from mesh.seal import Sealer
from mesh.settings import AgentSettings
from mesh.transport import Transport

FRESH_S = 2.0
"""Two streams of one pair opened within this time are a simultaneous open; a later one replaces a dead one."""
LARGER_DIALS_AFTER = 3
"""The larger name dials too when the smaller has not for so many rounds: perhaps it may not, through its firewall."""
TRIMMED_PER_ROUND = 4
"""Streams closed per round of maintenance because there are too many: slowly, so that relaying never breaks."""


class Owner(Host, Protocol):
    """What the agent must be to the streams."""

    def on_bound(self, pipe: Pipe) -> None:
        """State of this peer now goes over this stream."""
        ...

    def on_unbound(self, name: str) -> None:
        """No stream carries this peer's state any more."""
        ...

    def on_closed(self, name: str, boot: bytes) -> None:
        """The peer's end closed without a word."""
        ...


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
        self._owner = owner
        self._rng = rng
        self._doors = Doors(settings, transport, sealer, owner, self, entropy)
        self._pipes: dict[str, dict[bytes, Pipe]] = {}
        """name → boot → stream, greeted ones."""
        self._bound: dict[str, Pipe] = {}
        self._missing: dict[str, int] = {}
        self.is_large = False
        """No stream per pair, but a few neighbours each."""
        self.run = self._doors.run
        """Accept and dial until cancelled; every connection is closed on the way out."""

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
    def errors(self) -> dict[Address, str]:
        """What went wrong last with a stream to this address."""
        return self._doors.errors

    def is_refusing(self, address: Address) -> bool:
        """Did the port there refuse when we last dialled it, and was no stream open since?"""
        return address in self._doors.refusing

    @property
    def counts(self) -> dict[str, int]:
        """For metrics."""
        return self._doors.counts

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
            self._doors.dial(address).frames.append(frame)

    def dial_seed(self, text: str) -> None:
        """Resolve the seed, dial all its addresses; `on_seed` follows."""
        self._doors.dial_seed(text)

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
        if is_large != self.is_large:
            self.is_large = is_large
            for name in list(self._pipes):
                self.rebind(name)

    def welcome_member(self, name: str, address: Address) -> None:
        """A member appeared: in a small mesh the smaller name dials at once."""
        if not self.is_large and self._owner.hello(0).name < name and not self._has(name):
            self._doors.dial(address).is_kept = True

    def maintain(self, live: list[Member], now: float) -> None:
        """Once per round: dial what is missing, close what is not needed or silent."""
        silent_ticks = self._settings.silent_s / self._settings.maintain_interval_s
        for lives in list(self._pipes.values()):
            for pipe in list(lives.values()):
                pipe.silent_ticks += 1
                if pipe.silent_ticks > silent_ticks:
                    self._doors.count("silent")
                    pipe.error = "silent"
                    pipe.close(at_once=True)
        if self.is_large:
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
                    self._doors.dial(member.address).is_kept = True
        self._missing = missing

    def _keep_neighbours(self, live: list[Member], now: float) -> None:
        pipes = [pipe for lives in self._pipes.values() for pipe in lives.values() if pipe.is_open]
        dialled = [pipe for pipe in pipes if pipe.is_dialer and pipe.is_kept]
        wanted = (self._settings.neighbours + 1) // 2
        if len(dialled) < wanted and live:
            member = live[self._rng.randrange(len(live))]
            if not self._has(member.name):
                self._doors.dial(member.address).is_kept = True
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
            return self.at(address)
        lives = self._pipes.get(peer)
        if not lives:
            return None
        boot = self._owner.life_of(peer)
        pipe = lives.get(boot) if boot is not None else None
        if pipe is None or not pipe.is_open:
            pipe = self.at(address)
        return pipe if pipe is not None and pipe.is_open else None

    def _wanted(self, name: str) -> Pipe | None:
        lives = self._pipes.get(name, {})
        if name == self._owner.hello(0).name:
            return None  # a namesake: membership will settle it
        boot = self._owner.life_of(name)
        if boot is not None:
            pipes = [lives[boot]] if boot in lives else []
        else:
            pipes = list(lives.values())
        pipes = [pipe for pipe in pipes if pipe.is_open and (pipe.is_kept or not self.is_large)]
        return pipes[-1] if pipes else None

    # -- at the door

    def at(self, address: Address) -> Pipe | None:
        """The open stream to whoever advertises this address."""
        for lives in self._pipes.values():
            for pipe in lives.values():
                if pipe.is_open and pipe.peer is not None and pipe.peer.address == address:
                    return pipe
        return None

    def unwanted(self, own: Hello, hello: Hello) -> Refused | None:
        """Of two streams opened at once both sides keep the one dialled by the smaller name (of namesakes: boot)."""
        if (own.name, own.boot) < (hello.name, hello.boot):
            pipe = self._pipes.get(hello.name, {}).get(hello.boot)
            is_fresh = (
                pipe is not None
                and pipe.is_open
                and pipe.is_dialer
                and trio.current_time() - pipe.opened_s < FRESH_S
            )
            if is_fresh or self._doors.is_connected_to(hello.address):
                return Refused(DUPLICATE, "", own.name, own.boot)
        return None

    def keeps(self, hello: Hello) -> bool:
        """Shall the stream of this dialer stay and carry state? Nobody is turned away for want of a place: it may be
        a newcomer that knows only us."""
        if not self.is_large:
            return True
        accepted = sum(1 for pipe in self._bound.values() if not pipe.is_dialer)
        return hello.is_kept and accepted < self._settings.neighbours

    # -- the life of a stream

    async def live(self, pipe: Pipe, dial: Dial | None) -> None:
        """The life of a greeted stream, from its place in the table to its end."""
        peer = pipe.peer
        assert peer is not None
        try:
            lives = self._pipes.setdefault(peer.name, {})
            former = lives.get(peer.boot)
            if former is not None:
                former.close(at_once=True)
            lives[peer.boot] = pipe
            self._missing.pop(peer.name, None)
            self._doors.errors.pop(peer.address, None)
            self._doors.refusing.pop(peer.address, None)
            self.rebind(peer.name)
            if dial is not None:
                self._doors.arrived(dial, pipe, peer)
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
            self._doors.note_error(peer.address, pipe.error or "closed")
        if pipe.end is not None:
            self.rebind(peer.name)
            if pipe.end is End.CLOSED:
                self._owner.on_closed(peer.name, peer.boot)
