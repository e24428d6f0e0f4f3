"""Hot reload: all or nothing, told in the log, and a mistake leaves what was there."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio

from smg.errors import SettingsError
from smg.services.reload import Change, Part, Reload


class Log:
    def __init__(self) -> None:
        self.lines: list[str] = []

    def info(self, message: str, /, **fields: object) -> None:
        self.lines.append(" ".join(["info", message, *map(str, fields.values())]))

    def error(self, message: str, /, **fields: object) -> None:
        self.lines.append(" ".join(["error", message, *map(str, fields.values())]))


class Word:
    """A part whose value is the word in a file; the word `wrong` cannot be used."""

    def __init__(self, path: Path, word: str) -> None:
        self.path = path
        self.write(word)
        self.value = word
        self.prepared = 0

    def write(self, word: str) -> None:
        fresh = self.path.with_suffix(".new")
        fresh.write_text(word)
        os.replace(fresh, self.path)

    def part(self, *, is_watched: bool = True) -> Part:
        return Part(self.path.name, (str(self.path),) if is_watched else (), self.prepare)

    def prepare(self) -> Change | None:
        self.prepared += 1
        word = self.path.read_text()
        if word == "wrong":
            raise SettingsError("--word", repr(str(self.path)), "is wrong")
        if word == self.value:
            return None

        def apply() -> None:
            self.value = word

        return Change((f"{self.value} became {word}",), apply)


@asynccontextmanager
async def running(*parts: Part, interval_s: float = 0.01) -> AsyncIterator[tuple[Reload, Log]]:
    log = Log()
    reload = Reload(log=log, interval_s=interval_s)
    for part in parts:
        reload.add(part)
    async with trio.open_nursery() as nursery:
        await nursery.start(reload.run)
        yield reload, log
        nursery.cancel_scope.cancel()


async def until(log: Log, words: str, count: int = 1) -> None:
    with trio.fail_after(5):
        while sum(words in line for line in log.lines) < count:
            await trio.sleep(0.002)


@pytest.fixture
def one(tmp_path: Path) -> Word:
    return Word(tmp_path / "one", "first")


@pytest.fixture
def two(tmp_path: Path) -> Word:
    return Word(tmp_path / "two", "first")


async def test_a_changed_file_is_read_and_an_unchanged_one_is_not(one: Word, two: Word) -> None:
    async with running(one.part(), two.part()) as (_, log):
        one.write("second")
        await until(log, "info reloaded one first became second")
        assert (one.value, two.value) == ("second", "first")
        before = two.prepared
        one.write("third")
        await until(log, "second became third")
        assert two.prepared == before <= 1


async def test_what_changed_before_the_first_look_is_found(one: Word) -> None:
    one.write("second")
    async with running(one.part()) as (_, log):
        await until(log, "first became second")


async def test_a_mistake_is_said_once_and_the_old_value_stands(one: Word) -> None:
    async with running(one.part()) as (_, log):
        one.write("wrong")
        await until(log, "error not reloaded, what was loaded before stands one --word")
        for _ in range(3):
            one.write("wrong")
            await trio.sleep(0.03)
        assert one.value == "first" and len(log.lines) == 1
        one.write("first")
        await until(log, "info can be loaded again one")
        one.write("second")
        await until(log, "first became second")


async def test_a_file_that_goes_away_is_a_mistake_and_no_end(one: Word) -> None:
    async with running(one.part()) as (_, log):
        await until_prepared(one)
        one.path.unlink()
        await until(log, "error not reloaded")
        one.write("second")
        await until(log, "first became second")


async def until_prepared(word: Word) -> None:
    with trio.fail_after(5):
        while not word.prepared:
            await trio.sleep(0.002)


async def test_on_request_all_is_validated_before_anything_is_swapped(one: Word, two: Word) -> None:
    for order in ((one, two), (two, one)):
        async with running(*(word.part(is_watched=False) for word in order), interval_s=1000) as (
            reload,
            log,
        ):
            one.write("second")
            two.write("wrong")
            reload.ask()
            await until(log, "error not reloaded")
            assert (one.value, two.value) == ("first", "first")
            reload.ask()
            await until(log, "error not reloaded", 2)
    async with running(one.part(is_watched=False), two.part(is_watched=False), interval_s=1000) as (
        reload,
        log,
    ):
        two.write("third")
        reload.ask()
        await until(log, "first became third")
        assert (one.value, two.value) == ("second", "third")


async def test_a_request_that_finds_nothing_says_so(one: Word) -> None:
    async with running(one.part(), interval_s=1000) as (reload, log):
        await until_prepared(one)
        reload.ask()
        await until(log, "info nothing has changed")
    async with running(interval_s=1000) as (reload, log):
        reload.ask()
        await until(log, "info nothing has changed")


async def test_a_link_that_is_swapped_is_a_change(tmp_path: Path) -> None:
    """How mounted secrets change: the file is a link into a folder, and the folder's link is replaced."""
    for version in ("v1", "v2"):
        (tmp_path / version).mkdir()
        (tmp_path / version / "word").write_text("first" if version == "v1" else "second")
    (tmp_path / "now").symlink_to("v1")
    word = Word(tmp_path / "unused", "first")
    word.path = tmp_path / "now" / "word"
    async with running(word.part()) as (_, log):
        await until_prepared(word)
        (tmp_path / "next").symlink_to("v2")
        os.replace(tmp_path / "next", tmp_path / "now")
        await until(log, "first became second")
