"""Asks a server over HTTP for `serve.bench`, in a process of its own that imports the standard library alone: reads
loads as JSON lines, writes what each took as JSON lines. Connections are kept."""

import base64
import json
import random
import sys
import threading
import time
from http.client import HTTPConnection
from itertools import accumulate, count
from pathlib import Path

JPEG_START, COMMENT = b"\xff\xd8", b"\xff\xfe"


def numbered(jpeg: bytes, number: int) -> bytes:
    """The image with a number in a comment, so that a server has not seen it before."""
    text = str(number).encode()
    return JPEG_START + COMMENT + (len(text) + 2).to_bytes(2, "big") + text + jpeg[len(JPEG_START) :]


class Load:
    """Requests of several clients, each of which sends its next one when it has an answer. With `rate` requests
    arrive at random moments, that many a second, and a request's time begins there, whether a client is free or not."""

    def __init__(self, port: int, path: str, bodies: list[bytes], seconds: float, rate: float | None, seed: int):
        self.port, self.path, self.bodies, self.seconds = port, path, bodies, seconds
        draw = random.Random(seed)
        self.arrivals = None if rate is None else list(accumulate(draw.expovariate(rate) for _ in bodies))
        self.took: dict[int, float] = {}
        self.statuses: dict[int, int] = {}
        self.start = 0.0
        self._numbers = count()
        self._lock = threading.Lock()

    def run(self, clients: int) -> dict[str, object]:
        """Ends after `seconds`, or after the last body."""
        threads = [threading.Thread(target=self._client) for _ in range(clients)]
        cpu, self.start = time.process_time(), time.perf_counter()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return {
            "seconds": time.perf_counter() - self.start,
            "cpu": time.process_time() - cpu,
            "took": [self.took[number] for number in sorted(self.took)],
            "statuses": self.statuses,
        }

    def _client(self) -> None:
        connection = HTTPConnection("127.0.0.1", self.port, timeout=120)
        headers = {"Content-Type": "application/json"}
        while (number := next(self._numbers)) < len(self.bodies):
            due = time.perf_counter()
            if self.arrivals is not None:
                due = self.start + self.arrivals[number]
            if due >= self.start + self.seconds:
                break
            time.sleep(max(0.0, due - time.perf_counter()))
            connection.request("POST", self.path, self.bodies[number], headers)
            response = connection.getresponse()
            response.read()
            with self._lock:
                self.took[number] = time.perf_counter() - due
                self.statuses[response.status] = self.statuses.get(response.status, 0) + 1
        connection.close()


def main(folder: str) -> None:
    """Answers every line {"port", "path", "fields": [{..}, ..], "first", "count", "clients", "seconds", "rate",
    "seed"}: every image is asked about with all `fields`, one after the other; `first`: the first image's number."""
    jpegs = [path.read_bytes() for path in sorted(Path(folder).glob("*.jpg"))]
    for line in sys.stdin:
        asked = json.loads(line)
        bodies = []
        for number in range(asked["first"], asked["first"] + asked["count"]):
            image = base64.b64encode(numbered(jpegs[number % len(jpegs)], number)).decode()
            bodies += [json.dumps({"image": image, **fields}).encode() for fields in asked["fields"]]
        load = Load(asked["port"], asked["path"], bodies, asked["seconds"], asked["rate"], asked["seed"])
        print(json.dumps(load.run(asked["clients"])), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
