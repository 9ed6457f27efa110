"""Checks documents of KubeRay, whose API server would drop unknown fields silently, against the schemas of 1.7.0.

`schemas.json` is made by `tests/support/kuberay_schemas.py`.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

from lumen_ray.cluster.kustomize import Document
from lumen_ray.errors import UserError, suggest

FILE = Path(__file__).resolve().parent / "schemas.json"
#: the spec of a RayCronJob, besides that of its job, which KubeRay's other kinds have
_CRON_JOB = {
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


def check(document: Document) -> None:
    """Raises `UserError` for a field of a document of KubeRay that its kind does not have, or that has a wrong value.

    Documents of Kubernetes itself are left to its API server, which refuses unknown fields.
    """
    if not str(document.get("apiVersion", "")).startswith("ray.io/"):
        return
    kind, spec = document["kind"], document["spec"]
    parts = [(_validator(kind), document)]
    if kind == "RayCronJob":
        parts = [(_validator(kind), spec), (_validator("RayJob/properties/spec"), spec.get("jobTemplate", {}))]
    for validator, part in parts:
        for error in validator.iter_errors(part):
            raise UserError(f"{kind} '{document['metadata']['name']}': {_sentence(error)}", "invalid_manifest")


def _sentence(error: Any) -> str:
    place = error.json_path.removeprefix("$").lstrip(".")
    if error.validator == "additionalProperties":
        known = error.schema.get("properties", {})
        field = next(key for key in error.instance if key not in known)
        where = f"{place} has" if place else "it has"
        return f"{where} no field '{field}';{suggest(field, known)}".rstrip(";")
    told = error.message if len(error.message) < 200 else f"a value that '{error.validator}' refuses"
    return f"{place}: {told}"


@cache
def _validator(place: str) -> Any:
    """The validator of a place in the schemas."""
    import jsonschema

    schemas = json.loads(FILE.read_text(encoding="utf-8"))
    schemas["$defs"]["RayCronJob"] = _CRON_JOB
    return jsonschema.Draft202012Validator({"$ref": f"#/$defs/{place}"} | schemas)
