"""Streams (contract section 7), through the whole gateway."""

from __future__ import annotations

import json
import resource
from random import Random

import pytest
import trio

from tests.e2e.fake_worker import (
    CHUNKED,
    DONE,
    END,
    JSON,
    SSE,
    SSE_HEAD,
    Gate,
    answers,
    breaks,
    chunk,
    event,
    fake_worker,
    fake_workers,
    hangs,
    head,
    says,
    streams,
)
from tests.e2e.gateway import CHAT, HELLO, STREAM, drained, eventually, request, running_gateway

MESSAGES = {"model": "m", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 9, "stream": True}
RESPONSES = {"model": "m", "input": "hi", "stream": True}
ASKED = {CHAT: STREAM, "/v1/messages": MESSAGES, "/v1/responses": RESPONSES}

OPENAI_FRAME = {
    "error": {"type": "stream_error", "code": "upstream_stream_interrupted", "param": None},
}

TEXTS = {
    "events": b'data: {"a":1}\n\ndata: {"b":2}\n\ndata: [DONE]\n\n',
    "crlf": b"data: 1\r\n\r\ndata: 2\r\n\r\n",
    "cr": b"data: 1\r\rdata: 2\r\r",
    "comments": b": hello\n\n:\n\ndata: x\n\n: bye\n\n",
    "fields": b"event: a\nid: 7\nretry: 10\ndata: one\ndata: two\ndata:\n\nevent: b\ndata: {}\n\n",
    "utf-8": "data: äöü 你好 😀\n\n".encode(),
    "not utf-8": b"data: \xff\xfe\x00\n\n",
    "no end": b"data: x",
    "blank": b"\n\n\n\n",
    "bom": b"\xef\xbb\xbfdata: x\n\n",
}


@pytest.mark.parametrize("cut", [0, 1, 2, 5])
@pytest.mark.parametrize("name", TEXTS)
async def test_str_1_every_stream_is_relayed_byte_for_byte_whatever_the_cuts(name, cut):
    text = TEXTS[name]
    pieces = [text] if not cut else [text[at : at + cut] for at in range(0, len(text), cut)]
    async with fake_worker("m") as worker, running_gateway(workers=[worker]) as gateway:
        worker.plays.append(streams(*pieces))
        answer = await gateway.ask(CHAT, STREAM)
        assert answer.body == text
        assert answer["content-type"] == "text/event-stream" and answer.framing == "chunked"
        assert answer.worker == worker.id


async def test_str_1_events_of_several_megabytes_pass():
    rng = Random(1)
    text = b"".join(b"data: " + rng.randbytes(2_500_000).hex().encode() + b"\n\n" for _ in range(3)) + DONE
    async with fake_worker("m") as worker, running_gateway(workers=[worker]) as gateway:
        worker.plays.append(streams(*(text[at : at + 100_001] for at in range(0, len(text), 100_001))))
        assert (await gateway.ask(CHAT, STREAM)).body == text


async def test_str_1_a_stream_until_close_ends_regularly():
    async with fake_worker("m") as worker, running_gateway(workers=[worker]) as gateway:
        for start in (head(200, SSE), head("HTTP/1.0 200 OK", SSE)):
            worker.plays.append(says(start, b"data: 1\n\n", b"data: 2\n\n", close=True))
            answer = await gateway.ask(CHAT, STREAM)
            assert (answer.body, answer.framing) == (b"data: 1\n\ndata: 2\n\n", "chunked")


async def test_str_2_head_and_chunks_are_passed_on_as_they_come():
    async with fake_worker("m") as worker, running_gateway(workers=[worker]) as gateway:
        steps = [trio.Event() for _ in range(6)]

        async def play(turn):
            await turn.send(SSE_HEAD)
            for number, step in enumerate(steps):
                await step.wait()
                await turn.send(chunk(b"data: %d\n\n" % number))
            await turn.send(END)

        worker.plays.append(play)
        client = await gateway.connect()
        await client.send(request(CHAT, STREAM))
        answer = await client.read_head()  # before any event
        assert answer.status == 200
        delays = []
        for number, step in enumerate(steps):
            started_s = trio.current_time()
            step.set()
            assert await client.read_chunk() == b"data: %d\n\n" % number
            delays.append(trio.current_time() - started_s)
        assert await client.read_chunk() is None
        assert min(delays) < 0.02
        assert await client.is_open()


async def test_str_2_an_event_stream_with_a_length_is_not_held_back():
    async with fake_worker("m") as worker, running_gateway(workers=[worker]) as gateway:
        gate = trio.Event()
        text = b"data: 1\n\ndata: 2\n\n"

        async def play(turn):
            await turn.send(head(200, SSE, length=len(text)) + text[:9])
            await gate.wait()
            await turn.send(text[9:])

        worker.plays.append(play)
        client = await gateway.connect()
        await client.send(request(CHAT, STREAM))
        await client.read_head()
        with trio.fail_after(2):
            while b"data: 1" not in client.rest:
                await client.more()
        gate.set()
        with trio.fail_after(2):
            while b"data: 2" not in client.rest:
                await client.more()


@pytest.mark.parametrize("status", [400, 404, 422, 500, 503])
async def test_str_3_a_stream_that_the_worker_refuses_with_json_stays_json(status):
    async with fake_worker("m") as worker, running_gateway("--disable-retries", workers=[worker]) as gateway:
        for play in (
            answers(status, {"error": "no"}),
            says(head(status, f"content-type: {JSON}", CHUNKED), chunk(b'{"error": '), chunk(b'"no"}'), END),
        ):
            worker.plays.append(play)
            answer = await gateway.ask(CHAT, STREAM)
            assert (answer.status, answer["content-type"], answer.body) == (status, JSON, b'{"error": "no"}')


@pytest.mark.parametrize(
    "type", ["text/event-stream; charset=utf-8", "Text/Event-Stream", "text/event-stream;x"]
)
async def test_str_3_the_content_type_is_the_workers(type):
    async with fake_worker("m") as worker, running_gateway(workers=[worker]) as gateway:
        worker.plays.append(says(head(200, f"content-type: {type}", CHUNKED), chunk(b"data: 1\n\n"), END))
        assert (await gateway.ask(CHAT, STREAM))["content-type"] == type


PINGS = {
    CHAT: b": ping\n\n",
    "/v1/messages": b'event: ping\ndata: {"type": "ping"}\n\n',
    "/v1/responses": b": ping\n\n",
}


@pytest.mark.parametrize("path", PINGS)
async def test_str_4_a_silent_stream_gets_pings_between_events_and_nothing_else(path):
    async with (
        fake_worker("m") as worker,
        running_gateway("--sse-keepalive-secs", "0.1", workers=[worker]) as gateway,
    ):
        steps = [trio.Event() for _ in range(3)]

        async def play(turn):
            await turn.send(SSE_HEAD)
            await steps[0].wait()
            await turn.send(chunk(b"data: half"))
            await steps[1].wait()
            await turn.send(chunk(b" an event\n\n"))
            await steps[2].wait()
            await turn.send(chunk(DONE), END)

        worker.plays.append(play)
        client = await gateway.connect()
        await client.send(request(path, ASKED[path]))
        await client.read_head()
        ping = PINGS[path]
        assert await client.read_chunk() == ping
        assert await client.read_chunk() == ping
        steps[0].set()
        piece = await client.read_chunk()
        while piece == ping:
            piece = await client.read_chunk()
        assert piece == b"data: half"
        with trio.move_on_after(0.5):
            assert await client.read_chunk() is None, "a ping inside an event"
        steps[1].set()
        assert await client.read_chunk() == b" an event\n\n"
        assert await client.read_chunk() == ping
        steps[2].set()
        piece = await client.read_chunk()
        while piece == ping:
            piece = await client.read_chunk()
        assert piece == DONE
        assert await client.read_chunk() is None


@pytest.mark.parametrize("ends", [b"\r\n\r\n", b"\n\n", b"\r\r"])
async def test_str_4_pings_follow_every_kind_of_blank_line(ends):
    async with (
        fake_worker("m") as worker,
        running_gateway("--sse-keepalive-secs", "0.1", workers=[worker]) as gateway,
    ):
        gate = Gate()

        async def play(turn):
            # The blank line comes in packets of its own.
            await turn.send(
                SSE_HEAD, chunk(b"data: 1"), *(chunk(ends[at : at + 1]) for at in range(len(ends)))
            )
            await gate.before(says(END))(turn)

        worker.plays.append(play)
        client = await gateway.connect()
        await client.send(request(CHAT, STREAM))
        await client.read_head()
        seen = b""
        while not seen.endswith(b": ping\n\n"):
            seen += await client.read_chunk()
        assert seen == b"data: 1" + ends + b": ping\n\n"
        gate.open.set()


async def test_str_4_zero_turns_pings_off_and_json_gets_none():
    async with (
        fake_worker("m") as worker,
        running_gateway("--sse-keepalive-secs", "0", workers=[worker]) as gateway,
    ):
        gate = Gate()
        worker.plays.append(starts_then(SSE_HEAD, gate, chunk(DONE) + END))
        client = await gateway.connect()
        await client.send(request(CHAT, STREAM))
        await client.read_head()
        with trio.move_on_after(0.4):
            assert await client.read_chunk() is None, "a ping"
        gate.open.set()
        assert await client.read_chunk() == DONE


@pytest.mark.parametrize("start", [b"", b'{"a":\n\n'])
async def test_str_4_an_answer_that_is_no_event_stream_is_never_pinged(start):
    """An engine that does not stream answers `stream:true` with JSON, and takes its time."""
    async with (
        fake_worker("m") as worker,
        running_gateway("--sse-keepalive-secs", "0.1", workers=[worker]) as gateway,
    ):
        gate = Gate()
        worker.plays.append(
            starts_then(
                head(200, f"content-type: {JSON}", CHUNKED) + (chunk(start) if start else b""),
                gate,
                chunk(b"1}") + END,
            )
        )
        client = await gateway.connect()
        await client.send(request(CHAT, STREAM))
        await gate.reached.wait()
        with trio.move_on_after(0.4):
            await trio.sleep_forever()
        gate.open.set()
        assert (await client.read()).body == start + b"1}"


def starts_then(start, gate, rest):
    async def play(turn):
        await turn.send(start)
        await gate.before(says(rest))(turn)

    return play


async def test_str_5_a_slow_reader_slows_the_worker_and_little_is_held():
    sent = 0
    piece = b"data: " + b"s" * 65_000 + b"\n\n"

    async def flood(turn):
        nonlocal sent
        await turn.send(SSE_HEAD)
        with trio.CancelScope() as scope:
            turn.scope = scope
            while True:
                await turn.send(chunk(piece))
                sent += len(piece)

    async with fake_worker("m") as worker, running_gateway(workers=[worker]) as gateway:
        worker.play = flood
        clients = [await gateway.connect(receive_bytes=16_384) for _ in range(8)]
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        for client in clients:
            await client.send(request(CHAT, STREAM))
            await client.read_head()
        last = -1
        while sent != last:  # until nothing moves any more
            last = sent
            with trio.move_on_after(0.3):
                await trio.sleep_forever()
        held = sum(len(exchange._unsent or b"") for exchange in gateway.server._exchanges)
        pieces = [exchange.connection for exchange in gateway.server._exchanges]
        assert len(pieces) == 8 and held <= 8 << 20
        assert sent < 8 * 16_000_000  # kernel buffers of two connections each, not all that the worker has
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 40_000  # KiB
        client = clients[0]
        seen = 0
        while seen < 3_000_000:
            seen += len(await client.read_chunk())
        assert sent > last  # and on it goes when the client reads


@pytest.mark.parametrize("reset", [False, True])
@pytest.mark.parametrize(
    ("text", "closing"),
    [
        (b"", b""),
        (b"data: 1\n\n", b""),
        (b"data: 1\r\n\r\n", b""),
        (b"data: 1\n", b"\n"),
        (b"data: 1\r\n", b"\n"),
        (b'data: {"half":', b"\n\n"),
        (b": comment", b"\n\n"),
        (b"data: x [DONE]\n\n", b""),
        (b'data: {"text": "data: [DONE]"}\n\n', b""),
        (b"data: [DON", b"\n\n"),
    ],
)
async def test_str_6_a_stream_whose_worker_dies_is_closed_with_an_error_and_done(text, closing, reset):
    async with fake_worker("m") as worker, running_gateway(workers=[worker]) as gateway:
        worker.plays.append(breaks(SSE_HEAD, *([chunk(text)] if text else []), reset=reset))
        client = await gateway.connect()
        answer = await client.ask(CHAT, STREAM)
        assert answer.body.startswith(text + closing), answer.body
        frame = answer.body[len(text + closing) :]
        assert frame.startswith(b"data: {") and frame.endswith(b"\n\ndata: [DONE]\n\n")
        error = json.loads(frame[6:].split(b"\n\n")[0])["error"]
        assert error.pop("message")
        assert error == OPENAI_FRAME["error"]
        assert await client.is_open()  # a regular end


async def test_str_6_a_worker_that_breaks_the_framing_dies_too():
    async with fake_worker("m") as worker, running_gateway(workers=[worker]) as gateway:
        gate = Gate()
        worker.plays.append(starts_then(SSE_HEAD, gate, chunk(b"data: 1\n\n") + b"nonsense\r\n"))
        client = await gateway.connect()
        await client.send(request(CHAT, STREAM))
        answer = await client.read_head()
        gate.open.set()
        await client.read_body(answer)
        assert answer.body.startswith(b"data: 1\n\ndata: {")
        assert b"upstream_stream_interrupted" in answer.body


async def test_str_7_messages_end_with_an_error_event_and_no_done():
    async with fake_worker("m") as worker, running_gateway(workers=[worker]) as gateway:
        worker.plays.append(
            breaks(SSE_HEAD, chunk(b"event: message_start\ndata: {}\n\n"), chunk(b"event: con"))
        )
        answer = await gateway.ask("/v1/messages", MESSAGES, "x-request-id: r1")
        *_, last = answer.body.split(b"\n\n")[:-1]
        assert b"event: con\n\nevent: error\n" in answer.body
        name, data = last.split(b"\n")
        document = json.loads(data.removeprefix(b"data: "))
        assert name == b"event: error" and document["error"].pop("message")
        assert document == {"type": "error", "error": {"type": "api_error"}, "request_id": "r1"}
        assert b"[DONE]" not in answer.body


async def test_str_7_responses_end_with_the_next_sequence_number():
    async with fake_worker("m") as worker, running_gateway(workers=[worker]) as gateway:
        text = b"".join(
            b'event: response.output_text.delta\ndata: {"type":"response.output_text.delta","sequence_number":%d,"delta":"x"}\n\n'
            % n
            for n in range(7)
        )
        worker.plays.append(breaks(SSE_HEAD, *(chunk(text[at : at + 37]) for at in range(0, len(text), 37))))
        answer = await gateway.ask("/v1/responses", RESPONSES)
        assert answer.body.startswith(text + b"event: error\ndata: ")
        document = json.loads(answer.body[len(text) + len(b"event: error\ndata: ") :])
        assert document.pop("message")
        assert document == {
            "type": "error",
            "code": "upstream_stream_interrupted",
            "param": None,
            "sequence_number": 7,
        }


MARKED = {
    CHAT: b'data: {"a":1}\n\ndata: [DONE]\n\n',
    "/v1/messages": b'event: message_stop\ndata: {"type":"message_stop"}\n\n',
    "/v1/responses": b'event: response.completed\ndata: {"type":"response.completed","sequence_number":3}\n\n',
}


@pytest.mark.parametrize("cut", [1, 7, 10_000])
@pytest.mark.parametrize("path", MARKED)
async def test_str_8_after_the_workers_own_end_marker_nothing_is_appended(path, cut):
    text = MARKED[path]
    async with fake_worker("m") as worker, running_gateway(workers=[worker]) as gateway:
        worker.plays.append(
            breaks(SSE_HEAD, *(chunk(text[at : at + cut]) for at in range(0, len(text), cut)), reset=True)
        )
        client = await gateway.connect()
        answer = await client.ask(path, ASKED[path])
        assert answer.body == text and not answer.is_cut
        assert gateway.worker(worker).breaker.consecutive_failures == 0


@pytest.mark.parametrize("path", MARKED)
async def test_str_8_a_clean_end_without_a_marker_is_relayed_as_it_is(path):
    async with fake_worker("m") as worker, running_gateway(workers=[worker]) as gateway:
        worker.plays.append(streams(b"data: 1\n\n"))
        assert (await gateway.ask(path, ASKED[path])).body == b"data: 1\n\n"


async def test_str_9_a_stream_that_dies_counts_against_the_worker_and_a_client_that_leaves_does_not():
    async with fake_worker("m") as worker, running_gateway(workers=[worker]) as gateway:
        worker.plays.append(breaks(SSE_HEAD, chunk(b"data: 1\n\n")))
        await gateway.ask(CHAT, STREAM)
        assert gateway.worker(worker).breaker.consecutive_failures == 1
        assert gateway.metric("smg_worker_errors_total", error_type="broken_stream") == 1
        assert gateway.metric("smg_worker_cb_outcomes_total", outcome="failure") == 1

        async def trickle(turn):
            await turn.send(SSE_HEAD, chunk(b"data: 1\n\n"))
            await turn.wait_gone()

        worker.plays.append(trickle)
        client = await gateway.connect()
        await client.send(request(CHAT, STREAM))
        await client.read_head()
        client.reset()
        await eventually(lambda: gateway.worker(worker).in_flight == 0)
        assert gateway.worker(worker).breaker.consecutive_failures == 1
        assert gateway.metric("smg_worker_errors_total") == 1


async def test_str_10_a_stream_is_retried_before_its_head_and_never_after():
    async with (
        fake_workers(2, "m") as workers,
        running_gateway("--policy", "passthrough", workers=workers) as gateway,
    ):
        first, second = workers
        second.play = streams(b"data: 2\n\n")
        for play in (
            breaks(),
            breaks(reset=True),
            breaks(b"HTTP/1.1 200 OK\r\ncontent-"),
            answers(503),
            answers(429),
        ):
            first.plays.append(play)
            answer = await gateway.ask(CHAT, STREAM)
            assert answer.body == b"data: 2\n\n" and answer.worker == second.id
        first.plays.append(breaks(SSE_HEAD))
        answer = await gateway.ask(CHAT, STREAM)
        assert answer.worker == first.id and b"interrupted" in answer.body


async def test_str_11_the_timeout_bounds_the_head_of_a_stream():
    async with (
        fake_worker("m") as worker,
        running_gateway("--request-timeout-secs", "0.3", workers=[worker]) as gateway,
    ):
        worker.plays.append(hangs)
        answer = await gateway.ask(CHAT, STREAM)
        assert answer.is_error(504, "call_upstream_timeout")


@pytest.mark.parametrize("keepalive", ["0", "0.1", "15"])
async def test_str_11_the_timeout_bounds_each_silence_of_a_stream(keepalive):
    flags = "--request-timeout-secs", "0.4", "--sse-keepalive-secs", keepalive
    async with fake_worker("m") as worker, running_gateway(*flags, workers=[worker]) as gateway:

        async def play(turn):
            await turn.send(SSE_HEAD, chunk(b"data: 1\n\n"))
            await turn.wait_gone()

        worker.plays.append(play)
        started_s = trio.current_time()
        answer = await gateway.ask(CHAT, STREAM)
        assert b"upstream_stream_interrupted" in answer.body
        assert 0.3 < trio.current_time() - started_s < 2
        assert gateway.worker(worker).breaker.consecutive_failures == 1


async def test_str_11_a_stream_that_moves_may_last_longer_than_the_timeout():
    async with (
        fake_worker("m") as worker,
        running_gateway("--request-timeout-secs", "0.4", workers=[worker]) as gateway,
    ):

        async def play(turn):
            await turn.send(SSE_HEAD)
            for n in range(10):
                await trio.sleep(0.1)
                await turn.send(chunk(event(n)))
            await turn.send(chunk(DONE) + END)

        worker.plays.append(play)
        answer = await gateway.ask(CHAT, STREAM)
        assert answer.body.endswith(DONE) and b"interrupted" not in answer.body


@pytest.mark.parametrize("document", [STREAM, HELLO])
async def test_life_6_what_runs_when_the_grace_period_ends_is_told_so(document):
    async with fake_worker("m") as worker, running_gateway(workers=[worker]) as gateway:

        async def play(turn):
            if document is STREAM:
                await turn.send(SSE_HEAD, chunk(b"data: 1\n\ndata: half"))
            await turn.wait_gone()

        worker.plays.append(play)
        client = await gateway.connect()
        await client.send(request(CHAT, document))
        await worker.next_turn()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(drained, gateway, 0.4)
            answer = await client.read()
            assert answer.get("connection") == "close" or document is STREAM
            if document is STREAM:
                assert answer.body.startswith(b"data: 1\n\ndata: half\n\ndata: {")
                assert b"upstream_stream_interrupted" in answer.body and answer.body.endswith(DONE)
            else:
                assert answer.status == 503
            assert await client.until_closed() == b""
            await gateway.drained.wait()


async def test_met_3_a_stream_is_measured_and_its_usage_is_counted():
    usage = event(
        {
            "choices": [],
            "usage": {
                "prompt_tokens": 11,
                "completion_tokens": 7,
                "prompt_tokens_details": {"cached_tokens": 4},
            },
        }
    )
    async with fake_worker("m") as worker, running_gateway(workers=[worker]) as gateway:
        worker.plays.append(
            streams(
                event({"choices": [{}]}), *(chunk(b"") and b"data: x\n\n" for _ in range(100)), usage, DONE
            )
        )
        assert (await gateway.ask(CHAT, STREAM)).body.endswith(DONE)
        assert gateway.metric("smg_router_tokens_total", token_type="input") == 11
        assert gateway.metric("smg_router_tokens_total", token_type="output") == 7
        assert gateway.metric("smg_router_ttft_seconds_count") == 1
        worker.plays.append(answers(200, {"usage": {"prompt_tokens": 5, "completion_tokens": 1}}))
        await gateway.ask(CHAT, HELLO)
        assert gateway.metric("smg_router_tokens_total", token_type="input") == 16
