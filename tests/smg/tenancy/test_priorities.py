"""The words of the scheduler: class names, the file, reservations that fit, and what a reload tells."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from smg.errors import SettingsError
from smg.tenancy.priorities import (
    BULK,
    CLASSES,
    DEFAULT,
    INTERACTIVE,
    SYSTEM,
    ClassRules,
    PriorityFile,
    Rules,
    TenantRules,
    differences,
    fitted,
    rank_of,
)
from smg.yaml_config import load_yaml


def rules_of(text: bytes, flag: str = "default") -> Rules:
    return load_yaml(text, PriorityFile, "--priority-scheduler-config").rules(flag)


@pytest.mark.parametrize(
    ("value", "rank"),
    [
        (b"bulk", BULK),
        (b"Default", DEFAULT),
        (b" INTERACTIVE\t", INTERACTIVE),
        (b"system", SYSTEM),
        (b"", None),
        (b"high", None),
        (b"bulk,system", None),
        (b"\xff\x00", None),
    ],
)
def test_a_header_names_a_class(value, rank):
    assert rank_of(value) == rank


def test_an_empty_file_is_what_is_built_in():
    assert rules_of(b"") == Rules()
    assert rules_of(b"", "system").max_rank("anybody") == SYSTEM


def test_members_of_a_class_go_over_what_is_built_in():
    text = b"""
classes:
  bulk: {reserved_floor: 3, reserved_per_slot: 0.5, queue_size: 7, queue_timeout_secs: 9, can_preempt: true}
  interactive: {starvation_threshold_secs: 0.5}
prefill_ahead_secs: null
"""
    rules = rules_of(text)
    assert rules.classes[BULK] == ClassRules(
        reserved_floor=3,
        reserved_share=0.5,
        queue_size=7,
        queue_timeout_s=9.0,
        starvation_s=120.0,
        can_preempt=True,
    )
    assert rules.classes[INTERACTIVE] == msgspec.structs.replace(CLASSES[INTERACTIVE], starvation_s=0.5)
    assert rules.classes[SYSTEM] == CLASSES[SYSTEM]
    assert rules.prefill_ahead_s is None


def test_tenants_have_a_highest_class_and_a_weight():
    text = b'tenant_policies:\n  "auth:a": {max_class: interactive}\n  "ip:10.0.0.7": {weight: 2.5}\n'
    rules = rules_of(text, "bulk")
    assert (rules.max_rank("auth:a"), rules.weight("auth:a")) == (INTERACTIVE, 1.0)
    assert (rules.max_rank("ip:10.0.0.7"), rules.weight("ip:10.0.0.7")) == (BULK, 2.5)
    assert (rules.max_rank("auth:b"), rules.weight("auth:b")) == (BULK, 1.0)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"classes:\n  bulk:\n    queue_size: -1\n", "line 3: classes.bulk.queue_size: expected int >= 0"),
        (b"classes:\n  bulk: {queue_sise: 1}\n", "line 2: classes.bulk.queue_sise: is no member"),
        (b"classes: {bulk: {reserved_per_slot: 1.1}}", "classes.bulk.reserved_per_slot: expected float <= 1"),
        (b"classes: {bulk: {queue_timeout_secs: 0}}", "classes.bulk.queue_timeout_secs: expected float > 0"),
        (b"classes: {urgent: {}}\n", "line 1: classes.urgent: is no member; there are bulk, default"),
        (b"tenant_policies:\n  a: {max_class: king}\n", 'line 2: tenant_policies["a"].max_class: '),
        (b"tenant_policies:\n  a: {weight: 0}\n", 'line 2: tenant_policies["a"].weight: expected float > 0'),
        (b"prefill_ahead_secs: -1", "line 1: prefill_ahead_secs: expected float >= 0"),
        (b"- bulk", "line 1: expected members, got a list"),
    ],
)
def test_a_mistake_is_told_with_its_line_and_member(text, message):
    with pytest.raises(SettingsError) as error:
        rules_of(text)
    assert str(error.value).startswith("--priority-scheduler-config: ") and message in str(error.value)


CLASS = st.builds(
    ClassRules,
    reserved_floor=st.integers(0, 1000),
    reserved_share=st.floats(0, 1),
    queue_size=st.just(1),
    queue_timeout_s=st.just(1.0),
    starvation_s=st.just(1.0),
)


@given(st.tuples(CLASS, CLASS, CLASS, CLASS), st.integers(1, 2000))
def test_reservations_fit_every_fleet_and_keep_their_proportions(classes, slots):
    reserved, is_shrunk = fitted(classes, slots)
    wanted = [rules.reserved(slots) for rules in classes]
    assert is_shrunk == (sum(wanted) > slots)
    assert sum(reserved) <= slots * (0.75 if is_shrunk else 1)
    if is_shrunk:
        share = 0.75 * slots / sum(wanted)
        assert all(0 <= want * share - have < 1 for want, have in zip(wanted, reserved, strict=True))
    else:
        assert list(reserved) == wanted


def test_a_reload_tells_what_is_different_and_nothing_else():
    old = rules_of(
        b"classes: {bulk: {queue_size: 7}}\ntenant_policies: {a: {weight: 2}, b: {max_class: bulk}}\n"
    )
    new = rules_of(
        b"prefill_ahead_secs: 1\ntenant_policies: {a: {weight: 3}, c: {max_class: system}}\n", "bulk"
    )
    assert differences(old, old) == []
    assert differences(old, new) == [
        "class bulk: queue_size 7 -> 1024",
        "default_max_rank 1 -> 0",
        "prefill_ahead_s 0.25 -> 1.0",
        "tenant b: no rules any more",
        "tenant a: highest class as the flag, weight 3",
        "tenant c: highest class system, weight 1",
    ]
    assert Rules(tenants={"x": TenantRules()}) != Rules()
