"""The shelf of sources of workers: one file per source, one line in `SOURCES`."""

from __future__ import annotations

from smg.discovery.file import File
from smg.discovery.source import Source
from smg.discovery.static import Static
from smg.settings import Settings

SOURCES: dict[str, type[Source]] = {
    "flags": Static,
    "file": File,
}
"""Every source by its name; `sources_of` makes those that the settings ask for."""


def sources_of(settings: Settings) -> list[Source]:
    """The sources that the settings ask for, in the order in which their workers are registered."""
    sources: list[Source] = [Static(settings)]
    if settings.discovery.discovery_file is not None:
        sources.append(
            File(
                settings.discovery.discovery_file,
                settings.discovery.discovery_check_interval_secs,
                settings.workers.worker_api_key,
            )
        )
    return sources
