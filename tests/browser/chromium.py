"""Debian's Chromium, driven over its own pipe (Chrome DevTools Protocol, NUL-terminated JSON on descriptors 3 and 4)."""

import base64
import json
import os
import select
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

PROGRAM = "chromium"
WAIT_S = 120.0  # for a page to show something: MLflow's comes in ten megabytes of script
SIZE = (1280, 900)
OPTIONS = (
    "--headless=new", "--remote-debugging-pipe", "--no-first-run", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars",
    "--no-proxy-server", "--disable-background-networking", "--disable-component-update",
)  # fmt: skip


class Page:
    """One tab. `until` waits for words that a person would read; `click` takes what carries exactly a text."""

    def __init__(self, incoming: int, outgoing: int) -> None:
        self._in, self._out = incoming, outgoing
        self._buffer, self._count = b"", 0
        self._session: str | None = None
        target = self._call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self._call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        self._call("Page.enable")
        metrics = {"width": SIZE[0], "height": SIZE[1], "deviceScaleFactor": 1, "mobile": False}
        self._call("Emulation.setDeviceMetricsOverride", **metrics)

    def _call(self, method: str, **params: Any) -> dict[str, Any]:
        self._count += 1
        message: dict[str, Any] = {"id": self._count, "method": method, "params": params}
        if self._session is not None:
            message["sessionId"] = self._session
        os.write(self._out, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._read()
            if answer.get("id") == self._count:
                assert "error" not in answer, answer
                result: dict[str, Any] = answer["result"]
                return result

    def _read(self) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            ready, _, _ = select.select([self._in], [], [], WAIT_S)
            assert ready, f"{PROGRAM} says nothing"
            piece = os.read(self._in, 1 << 20)
            assert piece, f"{PROGRAM} has ended"
            self._buffer += piece
        message, _, self._buffer = self._buffer.partition(b"\0")
        value: dict[str, Any] = json.loads(message)
        return value

    def run(self, expression: str) -> Any:
        return self._call("Runtime.evaluate", expression=expression, returnByValue=True)["result"].get("value")

    def open(self, url: str) -> None:
        self._call("Page.navigate", url=url)

    @property
    def text(self) -> str:
        return str(self.run("document.body ? document.body.innerText : ''")).replace("\u00a0", " ")

    def until(self, *words: str) -> str:
        """The page's text once it shows all of these."""
        end = time.monotonic() + WAIT_S
        while not all(word in (text := self.text) for word in words):
            missing = [word for word in words if word not in text]
            assert time.monotonic() < end, f"the page never showed {missing}; it shows:\n{text[:3000]}"
            time.sleep(0.3)
        return text

    def wait(self, condition: str, what: str) -> None:
        """Until an expression holds."""
        end = time.monotonic() + WAIT_S
        while not self.run(condition):
            assert time.monotonic() < end, f"the page never had {what}; it shows:\n{self.text[:3000]}"
            time.sleep(0.3)

    def click(self, text: str) -> None:
        """With the mouse, in the middle of the innermost element that says exactly this, once there is one."""
        find = (
            "(() => { const all = [...document.querySelectorAll('body *')];"
            f"const found = all.filter(e => e.textContent.trim() === {json.dumps(text)} && e.getClientRects().length).pop();"
            "if (!found) return null; found.scrollIntoView({block: 'center'}); const at = found.getBoundingClientRect();"
            "return [at.x + at.width / 2, at.y + at.height / 2] })()"
        )
        end = time.monotonic() + WAIT_S
        while not (at := self.run(find)):
            assert time.monotonic() < end, f"nothing to click says {text!r}; the page shows:\n{self.text[:3000]}"
            time.sleep(0.3)
        for what in ("mousePressed", "mouseReleased"):
            self._call("Input.dispatchMouseEvent", type=what, x=at[0], y=at[1], button="left", clickCount=1)

    def write(self, placeholder: str, text: str) -> None:
        """Into the field that shows this while it is empty."""
        field = f"document.querySelector('input[placeholder={json.dumps(placeholder)}]')"
        self.wait(f"{field} !== null", f"a field {placeholder!r}")
        self.run(f"{field}.focus()")
        self._call("Input.insertText", text=text)

    def picture(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(base64.b64decode(self._call("Page.captureScreenshot", format="png")["data"]))


@contextmanager
def browser(folder: Path) -> Iterator[Page]:
    """A fresh profile under `folder`. As root Chromium has no sandbox of its own: it shows loopback pages here and nothing else."""
    assert shutil.which(PROGRAM), f"{PROGRAM} was expected: scripts/browser says how to get it"
    (their_in, our_out), (our_in, their_out) = os.pipe(), os.pipe()
    root = ["--no-sandbox"] if os.geteuid() == 0 else []
    options = [*OPTIONS, *root, f"--user-data-dir={folder / 'profile'}"]
    command = ["bash", "-c", f'exec "$@" 3<&{their_in} 4>&{their_out}', "bash", PROGRAM, *options]
    with (folder / "chromium.log").open("wb") as log:
        process = subprocess.Popen(command, pass_fds=(their_in, their_out), stdout=log, stderr=log, start_new_session=True)
    os.close(their_in)
    os.close(their_out)
    try:
        yield Page(our_in, our_out)
    finally:
        os.close(our_out)  # the browser ends with its pipe
        os.close(our_in)
        try:
            process.wait(15)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
