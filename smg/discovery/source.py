"""The contract of a source of workers; this docstring is the manual.

A source finds workers somewhere and reports them. It reports its whole truth each time, not what changed: the list
of specifications that hold now. Who listens compares it with what this source had reported before, adds what is new,
updates what differs and drains what is gone; workers that others added are never touched (WRK-18). So a lost or
doubled report costs nothing, and a source needs no memory of its own.

`run` reports the first truth before it calls `task_status.started()`, then again whenever it changed, and ends only
by cancellation. A source whose world is out of order (file broken, server away) reports nothing: the last good truth
stands. It logs such a state once, not once per look.

One source is one file in this folder and one line in the table of `smg/discovery/__init__.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import trio

from smg.fleet.worker import WorkerSpec

Report = Callable[[tuple[WorkerSpec, ...]], None]
"""Takes everything that a source knows now; must not wait."""


class Source(Protocol):
    """What every source is; see the module's docstring."""

    name: str
    """Shown in logs and in the label `source` of `smg_discovery_*`."""

    async def run(
        self, report: Report, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
    ) -> None:
        """Reports the workers of this source until cancelled."""
        ...
