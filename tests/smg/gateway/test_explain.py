"""EXP-1 to EXP-4, RT-4, RT-5: explain says what dispatch would do, and changes nothing."""

from __future__ import annotations

from random import Random
from typing import Any

import pytest

from smg.api.call import Call
from smg.api.endpoints import CHAT
from smg.errors import GatewayError
from smg.fleet import load
from smg.fleet.registry import Registry
from smg.fleet.worker import Kind, LoadReport, Status
from smg.gateway.explain import Explain
from smg.policies.routing_table import PolicyTable
from smg.settings import Routing
from tests.smg.gateway.desk import add, document, registry, request

BODY = {"model": "m", "messages": [{"role": "user", "content": "x" * 1200}]}
NOW = 5.0


class Node:
    """A registry, its policies and explain over them."""

    def __init__(self, policy: str, fleet: Registry | None = None, **settings: Any) -> None:
        self.fleet = fleet or registry()
        self.rng = Random(3)
        self.policies = PolicyTable(Routing(policy=policy, **settings), self.fleet)
        self.desk = Explain(
            self.fleet,
            self.policies,
            self.rng,
            lambda: NOW,
            routing_key_headers=["x-session"],
            keys_override=settings.get("routing_key_override", False),
        )

    async def explain(self, body: Any = BODY, query: str = "", **headers: str) -> dict[str, Any]:
        given = [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()]
        response = await self.desk.explain(request(f"/route/explain{query}", "POST", body, given))
        assert response.status == 200
        found = document(response)
        assert isinstance(found, dict)
        return found

    def chosen_by_dispatch(self, key: str | None = None) -> str:
        """What the request path would do now, with everything it changes."""
        pool = self.fleet.pool("m")
        assert pool is not None
        policy = self.policies.policy_for("m")
        call = Call(CHAT, "m", b"", BODY, routing_key=key)
        worker = policy.choose(call, pool.candidates(NOW), NOW, self.rng)
        assert worker is not None
        policy.placed(call, worker, NOW)
        load.begin(worker)
        return worker.id


def node(policy: str, workers: int = 3, **settings: Any) -> Node:
    found = Node(policy, **settings)
    for number in range(workers):
        add(found.fleet, f"w{number}", "m")
    return found


async def test_the_answer_has_every_promised_member() -> None:
    here = node("least_load", 2)
    worker = here.fleet.workers()[0]
    worker.in_flight = 3
    found = await here.explain()
    assert found["model"] == "m"
    assert found["endpoint"] == "/v1/chat/completions"
    assert found["policy"] == "least_load"
    assert found["decided_by"] == "policy"
    assert found["routing_key"] is None
    assert found["prompt"] == {"chars": 1200, "blocks": 3, "block_chars": 512}
    row = found["workers"][0]
    assert row.keys() == {
        "worker_id", "url", "status", "circuit", "eligible", "excluded_by", "matched_blocks", "matched_ratio", "in_flight",
        "queued", "kv_usage", "cost", "terms", "rank", "reason",
    }  # fmt: skip
    assert (row["url"], row["status"], row["circuit"], row["in_flight"]) == (
        "http://w0:8000",
        "ready",
        "closed",
        3,
    )
    assert found["chosen"] == here.fleet.workers()[1].id
    assert [row["rank"] for row in found["workers"]] == [2, 1]


@pytest.mark.parametrize("policy", ["round_robin", "passthrough", "least_load", "consistent_hashing", "manual", "prefix_hash", "bucket"])  # fmt: skip
async def test_exp_1_exp_4_explain_names_the_next_choice_again_and_again(policy: str) -> None:
    here = node(policy)
    for _ in range(7):
        first = await here.explain()
        assert await here.explain() == first
        assert first["chosen"] == here.chosen_by_dispatch()


@pytest.mark.parametrize("policy", ["consistent_hashing", "manual", "prefix_hash"])
@pytest.mark.parametrize("header", ["x_smg_routing_key", "x_session"])
async def test_exp_3_rt_5_a_routing_key_decides(policy: str, header: str) -> None:
    here = node(policy, 5)
    for key in ("a", "b", "a", "c"):
        found = await here.explain(**{header: key})
        assert (found["decided_by"], found["routing_key"]) == ("routing_key", key)
        assert found["chosen"] == here.chosen_by_dispatch(key)


async def test_rt_5_policies_without_keys_do_not_read_them() -> None:
    found = await node("round_robin").explain(x_smg_routing_key="a")
    assert (found["decided_by"], found["routing_key"]) == ("policy", None)


async def test_rt_5_with_the_override_every_policy_reads_them() -> None:
    here = node("round_robin", routing_key_override=True)
    first = await here.explain(x_smg_routing_key="a")
    assert (first["decided_by"], first["routing_key"]) == ("routing_key", "a")
    assert here.chosen_by_dispatch("a") == first["chosen"]
    here.chosen_by_dispatch()
    assert (await here.explain(x_smg_routing_key="a"))["chosen"] == first["chosen"]


@pytest.mark.parametrize("policy", ["random", "power_of_two"])
async def test_exp_1_random_policies_name_their_candidates(policy: str) -> None:
    here = node(policy)
    add(here.fleet, "sick", "m", status=Status.NOT_READY)
    found = await here.explain()
    assert found["chosen"] is None
    assert found["candidates"] == [worker.id for worker in here.fleet.workers()[:3]]


async def test_exp_3_a_single_candidate_needs_no_policy() -> None:
    for policy in ("random", "round_robin"):
        here = node(policy, 1)
        found = await here.explain()
        assert (found["chosen"], found["decided_by"]) == (here.fleet.workers()[0].id, "only_candidate")


async def test_exp_2_every_worker_is_listed_with_what_excludes_it() -> None:
    here = node("round_robin", 2)
    fleet = here.fleet
    for name, status in (
        ("pending", Status.PENDING),
        ("sick", Status.NOT_READY),
        ("leaving", Status.DRAINING),
    ):
        add(fleet, name, "m", status=status)
    broken = add(fleet, "broken", "m")
    for _ in range(10):
        broken.breaker.failed(NOW, broken.breaker.started(NOW))
    full = add(fleet, "full", "m")
    fleet.reported(full, LoadReport(NOW, waiting=50), load.ReportRules())
    other = add(fleet, "other", "n")
    found = await here.explain()
    rows = {row["url"].split("/")[-1].split(":")[0]: row for row in found["workers"]}
    assert other.id not in {row["worker_id"] for row in found["workers"]}
    assert {name: row["excluded_by"] for name, row in rows.items()} == {
        "w0": None, "w1": None, "pending": "status", "sick": "status", "leaving": "draining", "broken": "circuit", "full": "overload",
    }  # fmt: skip
    assert rows["broken"]["circuit"] == "open"
    assert rows["full"]["queued"] == 50
    for row in rows.values():
        assert row["eligible"] == (row["excluded_by"] is None) == (row["rank"] is not None)
    assert [row["worker_id"] for row in found["workers"] if row["rank"] == 1] == [found["chosen"]]


async def test_exp_3_with_no_candidate_every_reason_is_told() -> None:
    here = node("round_robin", 0)
    add(here.fleet, "sick", "m", status=Status.NOT_READY)
    found = await here.explain()
    assert found["chosen"] is None
    assert found["candidates"] == []
    assert [row["excluded_by"] for row in found["workers"]] == ["status"]


async def test_rt_4_exp_2_a_target_decides_under_every_policy() -> None:
    for policy in ("random", "least_load", "manual"):
        here = node(policy)
        workers = here.fleet.workers()
        for target in (workers[2].id, "2"):
            found = await here.explain(x_smg_target_worker=target, x_smg_routing_key="k")
            assert (found["chosen"], found["decided_by"]) == (workers[2].id, "target")
            assert [row["excluded_by"] for row in found["workers"]] == ["target", "target", None]


@pytest.mark.parametrize("target", ["3", "-1", "nobody", "999999999", "\u0662"])
async def test_rt_4_a_target_that_is_no_candidate_is_nobody(target: str) -> None:
    here = node("round_robin")
    given = [(b"x-smg-target-worker", target.encode())]
    found = document(await here.desk.explain(request("/route/explain", "POST", BODY, given)))
    assert (found["chosen"], found["decided_by"]) == (None, "target")


async def test_rt_4_an_empty_target_is_absent() -> None:
    assert (await node("round_robin").explain(x_smg_target_worker=" "))["decided_by"] == "policy"


@pytest.mark.parametrize(
    ("body", "path"),
    [
        ({"messages": [1]}, "/v1/chat/completions"),
        ({"prompt": "x"}, "/v1/completions"),
        ({"text": "x"}, "/generate"),
        ({"input": "x"}, "/v1/embeddings"),
        ({"query": "x", "documents": ["a"]}, "/v1/rerank"),
    ],
)
async def test_the_endpoint_is_guessed_from_the_members(body: dict[str, Any], path: str) -> None:
    found = await node("round_robin").explain({"model": "m", **body})
    assert found["endpoint"] == path


async def test_the_endpoint_can_be_told() -> None:
    found = await node("round_robin").explain({"model": "m", "input": "hello"}, "?endpoint=/v1/responses")
    assert found["endpoint"] == "/v1/responses"
    assert found["prompt"]["chars"] == 5


@pytest.mark.parametrize(
    ("body", "query", "status", "code"),
    [
        (b"{", "", 400, "invalid_json"),
        (b"[]", "", 400, "invalid_type"),
        ({"model": "m"}, "", 400, "missing_required_parameter"),
        ({"model": "m", "messages": []}, "", 400, "empty_array"),
        ({"messages": [1]}, "", 400, "missing_required_parameter"),
        (BODY, "?endpoint=/nothing", 400, "invalid_value"),
        (BODY, "?endpoint=/v1/audio/transcriptions", 400, "invalid_value"),
        ({**BODY, "model": "nobody"}, "", 404, "model_not_found"),
    ],
)
async def test_exp_3_bad_bodies_and_unknown_models_are_refused(
    body: Any, query: str, status: int, code: str
) -> None:
    with pytest.raises(GatewayError) as caught:
        await node("round_robin").explain(body, query)
    assert (caught.value.status, caught.value.code) == (status, code)


async def test_mod_4_an_alias_is_explained_as_its_model() -> None:
    here = Node("round_robin", registry(short="m"))
    add(here.fleet, "a", "m")
    assert (await here.explain({**BODY, "model": "short"}))["model"] == "m"


async def test_exp_1_nothing_is_counted() -> None:
    here = node("least_load")
    state = here.rng.getstate()
    for key in ("a", "b"):
        await here.explain(x_smg_routing_key=key)
    assert here.rng.getstate() == state
    for worker in here.fleet.workers():
        assert (worker.in_flight, worker.chars_in_flight, worker.sent_since_report) == (0, 0, 0)
        assert worker.kind is Kind.REGULAR


async def test_with_shedding_nobody_is_chosen_while_all_are_overloaded() -> None:
    here = node("round_robin", 2)
    for worker in here.fleet.workers():
        here.fleet.reported(worker, LoadReport(NOW, waiting=50), load.ReportRules())
    assert (await here.explain())["chosen"] is not None
    shedding = Explain(here.fleet, here.policies, here.rng, lambda: NOW, sheds_overload=True)
    found = document(await shedding.explain(request("/route/explain", "POST", BODY)))
    assert found["chosen"] is None
    assert [row["excluded_by"] for row in found["workers"]] == ["overload", "overload"]
