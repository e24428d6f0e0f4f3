"""The one retry loop: chooses a worker, sends, relays, and tries another when nothing was lost by it.

Owns the life of an attempt (contract sections 11 and 12): load counted in and out, the breaker told, the policy told,
each exactly once whatever happens. Never reads a client's body, never admits, never builds an error body.

    candidates -> policy.choose -> breaker.started, load.begin, policy.placed -> send -> relay
               -> load.end, breaker.succeeded | failed | abandoned, policy.finished
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from email.utils import parsedate_to_datetime
from random import Random

import msgspec
import trio

from smg.api.call import Call
from smg.api.endpoints import Endpoint
from smg.backends.http_worker import HttpWorkers, Lines
from smg.errors import UpstreamError
from smg.fleet import load
from smg.fleet.pool import Pool
from smg.fleet.retry import RetryBudget, RetryRules, is_failure
from smg.fleet.worker import Worker
from smg.gateway import problem
from smg.gateway.mesh_api import SessionOwners
from smg.gateway.relay import (
    BODYLESS,
    HELD_BYTES_MAX,
    PASSED_ON,
    StreamBounds,
    Told,
    relay_plain,
    relay_stream,
    whole_answer,
)
from smg.gateway.rerank import wrapped as wrapped_rerank
from smg.gateway.rerank import wraps
from smg.gateway.tallies import Lane, Tallies
from smg.net.connection import DeadlinePassed
from smg.net.exchange import Exchange
from smg.net.readiness import Readiness
from smg.net.upstream import Upstream
from smg.policies.policy import Outcome, Policy
from smg.wire.headers import returned, value_of

HELD_ANSWER_BYTES_MAX = 1 << 20  # an error answer up to this is kept while another worker is tried


class Held(msgspec.Struct, frozen=True):
    """A whole error answer of a worker, kept until it is known whether a better one comes (RTY-2)."""

    status: int
    headers: list[tuple[bytes, bytes]]
    body: bytes
    id_line: bytes
    has_length: bool = True


class Failed(msgspec.Struct, frozen=True):
    """An attempt that did not answer the client: a broken connection (`error`) or an answer worth a retry (`held`)."""

    error: UpstreamError | None = None
    held: Held | None = None


class Dispatch:
    """Sends calls to workers until one answer is with the client.

    `timeout_s` bounds a request with all its retries (RTY-5). `resend_bytes_max`: a larger body is sent once, so that
    it need not stay in memory for retries. `note_refused` is told of refused connections, for a probe at once (HLT-2).
    `owners`: other nodes of a mesh, which decide for some requests.
    """

    def __init__(
        self,
        workers: HttpWorkers,
        rules: RetryRules,
        budget: RetryBudget,
        bounds: StreamBounds,
        tallies: Tallies,
        note_refused: Callable[[Worker], None],
        readiness: Readiness,
        choice_rng: Random,
        rng: Random,
        *,
        timeout_s: float,
        resend_bytes_max: int,
        sheds_overload: bool,
        owners: SessionOwners | None = None,
    ) -> None:
        self._workers = workers
        self._rules = rules
        self._budget = budget
        self._bounds = bounds
        self._tallies = tallies
        self._note_refused = note_refused
        self._readiness = readiness
        self._choice_rng = choice_rng
        self._rng = rng
        self._timeout_s = timeout_s
        self._resend_bytes_max = resend_bytes_max
        self._sheds_overload = sheds_overload
        self._owners = owners

    async def run(self, exchange: Exchange, call: Call, pool: Pool, lane: Lane, query: bytes) -> int:
        """Answers `exchange` from a worker of `pool`; the status that was sent.

        Raises `GatewayError` 502, 503, 504 when no worker answered and none of its bytes went out; `ClientGone`.
        """
        now = self._readiness.now_s
        self._budget.requested(now)
        exchange.parking.deadline_s = exchange.started_s + self._timeout_s
        candidates: Sequence[Worker] = pool.candidates(now)
        if call.target is not None or self._sheds_overload or not candidates:
            candidates = self.candidates(call, pool, now)
        if len(candidates) == 1:
            worker = candidates[0]
        else:
            if self._owners is not None:
                worth = self._owners.worth(call, lane.policy)
                if worth is not None:
                    await self._owners.consult(call, worth)
                    now = self._readiness.now_s
                    candidates = self.candidates(call, pool, now)  # some milliseconds have passed
            chosen = lane.policy.choose(call, candidates, now, self._choice_rng)
            if chosen is None:
                raise problem.no_available_workers()
            worker = chosen
        attempts = 1
        attempts_max = self._rules.attempts_max if call.endpoint.may_retry else 1
        answered = await self._attempt(exchange, call, worker, lane, query, attempts < attempts_max)
        if type(answered) is int:
            return answered
        tried = [worker]
        while True:
            assert isinstance(answered, Failed)
            again = await self.next_worker(
                exchange, call, pool, lane.policy, worker, tried, attempts, answered
            )
            if again is None:
                return await self._give_up(exchange, answered)
            worker = again
            if worker not in tried:
                tried.append(worker)
            attempts += 1
            self._tallies.retried(call.endpoint, worker)
            answered = await self._attempt(exchange, call, worker, lane, query, attempts < attempts_max)
            if type(answered) is int:
                return answered

    def requested(self, exchange: Exchange, now: float) -> None:
        """A request begins that is not `run` here: the retry budget and the clock of RTY-5 are told."""
        self._budget.requested(now)
        exchange.parking.deadline_s = exchange.started_s + self._timeout_s

    def candidates(self, call: Call, pool: Pool, now: float) -> Sequence[Worker]:
        """Who may get the call (RT-1); never empty. Raises `GatewayError` 503 (ERR-15, ERR-19; RT-4)."""
        candidates: Sequence[Worker] = pool.candidates(now)
        if call.target:
            return [_target(call.target, pool, candidates)]
        if not candidates:
            raise problem.no_available_workers()
        if self._sheds_overload and pool.is_overloaded(now):
            raise problem.overload_shed()
        return candidates

    def choose(self, call: Call, policy: Policy, candidates: Sequence[Worker], now: float) -> Worker:
        """The policy's word; a lone candidate needs none. Raises `GatewayError` 503 when it names nobody."""
        if len(candidates) == 1:
            return candidates[0]
        worker = policy.choose(call, candidates, now, self._choice_rng)
        if worker is None:
            raise problem.no_available_workers()
        return worker

    async def _attempt(
        self, exchange: Exchange, call: Call, worker: Worker, lane: Lane, query: bytes, may_retry: bool
    ) -> int | Failed:
        """One attempt on `worker`: the status that was relayed, or why nothing was."""
        readiness = self._readiness
        started_s = readiness.now_s
        permit = worker.breaker.started(started_s)
        chars = len(call.text()) if lane.counts_chars else 0
        load.begin(worker, chars)
        if lane.tells_placed:
            lane.policy.placed(call, worker, started_s)
        lane.selected(worker)
        lines = self._workers.lines(worker)
        upstream: Upstream | None = None
        is_success: bool | None = None
        told = Told()
        try:
            upstream = await self._workers.open(call, worker, lines, query, exchange)
            status = upstream.status
            is_success = status == 200 or not is_failure(status, worker)
            if may_retry and not is_success and self._rules.is_retryable(status):
                held = await hold(exchange, upstream, lines)
                if held is not None:
                    self.note_rest(worker, held, started_s)
                    lane.upstream(status)
                    return Failed(held=held)
            if upstream.is_complete and upstream.length is not None and not call.endpoint.is_rerank:
                if not exchange.write_nowait(whole_answer(exchange, upstream, lines.id_line, told)):
                    await exchange.flush()
                return status
            told = await self.relay(exchange, call, worker, lane.policy, upstream, lines, started_s, told)
            if told.failure is not None:
                is_success = False
                self._tallies.worker_error(worker, told.failure.kind)
            return status
        except UpstreamError as error:
            is_success = False
            self.note_failure(worker, error)
            return Failed(error=error)
        except BaseException:
            is_success = None  # the client left, or we shut down: the worker is not to blame (STR-9)
            raise
        finally:
            if upstream is not None:
                self._workers.close(lines, upstream)
            call.told = told
            status = 0 if upstream is None else upstream.status
            self.end(call, worker, lane, permit, chars, status, told, is_success, started_s)

    def end(
        self,
        call: Call,
        worker: Worker,
        lane: Lane,
        permit: int,
        chars: int,
        status: int,
        told: Told,
        is_success: bool | None,
        started_s: float,
    ) -> None:
        """An attempt is over: load out, breaker and policy told. `is_success` None: the worker is not to be judged."""
        now = self._readiness.now_s
        load.end(worker, chars)
        breaker = worker.breaker
        if is_success:
            breaker.succeeded(now, permit)
        elif is_success is None:
            breaker.abandoned(permit)
        else:
            breaker.failed(now, permit)
        usage = told.usage
        if usage is not None or told.first_byte_s is not None:
            ttft_s = None if told.first_byte_s is None else told.first_byte_s - started_s
            lane.generated(ttft_s, now - started_s, usage)
        if lane.tells_finished:
            prompt_tokens = cached_tokens = completion_tokens = ttft_s = None
            if usage is not None:
                prompt_tokens = usage.prompt_tokens
                cached_tokens = usage.cached_tokens
                completion_tokens = usage.completion_tokens
            if told.first_byte_s is not None:
                ttft_s = told.first_byte_s - started_s
            outcome = Outcome(
                status, is_success, ttft_s, now - started_s, prompt_tokens, cached_tokens, completion_tokens
            )
            lane.policy.finished(call, worker, outcome, now)

    def note_failure(self, worker: Worker, error: UpstreamError) -> None:
        """A worker could not be used: counted, and probed at once when it refused (HLT-2)."""
        self._tallies.worker_error(worker, error.kind)
        if error.kind == UpstreamError.REFUSED:
            self._note_refused(worker)

    async def relay(
        self,
        exchange: Exchange,
        call: Call,
        worker: Worker,
        policy: Policy,
        upstream: Upstream,
        lines: Lines,
        started_s: float,
        told: Told,
    ) -> Told:
        """Passes the answer on; what a stream tells goes into `told` as it comes. Raises as `gateway/relay.py`."""
        content_type = upstream.content_type.lower()
        is_events = content_type.startswith(b"text/event-stream")
        # Nothing can be written between the events of an encoded stream: it is passed on like any other body.
        is_legible = value_of(upstream.headers, b"content-encoding") in (None, b"identity")
        if is_events and is_legible and upstream.length is None and upstream.status not in BODYLESS:

            def first_byte(now: float) -> None:
                policy.first_byte(call, worker, now - started_s, now)
                if call.begun is not None:
                    call.begun(now)

            await relay_stream(
                exchange, upstream, lines.id_line, call.endpoint.dialect, self._bounds, told, first_byte
            )
            return told
        if wraps(call.endpoint, upstream.status, upstream.content_type):
            return await _relay_rerank(exchange, call, upstream, lines)
        # JSON where a stream was asked for is a refusal, or an engine that does not stream (STR-3).
        passes_on = is_events or (call.is_stream and not content_type.startswith(b"application/json"))
        held_bytes_max = PASSED_ON if passes_on else HELD_BYTES_MAX
        return await relay_plain(exchange, upstream, lines.id_line, told, held_bytes_max)

    def note_rest(self, worker: Worker, held: Held, now: float) -> None:
        """Remembers `Retry-After` of a 429 or 503 (CB-4)."""
        if held.status in (429, 503):
            rest_s = retry_after_s(held.headers)
            if rest_s is not None:
                worker.breaker.avoid(now, rest_s)

    async def next_worker(
        self,
        exchange: Exchange,
        call: Call,
        pool: Pool,
        policy: Policy,
        worker: Worker,
        tried: list[Worker],
        attempts: int,
        failed: Failed,
    ) -> Worker | None:
        """Who is tried next (RTY-1 to RTY-4), after the backoff where one is due; None: the failure is the answer."""
        if not self._may_try_again(call.endpoint, call, attempts, failed):
            return None
        now = trio.current_time()
        others: Sequence[Worker] = ()
        if not call.target:
            others = [candidate for candidate in pool.candidates(now) if candidate not in tried]
        is_repeat = not others and len(tried) == 1
        if not others and not (is_repeat and self._may_repeat(failed)):
            return None
        is_free = failed.error is not None and failed.error.kind == UpstreamError.REFUSED
        if not is_free and not self._budget.may_retry(now):
            self._tallies.exhausted(call.endpoint, worker)
            return None
        if others:
            return self.choose(call, policy, others, now)
        await exchange.parking.sleep(self._rules.backoff_s(attempts - 1, self._rng))
        if trio.current_time() >= exchange.parking.deadline_s:
            return None
        return worker

    def _may_try_again(self, endpoint: Endpoint, call: Call, attempts: int, failed: Failed) -> bool:
        if attempts >= self._rules.attempts_max:
            return False
        error = failed.error
        if error is None:
            if failed.held is None or not self._rules.is_retryable(failed.held.status):
                return False
            return endpoint.may_retry and len(call.body) <= self._resend_bytes_max
        if error.was_sent and (not endpoint.may_retry or len(call.body) > self._resend_bytes_max):
            return False
        return error.kind == UpstreamError.BROKEN_STREAM or self._rules.is_retryable_kind(error.kind)

    def _may_repeat(self, failed: Failed) -> bool:
        """May the only worker be asked again (RTY-2)?"""
        if failed.held is None:
            return True
        return self._rules.is_repeatable(
            failed.held.status, value_of(failed.held.headers, b"retry-after") is not None
        )

    async def _give_up(self, exchange: Exchange, failed: Failed) -> int:
        """The last failure becomes the answer."""
        held = failed.held
        if held is None:
            assert failed.error is not None
            raise problem.of_upstream(failed.error)
        body = held.body
        length = len(body) if held.has_length else None
        head = exchange.head_block(held.status, returned(held.headers) + held.id_line, length)
        if length is None and not exchange.head.is_http10:  # what had no length gets none (DN-4)
            body = (b"%x\r\n%b\r\n" % (len(body), body) if body else b"") + b"0\r\n\r\n"
        await exchange.write(head + body)
        return held.status


async def hold(exchange: Exchange, upstream: Upstream, lines: Lines) -> Held | None:
    """The whole error answer, or None when it is too large to keep: then it is relayed as it is.

    Raises `UpstreamError` when it breaks off.
    """
    try:
        while not upstream.is_complete:
            if sum(map(len, upstream.pieces)) > HELD_ANSWER_BYTES_MAX:
                return None
            await upstream.read_more(exchange.parking)
    except DeadlinePassed:
        raise UpstreamError(
            UpstreamError.TIMEOUT, "answer not complete within the timeout", was_sent=True
        ) from None
    has_length = upstream.length is not None
    return Held(upstream.status, upstream.headers, upstream.take(), lines.id_line, has_length)


async def _relay_rerank(exchange: Exchange, call: Call, upstream: Upstream, lines: Lines) -> Told:
    """Wraps a bare array into the object that clients of `/v1/rerank` expect (MOD-8)."""
    pieces: list[bytes] = []
    try:
        while True:
            pieces.append(upstream.take())
            if upstream.is_complete:
                break
            await upstream.read_more(exchange.parking)
    except DeadlinePassed:
        raise UpstreamError(
            UpstreamError.TIMEOUT, "answer not complete within the timeout", was_sent=True
        ) from None
    body = wrapped_rerank(b"".join(pieces), call.document, call.request_id, time.time())
    head = exchange.head_block(upstream.status, returned(upstream.headers) + lines.id_line, len(body))
    await exchange.write(head + body)
    return Told()


def _target(target: str, pool: Pool, candidates: Sequence[Worker]) -> Worker:
    """The worker that `X-SMG-Target-Worker` names: an id, or an index among the model's candidates (RT-4)."""
    for worker in candidates:
        if worker.id == target:
            return worker
    if target.isascii() and target.isdigit() and len(target) < 6 and int(target) < len(candidates):
        return candidates[int(target)]
    raise problem.no_available_workers("X-SMG-Target-Worker names no available worker of this model")


def retry_after_s(headers: list[tuple[bytes, bytes]]) -> float | None:
    """Seconds of a `Retry-After` header: a number or a date (RFC 9110 section 10.2.3); None without a valid one."""
    value = value_of(headers, b"retry-after")
    if value is None:
        return None
    text = value.decode("latin-1").strip()
    try:
        seconds = float(text)
    except ValueError:
        date = value_of(headers, b"date")
        if date is None:
            return None
        try:
            seconds = (
                parsedate_to_datetime(text) - parsedate_to_datetime(date.decode("latin-1"))
            ).total_seconds()
        except (ValueError, TypeError):
            return None
    return seconds if math.isfinite(seconds) and seconds >= 0 else None
