"""Clients that ask a server without a pause, what each of them got, and the processes of its replicas."""

from __future__ import annotations

import itertools
import json
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field

import httpx
import psutil

from support.serve_fakes import base64_png

#: as the openai package repeats: two times, after Retry-After where there is one
RETRIES, RETRIED = 2, {408, 409, 429, *range(500, 600)}
_IMAGE = base64_png(128, 96)
_TEXT = [{"role": "user", "content": "hello , what can you do ?"}]
_SEEN = [
    {
        "role": "user",
        "content": [
            {"type": "text", "text": "what is it ?"},
            {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{_IMAGE}"}},
        ],
    }
]
#: paths and bodies, of every deployment and of both kinds of answers
BODIES = (
    ("detect", {"image": _IMAGE, "classes": ["red circle", "blue square"]}),
    ("caption", {"image": _IMAGE, "max_new_tokens": 12}),
    ("segment", {"image": _IMAGE, "classes": ["red circle"]}),
    ("chat/completions", {"messages": _SEEN, "max_tokens": 12}),
    ("pose", {"image": _IMAGE, "classes": ["figure"]}),
    ("detect", {"image": _IMAGE, "classes": [f"thing {n}" for n in range(100)]}),
    ("infer", {"image": _IMAGE, "requests": [{"task": "caption"}, {"task": "detect", "classes": ["circle"]}]}),
    ("chat/completions", {"messages": _TEXT, "max_tokens": 12}),
)
STREAM = ("chat/completions", {"messages": _SEEN, "max_tokens": 24, "stream": True})


@dataclass
class Load:
    """What clients got. `raw`: failures of single tries; `failed`: those that were left after the retries of a client;
    `cut`: streams that ended without their end, which no client repeats."""

    url: str
    answered: list[float] = field(default_factory=list)  # moments of `time.monotonic`
    raw: Counter[str] = field(default_factory=Counter)
    failed: Counter[str] = field(default_factory=Counter)
    cut: Counter[str] = field(default_factory=Counter)
    is_over: threading.Event = field(default_factory=threading.Event)

    def rate(self, seconds: float = 3) -> float:
        """Answers per second lately."""
        since = time.monotonic() - seconds
        return sum(moment > since for moment in self.answered) / seconds

    def __str__(self) -> str:
        return (
            f"{len(self.answered)} answered; failed tries {dict(self.raw)}, after retries {dict(self.failed)}, "
            f"cut streams {dict(self.cut)}"
        )

    def ask_on(self, number: int) -> None:
        """A client that asks one body after the other."""
        bodies = itertools.islice(itertools.cycle(BODIES), number, None)
        with httpx.Client(base_url=f"{self.url}/v1/", timeout=120) as client:
            while not self.is_over.is_set():
                self._ask(client, *next(bodies))

    def stream_on(self) -> None:
        """A client that reads streamed answers."""
        with httpx.Client(base_url=f"{self.url}/v1/", timeout=120) as client:
            while not self.is_over.is_set():
                self._stream(client)

    def _ask(self, client: httpx.Client, path: str, body: dict) -> None:
        for attempt in range(RETRIES + 1):
            try:
                response = client.post(path, json=body)
                what, wait_s = f"{response.status_code}", float(response.headers.get("retry-after", 0.5))
                if response.status_code == 200:
                    self.answered.append(time.monotonic())
                    return
                what += f" {response.json().get('error', {}).get('reason')}"
                is_retried = response.status_code in RETRIED
            except (httpx.TransportError, json.JSONDecodeError) as error:
                what, wait_s, is_retried = type(error).__name__, 0.5, True
            self.raw[what] += 1
            if not is_retried or attempt == RETRIES:
                self.failed[f"{path}: {what}"] += 1
                return
            time.sleep(wait_s)

    def _stream(self, client: httpx.Client) -> None:
        path, body = STREAM
        is_begun = False
        try:
            with client.stream("POST", path, json=body) as response:
                is_begun, last = response.status_code == 200, ""
                for line in response.iter_lines():
                    last = line or last
            if is_begun and last == "data: [DONE]":
                self.answered.append(time.monotonic())
                return
            what = f"{response.status_code}" if not is_begun else "ended early"
        except httpx.TransportError as error:
            what = type(error).__name__
        (self.cut if is_begun else self.raw)[what] += 1


@contextmanager
def load(url: str, clients: int = 3) -> Iterator[Load]:
    """`clients` that ask and one that streams, inside the block."""
    found = Load(url)
    threads = [threading.Thread(target=found.ask_on, args=(2 * n,)) for n in range(clients)]
    threads.append(threading.Thread(target=found.stream_on))
    for thread in threads:
        thread.start()
    try:
        yield found
    finally:
        found.is_over.set()
        for thread in threads:
            thread.join()


def replicas(deployment: str = "") -> list[psutil.Process]:
    """The replicas of a deployment, or of all, among the processes that this one has started."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):
            if f"ServeReplica:lumen:{deployment}" in " ".join(process.cmdline()):
                found.append(process)
    return found


def memory() -> dict[int, tuple[str, int]]:
    """Name, which says what a worker does just now, and MiB of every process of Ray that this one has started."""
    found = {}
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):
            name = " ".join(process.cmdline())[:60] or process.name()
            found[process.pid] = name, process.memory_info().rss >> 20
    return found
