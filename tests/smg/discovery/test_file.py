"""Workers out of a file (WRK-18): format, reload, and what a broken file does not do."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing
from hypothesis import given
from hypothesis import strategies as st

from smg.discovery.file import FILE_BYTES_MAX, BrokenFile, File, parse
from smg.fleet.worker import WorkerSpec


def text(*workers: Any, version: Any = 1) -> bytes:
    return json.dumps({"version": version, "workers": list(workers)}).encode()


def test_a_file_lists_specifications() -> None:
    specs, remarks = parse(text({"url": "http://A:1/", "cost": 2}, {"url": "http://b:2", "model_id": "m"}))
    assert specs == (WorkerSpec("http://a:1", cost=2.0), WorkerSpec("http://b:2", model_id="m"))
    assert remarks == []


def test_an_empty_list_is_a_good_file() -> None:
    assert parse(text()) == ((), [])


def test_the_worker_key_of_the_gateway_goes_to_workers_without_their_own() -> None:
    specs, _ = parse(text({"url": "http://a"}, {"url": "http://b", "api_key": "own"}), "shared")
    assert [spec.api_key for spec in specs] == ["shared", "own"]


def test_members_that_nobody_reads_are_remarked() -> None:
    _, remarks = parse(text({"url": "http://a", "prioritty": 1}))
    assert remarks == ["workers[0].prioritty is not a member that smg reads"]


@pytest.mark.parametrize(
    ("content", "place"),
    [
        (b"", "is not JSON"),
        (b'{"version":1,"workers":[', "is not JSON"),
        (b"\xff", "is not JSON"),
        (b"[]", "must be an object"),
        (b'{"workers":[]}', "version must be 1"),
        (text(version=2), "version must be 1"),
        (text(version=True), "version must be 1"),
        (b'{"version":1}', "workers must be a list"),
        (text("http://a"), "workers[0]: a worker is a JSON object"),
        (text({"url": "http://a"}, {}), "workers[1].url: url is missing"),
        (
            text({"url": "http://a"}, {"url": "http://b", "cost": "x"}),
            "workers[1].cost: Expected `float`, got `str`",
        ),
        (
            text({"url": "http://a", "health": {"timeout_secs": []}}),
            "workers[0].health.timeout_secs: Expected",
        ),
        (text({"url": "http://a"}, {"url": "http://A/"}), "workers[1].url: http://a is named twice"),
    ],
)
def test_a_broken_file_names_the_place(content: bytes, place: str) -> None:
    with pytest.raises(BrokenFile) as caught:
        parse(content)
    assert place in str(caught.value)


@given(st.binary(max_size=60), st.integers(0, 80))
def test_any_bytes_are_a_list_or_a_broken_file(noise: bytes, cut: int) -> None:
    good = text({"url": "http://a", "labels": {"x": "y"}})
    for content in (noise, good[:cut] + noise, good[:cut] + noise + good[cut:]):
        try:
            parse(content)
        except BrokenFile:
            pass


class Board:
    """What a source under test reported and logged."""

    def __init__(self) -> None:
        self.reports: list[list[str]] = []
        self.lines: list[tuple[str, str]] = []

    def report(self, specs: tuple[WorkerSpec, ...]) -> None:
        self.reports.append([spec.url for spec in specs])

    def log(self, level: str, message: str) -> None:
        self.lines.append((level, message))


async def looks(clock: trio.testing.MockClock, times: int = 1) -> None:
    """Lets the source look again: its interval passes, and its thread comes to an end."""
    for _ in range(times):
        clock.jump(30)
        for _ in range(3):  # the sleeper wakes, its thread runs in real time, the answer is reported
            await trio.testing.wait_all_tasks_blocked(0.02)


def rewrite(path: Path, content: bytes) -> None:
    """Replaces the file as careful writers do, so that its identity changes however coarse the clock of the disk is."""
    fresh = path.with_name("fresh")
    fresh.write_bytes(content)
    os.replace(fresh, path)


@pytest.fixture
def board() -> Board:
    return Board()


async def test_a_change_is_reported_within_the_interval_and_an_unchanged_file_is_not(
    tmp_path: Path, nursery: trio.Nursery, mock_clock: trio.testing.MockClock, board: Board
) -> None:
    path = tmp_path / "workers.json"
    path.write_bytes(text({"url": "http://a"}))
    await nursery.start(File(str(path), 30, log=board.log).run, board.report)
    assert board.reports == [["http://a"]]
    await looks(mock_clock, 3)
    assert board.reports == [["http://a"]]
    rewrite(path, text({"url": "http://b"}, {"url": "http://a"}))
    await looks(mock_clock)
    assert board.reports == [["http://a"], ["http://b", "http://a"]]
    assert board.lines == []


async def test_a_broken_or_missing_file_keeps_the_last_state_and_is_logged_once(
    tmp_path: Path, nursery: trio.Nursery, mock_clock: trio.testing.MockClock, board: Board
) -> None:
    path = tmp_path / "workers.json"
    path.write_bytes(text({"url": "http://a"}))
    await nursery.start(File(str(path), 30, log=board.log).run, board.report)
    rewrite(path, b"{")
    await looks(mock_clock, 3)
    assert [level for level, _ in board.lines] == ["error"]
    assert "is not JSON" in board.lines[0][1]
    path.unlink()
    await looks(mock_clock, 2)
    assert [level for level, _ in board.lines] == ["error", "error"]
    assert board.reports == [["http://a"]]
    rewrite(path, text())
    await looks(mock_clock)
    assert board.reports == [["http://a"], []]
    assert board.lines[-1][0] == "info"


async def test_a_file_that_comes_later_is_waited_for(
    tmp_path: Path, nursery: trio.Nursery, mock_clock: trio.testing.MockClock, board: Board
) -> None:
    path = tmp_path / "workers.json"
    await nursery.start(File(str(path), 30, log=board.log).run, board.report)
    assert board.reports == []
    rewrite(path, text({"url": "http://a"}))
    await looks(mock_clock)
    assert board.reports == [["http://a"]]


async def test_a_file_without_end_is_not_read_to_its_end(
    tmp_path: Path, nursery: trio.Nursery, mock_clock: trio.testing.MockClock, board: Board
) -> None:
    path = tmp_path / "workers.json"
    with path.open("wb") as file:
        file.truncate(FILE_BYTES_MAX * 4)
    await nursery.start(File(str(path), 30, log=board.log).run, board.report)
    assert board.reports == []
    assert "larger than" in board.lines[0][1]
