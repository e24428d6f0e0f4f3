"""What attackers try at the gates, and canaries: credentials that must turn up nowhere but at their owner (UP-6, WRK-14)."""

from __future__ import annotations

import gc
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import trio

from smg.errors import GatewayError
from tests.e2e.fake_worker import (
    DONE,
    FakeWorker,
    answers,
    breaks,
    closes,
    event,
    fake_workers,
    head,
    streams,
)
from tests.e2e.gateway import CHAT, HELLO, STREAM, Gateway, eventually, request, running_gateway
from tests.e2e.test_auth import bearer, provider

SHARED, RED, OPS, EYE, TO_WORKER, OWN = (
    "canary-shared-1", "canary-red-2", "canary-ops-3", "canary-eye-4", "canary-to-worker-5", "canary-own-6",
)  # fmt: skip
KEYS = (SHARED, RED, OPS, EYE)
PATHS: dict[str, dict[str, Any]] = {
    CHAT: HELLO,
    "/v1/completions": {"model": "m", "prompt": "a"},
    "/generate": {"text": "a"},
    "/v1/embeddings": {"model": "m", "input": "a"},
    "/v1/messages": {**HELLO, "max_tokens": 1},
    "/v1/responses": {"model": "m", "input": "a"},
    "/rerank": {"model": "m", "query": "q", "documents": ["d"]},
    "/v1/tokenize": {},
    "/nowhere": {},
}
ADMIN = [
    ("GET", "/workers", None),
    ("POST", "/workers", {"url": "nonsense"}),
    ("POST", "/workers", {"url": "http://127.0.0.1:1", "api_key": OWN, "labels": 7}),
    ("GET", "/get_loads", None),
    ("POST", "/flush_cache", None),
    ("POST", "/start_profile", None),
    ("POST", "/route/explain", HELLO),
    ("GET", "/mesh/status", None),
    ("PUT", "/mesh/status", None),
]
OPEN = [
    "/health",
    "/readiness",
    "/v1/models",
    "/get_server_info",
    "/engine_metrics",
    "/health_generate",
    "/metrics",
]


async def everything(gateway: Gateway, token: str) -> list[bytes]:
    """Asks for everything with every credential in every place, right and wrong; all bytes of all answers."""
    client = await gateway.connect()
    told: list[bytes] = []

    async def ask(*arguments: Any, **options: Any) -> None:
        nonlocal client
        answer = await client.ask(*arguments, **options)
        told.append(repr(answer.lines).encode() + answer.body)
        if answer.get("connection") == "close":
            client = await gateway.connect()

    for credential in (*KEYS, token):
        places = [
            [bearer(credential)],
            [f"x-api-key: {credential}"],
            [bearer(SHARED), f"openai-organization: {credential}", f"x-smg-routing-key: {credential}"],
            [
                bearer(SHARED),
                f"x-api-key: {SHARED}",
                f"cookie: k={credential}",
                f"x-correlation-id-2: {credential}",
            ],
            [bearer(RED), f"anthropic-beta: {credential}", f"tracestate: {credential}"],
            [f"authorization: Basic {credential}"],
        ]
        for lines in places:
            for path, document in PATHS.items():
                await ask(path, document, *lines)
            for method, path, document in ADMIN:
                await ask(path, document, *lines, method=method)
        for path in OPEN:
            await ask(path, None, bearer(credential))
        await ask(f"{CHAT}?api_key={credential}", HELLO, bearer(SHARED))
        await ask(f"/workers?key={credential}", None, bearer(credential))
        await ask(CHAT, None, bearer(credential), body=b"not json")
        await ask(CHAT, {"model": "unknown", "messages": HELLO["messages"]}, bearer(credential))
    return told


def breakages(worker: FakeWorker) -> None:
    """Answers of every kind, good and bad, one after the other."""
    worker.plays += [
        answers(200),
        answers(500, {"error": "ill"}),
        closes,
        breaks(head(200, length=100), b"half"),
        answers(401, {"error": {"message": "who are you?"}}),
        streams(event({"a": 1}), DONE),
        answers(429, {}, "retry-after: 1"),
    ]


async def test_up_6_no_credential_turns_up_where_it_does_not_belong(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
):
    for name, key in (("shared", SHARED), ("to-worker", TO_WORKER)):
        (tmp_path / name).write_text(key)
    async with provider() as idp, fake_workers(2, "m") as workers:
        token = idp.token(sub="canary")
        flags = (
            *idp.flags,
            *(
                "--api-key",
                f"@{tmp_path / 'shared'}",
                "--tenant-api-key",
                f"red:{RED}",
                "--log-level",
                "debug",
            ),
            *("--control-plane-api-keys", f"ops:Ops:admin:{OPS}", f"eye:Eye:user:{EYE}"),
            *("--worker-api-key", f"@{tmp_path / 'to-worker'}"),
        )
        for worker in workers:
            for path in ("/get_server_info", "/server_info"):
                worker.on_path[path] = answers(
                    200, {"version": "1", "api_key": OWN, "admin_api_key": TO_WORKER}
                )
        async with running_gateway(*flags, workers=workers) as gateway:
            own = workers[1]
            await gateway.ask(f"/workers/{own.id}", {"api_key": OWN}, bearer(OPS), method="PATCH")
            for worker in workers:
                breakages(worker)
            told = await everything(gateway, token)
            gateway.node.reload.ask()
            await trio.sleep(0.05)
            told.append(gateway.node.metrics.render())
            told.append(repr(gateway.settings).encode())
            refused = await gateway.raw(request(CHAT, HELLO, bearer(RED), "bad header: x"))
            told.append(refused)
        # A credential is not among what anybody was told ...
        log = capfd.readouterr()
        told.append((log.out + log.err).encode())
        for canary in (*KEYS, TO_WORKER, OWN, token):
            for text in told:
                assert canary.encode() not in text, (canary, text[:2000])
        # ... and each worker has got its own and no other.
        assert all(len(worker.turns) > 20 for worker in workers)
        for worker, key in ((workers[0], TO_WORKER), (own, OWN)):
            for turn in (*worker.turns, *worker.asked):
                for canary in (*KEYS, token, "canary-shared", *({TO_WORKER, OWN} - {key})):
                    if worker is own and canary == TO_WORKER and turn in worker.asked:
                        continue  # probes before it was given a key of its own
                    assert canary.encode() not in turn.raw, (canary, turn.raw)
        assert idp.server.turns == []
        assert all(b"canary" not in turn.raw for turn in idp.server.asked), (
            "the provider is asked without a key"
        )


async def test_up_6_a_token_for_this_gateway_is_not_relayed_by_an_open_one():
    async with provider() as idp, fake_workers(1, "m") as (worker,):
        async with running_gateway(*idp.flags, workers=[worker]) as gateway:
            for line in (bearer(idp.token()), bearer(idp.token(exp=1)), f"x-api-key: {idp.token()}"):
                assert (await gateway.ask(CHAT, HELLO, line)).status == 200
                assert {"authorization", "x-api-key"}.isdisjoint((await worker.next_turn()).names)
            theirs = idp.token(aud="worker")
            await gateway.ask(CHAT, HELLO, bearer(theirs))
            assert (await worker.next_turn()).header("authorization") == f"Bearer {theirs}".encode()


@pytest.mark.parametrize(
    "lines",
    [
        [f"Authorization : Bearer {RED}"],
        [f"authorization:\tBearer {RED}\r\n continued"],
        [f" authorization: Bearer {RED}"],
        [f"authorization\x00: Bearer {RED}"],
        [f"authorization: Bearer {RED}\x00"],
        [f"authorization: Bearer {RED}\rx: y"],
    ],
)
async def test_headers_that_can_be_read_in_two_ways_are_400(lines: list[str]):
    async with fake_workers(1, "m") as (worker,):
        async with running_gateway("--tenant-api-key", f"red:{RED}", workers=[worker]) as gateway:
            assert (await gateway.raw(request(CHAT, HELLO, *lines))).startswith(b"HTTP/1.1 400")
            assert worker.turns == []


@pytest.mark.parametrize(
    "lines",
    [
        [f"x-authorization: Bearer {RED}"],
        [f"authorization_: Bearer {RED}"],
        [f"proxy-authorization: Bearer {RED}"],
        [f"x-forwarded-authorization: Bearer {RED}"],
        [f"authorization: Bearer Bearer {RED}"],
        [f"authorization: Bearer {RED}, Bearer {RED}"],
        [f"authorization: Bearer {RED} {RED}"],
        [f'authorization: Bearer token="{RED}"'],
        [f"authorization: Bearer\xa0{RED}"],
        [f"authorization: Token {RED}"],
        [f"authorization: Bearer {RED.upper()}"],
        [f"authorization: Bearer {RED}\xff"],
        [f"authorization: Bearer {RED}%00"],
        ["authorization: Bearer red"],
        ["authorization: Bearer red:" + RED],
        ["x-api-key: null"],
        ["x-api-key: "],
        [bearer(RED), "authorization: Bearer wrong"],
        ["authorization: Bearer wrong", bearer(RED)],
        [f"connection: authorization, close\r\n{bearer('wrong')}"],
        [
            "x-real-ip: 127.0.0.1",
            "x-forwarded-for: 127.0.0.1",
            "x-smg-tenant-id: red",
            "via: x",
        ],
    ],
)
async def test_header_tricks_open_nothing(lines: list[str]):
    async with fake_workers(1, "m") as (worker,):
        async with running_gateway("--tenant-api-key", f"red:{RED}", workers=[worker]) as gateway:
            for target in (CHAT, CHAT.replace("chat", "%63hat"), f"http://gateway{CHAT}", f"{CHAT}?"):
                answer = await gateway.ask(target, HELLO, *lines)
                assert (answer.status, answer.code) == (401, "invalid_api_key"), (target, answer)
            assert worker.turns == []


@pytest.mark.parametrize(
    "target",
    [
        "/workers",
        "/%77orkers",
        "http://x/workers",
        "/workers?",
        "/workers/../health",
        "//workers",
        "/WORKERS",
        "/workers/",
    ],
)
async def test_no_spelling_of_a_path_gets_around_the_admin_gate(target: str):
    async with running_gateway("--control-plane-api-keys", f"ops:Ops:admin:{OPS}") as gateway:
        for method in ("GET", "POST", "DELETE", "HEAD", "PATCH"):
            answer = await gateway.ask(target, None, method=method)
            assert answer.status in (401, 404), (method, target)
            assert b'"workers"' not in answer.body
        assert gateway.node.registry.workers() == ()


@pytest.mark.parametrize("size", [9_000, 60_000])
async def test_an_oversize_credential_is_wrong_and_no_more(size: int):
    async with provider() as idp, running_gateway(*idp.flags, "--api-key", SHARED) as gateway:
        for text in ("x" * size, "a." * (size // 4) + "b", f"e.{'e' * size}.e"):
            assert (await gateway.ask("/workers", None, bearer(text))).status == 401
            assert (await gateway.ask(CHAT, HELLO, f"x-api-key: {text}")).status == 401


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def allocated_blocks() -> int:
    gc.collect()
    return sys.getallocatedblocks()


async def right_key_takes_s(gateway: Gateway) -> float:
    """The median of a hundred requests with the right key."""
    client = await gateway.connect()
    taken = []
    for _ in range(100):
        began_s = time.perf_counter()
        assert (await client.ask(CHAT, HELLO, bearer(RED))).status == 200
        taken.append(time.perf_counter() - began_s)
    await client.leave()
    gateway.clients.remove(client)
    return statistics.median(taken)


def guess_at_the_gate(gateway: Gateway, count: int) -> int:
    """Wrong keys shown to the gate itself, which is all of a request that knows of keys; how many it refused."""
    gates = gateway.node._access.gates
    refused = 0
    for number in range(count):
        key = b"canary-red-%06d" % number
        try:
            gates.serving(((b"authorization", b"Bearer " + key),) if number % 2 else ((b"x-api-key", key),))
        except GatewayError as error:
            refused += error.code == "invalid_api_key"
    return refused


async def guess_over_sockets(gateway: Gateway, first: int, count: int) -> None:
    """Wrong keys in requests that come all at once on a kept connection."""
    client = await gateway.connect()
    guesses = b"".join(
        b"POST /v1/chat/completions HTTP/1.1\r\nhost: g\r\nauthorization: Bearer canary-red-%06d\r\n"
        b"content-length: 0\r\n\r\n" % number
        for number in range(first, first + count)
    )
    async with trio.open_nursery() as nursery:
        nursery.start_soon(client.send, guesses)
        refused = 0
        while refused < count:
            assert await client.more()
            refused += client.rest.count(b"HTTP/1.1 401")
            client.rest = client.rest[client.rest.rfind(b"HTTP/1.1 401") + 1 :]
    await client.leave()
    gateway.clients.remove(client)


async def test_a_hundred_thousand_wrong_keys_cost_no_memory_and_slow_nobody_down():
    """The bulk is shown to the gate, thousands come over sockets: what grows with a guess would grow in either."""
    at_the_gate, over_sockets, connections = 100_000, 4_000, 4
    async with fake_workers(1, "m") as (worker,):
        async with running_gateway("--tenant-api-key", f"red:{RED}", workers=[worker]) as gateway:
            await right_key_takes_s(gateway)
            before_s = await right_key_takes_s(gateway)
            before_bytes, before_blocks = resident_bytes(), allocated_blocks()
            with trio.fail_after(60):
                async with trio.open_nursery() as nursery:
                    for number in range(connections):
                        share = over_sockets // connections
                        nursery.start_soon(guess_over_sockets, gateway, number * share, share)
            of_sockets = allocated_blocks() - before_blocks
            assert guess_at_the_gate(gateway, at_the_gate) == at_the_gate
            of_gate = allocated_blocks() - before_blocks - of_sockets
            grown_bytes = resident_bytes() - before_bytes
            after_s = await right_key_takes_s(gateway)
            assert gateway.metric("smg_http_responses_total", status_code="401") == over_sockets
            assert len(worker.turns) == 300
    # One object kept for each guess would be as many blocks as guesses.
    assert of_sockets < over_sockets / 2, of_sockets
    assert of_gate < at_the_gate / 20, of_gate
    assert grown_bytes < 24 << 20, grown_bytes
    assert after_s < 3 * before_s + 0.001, (before_s, after_s)


async def test_the_gate_stays_shut_while_requests_are_cut_into_pieces():
    """A key that comes byte by byte, and one that is remembered with a head that repeats, are still looked at whole."""
    async with fake_workers(1, "m") as (worker,):
        async with running_gateway("--tenant-api-key", f"red:{RED}", workers=[worker]) as gateway:
            client = await gateway.connect()
            good = request(CHAT, HELLO, bearer(RED))
            bad = request(CHAT, HELLO, bearer(RED[:-1] + "9"))
            without = request(CHAT, HELLO)
            for sent, status in (
                (good, 200),
                (good, 200),
                (bad, 401),
                (without, 401),
                (good, 200),
                (bad, 401),
            ):
                await client.send(sent)
                assert (await client.read()).status == status
            for sent, status in ((bad, 401), (good, 200), (good[:-1] + b" ", 400)):
                client = await gateway.connect()
                await client.send(*(sent[index : index + 1] for index in range(len(sent))))
                assert (await client.read()).status == status
            client = await gateway.connect()
            # The same head with another length is the same head; with another key it is not.
            longer = request(CHAT, {**HELLO, "user": "x" * 50}, bearer(RED))
            await client.send(good + longer + bad + longer)
            assert [(await client.read()).status for _ in range(4)] == [200, 200, 401, 200]


async def test_a_stream_is_not_begun_for_a_wrong_key():
    async with fake_workers(1, "m") as (worker,):
        async with running_gateway("--api-key", SHARED, workers=[worker]) as gateway:
            answer = await gateway.ask(CHAT, STREAM, bearer("wrong"))
            assert answer["content-type"] == "application/json" and answer.is_error(401, "invalid_api_key")
            await eventually(lambda: gateway.metric("smg_http_responses_total", status_code="401") == 1)
