"""The simulated engine in OpenAI's words: chat, completions, embeddings, and rerank and classify beside them.

Owns the shapes of these documents and stream events as vLLM and SGLang send them. It computes nothing: texts are
words by number, vectors and scores follow from hashes, so that equal requests get equal answers.
"""

from __future__ import annotations

import base64
import struct
from random import Random
from typing import Any

import xxhash

from smg.lab.face import CHOICES_MAX, BadRequest, Job, Send, event, output_length, prompt_bytes
from smg.lab.simulated import Generation

DONE = b"data: [DONE]\n\n"
DIMENSIONS = 16
"""Length of a vector when the client asks for none: enough to tell texts apart."""
DIMENSIONS_MAX = 8192
INPUTS_MAX = 2048
"""Most inputs of one embeddings request, as OpenAI has it."""
LABELS = ("negative", "positive")


def usage_of(job: Job, generation: Generation) -> dict[str, Any]:
    """The `usage` of chat and completions."""
    completion = generation.produced * job.choices
    return {
        "prompt_tokens": generation.prompt_tokens,
        "total_tokens": generation.prompt_tokens + completion,
        "completion_tokens": completion,
        "prompt_tokens_details": {"cached_tokens": generation.cached_tokens},
    }


def _asked(document: dict[str, Any], model: str, prompt: Any, default: int, members: tuple[str, ...]) -> Job:
    """The parts of a job that chat and completions share."""
    output_tokens, is_cut = output_length(document, members, default)
    choices = document.get("n") or 1
    if type(choices) is not int or not 1 <= choices <= CHOICES_MAX:
        raise BadRequest(f"n must be between 1 and {CHOICES_MAX}")
    options = document.get("stream_options")
    return Job(
        model=model,
        prompt=prompt_bytes(prompt),
        output_tokens=output_tokens,
        is_cut=is_cut,
        is_stream=document.get("stream") is True,
        has_stream_usage=isinstance(options, dict) and options.get("include_usage") is True,
        choices=choices,
        document=document,
    )


class Chat:
    """`/v1/chat/completions`."""

    id_prefix = "chatcmpl-"

    def __init__(self, output_tokens: int) -> None:
        self._output_tokens = output_tokens

    def job(self, document: dict[str, Any], model: str) -> Job:
        """What the body asks for; `messages` is required."""
        messages = document.get("messages")
        if not isinstance(messages, list) or not messages:
            raise BadRequest("messages must be a list with at least one message")
        tools = document.get("tools") or []
        prompt = [str(tools), messages] if tools else messages
        return _asked(document, model, prompt, self._output_tokens, ("max_completion_tokens", "max_tokens"))

    def answer(self, job: Job, done: Generation) -> Any:
        """A `chat.completion`."""
        call = _forced_call(job)
        choices = []
        for index in range(job.choices):
            message: dict[str, Any] = {"role": "assistant", "content": job.text(0, done.produced)}
            if call:
                message["content"] = None
                message["tool_calls"] = [
                    {
                        "id": f"call_{done.id}{index}",
                        "type": "function",
                        "function": {"name": call, "arguments": "{}"},
                    }
                ]
            choices.append(
                {"index": index, "message": message, "logprobs": None, "finish_reason": _finish(job, call)}
            )
        return {**self._head(job, "chat.completion"), "choices": choices, "usage": usage_of(job, done)}

    async def stream(self, job: Job, generation: Generation, send: Send) -> None:
        """`chat.completion.chunk` events, the usage when asked for, `[DONE]`."""
        head = self._head(job, "chat.completion.chunk")
        call = _forced_call(job)

        async def chunk(index: int, delta: dict[str, Any], finish: str | None = None) -> None:
            choice = {"index": index, "delta": delta, "logprobs": None, "finish_reason": finish}
            await send(event({**head, "choices": [choice]}))

        seen = await generation.wait_more(0)
        for index in range(job.choices):
            await chunk(index, {"role": "assistant", "content": None if call else ""})
        sent = 0
        while sent < seen:
            for number in range(sent, seen):
                for index in range(job.choices):
                    if not call:
                        await chunk(index, {"content": job.token(number)})
            sent = seen
            seen = await generation.wait_more(sent)
        for index in range(job.choices):
            delta: dict[str, Any] = {}
            if call:
                function = {"name": call, "arguments": "{}"}
                one = {
                    "index": 0,
                    "id": f"call_{generation.id}{index}",
                    "type": "function",
                    "function": function,
                }
                delta = {"tool_calls": [one]}
            await chunk(index, delta, _finish(job, call))
        if job.has_stream_usage:
            await send(event({**head, "choices": [], "usage": usage_of(job, generation)}))
        await send(DONE)

    def _head(self, job: Job, kind: str) -> dict[str, Any]:
        return {"id": job.id, "object": kind, "created": job.created, "model": job.model}


class Completions:
    """`/v1/completions`."""

    id_prefix = "cmpl-"

    def __init__(self, output_tokens: int) -> None:
        self._output_tokens = output_tokens

    def job(self, document: dict[str, Any], model: str) -> Job:
        """What the body asks for; `prompt` is a text, several texts, or token ids."""
        prompt = document.get("prompt")
        if not prompt:
            raise BadRequest("prompt must be a text or token ids")
        return _asked(document, model, prompt, self._output_tokens, ("max_tokens",))

    def answer(self, job: Job, done: Generation) -> Any:
        """A `text_completion`."""
        text = job.text(0, done.produced)
        choices = [
            {"index": index, "text": text, "logprobs": None, "finish_reason": _finish(job)}
            for index in range(job.choices)
        ]
        return {**self._head(job), "choices": choices, "usage": usage_of(job, done)}

    async def stream(self, job: Job, generation: Generation, send: Send) -> None:
        """`text_completion` events, the usage when asked for, `[DONE]`."""
        head = self._head(job)
        sent = 0
        while (seen := await generation.wait_more(sent)) > sent:
            for number in range(sent, seen):
                is_last = generation.is_finished and number == seen - 1
                for index in range(job.choices):
                    choice = {
                        "index": index,
                        "text": job.token(number),
                        "logprobs": None,
                        "finish_reason": _finish(job) if is_last else None,
                    }
                    await send(event({**head, "choices": [choice]}))
            sent = seen
        if job.has_stream_usage:
            await send(event({**head, "choices": [], "usage": usage_of(job, generation)}))
        await send(DONE)

    def _head(self, job: Job) -> dict[str, Any]:
        return {"id": job.id, "object": "text_completion", "created": job.created, "model": job.model}


class Embeddings:
    """`/v1/embeddings`: a unit vector per input, the same for the same text."""

    id_prefix = "embd-"

    def job(self, document: dict[str, Any], model: str) -> Job:
        """What the body asks for; `input` is a text, token ids, or a list of either."""
        given = document.get("input")
        if not given or not isinstance(given, (str, list)):
            raise BadRequest("input must be a text, token ids or a list of them")
        if isinstance(given, list) and len(given) > INPUTS_MAX and not isinstance(given[0], int):
            raise BadRequest(f"input has more than {INPUTS_MAX} entries")
        dimensions = document.get("dimensions") or DIMENSIONS
        if type(dimensions) is not int or not 1 <= dimensions <= DIMENSIONS_MAX:
            raise BadRequest(f"dimensions must be between 1 and {DIMENSIONS_MAX}")
        return Job(model=model, prompt=prompt_bytes(given), document=document)

    def answer(self, job: Job, done: Generation) -> Any:
        """A `list` of `embedding`s."""
        given = job.document["input"]
        inputs = given if isinstance(given, list) and not isinstance(given[0], int) else [given]
        dimensions = job.document.get("dimensions") or DIMENSIONS
        is_base64 = job.document.get("encoding_format") == "base64"
        data = []
        for index, text in enumerate(inputs):
            vector: Any = vector_of(prompt_bytes(text), dimensions)
            if is_base64:
                vector = base64.b64encode(struct.pack(f"<{dimensions}f", *vector)).decode()
            data.append({"object": "embedding", "index": index, "embedding": vector})
        tokens = {"prompt_tokens": done.prompt_tokens, "total_tokens": done.prompt_tokens}
        return {"object": "list", "data": data, "model": job.model, "usage": tokens}


class Rerank:
    """`/v1/rerank`: SGLang's bare array or vLLM's object."""

    id_prefix = "score-"

    def __init__(self, is_bare: bool) -> None:
        self._is_bare = is_bare

    def job(self, document: dict[str, Any], model: str) -> Job:
        """What the body asks for: `query` and `documents`."""
        query, documents = document.get("query"), document.get("documents")
        if not isinstance(query, str) or not isinstance(documents, list) or not documents:
            raise BadRequest("query and documents are required")
        return Job(model=model, prompt=prompt_bytes([query, documents]), document=document)

    def answer(self, job: Job, done: Generation) -> Any:
        """Scores by shared words, best first for vLLM, in order of the documents for SGLang."""
        query = set(str(job.document["query"]).lower().split())
        rows = []
        for index, given in enumerate(job.document["documents"]):
            text = given if isinstance(given, str) else prompt_bytes(given).decode("utf-8", "replace")
            words = set(text.lower().split())
            score = len(query & words) / max(1, len(query)) + len(query & words) / (1e3 * max(1, len(words)))
            rows.append((round(score, 6), index, text))
        if self._is_bare:
            meta = {"id": job.id, "prompt_tokens": done.prompt_tokens}
            return [
                {"score": score, "document": text, "index": index, "meta_info": meta}
                for score, index, text in rows
            ]
        rows.sort(key=lambda row: (-row[0], row[1]))
        top = job.document.get("top_n")
        results = [
            {"index": index, "document": {"text": text}, "relevance_score": score}
            for score, index, text in rows[: top if type(top) is int and top > 0 else None]
        ]
        return {
            "id": job.id,
            "model": job.model,
            "usage": {"prompt_tokens": done.prompt_tokens, "total_tokens": done.prompt_tokens},
            "results": results,
        }


class Classify:
    """`/v1/classify`: two labels with probabilities that follow from the text."""

    id_prefix = "classify-"

    def job(self, document: dict[str, Any], model: str) -> Job:
        """What the body asks for: `input`, one text or several."""
        given = document.get("input")
        if not given or not isinstance(given, (str, list)):
            raise BadRequest("input must be a text or a list of texts")
        return Job(model=model, prompt=prompt_bytes(given), document=document)

    def answer(self, job: Job, done: Generation) -> Any:
        """A `list` of labels with their probabilities."""
        given = job.document["input"]
        data = []
        for index, text in enumerate(given if isinstance(given, list) else [given]):
            share = round(Random(xxhash.xxh3_64_intdigest(prompt_bytes(text))).random(), 6)
            probabilities = [1 - share, share]
            label = LABELS[share >= 0.5]
            data.append({"index": index, "label": label, "probs": probabilities, "num_classes": len(LABELS)})
        return {
            "id": job.id,
            "object": "list",
            "created": job.created,
            "model": job.model,
            "data": data,
            "usage": {"prompt_tokens": done.prompt_tokens, "total_tokens": done.prompt_tokens},
        }


class Transcriptions:
    """`/v1/audio/transcriptions`: words by the length of the upload."""

    id_prefix = "trsc-"

    def job(self, document: dict[str, Any], model: str) -> Job:
        """A job whose prompt is the upload itself (`document["file"]`, bytes)."""
        return Job(model=model, prompt=document["file"], output_tokens=8, document={})

    def answer(self, job: Job, done: Generation) -> Any:
        """The text."""
        seconds = max(1, len(job.prompt) // 16_000)
        return {"text": job.text(0, done.produced), "usage": {"type": "duration", "seconds": seconds}}


def vector_of(text: bytes, dimensions: int) -> list[float]:
    """A unit vector that follows from the text alone."""
    rng = Random(xxhash.xxh3_64_intdigest(text))
    numbers = [rng.gauss(0.0, 1.0) for _ in range(dimensions)]
    norm = sum(number * number for number in numbers) ** 0.5 or 1.0
    return [round(number / norm, 6) for number in numbers]


def _forced_call(job: Job) -> str:
    """The tool that the client forces the model to call, empty when it forces none."""
    choice, tools = job.document.get("tool_choice"), job.document.get("tools")
    if not isinstance(tools, list) or not tools:
        return ""
    if choice == "required":
        choice = tools[0]
    if not isinstance(choice, dict) or not isinstance(choice.get("function"), dict):
        return ""
    name = choice["function"].get("name")
    return name if isinstance(name, str) else ""


def _finish(job: Job, call: str = "") -> str:
    if call:
        return "tool_calls"
    return "length" if job.is_cut else "stop"
