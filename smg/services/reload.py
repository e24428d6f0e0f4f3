"""Hot reload: what was read from files is read again when they change or when SIGHUP says so, and never half.

Owns the list of parts that can be reloaded, the watch over their files, and the order of a reload: every part is read and
validated before the first one is swapped, so that a mistake leaves everything as it was. It logs what has changed, in
the words of the parts, which never hold a secret. It knows nothing of what a part is; it must never wait between two
swaps.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Protocol

import msgspec
import trio

from smg.errors import SettingsError

WATCH_INTERVAL_S = 2.0
"""Between two looks at the files: a look costs a stat per file and a thread's turn."""

_Identity = tuple[int, int, int, int] | None


class Log(Protocol):
    """What a reload needs of `smg.telemetry.log.Logger`."""

    def info(self, message: str, /, **fields: object) -> None:
        """Something was reloaded."""
        ...

    def error(self, message: str, /, **fields: object) -> None:
        """Something could not be reloaded."""
        ...


class Change(msgspec.Struct, frozen=True):
    """What a part would become: what differs, in lines without secrets, and the swap, which must not wait or fail."""

    lines: tuple[str, ...]
    apply: Callable[[], None]


class Part(msgspec.Struct, frozen=True):
    """One thing that can be reloaded.

    `prepare` reads and validates in a thread and changes nothing: the change, or None when all is as it was. It raises
    `SettingsError` when what it read cannot be used. `files` are watched; a part without any is reloaded by SIGHUP only.
    """

    name: str
    files: tuple[str, ...]
    prepare: Callable[[], Change | None]


class Reload:
    """The service. Add parts before it runs."""

    def __init__(self, *, log: Log, interval_s: float = WATCH_INTERVAL_S) -> None:
        self._log = log
        self._interval_s = interval_s
        self._parts: list[Part] = []
        self._seen: dict[str, _Identity] = {}
        self._complaints: dict[str, str] = {}  # part -> why it could not be reloaded
        self._asked = trio.Event()
        self._answered = trio.Event()

    def add(self, part: Part) -> None:
        """Registers a part."""
        self._parts.append(part)

    def ask(self) -> None:
        """Reload everything now (SIGHUP). Does not wait."""
        self._asked.set()

    async def wait_reloaded(self) -> None:
        """As `ask`, and waits until it was done or refused."""
        answered = self._answered
        self._asked.set()
        await answered.wait()

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Watches until cancelled. The first look finds what changed while the node was starting."""
        task_status.started()
        while True:
            if self._asked.is_set():
                self._asked = trio.Event()
                await trio.to_thread.run_sync(self._changed_parts, abandon_on_cancel=True)
                await self.reload(self._parts, is_asked=True)
                self._answered.set()
                self._answered = trio.Event()
            elif self._parts:
                # Each by itself: a certificate that is being replaced must not hold up a new key.
                for part in await trio.to_thread.run_sync(self._changed_parts, abandon_on_cancel=True):
                    await self.reload([part])
            with trio.move_on_after(self._interval_s):
                await self._asked.wait()

    async def reload(self, parts: list[Part], *, is_asked: bool = False) -> bool:
        """Reads and validates all of `parts`, then swaps those that changed; False when one is wrong and none is swapped."""
        changes: list[tuple[Part, Change]] = []
        for part in parts:
            try:
                change = await trio.to_thread.run_sync(part.prepare, abandon_on_cancel=True)
            except SettingsError as error:
                self._complain(part, str(error), is_asked)
                return False
            except OSError as error:
                self._complain(part, error.strerror or type(error).__name__, is_asked)
                return False
            if change is not None:
                changes.append((part, change))
        for part, change in changes:
            change.apply()
            for line in change.lines:
                self._log.info("reloaded", part=part.name, change=line)
        for part in parts:
            if self._complaints.pop(part.name, None) is not None:
                self._log.info("can be loaded again", part=part.name)
        if is_asked and not changes:
            self._log.info("nothing has changed since the last load")
        return True

    def _complain(self, part: Part, reason: str, is_asked: bool) -> None:
        """Says once why a part stays as it was, and again to whoever asks."""
        if is_asked or self._complaints.get(part.name) != reason:
            self._complaints[part.name] = reason
            self._log.error("not reloaded, what was loaded before stands", part=part.name, reason=reason)

    def _changed_parts(self) -> list[Part]:
        """The parts with a file that is another one than at the last look. Runs in a thread."""
        found = []
        for part in self._parts:
            now = {path: _identity(path) for path in part.files}
            if any(self._seen.get(path, ()) != identity for path, identity in now.items()):
                found.append((part, now))
        for _, now in found:
            self._seen.update(now)
        return [part for part, _ in found]


def _identity(path: str) -> _Identity:
    """What changes with a file, through links too: mounted secrets are swapped by renaming a link. None: not there."""
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns
