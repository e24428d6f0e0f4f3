"""Calls that go to every worker, or to the first one, and what comes of them (contract section 16).

Owns flush, profile, loads, engine metrics and the relayed engine descriptions. Each worker is asked with its own key
only (UP-6), ranks of one worker are asked once at their base URL, and a worker that fails is part of the answer, never
an error of the whole. No key is ever shown, also not one that an engine tells of itself (WRK-14).
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from datetime import UTC, datetime
from typing import Any

import msgspec
import trio

from smg import __version__
from smg.api.checks import decode_object
from smg.errors import GatewayError, UpstreamError
from smg.fleet.engine_metrics import RankLoad
from smg.fleet.registry import Registry
from smg.fleet.worker import Engine, Status, Worker
from smg.gateway import problem
from smg.net.client import Fetched
from smg.net.plain import Request, Response, json_response
from smg.services.asking import Fetch, Heard, ask, worker_headers
from smg.wire.headers import value_of
from smg.wire.prometheus_merge import Merger, gauge

FLUSH_TIMEOUT_S = 45.0
"""OPS-1. An engine flushes when its running requests allow it."""
PROFILE_TIMEOUT_S = 60.0
"""Profilers write large traces before they answer."""
METRICS_TIMEOUT_S = 5.0
"""Below the 10 s that Prometheus waits for a scrape by default."""
INFO_TIMEOUT_S = 5.0
GENERATE_TIMEOUT_S = 20.0
"""`/health_generate` runs a token through the model, behind what is queued."""

CONCURRENT_MAX = 64
"""Workers asked at the same time, and so answers in memory."""
BODY_BYTES_MAX = 1 << 20
"""Options of a profiler are a few hundred bytes."""

_FLUSH_PATHS = {Engine.VLLM: "/reset_prefix_cache"}
_INFO_PATHS = {
    "get_server_info": ("/get_server_info", "/server_info"),
    "get_model_info": ("/get_model_info", "/model_info"),
    "health_generate": ("/health_generate",),
}
_SECRET_MEMBERS = frozenset(("api_key", "admin_api_key", "ssl_keyfile_password"))


class FanOut:
    """The endpoints `flush_cache`, `start_profile`, `stop_profile`, `get_loads`, `engine_metrics`, `health_generate`,
    `get_server_info` and `get_model_info`.

    `ask_loads` tells what a worker says of its load now (`LoadReports.ask_now`); empty: nothing usable.
    """

    def __init__(
        self, registry: Registry, fetch: Fetch, ask_loads: Callable[[Worker], Awaitable[list[RankLoad]]]
    ) -> None:
        self._registry = registry
        self._fetch = fetch
        self._ask_loads = ask_loads

    async def flush_cache(self, request: Request) -> Response:
        """Empties the KV cache of every worker; the gateway forgets what it knew of those that did (OPS-1)."""
        workers = self._registry.workers()
        heard = await self._ask_all(
            _by_base_url(workers), lambda worker: _FLUSH_PATHS.get(worker.engine or Engine.GENERIC, "/flush_cache"),
            FLUSH_TIMEOUT_S,
        )  # fmt: skip
        flushed = [url for url, answer in heard.items() if answer.is_ok]
        for worker in workers:
            if worker.base_url in flushed:
                self._registry.flushed(worker)
        counts = {"total_http_workers": len(heard), "total_workers": len(workers)}
        if len(flushed) == len(heard):
            message = f"Cache flushed on {len(flushed)} workers" if heard else "There is no worker to flush"
            return json_response(
                200, {"status": "success", "message": message, "workers_flushed": len(flushed), **counts}
            )
        return json_response(206, _partial(heard, FLUSH_TIMEOUT_S) | counts)

    async def start_profile(self, request: Request) -> Response:
        """Starts the profilers (OPS-3)."""
        return await self._profile(request, "/start_profile")

    async def stop_profile(self, request: Request) -> Response:
        """Stops the profilers (OPS-3)."""
        return await self._profile(request, "/stop_profile")

    async def get_loads(self, request: Request) -> Response:
        """What every worker says of its load at this moment, with a sum over all (OPS-2)."""
        workers = self._registry.workers()
        told: dict[str, list[RankLoad]] = {}

        async def one(worker: Worker) -> None:
            told[worker.id] = await self._ask_loads(worker)

        await _each(workers, one)
        rows: list[dict[str, Any]] = []
        for worker in workers:
            rows += _load_rows(worker, told.get(worker.id, []))
        ranks = [rank for worker in workers for rank in told.get(worker.id, [])]
        return json_response(
            200,
            {
                "timestamp": datetime.now(UTC).isoformat(),
                "version": __version__,
                "dp_rank_count": len(ranks),
                "loads": rows,
                "aggregate": _aggregate(ranks),
            },
        )

    async def engine_metrics(self, request: Request) -> Response:
        """The metrics of all engines as one page (OPS-7). Raises `GatewayError` 503 without workers."""
        workers = _by_base_url(self._registry.workers())
        if not workers:
            raise problem.no_available_workers("There is no worker to ask for metrics")
        heard = await self._ask_all(workers, lambda worker: "/metrics", METRICS_TIMEOUT_S)
        merger = Merger("worker_addr")
        is_up: dict[str, int] = {}
        for worker in workers:
            answer = heard[worker.base_url]
            is_up[worker.base_url] = int(answer.is_ok and merger.add(worker.base_url, answer.body))
            await trio.lowlevel.checkpoint()  # a page of a large engine takes milliseconds
        up = gauge("smg_engine_scrape_up", "Whether the worker gave metrics.", "worker_addr", is_up)
        return Response(200, up + merger.render(), "text/plain; version=0.0.4; charset=utf-8")

    async def health_generate(self, request: Request) -> Response:
        """Relayed from the first ready worker, `?model=` selects (OPS-8). Raises `GatewayError` 502, 503, 504."""
        return await self._relay_first(request, "health_generate", GENERATE_TIMEOUT_S)

    async def get_server_info(self, request: Request) -> Response:
        """As `health_generate`, without keys that the engine tells of."""
        return await self._relay_first(request, "get_server_info", INFO_TIMEOUT_S)

    async def get_model_info(self, request: Request) -> Response:
        """As `health_generate`, without keys that the engine tells of."""
        return await self._relay_first(request, "get_model_info", INFO_TIMEOUT_S)

    async def _profile(self, request: Request, path: str) -> Response:
        body = await request.body(BODY_BYTES_MAX)
        options = decode_object(body) if body.strip() else {}
        url = options.pop("url", None) or request.params.get("url")
        if url is not None and not isinstance(url, str):
            raise GatewayError(400, "invalid_type", "`url` must be a string", param="url")
        workers = _by_base_url(self._registry.workers())
        if url is not None:
            wanted = url.rstrip("/").lower()
            workers = [worker for worker in workers if worker.base_url.lower() == wanted]
        if not workers:
            raise GatewayError(404, "WORKER_NOT_FOUND", "No worker matches", param="url")
        sent = msgspec.json.encode(options) if options else b""
        heard = await self._ask_all(workers, lambda worker: path, PROFILE_TIMEOUT_S, sent)
        answer = _partial(heard, PROFILE_TIMEOUT_S)
        if not answer["failed"]:
            return json_response(200, answer | {"status": "success"})
        return json_response(206, answer)

    async def _ask_all(
        self,
        workers: Sequence[Worker],
        path_of: Callable[[Worker], str],
        within_s: float,
        body: bytes | None = None,
    ) -> dict[str, Heard]:
        """The answer of each base URL, in the order of `workers`. `/metrics` is got, everything else posted."""
        heard: dict[str, Heard] = {worker.base_url: Heard(0) for worker in workers}

        async def one(worker: Worker) -> None:
            path = path_of(worker)
            method = "GET" if path == "/metrics" else "POST"
            heard[worker.base_url] = await ask(
                self._fetch, worker, path, within_s, method=method, body=body or b""
            )

        await _each(workers, one)
        return heard

    async def _relay_first(self, request: Request, name: str, within_s: float) -> Response:
        worker = self._first_ready(request.params.get("model"))
        fetched: Fetched | None = None
        for path in _INFO_PATHS[name]:
            fetched = await self._get(worker, path, within_s)
            if fetched.status not in (404, 405):
                break  # engines know the one path or the other
        assert fetched is not None
        content_type = value_of(fetched.headers, b"content-type") or b"application/octet-stream"
        body = fetched.body if name == "health_generate" else without_keys(fetched.body, worker.spec.api_key)
        return Response(
            fetched.status,
            body,
            content_type.decode("latin-1"),
            [("x-smg-worker-id", worker.id)],
        )

    async def _get(self, worker: Worker, path: str, within_s: float) -> Fetched:
        try:
            with trio.fail_after(within_s):
                return await self._fetch("GET", worker.base_url + path, headers=worker_headers(worker))
        except UpstreamError as error:
            raise problem.of_upstream(error) from None
        except trio.TooSlowError:
            raise problem.upstream_timeout() from None

    def _first_ready(self, model: str | None) -> Worker:
        wanted = self._registry.resolve(model) if model else None
        for worker in self._registry.workers():
            if worker.status is Status.READY and (
                wanted is None or wanted in worker.models or not worker.models
            ):
                return worker
        raise problem.no_available_workers()


def without_keys(body: bytes, key: str | None) -> bytes:
    """An engine's description of itself without secrets: engines print their start arguments, keys included (WRK-14).

    Unchanged when there is none in it, or when it is no JSON and does not hold `key`; else JSON with `***` in place.
    """
    try:
        document = msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return body.replace(key.encode(), b"***") if key else body
    cleaned, is_changed = _cleaned(document, key)
    return msgspec.json.encode(cleaned) if is_changed else body


def _cleaned(node: Any, key: str | None) -> tuple[Any, bool]:
    if isinstance(node, str):
        if key and key in node:
            return node.replace(key, "***"), True
        return node, False
    is_changed = False
    if isinstance(node, dict):
        cleaned = {}
        for name, value in node.items():
            if name in _SECRET_MEMBERS and value is not None:
                cleaned[name], changed = "***", True
            else:
                cleaned[name], changed = _cleaned(value, key)
            is_changed = is_changed or changed
        return cleaned, is_changed
    if isinstance(node, list):
        pairs = [_cleaned(value, key) for value in node]
        return [value for value, _ in pairs], any(changed for _, changed in pairs)
    return node, False


async def _each(workers: Sequence[Worker], call: Callable[[Worker], Awaitable[None]]) -> None:
    """Calls `call` for every worker, a bounded number at a time; ends when all have ended."""
    limit = trio.CapacityLimiter(CONCURRENT_MAX)

    async def one(worker: Worker) -> None:
        async with limit:
            await call(worker)

    async with trio.open_nursery() as nursery:
        for worker in workers:
            nursery.start_soon(one, worker)


def _by_base_url(workers: Sequence[Worker]) -> list[Worker]:
    """One worker per base URL, in order: the ranks of a worker share its server."""
    return list({worker.base_url: worker for worker in reversed(workers)}.values())[::-1]


def _partial(heard: dict[str, Heard], within_s: float) -> dict[str, Any]:
    successful = [url for url, answer in heard.items() if answer.is_ok]
    failed = [
        {"worker": url, "error": answer.reason(within_s)} for url, answer in heard.items() if not answer.is_ok
    ]
    return {
        "status": "partial_success",
        "message": f"{len(successful)} of {len(heard)} workers did it",
        "successful": successful,
        "failed": failed,
    }


def _load_rows(worker: Worker, ranks: list[RankLoad]) -> list[dict[str, Any]]:
    about = {"worker": worker.url, "worker_type": worker.kind.value}
    if not ranks:
        row = {**about, "dp_rank": worker.spec.dp_rank or 0, "error": "the worker told no load"}
        return [{**row, "in_flight": worker.in_flight}]
    return [{**about, **msgspec.structs.asdict(rank), "in_flight": worker.in_flight} for rank in ranks]


def _aggregate(ranks: list[RankLoad]) -> dict[str, Any]:
    running = sum(rank.num_running_reqs or 0 for rank in ranks)
    waiting = sum(rank.num_waiting_reqs or 0 for rank in ranks)
    return {
        "total_running_reqs": running,
        "total_waiting_reqs": waiting,
        "total_reqs": running + waiting,
        "avg_token_usage": _mean([rank.token_usage for rank in ranks]),
        "avg_throughput": _mean([rank.gen_throughput for rank in ranks]),
        "avg_utilization": _mean([rank.utilization for rank in ranks]),
    }


def _mean(values: list[float | None]) -> float:
    told = [value for value in values if value is not None]
    return sum(told) / len(told) if told else 0.0
