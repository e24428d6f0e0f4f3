"""Tenant limits and usage over real sockets: section 14 of the contract, rows ADM-4, ADM-5, ADM-8, and ERR-13."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import anthropic
import openai
import pytest

from smg.errors import SettingsError
from tests.e2e.cluster import cluster
from tests.e2e.fake_worker import (
    answers,
    closes,
    fake_worker,
)
from tests.e2e.gateway import CHAT, HELLO, eventually, running_gateway
from tests.e2e.tenants import (
    BLUE,
    ENDPOINTS,
    KEYS,
    LIMITED,
    RED,
    flags,
    left,
    limited,
    red,
    still,
    told,
)
from tests.e2e.test_sdks import anthropic_client, in_thread, openai_client


@pytest.mark.parametrize("path", ENDPOINTS)
async def test_adm_4_err_13_every_endpoint_is_limited_before_a_worker_is_chosen(path: str, tmp_path: Path):
    async with limited(tmp_path, red(requests=1)) as (gateway, worker):
        body = ENDPOINTS[path]
        assert (await gateway.ask(path, body, RED)).status == 200
        answer = await gateway.ask(path, body, RED)
        assert answer.status == 429 and answer.code == LIMITED
        assert int(answer["retry-after"]) >= 1
        if path.startswith("/v1/messages"):
            assert answer.document["error"]["type"] == "rate_limit_error"
        else:
            assert answer.is_error(429, LIMITED)
        assert len(worker.turns) == 1
        for number in range(3):
            assert (await gateway.ask(path, body, BLUE)).status == 200, number
        assert gateway.metric("smg_tenant_rejected_total", tenant="auth:red", reason="requests") == 1
        assert gateway.metric("smg_http_responses_total", status_code="429", error_code=LIMITED) == 1


async def test_adm_4_an_audio_request_is_limited_too(tmp_path: Path):
    form = (
        b'--b\r\ncontent-disposition: form-data; name="model"\r\n\r\nm\r\n'
        b'--b\r\ncontent-disposition: form-data; name="file"; filename="a.wav"\r\n\r\nRIFF\r\n--b--\r\n'
    )
    async with limited(tmp_path, red(requests=1)) as (gateway, _):
        for status in (200, 429):
            answer = await gateway.ask(
                "/v1/audio/transcriptions", None, RED, body=form, type="multipart/form-data; boundary=b"
            )
            assert answer.status == status


async def test_adm_8_a_429_and_a_503_tell_what_is_left(tmp_path: Path):
    text = red(requests=2, tokens=1000) + "default_policy: {requests_per_minute: 5}\n"
    async with limited(tmp_path, text) as (gateway, _):
        good = await gateway.ask(CHAT, {**HELLO, "max_tokens": 100}, RED)
        assert good.status == 200 and not good.all("x-ratelimit-limit-requests")
        await gateway.ask(CHAT, HELLO, RED)
        answer = await gateway.ask(CHAT, HELLO, RED)
        assert answer.status == 429
        assert answer["x-ratelimit-limit-requests"] == "2"
        assert answer["x-ratelimit-remaining-requests"] == "0"
        assert 50 <= int(answer["x-ratelimit-reset-requests"].removesuffix("s")) <= 60
        assert answer["x-ratelimit-limit-tokens"] == "1000"
        assert 980 <= int(answer["x-ratelimit-remaining-tokens"]) <= 1000
        gone = await gateway.ask(CHAT, HELLO, BLUE, "x-smg-target-worker: nobody")
        assert gone.status == 503 and gone["x-ratelimit-limit-requests"] == "5"
        assert gone["x-ratelimit-remaining-requests"] == "5", "what was not answered comes back"
        assert not gone.all("x-ratelimit-limit-tokens")
        unknown = await gateway.ask(CHAT, {**HELLO, "model": "none"}, BLUE)
        assert unknown.status == 404 and not unknown.all("x-ratelimit-limit-requests")


async def test_adm_8_without_limits_nothing_is_told(tmp_path: Path):
    async with fake_worker("m") as worker:
        async with running_gateway("--rate-limit-tokens-per-second", "0.01", workers=[worker]) as gateway:
            await gateway.ask(CHAT, HELLO)
            answer = await gateway.ask(CHAT, HELLO)
            assert answer.is_error(429, "rate_limit_exceeded")
            assert not [name for name, _ in answer.lines if name.startswith("x-ratelimit")]


async def test_a_request_that_can_never_fit_is_told_so_and_sdks_do_not_try_again(tmp_path: Path):
    async with still(tmp_path, red(requests=10, tokens=1000)) as (gateway, worker):
        answer = await gateway.ask(CHAT, {**HELLO, "max_tokens": 1000}, RED)
        assert answer.is_error(429, LIMITED)
        message = answer.document["error"]["message"]
        assert "1001" in message and "1000" in message and "never" in message
        assert answer["x-should-retry"] == "false" and int(answer["retry-after"]) >= 1
        assert left(gateway, "requests") == 10 and worker.turns == []
        assert (await gateway.ask(CHAT, {**HELLO, "max_tokens": 999}, RED)).status == 200
        assert gateway.metric("smg_tenant_rejected_total", reason="too_large") == 1


async def test_a_bad_request_and_an_unknown_model_take_nothing(tmp_path: Path):
    async with limited(tmp_path, red(requests=10)) as (gateway, _):
        await gateway.ask(CHAT, {"model": "m", "messages": []}, RED)
        await gateway.ask(CHAT, {**HELLO, "model": "none"}, RED)
        limits = gateway.node.accounting.limits
        assert limits is not None and list(limits.buckets()) == []


TENANTS = """
default_policy: {requests_per_minute: 1}
tenants:
  - {tenant_key: 'auth:red', requests_per_minute: 2}
  - {tenant_key: 'auth:shared', requests_per_minute: 3}
"""


async def test_adm_5_a_key_names_its_tenant(tmp_path: Path):
    async with limited(tmp_path, TENANTS, "--api-key", "shared-key") as (gateway, _):
        for line, count in ((RED, 2), (BLUE, 1), ("x-api-key: shared-key", 3)):
            statuses = [(await gateway.ask(CHAT, HELLO, line)).status for _ in range(count + 1)]
            assert statuses == [200] * count + [429], line
            client = await gateway.connect()  # and one that keeps its connection, whose head repeats
            for _ in range(3):
                assert (await client.ask(CHAT, HELLO, line)).status == 429


async def test_adm_5_a_trusted_header_names_the_tenant_and_an_address_the_rest(tmp_path: Path):
    text = "default_policy: {requests_per_minute: 1}\ntenants: [{tenant_key: 'header:acme', requests_per_minute: 2}]\n"
    file = tmp_path / "limits.yaml"
    file.write_text(text)
    on = ("--tenant-rate-limit-enabled", "--tenant-rate-limit-config", str(file))
    async with fake_worker("m") as worker:
        async with running_gateway(*on, "--trust-tenant-header", workers=[worker]) as gateway:
            for line, count in (("x-smg-tenant-id: acme", 2), ("x-smg-tenant-id: other", 1), ("x-y: z", 1)):
                statuses = [(await gateway.ask(CHAT, HELLO, line)).status for _ in range(count + 1)]
                assert statuses == [200] * count + [429], line
            rows = gateway.node.accounting.accounts.book.rows()
            assert [row.tenant for row in rows] == ["header:acme", "header:other", "ip:127.0.0.1"]
        async with running_gateway(*on, workers=[worker]) as gateway:
            statuses = [
                (await gateway.ask(CHAT, HELLO, f"x-smg-tenant-id: t{number}")).status for number in range(3)
            ]
            assert statuses == [200, 429, 429], "a header that is not trusted names nobody"


RULES = """
default_policy:
  requests_per_minute: 100
  model_rules:
    - {rule_id: small, matcher: {type: prefix, value: m-}, requests_per_minute: 2}
    - {rule_id: one, matcher: {type: exact, value: m-1}, requests_per_minute: 1}
"""


async def test_adm_4_a_model_has_the_limit_of_its_rule_under_its_canonical_name(tmp_path: Path):
    async with fake_worker("m-1", "m-2", "m-3", "other") as worker:
        more = *flags(tmp_path, RULES), "--model-alias", "alias=m-1"
        async with running_gateway(*more, workers=[worker]) as gateway:

            async def ask(model: str) -> int:
                return (await gateway.ask(CHAT, {**HELLO, "model": model}, RED)).status

            assert [await ask("alias"), await ask("m-1")] == [200, 429]
            assert [await ask(model) for model in ("m-2", "m-3", "m-2")] == [200, 200, 429]
            assert {await ask("other") for _ in range(5)} == {200}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("tenants:\n- tenant_key: auth:a\n  requests_per_hour: 5\n", "line 3: tenants[0].requests_per_hour"),
        ("default_policy: {requests_per_minute: none}\n", "line 1"),
        ("tenants: [\n", "is not YAML"),
        ("{}\n", "limits nobody"),
    ],
)
async def test_adm_4_a_wrong_file_ends_the_start(text: str, said: str, tmp_path: Path):
    with pytest.raises(SettingsError) as error:
        async with running_gateway(*flags(tmp_path, text)):
            pass
    assert said in str(error.value) and error.value.is_combination


async def test_cli_7_the_switch_needs_the_file_and_the_file_must_be_there(tmp_path: Path):
    for wrong in (
        ("--tenant-rate-limit-enabled",),
        ("--tenant-rate-limit-enabled", "--tenant-rate-limit-config", str(tmp_path / "none.yaml")),
    ):
        with pytest.raises(SettingsError):
            async with running_gateway(*wrong):
                pass


async def test_a_file_without_the_switch_limits_nothing(tmp_path: Path):
    on = flags(tmp_path, red(requests=1))[1:]
    async with fake_worker("m") as worker, running_gateway(*on, workers=[worker]) as gateway:
        assert [(await gateway.ask(CHAT, HELLO, RED)).status for _ in range(3)] == [200] * 3
        assert gateway.node.accounting.limits is None


async def test_a_reload_changes_the_limits_keeps_what_was_used_and_refuses_what_is_wrong(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
):
    async with still(tmp_path, red(requests=3)) as (gateway, _):
        file = tmp_path / "limits.yaml"
        for _ in range(2):
            assert (await gateway.ask(CHAT, HELLO, RED)).status == 200
        limits = gateway.node.accounting.limits
        assert limits is not None
        kept = limits.plans
        (part,) = gateway.node.accounting.parts()
        for text in (red(requests=0), "tenants: [", red(requests=4) + "    x: 1\n"):
            file.write_text(text)
            assert not await gateway.node.reload.reload([part])
            assert limits.plans is kept
        file.write_text(red(requests=1000))
        assert await gateway.node.reload.reload([part])
        assert limits.plans.tenants[0].requests_per_minute == 1000
        assert left(gateway, "requests") == 1, "one of three was left; more comes with time"
        file.write_text("default_policy: {requests_per_minute: 1}\n")
        gateway.node.reload.ask()
        await eventually(lambda: limits.plans.default_policy is not None)
        assert (await gateway.ask(CHAT, HELLO, BLUE)).status == 200
        assert (await gateway.ask(CHAT, HELLO, BLUE)).status == 429


async def test_a_flood_of_tenants_stays_in_its_bounds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("smg.tenancy.limits.TENANTS_MAX", 20)
    monkeypatch.setattr("smg.tenancy.usage.LABELLED_GUESTS_MAX", 10)
    file = tmp_path / "limits.yaml"
    file.write_text("default_policy: {requests_per_minute: 1}\n")
    on = ("--tenant-rate-limit-enabled", "--tenant-rate-limit-config", str(file), "--trust-tenant-header")
    async with fake_worker("m") as worker, running_gateway(*on, workers=[worker]) as gateway:
        limits = gateway.node.accounting.limits
        assert limits is not None
        limits._tenants_max = 20
        client = await gateway.connect()
        statuses = [
            (await client.ask(CHAT, HELLO, f"x-smg-tenant-id: t{number % 40}")).status
            for number in range(120)
        ]
        assert statuses.count(200) == 20 + 1 and limits.tenant_count == 20
        page = gateway.node.metrics.render().decode()
        assert len([line for line in page.splitlines() if line.startswith("smg_tenant_requests_total")]) <= 11
        names = {line for line in page.splitlines() if line.startswith("smg_tenant_rejected_total")}
        assert len(names) <= 257 and gateway.metric("smg_tenant_rejected_total") == 120 - 21


# ---- GET /v1/usage


async def test_usage_is_told_to_admins_by_tenant_and_model():
    more = *KEYS, "--control-plane-api-keys", "ops:Ops:admin:of-ops", "eye:Eye:user:of-eye"
    ops = "authorization: Bearer of-ops"
    async with fake_worker("m", "n") as worker, running_gateway(*more, workers=[worker]) as gateway:
        worker.play = answers(200, told(10, 2, prompt_tokens_details={"cached_tokens": 4}))
        for line, model, count in ((RED, "m", 3), (RED, "n", 1), (BLUE, "m", 2)):
            for _ in range(count):
                assert (await gateway.ask(CHAT, {**HELLO, "model": model}, line)).status == 200
        for line in ((), (RED,)):
            assert (await gateway.ask("/v1/usage", None, *line)).status == 401
        assert (await gateway.ask("/v1/usage", None, method="POST")).status == 401
        assert (await gateway.ask("/v1/usage", None, "authorization: Bearer of-eye")).status == 200
        document = (await gateway.ask("/v1/usage", None, ops)).document
        assert document["object"] == "usage"
        (node,) = document["nodes"]
        assert node["name"] == "local" and node["since"] > 1.6e9
        assert [(row["tenant"], row["model"], row["requests"]) for row in document["usage"]] == [
            ("auth:blue", "m", 2), ("auth:red", "m", 3), ("auth:red", "n", 1),
        ]  # fmt: skip
        assert document["usage"][1] == {
            "tenant": "auth:red", "model": "m", "requests": 3, "prompt_tokens": 30, "cached_tokens": 12,
            "completion_tokens": 6, "estimated_requests": 0,
        }  # fmt: skip
        assert document["total"]["requests"] == 6 and document["total"]["prompt_tokens"] == 60
        some = (await gateway.ask("/v1/usage?tenant=auth:red&model=n", None, ops)).document
        assert [row["requests"] for row in some["usage"]] == [1] and some["total"]["requests"] == 1
        assert (await gateway.ask("/v1/usage?tenant=auth%3Ared", None, ops)).document["total"][
            "requests"
        ] == 4
        assert (await gateway.ask("/v1/usage?tenant=none", None, ops)).document["usage"] == []
        for wrong in ("day=1", "tenant=a&tenant=b"):
            assert (await gateway.ask(f"/v1/usage?{wrong}", None, ops)).is_error(400, "invalid_value")


async def test_usage_of_an_open_node_is_by_address_and_errors_are_not_in_it():
    async with fake_worker("m") as worker:
        async with running_gateway("--disable-retries", workers=[worker]) as gateway:
            worker.plays += [answers(500, {}), answers(400, {}), closes]
            statuses = [(await gateway.ask(CHAT, HELLO)).status for _ in range(4)]
            assert statuses == [500, 400, 502, 200]
            document = (await gateway.ask("/v1/usage")).document
            assert [(row["tenant"], row["requests"]) for row in document["usage"]] == [("ip:127.0.0.1", 1)]


# ---- the SDKs (ERR-31)


async def test_err_31_sdks_raise_rate_limit_errors_and_come_back_when_they_were_told(tmp_path: Path):
    # 100 tokens a second; the first request leaves too few for the second, for less than a second.
    async with limited(tmp_path, red(tokens=6000)) as (gateway, worker):
        worker.play = answers(200, {"choices": [], "content": [], **told(1, 5990)})
        patient = openai.OpenAI(base_url=f"{gateway.url}/v1", api_key="key-of-red", max_retries=1, timeout=20)
        with (
            openai_client(gateway, "key-of-red") as client,
            anthropic_client(gateway, "key-of-red") as second,
        ):

            def use() -> float:
                user: Any = HELLO["messages"]
                client.chat.completions.create(model="m", messages=user, max_tokens=10)
                with pytest.raises(openai.RateLimitError) as full:
                    client.chat.completions.create(model="m", messages=user, max_tokens=80)
                assert full.value.code == LIMITED and full.value.response.headers["retry-after"] == "1"
                with pytest.raises(anthropic.RateLimitError) as other:
                    second.messages.create(model="m", messages=user, max_tokens=80)
                assert other.value.body["error"]["type"] == "rate_limit_error"  # type: ignore[index,call-overload]  # the SDK says object
                began_s = time.monotonic()
                patient.chat.completions.create(model="m", messages=user, max_tokens=80)
                waited_s = time.monotonic() - began_s
                with pytest.raises(openai.RateLimitError):
                    patient.chat.completions.create(model="m", messages=user, max_tokens=90_000)
                return waited_s

            waited_s = await in_thread(use)
            assert waited_s >= 1.0, "Retry-After is honoured"
            rejected = "smg_tenant_rejected_total"
            assert gateway.metric(rejected, reason="too_large") == 1, "x-should-retry: false is honoured"
            assert gateway.metric(rejected, reason="tokens") == 3
        patient.close()


async def test_err_31_a_role_that_is_too_low_raises_permission_denied():
    keys = "--control-plane-api-keys", "eye:Eye:user:of-eye"
    async with running_gateway(*keys) as gateway:
        with openai_client(gateway, "of-eye") as client, anthropic_client(gateway, "of-eye") as second:

            def use() -> None:
                for sdk, kind in (
                    (client, openai.PermissionDeniedError),
                    (second, anthropic.PermissionDeniedError),
                ):
                    with pytest.raises(kind) as error:
                        sdk.post(f"{gateway.url}/flush_cache", cast_to=object)
                    assert error.value.status_code == 403
                with pytest.raises(openai.AuthenticationError):
                    client.with_options(api_key="wrong").post(f"{gateway.url}/flush_cache", cast_to=object)
                with pytest.raises(anthropic.AuthenticationError):
                    second.with_options(api_key="wrong").post(f"{gateway.url}/flush_cache", cast_to=object)

            await in_thread(use)


async def test_usage_of_a_mesh_is_the_sum_and_a_node_that_is_gone_is_not_in_it():
    async with fake_worker("m") as worker:
        more = *KEYS, "--control-plane-api-keys", "ops:Ops:admin:of-ops"
        async with cluster("a", "b", "c", workers=[worker], flags=more) as mesh:
            for name, count in (("a", 1), ("b", 2), ("c", 3)):
                for _ in range(count):
                    assert (await mesh[name].ask(CHAT, HELLO, RED)).status == 200

            async def asked(name: str) -> Any:
                return (await mesh[name].ask("/v1/usage", None, "authorization: Bearer of-ops")).document

            for name in "abc":
                document = await asked(name)
                assert [node["name"] for node in document["nodes"]] == ["a", "b", "c"]
                assert document["missing"] == []
                assert [(row["tenant"], row["requests"]) for row in document["usage"]] == [("auth:red", 6)]
                assert document["total"]["prompt_tokens"] == 18
            await mesh.crash("c")
            await eventually(lambda: "c" not in mesh.mesh("a").peers.live_names, 10)
            document = await asked("a")
            assert [node["name"] for node in document["nodes"]] == ["a", "b"]
            assert document["total"]["requests"] == 3
