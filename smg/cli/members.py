"""What one of several processes on a port is started with: its part of the limits, its place in the mesh, its own files.

Owns the division. Limits of the gateway hold for all processes together: slots and queue are cut into shares, and limits of rate
stay whole, because the mesh of the processes divides them by demand. The mesh is the one that was asked for, with a name and a
port per process, or one of their own on the loopback. Pure: which ports are free, and who starts whom, is the supervisor's matter.
"""

from __future__ import annotations

from pathlib import PurePath

import msgspec

from smg.settings import Mesh, Settings

LOOPBACK = "127.0.0.1"


class Member(msgspec.Struct, frozen=True, kw_only=True):
    """One process among `count`, the same in all its lives."""

    place: int
    """From 0 to count - 1."""
    count: int
    mesh_ports: tuple[int, ...]
    """Of all processes, by place."""
    secret: str | None = None
    """Of their own mesh; None with `--ha-mesh`, which has its own."""


class Host(msgspec.Struct, frozen=True, kw_only=True):
    """What the processes find out where they run."""

    name: str
    """Of the whole node; a process is `<name>-<place>`."""
    address: str
    """Where the processes find each other with `--ha-mesh`: an address that other hosts can dial too."""
    cores: int


def member_settings(settings: Settings, member: Member, host: Host) -> Settings:
    """The settings of one process, out of those that were given for all."""
    limits = settings.limits
    replace = msgspec.structs.replace
    in_flight_max = limits.in_flight_max(host.cores)
    return replace(
        settings,
        mesh=_mesh(settings.mesh, member, host),
        limits=replace(
            limits,
            max_concurrent_requests=0 if in_flight_max is None else share(in_flight_max, member),
            queue_size=-(-limits.queue_size // member.count),
        ),
        telemetry=replace(settings.telemetry, log_dir=_folder(settings.telemetry.log_dir, member)),
        routing=replace(settings.routing, record_trace=_file(settings.routing.record_trace, member)),
    )


def share(total: int, member: Member) -> int:
    """The part of a whole number; all parts together are the whole, and no two differ by more than 1."""
    return total // member.count + (member.place < total % member.count)


def _mesh(mesh: Mesh, member: Member, host: Host) -> Mesh:
    name = f"{host.name}-{member.place}"
    address = host.address if mesh.ha_mesh else LOOPBACK
    own_port = member.mesh_ports[member.place]
    siblings = tuple(f"{_bracketed(address)}:{port}" for port in member.mesh_ports if port != own_port)
    if not mesh.ha_mesh:
        return msgspec.structs.replace(
            mesh,
            ha_mesh=True,
            seeds=siblings,
            mesh_port=own_port,
            mesh_host=LOOPBACK,
            mesh_advertise=None,
            node_name=name,
            mesh_secret=member.secret,
            mesh_keys_file=None,
            mesh_tls_ca_cert=None,
            mesh_tls_cert=None,
            mesh_tls_key=None,
            mesh_private_workers=False,
        )
    # A seed without a port means the port of the node, not the one of this process.
    given = tuple(_with_port(seed, mesh.mesh_port) for seed in mesh.seed_addresses())
    return msgspec.structs.replace(
        mesh,
        seeds=(*given, *siblings),
        mesh_port=own_port,
        mesh_advertise=_advertised(mesh.mesh_advertise, member),
        node_name=name,
    )


def _advertised(text: str | None, member: Member) -> str | None:
    """Where others reach this process: a port that was given counts upwards as the mesh port does."""
    if text is None or not _has_port(text):
        return text
    host, _, port = text.rpartition(":")
    return f"{host}:{int(port) + member.place}"


def _with_port(seed: str, port: int) -> str:
    return seed if _has_port(seed) else f"{_bracketed(seed)}:{port}"


def _has_port(text: str) -> bool:
    """`host:port` and `[::1]:port`, but not `host`, `[::1]` or `::1`."""
    return ":" in text and not text.endswith("]") and (text.startswith("[") or text.count(":") == 1)


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host and not host.startswith("[") else host


def _folder(path: str | None, member: Member) -> str | None:
    """A folder of its own: files that are renamed each day have one writer."""
    return None if path is None else str(PurePath(path) / f"process-{member.place}")


def _file(path: str | None, member: Member) -> str | None:
    """`trace.jsonl` as `trace-0.jsonl`."""
    if path is None:
        return None
    whole = PurePath(path)
    return str(whole.with_name(f"{whole.stem}-{member.place}{whole.suffix}"))
