"""What the client gets of a worker's answer (contract section 6), and what it never gets."""

from __future__ import annotations

import pytest
import trio

from tests.e2e.fake_worker import (
    CHUNKED,
    END,
    JSON,
    answers,
    breaks,
    chunk,
    closes,
    fake_worker,
    fake_workers,
    head,
    resets,
    says,
)
from tests.e2e.gateway import CHAT, HELLO, eventually, request, running_gateway


@pytest.mark.parametrize(
    "status",
    [200, 201, 202, 206, 299, 302, 400, 401, 402, 404, 409, 418, 422, 429, 451, 500, 501, 503, 529, 599, 799],
)
@pytest.mark.parametrize("path", [CHAT, "/v1/messages"])
async def test_dn_1_status_and_body_of_the_worker_are_relayed_unchanged(status, path):
    body = b'{"error" : {"odd":"\xff\x00"}}'
    async with fake_worker("m") as worker, running_gateway("--disable-retries", workers=[worker]) as gateway:
        worker.plays.append(answers(status, None, body=body))
        answer = await gateway.ask(path, {**HELLO, "max_tokens": 1})
        assert (answer.status, answer.body, answer.code) == (status, body, None)
        assert answer.worker == worker.id


async def test_dn_2_headers_are_relayed_but_for_hop_by_hop_ones():
    kept = [
        "content-type: application/json",
        "set-cookie: a=1",
        "set-cookie: b=2",
        "x-a: 1",
        "x-a: 2",
        "server: engine",
        "content-encoding: gzip",
        "openai-processing-ms: 5",
        "x-smg-error-code: theirs",
        "retry-after: 7",
        "vary: origin",
    ]
    dropped = [
        "connection: keep-alive, X-Hop",
        "x-hop: 1",
        "keep-alive: timeout=5",
        "proxy-authenticate: Basic",
        "te: trailers",
        "trailer: x",
        "upgrade: h2c",
        "x-request-id: theirs",
    ]
    async with fake_worker("m") as worker, running_gateway(workers=[worker]) as gateway:
        for framing, body in (
            (["content-length: 3"], b"\x1f\x8b\x00"),
            ([CHUNKED], chunk(b"\x1f\x8b\x00") + END),
        ):
            worker.plays.append(says(head(200, *kept[:5], *dropped, *kept[5:], *framing) + body))
            answer = await gateway.ask(CHAT, HELLO, "x-request-id: ours")
            own = {"x-smg-worker-id", "x-request-id", "date", "content-length", "transfer-encoding"}
            assert [f"{n}: {v}" for n, v in answer.lines if n not in own] == kept
            assert answer["x-request-id"] == "ours" and answer.body == b"\x1f\x8b\x00"


async def test_http_17_a_date_of_the_worker_does_not_make_two():
    async with fake_worker("m") as worker, running_gateway(workers=[worker]) as gateway:
        for framing, body in ((["content-length: 2"], b"{}"), ([CHUNKED], chunk(b"{}") + END)):
            worker.plays.append(
                says(
                    head(200, f"content-type: {JSON}", "date: Mon, 01 Jan 2001 00:00:00 GMT", *framing) + body
                )
            )
            assert len((await gateway.ask(CHAT, HELLO)).all("date")) == 1


async def test_dn_2_trailers_of_a_worker_never_become_headers():
    async with fake_worker("m") as worker, running_gateway(workers=[worker]) as gateway:
        worker.plays.append(
            says(
                head(200, f"content-type: {JSON}", CHUNKED)
                + chunk(b"{}")
                + b"0\r\nset-cookie: evil=1\r\nx-t: 1\r\n\r\n"
            )
        )
        client = await gateway.connect()
        answer = await client.ask(CHAT, HELLO)
        assert answer.body == b"{}"
        assert answer.all("set-cookie") == answer.all("x-t") == []
        for _ in range(3):
            answer = await client.ask(CHAT, HELLO)
            assert answer.status == 200 and answer.all("set-cookie") == answer.all("x-t") == []


async def test_dn_3_the_worker_id_is_that_of_the_worker_list_and_no_address_is_shown():
    async with (
        fake_workers(2, "m") as workers,
        running_gateway("--policy", "round_robin", workers=workers) as gateway,
    ):
        listed = {row["id"] for row in (await gateway.ask("/workers")).document["workers"]}
        seen = set()
        for _ in range(4):
            answer = await gateway.ask(CHAT, HELLO)
            assert all(str(worker.port) not in value for worker in workers for _, value in answer.lines)
            seen.add(answer.worker)
        assert seen == listed == {worker.id for worker in workers}


async def test_dn_3_workers_that_share_a_connection_keep_their_own_ids():
    """Two workers behind one address share its connections; what is remembered of a connection must not mix them."""
    async with fake_worker("m") as fake, running_gateway() as gateway:
        fake.on_path |= {"/a/health": answers(200), "/b/health": answers(200)}
        ids = {}
        for path in ("a", "b"):
            added = await gateway.ask("/workers", {"url": f"{fake.url}/{path}", "model_id": "m"})
            ids[path] = added.document["worker_id"]
        await eventually(lambda: gateway.ready_count == 2)
        client = await gateway.connect()
        for path in "aabbabab":
            answer = await client.ask(CHAT, HELLO, f"x-smg-target-worker: {ids[path]}")
            assert answer.worker == ids[path]
            assert (await fake.next_turn()).target.decode() == f"/{path}{CHAT}"


async def test_dn_3_errors_show_no_address():
    async with (
        fake_worker("m") as worker,
        running_gateway(
            "--retry-initial-backoff-ms", "1", "--disable-circuit-breaker", workers=[worker]
        ) as gateway,
    ):
        for play in (resets, closes, says(b"garbage\r\n\r\n")):
            worker.play = play
            answer = await gateway.ask(CHAT, HELLO)
            assert answer.is_error(502, "call_upstream_response_failed")
            assert str(worker.port).encode() not in answer.body
        worker.kill()
        answer = await gateway.ask(CHAT, HELLO)
        assert answer.status in (502, 503)
        assert str(worker.port).encode() not in answer.body


async def test_dn_4_a_known_length_stays_a_length_and_an_unknown_one_chunked():
    async with fake_worker("m") as worker, running_gateway(workers=[worker]) as gateway:
        big = b"y" * 300_000
        for body in (b"{}", big, b""):
            worker.plays.append(answers(200, body=body))
            answer = await gateway.ask(CHAT, HELLO)
            assert (answer.framing, answer.body) == ("length", body)
            worker.plays.append(
                says(head(200, f"content-type: {JSON}", CHUNKED), *([chunk(body)] if body else []), END)
            )
            answer = await gateway.ask(CHAT, HELLO)
            assert (answer.framing, answer.body) == ("chunked", body)
            worker.plays.append(says(head(200, f"content-type: {JSON}"), body, close=True))
            answer = await gateway.ask(CHAT, HELLO)
            assert (answer.framing, answer.body) == ("chunked", body)
            worker.plays.append(says(head("HTTP/1.0 200 OK", f"content-type: {JSON}"), body, close=True))
            answer = await gateway.ask(CHAT, HELLO)
            assert (answer.framing, answer.body) == ("chunked", body)


async def test_dn_4_a_held_error_answer_keeps_its_framing():
    async with (
        fake_worker("m") as worker,
        running_gateway(
            "--retry-max-retries", "2", "--retry-initial-backoff-ms", "1", workers=[worker]
        ) as gateway,
    ):
        worker.play = says(head(500, f"content-type: {JSON}", CHUNKED) + chunk(b'{"e":1}') + END)
        answer = await gateway.ask(CHAT, HELLO)
        assert (answer.status, answer.framing, answer.body) == (500, "chunked", b'{"e":1}')
        assert len(worker.turns) == 2
        worker.play = answers(500, {"e": 1})
        assert (await gateway.ask(CHAT, HELLO)).framing == "length"


@pytest.mark.parametrize("reset", [False, True])
@pytest.mark.parametrize("framing", ["content-length: 100", CHUNKED])
async def test_dn_5_a_short_body_that_breaks_off_is_502_and_nothing_of_it_is_sent(framing, reset):
    async with fake_worker("m") as worker, running_gateway("--disable-retries", workers=[worker]) as gateway:
        worker.plays.append(
            breaks(
                head(200, f"content-type: {JSON}", framing),
                chunk(b'{"a":') if framing == CHUNKED else b'{"a":',
                reset=reset,
            )
        )
        answer = await gateway.ask(CHAT, HELLO)
        assert answer.is_error(502, "call_upstream_response_failed")


async def test_dn_5_a_short_body_that_breaks_off_is_retried():
    async with (
        fake_workers(2, "m") as workers,
        running_gateway("--policy", "passthrough", workers=workers) as gateway,
    ):
        workers[0].plays.append(breaks(head(200, f"content-type: {JSON}", "content-length: 100"), b'{"a":'))
        answer = await gateway.ask(CHAT, HELLO)
        assert answer.status == 200 and answer.worker == workers[1].id


@pytest.mark.parametrize("framing", ["content-length: 1000000", CHUNKED])
async def test_dn_5_a_long_body_that_breaks_off_cuts_the_client(framing):
    piece = b"w" * 300_000
    async with fake_worker("m") as worker, running_gateway("--disable-retries", workers=[worker]) as gateway:
        worker.plays.append(
            breaks(head(200, f"content-type: {JSON}", framing), chunk(piece) if framing == CHUNKED else piece)
        )
        client = await gateway.connect()
        await client.send(request(CHAT, HELLO) + request(CHAT, HELLO))
        answer = await client.read(may_cut=True)
        assert answer.is_cut and piece.startswith(answer.body)
        assert gateway.worker(worker).breaker.consecutive_failures == 1
        assert len(worker.turns) == 1


@pytest.mark.parametrize(
    ("status", "lines"),
    [(204, []), (204, ["content-length: 0"]), (304, []), (304, ["content-length: 5"]), (304, ["etag: x"])],
)
async def test_dn_6_answers_without_body_keep_having_none(status, lines):
    async with fake_worker("m") as worker, running_gateway(workers=[worker]) as gateway:
        client = await gateway.connect()
        for _ in range(3):
            worker.plays.append(says(head(status, *lines)))
            answer = await client.ask(CHAT, HELLO)
            assert (answer.status, answer.body) == (status, b"")
            assert (await client.ask(CHAT, HELLO)).status == 200


@pytest.mark.parametrize(
    "interim",
    [b"HTTP/1.1 100 Continue\r\n\r\n", b"HTTP/1.1 103 Early Hints\r\nlink: </x>\r\nset-cookie: a=b\r\n\r\n"],
)
async def test_interim_answers_of_a_worker_are_not_the_answer(interim):
    async with fake_worker("m") as worker, running_gateway(workers=[worker]) as gateway:
        client = await gateway.connect()
        for pieces in (
            [interim * 3 + head(200, f"content-type: {JSON}", length=2) + b"{}"],
            [interim, interim, head(200, f"content-type: {JSON}", length=2) + b"{}"],
        ):
            worker.plays.append(says(*pieces))
            answer = await client.ask(CHAT, HELLO)
            assert answer.status == 200 and answer.body == b"{}"
            assert answer.all("link") == answer.all("set-cookie") == []


async def test_a_second_answer_of_a_worker_reaches_nobody():
    """One request, two answers at once: the second is dropped with its connection, whatever it holds."""
    second = head(200, "set-cookie: evil=1", length=6) + b"POISON"
    async with fake_worker("m") as worker, running_gateway(workers=[worker]) as gateway:
        client = await gateway.connect()
        for first in (
            head(200, f"content-type: {JSON}", length=2) + b"{}",
            head(200, f"content-type: {JSON}", CHUNKED) + chunk(b"{}") + END,
        ):
            for extra in (second, second[:20], b"garbage", b"\r\n" + second):
                worker.plays.append(says(first + extra))
                answer = await client.ask(CHAT, HELLO)
                assert answer.body == b"{}" and answer.all("set-cookie") == [], extra
                assert client.rest == b""
                assert (await client.ask(CHAT, HELLO)).document["worker"] == "a"


async def test_a_second_answer_that_comes_later_reaches_nobody():
    async with fake_worker("m") as worker, running_gateway(workers=[worker]) as gateway:
        client = await gateway.connect()
        late = trio.Event()

        async def twice(turn):
            one = head(200, f"content-type: {JSON}", length=2) + b"{}"
            await turn.send(one)
            await late.wait()
            await turn.send(one.replace(b"{}", b"[]"))
            await turn.wait_gone()

        worker.plays.append(twice)
        assert (await client.ask(CHAT, HELLO)).body == b"{}"
        late.set()
        turn = await worker.next_turn()
        with trio.fail_after(5):
            await turn.gone.wait()  # swept when it spoke without being asked
        assert (await client.ask(CHAT, HELLO)).document["worker"] == "a"


@pytest.mark.parametrize(
    "bad",
    [
        b"garbage\r\n\r\n",
        b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\ncontent-length: 6\r\n\r\nabcdef",
        b"HTTP/1.1 200 OK\r\ncontent-length: x\r\n\r\n",
        b"HTTP/1.1 200 OK\r\ncontent-length: 99999999999999999999\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nx: a\x00b\r\ncontent-length: 0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nx : b\r\ncontent-length: 0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\nxyz\r\n",
        b"HTTP/1.1 101 Switching\r\nupgrade: x\r\nconnection: upgrade\r\n\r\n",
        b"HTTP/2 200\r\n\r\n",
        b"HTTP/1.1 20 OK\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nx: " + b"y" * 300_000,
        b"\x15\x03\x01\x00\x02\x02\x16",
        b"HTTP/1.1 100 C\r\n\r\n" * 20_000,
    ],
)
async def test_err_17_a_worker_that_breaks_the_protocol_is_502(bad):
    async with fake_worker("m") as worker, running_gateway("--disable-retries", workers=[worker]) as gateway:
        worker.play = says(bad, close=True)
        client = await gateway.connect()
        answer = await client.ask(CHAT, HELLO)
        assert answer.is_error(502, "call_upstream_response_failed")
        worker.play = answers(200)
        assert (await client.ask(CHAT, HELLO)).status == 200


async def test_answers_of_changing_length_on_one_connection_stay_apart():
    """Heads that repeat are remembered on the worker's side too."""
    async with fake_worker("m") as worker, running_gateway(workers=[worker]) as gateway:
        client = await gateway.connect()
        for size in (0, 5, 50, 5, 500_000, 7, 0, 70_000, 1):
            for pieces in (1, 2):
                body = b"b" * size
                data = head(200, f"content-type: {JSON}", length=size) + body
                worker.plays.append(says(data) if pieces == 1 else says(data[:90], data[90:]))
                assert (await client.ask(CHAT, HELLO)).body == body
        worker.plays.append(answers(404, None, "x-other: 1", body=b"n"))
        assert (await client.ask(CHAT, HELLO))["x-other"] == "1"
        assert (await client.ask(CHAT, HELLO)).all("x-other") == []


async def test_an_answer_byte_by_byte_is_the_same_answer():
    data = head(200, f"content-type: {JSON}", "x-a: b", length=5) + b"hello"
    coded = head(200, f"content-type: {JSON}", CHUNKED) + b"2;x=y\r\nhe\r\n3\r\nllo\r\n0\r\nt: 1\r\n\r\n"
    async with fake_worker("m") as worker, running_gateway(workers=[worker]) as gateway:
        client = await gateway.connect()
        for text in (data, coded, b"HTTP/1.1 100 C\r\n\r\n" + data):
            worker.plays.append(says(*(text[at : at + 1] for at in range(len(text)))))
            assert (await client.ask(CHAT, HELLO)).body == b"hello"
