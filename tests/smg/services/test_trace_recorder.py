"""The recorded trace: what was answered, in hashes and lengths, and the simulation reads it back."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random
from typing import Any

import pytest
import trio

from smg.api.call import Call
from smg.api.endpoints import CHAT, COMPLETIONS
from smg.errors import SettingsError
from smg.fleet.block_hashes import BlockHasher, BlockSettings
from smg.fleet.worker import Worker
from smg.lab import trace
from smg.lab.simulate import SimulateSettings, run
from smg.lab.world import WorldSettings
from smg.policies.manual import Manual
from smg.policies.policy import Outcome
from smg.policies.round_robin import RoundRobin
from smg.services import trace_recorder
from smg.services.trace_recorder import Recorded, TraceRecorder
from smg.settings import Routing
from tests.smg.fleet.builders import workers_of
from tests.smg.services.fakes import FakeLog


def chat(text: str) -> Call:
    return Call(CHAT, "m", b"", {"messages": [{"role": "user", "content": text}]})


def ids(tokens: list[int]) -> Call:
    return Call(COMPLETIONS, "m", b"", {"prompt": tokens})


class Site:
    def __init__(self, path: Path, **settings: Any) -> None:
        self.log = FakeLog()
        self.hasher = BlockHasher(BlockSettings(cluster_seed=5, **settings))
        self.recorder = TraceRecorder(str(path), self.hasher, log=self.log)
        self.path = path

    async def write(self) -> list[dict[str, Any]]:
        async with trio.open_nursery() as nursery:
            await nursery.start(self.recorder.run)
            nursery.cancel_scope.cancel()
        return [json.loads(line) for line in self.path.read_text().splitlines()]


async def test_a_line_holds_times_lengths_and_hashes_and_no_text(tmp_path):
    site = Site(tmp_path / "t.jsonl")
    text = "a secret sentence " * 100
    call = chat(text)
    site.recorder.record(call, trio.current_time(), 0.25, 451, 16, 400)
    (line,) = await site.write()
    seed = site.hasher.seed("m")
    assert line["hash_ids"] == site.hasher.text_blocks(text, seed)
    assert {name: line[name] for name in line if name not in ("timestamp", "hash_ids")} == {
        "input_length": 451,
        "output_length": 16,
        "block_chars": 512,
        "model": "m",
        "cached_tokens": 400,
        "ttft_ms": 250.0,
    }
    assert abs(line["timestamp"] / 1_000 - site.path.stat().st_mtime) < 60
    assert "secret" not in site.path.read_text()


async def test_what_the_engine_did_not_tell_is_estimated_or_left_out(tmp_path):
    site = Site(tmp_path / "t.jsonl")
    site.recorder.record(chat("x" * 1000), 0.0, None, None, None, None)
    site.recorder.record(ids(list(range(300))), 0.0, None, None, None, None)
    text, tokens = await site.write()
    assert text["input_length"] == 250 and text["output_length"] is None
    assert "cached_tokens" not in text and "ttft_ms" not in text
    assert tokens["input_length"] == 300 and tokens["block_tokens"] == 128 and len(tokens["hash_ids"]) == 2


async def test_hashes_are_keyed_with_the_secret_of_the_node(tmp_path):
    lines = []
    for seed in (5, 6):
        hasher = BlockHasher(BlockSettings(cluster_seed=seed))
        recorder = TraceRecorder(str(tmp_path / f"{seed}"), hasher, log=FakeLog())
        recorder.record(chat("the same text " * 100), 0.0, None, None, None, None)
        site = Site(tmp_path / f"{seed}")
        site.recorder = recorder
        lines += await site.write()
    assert not set(lines[0]["hash_ids"]) & set(lines[1]["hash_ids"])


async def test_a_file_is_appended_to(tmp_path):
    for number in range(2):
        site = Site(tmp_path / "t.jsonl")
        site.recorder.record(chat(f"{number}"), 0.0, None, None, None, None)
        lines = await site.write()
    assert len(lines) == 2


async def test_what_the_disk_does_not_take_in_time_is_dropped_and_counted(tmp_path, monkeypatch):
    monkeypatch.setattr(trace_recorder, "QUEUE_LINES", 10)
    monkeypatch.setattr(trace_recorder, "WRITE_LINES", 3)
    site = Site(tmp_path / "t.jsonl")
    for number in range(25):
        site.recorder.record(chat(str(number)), 0.0, None, None, None, None)
    assert site.recorder.dropped == 15
    assert len(await site.write()) == site.recorder.written == 10


async def test_queued_hashes_are_bounded_too(tmp_path, monkeypatch):
    monkeypatch.setattr(trace_recorder, "QUEUE_BLOCKS", 100)
    site = Site(tmp_path / "t.jsonl")
    for _ in range(25):
        site.recorder.record(chat("x" * 512 * 10), 0.0, None, None, None, None)
    assert site.recorder.dropped == 15
    assert len(await site.write()) == 10


async def test_a_full_disk_is_told_once_and_the_file_stays_readable(tmp_path):
    site = Site(tmp_path / "t.jsonl")
    real = site.recorder._file

    class Full:
        def __init__(self) -> None:
            self.room = 40

        def write(self, data: Any) -> int:
            if not self.room:
                raise OSError(28, "No space left on device")
            written = real.write(bytes(data[: self.room]))
            self.room -= written
            return written

        def close(self) -> None:
            real.close()

    site.recorder._file = Full()  # type: ignore[assignment]
    async with trio.open_nursery() as nursery:
        await nursery.start(site.recorder.run)
        for number in range(3):
            site.recorder.record(chat(str(number)), 0.0, None, None, None, None)
            with trio.fail_after(5):
                while site.recorder._queue or site.recorder.dropped <= number:
                    await trio.sleep(0.001)
        site.recorder._file = real
        site.recorder.record(chat("last"), 0.0, None, 7, 8, None)
        with trio.fail_after(5):
            while site.recorder.written < 1:
                await trio.sleep(0.001)
        nursery.cancel_scope.cancel()
    assert site.recorder.dropped == 3
    assert len(site.log.lines) == 1
    found = trace.load(site.path)
    assert [(request.prompt_tokens, request.output_tokens) for request in found.requests] == [(7, 8)]
    assert found.skipped_lines == 1


async def test_a_recording_ends_before_it_fills_the_disk(tmp_path, monkeypatch):
    monkeypatch.setattr(trace_recorder, "FILE_BYTES_MAX", 300)
    monkeypatch.setattr(trace_recorder, "WRITE_LINES", 1)
    site = Site(tmp_path / "t.jsonl")
    for number in range(20):
        site.recorder.record(chat(str(number)), 0.0, None, None, None, None)
    await site.write()
    assert 300 <= site.path.stat().st_size < 500
    assert site.recorder.dropped + site.recorder.written == 20


async def test_a_path_that_cannot_be_written_is_a_mistake_of_the_settings(tmp_path):
    with pytest.raises(SettingsError, match="--record-trace") as caught:
        Site(tmp_path / "nowhere" / "t.jsonl")
    assert caught.value.is_combination


# -- the policy around it ----------------------------------------------------------------------


def finish(policy: Recorded, worker: Worker, status: int = 200, is_success: bool | None = True) -> None:
    call = chat("x")
    policy.placed(call, worker, 1.0)
    policy.finished(call, worker, Outcome(status, is_success, 0.1, 0.5, 10, None, 3), 1.5)


async def test_answers_are_recorded_once_and_failures_are_not(tmp_path):
    site = Site(tmp_path / "t.jsonl")
    worker = workers_of(1)[0]
    policy = Recorded(RoundRobin(Routing()), site.recorder)
    finish(policy, worker)
    finish(policy, worker, 500, False)
    finish(policy, worker, 400, True)
    finish(policy, worker, 200, None)
    finish(policy, workers_of(1, worker_type="prefill")[0])
    assert len(await site.write()) == 1


async def test_what_only_one_policy_has_is_still_there(tmp_path):
    policy = Recorded(Manual(Routing()), Site(tmp_path / "t.jsonl").recorder)
    assert policy.entries == 0
    assert dict(policy.branches) is not None
    with pytest.raises(AttributeError):
        _ = policy.colour


# -- the round trip ----------------------------------------------------------------------------


async def test_the_simulation_reads_what_was_recorded(tmp_path):
    site = Site(tmp_path / "own.jsonl")
    rng = Random(3)
    texts = ["".join(rng.choice("abcdefgh ") for _ in range(512 * 6)) for _ in range(8)]
    sent = []
    for number in range(200):
        text = rng.choice(texts) + f"{number:04d}" * rng.randrange(1, 600)
        sent.append((number * 0.5, text))
        site.recorder.record(chat(text), number * 0.5, 0.2, max(1, len(text) // 4), 20, None)
    await site.write()
    found = trace.load(site.path)
    assert found.skipped_lines == 0 and len(found.requests) == 200
    assert found.block_tokens == pytest.approx(128, abs=4)
    assert [request.at_s for request in found.requests] == pytest.approx([at for at, _ in sent], abs=1e-3)
    for request, (_, text) in zip(found.requests, sent, strict=True):
        assert request.prompt_tokens == len(text) // 4
        assert len(request.blocks) in (len(text) // 512 - 1, len(text) // 512)
    firsts = {request.blocks[:6] for request in found.requests}
    assert len(firsts) == 8  # equal prefixes are equal hashes
    settings = SimulateSettings(policies=("cache_aware", "round_robin"), world=WorldSettings(workers=4))
    rows = {row.policy: row.measured for row in run(found, settings).rows}
    assert rows["cache_aware"].hit_ratio >= rows["round_robin"].hit_ratio > 0.1


async def test_prompts_of_token_ids_and_of_text_may_be_mixed(tmp_path):
    site = Site(tmp_path / "own.jsonl")
    site.recorder.record(ids(list(range(1000))), 0.0, None, 1000, 5, None)
    site.recorder.record(chat("word " * 1000), 1.0, None, 1100, 5, None)
    await site.write()
    found = trace.load(site.path)
    assert found.block_tokens == 128
    assert [len(request.blocks) for request in found.requests] == [7, 8]
