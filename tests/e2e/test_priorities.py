"""The priority scheduler over real sockets (contract ADM-6, ADM-7, ERR-12, ERR-14, ERR-20; docs/operate/priorities.md)."""

from __future__ import annotations

import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import anthropic
import openai
import pytest
import trio

from tests.e2e.fake_worker import DONE, END, SSE_HEAD, Gate, answers, chunk, fake_worker, hangs, says
from tests.e2e.gateway import CHAT, HELLO, STREAM, Client, Gateway, eventually, request, running_gateway
from tests.e2e.process import running_process
from tests.e2e.test_sdks import anthropic_client, in_thread, openai_client

ON = "--priority-scheduler-enabled", "--priority-scheduler-default-max-class", "system"
ONE = "--max-concurrent-requests", "1"
MESSAGES: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 1}
LONG = "word " * 24_000
"""30,000 tokens: some four seconds of prefill by the estimate."""


def of_class(name: str) -> str:
    return f"x-smg-priority: {name}"


async def sent(gateway: Gateway, *headers: str, document: Any = HELLO, path: str = CHAT) -> Client:
    """A client whose request is on its way."""
    client = await gateway.connect()
    await client.send(request(path, document, *headers))
    return client


def waiting(gateway: Gateway, **labels: str) -> float:
    return gateway.metric("smg_scheduler_queue_depth", **labels)


def in_flight(gateway: Gateway, **labels: str) -> float:
    return gateway.metric("smg_scheduler_inflight", **labels)


async def queued(gateway: Gateway, *names: str) -> list[Client]:
    """Waiting requests of these classes, in this order; each carries its place as `number`."""
    clients = []
    for number, name in enumerate(names):
        before = waiting(gateway)
        clients.append(await sent(gateway, of_class(name), document={**HELLO, "number": number}))
        await eventually(lambda before=before: waiting(gateway) == before + 1)
    return clients


def put(path: Path, text: str) -> None:
    """Replaces a file as careful people do: nobody reads half of it."""
    new = path.with_suffix(".new")
    new.write_text(text)
    new.rename(path)


def config(path: Path, text: str) -> Sequence[str]:
    put(path, text)
    return "--priority-scheduler-config", str(path)


# -- classes


async def test_adm_6_the_higher_class_goes_first():
    async with fake_worker("m") as worker, running_gateway(*ON, *ONE, workers=[worker]) as gateway:
        gate = Gate()
        worker.play = gate.before(answers(200))
        first = await sent(gateway, of_class("system"))
        await worker.next_turn()
        names = ["bulk", "default", "Interactive", " system ", "bulk", "default"]
        clients = await queued(gateway, *names)
        assert {name: waiting(gateway, **{"class": name}) for name in ("bulk", "system")} == {
            "bulk": 2.0,
            "system": 1.0,
        }
        gate.open.set()
        assert [(await client.read()).status for client in (first, *clients)] == [200] * 7
        order = [names[turn.document["number"]].strip().lower() for turn in worker.turns[1:]]
        assert order == ["system", "interactive", "default", "default", "bulk", "bulk"]
        admitted = {
            name: gateway.metric("smg_scheduler_admit_total", **{"class": name, "outcome": "admitted"})
            for name in ("bulk", "default", "interactive", "system")
        }
        assert admitted == {"bulk": 2, "default": 2, "interactive": 1, "system": 2}
        assert gateway.metric("smg_scheduler_queue_wait_seconds_count", **{"class": "bulk"}) == 2


async def test_adm_6_an_unknown_class_counts_as_default_and_is_counted():
    async with fake_worker("m") as worker, running_gateway(*ON, workers=[worker]) as gateway:
        for value in ("urgent", "", "default, system", "\xff"):
            assert (await gateway.ask(CHAT, HELLO, of_class(value))).status == 200
        assert gateway.metric("smg_scheduler_unknown_priority_value_total", tenant="other") == 4
        labels = {"class": "default", "outcome": "admitted"}
        assert gateway.metric("smg_scheduler_admit_total", **labels) == 4


async def test_adm_6_a_class_is_clamped_to_the_tenants_highest(tmp_path: Path):
    flags = config(
        tmp_path / "p.yaml",
        'tenant_policies:\n  "auth:gold": {max_class: interactive}\n  "auth:low": {max_class: bulk}\n',
    )
    keys = "--tenant-api-key", "gold:key-g", "low:key-l", "other:key-o"
    async with (
        fake_worker("m") as worker,
        running_gateway("--priority-scheduler-enabled", *flags, *keys, workers=[worker]) as gateway,
    ):
        for key in ("key-g", "key-l", "key-o"):
            for name in ("system", "bulk", ""):
                headers = [f"authorization: Bearer {key}", *([of_class(name)] if name else [])]
                assert (await gateway.ask(CHAT, HELLO, *headers)).status == 200

        def clamps(tenant: str, effective: str) -> float:
            labels = {"tenant": tenant, "requested_class": "system", "effective_class": effective}
            return gateway.metric("smg_scheduler_clamp_total", **labels)

        assert clamps("auth:gold", "interactive") == clamps("auth:low", "bulk") == 1
        assert clamps("other", "default") == 1  # no rules of its own: no series of its own
        assert gateway.metric("smg_scheduler_clamp_total") == 3
        admitted = {
            name: gateway.metric("smg_scheduler_admit_total", **{"class": name, "outcome": "admitted"})
            for name in ("bulk", "default", "interactive", "system")
        }
        assert admitted == {"bulk": 5, "default": 3, "interactive": 1, "system": 0}


async def test_adm_6_reserved_slots_are_kept_free_and_starvation_ends_that(tmp_path: Path):
    flags = config(
        tmp_path / "p.yaml",
        "classes:\n  interactive: {reserved_floor: 1}\n  bulk: {starvation_threshold_secs: 0.3}\n",
    )
    two = "--max-concurrent-requests", "2"
    async with fake_worker("m") as worker, running_gateway(*ON, *two, *flags, workers=[worker]) as gateway:
        gate = Gate()
        worker.play = gate.before(answers(200))
        clients = [await sent(gateway, of_class("bulk")) for _ in range(2)]
        await eventually(lambda: waiting(gateway) == 1)
        assert gateway.metric("smg_scheduler_class_capacity_pressure", **{"class": "bulk"}) == 1
        await eventually(lambda: waiting(gateway) == 0)  # by time alone
        assert in_flight(gateway, **{"class": "bulk"}) == 2
        assert gateway.metric("smg_scheduler_utilization") == 1
        gate.open.set()
        assert [(await client.read()).status for client in clients] == [200] * 2


async def test_adm_6_reservations_that_do_not_fit_shrink_with_a_warning(tmp_path: Path):
    text = "classes:\n  system: {reserved_floor: 32}\n  interactive: {reserved_floor: 128}\n"
    flags = config(tmp_path / "p.yaml", text)
    async with fake_worker("m") as worker:
        async with running_process(*ON, *flags, "--worker-urls", worker.url) as process:
            await process.says(b"do not fit the fleet and were shrunk in proportion")
            assert b"slots=64" in process.stderr
            while (await process.ask(CHAT, HELLO)).status != 200:
                await trio.sleep(0.05)
            clients = [await process.connect() for _ in range(12)]
            gate = Gate()
            worker.play = gate.before(answers(200))
            for client in clients:
                await client.send(request(CHAT, HELLO))
            await eventually(lambda: len(worker.turns) >= 13)  # a quarter of the slots is for everybody
            gate.open.set()
            assert [(await client.read()).status for client in clients] == [200] * 12
            assert process.stderr.count(b"do not fit the fleet") == 1


# -- queues


@pytest.mark.parametrize("path", [CHAT, "/v1/messages"])
async def test_err_12_a_full_queue_refuses_its_class_at_once(tmp_path: Path, path: str):
    flags = config(tmp_path / "p.yaml", "classes: {bulk: {queue_size: 1}}\n")
    async with fake_worker("m") as worker, running_gateway(*ON, *ONE, *flags, workers=[worker]) as gateway:
        gate = Gate()
        worker.play = gate.before(answers(200))
        clients = [await sent(gateway)]
        await worker.next_turn()
        clients += await queued(gateway, "bulk")
        answer = await gateway.ask(path, MESSAGES, of_class("bulk"))
        assert answer.is_error(429, "scheduler_queue_full") if path == CHAT else answer.status == 429
        assert answer["x-smg-error-code"] == "scheduler_queue_full" and int(answer["retry-after"]) >= 1
        assert answer.document["error"]["type"] == "rate_limit_error"
        clients += await queued(gateway, "default")
        gate.open.set()
        assert [(await client.read()).status for client in clients] == [200] * 3
        labels = {"class": "bulk", "outcome": "rejected_queue_full"}
        assert gateway.metric("smg_scheduler_admit_total", **labels) == 1
        assert gateway.metric("smg_http_rate_limit_total", result="rejected") == 1
        assert gateway.metric("smg_http_rate_limit_total", result="allowed") == 3


async def test_err_14_who_waits_too_long_for_its_turn_is_told_so(tmp_path: Path):
    flags = config(tmp_path / "p.yaml", "classes: {bulk: {queue_timeout_secs: 0.2}}\n")
    async with fake_worker("m") as worker, running_gateway(*ON, *ONE, *flags, workers=[worker]) as gateway:
        worker.plays.append(hangs)
        await sent(gateway)
        await worker.next_turn()
        client = await gateway.connect()
        answer = await client.ask(CHAT, HELLO, of_class("bulk"))
        assert answer.is_error(503, "scheduler_queue_timeout") and int(answer["retry-after"]) >= 1
        assert await client.is_open()
        answer = await gateway.ask("/v1/messages", MESSAGES, of_class("bulk"))
        assert answer.status == 503 and answer.document["error"]["type"] == "overloaded_error"
        labels = {"class": "bulk", "outcome": "rejected_queue_timeout"}
        assert gateway.metric("smg_scheduler_admit_total", **labels) == 2
        assert len(worker.turns) == 1


@pytest.mark.parametrize("how", ["reset", "close"])
async def test_http_13_a_waiting_client_that_leaves_frees_its_place(how: str):
    async with fake_worker("m") as worker, running_gateway(*ON, *ONE, workers=[worker]) as gateway:
        gate = Gate()
        worker.play = gate.before(answers(200))
        first = await sent(gateway)
        await worker.next_turn()
        second, third = await queued(gateway, "default", "default")
        if how == "reset":
            second.reset()
        else:
            await second.leave()
        await eventually(lambda: waiting(gateway) == 1, 1.5)
        gate.open.set()
        assert (await first.read()).status == (await third.read()).status == 200
        labels = {"class": "default", "outcome": "client_cancelled"}
        assert gateway.metric("smg_scheduler_admit_total", **labels) == 1
        assert len(worker.turns) == 2


# -- preemption


@pytest.mark.parametrize("document", [HELLO, STREAM], ids=["plain", "stream"])
async def test_adm_7_err_20_who_gives_way_receives_a_complete_503(document: Any):
    async with fake_worker("m") as worker, running_gateway(*ON, *ONE, workers=[worker]) as gateway:
        worker.plays += [hangs, answers(200)]
        victim = await sent(gateway, of_class("bulk"), document=document)
        turn = await worker.next_turn()
        answer = await gateway.ask(CHAT, HELLO, of_class("interactive"))
        assert answer.status == 200
        told = await victim.read()
        assert told.is_error(503, "scheduler_preempted")
        assert told["retry-after"] == "1" and told["x-smg-preempted"] == "true"
        assert told.document["error"]["type"] == "server_error"
        with trio.fail_after(2):
            await turn.gone.wait()  # the worker is told at once that nobody waits
        assert await victim.is_open()
        assert (await victim.ask(CHAT, HELLO)).status == 200  # the connection goes on
        labels = {"victim_class": "bulk", "by_class": "interactive"}
        assert gateway.metric("smg_scheduler_preemption_total", **labels) == 1
        assert gateway.metric("smg_router_request_errors_total", error_type="no_workers") <= 1


async def test_adm_7_who_has_sent_a_byte_is_left_in_peace():
    async with fake_worker("m") as worker, running_gateway(*ON, *ONE, workers=[worker]) as gateway:
        gate = Gate()

        async def slowly(turn: Any) -> None:
            await turn.send(SSE_HEAD, chunk(b"data: 1\n\n"))
            await gate.before(says(chunk(DONE) + END))(turn)

        worker.plays.append(slowly)
        first = await sent(gateway, of_class("bulk"), document=STREAM)
        await first.read_head()
        await first.read_chunk()
        (second,) = await queued(gateway, "system")
        await trio.sleep(0.25)  # two sweeps, each of which looks for somebody who could give way
        assert waiting(gateway) == 1
        gate.open.set()
        while await first.read_chunk() is not None:
            pass
        assert (await second.read()).status == 200
        assert gateway.metric("smg_scheduler_preemption_total") == 0


async def test_adm_7_a_thousand_times_nothing_is_lost():
    """Each arrival takes the slot of the one before; every client gets exactly one whole answer."""
    async with fake_worker("m") as worker, running_gateway(*ON, *ONE, workers=[worker]) as gateway:
        worker.play = hangs
        for round_ in range(50):
            low = await sent(gateway, of_class("bulk"))
            await eventually(lambda n=round_: len(worker.turns) == 3 * n + 1)
            middle = await sent(gateway, of_class("interactive"))
            await eventually(lambda n=round_: len(worker.turns) == 3 * n + 2)
            worker.plays.append(answers(200))
            high = await sent(gateway, of_class("system"))
            assert (await high.read()).status == 200
            for victim in (low, middle):
                assert (await victim.read()).is_error(503, "scheduler_preempted")
                await victim.leave()
            assert in_flight(gateway) == waiting(gateway) == 0
        assert gateway.metric("smg_scheduler_preemption_total") == 100


async def test_err_20_the_sdks_raise_and_read_retry_after():
    async with fake_worker("m") as worker, running_gateway(*ON, *ONE, workers=[worker]) as gateway:
        worker.play = hangs

        def ask_openai() -> openai.APIStatusError:
            with openai_client(gateway) as client, pytest.raises(openai.InternalServerError) as error:
                client.chat.completions.create(
                    model="m",
                    messages=[{"role": "user", "content": "hi"}],
                    extra_headers={"x-smg-priority": "bulk"},
                )
            return error.value

        def ask_anthropic() -> anthropic.APIStatusError:
            with anthropic_client(gateway) as client, pytest.raises(anthropic.APIStatusError) as error:
                client.messages.create(
                    model="m",
                    messages=[{"role": "user", "content": "hi"}],
                    max_tokens=1,
                    extra_headers={"x-smg-priority": "bulk"},
                )
            return error.value

        asks: list[Callable[[], Any]] = [ask_openai, ask_anthropic]
        for number, ask in enumerate(asks):
            raised: list[Any] = []
            async with trio.open_nursery() as nursery:

                async def run(ask: Callable[[], Any] = ask, raised: list[Any] = raised) -> None:
                    raised.append(await in_thread(ask))

                nursery.start_soon(run)
                await eventually(lambda n=number: len(worker.turns) == 2 * n + 1)
                worker.plays.append(answers(200))
                assert (await gateway.ask(CHAT, HELLO, of_class("system"))).status == 200
            assert raised[0].status_code == 503 and raised[0].response.headers["retry-after"] == "1"
            assert raised[0].response.headers["x-smg-preempted"] == "true"


async def test_err_12_the_sdk_raises_rate_limit_error(tmp_path: Path):
    flags = config(tmp_path / "p.yaml", "classes: {default: {queue_size: 0}}\n")
    async with fake_worker("m") as worker, running_gateway(*ON, *ONE, *flags, workers=[worker]) as gateway:
        worker.plays.append(hangs)
        await sent(gateway)
        await worker.next_turn()

        def ask() -> None:
            with openai_client(gateway) as client, pytest.raises(openai.RateLimitError) as error:
                client.chat.completions.create(model="m", messages=[{"role": "user", "content": "hi"}])
            assert int(error.value.response.headers["retry-after"]) >= 1

        await in_thread(ask)


# -- tenants and prefill


async def test_adm_6_a_flood_of_long_prompts_stands_before_nobody_else():
    keys = "--tenant-api-key", "flood:key-f", "other:key-o"
    async with fake_worker("m") as worker, running_gateway(*ON, *keys, workers=[worker]) as gateway:
        gates = [Gate() for _ in range(4)]

        def begins(gate: Gate) -> Any:
            async def play(turn: Any) -> None:
                await gate.open.wait()
                await turn.send(SSE_HEAD, chunk(b"data: 1\n\n"), chunk(DONE) + END)

            return play

        worker.plays += [begins(gate) for gate in gates]
        long = {**STREAM, "messages": [{"role": "user", "content": LONG}]}
        flood = [await sent(gateway, "authorization: Bearer key-f", document=long) for _ in range(3)]
        await eventually(lambda: waiting(gateway) == 2)
        assert len(worker.turns) == 1  # the engine has one prefill to do, and no queue
        assert gateway.metric("smg_scheduler_prefill_utilization") == 1
        other = await sent(gateway, "authorization: Bearer key-o", document=STREAM)
        await eventually(lambda: waiting(gateway) == 3)
        gates[0].open.set()
        await eventually(lambda: len(worker.turns) == 2)
        gates[1].open.set()
        await eventually(lambda: len(worker.turns) == 3)
        assert [len(turn.body) > 1000 for turn in worker.turns] == [True, False, True]
        for gate in gates:
            gate.open.set()
        for client in (*flood, other):
            await client.read_head()
            while await client.read_chunk() is not None:
                pass
        await eventually(lambda: in_flight(gateway) == 0)
        assert gateway.metric("smg_scheduler_prefill_utilization") == 0


async def test_adm_6_slots_follow_the_fleet():
    async with fake_worker("m") as worker, running_gateway(*ON, workers=[worker]) as gateway:
        worker.play = hangs
        worker_id = gateway.worker(worker).id
        patch = {"labels": {"max_running_requests": "1"}}
        assert (await gateway.ask(f"/workers/{worker_id}", patch, method="PATCH")).status == 202
        await eventually(lambda: gateway.worker(worker).spec.labels)
        first = await sent(gateway)
        await worker.next_turn()
        (second,) = await queued(gateway, "default")
        async with fake_worker("m", name="b") as more:
            assert (await gateway.ask("/workers", {"url": more.url})).status == 202
            await eventually(lambda: waiting(gateway) == 0)  # 64 more
            assert (await second.read()).status == 200
            first.reset()
            await eventually(lambda: in_flight(gateway) == 0, 1.5)
            assert (await gateway.ask(f"/workers/{worker_id}", method="DELETE")).status == 202


async def test_models_with_workers_of_their_own_do_not_get_into_each_others_way():
    async with (
        fake_worker("m") as worker,
        fake_worker("n", name="b") as other,
        running_gateway(*ON, workers=[worker, other]) as gateway,
    ):
        worker.play = hangs
        long = {**STREAM, "messages": [{"role": "user", "content": LONG}]}
        flood = [await sent(gateway, document=long) for _ in range(2)]
        await eventually(lambda: waiting(gateway) == 1)
        assert (await gateway.ask(CHAT, {**HELLO, "model": "n"})).status == 200
        for client in flood:
            client.reset()


# -- reload and mistakes


async def test_a_reload_changes_rules_and_keeps_who_waits(tmp_path: Path):
    path = tmp_path / "p.yaml"
    flags = config(path, "classes: {default: {queue_size: 1}}\n")
    async with fake_worker("m") as worker, running_gateway(*ON, *ONE, *flags, workers=[worker]) as gateway:
        gate = Gate()
        worker.play = gate.before(answers(200))
        clients = [await sent(gateway)]
        await worker.next_turn()
        clients += await queued(gateway, "default")
        assert (await gateway.ask(CHAT, HELLO)).status == 429
        put(path, "classes: {default: {queue_size: many}}\n")
        gateway.node.reload.ask()
        await trio.sleep(0.2)
        assert (await gateway.ask(CHAT, HELLO)).status == 429  # what was loaded before stands
        put(path, "classes: {default: {queue_size: 3}}\n")
        gateway.node.reload.ask()
        await eventually(
            lambda: gateway.metric("smg_scheduler_queue_size_limit", **{"class": "default"}) == 3
        )
        clients += await queued(gateway, "default")
        gate.open.set()
        assert [(await client.read()).status for client in clients] == [200] * 3


async def test_sighup_reloads_and_the_log_says_what_changed(tmp_path: Path):
    path = tmp_path / "p.yaml"
    flags = config(path, "classes: {bulk: {queue_size: 7}}\n")
    async with running_process(*ON, *flags) as process:
        put(path, "classes:\n  bulk:\n    queue_sise: 8\n")
        process.process.send_signal(signal.SIGHUP)
        await process.says(b"line 3: classes.bulk.queue_sise: is no member")
        put(path, 'classes: {bulk: {queue_size: 8}}\ntenant_policies: {"auth:a": {weight: 2}}\n')
        process.process.send_signal(signal.SIGHUP)
        await process.says(b"class bulk: queue_size 7 -> 8")
        await process.says(b"tenant auth:a: highest class as the flag, weight 2")


async def test_an_emptied_file_is_a_mistake_and_not_a_wish(tmp_path: Path):
    path = tmp_path / "p.yaml"
    flags = config(path, "classes: {default: {queue_size: 3}}\n")
    async with running_gateway(*ON, *flags) as gateway:
        put(path, "")
        assert await gateway.node.reload.reload(gateway.node.reload._parts) is False
        assert gateway.metric("smg_scheduler_queue_size_limit", **{"class": "default"}) == 3


async def test_a_mistake_in_the_file_ends_the_start_with_its_line(tmp_path: Path):
    flags = config(tmp_path / "p.yaml", "classes:\n  bulk:\n    queue_size: -1\n")
    async with running_process(*ON, *flags, ready=False) as process:
        await process.says(b"p.yaml line 3: classes.bulk.queue_size: expected int >= 0")
        assert await process.ends() == 1
