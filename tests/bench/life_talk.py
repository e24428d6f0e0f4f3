"""Conversations without end: new ones begin at a steady pace, so that each stretch of time sees the same kind of traffic.

Owns the clients: one connection per request, a broken one is made again and the question asked again, and all of it is noted, with
the node that held each try. A conversation has the same shape as every other one and its own words. It must never hide a failure.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import httptools
import msgspec
import trio

from smg.lab.conversations import ConversationTraffic, conversations
from tests.bench.life_site import NotingBalancer

SYSTEM_TOKENS = 400
SHAPE = ConversationTraffic(
    conversations=1,
    arrivals_s=0.0,
    assistants=1,
    system_tokens=(SYSTEM_TOKENS, SYSTEM_TOKENS),
    opening_tokens=(1500, 1500),
    turns=(6, 6),
    turn_tokens=(200, 200),
    think_s=(0.8, 1.2),
    output_tokens=(12, 12),
)
LIFE_S = 10.0
"""Longer than one conversation takes: after this time as many end as begin."""
ASSISTANTS = 6
TRIES = 5
PAUSE_S = 0.05
PATIENCE_S = 20.0
KEPT = 64
"""Bodies of ended conversations that are kept to be asked about."""


@dataclass
class Ask:
    """One request; times of the clock of trio."""

    asked_s: float
    ended_s: float = 0.0
    node: str = ""
    """Who answered."""
    broken: list[tuple[str, float, str]] = field(default_factory=list)
    """Tries that broke: the node that held it, when, how."""
    problem: str = ""
    ttft_s: float = 0.0
    prompt: int = 0
    cached: int = 0
    cacheable: int = 0
    """Tokens of the prompt that some engine has computed before, as far as the conversation tells."""
    text: str = ""


class _Parsed:
    """Callbacks of the parser: an event stream as it comes."""

    def __init__(self, ask: Ask) -> None:
        self.parser = httptools.HttpResponseParser(self)
        self.is_whole = False
        self.is_done = False
        self.error = ""
        self.body = b""
        self._ask = ask
        self._rest = b""

    def on_body(self, data: bytes) -> None:
        self.body = (self.body + data)[:500]
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in lines:
            if line.startswith(b"data: [DONE]"):
                self.is_done = True
            elif line.startswith(b"data: "):
                self._event(json.loads(line[6:]))

    def on_message_complete(self) -> None:
        self.is_whole = True

    def problem(self) -> str:
        """Empty for a good answer."""
        status = self.parser.get_status_code()
        if status != 200:
            return f"status {status}: {self.body[:300]!r}"
        return self.error or ("" if self.is_done else "the stream ended early")

    def _event(self, event: dict[str, Any]) -> None:
        if "error" in event:
            self.error = f"failure frame: {event['error']}"
            return
        usage = event.get("usage")
        if usage:
            self._ask.prompt = usage["prompt_tokens"]
            self._ask.cached = usage["prompt_tokens_details"]["cached_tokens"]
        for choice in event["choices"]:
            text = choice["delta"].get("content") or ""
            if text and not self._ask.ttft_s:
                self._ask.ttft_s = trio.current_time() - self._ask.asked_s
            self._ask.text += text


class Talks:
    """The clients of a balancer on `port`; `name_of` tells a node by its address."""

    def __init__(
        self,
        port: int,
        balancer: NotingBalancer,
        name_of: Callable[[tuple[str, int] | None], str],
        per_s: float,
    ) -> None:
        self.asks: list[Ask] = []
        self.ended: deque[dict[str, Any]] = deque(maxlen=KEPT)
        """Last requests of conversations that are over."""
        self.recent: deque[tuple[str, dict[str, Any]]] = deque(maxlen=KEPT)
        """What was answered last: by which node, and the request."""
        self.open: set[int] = set()
        """Ports of the clients whose requests are in flight."""
        self.is_over = False
        self._port = port
        self._balancer = balancer
        self._name_of = name_of
        self._per_s = per_s
        self._systems = [conversations(SHAPE, -1 - number)[0].system for number in range(ASSISTANTS)]

    async def run(self) -> None:
        """Begins conversations until `is_over`; then those that are open end with the answer that they wait for."""
        began_s, number = trio.current_time(), 0
        async with trio.open_nursery() as nursery:
            while not self.is_over:
                nursery.start_soon(self._talk, number)
                number += 1
                await trio.sleep_until(began_s + number / self._per_s)

    def held_by(self, name: str) -> int:
        """Requests in flight that a node holds now."""
        return sum(self._name_of(self._balancer.holders.get(port)) == name for port in self.open)

    async def _talk(self, number: int) -> None:
        (made,) = conversations(SHAPE, number)
        messages = [{"role": "system", "content": self._systems[number % ASSISTANTS]}]
        cacheable, body = SYSTEM_TOKENS, {}
        for turn in made.turns:
            await trio.sleep(turn.think_s)
            if self.is_over:
                return
            messages.append({"role": "user", "content": turn.question})
            body = {
                "model": "sim", "messages": messages, "max_tokens": turn.output_tokens,
                "stream": True, "stream_options": {"include_usage": True},
            }  # fmt: skip
            ask = await self._ask(body)
            ask.cacheable = cacheable
            cacheable = ask.prompt
            if not ask.problem:
                self.recent.append((ask.node, {**body, "messages": [*messages]}))
            messages.append({"role": "assistant", "content": ask.text})
            ask.text = ""
        self.ended.append(body)

    async def _ask(self, body: dict[str, Any]) -> Ask:
        data = msgspec.json.encode(body)
        head = (
            f"POST /v1/chat/completions HTTP/1.1\r\nHost: gateway\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(data)}\r\nConnection: close\r\n\r\n"
        )
        ask = Ask(trio.current_time())
        self.asks.append(ask)
        for _ in range(TRIES):
            ask.problem, ask.text, ask.ttft_s = "no answer in time", "", 0.0
            is_over = True
            with trio.move_on_after(PATIENCE_S):
                is_over = await self._try(ask, head.encode() + data)
            if is_over:
                break
            await trio.sleep(PAUSE_S)
        ask.ended_s = trio.current_time()
        return ask

    async def _try(self, ask: Ask, request: bytes) -> bool:
        """False when the connection broke and the client must ask again."""
        parsed, port, is_broken = _Parsed(ask), 0, True
        try:
            async with await trio.open_tcp_stream("127.0.0.1", self._port) as stream:
                port = stream.socket.getsockname()[1]
                self.open.add(port)
                await stream.send_all(request)
                while not parsed.is_whole:
                    received = await stream.receive_some()
                    if not received:
                        raise OSError("closed before the answer ended")
                    parsed.parser.feed_data(received)
            ask.problem, is_broken = parsed.problem(), False
        except (OSError, trio.BrokenResourceError) as error:
            ask.problem = f"{error} ({error.__cause__})"
        finally:
            self.open.discard(port)
            ask.node = self._name_of(self._balancer.holders.pop(port, None))
        if is_broken:
            ask.broken.append((ask.node, trio.current_time(), ask.problem))
        return not is_broken


def between(asks: Sequence[Ask], begin_s: float, end_s: float) -> list[Ask]:
    """Good answers to what was asked in this time."""
    return [ask for ask in asks if begin_s <= ask.asked_s < end_s and ask.ended_s and not ask.problem]


def hit_ratio(asks: Sequence[Ask]) -> float:
    """Cached prompt tokens over prompt tokens."""
    return sum(ask.cached for ask in asks) / max(1, sum(ask.prompt for ask in asks))


def kept_ratio(asks: Sequence[Ask]) -> float:
    """Cached prompt tokens over those that were computed before: 1 is what perfect memory gives, whatever the mix of turns."""
    return sum(ask.cached for ask in asks) / max(1, sum(ask.cacheable for ask in asks))


def quantile(values: Sequence[float], share: float) -> float:
    """0 for no values."""
    ordered = sorted(values)
    return ordered[min(int(share * len(ordered)), len(ordered) - 1)] if ordered else 0.0
