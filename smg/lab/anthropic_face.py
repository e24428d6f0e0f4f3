"""The simulated engine in Anthropic's words: `/v1/messages` and `/v1/messages/count_tokens`.

Owns the shapes of messages and their stream events. Input tokens exclude those read from the cache, as Anthropic
counts them.
"""

from __future__ import annotations

from typing import Any

from smg.lab.face import BadRequest, Job, Send, event, output_length, prompt_bytes
from smg.lab.simulated import Generation, count_tokens


def _prompt(document: dict[str, Any]) -> bytes:
    messages = document.get("messages")
    if not isinstance(messages, list) or not messages:
        raise BadRequest("messages: at least one message is required")
    tools = document.get("tools")
    return prompt_bytes([document.get("system") or "", str(tools) if tools else "", messages])


class Messages:
    """`/v1/messages`."""

    id_prefix = "msg_"

    def __init__(self, output_tokens: int) -> None:
        self._output_tokens = output_tokens

    def job(self, document: dict[str, Any], model: str) -> Job:
        """What the body asks for; `max_tokens` is required."""
        if document.get("max_tokens") is None:
            raise BadRequest("max_tokens: Field required")
        output_tokens, is_cut = output_length(document, ("max_tokens",), self._output_tokens)
        return Job(
            model=model,
            prompt=_prompt(document),
            output_tokens=output_tokens,
            is_cut=is_cut,
            is_stream=document.get("stream") is True,
            document=document,
        )

    def answer(self, job: Job, done: Generation) -> Any:
        """A `message`."""
        content = [{"type": "text", "text": job.text(0, done.produced)}]
        return self._message(job, content, _stop(job), _usage(done, done.produced))

    async def stream(self, job: Job, generation: Generation, send: Send) -> None:
        """`message_start` to `message_stop`, one text block between."""

        async def tell(name: str, **members: Any) -> None:
            await send(event({"type": name, **members}, name))

        seen = await generation.wait_more(0)
        await tell("message_start", message=self._message(job, [], None, _usage(generation, 0)))
        await tell("content_block_start", index=0, content_block={"type": "text", "text": ""})
        sent = 0
        while sent < seen:
            for number in range(sent, seen):
                delta = {"type": "text_delta", "text": job.token(number)}
                await tell("content_block_delta", index=0, delta=delta)
            sent = seen
            seen = await generation.wait_more(sent)
        await tell("content_block_stop", index=0)
        await tell(
            "message_delta",
            delta={"stop_reason": _stop(job), "stop_sequence": None},
            usage=_usage(generation, sent),
        )
        await tell("message_stop")

    def _message(
        self, job: Job, content: list[Any], stop: str | None, usage: dict[str, Any]
    ) -> dict[str, Any]:
        return {
            "id": job.id,
            "type": "message",
            "role": "assistant",
            "model": job.model,
            "content": content,
            "stop_reason": stop,
            "stop_sequence": None,
            "usage": usage,
        }


def count_answer(document: dict[str, Any]) -> dict[str, Any]:
    """The answer of `/v1/messages/count_tokens`; nothing is generated for it. Raises `BadRequest`."""
    return {"input_tokens": count_tokens(_prompt(document))}


def _usage(generation: Generation, output_tokens: int) -> dict[str, Any]:
    return {
        "input_tokens": generation.prompt_tokens - generation.cached_tokens,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": generation.cached_tokens,
        "output_tokens": output_tokens,
    }


def _stop(job: Job) -> str:
    return "max_tokens" if job.is_cut else "end_turn"
