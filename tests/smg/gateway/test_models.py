"""MOD-1, MOD-4: what clients may name."""

from __future__ import annotations

import pytest

from smg.errors import GatewayError
from smg.fleet.worker import ModelCard
from smg.gateway.models import Models
from tests.smg.gateway.desk import add, document, registry, request


def entry(model: str) -> dict[str, object]:
    return {"id": model, "object": "model", "created": 0, "owned_by": "self_hosted"}


async def test_mod_1_each_model_is_listed_once_in_order_of_its_id() -> None:
    fleet = registry(short="org/a")
    add(fleet, "one", "zeta", "org/a")
    add(fleet, "two", "org/a", "beta")
    response = await Models(fleet).models(request("/v1/models"))
    assert response.status == 200
    assert document(response) == {"object": "list", "data": [entry("beta"), entry("org/a"), entry("zeta")]}


async def test_mod_1_without_a_known_model_there_is_no_list() -> None:
    fleet = registry()
    add(fleet, "any")
    with pytest.raises(GatewayError) as caught:
        await Models(fleet).models(request("/v1/models"))
    assert (caught.value.status, caught.value.code) == (503, "no_models_available")


@pytest.mark.parametrize("path", ["/v1/models/org/a", "/v1/models/org%2Fa", "/v1/models/org%2fa", "/v1/models/short", "/v1/models/card-alias"])  # fmt: skip
async def test_mod_1_mod_4_one_entry_is_found_by_name_and_alias(path: str) -> None:
    fleet = registry(short="org/a")
    worker = add(fleet, "one")
    fleet.set_models(worker, (ModelCard("org/a", ("card-alias",)),))
    response = await Models(fleet).model(request(path))
    assert (response.status, document(response)) == (200, entry("org/a"))


@pytest.mark.parametrize(
    "path", ["/v1/models/nobody", "/v1/models/%ff", "/v1/models/org", "/v1/models/org/a/b"]
)
async def test_mod_1_an_unknown_model_is_404(path: str) -> None:
    fleet = registry()
    add(fleet, "one", "org/a")
    add(fleet, "wild")
    with pytest.raises(GatewayError) as caught:
        await Models(fleet).model(request(path))
    assert (caught.value.status, caught.value.code) == (404, "model_not_found")
