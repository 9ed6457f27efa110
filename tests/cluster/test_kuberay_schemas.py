"""Every manifest against the schemas of KubeRay 1.7.0 and of Kubernetes, which refuse unknown keys."""

import copy
import os
import shutil
import subprocess
from typing import Any

import pytest
import yaml
from support.manifests import VARIANTS, documents, pods

from lumen_ray.cluster.kustomize import render
from lumen_ray.cluster.manifests import FOLDER, ray_cluster_of


def of_ray(document: dict[str, Any]) -> bool:
    return document["apiVersion"].startswith("ray.io/")


@pytest.mark.parametrize("variant", VARIANTS)
def test_documents_of_kuberay_fit_its_schemas(variant, check):
    kinds = {"RayCluster", "RayJob", "RayCronJob", "RayService"}
    assert {d["kind"] for d in documents(variant) if of_ray(d)} == kinds
    assert [(d["metadata"]["name"], check(d)) for d in documents(variant) if of_ray(d) and check(d)] == []


@pytest.mark.parametrize("kind", ["RayCluster", "RayJob", "RayCronJob", "RayService"])
def test_unknown_keys_anywhere_are_mistakes(kind, check):
    document = next(d for d in documents("base") if d["kind"] == kind)

    def places(value: Any, path: tuple) -> list[tuple]:
        """Every mapping that is no free map of labels and the like."""
        free = ("labels", "annotations", "nodeSelector", "requests", "limits", "rayStartParams", "metadata")
        found = []
        if isinstance(value, dict):
            found.append(path)
            for key, item in value.items():
                found += places(item, (*path, key)) if key not in free else []
        elif isinstance(value, list):
            for n, item in enumerate(value):
                found += places(item, (*path, n))
        return found

    every = places(document["spec"], ("spec",))
    assert len(every) > 40
    for path in every:
        changed = copy.deepcopy(document)
        here = changed
        for step in path:
            here = here[step]
        here["replcias"] = 1
        assert any("replcias" in mistake for mistake in check(changed)), path


@pytest.mark.parametrize("variant", VARIANTS)
def test_other_documents_and_all_pods_fit_the_schemas_of_kubernetes(variant, check_kubernetes):
    rest = [d for d in documents(variant) if not of_ray(d)]
    assert {d["kind"] for d in rest} == {
        *("Namespace", "PersistentVolumeClaim", "NetworkPolicy", "PodDisruptionBudget"),
    }
    assert [check_kubernetes(document) for document in rest] == [[]] * len(rest)
    for _, template in pods(variant):
        document = {"apiVersion": "v1", "kind": "PodTemplate", "metadata": {"name": "a"}, "template": template}
        assert check_kubernetes(document) == []
    assert "replcias" in check_kubernetes(document | {"replcias": 1})[0]


@pytest.fixture(scope="module")
def with_history(tmp_path_factory):
    """An overlay of the base with the history server."""
    folder = tmp_path_factory.mktemp("history")
    base, history = (os.path.relpath(FOLDER / name, folder) for name in ("base", "history"))
    (folder / "kustomization.yaml").write_text(yaml.safe_dump({"resources": [base], "components": [history]}))
    return folder


def test_the_history_server_is_a_component_of_any_overlay(with_history, check, check_kubernetes):
    found = render(with_history)
    assert [(check if of_ray(d) else check_kubernetes)(d) for d in found] == [[]] * len(found)
    [server] = [d for d in found if d["kind"] == "Deployment"]
    environment = server["spec"]["template"]["spec"]["containers"][0]["env"]
    specs = [spec for spec in map(ray_cluster_of, found) if spec]
    assert len(specs) == 7
    assert all(spec["historyServerOptions"]["collectorOptions"]["env"] == environment for spec in specs)


@pytest.mark.parametrize("variant", [*VARIANTS, "history"])
def test_kubectl_renders_the_same(variant, with_history):
    kubectl = shutil.which("kubectl")
    if kubectl is None:
        pytest.skip("kubectl is not installed; the renderer of the package stands alone")
    folder = VARIANTS.get(variant, with_history)
    done = subprocess.run([kubectl, "kustomize", folder], capture_output=True, text=True, timeout=60)
    if "unknown command" in done.stderr:
        pytest.skip("this kubectl has no kustomize")
    assert done.returncode == 0, done.stderr

    def by_name(found: Any) -> dict[tuple[str, str], Any]:
        return {(d["kind"], d["metadata"]["name"]): d for d in found}

    assert by_name(yaml.safe_load_all(done.stdout)) == by_name(render(folder))
