"""The contract of an API face of the simulated engine, and the words that all faces share.

A face turns a decoded body into a `Job` (prompt, length), and a `Generation` into a document or a stream. It decides
how things look, never how long they take. Faces: `openai_face`, `anthropic_face`, `responses_face`, `engine_face`.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any, Protocol, runtime_checkable

import msgspec

from smg.lab.simulated import BYTES_PER_TOKEN, Generation

OUTPUT_TOKENS_MAX = 1 << 20
"""Longest answer; a wish for more is a mistake and would only fill memory."""
CHOICES_MAX = 16
"""Most choices (`n`) of one answer."""

_TEXT = (
    "the a one this of to in on for with and or so then now here some more new old small long clear "
    "river stone light road house garden morning letter window table bridge forest winter number "
    "goes stands turns keeps finds takes shows brings opens follows carries begins ends"
)
_WORDS = _TEXT.split()


Send = Callable[[bytes], Awaitable[None]]


class BadRequest(Exception):
    """The body cannot be served: 400, or `status`; `str(error)` is the message."""

    def __init__(self, message: str, status: int = 400) -> None:
        super().__init__(message)
        self.status = status


class Job(msgspec.Struct, kw_only=True):
    """One inference request as the engine needs it.

    `variant` chooses the words: a hash of the prompt. `output_tokens` is how many will come, `is_cut` whether the client's limit ended it (`finish_reason` length).
    `choices` is `n`. `created` are seconds since 1970.
    """

    model: str
    prompt: bytes
    variant: int = 0
    output_tokens: int = 1
    is_cut: bool = False
    is_stream: bool = False
    has_stream_usage: bool = False
    choices: int = 1
    created: int = 0
    id: str = ""
    document: dict[str, Any] = {}

    def text(self, start: int, end: int) -> str:
        """The words of tokens `start` to `end`; the same prompt always gets the same words."""
        return "".join(self.token(number) for number in range(start, end))

    def token(self, number: int) -> str:
        """One token of the answer; all but the first begin with a space, so that they add up to text."""
        word = _WORDS[(self.variant + number * number * 3 + number) % len(_WORDS)]
        return word if number == 0 else " " + word


class Face(Protocol):
    """One inference endpoint."""

    id_prefix: str
    """Beginning of the ids of its answers."""

    def job(self, document: dict[str, Any], model: str) -> Job:
        """What the body asks for. Raises `BadRequest`."""
        ...

    def answer(self, job: Job, done: Generation) -> Any:
        """The document of a whole answer."""
        ...


@runtime_checkable
class StreamFace(Face, Protocol):
    """An endpoint that can also stream."""

    async def stream(self, job: Job, generation: Generation, send: Send) -> None:
        """Sends the stream's events as tokens leave; every `send` is one complete event."""
        ...


def output_length(document: dict[str, Any], members: tuple[str, ...], default: int) -> tuple[int, bool]:
    """(tokens that come, whether the client's limit cuts them): the engine's own length, cut at the client's limit;

    with `ignore_eos`, as load generators send it, exactly the limit.
    """
    limit = None
    for member in members:
        value = document.get(member)
        if value is not None:
            if type(value) is not int or value < 1:
                raise BadRequest(f"{member} must be at least 1")
            limit = min(value, OUTPUT_TOKENS_MAX)
            break
    if limit is None:
        return default, False
    if document.get("ignore_eos") is True:
        return limit, True
    return min(limit, default), limit < default


def prompt_bytes(value: Any) -> bytes:
    """The bytes that count and are cached: text, token ids, content parts, messages with their roles, in order."""
    pieces: list[bytes] = []
    _collect(value, pieces)
    return b"".join(pieces)


def event(document: Any, name: str = "") -> bytes:
    """One server-sent event."""
    head = f"event: {name}\n".encode() if name else b""
    return head + b"data: " + msgspec.json.encode(document) + b"\n\n"


def _collect(value: Any, pieces: list[bytes]) -> None:
    if isinstance(value, str):
        pieces.append(value.encode("utf-8", "surrogatepass"))
    elif type(value) is int:
        pieces.append((value % 2**32).to_bytes(BYTES_PER_TOKEN, "big"))
    elif isinstance(value, list):
        for part in value:
            _collect(part, pieces)
    elif isinstance(value, dict):
        role = value.get("role")
        if isinstance(role, str):
            pieces.append(f"<|{role}|>".encode("utf-8", "surrogatepass"))
        for member in ("content", "text", "input", "output", "arguments"):
            if member in value:
                _collect(value[member], pieces)
        for url in ("image_url", "url"):
            _collect(value.get(url), pieces)
