#!/usr/bin/env bash
# ray 2.60.0 (Ray Serve)
#
# Guess:  handle.broadcast() reaches every replica at once, however busy it is: its
#         docstring says that it "bypasses per-replica backpressure" and is meant for
#         control operations, such as the reset of a cache or a new configuration.
# Seen:   it bypasses the queue limit of the router alone. In the replica the call
#         takes one of the max_ongoing_requests slots like any request, and waits as
#         long as all of them are taken. A time-out in results() does not withdraw it:
#         the method still runs later, when a slot is free.
# Output: a replica with one request in work and max_ongoing_requests=1: no answer in
#         5 s, 0 calls; after that request ends, the abandoned call runs. The same with
#         max_ongoing_requests=2: answered.
# Why it matters: replicas with long requests, as those of a language model, get the
#         call late just when they are full, and one full replica holds up the answers
#         of all. Keep a slot free: allow more ongoing requests than the work may have,
#         and limit the work itself with a semaphore in the deployment.
source "$(dirname "$0")/lib.sh"

install "ray[serve]==2.60.0"

probe <<'PY'
import asyncio, os, time

os.environ["RAY_AUTH_MODE"] = "disabled"  # a local Ray needs no token
import ray
from ray import serve


@serve.deployment(num_replicas=1, ray_actor_options={"num_cpus": 0})
class Model:
    async def work(self, name):
        open(f"{name}.started", "w").close()
        while not os.path.exists(f"{name}.end"):
            await asyncio.sleep(0.05)

    async def reset(self, name):
        with open(f"{name}.resets", "a") as file:
            file.write("x")
        return "reset"


def wait_for(path):
    deadline = time.monotonic() + 60
    while not os.path.exists(path) and time.monotonic() < deadline:
        time.sleep(0.05)


def resets(name):
    return os.path.getsize(f"{name}.resets") if os.path.exists(f"{name}.resets") else 0


def show(slots):
    name = os.path.abspath(f"slots{slots}")
    app = Model.options(max_ongoing_requests=slots).bind()
    handle = serve.run(app, name=f"slots{slots}", route_prefix=None)
    work = handle.work.remote(name)
    wait_for(f"{name}.started")
    call = handle.broadcast("reset", name)
    try:
        seen = f"answered {call.results(timeout_s=5)}"
    except TimeoutError:
        seen = "no answer in 5 s"
    print(f"max_ongoing_requests={slots}, one request in work: {seen}, {resets(name)} calls")
    open(f"{name}.end", "w").close()
    work.result(timeout_s=60)
    wait_for(f"{name}.resets")
    print(f"max_ongoing_requests={slots}, after that request: {resets(name)} calls")


ray.init(num_cpus=2, include_dashboard=False, logging_level="ERROR", log_to_driver=False)
show(1)
show(2)
ray.shutdown()
PY

expect <<'TXT'
max_ongoing_requests=1, one request in work: no answer in 5 s, 0 calls
max_ongoing_requests=1, after that request: 1 calls
max_ongoing_requests=2, one request in work: answered ['reset'], 1 calls
max_ongoing_requests=2, after that request: 1 calls
TXT
