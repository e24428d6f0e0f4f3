"""WRK-6 to WRK-16: the worker API over a real registry and the real jobs."""

from __future__ import annotations

from random import Random
from typing import Any
from uuid import UUID

import pytest

from smg.errors import GatewayError
from smg.fleet import load
from smg.fleet.registry import Registry
from smg.fleet.worker import ModelCard, Status
from smg.gateway import problem
from smg.gateway.workers_api import WorkersApi
from smg.services.worker_jobs import WorkerJobs
from tests.smg.gateway.desk import Engines, Journal, add, document, registry, request

CANARY = "worker-key-canary"


def api(fleet: Registry) -> WorkersApi:
    return WorkersApi(fleet, WorkerJobs(fleet, Engines({}), rng=Random(1), log=Journal()))


async def posted(desk: WorkersApi, body: Any) -> dict[str, Any]:
    response = await desk.add_worker(request("/workers", "POST", body))
    assert response.status == 202
    found = document(response)
    assert isinstance(found, dict)
    return found


async def shown(desk: WorkersApi, worker_id: str) -> dict[str, Any]:
    found = document(await desk.get_worker(request(f"/workers/{worker_id}")))
    assert isinstance(found, dict)
    return found


async def test_wrk_6_a_new_worker_is_accepted_with_its_place() -> None:
    desk = api(registry())
    response = await desk.add_worker(request("/workers", "POST", {"url": "HTTP://Host:8000/"}))
    found = document(response)
    assert response.status == 202
    assert found["status"] == "accepted"
    assert found["url"] == "http://host:8000"
    assert UUID(found["worker_id"]).version == 5
    assert found["location"] == f"/workers/{found['worker_id']}" == dict(response.headers)["location"]
    assert found["message"]


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"[]", {}, {"url": ""}, {"url": "host:1"}, {"url": 5}, {"url": "ftp://h"}, {"url": "http://h", "priority": "x"},
     {"url": "http://h", "labels": {"a": 1}}, {"url": "http://h", "worker_type": "other"}],
)  # fmt: skip
async def test_wrk_7_a_wrong_specification_is_bad_request(body: Any) -> None:
    with pytest.raises(GatewayError) as caught:
        await api(registry()).add_worker(request("/workers", "POST", body))
    assert (caught.value.status, caught.value.code) == (400, "BAD_REQUEST")


async def test_wrk_7_a_url_twice_is_a_conflict() -> None:
    fleet = registry()
    desk = api(fleet)
    await posted(desk, {"url": "http://a:1"})
    add(fleet, "b")
    for url, code in (
        ("http://A:1/", "WORKER_CREATE_IN_PROGRESS"),
        ("http://b:8000", "WORKER_ALREADY_EXISTS"),
    ):
        with pytest.raises(GatewayError) as caught:
            await desk.add_worker(request("/workers", "POST", {"url": url}))
        assert (caught.value.status, caught.value.code) == (409, code)


async def test_wrk_8_the_list_is_in_order_of_registration_with_counts() -> None:
    fleet = registry()
    for name, kind in (("z", "regular"), ("a", "prefill"), ("m", "decode"), ("b", "regular")):
        add(fleet, name, "m", worker_type=kind)
    found = document(await api(fleet).list_workers(request("/workers")))
    assert [worker["url"] for worker in found["workers"]] == [f"http://{name}:8000" for name in "zamb"]
    assert found["total"] == 4
    assert found["stats"] == {"prefill_count": 1, "decode_count": 1, "regular_count": 2}


async def test_wrk_8_a_model_selects_by_name_and_alias() -> None:
    fleet = registry(short="one")
    add(fleet, "a", "one")
    add(fleet, "b", "two", worker_type="decode")
    carded = add(fleet, "c")
    fleet.set_models(carded, (ModelCard("three", ("drei",)),))
    desk = api(fleet)
    for model, names in (("one", "a"), ("short", "a"), ("two", "b"), ("drei", "c"), ("none", "")):
        found = document(await desk.list_workers(request(f"/workers?model={model}")))
        assert [worker["url"] for worker in found["workers"]] == [f"http://{name}:8000" for name in names]
        assert found["total"] == len(names)
        assert sum(found["stats"].values()) == len(names)


async def test_wrk_9_every_field_is_shown() -> None:
    fleet = registry()
    worker = add(
        fleet, "a", worker_type="prefill", runtime_type="sglang", labels={"zone": "x"}, priority=70, cost=2.0,
        bootstrap_port=9000, dp_rank=1, dp_size=4, models=(ModelCard("m", ("alias",)), ModelCard("n")),
    )  # fmt: skip
    load.begin(worker)
    found = await shown(api(fleet), worker.id)
    assert found.pop("health")["check_interval_secs"] == 60.0
    assert found.pop("resilience")["cb_failure_threshold"] == 10
    assert found == {
        "id": worker.id,
        "url": "http://a:8000@1",
        "model_id": "m",
        "models": [{"id": "m", "aliases": ["alias"]}, {"id": "n", "aliases": []}],
        "worker_type": "prefill",
        "connection_mode": "http",
        "runtime_type": "sglang",
        "labels": {"zone": "x"},
        "priority": 70,
        "cost": 2.0,
        "bootstrap_port": 9000,
        "dp_rank": 1,
        "dp_size": 4,
        "is_healthy": True,
        "status": "ready",
        "load": 1,
    }


async def test_wrk_9_optional_fields_are_left_out_when_they_say_nothing() -> None:
    fleet = registry()
    worker = add(fleet, "a")
    found = await shown(api(fleet), worker.id)
    assert not {"bootstrap_port", "dp_rank", "dp_size", "job_status"} & found.keys()
    assert (found["model_id"], found["models"], found["runtime_type"]) == (None, [], None)


@pytest.mark.parametrize(
    ("worker_id", "status", "code"),
    [("nothing", 400, "BAD_REQUEST"), ("00000000-0000-0000-0000-000000000000", 404, "WORKER_NOT_FOUND"), ("%ff", 400, "BAD_REQUEST")],
)  # fmt: skip
async def test_wrk_9_ids_that_are_none_or_unknown(worker_id: str, status: int, code: str) -> None:
    desk = api(registry())
    target = f"/workers/{worker_id}"
    for handler, method in (
        (desk.get_worker, "GET"),
        (desk.patch_worker, "PATCH"),
        (desk.put_worker, "PUT"),
        (desk.delete_worker, "DELETE"),
    ):
        with pytest.raises(GatewayError) as caught:
            await handler(request(target, method, {"url": "http://a"}))
        assert (caught.value.status, caught.value.code) == (status, code)


async def test_wrk_10_a_worker_that_is_not_up_shows_its_job_and_why() -> None:
    fleet = registry()
    desk = api(fleet)
    accepted = await posted(desk, {"url": "http://a:1"})
    worker = fleet.by_id(accepted["worker_id"])
    assert worker is not None
    fleet.set_status(worker, Status.PENDING, 1.0, "connection refused")
    found = await shown(desk, worker.id)
    assert (found["is_healthy"], found["status"]) == (False, "pending")
    job = found["job_status"]
    assert job.keys() == {"job_type", "worker_url", "status", "message", "timestamp"}
    assert (job["worker_url"], job["message"]) == ("http://a:1", "connection refused")
    assert job["status"] in ("pending", "processing")


async def test_wrk_11_patch_changes_what_it_names_and_nothing_else() -> None:
    fleet = registry()
    desk = api(fleet)
    accepted = await posted(
        desk,
        {"url": "http://a:1", "priority": 10, "labels": {"a": "1", "b": "2"}, "model_id": "m", "cost": 3.0},
    )
    body = {
        "priority": 20,
        "labels": {"b": "3"},
        "api_key": CANARY,
        "health": {"timeout_secs": 1.5},
        "other": 1,
    }
    response = await desk.patch_worker(request(accepted["location"], "PATCH", body))
    assert response.status == 202
    assert document(response)["worker_id"] == accepted["worker_id"]
    found = await shown(desk, accepted["worker_id"])
    assert (found["priority"], found["cost"], found["model_id"]) == (20, 3.0, "m")
    assert found["labels"] == {"a": "1", "b": "3"}
    worker = fleet.by_id(accepted["worker_id"])
    assert worker is not None
    assert worker.spec.api_key == CANARY
    assert worker.spec.health.timeout_secs == 1.5


async def test_wrk_12_put_replaces_everything_but_id_and_url() -> None:
    desk = api(registry())
    accepted = await posted(
        desk, {"url": "http://a:1", "priority": 10, "labels": {"a": "1"}, "model_id": "m"}
    )
    target = accepted["location"]
    response = await desk.put_worker(request(target, "PUT", {"url": "http://a:1", "cost": 4.0}))
    assert response.status == 202
    found = await shown(desk, accepted["worker_id"])
    assert (found["priority"], found["cost"], found["labels"]) == (50, 4.0, {})
    with pytest.raises(GatewayError) as caught:
        await desk.put_worker(request(target, "PUT", {"url": "http://b:1"}))
    assert caught.value.status == 400
    assert caught.value.message.startswith("URL mismatch")


async def test_wrk_13_delete_drains_at_once() -> None:
    fleet = registry()
    worker = add(fleet, "a", "m")
    load.begin(worker)
    desk = api(fleet)
    response = await desk.delete_worker(request(f"/workers/{worker.id}", "DELETE"))
    assert response.status == 202
    found = await shown(desk, worker.id)
    assert (found["status"], found["is_healthy"], found["load"]) == ("draining", False, 1)
    assert found["job_status"]["status"] == "processing"
    pool = fleet.pool("m")
    assert pool is not None
    assert not pool.candidates(1.0)


async def test_wrk_14_a_key_is_in_no_answer_and_no_error() -> None:
    desk = api(registry())
    accepted = await posted(desk, {"url": "http://a:1", "api_key": CANARY})
    target = accepted["location"]
    answers = [
        await desk.list_workers(request("/workers")),
        await desk.get_worker(request(target)),
        await desk.patch_worker(request(target, "PATCH", {"api_key": CANARY + "2"})),
        await desk.put_worker(request(target, "PUT", {"url": "http://a:1", "api_key": CANARY})),
        await desk.delete_worker(request(target, "DELETE")),
    ]
    for response in answers:
        assert CANARY.encode() not in response.body
        assert CANARY not in repr(response.headers)
    wrong: list[Any] = [
        {"url": "http://a:1", "api_key": CANARY, "priority": CANARY},
        {"url": "http://b:1", "api_key": [CANARY]},
        {"url": "http://b:1", "api_key": CANARY + "\n"},
        {"url": "http://b:1", "api_key": CANARY, "labels": CANARY},
        {"url": "http://a:1", "api_key": CANARY},
        ('{"url":"http://b:1","api_key":"' + CANARY + '"').encode(),
    ]
    for body in wrong:
        with pytest.raises(GatewayError) as caught:
            await desk.add_worker(request("/workers", "POST", body))
        assert CANARY.encode() not in problem.body_of(caught.value, "worker", "rid")
