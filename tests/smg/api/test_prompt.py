"""How large a request is, roughly, before anybody has counted it (ADM-4)."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from smg.api.call import Call
from smg.api.endpoints import ENDPOINTS, Endpoint


def call(path: str, document: Any) -> Call:
    return Call(ENDPOINTS[path], "m", b"", document)


@pytest.mark.parametrize(
    ("path", "document", "tokens"),
    [
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x" * 9}]}, 3),
        ("/v1/chat/completions", {"messages": []}, 0),
        ("/v1/completions", {"prompt": [1, 2, 3]}, 3),
        ("/v1/completions", {"prompt": [[1, 2], [3]]}, 3),
        ("/v1/completions", {"prompt": "x" * 8}, 2),
        ("/generate", {"input_ids": [[1] * 4, "odd"]}, 4),
        ("/generate", {"text": ["x" * 4, "y" * 3]}, 2),
        ("/v1/embeddings", {"input": [1] * 9}, 9),
        ("/v1/rerank", {"query": "q" * 4, "documents": ["d" * 4] * 10}, 20),
        ("/v1/rerank", {"query": "q" * 4, "documents": "odd"}, 1),
        ("/v1/classify", {"input": "x" * 4}, 1),
        ("/v1/messages/count_tokens", {"messages": [{"role": "user", "content": "x" * 99}]}, 0),
        ("/v1/audio/transcriptions", {}, 0),
    ],
)
def test_the_prompt_is_a_fourth_of_its_characters_or_its_ids(path: str, document: Any, tokens: int):
    assert call(path, document).prompt_tokens_estimate() == tokens


@pytest.mark.parametrize(
    ("path", "document", "tokens"),
    [
        ("/v1/chat/completions", {"max_tokens": 5}, 5),
        ("/v1/chat/completions", {"max_tokens": 5, "max_completion_tokens": 7, "n": 2}, 14),
        ("/v1/chat/completions", {"max_output_tokens": 5}, 0),
        ("/v1/chat/completions", {"max_tokens": None, "n": 3}, 0),
        ("/v1/chat/completions", {"max_tokens": True}, 0),
        ("/v1/completions", {"prompt": [1, 2, 3], "max_tokens": 5}, 5),
        ("/v1/completions", {"prompt": ["a", "b"], "max_tokens": 5, "n": 3}, 30),
        ("/v1/responses", {"max_output_tokens": 5, "max_tokens": 900}, 5),
        ("/v1/messages", {"max_tokens": 5}, 5),
        ("/generate", {"text": ["a", "b"], "sampling_params": {"max_new_tokens": 5}}, 10),
        ("/generate", {"sampling_params": [{"max_new_tokens": 5}]}, 0),
        ("/v1/embeddings", {"max_tokens": 5}, 0),
        ("/v1/messages/count_tokens", {"max_tokens": 5}, 0),
    ],
)
def test_the_answer_is_what_the_endpoints_own_member_allows(path: str, document: Any, tokens: int):
    assert call(path, document).output_tokens_asked() == tokens


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=9), inner, max_size=4),
    max_leaves=9,
)
MEMBERS = [
    "messages",
    "prompt",
    "text",
    "input",
    "input_ids",
    "query",
    "documents",
    "sampling_params",
    "max_tokens",
    "n",
]


@given(st.sampled_from(list(ENDPOINTS.values())), st.dictionaries(st.sampled_from(MEMBERS), JSON))
def test_whatever_a_body_holds_its_size_is_a_number(endpoint: Endpoint, document: dict[str, Any]):
    assert Call(endpoint, "m", b"", document).tokens_estimate() >= 0
