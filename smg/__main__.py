"""`python -m smg`: the same command as `smg` (CLI-1). It owns nothing and must never do more than call it."""

from __future__ import annotations

import sys

from smg.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
