"""MOD-5 to MOD-7, ERR-1 to ERR-6, HTTP-15: what is refused before a worker is chosen, and what is not."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from smg.api.checks import (
    DEPTH_MAX,
    check,
    decode_body,
    decode_object,
    is_stream,
    refuse_content_encoding,
)
from smg.api.endpoints import ENDPOINTS, Endpoint
from smg.errors import GatewayError

GOOD: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"model": "m", "messages": [{"role": "user", "content": "hi"}]},
    "/v1/completions": {"model": "m", "prompt": "hi"},
    "/generate": {"text": "hi"},
    "/v1/embeddings": {"model": "m", "input": "hi"},
    "/rerank": {"query": "q", "documents": ["a"]},
    "/v1/rerank": {"query": "q", "documents": ["a"]},
    "/v1/classify": {"input": "hi"},
    "/v1/messages": {"model": "m", "max_tokens": 4, "messages": [{"role": "user", "content": "hi"}]},
    "/v1/messages/count_tokens": {"model": "m", "messages": [{"role": "user", "content": "hi"}]},
    "/v1/responses": {"model": "m", "input": "hi"},
    "/v1/audio/transcriptions": {"model": "m", "file": ""},
}
NAMED = ("/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/messages", "/v1/responses")
CHAT = "/v1/chat/completions"


def refusal(path: str, **changes: Any) -> tuple[int, str, str | None]:
    """The error for a good body of `path` with `changes`; a member given as `...` is left out."""
    document = {name: value for name, value in {**GOOD[path], **changes}.items() if value is not ...}
    with pytest.raises(GatewayError) as caught:
        check(ENDPOINTS[path], document)
    return caught.value.status, caught.value.code, caught.value.param


def body_refusal(body: bytes, content_type: bytes | None = b"application/json") -> tuple[int, str]:
    with pytest.raises(GatewayError) as caught:
        decode_body(ENDPOINTS[CHAT], body, content_type)
    return caught.value.status, caught.value.code


def test_every_endpoint_has_a_good_body_in_this_table() -> None:
    assert GOOD.keys() == ENDPOINTS.keys()


@pytest.mark.parametrize("path", GOOD)
def test_mod_6_a_good_body_passes(path: str) -> None:
    check(ENDPOINTS[path], GOOD[path])


@pytest.mark.parametrize("path", GOOD)
def test_mod_7_unknown_members_pass_on_every_endpoint(path: str) -> None:
    check(ENDPOINTS[path], {**GOOD[path], "chat_template_kwargs": {"a": [1]}, "bootstrap_room": 3, "x": None})


@pytest.mark.parametrize("path", NAMED)
@pytest.mark.parametrize("model", [..., None, ""])
def test_mod_5_err_3_model_is_required_on_openai_and_anthropic_endpoints(path: str, model: Any) -> None:
    assert refusal(path, model=model) == (400, "missing_required_parameter", "model")


@pytest.mark.parametrize("path", GOOD)
@pytest.mark.parametrize("model", [1, ["m"], {"m": 1}, True])
def test_err_2_model_must_be_text(path: str, model: Any) -> None:
    assert refusal(path, model=model) == (400, "invalid_type", "model")


@pytest.mark.parametrize("path", GOOD)
@pytest.mark.parametrize("stream", ["true", 1, 0, []])
def test_err_2_stream_must_be_a_bool(path: str, stream: Any) -> None:
    assert refusal(path, stream=stream) == (400, "invalid_type", "stream")


@pytest.mark.parametrize(
    ("path", "member"),
    [
        (CHAT, "messages"),
        ("/v1/messages", "messages"),
        ("/v1/messages/count_tokens", "messages"),
        ("/v1/completions", "prompt"),
        ("/v1/embeddings", "input"),
        ("/v1/responses", "input"),
        ("/rerank", "query"),
        ("/rerank", "documents"),
        ("/v1/rerank", "query"),
        ("/v1/rerank", "documents"),
        ("/v1/messages", "max_tokens"),
        ("/v1/audio/transcriptions", "file"),
    ],
)
def test_err_3_a_required_member_is_named(path: str, member: str) -> None:
    assert refusal(path, **{member: ...}) == (400, "missing_required_parameter", member)
    assert refusal(path, **{member: None}) == (400, "missing_required_parameter", member)


@pytest.mark.parametrize(
    ("path", "member", "value"),
    [
        (CHAT, "messages", "hi"),
        (CHAT, "messages", {"role": "user"}),
        ("/v1/messages", "messages", 1),
        ("/v1/completions", "prompt", 1),
        ("/v1/completions", "prompt", {"a": 1}),
        ("/v1/embeddings", "input", 1.5),
        ("/v1/responses", "input", True),
        ("/rerank", "query", 1),
        ("/rerank", "documents", "a"),
        (CHAT, "temperature", "hot"),
        (CHAT, "temperature", True),
        (CHAT, "top_p", [0.1]),
        (CHAT, "n", 1.0),
        (CHAT, "n", "2"),
        (CHAT, "max_tokens", 1.5),
        (CHAT, "max_tokens", True),
        ("/v1/messages", "max_tokens", "4"),
        ("/v1/responses", "temperature", {}),
    ],
)
def test_err_2_a_wrong_type_is_named(path: str, member: str, value: Any) -> None:
    assert refusal(path, **{member: value}) == (400, "invalid_type", member)


@pytest.mark.parametrize(
    ("path", "member"),
    [
        (CHAT, "messages"),
        ("/v1/messages", "messages"),
        ("/v1/embeddings", "input"),
        ("/v1/responses", "input"),
        ("/rerank", "documents"),
    ],
)
def test_err_4_an_empty_array_is_named(path: str, member: str) -> None:
    assert refusal(path, **{member: []}) == (400, "empty_array", member)


@pytest.mark.parametrize(
    ("path", "member", "value", "code"),
    [
        (CHAT, "temperature", 2.01, "decimal_above_max_value"),
        (CHAT, "temperature", 3, "decimal_above_max_value"),
        (CHAT, "temperature", -0.1, "decimal_below_min_value"),
        (CHAT, "top_p", 1.1, "decimal_above_max_value"),
        (CHAT, "top_p", -0.1, "decimal_below_min_value"),
        (CHAT, "frequency_penalty", 2.5, "decimal_above_max_value"),
        (CHAT, "frequency_penalty", -2.5, "decimal_below_min_value"),
        (CHAT, "presence_penalty", 2.5, "decimal_above_max_value"),
        (CHAT, "presence_penalty", -2.5, "decimal_below_min_value"),
        (CHAT, "n", 0, "integer_below_min_value"),
        (CHAT, "max_tokens", 0, "integer_below_min_value"),
        ("/v1/completions", "max_tokens", -1, "integer_below_min_value"),
        ("/v1/completions", "n", 0, "integer_below_min_value"),
        ("/v1/messages", "max_tokens", 0, "integer_below_min_value"),
        ("/v1/messages", "temperature", 2.5, "decimal_above_max_value"),
        ("/v1/responses", "top_p", 2, "decimal_above_max_value"),
        (CHAT, "temperature", float("inf"), "decimal_above_max_value"),
    ],
)
def test_err_5_numbers_out_of_range_are_named(path: str, member: str, value: float, code: str) -> None:
    assert refusal(path, **{member: value}) == (400, code, member)


@pytest.mark.parametrize(
    ("path", "changes"),
    [
        (
            CHAT,
            {
                "temperature": 0,
                "top_p": 1,
                "frequency_penalty": -2,
                "presence_penalty": 2.0,
                "n": 1,
                "max_tokens": 1,
            },
        ),
        (CHAT, {"temperature": 2, "top_p": 0.0}),
        (CHAT, {"temperature": None, "stream": None, "n": None, "max_tokens": None}),
        ("/v1/completions", {"max_tokens": 0, "prompt": ""}),
        ("/v1/completions", {"prompt": [1, 2, 3]}),
        ("/v1/completions", {"prompt": []}),
        ("/v1/embeddings", {"input": [[1, 2], [3]]}),
        ("/generate", {"text": ..., "input_ids": [1], "sampling_params": {"temperature": 9}}),
        ("/generate", {"temperature": 9, "n": 0}),
        (CHAT, {"messages": [1, None, "x"]}),
        ("/v1/responses", {"background": False, "previous_response_id": None, "conversation": None}),
    ],
)
def test_mod_6_bounds_are_inclusive_and_the_rest_is_the_workers_business(
    path: str, changes: dict[str, Any]
) -> None:
    check(
        ENDPOINTS[path],
        {name: value for name, value in {**GOOD[path], **changes}.items() if value is not ...},
    )


@pytest.mark.parametrize(
    ("member", "value"),
    [
        ("previous_response_id", "resp_1"),
        ("conversation", "conv_1"),
        ("conversation", {"id": "c"}),
        ("background", True),
    ],
)
def test_err_22_what_needs_state_is_not_implemented(member: str, value: Any) -> None:
    assert refusal("/v1/responses", **{member: value}) == (501, "not_implemented", member)


@pytest.mark.parametrize(
    "body",
    [b"", b"  \n", b"{", b"hello", b'{"a":1,}', b"{'a':1}", b'{"a":NaN}', b'{"a":Infinity}', b'{"a":1} x', b'\xef\xbb\xbf{}',
     b'{"a":"\xff"}', b'{"a":"\xc3"}', '{"a":1}'.encode("utf-16"), b'{"a":"\n"}', b'{"a":-Infinity,"b":1e999}'],
)  # fmt: skip
def test_err_1_what_is_no_json_is_refused(body: bytes) -> None:
    assert body_refusal(body) == (400, "invalid_json")


@pytest.mark.parametrize("body", [b"[]", b'"x"', b"1", b"null", b"true", b'[{"model":"m"}]'])
def test_err_2_json_that_is_no_object_is_refused(body: bytes) -> None:
    assert body_refusal(body) == (400, "invalid_type")


@pytest.mark.parametrize(
    "content_type",
    [
        None,
        b"",
        b"text/plain",
        b"application/x-www-form-urlencoded",
        b"application/jsonx",
        b"multipart/form-data; boundary=x",
    ],
)
def test_err_6_another_content_type_is_refused(content_type: bytes | None) -> None:
    assert body_refusal(b"{}", content_type) == (400, "json_parse_error")


@pytest.mark.parametrize(
    "content_type",
    [
        b"application/json",
        b"Application/JSON",
        b"application/json; charset=utf-8",
        b"application/json;charset=UTF-8",
        b"application/vnd.api+json",
    ],
)
def test_err_6_json_content_types_pass(content_type: bytes) -> None:
    assert decode_body(ENDPOINTS[CHAT], b'{"a":1}', content_type) == {"a": 1}


def nested(depth: int, opening: str, closing: str) -> bytes:
    """An object of `depth` containers inside each other, the object itself included."""
    return ('{"a":' + opening * (depth - 1) + "1" + closing * (depth - 1) + "}").encode()


@pytest.mark.parametrize(("opening", "closing"), [("[", "]"), ('{"b":', "}")])
def test_mod_7_depth_up_to_128_passes_and_deeper_is_refused(opening: str, closing: str) -> None:
    assert decode_object(nested(DEPTH_MAX, opening, closing))
    for depth in (DEPTH_MAX + 1, 5000, 100_000):
        assert body_refusal(nested(depth, opening, closing)) == (400, "invalid_json")


def test_mod_7_many_flat_containers_and_brackets_in_text_are_not_deep() -> None:
    document = {"a": [{"b": [1]} for _ in range(500)], "text": "[" * 5000 + "{" * 5000}
    assert decode_object(json.dumps(document).encode()) == document


def test_mod_7_depth_is_seen_behind_many_flat_containers() -> None:
    flat = b"[" + b"{}," * 300 + b"[" * 128 + b"]" * 128 + b"]"
    assert body_refusal(b'{"a":' + flat + b"}") == (400, "invalid_json")


def test_numbers_beyond_usual_ranges_are_json() -> None:
    document = decode_object(b'{"a":1e999,"b":123456789012345678901234567890,"c":' + b"9" * 5000 + b"}")
    assert document["a"] == float("inf")
    assert document["b"] == 123456789012345678901234567890
    assert document["c"] == float("inf")


def test_half_a_surrogate_pair_is_json_and_our_reading_can_be_encoded() -> None:
    document = decode_object(b'{"a":"\\ud800x","b":"\\uD83D\\uDE00","c":"\\udc00\\ud83d\\ude00"}')
    assert document == {"a": "\ufffdx", "b": "\U0001f600", "c": "\ufffd\U0001f600"}
    str(document).encode("utf-8")


def test_half_a_surrogate_pair_does_not_excuse_other_faults() -> None:
    assert body_refusal(b'{"a":"\\ud800",}') == (400, "invalid_json")
    assert body_refusal(b'{"a":"\\ud800","b":' + b"[" * 500 + b"]" * 500 + b"}") == (400, "invalid_json")


def test_duplicate_members_pass_and_the_last_one_counts() -> None:
    assert decode_object(b'{"model":"a","model":"b"}') == {"model": "b"}


def test_an_error_shows_no_text_of_the_body() -> None:
    for body in (b'{"secret-canary" 1}', b'{"a":"secret-canary', b"secret-canary", b'["secret-canary"]'):
        with pytest.raises(GatewayError) as caught:
            decode_object(body)
        assert "canary" not in caught.value.message


@given(st.dictionaries(st.text(max_size=5), st.recursive(st.one_of(st.none(), st.booleans(), st.floats(allow_nan=False, allow_infinity=False), st.integers(), st.text()), lambda inner: st.lists(inner))))  # fmt: skip
def test_every_json_object_is_read_as_json_reads_it(document: dict[str, Any]) -> None:
    assert decode_object(json.dumps(document).encode()) == document


@given(st.binary(max_size=80))
def test_garbage_is_an_object_or_a_refusal_of_400(body: bytes) -> None:
    try:
        assert isinstance(decode_object(body), dict)
    except GatewayError as error:
        assert error.status == 400


@given(st.sampled_from(sorted(ENDPOINTS)), st.dictionaries(
    st.sampled_from(["model", "stream", "messages", "prompt", "input", "query", "documents", "temperature", "top_p", "n", "max_tokens", "background"]),
    st.recursive(st.one_of(st.none(), st.booleans(), st.floats(), st.integers(), st.text(max_size=3)), lambda inner: st.one_of(st.lists(inner, max_size=2), st.dictionaries(st.text(max_size=2), inner, max_size=2))),
))  # fmt: skip
def test_any_members_pass_or_are_refused_as_the_table_says(path: str, document: dict[str, Any]) -> None:
    try:
        check(ENDPOINTS[path], document)
    except GatewayError as error:
        assert (error.status, error.code) in {
            (501, "not_implemented"),
            *((400, code) for code in (
                "missing_required_parameter", "invalid_type", "empty_array", "decimal_above_max_value",
                "decimal_below_min_value", "integer_above_max_value", "integer_below_min_value",
            )),
        }  # fmt: skip
        assert error.param in document or error.code == "missing_required_parameter"


def test_a_stream_is_asked_for_by_true_only() -> None:
    assert is_stream({"stream": True})
    assert not is_stream({"stream": False})
    assert not is_stream({"stream": None})
    assert not is_stream({})


@pytest.mark.parametrize("value", [b"gzip", b"br", b"identity, gzip", b"deflate", b"x"])
def test_http_15_encoded_bodies_are_refused(value: bytes) -> None:
    with pytest.raises(GatewayError) as caught:
        refuse_content_encoding(value)
    assert (caught.value.status, caught.value.code) == (415, "unsupported_content_encoding")


@pytest.mark.parametrize("value", [None, b"identity", b"Identity", b""])
def test_http_15_bodies_as_they_are_pass(value: bytes | None) -> None:
    refuse_content_encoding(value)


def form(endpoint_fields: dict[str, str]) -> tuple[Endpoint, bytes, bytes]:
    parts = "".join(
        f'--b\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n{value}\r\n'
        for name, value in endpoint_fields.items()
    )
    return (
        ENDPOINTS["/v1/audio/transcriptions"],
        (parts + "--b--\r\n").encode(),
        b"multipart/form-data; boundary=b",
    )


def test_up_8_a_form_is_read_for_model_and_stream() -> None:
    document = decode_body(*form({"model": "whisper", "stream": "true", "file": "x"}))
    assert document == {"model": "whisper", "stream": True, "file": "x"}
    check(ENDPOINTS["/v1/audio/transcriptions"], document)
    assert decode_body(*form({"stream": "false"})) == {"stream": False}
