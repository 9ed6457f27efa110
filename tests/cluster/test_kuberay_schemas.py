"""Every manifest against the schemas of KubeRay 1.7.0 and of Kubernetes, which refuse unknown keys."""

import copy
import json
import shutil
import subprocess
from collections.abc import Callable
from typing import Any

import pytest
import yaml
from support.manifests import VARIANTS, documents, pods

jsonschema = pytest.importorskip("jsonschema")
#: keys of a RayCronJob's spec in 1.7.0 besides the spec of its job; its schema is not in the test data
CRON_JOB = {
    "type": "object",
    "required": ["schedule", "jobTemplate"],
    "properties": {
        "schedule": {"type": "string", "pattern": r"^(\S+ ){4}\S+$"},
        "timeZone": {"type": "string"},
        "suspend": {"type": "boolean"},
        "jobTemplate": {"type": "object"},
    },
    "additionalProperties": False,
}
KUBERNETES = "1.34"


@pytest.fixture(scope="module")
def check(test_data) -> Callable[[dict[str, Any]], list[str]]:
    """A function that returns the mistakes in a document of KubeRay."""
    schemas = {
        kind: json.loads((test_data / "kuberay" / f"{kind}.schema.json").read_text())
        for kind in ("RayCluster", "RayJob", "RayService")
    }

    def mistakes(document: dict[str, Any]) -> list[str]:
        if document["kind"] == "RayCronJob":
            assert document["apiVersion"] == "ray.io/v1" and set(document) == {"apiVersion", "kind", "metadata", "spec"}
            parts = [(CRON_JOB, document["spec"])]
            parts += [(schemas["RayJob"]["properties"]["spec"], document["spec"]["jobTemplate"])]
        else:
            parts = [(schemas[document["kind"]], document)]
        return [
            f"{error.json_path}: {error.message}"
            for schema, part in parts
            for error in jsonschema.Draft202012Validator(schema).iter_errors(part)
        ]

    return mistakes


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
def test_other_documents_and_all_pods_fit_the_schemas_of_kubernetes(variant):
    kubernetes_validate = pytest.importorskip("kubernetes_validate")
    rest = [d for d in documents(variant) if not of_ray(d)]
    assert {d["kind"] for d in rest} == {
        *("Namespace", "PersistentVolumeClaim", "NetworkPolicy", "PodDisruptionBudget"),
    }
    for document in rest:
        kubernetes_validate.validate(document, KUBERNETES, strict=True)
    for _, template in pods(variant):
        document = {"apiVersion": "v1", "kind": "PodTemplate", "metadata": {"name": "a"}, "template": template}
        kubernetes_validate.validate(document, KUBERNETES, strict=True)
    with pytest.raises(kubernetes_validate.ValidationError, match="replcias"):
        kubernetes_validate.validate(document | {"replcias": 1}, KUBERNETES, strict=True)


@pytest.mark.parametrize("variant", VARIANTS)
def test_kubectl_renders_the_same(variant):
    kubectl = shutil.which("kubectl")
    if kubectl is None:
        pytest.skip("kubectl is not installed; the renderer of the tests stands alone")
    done = subprocess.run([kubectl, "kustomize", VARIANTS[variant]], capture_output=True, text=True, timeout=60)
    if "unknown command" in done.stderr:
        pytest.skip("this kubectl has no kustomize")
    assert done.returncode == 0, done.stderr

    def by_name(found: Any) -> dict[tuple[str, str], Any]:
        return {(d["kind"], d["metadata"]["name"]): d for d in found}

    assert by_name(yaml.safe_load_all(done.stdout)) == by_name(documents(variant))
