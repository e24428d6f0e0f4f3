"""`GET /v1/models`: which models clients may name (MOD-1).

Owns the shape of the list and of one entry. What is served is the registry's knowledge; aliases are accepted where a
model is named (MOD-4) and are not listed.
"""

from __future__ import annotations

from typing import Any

from smg.errors import GatewayError
from smg.fleet.registry import Registry
from smg.gateway import problem
from smg.net.plain import Request, Response, json_response
from smg.wire.headers import path_value


class Models:
    """The endpoints `models` and `model`."""

    def __init__(self, registry: Registry) -> None:
        self._registry = registry

    async def models(self, request: Request) -> Response:
        """Every served model once, in order of its id. Raises `GatewayError` 503 `no_models_available`."""
        served = self._registry.served_models()
        if not served:
            raise GatewayError(503, "no_models_available", "No worker has told a model yet")
        return json_response(200, {"object": "list", "data": [_entry(model) for model in served]})

    async def model(self, request: Request) -> Response:
        """One entry, by name or alias; slashes in the id may be sent plain or as `%2F`. Raises `GatewayError` 404."""
        asked = path_value(request.path_params["id"])
        model = self._registry.resolve(asked)
        if model not in self._registry.served_models():
            raise problem.model_not_found(asked)
        return json_response(200, _entry(model))


def _entry(model: str) -> dict[str, Any]:
    return {"id": model, "object": "model", "created": 0, "owned_by": "self_hosted"}
