"""Fakes for the services: workers that answer what a test says, and a log that remembers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from random import Random
from typing import Any

import trio

from smg.errors import UpstreamError
from smg.fleet.breaker import Breaker, BreakerRules
from smg.fleet.health import Health, health_rules
from smg.fleet.registry import Registry
from smg.fleet.worker import WorkerSpec
from smg.net.client import Fetched
from smg.settings import Health as HealthSettings
from smg.settings import Workers

URL = "http://w:1"


def make_registry(
    health: HealthSettings | None = None, workers: Workers | None = None, drain_timeout_s: float = 600.0
) -> Registry:
    """A registry with the machines of the command line's defaults."""

    def new_health(spec: WorkerSpec) -> Health:
        return Health(health_rules(health or HealthSettings(), workers or Workers(), spec.health))

    return Registry(
        aliases={},
        make_health=new_health,
        make_breaker=lambda spec: Breaker(BreakerRules()),
        drain_timeout_s=drain_timeout_s,
    )


class FakeWorker:
    """One server: path -> (status, body); `is_up` False refuses, `fault` raises, `hangs` names silent paths."""

    def __init__(self, **answers: Any) -> None:
        self.answers: dict[str, tuple[int, bytes]] = {"/health": (200, b"")}
        self.is_up = True
        self.fault = ""
        self.hangs: set[str] = set()
        self.delay_s = 0.0

    def says(self, path: str, document: Any, status: int = 200) -> FakeWorker:
        body = document if isinstance(document, bytes) else json.dumps(document).encode()
        self.answers[path] = (status, body)
        return self

    def models(self, *ids: str, owned_by: str = "x") -> FakeWorker:
        return self.says("/v1/models", {"data": [{"id": name, "owned_by": owned_by} for name in ids]})


class FakeNet:
    """Servers by base URL; its `fetch` stands for `Client.fetch`."""

    def __init__(self) -> None:
        self.workers: dict[str, FakeWorker] = {}
        self.asked: list[tuple[float, str, str]] = []  # time, base URL, path
        self.headers: list[dict[str, str]] = []
        self.open = self.open_most = 0
        self.open_by_url: dict[str, int] = {}

    def worker(self, url: str = URL) -> FakeWorker:
        return self.workers.setdefault(url, FakeWorker())

    def times(self, path: str, url: str = URL) -> list[float]:
        return [round(at, 6) for at, base, asked in self.asked if asked == path and base == url]

    async def fetch(
        self,
        method: str,
        url: str,
        *,
        headers: Sequence[tuple[str, str]] = (),
        body: bytes = b"",
        bytes_max: int = 1 << 30,
    ) -> Fetched:
        scheme, _, rest = url.partition("://")
        host, slash, path = rest.partition("/")
        base, path = f"{scheme}://{host}", slash + path
        self.asked.append((trio.current_time(), base, path))
        self.headers.append(dict(headers))
        worker = self.workers.get(base)
        if worker is None or not worker.is_up:
            raise UpstreamError(UpstreamError.REFUSED, "refused")
        self.open += 1
        self.open_most = max(self.open_most, self.open)
        try:
            if path in worker.hangs:
                await trio.sleep_forever()
            await trio.sleep(worker.delay_s)
            if worker.fault:
                raise UpstreamError(worker.fault, "ordered")
            status, answer = worker.answers.get(path, (404, b"{}"))
            return Fetched(status, (), answer, worker.delay_s)
        finally:
            self.open -= 1


class FakeLog:
    """Remembers lines as (level, message, fields)."""

    def __init__(self) -> None:
        self.lines: list[tuple[str, str, dict[str, object]]] = []

    def info(self, message: str, /, **fields: object) -> None:
        self.lines.append(("info", message, fields))

    def warn(self, message: str, /, **fields: object) -> None:
        self.lines.append(("warn", message, fields))


class MiddleRandom(Random):
    """No jitter: every draw is the middle."""

    def random(self) -> float:
        return 0.5
