"""The part of `smg doctor` that looks at the mesh: keys, certificates, and whether peers and this host reach each other.

Owns a short visit: a bare member under a name of its own, on the mesh port itself so that firewalls are met, joins by the
seeds, is pinged by the peers and pings them, and leaves. It tells nothing and is asked nothing: peers see that it hashes no
prompts. It must never run where a gateway with the same port runs; then the visit is on another port and says less.
"""

from __future__ import annotations

import trio

import mesh
from mesh import Agent, AgentSettings, MeshError, PeerStatus, TlsContexts
from smg.bridge import identity
from smg.cli.doctor_workers import Finding
from smg.errors import SettingsError
from smg.settings import Mesh

LOOK_S = 0.05
QUIET_S = 0.7
"""Members that were not heard of so long after the first one come late; a round of probes fits."""


def examine_mesh(settings: Mesh, timeout_s: float) -> list[Finding]:
    """What can be seen of the mesh from here; takes at most `timeout_s` and a second for the farewell."""
    try:
        secrets, tls = identity.secrets_of(settings), identity.tls_of(settings)
    except SettingsError as wrong:
        return [Finding("FAIL", wrong.flag, f"{wrong.value}: {wrong.reason}", "name another file")]
    findings = []
    if tls is not None:
        findings.append(Finding("OK", "--mesh-tls-cert", "the three files fit together"))
    if settings.mesh_keys_file is not None:
        findings.append(Finding("OK", "--mesh-keys-file", f"{len(secrets)} secret(s), the first one seals"))
    return findings + trio.run(_visit, settings, secrets, tls, timeout_s)


async def _visit(
    settings: Mesh, secrets: tuple[bytes, ...], tls: TlsContexts | None, timeout_s: float
) -> list[Finding]:
    check = f"--mesh-port {settings.mesh_host}:{settings.mesh_port}"
    findings = []
    for port in (settings.mesh_port, 0):
        visitor = AgentSettings(
            name=f"{identity.node_name(settings)}.doctor",
            host=settings.mesh_host,
            port=port,
            advertise=(settings.mesh_advertise or "") if port else "",
            seeds=_seeds(settings),
            label=settings.mesh_label,
            secrets=secrets,
        )
        try:
            peers, errors = await _peers(visitor, tls, timeout_s)
        except mesh.SettingsError as wrong:
            if port:
                findings.append(
                    Finding("WARN", check, str(wrong), "if that is a running gateway, all is well")
                )
                continue
            findings.append(Finding("FAIL", check, str(wrong), "choose another --mesh-host"))
        else:
            if port:
                findings.append(Finding("OK", check, "can be listened on, TCP and UDP"))
            findings += _findings(settings, peers, errors)
        break
    return findings


async def _peers(
    visitor: AgentSettings, tls: TlsContexts | None, timeout_s: float
) -> tuple[list[PeerStatus], list[str]]:
    """The live peers after a round of probes, and what went wrong. Raises `mesh.SettingsError`."""
    notes: list[str] = []

    def note(event: str, fields: object) -> None:
        if event not in ("left", "udp_open"):
            notes.append(f"{event.replace('_', ' ')}: {fields}" if fields else event)

    agent = Agent(visitor, tls=tls, hooks=mesh.Hooks(log=note))
    peers: list[PeerStatus] = []
    try:
        async with trio.open_nursery() as nursery:
            await nursery.start(agent.run)
            with trio.move_on_after(timeout_s):
                while visitor.seeds and not agent.members:
                    await trio.sleep(LOOK_S)
                await trio.sleep(QUIET_S if visitor.seeds else 0)
            peers = [peer for peer in agent.status().peers if peer.state in ("alive", "suspect")]
            await agent.leave()
            nursery.cancel_scope.cancel()
    except* mesh.SettingsError as group:
        raise _first(group) from None
    except* MeshError as group:
        notes.append(str(_first(group)))
    return peers, notes


def _findings(settings: Mesh, peers: list[PeerStatus], notes: list[str]) -> list[Finding]:
    if not settings.seeds:
        return [Finding("OK", "--ha-mesh", "no seeds: a mesh of one that others may join")]
    if not peers:
        why = f" ({notes[-1]})" if notes else ""
        return [
            Finding(
                "WARN",
                "--seeds",
                f"none of {', '.join(settings.seed_addresses())} answered as a member{why}",
                "the first node of a mesh has nobody to find; else look at ports, --mesh-secret and --mesh-label",
            )
        ]
    return [_peer(peer) for peer in peers]


def _peer(peer: PeerStatus) -> Finding:
    check = f"peer {peer.name} at {peer.host}:{peer.port}"
    if peer.stream == "none":
        why = f": {peer.last_error}" if peer.last_error else ""
        return Finding("WARN", check, f"is a member, but no stream to it{why}", "open its mesh port for TCP")
    rtt = "" if peer.rtt_s is None else f", round trip {peer.rtt_s * 1000:.1f} ms"
    if peer.transport == "tcp":
        return Finding(
            "WARN", check, f"reached by TCP alone{rtt}", "open the mesh port for UDP, in both directions"
        )
    return Finding("OK", check, f"reached by TCP and UDP, and reaches us{rtt}")


def _seeds(settings: Mesh) -> tuple[str, ...]:
    """The seeds, each with its port: the visit may be on another one."""
    return tuple(
        seed if "]:" in seed or seed.count(":") == 1 else _with_port(seed, settings.mesh_port)
        for seed in settings.seed_addresses()
    )


def _with_port(host: str, port: int) -> str:
    bare = host[1:-1] if host.startswith("[") and host.endswith("]") else host
    return f"[{bare}]:{port}" if ":" in bare else f"{bare}:{port}"


def _first(group: BaseExceptionGroup[MeshError]) -> MeshError:
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    assert isinstance(error, MeshError)
    return error
