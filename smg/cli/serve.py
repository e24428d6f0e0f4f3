"""The composition root: builds every room of a node, opens the service nursery, drains.

The one place where rooms are told of each other (house law 4). Owns the order of start and of shutdown (section 3 of
the contract) and nothing else: what a room does is in the room.
"""

from __future__ import annotations

import gc
import os
import resource
import signal
import socket
from collections.abc import AsyncIterator, Callable
from random import Random

import trio

from smg import __version__
from smg.cli.flags import Given
from smg.cli.node import Node
from smg.errors import SettingsError
from smg.net.listen import listen
from smg.net.readiness import Readiness
from smg.net.server import Server
from smg.services.reload import Reload
from smg.settings import Settings
from smg.settings_rules import warnings
from smg.telemetry import log as logs
from smg.telemetry.loop_delay import watch_loop_delay

LISTENER_GRACE_MAX_S = 5.0  # LIFE-5: load balancers notice an unready node within their probe interval
LAST_WORDS_S = 1.0  # for the failure frames of streams; a client that takes nothing by then is cut
EXIT_SECOND_SIGNAL = 130
# Generation 2 collections look at every object: with the large tables frozen away they may be rare.
GC_THRESHOLDS = (10_000, 20, 100)


async def serve(settings: Settings, given: Given | None = None) -> int:
    """Runs a node until it is told to stop; the process's exit code (CLI-6, CLI-9, CLI-11).

    `given` is what the settings were read from, for SIGHUP and files that change. Raises `SettingsError` before anything
    serves when a port cannot be bound or a file cannot be used.
    """
    _raise_file_limit()
    telemetry = settings.telemetry
    log = logs.configure(telemetry.log_level, telemetry.log_dir, telemetry.log_json)
    try:
        readiness = Readiness()
        node = Node(settings, readiness, Random(os.urandom(16)), given)
        listeners: _Listeners | None = None
        try:
            listeners = _Listeners(settings)
            for warning in warnings(settings):
                node.log.warn(warning)
            await node.bind()
            return await _run(node, listeners, readiness, settings, log)
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
        log.close()


class _Listeners:
    """The sockets of all three servers, bound before anything starts (CLI-6)."""

    def __init__(self, settings: Settings) -> None:
        self._open: list[socket.socket] = []
        host = settings.listening.host
        self.serving = self._listen(host, settings.listening.port, "--port")
        self.metrics = self._listen(
            settings.metrics_host(), settings.telemetry.prometheus_port, "--prometheus-port"
        )
        probe_port = settings.listening.health_check_port
        self.probes = self._listen(host, probe_port, "--health-check-port") if probe_port else []

    def close(self) -> None:
        """Closes what no server has closed."""
        for sock in self._open:
            sock.close()

    def _listen(self, host: str, port: int, flag: str) -> list[socket.socket]:
        try:
            sockets = listen(host, port, flag)
        except SettingsError:
            self.close()
            raise
        self._open += sockets
        return sockets


async def _run(
    node: Node, listeners: _Listeners, readiness: Readiness, settings: Settings, log: logs.Log
) -> int:
    async with trio.open_nursery() as services:
        services.start_soon(log.run)
        await services.start(readiness.run)
        serving = node.server()
        metrics = node.metrics_server()
        probes = node.probe_server()
        await services.start(serving.serve, listeners.serving)
        services.start_soon(metrics.serve, listeners.metrics)
        if listeners.probes:
            services.start_soon(probes.serve, listeners.probes)
        await _start_services(services, node, settings)
        address = listeners.serving[0].getsockname()
        shown = f"[{address[0]}]" if ":" in address[0] else address[0]
        scheme = "http" if settings.tls.tls_cert_path is None else "https"
        node.log.info(f"smg listening on {scheme}://{shown}:{address[1]}", version=__version__)
        gc.collect()
        gc.freeze()
        gc.set_threshold(*GC_THRESHOLDS)
        with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
            await anext(signals)
            await services.start(_exit_on_second, signals)
            grace_s = settings.listening.shutdown_grace_period_secs
            node.log.info("draining", grace_secs=grace_s)
            services.start_soon(node.leave)  # LIFE-7: the peers know before the listener closes
            await drain(node.start_draining, serving, grace_s)
            services.cancel_scope.cancel()
    return 0


async def _start_services(services: trio.Nursery, node: Node, settings: Settings) -> None:
    for run in node.services():
        await services.start(run)
    services.start_soon(watch_loop_delay, node.metrics)
    services.start_soon(_reload_on_hangup, node.reload)
    for source in node.sources:
        await services.start(source.run, node.reporter(source.name))


async def drain(start_draining: Callable[[], None], server: Server, grace_s: float) -> None:
    """Ends a server politely (LIFE-5, LIFE-6): unready, then no new connections, then no running requests, then gone."""
    start_draining()
    server.start_draining()
    started_s = trio.current_time()
    await trio.sleep(min(grace_s / 2, LISTENER_GRACE_MAX_S))
    server.stop_listening()
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


async def _reload_on_hangup(reload: Reload) -> None:
    """SIGHUP reloads whatever can be reloaded."""
    with trio.open_signal_receiver(signal.SIGHUP) as signals:
        async for _ in signals:
            reload.ask()


async def _exit_on_second(
    signals: AsyncIterator[int], *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
) -> None:
    """A second signal ends the process at once (CLI-11)."""
    task_status.started()  # it waits before a drain that takes no time can close `signals`
    await signals.__anext__()
    os._exit(EXIT_SECOND_SIGNAL)


def _raise_file_limit() -> None:
    """Every client and worker connection is an open file; the soft limit of shells is made for other programs."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        except (OSError, ValueError):
            pass  # the limit stays as it is; the accept loop survives running out of files
