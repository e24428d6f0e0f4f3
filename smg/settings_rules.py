"""What must hold between settings: combinations that are refused before a port is bound, and those that deserve a warning.

Owns the rules of CLI-7 and CLI-8 that no single value can break, as pure functions of `Settings`. It must not know which
policies exist (that table belongs to a higher floor) nor look at files or the network (`smg doctor` does).
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

from smg.errors import SettingsError
from smg.settings import Settings

MESH_SECRET_CHARS_MIN = 16
"""A shorter secret of the mesh is stretched and works, and is warned of."""

_ANY_ADDRESS = frozenset({"0.0.0.0", "::"})


def check(settings: Settings) -> None:
    """Raise SettingsError (with `is_combination` set) for the first combination that may not start (CLI-6, CLI-7)."""
    for rule in _RULES:
        rule(settings)


def warnings(settings: Settings) -> list[str]:
    """What may start but is probably not meant; one line each, for the log and `smg doctor`."""
    found = []
    workers = settings.workers.worker_urls
    few = len(workers) < 2 and not settings.discovery.is_on() and not settings.pd.pd_disaggregation
    if settings.routing.policy == "power_of_two" and few:
        found.append(
            f"--policy power_of_two: {len(workers)} worker(s) by flag; it needs two to compare (CLI-8), more may come later"
        )
    for flag, urls in (
        ("--worker-urls", workers),
        ("--prefill", tuple(worker.url for worker in settings.pd.prefill)),
        ("--decode", settings.pd.decode),
    ):
        found += [f"{flag}: {url}: given more than once, used once" for url in _repeated(urls)]
    if settings.pd.pd_disaggregation and not settings.discovery.is_on():
        for leg, given in (("prefill", settings.pd.prefill), ("decode", settings.pd.decode)):
            if not given:
                found.append(
                    f"--{leg}: no {leg} worker by flag; the node is not ready until one is added (LIFE-2)"
                )
    if not settings.pd.pd_disaggregation:
        for flag, policy in (
            ("--prefill-policy", settings.routing.prefill_policy),
            ("--decode-policy", settings.routing.decode_policy),
        ):
            if policy is not None:
                found.append(f"{flag}: {policy}: has no effect without --pd-disaggregation")
    if settings.health.disable_health_check and settings.removes_unhealthy_workers():
        found.append(
            "--remove-unhealthy-workers: has no effect with --disable-health-check: no worker ever fails a probe"
        )
    if settings.routing.worker_overload_shed and not settings.routing.protects_from_overload():
        found.append("--worker-overload-shed: has no effect while overload protection is off")
    if settings.load_polls.disable_load_monitoring and settings.routing.policy in (
        "cache_aware",
        "least_load",
        "power_of_two",
    ):
        found.append(
            f"--disable-load-monitoring: {settings.routing.policy} then sees only the requests of this node, not the engines' load"
        )
    limits = settings.limits
    if limits.priority_scheduler_config is not None and not limits.priority_scheduler_enabled:
        found.append("--priority-scheduler-config: has no effect without --priority-scheduler-enabled")
    auth = settings.auth
    if (
        auth.tenant_api_key
        and auth.api_key is None
        and not auth.control_plane_api_keys
        and not auth.jwt_issuer
    ):
        found.append("--tenant-api-key: without an admin key the admin routes are closed to everyone (SEC-4)")
    if auth.jwt_issuer is not None:
        found += [
            f"--control-plane-api-keys: {control.id}: a key with two dots is taken for a token, and opens nothing (SEC-6)"
            for control in auth.control_keys()
            if control.key.count(".") == 2
        ]
    if auth.tenant_header_name != "x-smg-tenant-id" and not auth.trust_tenant_header:
        found.append("--tenant-header-name: has no effect without --trust-tenant-header")
    limits = settings.limits
    if limits.tenant_rate_limit_config is not None and not limits.tenant_rate_limit_enabled:
        found.append("--tenant-rate-limit-config: has no effect without --tenant-rate-limit-enabled")
    for flag, url in (("--jwt-issuer", auth.jwt_issuer), ("--jwt-jwks-uri", auth.jwt_jwks_uri)):
        if url is not None and url.startswith("http://"):
            found.append(f"{flag}: {url}: whoever is on the way can replace the keys; use https")
    return found + _mesh_warnings(settings)


def _backoff(settings: Settings) -> None:
    retries = settings.retries
    if retries.retry_max_backoff_ms < retries.retry_initial_backoff_ms:
        _refuse(
            "--retry-max-backoff-ms",
            f"{retries.retry_max_backoff_ms:g}",
            f"is below --retry-initial-backoff-ms {retries.retry_initial_backoff_ms:g}",
        )


def _queue(settings: Settings) -> None:
    if settings.limits.queue_timeout_secs == 0 and settings.limits.queue_size > 0:
        _refuse(
            "--queue-timeout-secs",
            "0",
            f"must be greater than 0 while --queue-size is {settings.limits.queue_size}",
        )


def _tenant_limits(settings: Settings) -> None:
    limits = settings.limits
    if limits.tenant_rate_limit_enabled and limits.tenant_rate_limit_config is None:
        _refuse("--tenant-rate-limit-enabled", "", "needs --tenant-rate-limit-config")


def _buckets(settings: Settings) -> None:
    bounds = settings.telemetry.prometheus_duration_buckets
    if any(later <= earlier for earlier, later in pairwise(bounds)):
        _refuse("--prometheus-duration-buckets", " ".join(f"{bound:g}" for bound in bounds), "must rise")


def _ports(settings: Settings) -> None:
    listening = settings.listening
    listeners = [("--port", listening.host, listening.port)]
    listeners.append(("--prometheus-port", settings.metrics_host(), settings.telemetry.prometheus_port))
    if listening.health_check_port is not None:
        listeners.append(("--health-check-port", listening.host, listening.health_check_port))
    if settings.mesh.ha_mesh:
        last = settings.mesh.mesh_port + listening.processes - 1
        if last > 65535:
            _refuse("--processes", str(listening.processes), f"counts --mesh-port upwards to {last}")
        listeners += [
            ("--mesh-port", settings.mesh.mesh_host, port)
            for port in range(settings.mesh.mesh_port, last + 1)
        ]
    for index, (flag, host, port) in enumerate(listeners):
        for other_flag, other_host, other_port in listeners[:index]:
            if port == other_port and (host == other_host or {host, other_host} & _ANY_ADDRESS):
                _refuse(flag, str(port), f"is the port of {other_flag} too")


def _processes(settings: Settings) -> None:
    """Each process gets a part of what may be in flight, and 0 would mean no limit."""
    limit, count = settings.limits.max_concurrent_requests, settings.listening.processes
    if 0 < limit < count:
        _refuse("--max-concurrent-requests", str(limit), f"is less than one for each of --processes {count}")


def _aliases(settings: Settings) -> None:
    models: dict[str, str] = {}
    for text in settings.workers.model_alias:
        alias, _, model = text.partition("=")
        if models.setdefault(alias, model) != model:
            _refuse("--model-alias", text, f"{alias} already maps to {models[alias]}")
    for alias, model in models.items():
        if model in models:
            _refuse("--model-alias", f"{alias}={model}", f"{model} is an alias itself, of {models[model]}")


def _discovery(settings: Settings) -> None:
    discovery = settings.discovery
    if not discovery.is_on() or discovery.discovery_file is not None:
        return
    if discovery.discovery_provider is not None:
        _refuse("--discovery-provider", discovery.discovery_provider, "needs --discovery-file")
    _refuse("--service-discovery", "", "needs --discovery-file (kubernetes is not supported by this release)")


def _prefill_decode(settings: Settings) -> None:
    pd = settings.pd
    if pd.pd_disaggregation:
        if settings.workers.worker_urls:
            _refuse(
                "--worker-urls",
                settings.workers.worker_urls[0],
                "gets no request under --pd-disaggregation; name it with --prefill or --decode",
            )
        return
    if pd.prefill:
        _refuse("--prefill", pd.prefill[0].url, "needs --pd-disaggregation")
    if pd.decode:
        _refuse("--decode", pd.decode[0], "needs --pd-disaggregation")


def _keys(settings: Settings) -> None:
    """No key may have two meanings (CLI-7); a refusal names their owners and never the key."""
    auth = settings.auth
    owners: dict[str, str] = {} if auth.api_key is None else {auth.api_key: "--api-key"}
    for tenant, key in auth.tenant_keys():
        owner = owners.setdefault(key, f"tenant {tenant}")
        if owner != f"tenant {tenant}":
            _refuse("--tenant-api-key", tenant, f"has the key of {owner} too")
    ids: set[str] = set()
    for control in auth.control_keys():
        owner = owners.setdefault(control.key, f"control-plane key {control.id}")
        if owner != f"control-plane key {control.id}":
            _refuse("--control-plane-api-keys", control.id, f"is the key of {owner} too")
        if control.id in ids:
            _refuse("--control-plane-api-keys", control.id, "is the id of two keys")
        ids.add(control.id)


def _tokens(settings: Settings) -> None:
    auth = settings.auth
    if auth.jwt_issuer is None:
        for flag, text in (
            ("--jwt-audience", auth.jwt_audience),
            ("--jwt-jwks-uri", auth.jwt_jwks_uri),
            ("--jwt-role-mapping", " ".join(auth.jwt_role_mapping)),
        ):
            if text:
                _refuse(flag, text, "needs --jwt-issuer")
    elif auth.jwt_audience is None:
        _refuse("--jwt-issuer", auth.jwt_issuer, "needs --jwt-audience")
    names: dict[str, str] = {}
    for text in auth.jwt_role_mapping:
        name, _, role = text.rpartition("=")
        if names.setdefault(name, role) != role:
            _refuse("--jwt-role-mapping", text, f"{name} already maps to {names[name]}")


def _certificates(settings: Settings) -> None:
    tls = settings.tls
    for flag, path, needed, other in (
        ("--tls-cert-path", tls.tls_cert_path, "--tls-key-path", tls.tls_key_path),
        ("--tls-key-path", tls.tls_key_path, "--tls-cert-path", tls.tls_cert_path),
        ("--client-cert-path", tls.client_cert_path, "--client-key-path", tls.client_key_path),
        ("--client-key-path", tls.client_key_path, "--client-cert-path", tls.client_cert_path),
    ):
        if path is not None and other is None:
            _refuse(flag, path, f"needs {needed}")


def _mesh(settings: Settings) -> None:
    mesh = settings.mesh
    if mesh.seeds and not mesh.ha_mesh:
        _refuse("--seeds", mesh.seeds[0], "needs --ha-mesh (FLG-2)")
    files = {
        "--mesh-tls-ca-cert": mesh.mesh_tls_ca_cert,
        "--mesh-tls-cert": mesh.mesh_tls_cert,
        "--mesh-tls-key": mesh.mesh_tls_key,
    }
    missing = [flag for flag, path in files.items() if path is None]
    if missing and len(missing) < len(files):
        given = next(flag for flag in files if flag not in missing)
        _refuse(given, str(files[given]), f"needs {' and '.join(missing)} too")
    if mesh.mesh_secret is not None and mesh.mesh_keys_file is not None:
        _refuse(
            "--mesh-keys-file", mesh.mesh_keys_file, "takes the place of --mesh-secret; give one of the two"
        )


def _mesh_warnings(settings: Settings) -> list[str]:
    mesh = settings.mesh
    if not mesh.ha_mesh:
        return []
    found = []
    secret = mesh.mesh_secret
    if secret is None and mesh.mesh_keys_file is None and mesh.mesh_tls_cert is None:
        found.append(
            "--ha-mesh: without --mesh-secret or mesh TLS whoever reaches the mesh port may join; keys of workers stay here"
        )
    if secret is not None and len(secret) < MESH_SECRET_CHARS_MIN:
        found.append(
            f"--mesh-secret: shorter than {MESH_SECRET_CHARS_MIN} characters can be guessed; 32 random ones are good"
        )
    return found


_RULES: tuple[Callable[[Settings], None], ...] = (
    _backoff,
    _queue,
    _tenant_limits,
    _buckets,
    _ports,
    _processes,
    _aliases,
    _discovery,
    _prefill_decode,
    _keys,
    _tokens,
    _certificates,
    _mesh,
)


def _refuse(flag: str, value: str, reason: str) -> None:
    raise SettingsError(flag, repr(value) if value else "", reason, is_combination=True)


def _repeated(texts: tuple[str, ...]) -> list[str]:
    """Texts that occur more than once, in order of their second occurrence."""
    seen: set[str] = set()
    repeated: dict[str, None] = {}
    for text in texts:
        if text in seen:
            repeated[text] = None
        seen.add(text)
    return list(repeated)
