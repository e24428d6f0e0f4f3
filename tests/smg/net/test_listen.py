"""How a port becomes sockets: alone, and shared by several processes."""

from __future__ import annotations

import socket
from collections import Counter

import pytest

from smg.errors import SettingsError
from smg.net.listen import listen, listen_shared


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        return int(sock.getsockname()[1])


def test_shared_sockets_are_on_one_port_and_the_kernel_spreads_connections_over_them() -> None:
    port = free_port()
    lists = listen_shared("127.0.0.1", port, "--port", 3)
    clients = [socket.create_connection(("127.0.0.1", port)) for _ in range(120)]
    taken: Counter[int] = Counter()
    for place, (sock,) in enumerate(lists):
        assert sock.getsockname()[1] == port
        with pytest.raises(BlockingIOError):
            while True:
                sock.accept()[0].close()
                taken[place] += 1
    assert sum(taken.values()) == 120
    assert min(taken.values()) >= 15  # 40 each are expected; fewer than 15 come once in a million runs
    for sock in (*clients, *(sock for sockets in lists for sock in sockets)):
        sock.close()


def test_a_shared_port_is_not_shared_with_whoever_had_it_before() -> None:
    port = free_port()
    first = listen_shared("127.0.0.1", port, "--port", 2)
    with pytest.raises(SettingsError, match=f"--port.*cannot listen on 127.0.0.1:{port}"):
        listen_shared("127.0.0.1", port, "--port", 2)
    with pytest.raises(SettingsError):
        listen("127.0.0.1", port, "--port")
    for sockets in first:
        for sock in sockets:
            sock.close()
    for sock in listen("127.0.0.1", port, "--port"):
        sock.close()
