"""One edge-triggered epoll for the whole process, served by one trio task.

Owns who waits for which socket. `trio.lowlevel.wait_readable` costs an `epoll_ctl` and a trip through trio's own
epoll for every wait (10 us of 44 in hotpath measurements); here a socket is registered once for its life, readiness is a
flag, and a wait parks the task until the flag is set. Cancellation stays trio's: a parked task is an ordinary
trio task waiting in `wait_task_rescheduled`.

The room also keeps the one sweep over deadlines (a `trio.fail_after` per operation costs 10 us each) and the clock
of the data path: `now` is trio's clock, read once per batch of events.

A wait yields trio's own trap object, made once per parking: `wait_task_rescheduled` makes one per wait and adds two
frames (docs/decisions/0004-waiting-cheaply.md). `tests/smg/net/test_readiness.py` fails when a trio release changes it.

It must never read or write a socket.
"""

from __future__ import annotations

import math
import select
import socket
import types
from collections.abc import Callable, Generator
from typing import Any, Protocol

import trio
from trio._core._traps import WaitTaskRescheduled

SWEEP_INTERVAL_S = 0.1  # deadlines on the data path are seconds; 0.1 s late is soon enough (HTTP-14: 1.5 s)
EVENTS_PER_POLL_MAX = 1024

_READ = select.EPOLLIN | select.EPOLLRDHUP | select.EPOLLHUP | select.EPOLLERR
_WRITE = select.EPOLLOUT | select.EPOLLHUP | select.EPOLLERR
_LOST = select.EPOLLHUP | select.EPOLLERR
_ANY_END = select.EPOLLRDHUP | _LOST
_REGISTERED = select.EPOLLIN | select.EPOLLOUT | select.EPOLLRDHUP | select.EPOLLET


class _Sent:
    """What a parked task gets when it wakes; reusable, unlike `outcome.Value`, so that a wake allocates nothing."""

    __slots__ = ("_value",)

    def __init__(self, value: bool) -> None:
        self._value = value

    def unwrap(self) -> bool:
        return self._value


class _Raised:
    """Raises an exception in a parked task."""

    __slots__ = ("_error",)

    def __init__(self, error: BaseException) -> None:
        self._error = error

    def unwrap(self) -> bool:
        raise self._error


reschedule = trio.lowlevel.reschedule

_READY: Any = _Sent(True)
_EXPIRED: Any = _Sent(False)


class Slot:
    """The readiness of one socket.

    `is_readable` and `is_writable` are set by the service and cleared by whoever met EAGAIN or a short read.
    `is_hung_up`: the other side has shut down its sending half; `is_lost`: reset or both halves closed. `on_end` is
    called once for each of these when it becomes true.
    """

    __slots__ = (
        "fd",
        "is_hung_up",
        "is_lost",
        "is_readable",
        "is_writable",
        "on_end",
        "on_writable",
        "reader",
        "writer",
    )

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self.is_readable = False
        self.is_writable = True
        self.is_hung_up = False
        self.is_lost = False
        self.reader: Parking | None = None
        self.writer: Parking | None = None
        self.on_end: Callable[[], None] | None = None
        self.on_writable: Callable[[], None] | None = None


class Parking:
    """Where one task waits: for what, until when, and how others end the wait.

    The task that makes it owns it and waits in one place at a time. `deadline_s` bounds every wait (swept each
    `SWEEP_INTERVAL_S`); `gone_deadline_s` is when the client counts as gone (HTTP-13), and then `on_gone` decides.
    """

    __slots__ = (
        "_pending",
        "_scope",
        "_slot",
        "_task",
        "_trap",
        "_waiting",
        "deadline_s",
        "gone_deadline_s",
        "on_gone",
    )

    def __init__(self) -> None:
        self.deadline_s = math.inf
        self.gone_deadline_s = math.inf
        self.on_gone: Callable[[], None] | None = None
        self._task = trio.lowlevel.current_task()
        self._waiting = False
        self._slot: Slot | None = None
        self._pending: BaseException | None = None
        self._scope: trio.CancelScope | None = None
        self._trap: Any = WaitTaskRescheduled(self._aborted)

    @types.coroutine
    def wait_readable(self, slot: Slot) -> Generator[Any, Any, bool]:
        """Waits until `slot` may be read: True; or until the deadline: False. Raises what `interrupt` was given."""
        if slot.is_readable:
            return True
        if self._pending is not None:
            self._raise_pending()
        slot.reader = self
        self._slot = slot
        self._waiting = True
        is_in_time: bool = (yield self._trap).unwrap()
        return is_in_time

    @types.coroutine
    def wait_writable(self, slot: Slot) -> Generator[Any, Any, bool]:
        """As `wait_readable`, for writing."""
        if slot.is_writable:
            return True
        if self._pending is not None:
            self._raise_pending()
        slot.writer = self
        self._slot = slot
        self._waiting = True
        is_in_time: bool = (yield self._trap).unwrap()
        return is_in_time

    @types.coroutine
    def wait_either(self, slot: Slot) -> Generator[Any, Any, bool]:
        """Waits until `slot` may be read or written."""
        if slot.is_readable or slot.is_writable:
            return True
        if self._pending is not None:
            self._raise_pending()
        slot.reader = slot.writer = self
        self._slot = slot
        self._waiting = True
        is_in_time: bool = (yield self._trap).unwrap()
        return is_in_time

    @types.coroutine
    def wait_woken(self) -> Generator[Any, Any, bool]:
        """Waits until somebody calls `wake` (True) or the deadline passes (False)."""
        if self._pending is not None:
            self._raise_pending()
        self._waiting = True
        is_in_time: bool = (yield self._trap).unwrap()
        return is_in_time

    async def sleep(self, seconds: float) -> None:
        """Sleeps exactly, unlike the swept deadline; can be interrupted."""
        with trio.move_on_after(seconds):
            await self.wait_woken()

    async def run(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Awaits any trio function so that `interrupt` and the deadline cancel it; raises what `interrupt` was given.

        Returns the function's result, or None when the deadline passed.
        """
        if self._pending is not None:
            self._raise_pending()
        with trio.CancelScope(deadline=self.deadline_s) as scope:
            self._scope = scope
            try:
                return await function(*arguments)
            finally:
                self._scope = None
        if self._pending is not None:
            self._raise_pending()
        return None

    @property
    def is_waiting(self) -> bool:
        """Whether the task is parked now: only then does `interrupt` reach it before it runs any further."""
        return self._waiting

    def wake(self) -> None:
        """Ends the wait with True; nothing when nobody waits."""
        if self._waiting:
            self._waiting = False
            slot = self._slot
            if slot is not None:
                self._slot = None
                slot.reader = None
                slot.writer = None
            reschedule(self._task, _READY)

    def interrupt(self, error: BaseException) -> None:
        """Raises `error` in the waiting task, or at its next wait when it does not wait now."""
        if self._waiting:
            self._leave_slot()
            raised: Any = _Raised(error)
            reschedule(self._task, raised)
            return
        self._pending = error
        if self._scope is not None:
            self._scope.cancel()

    def reset(self) -> None:
        """Forgets an interrupt that came too late and every deadline: the next request starts clean."""
        self._pending = None
        self.deadline_s = math.inf
        self.gone_deadline_s = math.inf

    def sweep(self, now: float) -> None:
        """Ends the wait when its deadline has passed."""
        if now >= self.gone_deadline_s:
            self.gone_deadline_s = math.inf
            if self.on_gone is not None:
                self.on_gone()
        if now >= self.deadline_s and self._waiting:
            self._leave_slot()
            reschedule(self._task, _EXPIRED)

    def _raise_pending(self) -> None:
        error = self._pending
        self._pending = None
        assert error is not None
        raise error

    def _leave_slot(self) -> None:
        self._waiting = False
        slot = self._slot
        if slot is not None:
            # One connection has one user at a time, so whoever waits on the slot is this parking.
            self._slot = None
            slot.reader = None
            slot.writer = None

    def _aborted(self, raise_cancel: object) -> trio.lowlevel.Abort:
        self._leave_slot()
        return trio.lowlevel.Abort.SUCCEEDED


class Flushable(Protocol):
    """Whatever has bytes to send at the end of a turn."""

    def flush(self) -> None:
        """Sends what can be sent now; must not raise."""
        ...


class Readiness(trio.abc.Instrument):
    """The service: registers sockets, wakes parked tasks, sweeps deadlines, keeps the clock.

    `now_s` is trio's clock at the last batch of events, at most one batch old while a task runs.
    """

    def __init__(self) -> None:
        self._epoll = select.epoll()
        self._slots: dict[int, Slot] = {}
        self._parkings: dict[Parking, None] = {}
        self._sweepers: list[Callable[[float], None]] = []
        self._unsent: list[Flushable] = []
        self._is_running = False
        self.now_s = 0.0

    def defer(self, connection: Flushable) -> bool:
        """Calls `connection.flush()` at the end of this turn of the loop, once or more; False when nothing turns."""
        if self._is_running:
            self._unsent.append(connection)
        return self._is_running

    def before_io_wait(self, timeout: float) -> None:
        """What trio calls when all tasks of a turn have run: sends what they left. Must not raise."""
        unsent = self._unsent
        if unsent:
            self._unsent = []
            for connection in unsent:
                connection.flush()

    def register(self, sock: socket.socket) -> Slot:
        """Watches `sock` (non-blocking) until it is closed; call `forget` before closing it."""
        slot = Slot(sock.fileno())
        self._slots[slot.fd] = slot
        self._epoll.register(slot.fd, _REGISTERED)
        return slot

    def forget(self, slot: Slot) -> None:
        """Stops watching; the kernel drops the registration when the socket is closed."""
        if self._slots.get(slot.fd) is slot:
            del self._slots[slot.fd]

    def open_parking(self) -> Parking:
        """A parking whose deadlines are swept until `close_parking`."""
        parking = Parking()
        self._parkings[parking] = None
        return parking

    def close_parking(self, parking: Parking) -> None:
        """Ends the sweeping of a parking."""
        self._parkings.pop(parking, None)

    def add_sweeper(self, sweep: Callable[[float], None]) -> None:
        """Calls `sweep(now)` every `SWEEP_INTERVAL_S`; for pools and caches with deadlines of their own."""
        self._sweepers.append(sweep)

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Serves until cancelled; closes the epoll then."""
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._sweep)
                trio.lowlevel.add_instrument(self)
                self._is_running = True
                self.now_s = trio.current_time()
                task_status.started()
                await self._serve()
        finally:
            if self._is_running:
                self._is_running = False
                trio.lowlevel.remove_instrument(self)
                self.before_io_wait(0.0)
            self._epoll.close()

    async def _serve(self) -> None:
        poll = self._epoll.poll
        fd = self._epoll.fileno()
        while True:
            # Waiting also while events are left costs no more than a checkpoint, and nothing is polled in vain.
            await trio.lowlevel.wait_readable(fd)
            self.now_s = trio.current_time()
            self._dispatch(poll(0, EVENTS_PER_POLL_MAX))

    def _dispatch(self, events: list[tuple[int, int]]) -> None:
        slots = self._slots
        for fd, event in events:
            slot = slots.get(fd)
            if slot is None:
                continue
            if event & _READ:
                slot.is_readable = True
                reader = slot.reader
                if reader is not None:
                    reader.wake()
            if event & _WRITE:
                slot.is_writable = True
                if slot.on_writable is not None:
                    slot.on_writable()
                writer = slot.writer
                if writer is not None:
                    writer.wake()
            if event & _ANY_END:
                self._ended(slot, event)

    def _ended(self, slot: Slot, event: int) -> None:
        is_new = False
        if not slot.is_hung_up:
            slot.is_hung_up = is_new = True
        if event & _LOST and not slot.is_lost:
            slot.is_lost = is_new = True
        if is_new and slot.on_end is not None:
            slot.on_end()

    async def _sweep(self) -> None:
        while True:
            await trio.sleep(SWEEP_INTERVAL_S)
            now = self.now_s = trio.current_time()
            for parking in list(self._parkings):
                if now >= parking.deadline_s or now >= parking.gone_deadline_s:
                    parking.sweep(now)
            for sweep in self._sweepers:
                sweep(now)
