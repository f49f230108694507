"""A headless browser for tests, driven by its own debugging protocol: opens pages from files, fetches nothing."""

from __future__ import annotations

import asyncio
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from types import TracebackType
from typing import Any

import aiohttp

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
    "--remote-debugging-port=0",
)
START_SECONDS = 60.0


def browser_on_path() -> str | None:
    """The browser's command, or None where this machine has none."""
    return next((path for name in NAMES if (path := shutil.which(name))), None)


class Browser:
    """One browser process with a new empty profile; ends with the block."""

    def __init__(self, command: str) -> None:
        self._profile = tempfile.TemporaryDirectory(prefix="dngd-browser-", ignore_cleanup_errors=True)
        self._process = subprocess.Popen(
            [command, *FLAGS, f"--user-data-dir={self._profile.name}", "about:blank"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )

    def __enter__(self) -> Browser:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.terminate()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._profile.cleanup()

    def look(self, page: Path, script: str, *, width: int, dark: bool = False) -> tuple[Any, list[str]]:
        """Open a page in a window of that width; return what the script finds there, and all that went wrong.

        Wrong is: an error on the console, an exception, a warning of the browser, and any request but the page's own.
        """
        return asyncio.run(self._look(page.resolve().as_uri(), script, width, dark))

    async def _look(self, url: str, script: str, width: int, dark: bool) -> tuple[Any, list[str]]:
        port = self._port()
        async with aiohttp.ClientSession() as http:
            async with http.put(f"http://127.0.0.1:{port}/json/new?about:blank") as answer:
                address = (await answer.json())["webSocketDebuggerUrl"]
            async with http.ws_connect(address, max_msg_size=0) as socket:
                tab = _Tab(socket)
                for domain in ("Page", "Runtime", "Log", "Network"):
                    await tab.call(f"{domain}.enable")
                metrics = {"width": width, "height": 1000, "deviceScaleFactor": 1, "mobile": False}
                await tab.call("Emulation.setDeviceMetricsOverride", **metrics)
                scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
                await tab.call("Emulation.setEmulatedMedia", features=[scheme])
                await tab.call("Page.navigate", url=url)
                await tab.until("Page.loadEventFired")
                found = await tab.call("Runtime.evaluate", expression=script, returnByValue=True)
                await tab.call("Page.close")
        assert "exceptionDetails" not in found, found
        return found["result"].get("value"), tab.wrong(url)

    def _port(self) -> int:
        """Wait until the browser has written where it listens."""
        file, end = Path(self._profile.name) / "DevToolsActivePort", time.monotonic() + START_SECONDS
        while time.monotonic() < end:
            assert self._process.poll() is None, f"the browser ended with exit code {self._process.returncode}"
            lines = file.read_text().splitlines() if file.exists() else []
            if len(lines) >= 2:
                return int(lines[0])
            time.sleep(0.05)
        raise AssertionError(f"the browser did not start within {START_SECONDS:g} s")


class _Tab:
    """Commands to a tab, and the events that came meanwhile."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self._socket = socket
        self._number = 0
        self._events: list[dict[str, Any]] = []

    async def call(self, method: str, **parameters: Any) -> Any:
        self._number += 1
        await self._socket.send_json({"id": self._number, "method": method, "params": parameters})
        while True:
            message = await self._receive()
            if message.get("id") == self._number:
                assert "error" not in message, (method, message)
                return message["result"]

    async def until(self, event: str) -> None:
        while not any(found["method"] == event for found in self._events):
            await self._receive()

    async def _receive(self) -> dict[str, Any]:
        message: dict[str, Any] = await self._socket.receive_json(timeout=60)
        if "method" in message:
            self._events.append(message)
        return message

    def wrong(self, url: str) -> list[str]:
        out = []
        for event in self._events:
            method, own = event["method"], event["params"]
            if method == "Runtime.exceptionThrown":
                out.append(str(own["exceptionDetails"].get("text")))
            elif method == "Runtime.consoleAPICalled" and own["type"] in ("error", "warning", "assert"):
                out.append(f"console {own['type']}: {own['args']}")
            elif method == "Log.entryAdded" and own["entry"]["level"] in ("error", "warning"):
                out.append(f"{own['entry']['level']}: {own['entry']['text']}")
            elif method == "Network.requestWillBeSent" and own["request"]["url"] != url:
                out.append(f"request: {own['request']['url']}")
        return out
