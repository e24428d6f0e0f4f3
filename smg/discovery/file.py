"""Workers out of a file: `{"version":1,"workers":[{"url":...,...}]}`, read again when it changes (WRK-18).

Owns the file's format and the rule that a broken file keeps the last good state. It looks at the file every
`--discovery-check-interval-secs`, reads it only when its identity, size or time changed, and complains once per
broken version. It must never write the file, and never empty the fleet because of a typing error.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from typing import Any

import msgspec
import trio

from smg.discovery.source import Report
from smg.errors import GatewayError, SmgError
from smg.fleet.worker import WorkerSpec
from smg.fleet.worker_spec import spec_of, unknown_members

FILE_BYTES_MAX = 16 * 1024 * 1024
"""Largest file that is read: some 50,000 workers; a path to something else must not fill the memory."""
WORKERS_MAX = 50_000
"""Most workers of one file, for the same reason."""
MESSAGE_CHARS_MAX = 300

Log = Callable[[str, str], None]
_Identity = tuple[int, int, int, int]


class BrokenFile(SmgError):
    """The file cannot be used; `str(error)` names the place in it. Nothing changed."""


def parse(text: bytes, default_api_key: str | None = None) -> tuple[tuple[WorkerSpec, ...], list[str]]:
    """The workers of a discovery file and remarks on members that nobody reads.

    `default_api_key` goes to workers without an `api_key` of their own (FLG-4). Raises `BrokenFile`.
    """
    try:
        document: Any = msgspec.json.decode(text)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise BrokenFile(f"is not JSON: {str(error)[:MESSAGE_CHARS_MAX]}") from None
    if not isinstance(document, dict):
        raise BrokenFile("must be an object with the members version and workers")
    if type(document.get("version")) is not int or document["version"] != 1:
        raise BrokenFile("version must be 1")
    workers = document.get("workers")
    if not isinstance(workers, list):
        raise BrokenFile("workers must be a list")
    if len(workers) > WORKERS_MAX:
        raise BrokenFile(f"workers has more than {WORKERS_MAX} entries")
    found: dict[str, WorkerSpec] = {}
    remarks = []
    for position, entry in enumerate(workers):
        where = f"workers[{position}]"
        try:
            spec = spec_of(entry)
        except GatewayError as error:
            member = f"{error.param}: " if error.param else ""
            reason = error.message if error.message.startswith(member) else member + error.message
            dot = "." if member else ": "
            raise BrokenFile(f"{where}{dot}{reason}"[:MESSAGE_CHARS_MAX]) from None
        if spec.url in found:
            raise BrokenFile(f"{where}.url: {spec.url} is named twice")
        if spec.api_key is None and default_api_key is not None:
            spec = msgspec.structs.replace(spec, api_key=default_api_key)
        found[spec.url] = spec
        remarks += [f"{where}.{member} is not a member that smg reads" for member in unknown_members(entry)]
    return tuple(found.values()), remarks


class File:
    """The source of one file."""

    name = "file"

    def __init__(
        self, path: str, interval_s: float, default_api_key: str | None = None, log: Log | None = None
    ) -> None:
        self._path = path
        self._interval_s = interval_s
        self._default_api_key = default_api_key
        self._log = log if log is not None else _log
        self._seen: _Identity | None = None
        self._complaint = ""
        self._again = trio.Event()

    def look_again(self, default_api_key: str | None) -> None:
        """Reads the file anew at once, changed or not, with this key for workers without one (FLG-4). Does not wait."""
        self._default_api_key = default_api_key
        self._seen = None
        self._again.set()

    async def run(
        self, report: Report, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
    ) -> None:
        """Reports the workers of the file now and after each change. A file that is not there yet is waited for."""
        await self._look(report)
        task_status.started()
        while True:
            with trio.move_on_after(self._interval_s):
                await self._again.wait()
            self._again = trio.Event()
            await self._look(report)

    async def _look(self, report: Report) -> None:
        """Reads the file if it changed and reports it if it is good."""
        try:
            read = await trio.to_thread.run_sync(self._read_if_changed)
            if read is None:
                return
            specs, remarks = parse(read, self._default_api_key)
        except OSError as error:
            self._complain(error.strerror or type(error).__name__)
            return
        except BrokenFile as error:
            self._complain(str(error))
            return
        if self._complaint:
            self._log("info", f"discovery file {self._path} is good again")
        self._complaint = ""
        for remark in remarks[
            :10
        ]:  # the first ten tell what is wrong; a generated file may repeat it 1,000 times
            self._log("warning", f"discovery file {self._path}: {remark}")
        report(specs)

    def _read_if_changed(self) -> bytes | None:
        """The bytes of the file, None when it is as it was. Runs in a thread: network file systems may hang.

        The identity is noted only after a whole read, so that a file that cannot be opened is tried again; the
        inode is part of it because renaming over the file is how careful people (and ConfigMaps) replace it.
        """
        with open(self._path, "rb") as file:
            status = os.fstat(file.fileno())
            identity = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)
            if identity == self._seen:
                return None
            content = file.read(FILE_BYTES_MAX + 1)
        self._seen = identity
        if len(content) > FILE_BYTES_MAX:
            raise BrokenFile(f"is larger than {FILE_BYTES_MAX} bytes")
        return content

    def _complain(self, complaint: str) -> None:
        """Logs a complaint once until another one or a good file comes."""
        if complaint != self._complaint:
            self._complaint = complaint
            self._log("error", f"discovery file {self._path}: {complaint}; the last good state stands")


def _log(level: str, message: str) -> None:
    logging.getLogger("smg.discovery").log(logging.getLevelNamesMapping()[level.upper()], message)
