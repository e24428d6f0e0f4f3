"""Errors that the request path makes, validation, and which worker serves which model (contract sections 8 and 9)."""

from __future__ import annotations

import json
import socket

import pytest
import trio

from tests.e2e.fake_worker import answers, fake_worker, fake_workers, hangs, says
from tests.e2e.fake_worker import head as worker_head
from tests.e2e.gateway import CHAT, HELLO, eventually, request, running_gateway

MESSAGES = {"model": "m", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 1}
COMPLETION = {"model": "m", "prompt": "hi"}
OTHERS = {
    "/v1/completions": COMPLETION,
    "/v1/embeddings": {"model": "m", "input": "hi"},
    "/v1/responses": {"model": "m", "input": "hi"},
    "/v1/messages": MESSAGES,
    "/v1/rerank": {"model": "m", "query": "q", "documents": ["d"]},
}


def chat(**members):
    return {**HELLO, **members}


def without(document, member):
    return {name: value for name, value in document.items() if name != member}


BAD = [
    # path, body or document, code, param
    (CHAT, b"", "invalid_json", None),
    (CHAT, b"{", "invalid_json", None),
    (CHAT, b'{"a":1}x', "invalid_json", None),
    (CHAT, b'{"a":"\xff"}', "invalid_json", None),
    (CHAT, b"[]", "invalid_type", None),
    (CHAT, b"null", "invalid_type", None),
    (CHAT, b'"text"', "invalid_type", None),
    (CHAT, chat(model=1), "invalid_type", "model"),
    (CHAT, chat(stream="yes"), "invalid_type", "stream"),
    (CHAT, chat(messages="hi"), "invalid_type", "messages"),
    (CHAT, chat(messages=[]), "empty_array", "messages"),
    (CHAT, without(HELLO, "messages"), "missing_required_parameter", "messages"),
    (CHAT, without(HELLO, "model"), "missing_required_parameter", "model"),
    (CHAT, chat(temperature=2.1), "decimal_above_max_value", "temperature"),
    (CHAT, chat(temperature=-0.1), "decimal_below_min_value", "temperature"),
    (CHAT, chat(top_p=1.5), "decimal_above_max_value", "top_p"),
    (CHAT, chat(n=0), "integer_below_min_value", "n"),
    (CHAT, chat(max_tokens=0), "integer_below_min_value", "max_tokens"),
    (CHAT, chat(presence_penalty=-3), "decimal_below_min_value", "presence_penalty"),
    (CHAT, chat(deep=json.loads("[" * 200 + "]" * 200)), "invalid_json", None),
    ("/v1/completions", without(COMPLETION, "prompt"), "missing_required_parameter", "prompt"),
    ("/v1/embeddings", {"model": "m"}, "missing_required_parameter", "input"),
    ("/v1/embeddings", {"model": "m", "input": []}, "empty_array", "input"),
    ("/v1/messages", without(MESSAGES, "max_tokens"), "missing_required_parameter", None),
    ("/v1/messages", {**MESSAGES, "messages": []}, "empty_array", None),
    ("/v1/rerank", {"model": "m", "query": "q", "documents": []}, "empty_array", "documents"),
    ("/rerank", {"model": "m", "documents": ["d"]}, "missing_required_parameter", "query"),
    ("/v1/responses", {"model": "m"}, "missing_required_parameter", "input"),
]


@pytest.mark.parametrize(("path", "body", "code", "param"), BAD)
async def test_err_1_to_err_5_a_bad_body_is_400_and_reaches_no_worker(path, body, code, param):
    async with fake_worker("m") as worker, running_gateway(workers=[worker]) as gateway:
        client = await gateway.connect()
        raw = body if isinstance(body, bytes) else json.dumps(body).encode()
        answer = await client.ask(path, body=raw)
        if path == "/v1/messages":
            assert (answer.status, answer.code) == (400, code)
            assert answer.document["type"] == "error"
            assert answer.document["error"]["type"] == "invalid_request_error"
            assert answer.document["request_id"] == answer["x-request-id"]
        else:
            assert answer.is_error(400, code)
            error = answer.document["error"]
            assert error["type"] == "invalid_request_error" and error["param"] == param
        assert worker.turns == []
        assert await client.is_open()


@pytest.mark.parametrize("type", [None, "text/plain", "application/jsonx", "multipart/form-data; boundary=x"])
async def test_err_6_a_json_endpoint_wants_json(type):
    async with fake_worker("m") as worker, running_gateway(workers=[worker]) as gateway:
        assert (await gateway.ask(CHAT, HELLO, type=type)).is_error(400, "json_parse_error")
        assert (await gateway.ask(CHAT, HELLO, type="application/vnd.api+json")).status == 200


@pytest.mark.parametrize(("path", "document"), OTHERS.items())
async def test_err_9_an_unknown_model_is_404(path, document):
    async with fake_worker("m") as worker, running_gateway(workers=[worker]) as gateway:
        answer = await gateway.ask(path, {**document, "model": "nope"})
        assert (answer.status, answer.code) == (404, "model_not_found")
        error = answer.document["error"]
        assert error["message"] == "No worker available for model 'nope'"
        assert error["type"] == ("not_found_error" if path == "/v1/messages" else "invalid_request_error")


async def test_err_15_a_known_model_without_a_candidate_is_503():
    async with fake_worker("m") as worker, running_gateway(workers=[worker]) as gateway:
        await gateway.ask(f"/workers/{worker.id}", method="PATCH", body=b'{"health":{}}')
        from smg.fleet.worker import Status

        gateway.node.registry.set_status(
            gateway.worker(worker), Status.NOT_READY, trio.current_time(), "test"
        )
        answer = await gateway.ask(CHAT, HELLO)
        assert answer.is_error(503, "no_available_workers") and answer["retry-after"] == "1"
        assert answer.document["error"]["type"] == "server_error"
        answer = await gateway.ask("/v1/messages", MESSAGES)
        assert answer.status == 503 and answer.document["error"]["type"] == "overloaded_error"


async def test_err_15_while_a_worker_has_not_told_its_models_a_name_may_yet_become_known():
    async with fake_worker("m") as worker, running_gateway() as gateway:
        worker.on_path["/health"] = answers(503)
        worker.on_path["/v1/models"] = answers(503)
        await gateway.ask("/workers", {"url": worker.url})
        assert (await gateway.ask(CHAT, HELLO)).is_error(503, "no_available_workers")
        worker.on_path = {"/health": answers(200)}
        await eventually(lambda: gateway.ready_count == 1)
        await eventually(lambda: gateway.worker(worker).models == ("m",))
        assert (await gateway.ask(CHAT, HELLO)).status == 200


def refusing_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        return sock.getsockname()[1]


async def test_err_16_no_connection_to_any_worker_is_502():
    urls = [f"http://127.0.0.1:{refusing_port()}" for _ in range(2)]
    flags = "--disable-health-check", "--retry-initial-backoff-ms", "1"
    async with running_gateway(*flags, "--worker-urls", *urls, ready=False) as gateway:
        await eventually(lambda: gateway.ready_count == 2)
        answer = await gateway.ask(CHAT, HELLO)
        assert answer.is_error(502, "call_upstream_connection_failed")
        answer = await gateway.ask("/v1/messages", MESSAGES)
        assert answer.status == 502 and answer.document["error"]["type"] == "api_error"


async def test_err_18_no_head_within_the_timeout_is_504_and_is_not_retried():
    async with (
        fake_workers(2, "m") as workers,
        running_gateway("--request-timeout-secs", "0.3", workers=workers) as gateway,
    ):
        for worker in workers:
            worker.play = hangs
        answer = await gateway.ask(CHAT, HELLO)
        assert answer.is_error(504, "call_upstream_timeout")
        assert sum(len(worker.turns) for worker in workers) == 1
        assert gateway.metric("smg_worker_errors_total", error_type="timeout") == 1


async def test_err_18_a_body_that_does_not_come_within_the_timeout_is_504():
    async with (
        fake_worker("m") as worker,
        running_gateway("--request-timeout-secs", "0.3", workers=[worker]) as gateway,
    ):

        async def half(turn):
            await turn.send(worker_head(200, "content-type: application/json", length=10) + b"{")
            await turn.wait_gone()

        worker.play = half
        assert (await gateway.ask(CHAT, HELLO)).is_error(504, "call_upstream_timeout")


async def test_err_18_a_worker_that_does_not_take_the_request_is_504():
    async with (
        fake_worker("m") as worker,
        running_gateway("--request-timeout-secs", "0.3", workers=[worker]) as gateway,
    ):
        gone = trio.Event()

        async def reads_nothing(turn):
            await gone.wait()
            turn.reset()

        worker.on_head = reads_nothing
        answer = await gateway.ask(CHAT, body=json.dumps(chat(pad="x" * 20_000_000)).encode())
        assert answer.is_error(504, "call_upstream_timeout")
        gone.set()


async def test_err_21_a_fault_of_the_gateway_shows_nothing_and_is_counted():
    async with (
        fake_workers(2, "m") as workers,
        running_gateway("--policy", "round_robin", workers=workers) as gateway,
    ):
        policy = gateway.node._policies.policy_for("m")

        def broken(*_):
            raise RuntimeError("secret text 127.0.0.1 /code.py")

        choose, policy.choose = policy.choose, broken
        client = await gateway.connect()
        answer = await client.ask(CHAT, HELLO)
        assert answer.is_error(500, "internal_error")
        assert b"secret" not in answer.body and b"code" not in answer.body.replace(b'"code"', b"")
        assert answer.document["error"]["type"] == "server_error"
        assert [type(fault) for fault in gateway.faults] == [RuntimeError]
        gateway.faults.clear()
        policy.choose = choose
        assert (await client.ask(CHAT, HELLO)).status == 200
        assert gateway.metric("smg_http_requests_total", path=CHAT) == 2
        assert gateway.metric("smg_http_responses_total", path=CHAT, status_code="500") == 1


@pytest.mark.parametrize(
    ("path", "document"),
    [
        ("/v1/responses", {"model": "m", "input": "a", "previous_response_id": "r"}),
        ("/v1/responses", {"model": "m", "input": "a", "background": True}),
        ("/v1/responses", {"model": "m", "input": "a", "conversation": "conv_1"}),
        ("/v1/tokenize", {}),
        ("/v1/detokenize", {}),
        ("/v1/interactions", {}),
        ("/v1/realtime/sessions", {}),
        ("/v1/conversations", {}),
    ],
)
async def test_err_22_what_this_release_cannot_serve_is_501(path, document):
    async with fake_worker("m") as worker, running_gateway(workers=[worker]) as gateway:
        assert (await gateway.ask(path, document)).is_error(501, "not_implemented")


async def test_mod_1_models_are_listed_once_in_order_and_shown_by_id():
    async with (
        fake_worker("z", "a/b") as one,
        fake_worker("a/b", "c") as two,
        running_gateway("--api-key", "k", workers=[one, two]) as gateway,
    ):
        answer = await gateway.ask("/v1/models")
        entry = {"object": "model", "created": 0, "owned_by": "self_hosted"}
        assert answer.document == {
            "object": "list",
            "data": [{"id": name, **entry} for name in ("a/b", "c", "z")],
        }
        for target in ("/v1/models/a/b", "/v1/models/a%2Fb", "/v1/models/%61%2fb"):
            assert (await gateway.ask(target)).document == {"id": "a/b", **entry}, target
        assert (await gateway.ask("/v1/models/d")).is_error(404, "model_not_found")


async def test_mod_1_without_a_model_the_list_is_503():
    async with running_gateway() as gateway:
        assert (await gateway.ask("/v1/models")).is_error(503, "no_models_available")


async def test_mod_2_a_request_reaches_only_workers_of_its_model():
    async with (
        fake_worker("x", "both") as one,
        fake_worker("y", "both") as two,
        running_gateway("--policy", "round_robin", workers=[one, two]) as gateway,
    ):
        for _ in range(6):
            assert (await gateway.ask(CHAT, chat(model="x"))).worker == one.id
            assert (await gateway.ask(CHAT, chat(model="y"))).worker == two.id
        assert {(await gateway.ask(CHAT, chat(model="both"))).worker for _ in range(4)} == {one.id, two.id}


@pytest.mark.parametrize("models", [(), ("unknown",)])
async def test_mod_3_a_worker_that_tells_no_model_serves_what_nobody_claims(models):
    async with (
        fake_worker(*models) as any_model,
        fake_worker("m") as one_model,
        running_gateway("--policy", "round_robin", workers=[one_model]) as gateway,
    ):
        await gateway.ask("/workers", {"url": any_model.url})
        await eventually(lambda: gateway.ready_count == 2)
        for name in ("m", "m", "m"):
            assert (await gateway.ask(CHAT, chat(model=name))).worker == one_model.id
        for name in ("x", "y/z", "x"):
            answer = await gateway.ask(CHAT, chat(model=name))
            assert answer.worker == any_model.id
        assert [turn.document["model"] for turn in any_model.turns] == ["x", "y/z", "x"]
        assert gateway.metric("smg_router_requests_total", model="x") == 0  # clients cannot grow the series


async def test_mod_4_aliases_work_wherever_a_model_is_named():
    async with (
        fake_worker("m") as worker,
        running_gateway("--model-alias", "nick=m", workers=[worker]) as gateway,
    ):
        for path, document in OTHERS.items():
            assert (await gateway.ask(path, {**document, "model": "nick"})).status == 200, path
            assert worker.turns[-1].document["model"] == "m"
        assert (await gateway.ask("/v1/models/nick")).status == 200
        assert (await gateway.ask("/workers?model=nick")).document["total"] == 1


async def test_mod_4_aliases_of_a_card_work_too():
    async with fake_worker() as worker, running_gateway() as gateway:
        await gateway.ask("/workers", {"url": worker.url, "models": [{"id": "big", "aliases": ["nick"]}]})
        await eventually(lambda: gateway.ready_count == 1)
        assert (await gateway.ask(CHAT, chat(model="nick"))).status == 200
        assert worker.turns[0].document["model"] == "big"


async def test_mod_5_without_a_name_the_only_model_is_meant_and_with_several_it_is_400():
    async with fake_worker("m") as one, fake_worker("n") as two, running_gateway(workers=[one]) as gateway:
        for path, document in {
            "/generate": {"text": "hi"},
            "/rerank": {"query": "q", "documents": ["d"]},
            "/v1/classify": {"input": "x"},
        }.items():
            assert (await gateway.ask(path, document)).status == 200, path
            assert one.turns[-1].document == document  # the body stays
        await gateway.ask("/workers", {"url": two.url})
        await eventually(lambda: gateway.ready_count == 2)
        await eventually(lambda: gateway.worker(two).models == ("n",))
        assert (await gateway.ask("/generate", {"text": "hi"})).is_error(400, "missing_model")


async def test_mod_7_unknown_members_and_depth_up_to_128_pass():
    async with fake_worker("m") as worker, running_gateway(workers=[worker]) as gateway:
        document = chat(extra_body={"a": 1}, guided_json={}, deep=json.loads("[" * 127 + "]" * 127))
        assert (await gateway.ask(CHAT, document)).status == 200
        assert worker.turns[0].document == document


async def test_mod_8_a_bare_rerank_array_is_wrapped_and_an_object_is_not():
    rows = [{"score": 0.1, "index": 0, "document": "a"}, {"score": 0.9, "index": 1, "document": "b"}]
    async with (
        fake_worker("m") as worker,
        running_gateway("--model-alias", "nick=m", workers=[worker]) as gateway,
    ):
        document = {"model": "nick", "query": "q", "documents": ["a", "b"]}
        worker.play = answers(200, rows)
        for path in ("/rerank", "/v1/rerank"):
            answer = await gateway.ask(path, document)
            told = answer.document
            assert told.pop("created") > 0 and told.pop("id")
            assert told == {"results": rows[::-1], "model": "nick", "usage": None, "object": "rerank"}
            assert answer.worker == worker.id and answer["content-type"] == "application/json"
            assert worker.turns[-1].document["model"] == "m"
        answer = await gateway.ask("/rerank", {**document, "top_k": 1, "return_documents": False})
        assert answer.document["results"] == [{"score": 0.9, "index": 1}]
        body = b'{ "results" : [] }'
        worker.play = answers(200, body=body)
        assert (await gateway.ask("/rerank", document)).body == body
        worker.play = answers(400, rows)
        assert (await gateway.ask("/rerank", document)).document == rows


async def test_mod_8_a_rerank_answer_that_breaks_off_is_502():
    async with fake_worker("m") as worker, running_gateway("--disable-retries", workers=[worker]) as gateway:
        worker.play = says(worker_head(200, "content-type: application/json", length=99) + b"[{", close=True)
        answer = await gateway.ask("/rerank", {"model": "m", "query": "q", "documents": ["a"]})
        assert answer.is_error(502, "call_upstream_response_failed")


async def test_errors_are_counted_with_their_codes():
    async with fake_worker("m") as worker, running_gateway(workers=[worker]) as gateway:
        client = await gateway.connect()
        for _ in range(3):
            await client.ask(CHAT, {"model": "m"})
            await client.ask(CHAT, chat(model="x"))
            await client.ask("/nowhere")
        await client.send(b"GET / HTTP/1.1\r\n\r\n")
        await client.read()
        count = gateway.metric
        assert (
            count(
                "smg_http_responses_total",
                path=CHAT,
                status_code="400",
                error_code="missing_required_parameter",
            )
            == 3
        )
        assert (
            count("smg_http_responses_total", path=CHAT, status_code="404", error_code="model_not_found") == 3
        )
        assert (
            count("smg_http_responses_total", path="other", status_code="404", error_code="unknown_url") == 3
        )
        assert count("smg_http_responses_total", path="other", status_code="400") == 1
        assert count("smg_http_requests_total") == 10


async def test_requests_of_the_same_connection_do_not_inherit_anything():
    """Heads that repeat are remembered with what was worked out from them; what differs must differ."""
    async with (
        fake_workers(2, "m") as workers,
        running_gateway("--policy", "passthrough", workers=workers) as gateway,
    ):
        client = await gateway.connect()
        for _ in range(2):
            assert (await client.ask(CHAT, HELLO)).worker == workers[0].id
            assert (await client.ask(CHAT, HELLO, "x-smg-target-worker: 1")).worker == workers[1].id
            assert (await client.ask(CHAT, HELLO, "x-request-id: fixed"))["x-request-id"] == "fixed"
            assert (await client.ask(CHAT, HELLO, "content-encoding: gzip")).status == 415
            assert (await client.ask(CHAT, HELLO, "openai-beta: x")).status == 200
            assert "openai-beta" in workers[0].turns[-1].names
            assert (await client.ask(CHAT, HELLO, type="text/plain")).status == 400
            assert (await client.ask("/v1/completions", COMPLETION)).status == 200
            assert workers[0].turns[-1].path == "/v1/completions"
            assert (await client.ask("/health")).body == b"OK"
            await client.send(request(CHAT, HELLO, "connection: keep-alive"))
            assert (await client.read()).status == 200
            assert "openai-beta" not in workers[0].turns[-1].names
        assert (await client.ask(CHAT, HELLO, "connection: close"))["connection"] == "close"
        assert await client.until_closed() == b""


async def test_met_10_k_finished_requests_raise_the_counters_by_k_and_every_gauge_is_zero_when_quiet():
    async with (
        fake_workers(2, "m") as workers,
        running_gateway("--policy", "round_robin", workers=workers) as gateway,
    ):
        client = await gateway.connect()
        for number in range(10):
            await client.ask(CHAT, HELLO)
            await client.ask(CHAT, {**HELLO, "stream": True})
            await client.ask("/v1/completions", COMPLETION)
            if number < 3:
                await client.ask("/v1/models")
        count = gateway.metric
        assert count("smg_http_requests_total", path=CHAT, method="POST") == 20
        assert count("smg_http_responses_total", path=CHAT, status_code="200") == 20
        assert count("smg_http_request_duration_seconds_count", path=CHAT) == 20
        assert count("smg_http_requests_total", path="/v1/completions") == 10
        assert count("smg_http_requests_total", path="/v1/models", method="GET") == 3
        assert count("smg_router_requests_total", model="m", endpoint="chat", streaming="true") == 10
        assert count("smg_router_requests_total", model="m") == 30
        assert count("smg_router_request_duration_seconds_count", model="m") == 30
        assert count("smg_router_upstream_responses_total", status_code="200") == 30
        assert count("smg_worker_selection_total", policy="round_robin", model="m") == 30
        assert count("smg_worker_cb_outcomes_total", outcome="success") == 30
        assert count("smg_http_rate_limit_total", result="allowed") == 30
        assert count("smg_worker_pool_size", model="m") == 2
        assert count("smg_http_connections_active") == 1
        page = await gateway.ask("/metrics", port=gateway.metrics_port)
        assert page["content-type"].startswith("text/plain; version=")
        from prometheus_client.parser import text_string_to_metric_families

        families = {family.name for family in text_string_to_metric_families(page.body.decode())}
        assert {"smg_http_requests", "smg_worker_health", "smg_admission_inflight"} <= families
        assert (await gateway.ask("/other", port=gateway.metrics_port)).is_error(404, "unknown_url")
        gone = workers[0]
        assert (await gateway.ask(f"/workers/{gone.id}", method="DELETE")).status == 202
        await eventually(lambda: gateway.node.registry.by_id(gone.id) is None)
        assert gone.url not in gateway.node.metrics.render().decode()
