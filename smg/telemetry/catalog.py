"""The table of every metric family and every span attribute.

It owns names, kinds, labels and help texts; `docs/reference/metrics.md` is derived from it. It must never hold
a value. A family stands here only if some room feeds it: a name that nobody raises would be a lie on a dashboard.
"""

from __future__ import annotations

import msgspec

COUNTER = "counter"
GAUGE = "gauge"
HISTOGRAM = "histogram"

DURATION_BUCKETS_S: tuple[float, ...] = (
    0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5,
    1.0, 2.5, 5.0, 10.0, 15.0, 30.0, 45.0, 60.0, 90.0, 120.0, 180.0, 240.0, 300.0, 480.0,
    900.0, 1200.0, 1800.0, 2700.0, 3600.0, 5400.0, 7200.0,
)  # fmt: skip
"""Upper bounds in seconds of every duration histogram (contract section 19: 1 ms to 7200 s). The same bounds as
Shepherd Model Gateway's, so that dashboards of those who migrate keep their quantiles."""

LOOP_DELAY_BUCKETS_S: tuple[float, ...] = (
    0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0,
)  # fmt: skip
"""Bounds for the lateness of the event loop: below 0.5 ms it is noise of the kernel's timer, above 5 s the
process hangs and the exact figure helps nobody."""


class Family(msgspec.Struct, frozen=True):
    """One metric family: `name` with its unit last, `kind`, label names in the order of exposition, and help.

    `row` is the promise of the contract that names it. `buckets_s` overrides the duration buckets of a histogram.
    """

    name: str
    kind: str
    labels: tuple[str, ...]
    help: str
    row: str
    buckets_s: tuple[float, ...] = ()


_ROUTE = ("router_type", "backend_type", "connection_mode", "model", "endpoint")
_GENERATION = ("router_type", "backend_type", "model", "endpoint")
_WORKER_KIND = ("worker_type", "connection_mode")

FAMILIES: tuple[Family, ...] = (
    # ---- the client's side
    Family(
        "smg_http_requests_total",
        COUNTER,
        ("method", "path"),
        "Finished HTTP requests by method and route template.",
        "MET-1",
    ),
    Family(
        "smg_http_request_duration_seconds",
        HISTOGRAM,
        ("method", "path"),
        "From the request's head to the last byte of its answer.",
        "MET-1",
    ),
    Family(
        "smg_http_responses_total",
        COUNTER,
        ("path", "status_code", "error_code"),
        "Answers by status; error_code is empty when the answer was relayed or is no error.",
        "MET-1",
    ),
    Family("smg_http_connections_active", GAUGE, (), "Open client connections.", "MET-1"),
    Family(
        "smg_http_rate_limit_total",
        COUNTER,
        ("result",),
        "Decisions of admission: allowed or rejected.",
        "MET-1",
    ),
    # ---- routing
    Family(
        "smg_router_requests_total",
        COUNTER,
        (*_ROUTE, "streaming"),
        "Finished inference requests that named a served model.",
        "MET-2",
    ),
    Family(
        "smg_router_request_duration_seconds",
        HISTOGRAM,
        _ROUTE,
        "Inference requests from admission to the last byte of the answer; time in the queue is left out.",
        "MET-2",
    ),
    Family(
        "smg_router_request_errors_total",
        COUNTER,
        (*_ROUTE, "error_type"),
        "Inference requests that failed: no_workers, timeout, backend_error, validation_error, internal_error.",
        "MET-2",
    ),
    Family(
        "smg_router_upstream_responses_total",
        COUNTER,
        ("router_type", "status_code", "error_code"),
        "Answers of workers, those of retried attempts among them.",
        "MET-2",
    ),
    Family(
        "smg_router_ttft_seconds",
        HISTOGRAM,
        _GENERATION,
        "Streams: from the choice of a worker to the first byte of its body.",
        "MET-3",
    ),
    Family(
        "smg_router_tpot_seconds",
        HISTOGRAM,
        _GENERATION,
        "Streams: mean time per output token after the first.",
        "MET-3",
    ),
    Family(
        "smg_router_generation_duration_seconds",
        HISTOGRAM,
        _GENERATION,
        "From the choice of a worker to the end of its answer.",
        "MET-3",
    ),
    Family(
        "smg_router_tokens_total",
        COUNTER,
        (*_GENERATION, "token_type"),
        "Tokens as the worker's usage reports them: input or output.",
        "MET-3",
    ),
    # ---- workers
    Family(
        "smg_worker_pool_size",
        GAUGE,
        (*_WORKER_KIND, "model"),
        "Registered workers that serve the model.",
        "MET-4",
    ),
    Family("smg_worker_requests_active", GAUGE, ("worker",), "Requests in flight on the worker.", "MET-4"),
    Family("smg_worker_health", GAUGE, ("worker",), "1 when the worker is ready, else 0.", "MET-4"),
    Family(
        "smg_worker_health_checks_total",
        COUNTER,
        ("worker_type", "result"),
        "Health probes: success or failure.",
        "MET-4",
    ),
    Family(
        "smg_worker_selection_total",
        COUNTER,
        (*_WORKER_KIND, "model", "policy"),
        "Choices of a worker by a policy.",
        "MET-4",
    ),
    Family(
        "smg_worker_errors_total",
        COUNTER,
        (*_WORKER_KIND, "error_type"),
        "Failures of workers; a client that leaves is none.",
        "MET-4",
    ),
    Family(
        "smg_worker_cb_state",
        GAUGE,
        ("worker",),
        "Circuit breaker: 0 closed, 1 open, 2 half open.",
        "MET-5",
    ),
    Family(
        "smg_worker_cb_transitions_total",
        COUNTER,
        ("worker", "from", "to"),
        "Changes of the circuit breaker's state: closed, open, half_open.",
        "MET-5",
    ),
    Family(
        "smg_worker_cb_outcomes_total",
        COUNTER,
        ("worker", "outcome"),
        "What the circuit breaker was told: success or failure.",
        "MET-5",
    ),
    Family(
        "smg_worker_cb_consecutive_failures", GAUGE, ("worker",), "Failures since the last success.", "MET-5"
    ),
    Family(
        "smg_worker_cb_consecutive_successes",
        GAUGE,
        ("worker",),
        "Successes since the last failure.",
        "MET-5",
    ),
    Family(
        "smg_worker_retries_total",
        COUNTER,
        ("worker_type", "endpoint"),
        "Attempts after the first.",
        "MET-5",
    ),
    Family(
        "smg_worker_retries_exhausted_total",
        COUNTER,
        ("worker_type", "endpoint"),
        "Requests whose attempts or retry budget were used up.",
        "MET-5",
    ),
    # ---- policies
    Family("smg_manual_policy_branch_total", COUNTER, ("branch",), "How the manual policy chose.", "MET-6"),
    Family(
        "smg_consistent_hashing_policy_branch_total",
        COUNTER,
        ("branch",),
        "How the consistent_hashing policy chose.",
        "MET-6",
    ),
    Family(
        "smg_prefix_hash_policy_branch_total",
        COUNTER,
        ("branch",),
        "How the prefix_hash policy chose.",
        "MET-6",
    ),
    Family(
        "smg_manual_policy_cache_entries", GAUGE, (), "Routing keys the manual policy remembers.", "MET-6"
    ),
    # ---- caches
    Family(
        "smg_cache_prompt_chars_total",
        COUNTER,
        ("model",),
        "Characters of prompts that cache_aware placed; a token id counts as four.",
        "MET-9",
    ),
    Family(
        "smg_cache_matched_chars_total",
        COUNTER,
        ("model",),
        "Those of them that were believed to be cached on the worker that got them.",
        "MET-9",
    ),
    Family(
        "smg_cache_predicted_tokens_total",
        COUNTER,
        ("model",),
        "Prompt tokens that were believed to be cached, of answers that told how many were.",
        "MET-9",
    ),
    Family(
        "smg_cache_actual_tokens_total",
        COUNTER,
        ("model",),
        "Prompt tokens that these answers said were cached; the two should grow alike.",
        "MET-9",
    ),
    Family(
        "smg_cache_index_entries", GAUGE, (), "Blocks in the prefix index, counted for each worker.", "MET-9"
    ),
    Family(
        "smg_cache_index_bytes", GAUGE, (), "Memory of the prefix index, of --max-tree-size at most.", "MET-9"
    ),
    Family(
        "smg_kv_events_total",
        COUNTER,
        ("what",),
        "KV events of engines: batch (taken in), refused, gap, replay, lost (all that was told was forgotten), restart.",
        "MET-9",
    ),
    Family(
        "smg_trace_lines_total",
        COUNTER,
        ("result",),
        "Requests for --record-trace: written or dropped.",
        "MET-9",
    ),
    # ---- tenants
    Family(
        "smg_tenant_rejected_total",
        COUNTER,
        ("tenant", "reason"),
        "Requests refused by tenant limits: requests, tokens or too_large; tenants past the first ones are other.",
        "MET-9",
    ),
    Family(
        "smg_tenant_requests_total",
        COUNTER,
        ("tenant", "model"),
        "Requests that were answered, by who pays; tenants past the first ones are other.",
        "MET-9",
    ),
    Family(
        "smg_tenant_tokens_total",
        COUNTER,
        ("tenant", "model", "kind"),
        "Tokens by who pays: prompt (all of it), cached (the part of it out of a cache), completion.",
        "MET-9",
    ),
    # ---- the mesh
    Family(
        "smg_mesh_members",
        GAUGE,
        ("state",),
        "Members of the mesh as this node sees them, itself included: alive, suspect, dead, left.",
        "MET-9",
    ),
    Family(
        "smg_mesh_limits_divided",
        GAUGE,
        (),
        "Limits that are divided among the nodes by demand now; the others are divided evenly.",
        "ADM-5",
    ),
    Family(
        "smg_mesh_rate_limit_share",
        GAUGE,
        (),
        "This node's part of the request rate limit; over all nodes at most 1.",
        "ADM-3",
    ),
    Family(
        "smg_mesh_rate_limit_demand",
        GAUGE,
        (),
        "Requests a second that this node was asked lately, admitted or not, while the rate limit is divided.",
        "ADM-3",
    ),
    Family(
        "smg_mesh_rtt_seconds",
        HISTOGRAM,
        (),
        "Smoothed round trips to the live members, looked at every five seconds.",
        "MET-9",
        LOOP_DELAY_BUCKETS_S,
    ),
    Family(
        "smg_mesh_messages_total",
        COUNTER,
        ("kind", "direction"),
        "Datagrams and frames of the mesh by kind; direction is in or out.",
        "MET-9",
    ),
    Family(
        "smg_mesh_bytes_total",
        COUNTER,
        ("direction",),
        "Bytes of those datagrams and frames, without the headers below them.",
        "MET-9",
    ),
    Family(
        "smg_mesh_lag_seconds",
        HISTOGRAM,
        (),
        "How old placements of peers are when they arrive.",
        "MET-9",
        LOOP_DELAY_BUCKETS_S,
    ),
    Family(
        "smg_mesh_dropped_total",
        COUNTER,
        ("reason",),
        "What came to the mesh port and was dropped: not authentic, garbage, strangers, of another label.",
        "MSH-8",
    ),
    Family(
        "smg_mesh_owner_questions_total",
        COUNTER,
        ("result",),
        "Requests whose session another node owns: followed (it decided), late, failed, refused, resting (not asked).",
        "EXP-3",
    ),
    Family(
        "smg_mesh_owner_wait_seconds",
        HISTOGRAM,
        (),
        "Waits for an owner's answer that came.",
        "EXP-3",
        LOOP_DELAY_BUCKETS_S,
    ),
    # ---- the process
    Family(
        "smg_admission_inflight",
        GAUGE,
        (),
        "Inference requests that hold a slot of --max-concurrent-requests.",
        "MET-7",
    ),
    # ---- the priority scheduler
    Family(
        "smg_scheduler_admit_total",
        COUNTER,
        ("class", "outcome"),
        "Requests by what the scheduler did with them: admitted, rejected_queue_full, rejected_queue_timeout, preempted (after "
        "it was admitted), client_cancelled (while it waited).",
        "MET-7",
    ),
    Family(
        "smg_scheduler_queue_wait_seconds",
        HISTOGRAM,
        ("class",),
        "Wait of the requests that were admitted after a wait.",
        "MET-7",
    ),
    Family(
        "smg_scheduler_preemption_total",
        COUNTER,
        ("victim_class", "by_class"),
        "Requests that gave way to one of a higher class.",
        "MET-7",
    ),
    Family(
        "smg_scheduler_clamp_total",
        COUNTER,
        ("tenant", "requested_class", "effective_class"),
        "Requests that asked for a higher class than their tenant may have; tenants without rules of their own are other.",
        "MET-7",
    ),
    Family(
        "smg_scheduler_unknown_priority_value_total",
        COUNTER,
        ("tenant",),
        "Values of X-SMG-Priority that name no class; they count as default.",
        "ADM-6",
    ),
    Family(
        "smg_scheduler_starvation_promotion_total",
        COUNTER,
        ("class",),
        "Requests that went before waiting ones of higher classes, because their class had been given nothing for its bound.",
        "ADM-6",
    ),
    Family("smg_scheduler_inflight", GAUGE, ("class",), "Requests that hold a slot.", "MET-7"),
    Family("smg_scheduler_queue_depth", GAUGE, ("class",), "Requests that wait for their turn.", "MET-7"),
    Family("smg_scheduler_queue_size_limit", GAUGE, ("class",), "Requests that may wait.", "ADM-6"),
    Family(
        "smg_scheduler_class_capacity_pressure",
        GAUGE,
        ("class",),
        "Used share of the slots that a class could have now, in the fullest fleet; at 1 its next request waits or preempts.",
        "ADM-6",
    ),
    Family(
        "smg_scheduler_utilization",
        GAUGE,
        (),
        "Used share of all slots, 0 when they are not bounded.",
        "ADM-6",
    ),
    Family(
        "smg_scheduler_prefill_utilization",
        GAUGE,
        (),
        "Prefill under way as a share of what may be; at 1 requests wait for a first byte.",
        "ADM-6",
    ),
    Family(
        "smg_event_loop_delay_seconds",
        HISTOGRAM,
        (),
        "How late a timer of the event loop fires, sampled ten times a second.",
        "MET-9",
        LOOP_DELAY_BUCKETS_S,
    ),
    Family("smg_ui_viewers", GAUGE, (), "Who looks at /ui now; 16 at most.", "section 19"),
    # ---- the processes of --processes, told by their supervisor
    Family(
        "smg_process_up",
        GAUGE,
        ("process",),
        "1 when the process answered the scrape in time.",
        "section 19",
    ),
    Family(
        "smg_process_restarts_total",
        COUNTER,
        ("process",),
        "Times the supervisor has started the process again.",
        "section 19",
    ),
    Family(
        "smg_telemetry_series_folded_total",
        COUNTER,
        ("family",),
        "Label sets counted under `other` because their family reached its cap of series.",
        "section 19",
    ),
    Family(
        "smg_telemetry_spans_total",
        COUNTER,
        ("result",),
        "Spans by fate: exported, failed (the collector did not take them) or dropped (the queue was full).",
        "TRC-1",
    ),
)

SUMMED_GAUGES: frozenset[str] = frozenset(
    {
        "smg_http_connections_active",
        "smg_worker_requests_active",
        "smg_admission_inflight",
        "smg_scheduler_inflight",
        "smg_scheduler_queue_depth",
        "smg_cache_index_bytes",
        "process_resident_memory_bytes",
        "process_virtual_memory_bytes",
        "process_open_fds",
    }
)
"""Gauges that count what a process holds: with `--processes` the page shows their sum. All others say what a process sees or
is, and keep its value under the label `process`."""

BY_NAME: dict[str, Family] = {family.name: family for family in FAMILIES}
assert len(BY_NAME) == len(FAMILIES), "a metric is declared once"


class SpanKind(msgspec.Struct, frozen=True):
    """One kind of span: its name, the attributes it may carry (name to meaning), and help."""

    name: str
    attributes: dict[str, str]
    help: str


HTTP_REQUEST = SpanKind(
    "http_request",
    {
        "http.request.method": "method of the request",
        "http.route": "route template, or `other`",
        "http.response.status_code": "status of the answer",
        "error.type": "code of the gateway error, when there was one",
        "smg.request_id": "the request's id, as in logs and `x-request-id`",
        "smg.model": "served model",
        "smg.worker": "worker that gave the answer",
        "smg.attempts": "workers tried",
        "smg.streaming": "whether the answer was a stream",
    },
    "One request, from its head to the last byte of its answer.",
)

SPANS: tuple[SpanKind, ...] = (HTTP_REQUEST,)
