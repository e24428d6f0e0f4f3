"""OPS-7: several metrics pages become one that a Prometheus parser reads."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

from smg.wire.prometheus_merge import Merger, gauge

A = b"""# HELP vllm:num_requests_running Running.
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{engine="0",model_name="m, \\"x\\" } y"} 3.0
# HELP lat Latency.
# TYPE lat histogram
lat_bucket{le="1"} 1
lat_bucket{le="+Inf"} 2
lat_sum 1.5e-3
lat_count 2
# TYPE c counter
c_total 7 1700000000000
"""
B = b"""# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{engine="0"} 4\r
bare 1
nan{} NaN
inf +Inf
"""


def samples(text: bytes) -> dict[tuple[str, str], float]:
    return {
        (sample.name, sample.labels["worker_addr"]): sample.value
        for family in text_string_to_metric_families(text.decode())
        for sample in family.samples
        if sample.value == sample.value
    }


def merged(**texts: bytes) -> bytes:
    merger = Merger("worker_addr")
    for source, text in texts.items():
        assert merger.add(source, text)
    return merger.render()


def test_families_are_described_once_and_stay_together() -> None:
    text = merged(a=A, b=B)
    assert text.count(b"# TYPE vllm:num_requests_running gauge") == 1
    lines = text.split(b"\n")
    places = [index for index, line in enumerate(lines) if line.startswith(b"vllm:num_requests_running{")]
    assert len(places) == 2
    assert places[1] == places[0] + 1


def test_a_prometheus_parser_reads_every_sample_with_its_origin() -> None:
    found = samples(merged(a=A, b=B))
    assert found["vllm:num_requests_running", "a"] == 3.0
    assert found["vllm:num_requests_running", "b"] == 4.0
    assert found["lat_sum", "a"] == 0.0015
    assert found["lat_count", "a"] == 2
    assert found["c_total", "a"] == 7
    assert found["bare", "b"] == 1
    assert found["inf", "b"] == float("inf")


def test_labels_of_the_worker_stay_and_a_label_of_our_name_gives_way() -> None:
    text = merged(a=b'x{worker_addr="other",y="1"} 1\nx{y="2", worker_addr="o\\"ther"} 2\n')
    assert text == b'x{worker_addr="a",y="1"} 1\nx{worker_addr="a",y="2"} 2\n'


def test_an_origin_cannot_break_out_of_its_label() -> None:
    merger = Merger("worker_addr")
    assert merger.add('http://h"\n\\', b"x 1")
    assert samples(merger.render()) == {("x", 'http://h"\n\\'): 1.0}


@pytest.mark.parametrize(
    "text", [b"", b"\n\n", b"<html>", b"x", b"x{ 1", b'x{a="1} 1', b"x one", b'{"a":1}', b"x 1\nx y", b"x\x00 1", b'x{a="\xff"} 1', b"# only a comment"]
)  # fmt: skip
def test_a_text_that_is_none_is_refused_whole(text: bytes) -> None:
    merger = Merger("worker_addr")
    assert not merger.add("a", text)
    assert merger.render() == b""


def test_comments_and_exemplars_are_dropped() -> None:
    assert (
        merged(a=b'# EOF\n# note\nx_bucket{le="1"} 1 # {trace="a"} 0.5\n')
        == b'x_bucket{worker_addr="a",le="1"} 1\n'
    )


def test_our_own_gauge_is_readable() -> None:
    text = gauge("up", "Whether.", "worker_addr", {"a": 1, "b": 0})
    assert samples(text) == {("up", "a"): 1.0, ("up", "b"): 0.0}


@given(st.lists(st.binary(max_size=80), max_size=3))
def test_whatever_is_accepted_can_be_read_by_a_prometheus_parser(texts: list[bytes]) -> None:
    merger = Merger("worker_addr")
    for number, text in enumerate(texts):
        merger.add(str(number), text)
    list(text_string_to_metric_families(merger.render().decode("utf-8", "replace")))


@given(st.lists(st.tuples(st.sampled_from(["a", "a_total", "b_sum", "b", "c:d"]), st.dictionaries(st.sampled_from(["x", "y"]), st.text(max_size=4)), st.floats()), min_size=1))  # fmt: skip
def test_every_written_sample_comes_back(rows: list[tuple[str, dict[str, str], float]]) -> None:
    lines = []
    for name, labels, value in rows:
        inside = ",".join(
            key + '="' + text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n") + '"'
            for key, text in labels.items()
        )
        lines.append(f"{name}{{{inside}}} {value!r}")
    text = "\n".join(lines).encode()
    merger = Merger("worker_addr")
    if b"\r" in text or any(char in text.decode() for char in "\x0b\x0c\x1c\x1d\x1e\x85\u2028\u2029"):
        return  # other readers split lines there
    assert merger.add("w", text)
    found = [
        sample
        for family in text_string_to_metric_families(merger.render().decode())
        for sample in family.samples
    ]
    assert len(found) == len(rows)
