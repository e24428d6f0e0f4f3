"""MOD-8: a bare array becomes the rerank object; anything else stays as it is."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from smg.api.endpoints import CHAT, RERANK, RERANK_SHORT
from smg.gateway.rerank import wrapped, wraps

ARRAY = [
    {"score": 0.1, "document": "a", "index": 0},
    {"score": 0.9, "document": "b", "index": 1, "meta_info": {"x": 1}},
    {"score": 0.5, "index": 2},
]
REQUEST: dict[str, Any] = {"model": "alias", "query": "q", "documents": ["a", "b", "c"]}


def answer(array: Any = ARRAY, **changes: Any) -> dict[str, Any]:
    found = json.loads(wrapped(json.dumps(array).encode(), {**REQUEST, **changes}, "rid", 1234.7))
    assert isinstance(found, dict)
    return found


def test_an_array_is_wrapped_best_score_first() -> None:
    assert answer() == {
        "results": [ARRAY[1], ARRAY[2], ARRAY[0]],
        "model": "alias",
        "usage": None,
        "object": "rerank",
        "id": "rid",
        "created": 1234,
    }


@pytest.mark.parametrize(
    ("top_k", "count"), [(1, 1), (2, 2), (3, 3), (99, 3), (0, 0), (None, 3), ("1", 3), (-1, 3)]
)
def test_top_k_is_applied(top_k: Any, count: int) -> None:
    results = answer(top_k=top_k)["results"]
    assert len(results) == count
    assert [row["index"] for row in results] == [1, 2, 0][:count]


def test_return_documents_is_applied() -> None:
    assert all("document" not in row for row in answer(return_documents=False)["results"])
    assert [row["document"] for row in answer(return_documents=True)["results"]] == ["b", "c", "a"]
    assert ["document" in row for row in answer()["results"]] == [True, False, True]


def test_equal_scores_keep_the_workers_order() -> None:
    rows = [{"score": 1, "index": index} for index in (3, 1, 2)]
    assert [row["index"] for row in answer(rows)["results"]] == [3, 1, 2]


def test_an_index_that_is_none_gets_no_document() -> None:
    rows = [{"score": 1, "index": 7}, {"score": 1}, {"score": 1, "index": -1}, {"score": 1, "index": "0"}]
    assert all("document" not in row for row in answer(rows, return_documents=True)["results"])
    assert all("document" not in row for row in answer(rows, return_documents=True, documents="x")["results"])


def test_an_empty_array_is_an_object_without_results() -> None:
    assert answer([])["results"] == []


@pytest.mark.parametrize(
    "body",
    [b"{}", b'{"results":[]}', b"", b"[", b"[1]", b'[{"index":0}]', b'[{"score":"1"}]', b'[{"score":true}]', b'"x"', b"[\xff]",
     b"[" * 5000],
)  # fmt: skip
def test_any_other_answer_comes_back_byte_for_byte(body: bytes) -> None:
    assert wrapped(body, REQUEST, "rid", 0) == body


@given(st.lists(st.dictionaries(st.sampled_from(["score", "index", "x"]), st.one_of(st.integers(), st.floats(allow_nan=False), st.text(max_size=3)))))  # fmt: skip
def test_no_result_is_lost_or_changed(rows: list[dict[str, Any]]) -> None:
    body = json.dumps(rows).encode()
    found = json.loads(wrapped(body, REQUEST, "rid", 0))
    results = found if isinstance(found, list) else found["results"]
    key = repr
    assert sorted(map(key, results)) == sorted(map(key, json.loads(body)))


def test_only_good_json_answers_of_rerank_endpoints_are_looked_at() -> None:
    assert wraps(RERANK, 200, b"application/json")
    assert wraps(RERANK_SHORT, 200, b"Application/JSON; charset=utf-8")
    assert not wraps(CHAT, 200, b"application/json")
    assert not wraps(RERANK, 400, b"application/json")
    assert not wraps(RERANK, 200, None)
    assert not wraps(RERANK, 200, b"text/plain")
