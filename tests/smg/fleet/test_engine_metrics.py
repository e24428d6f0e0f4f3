"""Load out of engines' own words: Prometheus text of vLLM, SGLang and llama.cpp, JSON of SGLang."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from smg.fleet.engine_metrics import RANKS_MAX, combined, loads_ranks, metrics_ranks
from smg.fleet.worker import LoadReport

VLLM = b"""\
# HELP python_gc_objects_collected_total Objects collected during gc
# TYPE python_gc_objects_collected_total counter
python_gc_objects_collected_total{generation="0"} 13209.0
# HELP vllm:num_requests_running Number of requests in model execution batches.
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{engine="0",model_name="meta/llama"} 3.0
vllm:num_requests_running{engine="1",model_name="meta/llama"} 5.0
# TYPE vllm:num_requests_waiting gauge
vllm:num_requests_waiting{engine="0",model_name="meta/llama"} 0.0
vllm:num_requests_waiting{engine="1",model_name="meta/llama"} 2.0
vllm:num_requests_waiting_by_reason{engine="1",model_name="meta/llama",reason="capacity"} 77.0
# TYPE vllm:kv_cache_usage_perc gauge
vllm:kv_cache_usage_perc{engine="0",model_name="meta/llama"} 0.25
vllm:kv_cache_usage_perc{engine="1",model_name="meta/llama"} 0.75
# TYPE vllm:prefix_cache_queries_total counter
vllm:prefix_cache_queries_total{engine="0",model_name="meta/llama"} 1000.0
vllm:prefix_cache_queries_total{engine="1",model_name="meta/llama"} 0.0
vllm:prefix_cache_queries_created{engine="0",model_name="meta/llama"} 1.7e+09
vllm:prefix_cache_hits_total{engine="0",model_name="meta/llama"} 400.0
vllm:prefix_cache_hits_total{engine="1",model_name="meta/llama"} 0.0
vllm:cache_config_info{block_size="16",cache_dtype="auto",engine="0",num_gpu_blocks="1000"} 1.0
vllm:cache_config_info{block_size="16",cache_dtype="auto",engine="1",num_gpu_blocks="1000000"} 1.0
"""

SGLANG = b"""\
# TYPE sglang:num_running_reqs gauge
sglang:num_running_reqs{dp_rank="0",engine_type="unified",model_name="a}b {\\"c\\"",pp_rank="0",tp_rank="0"} 4.0
sglang:num_running_reqs{dp_rank="0",engine_type="unified",model_name="a}b {\\"c\\"",pp_rank="0",tp_rank="1"} 4.0
sglang:num_running_reqs{dp_rank="1",engine_type="unified",model_name="m",pp_rank="0",tp_rank="0"} 6.0
sglang:num_queue_reqs{dp_rank="0",tp_rank="0"} 1.0
sglang:num_queue_reqs{dp_rank="1",tp_rank="0"} 0.0
sglang:token_usage{dp_rank="0",tp_rank="0"} 0.5
sglang:token_usage{dp_rank="1",tp_rank="0"} 0.1
sglang:num_used_tokens{dp_rank="0",tp_rank="0"} 500.0
sglang:gen_throughput{dp_rank="0",tp_rank="0"} 100.5
sglang:gen_throughput{dp_rank="1",tp_rank="0"} 50.0
sglang:cache_hit_rate{dp_rank="0",tp_rank="0"} 0.9
sglang:max_total_num_tokens{dp_rank="0",tp_rank="0"} 1000.0
sglang:max_total_num_tokens{dp_rank="1",tp_rank="0"} 1000.0
"""

LOADS = {
    "timestamp": "2026-01-01T00:00:00",
    "dp_rank_count": 2,
    "loads": [
        {
            "dp_rank": 0,
            "num_running_reqs": 2,
            "num_waiting_reqs": 1,
            "num_waiting_uncached_tokens": 900,
            "num_used_tokens": 4000,
            "max_total_num_tokens": 10000,
            "token_usage": 0.4,
            "gen_throughput": 120.0,
            "cache_hit_rate": 0.5,
            "utilization": 0.2,
            "max_running_requests": 64,
            "queues": {"waiting": 1},
        },
        {"dp_rank": 1, "num_running_reqs": 1, "num_waiting_reqs": 0, "token_usage": 0.0},
    ],
}


def report(ranks: list, only_rank: int | None = None) -> LoadReport:
    found = combined(ranks, 7.0, only_rank)
    assert found is not None
    return found


def test_a_vllm_text_gives_one_report_for_all_its_ranks() -> None:
    assert report(metrics_ranks(VLLM)) == LoadReport(
        at_s=7.0,
        running=8,
        waiting=2,
        running_tokens=4000 + 12_000_000,
        kv_usage=0.5,
        kv_capacity_tokens=16_016_000,
        cache_hit_rate=0.4,
    )


def test_a_rank_of_its_own_counts_only_its_own_numbers() -> None:
    one = report(metrics_ranks(VLLM), only_rank=1)
    assert (one.running, one.waiting, one.kv_usage) == (5, 2, 0.75)
    assert combined(metrics_ranks(VLLM), 0.0, only_rank=9) is None


def test_a_rank_believes_an_engine_that_tells_one_number_for_all() -> None:
    ranks = metrics_ranks(b"vllm:num_requests_running 4\n")
    assert report(ranks, only_rank=3).running == 4


def test_older_vllm_names_and_texts_without_labels_are_read() -> None:
    text = b"vllm:num_requests_running 2\nvllm:gpu_cache_usage_perc 0.5\nvllm:gpu_prefix_cache_hit_rate 0.125"
    found = report(metrics_ranks(text))
    assert (found.running, found.kv_usage, found.cache_hit_rate) == (2, 0.5, 0.125)


def test_sglang_ranks_add_up_and_parallel_copies_of_one_rank_do_not() -> None:
    assert report(metrics_ranks(SGLANG)) == LoadReport(
        at_s=7.0,
        running=10,
        waiting=1,
        running_tokens=500,
        kv_usage=pytest.approx(0.3),
        kv_capacity_tokens=2000,
        throughput_tps=150.5,
        cache_hit_rate=0.9,
    )


def test_sglang_with_underscores_is_the_same() -> None:
    assert metrics_ranks(SGLANG.replace(b"sglang:", b"sglang_")) == metrics_ranks(SGLANG)


def test_llama_cpp_is_read() -> None:
    text = b"# HELP llamacpp:requests_processing x\nllamacpp:requests_processing 1\nllamacpp:requests_deferred 4\n"
    assert (report(metrics_ranks(text)).running, report(metrics_ranks(text)).waiting) == (1, 4)


@pytest.mark.parametrize("text", [b"", b"# nothing", b"<html>vllm:</html>", b"vllm:other 3\n", b"\xff\xfe"])
def test_a_text_without_load_gives_nothing(text: bytes) -> None:
    assert metrics_ranks(text) == []
    assert combined([], 1.0) is None


def test_values_that_are_no_counts_are_absent() -> None:
    text = b"vllm:num_requests_running NaN\nvllm:num_requests_waiting -1\nvllm:kv_cache_usage_perc 3\n"
    found = report(metrics_ranks(text))
    assert (found.running, found.waiting, found.kv_usage) == (0, 0, 1.0)
    assert metrics_ranks(b"vllm:num_requests_running +Inf\nvllm:num_requests_waiting soon\n") == []


def test_timestamps_carriage_returns_and_exemplars_do_not_disturb() -> None:
    text = (
        b'vllm:num_requests_running{a="b"} 4 1700000000000\r\nvllm:num_requests_waiting 2 # {t="}"} 9 1.0\r\n'
    )
    assert (report(metrics_ranks(text)).running, report(metrics_ranks(text)).waiting) == (4, 2)


def test_the_loads_of_sglang_add_up() -> None:
    ranks = loads_ranks(json.dumps(LOADS).encode())
    assert ranks[0].max_running_requests == 64
    assert report(ranks) == LoadReport(
        at_s=7.0,
        running=3,
        waiting=1,
        waiting_tokens=900,
        running_tokens=4000,
        kv_usage=0.2,
        kv_capacity_tokens=10000,
        throughput_tps=120.0,
        cache_hit_rate=0.5,
    )
    assert report(ranks, only_rank=1).running == 1


def test_the_older_get_load_counts_running_as_all_but_waiting() -> None:
    body = json.dumps([{"dp_rank": 0, "num_reqs": 5, "num_waiting_reqs": 2, "num_tokens": 80}]).encode()
    found = report(loads_ranks(body))
    assert (found.running, found.waiting, found.running_tokens) == (3, 2, 80)
    assert report(loads_ranks(b'{"load": 4}')).running == 4


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{}",
        b"null",
        b"[1,2]",
        b'{"loads":{}}',
        b'{"loads":[{}]}',
        b"[" * 200_000,
        b'{"\x80":1}',
        b'{"error":"x"}',
    ],
)
def test_a_body_without_loads_gives_nothing(body: bytes) -> None:
    assert loads_ranks(body) == []


def test_ranks_are_bounded() -> None:
    many = {"loads": [{"dp_rank": rank, "num_running_reqs": 1} for rank in range(3 * RANKS_MAX)]}
    assert len(loads_ranks(json.dumps(many).encode())) == RANKS_MAX
    lines = "".join(f'vllm:num_requests_running{{engine="{rank}"}} 1\n' for rank in range(3 * RANKS_MAX))
    assert len(metrics_ranks(lines.encode())) <= RANKS_MAX


@given(st.binary(max_size=200), st.integers(0, len(VLLM)), st.integers(0, len(SGLANG)))
def test_no_text_is_an_error(noise: bytes, first: int, second: int) -> None:
    for text in (noise, VLLM[:first] + noise + VLLM[first:], SGLANG[:second] + noise, SGLANG[second:]):
        combined(metrics_ranks(text), 0.0)
        combined(loads_ranks(text), 0.0)


@given(st.integers(0, len(VLLM)))
def test_a_text_cut_anywhere_never_tells_more_than_the_whole(cut: int) -> None:
    whole, part = report(metrics_ranks(VLLM)), combined(metrics_ranks(VLLM[:cut]), 7.0)
    assert part is None or part.running <= whole.running
