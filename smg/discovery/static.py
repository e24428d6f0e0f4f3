"""The workers of the command line: `--worker-urls`, `--prefill` and `--decode`, known from the start.

Owns how settings become specifications: the key of `--worker-api-key` (FLG-4), the engine of `--backend`, the kinds
of disaggregated serving. It reports once and never again.
"""

from __future__ import annotations

import trio

from smg.discovery.source import Report
from smg.fleet.worker import Kind, WorkerSpec
from smg.fleet.worker_spec import checked
from smg.settings import Settings


def specs_of(settings: Settings) -> tuple[WorkerSpec, ...]:
    """The workers that the settings name, in their order; one named twice counts once."""
    workers = settings.workers
    runtime = None if workers.backend == "auto" else workers.backend
    named: list[tuple[str, Kind, int | None]] = [(url, Kind.REGULAR, None) for url in workers.worker_urls]
    named += [(worker.url, Kind.PREFILL, worker.bootstrap_port) for worker in settings.pd.prefill]
    named += [(url, Kind.DECODE, None) for url in settings.pd.decode]
    found: dict[str, WorkerSpec] = {}
    for url, kind, bootstrap_port in named:
        spec = checked(
            WorkerSpec(
                url=url,
                worker_type=kind.value,
                runtime_type=runtime,
                api_key=workers.worker_api_key,
                bootstrap_port=bootstrap_port,
            )
        )
        found.setdefault(spec.url, spec)
    return tuple(found.values())


class Static:
    """The source of the command line."""

    name = "flags"

    def __init__(self, settings: Settings) -> None:
        self._specs = specs_of(settings)

    async def run(
        self, report: Report, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
    ) -> None:
        """Reports the workers of the settings, then sleeps until cancelled."""
        report(self._specs)
        task_status.started()
        await trio.sleep_forever()
