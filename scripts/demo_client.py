"""The clients of the demo: people who talk through a load balancer, over plain HTTP, and notice when an answer breaks.

Owns what a client sends, what it notes of an answer, and its patience: a connection that breaks is made again and the
question asked again. Every request has a connection of its own, so that the balancer deals out requests. Times are the
client's: from the first try to the first word that came to stay. A failure is noted, never raised.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import httptools
import trio

from smg.lab.conversations import Conversation

TRIES = 5
PAUSE_S = 0.05
PATIENCE_S = 30.0
"""A request that takes longer has failed."""


@dataclass
class Answer:
    """What one request came to; times in seconds, `asked_s` since the run began."""

    asked_s: float
    reconnects: int = 0
    problem: str = ""
    text: str = ""
    ttft_s: float = 0.0
    prompt_tokens: int = 0
    cached_tokens: int = 0


@dataclass
class Run:
    """All answers of one run of the trace, in the order in which they came; `total` requests will be asked."""

    total: int
    began_s: float = 0.0
    answers: list[Answer] = field(default_factory=list)
    latest: dict[str, Any] = field(default_factory=dict)
    """The body that was answered last."""
    changed: trio.Event = field(default_factory=trio.Event)

    def note(self, answer: Answer) -> None:
        """Keeps an answer and wakes those who count."""
        self.answers.append(answer)
        self.changed.set()
        self.changed = trio.Event()

    async def wait_answers(self, share: float) -> None:
        """Returns when this share of all requests is answered."""
        while len(self.answers) < share * self.total:
            await self.changed.wait()


class _Lost(Exception):
    """The connection broke before the answer was whole."""


async def replay(trace: Sequence[Conversation], run: Run, port: int, model: str) -> None:
    """Holds all conversations through the balancer on `port`; answers are noted in `run` as they come."""
    run.began_s = trio.current_time()
    async with trio.open_nursery() as nursery:
        for conversation in trace:
            nursery.start_soon(_converse, conversation, run, port, model)


async def _converse(talk: Conversation, run: Run, port: int, model: str) -> None:
    await trio.sleep(talk.at_s)
    messages = [{"role": "system", "content": talk.system}]
    for turn in talk.turns:
        await trio.sleep(turn.think_s)
        messages.append({"role": "user", "content": turn.question})
        body = {
            "model": model, "messages": messages, "max_tokens": turn.output_tokens,
            "stream": True, "stream_options": {"include_usage": True},
        }  # fmt: skip
        answer = await ask(port, body, run.began_s)
        messages.append({"role": "assistant", "content": answer.text})
        run.latest = body
        run.note(answer)


async def ask(port: int, body: dict[str, Any], began_s: float) -> Answer:
    """One question and its answer, over as many connections as it takes."""
    data = json.dumps(body).encode()
    asked_s = trio.current_time()
    answer = Answer(asked_s - began_s)
    for attempt in range(TRIES):
        answer.reconnects = attempt
        stream = Stream(asked_s)
        with trio.move_on_after(PATIENCE_S) as scope:
            try:
                await exchange(port, request(port, "POST", "/v1/chat/completions", data), stream)
                stream.check()
            except (_Lost, OSError, trio.BrokenResourceError) as error:
                answer.problem = f"{type(error).__name__}: {error}"
                await trio.sleep(PAUSE_S)
                continue
        answer.problem = "no answer in time" if scope.cancelled_caught else stream.problem
        break
    answer.text, answer.ttft_s = stream.text, stream.first_s
    answer.prompt_tokens, answer.cached_tokens = stream.prompt_tokens, stream.cached_tokens
    return answer


async def fetch(port: int, method: str, path: str, body: bytes = b"") -> tuple[int, bytes]:
    """Status and body of a small request. Raises OSError."""
    stream = Stream(0.0)
    try:
        await exchange(port, request(port, method, path, body), stream)
    except (_Lost, trio.BrokenResourceError) as error:
        raise OSError(str(error)) from None
    return stream.status, b"".join(stream.body)


def request(port: int, method: str, path: str, body: bytes = b"") -> bytes:
    """The bytes of a request that wants its connection closed afterwards."""
    head = (
        f"{method} {path} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    )
    return head.encode() + body


async def exchange(port: int, data: bytes, stream: Stream) -> None:
    """Sends a request and feeds its answer to `stream`. Raises OSError, `BrokenResourceError` and `_Lost`."""
    parser = httptools.HttpResponseParser(stream)
    stream.parser = parser
    async with await trio.open_tcp_stream("127.0.0.1", port) as connection:
        await connection.send_all(data)
        while not stream.is_whole:
            received = await connection.receive_some()
            if not received:
                raise _Lost("the connection was closed before the answer ended")
            try:
                parser.feed_data(received)
            except httptools.HttpParserError as error:
                raise _Lost(str(error)) from None


class Stream:
    """Callbacks of the parser: an answer as it comes, whether it is a stream of events or a document."""

    def __init__(self, asked_s: float) -> None:
        self.parser: Any = None
        self.status = 0
        self.is_whole = False
        self.body: list[bytes] = []
        self.text = ""
        self.first_s = 0.0
        self.prompt_tokens = 0
        self.cached_tokens = 0
        self.problem = ""
        self._is_done = False
        self._asked_s = asked_s
        self._rest = b""

    def on_body(self, data: bytes) -> None:
        self.body.append(data)
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in lines:
            if line.startswith(b"data: "):
                self._event(line[6:].strip())

    def on_message_complete(self) -> None:
        self.status = self.parser.get_status_code()
        self.is_whole = True

    def check(self) -> None:
        """Fills `problem` when this was no good answer. Raises `_Lost` when a node says that its own part broke."""
        if self.status != 200:
            self.problem = f"status {self.status}: {b''.join(self.body)[:200].decode(errors='replace')}"
        elif not self._is_done:
            self.problem = self.problem or "the stream ended early"

    def _event(self, data: bytes) -> None:
        if data == b"[DONE]":
            self._is_done = True
            return
        event = json.loads(data)
        if "error" in event:
            self.problem = f"failure frame: {event['error']}"
            return
        usage = event.get("usage")
        if usage:
            self.prompt_tokens = usage["prompt_tokens"]
            self.cached_tokens = usage["prompt_tokens_details"]["cached_tokens"]
        for choice in event["choices"]:
            text = choice["delta"].get("content") or ""
            if text and not self.first_s:
                self.first_s = trio.current_time() - self._asked_s
            self.text += text
