"""Keys and browser origins (contract section 15)."""

from __future__ import annotations

import pytest

from tests.e2e.fake_worker import DONE, fake_worker, streams
from tests.e2e.gateway import CHAT, HELLO, STREAM, eventually, running_gateway

KEY = "gate-key-1"
OPEN = [
    "/liveness",
    "/health",
    "/readiness",
    "/health_generate",
    "/v1/models",
    "/v1/models/m",
    "/get_server_info",
    "/get_model_info",
    "/engine_metrics",
]
SERVED = {
    CHAT: HELLO,
    "/v1/completions": {"model": "m", "prompt": "a"},
    "/generate": {"text": "a"},
    "/v1/embeddings": {"model": "m", "input": "a"},
    "/v1/messages": {**HELLO, "max_tokens": 1},
    "/v1/messages/count_tokens": {**HELLO},
    "/v1/responses": {"model": "m", "input": "a"},
    "/rerank": {"model": "m", "query": "q", "documents": ["d"]},
    "/v1/tokenize": {},
}
ADMIN = [
    ("GET", "/workers"),
    ("POST", "/workers"),
    ("POST", "/flush_cache"),
    ("GET", "/get_loads"),
    ("POST", "/route/explain"),
    ("GET", "/mesh/status"),
]


async def test_sec_1_inference_needs_the_key_and_open_paths_do_not():
    async with fake_worker("m") as worker, running_gateway("--api-key", KEY, workers=[worker]) as gateway:
        for path, document in SERVED.items():
            answer = await gateway.ask(path, document)
            assert (answer.status, answer.code) == (401, "invalid_api_key"), path
            assert answer["www-authenticate"] == 'Bearer realm="data-plane"'
            kind = "authentication_error" if path.startswith("/v1/messages") else "invalid_request_error"
            assert answer.document["error"]["type"] == kind
        for path in OPEN:
            assert (await gateway.ask(path)).status != 401, path
            assert (await gateway.ask(path, None, "authorization: Bearer wrong")).status != 401, path
        for method, path in ADMIN:
            assert (await gateway.ask(path, method=method)).code == "invalid_api_key"
            assert (
                await gateway.ask(path, None, f"authorization: Bearer {KEY}", method=method)
            ).status != 401
        assert [turn.path for turn in worker.turns if turn.path in SERVED] == []


@pytest.mark.parametrize(
    "credential",
    [
        f"authorization: Bearer {KEY}",
        f"authorization: bearer {KEY}",
        f"Authorization: BEARER  {KEY}",
        f"x-api-key: {KEY}",
        f"X-Api-Key: {KEY}",
    ],
)
async def test_sec_2_the_key_is_taken_in_every_form_on_every_path(credential):
    async with fake_worker("m") as worker, running_gateway("--api-key", KEY, workers=[worker]) as gateway:
        client = await gateway.connect()
        for path, document in SERVED.items():
            assert (await client.ask(path, document, credential)).status in (200, 501), path
        for turn in worker.turns:
            assert KEY.encode() not in turn.raw


@pytest.mark.parametrize(
    "lines",
    [
        ["authorization: Bearer wrong"],
        ["x-api-key: wrong"],
        [f"authorization: {KEY}"],
        [f"authorization: Basic {KEY}"],
        [f"authorization: Bearer {KEY}x"],
        [f"authorization: Bearer {KEY[:-1]}"],
        ["authorization: Bearer "],
        [f"authorization: Bearer {KEY}", "x-api-key: wrong"],
        ["authorization: Bearer wrong", f"x-api-key: {KEY}"],
        [f"cookie: key={KEY}"],
        [f"api-key: {KEY}"],
        ["authorization: Bearer \xff\xfe"],
    ],
)
async def test_sec_2_a_wrong_one_is_401(lines):
    async with fake_worker("m") as worker, running_gateway("--api-key", KEY, workers=[worker]) as gateway:
        client = await gateway.connect()
        assert (await client.ask(CHAT, HELLO, f"x-api-key: {KEY}")).status == 200
        assert (await client.ask(CHAT, HELLO, *lines)).is_error(401, "invalid_api_key")
        assert await client.is_open()
        assert (await client.ask("/workers", None, *lines)).code == "invalid_api_key"


async def test_sec_2_the_key_in_the_query_is_no_key():
    async with fake_worker("m") as worker, running_gateway("--api-key", KEY, workers=[worker]) as gateway:
        assert (await gateway.ask(f"{CHAT}?api_key={KEY}", HELLO)).status == 401


async def test_sec_3_a_header_value_equal_to_a_key_is_removed_wherever_it_is():
    async with fake_worker("m") as worker, running_gateway("--api-key", KEY, workers=[worker]) as gateway:
        answer = await gateway.ask(
            CHAT,
            HELLO,
            f"authorization: Bearer {KEY}",
            f"openai-organization: {KEY}",
            f"x-correlation-id: {KEY}",
            f"x-smg-routing-key: {KEY}",
            "openai-project: p",
        )
        assert answer.status == 200
        turn = await worker.next_turn()
        assert {"openai-organization", "x-smg-routing-key"}.isdisjoint(turn.names)
        assert turn.header("openai-project") == b"p"
        assert b"authorization" not in turn.head.lower()
        assert KEY.encode() not in turn.head.replace(b"x-request-id: " + KEY.encode(), b"")


async def test_sec_3_an_open_gateway_relays_the_clients_credentials_to_a_worker_without_key():
    async with fake_worker("m") as worker, running_gateway(workers=[worker]) as gateway:
        await gateway.ask(CHAT, HELLO, "authorization: Bearer theirs", "x-api-key: theirs-too")
        turn = await worker.next_turn()
        assert (turn.header("authorization"), turn.header("x-api-key")) == (b"Bearer theirs", b"theirs-too")


async def test_sec_3_a_worker_with_its_own_key_gets_only_that():
    async with fake_worker("m") as worker, running_gateway() as gateway:
        await gateway.ask("/workers", {"url": worker.url, "api_key": "own"})
        await eventually(lambda: gateway.ready_count == 1)
        client = await gateway.connect()
        for _ in range(2):
            await client.ask(CHAT, HELLO, "authorization: Bearer theirs", "x-api-key: theirs-too")
            turn = await worker.next_turn()
            assert (turn.header("authorization"), turn.header("x-api-key")) == (b"Bearer own", None)
        patched = await gateway.ask(f"/workers/{worker.id}", {"api_key": "new"}, method="PATCH")
        assert patched.status == 202
        await client.ask(CHAT, HELLO, "authorization: Bearer theirs", "x-api-key: theirs-too")
        assert (await worker.next_turn()).header("authorization") == b"Bearer new"


async def test_wrk_14_keys_are_never_shown_or_logged(capfd):
    flags = "--api-key", KEY, "--log-level", "debug"
    async with fake_worker("m") as worker, running_gateway(*flags) as gateway:
        auth = f"authorization: Bearer {KEY}"
        shown = [await gateway.ask("/workers", {"url": worker.url, "api_key": "worker-secret"}, auth)]
        await eventually(lambda: gateway.ready_count == 1)
        for path in (
            "/workers",
            f"/workers/{worker.id}",
            "/get_server_info",
            "/get_loads",
            "/engine_metrics",
        ):
            shown.append(await gateway.ask(path, None, auth))
        shown.append(await gateway.ask("/workers", {"url": worker.url, "api_key": "worker-secret"}, auth))
        shown.append(await gateway.ask("/workers", {"url": "nonsense", "api_key": "worker-secret"}, auth))
        shown.append(
            await gateway.ask(
                f"/workers/{worker.id}", {"api_key": "worker-secret", "labels": 5}, auth, method="PATCH"
            )
        )
        shown.append(await gateway.ask(CHAT, {**HELLO, "secret": "prompt-secret"}, auth))
        shown.append(await gateway.ask(CHAT, HELLO, "authorization: Bearer bad-secret"))
        for answer in shown:
            assert b"secret" not in answer.body and KEY.encode() not in answer.body, answer
        assert b"secret" not in gateway.node.metrics.render()
    out, err = capfd.readouterr()
    assert "secret" not in out + err and KEY not in out + err


ORIGIN = "origin: https://app.example"


async def test_sec_9_cors_is_off_by_default():
    async with fake_worker("m") as worker, running_gateway(workers=[worker]) as gateway:
        answer = await gateway.ask(CHAT, HELLO, ORIGIN)
        assert not any(name.startswith("access-control") for name, _ in answer.lines)
        preflight = await gateway.ask(
            CHAT, None, ORIGIN, "access-control-request-method: POST", method="OPTIONS"
        )
        assert preflight.status == 204 and not any(
            name.startswith("access-control") for name, _ in preflight.lines
        )


async def test_sec_9_a_listed_origin_is_echoed_on_every_answer():
    flags = "--cors-allowed-origins", "https://app.example", "https://b.example", "--api-key", KEY
    auth = f"x-api-key: {KEY}"
    async with fake_worker("m") as worker, running_gateway(*flags, workers=[worker]) as gateway:
        client = await gateway.connect()
        worker.plays.append(streams(DONE))
        seen = [
            await client.ask(CHAT, STREAM, ORIGIN, auth),
            await client.ask(CHAT, HELLO, ORIGIN, auth),
            await client.ask(CHAT, HELLO, ORIGIN, auth),
            await client.ask(CHAT, HELLO, ORIGIN),
            await client.ask(CHAT, {}, ORIGIN, auth),
            await client.ask("/nowhere", None, ORIGIN),
            await client.ask("/health", None, ORIGIN),
        ]
        for answer in seen:
            assert answer["access-control-allow-origin"] == "https://app.example", answer
            assert answer["vary"] == "Origin"
            exposed = {word.strip() for word in answer["access-control-expose-headers"].split(",")}
            assert exposed == {"x-request-id", "x-smg-error-code", "x-smg-worker-id", "retry-after"}
        other = await client.ask(CHAT, HELLO, "origin: https://b.example", auth)
        assert other["access-control-allow-origin"] == "https://b.example"
        for origin in ("https://evil.example", "https://app.example.evil", "null"):
            answer = await client.ask(CHAT, HELLO, f"origin: {origin}", auth)
            assert answer.status == 200 and answer.all("access-control-allow-origin") == []
            assert answer["vary"] == "Origin"


@pytest.mark.parametrize("allowed", ["https://app.example", "*"])
async def test_sec_9_a_preflight_is_answered_without_a_key(allowed):
    async with running_gateway("--cors-allowed-origins", allowed, "--api-key", KEY) as gateway:
        for path in (CHAT, "/workers", "/v1/models"):
            answer = await gateway.ask(
                path,
                None,
                ORIGIN,
                "access-control-request-method: POST",
                "access-control-request-headers: content-type, x-smg-routing-key",
                method="OPTIONS",
            )
            assert answer.status == 200 and answer["access-control-allow-origin"] == "https://app.example"
            assert answer["access-control-allow-methods"] == "GET, POST, PUT, PATCH, DELETE, OPTIONS"
            headers = {word.strip() for word in answer["access-control-allow-headers"].split(",")}
            assert {
                "content-type",
                "authorization",
                "x-api-key",
                "x-request-id",
                "x-smg-routing-key",
            } <= headers
            assert answer["access-control-max-age"] == "3600" and answer["vary"] == "Origin"
