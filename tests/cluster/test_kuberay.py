"""What the manifests say: commands that exist, sizes that fit the recipes, and pods that are locked down."""

import shlex
from importlib.metadata import version

import pytest
import yaml
from support.manifests import ROOT, VARIANTS, document, documents, pods, ray_clusters

from lumen_ray import cli, config
from lumen_ray.cluster.manifests import container, group, job_of, quantity
from lumen_ray.presets import find
from lumen_ray.recipe import Recipe

every_variant = pytest.mark.parametrize("variant", VARIANTS)


def entrypoints(variant: str) -> dict[str, list[str]]:
    """The words of the command of each job."""
    jobs = {d["metadata"]["name"]: job_of(d) for d in documents(variant)}
    return {name: shlex.split(job["entrypoint"]) for name, job in jobs.items() if job}


def components(variant: str) -> dict[str, str]:
    return {
        f"{d['kind']}/{d['metadata']['name']}": d["metadata"]["labels"]["app.kubernetes.io/component"]
        for d in documents(variant)
    }


# Commands -----------------------------------------------------------------------------------------------------------


@every_variant
def test_entrypoints_are_commands_of_lumen_ray(variant):
    verbs = {"prepare": "prepare", "train": "train", "evaluate": "evaluate", "label": "label", "nightly": "label"}
    found = entrypoints(variant)
    assert {name: words[1] for name, words in found.items()} == verbs
    for words in found.values():
        assert words[0] == "lumen-ray"
        args = cli.build_parser().parse_args(words[1:])
        if recipe := getattr(args, "recipe", None):
            find("recipes", recipe)
    assert "--refresh" in found["nightly"] and [w for w in found["nightly"] if w != "--refresh"] == found["label"]


@every_variant
def test_paths_are_on_the_shared_volume(variant):
    paths = [word for words in entrypoints(variant).values() for word in words if word.startswith("/")]
    assert paths and [path for path in paths if not path.startswith(("/data/", "/models/"))] == []
    for name, template in pods(variant):
        mounts = {m["mountPath"]: m for m in container(template)["volumeMounts"]}
        volumes = {v["name"]: v for v in template["spec"]["volumes"]}
        assert {m["name"] for m in mounts.values()} == volumes.keys(), name
        if not name.endswith("/submitter"):
            assert volumes["data"]["persistentVolumeClaim"]["claimName"] == "lumen-data"
            assert document(variant, "PersistentVolumeClaim", "lumen-data")
            assert mounts["/models"] == {"name": "data", "mountPath": "/models", "subPath": "models", "readOnly": True}


@every_variant
def test_the_service_is_the_serve_config_file(variant):
    from lumen_ray.serve.config_file import check_serve_file

    preset = "nano" if variant == "kind" else "7b"
    served = yaml.safe_load(document(variant, "RayService", "serve")["spec"]["serveConfigV2"])
    wanted = config.load_yaml(find("serve", preset))
    if preset == "nano":
        assert wanted["http_options"].pop("host") == "127.0.0.1"
        assert served["http_options"].pop("host") == "0.0.0.0"
    assert served == wanted
    check_serve_file(served, "serveConfigV2")
    port = served["http_options"]["port"]
    spec = dict(ray_clusters(variant))["serve"]
    head = container(spec["headGroupSpec"]["template"])
    assert {p["containerPort"] for p in head["ports"] if p["name"] == "serve"} == {port}
    [ingress] = document(variant, "NetworkPolicy", "serve")["spec"]["ingress"]
    assert [p["port"] for p in ingress["ports"]] == [port]


@every_variant
def test_pods_that_serve_are_ready_when_the_application_is(variant):
    from lumen_ray.serve.api import create_api
    from lumen_ray.serve.readiness import WAIT_S
    from lumen_ray.serve.settings import ServeSettings

    routes = create_api(None, ServeSettings(model="nano")).openapi()["paths"]
    probes = {name: container(template).get("readinessProbe") for name, template in pods(variant)}
    assert {name for name, probe in probes.items() if probe} == {"serve/cpu", "serve/gpu"}
    for probe in filter(None, probes.values()):
        assert probe["httpGet"] == {"path": "/readyz", "port": 8000}
        assert probe["httpGet"]["path"] in routes
        assert probe["timeoutSeconds"] > WAIT_S  # else the probe would give up before the route does


# Sizes --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", [v for v in VARIANTS if v != "kind"])
def test_workers_are_as_many_as_the_commands_ask_for(variant):
    words, clusters = entrypoints(variant), dict(ray_clusters(variant))
    recipe = config.load(Recipe, find("recipes", words["train"][words["train"].index("--recipe") + 1]))
    gang = group(clusters["train"], "gpu")
    assert gang["replicas"] == gang["minReplicas"] == gang["maxReplicas"] == recipe.workers
    for name in ("label", "nightly"):
        assert group(clusters[name], "gpu")["maxReplicas"] == int(words[name][words[name].index("--actors") + 1])
        # it looks for GPUs once, when it starts
        assert group(clusters[name], "gpu")["minReplicas"] >= 1
    evaluate = document(variant, "RayJob", "evaluate")["spec"]
    assert evaluate["entrypointNumGpus"] == group(clusters["evaluate"], "gpu")["maxReplicas"] == 1


def test_the_first_training_pod_holds_the_whole_model():
    from lumen_ray.footprint import FP32, count_recipe
    from lumen_ray.model.settings import ModelSettings

    recipe = config.load(Recipe, find("recipes", "7b"))
    counted = count_recipe(config.load(ModelSettings, find("models", recipe.model)), recipe)
    for variant in VARIANTS.keys() - {"kind"}:
        pod = container(group(dict(ray_clusters(variant))["train"], "gpu")["template"])
        assert counted.model.parameters * FP32 * 1.2 < quantity(pod["resources"]["limits"]["memory"])


@every_variant
def test_a_job_starts_with_a_worker_since_its_head_takes_no_work(variant):
    clusters = dict(ray_clusters(variant))
    for name in entrypoints(variant):
        assert sum(g["minReplicas"] for g in clusters[name]["workerGroupSpecs"]) >= 1, name
        for workers in clusters[name]["workerGroupSpecs"]:
            assert 0 <= workers["minReplicas"] <= workers["maxReplicas"], name


def test_kind_fits_a_laptop():
    for name, spec in ray_clusters("kind"):
        groups = [(1, spec["headGroupSpec"]["template"])]
        groups += [(g.get("replicas", g["maxReplicas"]), g["template"]) for g in spec["workerGroupSpecs"]]
        requests = [(n, container(t)["resources"]["requests"]) for n, t in groups]
        assert sum(n * quantity(r["memory"]) for n, r in requests) <= 12 * 2**30, name
        assert sum(n * quantity(r["cpu"]) for n, r in requests) <= 6, name
        assert not any("nvidia.com/gpu" in r for _, r in requests)
        assert all("nodeSelector" not in t["spec"] for _, t in groups)


@every_variant
def test_only_groups_named_gpu_ask_for_gpus_and_the_nodes_that_have_them(variant):
    for name, template in pods(variant):
        limits = container(template)["resources"]["limits"]
        assert ("nvidia.com/gpu" in limits) == (name.endswith("/gpu") and variant != "kind")
        if "nvidia.com/gpu" in limits:
            assert limits["nvidia.com/gpu"] == "1" and template["spec"]["nodeSelector"]
            assert {t["key"] for t in template["spec"]["tolerations"]} == {"nvidia.com/gpu"}
            assert "cuda" in container(template)["image"]


# Safety -------------------------------------------------------------------------------------------------------------


@every_variant
def test_pods_are_restricted(variant):
    for name, template in pods(variant):
        pod, only = template["spec"], container(template)
        assert pod["securityContext"]["runAsNonRoot"] and pod["securityContext"]["runAsUser"] == 1000, name
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert only["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "capabilities": {"drop": ["ALL"]},
            "readOnlyRootFilesystem": True,
        }
        [tmp] = [v for v in pod["volumes"] if v["name"] == "tmp"]
        assert "emptyDir" in tmp and {"name": "tmp", "mountPath": "/tmp"} in only["volumeMounts"]
        assert {"name": "HOME", "value": "/tmp"} in only["env"]
        for kind in ("requests", "limits"):
            assert {"cpu", "memory"} <= only["resources"][kind].keys(), name
        assert template["metadata"]["labels"]["app.kubernetes.io/part-of"] == "lumen-ray"
        # Ray's autoscaler, in the head, is the only one that speaks with the API server
        assert name.endswith("/head") or pod["automountServiceAccountToken"] is False, name


@every_variant
def test_every_cluster_asks_for_a_token_and_names_the_ray_that_is_installed(variant):
    for name, spec in ray_clusters(variant):
        assert spec["authOptions"] == {"mode": "token"}, name
        assert spec["rayVersion"].split(".")[:2] == version("ray").split(".")[:2], name  # patch releases may differ
        assert spec["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
        if spec["enableInTreeAutoscaling"]:
            security = spec["autoscalerOptions"]["securityContext"]
            assert security["readOnlyRootFilesystem"] and spec["autoscalerOptions"]["version"] == "v2"
            templates = [spec["headGroupSpec"]["template"], *(g["template"] for g in spec["workerGroupSpecs"])]
            assert {t["spec"]["restartPolicy"] for t in templates} == {"Never"}


@every_variant
def test_training_is_a_gang_that_kueue_takes(variant):
    train = document(variant, "RayJob", "train")
    assert train["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "lumen-ray"
    assert train["spec"]["shutdownAfterJobFinishes"] and "clusterSelector" not in train["spec"]
    assert [name for name, spec in ray_clusters(variant) if not spec["enableInTreeAutoscaling"]] == ["train"]
    for job in filter(None, map(job_of, documents(variant))):
        assert job["shutdownAfterJobFinishes"] and job["ttlSecondsAfterFinished"] > 0


@every_variant
def test_upgrades_are_incremental_where_there_is_a_gateway(variant):
    strategy = document(variant, "RayService", "serve")["spec"]["upgradeStrategy"]
    if variant == "kind":
        assert strategy == {"type": "NewCluster"}
    else:
        assert strategy["type"] == "NewClusterWithIncrementalUpgrade"
        options = strategy["clusterUpgradeOptions"]
        assert options.keys() == {"gatewayClassName", "maxSurgePercent", "stepSizePercent", "intervalSeconds"}


@every_variant
def test_selectors_of_policies_and_budgets_meet_pods(variant):
    of_kuberay = {"ray.io/serve", "ray.io/node-type"}
    labels = [template["metadata"]["labels"] for _, template in pods(variant)]
    for found in documents(variant):
        if found["kind"] in ("NetworkPolicy", "PodDisruptionBudget"):
            spec = found["spec"]
            wanted = spec.get("podSelector", spec.get("selector"))["matchLabels"].items()
            ours = {key: value for key, value in wanted if key not in of_kuberay}
            assert all(ours.items() <= given.items() for given in labels)
        if found["kind"] == "PodDisruptionBudget":
            # for pods of custom resources Kubernetes takes neither maxUnavailable nor percentages
            assert isinstance(found["spec"]["minAvailable"], int) and "maxUnavailable" not in found["spec"]


@every_variant
def test_everything_is_in_the_namespace_and_can_be_applied_by_its_component(variant):
    for found in documents(variant):
        if found["kind"] != "Namespace":
            assert found["metadata"]["namespace"] == "lumen-ray"
    parts = components(variant)
    ray = {key: part for key, part in parts.items() if key.startswith("Ray")}
    assert all(key.endswith(f"/{part}") for key, part in ray.items())
    assert {part for key, part in parts.items() if key not in ray} == {"common"}


def test_images_are_placeholders_with_the_version_of_the_package():
    from lumen_ray import __version__

    for variant in VARIANTS:
        images = {container(template)["image"] for _, template in pods(variant)}
        if variant == "base":
            assert images == {"lumen-ray", "lumen-ray-cuda"}
        else:
            assert images <= {f"lumen-ray:{__version__}-cpu", f"lumen-ray:{__version__}-cuda"}


def test_no_manifest_has_a_secret():
    text = "".join(path.read_text() for path in (ROOT / "cluster").rglob("*") if path.is_file())
    assert "kind: Secret" not in text and "AKIA" not in text
