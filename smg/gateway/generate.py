"""The endpoint of every inference path: body in, checked, admitted, dispatched, counted (contract sections 5, 9, 14).

Owns the straight line of one inference request and nothing of its parts. Never decodes more than the checks need and
never changes a byte of the body but the value of an alias (UP-2).
"""

from __future__ import annotations

from collections.abc import Sequence
from random import Random
from typing import Protocol

import trio

from smg.api import checks, multipart
from smg.api.call import Call
from smg.api.endpoints import Endpoint
from smg.errors import ClientGone, GatewayError
from smg.fleet.pool import Pool
from smg.fleet.registry import Registry
from smg.fleet.routing_table import PolicyTable
from smg.fleet.worker import Status
from smg.gateway import problem
from smg.gateway.dispatch import Dispatch
from smg.gateway.tallies import Lane, Tallies
from smg.net.exchange import Exchange
from smg.net.readiness import Parking, Readiness
from smg.policies.policy import Policy, Wants
from smg.tenancy.admission import EXPIRED, Admission, Ticket
from smg.wire.json_splice import quoted, replace_member

CLIENT_GONE_STATUS = 499  # the status under which a departed client is counted; nobody is sent it


class Runner(Protocol):
    """Who answers a call: `Dispatch`, or the prefill-decode pair."""

    async def run(
        self,
        exchange: Exchange,
        call: Call,
        pool: Pool,
        policy: Policy,
        lane: Lane,
        query: bytes,
        trace: bytes | None,
    ) -> int:
        """Answers the exchange; the status sent."""
        ...


class Generate:
    """Serves inference requests.

    `key_headers` are the names of `--routing-key-headers`; `needs_key` is true when every policy obeys the key
    (`--routing-key-override`).
    """

    def __init__(
        self,
        registry: Registry,
        policies: PolicyTable,
        admission: Admission,
        dispatch: Dispatch | Runner,
        tallies: Tallies,
        readiness: Readiness,
        rng: Random,
        *,
        key_headers: Sequence[str] = (),
        needs_key: bool = False,
    ) -> None:
        self._registry = registry
        self._policies = policies
        self._admission = admission
        self._dispatch = dispatch
        self._tallies = tallies
        self._rng = rng
        self._key_headers = (b"x-smg-routing-key", *(name.lower().encode("latin-1") for name in key_headers))
        self._needs_key = needs_key
        readiness.add_sweeper(self._expire)

    async def serve(self, exchange: Exchange, endpoint: Endpoint, query: bytes) -> None:
        """One inference request, its id and key already checked. Raises `GatewayError`, `ClientGone`."""
        lane: Lane | None = None
        try:
            call = await self._read(exchange, endpoint)
            pool = self._pool(call)
            policy = self._policies.policy_for(pool.model)
            lane = self._tallies.lane(endpoint, pool.model, policy.name, call.is_stream)
            if self._needs_key or Wants.KEY in policy.wants:
                call.routing_key = self._routing_key(exchange)
            queued_s = 0.0
            now = trio.current_time()
            ticket = self._admission.enter(now)
            if ticket is not None:
                await self._wait_turn(exchange, ticket)
                queued_s = trio.current_time() - now
            try:
                status = await self._dispatch.run(exchange, call, pool, policy, lane, query, None)
            finally:
                self._wake(self._admission.leave())
            lane.series.finished(status, "", trio.current_time() - exchange.started_s, queued_s)
        except GatewayError as error:
            self._count_failure(exchange, endpoint, lane, error.status, error.code)
            raise
        except ClientGone:
            self._count_failure(exchange, endpoint, lane, CLIENT_GONE_STATUS, "client_gone")
            raise

    async def _read(self, exchange: Exchange, endpoint: Endpoint) -> Call:
        fields = exchange.head.fields
        if b"content-encoding" in fields:
            checks.refuse_content_encoding(fields[b"content-encoding"])
        body = await exchange.read_body()
        content_type = fields.get(b"content-type")
        document = checks.decode_body(endpoint, body, content_type)
        checks.check(endpoint, document)
        asked = document.get("model") or ""
        model = self._registry.resolve(asked) if asked else self._only_model(endpoint)
        if model != asked and asked:
            if endpoint.is_json:
                body = replace_member(body, "model", quoted(model), is_present=True)
            else:
                body = multipart.replace_field(body, content_type, "model", model.encode())
        target = fields.get(b"x-smg-target-worker")
        return Call(
            endpoint,
            model,
            body,
            document,
            is_stream=document.get("stream") is True,
            target=target.decode("latin-1").strip() if target else None,
            request_id=exchange.request_id,
        )

    def _only_model(self, endpoint: Endpoint) -> str:
        """The model of a request that names none (MOD-5)."""
        served = self._registry.served_models()
        if len(served) > 1:
            raise GatewayError(
                400, "missing_model", "Several models are served; name one in `model`", param="model"
            )
        return served[0] if served else ""

    def _pool(self, call: Call) -> Pool:
        """The workers of the call's model. Raises 404 (ERR-9), or 503 while a worker has yet to tell its models."""
        pool = self._registry.pool(call.model)
        if pool is not None:
            return pool
        workers = self._registry.workers()
        if not workers and not call.model:
            raise problem.no_available_workers()
        if any(worker.status is Status.PENDING and not worker.models for worker in workers):
            raise problem.no_available_workers("A worker has not reported its models yet")
        raise problem.model_not_found(call.model)

    def _routing_key(self, exchange: Exchange) -> str | None:
        """The sticky key (RT-5): the first header given that holds visible text."""
        fields = exchange.head.fields
        for name in self._key_headers:
            value = fields.get(name)
            if value and len(value) <= 1024 and value.isascii():
                text = value.decode("ascii").strip()
                if text:
                    return text
        return None

    async def _wait_turn(self, exchange: Exchange, ticket: Ticket) -> None:
        ticket.waiter = exchange.parking
        try:
            await exchange.parking.wait_woken()
        except BaseException:
            self._wake(self._admission.abandon(ticket))
            raise
        if ticket.state is EXPIRED:
            raise self._admission.timeout_error()

    def _expire(self, now: float) -> None:
        for ticket in self._admission.expire(now):
            self._wake(ticket)

    def _wake(self, ticket: Ticket | None) -> None:
        if ticket is not None and isinstance(ticket.waiter, Parking):
            ticket.waiter.wake()

    def _count_failure(
        self, exchange: Exchange, endpoint: Endpoint, lane: Lane | None, status: int, code: str
    ) -> None:
        duration_s = trio.current_time() - exchange.started_s
        if lane is not None:
            lane.failed(status, code, duration_s)
        else:
            self._tallies.metrics.http_series("POST", endpoint.path).finished(status, code, duration_s)
