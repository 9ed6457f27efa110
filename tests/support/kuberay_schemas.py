"""Writes `lumen_ray/cluster/schemas.json` from the schemas of KubeRay in the test data.

    python tests/support/kuberay_schemas.py ../shared/data/kuberay > lumen_ray/cluster/schemas.json

Parts that occur more than once, such as a pod's template, are written once, under `$defs`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

KINDS = ("RayCluster", "RayJob", "RayService")
LEAST = 300  # characters of a part that is worth a reference


def read(folder: Path) -> dict[str, Any]:
    """Kind -> its schema."""
    return {kind: json.loads((folder / f"{kind}.schema.json").read_text()) for kind in KINDS}


def compact(schemas: dict[str, Any]) -> str:
    """The schemas as one JSON text, whose `$defs` have every kind by its name."""
    defs: dict[str, Any] = {}
    numbers: dict[str, str] = {}

    def shared(value: Any) -> Any:
        if isinstance(value, list):
            return [shared(item) for item in value]
        if not isinstance(value, dict):
            return value
        small = {key: shared(item) for key, item in value.items() if key != "$schema"}
        text = json.dumps(small, sort_keys=True)
        if len(text) < LEAST or not isinstance(small.get("type"), str):  # properties may have one called "type"
            return small
        if text not in numbers:
            numbers[text] = f"d{len(numbers)}"
            defs[numbers[text]] = small
        return {"$ref": f"#/$defs/{numbers[text]}"}

    kinds = {
        kind: {key: shared(item) for key, item in schema.items() if key != "$schema"}
        for kind, schema in schemas.items()
    }
    return json.dumps({"$defs": defs | kinds}, separators=(",", ":"), sort_keys=True) + "\n"


def expand(text: str) -> dict[str, Any]:
    """The schemas that `compact` was given, without `$schema`."""
    defs = json.loads(text)["$defs"]

    def whole(value: Any) -> Any:
        if isinstance(value, list):
            return [whole(item) for item in value]
        if not isinstance(value, dict):
            return value
        if "$ref" in value:
            return whole(defs[value["$ref"].rsplit("/", 1)[1]])
        return {key: whole(item) for key, item in value.items()}

    return {kind: whole(defs[kind]) for kind in KINDS}


if __name__ == "__main__":
    print(compact(read(Path(sys.argv[1]))), end="")
