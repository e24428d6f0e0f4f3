"""Why a request would go where: `POST /route/explain` (contract section 13).

Owns the reading of an explain call and the table of candidates. It asks the same policy instance the same question as
the request path, with a copy of its random state, so that it predicts the next choice (EXP-3, EXP-4); nothing is
sent, placed or counted (EXP-1).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from random import Random
from typing import Any

from smg.api import checks
from smg.api.call import Call
from smg.api.endpoints import CHAT, COMPLETIONS, EMBEDDINGS, ENDPOINTS, GENERATE, RERANK, Endpoint
from smg.errors import GatewayError
from smg.fleet.pool import Pool
from smg.fleet.registry import Registry
from smg.fleet.worker import Worker
from smg.gateway.mesh_api import SessionOwners
from smg.gateway.receipts import blocks_of, decided_by
from smg.gateway.resolve import key_headers, model_of, pool_of, routing_key_of
from smg.net.plain import Request, Response, json_response
from smg.policies.policy import Policy, Terms, Wants
from smg.policies.routing_table import PolicyTable

BLOCK_CHARS = 512
"""Characters of a prompt that are hashed as one block, unless the node says otherwise."""

_GUESSES: tuple[tuple[str, Endpoint], ...] = (
    ("messages", CHAT),
    ("prompt", COMPLETIONS),
    ("text", GENERATE),
    ("input", EMBEDDINGS),
    ("query", RERANK),
)


class Explain:
    """The endpoint `explain`.

    `rng` is the random state that dispatch chooses with; it is copied, never used. `now_s` is the clock of dispatch.
    `keys_override`: every policy obeys routing keys (`--routing-key-override`). `sheds_overload`: nobody gets a request
    while all are overloaded (`--worker-overload-shed`). `owners`: other nodes of a mesh, which decide for some requests;
    they are asked, and book nothing.
    """

    def __init__(
        self,
        registry: Registry,
        policies: PolicyTable,
        rng: Random,
        now_s: Callable[[], float],
        *,
        routing_key_headers: Sequence[str] = (),
        keys_override: bool = False,
        sheds_overload: bool = False,
        block_chars: int = BLOCK_CHARS,
        body_bytes_max: int | None = None,
        owners: SessionOwners | None = None,
    ) -> None:
        self._registry = registry
        self._policies = policies
        self._rng = rng
        self._now_s = now_s
        self._key_headers = key_headers(routing_key_headers)
        self._keys_override = keys_override
        self._sheds_overload = sheds_overload
        self._block_chars = block_chars
        self._body_bytes_max = body_bytes_max
        self._owners = owners

    async def explain(self, request: Request) -> Response:
        """200 with every worker of the model and the one that would be chosen. Raises `GatewayError` as section 8."""
        body = await request.body(self._body_bytes_max)
        document = checks.decode_object(body)
        endpoint = _endpoint_of(request.params.get("endpoint"), document)
        checks.check(endpoint, document)
        model = model_of(self._registry, document.get("model") or "")
        pool = pool_of(self._registry, model)
        policy = self._policies.policy_for(model)
        fields = dict(request.headers)
        target = fields.get(b"x-smg-target-worker", b"").decode("latin-1").strip()
        key = None
        if self._keys_override or Wants.KEY in policy.wants:
            key = routing_key_of(fields, self._key_headers)
        call = Call(
            endpoint,
            model,
            body,
            document,
            is_stream=checks.is_stream(document),
            routing_key=key,
            target=target or None,
            request_id=request.request_id,
        )
        foreseen = None
        if self._owners is not None and not call.target:
            candidates = pool.candidates(self._now_s())
            if len(candidates) > 1:
                foreseen = await self._owners.predict(call, policy, candidates)
        return json_response(200, self._explained(call, pool, policy, foreseen))

    def _explained(
        self, call: Call, pool: Pool, policy: Policy, foreseen: tuple[Worker, str] | None
    ) -> dict[str, Any]:
        now = self._now_s()
        candidates = pool.candidates(now)
        is_shed = not call.target and self._sheds_overload and pool.is_overloaded(now)
        chosen: Worker | None
        if foreseen is not None and not is_shed and foreseen[0] in candidates:
            chosen, by = foreseen[0], "owner"
        else:
            foreseen = None
            chosen, by = self._chosen(call, policy, () if is_shed else candidates, now)
        terms: dict[str, Terms] = {}
        if candidates:
            told = policy.terms(call, candidates, now, self._copied_rng())
            terms = {row.worker_id: row for row in told}
        why = "target" if call.target else "overload" if is_shed else None
        excluded: dict[str, str | None] = dict.fromkeys((worker.id for worker in candidates), why)
        if chosen is not None:
            excluded[chosen.id] = None
        chars = len(call.text())
        blocks = blocks_of(policy, call, self._block_chars)
        rows = []
        for worker in pool.workers:
            reason = excluded[worker.id] if worker.id in excluded else pool.excluded_by(worker, now)
            rows.append(_row(worker, reason, terms.get(worker.id), blocks, now))
        _rank(rows, chosen)
        answer: dict[str, Any] = {
            "model": call.model,
            "endpoint": call.endpoint.path,
            "policy": policy.name,
            "chosen": chosen.id if chosen is not None else None,
            "decided_by": by,
            **({} if foreseen is None else {"owner": foreseen[1]}),
            "routing_key": call.routing_key,
            "prompt": {"chars": chars, "blocks": blocks, "block_chars": self._block_chars},
            "workers": rows,
        }
        if chosen is None:
            answer["candidates"] = [row["worker_id"] for row in rows if row["eligible"]]
        return answer

    def _chosen(
        self, call: Call, policy: Policy, candidates: Sequence[Worker], now: float
    ) -> tuple[Worker | None, str]:
        """Who would get the call, and which rule says so (EXP-3)."""
        if call.target:
            return targeted(call.target, candidates), "target"
        if len(candidates) == 1:
            return candidates[0], "only_candidate"
        by = decided_by(policy, call)
        if not candidates or (policy.is_random and by == "policy"):
            return None, by
        return policy.choose(call, candidates, now, self._copied_rng()), by

    def _copied_rng(self) -> Random:
        copy = Random()
        copy.setstate(self._rng.getstate())
        return copy


def targeted(target: str, candidates: Sequence[Worker]) -> Worker | None:
    """The candidate that `X-SMG-Target-Worker` names, by id or by index among the candidates (RT-4), or None."""
    for worker in candidates:
        if worker.id == target:
            return worker
    if target.isascii() and target.isdigit() and len(target) < 6 and int(target) < len(candidates):
        return candidates[int(target)]
    return None


def _endpoint_of(told: str | None, document: dict[str, Any]) -> Endpoint:
    if told is not None:
        endpoint = ENDPOINTS.get(told)
        if endpoint is None or not endpoint.is_json:
            raise GatewayError(
                400, "invalid_value", "`endpoint` is no inference path with a JSON body", param="endpoint"
            )
        return endpoint
    for member, endpoint in _GUESSES:
        if member in document:
            return endpoint
    raise GatewayError(
        400,
        "missing_required_parameter",
        "The body has none of messages, prompt, text, input, query; name its path in `?endpoint=`",
        param="endpoint",
    )


def _row(
    worker: Worker, excluded_by: str | None, terms: Terms | None, blocks: int, now: float
) -> dict[str, Any]:
    report = worker.report
    matched = min(terms.matched_blocks, blocks) if terms is not None else 0
    parts = None
    if terms is not None and (terms.wait, terms.prefill, terms.penalty) != (None, None, None):
        parts = {"wait": terms.wait, "prefill": terms.prefill, "penalty": terms.penalty}
    return {
        "worker_id": worker.id,
        "url": worker.url,
        "status": worker.status.value,
        "circuit": worker.breaker.state_at(now),
        "eligible": excluded_by is None,
        "excluded_by": excluded_by,
        "matched_blocks": matched,
        "matched_ratio": matched / blocks if blocks else 0.0,
        "in_flight": worker.in_flight,
        "queued": report.waiting if report is not None else 0,
        "kv_usage": report.kv_usage if report is not None else None,
        "cost": terms.cost if terms is not None else None,
        "terms": parts,
        "rank": None,
        "reason": terms.reason if terms is not None else "",
    }


def _rank(rows: list[dict[str, Any]], chosen: Worker | None) -> None:
    """Numbers the eligible rows: the chosen one first, the others by cost, then in order of registration."""
    chosen_id = chosen.id if chosen is not None else None

    def place(row: dict[str, Any]) -> tuple[bool, bool, float]:
        cost = row["cost"]
        return row["worker_id"] != chosen_id, cost is None, cost if cost is not None else 0.0

    eligible = sorted((row for row in rows if row["eligible"]), key=place)
    for rank, row in enumerate(eligible, start=1):
        row["rank"] = rank
