"""Builds the rooms of one node out of its settings.

Owns which object is given to which (house law 4: dependencies enter by constructor). Starts nothing, waits for nothing;
`cli/serve.py` runs what is built here.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Mapping
from random import Random

import trio

from mesh.transport import Transport
from smg import __version__
from smg.backends.http_worker import HttpWorkers
from smg.backends.prefill_decode import PrefillDecode
from smg.bridge.identity import cluster_seed
from smg.bridge.mesh_node import MeshNode, Parts
from smg.bridge.meters import mesh_meters
from smg.cli.access import Access
from smg.cli.accounting import Accounting
from smg.cli.caches import Caches
from smg.cli.cluster_limits import share_limits
from smg.cli.flags import Given
from smg.cli.metrics_port import MetricsPort, ui_of
from smg.cli.reloading import Reloading
from smg.cli.scheduling import Scheduling
from smg.discovery import sources_of
from smg.errors import GatewayError
from smg.fleet.breaker import Breaker, BreakerRules
from smg.fleet.health import Health, HealthRules
from smg.fleet.load import ReportRules
from smg.fleet.registry import Change, ModelsChanged, Registry, Removed, Updated
from smg.fleet.retry import RetryBudget, RetryRules
from smg.fleet.worker import Worker, WorkerSpec
from smg.gateway import problem
from smg.gateway.app import App
from smg.gateway.decisions import Decisions
from smg.gateway.dispatch import Dispatch
from smg.gateway.explain import Explain
from smg.gateway.fan_out import FanOut
from smg.gateway.generate import Generate, Runner
from smg.gateway.mesh_api import MeshApi, NoMesh
from smg.gateway.models import Models
from smg.gateway.pair_dispatch import PairDispatch
from smg.gateway.probes import Probes
from smg.gateway.relay import StreamBounds
from smg.gateway.tallies import Tallies
from smg.gateway.tracing import TracedWorkers, Tracing
from smg.gateway.workers_api import WorkersApi
from smg.net.client import Client
from smg.net.exchange import Exchange, ServerLimits
from smg.net.plain import PlainHandler, plain
from smg.net.pool import ConnectionPool
from smg.net.readiness import Readiness
from smg.net.server import Server
from smg.policies.policy import Policy
from smg.policies.routing_table import PolicyTable
from smg.services.drain import Drains
from smg.services.health_probes import HealthProbes
from smg.services.load_reports import LoadReports
from smg.services.reload import Reload
from smg.services.rosters import Rosters
from smg.services.worker_jobs import WorkerJobs
from smg.settings import Settings
from smg.telemetry import log as logs
from smg.telemetry.metrics import Metrics
from smg.telemetry.otlp import OtlpSender
from smg.telemetry.trace import Tracer
from smg.telemetry.worker_gauges import worker_samples

Service = Callable[..., Awaitable[None]]


class Node:
    """One gateway node, built and not yet running.

    `given` is what it was started with; without it no secret is read again (hot reload). `sources` are to be run by
    whoever runs the node. Raises `SettingsError` when a certificate cannot be used.
    """

    def __init__(
        self,
        settings: Settings,
        readiness: Readiness,
        rng: Random,
        given: Given | None = None,
        mesh_transport: Transport | None = None,
    ) -> None:
        self._settings = settings
        self._readiness = readiness
        self._rng = rng
        # Choices have a random state of their own: `explain` copies it to tell the next choice (EXP-3).
        self._choice_rng = Random(rng.getrandbits(128))
        self.log = logs.logger("smg")
        self.metrics = Metrics(settings.telemetry.prometheus_duration_buckets)
        self._is_draining = False
        self.registry = _registry(settings)
        self._access = Access(settings, readiness)
        self._pool = self._make_pool()
        client = Client(readiness, self._pool)
        self._probes_service = self._make_probes_service(client)
        self._jobs = WorkerJobs(
            self.registry,
            client.fetch,
            rng=rng,
            log=logs.logger("smg.workers"),
            is_dp_aware=settings.workers.dp_aware,
        )
        self._drains = Drains(self.registry, log=logs.logger("smg.workers"))
        self._rosters = Rosters(self.registry, self._jobs, client.fetch, log=logs.logger("smg.discovery"))
        has_mesh = settings.mesh.ha_mesh
        seed = cluster_seed(settings.mesh) if has_mesh else rng.getrandbits(64)
        self._caches = Caches(settings.routing, self.registry, seed)
        self.accounting = Accounting(settings, self._access.tenants, self.metrics)
        self.mesh = self._make_mesh(mesh_transport) if has_mesh else None
        self._reports = self._make_reports(client)
        self._policies = PolicyTable(
            settings.routing,
            self.registry,
            self._make_policy,
            self.mesh.keys_of if self.mesh is not None else None,
        )
        self._scheduling = Scheduling(
            settings, self.registry, self._caches.fits, self._access.tenants, readiness, self.metrics
        )
        self._admission = self._scheduling.admission
        self._tallies = Tallies(self.metrics)
        if self.mesh is not None:
            share_limits(self.mesh.limits, self._admission, self.accounting.limits, trio.current_time())
        self._sender = _span_sender(settings)
        self._tracer = None if self._sender is None else Tracer(self.metrics, self._sender, rng)
        backend = HttpWorkers if self._tracer is None else TracedWorkers
        self._workers = backend(self._pool, self._access.gates.is_secret)
        self.registry.subscribe(self._changed)
        self._probes = Probes(
            self.registry, lambda: self._is_draining, needs_pair=settings.pd.pd_disaggregation
        )
        self._decisions = Decisions(lambda: readiness.now_s)
        self._app = self._make_app(client)
        self._metrics_port = self._make_metrics_port()
        self._serving: Server | None = None
        self.sources = sources_of(settings)
        self.reload = self._make_reload(given)
        self.metrics.add_source(self._samples)

    def start_draining(self) -> None:
        """Readiness turns 503 `draining` at once (LIFE-5)."""
        self._is_draining = True
        self._metrics_port.close()

    @property
    def is_ready(self) -> bool:
        """Whether a request would find a worker (LIFE-2)."""
        return self._probes.reason_not_ready() is None

    def is_first_asked(self, worker: Worker) -> bool:
        """See `WorkerJobs`."""
        return self._jobs.is_first_asked(worker)

    def services(self) -> Iterable[Service]:
        """Everything that runs beside the servers, in the order of its start."""
        yield self._probes_service.run
        yield self._jobs.run
        yield self._drains.run
        yield self._rosters.run
        if self.mesh is not None:
            yield self.mesh.run
        if not self._settings.load_polls.disable_load_monitoring:
            yield self._reports.run
        yield from self._caches.services()
        if self._tracer is not None:
            yield self._tracer.run
        if self._access.key_sets is not None:
            yield self._access.key_sets.run
        yield self.reload.run

    def close(self) -> None:
        """Ends what is not a task and not a socket of ours: the exporter, once all services have ended."""
        if self._sender is not None:
            self._sender.close()
        if self.mesh is not None:
            self.mesh.close()

    def server(self) -> Server:
        """The serving port."""
        app = self._app
        handle = app.handle if self._tracer is None else Tracing(app.handle, self._tracer).handle
        self._serving = Server(
            handle,
            app.refuse,
            app.report,
            self._readiness,
            _limits(self._settings),
            tls=self._access.serving_context,
        )
        return self._serving

    def metrics_server(self) -> Server:
        """The metrics port: `GET /metrics`, and `GET /ui` unless it is off."""
        return self._plain_server(self._metrics_port.serve)

    def probe_server(self) -> Server:
        """The port of `--health-check-port` (LIFE-4)."""
        return self._plain_server(self._probes.only_probes)

    def _make_probes_service(self, client: Client) -> HealthProbes:
        return HealthProbes(
            self.registry,
            client.fetch,
            rng=self._rng,
            log=logs.logger("smg.health"),
            removes_failed=self._settings.removes_unhealthy_workers(),
            counted=self._count_probe,
        )

    def _make_reports(self, client: Client) -> LoadReports:
        return LoadReports(
            self.registry,
            client.fetch,
            _report_rules(self._settings),
            rng=self._rng,
            refused=self._probes_service.note_refused,
            share=self.mesh,
        )

    def _make_pool(self) -> ConnectionPool:
        return ConnectionPool(
            self._readiness,
            idle_timeout_s=self._settings.workers.upstream_pool_idle_timeout_secs,
            connect_timeout_s=self._settings.retries.connect_timeout_secs,
            context=self._access.worker_context(),
        )

    def _make_metrics_port(self) -> MetricsPort:
        if not self._settings.telemetry.ui:
            return MetricsPort(self.metrics, None)
        ui = ui_of(
            self.registry,
            self.metrics,
            self._decisions,
            self.mesh,
            self._caches.samples,
            self._scheduling.load,
        )
        return MetricsPort(self.metrics, ui)

    def _make_reload(self, given: Given | None) -> Reload:
        reloading = Reloading(
            self._settings,
            given,
            self._access,
            self._pool,
            self.sources,
            lambda: self._serving,
            self.reporter("flags"),
            self.mesh,
        )
        for part in (*self.accounting.parts(), *self._scheduling.parts()):
            reloading.reload.add(part)
        return reloading.reload

    def _make_policy(self, name: str, model: str) -> Policy:
        """A policy off the shelf; those of `cache_aware` share index, hashes and fits over all models."""
        neighbours = self.mesh.neighbours(model) if self.mesh is not None and name == "cache_aware" else None
        return self._caches.make_policy(name, model, neighbours)

    def _make_mesh(self, transport: Transport | None) -> MeshNode:
        """The rooms that share what this node knows; its lists of workers then go through them."""
        jobs = self._jobs
        mesh = MeshNode(
            self._settings,
            Parts(
                registry=self.registry,
                index=self._caches.index,
                blocks=self._caches.hasher.settings,
                report_rules=_report_rules(self._settings),
                report=self._rosters.report,
                drain=jobs.drain,
                probe=self._probes_service.note_refused,
                policy_known=lambda model, kind: self._policies.known(model, kind),
                policy_of=lambda model: self._policies.policy_for(model),
                clock=lambda: self._readiness.now_s,
                book=self.accounting.book,
                since_s=self.accounting.since_s,
                meters=mesh_meters(self.metrics),
                log=logs.logger("smg.mesh"),
            ),
            self._rng,
            transport=transport,
        )
        jobs.subscribe_added(mesh.workers.added)
        jobs.subscribe_edited(mesh.workers.edited)
        jobs.subscribe_deleted(mesh.workers.deleted)
        self.metrics.add_source(mesh.samples)
        return mesh

    def reporter(self, source: str) -> Callable[[tuple[WorkerSpec, ...]], None]:
        """What a source of discovery reports to."""
        return (self.mesh.workers if self.mesh is not None else self._rosters).reporter(source)

    async def bind(self) -> None:
        """Takes the mesh port, if there is a mesh. Raises `SettingsError` (CLI-9)."""
        if self.mesh is not None:
            await self.mesh.bind()

    async def leave(self) -> None:
        """Says farewell to the mesh, if there is one (LIFE-7); two seconds at most."""
        if self.mesh is not None:
            await self.mesh.wait_left()

    def _make_app(self, client: Client) -> App:
        settings = self._settings
        dispatch = Dispatch(
            self._workers,
            _retry_rules(settings),
            RetryBudget(settings.retries.retry_budget_ratio, settings.retries.retry_budget_min_per_sec),
            StreamBounds(settings.telemetry.sse_keepalive_secs, settings.retries.request_timeout_secs),
            self._tallies,
            self._probes_service.note_refused,
            self._readiness,
            self._choice_rng,
            self._rng,
            timeout_s=settings.retries.request_timeout_secs,
            resend_bytes_max=settings.listening.max_buffered_request_bytes,
            sheds_overload=settings.routing.worker_overload_shed
            and settings.routing.protects_from_overload(),
            owners=self.mesh.owners if self.mesh is not None else None,
        )
        runner: Runner = dispatch
        if settings.pd.pd_disaggregation:
            pairs = PrefillDecode(self._workers, self._readiness, self._rng)
            runner = PairDispatch(dispatch, pairs, self.registry, self._tallies, self._readiness)
        generate = Generate(
            self.registry,
            self._policies,
            self._admission,
            runner,
            self._tallies,
            self._readiness,
            self.accounting.accounts,
            key_headers=settings.routing.routing_key_headers,
            needs_key=settings.routing.routing_key_override,
            is_pair=settings.pd.pd_disaggregation,
            decisions=self._decisions,
            turns=self._scheduling.turns(),
        )
        return App(
            generate,
            self._endpoints(client),
            self._access.gates,
            self._access.cors,
            self.metrics,
            logs.logger("smg.gateway"),
            self._rng,
            id_headers=settings.telemetry.request_id_headers,
            audit=self._access.audit,
        )

    def _endpoints(self, client: Client) -> Mapping[str, PlainHandler]:
        settings = self._settings
        models = Models(self.registry)
        workers = WorkersApi(self.registry, self._jobs)
        fan_out = FanOut(self.registry, client.fetch, self._reports.ask_now)
        mesh = NoMesh() if self.mesh is None else MeshApi(self.mesh)
        explain = Explain(
            self.registry,
            self._policies,
            self._choice_rng,
            lambda: self._readiness.now_s,
            routing_key_headers=settings.routing.routing_key_headers,
            keys_override=settings.routing.routing_key_override,
            sheds_overload=settings.routing.worker_overload_shed
            and settings.routing.protects_from_overload(),
            owners=self.mesh.owners if self.mesh is not None else None,
            block_chars=self._caches.hasher.settings.block_bytes,
        )
        return {
            "liveness": self._probes.liveness,
            "readiness": self._probes.readiness,
            "models": models.models,
            "model": models.model,
            "health_generate": fan_out.health_generate,
            "get_server_info": fan_out.get_server_info,
            "get_model_info": fan_out.get_model_info,
            "engine_metrics": fan_out.engine_metrics,
            "get_loads": fan_out.get_loads,
            "flush_cache": fan_out.flush_cache,
            "start_profile": fan_out.start_profile,
            "stop_profile": fan_out.stop_profile,
            "list_workers": workers.list_workers,
            "add_worker": workers.add_worker,
            "get_worker": workers.get_worker,
            "patch_worker": workers.patch_worker,
            "put_worker": workers.put_worker,
            "delete_worker": workers.delete_worker,
            "explain": explain.explain,
            "usage": self.accounting.api(self.mesh.usage if self.mesh is not None else None).usage,
            "mesh_status": mesh.mesh_status,
            "mesh_members": mesh.mesh_members,
            "mesh_limits": mesh.mesh_limits,
            "mesh_leave": mesh.mesh_leave,
        }

    def _plain_server(self, handler: PlainHandler) -> Server:
        serve = plain(handler)

        def handle(exchange: Exchange) -> Awaitable[None]:
            self._app.identify(exchange, "req-")
            return serve(exchange)

        return Server(
            handle,
            self._refuse_plain,
            self._app.report,
            self._readiness,
            ServerLimits(payload_bytes_max=65536),
        )

    async def _refuse_plain(self, exchange: Exchange, error: GatewayError) -> None:
        if not exchange.request_id:
            self._app.identify(exchange, "req-")
        status, block, body = problem.render(error, problem.OPENAI, exchange.request_id)
        await exchange.respond(status, block, body)

    def _changed(self, change: Change) -> None:
        """What outside of the fleet hangs on a worker goes with it."""
        worker = change.worker
        if isinstance(change, (Removed, Updated)):
            self._workers.forget(worker)
        if isinstance(change, Removed):
            self.metrics.forget(worker=worker.url)
        if isinstance(change, (Removed, ModelsChanged)):
            served = self.registry.served_models()
            old = change.old if isinstance(change, ModelsChanged) else worker.models
            for model in old:
                if model not in served:
                    self._tallies.forget_model(model)

    def _count_probe(self, worker: Worker, is_hit: bool) -> None:
        self.metrics.counter(
            "smg_worker_health_checks_total",
            worker_type=worker.kind.value,
            result="success" if is_hit else "failure",
        ).value += 1

    def _samples(self) -> Iterable[tuple[str, tuple[str, ...], float]]:
        """Gauges and counters that live in the rooms and are read when somebody scrapes."""
        if self._serving is not None:
            yield "smg_http_connections_active", (), float(self._serving.connection_count)
        yield from worker_samples(self.registry.workers(), self._readiness.now_s)
        yield from self._caches.samples()
        for _, policy in self._policies.policies():
            branches: Mapping[str, int] = getattr(policy, "branches", {})
            for branch, count in branches.items():
                yield f"smg_{_METRIC_NAMES[policy.name]}_policy_branch_total", (branch,), float(count)
            if policy.name == "manual":
                yield "smg_manual_policy_cache_entries", (), float(getattr(policy, "entries", 0))


_METRIC_NAMES = {
    "manual": "manual",
    "consistent_hashing": "consistent_hashing",
    "prefix_hash": "prefix_hash",
}


def _registry(settings: Settings) -> Registry:
    health, breaker, workers = settings.health, settings.breaker, settings.workers

    def make_health(spec: WorkerSpec) -> Health:
        own = spec.health
        return Health(
            HealthRules(
                endpoint=own.health_check_endpoint or health.health_check_endpoint,
                interval_s=own.check_interval_secs or health.health_check_interval_secs,
                timeout_s=own.timeout_secs or health.health_check_timeout_secs,
                failure_threshold=own.failure_threshold or health.health_failure_threshold,
                success_threshold=own.success_threshold or health.health_success_threshold,
                startup_timeout_s=workers.worker_startup_timeout_secs,
                startup_delay_s=workers.worker_startup_delay,
                startup_check_interval_s=workers.worker_startup_check_interval,
                is_disabled=(
                    health.disable_health_check
                    if own.disable_health_check is None
                    else own.disable_health_check
                ),
            )
        )

    def make_breaker(spec: WorkerSpec) -> Breaker:
        own = spec.resilience
        return Breaker(
            BreakerRules(
                failure_threshold=own.cb_failure_threshold or breaker.cb_failure_threshold,
                success_threshold=own.cb_success_threshold or breaker.cb_success_threshold,
                timeout_s=own.cb_timeout_duration_secs or breaker.cb_timeout_duration_secs,
                window_s=breaker.cb_window_duration_secs,
                is_disabled=(
                    breaker.disable_circuit_breaker
                    if own.disable_circuit_breaker is None
                    else own.disable_circuit_breaker
                ),
            )
        )

    return Registry(
        aliases=workers.aliases(),
        make_health=make_health,
        make_breaker=make_breaker,
        drain_timeout_s=workers.drain_timeout_secs,
    )


def _span_sender(settings: Settings) -> OtlpSender | None:
    """Raises `SettingsError` when tracing is on and the extra is missing or the endpoint wrong."""
    telemetry = settings.telemetry
    return OtlpSender(telemetry.otlp_traces_endpoint, __version__) if telemetry.enable_trace else None


def _report_rules(settings: Settings) -> ReportRules:
    routing = settings.routing
    return ReportRules(
        interval_s=settings.load_polls.interval_secs(routing.policy),
        overload_waiting=routing.worker_overload_waiting_requests,
        overload_kv_usage=routing.worker_overload_token_usage,
        is_protected=routing.protects_from_overload(),
    )


def _retry_rules(settings: Settings) -> RetryRules:
    retries = settings.retries
    return RetryRules(
        attempts_max=1 if retries.disable_retries else retries.retry_max_retries,
        initial_backoff_s=retries.retry_initial_backoff_ms / 1000,
        max_backoff_s=retries.retry_max_backoff_ms / 1000,
        backoff_multiplier=retries.retry_backoff_multiplier,
        jitter_ratio=retries.retry_jitter_factor,
    )


def _limits(settings: Settings) -> ServerLimits:
    listening = settings.listening
    return ServerLimits(
        header_read_timeout_s=listening.header_read_timeout_secs,
        idle_timeout_s=listening.idle_connection_timeout_secs,
        body_stall_timeout_s=listening.stream_body_stall_timeout_secs,
        payload_bytes_max=listening.max_payload_size,
    )
