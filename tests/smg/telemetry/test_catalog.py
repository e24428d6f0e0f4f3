"""The catalog against the contract (section 19) and against the page that is made of it."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest

from smg.telemetry.catalog import (
    BY_NAME,
    COUNTER,
    DURATION_BUCKETS_S,
    FAMILIES,
    GAUGE,
    HISTOGRAM,
    SUMMED_GAUGES,
)

ROUTE = "router_type backend_type connection_mode model endpoint"
GENERATION = "router_type backend_type model endpoint"

# Written down again on purpose: dashboards depend on each word.
CONTRACT = {
    "smg_http_requests_total": (COUNTER, "method path"),
    "smg_http_request_duration_seconds": (HISTOGRAM, "method path"),
    "smg_http_responses_total": (COUNTER, "path status_code error_code"),
    "smg_http_connections_active": (GAUGE, ""),
    "smg_http_rate_limit_total": (COUNTER, "result"),
    "smg_router_requests_total": (COUNTER, f"{ROUTE} streaming"),
    "smg_router_request_duration_seconds": (HISTOGRAM, ROUTE),
    "smg_router_request_errors_total": (COUNTER, f"{ROUTE} error_type"),
    "smg_router_upstream_responses_total": (COUNTER, "router_type status_code error_code"),
    "smg_router_ttft_seconds": (HISTOGRAM, GENERATION),
    "smg_router_tpot_seconds": (HISTOGRAM, GENERATION),
    "smg_router_generation_duration_seconds": (HISTOGRAM, GENERATION),
    "smg_router_tokens_total": (COUNTER, f"{GENERATION} token_type"),
    "smg_worker_pool_size": (GAUGE, "worker_type connection_mode model"),
    "smg_worker_requests_active": (GAUGE, "worker"),
    "smg_worker_health": (GAUGE, "worker"),
    "smg_worker_health_checks_total": (COUNTER, "worker_type result"),
    "smg_worker_selection_total": (COUNTER, "worker_type connection_mode model policy"),
    "smg_worker_errors_total": (COUNTER, "worker_type connection_mode error_type"),
    "smg_worker_cb_state": (GAUGE, "worker"),
    "smg_worker_cb_transitions_total": (COUNTER, "worker from to"),
    "smg_worker_cb_outcomes_total": (COUNTER, "worker outcome"),
    "smg_worker_cb_consecutive_failures": (GAUGE, "worker"),
    "smg_worker_cb_consecutive_successes": (GAUGE, "worker"),
    "smg_worker_retries_total": (COUNTER, "worker_type endpoint"),
    "smg_worker_retries_exhausted_total": (COUNTER, "worker_type endpoint"),
    "smg_manual_policy_branch_total": (COUNTER, "branch"),
    "smg_consistent_hashing_policy_branch_total": (COUNTER, "branch"),
    "smg_prefix_hash_policy_branch_total": (COUNTER, "branch"),
    "smg_manual_policy_cache_entries": (GAUGE, ""),
    "smg_admission_inflight": (GAUGE, ""),
    "smg_scheduler_admit_total": (COUNTER, "class outcome"),
    "smg_scheduler_queue_wait_seconds": (HISTOGRAM, "class"),
    "smg_scheduler_preemption_total": (COUNTER, "victim_class by_class"),
    "smg_scheduler_clamp_total": (COUNTER, "tenant requested_class effective_class"),
    "smg_scheduler_inflight": (GAUGE, "class"),
    "smg_scheduler_queue_depth": (GAUGE, "class"),
    "smg_event_loop_delay_seconds": (HISTOGRAM, ""),
    "smg_cache_matched_chars_total": (COUNTER, "model"),
    "smg_cache_prompt_chars_total": (COUNTER, "model"),
    "smg_tenant_rejected_total": (COUNTER, "tenant reason"),
    "smg_mesh_members": (GAUGE, "state"),
    "smg_mesh_rtt_seconds": (HISTOGRAM, ""),
    "smg_mesh_messages_total": (COUNTER, "kind direction"),
    "smg_mesh_lag_seconds": (HISTOGRAM, ""),
}


@pytest.mark.parametrize("name", CONTRACT)
def test_a_family_of_the_contract_has_its_kind_and_labels(name: str) -> None:
    kind, labels = CONTRACT[name]
    assert (BY_NAME[name].kind, BY_NAME[name].labels) == (kind, tuple(labels.split()))


def test_gauges_that_several_processes_add_are_gauges_without_a_state() -> None:
    own = {name for name in SUMMED_GAUGES if name.startswith("smg_")}
    assert all(BY_NAME[name].kind == GAUGE for name in own)
    assert SUMMED_GAUGES - own == {
        "process_resident_memory_bytes",
        "process_virtual_memory_bytes",
        "process_open_fds",
    }


def test_what_the_contract_does_not_name_is_listed_here() -> None:
    assert {name for name in BY_NAME if name not in CONTRACT} == {
        "smg_cache_predicted_tokens_total",
        "smg_cache_actual_tokens_total",
        "smg_cache_index_entries",
        "smg_cache_index_bytes",
        "smg_kv_events_total",
        "smg_process_up",
        "smg_process_restarts_total",
        "smg_trace_lines_total",
        "smg_scheduler_unknown_priority_value_total",
        "smg_scheduler_starvation_promotion_total",
        "smg_scheduler_queue_size_limit",
        "smg_scheduler_class_capacity_pressure",
        "smg_scheduler_utilization",
        "smg_scheduler_prefill_utilization",
        "smg_mesh_bytes_total",
        "smg_mesh_dropped_total",
        "smg_mesh_limits_divided",
        "smg_mesh_rate_limit_demand",
        "smg_mesh_rate_limit_share",
        "smg_mesh_owner_questions_total",
        "smg_mesh_owner_wait_seconds",
        "smg_tenant_requests_total",
        "smg_tenant_tokens_total",
        "smg_ui_viewers",
        "smg_telemetry_series_folded_total",
        "smg_telemetry_spans_total",
    }


def test_names_follow_prometheus_and_the_house() -> None:
    for family in FAMILIES:
        assert re.fullmatch(r"smg_[a-z]+(_[a-z0-9]+)+", family.name)
        assert (family.kind == COUNTER) is family.name.endswith("_total")
        assert family.kind != HISTOGRAM or family.name.endswith("_seconds")
        assert len(set(family.labels)) == len(family.labels)
        assert "le" not in family.labels
        assert family.help.endswith(".")


def test_duration_buckets_reach_from_one_millisecond_to_two_hours() -> None:
    assert (DURATION_BUCKETS_S[0], DURATION_BUCKETS_S[-1]) == (0.001, 7200)
    assert list(DURATION_BUCKETS_S) == sorted(set(DURATION_BUCKETS_S))


def test_the_reference_page_is_the_one_the_catalog_makes() -> None:
    house = Path(__file__).resolve().parents[3]
    spec = importlib.util.spec_from_file_location(
        "reference_metrics", house / "scripts" / "reference_metrics.py"
    )
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    page = module.render()
    for family in FAMILIES:
        assert f"`{family.name}` | {family.kind}" in page
    assert page == (house / "docs" / "reference" / "metrics.md").read_text()
