"""A real Chromium, driven over the DevTools protocol (https://chromedevtools.github.io/devtools-protocol/).

    with Browser() as browser:
        page = browser.open("http://127.0.0.1:8080/")
        page.wait_for("document.title !== ''")

Owns the process and its profile, a new one each time. Needs no Node and no driver: one WebSocket.
"""

import base64
import contextlib
import json
import os
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

from programs import chromium
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import ClientConnection, connect

_FLAGS = (
    "--headless",
    "--no-sandbox",  # it is root in containers, and what it opens is ours
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-quic",
    "--no-first-run",
    "--no-default-browser-check",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-default-apps",
    "--disable-extensions",
    "--mute-audio",
    "--password-store=basic",
    "--remote-debugging-port=0",
)
_START_SECONDS = 60.0


class BrowserError(Exception):
    """The browser, or the script that it was given, failed."""


class Browser:
    """One process. Each page that is opened has its own storage and cookies."""

    def __init__(self) -> None:
        self._profile = tempfile.mkdtemp(prefix="bcast-chromium-")
        self._process = subprocess.Popen(
            [chromium(), *_FLAGS, f"--user-data-dir={self._profile}", "about:blank"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env=os.environ | {"HOME": self._profile},
            start_new_session=True,
        )
        self._pages: dict[str, Page] = {}
        self._answers: dict[int, dict[str, Any]] = {}
        self._commands = 0
        self._resources = contextlib.ExitStack()
        try:
            self._devtools: ClientConnection = self._resources.enter_context(
                connect(self._address(), max_size=None, compression=None)
            )
        except BaseException:
            self._end()
            raise

    def __enter__(self) -> "Browser":
        return self

    def __exit__(self, *exc: object) -> None:
        with contextlib.suppress(BrowserError, ConnectionClosed, TimeoutError):
            self.command("Browser.close")
        self._resources.close()
        self._end()

    def _address(self) -> str:
        """Where it listens, which it writes into its profile."""
        path = Path(self._profile, "DevToolsActivePort")
        deadline = time.monotonic() + _START_SECONDS
        while time.monotonic() < deadline:
            if self._process.poll() is not None:
                raise BrowserError(f"Chromium ended with {self._process.returncode}")
            lines = path.read_text().splitlines() if path.exists() else []
            if len(lines) == 2:
                return f"ws://127.0.0.1:{lines[0]}{lines[1]}"
            time.sleep(0.02)
        raise BrowserError(f"Chromium did not start within {_START_SECONDS:.0f} s")

    def _end(self) -> None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(5)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)  # The session was made for it, helpers included.
        self._process.wait()
        shutil.rmtree(self._profile, ignore_errors=True)

    def open(self, url: str = "about:blank") -> "Page":
        context = self.command("Target.createBrowserContext")["browserContextId"]
        target = self.command("Target.createTarget", url="about:blank", browserContextId=context)["targetId"]
        session = self.command("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        page = self._pages[session] = Page(self, session)
        for domain in ("Page", "Runtime", "Log", "Network"):
            page.command(f"{domain}.enable")
        page.go(url)
        return page

    def command(self, method: str, session: str | None = None, **params: Any) -> dict[str, Any]:
        """Run one command and return its result. Events that come meanwhile are noted by their page."""
        self._commands += 1
        number = self._commands
        request = {"id": number, "method": method, "params": params}
        self._devtools.send(json.dumps(request if session is None else {**request, "sessionId": session}))
        deadline = time.monotonic() + 30
        while number not in self._answers:
            self.listen(deadline - time.monotonic())
        answer = self._answers.pop(number)
        if "error" in answer:
            raise BrowserError(f"{method}: {answer['error']['message']}")
        result: dict[str, Any] = answer["result"]
        return result

    def listen(self, seconds: float) -> None:
        """Wait for one message of the browser; TimeoutError when none comes."""
        message = json.loads(self._devtools.recv(timeout=max(seconds, 0.001)))
        if "id" in message:
            self._answers[message["id"]] = message
        elif message.get("sessionId") in self._pages:
            self._pages[message["sessionId"]].note(message["method"], message["params"])


class Page:
    """One page. `errors` has what the console would show in red, `requests` each URL that it asked for."""

    def __init__(self, browser: Browser, session: str) -> None:
        self._browser = browser
        self._session = session
        self.errors: list[str] = []
        self.requests: list[str] = []

    def command(self, method: str, **params: Any) -> dict[str, Any]:
        return self._browser.command(method, self._session, **params)

    def note(self, method: str, params: dict[str, Any]) -> None:
        if method == "Runtime.exceptionThrown":
            details = params["exceptionDetails"]
            self.errors.append(details.get("exception", {}).get("description", details["text"]))
        elif method == "Runtime.consoleAPICalled" and params["type"] in ("error", "warning", "assert"):
            self.errors.append(" ".join(str(part.get("value")) for part in params["args"]))
        elif method == "Log.entryAdded" and params["entry"]["level"] in ("error", "warning"):
            self.errors.append(params["entry"]["text"])
        elif method == "Network.requestWillBeSent":
            self.requests.append(params["request"]["url"])
        elif method == "Network.webSocketCreated":
            self.requests.append(params["url"])

    def go(self, url: str) -> None:
        failed = self.command("Page.navigate", url=url).get("errorText")
        if failed:
            raise BrowserError(f"{url}: {failed}")
        self.wait_for(f"document.readyState === 'complete' && location.href.startsWith({json.dumps(url)})")

    def evaluate(self, expression: str) -> Any:
        """The value of a JavaScript expression, awaited if it is a promise."""
        answer = self.command(
            "Runtime.evaluate",
            expression=expression,
            awaitPromise=True,
            returnByValue=True,
            userGesture=True,
        )
        if "exceptionDetails" in answer:
            details = answer["exceptionDetails"]
            raise BrowserError(details.get("exception", {}).get("description", details["text"]))
        return answer["result"].get("value")

    def wait_for(self, expression: str, seconds: float = 15.0) -> None:
        """Wait until the expression is true."""
        deadline = time.monotonic() + seconds
        while not self.evaluate(f"Boolean({expression})"):
            if time.monotonic() > deadline:
                raise BrowserError(f"not within {seconds:.0f} s: {expression}\nconsole: {self.errors}")
            with contextlib.suppress(TimeoutError):
                self._browser.listen(0.05)

    def text(self, selector: str) -> str:
        value = self.evaluate(f"document.querySelector({json.dumps(selector)}).innerText")
        return str(value)

    def click(self, selector: str) -> None:
        """A real click in the middle of the element."""
        box = self.evaluate(
            f"(() => {{ const e = document.querySelector({json.dumps(selector)});"
            "e.scrollIntoView({block: 'center'}); const b = e.getBoundingClientRect();"
            "return [b.x + b.width / 2, b.y + b.height / 2]; })()"
        )
        for kind in ("mousePressed", "mouseReleased"):
            self.command(
                "Input.dispatchMouseEvent", type=kind, x=box[0], y=box[1], button="left", clickCount=1
            )

    def type(self, text: str) -> None:
        """Type into what has the focus."""
        self.command("Input.insertText", text=text)

    def press(self, key: str, *, ctrl: bool = False) -> None:
        codes = {"Enter": 13, "Tab": 9, "Escape": 27, "Space": 32}
        event = {
            "key": " " if key == "Space" else key,
            "code": key,
            "windowsVirtualKeyCode": codes[key],
            "modifiers": 2 if ctrl else 0,
        }
        text = {"text": "\r"} if key == "Enter" else {"text": " "} if key == "Space" else {}
        self.command("Input.dispatchKeyEvent", type="keyDown", **event, **text)
        self.command("Input.dispatchKeyEvent", type="keyUp", **event)

    def resize(self, width: int, height: int, *, dark: bool = False, scale: float = 1) -> None:
        self.command(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=scale,
            mobile=width < 600,
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.command("Emulation.setEmulatedMedia", features=[scheme])

    def screenshot(self, path: Path, *, whole: bool = False) -> None:
        """Write a PNG of what is seen, or of the whole page."""
        answer = self.command("Page.captureScreenshot", captureBeyondViewport=whole)
        path.write_bytes(base64.b64decode(answer["data"]))
