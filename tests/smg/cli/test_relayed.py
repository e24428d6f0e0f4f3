"""A page of a process as it passes through the supervisor."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import pytest
import trio
import trio.testing

from smg.cli import relayed as relayed_room
from smg.cli.relayed import relayed
from smg.errors import GatewayError

Play = Callable[[trio.SocketStream], Awaitable[None]]


class Asked:
    """As much of a request as is looked at."""

    method = "GET"
    target = b"/ui/events?x=1"
    is_head = False


async def answer_of(play: Play, asked: Any = None) -> tuple[Any, list[bytes], list[bytes]]:
    """(the response, the pieces of its body, what the process was asked)."""
    questions: list[bytes] = []

    async def serve(stream: trio.SocketStream) -> None:
        async with stream:
            questions.append(await stream.receive_some())
            await play(stream)

    async with trio.open_nursery() as nursery:
        listeners = await nursery.start(
            lambda task_status: trio.serve_tcp(serve, 0, host="127.0.0.1", task_status=task_status)
        )
        port = listeners[0].socket.getsockname()[1]
        pieces: list[bytes] = []
        try:
            response = await relayed("127.0.0.1", port, asked or Asked())
        except GatewayError as error:
            nursery.cancel_scope.cancel()
            return error, pieces, questions

        async def send(data: bytes) -> None:
            if data:
                pieces.append(data)

        if not (asked or Asked()).is_head:
            with trio.fail_after(5):
                await response.source(send)
        nursery.cancel_scope.cancel()
    return response, pieces, questions


def says(*pieces: bytes) -> Play:
    async def play(stream: trio.SocketStream) -> None:
        for piece in pieces:
            await stream.send_all(piece)
            await trio.testing.wait_all_tasks_blocked(0.005)

    return play


HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ncache-control: no-store\r\ndate: x\r\nconnection: close\r\n\r\n"


async def test_head_and_body_pass_and_what_is_of_the_connection_does_not() -> None:
    response, pieces, questions = await answer_of(says(HEAD + b"one", b"two"))
    assert (response.status, response.content_type) == (200, "text/event-stream")
    assert response.headers == [("cache-control", "no-store")]
    assert b"".join(pieces) == b"onetwo"
    assert questions == [b"GET /ui/events?x=1 HTTP/1.0\r\nhost: smg\r\n\r\n"]


async def test_an_event_passes_before_the_stream_ends_and_a_head_may_come_in_pieces() -> None:
    response, pieces, _ = await answer_of(says(HEAD[:20], HEAD[20:], b"data: 1\n\n", b"data: 2\n\n"))
    assert response.status == 200
    assert pieces == [b"data: 1\n\n", b"data: 2\n\n"]


async def test_a_head_request_gets_no_body() -> None:
    class Head(Asked):
        method = "HEAD"
        is_head = True

    response, pieces, questions = await answer_of(says(HEAD), Head())
    assert (response.status, pieces) == (200, [])
    assert questions[0].startswith(b"HEAD ")


@pytest.mark.parametrize("answer", [b"", b"HTTP/1.1\r\n\r\n", b"HTTP/1.1 999 X\r\n\r\n", b"x" * 200_000])
async def test_a_process_that_answers_nothing_sensible_is_a_503(answer: bytes) -> None:
    error, _, _ = await answer_of(says(answer))
    assert isinstance(error, GatewayError)
    assert (error.status, error.code) == (503, "no_available_workers")


async def test_a_process_that_says_nothing_is_a_503(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(relayed_room, "HEAD_PATIENCE_S", 0.05)

    async def silence(stream: trio.SocketStream) -> None:
        await trio.sleep(5)

    error, _, _ = await answer_of(silence)
    assert isinstance(error, GatewayError) and error.status == 503
