"""TLS on both sides: a sealed connection behaves as a plain one, and garbage, silence and half closes end as they do there."""

from __future__ import annotations

import socket
import ssl
import struct
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio
import trustme

from smg.errors import GatewayError, SettingsError, UpstreamError
from smg.net.client import Client
from smg.net.exchange import Exchange, ServerLimits
from smg.net.pool import ConnectionPool
from smg.net.readiness import Readiness
from smg.net.server import Server
from smg.net.tls import describe, server_context, worker_context

PATIENCE_S = 5.0
AUTHORITY = trustme.CA()


def files(folder: Path, *names: str, authority: trustme.CA = AUTHORITY) -> tuple[str, str]:
    """Paths of a certificate for these names and of its key."""
    certificate = authority.issue_cert(*(names or ("127.0.0.1", "localhost")))
    cert_path, key_path = folder / "cert.pem", folder / "key.pem"
    cert_path.write_bytes(b"".join(blob.bytes() for blob in certificate.cert_chain_pems))
    key_path.write_bytes(certificate.private_key_pem.bytes())
    return str(cert_path), str(key_path)


def client_context(authority: trustme.CA = AUTHORITY) -> ssl.SSLContext:
    context = ssl.create_default_context()
    authority.configure_trust(context)
    context.set_alpn_protocols(["h2", "http/1.1"])
    return context


async def echo(exchange: Exchange) -> None:
    """Answers with the body; `/close` until close, `/stream` piece by piece, `/slow` after the client's half close."""
    exchange.request_id = "req-1"
    body = await exchange.read_body()
    target = exchange.head.target
    if target == b"/close":
        exchange.keep_alive = False
        await exchange.write(b"HTTP/1.1 200 OK\r\nconnection: close\r\n\r\n" + body)
    elif target == b"/cut":
        await exchange.write(b"HTTP/1.1 200 OK\r\nconnection: close\r\n\r\nhalf")
        exchange.cut()
    elif target == b"/stream":
        await exchange.write(exchange.head_block(200, b"", None))
        exchange.start_streaming()
        while True:
            await exchange.write(b"4\r\nping\r\n")
            await exchange.parking.sleep(0.01)
    else:
        await exchange.respond(200, b"content-type: text/plain\r\n", body)


class Sealed:
    """A running TLS server and what became of its exchanges."""

    def __init__(self, server: Server, readiness: Readiness, port: int) -> None:
        self.server = server
        self.readiness = readiness
        self.port = port
        self.faults: list[BaseException] = []

    async def connect(
        self, context: ssl.SSLContext | None = None, receive_bytes: int = 0
    ) -> trio.SSLStream[trio.SocketStream]:
        sock = trio.socket.socket()
        if receive_bytes:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)
        await sock.connect(("127.0.0.1", self.port))
        stream = trio.SSLStream(
            trio.SocketStream(sock),
            context or client_context(),
            server_hostname="127.0.0.1",
            https_compatible=True,
        )
        with trio.fail_after(PATIENCE_S):
            await stream.do_handshake()
        return stream


@asynccontextmanager
async def sealed(
    folder: Path, limits: ServerLimits | None = None, handle: Callable[[Exchange], Awaitable[None]] = echo
) -> AsyncIterator[Sealed]:
    listener = socket.create_server(("127.0.0.1", 0), backlog=64)
    listener.setblocking(False)
    readiness = Readiness()

    async def refuse(exchange: Exchange, error: GatewayError) -> None:
        exchange.request_id = "req-1"
        await exchange.respond(error.status, b"content-type: text/plain\r\n", error.code.encode())

    async with trio.open_nursery() as nursery:
        await nursery.start(readiness.run)
        tls = server_context(*files(folder))
        server = Server(
            handle,
            refuse,
            lambda _, error: running.faults.append(error),
            readiness,
            limits or ServerLimits(),
            tls=tls,
        )
        running = Sealed(server, readiness, listener.getsockname()[1])
        await nursery.start(server.serve, [listener])
        yield running
        assert running.faults == []
        nursery.cancel_scope.cancel()


def post(target: str, body: bytes = b"", version: str = "1.1") -> bytes:
    return f"POST {target} HTTP/{version}\r\nhost: h\r\ncontent-length: {len(body)}\r\n\r\n".encode() + body


async def read_until(stream: trio.abc.ReceiveStream, end: bytes) -> bytes:
    data = b""
    with trio.fail_after(PATIENCE_S):
        while end not in data:
            more = await stream.receive_some(65536)
            assert more, data
            data += more
    return data


async def test_requests_follow_one_another_on_a_connection(tmp_path):
    async with sealed(tmp_path) as running:
        stream = await running.connect()
        assert stream.selected_alpn_protocol() == "http/1.1"
        assert stream.version() == "TLSv1.3"
        for word in (b"one", b"two", b"three"):
            await stream.send_all(post("/", word))
            assert (await read_until(stream, word)).startswith(b"HTTP/1.1 200")
        assert running.server.connection_count == 1


async def test_tls_1_2_is_spoken_and_1_1_is_not(tmp_path):
    async with sealed(tmp_path) as running:
        old = client_context()
        old.maximum_version = ssl.TLSVersion.TLSv1_2
        stream = await running.connect(old)
        assert stream.version() == "TLSv1.2"
        await stream.send_all(post("/", b"word"))
        await read_until(stream, b"word")
    assert server_context(*files(tmp_path)).minimum_version is ssl.TLSVersion.TLSv1_2
    assert worker_context().minimum_version is ssl.TLSVersion.TLSv1_2


@pytest.mark.parametrize("receive_bytes", [0, 4096])
async def test_large_bodies_go_through_whole_in_both_directions(tmp_path, receive_bytes):
    body = bytes(range(256)) * (1 << 14)  # 4 MiB
    async with sealed(tmp_path) as running:
        stream = await running.connect(receive_bytes=receive_bytes)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(stream.send_all, post("/", body) + post("/", b"the end"))
            data = await read_until(stream, b"the end")
        assert data.partition(b"\r\n\r\n")[2].startswith(body)


async def test_requests_in_one_record_and_in_many_are_all_answered(tmp_path):
    async with sealed(tmp_path) as running:
        stream = await running.connect()
        await stream.send_all(b"".join(post("/", b"<%d>" % n) for n in range(500)))
        data = await read_until(stream, b"<499>")
        assert data.count(b"HTTP/1.1 200") == 500
        # A body above one record, with the next request in the record of its end.
        await stream.send_all(post("/", b"x" * 20_000) + post("/", b"<last>"))
        await read_until(stream, b"<last>")


async def test_every_cut_of_the_bytes_is_the_same_connection(tmp_path):
    """Between client and server stands a proxy that passes single bytes."""
    async with sealed(tmp_path) as running:

        async def drip(source: trio.SocketStream, target: trio.SocketStream) -> None:
            async for data in source:
                for index in range(len(data)):
                    await target.send_all(data[index : index + 1])

        async def proxy(near: trio.SocketStream) -> None:
            near.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            far = await trio.open_tcp_stream("127.0.0.1", running.port)
            async with trio.open_nursery() as both:
                both.start_soon(drip, near, far)
                both.start_soon(drip, far, near)

        (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
        async with trio.open_nursery() as nursery:
            nursery.start_soon(trio.serve_listeners, proxy, [listener])
            raw = await trio.open_tcp_stream("127.0.0.1", listener.socket.getsockname()[1])
            stream = trio.SSLStream(raw, client_context(), server_hostname="127.0.0.1")
            for word in (b"first word", b"second word"):
                await stream.send_all(post("/", word))
                await read_until(stream, word)
            nursery.cancel_scope.cancel()


async def test_http_13_a_half_close_still_gets_its_answer(tmp_path):
    async with sealed(tmp_path) as running:
        with socket.create_connection(("127.0.0.1", running.port)) as sock:

            def talk() -> bytes:
                with client_context().wrap_socket(sock, server_hostname="127.0.0.1") as tls:
                    tls.sendall(post("/", b"words before the end"))
                    socket.socket.shutdown(tls, socket.SHUT_WR)
                    data = b""
                    while more := tls.recv(1000):
                        data += more
                    return data

            with trio.fail_after(PATIENCE_S):
                assert (await trio.to_thread.run_sync(talk)).endswith(b"words before the end")


async def test_http_14_a_client_that_leaves_ends_its_stream(tmp_path):
    ended = trio.Event()

    async def handle(exchange: Exchange) -> None:
        try:
            await echo(exchange)
        finally:
            ended.set()

    async with sealed(tmp_path, handle=handle) as running:
        stream = await running.connect()
        await stream.send_all(post("/stream"))
        await read_until(stream, b"ping")
        sock = stream.transport_stream.socket
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        sock.close()
        with trio.fail_after(1.5):
            await ended.wait()


async def test_http_8_a_refused_body_does_not_hide_the_answer(tmp_path):
    async with sealed(tmp_path, ServerLimits(payload_bytes_max=1000)) as running:
        stream = await running.connect()
        await stream.send_all(post("/", b"x" * 200_000))
        assert b"413" in await read_until(stream, b"request_body_too_large")
        with trio.fail_after(PATIENCE_S):
            assert await stream.receive_some(100) == b""


async def test_dn_5_an_end_is_told_from_a_cut(tmp_path):
    async with sealed(tmp_path) as running:
        for target, is_whole in (("/close", True), ("/cut", False)):
            with socket.create_connection(("127.0.0.1", running.port)) as sock:

                def talk(sock: socket.socket = sock, target: str = target) -> bool:
                    context = client_context()
                    with context.wrap_socket(
                        sock, server_hostname="127.0.0.1", suppress_ragged_eofs=False
                    ) as tls:
                        tls.sendall(post(target, b"all", "1.0"))
                        try:
                            while tls.recv(1000):
                                pass
                        except (ssl.SSLEOFError, ConnectionResetError):
                            return False
                        return True

                with trio.fail_after(PATIENCE_S):
                    assert await trio.to_thread.run_sync(talk) is is_whole


@pytest.mark.parametrize(
    "garbage",
    [
        b"GET / HTTP/1.1\r\nhost: h\r\n\r\n",
        b"\x00" * 100,
        b"\x16\x03\x01\xff\xff" + b"\x01" * 70_000,
        b"\x16\x03\x01\x00\x05\x01\x00\x00\x01\x00",
        b"\x15\x03\x03\x00\x02\x02\x28",
    ],
)
async def test_garbage_ends_its_connection_and_no_other(tmp_path, garbage):
    async with sealed(tmp_path, ServerLimits(header_read_timeout_s=0.3)) as running:
        good = await running.connect()
        raw = await trio.open_tcp_stream("127.0.0.1", running.port)
        try:
            await raw.send_all(garbage)
            with trio.fail_after(PATIENCE_S):
                while await raw.receive_some(1000):
                    pass
        except trio.BrokenResourceError:
            pass
        await good.send_all(post("/", b"still here"))
        await read_until(good, b"still here")


@pytest.mark.parametrize("first", [b"", b"\x16\x03\x01"])
async def test_http_7_a_handshake_that_does_not_end_is_ended(tmp_path, first):
    async with sealed(tmp_path, ServerLimits(header_read_timeout_s=0.2)) as running:
        raw = await trio.open_tcp_stream("127.0.0.1", running.port)
        if first:
            await raw.send_all(first)
        with trio.fail_after(PATIENCE_S):
            assert await raw.receive_some(100) == b""
        assert running.server.connection_count == 0


async def test_garbage_inside_the_sealed_stream_is_a_loss(tmp_path):
    async with sealed(tmp_path) as running:
        stream = await running.connect()
        await stream.send_all(post("/", b"x"))
        await read_until(stream, b"x")
        await stream.transport_stream.send_all(b"\x17\x03\x03\x00\x20" + b"z" * 32)
        with trio.fail_after(PATIENCE_S):
            while running.server.connection_count:
                await trio.sleep(0.002)


async def test_sec_10_a_new_certificate_is_shown_to_the_next_and_ends_nobody(tmp_path):
    async with sealed(tmp_path) as running:
        before = await running.connect()
        serial = before.getpeercert()["serialNumber"]
        running.server.use_tls(server_context(*files(tmp_path)))
        after = await running.connect()
        assert after.getpeercert()["serialNumber"] != serial
        for stream in (before, after):
            await stream.send_all(post("/", b"served"))
            await read_until(stream, b"served")


class Asking:
    """A client of the gateway's own, towards a TLS worker."""

    def __init__(self, readiness: Readiness, context: ssl.SSLContext) -> None:
        self.pool = ConnectionPool(readiness, idle_timeout_s=60, connect_timeout_s=2, context=context)
        self.fetch = Client(readiness, self.pool).fetch


async def test_a_worker_is_asked_over_one_kept_connection(tmp_path):
    async with sealed(tmp_path) as running:
        (tmp_path / "ca.pem").write_bytes(AUTHORITY.cert_pem.bytes())
        asking = Asking(running.readiness, worker_context([str(tmp_path / "ca.pem")]))
        body = bytes(range(256)) * 8192
        for _ in range(5):
            answer = await asking.fetch("POST", f"https://localhost:{running.port}/", body=body)
            assert answer.body == body
        assert running.server.connection_count == 1
        asking.pool.use_context(worker_context([str(tmp_path / "ca.pem")]))
        await asking.fetch("POST", f"https://127.0.0.1:{running.port}/", body=b"x")


@pytest.mark.parametrize("fault", ["name", "authority"])
async def test_a_worker_that_cannot_prove_its_name_is_not_asked(tmp_path, fault):
    async with sealed(tmp_path) as running:
        if fault == "name":
            running.server.use_tls(server_context(*files(tmp_path, "elsewhere.example")))
        ca = AUTHORITY if fault == "name" else trustme.CA()
        (tmp_path / "ca.pem").write_bytes(ca.cert_pem.bytes())
        asking = Asking(running.readiness, worker_context([str(tmp_path / "ca.pem")]))
        with pytest.raises(UpstreamError) as refused:
            await asking.fetch("POST", f"https://localhost:{running.port}/", body=b"x")
        assert refused.value.kind == UpstreamError.REFUSED and "verify" in str(refused.value).lower()


@pytest.mark.parametrize("has_certificate", [True, False])
async def test_sec_10_a_worker_that_wants_a_certificate_gets_ours(tmp_path, has_certificate):
    async with sealed(tmp_path) as running:
        strict = server_context(*files(tmp_path))
        strict.verify_mode = ssl.CERT_REQUIRED
        AUTHORITY.configure_trust(strict)
        running.server.use_tls(strict)
        (tmp_path / "ca.pem").write_bytes(AUTHORITY.cert_pem.bytes())
        (tmp_path / "own").mkdir()
        own = files(tmp_path / "own", "gateway@example.org") if has_certificate else (None, None)
        asking = Asking(running.readiness, worker_context([str(tmp_path / "ca.pem")], *own))
        url = f"https://127.0.0.1:{running.port}/"
        if has_certificate:
            assert (await asking.fetch("POST", url, body=b"x")).status == 200
        else:
            with pytest.raises(UpstreamError):
                await asking.fetch("POST", url, body=b"x")


@pytest.mark.parametrize("says_goodbye", [True, False])
async def test_dn_5_a_body_until_close_is_whole_only_after_a_goodbye(tmp_path, says_goodbye):
    async with sealed(tmp_path) as running, trio.open_nursery() as nursery:

        async def worker(raw: trio.SocketStream) -> None:
            stream = trio.SSLStream(
                raw, server_context(*files(tmp_path)), server_side=True, https_compatible=not says_goodbye
            )
            await stream.receive_some(1000)
            await stream.send_all(b"HTTP/1.1 200 OK\r\n\r\nwords")
            if says_goodbye:
                await stream.aclose()
            else:
                await raw.aclose()

        (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
        nursery.start_soon(trio.serve_listeners, worker, [listener])
        (tmp_path / "ca.pem").write_bytes(AUTHORITY.cert_pem.bytes())
        asking = Asking(running.readiness, worker_context([str(tmp_path / "ca.pem")]))
        url = f"https://127.0.0.1:{listener.socket.getsockname()[1]}/"
        if says_goodbye:
            assert (await asking.fetch("GET", url)).body == b"words"
        else:
            with pytest.raises(UpstreamError) as broken:
                await asking.fetch("GET", url)
            assert broken.value.kind == UpstreamError.BROKEN_STREAM
        nursery.cancel_scope.cancel()


async def test_a_host_that_is_no_name_is_refused_and_no_fault(tmp_path):
    async with sealed(tmp_path) as running:
        asking = Asking(running.readiness, worker_context())
        for host in ("a" * 70, ".", "x..y"):
            with pytest.raises(UpstreamError):
                await asking.fetch("GET", f"https://{host}:1/")


async def test_sec_7_only_permitted_addresses_are_connected_to(tmp_path):
    async with sealed(tmp_path) as running:
        (tmp_path / "ca.pem").write_bytes(AUTHORITY.cert_pem.bytes())
        asking = Asking(running.readiness, worker_context([str(tmp_path / "ca.pem")]))
        with pytest.raises(UpstreamError) as refused:
            await asking.fetch("GET", f"https://localhost:{running.port}/", permits=lambda address: False)
        assert "not permitted" in str(refused.value)
        assert running.server.connection_count == 0


def test_files_that_cannot_be_used_are_named_with_their_flag(tmp_path):
    cert, key = files(tmp_path)
    (tmp_path / "other").mkdir()
    _, other_key = files(tmp_path / "other")
    (tmp_path / "garbage").write_text("no certificate")
    locked = tmp_path / "locked"
    from cryptography.hazmat.primitives import serialization

    private = serialization.load_pem_private_key(Path(key).read_bytes(), None)
    locked.write_bytes(
        private.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.BestAvailableEncryption(b"passphrase"),
        )
    )
    for arguments, flag in (
        ((str(tmp_path / "absent"), key), "--tls-cert-path"),
        ((cert, str(tmp_path / "absent")), "--tls-key-path"),
        ((str(tmp_path / "garbage"), key), "--tls-cert-path"),
        ((cert, other_key), "--tls-key-path"),
        ((cert, str(locked)), "--tls-key-path"),
    ):
        with pytest.raises(SettingsError) as refused:
            server_context(*arguments)
        assert refused.value.flag == flag and refused.value.is_combination, arguments
    with pytest.raises(SettingsError) as refused:
        worker_context([str(tmp_path / "garbage")])
    assert refused.value.flag == "--ca-cert-paths"
    assert ", valid until " in describe(cert)
