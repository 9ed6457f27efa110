"""Replicas that die at random, updates and hours of mixed load: what clients see of it.

    pytest -m slow -s tests/serve/test_serve_kills.py

`LUMEN_SERVE_KILLS` is the number of kills of each deployment's replicas (default 20), `LUMEN_SERVE_KILLS_SEED` the seed
of which and when, `LUMEN_LOAD_MINUTES` the length of the load whose memory is recorded (default 30).
"""

from __future__ import annotations

import os
import random
import shutil
import time
from pathlib import Path

import httpx
import pytest
from support.clusters import wait_for
from support.serve_fakes import free_port
from support.serve_load import load, memory, replicas

from lumen_ray.model.build import load_model, save_model
from lumen_ray.serve.app import APP_NAME, build_app, run
from lumen_ray.serve.settings import Deployment, Http, ModelDeployment, Reload, ServeSettings, TrunkDeployment

pytestmark = [pytest.mark.slow, pytest.mark.ray]
KILLS, SEED = int(os.environ.get("LUMEN_SERVE_KILLS", "20")), int(os.environ.get("LUMEN_SERVE_KILLS_SEED", "0"))
MINUTES = float(os.environ.get("LUMEN_LOAD_MINUTES", "30"))
#: share by which all processes together may grow, and MiB and share by which each may, once a sixth of the load is over
GROWTH, EACH_MB, EACH = 0.05, 32, 0.1


@pytest.fixture(scope="module")
def settings(model_folder, tmp_path_factory):
    folder = shutil.copytree(model_folder, tmp_path_factory.mktemp("kills") / "model")
    return ServeSettings(
        model=str(folder),
        http=Http(port=free_port(), request_timeout_s=60),
        reload=Reload(watch_s=0.5),
        ingress=Deployment(num_cpus=0.1, max_ongoing_requests=16, num_replicas=2),
        trunk=TrunkDeployment(num_cpus=0.1, max_ongoing_requests=8, num_replicas=2),
        decoders={"lumen": ModelDeployment(num_cpus=0.1, num_replicas=2)},
    )


@pytest.fixture(scope="module")
def url(settings):
    os.environ["PYTHONPATH"] = f"{Path(__file__).parents[2]}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    server = run(settings, blocking=False)
    yield server.url
    server.end()


def running(deployment):
    """The replicas that Serve's controller takes for running."""
    from ray import serve

    states = serve.status().applications[APP_NAME].deployments[deployment].replica_states
    return sum(count for state, count in states.items() if state == "RUNNING")


def publish(folder, target, scale):
    """Saves another version of the model in a folder, perhaps over it. Returns its name."""
    loaded = load_model(folder)
    state = {name: scale * tensor for name, tensor in loaded.model.state_dict().items()}
    save_model(target, state, loaded.settings, loaded.tokenizer, loaded.meta)
    return load_model(target).version


def served(url):
    return httpx.get(f"{url}/v1/models", timeout=60).json()["data"][0]["lumen"]["version"]


@pytest.mark.parametrize("deployment", ["Trunk", "LumenDecoder", "Ingress"])
def test_kills_of_replicas_at_random_moments(url, deployment):
    """One of two at a time. A request that an ingress replica has taken is lost with it, so that clients repeat it."""
    chance, back = random.Random(f"{SEED} {deployment}"), []
    with load(url) as seen:
        wait_for(lambda: len(seen.answered) > 30, "answers before the first kill")
        for _ in range(KILLS):
            wait_for(lambda: running(deployment) == 2 and len(replicas(deployment)) == 2, "two replicas")
            time.sleep(chance.uniform(1, 4))
            rate, killed = seen.rate(), time.monotonic()
            chance.choice(replicas(deployment)).kill()
            time.sleep(1)
            while seen.rate(1) < 0.7 * rate and time.monotonic() - killed < 60:
                time.sleep(0.1)
            back.append(time.monotonic() - killed)
        wait_for(lambda: running(deployment) == 2, "two replicas")
    print(f"\n{KILLS} kills of {deployment}: {seen}; 70 % of the rate again after at most {max(back, default=0):.1f} s")
    assert not seen.failed
    if deployment != "Ingress":
        assert not seen.raw and not seen.cut


def test_a_new_version_in_the_folder_under_load(url, settings):
    with load(url) as seen:
        wait_for(lambda: len(seen.answered) > 20, "answers of the old version")
        version = publish(settings.model, settings.model, 1.01)
        wait_for(lambda: served(url) == version, "the new version")
        enough = len(seen.answered) + 20
        wait_for(lambda: len(seen.answered) > enough, "answers of the new version")
    print(f"\nnew version in the folder: {seen}")
    assert not seen.raw and not seen.cut


def test_a_rolling_update_to_another_model_under_load(url, settings, tmp_path_factory):
    """As `serve deploy` does it: Serve replaces all replicas, ingress included, one of two at a time."""
    from ray import serve

    other = tmp_path_factory.mktemp("other") / "model"
    version = publish(settings.model, other, 1.01)
    with load(url) as seen:
        wait_for(lambda: len(seen.answered) > 20, "answers of the old version")
        updated = settings.model_copy(update={"model": str(other)})
        serve.run(build_app(updated), name=APP_NAME, route_prefix="/", blocking=False)
        wait_for(lambda: served(url) == version, "the new version")
        enough = len(seen.answered) + 20
        wait_for(lambda: len(seen.answered) > enough, "answers of the new version")
    print(f"\nrolling update: {seen}")
    assert not seen.failed


def test_memory_under_mixed_load(url):
    looks: list[dict[int, tuple[str, int]]] = []
    with load(url) as seen:
        wait_for(lambda: len(seen.answered) > 60, "answers before the first look")
        begun = time.monotonic()
        for sixth in range(7):
            while time.monotonic() < begun + 10 * MINUTES * sixth:
                time.sleep(1)
            looks.append(memory())
    kept = sorted(set.intersection(*(set(look) for look in looks)))  # Ray's idle workers come and go
    totals = [sum(look[process][1] for process in kept) for look in looks]
    print(f"\n{MINUTES:g} minutes of load: {seen}; MiB at the start and after each sixth:")
    print(" ".join(f"{total:6}" for total in totals), " all")
    grown = []
    for process in kept:
        sizes = [look[process][1] for look in looks]
        name = looks[-1][process][0]
        print(" ".join(f"{size:6}" for size in sizes), "", name)
        if sizes[-1] > (1 + EACH) * sizes[1] + EACH_MB:
            grown.append(name)
    assert not seen.raw and not seen.cut and not grown
    assert totals[-1] <= (1 + GROWTH) * totals[1]
