"""Log lines: one sink for the process, one cheap `Logger` per target (LOG-1).

This room owns stderr, the file under `--log-dir` and the records of every library that uses `logging`. A line is
event words plus fields. It must never wait for a slow reader on the loop, never let a value start a line of its
own, and never show a key, a prompt or an answer.

While `Log.run` is a task of the loop, that task writes what one turn of the loop has gathered; before and after, a
line is written at once (`log_output.py` says how).
"""

from __future__ import annotations

import json
import logging
import math
import os
import re
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from functools import lru_cache
from pathlib import Path

import trio

from smg.errors import SettingsError
from smg.telemetry.log_output import DailyFile, Output

DEBUG, INFO, WARN, ERROR = 10, 20, 30, 40

LEVELS: dict[str, int] = {"debug": DEBUG, "info": INFO, "warn": WARN, "error": ERROR}
"""The values of `--log-level`."""

STALL_RETRY_S = 0.05
"""Between two looks at a reader that takes nothing."""

LAST_FLUSH_S = 0.5
"""How long the lines before and after the loop may wait for a slow reader."""

REDACTED = "[redacted]"

_NAMES = {DEBUG: "DEBUG", INFO: "INFO", WARN: "WARN", ERROR: "ERROR"}
_COLOURS = {DEBUG: "\x1b[2m", INFO: "\x1b[32m", WARN: "\x1b[33m", ERROR: "\x1b[31m"}
_RESERVED = frozenset({"timestamp", "level", "target", "message", "process", "traceback"})

# Control characters, line separators of Unicode, marks that reorder text, halves of surrogate pairs.
_UNSAFE = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
_NEEDS_QUOTES = re.compile(r'[\s"=\\]|^$')
_SECRET = re.compile(
    r"(^|_)(key|keys|authorization|cookie|password|passwd|secret|secrets|token|credential|credentials"
    r"|prompt|messages|body|input|output|text|content|answer)$"
)


@lru_cache(maxsize=1024)
def is_secret(name: str) -> bool:
    """Whether a field of this name may hold a key, a prompt or an answer; such a field is written as `[redacted]`.

    Field names are literals of the code, so the cache stays small.
    """
    return _SECRET.search(name.lower()) is not None


class Logger:
    """The log of one target. A level that is off costs a call and a comparison: nothing is formatted or kept."""

    __slots__ = ("_log", "target")

    def __init__(self, log: Log, target: str) -> None:
        self._log = log
        self.target = target

    @property
    def is_debug(self) -> bool:
        """For callers that would compute a field only for a debug line."""
        return self._log.threshold <= DEBUG

    def debug(self, message: str, /, **fields: object) -> None:
        """For those who look for a fault in smg."""
        if self._log.threshold <= DEBUG:
            self._log.write(DEBUG, self.target, message, fields)

    def info(self, message: str, /, **fields: object) -> None:
        """What an operator wants to know about a healthy node."""
        if self._log.threshold <= INFO:
            self._log.write(INFO, self.target, message, fields)

    def always(self, message: str, /, **fields: object) -> None:
        """A line that no level keeps back: an audit with holes is none (SEC-8)."""
        self._log.write(INFO, self.target, message, fields)

    def warn(self, message: str, /, **fields: object) -> None:
        """Something is wrong and smg goes on."""
        if self._log.threshold <= WARN:
            self._log.write(WARN, self.target, message, fields)

    def error(self, message: str, /, **fields: object) -> None:
        """Something failed that nobody retries."""
        self._log.write(ERROR, self.target, message, fields)

    def exception(self, message: str, /, *, error: BaseException, **fields: object) -> None:
        """A bug: the error with its traceback."""
        self._log.write(ERROR, self.target, message, fields, error)


class Log:
    """The sink. Lines may come from any thread; `run` belongs to the loop, the rest to whoever composes the node."""

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        self.threshold = INFO
        self._clock = clock
        self._is_json = False
        self._process = ""
        self._is_coloured = False
        self._stderr: Output | None = Output(2)
        self._file: DailyFile | None = None
        self._library = _LibraryHandler(self)
        self._second = (-1, "")
        # Set while `run` is a task of the loop.
        self._wake: trio.Event | None = None
        self._token: trio.lowlevel.TrioToken | None = None
        self._loop_thread = 0

    def configure(
        self,
        level: str = "info",
        log_dir: str | None = None,
        is_json: bool = False,
        stderr: int | None = 2,
        process: str = "",
    ) -> None:
        """Take the settings, and the records of other libraries' loggers.

        `stderr` is a file descriptor, None for no output but the file. `process` stands in every line when several
        processes write to one place. Raises SettingsError when `log_dir` cannot be written or the level is unknown.
        """
        if level not in LEVELS:
            raise SettingsError("--log-level", level, f"not one of {', '.join(LEVELS)}")
        self.close()
        self.threshold = LEVELS[level]
        self._is_json = is_json
        self._process = process
        self._stderr = None if stderr is None else Output(stderr)
        # LOG-1 ties colour to stdout; a redirected stderr gets none either.
        self._is_coloured = (
            not is_json
            and stderr is not None
            and os.isatty(stderr)
            and bool(sys.stdout)
            and sys.stdout.isatty()
        )
        if log_dir is not None:
            try:
                self._file = DailyFile(Path(log_dir), self._clock())
            except OSError as error:
                raise SettingsError(
                    "--log-dir", log_dir, str(error.strerror or error), is_combination=True
                ) from error
        # Libraries chatter at INFO (one line per request of an HTTP client), so they speak from WARNING on.
        logging.root.setLevel(
            logging.INFO if self.threshold <= DEBUG else max(logging.WARNING, self.threshold)
        )
        logging.root.addHandler(self._library)

    def logger(self, target: str) -> Logger:
        """A logger for one room, such as `smg.fleet`. Keep it; making one per line would be waste."""
        return Logger(self, target)

    def write(
        self,
        level: int,
        target: str,
        message: str,
        fields: Mapping[str, object],
        error: BaseException | None = None,
    ) -> None:
        """Format a line and hand it to the outputs; never waits while `run` is a task of the loop."""
        now = self._clock()
        stamp = self._stamp(now)
        if self._is_json:
            line = plain = _json_line(stamp, level, target, message, fields, error, self._process)
        else:
            name = f"{_NAMES[level]:5}"
            rest = _human_rest(target, message, fields, error)
            if self._process:
                rest = f"[{_safe(self._process)}] {rest}"
            line = plain = f"{stamp} {name} {rest}\n"
            if self._is_coloured:
                line = f"{stamp} {_COLOURS[level]}{name}\x1b[0m {rest}\n"
        if self._stderr is not None:
            self._stderr.append(line)
        if self._file is not None:
            self._file.turn_day(now)
            self._file.append(plain)
        self._schedule_flush()

    async def run(self) -> None:
        """Write what is logged until cancelled; start it once, before the first request."""
        assert self._wake is None, "the log has one writer"
        self._wake = trio.Event()
        self._token = trio.lowlevel.current_trio_token()
        self._loop_thread = threading.get_ident()
        try:
            while True:
                while not self._flush(0.0):
                    await trio.sleep(STALL_RETRY_S)
                await self._wake.wait()
                self._wake = trio.Event()
        finally:
            self._wake = None
            self._flush(LAST_FLUSH_S)

    def close(self) -> None:
        """Write what is left (waiting at most half a second), close the file and leave the libraries' loggers."""
        self._flush(LAST_FLUSH_S)
        logging.root.removeHandler(self._library)
        if self._file is not None:
            self._file.close()
            self._file = None

    # -- private

    def _schedule_flush(self) -> None:
        wake = self._wake
        if wake is None:
            self._flush(LAST_FLUSH_S)
        elif threading.get_ident() == self._loop_thread:
            wake.set()
        else:
            assert self._token is not None
            try:
                self._token.run_sync_soon(self._set_wake, idempotent=True)
            except trio.RunFinishedError:
                self._flush(LAST_FLUSH_S)

    def _set_wake(self) -> None:
        if self._wake is not None:
            self._wake.set()

    def _flush(self, wait_s: float) -> bool:
        is_done = self._stderr is None or self._stderr.flush(wait_s)
        if self._file is not None:
            is_done = self._file.flush(wait_s) and is_done
        return is_done

    def _stamp(self, now: float) -> str:
        second, text = self._second
        if second != int(now):
            second = int(now)
            text = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(second))
            self._second = (second, text)  # One store: threads may log too.
        return f"{text}.{int((now - second) * 1000):03}Z"


class _LibraryHandler(logging.Handler):
    """Records of libraries that use `logging` go to the same sink, under their logger's name."""

    def __init__(self, log: Log) -> None:
        super().__init__()
        self._log = log

    def emit(self, record: logging.LogRecord) -> None:
        level = min(max(record.levelno // 10 * 10, DEBUG), ERROR)
        if level < self._log.threshold:
            return
        try:
            message = record.getMessage()
        except (TypeError, ValueError, KeyError):
            message = str(record.msg)  # Wrong arguments in a library must not cost its line.
        error = record.exc_info[1] if record.exc_info else None
        self._log.write(level, record.name, message, {}, error)


_ENCODE = json.JSONEncoder(ensure_ascii=True, separators=(",", ":")).encode


def _json_line(
    stamp: str,
    level: int,
    target: str,
    message: str,
    fields: Mapping[str, object],
    error: BaseException | None,
    process: str,
) -> str:
    line: dict[str, object] = {
        "timestamp": stamp,
        "level": _NAMES[level],
        "target": target,
        "message": message,
    }
    if process:
        line["process"] = process
    for name, value in fields.items():
        line[f"{name}_" if name in _RESERVED else name] = _plain(name, value)
    if error is not None:
        line["traceback"] = "".join(traceback.format_exception(error))
    return _ENCODE(line) + "\n"


def _human_rest(target: str, message: str, fields: Mapping[str, object], error: BaseException | None) -> str:
    words = [_safe(target), _safe(message)]
    for name, value in fields.items():
        if name != "request_id":
            words.append(f"{name}={_quoted(_plain(name, value))}")
    if "request_id" in fields:
        words.append(f"request_id={_quoted(_plain('request_id', fields['request_id']))}")
    text = " ".join(words)
    if error is not None:
        # Each line of a traceback is marked, so that an error's text cannot pass for a line of the log.
        lines = "".join(traceback.format_exception(error)).splitlines()
        text += "".join([f"\n    | {_safe(line)}" for line in lines])
    return text


def _plain(name: str, value: object) -> object:
    """The value as JSON knows it."""
    if is_secret(name) and value is not None:
        return REDACTED
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if value is None or isinstance(value, (str, int)):
        return value
    if isinstance(value, bytes):
        return value.decode("latin-1")
    if isinstance(value, BaseException):
        return f"{type(value).__name__}: {value}"
    return str(value)


def _quoted(value: object) -> str:
    if not isinstance(value, str):
        return "none" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
    if _NEEDS_QUOTES.search(value):
        value = json.dumps(value, ensure_ascii=False)
    return _safe(value)


def _safe(text: str) -> str:
    return _UNSAFE.sub(lambda match: f"\\u{ord(match[0]):04x}", text)


_process = Log()


def configure(
    level: str = "info",
    log_dir: str | None = None,
    is_json: bool = False,
    stderr: int | None = 2,
    process: str = "",
) -> Log:
    """Configure the log of this process and return it, for `run` and `close`. Raises like `Log.configure`."""
    _process.configure(level, log_dir, is_json, stderr, process)
    return _process


def logger(target: str) -> Logger:
    """A logger of this process's log; may be made at import time, before `configure`.

    The process has one stderr, so it has one log: the house's law against globals bends here as `logging` does.
    """
    return Logger(_process, target)
