"""The manifests below `cluster/kuberay`, rendered, and the Ray clusters and pods in them."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from pathlib import Path

from lumen_ray.cluster.kustomize import Document, render
from lumen_ray.cluster.manifests import OVERLAYS, ray_cluster_of, templates, variant_folder

ROOT = Path(__file__).resolve().parents[2]
VARIANTS = {"base" if overlay == "none" else overlay: variant_folder(overlay) for overlay in OVERLAYS}


@cache
def documents(variant: str) -> tuple[Document, ...]:
    """What an overlay, or the base, renders to; not to be changed."""
    return tuple(render(VARIANTS[variant]))


def document(variant: str, kind: str, name: str) -> Document:
    [found] = [d for d in documents(variant) if (d["kind"], d["metadata"]["name"]) == (kind, name)]
    return found


def ray_clusters(variant: str) -> Iterator[tuple[str, Document]]:
    """(name, spec of its Ray cluster) of every document that has one."""
    for found in documents(variant):
        if spec := ray_cluster_of(found):
            yield found["metadata"]["name"], spec


def pods(variant: str) -> Iterator[tuple[str, Document]]:
    """("name/group", template) of every pod."""
    for found in documents(variant):
        for name, template in templates(found):
            yield f"{found['metadata']['name']}/{name}", template
