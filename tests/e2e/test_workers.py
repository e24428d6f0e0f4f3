"""Registration and the worker API over HTTP, and how health shows (contract sections 10 and 11)."""

from __future__ import annotations

import json
from uuid import NAMESPACE_URL, uuid4, uuid5

import pytest
import trio

from tests.e2e.fake_worker import Gate, answers, fake_worker, fake_workers, hangs
from tests.e2e.gateway import CHAT, HELLO, eventually, request, running_gateway


@pytest.mark.parametrize("status", [200, 204, 401, 403, 404, 405, 501])
async def test_wrk_1_a_server_that_accepts_and_answers_the_probe_is_ready(status):
    async with fake_worker() as worker, running_gateway() as gateway:
        worker.on_path["/health"] = answers(status, body=b"", type=None)
        assert (await gateway.ask("/workers", {"url": worker.url})).status == 202
        await eventually(lambda: gateway.ready_count == 1, 0.5)
        assert (await gateway.ask(CHAT, HELLO)).status == 200


async def test_wrk_2_a_worker_that_is_up_is_routable_within_half_a_second():
    async with fake_worker("m") as worker, running_gateway(workers=[worker], ready=False) as gateway:
        await eventually(lambda: gateway.ready_count == 1, 0.5)
        assert (await gateway.ask(CHAT, HELLO)).status == 200


async def test_wrk_2_a_worker_that_starts_later_is_found():
    async with fake_worker("m") as first:
        port = first.port
    url = f"http://127.0.0.1:{port}"
    async with running_gateway("--worker-urls", url, ready=False) as gateway:
        assert (await gateway.ask("/readiness")).status == 503
        shown = (await gateway.ask("/workers")).document["workers"][0]
        assert (shown["status"], shown["is_healthy"]) == ("pending", False)
        await eventually(lambda: gateway.node.registry.workers()[0].message)
        async with fake_worker("m", port=port):
            await eventually(lambda: gateway.ready_count == 1, 2.5)
            assert (await gateway.ask(CHAT, HELLO)).status == 200


async def test_wrk_3_a_worker_whose_probe_is_5xx_stays_pending_and_then_fails_and_comes_back():
    flags = (
        "--worker-startup-timeout-secs",
        "0.3",
        "--worker-startup-check-interval",
        "0.1",
        "--health-check-interval-secs",
        "0.1",
    )
    async with fake_worker("m") as worker, running_gateway(*flags) as gateway:
        worker.on_path["/health"] = answers(503)
        await gateway.ask("/workers", {"url": worker.url})

        async def status():
            return (await gateway.ask(f"/workers/{worker.id}")).document["status"]

        assert await status() == "pending"
        assert (await gateway.ask(CHAT, HELLO)).status == 503
        await eventually(lambda: gateway.worker(worker).status.value == "failed")
        worker.on_path["/health"] = answers(200)
        await eventually(lambda: gateway.ready_count == 1)
        assert await status() == "ready"


@pytest.mark.parametrize(
    ("paths", "engine"),
    [
        ({"/v1/models": {"data": [{"id": "m", "owned_by": "sglang"}]}}, "sglang"),
        ({"/v1/models": {"data": [{"id": "m", "owned_by": "vllm"}]}}, "vllm"),
        ({"/version": {"version": "0.9"}}, "vllm"),
        ({"/get_server_info": {"model_path": "m", "tp_size": 1, "version": "0.4"}}, "sglang"),
        ({}, "generic"),
    ],
)
async def test_wrk_4_engines_are_recognised(paths, engine):
    async with fake_worker() as worker, running_gateway() as gateway:
        worker.on_path |= {path: answers(200, document) for path, document in paths.items()}
        await gateway.ask("/workers", {"url": worker.url})
        await eventually(lambda: gateway.worker(worker).engine is not None)
        assert (await gateway.ask(f"/workers/{worker.id}")).document["runtime_type"] == engine


@pytest.mark.parametrize(
    ("spec", "models"),
    [
        ({"model_id": "given"}, ["given"]),
        ({"models": [{"id": "one"}, {"id": "two", "aliases": ["zwei"]}]}, ["one", "two"]),
        ({"labels": {"served_model_name": "label"}}, ["label"]),
        ({"labels": {"model_path": "path"}}, ["path"]),
        ({}, ["x", "y"]),
    ],
)
async def test_wrk_5_where_model_names_come_from(spec, models):
    async with fake_worker("x", "y") as worker, running_gateway() as gateway:
        await gateway.ask("/workers", {"url": worker.url, **spec})
        await eventually(lambda: gateway.ready_count == 1)
        await eventually(lambda: gateway.worker(worker).models == tuple(models))
        listed = (await gateway.ask("/v1/models")).document["data"]
        assert [row["id"] for row in listed] == sorted(models)
        for name in models:
            assert (await gateway.ask(CHAT, {**HELLO, "model": name})).status == 200


async def test_wrk_6_wrk_7_adding_a_worker():
    async with fake_worker("m") as worker, running_gateway() as gateway:
        answer = await gateway.ask("/workers", {"url": worker.url.upper().replace("HTTP", "HTTP") + "/"})
        document = answer.document
        assert answer.status == 202 and document["status"] == "accepted" and document["message"]
        assert document["worker_id"] == worker.id == str(uuid5(NAMESPACE_URL, worker.url))
        assert answer["location"] == document["location"] == f"/workers/{worker.id}"
        assert document["url"] == worker.url
        await eventually(lambda: gateway.ready_count == 1)
        for url in (worker.url, worker.url + "/", worker.url.replace("http", "HTTP")):
            again = await gateway.ask("/workers", {"url": url})
            assert again.is_error(409, "WORKER_ALREADY_EXISTS")
        assert (await gateway.ask("/workers")).document["total"] == 1


async def test_wrk_7_while_a_worker_is_being_added_a_second_is_refused():
    async with fake_worker("m") as worker, running_gateway() as gateway:
        worker.on_path["/health"] = hangs
        assert (await gateway.ask("/workers", {"url": worker.url})).status == 202
        assert (await gateway.ask("/workers", {"url": worker.url})).is_error(409, "WORKER_CREATE_IN_PROGRESS")


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"url": ""},
        {"url": "127.0.0.1:8000"},
        {"url": 5},
        {"url": "ftp://a"},
        {"url": "http://a:99999"},
        {"url": "http://a", "priority": "high"},
        {"url": "http://a", "labels": []},
        {"url": "http://a\r\nx: y"},
        [],
        b"{",
        b"",
    ],
)
async def test_wrk_7_a_bad_specification_is_400(body):
    async with running_gateway() as gateway:
        raw = body if isinstance(body, bytes) else json.dumps(body).encode()
        assert (await gateway.ask("/workers", body=raw)).is_error(400, "BAD_REQUEST")
        assert (await gateway.ask("/workers")).document["total"] == 0


async def test_wrk_8_wrk_9_the_list_is_in_order_and_complete():
    async with (
        fake_workers(3, "m") as workers,
        fake_worker("n") as other,
        running_gateway(workers=[*workers, other]) as gateway,
    ):
        document = (await gateway.ask("/workers")).document
        assert [row["id"] for row in document["workers"]] == [worker.id for worker in (*workers, other)]
        assert document["total"] == 4
        assert document["stats"] == {"prefill_count": 0, "decode_count": 0, "regular_count": 4}
        only = (await gateway.ask("/workers?model=n")).document
        assert [row["id"] for row in only["workers"]] == [other.id]
        assert only["total"] == 1 and only["stats"]["regular_count"] == 1
        row = (await gateway.ask(f"/workers/{other.id}")).document
        assert row == only["workers"][0]
        wanted = "id url model_id models worker_type connection_mode runtime_type labels priority cost health resilience is_healthy status load"
        assert set(wanted.split()) <= row.keys()
        assert (row["url"], row["model_id"], row["worker_type"], row["priority"], row["cost"]) == (
            other.url,
            "n",
            "regular",
            50,
            1.0,
        )
        assert (await gateway.ask("/workers/not-a-uuid")).is_error(400, "BAD_REQUEST")
        assert (await gateway.ask(f"/workers/{uuid4()}")).is_error(404, "WORKER_NOT_FOUND")


async def test_wrk_10_an_unreachable_worker_says_why():
    async with fake_worker() as worker:
        url = worker.url
    async with running_gateway() as gateway:
        location = (await gateway.ask("/workers", {"url": url})).document["location"]
        with trio.fail_after(3):
            while not (row := (await gateway.ask(location)).document).get("job_status", {}).get("message"):
                await trio.lowlevel.checkpoint()
        assert (row["is_healthy"], row["status"]) == (False, "pending")
        job = row["job_status"]
        assert job["worker_url"] == url and job["status"] in ("pending", "processing", "failed")
        assert job["job_type"] and job["timestamp"]


async def test_wrk_11_wrk_12_patch_changes_what_it_names_and_put_replaces():
    async with fake_worker("m") as worker, running_gateway() as gateway:
        await gateway.ask(
            "/workers", {"url": worker.url, "priority": 70, "cost": 2.0, "labels": {"a": "1", "b": "2"}}
        )
        await eventually(lambda: gateway.ready_count == 1)
        where = f"/workers/{worker.id}"
        patch = {
            "cost": 3.5,
            "labels": {"b": "3", "c": "4"},
            "health": {"timeout_secs": 9},
            "unknown": 1,
            "url": worker.url,
        }
        assert (await gateway.ask(where, patch, method="PATCH")).status == 202
        row = (await gateway.ask(where)).document
        assert (row["priority"], row["cost"], row["labels"]) == (70, 3.5, {"a": "1", "b": "3", "c": "4"})
        assert row["health"]["timeout_secs"] == 9 and row["status"] == "ready"
        assert (await gateway.ask(where, {"url": worker.url, "cost": 1.5}, method="PUT")).status == 202
        row = (await gateway.ask(where)).document
        assert (row["id"], row["priority"], row["cost"], row["labels"]) == (worker.id, 50, 1.5, {})
        wrong = await gateway.ask(where, {"url": "http://127.0.0.1:1"}, method="PUT")
        assert wrong.is_error(400, "BAD_REQUEST") and wrong.document["error"].startswith("URL mismatch")
        await eventually(lambda: gateway.ready_count == 1)
        assert (await gateway.ask(CHAT, HELLO)).status == 200


async def test_wrk_13_an_idle_worker_is_gone_within_a_second_and_then_404():
    async with fake_workers(2, "m") as workers, running_gateway(workers=workers) as gateway:
        where = f"/workers/{workers[0].id}"
        assert (await gateway.ask(where, method="DELETE")).status == 202
        await eventually(lambda: len(gateway.node.registry.workers()) == 1, 1.0)
        assert (await gateway.ask(where)).is_error(404, "WORKER_NOT_FOUND")
        assert (await gateway.ask(where, method="DELETE")).is_error(404, "WORKER_NOT_FOUND")
        for _ in range(4):
            assert (await gateway.ask(CHAT, HELLO)).worker == workers[1].id


async def test_wrk_13_a_busy_worker_drains_and_its_requests_are_not_cut():
    async with (
        fake_workers(2, "m") as workers,
        running_gateway("--policy", "passthrough", workers=workers) as gateway,
    ):
        gate = Gate()
        workers[0].plays.append(gate.before(answers(200, {"late": 1})))
        client = await gateway.connect()
        await client.send(request(CHAT, HELLO))
        await gate.reached.wait()
        where = f"/workers/{workers[0].id}"
        assert (await gateway.ask(where, method="DELETE")).status == 202
        row = (await gateway.ask(where)).document
        assert (row["status"], row["load"]) == ("draining", 1)
        assert (await gateway.ask(CHAT, HELLO)).worker == workers[1].id
        assert (await gateway.ask(CHAT, HELLO, f"x-smg-target-worker: {workers[0].id}")).status == 503
        gate.open.set()
        assert (await client.read()).document == {"late": 1}
        await eventually(lambda: len(gateway.node.registry.workers()) == 1, 1.0)


async def test_wrk_13_the_drain_ends_at_its_timeout():
    async with (
        fake_workers(2, "m") as workers,
        running_gateway("--policy", "passthrough", "--drain-timeout-secs", "0.3", workers=workers) as gateway,
    ):
        workers[0].plays.append(hangs)
        client = await gateway.connect()
        await client.send(request(CHAT, HELLO))
        await workers[0].next_turn()
        await gateway.ask(f"/workers/{workers[0].id}", method="DELETE")
        await eventually(lambda: len(gateway.node.registry.workers()) == 1, 2)


async def test_wrk_13_a_worker_may_come_back_after_it_left():
    async with fake_worker("m") as worker, running_gateway(workers=[worker]) as gateway:
        for _ in range(3):
            await gateway.ask(f"/workers/{worker.id}", method="DELETE")
            await eventually(lambda: not gateway.node.registry.workers())
            assert (await gateway.ask(CHAT, HELLO)).status in (404, 503)
            assert (await gateway.ask("/workers", {"url": worker.url})).status == 202
            await eventually(lambda: gateway.ready_count == 1)
            await eventually(lambda: gateway.worker(worker).models == ("m",))
            assert (await gateway.ask(CHAT, HELLO)).status == 200


async def test_wrk_16_cost_weighs_in_least_load():
    async with (
        fake_workers(2, "m") as workers,
        running_gateway("--policy", "least_load", "--disable-load-monitoring") as gateway,
    ):
        for worker, cost in zip(workers, (1.0, 3.0), strict=True):
            await gateway.ask("/workers", {"url": worker.url, "cost": cost})
        await eventually(lambda: gateway.ready_count == 2)
        await eventually(lambda: all(gateway.worker(worker).models for worker in workers))
        gate = Gate()
        for worker in workers:
            worker.play = gate.before(answers(200))
        clients = [await gateway.connect() for _ in range(8)]
        for number, client in enumerate(clients):
            await client.send(request(CHAT, HELLO))
            await eventually(lambda n=number: sum(len(worker.turns) for worker in workers) == n + 1)
        assert len(workers[0].turns) > len(workers[1].turns) > 0
        gate.open.set()
        for client in clients:
            await client.read()


async def test_wrk_17_a_dp_worker_becomes_its_ranks():
    async with (
        fake_worker("m") as worker,
        running_gateway("--dp-aware", "--policy", "round_robin") as gateway,
    ):
        worker.on_path["/server_info"] = answers(
            200, {"dp_size": 2, "model_path": "m", "tp_size": 2, "version": "0.4"}
        )
        worker.on_path["/get_server_info"] = worker.on_path["/server_info"]
        await gateway.ask("/workers", {"url": worker.url})
        await eventually(lambda: gateway.ready_count == 2)
        rows = (await gateway.ask("/workers")).document["workers"]
        assert sorted(row["url"] for row in rows) == [f"{worker.url}@0", f"{worker.url}@1"]
        assert {row["id"] for row in rows} == {str(uuid5(NAMESPACE_URL, row["url"])) for row in rows}
        ids = {row["dp_rank"]: row["id"] for row in rows}
        client = await gateway.connect()
        for _ in range(6):
            answer = await client.ask(CHAT, HELLO)
            turn = await worker.next_turn()
            assert answer.worker == ids[turn.document["data_parallel_rank"]]
            assert turn.path == CHAT
        assert {turn.document["data_parallel_rank"] for turn in worker.turns} == {0, 1}
        await gateway.ask(f"/workers/{ids[0]}", method="DELETE")
        await eventually(lambda: len(gateway.node.registry.workers()) == 1)
        assert (await client.ask(CHAT, HELLO)).worker == ids[1]


async def test_wrk_18_a_discovery_file_is_followed_and_a_broken_one_changes_nothing(tmp_path):
    roster = tmp_path / "workers.json"

    def write(*urls):
        roster.write_text(json.dumps({"version": 1, "workers": [{"url": url} for url in urls]}))

    async with fake_workers(2, "m") as workers, fake_worker("m") as by_hand:
        write(workers[0].url)
        flags = "--discovery-file", str(roster), "--discovery-check-interval-secs", "0.05"
        async with running_gateway(*flags, workers=[by_hand], ready=False) as gateway:
            await eventually(lambda: gateway.ready_count == 2)
            write(workers[0].url, workers[1].url)
            await eventually(lambda: gateway.ready_count == 3)
            roster.write_text("{ broken")
            write(workers[1].url)
            await eventually(lambda: gateway.node.registry.by_id(workers[0].id) is None)
            assert gateway.node.registry.by_id(by_hand.id) is not None


async def test_hlt_1_a_worker_goes_and_comes_with_its_probes():
    flags = (
        "--health-check-interval-secs",
        "0.05",
        "--health-failure-threshold",
        "2",
        "--health-success-threshold",
        "2",
    )
    async with fake_worker("m") as worker, running_gateway(*flags, workers=[worker]) as gateway:
        worker.on_path["/health"] = answers(500)
        await eventually(lambda: gateway.ready_count == 0)
        assert gateway.worker(worker).status.value in ("not_ready", "failed")
        assert (await gateway.ask("/readiness")).document == {
            "status": "not ready",
            "reason": "insufficient healthy workers",
        }
        assert (await gateway.ask(CHAT, HELLO)).is_error(503, "no_available_workers")
        worker.on_path["/health"] = answers(200)
        await eventually(lambda: gateway.ready_count == 1)
        assert (await gateway.ask(CHAT, HELLO)).status == 200
        assert gateway.metric("smg_worker_health_checks_total", result="failure") >= 2


async def test_hlt_3_without_health_checks_a_worker_is_ready_and_never_probed():
    async with (
        fake_worker("m") as worker,
        running_gateway("--disable-health-check", workers=[worker]) as gateway,
    ):
        assert (await gateway.ask(CHAT, HELLO)).status == 200
        assert "/health" not in {turn.path for turn in worker.asked}


async def test_hlt_4_a_failed_worker_leaves_when_asked_to():
    flags = (
        "--health-check-interval-secs",
        "0.05",
        "--health-failure-threshold",
        "1",
        "--remove-unhealthy-workers",
    )
    async with fake_worker("m") as worker, running_gateway(*flags, workers=[worker]) as gateway:
        worker.on_path["/health"] = answers(500)
        await eventually(lambda: not gateway.node.registry.workers())
