"""Headless Chromium over its DevTools protocol (https://chromedevtools.github.io/devtools-protocol), for the tests of pages. Debian: apt-get install chromium."""

import asyncio
import base64
import contextlib
import itertools
import shutil
import subprocess
from pathlib import Path

import aiohttp

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")


class Page:
    """One page. problems: what the browser complained about."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse):
        self._socket, self._numbers, self.problems = socket, itertools.count(1), list[str]()

    async def send(self, method: str, **params) -> dict:
        number = next(self._numbers)
        await self._socket.send_json({"id": number, "method": method, "params": params})
        while True:
            told = await self._socket.receive_json(timeout=30)
            if told.get("method") in ("Runtime.exceptionThrown", "Log.entryAdded"):
                self.problems.append(str(told["params"]))
            if told.get("id") == number:
                if "error" in told:
                    raise AssertionError(told["error"])
                return told["result"]

    async def run(self, script: str):
        """The value of a script, its promise awaited."""
        found = await self.send("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    async def until(self, script: str, seconds: float = 60) -> None:
        for _ in range(int(seconds * 20)):
            if await self.run(script):
                return
            await asyncio.sleep(0.05)
        raise AssertionError(f"never: {script}")

    async def picture(self, file: Path, *, width: int, height: int, dark: bool = False) -> None:
        await self.shape(width, height, dark=dark)
        await asyncio.sleep(0.2)
        file.write_bytes(base64.b64decode((await self.send("Page.captureScreenshot"))["data"]))

    async def shape(self, width: int, height: int, *, dark: bool = False) -> None:
        await self.send("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600)
        await self.send("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}])


@contextlib.asynccontextmanager
async def opened(url: str, profile: Path):
    """A page at this address, in a browser with a profile of its own that can reach nothing but this machine."""
    argv = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--remote-debugging-port=0", f"--user-data-dir={profile}"]
    argv += ["--no-first-run", "--disable-background-networking", "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1", "about:blank"]
    browser = subprocess.Popen(argv, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        said = profile / "DevToolsActivePort"
        for _ in range(600):
            if said.is_file() and "\n" in said.read_text():
                break
            await asyncio.sleep(0.05)
        port = said.read_text().split()[0]
        async with aiohttp.ClientSession() as session:
            async with session.put(f"http://127.0.0.1:{port}/json/new?about:blank") as reply:
                address = (await reply.json())["webSocketDebuggerUrl"]
            async with session.ws_connect(address, max_msg_size=0) as socket:
                page = Page(socket)
                for domain in ("Page", "Runtime", "Log"):
                    await page.send(f"{domain}.enable")
                await page.send("Page.navigate", url=url)
                await page.until("document.readyState === 'complete'")
                yield page
    finally:
        browser.terminate()
        browser.wait(20)
