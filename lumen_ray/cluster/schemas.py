"""Checks documents of KubeRay for unknown fields and wrong values, against the CRDs of the cluster they are for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from lumen_ray.cluster.kustomize import Document
from lumen_ray.errors import UserError, suggest

_GROUP, _VERSION = "ray.io", "v1"
_FREE = "x-kubernetes-preserve-unknown-fields"
#: real CRDs have tens of thousands of lines
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_NUMBER_OR_TEXT = "x-kubernetes-int-or-string"


class Schemas:
    """The schemas of KubeRay's kinds, from what `kubectl get crd -o yaml` prints of them (or `-o json`).

    Kubernetes' documents are left to its API server. Raises `UserError` (`invalid_crds`) for a file without the CRDs.
    """

    def __init__(self, path: Path):
        try:
            text = path.read_text(encoding="utf-8")
            found = list(yaml.load_all(text, _LOADER))
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise _wrong(path, str(error).splitlines()[0]) from None
        self._kinds: dict[str, Any] = {}
        for document in found:
            for crd in (document or {}).get("items", [document]) if isinstance(document, dict) else ():
                self._add(crd)
        if not self._kinds:
            raise _wrong(path, f"no kind of {_GROUP}/{_VERSION} is in it")
        self._path = path

    def _add(self, crd: dict[str, Any]) -> None:
        spec = crd.get("spec", {})
        if spec.get("group") != _GROUP:
            return
        for version in spec.get("versions", ()):
            if version.get("name") == _VERSION:
                self._kinds[spec["names"]["kind"]] = strict(version["schema"]["openAPIV3Schema"])

    def check(self, document: Document) -> None:
        """Raises `UserError` for a field that its kind does not have, or that has a wrong value."""
        import jsonschema

        if not str(document.get("apiVersion", "")).startswith(f"{_GROUP}/"):
            return
        kind = document["kind"]
        if kind not in self._kinds:
            raise _wrong(self._path, f"it has no {kind}")
        for error in jsonschema.Draft202012Validator(self._kinds[kind]).iter_errors(document):
            raise UserError(f"{kind} '{document['metadata']['name']}': {_sentence(error)}", "invalid_manifest")


def _wrong(path: Path, why: str) -> UserError:
    return UserError(
        f"--crds '{path}' cannot be used: {why}; write it with: kubectl get crd rayclusters.ray.io rayjobs.ray.io "
        "rayservices.ray.io raycronjobs.ray.io -o yaml",
        "invalid_crds",
    )


def strict(schema: Any) -> Any:
    """A schema of a CRD as JSON Schema in which objects have no other fields than those named."""
    if isinstance(schema, list):
        return [strict(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    if schema.get(_NUMBER_OR_TEXT):
        return {"type": ["integer", "string"]}
    made = {key: value for key, value in schema.items() if not key.startswith("x-kubernetes-")}
    for key in ("items", "additionalProperties"):
        if key in made:
            made[key] = strict(made[key])
    if "properties" in made:
        made["properties"] = {name: strict(part) for name, part in made["properties"].items()}
        if not schema.get(_FREE):
            made.setdefault("additionalProperties", False)
    return made


def _sentence(error: Any) -> str:
    place = error.json_path.removeprefix("$").lstrip(".")
    if error.validator == "additionalProperties":
        known = error.schema.get("properties", {})
        field = next(key for key in error.instance if key not in known)
        where = f"{place} has" if place else "it has"
        return f"{where} no field '{field}';{suggest(field, known)}".rstrip(";")
    told = error.message if len(error.message) < 200 else f"a value that '{error.validator}' refuses"
    return f"{place}: {told}"
