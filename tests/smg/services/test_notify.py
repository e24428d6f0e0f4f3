"""What a service manager hears, and that one which does not listen costs nothing."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

from smg.services import notify
from smg.services.notify import Notifier, take_notifier

PID = 4711


class Lines:
    def __init__(self) -> None:
        self.lines: list[tuple[str, dict[str, Any]]] = []

    def warn(self, message: str, /, **fields: object) -> None:
        self.lines.append((message, fields))


def manager(path: str) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    sock.bind(path)
    sock.settimeout(2)
    return sock


def told(sock: socket.socket) -> dict[str, str]:
    """The words of the next message."""
    lines = sock.recv(4096).decode().split("\n")
    return dict(line.split("=", 1) for line in lines)


@pytest.mark.parametrize("is_abstract", [False, True])
async def test_a_manager_is_told_by_path_and_by_abstract_address(tmp_path: Path, is_abstract: bool) -> None:
    path = f"\0smg-test-{os.getpid()}" if is_abstract else str(tmp_path / "notify")
    with manager(path) as sock:
        environment = {"NOTIFY_SOCKET": path.replace("\0", "@"), "OTHER": "stays"}
        notifier = take_notifier(environment, PID)
        assert environment == {"OTHER": "stays"}
        assert notifier.is_heard
        await notifier.ready("serving on http://127.0.0.1:1")
        assert told(sock) == {"READY": "1", "STATUS": "serving on http://127.0.0.1:1"}
        await notifier.reloading()
        words = told(sock)
        assert words["RELOADING"] == "1" and int(words["MONOTONIC_USEC"]) > 0
        await notifier.stopping("draining")
        assert told(sock) == {"STOPPING": "1", "STATUS": "draining"}
        notifier.close()
        assert not notifier.is_heard
        await notifier.ready("nobody hears it")


@pytest.mark.parametrize("address", ["", "relative", "vsock:2:1234", "/"])
async def test_without_a_manager_nothing_is_told(address: str) -> None:
    notifier = take_notifier({"NOTIFY_SOCKET": address, "WATCHDOG_USEC": "1000"}, PID)
    assert not notifier.is_heard
    await notifier.ready("x")
    with trio.fail_after(1):
        await notifier.run(Lines())


async def test_the_sign_of_life_comes_twice_in_the_time_of_the_watchdog(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    path = str(tmp_path / "notify")
    with manager(path) as sock:
        notifier = take_notifier(
            {"NOTIFY_SOCKET": path, "WATCHDOG_USEC": "3000000", "WATCHDOG_PID": str(PID)}, PID
        )
        async with trio.open_nursery() as nursery:
            await nursery.start(notifier.run, Lines())
            await trio.sleep(4.6)
            nursery.cancel_scope.cancel()
        sock.setblocking(False)
        count = 0
        with pytest.raises(BlockingIOError):
            while True:
                assert sock.recv(100) == b"WATCHDOG=1"
                count += 1
        assert count == 4  # at 0, 1.5, 3 and 4.5 s
        notifier.close()


@pytest.mark.parametrize("pid", [str(PID + 1), "me"])
async def test_a_watchdog_over_somebody_else_is_not_fed(tmp_path: Path, pid: str) -> None:
    with manager(str(tmp_path / "notify")) as sock:
        notifier = take_notifier(
            {"NOTIFY_SOCKET": str(tmp_path / "notify"), "WATCHDOG_USEC": "1", "WATCHDOG_PID": pid}, PID
        )
        await notifier.run(Lines())
        sock.setblocking(False)
        with pytest.raises(BlockingIOError):
            sock.recv(100)
        notifier.close()


async def test_a_manager_whose_queue_is_full_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(notify, "SEND_PATIENCE_S", 0.01)
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs:
        notifier = Notifier(ours)
        with trio.fail_after(30):
            for _ in range(2000):
                await notifier.ready("x" * 1000)
                if not trio.lowlevel.current_statistics().tasks_runnable and _is_full(ours):
                    break
            await notifier.ready("one too many")
        notifier.close()


def _is_full(sock: socket.socket) -> bool:
    try:
        sock.send(b"y" * 1000)
    except BlockingIOError:
        return True
    return False


async def test_a_manager_that_is_gone_is_told_of_once(tmp_path: Path) -> None:
    path = str(tmp_path / "notify")
    manager(path).close()
    log = Lines()
    notifier = take_notifier({"NOTIFY_SOCKET": path}, PID)
    await notifier.run(log)
    await notifier.ready("x")
    await notifier.ready("y")
    assert [message for message, _ in log.lines] == ["the service manager cannot be told"]
    notifier.close()
