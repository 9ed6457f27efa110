"""Checks of documents against the schemas of KubeRay 1.7.0 and of Kubernetes."""

import json
from collections.abc import Callable
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
