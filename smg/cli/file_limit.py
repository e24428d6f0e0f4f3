"""How many files this process may open: every client and every worker connection is one.

Owns nothing; must never fail, since a node with few files is better than none.
"""

from __future__ import annotations

import resource


def raise_file_limit() -> None:
    """Takes what the system allows; the soft limit of shells is made for other programs. Children inherit it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        except (OSError, ValueError):
            pass  # the limit stays as it is; the accept loop survives running out of files
