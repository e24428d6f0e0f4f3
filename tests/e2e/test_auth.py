"""Tenant keys, control-plane keys, tokens, audit and key reloads, over real sockets (contract section 15, ADM-5)."""

from __future__ import annotations

import re
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import anthropic
import openai
import pytest
import trio

from smg.fleet.worker import worker_id
from tests.e2e.fake_worker import FakeWorker, answers, fake_worker
from tests.e2e.gateway import CHAT, HELLO, Answer, Gateway, eventually, running_gateway
from tests.smg.tenancy.token_maker import Signer, confused_token, none_token

TENANTS = "--tenant-api-key", "red:red-key", "blue:blue-key"
CONTROL = "--control-plane-api-keys", "ops:Operators:admin:ops-key", "eye:Viewers:user:eye-key"
DATA_REALM = 'Bearer realm="data-plane"'
CONTROL_REALM = 'Bearer realm="control-plane"'
NOBODY = worker_id("http://127.0.0.1:1")
ADMIN = [
    ("GET", "/workers"),
    ("POST", "/workers"),
    ("GET", f"/workers/{NOBODY}"),
    ("DELETE", f"/workers/{NOBODY}"),
    ("GET", "/get_loads"),
    ("POST", "/flush_cache"),
    ("POST", "/start_profile"),
    ("POST", "/route/explain"),
    ("GET", "/mesh/status"),
    ("GET", "/workers/no/such/path"),
    ("PUT", "/workers"),
    ("POST", "/parse/reasoning"),
    ("GET", "/v1/tokenizers"),
]


def bearer(key: str) -> str:
    return f"authorization: Bearer {key}"


def is_refused(answer: Answer, realm: str) -> bool:
    assert answer["www-authenticate"] == realm, answer
    return answer.is_error(401, "invalid_api_key")


async def test_sec_1_sec_4_tenant_keys_open_inference_and_no_admin_route():
    async with fake_worker("m") as worker, running_gateway(*TENANTS, workers=[worker]) as gateway:
        for key in ("red-key", "blue-key"):
            assert (await gateway.ask(CHAT, HELLO, bearer(key))).status == 200
            assert key.encode() not in (await worker.next_turn()).raw
        assert is_refused(await gateway.ask(CHAT, HELLO), DATA_REALM)
        assert is_refused(await gateway.ask(CHAT, HELLO, bearer("green-key")), DATA_REALM)
        for method, path in ADMIN:
            for line in ([], [bearer("red-key")], ["x-api-key: blue-key"]):
                assert (await gateway.ask(path, None, *line, method=method)).status == 401, path
        assert (await gateway.ask("/v1/models")).status == 200


async def test_sec_5_control_plane_keys_open_admin_and_nothing_else():
    flags = *CONTROL, "--api-key", "shared-key"
    async with fake_worker("m") as worker, running_gateway(*flags, workers=[worker]) as gateway:
        for method, path in ADMIN:
            for line in ([], [bearer("shared-key")], [bearer("wrong")]):
                answer = await gateway.ask(path, None, *line, method=method)
                assert (answer.status, answer["www-authenticate"]) == (401, CONTROL_REALM), path
            assert (await gateway.ask(path, None, bearer("ops-key"), method=method)).status not in (401, 403)
            seen = await gateway.ask(path, None, bearer("eye-key"), method=method)
            if method == "GET":
                assert seen.status not in (401, 403), path
            elif path not in ("/workers/no/such/path",) and (method, path) != ("PUT", "/workers"):
                assert (seen.status, seen.code) == (403, "forbidden"), path
        for key in ("ops-key", "eye-key"):
            assert is_refused(await gateway.ask(CHAT, HELLO, bearer(key)), DATA_REALM)
        assert (await gateway.ask(CHAT, HELLO, bearer("shared-key"))).status == 200


async def test_sec_5_err_8_a_viewer_is_told_in_json_what_he_may_not():
    async with running_gateway(*CONTROL) as gateway:
        answer = await gateway.ask("/flush_cache", None, bearer("eye-key"), method="POST")
        assert answer.is_error(403, "forbidden") and answer.document["error"]["type"] == "permission_error"
        answer = await gateway.ask("/workers", {"url": "http://127.0.0.1:1"}, bearer("eye-key"))
        assert answer.is_error(403, "forbidden")
        assert gateway.node.registry.workers() == ()
        assert (await gateway.ask("/workers", None, bearer("eye-key"), method="HEAD")).status == 200


ISSUER_PATH = "/realm"


class Provider:
    """An identity provider over HTTP: a fake server whose pages are a discovery document and a key set."""

    def __init__(self, server: FakeWorker) -> None:
        self.server = server
        self.issuer = f"{server.url}{ISSUER_PATH}"
        self.signers = [Signer("r1"), Signer("e1", "P-256"), Signer("e3", "P-384")]
        self.discovery: dict[str, Any] = {"issuer": self.issuer, "jwks_uri": f"{self.issuer}/keys"}
        self.publish()

    def publish(self) -> None:
        pages = self.server.on_path
        pages[f"{ISSUER_PATH}/.well-known/openid-configuration"] = answers(200, self.discovery)
        pages[f"{ISSUER_PATH}/keys"] = answers(200, {"keys": [signer.jwk() for signer in self.signers]})

    @property
    def fetches(self) -> int:
        return sum(1 for turn in self.server.asked if turn.path.endswith("/keys"))

    def claims(self, **changed: Any) -> dict[str, Any]:
        claims = {
            "iss": self.issuer,
            "aud": "smg",
            "sub": "alice",
            "exp": int(time.time()) + 600,
            "roles": ["admin"],
        }
        return {name: value for name, value in {**claims, **changed}.items() if value is not None}

    def token(self, signer: Signer | None = None, algorithm: str | None = None, **changed: Any) -> str:
        return (signer or self.signers[0]).token(self.claims(**changed), algorithm)

    @property
    def flags(self) -> tuple[str, ...]:
        return "--jwt-issuer", self.issuer, "--jwt-audience", "smg"


@asynccontextmanager
async def provider() -> AsyncIterator[Provider]:
    async with fake_worker() as server:
        yield Provider(server)


async def test_sec_6_tokens_of_the_provider_open_admin_routes():
    async with provider() as idp, running_gateway(*idp.flags, *CONTROL) as gateway:
        rsa, p256, p384 = idp.signers
        for signer, algorithm in (
            (rsa, "RS256"),
            (rsa, "RS384"),
            (rsa, "RS512"),
            (p256, "ES256"),
            (p384, "ES384"),
        ):
            token = idp.token(signer, algorithm)
            assert (await gateway.ask("/workers", None, bearer(token))).status == 200, algorithm
            assert (await gateway.ask("/flush_cache", None, bearer(token), method="POST")).status == 200
        viewer = idp.token(roles=["viewer"])
        assert (await gateway.ask("/workers", None, bearer(viewer))).status == 200
        assert (await gateway.ask("/flush_cache", None, bearer(viewer), method="POST")).code == "forbidden"
        assert (await gateway.ask("/workers", None, bearer("ops-key"))).status == 200
        assert idp.fetches == 1


async def test_sec_6_forged_and_stale_tokens_are_401():
    async with provider() as idp, running_gateway(*idp.flags) as gateway:
        rsa = idp.signers[0]
        now = time.time()
        good = idp.token()
        head, body, signature = good.split(".")
        client = await gateway.connect()
        for name, token in {
            "expired": idp.token(exp=now - 40),
            "no expiry": idp.token(exp=None),
            "of the future": idp.token(nbf=now + 60),
            "other audience": idp.token(aud="other"),
            "other issuer": idp.token(iss="https://evil.example"),
            "none": none_token(idp.claims(), "r1"),
            "no signature": f"{head}.{body}.",
            "other signature": f"{head}.{body}.{signature[::-1]}",
            "other claims": f"{head}.{idp.token(sub='mallory').split('.')[1]}.{signature}",
            "key confusion": confused_token(idp.claims(), rsa),
            "other algorithm": Signer("r1", name="r1").token(idp.claims(), "RS256", alg="PS256"),
            "algorithm of another key": idp.signers[1].token(idp.claims(), kid="r1"),
            "no kid": rsa.token(idp.claims(), kid=None),
            "unknown kid": Signer("zz", name="r1").token(idp.claims()),
            "impostor": Signer("r1", name="impostor").token(idp.claims()),
            "oversize": idp.token(pad="x" * 20_000),
            "garbage": "a.b.c",
            "dots": "..",
            "unicode": "\xe9.\xe9.\xe9",
        }.items():
            answer = await client.ask("/workers", None, bearer(token))
            assert is_refused(answer, CONTROL_REALM), name
        for name, token in {
            "just expired": idp.token(exp=now - 20),
            "just not yet": idp.token(nbf=now + 20),
            "several audiences": idp.token(aud=["x", "smg"]),
        }.items():
            assert (await client.ask("/workers", None, bearer(token))).status == 200, name
        assert (await client.ask("/workers", None, f"x-api-key: {good}")).status == 401
        # Tokens are for the control plane; on inference of an open gateway they are not even looked at.
        assert (await client.ask(CHAT, HELLO, bearer("a.b.c"))).status == 404


async def test_sec_6_roles_come_through_the_mapping():
    mapping = "--jwt-role-claim", "realm.roles", "--jwt-role-mapping", "Ops=admin", "Eye=user"
    async with provider() as idp, running_gateway(*idp.flags, *mapping) as gateway:
        for claims, status in (
            ({"realm": {"roles": ["Ops"]}}, 200),
            ({"realm": {"roles": ["Eye"]}}, 403),
            ({"groups": ["Ops"]}, 200),
            ({"roles": ["admin"]}, 403),
            ({"roles": None}, 403),
        ):
            token = idp.token(**{"roles": None, **claims})
            assert (await gateway.ask("/flush_cache", None, bearer(token), method="POST")).status == status, (
                claims
            )


async def test_sec_7_a_rotated_key_is_found_at_once_and_made_up_ones_cost_nothing():
    async with provider() as idp, running_gateway(*idp.flags) as gateway:
        assert (await gateway.ask("/workers", None, bearer(idp.token()))).status == 200
        old, idp.signers = idp.signers[0], [Signer("r2", "P-256")]
        idp.publish()
        assert (await gateway.ask("/workers", None, bearer(idp.token()))).status == 200
        assert (await gateway.ask("/workers", None, bearer(idp.token(old)))).status == 401
        assert idp.fetches == 2
        for number in range(100):
            token = Signer(f"made-up-{number}", name="r1").token(idp.claims())
            assert (await gateway.ask("/workers", None, bearer(token))).status == 401
        assert idp.fetches == 2


async def test_sec_7_admin_stays_closed_while_the_provider_is_away():
    async with provider() as idp:
        idp.server.on_path.clear()
        async with running_gateway(*idp.flags, *CONTROL) as gateway:
            assert is_refused(await gateway.ask("/workers", None, bearer(idp.token())), CONTROL_REALM)
            assert is_refused(await gateway.ask("/workers"), CONTROL_REALM)
            assert (await gateway.ask("/workers", None, bearer("ops-key"))).status == 200
            assert (await gateway.ask(CHAT, HELLO)).status == 404


async def test_sec_7_no_redirect_is_followed():
    async with provider() as idp:
        idp.server.on_path[f"{ISSUER_PATH}/keys"] = answers(302, {}, f"location: {idp.server.url}/elsewhere")
        idp.server.on_path["/elsewhere"] = answers(200, {"keys": [idp.signers[0].jwk()]})
        async with running_gateway(*idp.flags) as gateway:
            assert (await gateway.ask("/workers", None, bearer(idp.token()))).status == 401
        assert all(turn.path != "/elsewhere" for turn in idp.server.asked)


async def test_sec_7_a_private_address_is_asked_only_when_the_operator_named_it():
    async with provider() as idp, fake_worker() as inside:
        inside.on_path["/keys"] = answers(200, {"keys": [idp.signers[0].jwk()]})
        idp.discovery["jwks_uri"] = f"{inside.url}/keys"
        idp.publish()
        async with running_gateway(*idp.flags) as gateway:
            assert (await gateway.ask("/workers", None, bearer(idp.token()))).status == 401
        assert inside.connections_total == 0
        async with running_gateway(*idp.flags, "--jwt-jwks-uri", f"{inside.url}/keys") as gateway:
            assert (await gateway.ask("/workers", None, bearer(idp.token()))).status == 200


async def test_sec_7_a_client_that_leaves_while_the_provider_is_asked_is_let_go():
    async with provider() as idp:
        asked = trio.Event()

        async def silent(turn: Any) -> None:
            asked.set()
            await turn.wait_gone()

        idp.server.on_path[f"{ISSUER_PATH}/keys"] = silent
        async with running_gateway(*idp.flags) as gateway:
            client = await gateway.connect()
            await asked.wait()
            await client.send(f"GET /workers HTTP/1.1\r\nhost: g\r\n{bearer(idp.token())}\r\n\r\n".encode())
            await client.stream.send_eof()
            await eventually(lambda: gateway.server.connection_count == 0)


def audit_lines(text: str) -> list[dict[str, str]]:
    lines = [line for line in text.splitlines() if "smg.audit" in line]
    return [dict(re.findall(r'(\w+)=("(?:[^"\\]|\\.)*"|\S+)', line)) for line in lines]


async def test_sec_8_every_admin_call_is_on_record(capfd):
    async with provider() as idp, running_gateway(*idp.flags, *CONTROL) as gateway:
        await gateway.ask("/workers?key=ops-key", None, bearer("ops-key"), "x-request-id: call-1")
        await gateway.ask(
            "/workers", {"url": "http://127.0.0.1:1"}, bearer("eye-key"), "x-request-id: call-2"
        )
        await gateway.ask("/workers", None, bearer("wrong"), "x-request-id: call-3")
        await gateway.ask(f"/workers/{NOBODY}", None, bearer(idp.token()), "x-request-id: call-4")
        await gateway.ask("/workers/x/y", None, bearer(idp.token(exp=1)), "x-request-id: call-5")
        await gateway.ask("/v1/models")
        await gateway.ask(CHAT, HELLO)
    records = audit_lines(capfd.readouterr().err)
    fields = "principal", "auth_method", "role", "method", "path", "status", "outcome", "request_id"
    assert [tuple(record[field] for field in fields) for record in records] == [
        ("key:ops", "control_key", "admin", "GET", "/workers", "200", "success", "call-1"),
        ("key:eye", "control_key", "user", "POST", "/workers", "403", "denied", "call-2"),
        ("unknown", "none", "none", "GET", "/workers", "401", "denied", "call-3"),
        ("token:alice", "token", "admin", "GET", f"/workers/{NOBODY}", "404", "failed", "call-4"),
        ("unknown", "none", "none", "GET", "/workers/x/y", "401", "denied", "call-5"),
    ]
    assert records[4]["reason"] == "expired"


async def test_sec_8_the_record_can_be_switched_off_and_says_who_called_an_open_gateway(capfd):
    async with running_gateway() as gateway:
        await gateway.ask("/workers")
    assert [record["principal"] for record in audit_lines(capfd.readouterr().err)] == ["anonymous"]
    async with running_gateway("--disable-audit-logging") as gateway:
        await gateway.ask("/workers")
    assert audit_lines(capfd.readouterr().err) == []


async def test_sec_8_nobody_writes_a_record_of_his_own(capfd):
    async with provider() as idp, running_gateway(*idp.flags) as gateway:
        forged = (
            "x\n2026-01-01T00:00:00.000Z INFO  smg.audit admin call principal=key:ops \u2028\x1b[31m\u202e"
        )
        await gateway.ask("/workers", None, bearer(idp.token(sub=forged)))
        await gateway.ask("/workers/%0aINFO%20smg.audit%20admin", None, bearer(idp.token()))
        await gateway.ask("/workers/" + "a" * 5000, None, bearer(idp.token()))
    text = capfd.readouterr().err
    records = audit_lines(text)
    assert len(records) == 3 and records[0]["principal"].startswith('"token:x')
    assert "\x1b" not in text and "\u202e" not in text and max(map(len, text.splitlines())) < 2000


async def test_adm_5_the_tenant_of_a_request():
    flags = *TENANTS, "--api-key", "shared-key", "--trust-tenant-header", "--tenant-header-name", "x-customer"
    async with fake_worker("m") as worker:
        for given, lines, tenant in (
            (flags, [bearer("red-key")], "auth:red"),
            (flags, ["x-api-key: blue-key", "x-customer: acme"], "auth:blue"),
            (flags, [bearer("shared-key"), "x-customer: acme"], "auth:shared"),
            (flags[-3:], ["x-customer: acme"], "header:acme"),
            (flags[-3:], ["x-customer: a b"], "ip:127.0.0.1"),
            (flags[-3:], [], "ip:127.0.0.1"),
            ((), ["x-smg-tenant-id: acme"], "ip:127.0.0.1"),
        ):
            seen: list[str] = []
            async with running_gateway(*given, workers=[worker]) as gateway:
                tenants = gateway.node._access.tenants
                serve = gateway.node._app._generate.serve

                async def watch(
                    exchange: Any, *rest: Any, serve: Any = serve, tenants: Any = tenants, seen: Any = seen
                ) -> None:
                    seen.append(tenants.of(exchange))
                    await serve(exchange, *rest)

                gateway.node._app._generate.serve = watch  # type: ignore[method-assign]  # looks at the head
                client = await gateway.connect()
                for _ in range(3):
                    assert (await client.ask(CHAT, HELLO, *lines)).status == 200
                    turn = await worker.next_turn()
                    assert b"acme" not in turn.raw and b"x-customer" not in turn.names
            assert seen == [tenant] * 3


@asynccontextmanager
async def keyed(folder: Path, **files: str) -> AsyncIterator[tuple[Gateway, FakeWorker]]:
    """A gateway whose keys are in files."""
    for name, text in files.items():
        (folder / name).write_text(text)
    flags = [word for name in files for word in (f"--{name.replace('_', '-')}", f"@{folder / name}")]
    async with fake_worker("m") as worker, running_gateway(*flags, workers=[worker]) as gateway:
        gateway.node.reload._interval_s = 0.01
        gateway.node.reload.ask()
        yield gateway, worker


async def test_keys_in_files_are_read_again_when_they_change(tmp_path, capfd):
    files = {"api_key": "first-key\n", "tenant_api_key": "red:red-1\nblue:blue-1\n"}
    async with keyed(tmp_path, **files) as (gateway, worker):
        client = await gateway.connect()
        for _ in range(3):
            assert (await client.ask(CHAT, HELLO, bearer("first-key"))).status == 200
        (tmp_path / "api_key").write_text("second-key\n")
        (tmp_path / "tenant_api_key").write_text("red:red-1\nred:red-2\ngreen:green-1\n")
        await eventually(lambda: gateway.node._access.gates.keys.serving(b"green-1"))
        # The same bytes on the same connection, which were remembered as allowed.
        assert is_refused(await client.ask(CHAT, HELLO, bearer("first-key")), DATA_REALM)
        assert is_refused(await client.ask(CHAT, HELLO, bearer("blue-1")), DATA_REALM)
        for key in ("second-key", "red-1", "red-2", "green-1"):
            assert (await client.ask(CHAT, HELLO, bearer(key))).status == 200
        assert (await gateway.ask("/workers", None, bearer("second-key"))).status == 200
        # An old key beside a good one, where clients put it by mistake, goes no further than here.
        await client.ask(CHAT, HELLO, bearer("second-key"), "openai-organization: first-key")
        assert all(b"first-key" not in turn.raw for turn in worker.turns)
    text = capfd.readouterr().err
    for told in ("auth:green: a key was added", "auth:blue: a key was removed", "auth:red: a key was added"):
        assert told in text
    assert not re.search(r"first-key|second-key|red-\d|blue-\d|green-\d", text)


@pytest.mark.parametrize(
    "broken", ["", "\n\n", "red", "red:same-key\nblue:same-key", "x" * 70_000, "red:caf\xe9"]
)
async def test_a_broken_key_file_changes_nothing_and_opens_nothing(tmp_path, capfd, broken):
    async with keyed(tmp_path, tenant_api_key="red:red-1") as (gateway, _):
        (tmp_path / "tenant_api_key").write_text(broken)
        gateway.node.reload.ask()
        text = ""

        def is_told() -> bool:
            nonlocal text
            text += capfd.readouterr().err
            return "not reloaded, what was loaded before stands" in text

        await eventually(is_told)
        assert "same-key" not in text and "xxxx" not in text
        assert (await gateway.ask(CHAT, HELLO, bearer("red-1"))).status == 200
        assert (await gateway.ask(CHAT, HELLO)).status == 401


async def test_a_waiting_request_keeps_what_it_was_allowed_and_its_old_key_stays_here(tmp_path):
    """A key is replaced while a request that brought it waits for a slot: it is served, without the key."""
    (tmp_path / "key").write_text("old-key")
    flags = "--api-key", f"@{tmp_path / 'key'}", "--max-concurrent-requests", "1"
    async with fake_worker("m") as worker, running_gateway(*flags, workers=[worker]) as gateway:
        release = trio.Event()
        usual = worker.play

        async def held(turn: Any) -> None:
            await release.wait()
            await usual(turn)

        worker.plays.append(held)
        answers_of: list[int] = []

        async def ask() -> None:
            answers_of.append((await gateway.ask(CHAT, HELLO, bearer("old-key"))).status)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(ask)
            await worker.next_turn()
            nursery.start_soon(ask)
            await eventually(lambda: gateway.node._admission.waiting == 1)
            (tmp_path / "key").write_text("new-key")
            gateway.node.reload.ask()
            await eventually(lambda: gateway.node._access.gates.keys.serving(b"new-key"))
            release.set()
        assert answers_of == [200, 200]
        assert len(worker.turns) == 2 and all(b"old-key" not in turn.raw for turn in worker.turns)


async def test_the_key_for_workers_is_replaced_too(tmp_path):
    async with keyed(tmp_path, worker_api_key="old-worker-key") as (gateway, worker):
        await gateway.ask(CHAT, HELLO)
        assert (await worker.next_turn()).header("authorization") == b"Bearer old-worker-key"
        (tmp_path / "worker_api_key").write_text("new-worker-key")
        await eventually(lambda: gateway.worker(worker).spec.api_key == "new-worker-key")
        await gateway.ask(CHAT, HELLO)
        assert (await worker.next_turn()).header("authorization") == b"Bearer new-worker-key"


def raised_by(call: Any, *arguments: Any, **options: Any) -> BaseException:
    try:
        call(*arguments, **options)
    except (openai.APIError, anthropic.APIError) as error:
        return error
    raise AssertionError("nothing was raised")


async def test_err_31_the_sdks_raise_what_their_users_expect():
    flags = *TENANTS, *CONTROL
    message = {"model": "m", "max_tokens": 5, "messages": HELLO["messages"]}
    async with fake_worker("m") as worker, running_gateway(*flags, workers=[worker]) as gateway:

        def use() -> None:
            with openai.OpenAI(api_key="wrong", base_url=f"{gateway.url}/v1", max_retries=0) as wrong:
                error = raised_by(wrong.chat.completions.create, **HELLO)
                assert type(error) is openai.AuthenticationError and error.code == "invalid_api_key"
            with openai.OpenAI(api_key="eye-key", base_url=gateway.url, max_retries=0) as viewer:
                error = raised_by(viewer.post, "/flush_cache", cast_to=object)
                assert type(error) is openai.PermissionDeniedError and error.code == "forbidden"
            with openai.OpenAI(api_key="red-key", base_url=f"{gateway.url}/v1", max_retries=0) as right:
                assert right.chat.completions.with_raw_response.create(**HELLO).status_code == 200

        def use_the_other() -> None:
            for key in ({"api_key": "wrong"}, {"api_key": None, "auth_token": "wrong"}):
                with anthropic.Anthropic(base_url=gateway.url, max_retries=0, **key) as wrong:
                    error = raised_by(wrong.messages.create, **message)
                    assert type(error) is anthropic.AuthenticationError
                    assert error.body["error"]["type"] == "authentication_error"
            with anthropic.Anthropic(api_key="eye-key", base_url=gateway.url, max_retries=0) as viewer:
                error = raised_by(viewer.post, "/flush_cache", cast_to=object)
                assert type(error) is anthropic.PermissionDeniedError
            for key in ({"api_key": "blue-key"}, {"api_key": None, "auth_token": "blue-key"}):
                with anthropic.Anthropic(base_url=gateway.url, max_retries=0, **key) as right:
                    assert right.messages.with_raw_response.create(**message).status_code == 200

        await trio.to_thread.run_sync(use_the_other)
        await trio.to_thread.run_sync(use)
