"""The manifests of `cluster/kuberay`, and the jobs, Ray clusters and pods in them.

They lie in a checkout, or in its copy inside the installed package.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lumen_ray.cluster.kustomize import Document

OVERLAYS = ("kind", "eks", "gke", "none")


def manifest_folder(package: Path) -> Path:
    """The folder of the manifests for the package that lies in the folder `package`: that of the checkout, which has
    it beside the package, or package data of a wheel."""
    checkout = package.parent / "cluster" / "kuberay"
    if (package.parent / "pyproject.toml").is_file() and checkout.is_dir():
        return checkout
    return package / "kuberay"


FOLDER = manifest_folder(Path(__file__).resolve().parent.parent)


def variant_folder(overlay: str) -> Path:
    """The folder of a built-in overlay; of the base for "none"."""
    return FOLDER / "base" if overlay == "none" else FOLDER / "overlays" / overlay


def component_of(document: Document) -> str:
    """The part that a document is applied with: "common", or the name of a job or service."""
    return document["metadata"]["labels"]["app.kubernetes.io/component"]


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


def group(spec: Document, name: str) -> Document:
    """A group of workers of a Ray cluster."""
    [found] = [workers for workers in spec["workerGroupSpecs"] if workers["groupName"] == name]
    return found


def templates(document: Document) -> Iterator[tuple[str, Document]]:
    """(group, template) of every pod of a document; the group is "head", "submitter", "deployment", or workers'."""
    if spec := ray_cluster_of(document):
        yield "head", spec["headGroupSpec"]["template"]
        for workers in spec["workerGroupSpecs"]:
            yield workers["groupName"], workers["template"]
    if job := job_of(document):
        yield "submitter", job["submitterPodTemplate"]
    if document["kind"] == "Deployment":
        yield "deployment", document["spec"]["template"]


def container(template: Document) -> Document:
    """The container of Ray in a pod's template, its first."""
    return template["spec"]["containers"][0]


def quantity(text: Any) -> float:
    """A Kubernetes quantity as a number: "500m", "16Gi", "8"."""
    units = {"m": 1e-3, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}
    for unit, factor in units.items():
        if str(text).endswith(unit):
            return float(str(text)[: -len(unit)]) * factor
    return float(text)
