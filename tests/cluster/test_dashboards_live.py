"""Every query of a dashboard, answered by a real Prometheus that scrapes a real run."""

from __future__ import annotations

import pytest
from support import label_fakes
from support.clusters import wait_for
from support.label_fakes import encode, held_engine, picture, write_images
from support.prometheus import ROOT, metrics_addresses, needs, prometheus_of

pytestmark = [pytest.mark.ray, needs("prometheus")]
GRAFANA = ROOT / "cluster" / "grafana"
#: panels that are empty on machines without a GPU
OF_GPUS = {"GPU", "GPU memory", "Model FLOPs utilisation"}
#: panels that are empty until something goes wrong
OF_LOSSES = {"Workers ended for memory", "Restarts by reason"}


@pytest.fixture(scope="module")
def prometheus(tmp_path_factory):
    """Of a local Ray whose processes report every second."""
    from lumen_ray.ray_env import init_local, prepare_environment

    prepare_environment()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_metrics_report_interval_ms", "1000")
        import ray

        init_local()
        ray.cloudpickle.register_pickle_by_value(label_fakes)  # the workers cannot import this folder
        with prometheus_of(metrics_addresses(), tmp_path_factory.mktemp("prometheus")) as server:
            yield server
        ray.cloudpickle.unregister_pickle_by_value(label_fakes)
        ray.shutdown()


def empty_panels(prometheus, name):
    """The panels of a dashboard that have no data and should have some."""
    found = {title for title, _ in prometheus.unanswered(GRAFANA / f"{name}.json")} - OF_GPUS - OF_LOSSES
    print(name, found)
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
            wait_for(lambda: prometheus.query(f"ray_lumen_label_images_done == {status.done}"), "the job's numbers", 60)
        if len(seen) == 2:
            wait_for(lambda: not empty_panels(prometheus, "labelling"), "data in all panels", 30)
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
