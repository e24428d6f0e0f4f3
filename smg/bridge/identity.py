"""Who this node is in the mesh, out of its settings: name, address, keys, and what must be equal on all nodes.

Owns the reading of secrets and certificates and the mapping of the mesh's errors to the gateway's (FLG-3, CLI-6, MSH-8). It
must never show a secret, and nothing here depends on chance: nodes of one mesh must derive the same seed.
"""

from __future__ import annotations

import hashlib
import socket

from mesh import AgentSettings, Key, TlsContexts, TlsFiles
from mesh import SettingsError as MeshSettingsError
from smg import __version__
from smg.bridge import words
from smg.bridge.words import VERSION, Parameters
from smg.errors import SettingsError
from smg.fleet.block_hashes import BlockSettings
from smg.settings import Mesh
from smg.settings_rules import MESH_SECRET_CHARS_MIN

KEYS_FILE_BYTES_MAX = 65_536
_STRETCH_SALT = b"smg mesh secret 1"


def node_name(mesh: Mesh) -> str:
    """The node's name: as told, else host name and mesh port, so that a restart is known again (FLG-3)."""
    host = socket.gethostname().replace(":", "-") or "node"
    return mesh.node_name or f"{host}-{mesh.mesh_port}"


def secrets_of(mesh: Mesh) -> tuple[bytes, ...]:
    """The keyring, the key that seals first; empty for an open mesh. Raises `SettingsError` for a file that is no use."""
    if mesh.mesh_secret is not None:
        return (_stretched(mesh.mesh_secret),)
    path = mesh.mesh_keys_file
    if path is None:
        return ()
    try:
        with open(path, "rb") as file:
            content = file.read(KEYS_FILE_BYTES_MAX + 1)
    except OSError as wrong:
        raise _refused("--mesh-keys-file", path, wrong.strerror or "cannot be read") from None
    if len(content) > KEYS_FILE_BYTES_MAX:
        raise _refused("--mesh-keys-file", path, f"is longer than {KEYS_FILE_BYTES_MAX} bytes")
    try:
        lines = [line.strip() for line in content.decode("utf-8").splitlines()]
    except UnicodeDecodeError:
        raise _refused("--mesh-keys-file", path, "is not text") from None
    secrets = tuple(_stretched(line) for line in lines if line and not line.startswith("#"))
    if not secrets:
        raise _refused("--mesh-keys-file", path, "has no secret in it")
    return secrets


def key_id(secret: str) -> str:
    """The id that the mesh gives to a secret, as operators see it; it gives nothing away."""
    return f"{Key(_stretched(secret)).id:08x}"


def tls_of(mesh: Mesh) -> TlsContexts | None:
    """Contexts of mutual TLS; None without. Raises `SettingsError` for files that do not fit."""
    if mesh.mesh_tls_ca_cert is None or mesh.mesh_tls_cert is None or mesh.mesh_tls_key is None:
        return None
    try:
        return TlsContexts(
            TlsFiles(ca=mesh.mesh_tls_ca_cert, certificate=mesh.mesh_tls_cert, key=mesh.mesh_tls_key)
        )
    except MeshSettingsError as wrong:
        raise _refused("--mesh-tls-cert", mesh.mesh_tls_cert, str(wrong)) from None


def cluster_seed(mesh: Mesh) -> int:
    """The seed of all block hashes of the cluster: of label and secret, equal on all nodes and unknown to strangers.

    A file of secrets changes while it is rotated, so only the label counts there.
    """
    secret = b"" if mesh.mesh_secret is None else _stretched(mesh.mesh_secret)
    digest = hashlib.blake2b(mesh.mesh_label.encode(), digest_size=8, key=secret[:64], person=b"smg blocks")
    return int.from_bytes(digest.digest(), "big")


def parameters_of(blocks: BlockSettings) -> Parameters:
    """What peers compare before they take our hashes in."""
    return Parameters(
        VERSION, blocks.block_bytes, blocks.block_tokens, words.seed_check(blocks.cluster_seed), __version__
    )


def agent_settings(mesh: Mesh, parameters: Parameters) -> AgentSettings:
    """The mesh's own settings. Raises `SettingsError`."""
    return AgentSettings(
        name=node_name(mesh),
        host=mesh.mesh_host,
        port=mesh.mesh_port,
        advertise=mesh.mesh_advertise or "",
        seeds=mesh.seed_addresses(),
        label=mesh.mesh_label,
        secrets=secrets_of(mesh),
        meta=words.encode(parameters),
    )


def refused(wrong: MeshSettingsError, mesh: Mesh) -> SettingsError:
    """The mesh could not be made of these settings, or its port cannot be had (CLI-9)."""
    return _refused("--mesh-port", f"{mesh.mesh_host}:{mesh.mesh_port}", str(wrong))


def _stretched(secret: str) -> bytes:
    """A secret as a key: long ones as they are, short ones made longer at a price for whoever guesses."""
    data = secret.encode()
    if len(data) >= MESH_SECRET_CHARS_MIN:
        return data
    return hashlib.scrypt(data, salt=_STRETCH_SALT, n=1 << 14, r=8, p=1, dklen=32)


def _refused(flag: str, value: str, reason: str) -> SettingsError:
    return SettingsError(flag, repr(value), reason, is_combination=True)
