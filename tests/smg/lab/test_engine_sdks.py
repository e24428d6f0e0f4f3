"""The official SDKs against a simulated engine, on trio."""

from __future__ import annotations

import anthropic
import openai
import pytest

from tests.smg.lab.conftest import FAST, Start

MESSAGES = [{"role": "user", "content": "Tell me about rivers and stones, at some length please. " * 5}]


def openai_client(url: str) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)


def anthropic_client(url: str) -> anthropic.AsyncAnthropic:
    return anthropic.AsyncAnthropic(base_url=url, api_key="none", max_retries=0)


async def test_openai_models_and_chat(start_engines: Start) -> None:
    async with start_engines(*FAST) as [(_, url)], openai_client(url) as client:
        listed = await client.models.list()
        assert [model.id for model in listed.data] == ["sim"]
        answer = await client.chat.completions.create(model="sim", messages=MESSAGES, n=2)
        assert [choice.finish_reason for choice in answer.choices] == ["stop", "stop"]
        assert answer.choices[0].message.content
        assert answer.usage is not None
        assert answer.usage.completion_tokens == 64
        stream = await client.chat.completions.create(
            model="sim", messages=MESSAGES, stream=True, stream_options={"include_usage": True}
        )
        text, usage = "", None
        async for chunk in stream:
            usage = chunk.usage or usage
            for choice in chunk.choices:
                text += choice.delta.content or ""
        assert text == answer.choices[0].message.content
        assert usage is not None
        assert usage.prompt_tokens_details is not None
        assert usage.prompt_tokens_details.cached_tokens == (answer.usage.prompt_tokens - 1) // 16 * 16


async def test_openai_tools_that_are_forced(start_engines: Start) -> None:
    tools = [{"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}]
    async with start_engines(*FAST) as [(_, url)], openai_client(url) as client:
        answer = await client.chat.completions.create(
            model="sim", messages=MESSAGES, tools=tools, tool_choice="required"
        )
        assert answer.choices[0].finish_reason == "tool_calls"
        calls = answer.choices[0].message.tool_calls
        assert calls is not None
        assert calls[0].function.name == "look"
        stream = await client.chat.completions.create(
            model="sim", messages=MESSAGES, tools=tools, tool_choice="required", stream=True
        )
        names = [
            call.function.name
            async for chunk in stream
            for choice in chunk.choices
            for call in choice.delta.tool_calls or []
        ]
        assert names == ["look"]


async def test_openai_completions_and_embeddings(start_engines: Start) -> None:
    async with start_engines(*FAST) as [(_, url)], openai_client(url) as client:
        completion = await client.completions.create(model="sim", prompt="Once", max_tokens=4)
        assert completion.choices[0].finish_reason == "length"
        stream = await client.completions.create(model="sim", prompt="Once", max_tokens=4, stream=True)
        pieces = [chunk.choices[0].text async for chunk in stream]
        assert "".join(pieces) == completion.choices[0].text
        one = await client.embeddings.create(model="sim", input="a")
        many = await client.embeddings.create(model="sim", input=["a", "b"], dimensions=4)
        floats = await client.embeddings.create(model="sim", input="a", encoding_format="float")
        assert one.data[0].embedding == pytest.approx(floats.data[0].embedding, abs=1e-6)
        assert [len(row.embedding) for row in many.data] == [4, 4]
        assert many.data[0].embedding != many.data[1].embedding


async def test_openai_responses(start_engines: Start) -> None:
    async with start_engines(*FAST) as [(_, url)], openai_client(url) as client:
        answer = await client.responses.create(model="sim", input="Tell me about rivers.")
        assert answer.status == "completed"
        assert answer.output_text
        assert answer.usage is not None
        assert answer.usage.output_tokens == 32
        kinds, numbers, text = [], [], ""
        async with client.responses.stream(model="sim", input="Tell me about rivers.") as stream:
            async for event in stream:
                kinds.append(event.type)
                numbers.append(event.sequence_number)
                if event.type == "response.output_text.delta":
                    text += event.delta
            final = await stream.get_final_response()
        assert text == final.output_text == answer.output_text
        assert (kinds[0], kinds[-1]) == ("response.created", "response.completed")
        assert numbers == list(range(len(numbers)))


async def test_openai_errors_are_of_their_classes(start_engines: Start) -> None:
    async with start_engines(*FAST, "--api-key", "k") as [(_, url)]:
        async with openai_client(url) as client:
            with pytest.raises(openai.AuthenticationError):
                await client.models.list()
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="k", max_retries=0) as client:
            with pytest.raises(openai.NotFoundError):
                await client.chat.completions.create(model="other", messages=MESSAGES)
            with pytest.raises(openai.BadRequestError):
                await client.chat.completions.create(model="sim", messages=[])


async def test_anthropic_messages(start_engines: Start) -> None:
    async with start_engines(*FAST) as [(_, url)], anthropic_client(url) as client:
        answer = await client.messages.create(
            model="sim", max_tokens=100, system="Be brief. " * 20, messages=MESSAGES
        )
        assert answer.stop_reason == "end_turn"
        assert answer.usage.output_tokens == 32
        async with client.messages.stream(
            model="sim", max_tokens=100, system="Be brief. " * 20, messages=MESSAGES
        ) as stream:
            pieces = [text async for text in stream.text_stream]
            final = await stream.get_final_message()
        assert "".join(pieces) == answer.content[0].text == final.content[0].text
        assert final.usage.cache_read_input_tokens
        assert final.usage.cache_read_input_tokens + final.usage.input_tokens == answer.usage.input_tokens
        cut = await client.messages.create(model="sim", max_tokens=3, messages=MESSAGES)
        assert cut.stop_reason == "max_tokens"
        counted = await client.messages.count_tokens(model="sim", messages=MESSAGES)
        assert counted.input_tokens == cut.usage.input_tokens


async def test_anthropic_errors_are_of_their_classes(start_engines: Start) -> None:
    async with start_engines(*FAST) as [(_, url)], anthropic_client(url) as client:
        with pytest.raises(anthropic.NotFoundError):
            await client.messages.create(model="other", max_tokens=3, messages=MESSAGES)
