"""A headless Chromium, driven through its debugging pipe: no driver to install, no port, no network.

    with Browser(tmp_path) as browser:
        page = browser.open(path)
        page.move(100, 200)
        page.run("document.title")

The protocol is Chromium's own (DevTools): JSON messages with a zero byte after each, on file descriptors 3 and 4.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import select
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

CHROMIUM = shutil.which("chromium")
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--hide-scrollbars",
    "--no-first-run",
    "--disable-background-networking",
    "--remote-debugging-pipe",
)


class Browser:
    def __init__(self, scratch: Path, width: int = 1200, height: int = 900) -> None:
        self.scratch, self.size = scratch, (width, height)
        self._number, self._rest, self._inbox = 0, b"", list[dict[str, Any]]()

    def __enter__(self) -> Browser:
        to_read, self._write = os.pipe()
        self._read, to_write = os.pipe()
        # A shell puts the pipe's ends where Chromium expects them.
        put = f'exec "$0" "$@" 3<&{to_read} 4>&{to_write}'
        profile = self.scratch / "profile"
        command = ["bash", "-c", put, str(CHROMIUM), *FLAGS]
        size = f"--window-size={self.size[0]},{self.size[1]}"
        self._process = subprocess.Popen(
            [*command, size, f"--user-data-dir={profile}", "about:blank"],
            pass_fds=(to_read, to_write),
            stderr=subprocess.DEVNULL,
        )
        os.close(to_read)
        os.close(to_write)
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(EOFError, TimeoutError, OSError):
            self.call("Browser.close")
        os.close(self._write)
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        os.close(self._read)

    def call(self, method: str, session: str = "", limit_s: float = 60.0, **params: Any) -> dict[str, Any]:
        """One command and its answer; what happens meanwhile stays in the inbox."""
        self._number += 1
        number = self._number
        message = {"id": number, "method": method, "params": params}
        if session:
            message["sessionId"] = session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        deadline = time.monotonic() + limit_s
        while True:
            for said in self._hear(deadline):
                if said.get("id") == number:
                    if "error" in said:
                        raise RuntimeError(f"{method}: {said['error']}")
                    return dict(said["result"])
                self._inbox.append(said)

    def _hear(self, deadline: float) -> list[dict[str, Any]]:
        ready, _, _ = select.select([self._read], [], [], max(0.0, deadline - time.monotonic()))
        if not ready:
            raise TimeoutError("Chromium said nothing")
        got = os.read(self._read, 1 << 16)
        if not got:
            raise EOFError("Chromium is gone")
        *whole, self._rest = (self._rest + got).split(b"\0")
        return [json.loads(part) for part in whole]

    def open(self, path: Path, *, width: int = 0, dark: bool = False, limit_s: float = 60.0) -> Page:
        """The page at `path`, when its charts stand (or, without charts, when it is loaded)."""
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        page = Page(self, session)
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable", session)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", session, features=[scheme])
        size = {
            "width": width or self.size[0],
            "height": self.size[1],
            "deviceScaleFactor": 1,
            "mobile": False,
        }
        self.call("Emulation.setDeviceMetricsOverride", session, **size)
        self.call("Page.navigate", session, url=path.as_uri())
        page.wait("document.readyState === 'complete'", limit_s)
        page.wait("!document.getElementById('facts') || 'ready' in document.documentElement.dataset", limit_s)
        return page


class Page:
    def __init__(self, browser: Browser, session: str) -> None:
        self.browser, self.session = browser, session

    def run(self, expression: str) -> Any:
        """The value of a JavaScript expression."""
        answer = self.browser.call(
            "Runtime.evaluate", self.session, expression=expression, returnByValue=True, awaitPromise=True
        )
        if "exceptionDetails" in answer:
            raise RuntimeError(str(answer["exceptionDetails"].get("exception", answer)))
        return answer["result"].get("value")

    def wait(self, expression: str, limit_s: float = 20.0) -> Any:
        """Until the expression is true."""
        deadline = time.monotonic() + limit_s
        while not (value := self.run(expression)):
            if time.monotonic() > deadline:
                raise TimeoutError(f"never true: {expression}")
            time.sleep(0.02)
        return value

    def mouse(self, kind: str, x: float, y: float, **more: Any) -> None:
        self.browser.call("Input.dispatchMouseEvent", self.session, type=kind, x=x, y=y, **more)

    def click(self, x: float, y: float) -> None:
        self.mouse("mouseMoved", x, y)
        for kind in ("mousePressed", "mouseReleased"):
            self.mouse(kind, x, y, button="left", clickCount=1)

    def picture(self, path: Path, *, whole: bool = False) -> None:
        """A screenshot, of the window or of the whole page."""
        data = self.browser.call("Page.captureScreenshot", self.session, captureBeyondViewport=whole)["data"]
        path.write_bytes(base64.b64decode(data))

    def _events(self, *methods: str) -> list[dict[str, Any]]:
        self.run("0")  # all that was said before this has arrived then
        mine = [said for said in self.browser._inbox if said.get("sessionId") == self.session]
        return [said for said in mine if said.get("method") in methods]

    def complaints(self) -> list[str]:
        """Errors and warnings on the console, and exceptions that nobody caught."""
        found = []
        for said in self._events("Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded"):
            params = said["params"]
            level = params.get("type") or params.get("entry", {}).get("level") or "exception"
            if level in ("error", "warning", "exception", "assert"):
                found.append(json.dumps(params)[:2000])
        return found

    def asked_for(self) -> list[str]:
        """Addresses that the page requested, but for its own and what lies inside of it."""
        urls = [said["params"]["request"]["url"] for said in self._events("Network.requestWillBeSent")]
        return [url for url in urls[1:] if not url.startswith(("data:", "blob:", "about:"))]


TOOLTIPS = """(() => {
  const found = [], visit = root => {
    for (const e of root.querySelectorAll("*")) {
      if (e.classList.contains("bk-tooltip-content") && e.getClientRects().length) found.push(e.innerText);
      if (e.shadowRoot) visit(e.shadowRoot);
    }
  };
  visit(document);
  return found;
})()"""
"""Texts of the tooltips in sight: Bokeh keeps them in shadow roots."""
