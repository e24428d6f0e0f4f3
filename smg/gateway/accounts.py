"""What a request costs its tenant: reserved before it is routed, settled and written into the book when it is over.

Owns the meeting of answers with `tenancy/limits` (contract ADM-4, ADM-8) and `tenancy/usage`: how many tokens an answer was,
what of it is an estimate, and what a refused client is told. It decides nothing about routing, and without limits a request
pays for one look-up and four additions.

What is counted:

    answered, usage told        what the worker told
    answered, usage not told    the estimate of the prompt, and an estimate of what was sent (a look at its last bytes)
    the client left             the same, with what had been told and sent by then; all comes back if no worker was asked yet
    an error of the worker      no tokens; the request itself comes back too for 429 and 5xx
    an error of the gateway     nothing: all comes back
"""

from __future__ import annotations

import math

from smg.api.call import Call
from smg.api.endpoints import CHAT, COMPLETIONS, GENERATE, MESSAGES, RESPONSES
from smg.errors import GatewayError
from smg.gateway.gates import Tenants
from smg.gateway.relay import Usage
from smg.gateway.tallies import Lane
from smg.net.exchange import Exchange
from smg.telemetry.metrics import Metrics
from smg.tenancy.limits import REQUESTS, TOKENS, TOO_LARGE, Reservation, TenantLimited, TenantLimits
from smg.tenancy.usage import Book, Entry, Names

_GENERATING = frozenset((CHAT, COMPLETIONS, GENERATE, MESSAGES, RESPONSES))
"""Whose answers are tokens; those of the others are numbers."""

_LIMITED_STATUSES = (429, 503)


class Accounts:
    """The accounts of one node. `limits` is None without tenant limits; `book` is always kept."""

    __slots__ = ("_metrics", "_names", "book", "limits", "tenants")

    def __init__(self, tenants: Tenants, book: Book, metrics: Metrics, limits: TenantLimits | None) -> None:
        self.tenants = tenants
        self._metrics = metrics
        self._names = Names()
        self.book = book
        self.limits = limits

    def refused(self, exchange: Exchange, limited: TenantLimited) -> GatewayError:
        """The 429 `tenant_rate_limit_exceeded` of a request that its tenant's limits do not let in, counted (ERR-13)."""
        self._metrics.counter(
            "smg_tenant_rejected_total",
            tenant=self._names.of(self.tenants.of(exchange)),
            reason=limited.reason,
        ).value += 1
        return _refusal(limited)

    def answered(
        self,
        exchange: Exchange,
        call: Call,
        lane: Lane,
        reservation: Reservation | None,
        status: int,
        now: float,
    ) -> None:
        """A worker's answer with this status is with the client."""
        usage: Usage | None = call.told.usage
        if (
            usage is None
            or status >= 400
            or (prompt_tokens := usage.prompt_tokens) is None
            or (completion_tokens := usage.completion_tokens) is None
            or call.endpoint is MESSAGES
        ):
            self._settle(exchange, call, lane, reservation, status, now)
            return
        entry = lane.entries.get(exchange.head.tenant or "") or self._entry(exchange, lane)
        entry.requests += 1
        entry.completion_tokens += completion_tokens
        entry.prompt_tokens += prompt_tokens
        if usage.cached_tokens:
            entry.cached_tokens += usage.cached_tokens
        if reservation is not None:
            reservation.settle(prompt_tokens + completion_tokens, now)

    def failed(
        self,
        exchange: Exchange,
        call: Call,
        lane: Lane,
        reservation: Reservation | None,
        is_gone: bool,
        now: float,
    ) -> None:
        """No answer came to its end: the gateway answered with an error, or the client left (`is_gone`)."""
        if call.told is not None and (is_gone or exchange.has_begun_answer):
            self._settle(exchange, call, lane, reservation, 200, now)
        elif reservation is not None:
            reservation.refund(now)

    def mark(self, exchange: Exchange, model: str, error: GatewayError, now: float) -> None:
        """Adds what is left to the tenant to a 429 or 503 (ADM-8); for a model that is not known, `model` is empty."""
        limits = self.limits
        if limits is None or error.status not in _LIMITED_STATUSES:
            return
        found = limits.allowances(self.tenants.of(exchange), model, now)
        for kind in (REQUESTS, TOKENS):
            allowance = found.get(kind)
            if allowance is not None:
                error.headers += (
                    (f"x-ratelimit-limit-{kind}", str(allowance.limit)),
                    (f"x-ratelimit-remaining-{kind}", str(allowance.remaining)),
                    (f"x-ratelimit-reset-{kind}", f"{math.ceil(allowance.reset_s)}s"),
                )

    def _settle(
        self,
        exchange: Exchange,
        call: Call,
        lane: Lane,
        reservation: Reservation | None,
        status: int,
        now: float,
    ) -> None:
        if status >= 400:
            if reservation is not None:
                if status == 429 or status >= 500:
                    reservation.refund(now)
                else:
                    reservation.settle(0, now)
            return
        usage, is_estimate = used(call)
        prompt_tokens, completion_tokens = usage.prompt_tokens or 0, usage.completion_tokens or 0
        entry = lane.entries.get(exchange.head.tenant or "") or self._entry(exchange, lane)
        entry.requests += 1
        entry.estimated_requests += is_estimate
        entry.prompt_tokens += prompt_tokens
        entry.cached_tokens += usage.cached_tokens or 0
        entry.completion_tokens += completion_tokens
        if reservation is not None:
            reservation.settle(prompt_tokens + completion_tokens, now)

    def _entry(self, exchange: Exchange, lane: Lane) -> Entry:
        """The tenant's line for the lane's model; remembered with the lane when it is the tenant's own."""
        tenant = self.tenants.of(exchange)
        entry = self.book.entry(tenant, lane.model)
        if entry.tenant == tenant:
            lane.entries[tenant] = entry
        return entry


def used(call: Call) -> tuple[Usage, bool]:
    """The tokens that a call's last attempt was, and whether a part of them is an estimate."""
    told = call.told
    endpoint = call.endpoint
    usage: Usage | None = told.usage or told.partial
    is_whole = told.usage is not None
    prompt_tokens = None if usage is None else usage.prompt_tokens
    completion_tokens = None if usage is None else usage.completion_tokens
    cached_tokens = 0 if usage is None else usage.cached_tokens or 0
    is_estimate = not is_whole
    if prompt_tokens is None:
        prompt_tokens, is_estimate = call.prompt_tokens_estimate(), True
    elif endpoint is MESSAGES and usage is not None:
        # Anthropic's input_tokens are those that were neither read from the cache nor written to it.
        prompt_tokens += cached_tokens + (usage.written_tokens or 0)
    if endpoint not in _GENERATING:
        completion_tokens = completion_tokens or 0
    elif completion_tokens is None or (not is_whole and endpoint is MESSAGES):
        # The first event of a message has the prompt's tokens, and says of the answer's that there were none yet.
        sent_tokens = told.output_tokens
        asked_tokens = call.output_tokens_asked()
        if asked_tokens:
            sent_tokens = min(sent_tokens, asked_tokens)
        completion_tokens, is_estimate = max(completion_tokens or 0, sent_tokens), True
    return Usage(prompt_tokens, completion_tokens, cached_tokens), is_estimate


def _refusal(limited: TenantLimited) -> GatewayError:
    """The 429 that tells what was used up and when to come back; one that can never be admitted says so to SDKs too."""
    headers: tuple[tuple[str, str], ...] = ()
    limit = f"{limited.per_minute:.0f}"
    if limited.reason == TOO_LARGE:
        # The SDKs of OpenAI and Anthropic do not try again when this header says so.
        headers = (("x-should-retry", "false"),)
        message = (
            f"The request asks for about {limited.asked:.0f} tokens (its prompt and the most it may generate), more than the "
            f"limit of {limit} tokens per minute; it can never be admitted: shorten the prompt or lower the tokens to generate"
        )
    elif limited.reason == TOKENS:
        message = f"The limit of {limit} tokens per minute is used up; the request asks for about {limited.asked:.0f}"
    else:
        message = f"The limit of {limit} requests per minute is used up"
    return GatewayError(
        429,
        "tenant_rate_limit_exceeded",
        message,
        retry_after_s=limited.retry_after_s,
        headers=headers,
    )
