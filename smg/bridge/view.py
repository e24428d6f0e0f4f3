"""The mesh as operators see it: the documents of contract section 20 and the gauges of MET-9.

Owns how an agent's status and the rooms of the bridge become JSON and samples. It must change nothing, and shows no key.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import msgspec

from mesh import Agent, PeerStatus, State
from smg import __version__
from smg.bridge import words
from smg.bridge.health import HEALTH
from smg.bridge.limits import LIMITS, SharedLimits
from smg.bridge.loads import ENGINE, LOAD, SharedLoads
from smg.bridge.owner import Owners
from smg.bridge.peers import Peers
from smg.bridge.prefixes import PREFIX
from smg.bridge.sticky import STICKY
from smg.bridge.workers import ORDERS, WORKERS
from smg.fleet.prefix_index import PrefixIndex

Sample = tuple[str, tuple[str, ...], float]

_STORES = {
    "workers": (WORKERS, ORDERS),
    "prefix": (PREFIX,),
    "sticky": (STICKY,),
    "limits": (LIMITS,),
    "load": (LOAD,),
    "health": (HEALTH,),
    "engine": (ENGINE,),
}
"""Name in the status → namespaces of the mesh."""
_DROPS = ("seal_", "agent_datagrams_", "stream_strangers", "stream_turned_away", "stream_greetings_dropped")
_STATES = ("alive", "suspect", "dead", "left")


class View:
    """Reads; see the module."""

    def __init__(
        self,
        agent: Agent,
        peers: Peers,
        index: PrefixIndex,
        loads: SharedLoads,
        owners: Owners,
        limits: SharedLimits,
    ) -> None:
        self._agent = agent
        self._peers = peers
        self._index = index
        self._loads = loads
        self._owners = owners
        self._limits = limits

    def status(self, state: str, now: float) -> dict[str, Any]:
        """The document of `/mesh/status`; `state` is this node's own."""
        status = self._agent.status()
        lags = sorted(self._peers.lag_s(name, now) for name in self._peers.live())
        return {
            "enabled": True,
            "node": status.name,
            "address": shown_address(status.host, status.port),
            "incarnation": status.incarnation,
            "state": state,
            "members": status.members,
            "alive": status.alive,
            "version": __version__,
            "uptime_secs": round(status.uptime_s, 3),
            "converged": status.is_converged,
            "partitioned": status.is_partitioned,
            "state_digest": status.digest,
            "lag_secs": {
                "p50": round(lags[len(lags) // 2], 4) if lags else 0.0,
                "max": round(lags[-1], 4) if lags else 0.0,
            },
            "loop_lag_secs": round(status.lag_s, 4),
            "stores": self._stores(self._agent.state),
            "key_ids": [f"{key_id:08x}" for key_id in self._agent.keyring.ids],
            "mismatched": dict(self._peers.mismatched),
            "owner": {**self._owners.counts, "answered": self._owners.answered},
            "peers": [_peer(peer) for peer in status.peers],
        }

    def members(self, state: str, now: float) -> list[dict[str, Any]]:
        """The rows of `/mesh/members`; `lag_secs` is how old a live member's news is when it arrives."""
        status = self._agent.status()
        rows = [
            {
                "name": status.name,
                "address": shown_address(status.host, status.port),
                "state": "left" if state in ("left", "leaving") else "alive",
                "incarnation": status.incarnation,
                "self": True,
                "rtt_ms": None,
                "lag_secs": None,
                "last_seen_secs": 0.0,
                "version": __version__,
                "digest": status.digest,
            }
        ]
        live = set(self._peers.live())
        rows += [
            _member(peer, round(self._peers.lag_s(peer.name, now), 4) if peer.name in live else None)
            for peer in status.peers
        ]
        return sorted(rows, key=lambda row: str(row["name"]))

    def samples(self, state: str) -> Iterable[Sample]:
        """Gauges and counters for a scrape."""
        counted = dict.fromkeys(_STATES, 0)
        counted["left" if state in ("left", "leaving") else "alive"] += 1
        for member in self._agent.members:
            counted[member.status.name.lower()] += 1
        for name, count in counted.items():
            yield "smg_mesh_members", (name,), float(count)
        for what, count in self._agent.counts().items():
            if what.startswith(_DROPS):
                yield "smg_mesh_dropped_total", (what,), float(count)
        for result, count in self._owners.counts.items():
            yield "smg_mesh_owner_questions_total", (result,), float(count)
        yield "smg_mesh_limits_divided", (), float(self._limits.divided)
        row = self._limits.rate()
        yield "smg_mesh_rate_limit_share", (), self._limits.even if row is None else row.fraction
        yield "smg_mesh_rate_limit_demand", (), 0.0 if row is None else row.demand_per_s or 0.0

    def _stores(self, state: State) -> dict[str, dict[str, Any]]:
        stats = state.stats()
        stores: dict[str, dict[str, Any]] = {}
        for name, namespaces in _STORES.items():
            digest = 0
            for place, namespace in enumerate(namespaces):
                digest ^= state.digest(namespace) >> place
            entries = sum(stats.get(f"{namespace}.entries", 0) for namespace in namespaces)
            stores[name] = {"entries": entries, "digest": f"{digest:016x}"}
        stores["prefix"]["entries"] = self._index.entries
        requests, prefill_s = self._loads.of_peers()
        stores["load"] |= {"peers_in_flight": requests, "peers_prefill_secs": round(prefill_s, 3)}
        return stores


def joining_status(name: str, state: str, address: str) -> dict[str, Any]:
    """The document of `/mesh/status` before the agent has an address, or after it failed."""
    return {
        "enabled": True,
        "node": name,
        "address": address,
        "incarnation": 0,
        "state": state,
        "members": 1,
        "alive": 1,
        "version": __version__,
        "uptime_secs": 0.0,
        "converged": False,
        "state_digest": "",
        "lag_secs": {"p50": 0.0, "max": 0.0},
        "stores": {},
    }


def shown_address(host: str, port: int) -> str:
    """`host:port`, with brackets around an IPv6 host."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _peer(peer: PeerStatus) -> dict[str, Any]:
    """What this node measured itself of a peer."""
    row = msgspec.to_builtins(peer, builtin_types=(bytes,))
    del row["meta"], row["features"]
    row["key_ids"] = [f"{key_id:08x}" for key_id in peer.key_ids]
    return dict(row)


def _member(peer: PeerStatus, lag_s: float | None) -> dict[str, Any]:
    parameters = words.read_parameters(peer.meta)
    return {
        "name": peer.name,
        "address": shown_address(peer.host, peer.port),
        "state": peer.state,
        "incarnation": peer.incarnation,
        "self": False,
        "rtt_ms": None if peer.rtt_s is None else round(peer.rtt_s * 1000, 3),
        "lag_secs": lag_s,
        "last_seen_secs": round(max(0.0, peer.last_seen_s), 3),
        "version": "" if parameters is None else parameters.release,
        "digest": peer.digest,
    }
