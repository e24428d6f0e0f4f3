"""Specifications of workers: read, checked, merged (WRK-7, WRK-11, WRK-12)."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from smg.errors import GatewayError
from smg.fleet.worker import HealthOverrides, ModelCard, WorkerSpec
from smg.fleet.worker_spec import checked, patched, spec_of, unknown_members


def refused(document: Any) -> GatewayError:
    with pytest.raises(GatewayError) as caught:
        spec_of(document)
    assert (caught.value.status, caught.value.code) == (400, "BAD_REQUEST")
    return caught.value


def test_a_url_alone_is_a_worker() -> None:
    assert spec_of({"url": "HTTP://Host:8000/"}) == WorkerSpec("http://host:8000")


def test_every_member_is_read() -> None:
    spec = spec_of(
        {
            "url": "http://h:1@3",
            "models": [{"id": "m", "aliases": ["n"]}],
            "worker_type": "prefill",
            "runtime_type": "VLLM",
            "connection_mode": "http",
            "labels": {"zone": "a"},
            "priority": 90,
            "cost": 2,
            "api_key": "k",
            "bootstrap_port": 9000,
            "health": {"timeout_secs": 1, "disable_health_check": True},
            "something": {"else": 1},
        }
    )
    assert (spec.url, spec.dp_rank) == ("http://h:1@3", 3)
    assert spec.models == (ModelCard("m", ("n",)),)
    assert (spec.worker_type, spec.runtime_type, spec.cost, spec.priority) == ("prefill", "vllm", 2.0, 90)
    assert spec.health == HealthOverrides(disable_health_check=True, timeout_secs=1)
    assert unknown_members({"url": "", "something": 1, "load": 3}) == ["something"]


@pytest.mark.parametrize("runtime", [None, "", "auto", "unspecified"])
def test_an_engine_that_is_not_told_is_asked_for(runtime: str | None) -> None:
    assert spec_of({"url": "http://h", "runtime_type": runtime}).runtime_type is None


@pytest.mark.parametrize(
    ("document", "param"),
    [
        ([], None),
        ("http://h", None),
        ({}, "url"),
        ({"url": ""}, "url"),
        ({"url": "   "}, "url"),
        ({"url": 3}, "url"),
        ({"url": None}, "url"),
        ({"url": "h:8000"}, "url"),
        ({"url": "grpc://h:8000"}, "url"),
        ({"url": "ftp://h"}, "url"),
        ({"url": "http://h", "priority": "high"}, "priority"),
        ({"url": "http://h", "priority": -1}, "priority"),
        ({"url": "http://h", "cost": 0}, "cost"),
        ({"url": "http://h", "cost": True}, "cost"),
        ({"url": "http://h", "labels": {"a": 1}}, "labels[...]"),
        ({"url": "http://h", "labels": []}, "labels"),
        ({"url": "http://h", "models": ["m"]}, "models[0]"),
        ({"url": "http://h", "models": [{"aliases": []}]}, "models[0]"),
        ({"url": "http://h", "worker_type": "encode"}, "worker_type"),
        ({"url": "http://h", "runtime_type": "ollama"}, "runtime_type"),
        ({"url": "http://h", "connection_mode": "grpc"}, "connection_mode"),
        ({"url": "http://h", "bootstrap_port": 0}, "bootstrap_port"),
        ({"url": "http://h", "health": {"timeout_secs": 0}}, "health.timeout_secs"),
        ({"url": "http://h", "health": {"failure_threshold": 1.5}}, "health.failure_threshold"),
        ({"url": "http://h", "health": {"health_check_endpoint": "health"}}, "health.health_check_endpoint"),
        (
            {"url": "http://h", "resilience": {"retryable_status_codes": [42]}},
            "resilience.retryable_status_codes",
        ),
        ({"url": "http://h", "dp_rank": 4, "dp_size": 4}, "dp_rank"),
    ],
)
def test_what_is_wrong_is_refused_and_named(document: Any, param: str | None) -> None:
    assert refused(document).param == param


@pytest.mark.parametrize("key", ["", "se\ncret", "sécret", 7])
def test_a_bad_key_is_refused_without_being_shown(key: Any) -> None:
    error = refused({"url": "http://h", "api_key": key})
    assert error.param == "api_key"
    assert "cret" not in error.message


SPEC = WorkerSpec(
    "http://h:1",
    model_id="m",
    labels={"a": "1", "b": "2"},
    api_key="old",
    priority=70,
    cost=3.0,
    health=HealthOverrides(timeout_secs=2.0, failure_threshold=4),
)


def test_a_patch_changes_its_members_and_leaves_the_others() -> None:
    after = patched(SPEC, {"cost": 1, "labels": {"b": "3", "c": "4"}, "health": {"timeout_secs": 9}})
    assert after.cost == 1.0
    assert after.labels == {"a": "1", "b": "3", "c": "4"}
    assert after.health == HealthOverrides(timeout_secs=9, failure_threshold=4)
    assert (after.model_id, after.api_key, after.priority, after.url) == ("m", "old", 70, "http://h:1")


def test_a_patch_ignores_what_it_may_not_change() -> None:
    ignored = {"url": "http://other", "model_id": "n", "worker_type": 3, "bogus": 1, "health": {"bogus": 2}}
    assert patched(SPEC, ignored) == SPEC
    assert patched(SPEC, {}) == SPEC


def test_a_patch_sets_and_clears_the_key() -> None:
    assert patched(SPEC, {"api_key": "new"}).api_key == "new"
    assert patched(SPEC, {"api_key": None}).api_key is None


@pytest.mark.parametrize(
    "document",
    [
        [],
        {"cost": "x"},
        {"cost": -1},
        {"labels": {"a": None}},
        {"health": []},
        {"health": {"timeout_secs": "1"}},
    ],
)
def test_a_wrong_patch_is_refused(document: Any) -> None:
    with pytest.raises(GatewayError) as caught:
        patched(SPEC, document)
    assert caught.value.code == "BAD_REQUEST"


@given(
    st.dictionaries(
        st.sampled_from([*WorkerSpec.__struct_fields__, "x"]),
        st.recursive(
            st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6),
            lambda inner: (
                st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3)
            ),
            max_leaves=6,
        ),
    )
)
def test_any_document_is_a_worker_or_a_bad_request(document: dict[str, Any]) -> None:
    for url in ("http://h:1", document.get("url")):
        try:
            spec = spec_of({**document, "url": url})
        except GatewayError as error:
            assert (error.status, error.code) == (400, "BAD_REQUEST")
        else:
            assert checked(spec) == spec
