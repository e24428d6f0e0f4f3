"""Admin endpoints, probes and the routes around them (contract sections 3, 13, 16 and 20)."""

from __future__ import annotations

import pytest

from tests.e2e.fake_worker import answers, fake_worker, fake_workers, hangs, says
from tests.e2e.gateway import CHAT, HELLO, eventually, running_gateway

POSTED = "/flush_cache", "/start_profile", "/stop_profile", "/reset_prefix_cache"


async def test_life_1_liveness_and_health_are_ok_without_workers():
    async with running_gateway() as gateway:
        for path in ("/liveness", "/health"):
            for port in (gateway.port, gateway.probe_port):
                answer = await gateway.ask(path, port=port)
                assert (answer.status, answer.body) == (200, b"OK")
                assert answer["content-type"].startswith("text/plain")


async def test_life_2_life_3_readiness_follows_the_workers():
    async with running_gateway() as gateway:
        unready = {"status": "not ready", "reason": "insufficient healthy workers"}
        for port in (gateway.port, gateway.probe_port):
            answer = await gateway.ask("/readiness", port=port)
            assert (answer.status, answer.document) == (503, unready)
        async with fake_worker("m") as worker, fake_worker("m") as hanging:
            hanging.on_path["/health"] = hangs
            await gateway.ask("/workers", {"url": worker.url})
            await gateway.ask("/workers", {"url": hanging.url})
            await eventually(lambda: gateway.ready_count == 1)
            for port in (gateway.port, gateway.probe_port):
                answer = await gateway.ask("/readiness", port=port)
                assert (answer.status, answer.document) == (
                    200,
                    {"status": "ready", "healthy_workers": 1, "total_workers": 2},
                )
            gateway.node.start_draining()
            answer = await gateway.ask("/readiness")
            assert (answer.status, answer.document) == (503, {"status": "not ready", "reason": "draining"})
            assert (await gateway.ask("/liveness")).status == 200


async def test_life_4_the_probe_port_has_the_probes_and_nothing_else():
    async with running_gateway(
        "--api-key", "k", "--max-concurrent-requests", "1", "--queue-size", "0"
    ) as gateway:
        for path in ("/workers", CHAT, "/metrics", "/", "/v1/models"):
            assert (await gateway.ask(path, port=gateway.probe_port)).is_error(404, "unknown_url")
        assert (await gateway.ask("/readiness", method="HEAD", port=gateway.probe_port)).status == 503
        assert (await gateway.ask("/health", {}, port=gateway.probe_port)).status == 405


async def test_ops_1_flush_reaches_every_worker():
    async with fake_workers(3, "m") as workers, running_gateway(workers=workers) as gateway:
        for worker in workers:
            worker.on_path["/flush_cache"] = answers(200)
            worker.on_path["/reset_prefix_cache"] = answers(200)
        answer = await gateway.ask("/flush_cache", method="POST")
        document = answer.document
        assert answer.status == 200 and document["status"] == "success" and document["message"]
        assert document["workers_flushed"] == document["total_http_workers"] == document["total_workers"] == 3
        workers[1].on_path["/flush_cache"] = workers[1].on_path["/reset_prefix_cache"] = answers(500)
        answer = await gateway.ask("/flush_cache", method="POST")
        document = answer.document
        assert answer.status == 206 and document["status"] == "partial_success"
        assert len(document["successful"]) == 2
        assert [row["worker"] for row in document["failed"]] == [workers[1].url] and document["failed"][0][
            "error"
        ]


async def test_ops_1_flush_without_workers_is_200():
    async with running_gateway() as gateway:
        answer = await gateway.ask("/flush_cache", method="POST")
        assert answer.status == 200 and answer.document["total_workers"] == 0


async def test_ops_2_loads_list_every_worker_even_those_that_cannot_be_polled():
    async with fake_workers(2, "m") as workers, running_gateway(workers=workers) as gateway:
        document = (await gateway.ask("/get_loads")).document
        assert {row["worker"] for row in document["loads"]} == {worker.url for worker in workers}
        assert all("error" in row and row["in_flight"] == 0 for row in document["loads"])
        assert {"timestamp", "version", "dp_rank_count", "aggregate"} <= document.keys()
        text = "vllm:num_requests_running 3\nvllm:num_requests_waiting 2\nvllm:kv_cache_usage_perc 0.5\n"
        for worker in workers:
            worker.on_path["/metrics"] = answers(200, body=text.encode(), type="text/plain")
            worker.on_path["/version"] = answers(200, {"version": "0.9"})
        for worker in workers:
            await gateway.ask(
                f"/workers/{worker.id}", {"url": worker.url, "runtime_type": "vllm"}, method="PUT"
            )
        document = (await gateway.ask("/get_loads")).document
        assert document["aggregate"]["total_running_reqs"] == 6
        assert document["aggregate"]["total_reqs"] == 10
        assert [row["num_waiting_reqs"] for row in document["loads"]] == [2, 2]
        assert document["aggregate"]["avg_token_usage"] == 0.5


@pytest.mark.parametrize("path", ["/start_profile", "/stop_profile"])
async def test_ops_3_profiles_are_fanned_out(path):
    async with fake_workers(2, "m") as workers, running_gateway(workers=workers) as gateway:
        for worker in workers:
            worker.on_path[path] = answers(200)
        assert (await gateway.ask(path, method="POST")).status == 200
        assert [sum(turn.path == path for turn in worker.asked) for worker in workers] == [1, 1]
        assert (await gateway.ask(path, {"url": workers[0].url})).status == 200
        assert [sum(turn.path == path for turn in worker.asked) for worker in workers] == [2, 1]
        assert (await gateway.ask(path, {"url": "http://127.0.0.1:1"})).status == 404
        assert (await gateway.ask(path, body=b"{")).status == 400
        workers[0].on_path[path] = answers(500)
        assert (await gateway.ask(path, method="POST")).status == 206


async def test_ops_7_engine_metrics_are_merged_and_failures_are_shown():
    async with fake_workers(2, "m") as workers, running_gateway(workers=workers) as gateway:
        page = b'# HELP a_total x\n# TYPE a_total counter\na_total 1\na_total{x="y"} 2\n'
        workers[0].on_path["/metrics"] = answers(200, body=page, type="text/plain")
        workers[1].on_path["/metrics"] = answers(500)
        answer = await gateway.ask("/engine_metrics")
        text = answer.body.decode()
        address = workers[0].url
        assert answer.status == 200 and text.count("# TYPE a_total counter") == 1
        assert f'worker_addr="{address}"' in text and 'x="y"' in text
        assert f'smg_engine_scrape_up{{worker_addr="{workers[1].url}"}} 0' in text
    async with running_gateway() as gateway:
        assert (await gateway.ask("/engine_metrics")).status == 503


@pytest.mark.parametrize(
    "path", ["/health_generate", "/get_server_info", "/server_info", "/get_model_info", "/model_info"]
)
async def test_ops_8_the_first_ready_worker_answers(path):
    async with (
        fake_worker("m") as one,
        fake_worker("n") as two,
        running_gateway(workers=[one, two]) as gateway,
    ):
        for worker in (one, two):
            for name in (
                "/health_generate",
                "/get_server_info",
                "/server_info",
                "/get_model_info",
                "/model_info",
            ):
                worker.on_path[name] = answers(200, {"models": worker.models})
        assert (await gateway.ask(path)).document == {"models": ["m"]}
        assert (await gateway.ask(f"{path}?model=n")).document == {"models": ["n"]}
        assert (await gateway.ask(f"{path}?model=x")).status in (404, 503)
    async with running_gateway() as gateway:
        assert (await gateway.ask(path)).status == 503


async def test_ops_9_metrics_are_on_their_own_port_only():
    async with running_gateway("--api-key", "k") as gateway:
        assert (await gateway.ask("/metrics")).is_error(404, "unknown_url")
        answer = await gateway.ask("/metrics", port=gateway.metrics_port)
        assert answer.status == 200 and b"smg_http_connections_active" in answer.body
        head = await gateway.ask("/metrics", method="HEAD", port=gateway.metrics_port)
        assert head.status == 200 and head.body == b""


async def test_exp_1_exp_4_explain_predicts_and_changes_nothing():
    async with (
        fake_workers(3, "m") as workers,
        running_gateway("--policy", "round_robin", workers=workers) as gateway,
    ):
        for _ in range(5):
            told = (await gateway.ask("/route/explain", HELLO)).document
            assert told == (await gateway.ask("/v1/route/explain", HELLO)).document
            assert told["policy"] == "round_robin" and len(told["workers"]) == 3
            assert (await gateway.ask(CHAT, HELLO)).worker == told["chosen"]
        assert sum(len(worker.turns) for worker in workers) == 5
        assert (await gateway.ask("/route/explain", {**HELLO, "model": "x"})).status == 404
        assert (await gateway.ask("/route/explain", body=b"{")).status == 400


async def test_msh_1_without_a_mesh_both_paths_exist():
    async with running_gateway() as gateway:
        assert (await gateway.ask("/mesh/status")).document == {"enabled": False}
        assert (await gateway.ask("/mesh/members")).document["members"] == []
        assert (await gateway.ask("/mesh/leave", method="POST")).code == "mesh_disabled"


async def test_a_worker_that_floods_a_fan_out_is_cut_short():
    async with fake_worker("m") as worker, running_gateway(workers=[worker]) as gateway:
        gone = []

        async def flood(turn):
            await turn.send(b"HTTP/1.1 200 OK\r\ncontent-type: text/plain\r\n\r\n")
            try:
                while True:
                    await turn.send(b"a_total 1\n" * 10_000)
            finally:
                gone.append(turn)

        worker.on_path["/metrics"] = flood
        answer = await gateway.ask("/engine_metrics")
        assert b"smg_engine_scrape_up" in answer.body and gone
        worker.on_path["/server_info"] = worker.on_path["/get_server_info"] = says(b"garbage\r\n\r\n")
        assert (await gateway.ask("/get_server_info")).status in (502, 503)
