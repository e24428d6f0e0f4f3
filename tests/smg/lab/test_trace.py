"""Traces: every documented format is read, text is never kept, and what is no request is passed over."""

from __future__ import annotations

import json

import pytest

from smg.lab.trace import TraceError, TraceRequest, load, parse, record_line


def mooncake(timestamp, length, output, ids):
    return json.dumps(
        {"timestamp": timestamp, "input_length": length, "output_length": output, "hash_ids": ids}
    )


def test_a_mooncake_trace_keeps_lengths_prefixes_and_order():
    trace = parse([mooncake(2500, 600, 7, [0, 9]), mooncake(1000, 1000, 5, [0, 4])], "t")
    assert trace.block_tokens == 512
    assert [request.at_s for request in trace.requests] == [0.0, 1.5]
    first, second = trace.requests
    assert (first.prompt_tokens, first.output_tokens) == (1000, 5)
    assert first.blocks[0] == second.blocks[0] != 0
    assert first.blocks[1] != second.blocks[1]


def test_stamps_on_a_grid_are_spread_over_their_cell_by_the_seed():
    lines = [mooncake(3000 * (number // 10), 100, 1, [number]) for number in range(100)]
    trace = parse(lines, "t", seed=1)
    stamps = [request.at_s for request in trace.requests]
    assert len(set(stamps)) == 100
    assert stamps == sorted(stamps)
    assert stamps[-1] <= 30.0
    assert parse(lines, "t", seed=1) == trace
    assert parse(lines, "t", seed=2) != trace


def test_exact_stamps_are_left_alone():
    trace = parse([mooncake(number * 17, 100, 1, [number]) for number in range(20)], "t")
    assert trace.requests[3].at_s == pytest.approx(0.051)


def test_scaling_changes_the_pace_and_nothing_else():
    trace = parse([mooncake(0, 100, 1, [1]), mooncake(10_000, 100, 1, [2])], "t")
    fast = trace.scaled(4.0)
    assert fast.duration_s == 2.5
    assert [request.blocks for request in fast.requests] == [request.blocks for request in trace.requests]


def test_our_own_record_comes_back_as_it_was_written():
    lines = [
        record_line(5.0, 700, 20, [2**63 + 1, 2**64 - 1], 128),
        record_line(6.5, 300, 10, [2**63 + 1], 128),
    ]
    trace = parse(lines, "own")
    assert trace.requests == (
        TraceRequest(0.0, 700, 20, (2**63 + 1, 2**64 - 1)),
        TraceRequest(1.5, 300, 10, (2**63 + 1,)),
    )
    assert trace.block_tokens == 128


def test_an_sglang_json_log_joins_arrival_and_end_of_a_request():
    text = "You are a helpful assistant. " * 60
    lines = [
        json.dumps(
            {
                "timestamp": "2026-01-02T03:04:05.000000",
                "event": "request.received",
                "rid": "a",
                "obj": {"text": text + "one", "sampling_params": {"max_new_tokens": 500}},
            }
        ),
        json.dumps(
            {
                "timestamp": "2026-01-02T03:04:06.000000",
                "event": "request.received",
                "rid": "b",
                "obj": {"text": text + "two", "sampling_params": {"max_new_tokens": 77}},
            }
        ),
        json.dumps(
            {
                "timestamp": "2026-01-02T03:04:09.000000",
                "event": "request.finished",
                "rid": "a",
                "obj": {"text": None},
                "out": {"meta_info": {"prompt_tokens": 432, "completion_tokens": 33}},
            }
        ),
        "INFO some other line",
    ]
    trace = parse(lines, "sglang")
    one, two = trace.requests
    assert (one.at_s, one.prompt_tokens, one.output_tokens) == (0.0, 432, 33)
    assert (two.at_s, two.output_tokens) == (1.0, 77)
    assert one.blocks == two.blocks[: len(one.blocks)]
    assert len(one.blocks) == 3
    assert trace.skipped_lines == 1


def test_a_vllm_log_gives_prompts_bounds_and_token_ids():
    prompt = "It's \\n a prompt " * 100
    lines = [
        "INFO 11-24 22:43:13 [logger.py:40] Received request chatcmpl-1: prompt: "
        f"{prompt!r}, params: SamplingParams(n=1, max_tokens=99, seed=None), prompt_token_ids: None, "
        "prompt_embeds shape: None, lora_request: None.",
        "INFO 11-24 22:43:14 [async_llm.py:270] Added request chatcmpl-1.",
        "(APIServer pid=7) INFO 11-24 22:43:15 [logger.py:40] Received request cmpl-2: prompt: None, "
        f"params: SamplingParams(max_tokens=5), prompt_token_ids: {list(range(300))}, lora_request: None.",
    ]
    trace = parse(lines, "vllm")
    first, second = trace.requests
    assert first.output_tokens == 99
    assert first.prompt_tokens == -(-len(prompt) // 4)
    assert second.at_s == 2.0
    assert (second.prompt_tokens, second.output_tokens, len(second.blocks)) == (300, 5, 2)
    assert trace.skipped_lines == 1


def test_any_json_log_with_a_time_and_a_prompt_will_do():
    lines = [
        json.dumps(
            {"time": 1700000000.5, "messages": [{"role": "user", "content": "x" * 2000}], "max_tokens": 9}
        ),
        json.dumps(
            {
                "timestamp": 1700000002500,
                "request": {"prompt": "x" * 2000},
                "usage": {"prompt_tokens": 800, "completion_tokens": 4},
            }
        ),
        json.dumps({"arrival_time": 1700000003, "input_ids": [1, 2, 3]}),
    ]
    one, two, three = parse(lines, "any").requests
    assert one.blocks == two.blocks
    assert (two.at_s, two.prompt_tokens, two.output_tokens) == (2.0, 800, 4)
    assert (three.prompt_tokens, three.blocks) == (3, ())


def test_a_file_without_a_request_says_so(tmp_path):
    path = tmp_path / "notes.txt"
    path.write_text("hello\n{}\n[1]\n{broken\n")
    with pytest.raises(TraceError, match="notes"):
        load(path)


def test_a_limit_reads_the_first_requests_only():
    lines = [mooncake(number * 100, 100, 1, [number]) for number in range(50)]
    assert len(parse(lines, "t", limit=7).requests) == 7
    assert len(parse(lines, "t").first(5).requests) == 5


def test_mixed_block_sizes_are_refused():
    with pytest.raises(TraceError, match="different sizes"):
        parse([mooncake(0, 100, 1, [1]), record_line(1.0, 10, 1, [5], 128)], "mixed")
