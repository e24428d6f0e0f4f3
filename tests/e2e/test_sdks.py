"""The official OpenAI and Anthropic SDKs against smg with three simulated engines (contract ERR-31).

The SDKs run as their users run them: synchronous, in a thread. The gateway and the engines run here.
"""

from __future__ import annotations

import argparse
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import anthropic
import openai
import pytest
import trio

from smg.lab.engine import add_arguments, run_engines
from smg.lab.faults import NO_FAULTS, Faults
from tests.e2e.fake_worker import SSE_HEAD, answers, breaks, chunk, closes, event, fake_worker
from tests.e2e.gateway import Gateway, eventually, running_gateway

TURNS: Any = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is a mesh?"}]


class Engines:
    """Three engines behind a gateway."""

    def __init__(self, gateway: Gateway, engines: list[Any]) -> None:
        self.gateway = gateway
        self.engines = engines

    def order(self, faults: Faults) -> None:
        for engine in self.engines:
            engine.faults.order(faults)

    @property
    def served(self) -> list[int]:
        return [engine.requests_total for engine in self.engines]


@asynccontextmanager
async def engines(*flags: str, model: str = "sim") -> AsyncIterator[Engines]:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    arguments = parser.parse_args(["--port", "0", "--count", "3", "--model", model, "--speed", "50"])
    async with trio.open_nursery() as nursery:
        running = await nursery.start(run_engines, arguments, lambda line: None)
        urls = [url for _, url in running]
        async with running_gateway(
            "--policy", "round_robin", *flags, "--worker-urls", *urls, ready=False
        ) as gateway:
            await eventually(lambda: gateway.ready_count == 3)
            await eventually(lambda: gateway.node.registry.served_models() == (model,))
            await eventually(lambda: all(worker.models for worker in gateway.node.registry.workers()))
            yield Engines(gateway, [server for server, _ in running])
        nursery.cancel_scope.cancel()


def openai_client(gateway: Gateway, key: str = "any") -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{gateway.url}/v1", api_key=key, max_retries=0, timeout=20)


def anthropic_client(gateway: Gateway, key: str = "any") -> anthropic.Anthropic:
    return anthropic.Anthropic(base_url=gateway.url, api_key=key, max_retries=0, timeout=20)


async def in_thread(work: Callable[[], Any]) -> Any:
    with trio.fail_after(30):
        return await trio.to_thread.run_sync(work)


async def test_openai_chat_plain_and_streamed_over_three_engines():
    async with engines() as mesh:
        with openai_client(mesh.gateway) as client:

            def talk() -> None:
                for _ in range(3):
                    answer = client.chat.completions.create(model="sim", messages=TURNS, max_tokens=9)
                    assert answer.choices[0].message.content and answer.choices[0].finish_reason
                    assert answer.usage is not None and answer.usage.completion_tokens == 9
                    assert answer.model == "sim" and answer.object == "chat.completion"
                for _ in range(3):
                    with client.chat.completions.create(
                        model="sim",
                        messages=TURNS,
                        max_tokens=9,
                        stream=True,
                        stream_options={"include_usage": True},
                    ) as stream:
                        pieces = list(stream)
                    text = "".join(piece.choices[0].delta.content or "" for piece in pieces if piece.choices)
                    assert text and pieces[-1].usage is not None and pieces[-1].usage.completion_tokens == 9
                raw = client.chat.completions.with_raw_response.create(model="sim", messages=TURNS)
                assert raw.headers["x-request-id"].startswith("chatcmpl-") and raw.headers["x-smg-worker-id"]

            await in_thread(talk)
        assert sorted(mesh.served) == [2, 2, 3]
        assert mesh.gateway.metric("smg_router_requests_total", model="sim", endpoint="chat") == 7
        assert mesh.gateway.metric("smg_router_tokens_total", token_type="output") >= 54


async def test_openai_completions_embeddings_and_models():
    async with engines() as mesh:
        with openai_client(mesh.gateway) as client:

            def use() -> None:
                whole = client.completions.create(model="sim", prompt="Once upon a time", max_tokens=5)
                assert whole.choices[0].text and whole.object == "text_completion"
                pieces = list(
                    client.completions.create(model="sim", prompt="Once", max_tokens=5, stream=True)
                )
                assert "".join(piece.choices[0].text for piece in pieces if piece.choices)
                vectors = client.embeddings.create(model="sim", input=["a", "b", "c"])
                assert [row.index for row in vectors.data] == [0, 1, 2] and vectors.data[0].embedding
                assert [model.id for model in client.models.list()] == ["sim"]
                assert client.models.retrieve("sim").owned_by == "self_hosted"

            await in_thread(use)


async def test_openai_responses_plain_and_streamed():
    async with engines() as mesh:
        with openai_client(mesh.gateway) as client:

            def use() -> None:
                whole = client.responses.create(model="sim", input="What is a mesh?", max_output_tokens=6)
                assert whole.output_text and whole.status in ("completed", "incomplete")
                events = list(
                    client.responses.create(model="sim", input="Hi", max_output_tokens=6, stream=True)
                )
                assert events[0].type == "response.created"
                assert events[-1].type in ("response.completed", "response.incomplete")

            await in_thread(use)


async def test_anthropic_messages_plain_and_streamed():
    async with engines() as mesh:
        with anthropic_client(mesh.gateway) as client:

            def use() -> None:
                whole = client.messages.create(
                    model="sim", max_tokens=7, messages=[{"role": "user", "content": "What is a mesh?"}]
                )
                assert whole.content[0].type == "text" and whole.content[0].text
                assert whole.usage.output_tokens == 7 and whole.role == "assistant"
                with client.messages.stream(
                    model="sim", max_tokens=7, messages=[{"role": "user", "content": "What is a mesh?"}]
                ) as stream:
                    text = "".join(stream.text_stream)
                    final = stream.get_final_message()
                assert text and final.usage.output_tokens == 7 and final.stop_reason
                count = client.messages.count_tokens(
                    model="sim", messages=[{"role": "user", "content": "one two"}]
                )
                assert count.input_tokens > 0

            await in_thread(use)


async def test_the_async_sdks_work_on_trio():
    async with engines() as mesh:
        async with (
            openai.AsyncOpenAI(base_url=f"{mesh.gateway.url}/v1", api_key="x", max_retries=0) as client,
            anthropic.AsyncAnthropic(base_url=mesh.gateway.url, api_key="x", max_retries=0) as other,
        ):
            with trio.fail_after(20):
                seen = []
                stream = await client.chat.completions.create(
                    model="sim", messages=TURNS, max_tokens=4, stream=True
                )
                async for piece in stream:
                    seen.append(piece)
                assert seen
                answer = await other.messages.create(
                    model="sim", max_tokens=3, messages=[{"role": "user", "content": "hi"}]
                )
                assert answer.content


OPENAI_ERRORS = [
    (400, openai.BadRequestError),
    (401, openai.AuthenticationError),
    (403, openai.PermissionDeniedError),
    (404, openai.NotFoundError),
    (409, openai.ConflictError),
    (422, openai.UnprocessableEntityError),
    (429, openai.RateLimitError),
    (500, openai.InternalServerError),
    (503, openai.InternalServerError),
    (529, openai.InternalServerError),
]


@pytest.mark.parametrize(("status", "kind"), OPENAI_ERRORS)
async def test_err_31_a_workers_error_raises_the_right_class(status, kind):
    async with fake_worker("m") as worker, running_gateway("--disable-retries", workers=[worker]) as gateway:
        worker.play = answers(status, {"error": {"message": "no", "type": "x", "code": "y", "param": None}})
        other = getattr(anthropic, kind.__name__)
        with openai_client(gateway) as client, anthropic_client(gateway) as second:

            def use() -> None:
                with pytest.raises(kind):
                    client.chat.completions.create(model="m", messages=TURNS)
                with pytest.raises(kind):
                    client.chat.completions.create(model="m", messages=TURNS, stream=True)
                with pytest.raises(anthropic.APIStatusError) as caught:
                    second.messages.create(model="m", max_tokens=1, messages=TURNS[1:])
                assert caught.value.status_code == status
                assert isinstance(caught.value, other) or status == 529

            await in_thread(use)


async def test_err_31_the_gateways_own_errors_raise_the_right_classes():
    flags = "--api-key", "right", "--max-payload-size", "20000", "--retry-initial-backoff-ms", "1"
    async with fake_worker("m") as worker, running_gateway(*flags, workers=[worker]) as gateway:
        with (
            openai_client(gateway, "right") as client,
            openai_client(gateway, "wrong") as stranger,
            anthropic_client(gateway, "right") as second,
            anthropic_client(gateway, "wrong") as second_stranger,
        ):
            user = TURNS[1:]

            def use() -> None:
                create = client.chat.completions.create
                with pytest.raises(openai.BadRequestError) as bad:
                    create(model="m", messages=[])
                assert bad.value.code == "empty_array" and bad.value.param == "messages"
                assert bad.value.request_id
                with pytest.raises(openai.BadRequestError):
                    create(model="m", messages=TURNS, temperature=9)
                with pytest.raises(openai.AuthenticationError):
                    stranger.chat.completions.create(model="m", messages=TURNS)
                with pytest.raises(openai.NotFoundError) as missing:
                    create(model="none", messages=TURNS, stream=True)
                assert missing.value.code == "model_not_found"
                with pytest.raises(openai.APIStatusError) as large:
                    create(model="m", messages=[{"role": "user", "content": "x" * 30_000}])
                assert large.value.status_code == 413
                with pytest.raises(anthropic.BadRequestError) as second_bad:
                    second.messages.create(model="m", max_tokens=1, messages=[])
                assert second_bad.value.body["error"]["type"] == "invalid_request_error"
                with pytest.raises(anthropic.AuthenticationError):
                    second_stranger.messages.create(model="m", max_tokens=1, messages=user)
                with pytest.raises(anthropic.NotFoundError):
                    second.messages.create(model="none", max_tokens=1, messages=user)

            await in_thread(use)
            worker.play = closes

            def broken() -> None:
                with pytest.raises(openai.InternalServerError) as gone:
                    client.chat.completions.create(model="m", messages=TURNS)
                assert gone.value.status_code == 502
                with pytest.raises(anthropic.InternalServerError):
                    second.messages.create(model="m", max_tokens=1, messages=user)

            await in_thread(broken)


async def test_err_31_a_full_gateway_raises_rate_limit_error():
    flags = "--rate-limit-tokens-per-second", "0.001"
    async with fake_worker("m") as worker, running_gateway(*flags, workers=[worker]) as gateway:
        with openai_client(gateway) as client, anthropic_client(gateway) as second:

            def use() -> None:
                client.chat.completions.create(model="m", messages=TURNS)
                with pytest.raises(openai.RateLimitError) as full:
                    client.chat.completions.create(model="m", messages=TURNS)
                assert full.value.code == "rate_limit_exceeded" and full.value.response.headers["retry-after"]
                with pytest.raises(anthropic.RateLimitError):
                    second.messages.create(model="m", max_tokens=1, messages=TURNS[1:])

            await in_thread(use)


async def test_err_31_a_dead_stream_raises_api_error_and_what_came_is_delivered():
    async with fake_worker("m") as worker, running_gateway(workers=[worker]) as gateway:
        good = event(
            {
                "id": "c",
                "object": "chat.completion.chunk",
                "created": 1,
                "model": "m",
                "choices": [{"index": 0, "delta": {"content": "Hel"}}],
            }
        )
        start = (
            b'event: message_start\ndata: {"type":"message_start","message":{"id":"msg","type":"message","role":"assistant","model":"m","content":[],"stop_reason":null,"stop_sequence":null,"usage":{"input_tokens":1,"output_tokens":1}}}\n\n'
            b'event: content_block_start\ndata: {"type":"content_block_start","index":0,"content_block":{"type":"text","text":""}}\n\n'
            b'event: content_block_delta\ndata: {"type":"content_block_delta","index":0,"delta":{"type":"text_delta","text":"Hel"}}\n\n'
        )
        with openai_client(gateway) as client, anthropic_client(gateway) as second:

            def chat() -> None:
                seen = []
                with pytest.raises(openai.APIError) as dead:
                    for piece in client.chat.completions.create(model="m", messages=TURNS, stream=True):
                        seen.append(piece.choices[0].delta.content)
                assert seen == ["Hel"] and "interrupted" in str(dead.value)

            worker.plays.append(breaks(SSE_HEAD, chunk(good)))
            await in_thread(chat)

            def messages() -> None:
                seen = []
                with pytest.raises(anthropic.APIError) as dead:
                    with second.messages.stream(model="m", max_tokens=5, messages=TURNS[1:]) as stream:
                        for text in stream.text_stream:
                            seen.append(text)
                assert seen == ["Hel"] and "interrupted" in str(dead.value)

            worker.plays.append(breaks(SSE_HEAD, chunk(start)))
            await in_thread(messages)


async def test_a_user_who_stops_reading_stops_the_engine():
    async with engines() as mesh:
        with openai_client(mesh.gateway) as client:

            def stop_early() -> None:
                stream = client.chat.completions.create(
                    model="sim", messages=TURNS, stream=True, max_tokens=5000, extra_body={"ignore_eos": True}
                )
                next(iter(stream))
                stream.close()

            await in_thread(stop_early)
        await eventually(lambda: all(engine.engine.model.running == 0 for engine in mesh.engines), 2)


async def test_one_engine_that_fails_is_not_noticed():
    async with engines() as mesh:
        mesh.engines[0].faults.order(Faults(error_rate=1.0, status=503))
        mesh.engines[1].faults.order(Faults(close_before_head=True, count=2))
        with openai_client(mesh.gateway) as client:

            def use() -> None:
                for number in range(12):
                    answer = client.chat.completions.create(
                        model="sim", messages=[{"role": "user", "content": str(number)}], max_tokens=3
                    )
                    assert answer.choices[0].message.content

            await in_thread(use)
        mesh.order(NO_FAULTS)
        assert mesh.gateway.metric("smg_worker_retries_total") >= 4
