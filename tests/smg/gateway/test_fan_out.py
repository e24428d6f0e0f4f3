"""OPS-1 to OPS-3, OPS-7, OPS-8, UP-6, WRK-14: calls to every worker and what comes of them."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
import trio
import trio.testing

from smg.errors import GatewayError, UpstreamError
from smg.fleet.engine_metrics import RankLoad
from smg.fleet.registry import Flushed, Registry
from smg.fleet.worker import Engine, ModelCard, Status, Worker
from smg.gateway import fan_out
from smg.gateway.fan_out import FanOut, without_keys
from tests.smg.gateway.desk import Answer, Engines, add, document, registry, request

CANARY = "worker-key-canary"


async def no_loads(worker: Worker) -> list[RankLoad]:
    return []


def desk(
    fleet: Registry,
    answers: dict[str, Answer] | None = None,
    loads: Callable[[Worker], Awaitable[list[RankLoad]]] = no_loads,
) -> tuple[FanOut, Engines]:
    engines = Engines(answers or {})
    return FanOut(fleet, engines, loads), engines


async def test_ops_1_every_worker_is_flushed_with_its_own_key_only() -> None:
    fleet = registry()
    add(fleet, "a", api_key=CANARY)
    add(fleet, "b")
    told: list[Any] = []
    fleet.subscribe(told.append)
    front, engines = desk(fleet, {f"http://{name}:8000/flush_cache": (200, b"ok") for name in "ab"})
    gateway_key = [(b"authorization", b"Bearer gateway-key")]
    response = await front.flush_cache(request("/flush_cache", "POST", headers=gateway_key))
    assert response.status == 200
    found = document(response)
    assert found.pop("message")
    assert found == {"status": "success", "workers_flushed": 2, "total_http_workers": 2, "total_workers": 2}
    assert sorted((url, headers) for _, url, headers, _ in engines.asked) == [
        ("http://a:8000/flush_cache", {"authorization": f"Bearer {CANARY}"}),
        ("http://b:8000/flush_cache", {}),
    ]
    assert {asked[0] for asked in engines.asked} == {"POST"}
    assert [change.worker for change in told if isinstance(change, Flushed)] == list(fleet.workers())


async def test_ops_1_what_fails_is_named_and_keeps_its_prefixes() -> None:
    fleet = registry()
    workers = [add(fleet, name) for name in "abc"]
    told: list[Any] = []
    fleet.subscribe(told.append)
    front, _ = desk(
        fleet,
        {"http://a:8000/flush_cache": (200, b""), "http://b:8000/flush_cache": UpstreamError.REFUSED, "http://c:8000/flush_cache": (500, b"")},
    )  # fmt: skip
    response = await front.flush_cache(request("/flush_cache", "POST"))
    found = document(response)
    assert response.status == 206
    assert found["status"] == "partial_success"
    assert found["successful"] == ["http://a:8000"]
    assert [failure["worker"] for failure in found["failed"]] == ["http://b:8000", "http://c:8000"]
    assert all(failure["error"] for failure in found["failed"])
    assert (found["total_http_workers"], found["total_workers"]) == (3, 3)
    assert told == [Flushed(workers[0])]


async def test_ops_1_without_workers_there_is_nothing_to_do() -> None:
    front, _ = desk(registry())
    response = await front.flush_cache(request("/flush_cache", "POST"))
    assert response.status == 200
    assert document(response)["workers_flushed"] == 0


async def test_ops_1_a_silent_worker_ends_the_call_after_its_time(
    autojump_clock: trio.testing.MockClock,
) -> None:
    fleet = registry()
    add(fleet, "a")
    add(fleet, "b")
    front, _ = desk(fleet, {"http://a:8000/flush_cache": "hang", "http://b:8000/flush_cache": (200, b"")})
    started = trio.current_time()
    response = await front.flush_cache(request("/flush_cache", "POST"))
    assert response.status == 206
    assert trio.current_time() - started == fan_out.FLUSH_TIMEOUT_S


async def test_ops_1_ranks_are_flushed_once_and_all_forget() -> None:
    fleet = registry()
    for rank in range(3):
        worker = fleet.add(fan_out_spec(f"http://a:8000@{rank}"), 0.0)
        fleet.set_status(worker, Status.READY, 0.0)
    vllm = add(fleet, "v", runtime_type="vllm")
    told: list[Any] = []
    fleet.subscribe(told.append)
    front, engines = desk(
        fleet, {"http://a:8000/flush_cache": (200, b""), "http://v:8000/reset_prefix_cache": (200, b"")}
    )
    found = document(await front.flush_cache(request("/flush_cache", "POST")))
    assert (found["workers_flushed"], found["total_http_workers"], found["total_workers"]) == (2, 2, 4)
    assert len(engines.asked) == 2
    assert len(told) == 4
    assert vllm.engine is Engine.VLLM


def fan_out_spec(url: str) -> Any:
    from smg.fleet.worker_spec import spec_of

    return spec_of({"url": url})


async def test_ops_2_loads_are_listed_and_summed() -> None:
    fleet = registry()
    good = add(fleet, "a", worker_type="prefill")
    silent = add(fleet, "b")
    silent.in_flight = 7
    ranks = [
        RankLoad(
            dp_rank=0,
            num_running_reqs=2,
            num_waiting_reqs=1,
            token_usage=0.5,
            gen_throughput=100.0,
            utilization=0.2,
        ),
        RankLoad(dp_rank=1, num_running_reqs=4, num_waiting_reqs=0, token_usage=0.7),
    ]

    async def ask(worker: Worker) -> list[RankLoad]:
        return ranks if worker is good else []

    front, _ = desk(fleet, loads=ask)
    found = document(await front.get_loads(request("/get_loads")))
    assert found.keys() == {"timestamp", "version", "dp_rank_count", "loads", "aggregate"}
    assert found["dp_rank_count"] == 2
    first, second, third = found["loads"]
    assert (first["worker"], first["worker_type"], first["dp_rank"]) == ("http://a:8000", "prefill", 0)
    assert (second["dp_rank"], second["num_running_reqs"], second["token_usage"]) == (1, 4, 0.7)
    assert (third["worker"], third["in_flight"]) == ("http://b:8000", 7)
    assert third["error"]
    assert "error" not in first
    assert found["aggregate"] == {
        "total_running_reqs": 6, "total_waiting_reqs": 1, "total_reqs": 7, "avg_token_usage": 0.6, "avg_throughput": 100.0,
        "avg_utilization": 0.2,
    }  # fmt: skip


async def test_ops_2_without_workers_the_list_is_empty() -> None:
    front, _ = desk(registry())
    found = document(await front.get_loads(request("/get_loads")))
    assert (found["loads"], found["aggregate"]["total_reqs"], found["aggregate"]["avg_token_usage"]) == (
        [],
        0,
        0.0,
    )


@pytest.mark.parametrize("verb", ["start_profile", "stop_profile"])
async def test_ops_3_profiling_goes_to_all_with_its_options(verb: str) -> None:
    fleet = registry()
    add(fleet, "a")
    add(fleet, "b")
    answers: dict[str, Answer] = {f"http://{name}:8000/{verb}": (200, b"") for name in "ab"}
    front, engines = desk(fleet, answers)
    call = getattr(front, verb)
    response = await call(request(f"/{verb}", "POST", {"num_steps": 5}))
    assert response.status == 200
    assert document(response)["status"] == "success"
    assert document(response)["successful"] == ["http://a:8000", "http://b:8000"]
    assert [json.loads(body) for _, _, _, body in engines.asked] == [{"num_steps": 5}] * 2
    assert (await call(request(f"/{verb}", "POST"))).status == 200
    assert engines.asked[-1][3] == b""
    engines.answers["http://b:8000/" + verb] = (500, b"")
    assert (await call(request(f"/{verb}", "POST"))).status == 206


@pytest.mark.parametrize("how", ["body", "query"])
async def test_ops_3_a_url_selects_one_worker(how: str) -> None:
    fleet = registry()
    add(fleet, "a")
    add(fleet, "b")
    front, engines = desk(fleet, {"http://b:8000/start_profile": (200, b"")})
    for url in ("http://b:8000", "HTTP://B:8000/"):
        if how == "body":
            response = await front.start_profile(request("/start_profile", "POST", {"url": url}))
        else:
            response = await front.start_profile(request(f"/start_profile?url={url}", "POST"))
        assert response.status == 200
    assert {url for _, url, _, _ in engines.asked} == {"http://b:8000/start_profile"}
    assert {body for _, _, _, body in engines.asked} == {b""}


@pytest.mark.parametrize(
    ("body", "status"), [({"url": "http://nobody:1"}, 404), (b"{", 400), (b"[]", 400), ({"url": 5}, 400)]
)
async def test_ops_3_no_match_and_bad_json(body: Any, status: int) -> None:
    fleet = registry()
    add(fleet, "a")
    front, engines = desk(fleet)
    with pytest.raises(GatewayError) as caught:
        await front.start_profile(request("/start_profile", "POST", body))
    assert caught.value.status == status
    assert not engines.asked


async def test_ops_7_metrics_are_merged_and_a_failing_worker_is_shown_down() -> None:
    fleet = registry()
    for name in "abc":
        add(fleet, name)
    front, _ = desk(
        fleet,
        {"http://a:8000/metrics": (200, b"# TYPE x gauge\nx 1\n"), "http://b:8000/metrics": UpstreamError.RESET, "http://c:8000/metrics": (200, b"<html>")},
    )  # fmt: skip
    response = await front.engine_metrics(request("/engine_metrics"))
    assert response.status == 200
    assert response.content_type.startswith("text/plain")
    lines = response.body.decode().splitlines()
    assert 'x{worker_addr="http://a:8000"} 1' in lines
    for name, up in (("a", 1), ("b", 0), ("c", 0)):
        assert f'smg_engine_scrape_up{{worker_addr="http://{name}:8000"}} {up}' in lines


async def test_ops_7_without_workers_there_are_no_metrics() -> None:
    with pytest.raises(GatewayError) as caught:
        await desk(registry())[0].engine_metrics(request("/engine_metrics"))
    assert caught.value.status == 503


@pytest.mark.parametrize(
    ("name", "path", "upstream"),
    [
        ("health_generate", "/health_generate", "/health_generate"),
        ("get_server_info", "/get_server_info", "/get_server_info"),
        ("get_server_info", "/server_info", "/server_info"),
        ("get_model_info", "/get_model_info", "/get_model_info"),
        ("get_model_info", "/model_info", "/model_info"),
    ],
)
async def test_ops_8_the_first_ready_worker_answers(name: str, path: str, upstream: str) -> None:
    fleet = registry()
    add(fleet, "sick", "m", status=Status.NOT_READY)
    first = add(fleet, "a", "m", api_key=CANARY)
    add(fleet, "b", "n")
    body = b'{"n": 1.50}'
    front, engines = desk(
        fleet, {f"http://{host}:8000{upstream}": (200, body) for host in ("sick", "a", "b")}
    )
    response = await getattr(front, name)(request(path))
    assert (response.status, response.body) == (200, body)
    assert dict(response.headers)["x-smg-worker-id"] == first.id
    assert engines.asked[-1][2] == {"authorization": f"Bearer {CANARY}"}
    await getattr(front, name)(request(path + "?model=n"))
    assert engines.asked[-1][1] == f"http://b:8000{upstream}"


async def test_ops_8_a_status_of_the_worker_is_relayed() -> None:
    fleet = registry()
    add(fleet, "a")
    front, _ = desk(fleet, {"http://a:8000/health_generate": (503, b"busy")})
    response = await front.health_generate(request("/health_generate"))
    assert (response.status, response.body) == (503, b"busy")


@pytest.mark.parametrize(
    ("answer", "status"), [(UpstreamError.REFUSED, 502), (UpstreamError.RESET, 502), ("hang", 504)]
)
async def test_ops_8_a_worker_that_does_not_answer(
    answer: str, status: int, autojump_clock: trio.testing.MockClock
) -> None:
    fleet = registry()
    add(fleet, "a")
    front, _ = desk(fleet, {"http://a:8000/get_server_info": answer})
    with pytest.raises(GatewayError) as caught:
        await front.get_server_info(request("/get_server_info"))
    assert caught.value.status == status
    assert "127.0.0.1" not in caught.value.message


async def test_ops_8_without_a_ready_worker_it_is_503() -> None:
    fleet = registry()
    worker = add(fleet, "a", status=Status.PENDING)
    fleet.set_models(worker, (ModelCard("m"),))
    for target in ("/get_server_info", "/get_server_info?model=m"):
        with pytest.raises(GatewayError) as caught:
            await desk(fleet)[0].get_server_info(request(target))
        assert (caught.value.status, caught.value.code) == (503, "no_available_workers")


async def test_wrk_14_an_engine_that_prints_its_keys_is_not_repeated() -> None:
    fleet = registry()
    add(fleet, "a", api_key=CANARY)
    told = {
        "server_args": {"api_key": CANARY, "model_path": "m"},
        "admin_api_key": "another-canary",
        "argv": ["--api-key", CANARY],
        "dp_size": 2,
    }
    front, _ = desk(fleet, {"http://a:8000/get_server_info": (200, json.dumps(told).encode())})
    response = await front.get_server_info(request("/get_server_info"))
    assert b"canary" not in response.body
    found = json.loads(response.body)
    assert (found["dp_size"], found["server_args"]["model_path"]) == (2, "m")


def test_wrk_14_a_description_without_keys_is_untouched() -> None:
    for body in (b'{"a": 1.50, "api_key": null}', b"[1, 2]", b"plain", b""):
        assert without_keys(body, CANARY) == body
    assert without_keys(f"key={CANARY}".encode(), CANARY) == b"key=***"
    assert without_keys(b"plain", None) == b"plain"
