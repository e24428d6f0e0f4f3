"""`smg mesh keys`: change the secret of a mesh without a node or a message being lost.

Owns the three steps of a rotation on one node (add a secret behind the others, use it, remove the old one), each of which edits
the node's file of secrets and waits until the node has read it again, and refuses while other nodes are not as far. The file is
replaced whole, never half, and nobody but its owner can read it. It must never print a secret: keys go by their ids.
"""

from __future__ import annotations

import argparse
import os
import secrets
import stat
import time
from collections.abc import Callable, Iterable
from typing import Any

from smg.bridge.identity import KEYS_FILE_BYTES_MAX, key_id
from smg.cli.flags import read_secret
from smg.cli.remote import Gateway, RemoteError, add_common
from smg.errors import SettingsError
from smg.settings_flag import env_name

FILE_FLAG = "mesh-keys-file"
NEW_SECRET_BYTES = 32
KEYS_MAX = 8
"""As many as a member may hold (`mesh.keyring`)."""
LOOK_S = 0.1

Rows = list[tuple[str, str]]
"""(key id, secret) of each line with a secret, in order."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `smg mesh keys`."""
    parser.set_defaults(step="list")
    steps = parser.add_subparsers(dest="step", metavar="STEP", title="what to do (default: list)")
    listing = steps.add_parser("list", help="the keys of the file, and which nodes hold them")
    add = steps.add_parser(
        "add",
        help="step 1: accept a new secret too",
        description="Add a secret behind the others, a new one or the given one. Do it on every node with the same secret: "
        "make it on one, and copy its file to the others, or give --secret @FILE.",
    )
    add.add_argument("--secret", metavar="SECRET", help="the secret, or @/path/to/file (default: a new one)")
    use = steps.add_parser(
        "use",
        help="step 2: seal with it",
        description="Seal with this key from now on; every live node must hold it.",
    )
    remove = steps.add_parser(
        "remove",
        help="step 3: forget the old one",
        description="Do not accept this key any more; no live node may seal with it.",
    )
    for step in (use, remove):
        step.add_argument("key", metavar="KEY", help="the id of a key, 8 digits, as `list` shows it")
        step.add_argument("--force", action="store_true", help="whatever the other nodes hold")
    for step in (parser, listing, add, use, remove):
        is_default = step is parser
        add_common(step, is_default=False)
        step.add_argument(
            "--file",
            metavar="PATH",
            default=os.environ.get(env_name(FILE_FLAG)) if is_default else argparse.SUPPRESS,
            help=f"this node's --{FILE_FLAG} (default: {env_name(FILE_FLAG)})",
        )


def change(gateway: Gateway, arguments: argparse.Namespace) -> dict[str, Any]:
    """Do one step. Raises `RemoteError` or `SettingsError` with the reason, and nothing was changed."""
    path = arguments.file
    if not path:
        raise SettingsError("--file", "", f"give the node's --{FILE_FLAG}", is_combination=True)
    steps: dict[str, Callable[[Gateway, argparse.Namespace, list[str]], dict[str, Any]]] = {
        "list": _list,
        "add": _add,
        "use": _use,
        "remove": _remove,
    }
    return steps[arguments.step](gateway, arguments, read_lines(path))


def sentences(document: dict[str, Any]) -> Iterable[str]:
    """What was done, or is, for a person."""
    for row in document["keys"]:
        holders = ", ".join(row["nodes"]) or "nobody"
        told = f"{row['key']}  {'seals' if row['seals'] else 'opens'}  held by {holders}"
        yield told if not row["sealing"] else f"{told}; sealing at {', '.join(row['sealing'])}"
    if "next" in document:
        yield document["next"]


def _list(gateway: Gateway, arguments: argparse.Namespace, lines: list[str]) -> dict[str, Any]:
    return _document(_keys(lines), _holders(gateway))


def _add(gateway: Gateway, arguments: argparse.Namespace, lines: list[str]) -> dict[str, Any]:
    told = arguments.secret
    secret = secrets.token_urlsafe(NEW_SECRET_BYTES) if told is None else read_secret(told, "--secret")
    if not secret or secret != secret.strip() or secret.startswith("#") or "\n" in secret:
        raise SettingsError("--secret", "(hidden)", "must be one line without spaces around it")
    known = _keys(lines)
    new = key_id(secret)
    if new not in (key for key, _ in known):
        if len(known) >= KEYS_MAX:
            raise RemoteError(f"the file has {KEYS_MAX} keys already; remove one first")
        write_lines(arguments.file, [*lines, secret])
    known = _keys(read_lines(arguments.file))
    return _done(gateway, arguments, known, f"on all nodes, then: smg mesh keys use {new}")


def _use(gateway: Gateway, arguments: argparse.Namespace, lines: list[str]) -> dict[str, Any]:
    wanted, known = _wanted(arguments, lines)
    lacking = [name for name, held in _holders(gateway).items() if wanted not in held]
    if lacking and not arguments.force:
        raise RemoteError(
            f"{', '.join(lacking)} would not understand key {wanted}; first there: smg mesh keys add"
        )
    if known[0][0] != wanted:
        moved = [line for line in lines if _id_of(line) == wanted]
        others = [line for line in lines if _id_of(line) != wanted]
        place = next(number for number, line in enumerate(others) if _id_of(line))
        write_lines(arguments.file, [*others[:place], *moved[:1], *others[place:]])
    known = _keys(read_lines(arguments.file))
    return _done(gateway, arguments, known, "on all nodes, then: smg mesh keys remove with the old key")


def _remove(gateway: Gateway, arguments: argparse.Namespace, lines: list[str]) -> dict[str, Any]:
    wanted, known = _wanted(arguments, lines)
    if known[0][0] == wanted:
        raise RemoteError(f"this node seals with key {wanted}; first: smg mesh keys use with another one")
    sealing = [name for name, held in _holders(gateway).items() if held[:1] == [wanted]]
    if sealing and not arguments.force:
        raise RemoteError(
            f"{', '.join(sealing)} still seal with key {wanted}; first there: smg mesh keys use"
        )
    write_lines(arguments.file, [line for line in lines if _id_of(line) != wanted])
    return _done(gateway, arguments, _keys(read_lines(arguments.file)), "on all nodes; then it is done")


def _wanted(arguments: argparse.Namespace, lines: list[str]) -> tuple[str, Rows]:
    wanted, known = arguments.key.lower(), _keys(lines)
    if wanted not in (key for key, _ in known):
        raise RemoteError(f"the file has no key {wanted}; it has {', '.join(key for key, _ in known)}")
    return wanted, known


def _done(gateway: Gateway, arguments: argparse.Namespace, known: Rows, then: str) -> dict[str, Any]:
    """Wait until the node has read its file again."""
    wanted = [key for key, _ in known]
    deadline = time.monotonic() + arguments.timeout_secs
    while True:
        holders = _holders(gateway)
        own = next(iter(holders.values()))
        if own == wanted:
            return {**_document(known, holders), "next": then}
        if time.monotonic() > deadline:
            raise RemoteError(
                f"the file was changed, but {gateway.url} still holds {', '.join(own) or 'no key'} after "
                f"{arguments.timeout_secs:g} s: is it the node's --{FILE_FLAG}?"
            )
        time.sleep(LOOK_S)


def _holders(gateway: Gateway) -> dict[str, list[str]]:
    """The keys of each live node, the one that seals first; this node comes first."""
    status = gateway.ask("GET", "/mesh/status")
    if not status.get("enabled"):
        raise RemoteError(f"{gateway.url} is in no mesh; start it with --ha-mesh")
    holders = {str(status["node"]): list(status.get("key_ids", []))}
    for peer in status.get("peers", []):
        if peer["state"] in ("alive", "suspect"):
            holders[str(peer["name"])] = list(peer["key_ids"])
    return holders


def _document(known: Rows, holders: dict[str, list[str]]) -> dict[str, Any]:
    rows = [
        {
            "key": key,
            "seals": place == 0,
            "nodes": [name for name, held in holders.items() if key in held],
            "sealing": [name for name, held in holders.items() if held[:1] == [key]],
        }
        for place, (key, _) in enumerate(known)
    ]
    return {"keys": rows, "live": len(holders)}


def _id_of(line: str) -> str:
    """The id of the secret in a line, empty for comments."""
    text = line.strip()
    return key_id(text) if text and not text.startswith("#") else ""


def _keys(lines: list[str]) -> Rows:
    found: dict[str, str] = {}
    for line in lines:
        key = _id_of(line)
        if key:
            found.setdefault(key, line.strip())
    return list(found.items())


def read_lines(path: str) -> list[str]:
    """The lines of the file, comments too. Raises `SettingsError`."""
    try:
        with open(path, "rb") as file:
            content = file.read(KEYS_FILE_BYTES_MAX + 1)
    except OSError as wrong:
        raise _refused(path, wrong.strerror or "cannot be read") from None
    if len(content) > KEYS_FILE_BYTES_MAX:
        raise _refused(path, f"is longer than {KEYS_FILE_BYTES_MAX} bytes")
    try:
        lines = content.decode("utf-8").splitlines()
    except UnicodeDecodeError:
        raise _refused(path, "is not text") from None
    if not _keys(lines):
        raise _refused(path, "has no secret in it")
    return lines


def write_lines(path: str, lines: list[str]) -> None:
    """Replace the file: a reader finds the old or the new one. Its owner stays, and only the owner can read it.

    Raises `SettingsError`, and nothing has changed.
    """
    new = f"{path}.new"
    try:
        before = os.lstat(path)
        if stat.S_ISLNK(before.st_mode):
            raise _refused(path, "is a link, as mounted secrets are: change it where it comes from")
        descriptor = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
    except FileExistsError:
        raise _refused(path, f"is being changed by somebody else, or was left half changed: {new}") from None
    except OSError as wrong:
        raise _refused(path, wrong.strerror or "cannot be written") from None
    try:
        with os.fdopen(descriptor, "wb") as file:
            if (before.st_uid, before.st_gid) != (os.geteuid(), os.getegid()):
                os.fchown(descriptor, before.st_uid, before.st_gid)
            file.write("".join(f"{line}\n" for line in lines).encode())
            file.flush()
            os.fsync(descriptor)
        os.replace(new, path)
    except OSError as wrong:
        os.unlink(new)
        raise _refused(path, wrong.strerror or "cannot be written") from None


def _refused(path: str, reason: str) -> SettingsError:
    return SettingsError("--file", repr(path), reason, is_combination=True)
