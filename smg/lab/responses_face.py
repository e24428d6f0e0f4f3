"""The simulated engine in the words of OpenAI's Responses API: one message item, nothing stored.

Owns the shapes of `/v1/responses` and its stream events with their sequence numbers. State (`previous_response_id`,
background, tools) is not simulated; engines that lack it refuse it too.
"""

from __future__ import annotations

from typing import Any

from smg.lab.face import BadRequest, Job, Send, event, output_length, prompt_bytes
from smg.lab.simulated import Generation


class Responses:
    """`/v1/responses`."""

    id_prefix = "resp_"

    def __init__(self, output_tokens: int) -> None:
        self._output_tokens = output_tokens

    def job(self, document: dict[str, Any], model: str) -> Job:
        """What the body asks for; `input` is a text or a list of items."""
        if not document.get("input"):
            raise BadRequest("input is required")
        if document.get("previous_response_id"):
            raise BadRequest("previous_response_id: this engine stores nothing", 404)
        output_tokens, is_cut = output_length(document, ("max_output_tokens",), self._output_tokens)
        return Job(
            model=model,
            prompt=prompt_bytes([document.get("instructions") or "", document["input"]]),
            output_tokens=output_tokens,
            is_cut=is_cut,
            is_stream=document.get("stream") is True,
            document=document,
        )

    def answer(self, job: Job, done: Generation) -> Any:
        """A `response` that is over."""
        item = _item(job, done, "completed", [_part(job.text(0, done.produced))])
        return _response(job, "incomplete" if job.is_cut else "completed", [item], _usage(done))

    async def stream(self, job: Job, generation: Generation, send: Send) -> None:
        """`response.created` to `response.completed` (or `incomplete`), numbered without gaps."""
        number = 0

        async def tell(name: str, **members: Any) -> None:
            nonlocal number
            await send(event({"type": name, "sequence_number": number, **members}, name))
            number += 1

        seen = await generation.wait_more(0)
        started = _response(job, "in_progress", [], None)
        await tell("response.created", response=started)
        await tell("response.in_progress", response=started)
        where: dict[str, Any] = {"output_index": 0}
        await tell("response.output_item.added", **where, item=_item(job, generation, "in_progress", []))
        where.update(item_id=f"msg_{generation.id}", content_index=0)
        await tell("response.content_part.added", **where, part=_part(""))
        sent = 0
        while sent < seen:
            for token in range(sent, seen):
                await tell("response.output_text.delta", **where, delta=job.token(token), logprobs=[])
            sent = seen
            seen = await generation.wait_more(sent)
        text = job.text(0, sent)
        await tell("response.output_text.done", **where, text=text, logprobs=[])
        await tell("response.content_part.done", **where, part=_part(text))
        done = self.answer(job, generation)
        await tell("response.output_item.done", output_index=0, item=done["output"][0])
        await tell(f"response.{done['status']}", response=done)


def _item(job: Job, generation: Generation, status: str, content: list[Any]) -> dict[str, Any]:
    return {
        "id": f"msg_{generation.id}",
        "type": "message",
        "role": "assistant",
        "status": status,
        "content": content,
    }


def _part(text: str) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


def _response(job: Job, status: str, output: list[Any], usage: dict[str, Any] | None) -> dict[str, Any]:
    document = job.document
    return {
        "id": job.id,
        "object": "response",
        "created_at": job.created,
        "status": status,
        "error": None,
        "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
        "instructions": document.get("instructions"),
        "max_output_tokens": document.get("max_output_tokens"),
        "metadata": document.get("metadata") or {},
        "model": job.model,
        "output": output,
        "parallel_tool_calls": True,
        "previous_response_id": None,
        "store": False,
        "temperature": document.get("temperature", 1.0),
        "text": {"format": {"type": "text"}},
        "tool_choice": "auto",
        "tools": [],
        "top_p": document.get("top_p", 1.0),
        "truncation": "disabled",
        "usage": usage,
    }


def _usage(generation: Generation) -> dict[str, Any]:
    return {
        "input_tokens": generation.prompt_tokens,
        "input_tokens_details": {"cached_tokens": generation.cached_tokens},
        "output_tokens": generation.produced,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": generation.prompt_tokens + generation.produced,
    }
