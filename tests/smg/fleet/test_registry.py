"""The registry: membership, names, pools, and that its indices always agree with its workers."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from smg.errors import GatewayError
from smg.fleet import registry as registry_module
from smg.fleet.breaker import Breaker, BreakerRules
from smg.fleet.health import TRANSITIONS, Health, HealthRules
from smg.fleet.load import ReportRules
from smg.fleet.registry import Added, Flushed, ModelsChanged, Registry, Removed, StatusChanged, Updated
from smg.fleet.worker import (
    Engine,
    HealthOverrides,
    Kind,
    LoadReport,
    ModelCard,
    Status,
    WorkerSpec,
    worker_id,
)
from tests.smg.fleet.builders import PROBED, fleet, registry, url_of


def spec(index: int = 0, **fields) -> WorkerSpec:
    return WorkerSpec(url_of(index), **fields)


def code_of(error: pytest.ExceptionInfo[GatewayError]) -> tuple[int, str]:
    return error.value.status, error.value.code


def test_a_worker_is_found_by_id_url_and_order():
    reg = registry(health=PROBED)
    one, two = reg.add(spec(0), 0.0), reg.add(WorkerSpec("HTTP://Worker-1:8000/"), 0.0)
    assert reg.workers() == (one, two)
    assert reg.by_id(worker_id("http://worker-1:8000")) is two
    assert reg.by_url("http://worker-1:8000") is two
    assert one.status is Status.PENDING and one.order < two.order
    assert reg.by_id("nobody") is None and reg.by_url("http://nobody") is None


def test_the_same_url_twice_is_refused_with_the_stage_it_is_in():
    reg = registry(health=PROBED)
    worker = reg.add(spec(), 0.0)
    with pytest.raises(GatewayError) as error:
        reg.add(WorkerSpec("http://WORKER-0:8000/"), 0.0)
    assert code_of(error) == (409, "WORKER_CREATE_IN_PROGRESS")
    reg.set_status(worker, Status.READY, 1.0)
    with pytest.raises(GatewayError) as error:
        reg.add(spec(), 1.0)
    assert code_of(error) == (409, "WORKER_ALREADY_EXISTS")
    assert reg.workers() == (worker,)


@pytest.mark.parametrize(
    "bad", [WorkerSpec(""), WorkerSpec("host:1"), WorkerSpec("http://h", worker_type="odd")]
)
def test_what_is_no_worker_is_refused_and_changes_nothing(bad: WorkerSpec):
    reg = registry()
    with pytest.raises(GatewayError) as error:
        reg.add(bad, 0.0)
    assert code_of(error) == (400, "BAD_REQUEST")
    assert reg.workers() == ()


def test_a_fleet_has_a_bound(monkeypatch):
    monkeypatch.setattr(registry_module, "WORKERS_MAX", 2)
    reg, _ = fleet(2)
    with pytest.raises(GatewayError) as error:
        reg.add(spec(5), 0.0)
    assert error.value.status == 400


def test_ranks_of_one_url_are_workers_of_their_own():
    reg = registry()
    ranks = [reg.add(spec(0, dp_rank=rank, dp_size=2, model_id="m"), 0.0) for rank in range(2)]
    assert [worker.url for worker in ranks] == ["http://worker-0:8000@0", "http://worker-0:8000@1"]
    assert ranks[0].base_url == ranks[1].base_url
    reg.remove(ranks[0])
    assert reg.pool("m").workers == (ranks[1],)


def test_a_worker_without_checks_is_ready_at_once():
    reg = registry()
    told = []
    reg.subscribe(told.append)
    worker = reg.add(spec(), 0.0)
    assert worker.status is Status.READY
    assert told == [Added(worker), StatusChanged(worker, Status.PENDING)]


def test_models_come_from_the_specification_and_later_from_the_worker():
    reg = registry()
    worker = reg.add(spec(), 0.0)
    assert worker.models == () and reg.served_models() == ()
    told = []
    reg.subscribe(told.append)
    reg.set_models(worker, (ModelCard("b"), ModelCard("a")))
    assert worker.models == ("b", "a") and reg.served_models() == ("a", "b")
    assert told == [ModelsChanged(worker, ())]
    reg.set_models(worker, (ModelCard("b"), ModelCard("a")))
    assert len(told) == 1
    named = reg.add(spec(1, model_id="c"), 0.0)
    assert named.models == ("c",) and reg.served_models() == ("a", "b", "c")


def test_a_request_reaches_only_workers_of_its_model():
    reg = registry()
    one = reg.add(spec(0, model_id="m1"), 0.0)
    two = reg.add(spec(1, models=(ModelCard("m1"), ModelCard("m2"))), 0.0)
    assert reg.pool("m1").workers == (one, two)
    assert reg.pool("m2").workers == (two,)
    assert reg.pool("m3") is None


def test_a_worker_that_tells_no_model_serves_every_name_nobody_claims():
    reg = registry()
    named = reg.add(spec(0, model_id="m1"), 0.0)
    wild = reg.add(spec(1, model_id="unknown"), 0.0)
    assert reg.pool("m1").workers == (named,)
    assert reg.pool("anything").workers == (wild,)
    assert reg.pool("") is reg.pool("anything")
    reg.set_models(wild, (ModelCard("m2"),))
    assert reg.pool("anything") is None
    assert reg.served_models() == ("m1", "m2")


def test_a_claimed_name_stays_claimed_while_its_worker_is_down():
    reg = registry()
    named = reg.add(spec(0, model_id="m1"), 0.0)
    reg.add(spec(1), 0.0)
    reg.set_status(named, Status.NOT_READY, 1.0)
    assert reg.pool("m1").candidates(1.0) == ()


def test_aliases_of_the_command_line_and_of_cards_lead_to_the_canonical_name():
    reg = registry(aliases={"short": "long", "hop": "card-alias", "served": "long"})
    reg.add(spec(0, models=(ModelCard("long", ("card-alias", "short")), ModelCard("served"))), 0.0)
    reg.add(spec(1, models=(ModelCard("other", ("card-alias", "mine")),)), 0.0)
    assert reg.resolve("short") == "long"
    assert reg.resolve("card-alias") == "long"  # the first registered worker's
    assert reg.resolve("mine") == "other"
    assert reg.resolve("hop") == "long"
    assert reg.resolve("served") == "served"  # a served name is never an alias
    assert reg.resolve("stranger") == "stranger"


def test_aliases_go_with_their_worker():
    reg = registry()
    worker = reg.add(spec(0, models=(ModelCard("long", ("short",)),)), 0.0)
    reg.add(spec(1, model_id="long"), 0.0)
    assert reg.resolve("short") == "long"
    reg.remove(worker)
    assert reg.resolve("short") == "short"


def test_the_legs_of_disaggregated_serving_have_pools_of_their_own():
    reg = registry()
    prefill = reg.add(spec(0, model_id="m", worker_type="prefill"), 0.0)
    decode = reg.add(spec(1, model_id="m", worker_type="decode"), 0.0)
    wild = reg.add(spec(2, worker_type="decode"), 0.0)
    assert reg.pool("m") is None
    assert reg.pool_of("m", Kind.PREFILL).workers == (prefill,)
    assert reg.pool_of("m", Kind.DECODE).workers == (decode,)
    assert reg.pool_of("else", Kind.DECODE).workers == (wild,)
    assert reg.pool_of("else", Kind.PREFILL) is None
    assert reg.served_models() == ("m",)


def test_a_patch_keeps_what_the_worker_is():
    reg, (worker, _) = fleet(2)
    breaker, load_before = worker.breaker, worker.in_flight
    worker.breaker.failed(0.0, worker.breaker.started(0.0))
    told = []
    reg.subscribe(told.append)
    reg.update(worker, spec(0, model_id="m", priority=90, labels={"zone": "a"}), 1.0)
    assert worker.spec.priority == 90 and worker.in_flight == load_before
    assert worker.breaker is breaker and breaker.consecutive_failures == 1
    assert told == [Updated(worker)]
    assert reg.pool("m").workers[0] is worker


def test_a_new_specification_may_change_models_and_kind_and_keeps_the_order():
    reg, (one, two) = fleet(2)
    reg.update(one, spec(0, model_id="n"), 1.0)
    assert reg.pool("m").workers == (two,) and reg.pool("n").workers == (one,)
    reg.update(one, spec(0, model_id="m"), 1.0)
    assert reg.pool("m").workers == (one, two) and reg.pool("n") is None
    reg.update(one, spec(0, model_id="m", worker_type="prefill"), 1.0)
    assert reg.pool("m").workers == (two,)
    assert reg.pool_of("m", Kind.PREFILL).workers == (one,)


def test_models_that_the_worker_told_survive_a_patch():
    reg = registry()
    worker = reg.add(spec(), 0.0)
    reg.set_models(worker, (ModelCard("told"),))
    reg.update(worker, spec(priority=1), 1.0)
    assert worker.models == ("told",)


def test_another_url_is_refused():
    reg, (worker, _) = fleet(2)
    with pytest.raises(GatewayError) as error:
        reg.update(worker, spec(7), 1.0)
    assert error.value.status == 400 and error.value.message.startswith("URL mismatch")
    assert worker.spec.url == url_of(0)


def test_the_engine_that_is_told_decides_until_it_is_not_told_any_more():
    reg = registry()
    worker = reg.add(spec(runtime_type="vllm"), 0.0)
    assert worker.engine is Engine.VLLM
    reg.update(worker, spec(), 1.0)
    assert worker.engine is None
    reg.set_engine(worker, Engine.SGLANG)
    reg.update(worker, spec(priority=3), 1.0)
    assert worker.engine is Engine.SGLANG


def test_switching_checks_off_makes_a_worker_ready():
    reg = Registry(
        aliases={},
        make_health=lambda given: Health(HealthRules(is_disabled=bool(given.health.disable_health_check))),
        make_breaker=lambda given: Breaker(BreakerRules()),
    )
    worker = reg.add(spec(), 0.0)
    assert worker.status is Status.PENDING
    reg.update(worker, spec(health=HealthOverrides(disable_health_check=True)), 1.0)
    assert worker.status is Status.READY


def test_a_drained_worker_goes_when_idle_and_a_busy_one_at_the_deadline():
    reg = registry(drain_timeout_s=30.0)
    idle, busy = reg.add(spec(0), 0.0), reg.add(spec(1), 0.0)
    busy.in_flight = 1
    assert reg.next_drain_deadline() is None
    reg.drain(idle, 1.0)
    reg.drain(busy, 2.0)
    reg.drain(idle, 20.0)  # twice changes nothing
    assert reg.next_drain_deadline() == 31.0
    assert reg.drained(3.0) == [idle]
    reg.remove(idle)
    assert reg.drained(31.9) == [] and reg.next_drain_deadline() == 32.0
    assert reg.drained(32.0) == [busy]
    busy.in_flight = 0
    assert reg.drained(3.0) == [busy]
    reg.remove(busy)
    assert reg.next_drain_deadline() is None and reg.workers() == ()


def test_a_removed_worker_is_found_nowhere_and_its_url_is_free_again():
    reg, (one, two) = fleet(2)
    told = []
    reg.subscribe(told.append)
    reg.remove(one)
    reg.remove(one)
    assert told == [Removed(one)]
    assert reg.by_id(one.id) is None and reg.by_url(one.url) is None
    assert reg.pool("m").workers == (two,)
    again = reg.add(spec(0, model_id="m"), 1.0)
    assert again is not one and again.id == one.id
    assert reg.pool("m").workers == (two, again)  # behind the others: registered last
    one.breaker.avoid(1.0, 5.0)  # a late answer of the old one
    assert reg.pool("m").candidates(1.0) == (two, again)


def test_a_pool_that_is_kept_after_its_model_went_is_empty():
    reg, workers = fleet(1)
    pool = reg.pool("m")
    reg.remove(workers[0])
    assert reg.pool("m") is None and pool.workers == () and pool.candidates(1.0) == ()


def test_the_same_status_changes_only_the_message():
    reg, (worker, _) = fleet(2)
    told = []
    reg.subscribe(told.append)
    reg.set_status(worker, Status.READY, 1.0, "still fine")
    assert told == [] and worker.message == "still fine"


def test_an_illegal_change_of_status_is_a_bug():
    reg, (worker, _) = fleet(2)
    reg.drain(worker, 1.0)
    with pytest.raises(AssertionError):
        reg.set_status(worker, Status.READY, 2.0)


def test_a_flush_is_told():
    reg, (worker, _) = fleet(2)
    told = []
    reg.subscribe(told.append)
    reg.flushed(worker)
    assert told == [Flushed(worker)]


MODELS = st.lists(st.sampled_from(["a", "b", "c", "unknown"]), unique=True, max_size=3)
ALIASES = st.lists(st.sampled_from(["a", "x", "y"]), unique=True, max_size=2)
KINDS = st.sampled_from(["regular", "regular", "prefill", "decode"])
PICK = st.integers(0, 10**6)


class AnyHistory(RuleBasedStateMachine):
    """Whatever is done to a registry, its indices say what its workers say."""

    def __init__(self) -> None:
        super().__init__()
        self.reg = registry(
            health=PROBED, aliases={"x": "a", "z": "y"}, breaker=BreakerRules(failure_threshold=1)
        )
        self.model: dict[str, object] = {}
        self.now = 0.0

    def some(self, pick: int):
        workers = self.reg.workers()
        return workers[pick % len(workers)]

    @rule(index=st.integers(0, 7), models=MODELS, aliases=ALIASES, kind=KINDS)
    def add(self, index, models, aliases, kind):
        cards = tuple(ModelCard(name, tuple(aliases)) for name in models)
        given = WorkerSpec(url_of(index), models=cards, worker_type=kind)
        if url_of(index) in self.model:
            with pytest.raises(GatewayError):
                self.reg.add(given, self.now)
        else:
            self.model[url_of(index)] = self.reg.add(given, self.now)

    @precondition(lambda self: self.reg.workers())
    @rule(pick=PICK, models=MODELS, aliases=ALIASES)
    def set_models(self, pick, models, aliases):
        self.reg.set_models(
            self.some(pick), tuple(ModelCard(name, tuple(aliases)) for name in models if name != "unknown")
        )

    @precondition(lambda self: self.reg.workers())
    @rule(pick=PICK, models=MODELS, kind=KINDS)
    def update(self, pick, models, kind):
        worker = self.some(pick)
        cards = tuple(ModelCard(name) for name in models)
        self.reg.update(worker, WorkerSpec(worker.spec.url, models=cards, worker_type=kind), self.now)

    @precondition(lambda self: self.reg.workers())
    @rule(pick=PICK, status=st.sampled_from(list(Status)))
    def set_status(self, pick, status):
        worker = self.some(pick)
        if status is Status.DRAINING:
            self.reg.drain(worker, self.now)
        elif status in TRANSITIONS[worker.status]:
            self.reg.set_status(worker, status, self.now)

    @precondition(lambda self: self.reg.workers())
    @rule(pick=PICK, is_overloaded=st.booleans(), last_s=st.floats(0.0, 50.0))
    def overload(self, pick, is_overloaded, last_s):
        worker = self.some(pick)
        rules = ReportRules(interval_s=1.0 + last_s)
        told = LoadReport(self.now, waiting=99 if is_overloaded else 0)
        self.reg.reported(worker, told, rules)

    @precondition(lambda self: self.reg.workers())
    @rule(pick=PICK, what=st.sampled_from(["fail", "ok", "hang", "rest"]))
    def traffic(self, pick, what):
        breaker = self.some(pick).breaker
        if what == "rest":
            breaker.avoid(self.now, 7.0)
        elif breaker.permits(self.now):
            permit = breaker.started(self.now)
            if what == "fail":
                breaker.failed(self.now, permit)
            elif what == "ok":
                breaker.succeeded(self.now, permit)

    @precondition(lambda self: self.reg.workers())
    @rule(pick=PICK)
    def remove(self, pick):
        worker = self.some(pick)
        self.reg.remove(worker)
        del self.model[worker.url]

    @rule(later=st.floats(0.0, 100.0))
    def wait(self, later):
        self.now += later

    @invariant()
    def indices_agree(self):
        reg = self.reg
        assert list(reg.workers()) == sorted(self.model.values(), key=lambda worker: worker.order)
        for worker in reg.workers():
            assert reg.by_id(worker.id) is worker and reg.by_url(worker.url) is worker
        names = {name for worker in reg.workers() for name in worker.models}
        assert reg.served_models() == tuple(sorted(names))
        for kind in Kind:
            of_kind = [worker for worker in reg.workers() if worker.kind is kind]
            wild = tuple(worker for worker in of_kind if not worker.models)
            for name in ("a", "b", "c", "nobody's"):
                claimed = tuple(worker for worker in of_kind if name in worker.models)
                pool = reg.pool_of(name, kind)
                assert (pool.workers if pool else ()) == (claimed or wild)
                if kind is Kind.REGULAR:
                    assert reg.pool(name) is pool

    @invariant()
    def names_resolve_to_served_ones_or_to_themselves(self):
        served = self.reg.served_models()
        for name in ("a", "b", "c", "x", "y", "z"):
            resolved = self.reg.resolve(name)
            if name in served:
                assert resolved == name
            elif resolved != name and name not in ("x", "z"):
                assert resolved in served

    @invariant()
    def cached_candidates_are_those_of_a_fresh_judgement(self):
        for pool in self.reg.pools():
            cached = pool.candidates(self.now)
            pool.invalidate()
            assert pool.candidates(self.now) == cached
            permitted = [
                worker
                for worker in pool.workers
                if worker.status is Status.READY and worker.breaker.permits(self.now)
            ]
            assert bool(cached) == bool(permitted)
            for worker in pool.workers:
                assert (pool.excluded_by(worker, self.now) is None) == (worker in cached)


AnyHistory.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestAnyHistory = AnyHistory.TestCase
