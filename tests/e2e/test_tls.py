"""TLS on both sides of a gateway (SEC-10): everything behaves as over plain sockets, and certificates change in flight."""

from __future__ import annotations

import socket
import ssl
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import openai
import pytest
import trio
import trustme

from smg.errors import SettingsError
from smg.fleet.worker import worker_id
from tests.e2e.fake_worker import (
    DONE,
    FakeWorker,
    Gate,
    Turn,
    answers,
    breaks,
    event,
    fake_worker,
    hangs,
    head,
    says,
    streams,
)
from tests.e2e.gateway import (
    CHAT,
    HELLO,
    PATIENCE_S,
    STREAM,
    Client,
    Gateway,
    eventually,
    request,
    running_gateway,
)
from tests.e2e.test_auth import bearer, provider

AUTHORITY = trustme.CA()
STRANGER = trustme.CA()


class Files:
    """The certificate files of one gateway."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.ca = folder / "ca.pem"
        AUTHORITY.cert_pem.write_to_path(self.ca)
        self.serving_flags = (
            "--tls-cert-path",
            str(folder / "tls.pem"),
            "--tls-key-path",
            str(folder / "tls.key"),
        )
        self.client_flags = (
            *(
                "--client-cert-path",
                str(folder / "client.pem"),
                "--client-key-path",
                str(folder / "client.key"),
            ),
            *("--ca-cert-paths", str(self.ca)),
        )
        self.issue("tls")
        self.issue("client", "gateway.example")

    def issue(self, name: str, *identities: str, authority: trustme.CA = AUTHORITY) -> None:
        """Puts a new certificate and its key in place."""
        certificate = authority.issue_cert(*(identities or ("127.0.0.1", "localhost")))
        (self.folder / f"{name}.pem").write_bytes(
            b"".join(blob.bytes() for blob in certificate.cert_chain_pems)
        )
        certificate.private_key_pem.write_to_path(self.folder / f"{name}.key")


@pytest.fixture
def files(tmp_path: Path) -> Files:
    return Files(tmp_path)


def trusting(*, version: ssl.TLSVersion | None = None) -> ssl.SSLContext:
    context = ssl.create_default_context()
    AUTHORITY.configure_trust(context)
    if version is not None:
        context.maximum_version = version
    return context


async def connect(gateway: Gateway, receive_bytes: int | None = None, **options: Any) -> Client:
    """A sealed connection; the plain one below it is closed with the gateway at the latest."""
    plain = await gateway.connect(receive_bytes=receive_bytes)
    stream = trio.SSLStream(
        plain.stream, trusting(**options), server_hostname="127.0.0.1", https_compatible=True
    )
    with trio.fail_after(PATIENCE_S):
        await stream.do_handshake()
    client = Client(stream)  # type: ignore[arg-type]  # TLS streams have the methods that are used
    client.reset = plain.reset  # type: ignore[method-assign]  # a reset is the socket's
    return client


async def ask(gateway: Gateway, *arguments: Any, **options: Any) -> Any:
    client = await connect(gateway)
    answer = await client.ask(*arguments, **options)
    await client.leave()
    return answer


@asynccontextmanager
async def sealed_worker(
    *models: str,
    identity: str = "127.0.0.1",
    authority: trustme.CA = AUTHORITY,
    prepare: Callable[[ssl.SSLContext], None] | None = None,
) -> AsyncIterator[FakeWorker]:
    """A fake worker behind a TLS front of its own; `seen` on it are the certificates that callers showed."""
    async with fake_worker(*models) as worker, trio.open_nursery() as nursery:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        authority.issue_cert(identity).configure_cert(context)
        if prepare is not None:
            prepare(context)
        worker.seen = []  # type: ignore[attr-defined]

        async def pass_on(source: Any, target: Any) -> None:
            try:
                while data := await source.receive_some(65536):
                    await target.send_all(data)
                await target.aclose()
            except (trio.BrokenResourceError, trio.ClosedResourceError):
                # A reset on one side is one on the other.
                for stream in (source, target):
                    getattr(stream, "transport_stream", stream).socket.close()

        async def front(raw: trio.SocketStream) -> None:
            near = trio.SSLStream(raw, context, server_side=True)
            try:
                await near.do_handshake()
            except trio.BrokenResourceError:
                return
            worker.seen.append(near.getpeercert())  # type: ignore[attr-defined]
            far = await trio.open_tcp_stream("127.0.0.1", worker.port)
            async with trio.open_nursery() as both:
                both.start_soon(pass_on, near, far)
                both.start_soon(pass_on, far, near)

        (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
        nursery.start_soon(trio.serve_listeners, front, [listener])
        worker.url = f"https://127.0.0.1:{listener.socket.getsockname()[1]}"
        worker.id = worker_id(worker.url)
        yield worker
        nursery.cancel_scope.cancel()


@asynccontextmanager
async def sealed(files: Files, *flags: str, **options: Any) -> AsyncIterator[tuple[Gateway, FakeWorker]]:
    """A gateway and a worker, TLS on both sides."""
    async with sealed_worker("m", **options) as worker:
        async with running_gateway(
            *files.serving_flags, *files.client_flags, *flags, workers=[worker]
        ) as gateway:
            yield gateway, worker


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
async def test_sec_10_requests_and_streams_go_through_both_sides(files: Files, version: ssl.TLSVersion):
    async with sealed(files) as (gateway, worker):
        client = await connect(gateway, version=version)
        await client.ask(CHAT, HELLO)
        met = len(worker.seen)  # type: ignore[attr-defined]
        for number in range(5):
            worker.plays.append(answers(200, {"number": number}))
            assert (await client.ask(CHAT, HELLO)).document == {"number": number}
            worker.plays.append(streams(event({"a": 1}), event({"b": 2}), DONE))
            assert (await client.ask(CHAT, STREAM)).body == event({"a": 1}) + event({"b": 2}) + DONE
        assert len(worker.turns) == 11
        assert gateway.metric("smg_http_connections_active") == 1
        # The worker's description came in meanwhile, which costs its connections; the requests themselves share one.
        assert len(worker.seen) - met <= 3  # type: ignore[attr-defined]


async def test_str_2_an_event_is_passed_on_when_it_comes(files: Files):
    async with sealed(files) as (gateway, worker):
        gate = Gate()

        async def halting(turn: Turn) -> None:
            await streams(event({"a": 1}), end=False)(turn)
            gate.reached.set()
            await gate.open.wait()
            await turn.send(b"6\r\nlast\n\n\r\n0\r\n\r\n")

        worker.plays.append(halting)
        client = await connect(gateway)
        await client.send(request(CHAT, STREAM))
        answer = await client.read_head()
        assert answer.status == 200 and await client.read_chunk() == event({"a": 1})
        gate.open.set()
        assert await client.read_chunk() == b"last\n\n" and await client.read_chunk() is None


@pytest.mark.parametrize("receive_bytes", [None, 4096])
async def test_large_bodies_go_through_unchanged(files: Files, receive_bytes: int | None):
    big = {**HELLO, "messages": [{"role": "user", "content": "x" * 3_000_000}]}
    body = bytes(range(1, 256)) * 12_000
    async with sealed(files) as (gateway, worker):
        worker.play = answers(200, body=body, type="application/octet-stream")
        client = await connect(gateway, receive_bytes)
        for _ in range(2):
            assert (await client.ask(CHAT, big)).body == body
            assert (await worker.next_turn()).document == big


async def test_pipelined_requests_are_answered_in_order(files: Files):
    async with sealed(files) as (gateway, worker):
        worker.plays += [answers(200, {"n": number}) for number in range(40)]
        client = await connect(gateway)
        await client.send(request(CHAT, HELLO) * 40)
        assert [(await client.read()).document["n"] for _ in range(40)] == list(range(40))


async def test_http_13_a_half_closed_client_gets_its_plain_answer(files: Files):
    async with sealed(files) as (gateway, worker):

        async def late(turn: Turn) -> None:
            await trio.sleep(0.1)
            await answers(200, {"late": True})(turn)

        worker.plays.append(late)

        def talk() -> bytes:
            with socket.create_connection(("127.0.0.1", gateway.port)) as sock:
                with trusting().wrap_socket(sock, server_hostname="127.0.0.1") as stream:
                    stream.sendall(request(CHAT, HELLO))
                    socket.socket.shutdown(stream, socket.SHUT_WR)
                    data = b""
                    while more := stream.recv(65536):
                        data += more
                    return data

        with trio.fail_after(PATIENCE_S):
            assert b'{"late": true}' in await trio.to_thread.run_sync(talk)


@pytest.mark.parametrize("how", ["close", "goodbye", "reset"])
@pytest.mark.parametrize("body", [HELLO, STREAM])
async def test_http_14_a_client_that_leaves_takes_its_upstream_request_along(
    files: Files, how: str, body: Any
):
    async with sealed(files) as (gateway, worker):

        async def silent(turn: Turn) -> None:
            if body is STREAM:
                await streams(event({"a": 1}), end=False)(turn)
            await hangs(turn)

        worker.plays.append(silent)
        client = await connect(gateway)
        await client.send(request(CHAT, body))
        turn = await worker.next_turn()
        if body is STREAM:
            await client.read_head()
        if how == "reset":
            client.reset()
        elif how == "goodbye":
            client.stream._https_compatible = False  # type: ignore[attr-defined]
            with trio.move_on_after(0.2):
                await client.leave()
        else:
            await client.leave()
        with trio.fail_after(1.7):
            await turn.gone.wait()


async def test_a_connection_that_idles_is_closed_with_a_goodbye(files: Files):
    async with sealed(files, "--idle-connection-timeout-secs", "0.2") as (gateway, _):

        def talk() -> bytes:
            with socket.create_connection(("127.0.0.1", gateway.port)) as sock:
                with trusting().wrap_socket(
                    sock, server_hostname="127.0.0.1", suppress_ragged_eofs=False
                ) as stream:
                    stream.sendall(request("/health"))
                    data = b""
                    while more := stream.recv(1000):
                        data += more
                    return data

        with trio.fail_after(PATIENCE_S):
            assert (await trio.to_thread.run_sync(talk)).startswith(b"HTTP/1.1 200")


@pytest.mark.parametrize(
    ("play", "status"),
    [
        (breaks(), 502),
        (breaks(reset=True), 502),
        (breaks(head(200, length=10), b"half"), 502),
        (says(head(200, "content-type: text/plain"), b"until the end", close=True), 200),
    ],
)
async def test_dn_5_a_sealed_worker_that_breaks_off_is_seen_to(files: Files, play: Any, status: int):
    async with sealed(files, "--disable-retries") as (gateway, worker):
        worker.plays.append(play)
        client = await connect(gateway)
        await client.send(request(CHAT, HELLO))
        answer = await client.read(may_cut=True)
        assert answer.status == status or answer.is_cut, answer


async def test_plain_http_and_silence_on_the_sealed_port_harm_nobody(files: Files):
    async with sealed(files, "--header-read-timeout-secs", "0.3") as (gateway, _):
        assert not (await gateway.raw(request("/health"))).startswith(b"HTTP")
        silent = await gateway.connect()
        assert await silent.until_closed() == b""
        assert (await ask(gateway, CHAT, HELLO)).status == 200


async def test_keys_and_tokens_work_over_tls_with_a_provider_behind_a_private_authority(files: Files):
    async with provider() as idp, sealed_worker() as front:
        front.on_path.update(idp.server.on_path)
        front_issuer = f"{front.url}/realm"
        idp.issuer, idp.server = front_issuer, front
        idp.discovery = {"issuer": front_issuer, "jwks_uri": f"{front_issuer}/keys"}
        idp.publish()
        flags = *idp.flags, "--api-key", "k", *files.client_flags, *files.serving_flags
        async with running_gateway(*flags) as gateway:
            assert (await ask(gateway, "/workers", None, bearer(idp.token()))).status == 200
            assert (await ask(gateway, CHAT, HELLO, bearer("wrong"))).status == 401
        assert front.seen and not any(front.seen), "the certificate for workers is not shown to the provider"  # type: ignore[attr-defined]
        async with running_gateway(*idp.flags) as gateway:
            assert (await gateway.ask("/workers", None, bearer(idp.token()))).status == 401


def serial(client: Client) -> Any:
    return client.stream.getpeercert()["serialNumber"]  # type: ignore[attr-defined]


async def test_sec_10_the_serving_certificate_is_reloaded_without_a_restart(files: Files, capfd: Any):
    async with sealed(files) as (gateway, worker):
        gateway.node.reload._interval_s = 0.01
        gateway.node.reload.ask()
        before = await connect(gateway)
        hold = Gate()
        worker.plays.append(hold.before(answers(200, {"held": True})))
        await before.send(request(CHAT, HELLO))
        await worker.next_turn()
        # Half a change: the certificate is new, its key not yet. What was there is shown.
        old_key = (files.folder / "tls.key").read_bytes()
        files.issue("tls")
        new_key = (files.folder / "tls.key").read_bytes()
        (files.folder / "tls.key").write_bytes(old_key)
        text = ""

        def is_told(words: str) -> bool:
            nonlocal text
            text += capfd.readouterr().err
            return words in text

        gateway.node.reload.ask()
        await eventually(lambda: is_told("is not the key of the certificate"))
        assert serial(await connect(gateway)) == serial(before)
        (files.folder / "tls.key").write_bytes(new_key)
        await eventually(
            lambda: is_told('smg.reload reloaded part="serving certificate" change="certificate with')
        )
        after = await connect(gateway)
        assert serial(after) != serial(before)
        hold.open.set()
        assert (await before.read()).document == {"held": True}
        assert (await before.ask("/health")).status == (await after.ask("/health")).status == 200


def wants_certificate(context: ssl.SSLContext) -> None:
    context.verify_mode = ssl.CERT_REQUIRED
    AUTHORITY.configure_trust(context)


async def test_sec_10_a_worker_that_asks_for_a_certificate_gets_the_one_of_the_files(files: Files):
    async with sealed(files, prepare=wants_certificate) as (gateway, worker):
        assert (await ask(gateway, CHAT, HELLO)).status == 200
        first = worker.seen[-1]  # type: ignore[attr-defined]
        assert ("DNS", "gateway.example") in first["subjectAltName"]
        gateway.node.reload._interval_s = 0.01
        gateway.node.reload.ask()
        files.issue("client", "next.example")

        async def shown() -> bool:
            assert (await ask(gateway, CHAT, HELLO)).status == 200
            return ("DNS", "next.example") in worker.seen[-1]["subjectAltName"]  # type: ignore[attr-defined]

        with trio.fail_after(PATIENCE_S):
            while not await shown():
                await trio.sleep(0.01)


async def test_sec_10_a_worker_that_is_not_who_it_should_be_gets_nothing(files: Files):
    for options in (
        {"identity": "elsewhere.example"},
        {"authority": STRANGER},
        {"prepare": wants_certificate},
    ):
        flags = () if "prepare" not in options else ("--ca-cert-paths", str(files.ca))
        flags = flags or files.client_flags
        async with sealed_worker("m", **options) as worker:  # type: ignore[arg-type]
            async with running_gateway(*flags, workers=[worker], ready=False) as gateway:
                await trio.sleep(0.2)
                assert gateway.ready_count == 0
                assert (await gateway.ask(CHAT, HELLO)).status in (404, 503)
            assert worker.turns == worker.asked == []


@pytest.mark.parametrize("missing", ["tls.pem", "tls.key", "client.pem", "client.key", "ca.pem"])
async def test_cli_6_a_node_does_not_start_without_its_certificates(files: Files, missing: str):
    (files.folder / missing).write_text("no certificate")
    with pytest.raises((SettingsError, BaseExceptionGroup)) as refused:
        async with running_gateway(*files.serving_flags, *files.client_flags):
            raise AssertionError("it started")
    error = refused.value
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    assert isinstance(error, SettingsError) and error.is_combination and missing in str(error)


async def test_the_openai_sdk_streams_over_tls(files: Files):
    async with sealed(files) as (gateway, worker):
        chunk = {"id": "c", "object": "chat.completion.chunk", "created": 1, "model": "m"}
        words = [
            {**chunk, "choices": [{"index": 0, "delta": {"content": word}}]} for word in ("a ", "b ", "c")
        ]
        worker.plays.append(streams(*map(event, words), DONE))

        def use() -> str:
            http = openai.DefaultHttpxClient(verify=trusting())
            with openai.OpenAI(
                api_key="k",
                base_url=gateway.url.replace("http", "https") + "/v1",
                http_client=http,
                max_retries=0,
            ) as client:
                stream = client.chat.completions.create(model="m", messages=HELLO["messages"], stream=True)
                return "".join(part.choices[0].delta.content or "" for part in stream)

        assert await trio.to_thread.run_sync(use) == "a b c"
