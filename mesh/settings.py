"""Every setting of the membership machine, declared once, with its unit, its default and the reason for it.

Owns the numbers and their validation. Must never read the environment, a file or a clock; a shell builds the struct
and hands it in. Other parts of the library add their own struct here instead of growing this one.
"""

from __future__ import annotations

import msgspec

from mesh.errors import SettingsError

PACKET_BYTES_MAX = 1400
"""A datagram never exceeds this, seal included: fits an Ethernet MTU of 1,500 with IPv6 and a tunnel header."""

SEAL_BYTES_MAX = 64
"""Room left in each datagram for the seal (header 8, boot 8, counter 8, tag 16 = 40 today, the rest is growth)."""

PACKET_BODY_BYTES_MAX = PACKET_BYTES_MAX - SEAL_BYTES_MAX
"""What the codec may fill."""

NAME_BYTES_MAX = 128
HOST_BYTES_MAX = 128
META_BYTES_MAX = 256
KEY_IDS_MAX = 8
"""Caps of a member record: together below one datagram, so that every record can travel as a rumor."""


class SwimSettings(msgspec.Struct, frozen=True, kw_only=True):
    """Settings of one membership machine. All members should use the same values; a mix works, slower.

    Raises SettingsError from `checked()` when a value is impossible; the defaults are for one data centre.
    """

    probe_interval_s: float = 0.5
    """One member is probed per interval (times 1 + health). Half of memberlist's LAN value: detection in seconds
    matters more than the 200 B/s it costs."""

    probe_timeout_min_s: float = 0.1
    """A direct ping waits at least this long before help is asked for: a busy Python loop answers within 50 ms."""

    probe_timeout_max_s: float = 0.2
    """... and at most this long, whatever the smoothed round trip says (raise it for a WAN)."""

    probe_rtt_mult: float = 4.0
    """Between the two: this many smoothed round trips."""

    indirect_probes: int = 3
    """Members asked to ping on our behalf. SWIM's k; 3 gives 1 - .26^3 at 20 % loss."""

    stream_probe: bool = True
    """Also ping over a stream when UDP does not answer: with UDP blocked nobody is suspected."""

    suspicion_mult: float = 3.75
    """A suspicion lasts mult * max(1, log10 N) * probe_interval_s when confirmed (N <= 10: 1.9 s). memberlist: 4;
    a little less keeps the slowest death of 64 members below 5.5 s."""

    suspicion_mult_eof: float = 2.9
    """When the suspicion began with the end of the member's stream, it lasts mult * probe_interval_s whatever the
    size (1.45 s): a process death is likely, all who had a stream saw it at once, and a refutation is everywhere within
    .3 s even of 1,000 members. In silence the logarithm leaves time for probes by others, which nobody waits for here."""

    suspicion_max_mult: float = 6.0
    """Without confirmations it lasts this many times longer (Lifeguard), if there are enough members to confirm."""

    confirmations: int = 2
    """Independent accusers that bring the suspicion down to its minimum (memberlist: mult - 2)."""

    corroborators: float = 6.0
    """So many members, on average, probe a suspect at once when they hear of the suspicion, instead of waiting for
    its turn: confirmations come within an interval when it is dead, and the suspect hears of it when it is not.
    (Not in Lifeguard.) 0 = never."""

    refused_rule: bool = True
    """A port that refuses our dial, and a helper's where there is one, is a dead process: dead after refused_s."""

    refused_s: float = 0.3
    """Time between the first refusal and the verdict; a restart within it never counts as a death."""

    health_max: int = 7
    """Local health runs from 0 (well) to this; probe intervals are multiplied by 1 + health (Lifeguard)."""

    lag_unhealthy_s: float = 0.1
    """Own loop this late counts against our health and voids the probe that was under way."""

    lag_frozen_s: float = 0.5
    """Own loop this late was a freeze: no death verdict for frozen_hold_s afterwards."""

    frozen_hold_s: float = 1.0
    """Long enough to read what queued up in the sockets and to hear acks again."""

    gossip_interval_s: float = 0.1
    """Pause between two rounds of gossip while there is news; no news, no packets."""

    gossip_fanout: int = 3
    """Members told per round."""

    gossip_delay_s: float = 0.005
    """The first round waits only this long, so that news that arrives together leaves together."""

    transmit_mult: float = 4.0
    """Each rumor is sent mult * (1 + log10 N) times by each member (SWIM's lambda log N), and at least 2 * mult."""

    push_pull_interval_s: float = 30.0
    """Full tables are exchanged with one random member this often, times 1 + log2(N/32) above 32 members."""

    repair_after_s: float = 2.0
    """When a peer's fingerprint differs from ours, and ours has been quiet this long, exchange tables."""

    repair_interval_s: float = 5.0
    """At most one such exchange per interval; doubled up to a minute while exchanges bring nothing new."""

    redial_interval_s: float = 5.0
    """One dead or left member is dialled this often (0 = never), so that partitions of any length heal."""

    redial_all_s: float = 60.0
    """... more often when there are many: all of them within this time, but never more than ten a second."""

    tombstone_s: float = 24 * 3600.0
    """Dead and left members are remembered, and dialled, this long."""

    seed_retry_min_s: float = 0.25
    seed_retry_max_s: float = 4.0
    """A seed that is not a live member is dialled for ever: first after min, doubling up to max, with jitter."""

    seed_self_retry_s: float = 30.0
    """A seed that turned out to be ourselves is tried again this often: its name may resolve to others later."""

    leave_s: float = 1.0
    """A leaving node waits at most this long for acknowledgements of its farewell."""

    leave_resend_s: float = 0.2
    """... and repeats it, by stream too, to whom has not acknowledged within this."""

    clock_ahead_max_s: float = 600.0
    """A life that began later than our own clock plus this is refused: a broken clock would outrank its heirs."""

    members_max: int = 4096
    """Bound of the member table; a new member pushes out the oldest tombstone, or is refused."""

    events_max: int = 65_536
    """Bound of the queue of events; a shell that drains after each call never has more than a table's worth."""

    def checked(self) -> SwimSettings:
        """Return self. Raises SettingsError naming the first impossible value."""
        positive = (
            "probe_interval_s",
            "probe_timeout_min_s",
            "probe_timeout_max_s",
            "suspicion_mult",
            "suspicion_mult_eof",
            "gossip_interval_s",
            "push_pull_interval_s",
            "seed_retry_min_s",
            "tombstone_s",
        )
        for name in positive:
            if not getattr(self, name) > 0:
                raise SettingsError(f"{name} must be above 0, not {getattr(self, name)!r}")
        if self.probe_timeout_min_s > self.probe_timeout_max_s:
            raise SettingsError("probe_timeout_min_s is above probe_timeout_max_s")
        if self.probe_timeout_max_s >= self.probe_interval_s:
            raise SettingsError(
                "probe_timeout_max_s must be below probe_interval_s: help needs time to answer"
            )
        if self.suspicion_max_mult < 1:
            raise SettingsError("suspicion_max_mult must be at least 1")
        if self.members_max < 2:
            raise SettingsError("members_max must be at least 2")
        return self


MEMBERLIST_LAN = SwimSettings(
    probe_interval_s=1.0,
    probe_timeout_min_s=0.5,
    probe_timeout_max_s=0.5,
    seed_retry_max_s=1e9,
    suspicion_mult=4.0,
    suspicion_mult_eof=4.0,
    corroborators=0.0,
    refused_rule=False,
    gossip_interval_s=0.2,
    gossip_delay_s=0.1,
    redial_interval_s=0.0,
    repair_interval_s=0.0,
)
"""The values of hashicorp/memberlist's DefaultLANConfig in this machine, as a yardstick for the simulator: without
re-dial, repair by fingerprint, and seeds that are dialled for ever. What it still has from us (accusations told by
stream, acks that tell each side what it does not know) makes it better than the original under loss."""


class AgentSettings(msgspec.Struct, frozen=True, kw_only=True):
    """Settings of one agent: who it is, where it listens, whom it looks for, how it is protected.

    Raises SettingsError from `checked()`. The membership machine's and the replica's settings are structs of their own.
    """

    name: str
    """The member's identity, the same after a restart; not empty, no colon."""

    host: str = "0.0.0.0"
    """Where to listen: an address of this host, `0.0.0.0` for all, `::` for all of both families."""

    port: int = 7946
    """One number for UDP and TCP; 0 lets the kernel choose. Also the port of seeds given without one."""

    advertise: str = ""
    """`host` or `host:port` others reach us at. Empty: the bound host, or if that is unspecified the local address from
    which the first seed is reached."""

    seeds: tuple[str, ...] = ()
    """`host:port`, names or addresses; all are tried, for ever. None: a mesh of one that others may join."""

    label: str = ""
    """Meshes of different labels never merge, even with one key."""

    secrets: tuple[bytes, ...] = ()
    """The keyring, first key sends; none: plain."""

    accepts_plain: bool = False
    """With a keyring: read plain packets too, for the first of the two restarts from plain to sealed."""

    meta: bytes = b""
    """Opaque bytes in our member record, at most META_BYTES_MAX."""

    features: int = 0
    """Bitmap for the library's users."""

    full_mesh_max: int = 32
    """Up to so many members every pair keeps a stream: 31 streams a node, and news takes one hop. Above, each node
    keeps about `neighbours` and state is relayed."""

    neighbours: int = 8
    """Streams a node keeps in a larger mesh: half of them dialled, half accepted. A random graph of degree 8 stays
    connected and has a diameter of 4 at 1,000 members."""

    maintain_interval_s: float = 1.0
    """Missing streams are dialled and idle ones closed this often."""

    keepalive_s: float = 5.0
    """A stream on which nothing was sent for so long says that it is alive, and which digest its sender has."""

    silent_s: float = 20.0
    """A stream on which nothing came for so long (of our own running time) is closed and dialled anew."""

    errand_s: float = 10.0
    """In a larger mesh, a stream that is not to be kept is closed after so long without traffic."""

    dial_s: float = 2.0
    """Patience for a TCP connection: two SYN retransmissions would come at 1 s and 3 s."""

    greeting_s: float = 3.0
    """Patience for TLS and greeting, on either side."""

    greetings_max: int = 64
    """Streams that have not greeted yet; with more, the oldest is dropped, so that strangers cannot fill the room."""

    resolve_s: float = 3.0
    """Patience for the resolution of a seed's name."""

    queue_frames_max: int = 512
    """Membership frames and questions that wait for one stream; the oldest goes. State does not wait here."""

    questions_max: int = 1024
    """Questions to peers without an answer yet; more are refused."""

    def checked(self) -> AgentSettings:
        """Return self. Raises SettingsError naming the first impossible value."""
        if not 0 <= self.port < 65536:
            raise SettingsError(f"no such port: {self.port}")
        if self.accepts_plain and not self.secrets:
            raise SettingsError("accepts_plain needs a keyring: without one everything is plain")
        for name in ("maintain_interval_s", "keepalive_s", "dial_s", "greeting_s", "resolve_s"):
            if not getattr(self, name) > 0:
                raise SettingsError(f"{name} must be above 0, not {getattr(self, name)!r}")
        if self.silent_s < 2 * self.keepalive_s:
            raise SettingsError("silent_s must leave room for two keep-alives")
        if self.neighbours < 2 or self.full_mesh_max < 2:
            raise SettingsError("neighbours and full_mesh_max must be at least 2")
        return self
