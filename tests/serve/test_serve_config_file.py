"""Serve config files: Serve takes those that are shipped as they are, and mistakes in others are named."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from lumen_ray import cli
from lumen_ray.errors import UserError
from lumen_ray.serve.config_file import IMPORT_PATH, check_file, load_settings

CONFIGS = Path(__file__).parents[2] / "configs" / "serve"
EACH_CONFIG = pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.name)


def built(application):
    """The deployments, by name, that Serve builds from an application of a config file, as `serve deploy` does."""
    from ray._common.utils import import_attr
    from ray.serve._private.api import call_user_app_builder_with_args_if_necessary
    from ray.serve._private.build_app import build_app

    app = call_user_app_builder_with_args_if_necessary(import_attr(application["import_path"]), application["args"])
    found = build_app(app, name=application["name"], default_runtime_env={})
    found.validate_single_fastapi_ingress()
    return {deployment.name: deployment for deployment in found.deployments}


@EACH_CONFIG
def test_shipped_configs_are_serves(path):
    from ray.serve.schema import ServeDeploySchema

    check_file(str(path))
    schema = ServeDeploySchema.model_validate(yaml.safe_load(path.read_text()))
    assert [application.import_path for application in schema.applications] == [IMPORT_PATH]


def test_serve_builds_the_application_of_a_config():
    (application,) = yaml.safe_load((CONFIGS / "nano.yaml").read_text())["applications"]
    deployments = built(application)
    assert set(deployments) == {"Ingress", "Trunk", "LumenDecoder"}
    limits = deployments["Trunk"]._deployment_config.user_config
    assert (limits["max_ongoing_requests"], limits["max_queued_requests"]) == (16, 64)


@pytest.mark.parametrize(
    ("args", "says"),
    [
        ({"model": "nano", "trunk": {"num_replica": 2}}, "args: unknown key 'trunk.num_replica'; did you mean"),
        ({}, "args: 'model' is required"),
        ({"model": "nano", "http": {"port": 9}}, "args: 'http.port' would have no effect; give it in 'http_options'"),
        (
            {"model": "nano", "http": {"log_encoding": "JSON"}},
            "'http.log_encoding' would have no effect; give",
        ),
        ({"model": "nano", "tracing": {}}, "args: 'tracing' would have no effect; give it in 'tracing_config'"),
    ],
)
def test_the_builder_names_mistakes(args, says):
    with pytest.raises(UserError) as caught:
        built({"name": "lumen", "import_path": IMPORT_PATH, "args": args})
    assert says in str(caught.value)


def changed(tmp_path, change):
    """A file with nano's config after `change`."""
    data = yaml.safe_load((CONFIGS / "nano.yaml").read_text())
    change(data, data["applications"][0])
    path = tmp_path / "serve.yaml"
    path.write_text(yaml.safe_dump(data))
    return str(path)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda file, app: app.update(import_pth=1), "unknown key 'applications.0.import_pth'; did you mean"),
        (
            lambda file, app: app.update(deployments=[{"name": "Trunk", "num_replica": 2}]),
            "unknown key 'applications.0.deployments.0.num_replica'; did you mean 'num_replicas'?",
        ),
        (
            lambda file, app: app.update(deployments=[{"name": "Trunk", "autoscaling_config": {"min_replica": 2}}]),
            "unknown key 'applications.0.deployments.0.autoscaling_config.min_replica'; did you mean 'min_replicas'?",
        ),
        (
            lambda file, app: app.update(deployments=[{"name": "Trunk", "ray_actor_options": {"num_gpu": 2}}]),
            "unknown key 'applications.0.deployments.0.ray_actor_options.num_gpu'; did you mean 'num_gpus'?",
        ),
        (lambda file, app: file["http_options"].update(prt=1), "unknown key 'http_options.prt'; did you mean 'port'?"),
        (
            lambda file, app: app["args"].update(modl=1),
            "applications.0.args: unknown key 'modl'; did you mean 'model'?",
        ),
        (lambda file, app: app["args"].update(http={"host": "a"}), "applications.0.args: 'http.host' would have no"),
        (lambda file, app: file["http_options"].update(request_timeout_s=60), "is 60; give at least 70, 10 more than"),
        (lambda file, app: file["http_options"].update(port="x"), "'http_options.port' is invalid"),
        (lambda file, app: file.update(applications={}), "'applications' is invalid"),
    ],
)
def test_mistakes_are_named(tmp_path, change, says):
    path = changed(tmp_path, change)
    for read in (check_file, load_settings):
        with pytest.raises(UserError) as caught:
            read(path)
        assert says in str(caught.value) and caught.value.reason == "invalid_config"


def test_only_serve_applies_deployments(tmp_path):
    path = changed(tmp_path, lambda file, app: app.update(deployments=[{"name": "Trunk", "num_replicas": 2}]))
    check_file(path)
    with pytest.raises(UserError, match="does not apply 'applications.0.deployments'"):
        load_settings(path)


def test_one_application_is_served(tmp_path):
    other = {"name": "b", "route_prefix": "/b", "import_path": "b:app"}
    path = changed(tmp_path, lambda file, app: file["applications"].append(other))
    check_file(path)
    with pytest.raises(UserError, match="runs one application"):
        load_settings(path)


def test_the_address_is_that_of_the_file(tmp_path):
    path = changed(tmp_path, lambda file, app: file["http_options"].update(host="0.0.0.0", port=8123))
    assert (load_settings(path).http.host, load_settings(path).http.port) == ("0.0.0.0", 8123)
    assert load_settings(path, port=8124).http.port == 8124


def test_a_config_can_be_checked_alone(tmp_path, capsys):
    assert cli.main(["serve", "--config", "7b", "--check"]) in (0, None)
    assert "no mistakes in 7b" in "".join(capsys.readouterr())
    assert (
        cli.main(["serve", "--check", "--config", changed(tmp_path, lambda file, app: app["args"].pop("model"))]) == 2
    )


def test_logs_and_traces_of_a_file_hold_for_the_command_too(tmp_path):
    def change(file, app):
        file["logging_config"]["encoding"] = "JSON"
        file["tracing_config"] = {"enabled": True, "sampling_ratio": 0.5}

    settings = load_settings(changed(tmp_path, change))
    assert settings.http.log_encoding == "JSON" and settings.tracing.sampling_ratio == 0.5
    assert load_settings("nano").http.log_encoding == "TEXT" and load_settings("nano").tracing is None


def test_the_keys_file_has_its_place_whatever_the_folder_of_a_replica_is(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    args = {"model": "nano", "auth": {"keys_file": "keys.yaml"}}
    ingress = built({"name": "lumen", "import_path": IMPORT_PATH, "args": args})["Ingress"]
    assert ingress.init_args[0].auth.keys_file == str(tmp_path / "keys.yaml")
