"""KV events: listens to what engines publish of their caches and keeps the prefix index in step.

Owns one subscription per worker and what is done about messages that are missing: a replay where the engine offers
one, else everything the engine had told is forgotten, so that no claim is ever older than the truth. Meaning and order
of messages are `fleet/kv_events.py`'s, blocks and claims `fleet/engine_blocks.py`'s. ZeroMQ is imported when somebody
asks for events (the extra `kv-events`); its own thread reads the sockets, and trio waits on its file descriptor.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import trio

from smg.errors import SettingsError
from smg.fleet.block_hashes import BlockHasher
from smg.fleet.engine_blocks import EngineBlocks
from smg.fleet.kv_events import (
    END_OF_REPLAY,
    Batch,
    KvEventError,
    Sequence,
    Verdict,
    decode,
    number_of,
    replay_request,
    split,
)
from smg.fleet.prefix_index import PrefixIndex
from smg.fleet.registry import Added, Change, Registry, Removed, StatusChanged
from smg.fleet.worker import Status, Worker
from smg.services.asking import Log
from smg.settings_endpoint import endpoints_of

LABEL = "kv_events"
"""A worker label with an endpoint template of its own, or `off`."""
QUEUE_MESSAGES = 4_096
"""Messages that wait in ZeroMQ's memory while we are busy; what comes beyond is dropped there and shows as a gap."""
MESSAGE_BYTES_MAX = 16 << 20
"""A prompt of a million tokens is 5 MB; what is larger is no event."""
REPLAY_MESSAGES_MAX = 65_536
"""Engines keep ten thousand messages by default."""
REPLAY_TIMEOUT_S = 5.0
"""Silence after which a replay has failed."""
REPLAY_PAUSE_S = 60.0
"""After a failed replay none is tried for this time: each keeps the live messages waiting."""
SLICE_BLOCKS = 256
"""Blocks taken in before others get their turn: about half a millisecond."""
RECONNECT_MS, RECONNECT_MAX_MS = 200, 10_000
MEASURE_INTERVAL_S = 10.0
"""Between two words about the size of a worker's cache."""
AGE_INTERVAL_S = 60.0
"""Placements that the engine has not confirmed after one to two of these are no longer believed: longer than queues are."""

Measured = Callable[[Worker, int], None]
"""Told the tokens that a worker's cache holds when it is full."""


class KvEvents:
    """The listening service. Make it before workers are added: it follows the registry's changes.

    `speaks_ids()` tells whether all prompts since it was last asked came as token ids: then what engines do not confirm
    fades. Raises SettingsError when pyzmq is not installed.
    """

    def __init__(
        self,
        registry: Registry,
        index: PrefixIndex,
        hasher: BlockHasher,
        template: str,
        *,
        log: Log,
        measured: Measured,
        speaks_ids: Callable[[], bool],
    ) -> None:
        self._zmq = _zeromq(template)
        self._registry = registry
        self._index = index
        self._hasher = hasher
        self._template = template
        self._log = log
        self._measured = measured
        self._speaks_ids = speaks_ids
        self._followers: dict[str, Follower] = {}
        self._fresh: list[Follower] = []
        self._work = trio.Event()
        self.counts = dict.fromkeys(("batch", "refused", "gap", "replay", "lost", "restart"), 0)
        """What happened, over all workers (`smg_kv_events_total`)."""
        registry.subscribe(self._changed)
        for worker in registry.workers():
            self._join(worker)

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Listens until cancelled."""
        context = self._zmq.Context()
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._fade)
                task_status.started()
                while True:
                    self._work = trio.Event()
                    fresh, self._fresh = self._fresh, []
                    for follower in fresh:
                        nursery.start_soon(follower.run, context)
                    await self._work.wait()
        finally:
            context.destroy(linger=0)

    async def _fade(self) -> None:
        while True:
            await trio.sleep(AGE_INTERVAL_S)
            if self._speaks_ids():
                for follower in self._followers.values():
                    self._index.age(follower.worker.id)

    def _changed(self, change: Change) -> None:
        worker = change.worker
        if isinstance(change, Added):
            self._join(worker)
        elif isinstance(change, Removed):
            follower = self._followers.pop(worker.id, None)
            if follower is not None:
                follower.scope.cancel()
                self._index.forget(worker.id)
        elif isinstance(change, StatusChanged) and worker.status in (Status.NOT_READY, Status.FAILED):
            follower = self._followers.get(worker.id)
            if follower is not None:
                follower.is_doubtful = True

    def _join(self, worker: Worker) -> None:
        template = worker.spec.labels.get(LABEL, self._template)
        if template == "off":
            return
        try:
            endpoints = endpoints_of(template, worker.host, worker.port, worker.spec.dp_rank)
        except ValueError as wrong:
            self._log.warn("no KV events of this worker", worker=worker.url, reason=str(wrong))
            return
        blocks = EngineBlocks(worker.id, self._index, self._hasher)
        follower = Follower(worker, endpoints, blocks, self._zmq, self._log, self._measured, self.counts)
        self._followers[worker.id] = follower
        self._fresh.append(follower)
        self._work.set()


class Follower:
    """Follows one worker's events, from its registration to its removal."""

    def __init__(
        self,
        worker: Worker,
        endpoints: tuple[str, str | None],
        blocks: EngineBlocks,
        zmq: ModuleType,
        log: Log,
        measured: Measured,
        counts: dict[str, int],
    ) -> None:
        self.worker = worker
        self.scope = trio.CancelScope()
        self.is_doubtful = False
        """The worker was away: it may be another process by now."""
        self.blocks = blocks
        self._endpoint, self._replay_endpoint = endpoints
        self._zmq = zmq
        self._log = log
        self._tell_measured = measured
        self._counts = counts
        self._order = Sequence()
        self._measured_s = float("-inf")
        self._measured_tokens = 0
        self._no_replay_until_s = float("-inf")

    async def run(self, context: Any) -> None:
        """Listens until the worker is removed."""
        zmq = self._zmq
        with self.scope:
            socket = context.socket(zmq.SUB)
            try:
                socket.set_hwm(QUEUE_MESSAGES)
                self._set_up(socket)
                socket.setsockopt(zmq.SUBSCRIBE, b"")
                monitor = socket.get_monitor_socket(zmq.EVENT_DISCONNECTED)
                socket.connect(self._endpoint)
                while True:
                    parts = await self._receive(socket)
                    if _drain(zmq, monitor):
                        self.is_doubtful = True
                    await self._take(context, parts)
                    self._counts["batch"] += 1
            except zmq.ZMQError as wrong:
                self._log.warn("no KV events of this worker", worker=self.worker.url, reason=str(wrong))
                self.blocks.lost()
            finally:
                socket.disable_monitor()
                socket.close(linger=0)

    def _set_up(self, socket: Any) -> None:
        zmq = self._zmq
        socket.setsockopt(zmq.MAXMSGSIZE, MESSAGE_BYTES_MAX)
        socket.setsockopt(zmq.RECONNECT_IVL, RECONNECT_MS)
        socket.setsockopt(zmq.RECONNECT_IVL_MAX, RECONNECT_MAX_MS)
        socket.setsockopt(zmq.TCP_KEEPALIVE, 1)
        socket.setsockopt(zmq.TCP_KEEPALIVE_IDLE, 30)
        socket.setsockopt(zmq.IPV6, 1)

    async def _receive(self, socket: Any) -> list[bytes]:
        """The next message. Its descriptor tells of news only once, so it is waited for after nothing was left."""
        await trio.lowlevel.checkpoint()
        while True:
            try:
                parts: list[bytes] = socket.recv_multipart(self._zmq.NOBLOCK)
                return parts
            except self._zmq.Again:
                await trio.lowlevel.wait_readable(socket.getsockopt(self._zmq.FD))

    async def _take(self, context: Any, parts: list[bytes]) -> None:
        """One live message, and whatever must be done about those before it."""
        try:
            if len(parts) < 2:
                raise KvEventError("a message of one part")
            number, payload = number_of(parts[-2]), parts[-1]
        except KvEventError as wrong:
            self._refuse(wrong)
            return
        if self.is_doubtful:
            self.is_doubtful = False
            if self._order.has_begun:
                self._begin_again(number < self._order.expected)
        verdict = self._order.judge(number, payload)
        if verdict is Verdict.RESTART:
            self._begin_again(True)
            verdict = self._order.judge(number, payload)
        if verdict is Verdict.GAP:
            verdict = await self._bridge(context, number, payload)
        if verdict is Verdict.NEXT:
            if number == 0:
                self.blocks.is_whole = True
            await self._apply(payload)

    def _begin_again(self, is_new_process: bool) -> None:
        self._order = Sequence()
        if is_new_process:
            self._counts["restart"] += 1
            self._log.info("an engine began anew: its cache is empty", worker=self.worker.url)
            self.blocks.cleared()
        else:
            self.blocks.lost()
        self.blocks.is_whole = False

    async def _bridge(self, context: Any, number: int, payload: bytes) -> Verdict:
        """Messages before `number` are missing: a replay, or what was told so far is forgotten."""
        if self._order.has_begun:
            self._counts["gap"] += 1
        if self._replay_endpoint is not None and trio.current_time() >= self._no_replay_until_s:
            await self._replay(context, self._replay_endpoint)
            verdict = self._order.judge(number, payload)
            if verdict is not Verdict.GAP:
                return verdict
        self._give_up(number)
        return self._order.judge(number, payload)

    def _give_up(self, number: int) -> None:
        """The messages before `number` will not come."""
        if self._order.has_begun:
            self._counts["lost"] += 1
            self._log.info(
                "KV events are missing: what was known by them is forgotten", worker=self.worker.url
            )
            self.blocks.lost()
        self.blocks.is_whole = False
        self._order.skip_to(number)

    async def _replay(self, context: Any, endpoint: str) -> None:
        """Asks for all messages from the next one on, and takes in what comes."""
        zmq = self._zmq
        socket = context.socket(zmq.DEALER)
        try:
            socket.set_hwm(REPLAY_MESSAGES_MAX)
            self._set_up(socket)
            socket.connect(endpoint)
            socket.send_multipart([b"", replay_request(self._order.expected)], zmq.NOBLOCK)
            for _ in range(REPLAY_MESSAGES_MAX):
                with trio.fail_after(REPLAY_TIMEOUT_S):
                    parts = await self._receive(socket)
                if len(parts) < 2:
                    raise KvEventError("a message of one part")
                if parts[-2] == END_OF_REPLAY:
                    break
                await self._take_replayed(number_of(parts[-2]), parts[-1])
            self._counts["replay"] += 1
        except (zmq.ZMQError, KvEventError, trio.TooSlowError) as wrong:
            self._no_replay_until_s = trio.current_time() + REPLAY_PAUSE_S
            reason = "no answer in time" if isinstance(wrong, trio.TooSlowError) else str(wrong)
            self._log.info("the replay of KV events failed", worker=self.worker.url, reason=reason)
        finally:
            socket.close(linger=0)

    async def _take_replayed(self, number: int, payload: bytes) -> None:
        if not self._order.has_begun and number > 0:
            self._give_up(
                number
            )  # the engine does not remember its beginning: what is left is true all the same
        elif number > self._order.expected:
            self._give_up(number)
        if self._order.replayed(number):
            if number == 0:
                self.blocks.is_whole = True
            await self._apply(payload)

    async def _apply(self, payload: bytes) -> None:
        try:
            batch: Batch = decode(payload)
        except KvEventError as wrong:
            self._refuse(wrong)
            return
        rank = self.worker.spec.dp_rank
        if rank is not None and batch.rank is not None and batch.rank != rank:
            return
        blocks = self.blocks
        taken = 0
        for event in batch.events:
            for part in split(event, SLICE_BLOCKS):
                blocks.apply(part, self._model_of)
                taken += SLICE_BLOCKS if event is not part else 1
                if taken >= SLICE_BLOCKS:
                    taken = 0
                    await trio.lowlevel.checkpoint()
        blocks.settle()
        self._measure()

    def _refuse(self, wrong: KvEventError) -> None:
        """A message that nobody understands may have told of anything."""
        self._counts["refused"] += 1
        self._log.warn("a KV event message is not understood", worker=self.worker.url, reason=str(wrong))
        self.blocks.lost()

    def _measure(self) -> None:
        tokens = self.blocks.full_tokens
        if tokens and tokens != self._measured_tokens:
            now = trio.current_time()
            if now - self._measured_s >= MEASURE_INTERVAL_S:
                self._measured_s, self._measured_tokens = now, tokens
                self._tell_measured(self.worker, tokens)

    def _model_of(self, adapter: str | None) -> str | None:
        models = self.worker.models
        if adapter is None:
            return models[0] if models else None
        return adapter if adapter in models else None


def _drain(zmq: ModuleType, monitor: Any) -> bool:
    """Whether the connection broke since the last look."""
    is_broken = False
    while True:
        try:
            monitor.recv_multipart(zmq.NOBLOCK)
        except zmq.Again:
            return is_broken
        is_broken = True


def _zeromq(template: str) -> ModuleType:
    try:
        import zmq
    except ImportError:
        raise SettingsError(
            "--kv-events",
            repr(template),
            "needs pyzmq: pip install 'smg-mesh[kv-events]'",
            is_combination=True,
        ) from None
    module: ModuleType = zmq
    return module
