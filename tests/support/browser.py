"""Chromium by its DevTools protocol, over a pipe: enough to run the server's pages in tests."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any


class Browser:
    """A headless Chromium with one page. `complaints`: errors of scripts, the console and the page's policy."""

    def __init__(self, folder: Path) -> None:
        """`folder`: for its profile."""
        (read, theirs), (ours, write) = os.pipe(), os.pipe()
        options = "--headless --no-sandbox --disable-gpu --remote-debugging-pipe --window-size=1300,850 --no-first-run"
        # Chromium reads commands from 3 and answers on 4
        command = f'exec chromium {options} --user-data-dir="$0" about:blank 3<&{read} 4>&{write}'
        self._process = subprocess.Popen(
            ["bash", "-c", command, str(folder)], pass_fds=(read, write), stderr=subprocess.DEVNULL
        )
        os.close(read)
        os.close(write)
        self._commands, self._answers = os.fdopen(theirs, "wb"), os.fdopen(ours, "rb")
        self._buffer = b""
        self._number = 0
        self.complaints: list[str] = []
        pages = self._call("Target.getTargets")["targetInfos"]
        target = next(page["targetId"] for page in pages if page["type"] == "page")
        self._session = self._call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Runtime", "Log", "Page"):
            self.call(f"{domain}.enable")

    def close(self) -> None:
        self._call("Browser.close")
        self._process.wait(20)
        self._commands.close()
        self._answers.close()

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """A command to the page."""
        return self._call(method, session=self._session, **params)

    def open(self, url: str) -> None:
        """Loads a page; returns when its scripts have run."""
        self.call("Page.navigate", url=url)
        self.run(f"until(() => location.href === {json.dumps(url)} && document.readyState === 'complete')")

    def run(self, code: str) -> Any:
        """The value of an expression in the page, awaited if it is a promise. It may call `find(id)`, and
        `until(test)`, which waits until the test is true. Raises `AssertionError` for its errors."""
        helpers = """
            const find = id => document.getElementById(id)
            const until = async test => {
              for (let tries = 0; tries < 200; tries++) {
                try { if (test()) return } catch {}
                await new Promise(done => setTimeout(done, 25))
              }
              throw new Error(`never true: ${test}`)
            }"""
        answer = self.call(
            "Runtime.evaluate",
            expression=f"(async () => {{ {helpers}; return await ({code}) }})()",
            awaitPromise=True,
            returnByValue=True,
        )
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]["exception"]["description"]
        return answer["result"].get("value")

    def drag(self, *points: tuple[float, float]) -> None:
        """The mouse, pressed at the first of the points in the window and let go at the last."""
        kinds = ["mousePressed", *["mouseMoved"] * (len(points) - 1)]
        for kind, (x, y) in zip([*kinds, "mouseReleased"], [*points, points[-1]], strict=True):
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", buttons=1, clickCount=1)

    def press(self, *keys: str) -> None:
        """Keys by their names, as "Tab", "Enter" or "a"."""
        codes = {"Tab": 9, "Enter": 13, "ArrowLeft": 37, "ArrowUp": 38, "ArrowRight": 39, "ArrowDown": 40}
        for key in keys:
            text = {"Enter": "\r"}.get(key, key if len(key) == 1 else "")
            code = {"key": key, "code": key, "windowsVirtualKeyCode": codes.get(key, 0)}
            self.call("Input.dispatchKeyEvent", type="keyDown" if text else "rawKeyDown", text=text, **code)
            self.call("Input.dispatchKeyEvent", type="keyUp", **code)

    def _call(self, method: str, session: str | None = None, **params: Any) -> dict[str, Any]:
        self._number += 1
        command = {"id": self._number, "method": method, "params": params}
        if session is not None:
            command["sessionId"] = session
        self._commands.write(json.dumps(command).encode() + b"\0")
        self._commands.flush()
        while (message := self._next()).get("id") != self._number:
            self._note(message)
        assert "error" not in message, message["error"]
        return message["result"]

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            read = self._answers.read1(1 << 20)
            assert read, "Chromium has ended"
            self._buffer += read
        message, self._buffer = self._buffer.split(b"\0", 1)
        return json.loads(message)

    def _note(self, message: dict[str, Any]) -> None:
        params = message.get("params", {})
        if message["method"] == "Runtime.exceptionThrown":
            self.complaints.append(json.dumps(params["exceptionDetails"])[:500])
        elif message["method"] == "Log.entryAdded" and params["entry"]["level"] in ("error", "warning"):
            self.complaints.append(params["entry"]["text"])
