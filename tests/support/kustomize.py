"""Renders a kustomization as `kubectl kustomize` does, for the part of it that `cluster/kuberay` uses.

Anything else, a key, an operation or a path that it does not know, raises `KustomizeError`: what is rendered here is
what kubectl renders.
"""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import yaml

Document = dict[str, Any]
KEYS = {"apiVersion", "kind", "namespace", "resources", "components", "images", "patches", "replacements"}
CLUSTER_WIDE = {"Namespace"}


class KustomizeError(ValueError):
    """A kustomization that kubectl would refuse, or that is not supported here."""


def render(folder: Path) -> list[Document]:
    """The documents of a kustomization, in the order of its resources."""
    return _build(folder, [])


def _build(folder: Path, documents: list[Document]) -> list[Document]:
    """`documents` of the kustomization that lists this folder as a component, and its own; in kustomize's order:
    resources, components, patches, namespace, images, replacements."""
    path = folder / "kustomization.yaml"
    if not path.is_file():
        raise KustomizeError(f"{path} does not exist")
    given = yaml.safe_load(path.read_text(encoding="utf-8"))
    _check_keys(given, KEYS, str(path))
    for name in given.get("resources", []):
        documents += _build(folder / name, []) if (folder / name).is_dir() else _load(folder / name)
    for name in given.get("components", []):
        documents = _build(folder / name, documents)
    for patch in given.get("patches", []):
        _check_keys(patch, {"path", "patch", "target"}, str(path))
        text = patch["patch"] if "patch" in patch else (folder / patch["path"]).read_text(encoding="utf-8")
        targets = _select(documents, patch["target"])
        if not targets:
            raise KustomizeError(f"{path}: no document matches {patch['target']}")
        for document in targets:
            for operation in yaml.safe_load(text):
                _patch(document, operation)
    if namespace := given.get("namespace"):
        for document in documents:
            if document["kind"] not in CLUSTER_WIDE:
                document["metadata"]["namespace"] = namespace
            elif document["kind"] == "Namespace":
                document["metadata"]["name"] = namespace
    for image in given.get("images", []):
        _check_keys(image, {"name", "newName", "newTag"}, str(path))
        _set_image(documents, image)
    for replacement in given.get("replacements", []):
        _check_keys(replacement, {"source", "targets"}, str(path))
        _replace(documents, replacement, str(path))
    return documents


def _load(path: Path) -> list[Document]:
    # from text each time, so that no two documents share a value that both anchors stand for
    documents = [copy.deepcopy(d) for d in yaml.safe_load_all(path.read_text(encoding="utf-8"))]
    return [_unshared(document) for document in documents]


def _unshared(value: Any) -> Any:
    """The same value without parts that occur in it more than once, as YAML's aliases make them."""
    if isinstance(value, dict):
        return {key: _unshared(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_unshared(item) for item in value]
    return value


def _check_keys(given: Document, known: set[str], origin: str) -> None:
    if unknown := given.keys() - known:
        raise KustomizeError(f"{origin}: not supported: {', '.join(sorted(unknown))}")


def _select(documents: list[Document], selector: Document) -> list[Document]:
    """The documents of a kind, or of a kind and name."""
    _check_keys(selector, {"kind", "name"}, "selector")
    if not re.fullmatch(r"[\w-]*", selector.get("name", "")):  # patterns differ between patches and replacements
        raise KustomizeError(f"selector: not supported: name {selector['name']}")
    return [
        document
        for document in documents
        if selector.get("kind", document["kind"]) == document["kind"]
        and selector.get("name", document["metadata"]["name"]) == document["metadata"]["name"]
    ]


def _patch(document: Document, operation: Document) -> None:
    """JSON patch (RFC 6902): add, replace and remove."""
    _check_keys(operation, {"op", "path", "value"}, "patch")
    *parents, last = [step.replace("~1", "/").replace("~0", "~") for step in operation["path"].split("/")[1:]]
    here: Any = document
    try:
        for step in parents:
            here = here[int(step) if isinstance(here, list) else step]
        key: Any = int(last) if isinstance(here, list) else last
        if operation["op"] != "add":
            here[key]  # must exist
    except (KeyError, IndexError, ValueError):
        name = f"{document['kind']} {document['metadata']['name']}"
        raise KustomizeError(f"{name} has no {operation['path']}") from None
    if operation["op"] == "remove":
        del here[key]
    elif operation["op"] in ("add", "replace") and isinstance(here, dict) | (operation["op"] == "replace"):
        here[key] = _unshared(operation["value"])
    else:
        raise KustomizeError(f"patch: not supported: {operation['op']} in a list")


def _set_image(value: Any, image: Document) -> None:
    """Sets the image of a name in all lists `containers` and `initContainers`, at any depth."""
    if isinstance(value, list):
        for item in value:
            _set_image(item, image)
    elif isinstance(value, dict):
        for key, item in value.items():
            if key in ("containers", "initContainers") and isinstance(item, list):
                for container in item:
                    name, _, tag = container["image"].partition(":")
                    if name == image["name"]:
                        tag = image.get("newTag", tag)
                        container["image"] = image.get("newName", name) + (f":{tag}" if tag else "")
            _set_image(item, image)


def _replace(documents: list[Document], replacement: Document, origin: str) -> None:
    """Copies a field of one document into others; fields that are not there are made."""
    source = dict(replacement["source"])
    steps = _steps(source.pop("fieldPath"))
    sources = _select(documents, source)
    if len(sources) != 1:
        raise KustomizeError(f"{origin}: {len(sources)} documents match {source}")
    value: Any = sources[0]
    for step in steps:
        value = _step(value, step, origin)
    for target in replacement["targets"]:
        _check_keys(target, {"select", "reject", "fieldPaths", "options"}, origin)
        if target["options"] != {"create": True}:
            raise KustomizeError(f"{origin}: not supported: options {target['options']}")
        rejected = [id(d) for selector in target.get("reject", []) for d in _select(documents, selector)]
        for document in _select(documents, target["select"]):
            if id(document) in rejected:
                continue
            for path in target["fieldPaths"]:
                *parents, last = _steps(path)
                here: Any = document
                for step in parents:
                    here = _step(here, step, origin)
                here[last] = copy.deepcopy(value)


def _steps(path: str) -> list[str]:
    """`spec.groups.[name=a].template` as its steps."""
    return re.findall(r"\[[^\]]*\]|[^.\[\]]+", path)


def _step(value: Any, step: str, origin: str) -> Any:
    try:
        if not step.startswith("["):
            return value[step]
        key, _, wanted = step[1:-1].partition("=")
        [found] = [item for item in value if item[key] == wanted]
    except (KeyError, ValueError, TypeError):
        raise KustomizeError(f"{origin}: there is no {step}") from None
    return found
