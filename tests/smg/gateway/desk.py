"""What tests of plain handlers need: requests without a network, a registry with workers, engines that answer."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any, cast

import msgspec
import trio

from smg.errors import UpstreamError
from smg.fleet.breaker import Breaker, BreakerRules
from smg.fleet.health import Health, HealthRules
from smg.fleet.registry import Registry
from smg.fleet.worker import ModelCard, Status, Worker, WorkerSpec
from smg.gateway.routes import find
from smg.net.client import Fetched
from smg.net.exchange import Exchange
from smg.net.plain import Request, Response
from smg.wire.headers import split_target

Header = tuple[bytes, bytes]


class FakeHead:
    def __init__(self, method: str, target: str, headers: Sequence[Header]) -> None:
        self.method = method.encode()
        self.target = target.encode("latin-1")
        self.headers = list(headers)
        self.fields = dict(headers)


class FakeExchange:
    """The part of an exchange that a plain request reads."""

    peer = "192.0.2.1"
    request_id = "req-1"

    def __init__(self, head: FakeHead, body: bytes) -> None:
        self.head = head
        self._body = body

    async def read_body(self, bytes_max: int | None = None) -> bytes:
        assert bytes_max is None or len(self._body) <= bytes_max
        return self._body


def request(
    target: str, method: str = "GET", body: Any = b"", headers: Sequence[Header] = (), parameters: bool = True
) -> Request:
    """A request as the application makes it: with the parameters of its route."""
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    head = FakeHead(method, target, headers)
    path, query = split_target(head.target)
    found = find(path)
    return Request(cast(Exchange, FakeExchange(head, content)), path, query, found[1] if found else None)


def document(response: Response) -> Any:
    assert response.content_type == "application/json"
    return json.loads(response.body)


def registry(**aliases: str) -> Registry:
    return Registry(
        aliases=aliases,
        make_health=lambda spec: Health(HealthRules()),
        make_breaker=lambda spec: Breaker(BreakerRules()),
    )


def add(fleet: Registry, name: str, *models: str, status: Status = Status.READY, **spec: Any) -> Worker:
    """A worker `http://<name>:8000` with these models."""
    worker = fleet.add(WorkerSpec(f"http://{name}:8000", **spec), 0.0)
    if models:
        fleet.set_models(worker, tuple(ModelCard(model) for model in models))
    if status is not Status.PENDING:
        if status in (Status.NOT_READY,):
            fleet.set_status(worker, Status.READY, 0.0)
        fleet.set_status(worker, status, 0.0)
    return worker


Answer = tuple[int, bytes] | str | Callable[[str, bytes], tuple[int, bytes]]


class Engines:
    """A fake of `Client.fetch`: answers by (method, URL), and remembers what it was asked.

    An answer is (status, body), a kind of `UpstreamError`, the word `hang`, or a function of (method, body).
    """

    def __init__(self, answers: dict[str, Answer]) -> None:
        self.answers = answers
        self.asked: list[tuple[str, str, dict[str, str], bytes]] = []

    async def __call__(
        self,
        method: str,
        url: str,
        *,
        headers: Sequence[tuple[str, str]] = (),
        body: bytes = b"",
        bytes_max: int = 1 << 24,
    ) -> Fetched:
        self.asked.append((method, url, dict(headers), body))
        await trio.lowlevel.checkpoint()
        answer = self.answers.get(url, (404, b'{"error":"no such path"}'))
        if answer == "hang":
            await trio.sleep_forever()
        if isinstance(answer, str):
            raise UpstreamError(answer, "127.0.0.1:1 failed")
        status, content = answer(method, body) if callable(answer) else answer
        return Fetched(status, ((b"content-type", b"application/json"),), content, 0.001)


class Journal:
    """A log that is read by tests."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def info(self, message: str, /, **fields: object) -> None:
        self.lines.append(f"{message} {fields}")

    def warn(self, message: str, /, **fields: object) -> None:
        self.lines.append(f"{message} {fields}")


def encoded(value: Any) -> bytes:
    return msgspec.json.encode(value)
