"""The settings of the mesh: whether this node has peers, how it finds them, and how they know each other.

Owns this one group for `smg.settings`, which is the room's face: read it there. Like it, this file only declares, and cuts
the texts of addresses into their parts; it must never resolve a name or read a file.
"""

from __future__ import annotations

import re
from typing import Annotated

from smg.settings_flag import Flag, Group, listen_host

_HOST = re.compile(r"[0-9A-Za-z._-]+|\[[0-9A-Fa-f:.]+(%[0-9A-Za-z._-]+)?\]")
_PORT = re.compile(r"[0-9]{1,5}")
_NODE_NAME = re.compile(r"[!-9;-~]{1,128}")
_UNSPECIFIED = frozenset({"0.0.0.0", "[::]", "::"})


def seed_list(text: str) -> str:
    """`host[:port]`, or several with commas between them (FLG-1). Raises ValueError with the reason."""
    seeds = [part.strip() for part in text.split(",") if part.strip()]
    if not seeds:
        raise ValueError("may not be empty")
    for seed in seeds:
        _check_address(seed)
    return ",".join(seeds)


def advertised(text: str) -> str:
    """`host` or `host:port` that others can dial (FLG-3). Raises ValueError with the reason."""
    _check_address(text)
    if text in _UNSPECIFIED or text.rpartition(":")[0] in _UNSPECIFIED:
        raise ValueError("is no address that others could dial")
    return text


def node_name(text: str) -> str:
    """The name of a node: visible, not empty, without a colon (FLG-3). Raises ValueError with the reason."""
    if not text:
        raise ValueError("may not be empty")
    if not _NODE_NAME.fullmatch(text):
        raise ValueError("must be at most 128 visible ASCII characters without space and colon")
    return text


def _check_address(text: str) -> None:
    bare = text.count(":") > 1 and not text.startswith("[")
    host, port = (text, "") if bare or text.endswith("]") else _split(text)
    if bare:
        host = f"[{text}]"
    if not _HOST.fullmatch(host):
        raise ValueError(f"{text} is no host or host:port")
    has_port = ":" in text and not bare and not text.endswith("]")
    if has_port and not (_PORT.fullmatch(port) and 1 <= int(port) <= 65535):
        raise ValueError("the port must be between 1 and 65535")


def _split(text: str) -> tuple[str, str]:
    host, colon, port = text.rpartition(":")
    return (host, port) if colon else (text, "")


class Mesh(Group, frozen=True, kw_only=True):
    """Mesh: other nodes that serve the same workers."""

    ha_mesh: Annotated[
        bool,
        Flag(
            aliases=("enable-mesh",),
            doc="Be a member of a mesh of nodes. Alone until a seed is found or another node finds this one (FLG-2).",
        ),
    ] = False
    seeds: Annotated[
        tuple[str, ...],
        Flag(
            aliases=("mesh-peer-urls",),
            form=seed_list,
            metavar="HOST:PORT",
            doc="Nodes to join, by name or address, with commas or spaces between them. All are tried, again and again, and a "
            "seed may come up later; without a port --mesh-port is meant (FLG-1).",
        ),
    ] = ()
    mesh_port: Annotated[
        int,
        Flag(
            at_least=1,
            at_most=65535,
            doc="Port of the mesh, UDP and TCP. Both must be open between nodes; without UDP it works, a little slower.",
        ),
    ] = 30001
    mesh_host: Annotated[
        str,
        Flag(
            form=listen_host,
            doc="Address the mesh listens on. All interfaces, since peers are on other hosts.",
        ),
    ] = "0.0.0.0"
    mesh_advertise: Annotated[
        str | None,
        Flag(
            aliases=("mesh-advertise-host",),
            form=advertised,
            metavar="HOST[:PORT]",
            shown_default="the address that reaches the first seed",
            doc="Where other nodes reach this one, if that is not the address it sees itself (FLG-3).",
        ),
    ] = None
    node_name: Annotated[
        str | None,
        Flag(
            aliases=("mesh-server-name",),
            form=node_name,
            shown_default="<host name>-<mesh port>",
            doc="Name of this node in the mesh, the same after a restart, so that peers know it again (FLG-3).",
        ),
    ] = None
    mesh_tls_ca_cert: Annotated[
        str | None,
        Flag(metavar="PATH", doc="PEM file of the CA that signed the certificates of all nodes (MSH-8)."),
    ] = None
    mesh_tls_cert: Annotated[
        str | None, Flag(metavar="PATH", doc="PEM file of this node's certificate in the mesh.")
    ] = None
    mesh_tls_key: Annotated[
        str | None, Flag(metavar="PATH", doc="PEM file of the certificate's private key.")
    ] = None
    mesh_secret: Annotated[
        str | None,
        Flag(
            is_secret=True,
            metavar="SECRET",
            doc="Only nodes that know it are members, and what they say to each other is sealed (MSH-8). 32 random "
            "characters are good. None: whoever reaches the port may join.",
        ),
    ] = None
    mesh_keys_file: Annotated[
        str | None,
        Flag(
            metavar="PATH",
            doc="A file of secrets, one per line, in place of --mesh-secret: the first one seals, all open, so that a "
            "secret can be changed node by node.",
        ),
    ] = None
    mesh_label: Annotated[
        str,
        Flag(doc="Meshes of different labels never merge, even if one is given the other's seeds."),
    ] = "smg"
    mesh_private_workers: Annotated[
        bool,
        Flag(doc="Workers given to this node by flag are not told to the others (MSH-5)."),
    ] = False
    mesh_partition_limits: Annotated[
        str,
        Flag(
            choices=("divide", "local", "allow"),
            doc="What becomes of limits while nodes are lost without a word. divide: they may serve beyond a cut, so what they "
            "held stays theirs, for ten minutes. local: the nodes on each side divide the whole limit. allow: each node "
            "gives out the whole limit.",
        ),
    ] = "divide"
    owner_placement: Annotated[
        bool,
        Flag(
            off_flag="no-owner-placement",
            doc="Let one node decide for all requests of a session while much prefill is at stake: calls of one agent that "
            "start together on different nodes then share their context. A question of a few milliseconds at most.",
        ),
    ] = True

    def seed_addresses(self) -> tuple[str, ...]:
        """The seeds one by one."""
        return tuple(part for text in self.seeds for part in text.split(","))
