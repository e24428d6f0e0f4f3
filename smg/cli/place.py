"""How one process stands in the world: sockets it was left, whom it tells that it serves, who else serves beside it.

Owns that word, `Place`, and how it is read: from the environment of a service manager, or from the first message of smg's own
supervisor, which starts a process with a socket pair in place of its stdin. It must never bind, accept or start anything.
"""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import MutableMapping

import msgspec
import trio

from smg.cli.members import Member
from smg.net.activation import Inherited, adopt, take_inherited
from smg.services.notify import Notifier, take_notifier

START_BYTES_MAX = 65_536
"""The longest first message: the ports of 256 processes are a few KiB."""


class Start(msgspec.Struct, frozen=True, kw_only=True):
    """The first message of the supervisor to a process it has started; descriptors are those of the process."""

    member: Member
    serving: tuple[int, ...]
    neighbours: tuple[int, ...]
    metrics: int
    health: int
    watchdog_s: float
    opens_late: bool
    is_port_kept: bool
    is_first: bool


class Place:
    """See the module. `process` is the name in the log, empty when this process is alone.

    `opens_late`: the serving port was open before this process was and others may serve it, so nothing is accepted before
    a worker is ready. `is_port_kept`: the serving port stays open when this process ends. `is_first`: it speaks for all where one word is enough. `lifeline` ends when the supervisor does.
    """

    __slots__ = (
        "inherited",
        "is_first",
        "is_port_kept",
        "lifeline",
        "neighbours",
        "notifier",
        "opens_late",
        "process",
    )

    def __init__(
        self,
        inherited: Inherited,
        notifier: Notifier,
        *,
        neighbours: tuple[socket.socket, ...] = (),
        process: str = "",
        opens_late: bool = False,
        is_port_kept: bool = False,
        is_first: bool = True,
        lifeline: socket.socket | None = None,
    ) -> None:
        self.inherited = inherited
        self.notifier = notifier
        self.neighbours = neighbours
        self.process = process
        self.opens_late = opens_late
        self.is_port_kept = is_port_kept
        self.is_first = is_first
        self.lifeline = lifeline

    async def end_with_supervisor(self) -> None:
        """Ends this process as SIGTERM does when the supervisor is no more; else waits for ever."""
        lifeline = self.lifeline
        if lifeline is None:
            return
        while True:
            await trio.lowlevel.wait_readable(lifeline)
            try:
                if lifeline.recv(START_BYTES_MAX):
                    continue  # a word of a newer supervisor
            except BlockingIOError:
                continue
            except OSError:
                pass  # it is gone all the same
            os.kill(os.getpid(), signal.SIGTERM)
            return

    def close(self) -> None:
        """Gives every socket back."""
        self.inherited.close()
        for sock in self.neighbours:
            sock.close()
        self.notifier.close()


def place_of_environment(environment: MutableMapping[str, str]) -> Place:
    """Where the environment puts this process: under a service manager, or alone. Takes its variables away.

    Raises `SettingsError` for sockets that cannot be served on.
    """
    inherited = take_inherited(environment, os.getpid())
    notifier = take_notifier(environment, os.getpid())
    is_kept = bool(inherited.serving)
    return Place(inherited, notifier, opens_late=is_kept, is_port_kept=is_kept)


def place_under_supervisor(stdin_fd: int = 0) -> tuple[Place, Member]:
    """The place of a process that smg's supervisor started. Waits for its first message; stdin reads nothing from then on.

    Raises `msgspec.ValidationError` or `OSError` when stdin is no supervisor.
    """
    lifeline = socket.socket(fileno=os.dup(stdin_fd))
    nothing = os.open(os.devnull, os.O_RDONLY)
    start = msgspec.json.decode(lifeline.recv(START_BYTES_MAX), type=Start)
    os.dup2(nothing, stdin_fd)
    os.close(nothing)
    inherited = Inherited(
        tuple(adopt(fd) for fd in start.serving), (adopt(start.metrics),), (adopt(start.health),)
    )
    place = Place(
        inherited,
        Notifier(lifeline, None, start.watchdog_s),
        neighbours=tuple(adopt(fd) for fd in start.neighbours),
        opens_late=start.opens_late,
        is_port_kept=start.is_port_kept,
        is_first=start.is_first,
        lifeline=lifeline,
    )
    return place, start.member
