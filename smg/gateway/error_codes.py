"""Every code of `X-SMG-Error-Code`, with what it means and what to do: the text of docs/reference/errors.md.

Owns the words for people; what is raised, and when, stands at the places that raise it, and a test keeps both in step.
Clients act on codes, never on messages.
"""

from __future__ import annotations

import msgspec

BODY = "the request"
WHO = "keys and paths"
LOAD = "load and workers"
ADMIN = "the worker API and other admin calls"
NODE = "the gateway"

THEMES = (BODY, WHO, LOAD, ADMIN, NODE)
"""The themes in the order of the page."""


class ErrorCode(msgspec.Struct, frozen=True):
    """One code: its HTTP statuses, its theme, its meaning, what the caller does about it, its contract row."""

    code: str
    statuses: tuple[int, ...]
    theme: str
    meaning: str
    advice: str
    row: str


_SAME = "Change the request; the same one fails again."
_LATER = "Try again after `Retry-After`."
_RESEND = "Try again; nothing of an answer was lost."

CODES: tuple[ErrorCode, ...] = (
    ErrorCode("invalid_json", (400,), BODY, "The body is empty, no JSON, not UTF-8, nested deeper than 128 levels, or no valid form.", _SAME, "ERR-1"),
    ErrorCode("invalid_type", (400,), BODY, "The body is no JSON object, or the member in `param` has the wrong type.", _SAME, "ERR-2"),
    ErrorCode("missing_required_parameter", (400,), BODY, "The member in `param` is missing.", _SAME, "ERR-3"),
    ErrorCode("empty_array", (400,), BODY, "The array in `param` is empty.", _SAME, "ERR-4"),
    ErrorCode("decimal_above_max_value", (400,), BODY, "The number in `param` is too large.", _SAME, "ERR-5"),
    ErrorCode("decimal_below_min_value", (400,), BODY, "The number in `param` is too small.", _SAME, "ERR-5"),
    ErrorCode("integer_above_max_value", (400,), BODY, "The integer in `param` is too large.", _SAME, "ERR-5"),
    ErrorCode("integer_below_min_value", (400,), BODY, "The integer in `param` is too small.", _SAME, "ERR-5"),
    ErrorCode("invalid_value", (400,), BODY, "The value in `param` is none of those accepted.", _SAME, "GEN-5"),
    ErrorCode("json_parse_error", (400,), BODY, "The content type of a JSON endpoint is missing or not JSON.", "Send `Content-Type: application/json`.", "ERR-6"),
    ErrorCode("missing_model", (400,), BODY, "No model is named and several are served.", "Name one of `GET /v1/models`.", "MOD-5"),
    ErrorCode("bad_request", (400, 414, 431), BODY, "The HTTP request itself is malformed or its head too large; the connection closes.", "Look at the client or at the proxy in between.", "HTTP-5"),
    ErrorCode("request_timeout", (408,), BODY, "The head or the body did not come in time; the connection closes.", "Send faster, or look at the network.", "HTTP-7"),
    ErrorCode("request_body_too_large", (413,), BODY, "The body is larger than `--max-payload-size`.", "Send less, or raise the limit.", "ERR-11"),
    ErrorCode("unsupported_content_encoding", (415,), BODY, "The body is compressed.", "Send it as it is.", "HTTP-15"),
    ErrorCode("invalid_api_key", (401,), WHO, "The key is missing or wrong; one wrong key of two is enough.", "Send `Authorization: Bearer KEY` or `x-api-key: KEY`.", "ERR-7"),
    ErrorCode("forbidden", (403,), WHO, "The key is right, its role too low.", "Use a key with a higher role.", "ERR-8"),
    ErrorCode("unknown_url", (404,), WHO, "No such path.", "See [the routes](routes.md).", "ERR-10"),
    ErrorCode("method_not_allowed", (405,), WHO, "The path takes other methods; `Allow` lists them.", "Use one of them.", "ERR-10"),
    ErrorCode("not_implemented", (501,), WHO, "The path, or the member in `param`, is not in this release.", "See [the routes](routes.md).", "ERR-22"),
    ErrorCode("model_not_found", (404,), LOAD, "No worker serves this model, ready or not.", "Name one of `GET /v1/models`, or add a worker.", "ERR-9"),
    ErrorCode("no_models_available", (503,), LOAD, "No worker has told a model yet.", "Wait for a worker, or look at `GET /workers`.", "MOD-1"),
    ErrorCode("no_available_workers", (503,), LOAD, "Workers for the model exist and none may get a request, or one has not told its models yet, or the node drains.", _LATER + " `POST /route/explain` tells why.", "ERR-15"),
    ErrorCode("admission_queue_full", (429,), LOAD, "`--max-concurrent-requests` are in flight and the queue is full.", _LATER, "ERR-12"),
    ErrorCode("tenant_rate_limit_exceeded", (429,), LOAD, "The tenant has used up its requests or tokens per minute, or asks for more than it can ever have at once.", "Wait `Retry-After`; with `x-should-retry: false` ask for less.", "ERR-13"),
    ErrorCode("rate_limit_exceeded", (429,), LOAD, "More requests per second than `--rate-limit-tokens-per-second`.", _LATER, "ERR-13"),
    ErrorCode("admission_queue_timeout", (503,), LOAD, "The request waited `--queue-timeout-secs` in the queue.", _LATER, "ERR-14"),
    ErrorCode("worker_overload_protection_shed", (503,), LOAD, "Every worker is over the overload limits, and `--worker-overload-shed` is on.", _LATER, "ERR-19"),
    ErrorCode("scheduler_queue_full", (429,), LOAD, "The queue of the request's class is full (`--priority-scheduler-config`).", _LATER, "ERR-12"),
    ErrorCode("scheduler_queue_timeout", (503,), LOAD, "The request waited as long for its turn as its class may.", _LATER, "ERR-14"),
    ErrorCode("scheduler_preempted", (503,), LOAD, "The request gave way to one of a higher class; no byte of an answer was sent.", _LATER, "ERR-20"),
    ErrorCode("call_upstream_connection_failed", (502,), LOAD, "No worker that was tried could be connected to.", _RESEND, "ERR-16"),
    ErrorCode("call_upstream_response_failed", (502,), LOAD, "The worker closed the connection, or broke the protocol, before it answered.", _RESEND, "ERR-17"),
    ErrorCode("call_upstream_timeout", (504,), LOAD, "No answer within `--request-timeout-secs`, retries included.", "Ask for less, or raise the limit.", "ERR-18"),
    ErrorCode("pd_request_failed", (502,), LOAD, "Under `--pd-disaggregation`: a connection to one worker of the pair failed, and the other worker was told to stop.", _RESEND, "PD-2"),
    ErrorCode("decode_bad_request", (400,), LOAD, "The decode worker answered with this status.", _SAME, "PD-3"),
    ErrorCode("decode_not_found", (404,), LOAD, "The decode worker answered with this status.", _SAME, "PD-3"),
    ErrorCode("decode_internal_error", (500,), LOAD, "The decode worker answered with this status.", "Look at the decode worker.", "PD-3"),
    ErrorCode("decode_bad_gateway", (502,), LOAD, "The decode worker answered with this status.", "Look at the decode worker and what it stands before.", "PD-3"),
    ErrorCode("decode_unavailable", (503,), LOAD, "The decode worker answered with this status.", _LATER, "PD-3"),
    ErrorCode("decode_error", (422, 429, 504), LOAD, "The decode worker answered with another status of 400 or above, which is kept.", "Read the message; on 429 and 5xx try again.", "PD-3"),
    ErrorCode("prefill_bad_request", (400,), LOAD, "The prefill worker answered with this status.", _SAME, "PD-3"),
    ErrorCode("prefill_not_found", (404,), LOAD, "The prefill worker answered with this status.", _SAME, "PD-3"),
    ErrorCode("prefill_internal_error", (500,), LOAD, "The prefill worker answered with this status.", "Look at the prefill worker.", "PD-3"),
    ErrorCode("prefill_bad_gateway", (502,), LOAD, "The prefill worker answered with this status.", "Look at the prefill worker and what it stands before.", "PD-3"),
    ErrorCode("prefill_unavailable", (503,), LOAD, "The prefill worker answered with this status.", _LATER, "PD-3"),
    ErrorCode("prefill_error", (422, 429, 504), LOAD, "The prefill worker answered with another status of 400 or above, which is kept.", "Read the message; on 429 and 5xx try again.", "PD-3"),
    ErrorCode("BAD_REQUEST", (400,), ADMIN, "The body, a member or the id of a worker is not valid.", _SAME, "WRK-7"),
    ErrorCode("WORKER_NOT_FOUND", (404,), ADMIN, "No worker has this id or URL.", "See `GET /workers`.", "WRK-9"),
    ErrorCode("WORKER_ALREADY_EXISTS", (409,), ADMIN, "The URL is registered.", "Change the worker with `PATCH` or `PUT`.", "WRK-7"),
    ErrorCode("WORKER_CREATE_IN_PROGRESS", (409,), ADMIN, "The URL is being added.", "Wait for it: `GET /workers/{id}`.", "WRK-7"),
    ErrorCode("mesh_disabled", (409,), ADMIN, "The gateway is in no mesh.", "Start it with `--ha-mesh`.", "MSH-4"),
    ErrorCode("already_left", (409,), ADMIN, "The node has left its mesh.", "Restart it to join again.", "MSH-4"),
    ErrorCode("page_is_off", (404,), NODE, "The page `/ui` of the metrics port is turned off.", "Start the node without `--no-ui`.", "section 19"),
    ErrorCode("too_many_viewers", (503,), NODE, "As many as may look at `/ui` at once do so already.", _LATER, "section 19"),
    ErrorCode("internal_error", (500,), NODE, "A fault of the gateway itself; its log has the rest, by request id.", "Report it.", "ERR-21"),
)  # fmt: skip
