"""SEC-7: when the provider is asked, what happens when it does not answer, and where a document may send us."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
import trio
from trio.testing import MockClock

from smg.errors import UpstreamError
from smg.net.client import Fetched
from smg.services.key_sets import (
    FAILED_INTERVAL_S,
    KEPT_FOR_S,
    RENEWED_AFTER_S,
    UNKNOWN_INTERVAL_S,
    KeySets,
    is_public,
)
from tests.smg.tenancy.token_maker import Signer

ISSUER = "https://idp.example"
KEYS_URL = "https://idp.example/keys"
OLD, NEW = Signer("old", "P-256"), Signer("new", "P-256")


class Provider:
    """Answers fetches out of a table, and remembers them."""

    def __init__(self) -> None:
        self.pages: dict[str, Any] = {}
        self.asked: list[tuple[str, Callable[[str], bool] | None]] = []
        self.takes_s = 0.0
        self.status = 200
        self.error: BaseException | None = None
        self.keys(OLD)
        self.discovery()

    def keys(self, *signers: Signer) -> None:
        self.pages[KEYS_URL] = {"keys": [signer.jwk() for signer in signers]}

    def discovery(self, **changed: Any) -> None:
        document = {"issuer": ISSUER, "jwks_uri": KEYS_URL, **changed}
        self.pages[f"{ISSUER}/.well-known/openid-configuration"] = document

    async def fetch(self, method: str, url: str, **options: Any) -> Fetched:
        assert method == "GET" and options["bytes_max"] == 1 << 20
        self.asked.append((url, options["permits"]))
        await trio.sleep(self.takes_s)
        if self.error is not None:
            raise self.error
        page = self.pages[url]
        return Fetched(self.status, (), page if isinstance(page, bytes) else json.dumps(page).encode(), 0.0)

    @property
    def rounds(self) -> int:
        """How often the keys were fetched."""
        return sum(1 for url, _ in self.asked if url == KEYS_URL)


class Log:
    def __init__(self) -> None:
        self.lines: list[str] = []

    def info(self, message: str, /, **fields: object) -> None:
        self.lines.append(f"info {message} {fields}")

    def warn(self, message: str, /, **fields: object) -> None:
        self.lines.append(f"warn {message} {fields}")


@asynccontextmanager
async def running(provider: Provider, jwks_uri: str | None = KEYS_URL) -> AsyncIterator[tuple[KeySets, Log]]:
    log = Log()
    sets = KeySets(provider.fetch, ISSUER, jwks_uri, log=log)
    async with trio.open_nursery() as nursery:
        await nursery.start(sets.run)
        yield sets, log
        nursery.cancel_scope.cancel()


async def kids(sets: KeySets, kid: str = "old") -> set[str]:
    return {found for found, _ in await sets.keys(kid)}


async def test_keys_are_fetched_at_the_start_and_kept_for_an_hour(autojump_clock: MockClock) -> None:
    provider = Provider()
    async with running(provider) as (sets, _):
        for _ in range(100):
            assert await kids(sets) == {"old"}
        await trio.sleep(RENEWED_AFTER_S - 1)
        assert await kids(sets) == {"old"} and provider.rounds == 1
        await trio.sleep(KEPT_FOR_S)
        assert await kids(sets) == {"old"} and provider.rounds == 2


async def test_keys_in_use_are_renewed_before_the_hour_is_over_without_waiting(
    autojump_clock: MockClock,
) -> None:
    provider = Provider()
    async with running(provider) as (sets, _):
        await kids(sets)
        await trio.sleep(RENEWED_AFTER_S + 1)
        provider.takes_s = 5
        began_s = trio.current_time()
        assert await kids(sets) == {"old"} and trio.current_time() == began_s
        await trio.sleep(6)
        assert provider.rounds == 2


async def test_an_unknown_kid_is_asked_for_at_once_and_then_twice_a_minute(autojump_clock: MockClock) -> None:
    provider = Provider()
    async with running(provider) as (sets, _):
        assert await kids(sets) == {"old"}
        provider.keys(OLD, NEW)
        assert await kids(sets, "new") == {"old", "new"}
        assert provider.rounds == 2
        for _ in range(10_000):
            await sets.keys("made-up")
        assert provider.rounds == 2
        await trio.sleep(UNKNOWN_INTERVAL_S)
        for number in range(1000):
            await sets.keys(f"made-up-{number}")
        assert provider.rounds == 3


async def test_one_fetch_serves_all_who_wait_and_survives_those_who_leave(autojump_clock: MockClock) -> None:
    provider = Provider()
    provider.takes_s = 3
    found: list[set[str]] = []
    async with running(provider) as (sets, _):

        async def ask() -> None:
            found.append(await kids(sets))

        async with trio.open_nursery() as nursery:
            with trio.move_on_after(1):
                await kids(sets)
            for _ in range(50):
                nursery.start_soon(ask)
    assert found == [{"old"}] * 50 and provider.rounds == 1


async def test_without_the_provider_there_are_no_keys_and_it_is_not_flooded(
    autojump_clock: MockClock,
) -> None:
    provider = Provider()
    provider.error = UpstreamError(UpstreamError.REFUSED, "connection refused")
    async with running(provider) as (sets, log):
        for _ in range(1000):
            assert await kids(sets) == set()
        assert provider.rounds == 1
        await trio.sleep(FAILED_INTERVAL_S)
        assert await kids(sets) == set() and provider.rounds == 2
        assert [line[:4] for line in log.lines] == ["warn"], "said once"
        provider.error = None
        await trio.sleep(FAILED_INTERVAL_S)
        assert await kids(sets) == {"old"}


async def test_old_keys_outlive_a_failure_for_their_hour_and_no_longer(autojump_clock: MockClock) -> None:
    provider = Provider()
    async with running(provider) as (sets, _):
        assert await kids(sets) == {"old"}
        provider.status = 500
        await trio.sleep(KEPT_FOR_S - 1)
        assert await kids(sets) == {"old"}
        await trio.sleep(1 + FAILED_INTERVAL_S)
        assert await kids(sets) == set()


async def test_a_provider_that_never_answers_holds_nobody_longer_than_a_fetch(
    autojump_clock: MockClock,
) -> None:
    provider = Provider()
    provider.takes_s = 10_000
    async with running(provider) as (sets, log):
        began_s = trio.current_time()
        assert await kids(sets) == set()
        assert trio.current_time() - began_s <= 10
        assert "no answer in time" in log.lines[0]


@pytest.mark.parametrize("page", [b"not json", b"[]", b'{"keys":7}', b"\xff", b"[" * 100_000])
async def test_a_page_that_is_no_key_set_is_a_failure(autojump_clock: MockClock, page: bytes) -> None:
    provider = Provider()
    provider.pages[KEYS_URL] = page
    async with running(provider) as (sets, log):
        assert await kids(sets) == set() and log.lines[0].startswith("warn")


async def test_a_redirect_is_not_followed(autojump_clock: MockClock) -> None:
    provider = Provider()
    provider.status = 302
    async with running(provider) as (sets, log):
        assert await kids(sets) == set() and "302" in log.lines[0]
    assert len(provider.asked) == 1


async def test_the_issuer_tells_where_its_keys_are(autojump_clock: MockClock) -> None:
    provider = Provider()
    async with running(provider, None) as (sets, _):
        assert await kids(sets) == {"old"}
    assert [url for url, _ in provider.asked] == [f"{ISSUER}/.well-known/openid-configuration", KEYS_URL]
    assert all(permits is None for _, permits in provider.asked), "the operator named this place"


async def test_a_place_that_only_the_document_names_must_be_a_public_one(autojump_clock: MockClock) -> None:
    provider = Provider()
    provider.discovery(jwks_uri="https://keys.example/k")
    provider.pages["https://keys.example/k"] = provider.pages[KEYS_URL]
    async with running(provider, None) as (sets, _):
        assert await kids(sets) == {"old"}
    assert provider.asked[1] == ("https://keys.example/k", is_public)


@pytest.mark.parametrize(
    "changed",
    [
        {"issuer": "https://evil.example"},
        {"issuer": None},
        {"jwks_uri": None},
        {"jwks_uri": 7},
        {"jwks_uri": "http://idp.example/keys"},
        {"jwks_uri": "file:///etc/passwd"},
        {"jwks_uri": "https://idp.example/a b"},
        {"jwks_uri": "https://idp.example/\r\nx: y"},
        {"jwks_uri": "https://idp.example/ü"},
        {"jwks_uri": "https://[::1"},
        {"jwks_uri": "https://idp.example:99999/"},
        {"jwks_uri": "https:///keys"},
    ],
)
async def test_a_document_that_leads_astray_is_not_followed(
    autojump_clock: MockClock, changed: dict[str, Any]
) -> None:
    provider = Provider()
    provider.discovery(**changed)
    async with running(provider, None) as (sets, log):
        assert await kids(sets) == set() and log.lines[0].startswith("warn")
    assert len(provider.asked) == 1


@pytest.mark.parametrize(
    ("address", "is_it"),
    [
        ("8.8.8.8", True),
        ("2606:4700::1111", True),
        ("::ffff:8.8.8.8", True),
        ("64:ff9b::808:808", True),
        ("127.0.0.1", False),
        ("10.1.2.3", False),
        ("172.16.0.1", False),
        ("192.168.1.1", False),
        ("169.254.169.254", False),
        ("100.64.0.1", False),
        ("0.0.0.0", False),
        ("224.0.0.1", False),
        ("::1", False),
        ("::", False),
        ("fe80::1%eth0", False),
        ("fd00::1", False),
        ("::ffff:127.0.0.1", False),
        ("::ffff:10.0.0.1", False),
        ("64:ff9b::a00:1", False),
        ("2002:0a00:0001::", False),
        ("localhost", False),
        ("", False),
    ],
)
def test_private_addresses_are_known_in_all_their_clothes(address: str, is_it: bool) -> None:
    assert is_public(address) is is_it
