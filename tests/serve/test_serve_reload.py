"""A model folder that changes, and decoders that scale to zero, on a local Ray under real requests."""

from __future__ import annotations

import os
import shutil
import threading
from pathlib import Path

import httpx
import numpy as np
import pytest
from support.clusters import wait_for
from support.serve_fakes import base64_png, free_port

from lumen_ray.inference.engine import Engine
from lumen_ray.inference.request import make_request
from lumen_ray.model.build import load_model, save_model
from lumen_ray.serve.app import run
from lumen_ray.serve.settings import Autoscaling, Http, ModelDeployment, Reload, ServeSettings, TrunkDeployment
from lumen_ray.serve.sleeping import HEADER
from lumen_ray.wire.settings import Defaults

pytestmark = pytest.mark.ray
BODY = {"image": base64_png(128, 96), "classes": ["red circle", "blue square"]}
PIXELS = np.full((96, 128, 3), 200, np.uint8)


@pytest.fixture(scope="module")
def folder(model_folder, tmp_path_factory):
    return shutil.copytree(model_folder, tmp_path_factory.mktemp("reload") / "model")


@pytest.fixture(scope="module")
def url(folder):
    os.environ["PYTHONPATH"] = f"{Path(__file__).parents[2]}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    sleeps = Autoscaling(min_replicas=0, max_replicas=1, downscale_delay_s=2)
    settings = ServeSettings(
        model=str(folder),
        http=Http(port=free_port(), request_timeout_s=60),
        reload=Reload(watch_s=0.5),
        defaults=Defaults(score_threshold=0, max_per_phrase=3),
        trunk=TrunkDeployment(num_cpus=0.5, max_ongoing_requests=8),
        decoders={"lumen": ModelDeployment(num_cpus=0.5, autoscaling=sleeps)},
    )
    server = run(settings, blocking=False)
    yield server.url
    server.end()


def detect(url):
    return httpx.post(f"{url}/v1/detect", json=BODY, timeout=90)


def version_of(url):
    return httpx.get(f"{url}/v1/models", timeout=30).json()["data"][0]["lumen"]["version"]


def scores(folder):
    """Of the answer that the version in a folder gives."""
    request = make_request("detect", classes=BODY["classes"])
    ((answer,),) = Engine.load(folder).run([PIXELS], [[request]], score_threshold=0, max_per_phrase=3)
    return [score for prediction in answer.predictions for score in prediction.scores.tolist()]


def test_a_decoder_sleeps_until_it_is_asked_and_the_answer_says_so(url):
    def asleep():
        found = httpx.get(f"{url}/readyz", timeout=30)
        assert found.status_code == 200, found.text
        return found.json().get("scaled_to_zero") == ["lumen"]

    for _ in range(2):  # as it starts, and after it has answered
        wait_for(asleep, "the decoder's sleep", 60)
        first, second = detect(url), detect(url)
        assert first.status_code == second.status_code == 200, first.text
        assert first.headers.get(HEADER) == "lumen" and HEADER not in second.headers
    assert not asleep()


def test_a_new_version_is_served_without_losing_a_request_or_mixing_two(url, folder):
    answers, is_over = [], threading.Event()

    def client():
        while not is_over.is_set():
            answers.append(detect(url))

    first, expected = version_of(url), [scores(folder)]
    clients = [threading.Thread(target=client) for _ in range(4)]
    for thread in clients:
        thread.start()
    try:
        wait_for(lambda: len(answers) >= 8, "answers of the old version")
        loaded = load_model(folder)
        state = {name: 1.2 * tensor for name, tensor in loaded.model.state_dict().items()}
        save_model(folder, state, loaded.settings, loaded.tokenizer, loaded.meta)
        wait_for(lambda: version_of(url) != first, "the new version", 60)
        enough = len(answers) + 12
        wait_for(lambda: len(answers) >= enough, "answers of the new version")
    finally:
        is_over.set()
        for thread in clients:
            thread.join()
    assert {answer.status_code for answer in answers} == {200}, [a.text for a in answers if a.status_code != 200][:1]
    expected.append(scores(folder))
    assert version_of(url) == load_model(folder).version
    seen = set()
    for answer in answers:
        found = [instance["score"] for instance in answer.json()["instances"]]
        near = [n for n, one in enumerate(expected) if found == pytest.approx(one, abs=1e-4)]
        assert near, (found, expected)
        seen.update(near)
    assert seen == {0, 1} and expected[0] != pytest.approx(expected[1], abs=2e-4)


def test_an_incomplete_folder_is_named_and_the_old_version_goes_on(url, folder):
    def refused():
        return httpx.get(f"{url}/readyz", timeout=30).json().get("reload_refused")

    version = version_of(url)
    (folder / "meta.json").rename(folder / "aside")
    try:
        assert "meta.json is missing" in wait_for(refused, "the refusal", 30)
        assert detect(url).status_code == 200 and version_of(url) == version
    finally:
        (folder / "aside").rename(folder / "meta.json")
    wait_for(lambda: refused() is None, "the end of the refusal", 30)
