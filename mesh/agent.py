"""The agent: one member of a mesh, with its sockets, its clock and its one loop. What users of the library hold.

Owns the building of the parts and the loop that waits for them; no part starts a timer of its own, the loop sleeps until
the earliest deadline or the next datagram. It must never decide what a machine should decide.

    agent = Agent(AgentSettings(name="a", seeds=("b:7946",)), [Lww(name="config")])
    agent.on_change("config", print)
    async with trio.open_nursery() as nursery:
        await nursery.start(agent.run)
        agent.state.put("config", b"key", b"value")
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from random import Random

import trio

from mesh.address import parse_address
from mesh.bell import Bell
from mesh.errors import ConflictError, WeatherError
from mesh.home import ReplicaSettings
from mesh.hooks import Hooks
from mesh.keyring import Keyring
from mesh.member import Address, Member, Record, Status, check_name, first_incarnation
from mesh.messages import Event
from mesh.namespace import Change, Namespace
from mesh.partition import Standing
from mesh.questions import Answerer
from mesh.replica import Replica, life_number
from mesh.seal import Mode, Sealer
from mesh.settings import AgentSettings, SwimSettings
from mesh.state import State
from mesh.status import Status as NodeStatus
from mesh.status import node_status, peer_status
from mesh.swim import Swim
from mesh.switchboard import Switchboard
from mesh.tls import TlsContexts
from mesh.transport import NetTransport, Transport
from mesh.watch import Watch

DATAGRAMS_PER_TURN = 64
"""Datagrams read before the machines' deadlines and the other tasks get their turn: 2 ms of work."""
LAST_WORDS_S = 0.3
"""After a farewell the streams get this long to empty their queues."""
LAST_LOOK_S = 0.01
"""... and we look this often whether they have."""


def wall_clock() -> float:
    """Seconds since the epoch: for lives' birth and stamps only, never for waiting."""
    return time.time()


class Agent:
    """One member of a mesh. Build it inside `trio.run`, then `run` it once; `state` may be used before that.

    `tls`: contexts for streams; without a keyring all membership then travels by stream, since datagrams could not be
    protected. `wall` and `entropy` exist for tests. Raises SettingsError.
    """

    def __init__(
        self,
        settings: AgentSettings,
        namespaces: Sequence[Namespace] = (),
        *,
        swim: SwimSettings | None = None,
        replica: ReplicaSettings | None = None,
        tls: TlsContexts | None = None,
        transport: Transport | None = None,
        hooks: Hooks | None = None,
        wall: Callable[[], float] = wall_clock,
        entropy: Callable[[int], bytes] = os.urandom,
    ) -> None:
        self.settings = settings.checked()
        check_name(settings.name)
        for seed in settings.seeds:
            parse_address(seed, settings.port)
        self._swim_settings = (swim or SwimSettings()).checked()
        self._tls = tls
        self._wall = wall
        self._boot = entropy(8)
        self._born_s = int(wall())
        self._rng = Random(int.from_bytes(entropy(16), "big"))
        self._sealer = Sealer(
            self._boot,
            settings.label,
            Keyring.of(*settings.secrets),
            Mode.ACCEPT if settings.accepts_plain else None,
        )
        now = self._started_s = trio.current_time()
        self._replica = Replica(
            settings.name,
            life_number(self._born_s, self._boot),
            namespaces,
            now,
            Random(self._rng.getrandbits(64)),
            wall_offset_s=wall() - now,
            settings=replica,
        )
        self._bell = Bell()
        self.state = State(self._replica, self._bell.ring)
        self._transport = transport or NetTransport(settings.host, settings.port, tls)
        self._board = Switchboard(
            settings,
            self._replica,
            self._sealer,
            self._transport,
            hooks or Hooks(),
            self._bell,
            wall=wall,
            rng=Random(self._rng.getrandbits(64)),
            entropy=entropy,
        )
        self._board.is_by_stream = tls is not None and not settings.secrets
        self._left = trio.Event()
        self._watches: list[Watch[Event] | Watch[Change]] = []

    # -- who is there

    @property
    def name(self) -> str:
        """Our name."""
        return self.settings.name

    @property
    def address(self) -> Address:
        """Where others reach us. Valid once `run` has started."""
        return self._board.swim.own.address

    @property
    def own(self) -> Record:
        """What we say about ourselves. Valid once `run` has started."""
        return self._board.swim.own

    @property
    def members(self) -> list[Member]:
        """Rows of all other members, by name; read only."""
        machine = self._board.machine
        return machine.members() if machine is not None else []

    @property
    def standing(self) -> Standing:
        """Are we cut off?"""
        return self._board.watch.standing(trio.current_time())

    def member(self, name: str) -> Member | None:
        """The row of another member; read only."""
        machine = self._board.machine
        return machine.member(name) if machine is not None else None

    def is_refusing(self, name: str) -> bool:
        """Does this member's port refuse us? Then its process is gone; a member that is only silent may be beyond a cut."""
        member = self.member(name)
        return member is not None and self._board.streams.is_refusing(member.address)

    def on_member(self, callback: Callable[[Event], None]) -> None:
        """Call this with every membership event, between two awaits."""
        self._board.member_callbacks.append(callback)

    def watch_members(self, waiting_max: int = 1024) -> Watch[Event]:
        """A queue of membership events for one who waits; close it when done."""
        watch: Watch[Event] = Watch(waiting_max)
        self._watches.append(watch)
        self.on_member(watch.put)
        return watch

    def join(self, seeds: Sequence[str]) -> None:
        """More seeds, dialled at once and for ever."""
        self._board.swim.join(seeds, trio.current_time())
        self._bell.ring()

    def update(self, *, meta: bytes | None = None, features: int | None = None) -> None:
        """Say something else about ourselves. Raises SettingsError."""
        self._board.swim.update_own(trio.current_time(), meta=meta, features=features)
        self._bell.ring()

    async def leave(self) -> None:
        """Say farewell, at most for `SwimSettings.leave_s`; `run` then returns. What we own elsewhere goes."""
        board = self._board
        if board.machine is not None and board.state == "alive":
            board.state = "leaving"
            now = trio.current_time()
            self._replica.leave(now)
            board.machine.leave(now)
            self._bell.ring()
        if board.state == "leaving":
            await self._left.wait()

    # -- what is shared

    def on_change(self, namespace: str, callback: Callable[[Change], None]) -> None:
        """Call this with every change of a namespace that others made, between two awaits, in order."""
        self._board.change_callbacks.setdefault(namespace, []).append(callback)

    def watch_changes(self, namespace: str, waiting_max: int = 1024) -> Watch[Change]:
        """A queue of changes of a namespace for one who waits; close it when done."""
        watch: Watch[Change] = Watch(waiting_max)
        self._watches.append(watch)
        self.on_change(namespace, watch.put)
        return watch

    def answer_with(self, answerer: Answerer) -> None:
        """Answer peers' questions with this function; it must be quick."""
        self._board.questions.answerer = answerer

    async def ask(self, peer: str, question: bytes) -> bytes:
        """What the peer's answerer says. Raises WeatherError when there is no stream to it, it breaks, or nobody there
        answers; BoundError when too long or too many wait. Put a deadline around it."""
        pipe = self._board.streams.of(peer)
        if pipe is None:
            raise WeatherError(f"no stream to {peer}")
        return await self._board.questions.ask(peer, question, pipe.send_now)

    # -- keys and certificates

    @property
    def keyring(self) -> Keyring:
        """The keys we hold."""
        return self._sealer.keyring

    def set_keyring(self, keyring: Keyring, *, accepts_plain: bool = False) -> None:
        """Change keys: what is sent from now on uses the first; open streams keep theirs. Raises SettingsError."""
        self._sealer.set_keyring(keyring, Mode.ACCEPT if accepts_plain and keyring.keys else None)
        self._board.keys_changed(is_by_stream=self._tls is not None and not keyring.keys)
        self._bell.ring()

    def key_holders(self, key_id: int) -> tuple[int, int]:
        """(live members that hold this key, live members), ourselves included: a rotation goes on at N of N."""
        swim = self._board.swim
        records = [swim.own, *(member.record for member in swim.live())]
        return sum(key_id in record.key_ids for record in records), len(records)

    def reload_tls(self) -> None:
        """Read the certificates again, for streams opened from now on. Raises SettingsError; then nothing changed."""
        if self._tls is not None:
            self._tls.reload()

    # -- for operators

    def status(self) -> NodeStatus:
        """All that an operator may want to know, now. Valid once `run` has started."""
        now = trio.current_time()
        board = self._board
        swim, streams, digest = board.swim, board.streams, board.digest()
        peers = []
        is_converged = True
        for member in swim.members():
            pipe = streams.of(member.name)
            peers.append(peer_status(member, pipe, streams.errors.get(member.address, ""), digest, now))
            if pipe is not None and member.is_live:
                is_equal = (pipe.peer_digest, pipe.peer_fingerprint) == (digest, swim.fingerprint)
                is_converged = is_converged and is_equal
        return node_status(
            swim.own,
            state=board.state,
            uptime_s=now - self._started_s,
            health=swim.health,
            lag_s=swim.lag_ms(now) / 1000,
            fingerprint=swim.fingerprint,
            digest=digest,
            is_converged=is_converged,
            standing=board.watch.standing(now),
            streams=streams.count,
            peers=tuple(peers),
            counts=self.counts(),
        )

    def counts(self) -> dict[str, int]:
        """Counters since the start, and lengths of queues, of all parts; names have their part in front."""
        board = self._board
        found = {f"agent_{name}": value for name, value in board.counts.items()}
        found |= {f"seal_{name}": value for name, value in self._sealer.counts.items()}
        found |= {f"stream_{name}": value for name, value in board.streams.counts.items()}
        found |= {f"swim_{name}": value for name, value in board.swim.counts().items()}
        found["agent_questions"] = len(board.questions)
        return found

    # -- the loop

    async def run(self, task_status: trio.TaskStatus[Address] = trio.TASK_STATUS_IGNORED) -> None:
        """Be a member until `leave` or cancellation (which is a crash to the others). Reports the advertised address.

        Raises SettingsError when the port cannot be had, ConflictError when an older live node has our name.
        """
        board = self._board
        assert board.machine is None, "an agent runs once"
        bound = await self._transport.open()
        try:
            address = await board.advertised.find(bound)
            now = trio.current_time()
            board.machine = Swim(self._swim_settings, self._record(address), self._rng, now, self._wall())
            board.machine.join(self.settings.seeds, now)
            async with trio.open_nursery() as nursery:
                await nursery.start(board.streams.run)
                task_status.started(address)
                await self._loop(board.machine)
                nursery.cancel_scope.cancel()
        finally:
            self._transport.close()
            self._left.set()
            for watch in self._watches:
                watch.close()
        if board.conflict is not None:
            elder, own = board.conflict.elder, board.conflict.own
            raise ConflictError(
                f"the name {own.name!r} is taken: the node at {elder.host}:{elder.port} is older than ours at "
                f"{own.host}:{own.port} and answers; give this node another name"
            )

    def _record(self, address: Address) -> Record:
        return Record(
            name=self.settings.name,
            boot=self._boot,
            incarnation=first_incarnation(self._born_s),
            status=Status.ALIVE,
            host=address[0],
            port=address[1],
            born_s=self._born_s,
            features=self.settings.features,
            key_ids=self._sealer.keyring.ids,
            meta=self.settings.meta,
        )

    async def _loop(self, machine: Swim) -> None:
        board, transport = self._board, self._transport
        board.turn()
        while machine.is_running:
            lag_s = await self._bell.wait(board.due_s(), transport.wait_datagrams)
            now = trio.current_time()
            board.note_lag(lag_s, now)
            for data, address in transport.receive_nowait(DATAGRAMS_PER_TURN):
                board.receive_datagram(data, address, now)
            board.turn()
        board.streams.close_all()
        with trio.move_on_after(LAST_WORDS_S):
            while board.streams.count:
                await trio.sleep(LAST_LOOK_S)
