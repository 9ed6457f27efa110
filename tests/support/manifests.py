"""The manifests below `cluster/kuberay`, and the Ray clusters and pods in them."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

from support.kustomize import Document, render

ROOT = Path(__file__).resolve().parents[2]
KUBERAY = ROOT / "cluster" / "kuberay"
VARIANTS = {"base": KUBERAY / "base"} | {path.name: path for path in sorted((KUBERAY / "overlays").iterdir())}


@cache
def documents(variant: str) -> tuple[Document, ...]:
    """What an overlay, or the base, renders to; not to be changed."""
    return tuple(render(VARIANTS[variant]))


def document(variant: str, kind: str, name: str) -> Document:
    [found] = [d for d in documents(variant) if (d["kind"], d["metadata"]["name"]) == (kind, name)]
    return found


def job_of(document: Document) -> Document | None:
    """The spec of the job of a RayJob or RayCronJob."""
    if document["kind"] == "RayCronJob":
        return document["spec"]["jobTemplate"]
    return document["spec"] if document["kind"] == "RayJob" else None


def ray_cluster_of(document: Document) -> Document | None:
    """The spec of the Ray cluster that a document has or makes."""
    if document["kind"] == "RayCluster":
        return document["spec"]
    if document["kind"] == "RayService":
        return document["spec"]["rayClusterConfig"]
    job = job_of(document)
    return job and job["rayClusterSpec"]


def ray_clusters(variant: str) -> Iterator[tuple[str, Document]]:
    """(name, spec of its Ray cluster) of every document that has one."""
    for found in documents(variant):
        if spec := ray_cluster_of(found):
            yield found["metadata"]["name"], spec


def group(spec: Document, name: str) -> Document:
    """A group of workers of a Ray cluster."""
    [found] = [g for g in spec["workerGroupSpecs"] if g["groupName"] == name]
    return found


def pods(variant: str) -> Iterator[tuple[str, Document]]:
    """("name/group", template) of every pod; the group is "head", that of workers, or "submitter"."""
    for found in documents(variant):
        name = found["metadata"]["name"]
        if spec := ray_cluster_of(found):
            yield f"{name}/head", spec["headGroupSpec"]["template"]
            for workers in spec["workerGroupSpecs"]:
                yield f"{name}/{workers['groupName']}", workers["template"]
        if job := job_of(found):
            yield f"{name}/submitter", job["submitterPodTemplate"]


def container(template: Document) -> Document:
    [found] = template["spec"]["containers"]
    return found


def quantity(text: Any) -> float:
    """A Kubernetes quantity as a number: "500m", "16Gi", "8"."""
    units = {"m": 1e-3, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}
    for unit, factor in units.items():
        if str(text).endswith(unit):
            return float(str(text)[: -len(unit)]) * factor
    return float(text)
