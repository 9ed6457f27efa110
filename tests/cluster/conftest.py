"""Checks of documents against the schemas of KubeRay 1.7.0 and of Kubernetes."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

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


@pytest.fixture(scope="session")
def check(test_data) -> Callable[[dict[str, Any]], list[str]]:
    """A function that returns the mistakes in a document of KubeRay."""
    jsonschema = pytest.importorskip("jsonschema")
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


@pytest.fixture(scope="session")
def crds(test_data, tmp_path_factory) -> Path:
    """A file with KubeRay's CRDs as `kubectl get crd -o yaml` prints them, made of the schemas."""
    found = {
        kind: json.loads((test_data / "kuberay" / f"{kind}.schema.json").read_text())
        for kind in ("RayCluster", "RayJob", "RayService")
    }
    job = found["RayJob"]["properties"]["spec"]
    spec = CRON_JOB | {"properties": CRON_JOB["properties"] | {"jobTemplate": job}}
    found["RayCronJob"] = {"type": "object", "properties": found["RayJob"]["properties"] | {"spec": spec}}
    items = [
        {
            "kind": "CustomResourceDefinition",
            "spec": {
                "group": "ray.io",
                "names": {"kind": kind},
                "versions": [
                    {"name": "v1alpha1", "schema": {"openAPIV3Schema": {"type": "object"}}},
                    {"name": "v1", "schema": {"openAPIV3Schema": _as_in_a_crd(schema)}},
                ],
            },
        }
        for kind, schema in found.items()
    ]
    path = tmp_path_factory.mktemp("crds") / "crds.yaml"
    path.write_text(json.dumps({"kind": "List", "items": items}))  # YAML too, which is faster to read
    return path


def _as_in_a_crd(value: Any) -> Any:
    """A schema without what makes it strict, which CRDs do not have."""
    if isinstance(value, list):
        return [_as_in_a_crd(item) for item in value]
    if not isinstance(value, dict):
        return value
    strict = "properties" in value and value.get("additionalProperties") is False
    return {k: _as_in_a_crd(v) for k, v in value.items() if not (strict and k == "additionalProperties")}


@pytest.fixture(scope="session")
def check_kubernetes() -> Callable[[dict[str, Any]], list[str]]:
    """A function that returns the mistakes in a document of Kubernetes."""
    kubernetes_validate = pytest.importorskip("kubernetes_validate")

    def mistakes(document: dict[str, Any]) -> list[str]:
        try:
            kubernetes_validate.validate(document, KUBERNETES, strict=True)
        except kubernetes_validate.ValidationError as error:
            return [error.message]
        return []

    return mistakes
