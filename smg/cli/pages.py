"""The metrics port and the probe port of `--processes`: one page for all processes, whichever of them answers.

Owns the asking: every process that serves is asked at once, over a port of the loopback that only the supervisor knows, and
whoever does not answer in time is left out; what its counters were is not forgotten. The rule of adding is `wire`'s
(`prometheus_sum`). It must never wait for a process that hangs, nor say `ready` while none is.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Sequence
from random import Random

import msgspec
import trio

from smg.cli.members import LOOPBACK
from smg.cli.relayed import no_page, relayed
from smg.errors import GatewayError, UpstreamError
from smg.gateway import problem
from smg.net.client import Client, Fetched
from smg.net.exchange import Exchange, ServerLimits
from smg.net.plain import (
    PlainHandler,
    Request,
    Response,
    StreamResponse,
    json_response,
    plain,
    text_response,
)
from smg.net.pool import ConnectionPool
from smg.net.readiness import Readiness
from smg.net.server import Server
from smg.telemetry.catalog import SUMMED_GAUGES
from smg.telemetry.log import Logger
from smg.telemetry.metrics import CONTENT_TYPE, Metrics
from smg.wire.headers import new_request_id
from smg.wire.prometheus_sum import Totals

METRICS_PATIENCE_S = 2.0
"""A process renders its page in milliseconds; Prometheus itself waits 10 s."""
PROBE_PATIENCE_S = 0.5
"""Load balancers wait a second or two for a probe."""
SUPERVISOR = "supervisor"
"""How the supervisor calls itself in the label `process`."""


class Source(msgspec.Struct, frozen=True):
    """One process: its name in the label, and where its own two pages are on the loopback."""

    name: str
    metrics_port: int
    health_port: int


class Pages:
    """See the module. `is_ready(name)`: whether a process serves, so that it can be asked."""

    def __init__(
        self,
        sources: Sequence[Source],
        readiness: Readiness,
        rng: Random,
        *,
        is_ready: Callable[[str], bool],
        is_draining: Callable[[], bool],
        log: Logger,
    ) -> None:
        self._sources = sources
        self._readiness = readiness
        self._rng = rng
        self._is_ready = is_ready
        self._is_draining = is_draining
        self._log = log
        pool = ConnectionPool(readiness, idle_timeout_s=60.0, connect_timeout_s=METRICS_PATIENCE_S)
        self._client = Client(readiness, pool)
        self._totals = Totals(SUMMED_GAUGES)
        self._answered: set[str] = set()
        self._metrics = Metrics()
        for source in sources:
            self._metrics.counter("smg_process_restarts_total", process=source.name)
        self._metrics.add_source(self._samples)

    def ended(self, name: str) -> None:
        """A process has ended; what it had counted stays counted."""
        self._totals.end(name)

    def count_restart(self, name: str) -> None:
        """A process is started again."""
        self._metrics.counter("smg_process_restarts_total", process=name).add()

    def metrics_server(self) -> Server:
        """`GET /metrics`, and the page `/ui` of one of the processes."""
        return self._server(self._metrics_or_page)

    def probe_server(self) -> Server:
        """The three probes and nothing else (LIFE-4)."""
        return self._server(self.probe)

    async def _metrics_or_page(self, request: Request) -> Response | StreamResponse:
        if not request.path.startswith("/ui"):
            return await self.metrics(request)
        for source in self._sources:
            if self._is_ready(source.name):
                return await relayed(LOOPBACK, source.metrics_port, request)
        raise no_page()

    async def metrics(self, request: Request) -> Response:
        """The page of all processes and of the supervisor itself. Raises `GatewayError` 404 and 405."""
        _check(request, ("/metrics",))
        lives = {source.name: self._totals.life(source.name) for source in self._sources}
        found = await self._ask("metrics", METRICS_PATIENCE_S)
        self._answered = {
            name
            for name, fetched in found.items()
            if fetched.status == 200 and self._totals.take(name, lives[name], fetched.body)
        }
        own = await self._metrics.render_text()
        self._totals.take(SUPERVISOR, 0, own)
        return Response(200, self._totals.render({*self._answered, SUPERVISOR}), CONTENT_TYPE)

    async def probe(self, request: Request) -> Response:
        """Liveness is the supervisor's own; ready is the port when one of the processes is (LIFE-1, LIFE-2).

        Raises `GatewayError` 404 and 405.
        """
        _check(request, ("/liveness", "/health", "/readiness"))
        if request.path != "/readiness":
            return text_response(200, "OK")
        reason = "draining"
        if not self._is_draining():
            found = await self._ask("readiness", PROBE_PATIENCE_S)
            for fetched in sorted(found.values(), key=lambda fetched: fetched.status):
                return Response(fetched.status, fetched.body)
            reason = "insufficient healthy workers"
        return json_response(503, {"status": "not ready", "reason": reason})

    async def _ask(self, page: str, patience_s: float) -> dict[str, Fetched]:
        """The answers of all processes that serve and answer in time."""
        found: dict[str, Fetched] = {}

        async def ask(source: Source) -> None:
            port = source.metrics_port if page == "metrics" else source.health_port
            try:
                found[source.name] = await self._client.fetch("GET", f"http://{LOOPBACK}:{port}/{page}")
            except UpstreamError as error:
                self._log.debug("a process was not asked", process=source.name, error=str(error))

        with trio.move_on_after(patience_s):
            async with trio.open_nursery() as nursery:
                for source in self._sources:
                    if self._is_ready(source.name):
                        nursery.start_soon(ask, source)
        return found

    def _samples(self) -> Iterable[tuple[str, tuple[str, ...], float]]:
        for source in self._sources:
            yield "smg_process_up", (source.name,), float(source.name in self._answered)

    def _server(self, handler: PlainHandler) -> Server:
        serve = plain(handler)

        def handle(exchange: Exchange) -> Awaitable[None]:
            exchange.request_id = new_request_id("req-", self._rng)
            return serve(exchange)

        return Server(
            handle, self._refuse, self._report, self._readiness, ServerLimits(payload_bytes_max=65536)
        )

    async def _refuse(self, exchange: Exchange, error: GatewayError) -> None:
        exchange.request_id = exchange.request_id or new_request_id("req-", self._rng)
        status, block, body = problem.render(error, problem.OPENAI, exchange.request_id)
        await exchange.respond(status, block, body)

    def _report(self, exchange: Exchange, error: BaseException) -> None:
        self._log.exception("a page failed by a fault of the supervisor", error=error)


def _check(request: Request, paths: Sequence[str]) -> None:
    if request.path not in paths:
        raise problem.unknown_url(request.method, request.path)
    if request.method not in ("GET", "HEAD"):
        raise problem.method_not_allowed(request.method, request.path, "GET, HEAD")
