"""The endpoint of every inference path: body in, checked, admitted, dispatched, counted (contract sections 5, 9, 14).

Owns the straight line of one inference request and nothing of its parts. Never decodes more than the checks need and
never changes a byte of the body but the value of an alias (UP-2).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Protocol

import trio

from smg.api import checks, multipart
from smg.api.call import Call
from smg.api.endpoints import Endpoint
from smg.errors import ClientGone, GatewayError, ShuttingDown
from smg.fleet.pool import Pool
from smg.fleet.registry import Added, ModelsChanged, Registry, Removed, Updated
from smg.gateway.accounts import Accounts
from smg.gateway.decisions import Decisions
from smg.gateway.receipts import HEADER as RECEIPT
from smg.gateway.receipts import receipted
from smg.gateway.resolve import key_headers as resolve_key_headers
from smg.gateway.resolve import model_of, no_pool, pair_pool, routing_key_of
from smg.gateway.tallies import LANES_MAX, Lane, Tallies
from smg.gateway.turns import Turns
from smg.net.exchange import Exchange
from smg.net.readiness import Parking, Readiness
from smg.policies.routing_table import PolicyTable
from smg.tenancy.admission import EXPIRED, WAITING, Admission, Ticket
from smg.tenancy.limits import Reservation, TenantLimited
from smg.tenancy.scheduler import Ticket as Turn
from smg.wire.json_splice import quoted, replace_member

CLIENT_GONE_STATUS = 499  # the status under which a departed client is counted; nobody is sent it


class Runner(Protocol):
    """Who answers a call: `Dispatch`, or the prefill-decode pair."""

    async def run(self, exchange: Exchange, call: Call, pool: Pool, lane: Lane, query: bytes) -> int:
        """Answers the exchange; the status sent."""
        ...


class Generate:
    """Serves inference requests.

    `key_headers` are the names of `--routing-key-headers`; `needs_key` is true when every policy obeys the key
    (`--routing-key-override`). `is_pair`: calls go to a prefill and a decode worker (section 18). `decisions`: where
    choices are noted while somebody watches. `turns`: the priority scheduler, behind the door of `admission`.
    """

    def __init__(
        self,
        registry: Registry,
        policies: PolicyTable,
        admission: Admission,
        dispatch: Runner,
        tallies: Tallies,
        readiness: Readiness,
        accounts: Accounts,
        *,
        key_headers: Sequence[str] = (),
        needs_key: bool = False,
        is_pair: bool = False,
        decisions: Decisions | None = None,
        turns: Turns | None = None,
    ) -> None:
        self._registry = registry
        self._policies = policies
        self._admission = admission
        self._dispatch = dispatch
        self._tallies = tallies
        self._accounts = accounts
        self._key_headers = resolve_key_headers(key_headers)
        self._needs_key = needs_key
        self._is_pair = is_pair
        self._pool_of: Callable[[str], Pool | None] = (
            partial(pair_pool, registry) if is_pair else registry.pool
        )
        self._readiness = readiness
        self._lanes: dict[tuple[str, str, bool], Lane] = {}
        self._decisions = decisions
        self._turns = turns
        self._has_door = turns is None or admission.rate_limit is not None
        readiness.add_sweeper(self._expire)
        registry.subscribe(self._changed)
        if decisions is not None:
            decisions.on_switch(self._lanes.clear)

    async def serve(self, exchange: Exchange, endpoint: Endpoint, query: bytes) -> None:
        """One inference request, its id and key already checked. Raises `GatewayError`, `ClientGone`."""
        lane: Lane | None = None
        call: Call | None = None
        reservation: Reservation | None = None
        readiness = self._readiness
        accounts = self._accounts
        turns = self._turns
        turn: Turn | None = None
        status = 0
        try:
            fields = exchange.head.fields
            if b"content-encoding" in fields:
                for name, value in exchange.head.headers:
                    if name == b"content-encoding":
                        checks.refuse_content_encoding(value)
            body = exchange.body_nowait()
            if body is None:
                body = await exchange.read_body()
            call = self._call(exchange, endpoint, body, fields)
            pool = self._pool_of(call.model)
            if pool is None:
                raise no_pool(self._registry, call.model)
            lane = self._lanes.get((endpoint.path, call.model, call.is_stream)) or self._lane(call, pool)
            if lane.needs_key:
                call.routing_key = routing_key_of(fields, self._key_headers)
            if RECEIPT in fields and fields[RECEIPT] == b"1":
                lane = receipted(lane, exchange)
            limits = accounts.limits
            if limits is not None:
                tenant = exchange.head.tenant or accounts.tenants.of(exchange)
                try:
                    reservation = limits.reserve(tenant, call.model, call.tokens_estimate, readiness.now_s)
                except TenantLimited as limited:
                    raise accounts.refused(exchange, limited) from None
            queued_s = 0.0
            admission = self._admission
            ticket = admission.enter(readiness.now_s) if self._has_door else None
            if ticket is not None:
                now = readiness.now_s
                await self._wait_turn(exchange, ticket)
                queued_s = trio.current_time() - now
            try:
                if turns is not None:
                    turn = turns.enter(exchange, call, pool)
                    if turn.state is WAITING:
                        await turns.wait(exchange, call, turn)
                status = await self._dispatch.run(exchange, call, pool, lane, query)
            finally:
                if turn is not None and turns is not None:
                    turns.leave(turn, status == 200)
                if self._has_door:
                    next_ticket = admission.leave()
                    if next_ticket is not None:
                        self._wake(next_ticket)
            now = readiness.now_s
            lane.series.finished(status, "", now - exchange.started_s, queued_s or call.queued_s)
            accounts.answered(exchange, call, lane, reservation, status, now)
        except Exception as error:
            self._failed(exchange, endpoint, call, lane, reservation, error)
            raise

    def _call(self, exchange: Exchange, endpoint: Endpoint, body: bytes, fields: dict[bytes, bytes]) -> Call:
        """The checked call. Raises `GatewayError` 400, 501."""
        content_type = fields.get(b"content-type")
        document = checks.decode_body(endpoint, body, content_type)
        checks.check(endpoint, document)
        asked = document.get("model") or ""
        model = model_of(self._registry, asked)
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
            document.get("stream") is True,
            None,
            target.decode("latin-1").strip() if target else None,
            exchange.request_id,
        )

    def _lane(self, call: Call, pool: Pool) -> Lane:
        """A new lane; kept until the fleet's models change."""
        lane: Lane
        if self._is_pair:
            pair = self._policies.pair_for(call.model)
            lane = self._tallies.pair_lane(call.endpoint, pool.model, pair, call.is_stream, self._needs_key)
        else:
            policy = self._policies.policy_for(call.model)
            lane = self._tallies.lane(call.endpoint, pool.model, policy, call.is_stream, self._needs_key)
        if self._decisions is not None and self._decisions.is_on:
            lane = self._decisions.watched(lane, call.endpoint.path)
        if pool.model and len(self._lanes) < LANES_MAX:
            # Names that nobody claims are made up by clients: their policies live in a bounded table, not here.
            self._lanes[call.endpoint.path, call.model, call.is_stream] = lane
        return lane

    def _changed(self, change: object) -> None:
        """Workers came, went or changed their models: policies and series may be others now."""
        if isinstance(change, (Added, Removed, ModelsChanged, Updated)):
            self._lanes.clear()

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

    def _failed(
        self,
        exchange: Exchange,
        endpoint: Endpoint,
        call: Call | None,
        lane: Lane | None,
        reservation: Reservation | None,
        error: Exception,
    ) -> None:
        """A request has ended without an answer of a worker, or in the middle of one: counted and settled."""
        now = self._readiness.now_s
        if isinstance(error, GatewayError):
            status, code = error.status, error.code
        elif isinstance(error, ClientGone):
            status, code = CLIENT_GONE_STATUS, "client_gone"
        elif isinstance(error, ShuttingDown):
            begun = exchange.has_begun_answer
            status, code = (exchange.status, "") if begun else (503, "no_available_workers")
        else:  # a fault of ours: told and answered by the server (ERR-21)
            status, code = 500, "internal_error"
        if call is not None and lane is not None:
            self._accounts.failed(exchange, call, lane, reservation, status == CLIENT_GONE_STATUS, now)
        if isinstance(error, GatewayError):
            self._accounts.mark(exchange, "" if call is None else call.model, error, now)
        duration_s = now - exchange.started_s
        if lane is not None:
            lane.failed(status, code, duration_s)
        else:
            self._tallies.metrics.http_series("POST", endpoint.path).finished(status, code, duration_s)
