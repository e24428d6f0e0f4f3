"""HTTP on the client side (contract section 4) and request ids (section 5), through the whole gateway."""

from __future__ import annotations

import pytest
import trio

from tests.e2e.fake_worker import Gate, answers, fake_worker, hangs, says
from tests.e2e.fake_worker import head as worker_head
from tests.e2e.gateway import CHAT, HELLO, STREAM, eventually, request, running_gateway

BODY = b'{"model":"m","messages":[{"role":"user","content":"hi"}]}'
POST = b"POST /v1/chat/completions HTTP/1.1\r\nhost: g\r\ncontent-type: application/json\r\n"


async def test_http_1_a_connection_serves_request_after_request():
    async with fake_worker("m") as worker, running_gateway(workers=[worker]) as gateway:
        client = await gateway.connect()
        for _ in range(5):
            answer = await client.ask(CHAT, HELLO)
            assert answer.status == 200 and answer.get("connection") is None
        assert len({turn.stream for turn in worker.turns}) < 5  # those to the worker too


async def test_http_1_pipelined_requests_are_answered_in_order():
    async with fake_worker("m") as worker, running_gateway(workers=[worker]) as gateway:
        gate = Gate()
        worker.plays.append(gate.before(answers(200, {"n": 0})))
        worker.plays.extend(answers(200, {"n": n}) for n in range(1, 5))
        client = await gateway.connect()
        await client.send(
            b"".join(request(CHAT, HELLO) for _ in range(3)) + request("/health") + request(CHAT, HELLO)
        )
        await gate.reached.wait()
        gate.open.set()
        seen = [(await client.read()).body for _ in range(5)]
    assert seen == [b'{"n": 0}', b'{"n": 1}', b'{"n": 2}', b"OK", b'{"n": 3}']


@pytest.mark.parametrize(
    ("ask", "status"),
    [
        (request(CHAT, {"model": "m"}), 400),
        (request(CHAT, body=b"{"), 400),
        (request(CHAT, {**HELLO, "model": "none"}), 404),
        (request("/nowhere"), 404),
        (request("/nowhere", {"a": 1}), 404),
        (request(CHAT), 405),
        (request("/health", {"a": 1}), 405),
        (request(CHAT, HELLO, type="text/plain"), 400),
        (request(CHAT, HELLO, "content-encoding: gzip"), 415),
        (request("/v1/tokenize", {"a": 1}), 501),
    ],
)
async def test_http_1_an_error_answer_does_not_end_a_connection_whose_request_was_read(ask, status):
    async with fake_worker("m") as worker, running_gateway(workers=[worker]) as gateway:
        client = await gateway.connect()
        await client.send(ask)
        answer = await client.read()
        assert answer.status == status and answer.get("connection") is None
        assert await client.is_open()


async def test_http_1_an_error_of_a_worker_does_not_end_the_connection():
    async with fake_worker("m") as worker, running_gateway("--disable-retries", workers=[worker]) as gateway:
        worker.plays.append(answers(500))
        client = await gateway.connect()
        assert (await client.ask(CHAT, HELLO)).status == 500
        assert (await client.ask(CHAT, HELLO)).status == 200


async def test_http_2_a_1_0_request_is_answered_with_a_length_and_a_close():
    async with fake_worker("m") as worker, running_gateway(workers=[worker]) as gateway:
        answer = await gateway.ask(CHAT, HELLO, version="1.0")
        assert answer.framing == "length" and answer["connection"] == "close"
        client = await gateway.connect()
        kept = await client.ask(CHAT, HELLO, "connection: keep-alive", version="1.0")
        assert kept.framing == "length" and kept["connection"] == "keep-alive"
        assert await client.is_open()


async def test_http_2_a_1_0_request_gets_a_stream_and_a_body_without_length_until_close():
    async with fake_worker("m") as worker, running_gateway(workers=[worker]) as gateway:
        worker.plays.append(
            says(
                worker_head(200, "content-type: text/event-stream", "transfer-encoding: chunked"),
                b"5\r\ndata:\r\n",
                b"3\r\n 1\n\r\n1\r\n\n\r\n0\r\n\r\n",
            )
        )
        stream = await gateway.ask(CHAT, STREAM, "connection: keep-alive", version="1.0")
        worker.plays.append(
            says(
                worker_head(200, "content-type: application/json", "transfer-encoding: chunked"),
                b"2\r\n{}\r\n0\r\n\r\n",
            )
        )
        plain = await gateway.ask(CHAT, HELLO, "connection: keep-alive", version="1.0")
    assert (stream.framing, stream.body) == ("close", b"data: 1\n\n")
    assert (plain.framing, plain.body) == ("close", b"{}")


@pytest.mark.parametrize("cut", [1, 3, 7, 1000])
async def test_http_3_a_chunked_request_reaches_the_worker_with_a_length(cut):
    coded = b"".join(
        b"%X;ext=1\r\n%b\r\n" % (len(BODY[at : at + 10]), BODY[at : at + 10])
        for at in range(0, len(BODY), 10)
    )
    data = POST + b"transfer-encoding: chunked\r\n\r\n" + coded + b"0\r\nx-trailer: 1\r\n\r\n"
    async with fake_worker("m") as worker, running_gateway(workers=[worker]) as gateway:
        client = await gateway.connect()
        await client.send(*(data[at : at + cut] for at in range(0, len(data), cut)))
        assert (await client.read()).status == 200
        assert worker.turns[0].body == BODY
        assert "x-trailer" not in worker.turns[0].names
        assert await client.is_open()


async def test_http_4_continue_comes_before_the_body_is_sent():
    async with fake_worker("m") as worker, running_gateway(workers=[worker]) as gateway:
        client = await gateway.connect()
        for framing in (b"content-length: %d\r\n" % len(BODY), b"transfer-encoding: chunked\r\n"):
            await client.send(POST + framing + b"expect: 100-continue\r\n\r\n")
            while b"\r\n\r\n" not in client.rest:
                await client.more()
            assert client.rest == b"HTTP/1.1 100 Continue\r\n\r\n"
            client.rest = b""
            assert not client.rest and len(worker.turns) < 2
            await client.send(
                BODY if framing.startswith(b"content") else b"%x\r\n%b\r\n0\r\n\r\n" % (len(BODY), BODY)
            )
            assert (await client.read()).status == 200
        assert all("expect" not in turn.names for turn in worker.turns)


@pytest.mark.parametrize(
    ("start", "flags", "status"),
    [
        (b"POST /v1/chat/completions", ["--max-payload-size", "1000"], 413),
        (b"POST /v1/chat/completions", ["--api-key", "secret"], 401),
        (b"POST /nowhere", [], 404),
        (b"PUT /v1/chat/completions", [], 405),
    ],
)
async def test_http_4_the_head_alone_may_decide_the_answer(start, flags, status):
    async with fake_worker("m") as worker, running_gateway(*flags, workers=[worker]) as gateway:
        client = await gateway.connect()
        await client.send(
            start
            + b" HTTP/1.1\r\nhost: g\r\ncontent-type: application/json\r\ncontent-length: 2000\r\nexpect: 100-continue\r\n\r\n"
        )
        answer = await client.read()  # no 100 before it
        assert answer.status == status and answer["connection"] == "close"


@pytest.mark.parametrize(
    "bad",
    [
        POST + b"content-length: 3\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n",
        POST + b"content-length: 57\r\ncontent-length: 58\r\n\r\n" + BODY,
        POST + b"transfer-encoding: chunked, chunked\r\n\r\n0\r\n\r\n",
        POST + b"transfer-encoding: chunked\r\n\r\nzz\r\n" + BODY,
        POST + b"transfer-encoding: chunked\r\n\r\n3\r\n{}xyz0\r\n\r\n",
        POST + b"x : y\r\ncontent-length: 57\r\n\r\n" + BODY,
        POST + b"x: y\r\n z\r\ncontent-length: 57\r\n\r\n" + BODY,
        POST + b"x: \x00\r\ncontent-length: 57\r\n\r\n" + BODY,
        POST + b"x: a\nb: c\r\ncontent-length: 57\r\n\r\n" + BODY,
        POST.replace(b"host: g\r\n", b"") + b"content-length: 57\r\n\r\n" + BODY,
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(100),
        b"BREW " + POST[5:] + b"content-length: 57\r\n\r\n" + BODY,
    ],
)
async def test_http_5_ambiguous_requests_are_400_and_close_and_reach_no_worker(bad):
    async with fake_worker("m") as worker, running_gateway(workers=[worker]) as gateway:
        client = await gateway.connect()
        await client.send(bad + request(CHAT, HELLO))
        answer = await client.read()
        assert answer.is_error(400, "bad_request") and answer["connection"] == "close"
        assert await client.until_closed() == b""
        assert worker.turns == []


async def test_http_5_what_came_before_an_ambiguous_request_is_still_answered():
    async with fake_worker("m") as worker, running_gateway(workers=[worker]) as gateway:
        client = await gateway.connect()
        await client.send(
            request(CHAT, HELLO) + POST + b"content-length: 1, 2\r\n\r\n" + request(CHAT, HELLO)
        )
        assert (await client.read()).status == 200
        assert (await client.read()).status == 400
        assert await client.until_closed() == b""
        assert len(worker.turns) == 1


async def test_http_6_a_head_of_64_kib_with_96_lines_is_served():
    lines = [f"x-{n}: {'v' * 660}" for n in range(90)]
    async with fake_worker("m") as worker, running_gateway(workers=[worker]) as gateway:
        data = request(CHAT, HELLO, *lines)
        assert len(data) > 60_000
        client = await gateway.connect()
        await client.send(data)
        assert (await client.read()).status == 200
        await client.send(*(data[at : at + 1000] for at in range(0, len(data), 1000)))
        assert (await client.read()).status == 200


@pytest.mark.parametrize(
    ("data", "status"),
    [
        (b"GET /health HTTP/1.1\r\nhost: g\r\n" + b"x: y\r\n" * 300 + b"\r\n", 431),
        (b"GET /health HTTP/1.1\r\nhost: g\r\nx: " + b"y" * (5 << 20) + b"\r\n\r\n", 431),
        (b"GET /" + b"a" * 70_000 + b" HTTP/1.1\r\nhost: g\r\n\r\n", 414),
        (b"GET /" + b"a" * (5 << 20), 414),
    ],
)
async def test_http_6_heads_beyond_the_limits_are_refused_readably_and_close(data, status):
    async with running_gateway() as gateway:
        client = await gateway.connect()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(send_unless_broken, client, data)
            answer = await client.read()
            assert answer.status == status and answer["connection"] == "close"
            assert await client.until_closed() == b""


async def send_unless_broken(client, data):
    try:
        await client.send(data)
    except trio.BrokenResourceError:
        pass


@pytest.mark.parametrize("start", [b"", b"G", b"GET /health HTTP/1.1\r\nhost: g\r\n"])
async def test_http_7_a_head_that_does_not_come_in_time_ends_the_connection(start):
    async with running_gateway("--header-read-timeout-secs", "0.2") as gateway:
        client = await gateway.connect()
        await client.send(start)
        data = await client.until_closed()
        assert data == b"" or data.startswith(b"HTTP/1.1 408 ")


async def test_http_7_a_head_that_drips_has_no_more_time_than_one_that_stands_still():
    async with running_gateway(
        "--header-read-timeout-secs", "0.3", "--idle-connection-timeout-secs", "60"
    ) as gateway:
        client = await gateway.connect()
        assert await client.is_open()
        ended = trio.Event()
        async with trio.open_nursery() as nursery:

            async def drip():
                with trio.CancelScope() as scope:
                    nursery.start_soon(cancel_when, ended, scope)
                    while True:
                        await send_unless_broken(client, b"x")
                        await trio.sleep(0.02)

            nursery.start_soon(drip)
            with trio.fail_after(2):
                data = await client.until_closed()
            ended.set()
        assert data == b"" or data.startswith(b"HTTP/1.1 408 ")


async def cancel_when(event, scope):
    await event.wait()
    scope.cancel()


async def test_http_7_an_idle_kept_connection_closes_without_a_word():
    async with running_gateway("--idle-connection-timeout-secs", "0.2") as gateway:
        client = await gateway.connect()
        assert await client.is_open()
        assert await client.until_closed() == b""


async def test_http_8_a_declared_body_above_the_limit_is_refused_before_it_is_read():
    async with (
        fake_worker("m") as worker,
        running_gateway("--max-payload-size", "1000", workers=[worker]) as gateway,
    ):
        client = await gateway.connect()
        await client.send(POST + b"content-length: 1001\r\n\r\n")
        answer = await client.read()
        assert answer.is_error(413, "request_body_too_large") and answer["connection"] == "close"
        exact = await gateway.ask(CHAT, body=b" " * (1000 - len(BODY)) + BODY)
        assert exact.status == 200
        together = await gateway.ask(CHAT, body=b" " * (1001 - len(BODY)) + BODY)
        assert together.is_error(413, "request_body_too_large")
        assert len(worker.turns) == 1


@pytest.mark.parametrize("size", [900_000, 30_000_000])
@pytest.mark.parametrize("framing", ["length", "chunked"])
async def test_http_8_a_client_that_sends_its_large_body_all_the_same_can_read_the_answer(framing, size):
    async with (
        fake_worker("m") as worker,
        running_gateway("--max-payload-size", "1000", workers=[worker]) as gateway,
    ):
        client = await gateway.connect()
        body = b"x" * size
        if framing == "length":
            data = POST + b"content-length: %d\r\n\r\n" % size + body
        else:
            data = POST + b"transfer-encoding: chunked\r\n\r\n%x\r\n" % size + body
        async with trio.open_nursery() as nursery:
            nursery.start_soon(send_unless_broken, client, data)
            assert (await client.read()).status == 413
            await client.until_closed()
        assert worker.turns == []


@pytest.mark.parametrize(
    "path",
    [
        "/health",
        "/liveness",
        "/readiness",
        "/v1/models",
        "/v1/models/m",
        "/workers",
        "/get_loads",
        "/nowhere",
    ],
)
async def test_http_9_head_has_status_and_headers_of_get_and_no_body(path):
    async with fake_worker("m") as worker, running_gateway(workers=[worker]) as gateway:
        await eventually(lambda: gateway.worker(worker).engine is not None)  # `/workers` shows it
        client = await gateway.connect()
        shown = await client.ask(path)
        head = await client.ask(path, method="HEAD")
        assert head.status == shown.status and head.body == b""
        drop = {"date", "x-request-id"} | (
            {"content-length"} if path in ("/nowhere", "/get_loads") else set()
        )
        assert [line for line in head.lines if line[0] not in drop] == [
            line for line in shown.lines if line[0] not in drop
        ]
        assert await client.is_open()


async def test_http_9_options_on_known_paths_is_204_with_allow():
    async with running_gateway() as gateway:
        client = await gateway.connect()
        for path, allow in {
            CHAT: "OPTIONS, POST",
            "/health": "GET, HEAD, OPTIONS",
            "/workers": "GET, HEAD, OPTIONS, POST",
        }.items():
            answer = await client.ask(path, method="OPTIONS")
            assert (answer.status, answer["allow"]) == (204, allow)
            assert answer.get("content-type") is None
        assert (await client.ask("/nowhere", method="OPTIONS")).status == 404


async def test_http_10_unknown_paths_and_wrong_methods():
    async with running_gateway() as gateway:
        for path in (
            "/nowhere",
            "/",
            "/v1",
            "/v1/chat/completions/",
            "/workers/a/b",
            "/v1/systemone",
            "/v1/rl/x",
            "/wasm",
            "/metrics",
            "//health",
        ):
            assert (await gateway.ask(path)).is_error(404, "unknown_url"), path
        for method in ("GET", "PUT", "DELETE", "PATCH", "TRACE"):
            answer = await gateway.ask(CHAT, method=method)
            assert answer.is_error(405, "method_not_allowed")
            assert answer["allow"] == "OPTIONS, POST"


async def test_http_10_the_key_is_asked_for_before_404_and_405_on_admin_prefixes():
    async with running_gateway("--api-key", "k") as gateway:
        assert (await gateway.ask("/workers/a/b")).is_error(401, "invalid_api_key")
        assert (await gateway.ask("/workers", method="DELETE")).is_error(401, "invalid_api_key")
        assert (await gateway.ask("/workers/a/b", None, "authorization: Bearer k")).is_error(
            404, "unknown_url"
        )
        assert (await gateway.ask("/nowhere")).is_error(404, "unknown_url")


async def test_http_11_the_absolute_form_is_served_by_its_path():
    async with fake_worker("m") as worker, running_gateway(workers=[worker]) as gateway:
        assert (await gateway.ask("http://any-host/health")).body == b"OK"
        assert (await gateway.ask(f"http://any-host:80{CHAT}?a=b", HELLO)).status == 200
        assert worker.turns[0].target == b"/v1/chat/completions?a=b"


async def test_http_12_unreserved_characters_are_decoded_and_slashes_are_not():
    async with fake_worker("m") as worker, running_gateway(workers=[worker]) as gateway:
        assert (await gateway.ask("/v1/ch%61t/completion%73?q=%2F&%20=+&x", HELLO)).status == 200
        assert worker.turns[0].target == b"/v1/chat/completions?q=%2F&%20=+&x"
        for path in (
            "/v1%2Fchat/completions",
            "/v1/chat%2fcompletions",
            "/he%61lth%00",
            "/%zz",
            "/%",
            "/%FF",
            "/v1/%2e%2e/health",
        ):
            assert (await gateway.ask(path, HELLO)).status == 404, path


@pytest.mark.parametrize("query", ["", "?", "?a", "?a=%ff&b=%00", "?" + "x" * 5000, "?a=b?c=d#e"])
async def test_http_12_the_query_is_relayed_untouched(query):
    async with fake_worker("m") as worker, running_gateway(workers=[worker]) as gateway:
        assert (await gateway.ask(CHAT + query, HELLO)).status == 200
        assert worker.turns[0].target.decode() in (CHAT + query, (CHAT + query).removesuffix("?"))


async def test_http_13_a_half_closed_client_gets_the_answer_that_begins_within_a_second():
    async with fake_worker("m") as worker, running_gateway(workers=[worker]) as gateway:
        client = await gateway.connect()
        gate = Gate()
        worker.plays.append(gate.before(answers(200, {"late": True})))
        await client.send(request(CHAT, HELLO))
        await client.stream.send_eof()
        await gate.reached.wait()
        await eventually(
            lambda: any(e.parking.gone_deadline_s < float("inf") for e in gateway.server._exchanges)
        )
        gate.open.set()
        assert (await client.read()).document == {"late": True}


async def test_http_13_after_the_second_a_half_closed_client_counts_as_gone():
    async with fake_worker("m") as worker, running_gateway(workers=[worker]) as gateway:
        client = await gateway.connect()
        worker.plays.append(hangs)
        await client.send(request(CHAT, HELLO))
        await client.stream.send_eof()
        turn = await worker.next_turn()
        with trio.fail_after(1.5):
            await turn.gone.wait()
        assert await client.until_closed() == b""


async def test_http_13_a_half_closed_client_gets_a_long_plain_answer_whole():
    body = b"z" * (8 << 20)
    async with fake_worker("m") as worker, running_gateway(workers=[worker]) as gateway:
        worker.plays.append(answers(200, body=body))
        client = await gateway.connect()
        await client.send(request(CHAT, HELLO))
        await client.stream.send_eof()
        answer = await client.read()
        assert answer.body == body


async def test_http_13_a_running_stream_ends_with_the_input_of_its_client():
    async with fake_worker("m") as worker, running_gateway(workers=[worker]) as gateway:
        worker.plays.append(says_then_hangs(b"data: 1\n\n"))
        client = await gateway.connect()
        await client.send(request(CHAT, STREAM))
        await client.read_head()
        turn = await worker.next_turn()
        await client.stream.send_eof()
        with trio.fail_after(0.5):
            await turn.gone.wait()


def says_then_hangs(piece):
    async def play(turn):
        await turn.send(
            b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n",
            b"%x\r\n%b\r\n" % (len(piece), piece),
        )
        await turn.wait_gone()

    return play


@pytest.mark.parametrize("how", ["reset", "close"])
@pytest.mark.parametrize("document", [HELLO, STREAM])
async def test_http_14_a_client_that_leaves_a_silent_worker_ends_the_upstream_request(how, document):
    async with fake_worker("m") as worker, running_gateway(workers=[worker]) as gateway:
        worker.plays.append(hangs)
        client = await gateway.connect()
        await client.send(request(CHAT, document))
        turn = await worker.next_turn()
        assert gateway.worker(worker).in_flight == 1
        if how == "reset":
            client.reset()
        else:
            await client.leave()
        with trio.fail_after(1.5):
            await turn.gone.wait()
        await eventually(lambda: gateway.worker(worker).in_flight == 0)
        assert gateway.metric("smg_http_responses_total", status_code="499") == 1
        assert gateway.worker(worker).breaker.consecutive_failures == 0


async def test_http_14_a_client_that_leaves_a_running_stream_ends_the_upstream_request():
    async with fake_worker("m") as worker, running_gateway(workers=[worker]) as gateway:
        worker.plays.append(says_then_hangs(b"data: 1\n\n"))
        client = await gateway.connect()
        await client.send(request(CHAT, STREAM))
        await client.read_head()
        turn = await worker.next_turn()
        await client.leave()
        with trio.fail_after(1.5):
            await turn.gone.wait()


async def test_http_14_a_client_that_leaves_in_the_middle_of_its_body_leaves_nothing_behind():
    async with fake_worker("m") as worker, running_gateway(workers=[worker]) as gateway:
        for _ in range(20):
            client = await gateway.connect()
            await client.send(request(CHAT, HELLO)[:-5])
            await client.leave()
        await eventually(lambda: gateway.server.connection_count == 0)
        assert worker.turns == []


async def test_http_15_an_encoded_body_is_415_and_identity_is_not():
    async with fake_worker("m") as worker, running_gateway(workers=[worker]) as gateway:
        for coding in ("gzip", "br", "deflate, gzip", "x"):
            answer = await gateway.ask(CHAT, HELLO, f"content-encoding: {coding}")
            assert answer.is_error(415, "unsupported_content_encoding")
        assert worker.turns == []
        assert (await gateway.ask(CHAT, HELLO, "content-encoding: Identity")).status == 200


async def test_http_15_a_second_content_encoding_line_hides_nothing():
    async with fake_worker("m") as worker, running_gateway(workers=[worker]) as gateway:
        answer = await gateway.ask(CHAT, HELLO, "content-encoding: gzip", "content-encoding: identity")
        assert answer.status == 415


@pytest.mark.parametrize("text", ["a%0d%0ax: y", "/x%0Aset-cookie:%20a", "%00"])
async def test_http_16_text_of_the_request_never_splits_the_head(text):
    async with running_gateway() as gateway:
        for target in (f"/{text}", f"/v1/models/{text}", f"/workers/{text}", f"/workers?model={text}"):
            answer = await gateway.ask(target)
            assert answer.all("x") == answer.all("set-cookie") == []
        answer = await gateway.ask("/health", None, f"x-request-id: {text}")
        assert (
            answer["x-request-id"] == text if " " not in text else answer["x-request-id"].startswith("req-")
        )


@pytest.mark.parametrize("bad", [b"GET / HTTP/1.1\r\n\r\n", POST + b"content-length: x\r\n\r\n"])
async def test_http_5_a_refused_client_that_still_sends_is_closed_without_a_reset(bad):
    """A reset would take the answer out of the client's hands on many systems."""
    async with running_gateway() as gateway:
        client = await gateway.connect()
        await client.send(bad + b"x" * 500_000)
        assert (await client.read()).status == 400
        with trio.fail_after(5):
            while await client.more():
                pass
        assert client.has_ended
