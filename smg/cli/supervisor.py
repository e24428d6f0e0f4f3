"""`--processes N`: starts N processes on one port, keeps them alive, and speaks for all of them.

Owns the sockets (so that a connection in the queue outlives the process that would have taken it), the lives of the
processes, and what signals mean for all: SIGHUP reaches each, one SIGTERM drains all, a second ends all. A process tells that
it serves and that its loop turns over a socket pair, as a service under systemd does; one that is silent is killed, one that
is dead is started again. It must never serve a client's request, and holds no state of a node.
"""

from __future__ import annotations

import os
import secrets
import signal
import socket
import sys
from collections.abc import AsyncIterator, Sequence
from random import Random

import msgspec
import trio

from smg import __version__
from smg.cli.file_limit import raise_file_limit
from smg.cli.members import LOOPBACK, Member
from smg.cli.pages import Pages, Source
from smg.cli.place import Place, Start
from smg.cli.restarts import Restarts
from smg.net.listen import listen, listen_shared
from smg.net.readiness import Readiness
from smg.services.notify import READY
from smg.settings import Settings
from smg.telemetry import log as logs

EXIT_SECOND_SIGNAL = 130

HANG_S = 30.0
"""A process whose loop has not turned for so long hangs: it is killed and started again. Nothing of ours takes a second."""

START_PATIENCE_S = 90.0
"""A process that has just been started may be silent for longer: imports on a machine that is overloaded."""

NOBODY_S = 60.0
"""When no process has served for so long the supervisor ends, for its own manager to see. Two rounds of the longest pause
of `smg.cli.restarts` and a slow start."""

STOP_EXTRA_S = 10.0
"""After the grace period the processes end by themselves; one that does not is killed."""

KILL_PATIENCE_S = 5.0
"""A killed process is gone at once, unless the kernel holds it; then it is left to the kernel."""

RELOAD_PATIENCE_S = 10.0
"""A reload of all processes is told to be over after this time at the latest."""

WORD_BYTES_MAX = 4096
EPHEMERAL_RANGE = "/proc/sys/net/ipv4/ip_local_port_range"
PORT_TRIES_MAX = 200


class Slot:
    """One of the processes, through all its lives."""

    def __init__(self, member: Member, serving: Sequence[socket.socket]) -> None:
        self.member = member
        self.name = str(member.place)
        self.serving = serving
        self.metrics = listen(LOOPBACK, 0, "--processes")[0]
        self.health = listen(LOOPBACK, 0, "--processes")[0]
        self.process: trio.Process | None = None
        self.restarts = Restarts()
        self.has_served = False
        """In any of its lives."""
        self.is_ready = False
        self.is_reloading = False
        self.silent_until_s = 0.0

    def source(self) -> Source:
        """Where its own pages are read."""
        return Source(self.name, self.metrics.getsockname()[1], self.health.getsockname()[1])

    def send_signal(self, number: int) -> None:
        """To the process, if it lives."""
        if self.process is not None and self.process.returncode is None:
            self.process.send_signal(number)


async def supervise(settings: Settings, arguments: tuple[str, ...], place: Place) -> int:
    """Runs all processes until told to stop; the exit code (CLI-6, CLI-9, CLI-11).

    Raises `SettingsError` before any process is started when a port cannot be bound. What a process finds wrong with the
    settings it says itself, once: the first one is started alone, and its exit code is returned.
    """
    raise_file_limit()
    telemetry = settings.telemetry
    log = logs.configure(telemetry.log_level, telemetry.log_dir, telemetry.log_json, process="supervisor")
    try:
        supervisor = Supervisor(settings, arguments, place)
        try:
            return await supervisor.run(log)
        finally:
            supervisor.close()
    finally:
        place.close()
        log.close()


class Supervisor:
    """See the module. Raises `SettingsError` when a port cannot be bound; `close` gives back whatever is open."""

    def __init__(self, settings: Settings, arguments: tuple[str, ...], place: Place) -> None:
        self._settings = settings
        self._arguments = arguments
        self._place = place
        self._log = logs.logger("smg.supervisor")
        self._rng = Random(os.urandom(16))
        self._readiness = Readiness()
        self._is_stopping = trio.Event()
        self._has_ended = trio.Event()
        self._changed = trio.Event()
        self._code = 0
        self._sockets: list[socket.socket] = []
        self._slots: list[Slot] = []
        try:
            self._bind()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Kills what still runs and closes every socket."""
        for slot in self._slots:
            slot.send_signal(signal.SIGKILL)
            slot.metrics.close()
            slot.health.close()
        for sock in self._sockets:
            sock.close()

    def _bind(self) -> None:
        listening, inherited = self._settings.listening, self._place.inherited
        count, host = listening.processes, listening.host
        if inherited.serving:
            # One socket cannot be cut into several; all accept from it, and the kernel wakes them all.
            shared: list[Sequence[socket.socket]] = [inherited.serving] * count
        else:
            shared = [*listen_shared(host, listening.port, "--port", count)]
            self._sockets += [sock for sockets in shared for sock in sockets]
        self._metrics: Sequence[socket.socket] = inherited.metrics
        if not self._metrics:
            port = self._settings.telemetry.prometheus_port
            self._metrics = listen(self._settings.metrics_host(), port, "--prometheus-port")
            self._sockets += self._metrics
        self._health: Sequence[socket.socket] = inherited.health
        if not self._health and listening.health_check_port:
            self._health = listen(host, listening.health_check_port, "--health-check-port")
            self._sockets += self._health
        for place, member in enumerate(members_of(self._settings)):
            self._slots.append(Slot(member, shared[place]))
        self._pages = Pages(
            [slot.source() for slot in self._slots],
            self._readiness,
            self._rng,
            is_ready=lambda name: self._slots[int(name)].is_ready,
            is_draining=self._is_stopping.is_set,
            log=self._log,
        )

    # -- running

    async def run(self, log: logs.Log) -> int:
        """See `supervise`."""
        numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
        with trio.open_signal_receiver(*numbers) as signals:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(log.run)
                await nursery.start(self._readiness.run)
                await nursery.start(self._place.notifier.run, self._log)
                nursery.start_soon(self._obey, signals, nursery)
                nursery.start_soon(self._pages.metrics_server().serve, self._metrics)
                if self._health:
                    nursery.start_soon(self._pages.probe_server().serve, self._health)
                await self._start_all(nursery)
                await self._has_ended.wait()
                nursery.cancel_scope.cancel()
        return self._code

    async def _start_all(self, nursery: trio.Nursery) -> None:
        """All are started at once, and load their code; see `_wait_turn`."""
        async with trio.open_nursery() as starting:
            for slot in self._slots:
                starting.start_soon(nursery.start, self._keep, slot)
        if self._has_ended.is_set() or self._is_stopping.is_set():
            return
        scheme = "http" if self._settings.tls.tls_cert_path is None else "https"
        host, port = self._slots[0].serving[0].getsockname()[:2]
        url = f"{scheme}://{f'[{host}]' if ':' in host else host}:{port}"
        self._log.info(f"smg listening on {url}", version=__version__, processes=len(self._slots))
        nursery.start_soon(self._watch_all)
        await self._place.notifier.ready(f"{len(self._slots)} processes serve {url}")

    async def _keep(
        self, slot: Slot, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
    ) -> None:
        """All lives of one process. Started when the first one serves, or has failed."""
        while not self._is_stopping.is_set() and not self._has_ended.is_set():
            started_s = trio.current_time()
            code = await self._live(slot, task_status)
            self._pages.ended(slot.name)
            if self._is_stopping.is_set() or self._has_ended.is_set():
                break
            if not slot.has_served:
                self._log.error("a process ended before it served", process=slot.name, exit_code=code)
                self._end(code if code > 0 else 1)
                break
            pause_s = slot.restarts.pause_s(trio.current_time() - started_s, self._rng)
            self._pages.count_restart(slot.name)
            self._log.warn(
                "a process ended and is started again",
                process=slot.name,
                exit_code=code,
                pause_secs=round(pause_s, 2),
            )
            with trio.move_on_after(pause_s):
                await self._is_stopping.wait()
        if not slot.has_served:
            task_status.started()

    async def _live(self, slot: Slot, task_status: trio.TaskStatus[None]) -> int:
        """One life, to its end: the exit code, or the negative number of a signal."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        process: trio.Process | None = None
        try:
            with theirs:
                try:
                    process = await self._open_process(slot, theirs)
                except (
                    OSError
                ) as error:  # no memory, no more processes, or the sockets were closed for the end
                    self._log.error("a process cannot be started", process=slot.name, error=str(error))
                    return 1
            slot.process = process
            slot.silent_until_s = trio.current_time() + START_PATIENCE_S
            ours.setblocking(False)
            if await self._wait_turn(slot):
                try:
                    ours.send(msgspec.json.encode(self._start_of(slot)))
                except OSError:
                    pass  # it has ended already, as `wait` will tell
            else:
                process.terminate()
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._listen, slot, ours, task_status)
                nursery.start_soon(self._watch, slot, process)
                code = await process.wait()
                nursery.cancel_scope.cancel()
        finally:
            ours.close()
            if process is not None and process.returncode is None:
                process.kill()
            slot.process = None
            slot.is_ready = slot.is_reloading = False
            self._note()
        return code

    async def _wait_turn(self, slot: Slot) -> bool:
        """Waits until the first process serves, so that a mistake in the settings is told by one; False: it is over."""
        first = self._slots[0]
        while not self._is_stopping.is_set() and not self._has_ended.is_set():
            if slot is first or first.has_served:
                return True
            await self._changed.wait()
        return False

    async def _open_process(self, slot: Slot, theirs: socket.socket) -> trio.Process:
        fds = [sock.fileno() for other in self._slots for sock in other.serving]
        return await trio.lowlevel.open_process(
            [*interpreter(), "-m", "smg.cli.child", *self._arguments],
            stdin=theirs.fileno(),
            pass_fds=[*dict.fromkeys(fds), slot.metrics.fileno(), slot.health.fileno()],
            # A group of its own: the terminal's Ctrl-C is for the supervisor, which tells the processes once.
            process_group=0,
        )

    def _start_of(self, slot: Slot) -> Start:
        own = tuple(sock.fileno() for sock in slot.serving)
        neighbours = {sock.fileno() for other in self._slots for sock in other.serving} - set(own)
        is_kept = bool(self._place.inherited.serving)
        return Start(
            member=slot.member,
            serving=own,
            neighbours=tuple(neighbours),
            metrics=slot.metrics.fileno(),
            health=slot.health.fileno(),
            watchdog_s=HANG_S / 3,
            opens_late=is_kept or slot.has_served,
            is_port_kept=is_kept,
            is_first=slot is self._slots[0] and not slot.has_served,
        )

    async def _listen(self, slot: Slot, ours: socket.socket, task_status: trio.TaskStatus[None]) -> None:
        """What the process tells, until it is silent for ever."""
        while True:
            await trio.lowlevel.wait_readable(ours)
            try:
                words = ours.recv(WORD_BYTES_MAX)
            except BlockingIOError:
                continue
            except OSError:
                return
            if not words:
                return
            slot.silent_until_s = max(slot.silent_until_s, trio.current_time() + HANG_S)
            if READY.encode() in words.split(b"\n"):
                slot.is_reloading = False
                if not slot.is_ready:
                    slot.is_ready = True
                    slot.silent_until_s = trio.current_time() + HANG_S
                if not slot.has_served:
                    slot.has_served = True
                    task_status.started()
                self._note()

    async def _watch(self, slot: Slot, process: trio.Process) -> None:
        """Ends a process that hangs."""
        while trio.current_time() < slot.silent_until_s:
            with trio.move_on_at(slot.silent_until_s):
                await self._changed.wait()  # the moment comes nearer when it serves
        self._log.error("a process hangs and is killed", process=slot.name, pid=process.pid)
        process.kill()

    async def _watch_all(self) -> None:
        """Ends the supervisor when nobody has served for too long."""
        while True:
            while self._is_anybody_ready() or self._is_stopping.is_set():
                await self._changed.wait()
            with trio.move_on_after(NOBODY_S) as patience:
                while not self._is_anybody_ready() and not self._is_stopping.is_set():
                    await self._changed.wait()
            if patience.cancelled_caught:
                self._log.error("no process serves, and none can be started", for_secs=NOBODY_S)
                self._end(1)
                return

    # -- signals

    async def _obey(self, signals: AsyncIterator[int], nursery: trio.Nursery) -> None:
        async for number in signals:
            if number == signal.SIGHUP:
                nursery.start_soon(self._reload)
            elif self._is_stopping.is_set():
                self.close()
                os._exit(EXIT_SECOND_SIGNAL)
            else:
                nursery.start_soon(self._stop)
                await self._is_stopping.wait()

    async def _reload(self) -> None:
        """SIGHUP for every process that has begun to listen to it; those that are starting read what is there now."""
        await self._place.notifier.reloading()
        for slot in self._slots:
            if slot.is_ready:
                slot.is_reloading = True
                slot.send_signal(signal.SIGHUP)
        with trio.move_on_after(RELOAD_PATIENCE_S):
            while any(slot.is_reloading for slot in self._slots):
                await self._changed.wait()
        await self._place.notifier.ready("reloaded")

    async def _stop(self) -> None:
        grace_s = self._settings.listening.shutdown_grace_period_secs
        self._is_stopping.set()
        self._note()
        self._log.info("draining all processes", grace_secs=grace_s)
        for slot in self._slots:
            slot.send_signal(signal.SIGTERM)
            # The processes have the port until they close it; a copy that stays here would keep it open.
            for sock in slot.serving:
                sock.close()
        await self._place.notifier.stopping("draining")
        if not await self._have_ended_within(grace_s + STOP_EXTRA_S):
            self._log.warn("a process did not end by itself and is killed")
            for slot in self._slots:
                slot.send_signal(signal.SIGKILL)
            await self._have_ended_within(KILL_PATIENCE_S)
        self._end(0)

    async def _have_ended_within(self, seconds: float) -> bool:
        with trio.move_on_after(seconds):
            while any(slot.process is not None for slot in self._slots):
                await self._changed.wait()
            return True
        return False

    # -- state

    def _is_anybody_ready(self) -> bool:
        return any(slot.is_ready for slot in self._slots)

    def _note(self) -> None:
        self._changed.set()
        self._changed = trio.Event()

    def _end(self, code: int) -> None:
        if not self._has_ended.is_set():
            self._code = code
            self._has_ended.set()
            self._note()


def members_of(settings: Settings) -> list[Member]:
    """Who the processes are, with ports that were free a moment ago when their mesh is on the loopback."""
    mesh, count = settings.mesh, settings.listening.processes
    if mesh.ha_mesh:
        ports = tuple(range(mesh.mesh_port, mesh.mesh_port + count))
        secret = None
    else:
        ports, secret = free_mesh_ports(count), secrets.token_urlsafe(32)
    return [Member(place=place, count=count, mesh_ports=ports, secret=secret) for place in range(count)]


def free_mesh_ports(count: int) -> tuple[int, ...]:
    """Ports of the loopback that are free for UDP and TCP, where possible outside of what the kernel hands out itself.

    A port is used again after a restart of its process; one that the kernel gives away would be taken by then.
    """
    low = 32768
    try:
        with open(EPHEMERAL_RANGE, "rb") as file:
            low = int(file.read().split()[0])
    except (OSError, ValueError, IndexError):
        pass  # the usual range
    rng = secrets.SystemRandom()
    found: dict[int, None] = {}
    for _ in range(PORT_TRIES_MAX * count):
        port = rng.randrange(20_000, low) if low > 22_000 else 0
        with socket.socket() as stream, socket.socket(type=socket.SOCK_DGRAM) as datagrams:
            try:
                stream.bind((LOOPBACK, port))
                port = stream.getsockname()[1]
                datagrams.bind((LOOPBACK, port))
            except OSError:
                continue
        found[port] = None
        if len(found) == count:
            break
    return tuple(found)


def interpreter() -> list[str]:
    """This Python, looking for modules where this process looks: in the folder it was started from only if we do."""
    return [sys.executable, *([] if os.getcwd() in sys.path or "" in sys.path else ["-P"])]
