"""What this process tells whoever started it: that it serves, reloads, stops, and that its loop still turns.

Owns the protocol of `NOTIFY_SOCKET` and `WATCHDOG_USEC` (sd_notify(3)), which systemd speaks, and which smg's own supervisor
speaks to its processes over a socket pair. The sign of life is sent by the loop itself, so a loop that hangs is noticed. A
manager that does not listen must never keep the node from serving: what cannot be sent in time is dropped.
"""

from __future__ import annotations

import socket
import time
from collections.abc import MutableMapping
from typing import Protocol

import trio

READY = "READY=1"
STOPPING = "STOPPING=1"
WATCHDOG = "WATCHDOG=1"

SEND_PATIENCE_S = 1.0
"""A manager that is busy for longer is not waited for."""

_VARIABLES = ("NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID")


class Log(Protocol):
    """What this room needs of `smg.telemetry.log.Logger`."""

    def warn(self, message: str, /, **fields: object) -> None:
        """Something is wrong and smg goes on."""
        ...


class Notifier:
    """Tells one manager, or nobody.

    `sock` is owned from now on; `address` is where it sends to, None when it is connected. `watchdog_s`: the manager
    takes this process for hung after so long without a word; None: it does not watch.
    """

    def __init__(
        self,
        sock: socket.socket | None = None,
        address: str | None = None,
        watchdog_s: float | None = None,
    ) -> None:
        self._sock = sock
        self._address = address
        self._watchdog_s = watchdog_s
        self._log: Log | None = None
        if sock is not None:
            sock.setblocking(False)

    @property
    def is_heard(self) -> bool:
        """Whether anybody is told."""
        return self._sock is not None

    async def ready(self, status: str) -> None:
        """It serves, or goes on after a reload; `status` is a line for people."""
        await self._tell(f"{READY}\nSTATUS={status}")

    async def reloading(self) -> None:
        """A reload begins; `ready` ends it."""
        await self._tell(f"RELOADING=1\nMONOTONIC_USEC={time.monotonic_ns() // 1000}")

    async def stopping(self, status: str) -> None:
        """It drains and will end."""
        await self._tell(f"{STOPPING}\nSTATUS={status}")

    async def run(self, log: Log, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Gives the sign of life at half of the time the manager waits for one, until cancelled."""
        self._log = log
        task_status.started()
        if self._sock is None or self._watchdog_s is None:
            return
        while True:
            await self._tell(WATCHDOG)
            await trio.sleep(self._watchdog_s / 2)

    def close(self) -> None:
        """Gives the socket back; nobody is told any more."""
        if self._sock is not None:
            self._sock.close()
            self._sock = None

    async def _tell(self, text: str) -> None:
        if self._sock is None:
            return
        data = text.encode()
        with trio.move_on_after(SEND_PATIENCE_S):
            while not self._sent(data):
                await trio.lowlevel.wait_writable(self._sock)

    def _sent(self, data: bytes) -> bool:
        """False when the manager's queue is full."""
        assert self._sock is not None
        try:
            if self._address is None:
                self._sock.send(data)
            else:
                self._sock.sendto(data, self._address)
        except BlockingIOError:
            return False
        except OSError as error:
            # A datagram socket may be there again later; each word is tried by itself, the first failure is told.
            if self._log is not None:
                self._log.warn("the service manager cannot be told", error=error.strerror or str(error))
                self._log = None
        return True


def take_notifier(environment: MutableMapping[str, str], pid: int) -> Notifier:
    """Whom the environment says to tell. Takes the variables out of it, so that no child speaks in our name."""
    address, usec, watched = [environment.pop(name, "") for name in _VARIABLES]
    if address[:1] not in ("/", "@") or len(address) < 2:
        return Notifier()  # nobody, or a kind of address that smg does not know (vsock)
    is_watched = usec.isdigit() and int(usec) > 0 and watched in ("", str(pid))
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
    # An abstract address is written with @ and begins with NUL.
    place = "\0" + address[1:] if address[0] == "@" else address
    return Notifier(sock, place, int(usec) / 1e6 if is_watched else None)
