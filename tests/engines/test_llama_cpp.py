"""The OpenAI and Anthropic SDKs against a real llama.cpp server, through the gateway."""

from __future__ import annotations

import json
import time
import urllib.request
from collections.abc import Iterator
from typing import Any

import anthropic
import openai
import pytest

from tests.engines.conftest import CHAT_MODEL, EMBEDDING_MODEL

pytestmark = pytest.mark.engines

TOKENS = 12
QUESTION: list[Any] = [{"role": "user", "content": "When does the next train leave?"}]
# The weights are random: without this an answer may end with its first token.
UNTIL_CUT = {"ignore_eos": True}


@pytest.fixture(scope="module")
def client(gateway: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{gateway}/v1", api_key="none", max_retries=0, timeout=60) as client:
        yield client


@pytest.fixture(scope="module")
def claude(gateway: str) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=gateway, api_key="none", max_retries=0, timeout=60) as client:
        yield client


def test_both_servers_are_workers_with_the_models_they_serve(gateway: str) -> None:
    workers = _get(f"{gateway}/workers")["workers"]
    assert [worker["status"] for worker in workers] == ["ready", "ready"]
    assert [[model["id"] for model in worker["models"]] for worker in workers] == [
        [CHAT_MODEL],
        [EMBEDDING_MODEL],
    ]


def test_models_are_listed(client: openai.OpenAI) -> None:
    assert sorted(model.id for model in client.models.list()) == [CHAT_MODEL, EMBEDDING_MODEL]


def test_a_chat_is_answered(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model=CHAT_MODEL, messages=QUESTION, max_tokens=TOKENS, extra_body=UNTIL_CUT
    )
    assert answer.choices[0].finish_reason == "length"
    assert answer.choices[0].message.role == "assistant"
    assert answer.usage is not None and answer.usage.completion_tokens == TOKENS


def test_a_chat_is_streamed_with_its_usage_at_the_end(client: openai.OpenAI) -> None:
    stream = client.chat.completions.create(
        model=CHAT_MODEL,
        messages=QUESTION,
        max_tokens=TOKENS,
        stream=True,
        stream_options={"include_usage": True},
        extra_body=UNTIL_CUT,
    )
    events = list(stream)
    assert [event.choices[0].finish_reason for event in events if event.choices][-1] == "length"
    assert events[-1].usage is not None and events[-1].usage.completion_tokens == TOKENS
    assert len(events) > 2


def test_the_engine_gets_and_says_the_same_as_without_a_gateway(gateway: str, engine: str) -> None:
    body = {
        "model": CHAT_MODEL,
        "messages": QUESTION,
        "max_tokens": TOKENS,
        "temperature": 0,
        "seed": 1,
        **UNTIL_CUT,
    }
    direct, relayed = (_post(f"{url}/v1/chat/completions", body) for url in (engine, gateway))
    assert direct.keys() == relayed.keys()
    assert direct["usage"]["prompt_tokens"] == relayed["usage"]["prompt_tokens"]
    assert direct["choices"][0]["message"].keys() == relayed["choices"][0]["message"].keys()


def test_a_completion_is_answered_and_streamed(client: openai.OpenAI) -> None:
    answer = client.completions.create(
        model=CHAT_MODEL, prompt="The train", max_tokens=TOKENS, extra_body=UNTIL_CUT
    )
    assert answer.usage is not None and answer.usage.completion_tokens == TOKENS
    stream = client.completions.create(
        model=CHAT_MODEL, prompt="The train", max_tokens=TOKENS, stream=True, extra_body=UNTIL_CUT
    )
    assert [event.choices[0].finish_reason for event in stream if event.choices][-1] == "length"


def test_a_response_is_answered_and_streamed(client: openai.OpenAI) -> None:
    answer = client.responses.create(
        model=CHAT_MODEL, input="The train", max_output_tokens=TOKENS, store=False, extra_body=UNTIL_CUT
    )
    assert answer.usage is not None and answer.usage.output_tokens == TOKENS
    stream = client.responses.create(
        model=CHAT_MODEL,
        input="The train",
        max_output_tokens=TOKENS,
        store=False,
        stream=True,
        extra_body=UNTIL_CUT,
    )
    kinds = [event.type for event in stream]
    assert kinds[0] == "response.created"
    assert kinds[-1] in ("response.completed", "response.incomplete")


def test_texts_become_vectors(client: openai.OpenAI) -> None:
    answer = client.embeddings.create(model=EMBEDDING_MODEL, input=["a train", "a platform"])
    first, second = (item.embedding for item in answer.data)
    assert len(first) == len(second) == 64
    assert first != second


def test_a_message_is_answered(claude: anthropic.Anthropic) -> None:
    answer = claude.messages.create(
        model=CHAT_MODEL, messages=QUESTION, max_tokens=TOKENS, extra_body=UNTIL_CUT
    )
    assert answer.stop_reason == "max_tokens"
    assert answer.usage.output_tokens == TOKENS


def test_a_message_is_streamed(claude: anthropic.Anthropic) -> None:
    with claude.messages.stream(
        model=CHAT_MODEL, messages=QUESTION, max_tokens=TOKENS, extra_body=UNTIL_CUT
    ) as stream:
        kinds = [event.type for event in stream]
        answer = stream.get_final_message()
    assert kinds[0] == "message_start"
    assert kinds[-1] == "message_stop"
    assert answer.usage.output_tokens == TOKENS


def test_tokens_of_a_message_are_counted(claude: anthropic.Anthropic) -> None:
    assert claude.messages.count_tokens(model=CHAT_MODEL, messages=QUESTION).input_tokens > len(QUESTION)


def test_a_refusal_of_the_engine_reaches_the_sdk_as_the_right_exception(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError):
        client.chat.completions.create(
            model=CHAT_MODEL, messages=[{"role": "user", "content": "word " * 6000}], max_tokens=TOKENS
        )


def test_a_model_that_nobody_serves_is_not_found(client: openai.OpenAI, claude: anthropic.Anthropic) -> None:
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="nobody", messages=QUESTION)
    with pytest.raises(anthropic.NotFoundError):
        claude.messages.create(model="nobody", messages=QUESTION, max_tokens=TOKENS)


def test_a_client_that_leaves_frees_the_slot_of_the_engine(
    client: openai.OpenAI, engine: str, gateway: str
) -> None:
    stream = client.chat.completions.create(
        model=CHAT_MODEL, messages=QUESTION, max_tokens=3900, stream=True, extra_body=UNTIL_CUT
    )
    next(iter(stream))
    assert _busy_slots(engine) == 1
    stream.close()
    deadline = time.monotonic() + 10
    while _busy_slots(engine) or _get(f"{gateway}/workers")["workers"][0]["load"]:
        assert time.monotonic() < deadline, "the engine still computes for a client that has left"
        time.sleep(0.05)


def _busy_slots(engine: str) -> int:
    return sum(slot["is_processing"] for slot in _get(f"{engine}/slots"))


def _get(url: str) -> Any:
    with urllib.request.urlopen(url, timeout=30) as response:
        return json.load(response)


def _post(url: str, body: dict[str, Any]) -> Any:
    head = {"Content-Type": "application/json"}
    request = urllib.request.Request(url, json.dumps(body).encode(), head)
    with urllib.request.urlopen(request, timeout=30) as response:
        return json.load(response)
