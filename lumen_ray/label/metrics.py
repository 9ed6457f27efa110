"""The numbers of a label job for Prometheus, at Ray's endpoint of the driver's node, and of each actor's."""

from __future__ import annotations

from lumen_ray.data import urls
from lumen_ray.ray_metrics import Metric, in_ray

_JOB = ("output",)
IMAGES = Metric(
    "counter", "lumen_label_images_total", "images of this run: labelled, copied or failed", ("output", "result")
)
ERRORS = Metric("counter", "lumen_label_errors_total", "images that failed, by their reason", ("output", "reason"))
BYTES = Metric("counter", "lumen_label_bytes_total", "bytes of the encoded images that were read", _JOB)
WORKER_SECONDS = Metric("counter", "lumen_label_worker_seconds_total", "time of all actors together", _JOB)
MODEL_SECONDS = Metric("counter", "lumen_label_model_seconds_total", "of that, with the model at work", _JOB)
LISTED = Metric("gauge", "lumen_label_images_listed", "images listed so far, in all runs", _JOB)
DONE = Metric("gauge", "lumen_label_images_done", "images done in all runs, failed ones included", _JOB)
FRAGMENTS_LEFT = Metric("gauge", "lumen_label_fragments_left", "fragments that wait or are being labelled", _JOB)
SECONDS_LEFT = Metric("gauge", "lumen_label_seconds_left", "expected time to the end, at the rate of this run", _JOB)
USD = Metric("gauge", "lumen_label_usd", "cost of all runs, at the price given", _JOB)
USD_EXPECTED = Metric("gauge", "lumen_label_usd_expected", "cost of the whole job, at the rate of this run", _JOB)
ACTORS = Metric("gauge", "lumen_label_actors", "1 for every actor whose model is loaded", _JOB)

#: all of them
METRICS: tuple[Metric, ...] = (
    IMAGES, ERRORS, BYTES, WORKER_SECONDS, MODEL_SECONDS, LISTED, DONE, FRAGMENTS_LEFT, SECONDS_LEFT, USD, USD_EXPECTED,
    ACTORS,
)  # fmt: skip


def count_actor(output: urls.Location) -> None:
    """Counts this process among the actors until it ends."""
    if in_ray():
        ACTORS.export_to_ray()
    ACTORS.record(1, output=urls.shown(output))
