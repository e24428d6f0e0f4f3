"""What the worker receives (contract section 5)."""

from __future__ import annotations

import json

import pytest

from tests.e2e.fake_worker import (
    JSON,
    answers,
    closes,
    fake_worker,
    head,
    resets,
    says,
)
from tests.e2e.gateway import CHAT, HELLO, request, running_gateway

ODD = b'{ "model" :"m","messages":[{"role":"user","content":"\\u00e9\\ud83d\\ude00 \xc3\xa4"}],\n"z":1.0e0,"z":1E+2,"a":-0,"n":1,"unknown":{"deep":[[[[{}]]]]}, "big":123456789012345678901234567890}\n'


async def test_up_1_the_body_reaches_the_worker_byte_for_byte():
    async with fake_worker("m") as worker, running_gateway(workers=[worker]) as gateway:
        assert (await gateway.ask(CHAT, body=ODD)).status == 200
        turn = await worker.next_turn()
        assert turn.body == ODD
        assert turn.header("content-length") == str(len(ODD)).encode()


@pytest.mark.parametrize("size", [10_000, 70_000, 3_000_000])
async def test_up_1_a_large_body_reaches_the_worker_byte_for_byte(size):
    body = json.dumps({**HELLO, "pad": "ä" * size}, ensure_ascii=False).encode()
    async with fake_worker("m") as worker, running_gateway(workers=[worker]) as gateway:
        client = await gateway.connect()
        await client.send(request(CHAT, body=body))
        assert (await client.read()).status == 200
        assert (await worker.next_turn()).body == body
        data = request(CHAT, body=body)
        await client.send(*(data[at : at + 9973] for at in range(0, len(data), 9973)))
        assert (await client.read()).status == 200
        assert (await worker.next_turn()).body == body


async def test_up_1_bodies_of_changing_length_on_one_connection_stay_apart():
    """The head repeats but for its length, which is what the reader remembers heads for."""
    async with fake_worker("m") as worker, running_gateway(workers=[worker]) as gateway:
        client = await gateway.connect()
        bodies = [json.dumps({**HELLO, "pad": "x" * n}).encode() for n in (1, 50, 1000, 2, 100_000, 3, 9, 10)]
        for body in bodies:
            worker.plays.append(answers(200, {"n": len(body)}))
            await client.send(request(CHAT, body=body))
            assert (await client.read()).document == {"n": len(body)}
        await client.send(b"".join(request(CHAT, body=body) for body in bodies))
        for _ in bodies:
            assert (await client.read()).status == 200
        assert [turn.body for turn in worker.turns] == bodies * 2
        assert [int(turn.header("content-length")) for turn in worker.turns] == [*map(len, bodies)] * 2


async def test_up_2_an_alias_is_the_only_thing_that_changes():
    async with (
        fake_worker("m") as worker,
        running_gateway("--model-alias", "nick=m", workers=[worker]) as gateway,
    ):
        body = ODD.replace(b'"model" :"m"', b'"model" : "n\\u0069ck"')
        assert (await gateway.ask(CHAT, body=body)).status == 200
        assert (await worker.next_turn()).body == ODD.replace(b'"model" :"m"', b'"model" : "m"')


@pytest.mark.parametrize(
    ("path", "sent"),
    [
        (CHAT, CHAT),
        ("/v1/completions", "/v1/completions"),
        ("/generate", "/generate"),
        ("/v1/embeddings?a=b&a=c", "/v1/embeddings?a=b&a=c"),
        ("/rerank?x", "/v1/rerank?x"),
        ("/v1/rerank", "/v1/rerank"),
        ("/v1/classify", "/v1/classify"),
        ("/v1/messages?beta=true", "/v1/messages?beta=true"),
        ("/v1/messages/count_tokens", "/v1/messages/count_tokens"),
        ("/v1/responses", "/v1/responses"),
    ],
)
async def test_up_3_path_and_query_are_the_clients(path, sent):
    document = {
        "model": "m",
        "messages": [{}],
        "prompt": "a",
        "input": "a",
        "text": "a",
        "query": "a",
        "documents": ["a"],
        "max_tokens": 1,
    }
    async with fake_worker("m") as worker, running_gateway(workers=[worker]) as gateway:
        assert (await gateway.ask(path, document)).status == 200
        assert (await worker.next_turn()).target.decode() == sent


RELAYED = [
    "accept: text/event-stream, */*",
    "accept-encoding: gzip, br",
    "authorization: Bearer client-key",
    "x-correlation-id: corr",
    "x-request-id-tenant: t",
    "traceparent: 00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01",
    "tracestate: a=b",
    "x-smg-routing-key: key",
    "openai-organization: org",
    "OpenAI-Beta: x=y",
    "anthropic-version: 2023-06-01",
    "anthropic-beta: b1",
    "anthropic-beta: b2",
]
DROPPED = [
    "cookie: a=b",
    "user-agent: u",
    "x-forwarded-for: 1.2.3.4",
    "x-forwarded-proto: https",
    "forwarded: for=1.2.3.4",
    "x-real-ip: 1.2.3.4",
    "te: trailers",
    "trailer: x",
    "keep-alive: timeout=5",
    "proxy-authorization: Basic eDp5",
    "proxy-connection: keep-alive",
    "upgrade-insecure-requests: 1",
    "x-smg-tenant-id: t",
    "x-smg-priority: system",
    "x-smg-target-worker:",
    "origin: http://o",
    "referer: http://r",
    "x-custom: 1",
    "accept-language: en",
    "if-none-match: x",
    "range: bytes=0-1",
]


async def test_up_4_up_5_only_the_headers_of_the_list_reach_the_worker():
    async with fake_worker("m") as worker, running_gateway(workers=[worker]) as gateway:
        answer = await gateway.ask(CHAT, HELLO, *RELAYED, *DROPPED, "connection: keep-alive, x-custom")
        assert answer.status == 200, answer
        turn = await worker.next_turn()
        lines = [(name.lower(), value) for name, value in turn.lines]
        wanted = [tuple(line.lower().encode().split(b": ", 1)) for line in RELAYED]
        framing = {b"host", b"content-length", b"content-type", b"x-request-id"}
        assert [(n, v.lower()) for n, v in lines if n not in framing] == wanted
        assert turn.header("host") == f"127.0.0.1:{worker.port}".encode()
        assert turn.header("content-type") == b"application/json"
        assert turn.version == b"HTTP/1.1"


async def test_up_4_content_type_is_sent_as_the_client_wrote_it():
    async with fake_worker("m") as worker, running_gateway(workers=[worker]) as gateway:
        await gateway.ask(CHAT, HELLO, type="Application/JSON; charset=UTF-8")
        assert (await worker.next_turn()).header("content-type") == b"Application/JSON; charset=UTF-8"


async def test_up_6_a_worker_with_a_key_gets_it_as_the_only_authorization_everywhere():
    flags = "--worker-api-key", "worker-key", "--api-key", "gate-key", "--load-monitor-interval", "0.05"
    async with fake_worker("m") as worker, running_gateway(*flags, workers=[worker]) as gateway:
        auth = "authorization: Bearer gate-key"
        assert (await gateway.ask(CHAT, HELLO, auth, "x-api-key: gate-key")).status == 200
        assert (await gateway.ask(CHAT, HELLO, "x-api-key: gate-key")).status == 200
        for path in ("/get_server_info", "/engine_metrics", "/get_loads"):
            await gateway.ask(path, None, auth)
        await gateway.ask("/flush_cache", None, auth, method="POST")
        for turn in [*worker.turns, *worker.asked]:
            assert turn.header("authorization") == b"Bearer worker-key", turn.target
            assert turn.header("x-api-key") is None
            assert b"gate-key" not in turn.raw
        assert len(worker.turns) >= 3 and len(worker.asked) >= 4


async def test_up_7_the_generated_id_of_the_answer_is_sent_to_the_worker():
    async with fake_worker("m") as worker, running_gateway(workers=[worker]) as gateway:
        client = await gateway.connect()
        seen = [(await client.ask(CHAT, HELLO))["x-request-id"] for _ in range(4)]
        assert [turn.header("x-request-id").decode() for turn in worker.turns] == seen
        assert len(set(seen)) == 4


MULTIPART = (
    b'--bound\r\ncontent-disposition: form-data; name="model"\r\n\r\n%s\r\n'
    b'--bound\r\nContent-Disposition: form-data; name="file"; filename="a.wav"\r\ncontent-type: audio/wav\r\n\r\n'
    + bytes(range(256)) * 10
    + b"\r\n--bound--\r\n"
)


@pytest.mark.parametrize(("asked", "got"), [(b"m", b"m"), (b"nick", b"m")])
async def test_up_8_a_multipart_body_is_relayed_and_only_an_alias_changes_it(asked, got):
    async with (
        fake_worker("m") as worker,
        running_gateway("--model-alias", "nick=m", workers=[worker]) as gateway,
    ):
        body = MULTIPART.replace(b"%s", asked)
        answer = await gateway.ask(
            "/v1/audio/transcriptions", body=body, type="multipart/form-data; boundary=bound"
        )
        assert answer.status == 200
        turn = await worker.next_turn()
        assert turn.body == MULTIPART.replace(b"%s", got)
        assert turn.header("content-type") == b"multipart/form-data; boundary=bound"


async def test_an_early_answer_of_a_worker_that_reads_no_body_is_relayed():
    body = json.dumps({**HELLO, "pad": "x" * 8_000_000}).encode()
    async with fake_worker("m") as worker, running_gateway("--disable-retries", workers=[worker]) as gateway:

        async def early(turn):
            await turn.send(head(413, f"content-type: {JSON}", "connection: close", length=2) + b"{}")
            await turn.close()

        worker.on_head = early
        answer = await gateway.ask(CHAT, body=body)
        assert (answer.status, answer.body) == (413, b"{}")


async def test_a_kept_connection_that_the_worker_has_closed_is_replaced_silently():
    async with fake_worker("m") as worker, running_gateway("--disable-retries", workers=[worker]) as gateway:
        client = await gateway.connect()
        worker.play = says(head(200, f"content-type: {JSON}", length=2) + b"{}", close=True)
        for _ in range(20):
            assert (await client.ask(CHAT, HELLO)).status == 200
        assert gateway.metric("smg_worker_errors_total") == 0


@pytest.mark.parametrize("play", [closes, resets])
@pytest.mark.parametrize(
    ("path", "flags", "sends"),
    [
        (CHAT, ["--disable-retries"], 1),
        (CHAT, ["--retry-max-retries", "3", "--retry-initial-backoff-ms", "1"], 3),
        ("/v1/audio/transcriptions", ["--retry-max-retries", "3"], 1),
    ],
)
async def test_rty_1_rty_2_a_request_that_was_read_on_a_kept_connection_is_not_sent_beyond_the_count(
    play, path, flags, sends
):
    async with fake_worker("m") as worker, running_gateway(*flags, workers=[worker]) as gateway:
        client = await gateway.connect()
        assert (await client.ask(CHAT, HELLO)).status == 200  # leaves a kept connection behind
        worker.play = play
        if path == CHAT:
            answer = await client.ask(CHAT, HELLO)
        else:
            body = MULTIPART.replace(b"%s", b"m")
            answer = await client.ask(path, body=body, type="multipart/form-data; boundary=bound")
        assert answer.is_error(502, "call_upstream_response_failed")
        assert len(worker.turns) == 1 + sends
        assert gateway.metric("smg_worker_errors_total") == sends


@pytest.mark.parametrize("size", [10, 100_000])
async def test_a_kept_connection_that_ends_as_it_is_written_on_is_replaced_silently(size):
    """The worker's close and the next request cross: nobody has read it, so it is no failure of anybody."""
    async with fake_worker("m") as worker, running_gateway("--disable-retries", workers=[worker]) as gateway:
        client = await gateway.connect()
        document = {**HELLO, "pad": "x" * size}

        async def closes_afterwards(turn):
            await answers(200)(turn)
            await turn.close()

        worker.play = closes_afterwards
        for _ in range(60):
            # Both in one turn of the loop: whether the gateway sees the end first is chance.
            await client.send(request(CHAT, document))
            assert (await client.read()).status == 200
        assert gateway.metric("smg_worker_errors_total") == 0
