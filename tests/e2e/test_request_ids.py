"""Request ids (contract section 5, RID-1 to RID-3), through the whole gateway."""

from __future__ import annotations

import pytest

from tests.e2e.fake_worker import fake_worker
from tests.e2e.gateway import CHAT, HELLO, running_gateway


@pytest.mark.parametrize(
    "name", ["x-request-id", "x-correlation-id", "x-trace-id", "request-id", "X-REQUEST-ID"]
)
async def test_rid_1_an_inbound_id_is_returned_and_sent_to_the_worker(name):
    async with fake_worker("m") as worker, running_gateway(workers=[worker]) as gateway:
        answer = await gateway.ask(CHAT, HELLO, f"{name}: my-id_1")
        assert answer["x-request-id"] == "my-id_1"
        assert worker.turns[0].header("x-request-id") == b"my-id_1"
        for target in ("/health", "/nowhere", "/readiness", "/v1/models"):
            assert (await gateway.ask(target, None, f"{name}: my-id_2"))["x-request-id"] == "my-id_2"
        error = await gateway.ask("/v1/messages", {}, f"{name}: my-id_3")
        assert error.document["request_id"] == error["x-request-id"] == "my-id_3"


async def test_rid_1_the_first_valid_header_wins_and_the_names_are_a_setting():
    async with running_gateway() as gateway:
        answer = await gateway.ask(
            "/health", None, "request-id: d", "x-trace-id: c", "x-correlation-id: b b", "x-request-id: \xe4"
        )
        assert answer["x-request-id"] == "c"
    async with running_gateway("--request-id-headers", "X-My-Id") as gateway:
        assert (await gateway.ask("/health", None, "x-my-id: mine", "x-request-id: no"))[
            "x-request-id"
        ] == "mine"


async def test_rid_1_the_other_ports_and_unreadable_requests_have_ids_too():
    async with running_gateway() as gateway:
        for port in (gateway.probe_port, gateway.metrics_port):
            assert (await gateway.ask("/health", None, "x-request-id: p", port=port))["x-request-id"] == "p"
            made = (await gateway.ask("/liveness", port=port))["x-request-id"]
            assert len(made) == 28 and made.startswith("req-")
        client = await gateway.connect()
        await client.send(b"GET / HTTP/1.1\r\n\r\n")
        assert (await client.read())["x-request-id"].startswith("req-")


@pytest.mark.parametrize(
    ("path", "prefix"),
    [
        (CHAT, "chatcmpl-"),
        ("/v1/completions", "cmpl-"),
        ("/generate", "gnt-"),
        ("/v1/responses", "resp-"),
        ("/v1/messages", "msg_"),
        ("/v1/embeddings", "req-"),
        ("/nowhere", "req-"),
    ],
)
async def test_rid_2_generated_ids_have_the_prefix_of_the_endpoint(path, prefix):
    async with fake_worker("m") as worker, running_gateway(workers=[worker]) as gateway:
        seen = [
            (
                await gateway.ask(
                    path, {"model": "m", "messages": [1], "prompt": "a", "input": "a", "max_tokens": 1}
                )
            )["x-request-id"]
            for _ in range(3)
        ]
        assert len(set(seen)) == 3
        for made in seen:
            assert made.startswith(prefix)
            assert len(made) == len(prefix) + 24 and made[len(prefix) :].isalnum()
        assert [turn.header("x-request-id").decode() for turn in worker.turns] == (
            seen if worker.turns else []
        )


@pytest.mark.parametrize("value", ["", "a b", "x" * 129, "\xe4", "a\tb"])
async def test_rid_3_an_invalid_id_is_ignored(value):
    async with running_gateway() as gateway:
        answer = await gateway.ask("/health", None, f"x-request-id: {value}", "x-correlation-id: good")
        assert answer["x-request-id"] == "good"
    async with running_gateway() as gateway:
        assert (await gateway.ask("/health", None, f"x-request-id: {value}"))["x-request-id"].startswith(
            "req-"
        )


async def test_rid_3_an_id_of_128_characters_is_valid():
    async with running_gateway() as gateway:
        assert (await gateway.ask("/health", None, f"x-request-id: {'~' * 128}"))["x-request-id"] == "~" * 128
