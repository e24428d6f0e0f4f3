"""What the page is told: the right numbers, in bounds, and no secret of any kind."""

from __future__ import annotations

import json
from collections.abc import Iterable
from random import Random
from typing import Any

import msgspec
import pytest

from smg.api.call import Call
from smg.api.endpoints import CHAT
from smg.fleet import load
from smg.fleet.registry import Registry
from smg.fleet.worker import LoadReport, ModelCard, Status, WorkerSpec
from smg.gateway.decisions import Decisions
from smg.gateway.tallies import Tallies
from smg.policies.cache_aware import CacheAware
from smg.telemetry.metrics import Metrics
from smg.ui.pace import POINTS_MAX
from smg.ui.snapshot import (
    MEMBERS_SHOWN_MAX,
    NAME_CHARS_MAX,
    WORKERS_SHOWN_MAX,
    Rooms,
    Snapshot,
    Snapshots,
    name_of,
)
from tests.smg.fleet.builders import reported
from tests.smg.gateway.desk import add, registry

WALL = 1_700_000_000.0


class FakeMesh:
    """The documents of `/mesh/status` and `/mesh/members`."""

    def __init__(self, *peers: str) -> None:
        self.rows = [self.row("gw-1", is_self=True), *(self.row(peer) for peer in peers)]

    def row(self, name: str, *, is_self: bool = False, state: str = "alive") -> dict[str, Any]:
        return {
            "name": name,
            "address": "10.1.2.3:30001",
            "state": state,
            "incarnation": 1,
            "self": is_self,
            "rtt_ms": None if is_self else 1.25,
            "lag_secs": None if is_self else 0.05,
            "last_seen_secs": 0.0,
            "version": "0.1.0",
            "digest": "9f",
        }

    def status(self) -> dict[str, Any]:
        return {
            "node": "gw-1",
            "state": "alive",
            "members": len(self.rows),
            "alive": len(self.rows),
            "converged": True,
            "lag_secs": {"p50": 0.05, "max": 0.2},
        }

    def members(self) -> list[dict[str, Any]]:
        return self.rows

    def leave(self) -> bool:
        return True


class House:
    """The rooms of a node that the page looks at."""

    def __init__(self, mesh: FakeMesh | None = None) -> None:
        self.fleet: Registry = registry()
        self.metrics = Metrics()
        self.now = 100.0
        self.decisions = Decisions(lambda: self.now)
        self.samples: list[tuple[str, tuple[str, ...], float]] = []
        self.waiting = (0, 0)
        rooms = Rooms(
            registry=self.fleet,
            metrics=self.metrics,
            decisions=self.decisions,
            mesh=mesh,
            cache_samples=self._samples,
            waiting=lambda: self.waiting,
            version="1.2.3",
        )
        self.snapshots = Snapshots(rooms, 40.0)

    def _samples(self) -> Iterable[tuple[str, tuple[str, ...], float]]:
        return self.samples

    def look(self, after_s: float = 1.0) -> Snapshot:
        self.now += after_s
        return self.snapshots.take(self.now, WALL + self.now)

    def serve(self, count: int, ttft_s: float = 0.2) -> None:
        series = self.metrics.request_series(
            "POST", CHAT.path, "m", CHAT.name, True, "http", "regular", "http"
        )
        for _ in range(count):
            series.finished(200, "", 0.5)
            series.generated(ttft_s, 0.5, 100, 10)


def test_a_node_without_anything_has_a_snapshot() -> None:
    told = House().look()
    assert told.node is None and told.mesh is None
    assert (told.version, told.uptime_s) == ("1.2.3", 61.0)
    assert told.workers.total == 0 and told.workers.rows == ()
    assert told.ttft.p50_s is None and told.hits.ratio is None
    assert told.decisions == () and len(told.points) == 1


def test_requests_tokens_and_waits_are_those_of_the_metrics() -> None:
    house = House()
    house.serve(3)
    first = house.look()
    assert first.traffic.requests == 3 and first.traffic.requests_per_s == 0.0
    assert first.ttft.is_ever and first.ttft.count == 3
    house.serve(10, ttft_s=0.3)
    told = house.look(2.0)
    assert told.traffic.requests_per_s == 5.0
    assert (told.traffic.tokens_in_per_s, told.traffic.tokens_out_per_s) == (500.0, 50.0)
    assert not told.ttft.is_ever and told.ttft.count == 10
    assert told.ttft.p50_s is not None and 0.25 < told.ttft.p50_s <= 0.5


def test_only_failures_of_inference_count() -> None:
    house = House()
    house.look()
    house.metrics.response(CHAT.path, 503, "no_available_workers").add(4)
    house.metrics.response(CHAT.path, 400, "invalid_json").add(9)
    house.metrics.response("/readiness", 503, "").add(9)
    assert house.look(2.0).traffic.failures_per_s == 2.0


def test_the_hit_ratio_is_matched_over_prompt_characters() -> None:
    house = House()
    house.samples = [
        ("smg_cache_prompt_chars_total", ("m",), 1000.0),
        ("smg_cache_matched_chars_total", ("m",), 100.0),
    ]
    house.look()
    house.samples = [
        ("smg_cache_prompt_chars_total", ("m",), 1500.0),
        ("smg_cache_prompt_chars_total", ("n",), 500.0),
        ("smg_cache_matched_chars_total", ("m",), 900.0),
        ("smg_cache_actual_tokens_total", ("m",), 50.0),
    ]
    house.serve(1)
    told = house.look().hits
    assert told.ratio == 0.8 and told.ratio_ever == 0.45
    assert (told.cached_tokens, told.cached_ratio) == (50, 0.5)


def test_a_worker_is_shown_with_its_load_and_what_its_engine_says() -> None:
    house = House()
    worker = add(house.fleet, "a", "llama")
    load.begin(worker)
    load.note_peers(worker, 3)
    reported(worker, running=5, waiting=2, kv_usage=0.75)
    (row,) = house.look().workers.rows
    assert (row.name, row.models, row.kind, row.status) == ("a:8000", ("llama",), "regular", "ready")
    assert (row.in_flight, row.peers_in_flight) == (1, 3)
    assert (row.running, row.waiting, row.kv_usage, row.breaker) == (5, 2, 0.75, "closed")


def test_what_an_engine_said_long_ago_is_not_shown() -> None:
    house = House()
    worker = add(house.fleet, "a", "llama")
    worker.report = LoadReport(0.0, waiting=9, kv_usage=0.9)
    worker.report_until_s = 50.0
    worker.is_overloaded = True
    (row,) = house.look().workers.rows
    assert row.waiting is None and row.kv_usage is None and not row.is_overloaded


def test_shares_are_of_what_was_finished_while_somebody_looked() -> None:
    house = House()
    one, other = add(house.fleet, "a", "m"), add(house.fleet, "b", "m")
    house.look()
    for worker, count in ((one, 3), (other, 1)):
        for _ in range(count):
            worker.breaker.succeeded(house.now, 0)
    assert [row.share for row in house.look().workers.rows] == [0.75, 0.25]


def test_of_a_large_fleet_those_are_shown_that_are_out_or_busy() -> None:
    house = House()
    workers = [add(house.fleet, f"w{place}", "m") for place in range(WORKERS_SHOWN_MAX + 50)]
    house.fleet.set_status(workers[-1], Status.NOT_READY, 0.0)
    load.begin(workers[-2])
    told = house.look().workers
    names = [row.name for row in told.rows]
    assert (told.total, told.ready, told.hidden) == (len(workers), len(workers) - 1, 50)
    assert len(names) == WORKERS_SHOWN_MAX
    assert names[-2:] == [name_of(workers[-2]), name_of(workers[-1])], "in order of registration"


def test_members_are_shown_and_those_that_are_gone_come_last() -> None:
    mesh = FakeMesh("gw-3", "gw-2")
    mesh.rows.append(mesh.row("a-dead", state="dead"))
    told = House(mesh).look()
    assert told.node == "gw-1" and told.mesh is not None
    assert [row.name for row in told.mesh.rows] == ["gw-1", "gw-2", "gw-3", "a-dead"]
    assert [row.is_self for row in told.mesh.rows] == [True, False, False, False]
    assert told.mesh.rows[1].rtt_ms == 1.25 and told.mesh.rows[1].lag_ms == 50.0
    assert told.mesh.lag_max_ms == 200.0


def test_a_large_mesh_is_shown_in_part() -> None:
    told = House(FakeMesh(*(f"n{place:03}" for place in range(100)))).look()
    assert told.mesh is not None
    assert len(told.mesh.rows) == MEMBERS_SHOWN_MAX
    assert told.mesh.hidden == 101 - MEMBERS_SHOWN_MAX


def test_long_names_are_cut() -> None:
    house = House(FakeMesh("x" * 5000))
    add(house.fleet, "a", "y" * 5000)
    told = house.look()
    assert told.mesh is not None
    assert max(len(row.name) for row in told.mesh.rows) == NAME_CHARS_MAX
    assert len(told.workers.rows[0].models[0]) == NAME_CHARS_MAX


def test_two_minutes_of_points_are_kept() -> None:
    house = House()
    for _ in range(POINTS_MAX + 30):
        told = house.look()
    assert len(told.points) == POINTS_MAX
    later = house.look(POINTS_MAX + 1.0)
    assert len(later.points) == 1


SECRETS = {
    "key": "sk-canary-key",
    "path": "canary-path",
    "label": "canary-label",
    "prompt": "canary-prompt",
    "routing": "canary-routing-key",
    "request": "req-canary",
    "salt": "canary-salt",
    "message": "canary-message",
    "address": "10.1.2.3",
}


def _whole_node() -> House:
    house = House(FakeMesh("gw-2"))
    spec = WorkerSpec(
        f"http://worker:8000/{SECRETS['path']}",
        api_key=SECRETS["key"],
        labels={"team": SECRETS["label"]},
        model_id="m",
    )
    worker = house.fleet.add(spec, 0.0)
    other = house.fleet.add(WorkerSpec("http://other:8000", model_id="m"), 0.0)
    for each in (worker, other):
        house.fleet.set_models(each, (ModelCard("m"),))
        house.fleet.set_status(each, Status.READY, 0.0)
    worker.message = SECRETS["message"]
    return house


def test_no_secret_is_in_a_snapshot() -> None:
    """The canary: keys, paths, labels, texts, routing keys, request ids and addresses of members stay where they are."""
    house = _whole_node()
    house.decisions.switch(True)
    policy = CacheAware("m")
    lane = house.decisions.watched(Tallies(house.metrics).lane(CHAT, "m", policy, True), CHAT.path)
    body = {
        "model": "m",
        "cache_salt": SECRETS["salt"],
        "messages": [{"role": "user", "content": SECRETS["prompt"] * 200}],
    }
    call = Call(
        CHAT, "m", json.dumps(body).encode(), body, True, SECRETS["routing"], None, SECRETS["request"]
    )
    chosen = lane.policy.choose(call, house.fleet.workers(), house.now, Random(1))
    assert chosen is not None
    lane.policy.placed(call, chosen, house.now)
    told = house.look()
    document = msgspec.json.encode(told).decode()
    assert len(told.decisions) == 1 and told.decisions[0].worker in ("worker:8000", "other:8000")
    for what, secret in SECRETS.items():
        assert secret not in document, what


@pytest.mark.parametrize("rank", [None, 3])
def test_a_name_is_host_port_and_rank_alone(rank: int | None) -> None:
    worker = registry().add(WorkerSpec("http://[::1]:9000/secret/path", dp_rank=rank), 0.0)
    assert name_of(worker) == "[::1]:9000" + ("" if rank is None else "@3")
