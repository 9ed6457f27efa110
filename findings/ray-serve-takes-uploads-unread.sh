#!/usr/bin/env bash
# ray 2.60.0 (Ray Serve)
#
# Guess:  a request body that the application reads piece by piece is streamed through
#         Serve: while the application does not read, the client has to wait, as with
#         uvicorn alone.
# Seen:   proxy and replica take in the whole body and hold it in memory, whether the
#         application reads or not. Their queues of ASGI messages have no limit.
# Output: 256 MB are sent to an application that reads nothing until the client is
#         done. The client gets rid of all of them, and both processes have grown by
#         more than the body.
# Why it matters: an application that writes uploads to disk does not keep them out of
#         memory. The memory of the proxy is that of all uploads in progress whose
#         clients are faster than the disk. A limit in the application comes late: refuse
#         by Content-Length, and let a proxy in front limit bodies.
source "$(dirname "$0")/lib.sh"

install "ray[serve]==2.60.0" psutil

probe <<'PY'
import asyncio, http.client, os, time

os.environ["RAY_AUTH_MODE"] = "disabled"  # a local Ray needs no token
import psutil
import ray
from fastapi import FastAPI, Request
from ray import serve

SIZE, PIECE = 256 << 20, b"x" * (1 << 20)
SENT = os.path.abspath("sent")
api = FastAPI()


@serve.deployment(ray_actor_options={"num_cpus": 0})
@serve.ingress(api)
class App:
    @api.post("/")
    async def upload(self, request: Request) -> int:
        while not os.path.exists(SENT):
            await asyncio.sleep(0.05)
        return sum([len(piece) async for piece in request.stream()])


def memory():
    """Resident MB of proxy and replica."""
    found = {}
    for process in psutil.Process().children(recursive=True):
        title = " ".join(process.cmdline())
        for name in ("ProxyActor", "ServeReplica"):
            if title.startswith(f"ray::{name}"):
                found[name] = process.memory_info().rss >> 20
    return found


ray.init(num_cpus=2, include_dashboard=False, logging_level="ERROR", log_to_driver=False)
serve.start(http_options={"port": 18765})
serve.run(App.bind(), route_prefix="/")
before = memory()
client = http.client.HTTPConnection("127.0.0.1", 18765, timeout=60)
client.putrequest("POST", "/")
client.putheader("Content-Length", str(SIZE))
client.endheaders()
for _ in range(SIZE // len(PIECE)):
    client.send(PIECE)
print("the client has sent everything")
time.sleep(5)  # until the last pieces are where they are held
grown = {name: megabytes - before[name] for name, megabytes in memory().items()}
for name in sorted(grown):
    print(f"{name} holds the body:", grown[name] > SIZE >> 20)
open(SENT, "w").close()
print("read then:", int(client.getresponse().read()) == SIZE)
ray.shutdown()
PY

expect <<'TXT'
the client has sent everything
ProxyActor holds the body: True
ServeReplica holds the body: True
read then: True
TXT
