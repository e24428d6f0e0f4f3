"""The member table: one row per name, the live ones in a shuffled ring for probing, and a fingerprint over them.

Owns the rows, their bound and the fingerprint. Must never judge: it stores what the judge decided.
"""

from __future__ import annotations

from random import Random
from zlib import crc32

from mesh.member import Member, Record, Status


def mark(record: Record) -> int:
    """What one live member adds (by xor) to the fingerprint: name, life and incarnation, not the status.

    Suspicions come and go and are not worth a repair; a life or a refutation that someone missed is.
    """
    return crc32(b"%b\x00%b%d" % (record.name.encode(), record.boot, record.incarnation))


class Roster:
    """Rows of all other members. Invariant: `_live` holds exactly the names whose status is ALIVE or SUSPECT."""

    __slots__ = (
        "_cursor",
        "_gossip_place",
        "_live",
        "_max",
        "_place",
        "_rng",
        "_rows",
        "_rows_down",
        "changed_s",
        "fingerprint",
    )

    def __init__(self, members_max: int, own: Record, rng: Random) -> None:
        self._max = members_max
        self._rng = rng
        self._rows: dict[str, Member] = {}
        self._rows_down: dict[str, Member] = {}
        """Tombstones, oldest first."""
        self._live: list[Member] = []
        """The ring: places before the cursor were probed in this round."""
        self._place: dict[str, int] = {}
        self._cursor = 0
        self._gossip_place = 0
        self.fingerprint = mark(own)
        self.changed_s = float("-inf")
        """Machine time of the last change of the fingerprint."""

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def live_count(self) -> int:
        """Alive and suspect members, without ourselves."""
        return len(self._live)

    def get(self, name: str) -> Member | None:
        """The row, or None."""
        return self._rows.get(name)

    def rows(self) -> list[Member]:
        """All rows in the order they were learned."""
        return list(self._rows.values())

    def live(self) -> list[Member]:
        """Rows of alive and suspect members."""
        return list(self._live)

    def down(self) -> list[Member]:
        """Tombstones, oldest first."""
        return list(self._rows_down.values())

    @property
    def oldest_down(self) -> Member | None:
        """The tombstone that has been one for longest."""
        return next(iter(self._rows_down.values()), None)

    def is_full(self) -> bool:
        """A new name needs a row that is not there."""
        return len(self._rows) >= self._max

    def add(self, record: Record, now: float) -> Member:
        """Make a row for a new name. The judge has made room."""
        assert record.name not in self._rows
        assert not self.is_full()
        member = Member(record, now)
        self._rows[record.name] = member
        self._enter(member, now)
        return member

    def put(self, member: Member, record: Record, now: float) -> None:
        """Replace what is known of a member. `since_s` moves when status or life change."""
        old = member.record
        assert old.name == record.name
        was_live = member.is_live
        if old.status != record.status or old.boot != record.boot:
            member.since_s = now
        if was_live and record.status <= Status.SUSPECT:
            self._touch(mark(old) ^ mark(record), now)
            member.record = record
            return
        self._exit(member, now)
        member.record = record
        self._enter(member, now)

    def remove(self, name: str, now: float) -> None:
        """Forget a row."""
        member = self._rows[name]
        self._exit(member, now)
        del self._rows[name]

    def own_changed(self, old: Record, new: Record, now: float) -> None:
        """Our own record changed: it is part of the fingerprint too."""
        self._touch(mark(old) ^ mark(new), now)

    def next_to_probe(self) -> Member | None:
        """Round robin over a shuffled ring (SWIM section 4.3): everyone is probed within 2N - 1 turns."""
        live = self._live
        if not live:
            return None
        if self._cursor >= len(live):
            self._cursor = 0
            self._rng.shuffle(live)
            for place, member in enumerate(live):
                self._place[member.name] = place
        self._cursor += 1
        return live[self._cursor - 1]

    def next_to_tell(self, count: int) -> list[Member]:
        """The next `count` members of the ring for gossip: nobody is told twice before everyone was told once.

        Plain random choice would leave a member of ten untold, after the few rounds a rumor lives, in one of fifty
        cases; the walk over a shuffled ring costs nothing and spreads as fast.
        """
        live = self._live
        if len(live) <= count:
            return list(live)
        start = self._gossip_place % len(live)
        self._gossip_place = start + count
        return [live[(start + step) % len(live)] for step in range(count)]

    def sample(self, count: int, *without: str) -> list[Member]:
        """Up to `count` distinct random live members, none of those named."""
        live = self._live
        if len(live) <= count + len(without):
            chosen = [member for member in live if member.name not in without]
            self._rng.shuffle(chosen)
            return chosen[:count]
        picked: list[Member] = []
        random = self._rng.random
        while len(picked) < count:
            # rejection is cheap: there are more live members than we want and must avoid together
            member = live[int(random() * len(live))]
            if member not in picked and member.name not in without:
                picked.append(member)
        return picked

    def _enter(self, member: Member, now: float) -> None:
        if not member.is_live:
            self._rows_down[member.name] = member
            return
        live = self._live
        # A newcomer takes a random place among those still to be probed in this round.
        place = self._cursor + int(self._rng.random() * (len(live) + 1 - self._cursor))
        live.append(member)
        self._move(live[place], len(live) - 1)
        self._move(member, place)
        self._touch(mark(member.record), now)

    def _exit(self, member: Member, now: float) -> None:
        place = self._place.pop(member.name, None)
        if place is None:
            self._rows_down.pop(member.name, None)
            return
        live = self._live
        if place < self._cursor:
            # Fill the hole with one that was probed too, or the ring would skip someone.
            self._cursor -= 1
            self._move(live[self._cursor], place)
            place = self._cursor
        last = live.pop()
        if place < len(live):
            self._move(last, place)
        self._place.pop(member.name, None)
        self._touch(mark(member.record), now)

    def _move(self, member: Member, place: int) -> None:
        self._live[place] = member
        self._place[member.name] = place

    def _touch(self, bits: int, now: float) -> None:
        if bits:
            self.fingerprint ^= bits
            self.changed_s = now
