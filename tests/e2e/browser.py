"""A headless Chromium, driven over its debugging pipe: the page as a person's browser sees it.

Owns the browser's process and the few words of the DevTools protocol that tests need: open a page, ask it something, wait until
something is so, take a picture, and know everything the browser complained of. Any Chromium will do; a browser that is missing
is a failure, not a reason to skip.
"""

from __future__ import annotations

import base64
import fcntl
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import trio

NAMES = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
PATIENCE_S = 20.0
"""A browser starts in half a second where nobody else wants the cores."""
FLAGS = (
    "--headless",
    "--remote-debugging-pipe",
    "--no-sandbox",  # it shows nothing but our own page, and root may not have one
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--no-default-browser-check",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-extensions",
    "--no-proxy-server",
    "--hide-scrollbars",
    "--force-color-profile=srgb",
)
# The pipe must be files 3 and 4 of the browser.
TRAMPOLINE = (
    "import os, sys; os.dup2(int(sys.argv[1]), 3); os.dup2(int(sys.argv[2]), 4); "
    "os.execvp(sys.argv[3], sys.argv[3:])"
)


def browser_path() -> str:
    """Where a Chromium is: $SMG_TEST_BROWSER, or the first of the usual names."""
    given = os.environ.get("SMG_TEST_BROWSER")
    for name in [given] if given else NAMES:
        found = shutil.which(name)
        if found is not None:
            return found
    raise AssertionError(
        f"no browser: install one of {', '.join(NAMES)} (Debian: apt-get install chromium-headless-shell), "
        "or name one with SMG_TEST_BROWSER"
    )


class Browser:
    """A running browser; see `running_browser`."""

    def __init__(self, commands: trio.lowlevel.FdStream, answers: trio.lowlevel.FdStream) -> None:
        self._commands = commands
        self._answers = answers
        self._last_id = 0
        self._waiting: dict[int, trio.MemorySendChannel[Any]] = {}
        self._pages: dict[str, Page] = {}

    async def read(self) -> None:
        """Takes what the browser says, until it says no more."""
        rest = b""
        while data := await self._answers.receive_some(1 << 20):
            *messages, rest = (rest + data).split(b"\0")
            for message in messages:
                self._told(json.loads(message))

    def _told(self, message: dict[str, Any]) -> None:
        waiting = self._waiting.pop(message.get("id", 0), None)
        if waiting is not None:
            waiting.send_nowait(message)
        elif message.get("sessionId") in self._pages:
            self._pages[message["sessionId"]].told(message["method"], message["params"])

    async def call(self, method: str, session: str | None = None, **params: Any) -> Any:
        """One command and its result."""
        self._last_id += 1
        message: dict[str, Any] = {"id": self._last_id, "method": method, "params": params}
        if session is not None:
            message["sessionId"] = session
        send, receive = trio.open_memory_channel[Any](1)
        self._waiting[self._last_id] = send
        await self._commands.send_all(json.dumps(message).encode() + b"\0")
        with trio.fail_after(PATIENCE_S):
            answer = await receive.receive()
        assert "error" not in answer, (method, answer["error"])
        return answer["result"]

    async def page(
        self, url: str, *, width: int = 1280, height: int = 900, scale: float = 1, dark: bool = False
    ) -> Page:
        """A new page that has loaded."""
        target = await self.call("Target.createTarget", url="about:blank")
        attached = await self.call("Target.attachToTarget", targetId=target["targetId"], flatten=True)
        page = self._pages[attached["sessionId"]] = Page(self, attached["sessionId"], target["targetId"])
        for domain in ("Page", "Runtime", "Log", "Network"):
            await page.call(f"{domain}.enable")
        await page.look(width, height, scale=scale, dark=dark)
        await page.go(url)
        return page


class Page:
    """One page. `complaints` is everything that the browser found wrong, `requests` every address it asked for."""

    def __init__(self, browser: Browser, session: str, target: str) -> None:
        self._browser = browser
        self._session = session
        self._target = target
        self._loaded = trio.Event()
        self.complaints: list[str] = []
        self.requests: list[str] = []

    def told(self, method: str, params: dict[str, Any]) -> None:
        if method == "Page.loadEventFired":
            self._loaded.set()
        elif method == "Runtime.exceptionThrown":
            self.complaints.append(json.dumps(params["exceptionDetails"])[:500])
        elif method == "Log.entryAdded" and params["entry"]["level"] in ("error", "warning"):
            self.complaints.append(params["entry"]["text"])
        elif method == "Runtime.consoleAPICalled":
            self.complaints.append(json.dumps(params["args"])[:500])
        elif method == "Network.requestWillBeSent":
            self.requests.append(params["request"]["url"])

    async def call(self, method: str, **params: Any) -> Any:
        return await self._browser.call(method, self._session, **params)

    async def go(self, url: str) -> None:
        """Loads an address."""
        self._loaded = trio.Event()
        await self.call("Page.navigate", url=url)
        with trio.fail_after(PATIENCE_S):
            await self._loaded.wait()

    async def look(self, width: int, height: int, *, scale: float = 1, dark: bool = False) -> None:
        """The size of the window, and what its owner prefers."""
        await self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=scale,
            mobile=width < 600,
        )
        features = [
            {"name": "prefers-color-scheme", "value": "dark" if dark else "light"},
            {"name": "prefers-reduced-motion", "value": "reduce"},
        ]
        await self.call("Emulation.setEmulatedMedia", features=features)

    async def ask(self, expression: str) -> Any:
        """The value of a JavaScript expression."""
        answer = await self.call(
            "Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True
        )
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    async def until(self, expression: str, within_s: float = PATIENCE_S) -> Any:
        """Waits until an expression is true; its value."""
        value: Any = None
        with trio.move_on_after(within_s):
            while not (value := await self.ask(expression)):
                await trio.sleep(0.02)
        assert value, f"never true: {expression}; {self.complaints}"
        return value

    async def texts(self, selector: str) -> list[str]:
        """The text of every element of a selector, as it is read."""
        found = await self.ask(f"[...document.querySelectorAll({selector!r})].map((node) => node.innerText)")
        assert isinstance(found, list)
        return found

    async def picture(self, *, whole: bool = False) -> bytes:
        """A PNG of the window, or of the whole page."""
        shot = await self.call("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
        return base64.b64decode(shot["data"])

    async def close(self) -> None:
        await self._browser.call("Target.closeTarget", targetId=self._target)


@asynccontextmanager
async def running_browser(flags: Sequence[str] = ()) -> AsyncIterator[Browser]:
    """A browser, gone with the block and all it has written with it."""
    path = browser_path()
    command_read, command_write = _high_pipe()
    answer_read, answer_write = _high_pipe()
    with tempfile.TemporaryDirectory(prefix="smg-browser-", ignore_cleanup_errors=True) as profile:
        command = (sys.executable, "-c", TRAMPOLINE, str(command_read), str(answer_write), path, *FLAGS)
        async with (
            trio.lowlevel.FdStream(command_write) as commands,
            trio.lowlevel.FdStream(answer_read) as answers,
            trio.open_nursery() as nursery,
        ):
            process = await trio.lowlevel.open_process(
                [*command, f"--user-data-dir={profile}", *flags],
                pass_fds=(command_read, answer_write),
                stderr=subprocess.DEVNULL,
            )
            os.close(command_read)
            os.close(answer_write)
            browser = Browser(commands, answers)
            nursery.start_soon(browser.read)
            try:
                yield browser
            finally:
                process.kill()
                with trio.CancelScope(shield=True):
                    await process.wait()
                nursery.cancel_scope.cancel()


def _high_pipe() -> tuple[int, int]:
    """A pipe whose ends are not among the first files of a process, where the browser will want two others."""
    ends = os.pipe()
    read, write = (fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 20) for end in ends)
    for end in ends:
        os.close(end)
    return read, write
