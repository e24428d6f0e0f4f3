"""Listening sockets.

Owns how an address and a port become sockets that a `Server` accepts from. Never accepts.
"""

from __future__ import annotations

import socket

from smg.errors import SettingsError

BACKLOG = 4096  # connections the kernel keeps while the loop is busy; capped by net.core.somaxconn


def listen(host: str, port: int, flag: str) -> list[socket.socket]:
    """Non-blocking listening sockets on every address that `host` means; port 0 takes a free one.

    Raises `SettingsError` (CLI-9) naming `flag` and the address when one cannot be bound; nothing stays open then.
    """
    shown = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    listeners: list[socket.socket] = []
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        for family, kind, protocol, _, address in dict.fromkeys(found):
            sock = socket.socket(family, kind | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC, protocol)
            listeners.append(sock)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                # Both families are bound one by one where both are meant.
                sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, int(host not in ("", "::")))
            sock.bind(address)
            sock.listen(BACKLOG)
    except OSError as error:
        for sock in listeners:
            sock.close()
        reason = f"cannot listen on {shown}: {error.strerror or error}"
        raise SettingsError(flag, str(port), reason, is_combination=True) from None
    return listeners
