"""Metrics: exact counts, exact text, bounded series."""

from __future__ import annotations

import math
from collections.abc import Iterable

import pytest
import trio
import trio.testing
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

from smg.telemetry.catalog import DURATION_BUCKETS_S, FAMILIES
from smg.telemetry.metrics import METHODS, OTHER, PIECE_LINES, Metrics
from smg.telemetry.series import RequestSeries

ROUTE = {
    "router_type": "http",
    "backend_type": "regular",
    "connection_mode": "http",
    "model": "m",
    "endpoint": "chat",
}
GENERATION = {name: value for name, value in ROUTE.items() if name != "connection_mode"}


def read(text: bytes) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    """Every sample of the exposition, by name and labels; a sample that stands twice is an error."""
    samples: dict[tuple[str, frozenset[tuple[str, str]]], float] = {}
    for family in text_string_to_metric_families(text.decode()):
        for sample in family.samples:
            key = (sample.name, frozenset(sample.labels.items()))
            assert key not in samples
            samples[key] = sample.value
    return samples


def value(metrics: Metrics, name: str, **labels: str) -> float | None:
    return read(metrics.render()).get((name, frozenset(labels.items())))


def chat(metrics: Metrics, model: str = "m", streaming: bool = False) -> RequestSeries:
    return metrics.request_series(
        "POST", "/v1/chat/completions", model, "chat", streaming, "http", "regular", "http"
    )


# -- counting


def test_k_finished_requests_raise_every_counter_of_the_request_by_k() -> None:
    metrics = Metrics()
    for _ in range(7):
        chat(metrics).finished(200, "", 0.02)
    for _ in range(3):
        chat(metrics, streaming=True).finished(502, "call_upstream_connection_failed", 4.0)
    for _ in range(2):
        chat(metrics).finished(422, "", 0.5)
    path = "/v1/chat/completions"
    assert value(metrics, "smg_http_requests_total", method="POST", path=path) == 12
    assert value(metrics, "smg_http_request_duration_seconds_count", method="POST", path=path) == 12
    total = value(metrics, "smg_http_request_duration_seconds_sum", method="POST", path=path)
    assert total == pytest.approx(7 * 0.02 + 3 * 4.0 + 2 * 0.5)
    responses = "smg_http_responses_total"
    assert value(metrics, responses, path=path, status_code="200", error_code="") == 7
    assert value(metrics, responses, path=path, status_code="422", error_code="") == 2
    failed = {"path": path, "status_code": "502", "error_code": "call_upstream_connection_failed"}
    assert value(metrics, responses, **failed) == 3
    assert value(metrics, "smg_router_requests_total", **ROUTE, streaming="false") == 9
    assert value(metrics, "smg_router_requests_total", **ROUTE, streaming="true") == 3
    assert value(metrics, "smg_router_request_duration_seconds_count", **ROUTE) == 12
    upstream = "smg_router_upstream_responses_total"
    assert value(metrics, upstream, router_type="http", status_code="200", error_code="") == 7
    assert value(metrics, upstream, router_type="http", status_code="422", error_code="") == 2
    # A gateway's own answer is no upstream response.
    assert not any(key[0] == upstream and ("status_code", "502") in key[1] for key in read(metrics.render()))


def test_time_in_the_queue_counts_for_the_client_and_not_for_the_router() -> None:
    metrics = Metrics()
    chat(metrics).finished(200, "", 5.0, 4.5)
    labels = {"method": "POST", "path": "/v1/chat/completions"}
    assert value(metrics, "smg_http_request_duration_seconds_sum", **labels) == 5.0
    assert value(metrics, "smg_router_request_duration_seconds_sum", **ROUTE) == 0.5
    assert value(metrics, "smg_router_request_duration_seconds_bucket", **ROUTE, le="0.25") == 0
    assert value(metrics, "smg_router_request_duration_seconds_bucket", **ROUTE, le="0.5") == 1


def test_a_generation_fills_the_token_families() -> None:
    metrics = Metrics()
    series = chat(metrics, streaming=True)
    series.generated(0.5, 2.5, 100, 21)
    series.generated(None, 3.0, 10, 5)
    series.generated(0.25, 0.25, 10, 1)  # one token has no time per further token
    assert value(metrics, "smg_router_ttft_seconds_count", **GENERATION) == 2
    assert value(metrics, "smg_router_tpot_seconds_count", **GENERATION) == 1
    assert value(metrics, "smg_router_tpot_seconds_sum", **GENERATION) == pytest.approx(0.1)
    assert value(metrics, "smg_router_generation_duration_seconds_count", **GENERATION) == 3
    assert value(metrics, "smg_router_tokens_total", **GENERATION, token_type="input") == 120
    assert value(metrics, "smg_router_tokens_total", **GENERATION, token_type="output") == 27


def test_a_request_without_tokens_makes_no_token_series() -> None:
    metrics = Metrics()
    chat(metrics).finished(200, "", 0.1)
    assert b"ttft" not in metrics.render()


def test_failures_and_retried_answers_are_counted_beside_the_final_one() -> None:
    metrics = Metrics()
    series = chat(metrics)
    series.upstream(503, "")
    series.failed("backend_error")
    series.failed("backend_error")
    upstream = "smg_router_upstream_responses_total"
    assert value(metrics, upstream, router_type="http", status_code="503", error_code="") == 1
    assert value(metrics, "smg_router_request_errors_total", **ROUTE, error_type="backend_error") == 2


def test_http_series_count_without_touching_the_router() -> None:
    metrics = Metrics()
    metrics.http_series("GET", "/readiness").finished(200, "", 0.0004)
    metrics.http_series("GET", "/readiness").finished(503, "not_ready", 0.0004)
    assert value(metrics, "smg_http_requests_total", method="GET", path="/readiness") == 2
    labels = {"path": "/readiness", "status_code": "503", "error_code": "not_ready"}
    assert value(metrics, "smg_http_responses_total", **labels) == 1
    assert b"smg_router" not in metrics.render()


def test_a_method_that_a_client_invents_counts_as_other() -> None:
    metrics = Metrics()
    for number in range(50):
        metrics.http_series(f"BREW{number}", "/x").finished(405, "method_not_allowed", 0.001)
    assert "BREW1" not in METHODS
    assert value(metrics, "smg_http_requests_total", method=OTHER, path="/x") == 50
    assert b"BREW" not in metrics.render()


# -- histograms


@given(
    seconds=st.lists(st.floats(min_value=0, max_value=10_000, allow_nan=False), max_size=40),
    exact=st.lists(st.sampled_from(DURATION_BUCKETS_S), max_size=10),
)
def test_a_bucket_holds_exactly_what_is_not_above_its_bound(seconds: list[float], exact: list[float]) -> None:
    metrics = Metrics()
    histogram = metrics.histogram("smg_http_request_duration_seconds", method="GET", path="/x")
    observed = seconds + exact
    for item in observed:
        histogram.observe(item)
    samples = read(metrics.render())
    labels = {"method": "GET", "path": "/x"}
    for bound in (*DURATION_BUCKETS_S, math.inf):
        le = "+Inf" if bound == math.inf else repr(bound)
        key = ("smg_http_request_duration_seconds_bucket", frozenset({**labels, "le": le}.items()))
        assert samples[key] == sum(item <= bound for item in observed)
    assert samples[("smg_http_request_duration_seconds_count", frozenset(labels.items()))] == len(observed)


def test_buckets_may_be_overridden_but_not_those_of_the_loop() -> None:
    metrics = Metrics((0.5, 2))
    metrics.histogram("smg_http_request_duration_seconds", method="GET", path="/x").observe(1)
    metrics.histogram("smg_event_loop_delay_seconds").observe(0.0001)
    text = metrics.render().decode()
    assert 'smg_http_request_duration_seconds_bucket{method="GET",path="/x",le="2.0"} 1\n' in text
    assert text.count("smg_http_request_duration_seconds_bucket") == 3
    assert 'smg_event_loop_delay_seconds_bucket{le="0.0005"} 1\n' in text


def test_no_buckets_means_the_default_ones() -> None:
    assert Metrics(()).histogram("smg_event_loop_delay_seconds").count == 0
    histogram = Metrics(()).histogram("smg_http_request_duration_seconds", method="GET", path="/x")
    assert tuple(histogram.bounds_s) == DURATION_BUCKETS_S


@pytest.mark.parametrize(
    "buckets", [(1.0, 1.0), (2.0, 1.0), (0.0, 1.0), (-1.0,), (1.0, math.inf), (math.nan,)]
)
def test_buckets_that_do_not_rise_from_above_zero_are_refused(buckets: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="rising"):
        Metrics(buckets)


# -- binding


def test_an_undeclared_name_is_refused() -> None:
    with pytest.raises(ValueError, match="smg_made_up_total"):
        Metrics().counter("smg_made_up_total")


def test_a_family_of_another_kind_is_refused() -> None:
    with pytest.raises(ValueError, match="gauge"):
        Metrics().gauge("smg_http_requests_total", method="GET", path="/x")


@pytest.mark.parametrize(
    "labels", [{}, {"method": "GET"}, {"method": "GET", "path": "/", "model": "m"}, {"a": "b", "c": "d"}]
)
def test_other_labels_than_the_declared_ones_are_refused(labels: dict[str, str]) -> None:
    with pytest.raises(ValueError, match="labels"):
        Metrics().counter("smg_http_requests_total", **labels)


def test_equal_labels_give_the_same_child_in_any_order() -> None:
    metrics = Metrics()
    first = metrics.counter("smg_http_requests_total", method="GET", path="/x")
    assert metrics.counter("smg_http_requests_total", path="/x", method="GET") is first
    assert chat(metrics) is chat(metrics)
    assert chat(metrics) is not chat(metrics, streaming=True)


def test_the_label_from_is_written_with_an_underscore() -> None:
    metrics = Metrics()
    metrics.counter("smg_worker_cb_transitions_total", worker="w", from_="closed", to="open").add()
    assert b'{worker="w",from="closed",to="open"} 1\n' in metrics.render()


def test_every_family_of_the_catalog_can_be_bound_and_is_exposed_with_its_help() -> None:
    metrics = Metrics()
    for family in FAMILIES:
        bind = {"counter": metrics.counter, "gauge": metrics.gauge, "histogram": metrics.histogram}[
            family.kind
        ]
        bind(family.name, **dict.fromkeys(family.labels, "x"))
    text = metrics.render().decode()
    for family in FAMILIES:
        assert f"# HELP {family.name} {family.help}\n# TYPE {family.name} {family.kind}\n" in text
        assert "\n" not in family.help and "\\" not in family.help
    read(text.encode())


# -- text


@given(st.text(alphabet=st.one_of(st.characters(codec="utf-8"), st.sampled_from('\\"\n\r{}=,'))))
def test_any_label_value_survives_the_text(model: str) -> None:
    metrics = Metrics()
    labels = {"worker_type": "regular", "connection_mode": "http", "model": model, "policy": "random"}
    metrics.counter("smg_worker_selection_total", **labels).add(3)
    assert value(metrics, "smg_worker_selection_total", **labels) == 3


def test_half_a_surrogate_pair_in_a_label_does_not_cost_the_scrape() -> None:
    metrics = Metrics()
    metrics.gauge("smg_worker_health", worker="\ud800").set(1)
    assert value(metrics, "smg_worker_health", worker="?") == 1


@pytest.mark.parametrize("number", [0, 5, -2, 0.1, 1e-9, 1e300, 2**70, math.inf, -math.inf])
def test_numbers_are_read_back_as_they_were(number: float) -> None:
    metrics = Metrics()
    metrics.gauge("smg_worker_health", worker="w").set(number)
    assert value(metrics, "smg_worker_health", worker="w") == float(number)


def test_not_a_number_is_exposed_as_such() -> None:
    metrics = Metrics()
    metrics.gauge("smg_worker_health", worker="w").set(math.nan)
    assert math.isnan(value(metrics, "smg_worker_health", worker="w") or 0)


def test_the_process_tells_its_memory_and_cpu() -> None:
    names = {name for name, _ in read(Metrics().render())}
    assert {"process_cpu_seconds_total", "process_resident_memory_bytes", "process_open_fds"} <= names


async def test_both_ways_of_rendering_say_the_same() -> None:
    metrics = Metrics()
    for number in range(200):
        chat(metrics, f"m{number}").finished(200, "", number / 10)
    metrics.add_source(lambda: [("smg_worker_health", ("w",), 1)])

    def ours(text: bytes) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
        return {key: value for key, value in read(text).items() if key[0].startswith("smg_")}

    assert ours(await metrics.render_text()) == ours(metrics.render())


async def test_counts_stay_exact_and_histograms_consistent_while_scrapes_run() -> None:
    metrics = Metrics()
    models = [f"m{number}" for number in range(3 * PIECE_LINES // len(DURATION_BUCKETS_S))]
    for model in models:
        chat(metrics, model)
    scrapes: list[bytes] = []

    async def scrape() -> None:
        for _ in range(3):
            scrapes.append(await metrics.render_text())

    async with trio.open_nursery() as nursery:
        nursery.start_soon(scrape)
        for turn in range(60):
            for model in models[turn % 7 :: 7]:
                chat(metrics, model).finished(200, "", turn / 7)
            metrics.http_series("GET", f"/late{turn}").finished(200, "", 0.1)
            await trio.lowlevel.checkpoint()
    done = sum(len(models[turn % 7 :: 7]) for turn in range(60))
    labels = {"method": "POST", "path": "/v1/chat/completions"}
    assert value(metrics, "smg_http_requests_total", **labels) == done
    assert len(scrapes) == 3
    before: dict[tuple[str, frozenset[tuple[str, str]]], float] = {}
    for text in scrapes:
        samples = read(text)
        for (name, key), number in samples.items():
            if name.startswith("smg_"):
                assert number >= before.get((name, key), 0)
            if name.endswith("_count"):
                bucket = (f"{name.removesuffix('_count')}_bucket", key | {("le", "+Inf")})
                assert samples[bucket] == number
        before = samples


# -- the cap


def test_a_family_past_its_cap_folds_into_other_and_tells_so() -> None:
    metrics = Metrics(series_max=10)
    for number in range(25):
        metrics.counter("smg_manual_policy_branch_total", branch=f"b{number}").add()
    samples = read(metrics.render())
    children = {key: value for key, value in samples.items() if key[0] == "smg_manual_policy_branch_total"}
    assert len(children) == 11
    assert sum(children.values()) == 25
    assert value(metrics, "smg_manual_policy_branch_total", branch=OTHER) == 15
    folded = value(metrics, "smg_telemetry_series_folded_total", family="smg_manual_policy_branch_total")
    assert folded == 15


def test_bundles_past_the_cap_count_every_request_once() -> None:
    metrics = Metrics(series_max=5)
    for number in range(40):
        chat(metrics, f"m{number}").finished(500 + number, "internal_error", 0.1)
        metrics.http_series("GET", f"/p{number}").finished(200, "", 0.1)
    samples = read(metrics.render())

    def total(name: str) -> float:
        return sum(value for key, value in samples.items() if key[0] == name)

    assert total("smg_router_requests_total") == 40
    assert total("smg_http_requests_total") == 80
    assert total("smg_http_responses_total") == 80
    assert len([key for key in samples if key[0] == "smg_router_requests_total"]) <= 6
    assert len([key for key in samples if key[0] == "smg_http_responses_total"]) <= 6


def test_a_source_that_yields_too_much_is_folded_too() -> None:
    metrics = Metrics(series_max=3)
    metrics.add_source(lambda: [("smg_worker_requests_active", (f"w{n}",), 1) for n in range(10)])
    samples = {k: v for k, v in read(metrics.render()).items() if k[0] == "smg_worker_requests_active"}
    assert len(samples) == 4
    assert samples[("smg_worker_requests_active", frozenset({("worker", OTHER)}))] == 7


# -- sources and removal


def test_a_source_is_read_at_each_scrape_and_its_series_go_with_their_worker() -> None:
    metrics = Metrics()
    active = {"w1": 3, "w2": 0}

    def source() -> Iterable[tuple[str, tuple[str, ...], float]]:
        for worker, count in active.items():
            yield ("smg_worker_requests_active", (worker,), count)

    metrics.add_source(source)
    assert value(metrics, "smg_worker_requests_active", worker="w1") == 3
    active["w1"] = 0
    assert value(metrics, "smg_worker_requests_active", worker="w1") == 0
    del active["w1"]
    assert value(metrics, "smg_worker_requests_active", worker="w1") is None
    assert value(metrics, "smg_worker_requests_active", worker="w2") == 0


def test_equal_labels_of_sources_add_up() -> None:
    metrics = Metrics()
    labels = ("regular", "http", "m")
    metrics.add_source(lambda: [("smg_worker_pool_size", labels, 1), ("smg_worker_pool_size", labels, 1)])
    metrics.add_source(lambda: [("smg_worker_pool_size", labels, 1), ("smg_http_connections_active", (), 4)])
    pool = {"worker_type": "regular", "connection_mode": "http", "model": "m"}
    assert value(metrics, "smg_worker_pool_size", **pool) == 3
    assert value(metrics, "smg_http_connections_active") == 4


@pytest.mark.parametrize(
    "sample", [("smg_nothing", (), 1), ("smg_worker_health", (), 1), ("smg_event_loop_delay_seconds", (), 1)]
)
def test_a_source_may_yield_only_what_is_declared(sample: tuple[str, tuple[str, ...], float]) -> None:
    metrics = Metrics()
    metrics.add_source(lambda: [sample])
    with pytest.raises(ValueError, match="catalog"):
        metrics.render()


def test_a_forgotten_worker_leaves_no_series_and_the_others_stay() -> None:
    metrics = Metrics()
    for worker in ("w1", "w2"):
        metrics.counter("smg_worker_cb_outcomes_total", worker=worker, outcome="success").add()
        metrics.counter("smg_worker_cb_transitions_total", worker=worker, from_="closed", to="open").add()
    chat(metrics).finished(200, "", 0.1)
    metrics.forget(worker="w1")
    text = metrics.render().decode()
    assert "w1" not in text
    assert text.count('worker="w2"') == 2
    assert value(metrics, "smg_router_requests_total", **ROUTE, streaming="false") == 1


def test_a_forgotten_model_starts_again_from_nothing() -> None:
    metrics = Metrics()
    chat(metrics, "old").finished(200, "", 0.1)
    chat(metrics, "kept").finished(200, "", 0.1)
    metrics.forget(model="old")
    assert b'"old"' not in metrics.render()
    chat(metrics, "old").finished(200, "", 0.1)
    route = {**ROUTE, "model": "old"}
    assert value(metrics, "smg_router_requests_total", **route, streaming="false") == 1
    assert value(metrics, "smg_router_request_duration_seconds_count", **route) == 1
    assert value(metrics, "smg_router_requests_total", **{**ROUTE, "model": "kept"}, streaming="false") == 1
    # What has no model goes on counting.
    labels = {"method": "POST", "path": "/v1/chat/completions"}
    assert value(metrics, "smg_http_requests_total", **labels) == 3
    responses = {"path": "/v1/chat/completions", "status_code": "200", "error_code": ""}
    assert value(metrics, "smg_http_responses_total", **responses) == 3


def test_forget_needs_all_of_its_labels_to_match() -> None:
    metrics = Metrics()
    metrics.counter("smg_worker_cb_outcomes_total", worker="w", outcome="success").add()
    metrics.forget(worker="w", outcome="failure")
    metrics.forget()
    assert value(metrics, "smg_worker_cb_outcomes_total", worker="w", outcome="success") == 1
