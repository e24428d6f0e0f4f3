"""The clients of the demo: chats that grow turn by turn, asked over plain HTTP with the standard library.

Owns what a client sends and what it notes of an answer. A failure is noted, never raised, since counting failures is the point.
"""

from __future__ import annotations

import http.client
import json
import threading
import time
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

TIMEOUT_S = 60.0
SYSTEM = (
    "You are the patient voice of a railway company. Answer in one sentence, and name the platform. " * 12
)
"""A system prompt of usual length, the same in every chat: what an engine's cache is good for."""


@dataclass
class Chat:
    """One conversation: all that was said so far goes along with each question."""

    model: str
    topic: str
    messages: list[dict[str, str]] = field(default_factory=list)

    def ask(self) -> list[dict[str, str]]:
        """The messages of the next question."""
        if not self.messages:
            self.messages.append({"role": "system", "content": SYSTEM})
        question = (
            f"Question {len(self.messages)} about {self.topic}: when does the next train leave, and from where? "
            * 3
        )
        self.messages.append({"role": "user", "content": question})
        return self.messages

    def hear(self, text: str) -> None:
        """Keeps an answer, for the next question."""
        self.messages.append({"role": "assistant", "content": text})


@dataclass
class Answer:
    """What one request came to."""

    is_stream: bool
    problem: str = ""
    worker_id: str = ""
    text: str = ""
    first_token_s: float = 0.0
    prompt_tokens: int = 0
    cached_tokens: int = 0

    @property
    def is_good(self) -> bool:
        """True when the whole answer came."""
        return not self.problem

    def note_usage(self, usage: dict[str, Any] | None) -> None:
        """Takes over what the engine counted."""
        if usage:
            self.prompt_tokens = usage["prompt_tokens"]
            self.cached_tokens = usage["prompt_tokens_details"]["cached_tokens"]


class Client:
    """Asks one gateway; each thread has a connection of its own."""

    def __init__(self, url: str) -> None:
        self._host = urlsplit(url).netloc
        self._own = threading.local()

    def ask(self, chat: Chat, *, stream: bool) -> Answer:
        """One question and its answer, whatever became of it."""
        body: dict[str, Any] = {"model": chat.model, "messages": chat.ask(), "stream": stream}
        if stream:
            body["stream_options"] = {"include_usage": True}
        answer = Answer(stream)
        try:
            self._ask(json.dumps(body).encode(), answer)
        except (OSError, http.client.HTTPException, ValueError, KeyError) as error:
            answer.problem = f"{type(error).__name__}: {error}"
            self._own.connection = None
        chat.hear(answer.text)
        return answer

    def workers(self) -> list[dict[str, Any]]:
        """The workers as `GET /workers` tells them."""
        workers: list[dict[str, Any]] = self._get("/workers")["workers"]
        return workers

    def policy(self, model: str) -> str:
        """The policy that chooses among the workers of a model."""
        question = {"model": model, "messages": [{"role": "user", "content": "?"}]}
        connection = self._connection()
        connection.request(
            "POST", "/route/explain", json.dumps(question), {"Content-Type": "application/json"}
        )
        return str(json.loads(connection.getresponse().read())["policy"])

    def wait_until_ready(self, count: int) -> None:
        """Returns when so many workers are ready. Raises `TimeoutError`."""
        deadline = time.monotonic() + TIMEOUT_S
        while time.monotonic() < deadline:
            if sum(worker["status"] == "ready" for worker in self.workers()) >= count:
                return
            time.sleep(0.05)
        raise TimeoutError("the engines did not become ready")

    def _connection(self) -> http.client.HTTPConnection:
        connection: http.client.HTTPConnection | None = getattr(self._own, "connection", None)
        if connection is None:
            connection = self._own.connection = http.client.HTTPConnection(self._host, timeout=TIMEOUT_S)
        return connection

    def _get(self, path: str) -> dict[str, Any]:
        connection = self._connection()
        connection.request("GET", path)
        document: dict[str, Any] = json.loads(connection.getresponse().read())
        return document

    def _ask(self, body: bytes, answer: Answer) -> None:
        connection = self._connection()
        begin = time.monotonic()
        connection.request("POST", "/v1/chat/completions", body, {"Content-Type": "application/json"})
        response = connection.getresponse()
        answer.worker_id = response.headers.get("x-smg-worker-id", "")
        if response.status != 200:
            answer.problem = f"status {response.status}: {response.read()[:200].decode(errors='replace')}"
            return
        if answer.is_stream:
            _read_stream(response, answer, begin)
        else:
            document = json.loads(response.read())
            answer.text = document["choices"][0]["message"]["content"]
            answer.note_usage(document["usage"])


def _read_stream(response: http.client.HTTPResponse, answer: Answer, begin: float) -> None:
    is_whole = False
    for line in response:
        if not line.startswith(b"data: "):
            continue
        if line.strip() == b"data: [DONE]":
            is_whole = True
            continue
        event = json.loads(line[6:])
        if "error" in event:
            answer.problem = f"failure frame: {event['error']}"
            continue
        answer.note_usage(event.get("usage"))
        for choice in event["choices"]:
            text = choice["delta"].get("content") or ""
            if text and not answer.first_token_s:
                answer.first_token_s = time.monotonic() - begin
            answer.text += text
    if not is_whole and not answer.problem:
        answer.problem = "the stream ended early"
