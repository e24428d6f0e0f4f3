"""SIGHUP on a real process: what is in files is loaded again, all of it or nothing."""

from __future__ import annotations

import json
import signal
from pathlib import Path

from tests.e2e.process import running_process
from tests.e2e.test_auth import bearer


def roster(*urls: str) -> str:
    return json.dumps({"version": 1, "workers": [{"url": url} for url in urls]})


async def test_sighup_loads_keys_and_discovery_and_refuses_all_when_one_is_wrong(tmp_path: Path):
    key, found = tmp_path / "key", tmp_path / "workers.json"
    key.write_text("first-key")
    found.write_text(roster())
    flags = (
        "--api-key",
        f"@{key}",
        "--discovery-file",
        str(found),
        "--discovery-check-interval-secs",
        "3600",
    )
    async with running_process(*flags) as process:

        async def status(given: str) -> int:
            return (await process.ask("/workers", None, bearer(given))).status

        assert await status("first-key") == 200

        # What is wrong is refused with all the rest.
        found.write_text('{"version":1,"workers":"none"}')
        process.process.send_signal(signal.SIGHUP)
        await process.says(b'smg.reload not reloaded, what was loaded before stands part="discovery file"')
        assert (await process.ask("/workers", None, bearer("first-key"))).document["total"] == 0

        found.write_text(roster("http://127.0.0.1:9"))
        key.write_text("second-key")
        process.process.send_signal(signal.SIGHUP)
        await process.says(b"listed worker is added worker=http://127.0.0.1:9")
        await process.says(b'change="auth:shared: a key was added"')
        assert await status("first-key") == 401 and await status("second-key") == 200
        assert (await process.ask("/workers", None, bearer("second-key"))).document["total"] == 1

        process.process.send_signal(signal.SIGTERM)
        assert await process.ends() == 0
        assert b"first-key" not in process.stderr and b"second-key" not in process.stderr
