"""The page in a headless Chromium without a network: nothing fails to load, links and toggles work, cells answer.

It is driven by DevTools over a pipe. TOPROVAR_BROWSER names a browser, TOPROVAR_PICTURES a folder to put pictures in.
"""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from toprovar_compile.plan import Plan

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome", "chromium-headless-shell")
_OPTIONS = (
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
    "--disable-background-networking", "--host-resolver-rules=MAP * ~NOTFOUND", "--remote-debugging-pipe",
    "--window-size=1400,1000",
)  # fmt: skip
_PATIENCE = 300.0  # seconds, after which a browser that hangs is ended


def find_browser() -> str | None:
    """The Chromium of this machine, or the one that TOPROVAR_BROWSER names; None if there is none."""
    named = os.environ.get("TOPROVAR_BROWSER")
    return named or next((path for name in NAMES if (path := shutil.which(name))), None)


class Tab:
    """One page. `complaints` are console errors, exceptions and failed loads; `requests` are all addresses it asked
    for."""

    def __init__(self, to: Any, back: Any) -> None:
        self._to, self._back, self._sent, self._session = to, back, 0, ""
        self.complaints: list[str] = []
        self.requests: list[str] = []
        self._loaded = False
        target = self._send("Target.createTarget", url="about:blank")["targetId"]
        self._session = self._send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self._send(f"{domain}.enable")

    def open(self, url: str) -> None:
        """Load a page and wait until it is there."""
        self._loaded = False
        self._send("Page.navigate", url=url)
        while not self._loaded:
            self._read()

    def evaluate(self, script: str) -> Any:
        """The value of a JavaScript expression, as JSON carries it."""
        answer = self._send("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def click(self, selector: str) -> None:
        """Click in the middle of an element, which is scrolled to and must be what the mouse meets."""
        where = self.evaluate(
            f"""(() => {{
                const element = document.querySelector({json.dumps(selector)});
                element.scrollIntoView({{block: "center"}});
                const box = element.getBoundingClientRect();
                const [x, y] = [box.x + box.width / 2, box.y + box.height / 2];
                const met = document.elementFromPoint(x, y);
                return [x, y, element.contains(met) || met.contains(element)];
            }})()"""
        )
        assert where[2], f"{selector} is covered by something"
        for kind in ("mousePressed", "mouseReleased"):
            self._send("Input.dispatchMouseEvent", type=kind, x=where[0], y=where[1], button="left", clickCount=1)

    def picture(self, path: Path) -> None:
        """Write a PNG of what is to be seen."""
        data = self._send("Page.captureScreenshot")["data"]
        path.write_bytes(base64.b64decode(data))

    def _send(self, method: str, **params: Any) -> dict[str, Any]:
        self._sent += 1
        message = {"id": self._sent, "method": method, "params": params}
        self._to.write(json.dumps(message | ({"sessionId": self._session} if self._session else {})).encode() + b"\0")
        self._to.flush()
        while True:
            answer = self._read()
            if answer.get("id") == self._sent:
                assert "error" not in answer, f"{method}: {answer['error']}"
                result: dict[str, Any] = answer["result"]
                return result

    def _read(self) -> dict[str, Any]:
        text = bytearray()
        while (byte := self._back.read(1)) != b"\0":
            assert byte, "the browser has ended"
            text += byte
        message: dict[str, Any] = json.loads(text)
        method, params = message.get("method"), message.get("params", {})
        if method == "Page.loadEventFired":
            self._loaded = True
        elif method == "Runtime.exceptionThrown":
            self.complaints.append(params["exceptionDetails"]["text"])
        elif method == "Runtime.consoleAPICalled" and params["type"] in ("error", "warning"):
            self.complaints.append(str(params["args"]))
        elif method == "Log.entryAdded":
            self.complaints.append(params["entry"]["text"])
        elif method == "Network.loadingFailed":
            self.complaints.append(f"not loaded: {params['errorText']}")
        elif method == "Network.requestWillBeSent":
            self.requests.append(params["request"]["url"])
        return message


@contextmanager
def browser(profile: Path) -> Iterator[Tab]:
    """A tab of a browser that keeps its files in `profile` and ends with the block."""
    found = find_browser()
    assert found is not None
    to_child, to = os.pipe()
    back, from_child = os.pipe()
    shell = f'exec "$@" 3<&{to_child} 4>&{from_child}'  # the numbers that --remote-debugging-pipe reads and writes
    command = ["bash", "-c", shell, "bash", found, *_OPTIONS, f"--user-data-dir={profile}"]
    process = subprocess.Popen(
        command, pass_fds=(to_child, from_child), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    os.close(to_child)
    os.close(from_child)
    patience = threading.Timer(_PATIENCE, process.kill)
    patience.start()
    with open(to, "wb") as writer, open(back, "rb") as reader:
        try:
            yield Tab(writer, reader)
        finally:
            patience.cancel()
            process.kill()
            process.wait()


pytestmark = pytest.mark.skipif(find_browser() is None, reason="needs a Chromium: one of " + ", ".join(NAMES))


@pytest.fixture(scope="module")
def tab(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tab]:
    """The page of the dump, loaded."""
    with browser(tmp_path_factory.mktemp("profile")) as tab:
        tab.open((folder / "index.html").as_uri())
        yield tab


def _picture(tab: Tab, name: str) -> None:
    if folder := os.environ.get("TOPROVAR_PICTURES"):
        tab.picture(Path(folder) / f"{name}.png")


def shown(tab: Tab, selector: str) -> bool:
    """Whether an element is to be seen."""
    return bool(tab.evaluate(f"document.querySelector({json.dumps(selector)}).checkVisibility()"))


def test_it_loads_from_one_file_and_without_complaints(tab: Tab, folder: Path) -> None:
    assert tab.complaints == []
    page = (folder / "index.html").as_uri()
    assert {url for url in tab.requests if not url.startswith("data:")} == {page}
    assert tab.evaluate("document.compatMode") == "CSS1Compat"
    assert tab.evaluate("document.documentElement.scrollWidth <= innerWidth"), "nothing sticks out"
    _picture(tab, "whole")


def test_the_sections_are_reached_by_their_links(tab: Tab) -> None:
    for link in tab.evaluate("[...document.querySelectorAll('nav a[href^=\"#\"]')].map((a) => a.hash)"):
        tab.click(f'nav a[href="{link}"]')
        top = tab.evaluate(f"document.querySelector('{link} h2').getBoundingClientRect().top")
        below = tab.evaluate("document.querySelector('nav').getBoundingClientRect().bottom")
        assert tab.evaluate("location.hash") == link
        assert top >= below, f"the heading of {link} is under the navigation"
        assert top < tab.evaluate("innerHeight"), link


def test_a_cell_says_what_was_pruned_and_why(tab: Tab, made: tuple[Path, Plan, Tensor, Tensor]) -> None:
    digest = made[1].digest()
    assert not shown(tab, ".answer")
    tab.click(f'#heat_{digest} a[href$="_s4_l1"]')
    answer = tab.evaluate("document.querySelector('.answer').innerText")
    assert answer.startswith(
        "Scale 4 (6 x 6 = 36 tokens), layer 1: pruned, 18 of 36 tokens (50.0%) are computed, 18 are"
    )
    assert "lowest attention entropy" in answer and "Why: the plan was made by keep_share" in answer
    maps = tab.evaluate("[...document.querySelectorAll('.answer figcaption')].map((c) => c.textContent)")
    assert [text.partition(":")[0] for text in maps] == ["Scale 3, layer 1", "Scale 4, layer 1"]
    assert shown(tab, ".answer .entropy") and shown(tab, ".answer .kept")
    _picture(tab, "answer")
    tab.click(f'#heat_{digest} a[href$="_s4_l0"]')
    assert "layer 0: dense, nothing is pruned" in tab.evaluate("document.querySelector('.answer').innerText")
    assert tab.evaluate("document.querySelectorAll('.heat a.on').length") == 1


def test_what_is_folded_opens(tab: Tab, made: tuple[Path, Plan, Tensor, Tensor]) -> None:
    row = f"#why_{made[1].digest()}_s4_l1"
    assert not shown(tab, row)
    tab.evaluate(f"location.hash = '{row}'")
    assert tab.evaluate(
        f"new Promise((done) => setTimeout(() => done(document.querySelector('{row}').checkVisibility())))"
    )
    number = tab.evaluate("document.querySelectorAll('details').length")
    tab.evaluate("document.querySelectorAll('details').forEach((d) => d.open = true)")
    assert tab.evaluate("[...document.querySelectorAll('details')].filter((d) => d.open).length") == number > 20
    assert tab.evaluate("document.documentElement.scrollWidth <= innerWidth"), "nothing sticks out"
    lines = "pre.diff .plus:not(:first-child)"
    assert tab.evaluate(f"document.querySelector('{lines}').textContent[0]") == "+", "changes are coloured once open"
    _picture(tab, "diff")


def test_layers_of_the_maps_can_be_hidden(tab: Tab) -> None:
    tab.evaluate("location.hash = '#maps'")
    for kind in ("image", "entropy", "kept"):
        assert shown(tab, f"#maps figure .{kind}")
        tab.click(f'[data-hide="{kind}"]')
        assert not shown(tab, f"#maps figure .{kind}"), kind
        tab.click(f'[data-hide="{kind}"]')
        assert shown(tab, f"#maps figure .{kind}"), kind
    tab.evaluate("slider.value = .2; slider.dispatchEvent(new Event('input'))")
    assert tab.evaluate("getComputedStyle(document.querySelector('#maps .entropy')).opacity") == "0.2"
    _picture(tab, "maps")


def test_links_beside_the_page_open(tab: Tab, folder: Path) -> None:
    links = tab.evaluate("[...document.querySelectorAll('a')].map((a) => a.href).filter((h) => !h.includes('#'))")
    assert len(links) > 20 and [url for url in links if not url.startswith(folder.as_uri() + "/")] == []
    tab.open(next(url for url in links if url.endswith(".diff")))
    assert "+++ after" in tab.evaluate("document.body.innerText")
    assert tab.complaints == []
