"""One limit divided among nodes: how much of it this node holds, and what nodes have given each other.

Owns the arithmetic that keeps the parts from adding up to more than the whole. A part changes hands by gift only: the giver
lowers what it holds and counts the gift for one receiver, who raises what it holds by what it has not accepted yet. All of it
are absolute, growing numbers that their owner repeats, so words may be late, lost, or arrive twice, and the sum over nodes is
never above the whole, whoever hears whom (as in the bounded counters of Balegas et al., "Extending Eventually Consistent
Cloud Databases for Enforcing Numeric Invariants", 2015). What nobody holds any more is made anew by one node only, and what
is held twice is given up. The book never knows a clock, a network, or what its limit is of.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import NamedTuple

import msgspec

WHOLE = 1_000_000
"""A limit in the parts in which it is divided: whole numbers, because sums of them are exact."""

Peer = bytes
"""Which node, and which life of it: a node that starts again is another peer, and the former one has gone."""

GIVE_SHARE = 0.15
GIVE_MIN = 2_000
"""What is above one's due is given when it is more than this share of what is held, while anybody asks, and more than this.
Demand is counted over a second or less, so it trembles by such a share at 20 requests a second, and a gift that is on its way
serves nobody."""

IDLE_SLACK = 400
"""While nobody asks nothing trembles, and parts become even but for this. Nodes begin below the even part by as much."""

SHORT_MIN = 100
"""Less than this missing from the whole is left alone."""


class Gift(NamedTuple):
    """What one node has given to another, and accepted from it, since both began their books.

    `epoch` is the peer's: gifts to and from another book of that peer say nothing. Tokens are parts of a full bucket.
    """

    peer: Peer
    epoch: int
    given: int
    accepted: int
    tokens: int
    tokens_accepted: int


class Told(msgspec.Struct, frozen=True):
    """All that a node says of one limit.

    `epoch` is the number of this book among all of the node's; `demand` what was asked of the node lately and `held` what it
    may give out, both in parts of the limit (`demand` may be above the whole). `refill_s` is how long an empty bucket takes to
    be full. `view` is a digest of the nodes that the teller reckoned with.
    """

    epoch: int
    demand: int
    held: int
    refill_s: float
    view: int
    gifts: tuple[Gift, ...] = ()


class Group(NamedTuple):
    """The nodes of this moment, without the node itself: those it hears of, and those that fell silent and may be serving
    beyond a cut. `may_make`: this node is the one that makes anew what nobody holds. `view` is a digest of all of them, this
    node included."""

    live: Collection[Peer]
    silent: Collection[Peer]
    may_make: bool
    view: int

    @property
    def size(self) -> int:
        """Nodes that the limit is divided among."""
        return 1 + len(self.live) + len(self.silent)


def even_part(group: Group) -> int:
    """What each node holds of a limit that nobody has divided. A little below the even part, so that it is not more than
    what the node held when it closed its last book."""
    return WHOLE if group.size == 1 else WHOLE // group.size - IDLE_SLACK


class ShareBook:
    """See the module. `epoch` differs from that of every former book of the node for this limit."""

    __slots__ = ("_gifts", "_me", "demand", "epoch", "held", "refill_s", "told")

    def __init__(self, me: Peer, epoch: int, refill_s: float) -> None:
        self._me = me
        self._gifts: dict[Peer, Gift] = {}
        self.epoch = epoch
        self.held = 0
        """Parts that this node may give out. Only gifts, `begin` and `settle` change it; never below 0."""
        self.demand = 0
        self.refill_s = refill_s
        self.told: dict[Peer, Told] = {}
        """The last word of each peer."""

    # -- what is said and heard

    def words(self, group: Group) -> Told:
        """What to tell the others."""
        gifts = tuple(self._gifts.values())
        return Told(self.epoch, self.demand, self.held, self.refill_s, group.view, gifts)

    def hear(self, peer: Peer, told: Told, group: Group) -> int:
        """A peer's word. Accepts what it has given to this node; the tokens that came with it.

        Nothing is accepted from a node that reckons with others than this one does: one of the two may count a third as gone,
        and make its part anew together with what it had given. Hear it again when that has changed.
        """
        self.told[peer] = told
        if told.view != group.view:
            return 0
        self.refill_s = told.refill_s
        ours = self._gifts.get(peer)
        if ours is not None and ours.epoch != told.epoch:
            # What was given to a book that is no more is lost, and will be made anew. The empty row tells who reads ours
            # together with an old word of the peer that the two do not belong together.
            ours = self._gifts[peer] = Gift(peer, told.epoch, 0, 0, 0, 0)
        if ours is None:
            ours = Gift(peer, told.epoch, 0, 0, 0, 0)
        theirs = next((gift for gift in told.gifts if gift.peer == self._me), None)
        if theirs is None or theirs.epoch != self.epoch or theirs.given <= ours.accepted:
            return 0
        tokens = max(theirs.tokens - ours.tokens_accepted, 0)
        self.held += theirs.given - ours.accepted
        self._gifts[peer] = ours._replace(accepted=theirs.given, tokens_accepted=theirs.tokens)
        return tokens

    def forget(self, peer: Peer) -> None:
        """A peer's word does not count any more; it may come again."""
        self.told.pop(peer, None)

    def has_dealt_with(self, peers: Collection[Peer]) -> bool:
        """Whether anything was given to one of these, or accepted from it."""
        return any(peer in self._gifts for peer in peers)

    def renew(self, epoch: int) -> None:
        """Begin a new book with what is held: every gift on its way to this node is void. After that nothing need be
        remembered of peers that are gone, which would be accepted a second time if one came back."""
        self.epoch = epoch
        self._gifts.clear()

    # -- what follows

    def known_sum(self, group: Group) -> int:
        """Parts held by the nodes that were heard, and on their way between them. Exact for words of any age."""
        nodes = self._nodes(group)
        return sum(_due(nodes).values())

    def _may_make(self, group: Group) -> bool:
        """Is it for this node to make what is missing, and was every other one heard since it reckons with the same nodes?

        Then what a node that has gone had given to it is in its word, and will be no more; so the known sum is the true one.
        """
        told = self.told
        if not group.may_make or group.silent:
            return False
        return all(peer in told and told[peer].view == group.view for peer in group.live)

    def begin(self, group: Group) -> None:
        """Take the part of a limit that nobody has divided yet, as far as no other node has it.

        What was given to a node that was not heard yet is there, though it cannot be seen what has become of it. And those
        who do not reckon with this node yet may be making the whole.
        """
        nodes = self._nodes(group)
        if any(told.view != group.view for told in nodes.values()):
            return
        unseen = sum(gift.given for told in nodes.values() for gift in told.gifts if gift.peer not in nodes)
        known = sum(_due(nodes).values()) + unseen
        self.held = min(max(WHOLE - known, 0), even_part(group))

    def settle(self, group: Group, may_make: bool) -> dict[Peer, int]:
        """Give up what is held twice, make what nobody holds (if this node may), and say what to give to whom.

        The gifts are to be written down with `hand_over`.
        """
        nodes = self._nodes(group)
        due = _due(nodes)
        whole = sum(due.values())
        before = self.held
        if whole > WHOLE:
            self._give_up(nodes, due, group, whole - WHOLE)
        elif WHOLE - whole >= SHORT_MIN and may_make and self._may_make(group):
            self.held += WHOLE - whole
        due[self._me] += self.held - before
        return self._gifts_now(nodes, due, group)

    def _give_up(
        self, nodes: Mapping[Peer, Told], due: Mapping[Peer, int], group: Group, too_much: int
    ) -> None:
        """Two meshes, or two books, have met, and together hold more than the whole: this is our part of it."""
        beyond = sum(due[peer] for peer in group.silent if peer in due)
        excess = self._excess(nodes, due, group, max(WHOLE - beyond, 0))
        above = sum(parts for parts in excess.values() if parts > 0)
        mine = excess[self._me]
        if mine > 0:
            self.held -= min(-(-too_much * mine // above), self.held)

    def _gifts_now(
        self, nodes: Mapping[Peer, Told], due: Mapping[Peer, int], group: Group
    ) -> dict[Peer, int]:
        """What is held above what the demand of all nodes makes of it, for those who lack it."""
        side = due[self._me] + sum(due[peer] for peer in group.live if peer in due)
        excess = self._excess(nodes, due, group, side)
        mine = min(excess[self._me], self.held)
        is_asked = any(node.demand for node in nodes.values())
        if mine <= (GIVE_MIN + GIVE_SHARE * self.held if is_asked else IDLE_SLACK // group.size):
            return {}
        lacks = {peer: -parts for peer, parts in excess.items() if parts < 0}
        lacking = sum(lacks.values())
        gifts = {peer: min(mine, lacking) * parts // lacking for peer, parts in lacks.items()}
        return {peer: parts for peer, parts in gifts.items() if parts > 0}

    def hand_over(self, gifts: Mapping[Peer, int], tokens: int) -> None:
        """Give parts away, and so many tokens with them, to each its share."""
        whole = sum(gifts.values())
        assert whole <= self.held, "one can only give what one has"
        self.held -= whole
        for peer, parts in gifts.items():
            gift = self._gifts.get(peer)
            if gift is None:
                gift = Gift(peer, self.told[peer].epoch, 0, 0, 0, 0)
            self._gifts[peer] = gift._replace(
                given=gift.given + parts, tokens=gift.tokens + tokens * parts // whole
            )

    def is_even(self, group: Group) -> bool:
        """Is nobody cut off, does nobody ask, and is what is held what a node begins with, or nearly?"""
        is_idle = not self.demand and not any(told.demand for told in self.told.values())
        spread = self.held - even_part(group)
        return is_idle and not group.silent and 0 <= spread <= 2 * IDLE_SLACK

    def _nodes(self, group: Group) -> dict[Peer, Told]:
        nodes = {peer: self.told[peer] for peer in (*group.live, *group.silent) if peer in self.told}
        nodes[self._me] = self.words(group)
        return nodes

    def _excess(
        self, nodes: Mapping[Peer, Told], due: Mapping[Peer, int], group: Group, side: int
    ) -> dict[Peer, int]:
        """What each live node has above its target; the targets add up to `side`.

        While all together ask for less than the whole, each gets what it asks for and what is left is divided evenly, so
        that the first requests on a quiet node find something. Else parts follow demand, as if all asked one bucket.
        """
        live = [self._me, *(peer for peer in group.live if peer in nodes)]
        asked = sum(nodes[peer].demand for peer in live)
        spare = max(WHOLE - asked, 0)
        weight = max(asked, WHOLE)
        return {
            peer: due[peer] - side * (nodes[peer].demand * len(live) + spare) // (weight * len(live))
            for peer in live
        }


def _due(nodes: Mapping[Peer, Told]) -> dict[Peer, int]:
    """What each of these holds, with what is on its way to it.

    A gift was either heard of from both sides, or from one: then it is counted with the receiver, or, when only the receiver
    told of it, taken off it again. So the sum is right for words of different ages. Rows about another book than the one that
    its owner tells of are void, and so is what the other side says of the same pair.
    """
    due = {peer: told.held for peer, told in nodes.items()}
    epoch_seen = {(owner, gift.peer): gift.epoch for owner, told in nodes.items() for gift in told.gifts}
    for (owner, peer), epoch in epoch_seen.items():
        other = nodes.get(peer)
        if other is None or other.epoch != epoch:
            epoch_seen[owner, peer] = -1
    for owner, told in nodes.items():
        for gift in told.gifts:
            if epoch_seen[owner, gift.peer] < 0:
                continue
            due[gift.peer] += gift.given
            if epoch_seen.get((gift.peer, owner), 0) >= 0:
                due[owner] -= gift.accepted
    return due
