"""Which policy decides for which model, and how long it lives (RT-2, RT-8)."""

from __future__ import annotations

from random import Random

from smg.fleet.worker import ModelCard, Status, WorkerSpec
from smg.policies import routing_table
from smg.policies.least_load import LeastLoad
from smg.policies.manual import Manual
from smg.policies.policy import Stateless
from smg.policies.routing_table import PolicyTable
from smg.policies.sticky_key import StickyKey
from smg.settings import Routing
from tests.smg.fleet.builders import PROBED, call, registry, url_of


def spec(index: int, model: str | None = "m", **fields) -> WorkerSpec:
    return WorkerSpec(url_of(index), model_id=model, **fields)


class Recorder(Stateless):
    """A policy that remembers what it was told."""

    def __init__(self, name: str, model: str) -> None:
        self.name = name
        self.model = model
        self.told: list[tuple[str, int]] = []

    def choose(self, call, workers, now, rng):
        return workers[0]

    def removed(self, worker):
        self.told.append(("removed", worker.order))

    def flushed(self, worker):
        self.told.append(("flushed", worker.order))


def test_every_model_has_an_instance_of_its_own_that_stays():
    reg = registry()
    reg.add(spec(0, "a"), 0.0)
    reg.add(spec(1, "b"), 0.0)
    table = PolicyTable(Routing(policy="least_load"), reg)
    assert isinstance(table.policy_for("a"), LeastLoad)
    assert table.policy_for("a") is table.policy_for("a")
    assert table.policy_for("a") is not table.policy_for("b")


def test_the_label_of_the_first_worker_decides_with_the_command_lines_values():
    reg = registry()
    first = reg.add(spec(0, labels={"policy": "manual"}), 0.0)
    reg.add(spec(1, labels={"policy": "random"}), 0.0)
    table = PolicyTable(Routing(assignment_mode="min_group"), reg)
    policy = table.policy_for("m")
    assert isinstance(policy, Manual) and policy._mode == "min_group"
    reg.remove(first)
    assert table.policy_for("m").name == "random"


def test_an_unknown_label_is_no_label():
    reg = registry()
    reg.add(spec(0, labels={"policy": "astrology"}), 0.0)
    assert PolicyTable(Routing(), reg).policy_for("m").name == Routing().policy


def test_a_patched_label_changes_the_policy_and_other_patches_keep_its_state():
    reg = registry()
    worker = reg.add(spec(0, labels={"policy": "manual"}), 0.0)
    table = PolicyTable(Routing(), reg)
    policy = table.policy_for("m")
    reg.update(worker, spec(0, labels={"policy": "manual", "zone": "a"}, priority=9), 1.0)
    assert table.policy_for("m") is policy
    reg.update(worker, spec(0, labels={"policy": "random"}), 1.0)
    assert table.policy_for("m").name == "random"


def test_a_policy_goes_when_its_model_goes():
    reg = registry()
    worker = reg.add(spec(0), 0.0)
    table = PolicyTable(Routing(), reg)
    policy = table.policy_for("m")
    reg.set_models(worker, (ModelCard("n"),))
    assert list(table.policies()) == []
    reg.set_models(worker, (ModelCard("m"),))
    assert table.policy_for("m") is not policy


def test_names_that_only_wildcard_workers_serve_do_not_share_and_are_bounded(monkeypatch):
    monkeypatch.setattr(routing_table, "UNCLAIMED_MAX", 3)
    reg = registry()
    reg.add(spec(0, None), 0.0)
    table = PolicyTable(Routing(), reg)
    one = table.policy_for("one")
    assert table.policy_for("two") is not one
    assert table.policy_for("one") is one
    table.policy_for("three")
    table.policy_for("four")  # `two` is the longest unused
    assert table.policy_for("one") is one
    assert len(list(table.policies())) == 3


def test_a_name_that_gets_claimed_starts_anew():
    reg = registry()
    reg.add(spec(0, None), 0.0)
    table = PolicyTable(Routing(), reg)
    before = table.policy_for("m")
    reg.add(spec(1, "m"), 1.0)
    assert table.policy_for("m") is not before
    assert len(list(table.policies())) == 1


def test_policies_hear_of_workers_that_left_failed_or_flushed():
    reg = registry(health=PROBED)
    workers = [reg.add(spec(i), 0.0) for i in range(3)]
    table = PolicyTable(Routing(), reg, Recorder)
    policy = table.policy_for("m")
    for worker in workers:
        reg.set_status(worker, Status.READY, 1.0)
    reg.set_status(workers[0], Status.NOT_READY, 2.0)
    assert policy.told == []
    reg.set_status(workers[0], Status.FAILED, 3.0)
    reg.flushed(workers[1])
    reg.remove(workers[2])
    assert policy.told == [("flushed", 0), ("flushed", 1), ("removed", 2)]


def test_keys_survive_the_failure_of_their_worker_and_not_its_removal():
    reg = registry(health=PROBED)
    workers = [reg.add(spec(i), 0.0) for i in range(2)]
    table = PolicyTable(Routing(policy="manual"), reg)
    policy = table.policy_for("m")
    for worker in workers:
        reg.set_status(worker, Status.READY, 1.0)
    policy.placed(call(key="k"), workers[0], 1.0)
    reg.set_status(workers[0], Status.NOT_READY, 2.0)
    reg.set_status(workers[0], Status.FAILED, 3.0)
    reg.set_status(workers[0], Status.READY, 4.0)
    assert all(policy.choose(call(key="k"), tuple(workers), 4.0, Random(i)) is workers[0] for i in range(9))
    reg.remove(workers[0])
    assert policy._map.keys_of(workers[0]) == 0


def test_override_wraps_every_policy_but_those_that_obey_keys_themselves():
    for name, is_wrapped in (("round_robin", True), ("manual", False), ("consistent_hashing", False)):
        reg = registry()
        reg.add(spec(0), 0.0)
        policy = PolicyTable(Routing(policy=name, routing_key_override=True), reg).policy_for("m")
        assert isinstance(policy, StickyKey) == is_wrapped
        assert policy.name == name


def test_a_wrapped_policy_stays_while_nothing_changes():
    reg = registry()
    reg.add(spec(0), 0.0)
    table = PolicyTable(Routing(routing_key_override=True), reg)
    policy = table.policy_for("m")
    reg.add(spec(1), 1.0)
    assert table.policy_for("m") is policy


def test_legs_have_policies_of_their_own():
    reg = registry()
    prefill = reg.add(spec(0, worker_type="prefill"), 0.0)
    decode = reg.add(spec(1, worker_type="decode", labels={"policy": "random"}), 0.0)
    table = PolicyTable(Routing(policy="round_robin", prefill_policy="bucket"), reg)
    pair = table.pair_for("m")
    assert (pair.prefill.name, pair.decode.name) == ("bucket", "random")
    assert table.pair_for("m") is pair
    reg.update(decode, spec(1, worker_type="decode"), 1.0)
    assert table.pair_for("m").decode.name == "round_robin"
    reg.remove(prefill)
    reg.remove(decode)
    assert list(table.policies()) == []
