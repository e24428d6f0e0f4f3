"""smg: a mesh of LLM gateway nodes. This file holds the version and nothing else, so that asking for it costs nothing."""

from __future__ import annotations

__version__ = "0.1.0"
