"""Pairs: what a client is told of a leg's error, and what policies are told of each leg (PD-2, PD-3)."""

from __future__ import annotations

import json
from random import Random
from typing import Any

import pytest
import trio

from smg.errors import GatewayError, UpstreamError
from smg.fleet.worker import Kind, Worker
from smg.gateway.dispatch import Failed, Held
from smg.gateway.pair_dispatch import Leg, PairFailed, _error_of
from smg.gateway.resolve import pair_pool
from smg.policies.policy import Outcome
from tests.e2e.fake_worker import answers, closes, event, fake_workers, hangs, resets, streams
from tests.e2e.gateway import CHAT, HELLO, STREAM, eventually, running_gateway
from tests.smg.gateway.desk import add, registry


def error_of(failed: Failed, kind: Kind = Kind.DECODE) -> GatewayError:
    fleet = registry()
    prefill = add(fleet, "10.0.0.1", "m", worker_type="prefill", bootstrap_port=8998)
    decode = add(fleet, "w", "m", worker_type="decode")
    worker = prefill if kind is Kind.PREFILL else decode
    pool = fleet.pool_of("m", kind)
    assert pool is not None
    leg = Leg(kind, None, pool, None)  # type: ignore[arg-type]
    return _error_of(PairFailed(leg, worker, failed), (prefill, decode))


def answered(status: int, body: bytes, *headers: tuple[bytes, bytes]) -> Failed:
    return Failed(held=Held(status, list(headers), body, b""))


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b'{"error":{"message":"too long","code":1}}', "too long"),
        (b'{"error":"too long"}', "too long"),
        (b'{"object":"error","message":"too long"}', "too long"),
        (b'{"detail":"too long"}', "too long"),
        (b'{"detail":[{"loc":["body"]}]}', "The decode worker answered with status 422"),
        (b'{"error":{"message":""}}', "The decode worker answered with status 422"),
        (b"[1]", "The decode worker answered with status 422"),
        (b"<html>", "The decode worker answered with status 422"),
        (b"\xff", "The decode worker answered with status 422"),
    ],
)
def test_pd_3_the_message_is_the_workers_own_where_there_is_one(body: bytes, message: str) -> None:
    error = error_of(answered(422, body))
    assert (error.status, error.code, error.message) == (422, "decode_error", message)


def test_dn_3_the_addresses_of_both_workers_are_taken_out_of_a_message() -> None:
    text = (
        "KV transfer from 10.0.0.1:8998 (http://10.0.0.1:8000) to w:8000 on 10.0.0.1 failed, see the window"
    )
    error = error_of(answered(500, json.dumps({"message": text}).encode()), Kind.PREFILL)
    assert error.message == "KV transfer from worker (worker) to worker on worker failed, see the window"
    assert error.code == "prefill_internal_error"


def test_pd_3_a_message_is_cut_and_retry_after_kept() -> None:
    body = json.dumps({"message": "x" * 100_000}).encode()
    error = error_of(answered(503, body, (b"retry-after", b"9")))
    assert len(error.message) == 4096
    assert error.retry_after_s == 9


@pytest.mark.parametrize(
    ("kind", "status", "code"),
    [
        (UpstreamError.REFUSED, 502, "pd_request_failed"),
        (UpstreamError.RESET, 502, "pd_request_failed"),
        (UpstreamError.BROKEN_STREAM, 502, "pd_request_failed"),
        (UpstreamError.TIMEOUT, 504, "call_upstream_timeout"),
    ],
)
def test_pd_2_a_transport_error_is_502_and_a_timeout_504(kind: str, status: int, code: str) -> None:
    error = error_of(Failed(error=UpstreamError(kind, "10.0.0.1 said no")))
    assert (error.status, error.code) == (status, code)
    assert "10.0.0.1" not in error.message


def test_pd_2_a_model_needs_both_legs_and_a_name_that_nobody_knows_has_none() -> None:
    fleet = registry()
    add(fleet, "p", "m", worker_type="prefill")
    add(fleet, "r", "other")
    with pytest.raises(GatewayError) as caught:
        pair_pool(fleet, "m")
    assert (caught.value.status, caught.value.code) == (503, "no_available_workers")
    assert "decode" in caught.value.message
    assert pair_pool(fleet, "other") is None  # regular workers serve no pair
    add(fleet, "d", "m", worker_type="decode")
    pool = pair_pool(fleet, "m")
    assert pool is not None and pool.model == "m"


def test_mod_3_the_leg_that_tells_its_models_names_the_model() -> None:
    fleet = registry()
    add(fleet, "p", "m", worker_type="prefill")
    add(fleet, "d", worker_type="decode")
    named = pair_pool(fleet, "m")
    assert named is not None and named.model == "m"


class Spy:
    """Stands before a policy and notes what it is told."""

    def __init__(self, policy: Any) -> None:
        self._policy = policy
        self.told: list[tuple[str, str]] = []
        self.outcomes: list[Outcome] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._policy, name)

    def placed(self, call: Any, worker: Worker, now: float) -> None:
        self.told.append(("placed", worker.id))

    def first_byte(self, call: Any, worker: Worker, ttft_s: float, now: float) -> None:
        self.told.append(("first_byte", worker.id))

    def finished(self, call: Any, worker: Worker, outcome: Outcome, now: float) -> None:
        self.told.append(("finished", worker.id))
        self.outcomes.append(outcome)


async def spied(play: dict[str, Any], document: dict[str, Any]) -> tuple[Any, list[Spy], list[Any]]:
    """One request through a pair whose policies are watched."""
    async with fake_workers(2, "m") as [prefill, decode]:
        prefill.play = play.get("prefill", answers(200, {"usage": {"prompt_tokens": 7}}))
        decode.play = play.get(
            "decode", answers(200, {"usage": {"prompt_tokens": 8, "completion_tokens": 1}})
        )
        flags = ["--pd-disaggregation", "--disable-retries", "--prefill", prefill.url, "none"]
        async with running_gateway(*flags, "--decode", decode.url, ready=False) as gateway:
            await eventually(lambda: gateway.ready_count == 2)
            await eventually(lambda: gateway.worker(prefill).models and gateway.worker(decode).models)
            pair = gateway.node._policies.pair_for("m")
            spies = [Spy(pair.prefill), Spy(pair.decode)]
            pair.prefill, pair.decode = spies  # type: ignore[assignment]
            answer = await gateway.ask(CHAT, document)
            await eventually(lambda: all("finished" in dict(spy.told) for spy in spies))
            return answer, spies, [prefill, decode]


async def test_each_policy_is_told_its_own_leg_once() -> None:
    answer, [first, second], [prefill, decode] = await spied({}, HELLO)
    assert answer.status == 200
    assert first.told == [(word, prefill.id) for word in ("placed", "first_byte", "finished")]
    assert second.told == [(word, decode.id) for word in ("placed", "finished")]
    assert [first.outcomes[0].prompt_tokens, second.outcomes[0].prompt_tokens] == [7, 8]
    assert first.outcomes[0].is_success and second.outcomes[0].is_success


async def test_the_decode_policy_is_told_the_first_byte_of_a_stream() -> None:
    _, [first, second], [_, decode] = await spied({"decode": streams(event({"a": 1}))}, STREAM)
    assert second.told == [(word, decode.id) for word in ("placed", "first_byte", "finished")]
    assert [word for word, _ in first.told] == ["placed", "first_byte", "finished"]


@pytest.mark.parametrize(
    ("plays", "judged"),
    [
        ({"prefill": resets, "decode": hangs}, [False, None]),
        ({"prefill": hangs, "decode": closes}, [None, False]),
        ({"prefill": answers(500), "decode": hangs}, [False, None]),
        ({"prefill": answers(400), "decode": hangs}, [True, None]),
        ({"prefill": hangs, "decode": answers(500)}, [None, False]),
        ({"decode": answers(400)}, [True, True]),
    ],
)
async def test_pd_2_only_the_leg_that_failed_is_judged(
    plays: dict[str, Any], judged: list[bool | None]
) -> None:
    answer, spies, _ = await spied(plays, HELLO)
    assert answer.status >= 400
    outcomes = [spy.outcomes for spy in spies]
    assert all(len(told) == 1 for told in outcomes)
    if judged == [True, True]:  # a decode worker may refuse before the prefill is done
        judged = [outcomes[0][0].is_success, True]
        assert judged[0] is not False
    assert [told[0].is_success for told in outcomes] == judged


async def test_rt_3_whatever_becomes_of_pairs_every_count_comes_back() -> None:
    rng = Random(7)
    plays = [
        answers(200, {"ok": 1}),
        answers(200, {"ok": 1}),
        answers(503, {"error": "full"}),
        answers(400, {"error": "bad"}),
        streams(event({"a": 1})),
        resets,
        closes,
        hangs,
    ]
    async with fake_workers(2, "m") as prefills, fake_workers(2, "m") as decodes:
        every = [*prefills, *decodes]
        for worker in every:
            worker.plays.extend(rng.choice(plays) for _ in range(200))
        named = [word for worker in prefills for word in ("--prefill", worker.url, "none")]
        named += [word for worker in decodes for word in ("--decode", worker.url)]
        flags = ["--pd-disaggregation", "--request-timeout-secs", "0.5", "--cb-timeout-duration-secs", "0.05"]
        async with running_gateway(*flags, *named, ready=False) as gateway:
            await eventually(lambda: gateway.ready_count == 4)

            async def talk(number: int) -> None:
                client = await gateway.connect()
                for _ in range(8):
                    if rng.random() < 0.3:
                        with trio.move_on_after(rng.random() * 0.05):
                            await client.ask(CHAT, STREAM)
                        client.reset()
                        client = await gateway.connect()
                        continue
                    answer = await client.ask(CHAT, STREAM if number % 2 else HELLO)
                    assert answer.status in (200, 400, 502, 503, 504), answer

            with trio.fail_after(60):
                async with trio.open_nursery() as nursery:
                    for number in range(12):
                        nursery.start_soon(talk, number)
            for worker in gateway.node.registry.workers():
                await eventually(lambda w=worker: not w.breaker._trials and not w.chars_in_flight)
        # `running_gateway` looks that nothing is in flight and no fault was reported.
