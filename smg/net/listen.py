"""Listening sockets.

Owns how an address and a port become sockets that a `Server` accepts from, and how they stop to answer the kernel's first
packet. Never accepts.
"""

from __future__ import annotations

import ctypes
import socket
import struct

from smg.errors import SettingsError

BACKLOG = 4096  # connections the kernel keeps while the loop is busy; capped by net.core.somaxconn


def listen_shared(host: str, port: int, flag: str, count: int) -> list[list[socket.socket]]:
    """As `listen`, `count` times on one port: the kernel spreads new connections evenly over the lists.

    The port is taken alone first: sockets that share a port would share it with another gateway too, where one is
    refused (CLI-9). Raises as `listen`.
    """
    for sock in listen(host, port, flag):
        sock.close()
    lists: list[list[socket.socket]] = []
    try:
        for _ in range(count):
            lists.append(listen(host, port, flag, is_shared=True))
    except SettingsError:
        for sockets in lists:
            for sock in sockets:
                sock.close()
        raise
    return lists


def listen(host: str, port: int, flag: str, *, is_shared: bool = False) -> list[socket.socket]:
    """Non-blocking listening sockets on every address that `host` means; port 0 takes a free one.

    `is_shared`: other sockets of this user may listen on the same port. Raises `SettingsError` (CLI-9) naming `flag` and
    the address when one cannot be bound; nothing stays open then.
    """
    shown = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    listeners: list[socket.socket] = []
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        for family, kind, protocol, _, address in dict.fromkeys(found):
            sock = socket.socket(family, kind | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC, protocol)
            listeners.append(sock)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if is_shared:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
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


# Linux: <asm-generic/socket.h>; Python's socket module does not name it.
_SO_ATTACH_FILTER = 26
# Classic BPF; a TCP socket's filter sees the segment from its header on, whose byte 13 has the flags. A segment with SYN and
# without ACK is dropped (return 0), everything else passes.
_NO_SYN = b"".join(
    struct.pack("HBBI", *instruction)
    for instruction in (
        (0x30, 0, 0, 13),  # load the byte at 13
        (0x54, 0, 0, 0x12),  # keep SYN and ACK
        (0x15, 0, 1, 0x02),  # only SYN: the next line, else the one after it
        (0x06, 0, 0, 0),
        (0x06, 0, 0, 0xFFFFFFFF),
    )
)


def ignore_newcomers(listener: socket.socket) -> bool:
    """From now on handshakes in progress come to their end and no new one begins; False where the system cannot do it.

    A listener that is closed resets whoever the kernel has connected and nobody has accepted, and who may have sent a request
    already; for a client that is no refusal, and a POST is not sent again. So a port is closed in two steps: no first packet
    is answered for longer than a handshake takes, what has come is accepted, and then the listener is closed. Who came in
    between sends its first packet again after a second and is refused, which everybody may try elsewhere.
    """
    program = ctypes.create_string_buffer(_NO_SYN, len(_NO_SYN))
    count = len(_NO_SYN) // struct.calcsize("HBBI")
    try:
        listener.setsockopt(
            socket.SOL_SOCKET, _SO_ATTACH_FILTER, struct.pack("HP", count, ctypes.addressof(program))
        )
    except OSError:
        return False
    return True
