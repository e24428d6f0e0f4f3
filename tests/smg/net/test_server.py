"""The server over real sockets (contract section 4)."""

from __future__ import annotations

import trio

from smg.net.exchange import Exchange, ServerLimits
from smg.net.plain import Request, Response, StreamResponse, text_response


async def talk(port: int, data: bytes, *, is_half_closed: bool = False) -> bytes:
    """Sends bytes, then reads until the server closes."""
    stream = await trio.open_tcp_stream("127.0.0.1", port)
    async with stream:
        await stream.send_all(data)
        if is_half_closed:
            await stream.send_eof()
        received = b""
        with trio.fail_after(5):
            async for chunk in stream:
                received += chunk
        return received


async def echo(request: Request) -> Response:
    body = await request.body()
    return text_response(200, f"{request.method} {request.path} {len(body)}")


CLOSE = b"GET /last HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n"


async def test_http_1_keeps_the_connection_and_answers_pipelined_requests_in_order(start_plain):
    async with start_plain(echo) as server:
        received = await talk(
            server.port,
            b"GET /a HTTP/1.1\r\nhost: x\r\n\r\n"
            b"POST /b HTTP/1.1\r\nhost: x\r\ncontent-length: 3\r\n\r\nabc"
            b"POST /c HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n2;q=1\r\nxy\r\n0\r\nt: 1\r\n\r\n"
            + CLOSE,
        )
    assert received.count(b"HTTP/1.1 200 OK") == 4
    at = [received.index(text) for text in (b"GET /a 0", b"POST /b 3", b"POST /c 2", b"GET /last 0")]
    assert at == sorted(at)


async def test_http_1_a_body_may_come_byte_by_byte(start_plain):
    request = b"POST /b HTTP/1.1\r\nhost: x\r\ncontent-length: 5\r\nconnection: close\r\n\r\nhello"
    async with start_plain(echo) as server:
        stream = await trio.open_tcp_stream("127.0.0.1", server.port)
        for at in range(len(request)):
            await stream.send_all(request[at : at + 1])
            await trio.lowlevel.checkpoint()
        received = b""
        async for chunk in stream:
            received += chunk
    assert b"POST /b 5" in received


async def test_http_4_continue_is_sent_before_the_body_is_read(start_plain):
    async with start_plain(echo) as server:
        stream = await trio.open_tcp_stream("127.0.0.1", server.port)
        await stream.send_all(
            b"POST /b HTTP/1.1\r\nhost: x\r\ncontent-length: 2\r\nexpect: 100-continue\r\nconnection: close\r\n\r\n"
        )
        assert await stream.receive_some() == b"HTTP/1.1 100 Continue\r\n\r\n"
        await stream.send_all(b"ok")
        received = b""
        async for chunk in stream:
            received += chunk
    assert b"POST /b 2" in received


async def test_http_8_a_body_over_the_limit_is_refused_before_it_is_read_and_the_answer_can_be_read(
    start_plain,
):
    async with start_plain(echo, ServerLimits(payload_bytes_max=10)) as server:
        received = await talk(
            server.port, b"POST /b HTTP/1.1\r\nhost: x\r\ncontent-length: 500000\r\n\r\n" + b"x" * 500_000
        )
        chunked = await talk(
            server.port,
            b"POST /b HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n" + b"6\r\nabcdef\r\n" * 3,
            is_half_closed=True,
        )
    assert received.startswith(b"HTTP/1.1 413 ")
    assert chunked.startswith(b"HTTP/1.1 413 ")
    assert b"request_body_too_large" in received and b"connection: close" in received


async def test_http_2_an_http_1_0_stream_ends_with_the_connection_and_is_not_chunked(start_plain):
    async def stream(request: Request) -> StreamResponse:
        async def source(send):
            await send(b"one ")
            await send(b"two")

        return StreamResponse(200, source, "text/plain")

    async with start_plain(stream) as server:
        old = await talk(server.port, b"GET / HTTP/1.0\r\n\r\n")
        new = await talk(server.port, CLOSE)
    assert old.endswith(b"\r\n\r\none two") and b"chunked" not in old
    assert new.endswith(b"4\r\none \r\n3\r\ntwo\r\n0\r\n\r\n")


async def test_http_13_a_half_closed_client_still_gets_its_plain_answer(start_plain):
    async with start_plain(echo) as server:
        received = await talk(server.port, b"GET /a HTTP/1.1\r\nhost: x\r\n\r\n", is_half_closed=True)
    assert b"GET /a 0" in received


async def test_http_14_a_client_that_leaves_cancels_a_handler_that_waits(start_plain):
    cancelled = trio.Event()
    started = trio.Event()

    async def forever(request: Request) -> Response:
        started.set()
        try:
            await trio.sleep_forever()
        finally:
            cancelled.set()
        raise AssertionError

    async with start_plain(forever) as server:
        stream = await trio.open_tcp_stream("127.0.0.1", server.port)
        await stream.send_all(b"GET /a HTTP/1.1\r\nhost: x\r\n\r\n")
        await started.wait()
        await stream.aclose()
        with trio.fail_after(1.5):
            await cancelled.wait()
        with trio.fail_after(1):
            while server.server.connection_count:
                await trio.lowlevel.checkpoint()


async def test_a_fault_of_the_handler_is_reported_and_answered_with_500(start_plain):
    async def broken(request: Request) -> Response:
        raise KeyError("a bug")

    async with start_plain(broken) as server:
        received = await talk(server.port, CLOSE)
        assert received.startswith(b"HTTP/1.1 500 ")
        assert b"a bug" not in received
        assert [type(fault) for fault in server.faults] == [KeyError]


async def test_a_slow_reader_of_a_large_answer_gets_every_byte(start):
    body = bytes(range(256)) * 40_000

    async def large(exchange: Exchange) -> None:
        exchange.request_id = "req-1"
        await exchange.respond(200, b"content-type: application/octet-stream\r\n", body)

    async with start(large) as server:
        stream = await trio.open_tcp_stream("127.0.0.1", server.port)
        await stream.send_all(CLOSE)
        received = bytearray()
        while chunk := await stream.receive_some(70_000):
            received += chunk
            await trio.lowlevel.checkpoint()
    assert received.endswith(body)


async def test_http_9_head_has_the_length_of_get_and_no_body(start_plain):
    async with start_plain(echo) as server:
        received = await talk(server.port, b"HEAD /a HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
    assert b"content-length: 9\r\n" in received.lower()
    assert received.endswith(b"\r\n\r\n")
