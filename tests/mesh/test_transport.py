"""The real network: ports, datagrams, streams, TLS and names, on loopback."""

from __future__ import annotations

import os
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio
import trio.testing
import trustme

from mesh.errors import DialError, SettingsError, WeatherError
from mesh.settings import PACKET_BYTES_MAX
from mesh.tls import TlsContexts, TlsFiles
from mesh.transport import ByteStream, NetTransport

HOST = "127.0.0.1"


def make_tls(folder: Path, ca: trustme.CA, *names: str, required: str = "") -> TlsContexts:
    folder.mkdir(exist_ok=True)
    ca.cert_pem.write_to_path(folder / "ca.pem")
    certificate = ca.issue_cert(*names)
    certificate.cert_chain_pems[0].write_to_path(folder / "cert.pem")
    certificate.private_key_pem.write_to_path(folder / "key.pem")
    files = (str(folder / name) for name in ("ca.pem", "cert.pem", "key.pem"))
    ca_path, cert_path, key_path = files
    return TlsContexts(TlsFiles(ca=ca_path, certificate=cert_path, key=key_path, name=required))


@asynccontextmanager
async def opened(host: str = HOST, tls: TlsContexts | None = None) -> AsyncIterator[tuple[NetTransport, int]]:
    transport = NetTransport(host, 0, tls)
    _, port = await transport.open()
    try:
        yield transport, port
    finally:
        transport.close()


async def connected(dialer: NetTransport, acceptor: NetTransport, port: int) -> tuple[ByteStream, ByteStream]:
    ends: list[ByteStream] = []

    async def accept() -> None:
        ends.append(await acceptor.accept())

    async with trio.open_nursery() as nursery:
        nursery.start_soon(accept)
        dialled = await dialer.dial((HOST, port))
    return dialled, ends[0]


async def received(transport: NetTransport, count: int = 1) -> list[bytes]:
    found: list[bytes] = []
    with trio.fail_after(5):
        while len(found) < count:
            await transport.wait_datagrams()
            found += [data for data, _ in transport.receive_nowait(64)]
    return found


async def test_one_port_number_is_taken_for_datagrams_and_streams() -> None:
    async with opened() as (one, port), opened() as (other, other_port):
        assert one.send(b"hello", (HOST, other_port))
        await other.wait_datagrams()
        assert other.receive_nowait(64) == [(b"hello", (HOST, port))]
        assert other.receive_nowait(64) == []
        dialled, accepted = await connected(one, other, other_port)
        await dialled.send_all(b"over tcp")
        assert await accepted.receive_some(100) == b"over tcp"
        assert accepted.peer_address == dialled.local_address
        assert not dialled.is_protected
        for end in (dialled, accepted):
            await end.aclose()


async def test_datagrams_above_the_limit_neither_leave_nor_arrive() -> None:
    async with opened() as (one, _), opened() as (other, other_port):
        assert not one.send(bytes(PACKET_BYTES_MAX + 1), (HOST, other_port))
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as rough:
            rough.sendto(bytes(PACKET_BYTES_MAX + 1), (HOST, other_port))
            rough.sendto(bytes(60_000), (HOST, other_port))
        assert one.send(bytes(PACKET_BYTES_MAX), (HOST, other_port))
        assert await received(other) == [bytes(PACKET_BYTES_MAX)]


async def test_no_more_datagrams_are_read_at_once_than_asked_for() -> None:
    async with opened() as (one, _), opened() as (other, other_port):
        for number in range(10):
            assert one.send(b"%d" % number, (HOST, other_port))
        await other.wait_datagrams()
        assert [data for data, _ in other.receive_nowait(4)] == [b"0", b"1", b"2", b"3"]
        assert len(other.receive_nowait(64)) == 6


async def test_what_the_kernel_does_not_take_is_counted() -> None:
    async with opened() as (one, _):
        assert not one.send(b"x", ("::1", 1))
        assert not one.send(b"x", ("255.255.255.255", 9))
        assert one.dropped == 2
        one.close()
        assert not one.send(b"x", (HOST, 9))
        assert one.receive_nowait(1) == []


async def test_names_in_place_of_addresses_are_never_resolved_on_the_way_out() -> None:
    async with opened() as (one, port):
        for host in ("localhost", "a.example", "x" * 70, "", "1.2.3", "\u2603"):
            assert not one.send(b"x", (host, port))
            with pytest.raises(DialError, match="not an IP address"):
                await one.dial((host, port))


async def test_a_port_that_is_taken_is_refused_in_words() -> None:
    async with opened() as (_, port):
        with pytest.raises(SettingsError, match=f"cannot listen on 127.0.0.1:{port}: Address already in use"):
            await NetTransport(HOST, port).open()
    with pytest.raises(SettingsError, match="cannot listen"):
        await NetTransport("192.0.2.77", 0).open()
    with pytest.raises(SettingsError, match="cannot listen"):
        await NetTransport("no such host.invalid", 0).open()


async def test_a_port_can_be_taken_again_at_once() -> None:
    async with opened() as (one, port):
        dialled, accepted = await connected(one, one, port)
        await accepted.aclose()
        await dialled.aclose()
    again = NetTransport(HOST, port)
    assert await again.open() == (HOST, port)
    again.close()
    again.close()


async def test_a_closed_port_is_told_from_other_failures() -> None:
    async with opened() as (one, port):
        pass
    with pytest.raises(DialError) as refused:
        await one.dial((HOST, port))
    assert refused.value.is_refused and str(refused.value) == "Connection refused"
    with pytest.raises(DialError) as unreachable:
        await one.dial(("255.255.255.255", 9))
    assert not unreachable.value.is_refused


async def test_what_is_sent_at_once_is_taken_as_far_as_there_is_room() -> None:
    async with opened() as (one, _), opened() as (other, port):
        dialled, accepted = await connected(one, other, port)
        assert dialled.send_nowait(b"at once") == 7
        assert await accepted.receive_some(100) == b"at once"
        data = os.urandom(32 * 1024 * 1024)
        taken = 0
        while more := dialled.send_nowait(data[taken:]):
            taken += more
        assert 0 < taken < len(data)
        got = bytearray()
        while len(got) < taken:
            got += await accepted.receive_some(1024 * 1024)
        assert got == data[:taken]
        await dialled.aclose()
        assert dialled.send_nowait(b"closed") == 0
        with pytest.raises(WeatherError):
            await dialled.receive_some(10)
        await accepted.aclose()


async def test_a_reader_that_waits_is_told_when_its_own_end_is_closed() -> None:
    async with opened() as (one, _), opened() as (other, port):
        dialled, accepted = await connected(one, other, port)
        async with trio.open_nursery() as nursery:

            async def read() -> None:
                with pytest.raises(WeatherError):
                    await dialled.receive_some(10)

            nursery.start_soon(read)
            await trio.testing.wait_all_tasks_blocked()
            await dialled.aclose()
        await accepted.aclose()


async def test_an_end_and_a_reset_both_read_as_the_end() -> None:
    async with opened() as (one, port):
        dialled, accepted = await connected(one, one, port)
        await dialled.aclose()
        assert await accepted.receive_some(100) == b""
        await accepted.aclose()
        dialled, accepted = await connected(one, one, port)
        await dialled.send_all(b"unread")
        await trio.sleep(0.01)
        await accepted.aclose()  # with unread bytes: the kernel resets
        assert await dialled.receive_some(100) == b""
        with pytest.raises(WeatherError):
            for _ in range(10):
                await dialled.send_all(bytes(100_000))
        await dialled.aclose()


async def test_a_dial_that_is_given_up_leaves_no_socket() -> None:
    async with opened() as (one, port):
        before = len(os.listdir("/proc/self/fd"))
        with trio.CancelScope() as scope:
            scope.cancel()
            await one.dial((HOST, port))
        assert scope.cancelled_caught
        assert len(os.listdir("/proc/self/fd")) == before


async def test_names_resolve_and_unknown_ones_are_weather() -> None:
    async with opened() as (one, _):
        assert await one.resolve("localhost", 5) == [(HOST, 5)]
        assert await one.resolve("10.1.2.3", 5) == [("10.1.2.3", 5)]
        for name in ("no-such-name.invalid", "a" * 70 + ".example", "."):
            with pytest.raises(WeatherError), trio.fail_after(20):
                await one.resolve(name, 5)


async def test_the_source_towards_loopback_is_loopback() -> None:
    async with opened() as (one, _):
        assert one.source_towards((HOST, 9)) == HOST
        far = one.source_towards(None)
        assert far is None or far not in ("0.0.0.0", "")


async def test_both_families_share_a_port() -> None:
    async with opened("::") as (both, port), opened() as (four, four_port):
        assert both.send(b"to four", (HOST, four_port))
        assert await received(four) == [b"to four"]
        assert four.send(b"to both", (HOST, port))
        await both.wait_datagrams()
        assert both.receive_nowait(9) == [(b"to both", (HOST, four_port))]
        dialled, accepted = await connected(four, both, port)
        assert accepted.peer_address == dialled.local_address
        assert ("::1", 9) in await both.resolve("::1", 9)
        six = await both.dial(("::1", port))
        await six.aclose()
        await dialled.aclose()
        await accepted.aclose()


# -- TLS


async def handshake(one: NetTransport, other: NetTransport, port: int) -> list[str]:
    """What each side says: "" or the error."""
    dialled, accepted = await connected(one, other, port)
    assert dialled.is_protected and accepted.is_protected
    said = ["", ""]

    async def go(number: int, end: ByteStream) -> None:
        try:
            await end.start()
            await end.send_all(b"hello")
            while not await end.receive_some(100):
                raise WeatherError("closed")
        except WeatherError as error:
            said[number] = str(error)
            await end.aclose()

    with trio.fail_after(5):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(go, 0, dialled)
            nursery.start_soon(go, 1, accepted)
    await dialled.aclose()
    await accepted.aclose()
    return said


async def test_members_of_one_ca_talk_and_others_do_not(tmp_path: Path) -> None:
    ca, foreign = trustme.CA(), trustme.CA()
    ours, theirs = make_tls(tmp_path / "a", ca, "x.local"), make_tls(tmp_path / "b", foreign, "x.local")
    async with opened(tls=ours) as (one, port), opened(tls=theirs) as (stranger, stranger_port):
        assert await handshake(one, one, port) == ["", ""]
        assert all(await handshake(stranger, one, port))
        assert all(await handshake(one, stranger, stranger_port))


async def test_a_plain_dialer_and_one_without_a_certificate_are_turned_away(tmp_path: Path) -> None:
    ours = make_tls(tmp_path / "a", trustme.CA(), "x.local")
    async with opened(tls=ours) as (one, port), opened() as (plain, _):
        dialled, accepted = await connected(plain, one, port)
        await dialled.send_all(b"GET / HTTP/1.1\r\n\r\n")
        with pytest.raises(WeatherError, match="TLS"):
            await accepted.start()
        await accepted.aclose()
        await dialled.aclose()


async def test_the_mesh_name_is_demanded_of_both_sides(tmp_path: Path) -> None:
    ca = trustme.CA()
    strict = make_tls(tmp_path / "a", ca, "mesh.local", required="mesh.local")
    other = make_tls(tmp_path / "b", ca, "web.local", required="mesh.local")
    async with opened(tls=strict) as (one, port), opened(tls=other) as (web, web_port):
        assert await handshake(one, one, port) == ["", ""]
        assert "is for web.local, not for mesh.local" in (await handshake(web, one, port))[1]
        assert "is for web.local, not for mesh.local" in (await handshake(one, web, web_port))[0]


async def test_reloaded_certificates_are_used_for_new_streams(tmp_path: Path) -> None:
    old, new = trustme.CA(), trustme.CA()
    ours = make_tls(tmp_path / "a", old, "x.local")
    theirs = make_tls(tmp_path / "b", new, "x.local")
    async with opened(tls=ours) as (one, port), opened(tls=theirs) as (other, _):
        assert all(await handshake(other, one, port))
        make_tls(tmp_path / "a", new, "x.local")
        assert all(await handshake(other, one, port))
        ours.reload()
        assert await handshake(other, one, port) == ["", ""]
        (tmp_path / "a" / "key.pem").write_text("nonsense")
        with pytest.raises(SettingsError, match="TLS files"):
            ours.reload()
        assert await handshake(other, one, port) == ["", ""]


def test_missing_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="nowhere"):
        TlsContexts(TlsFiles(ca=str(tmp_path / "nowhere"), certificate="x", key="y"))
