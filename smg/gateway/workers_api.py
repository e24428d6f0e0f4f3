"""The worker API: who is here, who comes, who goes (contract section 10).

Owns how a worker is shown and how bodies and ids of this API are read; what a change means is the business of
`services/worker_jobs`. Never shows a key (WRK-14): the words of `api/admin` have no place for one.
"""

from __future__ import annotations

from typing import Any

import msgspec
import trio
from msgspec import UNSET

from smg.api import admin
from smg.api.checks import decode_object
from smg.errors import GatewayError
from smg.fleet.registry import Registry
from smg.fleet.retry import FAILURE_STATUSES
from smg.fleet.worker import Kind, Status, Worker
from smg.net.plain import Request, Response, json_response
from smg.services.worker_jobs import Job, WorkerJobs

BODY_BYTES_MAX = 1 << 20
"""A specification with a thousand models stays below; the body is held whole."""

VIEWS_PER_TURN = 64
"""Workers shown before others get a turn: about half a millisecond."""

CONNECTION_MODE = "http"
"""Workers of this release are HTTP servers, all of them."""


class WorkersApi:
    """The endpoints `list_workers`, `add_worker`, `get_worker`, `patch_worker`, `put_worker` and `delete_worker`.

    All raise `GatewayError` with the codes of WRK-7 and WRK-9, and 413.
    """

    def __init__(self, registry: Registry, jobs: WorkerJobs) -> None:
        self._registry = registry
        self._jobs = jobs

    async def list_workers(self, request: Request) -> Response:
        """All workers in order of registration; `?model=` keeps those that serve this name or alias (WRK-8)."""
        workers = list(self._registry.workers())
        model = request.params.get("model")
        if model:
            canonical = self._registry.resolve(model)
            workers = [worker for worker in workers if canonical in worker.models]
        kinds = [worker.kind for worker in workers]
        views = []
        for count, worker in enumerate(workers):
            if count % VIEWS_PER_TURN == VIEWS_PER_TURN - 1:
                await trio.lowlevel.checkpoint()
            views.append(self.view(worker))
        return json_response(
            200,
            admin.WorkerList(
                tuple(views),
                len(workers),
                admin.WorkerStats(
                    prefill_count=kinds.count(Kind.PREFILL),
                    decode_count=kinds.count(Kind.DECODE),
                    regular_count=kinds.count(Kind.REGULAR),
                ),
            ),
        )

    async def add_worker(self, request: Request) -> Response:
        """202 with the place of the new worker (WRK-6)."""
        worker = self._jobs.add(await _document(request))
        return _accepted(worker, "Worker addition is under way", is_new=True)

    async def get_worker(self, request: Request) -> Response:
        """One worker (WRK-9)."""
        return json_response(200, self.view(self._jobs.find(request.path_params["id"])))

    async def patch_worker(self, request: Request) -> Response:
        """202; some members change (WRK-11)."""
        worker = self._jobs.find(request.path_params["id"])
        worker = self._jobs.patch(worker.id, await _document(request))
        return _accepted(worker, "Worker was updated")

    async def put_worker(self, request: Request) -> Response:
        """202; the specification is replaced (WRK-12)."""
        worker = self._jobs.find(request.path_params["id"])
        worker = self._jobs.replace(worker.id, await _document(request))
        return _accepted(worker, "Worker was replaced")

    async def delete_worker(self, request: Request) -> Response:
        """202; the worker drains (WRK-13)."""
        worker = self._jobs.delete(request.path_params["id"])
        return _accepted(worker, "Worker drains and leaves when it is idle")

    def view(self, worker: Worker) -> admin.WorkerView:
        """A worker as the API shows it."""
        spec = worker.spec
        job = self._jobs.job_of(worker)
        return admin.WorkerView(
            id=worker.id,
            url=worker.url,
            model_id=worker.models[0] if worker.models else spec.model_id,
            models=tuple(admin.ModelView(card.id, card.aliases) for card in worker.cards),
            worker_type=worker.kind.value,
            connection_mode=CONNECTION_MODE,
            runtime_type=worker.engine.value if worker.engine is not None else None,
            labels=spec.labels,
            priority=spec.priority,
            cost=spec.cost,
            health=_health(worker),
            resilience=_resilience(worker),
            is_healthy=worker.status is Status.READY,
            status=worker.status.value,
            load=worker.in_flight,
            bootstrap_port=UNSET if spec.bootstrap_port is None else spec.bootstrap_port,
            dp_rank=UNSET if spec.dp_rank is None else spec.dp_rank,
            dp_size=UNSET if spec.dp_size is None else spec.dp_size,
            job_status=UNSET if job is None else _job_status(job),
        )


async def _document(request: Request) -> Any:
    """The decoded body, whatever its content type: this API is called by hand a lot. `BAD_REQUEST` when it is none."""
    body = await request.body(BODY_BYTES_MAX)
    try:
        return decode_object(body)
    except GatewayError as error:
        raise GatewayError(400, "BAD_REQUEST", error.message) from None


def _accepted(worker: Worker, message: str, *, is_new: bool = False) -> Response:
    location = f"/workers/{worker.id}"
    answer = admin.Accepted("accepted", worker.id, worker.url, location, message)
    return Response(202, msgspec.json.encode(answer), headers=[("location", location)] if is_new else None)


def _health(worker: Worker) -> admin.HealthView:
    rules = worker.health.rules
    return admin.HealthView(
        disable_health_check=rules.is_disabled,
        check_interval_secs=rules.interval_s,
        timeout_secs=rules.timeout_s,
        failure_threshold=rules.failure_threshold,
        success_threshold=rules.success_threshold,
        health_check_endpoint=rules.endpoint,
    )


def _resilience(worker: Worker) -> admin.ResilienceView:
    rules = worker.breaker.rules
    own = worker.spec.resilience.retryable_status_codes
    return admin.ResilienceView(
        disable_circuit_breaker=rules.is_disabled,
        cb_failure_threshold=rules.failure_threshold,
        cb_success_threshold=rules.success_threshold,
        cb_timeout_duration_secs=rules.timeout_s,
        cb_window_duration_secs=rules.window_s,
        retryable_status_codes=tuple(sorted(FAILURE_STATUSES)) if own is None else own,
    )


def _job_status(job: Job) -> admin.JobStatus:
    return admin.JobStatus(job.job_type, job.worker_url, job.status, job.message, job.timestamp)
