"""Seeds: the addresses through which a node finds its mesh, dialled for ever.

Owns each seed's backoff and what it turned out to be. Must never resolve or dial: it asks the shell for it.
"""

from __future__ import annotations

from collections.abc import Iterable
from random import Random

from mesh.messages import DialSeed
from mesh.outbox import Outbox
from mesh.own import Own
from mesh.roster import Roster
from mesh.settings import SwimSettings
from mesh.timers import Timers

SEEDS_MAX = 256
"""More seeds than this are a mistake in a configuration; the first ones are used."""
DIAL_PATIENCE_S = 10.0
"""A dial the shell never reported on is given up after this long, and made again."""


class _Seed:
    __slots__ = ("backoff_s", "is_dialling", "name", "started_s", "text")

    def __init__(self, text: str, backoff_s: float) -> None:
        self.text = text
        self.name: str | None = None
        """The member that answered last."""
        self.backoff_s = backoff_s
        self.is_dialling = False
        self.started_s = float("-inf")


class Seeds:
    """All seeds of one node."""

    __slots__ = ("_outbox", "_own", "_rng", "_roster", "_seeds", "_settings", "_timers")

    def __init__(
        self, settings: SwimSettings, own: Own, roster: Roster, outbox: Outbox, timers: Timers, rng: Random
    ) -> None:
        self._settings = settings
        self._own = own
        self._roster = roster
        self._outbox = outbox
        self._timers = timers
        self._rng = rng
        self._seeds: dict[str, _Seed] = {}

    def add(self, texts: Iterable[str], now: float) -> None:
        """Dial these at once and keep at them."""
        for text in texts:
            if text not in self._seeds and len(self._seeds) < SEEDS_MAX:
                seed = _Seed(text, self._settings.seed_retry_min_s)
                self._seeds[text] = seed
                self._try(seed, now)

    def answered(self, text: str, name: str, boot: bytes, now: float) -> None:
        """A dial reached this peer, perhaps ourselves."""
        seed = self._seeds.get(text)
        if seed is None:
            return
        seed.is_dialling = False
        seed.backoff_s = self._settings.seed_retry_min_s
        if boot != self._own.record.boot:
            seed.name = name
        elif seed.name is None:
            seed.name = self._own.name

    def failed(self, text: str, now: float) -> None:
        """A dial reached nobody."""
        seed = self._seeds.get(text)
        if seed is not None:
            seed.is_dialling = False

    def is_satisfied(self) -> bool:
        """Every seed is a live member or ourselves."""
        return all(self._is_live(seed) for seed in self._seeds.values())

    def _try(self, seed: _Seed, now: float) -> None:
        settings = self._settings
        if self._is_live(seed):
            wait_s = settings.seed_self_retry_s if seed.name == self._own.name else settings.seed_retry_max_s
            if seed.name == self._own.name:
                self._dial(seed, now)
        else:
            self._dial(seed, now)
            wait_s = seed.backoff_s
            seed.backoff_s = min(settings.seed_retry_max_s, 2 * seed.backoff_s)
        # Jitter keeps a thousand nodes that started together from dialling together.
        wait_s *= 0.75 + 0.25 * self._rng.random()
        self._timers.at(now + wait_s, lambda later: self._try(seed, later))

    def _dial(self, seed: _Seed, now: float) -> None:
        if seed.is_dialling and now - seed.started_s < DIAL_PATIENCE_S:
            return
        seed.is_dialling = True
        seed.started_s = now
        self._outbox.effect(DialSeed(seed.text))

    def _is_live(self, seed: _Seed) -> bool:
        if seed.name is None:
            return False
        if seed.name == self._own.name:
            return True
        member = self._roster.get(seed.name)
        return member is not None and member.is_live
