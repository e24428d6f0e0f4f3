"""What holds for every test: a clean environment, a repeatable hypothesis, and services that fail when they are missing.

Owns nothing that a test would want to hold; fixtures live beside the tests that use them. It must never turn a missing
service into a skipped test.
"""

from __future__ import annotations

import os
import shutil

import hypothesis
import pytest

for name in [name for name in os.environ if name.startswith("SMG_") and not name.startswith("SMG_TEST_")]:
    del os.environ[name]
    """Settings in the developer's shell are not the defaults that tests speak of."""
os.environ["NO_PROXY"] = os.environ["no_proxy"] = "127.0.0.1,localhost,::1"
"""Clients from outside, such as the SDKs, would send even loopback requests to the proxy of the environment."""

# Shared machines are slow by moments, so no example has a deadline; a failure prints the line that repeats it.
hypothesis.settings.register_profile("house", deadline=None, print_blob=True)
hypothesis.settings.register_profile("ci", parent=hypothesis.settings.get_profile("house"), derandomize=True)
hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "house")


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("netns") is None:
        return
    if os.geteuid() != 0 or not (shutil.which("ip") and shutil.which("iptables")):
        pytest.fail("needs root, ip and iptables; leave such tests out with -m 'not netns'", pytrace=False)
