"""Where log lines go: a descriptor that may have a slow reader, and a file per day.

This room owns the bytes that wait and the rotation of files. A line is appended to a bounded buffer and written at
most 4 KiB at a time, each time only after `poll` said that the descriptor takes it, so that a stalled reader delays
log lines and nothing else; what does not fit the buffer is counted, and the count is written when there is room.
`O_NONBLOCK` would be shorter, but it belongs to the open file that the parent process shares with us. It must never
raise for a reader that left or a disk that is full.
"""

from __future__ import annotations

import os
import select
import threading
import time
from pathlib import Path

BUFFER_BYTES_MAX = 1 << 20
"""Lines that wait for a slow reader: about 5,000. More would only make old news older."""

PIPE_BYTES = select.PIPE_BUF
"""A pipe that polls writable takes this many bytes without blocking (POSIX: a page on Linux)."""

FILES_KEPT = 14
"""Files of past days under `--log-dir`: two weeks is what an incident review asks for."""

FILE_NAME = "smg.log"


class Output:
    """A descriptor and the bytes that wait for it."""

    def __init__(self, fd: int, bytes_per_write: int = PIPE_BYTES) -> None:
        self._bytes_per_write = bytes_per_write
        self._pending = bytearray()
        self._lost_lines = 0
        self._lock = threading.RLock()
        self._fd = fd
        self._poll = select.poll()
        self._poll.register(fd, select.POLLOUT)

    def append(self, line: str) -> None:
        """Keep a line for the next `flush`; counts it as lost when the buffer is full."""
        if len(self._pending) > BUFFER_BYTES_MAX:
            self._lost_lines += 1
            return
        self._pending += line.encode("utf-8", "backslashreplace")

    def flush(self, wait_s: float) -> bool:
        """True when nothing is left to write; waits for the reader at most `wait_s`."""
        until = time.monotonic() + wait_s if wait_s else 0.0
        with self._lock:
            while self._pending:
                if not self._poll.poll(max(0.0, until - time.monotonic()) * 1000 if wait_s else 0):
                    return False
                piece = bytes(self._pending[: self._bytes_per_write])
                # Whole lines where they fit: other processes may write to the same pipe in between.
                piece = piece[: piece.rfind(b"\n") + 1] or piece
                try:
                    written = os.write(self._fd, piece)
                except BlockingIOError:
                    return False
                except OSError:
                    # Nobody reads any more or the disk is full: there is no place left to complain at.
                    self._pending.clear()
                    return True
                del self._pending[:written]
                if not self._pending and self._lost_lines:
                    self._pending += b"%d log lines were lost: their reader was too slow\n" % self._lost_lines
                    self._lost_lines = 0
        return True


class DailyFile(Output):
    """`smg.log`, renamed to `smg.log.YYYY-MM-DD` when the day (UTC) is over; `FILES_KEPT` old ones stay."""

    def __init__(self, directory: Path, now: float) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self._path = directory / FILE_NAME
        self._day = int(now // 86400)
        # A disk takes what it is given; the pieces only bound one system call.
        super().__init__(self._open(), bytes_per_write=1 << 16)
        written = os.fstat(self._fd).st_mtime if os.fstat(self._fd).st_size else now
        if written // 86400 < self._day:
            self._day = int(written // 86400)
            self.turn_day(now)

    def turn_day(self, now: float) -> None:
        """Start a new file when a line of another day than the last one comes."""
        if int(now // 86400) <= self._day:
            return
        with self._lock:
            self._turn_day(int(now // 86400))

    def close(self) -> None:
        """Give the descriptor back; what is not flushed is lost."""
        self._poll.unregister(self._fd)
        os.close(self._fd)

    def _turn_day(self, day: int) -> None:
        if day <= self._day:
            return  # Another thread was first.
        self.flush(0.0)
        stamp = time.strftime("%Y-%m-%d", time.gmtime(self._day * 86400))
        self._day = day
        try:
            os.replace(self._path, self._path.with_name(f"{FILE_NAME}.{stamp}"))
            fd = self._open()
        except OSError:
            return  # The old file goes on: lines are worth more than their file's name.
        self.close()
        self._fd = fd
        self._poll.register(fd, select.POLLOUT)
        old = sorted(self._path.parent.glob(f"{FILE_NAME}.????-??-??"))
        for path in old[:-FILES_KEPT]:
            path.unlink(missing_ok=True)

    def _open(self) -> int:
        return os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o640)
