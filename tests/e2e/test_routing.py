"""Targets, keys, load, retries and breakers as seen from outside (contract sections 11 and 12)."""

from __future__ import annotations

from itertools import pairwise

import pytest
import trio

from tests.e2e.fake_worker import (
    Gate,
    answers,
    breaks,
    closes,
    fake_worker,
    fake_workers,
    hangs,
    head,
    resets,
    says,
    streams,
)
from tests.e2e.gateway import CHAT, HELLO, STREAM, eventually, request, running_gateway

FAST = "--retry-initial-backoff-ms", "1"


@pytest.mark.parametrize(
    "play",
    [
        answers(200),
        answers(500),
        resets,
        closes,
        streams(b"data: 1\n\n"),
        breaks(head(200, "content-type: a/b", length=9), b"x"),
        says(b"garbage"),
    ],
)
@pytest.mark.parametrize("document", [HELLO, STREAM])
async def test_rt_3_load_comes_back_to_zero_whatever_happens(play, document):
    """`running_gateway` checks it after every test; here it is also seen while the request runs."""
    async with fake_worker("m") as worker, running_gateway("--disable-retries", workers=[worker]) as gateway:
        gate = Gate()
        worker.plays.append(gate.before(play))
        client = await gateway.connect()
        await client.send(request(CHAT, document))
        await gate.reached.wait()
        assert (await gateway.ask("/workers")).document["workers"][0]["load"] == 1
        assert gateway.metric("smg_worker_requests_active") == 1
        assert gateway.metric("smg_admission_inflight") == 1
        gate.open.set()
        await client.read(may_cut=True)
        await eventually(lambda: gateway.metric("smg_worker_requests_active") == 0)
        assert gateway.metric("smg_admission_inflight") == 0


@pytest.mark.parametrize(
    "policy",
    [
        "round_robin",
        "random",
        "power_of_two",
        "least_load",
        "consistent_hashing",
        "prefix_hash",
        "manual",
        "bucket",
        "passthrough",
    ],
)
async def test_rt_4_a_target_is_obeyed_under_every_policy(policy):
    async with (
        fake_workers(3, "m") as workers,
        running_gateway("--policy", policy, workers=workers) as gateway,
    ):
        for number, worker in enumerate(workers):
            for target in (worker.id, str(number)):
                answer = await gateway.ask(
                    CHAT, HELLO, f"x-smg-target-worker: {target}", "x-smg-routing-key: k"
                )
                assert answer.worker == worker.id
        for target in (
            "3",
            "-1",
            "99999999999",
            "nobody",
            "00000000-0000-0000-0000-000000000000",
            workers[0].url,
        ):
            answer = await gateway.ask(CHAT, HELLO, f"x-smg-target-worker: {target}")
            assert answer.is_error(503, "no_available_workers"), target
        assert (await gateway.ask(CHAT, HELLO, "x-smg-target-worker:")).status == 200


async def test_rt_4_the_index_counts_candidates_of_the_model_only():
    async with (
        fake_worker("other") as one,
        fake_worker("m") as two,
        fake_worker("m") as three,
        running_gateway(workers=[one, two, three]) as gateway,
    ):
        assert (await gateway.ask(CHAT, HELLO, "x-smg-target-worker: 0")).worker == two.id
        assert (await gateway.ask(CHAT, HELLO, "x-smg-target-worker: 1")).worker == three.id
        assert (await gateway.ask(CHAT, HELLO, f"x-smg-target-worker: {one.id}")).status == 503


async def test_rt_4_a_target_is_not_left_for_another_worker():
    async with fake_workers(2, "m") as workers, running_gateway(*FAST, workers=workers) as gateway:
        workers[0].play = resets
        answer = await gateway.ask(CHAT, HELLO, "x-smg-target-worker: 0")
        assert answer.is_error(502, "call_upstream_response_failed")
        assert workers[1].turns == []


@pytest.mark.parametrize("policy", ["manual", "consistent_hashing", "prefix_hash"])
async def test_rt_5_a_routing_key_stays_with_its_worker(policy):
    flags = "--policy", policy, "--routing-key-headers", "x-user", "x-team"
    async with fake_workers(3, "m") as workers, running_gateway(*flags, workers=workers) as gateway:
        homes = {}
        for turn in range(3):
            for key in range(12):
                document = {**HELLO, "messages": [{"role": "user", "content": f"{turn}"}]}
                homes.setdefault(key, set()).add(
                    (await gateway.ask(CHAT, document, f"x-smg-routing-key: user-{key}")).worker
                )
        assert all(len(seen) == 1 for seen in homes.values())
        assert len({worker for seen in homes.values() for worker in seen}) > 1
        for name in ("x-user", "X-Team"):
            assert {(await gateway.ask(CHAT, HELLO, f"{name}: user-1")).worker} == homes[1]
        assert (
            await gateway.ask(CHAT, HELLO, "x-user: user-2", "x-smg-routing-key: user-1")
        ).worker in homes[1]


async def test_rt_5_other_policies_obey_a_key_only_when_told_to():
    async with fake_workers(3, "m") as workers:
        async with running_gateway("--policy", "round_robin", workers=workers) as gateway:
            seen = {(await gateway.ask(CHAT, HELLO, "x-smg-routing-key: k")).worker for _ in range(6)}
            assert len(seen) == 3
        async with running_gateway(
            "--policy", "round_robin", "--routing-key-override", workers=workers
        ) as gateway:
            seen = {(await gateway.ask(CHAT, HELLO, "x-smg-routing-key: k")).worker for _ in range(6)}
            assert len(seen) == 1
            assert len({(await gateway.ask(CHAT, HELLO)).worker for _ in range(6)}) == 3


@pytest.mark.parametrize("status", [408, 429, 500, 502, 503, 504])
async def test_rty_1_these_answers_are_retried_at_another_worker(status):
    async with (
        fake_workers(2, "m") as workers,
        running_gateway("--policy", "passthrough", workers=workers) as gateway,
    ):
        workers[0].play = answers(status)
        answer = await gateway.ask(CHAT, HELLO)
        assert answer.status == 200 and answer.worker == workers[1].id
        assert [len(worker.turns) for worker in workers] == [1, 1]
        assert workers[0].turns[0].body == workers[1].turns[0].body
        assert gateway.metric("smg_worker_retries_total") == 1


@pytest.mark.parametrize(
    "status", [200, 201, 204, 301, 400, 401, 403, 404, 409, 413, 422, 425, 501, 505, 529]
)
async def test_rty_1_no_other_answer_is_retried(status):
    async with (
        fake_workers(2, "m") as workers,
        running_gateway("--policy", "passthrough", workers=workers) as gateway,
    ):
        workers[0].play = answers(
            status, body=b"" if status == 204 else b"{}", type=None if status == 204 else "a/b"
        )
        if status == 204:
            workers[0].play = says(head(204))
        answer = await gateway.ask(CHAT, HELLO)
        assert answer.status == status and answer.worker == workers[0].id
        assert workers[1].turns == []


@pytest.mark.parametrize("play", [resets, closes, answers(500), answers(503)])
async def test_rty_1_a_transcription_is_sent_once(play):
    body = b'--b\r\ncontent-disposition: form-data; name="model"\r\n\r\nm\r\n--b\r\ncontent-disposition: form-data; name="file"; filename="f"\r\n\r\nx\r\n--b--\r\n'
    async with (
        fake_workers(2, "m") as workers,
        running_gateway("--policy", "passthrough", workers=workers) as gateway,
    ):
        workers[0].play = play
        answer = await gateway.ask(
            "/v1/audio/transcriptions", body=body, type="multipart/form-data; boundary=b"
        )
        assert answer.status in (500, 502, 503)
        assert [len(worker.turns) for worker in workers] == [1, 0]


async def test_rty_1_a_transcription_whose_worker_refuses_the_connection_goes_to_another():
    body = b'--b\r\ncontent-disposition: form-data; name="model"\r\n\r\nm\r\n--b\r\ncontent-disposition: form-data; name="file"; filename="f"\r\n\r\nx\r\n--b--\r\n'
    flags = (
        "--policy",
        "passthrough",
        "--upstream-pool-idle-timeout-secs",
        "0.1",
        "--health-check-interval-secs",
        "60",
        "--disable-load-monitoring",
    )
    async with fake_workers(2, "m") as workers, running_gateway(*flags, workers=workers) as gateway:
        workers[0].kill()
        answer = await gateway.ask(
            "/v1/audio/transcriptions", body=body, type="multipart/form-data; boundary=b"
        )
        assert answer.status == 200 and answer.worker == workers[1].id


async def test_rty_2_each_attempt_goes_to_a_worker_not_tried_and_the_last_answer_is_relayed():
    async with (
        fake_workers(3, "m") as workers,
        running_gateway("--policy", "round_robin", workers=workers) as gateway,
    ):
        for number, worker in enumerate(workers):
            worker.play = answers(500, {"from": number}, f"x-from: {number}")
        answer = await gateway.ask(CHAT, HELLO)
        assert answer.status == 500 and answer.code is None
        assert [len(worker.turns) for worker in workers] == [1, 1, 1]
        last = next(number for number, worker in enumerate(workers) if worker.id == answer.worker)
        assert answer.document == {"from": last} and answer["x-from"] == str(last)


@pytest.mark.parametrize("count", [1, 2, 4])
async def test_rty_2_a_single_candidate_is_asked_again_up_to_the_bound(count):
    async with (
        fake_worker("m") as worker,
        running_gateway(*FAST, "--retry-max-retries", str(count), workers=[worker]) as gateway,
    ):
        for play in (resets, closes, answers(500), answers(502), answers(503), answers(504)):
            worker.turns.clear()
            worker.play = play
            assert (await gateway.ask(CHAT, HELLO)).status >= 500
            assert len(worker.turns) == count
            gateway.worker(worker).breaker.succeeded(
                trio.current_time(), gateway.worker(worker).breaker.started(trio.current_time())
            )


@pytest.mark.parametrize(
    "play",
    [answers(429), answers(408), answers(503, None, "retry-after: 1"), answers(500, None, "retry-after: 1")],
)
async def test_rty_2_a_single_candidate_that_asks_for_rest_is_not_asked_again(play):
    async with fake_worker("m") as worker, running_gateway(*FAST, workers=[worker]) as gateway:
        worker.play = play
        assert (await gateway.ask(CHAT, HELLO)).status in (408, 429, 500, 503)
        assert len(worker.turns) == 1


async def test_rty_2_disable_retries_is_one_send():
    async with (
        fake_workers(2, "m") as workers,
        running_gateway("--disable-retries", workers=workers) as gateway,
    ):
        for worker in workers:
            worker.play = answers(503)
        assert (await gateway.ask(CHAT, HELLO)).status == 503
        assert sum(len(worker.turns) for worker in workers) == 1
        assert (await gateway.ask(CHAT, {"model": "m"})).status == 400  # checks stay


async def test_rty_2_a_body_too_large_to_keep_is_sent_once():
    flags = "--policy", "passthrough", "--max-buffered-request-bytes", "1000"
    async with fake_workers(2, "m") as workers, running_gateway(*flags, workers=workers) as gateway:
        workers[0].play = answers(500)
        assert (await gateway.ask(CHAT, {**HELLO, "pad": "x" * 2000})).status == 500
        assert workers[1].turns == []
        assert (await gateway.ask(CHAT, HELLO)).status == 200


async def test_rty_3_to_another_worker_the_retry_goes_at_once():
    flags = "--policy", "passthrough", "--retry-initial-backoff-ms", "20000"
    async with fake_workers(2, "m") as workers, running_gateway(*flags, workers=workers) as gateway:
        workers[0].play = answers(503)
        assert (await gateway.ask(CHAT, HELLO)).status == 200  # `read` waits less than the backoff


async def test_rty_3_a_repeat_on_the_same_worker_waits():
    flags = "--retry-initial-backoff-ms", "200", "--retry-jitter-factor", "0", "--retry-max-retries", "3"
    async with fake_worker("m") as worker, running_gateway(*flags, workers=[worker]) as gateway:
        times = []

        async def timed(turn):
            times.append(trio.current_time())
            await answers(500)(turn)

        worker.play = timed
        await gateway.ask(CHAT, HELLO)
        waits = [b - a for a, b in pairwise(times)]
        assert 0.2 <= waits[0] < 0.29 and 0.3 <= waits[1] < 0.45


async def test_rty_3_a_client_that_leaves_during_the_backoff_ends_the_request():
    async with (
        fake_worker("m") as worker,
        running_gateway("--retry-initial-backoff-ms", "20000", workers=[worker]) as gateway,
    ):
        worker.play = answers(500)
        client = await gateway.connect()
        await client.send(request(CHAT, HELLO))
        await worker.next_turn()
        await eventually(lambda: gateway.worker(worker).in_flight == 0)
        client.reset()
        await eventually(lambda: gateway.metric("smg_admission_inflight") == 0, 1.5)
        assert len(worker.turns) == 1


async def test_rty_4_past_the_budget_the_first_failure_is_the_answer():
    flags = (
        "--policy",
        "passthrough",
        "--retry-budget-ratio",
        "0",
        "--retry-budget-min-per-sec",
        "0.2",
        "--disable-circuit-breaker",
    )
    async with fake_workers(2, "m") as workers, running_gateway(*flags, workers=workers) as gateway:
        workers[0].play = answers(503)
        statuses = [(await gateway.ask(CHAT, HELLO)).status for _ in range(6)]
        assert statuses == [200, 200, 503, 503, 503, 503]
        assert gateway.metric("smg_worker_retries_exhausted_total") == 4
        assert gateway.metric("smg_worker_retries_total") == 2


async def test_rty_4_refused_connections_do_not_draw_on_the_budget():
    flags = (
        "--policy",
        "passthrough",
        "--retry-budget-ratio",
        "0",
        "--retry-budget-min-per-sec",
        "0",
        "--disable-health-check",
        "--disable-circuit-breaker",
        "--disable-load-monitoring",
    )
    async with fake_workers(2, "m") as workers, running_gateway(*flags, workers=workers) as gateway:
        workers[0].kill()
        for _ in range(5):
            assert (await gateway.ask(CHAT, HELLO)).status == 200
        assert gateway.metric("smg_worker_retries_exhausted_total") == 0


async def test_rty_5_the_timeout_bounds_the_request_with_all_its_retries():
    flags = (
        "--request-timeout-secs",
        "0.5",
        "--retry-initial-backoff-ms",
        "100",
        "--retry-backoff-multiplier",
        "1",
        "--retry-max-retries",
        "50",
        "--disable-circuit-breaker",
    )
    async with fake_worker("m") as worker, running_gateway(*flags, workers=[worker]) as gateway:
        worker.play = answers(500)
        started_s = trio.current_time()
        answer = await gateway.ask(CHAT, HELLO)
        assert trio.current_time() - started_s < 1.5
        assert answer.status in (500, 504)
        assert 3 <= len(worker.turns) <= 6


async def test_rty_6_a_killed_worker_causes_no_error_while_another_exists():
    async with (
        fake_workers(2, "m") as workers,
        running_gateway("--policy", "round_robin", workers=workers) as gateway,
    ):
        gates = [Gate() for _ in range(6)]
        clients = []
        for gate in gates:
            workers[0].plays.append(gate.before(answers(200)))
        for number in range(6):
            client = await gateway.connect()
            clients.append(client)
            await client.send(request(CHAT, STREAM if number % 2 else HELLO, "x-smg-routing-key: x"))
        await eventually(lambda: len(workers[0].turns) == 3)
        workers[0].kill()
        for client in clients:
            answer = await client.read()
            assert answer.status == 200 and answer.worker == workers[1].id


async def test_rty_7_the_final_answer_keeps_its_retry_after():
    async with fake_workers(2, "m") as workers, running_gateway(workers=workers) as gateway:
        for worker in workers:
            worker.play = answers(429, None, "retry-after: 17")
        answer = await gateway.ask(CHAT, HELLO)
        assert answer.status == 429 and answer["retry-after"] == "17"


async def test_hlt_2_a_worker_that_refuses_is_out_of_rotation_within_a_second():
    flags = "--policy", "round_robin", "--health-check-interval-secs", "60", "--disable-load-monitoring"
    async with fake_workers(2, "m") as workers, running_gateway(*flags, workers=workers) as gateway:
        workers[0].kill()
        for _ in range(2):
            assert (await gateway.ask(CHAT, HELLO)).status == 200
        await eventually(lambda: gateway.ready_count == 1, 1.0)
        assert (await gateway.ask("/readiness")).document["healthy_workers"] == 1


async def test_cb_1_the_breaker_opens_after_failures_in_a_row_and_a_success_clears_them():
    flags = "--cb-failure-threshold", "3", "--disable-retries"
    async with fake_worker("m") as worker, running_gateway(*flags, workers=[worker]) as gateway:
        for play in (answers(500), resets, answers(200), answers(429), closes):
            worker.plays.append(play)
            await gateway.ask(CHAT, HELLO)
        assert gateway.metric("smg_worker_cb_state") == 0
        worker.plays.append(answers(504))
        await gateway.ask(CHAT, HELLO)
        assert gateway.metric("smg_worker_cb_state") == 1
        assert (await gateway.ask(CHAT, HELLO)).is_error(503, "no_available_workers")
        assert len(worker.turns) == 6
        assert gateway.metric("smg_worker_cb_transitions_total", to="open") == 1


async def test_cb_1_other_answers_are_no_failures():
    async with (
        fake_worker("m") as worker,
        running_gateway("--cb-failure-threshold", "1", "--disable-retries", workers=[worker]) as gateway,
    ):
        for status in (400, 401, 404, 422, 501, 529):
            worker.plays.append(answers(status))
            assert (await gateway.ask(CHAT, HELLO)).status == status
        assert gateway.metric("smg_worker_cb_state") == 0


async def test_cb_1_a_worker_may_have_its_own_failure_statuses():
    async with fake_worker("m") as worker, running_gateway("--disable-retries") as gateway:
        await gateway.ask(
            "/workers",
            {"url": worker.url, "resilience": {"retryable_status_codes": [418], "cb_failure_threshold": 2}},
        )
        await eventually(lambda: gateway.ready_count == 1)
        for status in (500, 503, 418, 418):
            worker.plays.append(answers(status))
            await gateway.ask(CHAT, HELLO)
        assert gateway.metric("smg_worker_cb_state") == 1


async def test_cb_3_half_open_lets_a_few_through_and_closes_after_successes():
    flags = (
        "--cb-failure-threshold",
        "1",
        "--cb-timeout-duration-secs",
        "0.2",
        "--cb-success-threshold",
        "2",
        "--disable-retries",
    )
    async with fake_worker("m") as worker, running_gateway(*flags, workers=[worker]) as gateway:
        worker.plays.append(answers(500))
        await gateway.ask(CHAT, HELLO)
        assert (await gateway.ask(CHAT, HELLO)).status == 503
        await eventually(lambda: gateway.metric("smg_worker_cb_state") == 2, 2)
        gate = Gate()
        worker.play = gate.before(answers(200))
        clients = [await gateway.connect() for _ in range(5)]
        for client in clients:
            await client.send(request(CHAT, HELLO))
        await eventually(lambda: len(worker.turns) == 3)
        statuses = []

        async def read(client) -> None:
            statuses.append((await client.read()).status)
            if statuses == [503] * 3:
                gate.open.set()

        async with trio.open_nursery() as nursery:
            for client in clients:
                nursery.start_soon(read, client)
        assert statuses == [503] * 3 + [200] * 2
        assert gateway.metric("smg_worker_cb_state") == 0


async def test_cb_3_one_failure_opens_it_again_and_a_client_that_leaves_gives_its_permit_back():
    flags = (
        "--cb-failure-threshold",
        "1",
        "--cb-timeout-duration-secs",
        "0.2",
        "--cb-success-threshold",
        "1",
        "--disable-retries",
    )
    async with fake_worker("m") as worker, running_gateway(*flags, workers=[worker]) as gateway:
        worker.plays.append(answers(500))
        await gateway.ask(CHAT, HELLO)
        await eventually(lambda: gateway.metric("smg_worker_cb_state") == 2, 2)
        worker.plays.append(hangs)
        client = await gateway.connect()
        await client.send(request(CHAT, HELLO))
        await worker.next_turn()
        await worker.next_turn()
        assert (await gateway.ask(CHAT, HELLO)).status == 503  # the one permit is out
        client.reset()
        await eventually(lambda: gateway.worker(worker).in_flight == 0)
        worker.plays.append(answers(500))
        assert (await gateway.ask(CHAT, HELLO)).status == 500
        assert gateway.metric("smg_worker_cb_state") == 1


async def test_cb_4_a_worker_that_asks_for_rest_is_avoided_while_another_exists():
    async with (
        fake_workers(2, "m") as workers,
        running_gateway("--policy", "round_robin", workers=workers) as gateway,
    ):
        workers[0].plays.append(answers(503, None, "retry-after: 30"))
        for _ in range(6):
            assert (await gateway.ask(CHAT, HELLO)).worker == workers[1].id
        assert len(workers[0].turns) == 1
        workers[1].plays.append(answers(429, None, "retry-after: 30"))
        assert (await gateway.ask(CHAT, HELLO)).status in (200, 429)
        assert (await gateway.ask(CHAT, HELLO)).status == 200  # all rest: they go on getting requests


async def test_cb_5_the_breaker_survives_a_patch_and_can_be_off():
    flags = "--cb-failure-threshold", "1", "--disable-retries"
    async with fake_worker("m") as worker:
        async with running_gateway(*flags, workers=[worker]) as gateway:
            worker.plays.append(answers(500))
            await gateway.ask(CHAT, HELLO)
            patched = await gateway.ask(f"/workers/{worker.id}", {"labels": {"a": "b"}}, method="PATCH")
            assert patched.status == 202
            assert gateway.metric("smg_worker_cb_state") == 1
            assert (await gateway.ask(CHAT, HELLO)).status == 503
        async with running_gateway(*flags, "--disable-circuit-breaker", workers=[worker]) as gateway:
            worker.play = answers(500)
            assert {(await gateway.ask(CHAT, HELLO)).status for _ in range(4)} == {500}
            assert gateway.metric("smg_worker_cb_state") == 0
