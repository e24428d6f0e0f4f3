"""Listening sockets that somebody else has bound and left to this process: the socket activation of service managers.

Owns the protocol (`LISTEN_PID`, `LISTEN_FDS`, `LISTEN_FDNAMES`, descriptors from 3 upwards; sd_listen_fds(3)) and the check
that what was inherited can be served on. A socket that outlives its server refuses nobody while the server is restarted: its
connections wait in the kernel. The variables are taken away, so that no process started from here believes them. It must
never accept, and never bind anything.
"""

from __future__ import annotations

import os
import socket
from collections.abc import MutableMapping

import msgspec

from smg.errors import SettingsError

FIRST_FD = 3
"""The first inherited descriptor; the protocol says so."""

FDS_MAX = 64
"""More inherited descriptors than this are a mistake: three ports on a few addresses each are all there is to listen on."""

SERVING = "serving"
METRICS = "metrics"
HEALTH = "health"
NAMES = (SERVING, METRICS, HEALTH)
"""What a socket may be called (`FileDescriptorName=`): which server gets it."""

_VARIABLES = ("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES")
_NAMELESS = frozenset({"", "unknown", "stored"})


class Inherited(msgspec.Struct, frozen=True):
    """The sockets this process was given, by what they are for. Whoever serves on them closes them."""

    serving: tuple[socket.socket, ...] = ()
    metrics: tuple[socket.socket, ...] = ()
    health: tuple[socket.socket, ...] = ()

    def close(self) -> None:
        """Gives all of them back; those that are closed already stay so."""
        for sock in (*self.serving, *self.metrics, *self.health):
            sock.close()


def take_inherited(environment: MutableMapping[str, str], pid: int) -> Inherited:
    """The sockets that a service manager left to the process `pid`, this one; empty when there are none for it.

    A socket without a name of its own is for serving (systemd names it after its unit). Takes the variables out of
    `environment`. Raises `SettingsError` for a name that is unknown and for a descriptor that is no TCP listener.
    """
    told_pid, told_count, told_names = [environment.pop(name, "") for name in _VARIABLES]
    if not told_pid.isdigit() or int(told_pid) != pid or not told_count.isdigit():
        return Inherited()
    count = int(told_count)
    if count > FDS_MAX:
        raise SettingsError("LISTEN_FDS", told_count, f"is above {FDS_MAX}", is_combination=True)
    names = told_names.split(":") if told_names else []
    found: dict[str, list[socket.socket]] = {name: [] for name in NAMES}
    try:
        for place in range(count):
            name = _purpose(names[place] if place < len(names) else "")
            found[name].append(adopt(FIRST_FD + place))
    except SettingsError:
        for sockets in found.values():
            for sock in sockets:
                sock.close()
        raise
    return Inherited(*(tuple(found[name]) for name in NAMES))


def adopt(fd: int) -> socket.socket:
    """The listening socket behind a descriptor, not blocking and closed on exec. Raises `SettingsError` for any other."""
    try:
        sock = socket.socket(fileno=fd)
    except OSError as error:
        raise _unusable(fd, error.strerror or str(error)) from None
    is_tcp = sock.family in (socket.AF_INET, socket.AF_INET6) and sock.type == socket.SOCK_STREAM
    if not is_tcp or not sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
        sock.detach()
        raise _unusable(fd, "is no listening TCP socket")
    sock.setblocking(False)
    os.set_inheritable(fd, False)
    return sock


def _purpose(name: str) -> str:
    if name in NAMES:
        return name
    if name in _NAMELESS or name.endswith(".socket"):
        return SERVING
    raise SettingsError(
        "LISTEN_FDNAMES", repr(name), f"must be one of {', '.join(NAMES)}", is_combination=True
    )


def _unusable(fd: int, reason: str) -> SettingsError:
    return SettingsError("LISTEN_FDS", f"descriptor {fd}", reason, is_combination=True)
