"""Photograph the built site with Chromium, at 1280 and 390 pixels, light and dark, into site/look.

    python docs/look.py [PAGE]…

Beside the pages, it photographs a report of `ddparity audit --html`, and the notebook with its output. It fails for an
error in the console, for a page that is wider than the window, and for one in the other colours. It speaks the DevTools
protocol over two pipes, so it needs no driver.
"""

from __future__ import annotations

import base64
import functools
import http.server
import itertools
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

from nbconvert import HTMLExporter
from terminal import SCRIPT

SITE = Path(__file__).parent.parent / "site"
WIDTHS = (1280, 390)
SCHEMES = ("light", "dark")
PAGES = (
    "index",
    "tutorial/1-training",
    "tutorial/4-proof",
    "data",
    "recipes/gan",
    "moving/ddp",
    "moving/accelerate",
    "reference/training",
    "reference/commands",
    "explanations/idea",
    "costs",
    "failures",
    "audit",
    "changelog",
    "zh/index",
    "zh/data",
    "zh/moving/ddp",
    "zh/reference/training",
)
REPORT, NOTEBOOK = "look/report", "look/notebook"
_WIDTH = "document.documentElement.scrollWidth"
_SCHEME = "document.body.dataset.mdColorScheme"


class Browser:
    """A Chromium with one tab, over the pipes of `--remote-debugging-pipe`: JSON that ends with a zero byte."""

    def __init__(self, folder: str) -> None:
        program = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
        if program is None:
            raise SystemExit("no chromium on this machine: apt-get install chromium")
        to_browser, self._write = os.pipe()
        self._read, from_browser = os.pipe()
        # The browser reads descriptor 3 and writes descriptor 4.
        shell = f'exec "{program}" "$@" 3<&{to_browser} 4>&{from_browser}'
        options = [
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--remote-debugging-pipe",
            f"--user-data-dir={folder}",
        ]
        self._process = subprocess.Popen(
            ["bash", "-c", shell, "chromium", *options],
            pass_fds=(to_browser, from_browser),
            stderr=subprocess.DEVNULL,
        )
        os.close(to_browser)
        os.close(from_browser)
        self._numbers, self._rest, self.events = itertools.count(1), b"", list[dict[str, Any]]()
        self._session: str | None = None
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")
        # Material keeps the colours of one page for the next.
        self.call("Page.addScriptToEvaluateOnNewDocument", source="try { localStorage.clear() } catch {}")

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Call a method, and return its result. What happens meanwhile goes to `events`."""
        number = next(self._numbers)
        message = {"id": number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._next()
            if answer.get("id") == number:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']['message']}")
                return answer["result"]
            self.events.append(answer)

    def wait(self, event: str) -> None:
        """Wait until an event has come."""
        while not any(one.get("method") == event for one in self.events):
            self.events.append(self._next())

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            part = os.read(self._read, 1 << 16)
            if not part:
                raise RuntimeError("chromium has ended")
            self._rest += part
        message, self._rest = self._rest.split(b"\0", 1)
        return json.loads(message)

    def close(self) -> None:
        """End the browser."""
        self._process.terminate()
        self._process.wait(30)


def problems_of(browser: Browser, url: str, width: int, scheme: str, picture: Path) -> list[str]:
    """Open a page, photograph it, and return what is wrong with it."""
    browser.events.clear()
    browser.call("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=width < 600)
    browser.call("Page.navigate", url="about:blank")  # a page that is still open would keep its colours for this one
    browser.wait("Page.loadEventFired")
    browser.events.clear()
    browser.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
    browser.call("Page.navigate", url=url)
    browser.wait("Page.loadEventFired")
    overflow = browser.call("Runtime.evaluate", expression=_WIDTH)["result"]["value"] - width
    image = browser.call("Page.captureScreenshot", format="png")["data"]
    picture.parent.mkdir(parents=True, exist_ok=True)
    picture.write_bytes(base64.b64decode(image))
    problems = [f"{overflow} pixels too wide"] if overflow > 0 else []
    shown = browser.call("Runtime.evaluate", expression=_SCHEME)["result"].get("value")
    if shown not in (None, {"light": "default", "dark": "slate"}[scheme]):  # None: no page of Material
        problems.append(f"has the colours of {shown}")
    for event in browser.events:
        about = event.get("params", {})
        match event.get("method"):
            case "Runtime.exceptionThrown":
                problems.append(about["exceptionDetails"]["text"])
            case "Log.entryAdded" if about["entry"]["level"] == "error":
                if about["entry"].get("url", "").endswith("/favicon.ico"):  # a page without an icon of its own
                    continue
                problems.append(f"{about['entry']['text']} {about['entry'].get('url', '')}")
            case "Network.requestWillBeSent" if "127.0.0.1" not in (wanted := about["request"]["url"]):
                if not wanted.startswith("data:"):
                    problems.append(f"asks the network for {wanted}")
    return problems


def make_report(page: Path) -> None:
    """Audit a script with two faults."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "train.py").write_text(SCRIPT, encoding="utf-8")
        command = [sys.executable, "-m", "ddparity", "audit", "--html", str(page), "train.py"]
        subprocess.run(command, cwd=folder, stdout=subprocess.DEVNULL, check=False)  # 1: it has faults


def make_notebook(page: Path) -> None:
    """Write the notebook as a page, without what it would ask the network for."""
    exporter = HTMLExporter(mathjax_url="", require_js_url="", jquery_url="", mermaid_js_url="")
    text, _ = exporter.from_filename(str(SITE.parent / "examples" / "notebook.ipynb"))
    page.write_text(text, encoding="utf-8")


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_: Any) -> None:
        """Say nothing."""


def main() -> None:
    """Photograph the pages of the command line, or the main ones."""
    handler = functools.partial(_Quiet, directory=str(SITE))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    found = 0
    (SITE / "look").mkdir(parents=True, exist_ok=True)
    make_report(SITE / f"{REPORT}.html")
    make_notebook(SITE / f"{NOTEBOOK}.html")
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        browser = Browser(folder)
        for page, width, scheme in itertools.product(sys.argv[1:] or (*PAGES, REPORT, NOTEBOOK), WIDTHS, SCHEMES):
            picture = SITE / "look" / f"{page.removeprefix('look/').replace('/', '-')}-{width}-{scheme}.png"
            url = f"http://127.0.0.1:{server.server_port}/{page}.html"
            problems = problems_of(browser, url, width, scheme, picture)
            found += len(problems)
            print(f"{page} at {width}, {scheme}: {'; '.join(problems) or 'fine'}")
        browser.close()
    server.shutdown()
    raise SystemExit(1 if found else 0)


if __name__ == "__main__":
    main()
