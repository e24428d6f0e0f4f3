"""Section 8 row by row: status, code, type in both families, headers; STR-6 and STR-7 frames."""

from __future__ import annotations

import json
from typing import Any

import pytest

from smg.errors import GatewayError, UpstreamError
from smg.gateway import problem

ROWS: list[tuple[str, GatewayError, int, str, str, str]] = [
    ("ERR-1", GatewayError(400, "invalid_json", "m"), 400, "invalid_json", "invalid_request_error", "invalid_request_error"),
    ("ERR-2", GatewayError(400, "invalid_type", "m", param="p"), 400, "invalid_type", "invalid_request_error", "invalid_request_error"),
    ("ERR-7", problem.invalid_api_key(), 401, "invalid_api_key", "invalid_request_error", "authentication_error"),
    ("ERR-8", problem.forbidden(), 403, "forbidden", "permission_error", "permission_error"),
    ("ERR-9", problem.model_not_found("x"), 404, "model_not_found", "invalid_request_error", "not_found_error"),
    ("ERR-10", problem.unknown_url("GET", "/x"), 404, "unknown_url", "invalid_request_error", "invalid_request_error"),
    ("ERR-10", problem.method_not_allowed("PUT", "/x", "GET"), 405, "method_not_allowed", "invalid_request_error", "invalid_request_error"),
    ("ERR-11", GatewayError(413, "request_body_too_large", "m"), 413, "request_body_too_large", "invalid_request_error", "request_too_large"),
    ("ERR-12", GatewayError(429, "admission_queue_full", "m", retry_after_s=1), 429, "admission_queue_full", "rate_limit_error", "rate_limit_error"),
    ("ERR-14", GatewayError(503, "admission_queue_timeout", "m", retry_after_s=1), 503, "admission_queue_timeout", "server_error", "overloaded_error"),
    ("ERR-15", problem.no_available_workers(), 503, "no_available_workers", "server_error", "overloaded_error"),
    ("ERR-16", problem.connection_failed(), 502, "call_upstream_connection_failed", "server_error", "api_error"),
    ("ERR-17", problem.response_failed(), 502, "call_upstream_response_failed", "server_error", "api_error"),
    ("ERR-18", problem.upstream_timeout(), 504, "call_upstream_timeout", "server_error", "timeout_error"),
    ("ERR-19", problem.overload_shed(2.2), 503, "worker_overload_protection_shed", "server_error", "overloaded_error"),
    ("ERR-20", problem.preempted(), 503, "scheduler_preempted", "server_error", "overloaded_error"),
    ("ERR-21", problem.internal_error(), 500, "internal_error", "server_error", "api_error"),
    ("ERR-22", problem.not_implemented("/v1/tokenize"), 501, "not_implemented", "server_error", "api_error"),
    ("HTTP-15", GatewayError(415, "unsupported_content_encoding", "m"), 415, "unsupported_content_encoding", "invalid_request_error", "invalid_request_error"),
    ("HTTP-6", GatewayError(431, "bad_request", "m"), 431, "bad_request", "invalid_request_error", "invalid_request_error"),
]  # fmt: skip


def rendered(error: GatewayError, dialect: str) -> tuple[int, dict[str, str], dict[str, Any]]:
    status, block, body = problem.render(error, dialect, "rid-1")
    lines = [line.split(": ", 1) for line in block.decode().split("\r\n")[:-1]]
    headers = dict(lines)
    assert len(headers) == len(lines), "a header came twice"
    return status, headers, json.loads(body)


@pytest.mark.parametrize(("row", "error", "status", "code", "openai_type", "anthropic_type"), ROWS)
def test_section_8_rows(
    row: str, error: GatewayError, status: int, code: str, openai_type: str, anthropic_type: str
) -> None:
    for dialect in ("openai", "responses"):
        got, headers, body = rendered(error, dialect)
        assert got == status, row
        assert headers["x-smg-error-code"] == code
        assert headers["content-type"] == "application/json"
        expected = {"message": error.message, "type": openai_type, "code": code, "param": error.param}
        assert body == {"error": expected}
    got, headers, body = rendered(error, "anthropic")
    assert (got, headers["x-smg-error-code"]) == (status, code)
    assert body == {
        "type": "error",
        "error": {"type": anthropic_type, "message": error.message},
        "request_id": "rid-1",
    }
    got, headers, body = rendered(error, "worker")
    assert (got, headers["x-smg-error-code"]) == (status, code)
    assert body == {"error": error.message, "code": code}


def test_err_7_a_missing_key_is_challenged() -> None:
    assert rendered(problem.invalid_api_key(), "openai")[1]["www-authenticate"] == 'Bearer realm="data-plane"'
    admin = problem.invalid_api_key(problem.CONTROL_PLANE_REALM)
    assert rendered(admin, "worker")[1]["www-authenticate"] == 'Bearer realm="control-plane"'


def test_err_9_the_message_names_the_model() -> None:
    assert (
        rendered(problem.model_not_found("x"), "openai")[2]["error"]["message"]
        == "No worker available for model 'x'"
    )


def test_err_10_405_lists_the_methods() -> None:
    assert rendered(problem.method_not_allowed("PUT", "/x", "GET, HEAD"), "openai")[1]["allow"] == "GET, HEAD"


@pytest.mark.parametrize(
    ("told", "shown"), [(0, "1"), (0.01, "1"), (1, "1"), (1.2, "2"), (60, "60"), (-3, "1")]
)
def test_err_30_retry_after_is_whole_seconds_and_at_least_1(told: float, shown: str) -> None:
    assert rendered(GatewayError(429, "c", "m", retry_after_s=told), "openai")[1]["retry-after"] == shown


def test_err_30_without_a_time_there_is_no_retry_after() -> None:
    assert "retry-after" not in rendered(GatewayError(400, "c", "m"), "openai")[1]


def test_err_15_and_err_20_say_when_to_come_back() -> None:
    assert rendered(problem.no_available_workers(), "openai")[1]["retry-after"] == "1"
    headers = rendered(problem.preempted(), "openai")[1]
    assert (headers["retry-after"], headers["x-smg-preempted"]) == ("1", "true")


@pytest.mark.parametrize(
    ("kind", "code"),
    [
        (UpstreamError.REFUSED, "call_upstream_connection_failed"),
        (UpstreamError.RESET, "call_upstream_response_failed"),
        (UpstreamError.BROKEN_STREAM, "call_upstream_response_failed"),
        (UpstreamError.TIMEOUT, "call_upstream_timeout"),
    ],
)
def test_dn_3_a_failed_worker_is_told_without_its_address(kind: str, code: str) -> None:
    error = problem.of_upstream(UpstreamError(kind, "connect to 10.1.2.3:8000 failed"))
    assert error.code == code
    assert "10.1.2.3" not in problem.body_of(error, "openai", "rid").decode()


def events(stream: bytes) -> list[tuple[str | None, str]]:
    found = []
    for event in stream.decode().split("\n\n")[:-1]:
        fields = dict(line.split(": ", 1) for line in event.split("\n"))
        found.append((fields.get("event"), fields["data"]))
    return found


def test_str_6_a_dead_openai_stream_ends_with_an_error_and_done() -> None:
    first, done = events(problem.stream_failure("openai", "rid"))
    assert first[0] is None
    error = json.loads(first[1])["error"]
    assert error.pop("message")
    assert error == {"type": "stream_error", "code": "upstream_stream_interrupted", "param": None}
    assert done == (None, "[DONE]")


def test_str_7_a_dead_messages_stream_ends_with_an_error_event_alone() -> None:
    ((name, data),) = events(problem.stream_failure("anthropic", "rid"))
    document = json.loads(data)
    assert name == "error"
    assert document["error"].pop("message")
    assert document == {"type": "error", "error": {"type": "api_error"}, "request_id": "rid"}


def test_str_7_a_dead_responses_stream_counts_on() -> None:
    ((name, data),) = events(problem.stream_failure("responses", "rid", 7))
    document = json.loads(data)
    assert name == "error"
    assert document.pop("message")
    assert document == {
        "type": "error",
        "code": "upstream_stream_interrupted",
        "param": None,
        "sequence_number": 7,
    }


def test_str_4_keep_alives_are_whole_events_in_the_words_of_the_dialect() -> None:
    assert problem.KEEP_ALIVE["openai"] == problem.KEEP_ALIVE["responses"] == b": ping\n\n"
    assert problem.KEEP_ALIVE["anthropic"] == b'event: ping\ndata: {"type": "ping"}\n\n'
