"""One of the processes of `--processes`: reads the settings again, takes its part of them, and serves as any node.

`python -m smg.cli.child ARGUMENTS` is how the supervisor starts it, with the arguments it was started with itself and a socket
in place of stdin; a new life of a process therefore runs the code that is installed now. It owns nothing and must never be
started by hand.
"""

from __future__ import annotations

import os
import sys

import trio

from mesh.transport import NetTransport
from smg.bridge.identity import node_name
from smg.cli.flags import Given, parse
from smg.cli.members import LOOPBACK, Host, member_settings
from smg.cli.place import place_under_supervisor
from smg.cli.serve import serve
from smg.errors import SettingsError
from smg.settings import Mesh


def main(arguments: list[str]) -> int:
    """Run one process until it is told to stop; its exit code, as `smg.cli.main` has them."""
    try:
        place, member = place_under_supervisor()
    except (OSError, ValueError) as wrong:
        print(f"smg: error: a process of --processes is started by smg alone: {wrong}", file=sys.stderr)
        return 2
    try:
        given = Given(tuple(arguments), dict(os.environ))
        told = parse(arguments, os.environ)
        settings = member_settings(told, member, _host(told.mesh))
        place.process = settings.mesh.node_name or ""
        return trio.run(serve, settings, given, place)
    except SettingsError as wrong:
        print(f"smg: error: {wrong}", file=sys.stderr)
        return 1 if wrong.is_combination else 2
    except KeyboardInterrupt:
        return 130


def _host(mesh: Mesh) -> Host:
    """What this process sees of its host.

    On all interfaces the others are met where other hosts would meet them, since what reaches the first seed is advertised.
    """
    address = mesh.mesh_host
    if address in ("0.0.0.0", "::"):
        address = NetTransport(address, 0).source_towards(None) or LOOPBACK
    return Host(name=node_name(mesh), address=address, cores=os.cpu_count() or 1)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
