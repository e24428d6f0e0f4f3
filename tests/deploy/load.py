"""Clients that ask without pause through a load balancer, and the list of what became of each request.

Owns an HTTP client that forgives nothing: a status other than 200, a cut body, a stream without its end, a connection that
closes where an answer should be, each is a failure. It never asks twice, as an SDK would, because that would hide what it looks for.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

import httptools
import trio

PATIENCE_S = 15.0
"""Longer than a handshake that had to be repeated and a generation together; a hang counts as a failure."""

STREAM_EVERY = 2
"""Every second request is a stream: they live longest and have the most to lose."""


TOKENS_MAX = 24
"""Answers take up to 0.3 s, and all lengths below, so that every moment has some that begin and some that end."""


class Failed(Exception):
    """A request that did not get its whole answer."""


@dataclass
class Outcome:
    """What became of one request; times are of the clock of trio."""

    name: str
    started_s: float
    ended_s: float = 0.0
    failure: str = ""
    arrivals_s: list[float] = field(default_factory=list)
    """When pieces of the body came in."""


class Answer:
    """Collects one answer from the parser."""

    def __init__(self) -> None:
        self.status = 0
        self.headers: dict[str, str] = {}
        self.body = b""
        self.is_whole = False
        self.parser = httptools.HttpResponseParser(self)

    def on_header(self, name: bytes, value: bytes) -> None:
        self.headers[name.decode().lower()] = value.decode()

    def on_headers_complete(self) -> None:
        self.status = self.parser.get_status_code()

    def on_body(self, data: bytes) -> None:
        self.body += data

    def on_message_complete(self) -> None:
        self.is_whole = True


class Browser:
    """One client: a connection that is kept as long as the other side keeps it."""

    def __init__(self, host: str, port: int) -> None:
        self._address = (host, port)
        self._stream: trio.SocketStream | None = None

    async def ask(
        self, method: str, path: str, document: Any = None, arrivals_s: list[float] | None = None
    ) -> Answer:
        """The whole answer. Raises `Failed`."""
        body = b"" if document is None else json.dumps(document).encode()
        head = f"{method} {path} HTTP/1.1\r\nhost: gateway\r\ncontent-type: application/json\r\n"
        answer = Answer()
        try:
            if self._stream is None:
                self._stream = await trio.open_tcp_stream(*self._address)
            await self._stream.send_all(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)
            while not answer.is_whole:
                data = await self._stream.receive_some()
                if not data:
                    raise Failed(f"closed after status {answer.status} and {len(answer.body)} bytes")
                answer.parser.feed_data(data)
                if arrivals_s is not None and answer.body:
                    arrivals_s.append(trio.current_time())
        except OSError as error:
            self.leave()
            raise Failed(f"{error} after status {answer.status}") from error
        except (trio.BrokenResourceError, Failed) as error:
            self.leave()
            raise Failed(f"{error or 'reset'} after status {answer.status}") from error
        if answer.headers.get("connection", "").lower() == "close":
            self.leave()
        return answer

    def leave(self) -> None:
        """Closes; the next request opens anew."""
        if self._stream is not None:
            self._stream.socket.close()
            self._stream = None


class Load:
    """Closed loops of clients, each with one request in flight."""

    def __init__(self) -> None:
        self.outcomes: list[Outcome] = []
        self.running: set[str] = set()
        self.is_over = False
        self._count = 0

    async def run(self, balancer: str, port: int, clients: int) -> None:
        """Asks until `is_over`, and then ends what is in flight."""
        async with trio.open_nursery() as nursery:
            for _ in range(clients):
                nursery.start_soon(self._client, balancer, Browser("127.0.0.1", port))

    async def _client(self, balancer: str, browser: Browser) -> None:
        while not self.is_over:
            self._count += 1
            outcome = Outcome(f"{balancer} {self._count}", trio.current_time())
            self.running.add(outcome.name)
            with trio.move_on_after(PATIENCE_S) as patience:
                outcome.failure = await self._ask(browser, outcome, is_stream=self._count % STREAM_EVERY == 0)
            if patience.cancelled_caught:
                outcome.failure = "nothing came"
                browser.leave()
            outcome.ended_s = trio.current_time()
            self.running.discard(outcome.name)
            self.outcomes.append(outcome)
            if outcome.failure:
                await trio.sleep(0.1)  # a client that fails at once must not become a storm
        browser.leave()

    async def _ask(self, browser: Browser, outcome: Outcome, *, is_stream: bool) -> str:
        """Empty, or what went wrong."""
        try:
            answer = await browser.ask(
                "POST",
                "/v1/chat/completions",
                question(outcome.name, is_stream=is_stream, tokens=1 + self._count * 7 % TOKENS_MAX),
                outcome.arrivals_s,
            )
        except Failed as failed:
            return str(failed)
        if answer.status != 200:
            return f"status {answer.status}: {answer.body[:200]!r}"
        if is_stream and not answer.body.rstrip().endswith(b"data: [DONE]"):
            return f"a stream without its end: {answer.body[-200:]!r}"
        return ""

    @property
    def failures(self) -> list[Outcome]:
        return [outcome for outcome in self.outcomes if outcome.failure]


def question(text: str, *, is_stream: bool, tokens: int = 32) -> dict[str, Any]:
    """A chat request for so many tokens."""
    messages = [{"role": "user", "content": text}]
    return {
        "model": "sim",
        "messages": messages,
        "stream": is_stream,
        "max_tokens": tokens,
        "ignore_eos": True,
    }
