"""Serve settings: refused typos, and what reaches Ray."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.tiny_models import EXPERTS, tiny_folder

from lumen_ray.config import validate
from lumen_ray.errors import UserError
from lumen_ray.serve.app import model_settings
from lumen_ray.serve.config_file import load_settings
from lumen_ray.serve.settings import ServeSettings

CONFIGS = Path(__file__).parents[2] / "configs" / "serve"


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda p: p.name)
def test_shipped_configs_load(path):
    settings = load_settings(str(path))
    assert settings.logical_cpus(["lumen"]) >= 1


@pytest.mark.parametrize(
    ("data", "says"),
    [
        ({"trunk": {"num_replica": 2}}, "did you mean 'num_replicas'?"),
        ({"trunk": {"autoscaling": {"max_replica": 2}}}, "did you mean 'max_replicas'?"),
        ({"decoders": {"lumin": {}}}, "did you mean 'lumen'?"),
        ({"trunk": {"num_replicas": 1, "autoscaling": {}}}, "not both"),
        ({"trunk": {"autoscaling": {"min_replicas": 3, "max_replicas": 2}}}, "min_replicas <= initial_replicas"),
        ({"trunk": {"batching": {"max_batch_size": 64}}}, "no batch can fill"),
        ({"trunk": {"dtype": "half"}}, "trunk.dtype"),
        ({"trunk": {"not_ready_after_s": 9, "replace_after_s": 8}}, "replace_after_s must be at least"),
        ({"http": {"port": 0}}, "http.port"),
        ({"batches": {}}, "'batches.folder' is required"),
        ({"batches": {"folder": "s3://bucket/batches"}}, "is no path"),
    ],
)
def test_mistakes_are_named(data, says):
    with pytest.raises(UserError) as caught:
        validate(ServeSettings, {"model": "m", **data}, "test.yaml")
    assert says in str(caught.value) and caught.value.reason == "invalid_config"


def test_options_are_accepted_by_serve():
    from ray import serve

    data = {"trunk": {"autoscaling": {"max_replicas": 3, "upscale_delay_s": 2}, "num_cpus": 1}}
    settings = validate(ServeSettings, {"model": "m", **data}, "test")
    for part in (settings.ingress, settings.trunk, settings.decoder("lumen")):
        serve.deployment(object, **part.options())
    options = settings.trunk.options()
    assert (options["health_check_period_s"], options["health_check_timeout_s"]) == (1, 10)
    assert options["autoscaling_config"]["upscale_delay_s"] == 2 and "num_replicas" not in options
    expected = {"max_batch_size": 8, "max_batch_tokens": 16384, "batch_wait_timeout_s": 0}
    expected |= {"not_ready_after_s": 60, "replace_after_s": 300, "image_cache_mb": 256}
    expected |= {"max_ongoing_requests": 8, "max_queued_requests": 32}
    assert options["user_config"] == expected
    assert settings.logical_cpus(["lumen"]) == 4  # 3 trunks of 1, a decoder and an ingress of a half
    batches = validate(ServeSettings, {"model": "m", "batches": {"folder": "b", "num_cpus": 0.5}}, "test")
    assert batches.deployments([])["batches"].options()["num_replicas"] == 1
    assert batches.logical_cpus([]) == 2


def test_deployments_too_large_for_a_ray_are_refused():
    """Of the least replicas: Serve waits for the others to find room."""
    trunk = {"num_gpus": 1, "num_cpus": 2, "autoscaling": {"min_replicas": 2, "max_replicas": 9}}
    settings = validate(ServeSettings, {"model": "m", "trunk": trunk}, "test")
    settings.check_room(["lumen"], {"CPU": 5, "GPU": 2})
    with pytest.raises(UserError, match=r"need 2 GPUs \(trunk 2\), but this Ray has 1; lower num_gpus") as error:
        settings.check_room(["lumen"], {"CPU": 5, "GPU": 1})
    assert error.value.reason == "no_room"
    with pytest.raises(UserError, match=r"need 5 CPUs \(ingress 0.5, trunk 4, lumen 0.5\), but this Ray has 4"):
        settings.check_room(["lumen"], {"CPU": 4, "GPU": 2})


def test_more_replicas_than_the_machine_can_hold_are_refused():
    """A local Ray is started with as many logical CPUs as they need."""
    settings = validate(ServeSettings, {"model": "m", "trunk": {"num_replicas": 400}}, "test")
    settings.check_memory(["lumen"], 402 * 200 << 20)
    with pytest.raises(
        UserError, match=r"402 replicas \(ingress 1, trunk 400, lumen 1\), more than the 24 GiB"
    ) as error:
        settings.check_memory(["lumen"], 24 << 30)
    assert error.value.reason == "no_room"


def test_what_is_given_replaces_the_files(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text("model: m\nhttp:\n")
    settings = load_settings(str(path), port=8001)
    assert (settings.model, settings.http.host, settings.http.port) == ("m", "127.0.0.1", 8001)
    assert load_settings("nano", model="n", host="0.0.0.0").http.host == "0.0.0.0"


def test_who_serves_a_task_is_the_models_choice_or_the_settings(tmp_path):
    model = tiny_folder(tmp_path / "model", grounding_dino=EXPERTS["grounding_dino"])
    path = tmp_path / "a.yaml"
    path.write_text(f"model: {model}\nserving: {{detect: grounding_dino}}\n")
    serving = model_settings(load_settings(str(path), serving={"count": "grounding_dino"})).serving
    assert (serving["detect"], serving["count"], serving["segment"]) == ("grounding_dino", "grounding_dino", "lumen")
    with pytest.raises(UserError, match="'unipose' cannot serve task 'detect'; this model's for it: lumen, ground"):
        model_settings(load_settings(str(path), serving={"detect": "unipose"}))


def test_every_deployment_of_nano_scales_by_itself():
    settings = load_settings("nano")
    for part in (settings.ingress, settings.trunk, settings.decoder("lumen")):
        assert (part.autoscaling.min_replicas, part.autoscaling.max_replicas) == (1, 2)
