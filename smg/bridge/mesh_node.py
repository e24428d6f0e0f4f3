"""One gateway node as a member of its mesh: builds the agent and the rooms of this folder, and keeps their rhythm.

Owns the wiring, the one loop in which the rooms look for changes, and what follows when the agent ends: by a leave, by a name
that is taken, or by a fault of its own, after which this node serves alone (MSH-7). It must never be on the way of a request.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from random import Random
from typing import Any, Protocol

import msgspec
import trio

from mesh import (
    Agent,
    Change,
    ConflictError,
    Ephemeral,
    Event,
    Hooks,
    Keyring,
    Lww,
    MeshError,
    Owned,
    Stream,
)
from mesh import SettingsError as MeshSettingsError
from mesh.transport import NetTransport, Transport
from smg.bridge import identity, words
from smg.bridge.chains import Chains
from smg.bridge.health import HEALTH, SharedHealth
from smg.bridge.limits import LIMITS, SharedLimits
from smg.bridge.loads import ENGINE, LOAD, LOOK_INTERVAL_S, SharedLoads
from smg.bridge.owner import Owners
from smg.bridge.peers import Peers
from smg.bridge.port import BoundPort
from smg.bridge.prefixes import PREFIX, ModelNeighbours, SharedPrefixes, cache_aware_of
from smg.bridge.sticky import BYTES_MAX as STICKY_BYTES_MAX
from smg.bridge.sticky import STICKY, KeysOf, SharedKeys
from smg.bridge.usage import SharedUsage
from smg.bridge.view import Sample, View, joining_status, shown_address
from smg.bridge.warming import Warming
from smg.bridge.words import AskedChains, AskedPage, AskedUsage
from smg.bridge.workers import ORDERS, WORKERS, Fleet, SharedWorkers
from smg.errors import SettingsError
from smg.fleet.block_hashes import BlockSettings
from smg.fleet.load import ReportRules
from smg.fleet.prefix_index import PrefixIndex
from smg.fleet.registry import Registry
from smg.fleet.worker import Kind, LoadReport, Worker, WorkerSpec
from smg.policies.cache_aware import CacheAware
from smg.policies.policy import Policy
from smg.settings import Settings
from smg.tenancy.usage import Book

STEP_LOOKS = 3
"""Looks at our load between two steps of everything else: a step each 100 ms."""
SLOW_STEPS = 10
"""Steps between two looks at what changes slowly: each second."""
RTT_STEPS = 50
LIMITS_BYTES_MAX = 16 * 1024 * 1024
"""A thousand divided limits of 32 nodes in full words."""
TELL_AFTER_S = 0.002
"""What was decided for a peer is told so much later than the peer itself has its answer: a process that goes on working after an
answer keeps the processor from whoever waits for it on the same host."""
CHAINS_PATIENCE_S = 2.0
"""A question for lost chains waits so long; nobody else waits for it."""
LEAVE_PATIENCE_S = 2.0
"""A farewell takes at most a second; a mesh that hangs may not keep a node from ending."""


_QUIET_EVENTS = frozenset({"stream_failed", "stream_closed"})
"""Events that repeat every few seconds while a member is away; `/mesh/status` has the last error."""


class Log(Protocol):
    """What this room needs of `smg.telemetry.log.Logger`."""

    def debug(self, message: str, /, **fields: object) -> None:
        """An event for those who look for something."""
        ...

    def info(self, message: str, /, **fields: object) -> None:
        """An event that operators may want to read."""
        ...

    def warn(self, message: str, /, **fields: object) -> None:
        """An event that operators should read."""
        ...


class Tally(Protocol):
    """What this room counts by: a bound counter."""

    value: float


class Seconds(Protocol):
    """What this room observes into: a bound histogram."""

    def observe(self, seconds: float) -> None:
        """One observation."""
        ...


class Meters(msgspec.Struct, frozen=True, kw_only=True):
    """The metrics of MET-9, bound by whoever owns them."""

    messages: Callable[[str, str], Tally]
    """(kind, direction) → counter."""
    bytes_in: Tally
    bytes_out: Tally
    rtt: Seconds
    lag: Seconds
    owner_wait: Seconds


class Parts(msgspec.Struct, frozen=True, kw_only=True):
    """What the gateway gives to its mesh."""

    registry: Registry
    index: PrefixIndex
    blocks: BlockSettings
    report_rules: ReportRules
    report: Callable[[str, tuple[WorkerSpec, ...]], None]
    """The whole list of a source (`Rosters.report`)."""
    drain: Callable[[Worker], None]
    probe: Callable[[Worker], None]
    policy_known: Callable[[str, Kind], Policy | None]
    """The policy of a model and leg if there is one."""
    policy_of: Callable[[str], Policy]
    """The policy of a model, made if need be."""
    clock: Callable[[], float]
    """The clock of dispatch."""
    book: Book
    since_s: float
    """The book of usage, and since when it counts (seconds since 1970)."""
    meters: Meters
    log: Log


def _namespaces(chains: Chains) -> tuple[Owned | Lww | Ephemeral | Stream, ...]:
    """All namespaces, in the order of their turns: placements come after the workers that they name."""
    return (
        Owned(name=WORKERS),
        Lww(name=ORDERS),
        Ephemeral(name=LOAD, coalesce_s=0.0),
        Ephemeral(name=HEALTH, coalesce_s=0.0),
        Ephemeral(name=ENGINE, coalesce_s=0.05),
        Stream(name=PREFIX, coalesce_s=0.0, source=chains),
        Lww(name=STICKY, bytes_max=STICKY_BYTES_MAX, coalesce_s=0.05),
        Ephemeral(name=LIMITS, bytes_max=LIMITS_BYTES_MAX, coalesce_s=0.0, ttl_s=10.0, refresh_s=3.0),
    )


class MeshNode:
    """See the module. Raises `SettingsError` for a mesh that cannot be made. `transport` is for tests."""

    def __init__(
        self,
        settings: Settings,
        parts: Parts,
        rng: Random,
        *,
        transport: Transport | None = None,
        wall: Callable[[], float] = time.time,
    ) -> None:
        mesh = settings.mesh
        self._mesh = mesh
        self._parts = parts
        self._log = parts.log
        parameters = identity.parameters_of(parts.blocks)
        tls = identity.tls_of(mesh)
        self._port = BoundPort(transport or NetTransport(mesh.mesh_host, mesh.mesh_port, tls))
        self._chains = Chains(
            parts.registry,
            parts.index,
            name=identity.node_name(mesh),
            nodes=lambda: (self._peers.name, *self._peers.live_names),
        )
        try:
            self._agent = Agent(
                identity.agent_settings(mesh, parameters),
                _namespaces(self._chains),
                tls=tls,
                transport=self._port,
                hooks=Hooks(message=self._counted, log=self._logged),
                wall=wall,
            )
        except MeshSettingsError as wrong:
            raise identity.refused(wrong, mesh) from None
        self._messages: dict[tuple[str, str], Tally] = {}
        self._peers = Peers(self._agent, parameters, parts.meters.lag.observe)
        self._build(settings, rng, wall, is_sealed=bool(tls or self._agent.settings.secrets))
        self._state = "joining"
        self._address = ""
        self._wants_leave = trio.Event()
        self._has_ended = trio.Event()
        self._is_unsettled = trio.Event()
        self._untold = trio.CancelScope()
        self._subscribe()

    def _build(self, settings: Settings, rng: Random, wall: Callable[[], float], *, is_sealed: bool) -> None:
        parts, peers, state = self._parts, self._peers, self._agent.state
        registry = parts.registry
        self.health = SharedHealth(state, registry, name=peers.name, probe=parts.probe, live=peers.live)
        self.workers = SharedWorkers(
            state,
            peers,
            Fleet(registry=registry, report=parts.report, drain=parts.drain, warn=parts.log.warn),
            wake=lambda: self._is_unsettled.set(),
            wall=wall,
            bad_everywhere=self.health.bad_everywhere,
            is_private=self._mesh.mesh_private_workers,
            tells_keys=is_sealed,
            default_key=settings.workers.worker_api_key,
        )
        self.loads = SharedLoads(
            state,
            registry,
            name=peers.name,
            live=peers.live,
            rules=parts.report_rules,
            owed_ms=self._owed_ms,
            peers_done=self._peers_done,
        )
        self.prefixes = SharedPrefixes(
            state,
            peers,
            registry,
            parts.index,
            self._chains,
            policy_of=parts.policy_known,
            settle=self._settle,
            telling=self.loads.look,  # a placement and the request in flight are told together
            soon=self._tell_soon,
            peers_done=self._peers_done,
        )
        self.keys = SharedKeys(
            state,
            name=peers.name,
            idle_max_s=settings.routing.max_idle_secs,
            wall=wall,
            worker_of=self._chains.workers.get,
            policy_of=parts.policy_known,
            models=registry.served_models,
            is_first=lambda: all(peers.name < name for name in peers.live_names),
        )
        self.limits = SharedLimits(state, self._mesh.mesh_partition_limits)
        self.usage = SharedUsage(
            parts.book, since_s=parts.since_s, ask=self._agent.ask, names=lambda: peers.live_names
        )
        self.owners = Owners(
            peers,
            registry,
            self.prefixes,
            ask=self._agent.ask,
            policy_of=parts.policy_of,
            clock=parts.clock,
            rng=Random(rng.getrandbits(128)),
            waited=parts.meters.owner_wait.observe,
            is_on=self._mesh.owner_placement and settings.routing.cache_aware_mode == "price",
        )
        self._view = View(self._agent, peers, parts.index, self.loads, self.owners, self.limits)

    def _subscribe(self) -> None:
        agent, clock = self._agent, trio.current_time
        callbacks: Mapping[str, Callable[[Change], None]] = {
            WORKERS: self.workers.on_change,
            ORDERS: self.workers.on_change,
            LOAD: self.loads.on_load,
            HEALTH: lambda change: self.health.on_change(change, clock()),
            ENGINE: lambda change: self.loads.on_engine(change, clock()),
            PREFIX: lambda change: self.prefixes.on_change(change, clock()),
            STICKY: lambda change: self.keys.on_change(change, clock()),
            LIMITS: lambda change: self.limits.on_change(change, clock()),
        }
        for namespace, callback in callbacks.items():
            agent.on_change(namespace, callback)
        agent.on_member(self._member_changed)
        agent.answer_with(self._answer)

    # -- for the rooms of the gateway

    @property
    def name(self) -> str:
        """This node's name."""
        return self._agent.name

    @property
    def agent(self) -> Agent:
        """The member itself, for tools and tests."""
        return self._agent

    @property
    def peers(self) -> Peers:
        """The other nodes."""
        return self._peers

    def neighbours(self, model: str) -> ModelNeighbours:
        """The other gateways, for the policy of a model."""
        return ModelNeighbours(model, self.prefixes, self._peers)

    def keys_of(self, model: str, kind: Kind) -> KeysOf:
        """The routing keys of a model and leg."""
        return self.keys.of(model, kind)

    def is_poller(self, base_url: str) -> bool:
        """Is this node to ask this engine for its load (`LoadReports`)?"""
        return self.loads.is_poller(base_url, trio.current_time())

    def polled(self, worker: Worker, told: LoadReport) -> None:
        """An engine told its load."""
        self.loads.polled(worker, told, trio.current_time())

    # -- keys

    def key_files(self) -> tuple[str, ...]:
        """Files that are read again when they change: secrets and certificates."""
        mesh = self._mesh
        paths = (mesh.mesh_keys_file, mesh.mesh_tls_ca_cert, mesh.mesh_tls_cert, mesh.mesh_tls_key)
        return tuple(path for path in paths if path is not None)

    def read_keys(self) -> tuple[tuple[str, ...], Callable[[], None]] | None:
        """What changed in them, in words without secrets, and the swap; None when nothing did. Raises `SettingsError`."""
        ring = Keyring.of(*identity.secrets_of(self._mesh))
        tls = identity.tls_of(self._mesh)
        old = self._agent.keyring
        lines = []
        if ring.ids != old.ids:
            shown = ", ".join(f"{key_id:08x}" for key_id in ring.ids)
            lines.append(
                f"mesh: {len(ring.ids)} secret(s) instead of {len(old.ids)}, {shown}; the first one seals"
            )
        elif tls is None:
            return None

        def swap() -> None:
            if ring.ids != old.ids:
                self._agent.set_keyring(ring)
            if tls is not None:
                self._agent.reload_tls()

        return tuple(lines or ["mesh: certificates were read again, for streams opened from now on"]), swap

    # -- for operators

    def status(self) -> dict[str, Any]:
        """See `gateway.mesh_api.MeshView`."""
        if not self._address or self._state == "failed":
            return joining_status(self.name, self._state, self._address)
        return self._view.status(self._shown_state(), trio.current_time())

    def members(self) -> list[dict[str, Any]]:
        """See `gateway.mesh_api.MeshView`."""
        if not self._address or self._state == "failed":
            return []
        return self._view.members(self._shown_state(), trio.current_time())

    def limits_document(self) -> dict[str, Any]:
        """See `gateway.mesh_api.MeshView`."""
        return self.limits.document()

    def leave(self) -> bool:
        """See `gateway.mesh_api.MeshView`."""
        if self._wants_leave.is_set():
            return False
        self._wants_leave.set()
        return True

    async def wait_left(self) -> None:
        """Leave, if that was not begun before, and wait until the peers know or a second is over (LIFE-7)."""
        self.leave()
        with trio.move_on_after(LEAVE_PATIENCE_S):
            await self._has_ended.wait()

    def samples(self) -> Iterable[Sample]:
        """Gauges and counters for a scrape."""
        return self._view.samples(self._shown_state()) if self._address else ()

    def _shown_state(self) -> str:
        return self._state

    # -- running

    async def bind(self) -> None:
        """Take the mesh port. Raises `SettingsError` (CLI-9)."""
        try:
            await self._port.bind()
        except MeshSettingsError as wrong:
            raise identity.refused(wrong, self._mesh) from None

    def close(self) -> None:
        """Give the mesh port back; for a node that never ran."""
        self._port.close()

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Be a member until cancelled, or until this node has left.

        Ready at once: a mesh that is slow to be found delays no request. Raises `SettingsError` when the name of this
        node is taken by an older one.
        """
        await self.bind()
        task_status.started()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._keep_settled)
            nursery.start_soon(self._keep_telling)
            nursery.start_soon(self._keep_rhythm, nursery)
            nursery.start_soon(
                Warming(self._agent, self._peers, self._chains, self.prefixes, self._log.info).run
            )
            await self._run_agent()
            self._alone()
            nursery.cancel_scope.cancel()

    async def _run_agent(self) -> None:
        try:
            async with trio.open_nursery() as nursery:
                address = await nursery.start(self._agent.run)
                self._address = shown_address(*address)
                self._state = "alive"
                self.limits.begin(self.name, self._agent.own.boot, trio.current_time())
                self._log.info("mesh: this node is up", node=self.name, address=self._address)
                await self._wants_leave.wait()
                self._state = "leaving"
                await self._agent.leave()
            self._state = "left"
        except* ConflictError as group:
            self._state = "conflict"
            raise SettingsError("--node-name", repr(self.name), _text(group), is_combination=True) from None
        except* MeshSettingsError as group:
            raise SettingsError(
                "--mesh-advertise", repr(self._mesh.mesh_advertise), _text(group), is_combination=True
            ) from None
        except* Exception as group:
            # The only place where a fault of ours does not end the process: requests come first (MSH-7).
            self._state = "failed"
            self._log.warn("mesh: stopped by a fault; this node serves alone", error=repr(group.exceptions))

    def _alone(self) -> None:
        """Nobody is there any more; what is known stays."""
        self._peers.is_gone = True
        self._peers.refresh(trio.current_time())
        self.limits.end(trio.current_time())
        self._has_ended.set()

    async def _keep_settled(self) -> None:
        while True:
            await self._is_unsettled.wait()
            self._is_unsettled = trio.Event()
            self._settle()

    def _settle(self) -> None:
        if self.workers.is_dirty:
            self.workers.settle(trio.current_time())

    def _tell_soon(self) -> None:
        # A deadline costs nothing now; an event would have its task run before this process gives the processor away.
        self._untold.deadline = min(self._untold.deadline, trio.current_time() + TELL_AFTER_S)

    async def _keep_telling(self) -> None:
        while True:
            with self._untold:
                await trio.sleep_forever()
            self._untold = trio.CancelScope()
            self.prefixes.tell_waiting(trio.current_time())

    async def _keep_rhythm(self, nursery: trio.Nursery) -> None:
        looks = 0
        due_s = trio.current_time()
        while True:
            self.loads.look()
            if looks % STEP_LOOKS == 0:
                self._step(looks // STEP_LOOKS, nursery)
                while self.prefixes.has_touches:
                    self.prefixes.touch()
                    await trio.lowlevel.checkpoint()
            looks += 1
            due_s = max(due_s + LOOK_INTERVAL_S, trio.current_time())
            await trio.sleep_until(due_s)

    def _step(self, steps: int, nursery: trio.Nursery) -> None:
        now = trio.current_time()
        self._peers.refresh(now)
        self.limits.step(self._agent.members, self._agent.is_refusing, now)
        self.prefixes.step(now)
        self.health.refresh(now)
        for peer, question in self.prefixes.questions():
            nursery.start_soon(self._ask_chains, peer, question)
        if steps % SLOW_STEPS == 0:
            self.workers.refresh(now)
            self.keys.refresh(now)
        if steps % RTT_STEPS == 0:
            for name in self._peers.live_names:
                rtt_s = self._peers.rtt_s(name)
                if rtt_s:
                    self._parts.meters.rtt.observe(rtt_s)

    async def _ask_chains(self, peer: str, question: bytes) -> None:
        with trio.move_on_after(CHAINS_PATIENCE_S):
            try:
                answer = await self._agent.ask(peer, question)
            except MeshError:
                return  # the next snapshot or placement brings it
            self.prefixes.answered(answer)

    # -- what the agent calls

    def _answer(self, peer: str, question: bytes) -> bytes | None:
        asked = words.read_question(question)
        if asked is None:
            return None
        if isinstance(asked, AskedChains):
            return self._chains.answer(asked)
        if isinstance(asked, AskedPage):
            return self._chains.page(peer, asked)
        if isinstance(asked, AskedUsage):
            return self.usage.answer(asked)
        return self.owners.answer(peer, asked)

    def _member_changed(self, event: Event) -> None:
        self._peers.refresh(trio.current_time())
        record = getattr(event, "record", None)
        name = getattr(record, "name", "")
        self._log.info(
            f"mesh: {_words_of(event)}",
            node=name,
            alive=len(self._peers.live_names) + (not self._peers.is_gone),
        )

    def _counted(self, kind: str, direction: str, size_bytes: int) -> None:
        tally = self._messages.get((kind, direction))
        if tally is None:
            tally = self._messages[(kind, direction)] = self._parts.meters.messages(kind, direction)
        tally.value += 1
        (
            self._parts.meters.bytes_in if direction == "in" else self._parts.meters.bytes_out
        ).value += size_bytes

    def _logged(self, event: str, fields: Mapping[str, object]) -> None:
        tell = self._log.debug if event in _QUIET_EVENTS else self._log.info
        tell(f"mesh: {event.replace('_', ' ')}", **dict(fields))

    def _owed_ms(self, worker: Worker) -> float:
        now = self._parts.clock()
        return 1000 * sum(policy.owed_s(worker.id, now) for policy in self._policies_on(worker))

    def _peers_done(self, worker: Worker) -> None:
        for policy in self._policies_on(worker):
            policy.peers_done(worker.id, self._parts.clock())

    def _policies_on(self, worker: Worker) -> Iterator[CacheAware]:
        """The policies that have an account of this worker."""
        for model in worker.models or ("",):
            policy = cache_aware_of(self._parts.policy_known(model, worker.kind))
            if policy is not None:
                yield policy


def _words_of(event: Event) -> str:
    """`MemberUp` as `member up`."""
    name = type(event).__name__
    return "".join(f" {letter.lower()}" if letter.isupper() else letter for letter in name).strip()


def _text(group: BaseExceptionGroup[Exception]) -> str:
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return str(error)
