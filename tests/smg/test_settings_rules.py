"""Combinations that may not start, and those that start with a warning."""

from __future__ import annotations

import pytest

from smg.errors import SettingsError
from smg.settings import (
    Discovery,
    Health,
    Limits,
    Listening,
    LoadPolls,
    Prefill,
    PrefillDecode,
    Retries,
    Routing,
    Settings,
    Telemetry,
    Workers,
)
from smg.settings_rules import check, warnings

REFUSED = [
    (
        Settings(retries=Retries(retry_initial_backoff_ms=100, retry_max_backoff_ms=99)),
        "--retry-max-backoff-ms",
    ),
    (Settings(limits=Limits(queue_timeout_secs=0.0)), "--queue-timeout-secs"),
    (Settings(limits=Limits(tenant_rate_limit_enabled=True)), "--tenant-rate-limit-enabled"),
    (Settings(telemetry=Telemetry(prometheus_duration_buckets=(1.0, 0.5))), "--prometheus-duration-buckets"),
    (Settings(telemetry=Telemetry(prometheus_duration_buckets=(1.0, 1.0))), "--prometheus-duration-buckets"),
    (Settings(listening=Listening(port=29000)), "--prometheus-port"),
    (Settings(listening=Listening(host="10.0.0.1", health_check_port=30000)), "--health-check-port"),
    (Settings(listening=Listening(health_check_port=29000)), "--health-check-port"),
    (Settings(workers=Workers(model_alias=("a=x", "a=y"))), "--model-alias"),
    (Settings(workers=Workers(model_alias=("a=b", "b=c"))), "--model-alias"),
    (Settings(discovery=Discovery(service_discovery=True)), "--service-discovery"),
    (Settings(discovery=Discovery(discovery_provider="file")), "--discovery-provider"),
    (Settings(pd=PrefillDecode(prefill=(Prefill("http://a"),))), "--prefill"),
    (Settings(pd=PrefillDecode(decode=("http://a",))), "--decode"),
    (
        Settings(workers=Workers(worker_urls=("http://a",)), pd=PrefillDecode(pd_disaggregation=True)),
        "--worker-urls",
    ),
]


@pytest.mark.parametrize(
    ("settings", "flag"), REFUSED, ids=lambda value: value if isinstance(value, str) else ""
)
def test_a_combination_that_cannot_work_is_refused_by_the_name_of_its_flag(
    settings: Settings, flag: str
) -> None:
    with pytest.raises(SettingsError) as refused:
        check(settings)
    assert refused.value.flag == flag
    assert refused.value.is_combination
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    "settings",
    [
        Settings(),
        Settings(limits=Limits(queue_size=0, queue_timeout_secs=0.0)),
        Settings(
            listening=Listening(host="10.0.0.1", port=9),
            telemetry=Telemetry(prometheus_port=9, prometheus_host="10.0.0.2"),
        ),
        Settings(workers=Workers(model_alias=("a=x", "a=x", "b=x"))),
        Settings(discovery=Discovery(service_discovery=True, discovery_provider="file", discovery_file="/w")),
        Settings(discovery=Discovery(discovery_file="/w")),
        Settings(pd=PrefillDecode(pd_disaggregation=True)),
    ],
)
def test_a_combination_that_works_is_accepted(settings: Settings) -> None:
    check(settings)


WARNED = [
    (
        Settings(routing=Routing(policy="power_of_two"), workers=Workers(worker_urls=("http://a",))),
        "power_of_two",
    ),
    (Settings(workers=Workers(worker_urls=("http://a", "http://a"))), "--worker-urls: http://a"),
    (Settings(pd=PrefillDecode(pd_disaggregation=True, prefill=(Prefill("http://a"),))), "--decode"),
    (Settings(routing=Routing(prefill_policy="random")), "--prefill-policy"),
    (
        Settings(health=Health(disable_health_check=True, remove_unhealthy_workers=True)),
        "--remove-unhealthy-workers",
    ),
    (
        Settings(routing=Routing(worker_overload_shed=True, worker_overload_protection=False)),
        "--worker-overload-shed",
    ),
    (Settings(load_polls=LoadPolls(disable_load_monitoring=True)), "--disable-load-monitoring"),
    (Settings(limits=Limits(tenant_rate_limit_config="f")), "without --tenant-rate-limit-enabled"),
]


@pytest.mark.parametrize(
    ("settings", "words"), WARNED, ids=lambda value: value if isinstance(value, str) else ""
)
def test_what_is_probably_not_meant_is_warned_of_once(settings: Settings, words: str) -> None:
    check(settings)
    found = warnings(settings)
    assert len(found) == 1
    assert words in found[0]


@pytest.mark.parametrize(
    "settings",
    [
        Settings(),
        Settings(
            routing=Routing(policy="power_of_two"), workers=Workers(worker_urls=("http://a", "http://b"))
        ),
        Settings(routing=Routing(policy="power_of_two"), discovery=Discovery(discovery_file="/w")),
        Settings(
            pd=PrefillDecode(pd_disaggregation=True, prefill=(Prefill("http://a"),), decode=("http://b",)),
            routing=Routing(prefill_policy="random"),
        ),
    ],
)
def test_what_is_meant_is_not_warned_of(settings: Settings) -> None:
    assert warnings(settings) == []
