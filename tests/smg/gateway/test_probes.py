"""LIFE-1 to LIFE-4: the probes."""

from __future__ import annotations

import pytest

from smg.errors import GatewayError
from smg.fleet.worker import Status
from smg.gateway.probes import Probes
from tests.smg.gateway.desk import add, document, registry, request


@pytest.mark.parametrize("path", ["/liveness", "/health"])
async def test_life_1_liveness_is_ok_with_no_workers_and_while_draining(path: str) -> None:
    probes = Probes(registry(), lambda: True)
    for handler in (probes.liveness, probes.only_probes):
        response = await handler(request(path))
        assert (response.status, response.body) == (200, b"OK")
        assert response.content_type.startswith("text/plain")


async def test_life_2_readiness_counts_workers() -> None:
    fleet = registry()
    add(fleet, "a", "m")
    add(fleet, "b", "m", status=Status.PENDING)
    response = await Probes(fleet, lambda: False).readiness(request("/readiness"))
    assert response.status == 200
    assert document(response) == {"status": "ready", "healthy_workers": 1, "total_workers": 2}


@pytest.mark.parametrize("status", [Status.PENDING, Status.NOT_READY, Status.FAILED, Status.DRAINING])
async def test_life_2_a_worker_that_is_not_ready_is_not_enough(status: Status) -> None:
    fleet = registry()
    add(fleet, "a", "m", status=status)
    response = await Probes(fleet, lambda: False).readiness(request("/readiness"))
    assert response.status == 503
    assert document(response) == {"status": "not ready", "reason": "insufficient healthy workers"}


async def test_life_2_draining_wins() -> None:
    fleet = registry()
    for _ in range(2):
        response = await Probes(fleet, lambda: True).readiness(request("/readiness"))
        assert response.status == 503
        assert document(response) == {"status": "not ready", "reason": "draining"}
        if not fleet.workers():
            add(fleet, "a", "m")


async def test_life_2_with_pairs_one_of_each_kind_is_needed() -> None:
    fleet = registry()
    probes = Probes(fleet, lambda: False, needs_pair=True)
    add(fleet, "regular", "m")
    add(fleet, "prefill", "m", worker_type="prefill")
    assert (await probes.readiness(request("/readiness"))).status == 503
    add(fleet, "decode", "m", worker_type="decode")
    assert (await probes.readiness(request("/readiness"))).status == 200


async def test_life_3_a_change_shows_at_once() -> None:
    fleet = registry()
    worker = add(fleet, "a", "m")
    probes = Probes(fleet, lambda: False)
    assert (await probes.readiness(request("/readiness"))).status == 200
    fleet.set_status(worker, Status.NOT_READY, 1.0)
    assert (await probes.readiness(request("/readiness"))).status == 503


async def test_life_4_the_second_listener_has_the_probes_only() -> None:
    probes = Probes(registry(), lambda: False)
    assert (await probes.only_probes(request("/readiness"))).status == 503
    for path in ("/workers", "/v1/models", "/metrics", "/", "/health/"):
        with pytest.raises(GatewayError) as caught:
            await probes.only_probes(request(path))
        assert caught.value.status == 404
    with pytest.raises(GatewayError) as caught:
        await probes.only_probes(request("/health", "POST"))
    assert caught.value.status == 405
