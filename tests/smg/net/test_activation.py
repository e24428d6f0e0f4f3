"""Sockets that a service manager leaves: which are taken, for what, and what is refused."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator

import pytest

from smg.errors import SettingsError
from smg.net import activation
from smg.net.activation import Inherited, adopt, take_inherited

PID = 4711


@pytest.fixture
def fds(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[socket.socket]]:
    """Three listening sockets where the protocol would have put them, on whatever numbers are free here."""
    listeners = [socket.create_server(("127.0.0.1", 0)) for _ in range(3)]
    numbers = [sock.fileno() for sock in listeners]
    monkeypatch.setattr(activation, "adopt", lambda fd: adopt(os.dup(numbers[fd - 3])))
    yield listeners
    for sock in listeners:
        sock.close()


def told(count: int, names: str = "", pid: int = PID) -> dict[str, str]:
    return {"LISTEN_PID": str(pid), "LISTEN_FDS": str(count), "LISTEN_FDNAMES": names, "OTHER": "stays"}


def ports(sockets: tuple[socket.socket, ...]) -> list[int]:
    return [sock.getsockname()[1] for sock in sockets]


def test_sockets_are_given_out_by_their_names(fds: list[socket.socket]) -> None:
    environment = told(3, "metrics:serving:health")
    found = take_inherited(environment, PID)
    own = ports(tuple(fds))
    assert (ports(found.metrics), ports(found.serving), ports(found.health)) == ([own[0]], [own[1]], [own[2]])
    assert environment == {"OTHER": "stays"}
    found.close()


@pytest.mark.parametrize("names", ["", "smg.socket:unknown", "smg@30000.socket:serving"])
def test_a_socket_without_a_name_of_its_own_is_for_serving(fds: list[socket.socket], names: str) -> None:
    found = take_inherited(told(2, names), PID)
    assert ports(found.serving) == ports(tuple(fds[:2]))
    assert not found.metrics and not found.health
    found.close()


def test_adopted_sockets_do_not_block_and_are_not_passed_on(fds: list[socket.socket]) -> None:
    found = take_inherited(told(1), PID)
    (sock,) = found.serving
    assert not sock.getblocking()
    assert not os.get_inheritable(sock.fileno())
    with pytest.raises(BlockingIOError):
        sock.accept()
    found.close()
    assert sock.fileno() == -1


@pytest.mark.parametrize(
    "environment",
    [
        {},
        told(1, pid=PID + 1),
        {"LISTEN_FDS": "1"},
        {"LISTEN_PID": str(PID), "LISTEN_FDS": "many"},
        {"LISTEN_PID": "me", "LISTEN_FDS": "1"},
    ],
)
def test_what_is_for_somebody_else_is_left_alone_and_not_passed_on(environment: dict[str, str]) -> None:
    assert take_inherited(environment, PID) == Inherited()
    assert not {"LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES"} & environment.keys()


def test_an_unknown_name_is_refused_by_the_variable(fds: list[socket.socket]) -> None:
    with pytest.raises(SettingsError, match=r"LISTEN_FDNAMES: 'admin': must be one of serving, metrics"):
        take_inherited(told(2, "serving:admin"), PID)


def test_more_sockets_than_there_can_be_are_refused() -> None:
    with pytest.raises(SettingsError, match="LISTEN_FDS"):
        take_inherited(told(1_000_000), PID)


def test_only_listening_tcp_sockets_can_be_served_on() -> None:
    stream, datagram = socket.socket(), socket.socket(type=socket.SOCK_DGRAM)
    local = socket.socket(socket.AF_UNIX)
    local.bind("")
    local.listen()
    with open(os.devnull) as file, stream, datagram, local:
        for fd in (stream.fileno(), datagram.fileno(), local.fileno(), file.fileno()):
            with pytest.raises(SettingsError, match=f"descriptor {fd}"):
                adopt(fd)
            os.fstat(fd)  # what is refused is not closed: it may be somebody's
