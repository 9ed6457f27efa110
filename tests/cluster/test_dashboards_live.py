"""Every query of a dashboard, answered by a real Prometheus that scrapes a real run."""

from __future__ import annotations

import _thread
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import httpx
import pytest
from support import label_fakes
from support.clusters import kill_tree, train_workers, wait_for
from support.label_fakes import encode, held_engine, picture, write_images
from support.prometheus import ROOT, metrics_addresses, needs, prometheus_of
from support.serve_fakes import base64_png, free_port, save_random_model
from support.train_fakes import make_recipe, make_shards

from lumen_ray.serve.keys import new_key

pytestmark = [pytest.mark.ray, needs("prometheus")]
GRAFANA = ROOT / "cluster" / "grafana"
#: panels that are empty on machines without a GPU
OF_GPUS = {"GPU", "GPU memory", "Model FLOPs utilisation"}
#: panels that are empty until something goes wrong
OF_LOSSES = {"Workers ended for memory", "Restarts by reason", "Refused for load"}
#: panels of shards with several sources, and of recipes with validation
OF_RECIPES = {"Losses by source", "Passes over each source", "Validation"}


@pytest.fixture(scope="module")
def prometheus(tmp_path_factory):
    """Of a local Ray whose processes report every two seconds."""
    from lumen_ray.ray_env import init_local, prepare_environment

    prepare_environment()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_metrics_report_interval_ms", "2000")
        import ray

        init_local()
        ray.cloudpickle.register_pickle_by_value(label_fakes)  # the workers cannot import this folder
        with prometheus_of(metrics_addresses(), tmp_path_factory.mktemp("prometheus")) as server:
            yield server
        ray.cloudpickle.unregister_pickle_by_value(label_fakes)
        ray.shutdown()


def empty_panels(prometheus, name):
    """The panels of a dashboard that have no data and should have some."""
    found = {title for title, _ in prometheus.unanswered(GRAFANA / f"{name}.json")}
    found -= OF_GPUS | OF_LOSSES | OF_RECIPES
    print(f"{name}: no data in {sorted(found)}")
    return found


def test_a_label_job_fills_its_dashboard(prometheus, tmp_path):
    from lumen_ray.label.pipeline import label

    photos = write_images(tmp_path / "in", 14)
    (photos / "broken.png").write_bytes(b"nothing")
    (photos / "copy.png").write_bytes(encode(picture(0)))
    output, go_on = tmp_path / "out", tmp_path / "go-on"
    seen = []

    def wait(status):
        """Holds the job, with its actor alive, until Prometheus has seen two outcomes. A third one is done by then,
        since Ray Data hands out a row once it has the next."""
        seen.append(status.done)
        if len(seen) <= 2:
            wait_for(
                lambda: prometheus.query(f"ray_lumen_label_images_done == {status.done}"), "the job's numbers", 120
            )
        if len(seen) == 2:
            wait_for(lambda: not empty_panels(prometheus, "labelling"), "data in all panels", 60)
            go_on.touch()

    label(
        held_engine(go_on, 10), photos, output, tasks=["detect"], classes=["square"], num_actors=1, fragment_size=4,
        batch_size=2, exports=(), dedup=True, usd_per_hour=3600.0, progress=wait,
    )  # fmt: skip
    assert seen == [4, 8, 12, 16]
    wait_for(lambda: prometheus.query("ray_lumen_label_images_done == 16"), "the last numbers", 30)
    images = {s["metric"]["result"]: float(s["value"][1]) for s in prometheus.query("ray_lumen_label_images_total")}
    assert images == {"labelled": 14, "copied": 1, "failed": 1}
    (errors,) = prometheus.query("ray_lumen_label_errors_total")
    assert (errors["metric"]["reason"], errors["metric"]["output"]) == ("broken_image", str(output))
    (read,) = prometheus.query("ray_lumen_label_bytes_total")
    assert float(read["value"][1]) == sum(path.stat().st_size for path in photos.iterdir())


@pytest.mark.slow
def test_a_training_run_fills_its_dashboard(prometheus, tmp_path):
    """And a worker that is killed is a restart with a reason."""
    from lumen_ray.train.launch import train

    data, run = make_shards(tmp_path), tmp_path / "run"
    recipe = make_recipe(data, stages=((1500, None),), checkpoint_every=20, max_failures=2)
    ended = threading.Event()

    def watch() -> str:
        shown = f'ray_lumen_train_step{{run="{run}"}} > 0'
        wait_for(
            lambda: prometheus.query(shown) and not empty_panels(prometheus, "training"), "data in all panels", 150
        )
        kill_tree(train_workers(os.getpid())[0].pid)
        wait_for(lambda: prometheus.query("ray_lumen_train_restarts_total"), "the restart", 90)
        return prometheus.query("ray_lumen_train_restarts_total")[0]["metric"]["reason"]

    with ThreadPoolExecutor(1) as pool:
        reason = pool.submit(watch)
        reason.add_done_callback(lambda _: ended.set())

        def stop(entry) -> None:
            if ended.is_set():
                _thread.interrupt_main()

        with suppress(KeyboardInterrupt):
            train(data / "shards", recipe, run, progress=stop)
    assert reason.result() == "WorkerHealthCheckFailedError"


@pytest.mark.slow
def test_a_server_fills_its_dashboard(prometheus, tmp_path):
    from lumen_ray.serve.app import run
    from lumen_ray.serve.settings import Auth, Autoscaling, Deployment, Http, ServeSettings, TrunkDeployment

    key, digest = new_key("alice")
    (tmp_path / "keys.yaml").write_text(digest)
    settings = ServeSettings(
        model=str(save_random_model(tmp_path / "model")),
        http=Http(port=free_port(), request_timeout_s=90),
        auth=Auth(keys_file=str(tmp_path / "keys.yaml")),
        ingress=Deployment(num_cpus=0.1, autoscaling=Autoscaling(min_replicas=1, max_replicas=1)),
        trunk=TrunkDeployment(num_cpus=0.5),
    )
    running = run(settings, blocking=False)
    chat = {
        "role": "user",
        "content": [{"type": "text", "text": "what is it?"}, {"type": "image_url", "image_url": {}}],
    }
    chat["content"][1]["image_url"]["url"] = f"data:image/png;base64,{base64_png()}"
    try:
        with httpx.Client(base_url=running.url, headers={"X-API-Key": key}, timeout=90) as client:

            def asked() -> bool:
                """Asks once more, and looks whether all panels have data."""
                image = {"image": base64_png(), "max_new_tokens": 4}
                first = client.post("/v1/detect", json={**image, "classes": ["red circle"]})
                assert first.status_code == 200, first.text
                client.post("/v1/caption", json={"image_id": first.json()["image_id"], "max_new_tokens": 4})
                assert client.post("/v1/caption", json={}).status_code == 400
                body = {"messages": [chat], "stream": True, "max_tokens": 4}
                assert "data: [DONE]" in client.post("/v1/chat/completions", json=body).text
                return not empty_panels(prometheus, "serving")

            wait_for(asked, "data in all panels", 120)
    finally:
        running.stop()
