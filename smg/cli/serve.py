"""The composition root: builds every room of a node, opens the service nursery, drains.

The one place where rooms are told of each other (house law 4). Owns the order of start and of shutdown (section 3 of
the contract) and nothing else: what a room does is in the room.
"""

from __future__ import annotations

import gc
import os
import signal
import socket
from collections.abc import AsyncIterator, Callable, Sequence
from functools import partial
from random import Random

import trio

from smg import __version__
from smg.cli.file_limit import raise_file_limit
from smg.cli.flags import Given
from smg.cli.node import Node
from smg.cli.opening import wait_decided
from smg.cli.place import Place
from smg.errors import SettingsError
from smg.net.activation import Inherited
from smg.net.listen import listen
from smg.net.readiness import Readiness
from smg.net.server import Server
from smg.services.notify import Notifier
from smg.services.reload import Reload
from smg.settings import Settings
from smg.settings_rules import warnings
from smg.telemetry import log as logs
from smg.telemetry.loop_delay import watch_loop_delay

LISTENER_GRACE_MAX_S = 5.0  # LIFE-5: load balancers notice an unready node within their probe interval
HANDSHAKE_S = 0.1
"""How long no newcomer is answered before the port is closed: more than a round trip to a load balancer."""
LAST_WORDS_S = 1.0  # for the failure frames of streams; a client that takes nothing by then is cut
EXIT_SECOND_SIGNAL = 130
READY_PATIENCE_S = 3.0
"""A port that was open before this process is not served before a worker is ready, for so long: those who wait get an answer."""
READY_LOOK_S = 0.01
# Generation 2 collections look at every object: with the large tables frozen away they may be rare.
GC_THRESHOLDS = (10_000, 20, 100)


async def serve(settings: Settings, given: Given | None = None, place: Place | None = None) -> int:
    """Runs a node until it is told to stop; the process's exit code (CLI-6, CLI-9, CLI-11).

    `given` is what the settings were read from, for SIGHUP and files that change; `place` where this process stands, alone
    when it is None. Raises `SettingsError` before anything
    serves when a port cannot be bound or a file cannot be used.
    """
    raise_file_limit()
    telemetry = settings.telemetry
    place = place or Place(Inherited(), Notifier())
    log = logs.configure(telemetry.log_level, telemetry.log_dir, telemetry.log_json, process=place.process)
    try:
        readiness = Readiness()
        node = Node(settings, readiness, Random(os.urandom(16)), given)
        listeners: Listeners | None = None
        try:
            listeners = Listeners(settings, place.inherited)
            if place.is_first:
                for warning in warnings(given.settings() if given is not None else settings):
                    node.log.warn(warning)
            await node.bind()
            return await _run(node, listeners, readiness, settings, log, place)
        except BaseExceptionGroup as group:
            wrong = _only_settings_error(group)
            if wrong is None:
                raise
            raise wrong from None
        finally:
            node.close()
            if listeners is not None:
                listeners.close()
    finally:
        place.close()
        log.close()


class Listeners:
    """The sockets of all three servers, inherited or bound before anything starts (CLI-6)."""

    def __init__(self, settings: Settings, inherited: Inherited) -> None:
        self._open: list[socket.socket] = []
        host = settings.listening.host
        self.serving = inherited.serving or self._listen(host, settings.listening.port, "--port")
        self.metrics = inherited.metrics or self._listen(
            settings.metrics_host(), settings.telemetry.prometheus_port, "--prometheus-port"
        )
        probe_port = settings.listening.health_check_port
        self.probes: Sequence[socket.socket] = inherited.health
        if probe_port and not self.probes:
            self.probes = self._listen(host, probe_port, "--health-check-port")

    def close(self) -> None:
        """Closes what no server has closed of what was bound here."""
        for sock in self._open:
            sock.close()

    @property
    def shown(self) -> str:
        """HOST:PORT of the serving port."""
        address = self.serving[0].getsockname()
        host = f"[{address[0]}]" if ":" in address[0] else address[0]
        return f"{host}:{address[1]}"

    def _listen(self, host: str, port: int, flag: str) -> Sequence[socket.socket]:
        try:
            sockets = listen(host, port, flag)
        except SettingsError:
            self.close()
            raise
        self._open += sockets
        return sockets


async def _run(
    node: Node,
    listeners: Listeners,
    readiness: Readiness,
    settings: Settings,
    log: logs.Log,
    place: Place,
) -> int:
    async with trio.open_nursery() as services:
        services.start_soon(log.run)
        await services.start(readiness.run)
        await services.start(place.notifier.run, node.log)
        services.start_soon(place.end_with_supervisor)
        serving = node.server()
        services.start_soon(node.metrics_server().serve, listeners.metrics)
        if listeners.probes:
            services.start_soon(node.probe_server().serve, listeners.probes)
        await _start_services(services, node, settings, place)
        # From here on a signal drains, also one that comes while the port is not served yet.
        with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
            await _wait_decided(node, settings, place)
            await services.start(
                partial(serving.serve, listeners.serving, place.neighbours, is_port_kept=place.is_port_kept)
            )
            scheme = "http" if settings.tls.tls_cert_path is None else "https"
            url = f"{scheme}://{listeners.shown}"
            if place.process:
                node.log.info("this process serves", version=__version__, pid=os.getpid())
            else:
                node.log.info(f"smg listening on {url}", version=__version__)
            gc.collect()
            gc.freeze()
            gc.set_threshold(*GC_THRESHOLDS)
            await place.notifier.ready(f"serving on {url}")
            await anext(signals)
            await services.start(_exit_on_second, signals)
            grace_s = settings.listening.shutdown_grace_period_secs
            node.log.info("draining", grace_secs=grace_s)
            services.start_soon(node.leave)  # LIFE-7: the peers know before the listener closes
            services.start_soon(place.notifier.stopping, "draining")
            await drain(node.start_draining, serving, grace_s)
            services.cancel_scope.cancel()
    return 0


async def _wait_decided(node: Node, settings: Settings, place: Place) -> None:
    """Waits until a request would find a worker: connections wait in the kernel meanwhile, and would be answered 503 here."""
    if place.opens_late:
        with trio.move_on_after(READY_PATIENCE_S):
            while not node.is_ready:
                await trio.sleep(READY_LOOK_S)
    else:
        # The processes beside this one are seeds as well, and know no more than it does.
        beside = settings.listening.processes - 1 if place.process else 0
        may_find_some = len(settings.mesh.seed_addresses()) > beside or bool(node.sources[1:])
        await wait_decided(node.registry, node.is_first_asked, may_find_some=may_find_some)


async def _start_services(services: trio.Nursery, node: Node, settings: Settings, place: Place) -> None:
    for run in node.services():
        await services.start(run)
    services.start_soon(watch_loop_delay, node.metrics)
    await services.start(_reload_on_hangup, node.reload, place.notifier)
    for source in node.sources:
        await services.start(source.run, node.reporter(source.name))


async def drain(start_draining: Callable[[], None], server: Server, grace_s: float) -> None:
    """Ends a server politely (LIFE-5, LIFE-6): unready, then no new connections, then no running requests, then gone."""
    start_draining()
    server.start_draining()
    started_s = trio.current_time()
    open_s = min(grace_s / 2, LISTENER_GRACE_MAX_S)
    await trio.sleep(open_s)
    server.turn_newcomers_away()
    await trio.sleep(min(open_s / 2, HANDSHAKE_S))
    server.stop_listening(last_word_s=open_s)
    with trio.move_on_at(started_s + grace_s):
        await server.wait_closed()
        return
    server.cut_off()
    with trio.move_on_after(LAST_WORDS_S):
        await server.wait_closed()


def _only_settings_error(group: BaseExceptionGroup[BaseException]) -> SettingsError | None:
    """The mistake in the settings that ended the services, such as a name that another node has."""
    found, rest = group.split(SettingsError)
    if found is None or rest is not None:
        return None
    error: BaseException = found
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error if isinstance(error, SettingsError) else None


async def _reload_on_hangup(
    reload: Reload, notifier: Notifier, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
) -> None:
    """SIGHUP reloads whatever can be reloaded."""
    with trio.open_signal_receiver(signal.SIGHUP) as signals:
        task_status.started()
        async for _ in signals:
            await notifier.reloading()
            await reload.wait_reloaded()
            await notifier.ready("serving")


async def _exit_on_second(
    signals: AsyncIterator[int], *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
) -> None:
    """A second signal ends the process at once (CLI-11)."""
    task_status.started()  # it waits before a drain that takes no time can close `signals`
    await signals.__anext__()
    os._exit(EXIT_SECOND_SIGNAL)
