"""From what a request names to what it means: model, pool, routing key (MOD-4, MOD-5, ERR-9, ERR-15, RT-5).

Owns these three questions for everybody who asks them: the request path and `explain`, which must agree (EXP-4). Reads
the registry, changes nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from smg.errors import GatewayError
from smg.fleet.pool import Pool
from smg.fleet.registry import Registry
from smg.fleet.worker import Kind, Status
from smg.gateway import problem

ROUTING_KEY_HEADER = b"x-smg-routing-key"
ROUTING_KEY_BYTES_MAX = 1024
"""A longer value is no key: sticky maps keep every key they see."""


def model_of(registry: Registry, asked: str) -> str:
    """The canonical name of the model a request asks for; the only one there is when it names none (MOD-5).

    Empty when no worker tells a model. Raises `GatewayError` 400 `missing_model` when several are served.
    """
    if asked:
        return registry.resolve(asked)
    served = registry.served_models()
    if len(served) > 1:
        raise GatewayError(
            400, "missing_model", "Several models are served; name one in `model`", param="model"
        )
    return served[0] if served else ""


def no_pool(registry: Registry, model: str) -> GatewayError:
    """Why nobody serves `model`: 503 while there is no worker at all or one has yet to tell its models (ERR-15), else
    404 (ERR-9)."""
    workers = registry.workers()
    if not workers and not model:
        return problem.no_available_workers()
    if any(worker.status is Status.PENDING and not worker.models for worker in workers):
        return problem.no_available_workers("A worker has not reported its models yet")
    return problem.model_not_found(model)


def pool_of(registry: Registry, model: str) -> Pool:
    """The regular workers of a canonical model name. Raises `GatewayError` 404 or 503, see `no_pool`."""
    pool = registry.pool(model)
    if pool is None:
        raise no_pool(registry, model)
    return pool


def pair_pool(registry: Registry, model: str) -> Pool | None:
    """The decode workers of a canonical model name, or the prefill workers when only those told the name; None when
    nobody of either kind can serve it. Raises `GatewayError` 503 when one leg is missing (PD-2)."""
    prefills = registry.pool_of(model, Kind.PREFILL)
    decodes = registry.pool_of(model, Kind.DECODE)
    if prefills is None and decodes is None:
        return None
    if prefills is None or decodes is None:
        raise missing_leg(Kind.DECODE if decodes is None else Kind.PREFILL)
    return decodes if decodes.model else prefills


def missing_leg(kind: Kind) -> GatewayError:
    """PD-2: a leg without a worker."""
    return problem.no_available_workers(f"No {kind.value} worker is available for this request at the moment")


def routing_key_of(fields: Mapping[bytes, bytes], names: Sequence[bytes]) -> str | None:
    """The first of the headers `names` that holds visible text (RT-5), or None."""
    for name in names:
        value = fields.get(name)
        if value and len(value) <= ROUTING_KEY_BYTES_MAX and value.isascii():
            text = value.decode("ascii").strip()
            if text.isprintable() and text:
                return text
    return None


def key_headers(configured: Sequence[str]) -> tuple[bytes, ...]:
    """The headers that may hold a routing key, in order: our own first, then `--routing-key-headers`."""
    return (ROUTING_KEY_HEADER, *(name.lower().encode("latin-1") for name in configured))
