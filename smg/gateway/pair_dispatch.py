"""The retry loop of pairs: chooses a prefill and a decode worker, sends to both, relays the decode worker's answer.

Owns the life of an attempt on a pair (contract section 18): each leg is counted in and out by itself, in the places
where `dispatch.py` counts, and only the leg that failed is blamed. What is the same for one worker is asked of
`Dispatch`. Never reads a client's body, never admits.

    prefill:  counted in -> answer read and dropped -> counted out, while the decode leg still runs
    decode:   counted in -> head, prefill done -> relayed -> counted out
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import msgspec
import trio

from smg.api.call import Call
from smg.api.endpoints import CHAT, COMPLETIONS, GENERATE, MESSAGES, RERANK, RERANK_SHORT, RESPONSES
from smg.backends.prefill_decode import ERROR_STATUS_MIN, Prefill, PrefillDecode, PrefillFailed
from smg.errors import GatewayError, UpstreamError
from smg.fleet import load
from smg.fleet.pool import Pool
from smg.fleet.registry import Registry
from smg.fleet.retry import is_failure
from smg.fleet.worker import Kind, Worker
from smg.gateway import problem
from smg.gateway.dispatch import Dispatch, Failed, Held, hold, retry_after_s
from smg.gateway.relay import Told, usage_of
from smg.gateway.resolve import missing_leg
from smg.gateway.tallies import Lane, PairLane, Tallies
from smg.net.exchange import Exchange
from smg.net.readiness import Readiness
from smg.net.upstream import Upstream

SERVED = frozenset((CHAT, COMPLETIONS, GENERATE, MESSAGES, RESPONSES, RERANK, RERANK_SHORT))
"""What generates, so that there is a KV cache to hand over, and reranking, which such engines answer by the same way."""

MESSAGE_CHARS_MAX = 4096


class Leg:
    """One leg of a call through all its attempts: the workers there are, the lane, and who has failed already."""

    __slots__ = ("call", "kind", "lane", "pool", "tried")

    def __init__(self, kind: Kind, call: Call, pool: Pool, lane: Lane) -> None:
        self.kind = kind
        self.call = call
        self.pool = pool
        self.lane = lane
        self.tried: list[Worker] = []


class Booked:
    """A leg's attempt that is counted in; `end` counts it out, exactly once."""

    __slots__ = ("chars", "lane", "leg", "permit", "started_s", "worker")

    def __init__(self, leg: Leg, worker: Worker, now: float) -> None:
        self.leg = leg
        self.lane = lane = leg.lane
        self.worker = worker
        self.started_s = now
        self.permit = worker.breaker.started(now)
        self.chars = len(leg.call.text()) if lane.counts_chars else 0
        load.begin(worker, self.chars)
        if lane.tells_placed:
            lane.policy.placed(leg.call, worker, now)
        lane.selected(worker)

    def end(self, dispatch: Dispatch, status: int, told: Told, is_success: bool | None) -> None:
        """The attempt is over; `is_success` None: the worker is not to be judged."""
        dispatch.end(
            self.leg.call,
            self.worker,
            self.lane,
            self.permit,
            self.chars,
            status,
            told,
            is_success,
            self.started_s,
        )


class PairFailed(msgspec.Struct, frozen=True):
    """An attempt that did not answer the client, and the leg that is to blame."""

    leg: Leg
    worker: Worker
    failed: Failed


class PairDispatch:
    """Sends calls to pairs of workers until one answer is with the client (a `Runner`)."""

    def __init__(
        self,
        dispatch: Dispatch,
        backend: PrefillDecode,
        registry: Registry,
        tallies: Tallies,
        readiness: Readiness,
    ) -> None:
        self._dispatch = dispatch
        self._backend = backend
        self._registry = registry
        self._tallies = tallies
        self._readiness = readiness

    async def run(self, exchange: Exchange, call: Call, pool: Pool, lane: Lane, query: bytes) -> int:
        """Answers `exchange` from a pair that serves the model of `call`; the status that was sent.

        Raises `GatewayError` 501 for an endpoint that pairs do not serve, 503, 504, `pd_request_failed` and the codes
        of PD-3 when no pair answered; `ClientGone`.
        """
        if call.endpoint not in SERVED:
            raise problem.not_implemented(f"{call.endpoint.path} under --pd-disaggregation")
        assert isinstance(lane, PairLane)
        prefill, decode = self._legs(call, lane)
        now = self._readiness.now_s
        self._dispatch.requested(exchange, now)
        pair = self._choose(prefill, now), self._choose(decode, now)
        attempts = 1
        while True:
            answered = await self._attempt(exchange, call, prefill, decode, pair, query)
            if type(answered) is int:
                return answered
            assert isinstance(answered, PairFailed)
            again = await self._next_pair(exchange, prefill, decode, attempts, answered)
            if again is None:
                raise _error_of(answered, pair)
            pair = again
            attempts += 1

    def _legs(self, call: Call, lane: PairLane) -> tuple[Leg, Leg]:
        """Both legs. `X-SMG-Target-Worker` (RT-4) holds for the prefill when it is a prefill worker's id, else for the
        decode, whose candidates an index counts. Raises `GatewayError` 503 when nobody is there for a leg."""
        prefills = self._registry.pool_of(call.model, Kind.PREFILL)
        decodes = self._registry.pool_of(call.model, Kind.DECODE)
        if prefills is None or decodes is None:
            raise missing_leg(Kind.PREFILL if prefills is None else Kind.DECODE)
        calls = [call, call]
        if call.target:
            names_prefill = any(worker.id == call.target for worker in prefills.workers)
            calls[names_prefill] = _untargeted(call)
        return (
            Leg(Kind.PREFILL, calls[0], prefills, lane.prefill),
            Leg(Kind.DECODE, calls[1], decodes, lane),
        )

    def _choose(self, leg: Leg, now: float, candidates: Sequence[Worker] = ()) -> Worker:
        """The leg's policy's word among `candidates`, else among all. Raises `GatewayError` 503 (PD-2)."""
        if not candidates:
            if not leg.pool.candidates(now):
                raise missing_leg(leg.kind)
            candidates = self._dispatch.candidates(leg.call, leg.pool, now)
        return self._dispatch.choose(leg.call, leg.lane.policy, candidates, now)

    async def _attempt(
        self,
        exchange: Exchange,
        call: Call,
        prefill_leg: Leg,
        decode_leg: Leg,
        pair: tuple[Worker, Worker],
        query: bytes,
    ) -> int | PairFailed:
        """One attempt on a pair: the status that was relayed, or who failed and how."""
        dispatch, backend = self._dispatch, self._backend
        now = self._readiness.now_s
        prefiller, decoder = pair
        prefill = backend.prefill(call, prefiller)
        lines = backend.lines(decoder)
        prefill.ended = partial(self._prefill_ended, Booked(prefill_leg, prefiller, now))
        decoding = Booked(decode_leg, decoder, now)
        upstream: Upstream | None = None
        is_success: bool | None = None
        told = Told()
        try:
            upstream = await backend.open(prefill, decoder, lines, query, exchange)
            status = upstream.status
            is_success = not is_failure(status, decoder)
            if status >= ERROR_STATUS_MIN:
                held = await hold(exchange, upstream, lines)
                if held is None:  # too long to be read: its beginning has to do
                    held = Held(status, upstream.headers, upstream.take(), lines.id_line)
                dispatch.note_rest(decoder, held, now)
                return PairFailed(decode_leg, decoder, Failed(held=held))
            told = await dispatch.relay(
                exchange, call, decoder, decode_leg.lane.policy, upstream, lines, now, told
            )
            if told.failure is not None:
                is_success = False
                self._tallies.worker_error(decoder, told.failure.kind)
            return status
        except PrefillFailed:
            is_success = None  # the decode worker waited in vain: it is not to blame (PD-2)
            return PairFailed(prefill_leg, prefiller, _failed(prefill))
        except UpstreamError as error:
            is_success = False
            dispatch.note_failure(decoder, error)
            return PairFailed(decode_leg, decoder, Failed(error=error))
        except BaseException:
            is_success = None  # the client left, or we shut down (STR-9)
            raise
        finally:
            if upstream is not None:
                backend.close(lines, upstream)
            call.told = told
            decoding.end(dispatch, 0 if upstream is None else upstream.status, told, is_success)

    def _prefill_ended(self, booked: Booked, prefill: Prefill) -> None:
        """The prefill leg is over, whatever the other one does: it is counted out."""
        now = self._readiness.now_s
        worker = prefill.worker
        told = Told()
        is_success: bool | None = None
        try:
            if prefill.error is not None:
                is_success = False
                self._dispatch.note_failure(worker, prefill.error)
            elif prefill.is_whole:
                is_success = not is_failure(prefill.status, worker)
                if prefill.has_failed:
                    self._dispatch.note_rest(worker, _held(prefill), now)
                else:
                    # The whole answer stands for the first byte: a prefill worker makes one token at most.
                    told.first_byte_s = now
                    told.usage = usage_of(prefill.body)
                    booked.lane.policy.first_byte(booked.leg.call, worker, now - booked.started_s, now)
        finally:
            booked.end(self._dispatch, prefill.status, told, is_success)

    async def _next_pair(
        self, exchange: Exchange, prefill: Leg, decode: Leg, attempts: int, failure: PairFailed
    ) -> tuple[Worker, Worker] | None:
        """Who is tried next, by the rules of one worker applied to the leg that failed; None: nobody.

        The other leg is chosen anew: its worker did nothing wrong, and its load has changed. Raises `GatewayError` 503
        when that leg has nobody left.
        """
        leg = failure.leg
        if failure.worker not in leg.tried:
            leg.tried.append(failure.worker)
        again = await self._dispatch.next_worker(
            exchange,
            leg.call,
            leg.pool,
            leg.lane.policy,
            failure.worker,
            leg.tried,
            attempts,
            failure.failed,
        )
        if again is None:
            return None
        held = failure.failed.held
        if held is not None:
            leg.lane.upstream(held.status)
        self._tallies.retried(leg.call.endpoint, again)
        now = trio.current_time()
        other = decode if leg is prefill else prefill
        fresh = [worker for worker in other.pool.candidates(now) if worker not in other.tried]
        partner = self._choose(other, now, () if other.call.target else fresh)
        return (again, partner) if leg is prefill else (partner, again)


def _untargeted(call: Call) -> Call:
    """The call for the leg that `X-SMG-Target-Worker` does not speak of."""
    return Call(
        call.endpoint,
        call.model,
        call.body,
        call.document,
        is_stream=call.is_stream,
        routing_key=call.routing_key,
        request_id=call.request_id,
    )


def _held(prefill: Prefill) -> Held:
    return Held(prefill.status, prefill.headers, prefill.body, prefill.lines.id_line)


def _failed(prefill: Prefill) -> Failed:
    if prefill.error is not None:
        return Failed(error=prefill.error)
    return Failed(held=_held(prefill))


def _error_of(failure: PairFailed, pair: tuple[Worker, Worker]) -> GatewayError:
    """The answer when no pair could give one (PD-2, PD-3, ERR-18)."""
    held = failure.failed.held
    if held is None:
        assert failure.failed.error is not None
        if failure.failed.error.kind == UpstreamError.TIMEOUT:
            return problem.upstream_timeout()
        return problem.pd_request_failed()
    leg = failure.leg.kind.value
    message = _message_of(held) or f"The {leg} worker answered with status {held.status}"
    return problem.leg_error(
        leg,
        held.status,
        _without_addresses(message, pair),
        headers=(("x-smg-worker-id", failure.worker.id),),
        retry_after_s=retry_after_s(held.headers),
    )


def _message_of(held: Held) -> str:
    """The text in a worker's error, in any of the shapes that engines use; empty without one."""
    try:
        document: Any = msgspec.json.decode(held.body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return ""
    for member in ("error", "message", "detail"):
        found = document.get(member) if isinstance(document, dict) else None
        if isinstance(found, dict):
            found = found.get("message")
        if isinstance(found, str) and found:
            return found[:MESSAGE_CHARS_MAX]
    return ""


def _without_addresses(message: str, pair: tuple[Worker, Worker]) -> str:
    """Engines name the other worker in what they say of a transfer; clients are not to see it (DN-3)."""
    places: set[str] = set()
    for worker in pair:
        places |= {worker.base_url, worker.host_header.decode("latin-1")}
        if worker.spec.bootstrap_port is not None:
            places.add(f"{worker.host}:{worker.spec.bootstrap_port}")
        if "." in worker.host or ":" in worker.host:  # a bare word may be a word of the message
            places.add(worker.host)
    for place in sorted(places, key=len, reverse=True):
        message = message.replace(place, "worker")
    return message
