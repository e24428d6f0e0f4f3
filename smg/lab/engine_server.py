"""HTTP around one simulated engine: its routes, its key, its faults on order.

Owns the table of paths per flavour and the life of an inference request: body, job, generation, answer. A client
that leaves takes its generation out of the engine, whatever it was waiting for. How documents look is the faces'
business, when tokens leave the model's.
"""

from __future__ import annotations

import hmac
import time
from collections.abc import Awaitable, Callable
from random import Random
from typing import Any

import msgspec
import trio
import xxhash

from smg.errors import ClientGone, GatewayError
from smg.lab.anthropic_face import Messages, count_answer
from smg.lab.engine_face import VERSION, Generate, get_load, loads, metrics, model_info, server_info
from smg.lab.engine_model import EngineFull
from smg.lab.face import BadRequest, Face, Job, Send, StreamFace
from smg.lab.faults import NO_FAULTS, FaultBox, Faults
from smg.lab.openai_face import Chat, Classify, Completions, Embeddings, Rerank, Transcriptions
from smg.lab.responses_face import Responses
from smg.lab.simulated import Simulated
from smg.net.exchange import Exchange
from smg.net.plain import Request, Response, StreamResponse, answer, json_response, text_response

TRANSCRIPTIONS_PATH = "/v1/audio/transcriptions"
OPEN_PATHS = frozenset({"/health", "/ping", "/lab/faults", "/lab/state"})
"""Paths that need no key: engines leave their probes open, and orders for faults come from tests."""

Reply = Callable[[Request], Awaitable[Response]]


class _Cut(Exception):
    """An ordered fault: reset the connection here."""


class EngineServer:
    """One engine's HTTP face; `handle` is the handler of a `smg.net.server.Server`.

    `models` are the names it serves, the first one is used where a request names none. `api_key` guards everything
    but probes. `output_tokens` is the length of an answer that the client does not limit.
    """

    def __init__(
        self,
        engine: Simulated,
        *,
        models: tuple[str, ...],
        flavour: str = "vllm",
        api_key: str | None = None,
        output_tokens: int = 32,
        seed: int = 0,
    ) -> None:
        self.engine = engine
        self.faults = FaultBox(Random(seed))
        self.requests_total = 0
        self._models = models
        self._flavour = flavour
        self._api_key = api_key
        self._faces: dict[str, Face] = {
            "/v1/chat/completions": Chat(output_tokens),
            "/v1/completions": Completions(output_tokens),
            "/v1/messages": Messages(output_tokens),
            "/v1/responses": Responses(output_tokens),
            "/generate": Generate(output_tokens),
            "/v1/embeddings": Embeddings(),
            "/v1/rerank": Rerank(is_bare=flavour == "sglang"),
            "/v1/classify": Classify(),
            TRANSCRIPTIONS_PATH: Transcriptions(),
        }
        self._replies = self._table()

    async def handle(self, exchange: Exchange) -> None:
        """Serves one request."""
        path, _, query = exchange.head.target.decode("latin-1").partition("?")
        request = Request(exchange, path, query)
        exchange.request_id = _request_id(request)
        try:
            self._check_key(request)
            face = self._faces.get(path)
            if face is not None and request.method == "POST":
                await self._infer(exchange, request, face)
                return
            reply = self._replies.get((request.method if request.method != "HEAD" else "GET", path))
            if reply is None:
                is_known = face is not None or any(known == path for _, known in self._replies)
                raise BadRequest("method not allowed" if is_known else "not found", 405 if is_known else 404)
            response = await exchange.parking.run(reply, request)
            await answer(exchange, response)
        except BadRequest as error:
            await answer(exchange, _error(error.status, str(error)))
        except _Cut:
            exchange.cut()
            raise ClientGone from None

    # -- inference -----------------------------------------------------------------------------

    async def _infer(self, exchange: Exchange, request: Request, face: Face) -> None:
        self.requests_total += 1
        body = await request.body()
        exchange.start_streaming()  # engines stop at once for a client that left, in plain answers too
        faults = self.faults.draw(request.path)
        if faults is not NO_FAULTS:
            await exchange.parking.run(_misbehave, faults)
            if faults.error_rate:
                headers = [] if faults.retry_after is None else [("retry-after", str(faults.retry_after))]
                await answer(exchange, _error(faults.status, "a fault that was ordered", headers))
                return
        job = self._job(request, face, body)
        try:
            generation = self.engine.submit(job.prompt, job.output_tokens)
        except EngineFull as error:
            await answer(exchange, _error(503, str(error), [("retry-after", "1")]))
            return
        with generation:
            job.id = face.id_prefix + generation.id
            if job.is_stream and isinstance(face, StreamFace):
                stream = face.stream

                async def source(send: Send) -> None:
                    await stream(job, generation, _counting(send, faults))

                await answer(exchange, StreamResponse(200, source))
                return
            await exchange.parking.run(generation.wait_finished)
            response = json_response(200, face.answer(job, generation))
            if faults.reset_after_chunks is not None or faults.stall_after_chunks is not None:
                await _break_off(exchange, response, faults)
            await answer(exchange, response)

    def _job(self, request: Request, face: Face, body: bytes) -> Job:
        document: Any
        if request.path == TRANSCRIPTIONS_PATH:
            if not (request.header(b"content-type") or b"").startswith(b"multipart/form-data"):
                raise BadRequest("content-type must be multipart/form-data", 415)
            document = {"file": body}
        else:
            document = _decoded(body)
        model = document.get("model") or self._models[0]
        if model not in self._models:
            raise BadRequest(f"The model `{model}` does not exist.", 404)
        job = face.job(document, model)
        job.variant = xxhash.xxh3_64_intdigest(job.prompt)
        job.created = int(time.time())
        return job

    # -- everything else -----------------------------------------------------------------------

    def _table(self) -> dict[tuple[str, str], Reply]:
        """(method, path) -> reply, of this engine's flavour."""
        engine, model = self.engine, self._models[0]

        def document(make: Callable[[], Any]) -> Reply:
            async def reply(request: Request) -> Response:
                return json_response(200, make())

            return reply

        async def metrics_text(request: Request) -> Response:
            return text_response(200, metrics(engine, self._flavour, model))

        async def count(request: Request) -> Response:
            return json_response(200, count_answer(_decoded(await request.body())))

        table: dict[tuple[str, str], Reply] = {
            ("GET", "/health"): self._health,
            ("GET", "/health_generate"): self._health,
            ("GET", "/ping"): self._health,
            ("GET", "/v1/models"): document(self._model_list),
            ("POST", "/v1/messages/count_tokens"): count,
            ("GET", "/lab/faults"): document(lambda: self.faults.faults),
            ("POST", "/lab/faults"): self._order_faults,
            ("DELETE", "/lab/faults"): self._order_faults,
            ("GET", "/lab/state"): document(self._state),
        }
        if self._flavour == "generic":
            return table
        table[("GET", "/metrics")] = metrics_text
        table[("GET", "/v1/loads")] = document(lambda: loads(engine, _timestamp()))
        for path in ("/flush_cache", "/reset_prefix_cache"):
            table[("POST", path)] = self._flush
        for path in ("/start_profile", "/stop_profile"):
            table[("POST", path)] = _said(f"{path[1:].replace('_', ' ')}: nothing to profile here")
        if self._flavour == "vllm":
            table[("GET", "/version")] = document(lambda: {"version": VERSION})
        else:
            table[("GET", "/get_load")] = document(lambda: get_load(engine))
            table[("GET", "/flush_cache")] = self._flush
            for path in ("/server_info", "/get_server_info"):
                table[("GET", path)] = document(lambda: server_info(engine, model))
            for path in ("/model_info", "/get_model_info"):
                table[("GET", path)] = document(lambda: model_info(model))
        return table

    async def _health(self, request: Request) -> Response:
        faults = self.faults.faults
        if faults.health_hang:
            await trio.sleep_forever()
        return Response(faults.health_status or 200)

    async def _flush(self, request: Request) -> Response:
        return text_response(200, f"Cache flushed: {self.engine.flush()} blocks.\n")

    async def _order_faults(self, request: Request) -> Response:
        if request.method == "DELETE":
            self.faults.order(NO_FAULTS)
            return json_response(200, self.faults.faults)
        try:
            self.faults.order(msgspec.json.decode(await request.body(), type=Faults))
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise BadRequest(str(error)) from None
        return json_response(200, self.faults.faults)

    def _model_list(self) -> dict[str, Any]:
        owner = {"vllm": "vllm", "sglang": "sglang"}.get(self._flavour, "smg")
        data = [
            {
                "id": name,
                "object": "model",
                "created": 0,
                "owned_by": owner,
                "root": name,
                "max_model_len": 131072,
            }
            for name in self._models
        ]
        return {"object": "list", "data": data}

    def _state(self) -> dict[str, Any]:
        """Counters for tests and demos, in plain words."""
        model = self.engine.model
        return {
            "requests_total": self.requests_total,
            "running": model.running,
            "waiting": model.waiting,
            "finished_total": model.finished_total,
            "prompt_tokens_total": model.prompt_tokens_total,
            "cached_tokens_total": model.cached_tokens_total,
            "output_tokens_total": model.output_tokens_total,
            "used_blocks": model.used_blocks,
            "cached_blocks": model.cached_blocks,
        }

    def _check_key(self, request: Request) -> None:
        if self._api_key is None or request.path in OPEN_PATHS:
            return
        given = request.header(b"authorization") or b""
        if not hmac.compare_digest(given, b"Bearer " + self._api_key.encode()):
            raise BadRequest("Unauthorized", 401)


def refuse(exchange: Exchange, error: GatewayError) -> Awaitable[None]:
    """Answers a request that the server could not read."""
    exchange.request_id = exchange.request_id or "none"
    headers = [("retry-after", str(max(1, round(error.retry_after_s))))] if error.retry_after_s else []
    return answer(exchange, _error(error.status, error.message, headers))


async def _misbehave(faults: Faults) -> None:
    """What an ordered fault does before the head."""
    if faults.delay_s:
        await trio.sleep(faults.delay_s)
    if faults.hang:
        await trio.sleep_forever()
    if faults.close_before_head:
        raise _Cut


def _counting(send: Send, faults: Faults) -> Send:
    """`send` with the ordered end of the stream in it."""
    if faults.reset_after_chunks is None and faults.stall_after_chunks is None:
        return send
    sent = 0

    async def counted(data: bytes) -> None:
        nonlocal sent
        if sent == faults.reset_after_chunks:
            raise _Cut
        if sent == faults.stall_after_chunks:
            await trio.sleep_forever()
        await send(data)
        sent += 1

    return counted


async def _break_off(exchange: Exchange, response: Response, faults: Faults) -> None:
    """Sends the head and half of a plain answer, then resets or falls silent."""
    head = exchange.head_block(response.status, b"content-type: application/json\r\n", len(response.body))
    await exchange.write(head + response.body[: len(response.body) // 2])
    if faults.reset_after_chunks is None:
        await exchange.parking.run(trio.sleep_forever)
    raise _Cut


def _decoded(body: bytes) -> dict[str, Any]:
    try:
        document = msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise BadRequest(f"body is not JSON: {error}") from None
    if not isinstance(document, dict):
        raise BadRequest("body must be a JSON object")
    return document


def _said(text: str) -> Reply:
    async def reply(request: Request) -> Response:
        return text_response(200, text + "\n")

    return reply


def _error(status: int, message: str, headers: list[tuple[str, str]] | None = None) -> Response:
    """An error as engines send it: the members of OpenAI's and those of Anthropic's shape in one object."""
    kinds = {
        400: "invalid_request_error",
        401: "authentication_error",
        404: "not_found_error",
        429: "rate_limit_error",
    }
    kind = kinds.get(status, "invalid_request_error" if status < 500 else "server_error")
    error = {"message": message, "type": kind, "param": None, "code": status}
    return json_response(status, {"type": "error", "object": "error", "error": error}, headers)


def _request_id(request: Request) -> str:
    """The caller's id when it is one, so that a test can follow a request through gateway and engine."""
    given = request.header(b"x-request-id")
    if given is not None and 1 <= len(given) <= 128 and given.isascii() and given.decode().isprintable():
        return given.decode()
    return "req-engine"


def _timestamp() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
