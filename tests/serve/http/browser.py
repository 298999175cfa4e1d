"""A headless Chromium, driven by its DevTools protocol over two pipes: no driver and no library is needed."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
"""The program, or None where none is installed."""

START = """
import fcntl, os, sys
kept = [fcntl.fcntl(int(descriptor), fcntl.F_DUPFD, 10) for descriptor in sys.argv[1:3]]
os.dup2(kept[0], 3)
os.dup2(kept[1], 4)
os.execv(sys.argv[3], sys.argv[3:])
"""
"""Becomes the browser, with the pipes as its descriptors 3 and 4, where the protocol expects them."""


class Page:
    """One page of a browser.

    Args:
        commands: File descriptor that the browser reads.
        replies: File descriptor that it writes.
    """

    def __init__(self, commands: int, replies: int):
        self._commands, self._replies = commands, replies
        self._rest = b""
        self._number = 0
        self._session: str | None = None
        self.complaints: list[str] = []
        """Uncaught exceptions and everything that the browser logs, such as a refusal of the content policy."""
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Runtime", "Log", "Page"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """Run a command of the protocol -> its result."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": params}
        if self._session is not None:
            message["sessionId"] = self._session
        data = json.dumps(message).encode() + b"\0"
        while data:
            data = data[os.write(self._commands, data) :]
        while (reply := self._read()).get("id") != self._number:
            self._note(reply)
        assert "error" not in reply, (method, reply["error"])
        return reply["result"]

    def open(self, url: str, width: int, scheme: str) -> None:
        """Show an address. width: of the window, in CSS pixels; scheme: the color scheme that the user prefers."""
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=False)
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        self.call("Page.navigate", url=url)

    def value(self, expression: str) -> Any:
        """The value of a JavaScript expression, which may be a promise."""
        found = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def screenshot(self, path: Path) -> None:
        """Write a PNG of the whole page."""
        shot = self.call("Page.captureScreenshot", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(shot["data"]))

    def _read(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            more = os.read(self._replies, 1 << 16)
            assert more, "the browser has ended"
            self._rest += more
        message, self._rest = self._rest.split(b"\0", 1)
        return json.loads(message)

    def _note(self, event: dict[str, Any]) -> None:
        if event.get("method") == "Runtime.exceptionThrown":
            self.complaints.append(str(event["params"]["exceptionDetails"]))
        elif event.get("method") == "Log.entryAdded":
            self.complaints.append(str(event["params"]["entry"]))


@contextmanager
def open_page(folder: Path) -> Iterator[Page]:
    """A page of a new browser. folder: for its profile."""
    assert CHROMIUM is not None
    commands, write = os.pipe()
    read, replies = os.pipe()
    options = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--remote-debugging-pipe"]
    start = [sys.executable, "-c", START, str(commands), str(replies)]
    command = [*start, CHROMIUM, *options, f"--user-data-dir={folder}"]
    with subprocess.Popen(command, pass_fds=(commands, replies), stderr=subprocess.DEVNULL) as process:
        os.close(commands)
        os.close(replies)
        try:
            page = Page(write, read)
            yield page
            page._session = None
            page.call("Browser.close")
            process.wait(timeout=60)
        except BaseException:
            process.kill()
            raise
        finally:
            os.close(write)
            os.close(read)
