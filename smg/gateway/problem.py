"""What the errors of the gateway look like to a client (contract section 8) and how a dead stream ends (section 7).

Owns the bodies of the four families of endpoints, the headers of error answers, the named errors of section 8 and the
failure frames of streams. Never decides that something is an error, and never shows an address of a worker or a word
of the code (DN-3, ERR-21).
"""

from __future__ import annotations

import math
from typing import Any

import msgspec

from smg.errors import GatewayError, UpstreamError

OPENAI = "openai"
ANTHROPIC = "anthropic"
RESPONSES = "responses"
WORKER_API = "worker"

_encode = msgspec.json.Encoder().encode

# Error types by status: (OpenAI style, Anthropic style). What is not listed: 4xx as 400, 5xx as 500.
_TYPES: dict[int, tuple[str, str]] = {
    400: ("invalid_request_error", "invalid_request_error"),
    401: ("invalid_request_error", "authentication_error"),
    403: ("permission_error", "permission_error"),
    413: ("invalid_request_error", "request_too_large"),
    429: ("rate_limit_error", "rate_limit_error"),
    500: ("server_error", "api_error"),
    503: ("server_error", "overloaded_error"),
    504: ("server_error", "timeout_error"),
}

DATA_PLANE_REALM = 'Bearer realm="data-plane"'
CONTROL_PLANE_REALM = 'Bearer realm="control-plane"'

INTERRUPTED_CODE = "upstream_stream_interrupted"
_INTERRUPTED = "The stream was interrupted before its end; the answer is incomplete"


def error_type(error: GatewayError, dialect: str) -> str:
    """The `type` of an error in the words of a dialect (columns T / A of section 8)."""
    if dialect == ANTHROPIC and error.code == "model_not_found":
        return "not_found_error"
    pair = _TYPES.get(error.status) or _TYPES[500 if error.status >= 500 else 400]
    return pair[1] if dialect == ANTHROPIC else pair[0]


def body_of(error: GatewayError, dialect: str, request_id: str) -> bytes:
    """The JSON body of an error answer in the family of `dialect`."""
    document: dict[str, Any]
    if dialect == ANTHROPIC:
        document = {
            "type": "error",
            "error": {"type": error_type(error, dialect), "message": error.message},
            "request_id": request_id,
        }
    elif dialect == WORKER_API:
        document = {"error": error.message, "code": error.code}
    else:
        document = {
            "error": {
                "message": error.message,
                "type": error_type(error, dialect),
                "code": error.code,
                "param": error.param,
            }
        }
    return _encode(document)


def header_block(error: GatewayError) -> bytes:
    """The header lines of an error answer, each ended by CRLF: type, code, its own headers, `retry-after` (ERR-30)."""
    lines = [f"content-type: application/json\r\nx-smg-error-code: {error.code}\r\n"]
    lines += [f"{name}: {value}\r\n" for name, value in error.headers]
    if error.retry_after_s is not None:
        lines.append(f"retry-after: {max(1, math.ceil(error.retry_after_s))}\r\n")
    return "".join(lines).encode("latin-1")


def render(error: GatewayError, dialect: str, request_id: str) -> tuple[int, bytes, bytes]:
    """Status, header lines and body of the answer for an error: what `Exchange.respond` takes.

    Date, length, connection and request id are added there as to every answer (HTTP-17).
    """
    return error.status, header_block(error), body_of(error, dialect, request_id)


# The errors of section 8 by name. Checks (ERR-1 to ERR-6), bodies (ERR-11) and admission (ERR-12 to ERR-14) have
# theirs in their own rooms; `error_codes.py` lists them all.


def invalid_api_key(challenge: str = DATA_PLANE_REALM) -> GatewayError:
    """ERR-7: missing or wrong key. Never says which."""
    return GatewayError(
        401, "invalid_api_key", "Missing or invalid API key", headers=(("www-authenticate", challenge),)
    )


def forbidden() -> GatewayError:
    """ERR-8: right key, role too low."""
    return GatewayError(403, "forbidden", "This key may not do that")


def model_not_found(model: str) -> GatewayError:
    """ERR-9."""
    return GatewayError(404, "model_not_found", f"No worker available for model '{model}'", param="model")


def unknown_url(method: str, path: str) -> GatewayError:
    """ERR-10: unknown path."""
    return GatewayError(404, "unknown_url", f"Unknown request URL: {method} {path[:200]}")


def method_not_allowed(method: str, path: str, allow: str) -> GatewayError:
    """ERR-10: known path, other method; `allow` is the value of `Allow` (HTTP-10)."""
    return GatewayError(
        405, "method_not_allowed", f"{path[:200]} does not take {method[:20]}", headers=(("allow", allow),)
    )


def page_is_off(path: str) -> GatewayError:
    """A page that exists and was turned off by a flag."""
    return GatewayError(404, "page_is_off", f"{path[:200]} is off: the node was started with --no-ui")


def too_many_viewers(viewers_max: int, retry_after_s: float) -> GatewayError:
    """The live page has as many viewers as it may have."""
    return GatewayError(
        503, "too_many_viewers", f"{viewers_max} look at this page already", retry_after_s=retry_after_s
    )


def no_available_workers(
    message: str = "No worker is available for this request at the moment",
) -> GatewayError:
    """ERR-15: workers exist, none is a candidate."""
    return GatewayError(503, "no_available_workers", message, retry_after_s=1)


def connection_failed() -> GatewayError:
    """ERR-16: no connection to any tried worker."""
    return GatewayError(502, "call_upstream_connection_failed", "No worker could be connected to")


def response_failed() -> GatewayError:
    """ERR-17: closed or broke the protocol before a usable head."""
    return GatewayError(
        502, "call_upstream_response_failed", "The worker ended the connection before it answered"
    )


def upstream_timeout() -> GatewayError:
    """ERR-18: no head within the timeout."""
    return GatewayError(504, "call_upstream_timeout", "The worker did not answer in time")


def of_upstream(error: UpstreamError) -> GatewayError:
    """The answer for a worker that could not be used, by its kind (ERR-16 to ERR-18)."""
    if error.kind == UpstreamError.REFUSED:
        return connection_failed()
    if error.kind == UpstreamError.TIMEOUT:
        return upstream_timeout()
    return response_failed()


def pd_request_failed() -> GatewayError:
    """PD-2: a connection to a worker of the pair failed, so the other one was told to stop."""
    return GatewayError(502, "pd_request_failed", "A worker of the pair could not be used")


LEG_CODES: dict[str, dict[int, str]] = {
    "decode": {
        400: "decode_bad_request",
        404: "decode_not_found",
        500: "decode_internal_error",
        502: "decode_bad_gateway",
        503: "decode_unavailable",
    },
    "prefill": {
        400: "prefill_bad_request",
        404: "prefill_not_found",
        500: "prefill_internal_error",
        502: "prefill_bad_gateway",
        503: "prefill_unavailable",
    },
}
"""The code for an error status of a leg (PD-3); every other status has `decode_error` or `prefill_error`."""


def leg_error(
    leg: str,
    status: int,
    message: str,
    *,
    headers: tuple[tuple[str, str], ...] = (),
    retry_after_s: float | None = None,
) -> GatewayError:
    """PD-3: the worker of `leg` (`prefill`, `decode`) answered with an error; its status is kept."""
    code = LEG_CODES[leg].get(status, f"{leg}_error")
    return GatewayError(status, code, message, headers=headers, retry_after_s=retry_after_s)


def overload_shed(retry_after_s: float = 1.0) -> GatewayError:
    """ERR-19: every worker is over the overload limits and shedding is on."""
    return GatewayError(
        503,
        "worker_overload_protection_shed",
        "Every worker is overloaded at the moment",
        retry_after_s=retry_after_s,
    )


def preempted() -> GatewayError:
    """ERR-20: preempted by a higher class."""
    return GatewayError(
        503,
        "scheduler_preempted",
        "The request gave way to one of a higher class",
        retry_after_s=1,
        headers=(("x-smg-preempted", "true"),),
    )


def internal_error() -> GatewayError:
    """ERR-21: a fault of the gateway; the log has the rest."""
    return GatewayError(500, "internal_error", "Internal error of the gateway")


def not_implemented(what: str) -> GatewayError:
    """ERR-22: `what` is a path or member that this release does not serve."""
    return GatewayError(501, "not_implemented", f"{what} is not supported by this release")


# How streams stay open, and how they end when their worker died.

KEEP_ALIVE: dict[str, bytes] = {
    OPENAI: b": ping\n\n",
    RESPONSES: b": ping\n\n",
    ANTHROPIC: b'event: ping\ndata: {"type": "ping"}\n\n',
}
"""What is sent after a time of silence, only between two complete events (STR-4)."""

_OPENAI_FRAME = (
    b"data: "
    + _encode(
        {"error": {"message": _INTERRUPTED, "type": "stream_error", "code": INTERRUPTED_CODE, "param": None}}
    )
    + b"\n\ndata: [DONE]\n\n"
)


def stream_failure(dialect: str, request_id: str, sequence_number: int = 0) -> bytes:
    """The frames that end a stream whose worker died (STR-6, STR-7).

    `sequence_number` is the number after the last one the worker sent, for `responses` only. An incomplete event
    before it is closed by `wire.sse_tail.closing`; whether anything may be appended says `wire.sse_tail` too (STR-8).
    """
    if dialect == ANTHROPIC:
        document: dict[str, Any] = {
            "type": "error",
            "error": {"type": "api_error", "message": _INTERRUPTED},
            "request_id": request_id,
        }
    elif dialect == RESPONSES:
        document = {
            "type": "error",
            "code": INTERRUPTED_CODE,
            "message": _INTERRUPTED,
            "param": None,
            "sequence_number": sequence_number,
        }
    else:
        return _OPENAI_FRAME
    return b"event: error\ndata: " + _encode(document) + b"\n\n"
