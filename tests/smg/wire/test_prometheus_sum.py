"""The pages of several processes as one: sums that never fall, gauges told apart, former lives remembered."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

from smg.wire import prometheus_sum
from smg.wire.prometheus_sum import Totals

SUMMED = ("smg_http_connections_active",)


def page(count: int, gauge: float = 0.0, observed: int = 0, worker: str | None = "w") -> bytes:
    lines = [
        "# HELP requests_total Requests.",
        "# TYPE requests_total counter",
        f'requests_total{{path="/a"}} {count}',
        "# HELP lat_seconds Latency.",
        "# TYPE lat_seconds histogram",
        f'lat_seconds_bucket{{le="0.5"}} {observed}',
        f'lat_seconds_bucket{{le="+Inf"}} {observed}',
        f"lat_seconds_sum {observed * 0.25}",
        f"lat_seconds_count {observed}",
        "# TYPE smg_http_connections_active gauge",
        f"smg_http_connections_active {gauge}",
    ]
    if worker is not None:
        lines += [
            "# TYPE smg_worker_health gauge",
            f'smg_worker_health{{worker="{worker}"}} {gauge}',
            "# TYPE picks_total counter",
            f'picks_total{{worker="{worker}"}} {count}',
        ]
    return ("\n".join(lines) + "\n").encode()


def values(text: bytes) -> dict[tuple[str, ...], float]:
    """Sample name and label values to value, as Prometheus reads the page."""
    return {
        (sample.name, *sample.labels.values()): sample.value
        for family in text_string_to_metric_families(text.decode())
        for sample in family.samples
    }


def totals(**pages: bytes) -> Totals:
    found = Totals(SUMMED)
    for process, text in pages.items():
        assert found.take(process, found.life(process), text)
    return found


def test_counters_and_histograms_are_added() -> None:
    found = values(totals(a=page(3, observed=2), b=page(4, observed=5)).render({"a", "b"}))
    assert found["requests_total", "/a"] == 7
    assert found["lat_seconds_bucket", "0.5"] == found["lat_seconds_count",] == 7
    assert found["lat_seconds_sum",] == 7 * 0.25


def test_gauges_of_what_is_held_are_added_and_others_keep_their_process() -> None:
    found = values(totals(a=page(0, 2), b=page(0, 3)).render({"a", "b"}))
    assert found["smg_http_connections_active",] == 5
    assert found["smg_worker_health", "w", "a"] == 2
    assert found["smg_worker_health", "w", "b"] == 3
    assert ("smg_worker_health", "w") not in found


def test_a_process_that_does_not_answer_keeps_its_counts_and_loses_its_gauges() -> None:
    found = values(totals(a=page(3, 2), b=page(4, 3)).render({"a"}))
    assert found["requests_total", "/a"] == 7
    assert found["smg_http_connections_active",] == 2
    assert ("smg_worker_health", "w", "b") not in found


def test_what_a_dead_process_had_counted_stays_counted() -> None:
    found = totals(a=page(3), b=page(4, 1))
    found.end("b")
    assert values(found.render({"a"}))["requests_total", "/a"] == 7
    assert found.take("b", found.life("b"), page(2))
    assert values(found.render({"a", "b"}))["requests_total", "/a"] == 9


def test_a_late_answer_of_a_dead_process_is_not_counted_again() -> None:
    found = totals(a=page(3))
    life = found.life("a")
    found.end("a")
    assert not found.take("a", life, page(3))
    assert found.render({"a"}) == b""


def test_the_past_of_a_series_that_nobody_has_any_more_is_not_shown() -> None:
    found = totals(a=page(3, worker="gone"), b=page(4, worker="here"))
    found.end("a")
    seen = values(found.render({"b"}))
    assert ("picks_total", "here") in seen
    assert ("picks_total", "gone") not in seen


def test_the_past_is_bounded(monkeypatch) -> None:
    monkeypatch.setattr(prometheus_sum, "PAST_SERIES_MAX", 7)
    found = Totals(SUMMED)
    for place in range(5):
        found.take("a", found.life("a"), page(1, worker=f"w{place}"))
        found.end("a")
    assert len(found._past) == 7


def test_what_is_no_page_changes_nothing() -> None:
    found = totals(a=page(3))
    for text in (b"", b"<html>\n", b"requests_total{\n", b"# only a remark\n"):
        assert not found.take("a", 0, text)
    assert values(found.render({"a"}))["requests_total", "/a"] == 3


def test_label_values_with_braces_quotes_and_line_ends_pass() -> None:
    text = b'# TYPE x gauge\nx{model="a\\"} \\n\\\\b",n="1"} 2.0\ny 1e-3\n'
    found = values(totals(**{'p"1': text}).render({'p"1'}))
    assert found["x", 'a"} \n\\b', "1", 'p"1'] == 2.0
    assert found["y", 'p"1'] == 0.001


def test_a_series_that_names_its_process_itself_is_left_as_it_is() -> None:
    text = totals(supervisor=b'# TYPE up gauge\nup{process="0"} 1\nup{x="1",process="1"} 0\n').render(
        {"supervisor"}
    )
    assert b'up{process="0"} 1\nup{x="1",process="1"} 0\n' in text


def test_infinities_and_nan_are_written_as_prometheus_reads_them() -> None:
    text = totals(a=b"# TYPE x gauge\nx +Inf\n# TYPE y gauge\ny NaN\n# TYPE z gauge\nz -Inf\n").render({"a"})
    assert b"} +Inf\n" in text and b"} NaN\n" in text and b"} -Inf\n" in text


STEPS = st.lists(
    st.tuples(st.sampled_from("abc"), st.sampled_from(["count", "ask", "end"]), st.integers(1, 50)),
    max_size=40,
)


@given(STEPS)
def test_a_sum_never_falls_and_never_tells_more_than_happened(steps: list[tuple[str, str, int]]) -> None:
    found = Totals(SUMMED)
    counts = dict.fromkeys("abc", 0)
    for process in counts:
        found.take(process, 0, page(0))
    happened, seen = 0, 0.0
    for process, step, number in steps:
        if step == "count":
            counts[process] += number
            happened += number
        elif step == "end":
            found.end(process)
            counts[process] = 0
            found.take(process, found.life(process), page(0))
        else:
            assert found.take(process, found.life(process), page(counts[process]))
        told = values(found.render(counts))["requests_total", "/a"]
        assert seen <= told <= happened
        seen = told


@given(st.lists(st.integers(0, 1000), min_size=1, max_size=5))
def test_all_answers_together_are_the_exact_sum(counts: list[int]) -> None:
    found = totals(**{f"p{place}": page(count, observed=count) for place, count in enumerate(counts)})
    told = values(found.render([f"p{place}" for place in range(len(counts))]))
    assert told["requests_total", "/a"] == told["lat_seconds_count",] == sum(counts)
