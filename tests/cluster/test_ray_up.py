"""The files for `ray up`, checked as `ray up` does before it calls a cloud."""

import copy
import shlex
from typing import Any

import pytest
import yaml
from support.manifests import ROOT

from lumen_ray.ray_env import prepare_environment

prepare_environment()
util = pytest.importorskip("ray.autoscaler._private.util")
jsonschema = pytest.importorskip("jsonschema")

FOLDER = ROOT / "cluster" / "ray-up"
FILES = sorted(path.stem for path in FOLDER.glob("*.yaml"))
CLOUDS = ["aws", "gcp"]


def load(name: str) -> dict[str, Any]:
    return yaml.safe_load((FOLDER / f"{name}.yaml").read_text())


def prepared(config: dict[str, Any]) -> dict[str, Any]:
    """The configuration with Ray's defaults; raises what `ray up` would."""
    done = util.prepare_config(copy.deepcopy(config))
    util.validate_config(done)
    return done


def test_there_is_a_file_for_each_place():
    assert FILES == ["aws", "gcp", "onpremise"]


@pytest.mark.parametrize("name", FILES)
def test_ray_takes_the_file(name):
    done = prepared(load(name))
    assert done["cluster_name"] == "lumen-ray"
    for command in [*done["setup_commands"], *done["head_start_ray_commands"], *done["worker_start_ray_commands"]]:
        shlex.split(command)


@pytest.mark.parametrize("name", FILES)
def test_ray_would_refuse_unknown_keys(name):
    with pytest.raises(jsonschema.ValidationError, match="max_wokers"):
        prepared(load(name) | {"max_wokers": 3})


@pytest.mark.parametrize("name", CLOUDS)
def test_ray_would_refuse_unknown_keys_of_a_node_type(name):
    config = load(name)
    config["available_node_types"]["gpu"]["spot"] = True
    with pytest.raises(jsonschema.ValidationError, match="spot"):
        prepared(config)


@pytest.mark.parametrize("name", CLOUDS)
def test_a_cloud_has_cpu_and_gpu_nodes_and_spot_workers(name):
    types = prepared(load(name))["available_node_types"]
    assert types.keys() == {"head", "cpu-spot", "gpu-spot", "gpu"}
    assert types["head"]["resources"] == {"CPU": 0} and types["head"]["max_workers"] == 0
    assert [t["resources"].get("GPU", 0) for t in types.values()] == [0, 0, 1, 8]
    on_spot = [
        key
        for key, given in types.items()
        if given["node_config"].get("InstanceMarketOptions") == {"MarketType": "spot"}
        or {"preemptible": True} in given["node_config"].get("scheduling", [])
    ]
    assert on_spot == ["cpu-spot", "gpu-spot"]
    assert all(given.get("min_workers", 0) == 0 for given in types.values())  # an idle cluster costs its head


@pytest.mark.parametrize("name", FILES)
def test_ray_asks_for_a_token_that_every_node_has(name):
    config = load(name)
    starts = [c for key in ("head", "worker") for c in config[f"{key}_start_ray_commands"] if "ray start" in c]
    assert len(starts) == 2 and all("RAY_AUTH_MODE=token" in command for command in starts)
    assert [there for there, here in config["file_mounts"].items() if here == "~/.ray/auth_token"]
    assert "--dashboard-host=127.0.0.1" in starts[0]  # reached through SSH by `ray dashboard`


def test_ec2_takes_the_nodes():
    session = pytest.importorskip("botocore.session")
    validate = pytest.importorskip("botocore.validate")
    shape = session.Session().get_service_model("ec2").operation_model("RunInstances").input_shape
    for name, given in load("aws")["available_node_types"].items():
        asked = given["node_config"] | {"MinCount": 1, "MaxCount": 1}
        assert not validate.ParamValidator().validate(asked, shape).has_errors(), name
        wrong = asked | {"InstanceTyp": "m5.large"}
        assert validate.ParamValidator().validate(wrong, shape).has_errors()
