"""What systemd does, done by a manager of our own: sockets handed over, words listened to, restarts under load.

And the units in `deploy/`, read by systemd itself where it is installed (`systemd-analyze verify`), else by their words.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import warnings
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio

from smg.cli.flags import parse, unknown_variables
from smg.cli.supervisor import STOP_EXTRA_S
from smg.net import activation
from tests.e2e.fake_worker import fake_worker
from tests.e2e.gateway import CHAT, HELLO, Client, eventually, request
from tests.e2e.process import free_ports

DEPLOY = Path(__file__).parents[2] / "deploy"
PATIENCE_S = 20.0
QUICK = ("--shutdown-grace-period-secs", "0.4")

# Started as systemd does it: sockets from descriptor 3 upwards, and the pid of the process that will be smg.
LAUNCH = """
import os, sys
count = int(sys.argv[1])
os.environ["LISTEN_PID"] = os.environ["WATCHDOG_PID"] = str(os.getpid())
for place, fd in enumerate(map(int, sys.argv[2 : 2 + count])):
    os.dup2(fd, 100 + place)
for place in range(count):
    os.dup2(100 + place, 3 + place)
    os.close(100 + place)
if not count:
    del os.environ["LISTEN_PID"]
os.execv(sys.executable, [sys.executable, "-m", "smg", *sys.argv[2 + count :]])
"""


class Manager:
    """Holds the listening sockets and the notification socket of one unit, over all lives of its process."""

    def __init__(self, sockets: dict[str, socket.socket], watchdog_s: float = 0.0) -> None:
        self.sockets = sockets
        self.watchdog_s = watchdog_s
        self.address = f"\0smg-test-{os.getpid()}-{id(self)}"
        self.words = trio.socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.told: list[str] = []
        self.process: trio.Process | None = None
        self.stderr = b""
        self._heard = trio.Event()

    async def listen(self) -> None:
        await self.words.bind(self.address)
        while True:
            self.told += (await self.words.recv(4096)).decode().split("\n")
            self._heard.set()
            self._heard = trio.Event()

    async def start(self, nursery: trio.Nursery, *flags: str) -> None:
        fds = [sock.fileno() for sock in self.sockets.values()]
        environment = {name: value for name, value in os.environ.items() if not name.startswith("SMG_")}
        environment |= {
            "LISTEN_FDS": str(len(fds)),
            "LISTEN_FDNAMES": ":".join(self.sockets),
            "NOTIFY_SOCKET": self.address.replace("\0", "@"),
        }
        if self.watchdog_s:
            environment["WATCHDOG_USEC"] = str(int(self.watchdog_s * 1e6))
        self.told.clear()
        self.process = await trio.lowlevel.open_process(
            [sys.executable, "-c", LAUNCH, str(len(fds)), *map(str, fds), *flags],
            pass_fds=fds,
            env=environment,
            stderr=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
        )
        nursery.start_soon(self._read, self.process)

    async def _read(self, process: trio.Process) -> None:
        assert process.stderr is not None
        async for data in process.stderr:
            self.stderr += data

    async def hears(self, word: str) -> None:
        with trio.move_on_after(PATIENCE_S):
            while word not in self.told:
                await self._heard.wait()
        assert word in self.told, (self.told, self.stderr.decode())

    async def stop(self) -> int:
        assert self.process is not None
        self.process.terminate()
        with trio.fail_after(PATIENCE_S):
            return await self.process.wait()


@asynccontextmanager
async def managed(
    names: Sequence[str], watchdog_s: float = 0.0
) -> AsyncIterator[tuple[Manager, trio.Nursery]]:
    sockets = {name: socket.create_server(("127.0.0.1", 0), backlog=512) for name in names}
    manager = Manager(sockets, watchdog_s)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(manager.listen)
        try:
            yield manager, nursery
        finally:
            if manager.process is not None and manager.process.returncode is None:
                manager.process.kill()
                with trio.CancelScope(shield=True):
                    await manager.process.wait()
        nursery.cancel_scope.cancel()
    manager.words.close()
    for sock in sockets.values():
        sock.close()


class Load:
    """A client that opens a connection per request and tries nothing twice: whatever fails is a failure."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.statuses: list[int] = []
        self.slowest_s = 0.0

    async def run(self) -> None:
        while True:
            started_s = trio.current_time()
            # A timeout here is a failure as well; the manager's queue is meant to hold them for a moment only.
            with trio.fail_after(PATIENCE_S):
                client = Client(await trio.open_tcp_stream("127.0.0.1", self.port))
                await client.send(request(CHAT, HELLO, "connection: close"))
                self.statuses.append((await client.read()).status)
                await client.leave()
            self.slowest_s = max(self.slowest_s, trio.current_time() - started_s)


@pytest.mark.parametrize("processes", [1, 2])
async def test_a_restart_under_load_fails_no_connection_and_no_request(processes: int) -> None:
    """The sockets are the manager's: while nobody serves, connections wait in the kernel."""
    async with fake_worker("m") as worker, managed(("serving", "metrics")) as (manager, nursery):
        port = manager.sockets["serving"].getsockname()[1]
        metrics = manager.sockets["metrics"].getsockname()[1]
        flags = ("--host", "127.0.0.1", *QUICK, "--worker-urls", worker.url, "--processes", str(processes))
        await manager.start(nursery, *flags)
        await manager.hears("READY=1")
        load = Load(port)
        async with trio.open_nursery() as clients:
            for _ in range(4):
                clients.start_soon(load.run)
            await eventually(lambda: len(load.statuses) > 20)
            assert await manager.stop() == 0
            assert "STOPPING=1" in manager.told
            before = len(load.statuses)
            await manager.start(nursery, *flags)
            await manager.hears("READY=1")
            await eventually(lambda: len(load.statuses) > before + 40)
            clients.cancel_scope.cancel()
        assert set(load.statuses) == {200}
        client = Client(await trio.open_tcp_stream("127.0.0.1", metrics))
        assert b"smg_http_requests_total" in (await client.ask("/metrics")).body
        await client.leave()


async def test_readiness_reload_watchdog_and_a_hung_loop_are_told() -> None:
    port, metrics = free_ports(2)
    async with managed((), watchdog_s=0.6) as (manager, nursery):
        await manager.start(
            nursery, "--host", "127.0.0.1", "--port", str(port), "--prometheus-port", str(metrics), *QUICK
        )
        await manager.hears("READY=1")
        assert f"STATUS=serving on http://127.0.0.1:{port}" in manager.told
        async with await trio.open_tcp_stream("127.0.0.1", port):
            pass  # READY comes after the port is open
        manager.told.clear()
        await manager.hears("WATCHDOG=1")
        manager.told.clear()
        assert manager.process is not None
        manager.process.send_signal(signal.SIGHUP)
        await manager.hears("RELOADING=1")
        await manager.hears("READY=1")
        assert manager.told.index("RELOADING=1") < manager.told.index("READY=1")
        # A loop that does not turn gives no sign of life, whatever the kernel still accepts for it.
        manager.process.send_signal(signal.SIGSTOP)
        await trio.sleep(0.1)
        manager.told.clear()
        await trio.sleep(0.8)
        assert "WATCHDOG=1" not in manager.told
        manager.process.send_signal(signal.SIGCONT)
        await manager.hears("WATCHDOG=1")
        assert await manager.stop() == 0
        assert "STOPPING=1" in manager.told


async def test_sockets_that_cannot_be_served_on_end_the_start_with_one_line() -> None:
    async with managed(("admin",)) as (manager, nursery):
        await manager.start(nursery)
        assert manager.process is not None
        with trio.fail_after(PATIENCE_S):
            assert await manager.process.wait() == 1
        await eventually(lambda: manager.stderr.count(b"\n") == 1)
        assert b"LISTEN_FDNAMES: 'admin'" in manager.stderr


UNITS = ("smg.service", "smg.socket", "smg@.service", "smg@.socket")
WORDS = {
    "Unit": "Description Documentation After Wants StartLimitIntervalSec StartLimitBurst",
    "Socket": "ListenStream FileDescriptorName Backlog",
    "Service": "Type WatchdogSec ExecStart ExecReload EnvironmentFile DynamicUser LimitNOFILE Restart RestartSec "
    "RestartPreventExitStatus TimeoutStopSec KillSignal KillMode CapabilityBoundingSet AmbientCapabilities NoNewPrivileges "
    "ProtectSystem ProtectHome PrivateTmp PrivateDevices DevicePolicy ProtectKernelTunables ProtectKernelModules "
    "ProtectKernelLogs ProtectControlGroups ProtectClock ProtectHostname ProtectProc RestrictAddressFamilies "
    "RestrictNamespaces RestrictRealtime RestrictSUIDSGID LockPersonality MemoryDenyWriteExecute RemoveIPC UMask "
    "SystemCallArchitectures SystemCallFilter SystemCallErrorNumber",
    "Install": "WantedBy",
}
"""What our units say; a word that is new here has to be looked up once (systemd.directives(7))."""


def read_unit(name: str) -> dict[str, dict[str, str]]:
    """Sections of a unit; a word that comes twice has both values, with a line end between."""
    found: dict[str, dict[str, str]] = {}
    section: dict[str, str] = {}
    for line in (DEPLOY / name).read_text().splitlines():
        if line.startswith("["):
            section = found[line.strip("[]")] = {}
        elif line and not line.startswith("#"):
            word, sign, value = line.partition("=")
            assert sign and word == word.strip(), (name, line)
            section[word] = f"{section[word]}\n{value}" if word in section else value
    return found


@pytest.mark.parametrize("name", UNITS)
def test_a_unit_uses_no_word_that_systemd_does_not_have(name: str) -> None:
    for section, words in read_unit(name).items():
        assert not words.keys() - set(WORDS[section].split())


def test_the_template_differs_from_the_unit_in_its_ports_alone() -> None:
    one, many = read_unit("smg.service"), read_unit("smg@.service")
    for unit in (one, many):
        del unit["Unit"]["Description"], unit["Service"]["ExecStart"], unit["Service"]["EnvironmentFile"]
    assert one == many
    sockets = read_unit("smg.socket")["Socket"], read_unit("smg@.socket")["Socket"]
    assert (sockets[0].pop("ListenStream"), sockets[1].pop("ListenStream")) == (
        "0.0.0.0:30000",
        "0.0.0.0:3000%i",
    )
    assert sockets[0] == sockets[1]
    assert sockets[0]["FileDescriptorName"] in activation.NAMES


@pytest.mark.parametrize("instance", ["0", "9"])
def test_flags_and_variables_of_the_units_are_smgs_own(instance: str) -> None:
    words = (
        read_unit("smg@.service")["Service"]["ExecStart"]
        .replace("%i", instance)
        .replace("%H", "host")
        .split()
    )
    assert words[0] == "/opt/smg/bin/smg"
    lines = [line.removeprefix("#") for line in (DEPLOY / "smg.env").read_text().splitlines()]
    environment = dict(line.split("=", 1) for line in lines if line.startswith("SMG_"))
    assert not unknown_variables(environment)
    secret = environment.pop("SMG_MESH_SECRET")
    assert secret.startswith("@/run/credentials/smg.service/")
    settings = parse(words[1:], environment)
    assert settings.listening.port == 30_000 + int(instance)
    assert settings.mesh.node_name == f"host-{instance}"
    stop_s = float(read_unit("smg@.service")["Service"]["TimeoutStopSec"])
    assert stop_s > settings.listening.shutdown_grace_period_secs + STOP_EXTRA_S
    assert settings.listening.processes > 1 and settings.mesh.ha_mesh


def test_systemd_itself_finds_nothing_wrong_with_the_units(tmp_path: Path) -> None:
    analyze = shutil.which("systemd-analyze")
    if analyze is None:
        warnings.warn("systemd is not installed: the units were checked by their words alone", stacklevel=1)
        return
    files = []
    for name in UNITS:
        path = tmp_path / name.replace("@", "@1")
        # Only what the unit starts is missing here.
        path.write_text((DEPLOY / name).read_text().replace("/opt/smg/bin/smg", sys.executable))
        files.append(str(path))
    # A template is needed as well, since its instance is made of it.
    for name in UNITS:
        (tmp_path / name).write_text((DEPLOY / name).read_text().replace("/opt/smg/bin/smg", sys.executable))
    told = subprocess.run([analyze, "verify", "--man=no", *files], capture_output=True, text=True, timeout=60)
    assert (told.returncode, told.stderr) == (0, "")
    rated = subprocess.run(
        [analyze, "security", "--offline=yes", "--threshold=20", files[0]],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert rated.returncode == 0, rated.stdout[-300:]  # 2.0 of 10 is the most that may stay open
