"""The keys of the identity provider: fetched, kept for an hour, fetched again when a token names an unknown one (SEC-7).

Owns when the provider is asked: at the start, when the hour is over, and at most twice a minute for keys that nobody knows,
however many tokens name them. One fetch serves all who wait for it. When the provider cannot be reached and the hour is
over there are no keys, so the admin routes stay closed. Addresses that the provider only tells of (`jwks_uri` in its
discovery document) must be public ones: a document must not be able to make the gateway ask inside its own network.
It must never follow a redirect, and never checks a token.
"""

from __future__ import annotations

import ipaddress
import math
from collections.abc import Callable, Sequence
from typing import Any, Protocol
from urllib.parse import urlsplit

import msgspec
import trio

from smg.errors import UpstreamError
from smg.net.client import Fetched
from smg.services.asking import Log
from smg.tenancy.claims import BadKeySet, KeySet, key_set, load_library

KEPT_FOR_S = 3600.0
"""How long a set of keys is used (SEC-7)."""
RENEWED_AFTER_S = 2700.0
"""From this age on, use of a set asks for a new one without waiting: the provider may be away for a quarter of an hour."""
UNKNOWN_INTERVAL_S = 30.0
"""Shortest time between two fetches for unknown kids (SEC-7)."""
FAILED_INTERVAL_S = 5.0
"""Shortest time between two tries while there are no keys: callers with made-up tokens must not become a flood there."""
FETCH_TIMEOUT_S = 10.0
"""For both documents together; an admin call waits for no longer."""
DOCUMENT_BYTES_MAX = 1 << 20
"""Largest document: real ones have a few KiB."""

_DISCOVERY_PATH = "/.well-known/openid-configuration"
_NAT64 = ipaddress.ip_network("64:ff9b::/96")


class Fetch(Protocol):
    """`smg.net.client.Client.fetch`, on connections of its own."""

    async def __call__(
        self,
        method: str,
        url: str,
        *,
        headers: Sequence[tuple[str, str]] = (),
        body: bytes = b"",
        bytes_max: int = 0,
        permits: Callable[[str], bool] | None = None,
    ) -> Fetched:
        """One request, one answer; only addresses that `permits` allows are connected to."""
        ...


class _Unfetched(Exception):
    """The keys could not be fetched; the text says why, for the log."""


class KeySets:
    """The keys of one provider. `now` is a clock of seconds that never goes back."""

    def __init__(
        self,
        fetch: Fetch,
        issuer: str,
        jwks_uri: str | None,
        *,
        log: Log,
        now: Callable[[], float] = trio.current_time,
    ) -> None:
        self._fetch = fetch
        self._issuer = issuer
        self._jwks_uri = jwks_uri
        self._log = log
        self._now = now
        self._keys: KeySet = {}
        self._fetched_s = -math.inf
        self._tried_s = -math.inf
        self._asked_unknown_s = -math.inf
        self._is_failing = False
        self._wanted = trio.Event()
        self._done = trio.Event()

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Fetches when asked to, until cancelled; the first time at once, so that a wrong address shows in the log."""
        self._wanted.set()
        task_status.started()
        await trio.to_thread.run_sync(load_library)
        while True:
            await self._wanted.wait()
            self._tried_s = self._now()
            try:
                with trio.fail_after(FETCH_TIMEOUT_S):
                    keys = await self._fetch_keys()
            except (_Unfetched, UpstreamError, trio.TooSlowError) as error:
                self._complain(str(error) or "no answer in time")
            else:
                self._fetched_s = self._now()
                self._is_failing = False
                if keys.keys() != self._keys.keys():
                    self._log.info("identity provider's keys are known", issuer=self._issuer, count=len(keys))
                self._keys = keys
            self._wanted = trio.Event()
            done, self._done = self._done, trio.Event()
            done.set()

    async def keys(self, kid: str) -> KeySet:
        """The keys that hold now, fetched first when there are none or `kid` is not among them; may be empty.

        Waits for a fetch, never longer than one takes. Whether `kid` is there in the end is for the caller to see.
        """
        now = self._now()
        age_s = now - self._fetched_s
        is_known = any(known == kid for known, _ in self._keys)
        if age_s >= KEPT_FOR_S:
            self._keys = {}
            if self._wanted.is_set() or now - self._tried_s >= FAILED_INTERVAL_S:
                await self._renew()
        elif not is_known:
            if now - self._asked_unknown_s >= UNKNOWN_INTERVAL_S:
                self._asked_unknown_s = now
                await self._renew()
            elif self._wanted.is_set():
                await self._renew()  # a fetch for somebody else is under way: its answer counts for all
        elif age_s >= RENEWED_AFTER_S and now - self._tried_s >= UNKNOWN_INTERVAL_S:
            self._wanted.set()
        return self._keys

    async def _renew(self) -> None:
        done = self._done
        self._wanted.set()
        await done.wait()

    async def _fetch_keys(self) -> KeySet:
        url, permits = self._jwks_uri, None
        if url is None:
            document = await self._document(self._issuer.rstrip("/") + _DISCOVERY_PATH, None)
            if not isinstance(document, dict) or document.get("issuer") != self._issuer:
                raise _Unfetched("the discovery document is another issuer's")
            url = document.get("jwks_uri")
            if not isinstance(url, str) or not _may_follow(self._issuer, url):
                raise _Unfetched("the discovery document names no usable jwks_uri")
            if _place(url) != _place(self._issuer):
                permits = is_public
        try:
            return key_set(await self._document(url, permits))
        except BadKeySet as error:
            raise _Unfetched(f"the document of keys {error}") from None

    async def _document(self, url: str, permits: Callable[[str], bool] | None) -> Any:
        answer = await self._fetch(
            "GET",
            url,
            headers=(("accept", "application/json"),),
            bytes_max=DOCUMENT_BYTES_MAX,
            permits=permits,
        )
        if answer.status != 200:
            raise _Unfetched(f"{_place(url)} answered {answer.status}")
        try:
            return msgspec.json.decode(answer.body)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            raise _Unfetched(f"{_place(url)} answered no JSON") from None

    def _complain(self, reason: str) -> None:
        """Logs the first failure of a row; the keys at hand stay for their hour."""
        if not self._is_failing:
            self._is_failing = True
            self._log.warn("identity provider's keys cannot be fetched", issuer=self._issuer, reason=reason)


def is_public(address: str) -> bool:
    """Whether an IP address is one of the public internet, also when it is an IPv4 address in IPv6 clothes."""
    try:
        ip = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return False
    if isinstance(ip, ipaddress.IPv6Address):
        if ip in _NAT64:
            return is_public(str(ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)))
        inner = ip.ipv4_mapped or ip.sixtofour or (ip.teredo[1] if ip.teredo else None)
        if inner is not None:
            return is_public(str(inner))
    return ip.is_global and not ip.is_multicast


def _may_follow(issuer: str, url: str) -> bool:
    """A document that came sealed does not send us to an open line."""
    try:
        scheme, host, _ = _place(url)
    except ValueError:
        return False
    if not (url.isascii() and url.isprintable()) or " " in url:
        return False  # it becomes a request line
    return bool(host) and (scheme == "https" or (scheme == "http" and urlsplit(issuer).scheme == "http"))


def _place(url: str) -> tuple[str, str, int]:
    """Scheme, host and port of a URL. Raises ValueError."""
    parts = urlsplit(url)
    return parts.scheme, parts.hostname or "", parts.port or (443 if parts.scheme == "https" else 80)
