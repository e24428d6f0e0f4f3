"""The log: its two forms, what may not enter it, and readers that do not read."""

from __future__ import annotations

import ast
import json
import logging
import os
import pty
import re
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio
import trio.testing
from hypothesis import given
from hypothesis import strategies as st

from smg.errors import SettingsError
from smg.telemetry import log as log_room
from smg.telemetry.log import REDACTED, Log, is_secret
from smg.telemetry.log_output import BUFFER_BYTES_MAX, FILES_KEPT

NOW_S = 1_764_024_394.25  # 2025-11-24T22:46:34.250Z
SMG = Path(log_room.__file__).parents[1]


class Pipe:
    """A log whose stderr is a pipe that the test reads, or does not."""

    def __init__(self) -> None:
        self.reader, self.writer = os.pipe()
        self.now = NOW_S
        self.log = Log(clock=lambda: self.now)

    def read(self) -> str:
        """What has been written so far."""
        os.set_blocking(self.reader, False)
        parts = []
        while True:
            try:
                part = os.read(self.reader, 1 << 20)
            except BlockingIOError:
                break
            if not part:
                break
            parts.append(part)
        return b"".join(parts).decode()


@pytest.fixture
def pipe() -> Iterator[Pipe]:
    pipe = Pipe()
    level = logging.root.level
    yield pipe
    pipe.log.close()
    logging.root.setLevel(level)
    os.close(pipe.writer)
    os.close(pipe.reader)


def human(pipe: Pipe, level: str = "info") -> log_room.Logger:
    pipe.log.configure(level, stderr=pipe.writer)
    return pipe.log.logger("smg.fleet")


def as_json(pipe: Pipe, level: str = "info") -> log_room.Logger:
    pipe.log.configure(level, is_json=True, stderr=pipe.writer)
    return pipe.log.logger("smg.fleet")


# -- the two forms


def test_a_human_line_has_time_level_target_message_fields_and_at_last_the_request_id(pipe: Pipe) -> None:
    human(pipe).info(
        "worker added", request_id="req-1", worker="http://w:8000", load=0.5, is_new=True, note=None
    )
    assert pipe.read() == (
        "2025-11-24T22:46:34.250Z INFO  smg.fleet worker added"
        " worker=http://w:8000 load=0.5 is_new=true note=none request_id=req-1\n"
    )


def test_a_json_line_is_one_object_with_the_words_of_the_contract(pipe: Pipe) -> None:
    as_json(pipe).warn(
        "worker lost", request_id="req-1", attempts=3, level="odd", error=ValueError("no\nway")
    )
    text = pipe.read()
    assert text.count("\n") == 1
    assert json.loads(text) == {
        "timestamp": "2025-11-24T22:46:34.250Z",
        "level": "WARN",
        "target": "smg.fleet",
        "message": "worker lost",
        "request_id": "req-1",
        "attempts": 3,
        "level_": "odd",
        "error": "ValueError: no\nway",
    }


def test_the_second_of_the_time_stamp_follows_the_clock(pipe: Pipe) -> None:
    logger = human(pipe)
    logger.info("one")
    pipe.now += 1.5
    logger.info("two")
    assert [line.split()[0] for line in pipe.read().splitlines()] == [
        "2025-11-24T22:46:34.250Z",
        "2025-11-24T22:46:35.750Z",
    ]


def test_no_colour_codes_reach_a_pipe(pipe: Pipe) -> None:
    human(pipe).error("bad")
    assert "\x1b" not in pipe.read()


@pytest.mark.parametrize("stdout_is_terminal", [True, False])
def test_a_terminal_gets_colours_only_if_stdout_is_one_too(
    stdout_is_terminal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    master, slave = pty.openpty()
    monkeypatch.setattr("sys.stdout.isatty", lambda: stdout_is_terminal, raising=False)
    log = Log()
    log.configure(stderr=slave)
    log.logger("smg").error("bad")
    text = os.read(master, 4096).decode()
    log.close()
    os.close(slave)
    os.close(master)
    assert "bad" in text
    assert ("\x1b[31mERROR" in text) is stdout_is_terminal


# -- levels


class Loud:
    """A value that tells when it is formatted."""

    def __init__(self) -> None:
        self.count = 0

    def __str__(self) -> str:
        self.count += 1
        return "loud"


def test_a_level_that_is_off_formats_nothing(pipe: Pipe) -> None:
    loud = Loud()
    logger = human(pipe, "error")
    logger.debug("x", value=loud)
    logger.info("x", value=loud)
    logger.warn("x", value=loud)
    assert loud.count == 0
    assert pipe.read() == ""
    logger.error("x", value=loud)
    assert loud.count == 1
    assert not logger.is_debug


def test_each_level_lets_itself_and_the_worse_ones_through(pipe: Pipe) -> None:
    seen = {}
    for level in ("debug", "info", "warn", "error"):
        logger = human(pipe, level)
        assert logger.is_debug is (level == "debug")
        logger.debug("x")
        logger.info("x")
        logger.warn("x")
        logger.error("x")
        seen[level] = len(pipe.read().splitlines())
    assert seen == {"debug": 4, "info": 3, "warn": 2, "error": 1}


def test_an_unknown_level_is_refused(pipe: Pipe) -> None:
    with pytest.raises(SettingsError, match="--log-level: loud"):
        pipe.log.configure("loud")


# -- what may not enter


HOSTILE = "x\r\n2025-11-24T22:46:34.250Z ERROR smg forged\x1b[2J\x85\u2028\u202e\ud800\0"


@pytest.mark.parametrize("form", [human, as_json])
def test_a_value_cannot_start_a_line_or_move_the_cursor(form: object, pipe: Pipe) -> None:
    logger = form(pipe)  # type: ignore[operator]
    logger.info("event " + HOSTILE, value=HOSTILE, request_id=HOSTILE, raw=HOSTILE.encode("utf-8", "replace"))
    logger.exception("event", error=RuntimeError(HOSTILE))
    text = pipe.read()
    assert "\x1b" not in text and "\r" not in text and "\u2028" not in text and "\x85" not in text
    stamped = [line for line in text.split("\n") if line.startswith(("2025", "{"))]
    assert len(stamped) == 2
    for line in text.rstrip("\n").split("\n"):
        assert line.startswith(("2025", "{", "    | "))


@given(st.text(), st.text())
def test_any_text_stays_on_its_json_line_and_is_read_back(message: str, value: str) -> None:
    pipe = Pipe()
    as_json(pipe).info(message, value=value)
    text = pipe.read()
    assert text.count("\n") == 1 and text.isascii()
    record = json.loads(text)
    assert record["message"] == message
    assert record["value"] == value
    pipe.log.close()
    os.close(pipe.reader)
    os.close(pipe.writer)


def test_a_value_with_spaces_or_an_equals_sign_cannot_pass_for_another_field(pipe: Pipe) -> None:
    human(pipe).info("event", value='a request_id=forged "q"', empty="")
    assert pipe.read().endswith('event value="a request_id=forged \\"q\\"" empty=""\n')


def test_numbers_json_does_not_know_are_written_as_text(pipe: Pipe) -> None:
    as_json(pipe).info("event", a=float("inf"), b=float("nan"), c=2**70)

    def refuse(word: str) -> None:
        raise AssertionError(word)

    record = json.loads(pipe.read(), parse_constant=refuse)
    assert (record["a"], record["b"], record["c"]) == ("inf", "nan", 2**70)


SECRETS = [
    "key",
    "api_key",
    "worker_api_key",
    "authorization",
    "Authorization",
    "prompt",
    "messages",
    "token",
    "cookie",
    "client_secret",
    "password",
    "body",
    "answer",
]


@pytest.mark.parametrize("name", SECRETS)
@pytest.mark.parametrize("form", [human, as_json])
def test_fields_that_may_hold_a_secret_are_redacted(form: object, name: str, pipe: Pipe) -> None:
    form(pipe).info("event", **{name: "sk-very-secret"})  # type: ignore[operator]
    text = pipe.read()
    assert "sk-very-secret" not in text
    assert REDACTED in text


@pytest.mark.parametrize("name", ["tokens", "input_tokens", "keys_count", "worker", "message_id", "monkey"])
def test_harmless_names_are_not_taken_for_secrets(name: str) -> None:
    assert not is_secret(name)


def secrets_logged(source: str) -> list[str]:
    """Log calls that name a field which may hold a secret."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
            continue
        is_log = re.search(r"log(ger)?$", ast.unparse(node.func.value))
        if is_log and node.func.attr in {"debug", "info", "warn", "error", "exception"}:
            names = [keyword.arg for keyword in node.keywords if keyword.arg is not None]
            found += [f"line {node.lineno}: {name}" for name in names if is_secret(name)]
    return found


def test_a_log_call_that_names_a_secret_is_found() -> None:
    assert secrets_logged(
        "self._log.info('x', worker=1, api_key=k)\nlogger.warn('y', prompt=p)\nf(key=1)"
    ) == [
        "line 1: api_key",
        "line 2: prompt",
    ]


def test_no_log_call_in_the_source_names_a_secret() -> None:
    """Redaction is the second net; the first is that nobody tries."""
    for path in [*SMG.rglob("*.py"), *(SMG.parent / "mesh").rglob("*.py")]:
        assert secrets_logged(path.read_text()) == [], path


# -- libraries


def test_records_of_libraries_go_to_the_same_sink(pipe: Pipe) -> None:
    as_json(pipe)
    logging.getLogger("httpx").warning("slow %s", "thing\nnext")
    logging.getLogger("httpx").info("one line per request")
    try:
        raise KeyError("k")
    except KeyError:
        logging.getLogger("lib").exception("failed")
    [handler] = [h for h in logging.root.handlers if type(h).__module__ == log_room.__name__]
    handler.emit(logging.LogRecord("lib", logging.CRITICAL, "f.py", 1, "wrong %d arguments", ("x",), None))
    lines = [json.loads(line) for line in pipe.read().splitlines()]
    assert [(line["target"], line["level"], line["message"]) for line in lines] == [
        ("httpx", "WARN", "slow thing\nnext"),
        ("lib", "ERROR", "failed"),
        ("lib", "ERROR", "wrong %d arguments"),
    ]
    assert "KeyError: 'k'" in lines[1]["traceback"]


def test_a_closed_log_leaves_the_loggers_of_libraries(pipe: Pipe) -> None:
    human(pipe)
    pipe.log.configure("info", stderr=pipe.writer)  # twice must not mean twice each line
    logging.getLogger("lib").error("once")
    assert pipe.read().count("once") == 1
    pipe.log.close()
    assert not any(type(handler).__module__ == log_room.__name__ for handler in logging.root.handlers)


# -- readers that do not read


async def test_the_loop_goes_on_while_nobody_reads_and_the_lost_lines_are_counted(
    pipe: Pipe, autojump_clock: trio.testing.MockClock
) -> None:
    logger = human(pipe)
    line = "y" * 1000
    async with trio.open_nursery() as nursery:
        nursery.start_soon(pipe.log.run)
        await trio.testing.wait_all_tasks_blocked()
        written = 0
        for _ in range(3):  # three buffers' worth; a blocking write would never come back
            for _ in range(BUFFER_BYTES_MAX // 1000):
                logger.info(line)
                written += 1
            await trio.sleep(1)
        text = ""
        for _ in range(1000):
            text += pipe.read()
            await trio.sleep(0.05)
            if "were lost" in text:
                break
        nursery.cancel_scope.cancel()
    arrived = text.count("INFO")
    lost = int(re.search(r"(\d+) log lines were lost", text)[1])  # type: ignore[index]
    assert lost > 0
    assert arrived + lost == written
    assert len(text) <= 2 * BUFFER_BYTES_MAX


async def test_lines_of_one_turn_of_the_loop_are_written_together_and_in_order(pipe: Pipe) -> None:
    logger = human(pipe)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(pipe.log.run)
        await trio.testing.wait_all_tasks_blocked()
        for number in range(100):
            logger.info(f"event {number}")
        assert pipe.read() == ""  # nothing is written before the turn is over
        await trio.testing.wait_all_tasks_blocked()
        lines = pipe.read().splitlines()
        assert [line.split()[-1] for line in lines] == [str(number) for number in range(100)]
        nursery.cancel_scope.cancel()


async def test_what_is_logged_while_the_loop_ends_is_not_lost(pipe: Pipe) -> None:
    logger = human(pipe)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(pipe.log.run)
        await trio.testing.wait_all_tasks_blocked()
        logger.info("last words")
        nursery.cancel_scope.cancel()
    assert "last words" in pipe.read()
    logger.info("and after")
    assert "and after" in pipe.read()


async def test_a_thread_may_log(pipe: Pipe) -> None:
    logger = human(pipe)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(pipe.log.run)
        await trio.testing.wait_all_tasks_blocked()
        await trio.to_thread.run_sync(lambda: logger.info("from a thread"))
        await trio.testing.wait_all_tasks_blocked()
        assert "from a thread" in pipe.read()
        nursery.cancel_scope.cancel()


def test_lines_of_many_threads_are_whole_and_none_is_missing(pipe: Pipe, tmp_path: Path) -> None:
    pipe.log.configure("info", log_dir=str(tmp_path), stderr=None)
    logger = pipe.log.logger("smg")

    def work(number: int) -> None:
        for _ in range(200):
            logger.info("event", value=f"{number}" * 50)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    pipe.log.close()
    lines = (tmp_path / "smg.log").read_text().splitlines()
    assert len(lines) == 800
    assert all(re.fullmatch(r"\S+Z INFO  smg event value=(\d)\1{49}", line) for line in lines)


def test_a_reader_that_left_costs_its_lines_and_nothing_else() -> None:
    reader, writer = os.pipe()
    log = Log()
    log.configure(stderr=writer)
    os.close(reader)
    log.logger("smg").error("to nobody")
    log.logger("smg").error("to nobody")
    log.close()
    os.close(writer)


# -- the file


def test_the_file_gets_the_same_lines_without_colour(pipe: Pipe, tmp_path: Path) -> None:
    pipe.log.configure("info", log_dir=str(tmp_path / "new" / "dir"), stderr=pipe.writer)
    pipe.log.logger("smg").info("hello")
    pipe.log.close()
    assert (tmp_path / "new" / "dir" / "smg.log").read_text() == pipe.read()


def test_a_new_day_starts_a_new_file_and_only_a_bounded_number_is_kept(pipe: Pipe, tmp_path: Path) -> None:
    pipe.log.configure("info", log_dir=str(tmp_path), stderr=None)
    logger = pipe.log.logger("smg")
    (tmp_path / "smg.log.notes").write_text("not ours")
    for day in range(FILES_KEPT + 6):
        pipe.now = NOW_S + day * 86400
        logger.info(f"day {day}")
        logger.info(f"day {day} again")
    pipe.log.close()
    old = sorted(path.name for path in tmp_path.glob("smg.log.2*"))
    assert len(old) == FILES_KEPT
    assert old[-1] == "smg.log.2025-12-12"  # 24 November + 18 days
    assert (tmp_path / "smg.log").read_text().count(f"day {FILES_KEPT + 5}") == 2
    assert (tmp_path / old[-1]).read_text().count(f"day {FILES_KEPT + 4}") == 2
    assert (tmp_path / old[-1]).read_text().count("\n") == 2
    assert (tmp_path / "smg.log.notes").exists()


def test_a_file_of_an_earlier_day_is_put_aside_at_the_start(pipe: Pipe, tmp_path: Path) -> None:
    file = tmp_path / "smg.log"
    file.write_text("old\n")
    os.utime(file, (NOW_S - 3 * 86400, NOW_S - 3 * 86400))
    pipe.log.configure("info", log_dir=str(tmp_path), stderr=None)
    pipe.log.logger("smg").info("new")
    pipe.log.close()
    assert (tmp_path / "smg.log.2025-11-21").read_text() == "old\n"
    assert "old" not in file.read_text()


def test_a_file_of_today_is_continued(pipe: Pipe, tmp_path: Path) -> None:
    file = tmp_path / "smg.log"
    file.write_text("earlier\n")
    os.utime(file, (NOW_S - 60, NOW_S - 60))
    pipe.log.configure("info", log_dir=str(tmp_path), stderr=None)
    pipe.log.logger("smg").info("later")
    pipe.log.close()
    assert file.read_text().splitlines()[0] == "earlier"
    assert len(list(tmp_path.iterdir())) == 1


def test_a_directory_that_cannot_be_written_is_a_wrong_configuration(pipe: Pipe, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(SettingsError, match=r"--log-dir: .*file/logs"):
        pipe.log.configure("info", log_dir=str(tmp_path / "file" / "logs"))


# -- the process's own log


def test_a_logger_made_before_configure_follows_it(tmp_path: Path) -> None:
    logger = log_room.logger("smg.early")
    level = logging.root.level
    log = log_room.configure("warn", log_dir=str(tmp_path), is_json=True, stderr=None)
    try:
        logger.info("not this")
        logger.warn("this")
    finally:
        log.close()
        log_room.configure("info")
        log.close()
        logging.root.setLevel(level)
    assert [json.loads(line)["message"] for line in (tmp_path / "smg.log").read_text().splitlines()] == [
        "this"
    ]
