"""The template of `--kv-events`: where an engine publishes its KV events, in terms of the worker's own address.

Owns the small language of the template, checked when the process starts and filled in for every worker:
`tcp://{host}:5557` or `tcp://{host}:{port+1000}`, and after a comma where a replay is asked for,
`tcp://{host}:5557,tcp://{host}:5558`. Data-parallel ranks publish at the port of rank 0 plus their number, as engines
do; a template that says `{rank}` itself is left alone. Nothing is connected here.
"""

from __future__ import annotations

import re

_PLACE = re.compile(r"\{([^{}]*)\}")
_TCP = re.compile(r"tcp://(\[[0-9A-Fa-f:.%a-zA-Z]+\]|[^:/\[\]\s]+):([0-9]{1,5})")


def event_endpoints(text: str) -> str:
    """A template that gives one or two endpoints for any worker. Raises ValueError with the reason."""
    endpoints_of(text, "10.0.0.1", 8000, 0)
    return text.strip()


def endpoints_of(template: str, host: str, port: int, rank: int | None) -> tuple[str, str | None]:
    """The publisher's endpoint and that of its replay (None: there is none) for a worker. Raises ValueError."""
    parts = [part.strip() for part in template.split(",")]
    if len(parts) > 2 or not all(parts):
        raise ValueError("must be one endpoint, or two with a comma between (events, replay)")
    found = [_filled(part, host, port, rank) for part in parts]
    return found[0], found[1] if len(found) > 1 else None


def _filled(part: str, host: str, port: int, rank: int | None) -> str:
    names = {"port": port, "rank": rank or 0}
    shown = f"[{host}]" if ":" in host else host

    def fill(place: re.Match[str]) -> str:
        words = [word.strip() for word in place.group(1).split("+")]
        if words == ["host"]:
            return shown
        if not all(word in names or (word.isascii() and word.isdigit()) for word in words):
            raise ValueError(
                f"{place.group(0)} is not known: {{host}}, {{port}}, {{rank}} and sums like {{port+1000}}"
            )
        return str(sum(names[word] if word in names else int(word) for word in words))

    has_own_rank = any("rank" in place for place in _PLACE.findall(part))
    endpoint = _PLACE.sub(fill, part)
    if endpoint.startswith("ipc://") and len(endpoint) > len("ipc://"):
        return endpoint
    told = _TCP.fullmatch(endpoint)
    if told is None:
        raise ValueError("must be tcp://HOST:PORT or ipc://PATH")
    number = int(told.group(2)) + (0 if has_own_rank else rank or 0)
    if not 1 <= number <= 65535:
        raise ValueError(f"gives port {number}, which is none")
    return f"tcp://{told.group(1)}:{number}"
