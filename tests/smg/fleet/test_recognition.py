"""Recognition of engines, model names and data-parallel size out of workers' answers (WRK-4, WRK-5, WRK-17)."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from smg.fleet.recognition import (
    DP_SIZE_MAX,
    MODELS_MAX,
    NAME_CHARS_MAX,
    answered_models,
    dp_size,
    recognised_engine,
    told_models,
)
from smg.fleet.worker import Engine, ModelCard, WorkerSpec

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)


def models(*ids: object, owned_by: str = "self") -> dict[str, Any]:
    return {"object": "list", "data": [{"id": name, "object": "model", "owned_by": owned_by} for name in ids]}


@pytest.mark.parametrize(
    ("owner", "engine"), [("sglang", Engine.SGLANG), ("nvidia", Engine.SGLANG), ("vllm", Engine.VLLM)]
)
def test_the_owner_of_the_models_names_the_engine(owner: str, engine: Engine) -> None:
    assert recognised_engine(models("m", owned_by=owner), None, None) is engine


def test_the_owner_wins_over_what_other_paths_say() -> None:
    assert (
        recognised_engine(models("m", owned_by="sglang"), {"version": "0.9"}, {"dp_size": 1}) is Engine.SGLANG
    )


def test_a_version_answer_means_vllm() -> None:
    assert recognised_engine(models("m"), {"version": "0.11.0"}, {"model_path": "x"}) is Engine.VLLM


def test_a_server_info_answer_means_sglang() -> None:
    assert recognised_engine(None, None, {"model_path": "x", "dp_size": 2}) is Engine.SGLANG


@pytest.mark.parametrize(
    ("models_answer", "version", "server_info"),
    [
        (None, None, None),
        (models("m", owned_by="llamacpp"), None, None),
        (None, {"versions": []}, None),
        (None, {"version": 3}, None),
        (None, "0.1", ["x"]),
        (None, None, {}),
        (None, None, {"error": {"message": "no such path"}}),
        (None, None, {"id": "c", "choices": []}),
        (None, None, {"detail": "Not Found"}),
    ],
)
def test_an_engine_that_tells_nothing_is_generic(models_answer: Any, version: Any, server_info: Any) -> None:
    assert recognised_engine(models_answer, version, server_info) is Engine.GENERIC


def test_the_specification_names_its_models_in_order() -> None:
    spec = WorkerSpec("http://a", model_id="one", models=(ModelCard("two", ("zwei",)), ModelCard("one")))
    assert [card.id for card in told_models(spec)] == ["one", "two"]
    assert told_models(spec)[1].aliases == ("zwei",)


def test_labels_name_the_model_when_the_specification_does_not() -> None:
    labels = {"model_path": "/models/x", "served_model_name": "x"}
    assert told_models(WorkerSpec("http://a", labels=labels)) == (ModelCard("x"),)
    assert told_models(WorkerSpec("http://a", labels={"model_path": "/models/x"})) == (
        ModelCard("/models/x"),
    )
    assert told_models(WorkerSpec("http://a", model_id="m", labels=labels)) == (ModelCard("m"),)


def test_unknown_and_empty_names_are_no_names() -> None:
    spec = WorkerSpec("http://a", model_id="unknown", labels={"served_model_name": "", "model_path": "p"})
    assert told_models(spec) == (ModelCard("p"),)
    assert told_models(WorkerSpec("http://a")) == ()
    assert answered_models(models("unknown", "", "a")) == (ModelCard("a"),)


def test_all_ids_of_the_answer_are_taken_once_and_in_order() -> None:
    assert [card.id for card in answered_models(models("b", "a/c", "b", 7, None))] == ["b", "a/c"]


def test_aliases_in_an_entry_are_kept() -> None:
    answer = {"data": [{"id": "m", "aliases": ["n", 3, "m", "unknown"]}]}
    assert answered_models(answer) == (ModelCard("m", ("n",)),)


def test_other_shapes_of_model_lists_are_read() -> None:
    assert answered_models([{"id": "a"}]) == (ModelCard("a"),)
    assert answered_models({"models": [{"id": "a"}, "b"]}) == (ModelCard("a"),)
    assert answered_models({"data": {"id": "a"}}) == ()


def test_a_worker_cannot_bring_models_without_bound() -> None:
    assert len(answered_models(models(*(f"m{number}" for number in range(3 * MODELS_MAX))))) == MODELS_MAX
    assert answered_models(models("x" * (NAME_CHARS_MAX + 1), "a\nb")) == ()


def test_ranks_come_from_specification_label_or_server_info_in_this_order() -> None:
    info = {"dp_size": 4}
    assert dp_size(WorkerSpec("http://a"), info) == 4
    assert dp_size(WorkerSpec("http://a", labels={"dp_size": "3"}), info) == 3
    assert dp_size(WorkerSpec("http://a", labels={"dp_size": "3"}, dp_size=2), info) == 2
    assert dp_size(WorkerSpec("http://a", labels={"dp_size": "many"}), {"dp_size": True}) == 1


def test_ranks_are_bounded() -> None:
    assert dp_size(WorkerSpec("http://a"), {"dp_size": 10**9}) == DP_SIZE_MAX
    assert dp_size(WorkerSpec("http://a"), {"dp_size": -3}) == 1


@given(JSON, JSON, JSON)
def test_no_answer_is_an_error(first: Any, second: Any, third: Any) -> None:
    assert isinstance(recognised_engine(first, second, third), Engine)
    assert all(card.id for card in answered_models(first))
    assert 1 <= dp_size(WorkerSpec("http://a"), third) <= DP_SIZE_MAX
