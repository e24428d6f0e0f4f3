"""Where a process finds itself: alone, under a service manager, under smg's own supervisor."""

from __future__ import annotations

import os
import signal
import socket

import msgspec
import pytest
import trio
import trio.testing

from smg.cli.members import Member
from smg.cli.place import Place, Start, place_of_environment, place_under_supervisor
from smg.net.activation import Inherited
from smg.services.notify import Notifier


def test_alone_it_has_nothing_and_opens_at_once() -> None:
    place = place_of_environment({})
    assert not place.opens_late and not place.is_port_kept and place.is_first
    assert not place.notifier.is_heard
    assert place.process == ""


async def test_under_the_supervisor_sockets_and_name_come_with_the_first_message() -> None:
    supervisor, stdin = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    listeners = [socket.create_server(("127.0.0.1", 0)) for _ in range(4)]
    start = Start(
        member=Member(place=1, count=2, mesh_ports=(1, 2)),
        serving=(os.dup(listeners[0].fileno()),),
        neighbours=(os.dup(listeners[1].fileno()),),
        metrics=os.dup(listeners[2].fileno()),
        health=os.dup(listeners[3].fileno()),
        watchdog_s=10.0,
        opens_late=True,
        is_port_kept=False,
        is_first=False,
    )
    with supervisor:
        supervisor.send(msgspec.json.encode(start))
        fd = stdin.detach()
        place, member = place_under_supervisor(fd)
        assert member == start.member
        assert place.opens_late and not place.is_first
        assert place.inherited.serving[0].getsockname() == listeners[0].getsockname()
        assert place.neighbours[0].getsockname() == listeners[1].getsockname()
        assert place.inherited.metrics[0].getsockname() == listeners[2].getsockname()
        assert place.inherited.health[0].getsockname() == listeners[3].getsockname()
        assert os.read(fd, 10) == b""  # stdin reads nothing any more
        os.close(fd)
        await place.notifier.ready("x")
        assert supervisor.recv(100).startswith(b"READY=1\n")
        place.close()
    for sock in listeners:
        sock.close()


def test_a_stdin_that_is_no_supervisor_is_refused() -> None:
    with open(os.devnull) as file, pytest.raises(OSError):
        place_under_supervisor(file.fileno())


async def test_a_process_ends_as_on_sigterm_when_its_supervisor_does() -> None:
    supervisor, own = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    own.setblocking(False)
    place = Place(Inherited(), Notifier(own), lifeline=own)
    with trio.open_signal_receiver(signal.SIGTERM) as signals:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(place.end_with_supervisor)
            supervisor.send(b"a word of a newer one")
            await trio.testing.wait_all_tasks_blocked(0.01)
            supervisor.close()
            with trio.fail_after(5):
                assert await anext(signals) == signal.SIGTERM
    place.close()
