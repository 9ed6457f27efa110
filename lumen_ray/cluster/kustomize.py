"""Renders a kustomization as `kubectl kustomize` does, for the part of it that `cluster/kuberay` uses.

Anything else, a key, an operation or a path that it does not know, raises `UserError`: what is rendered here is what
kubectl renders.
"""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field

from lumen_ray import config
from lumen_ray.config import Settings
from lumen_ray.errors import UserError

Document = dict[str, Any]
CLUSTER_WIDE = {"Namespace", "ClusterRole", "ClusterRoleBinding"}


class Selector(Settings):
    """The documents of a kind, or of a kind and name."""

    kind: str | None = None
    name: str | None = Field(None, pattern=r"^[\w-]+$")  # other patterns differ between patches and replacements


class Patch(Settings):
    """JSON patch operations, in `patch` or in a file."""

    target: Selector
    patch: str | None = None
    path: str | None = None


class Operation(Settings):
    """An operation of a JSON patch (RFC 6902)."""

    op: Literal["add", "replace", "remove"]
    path: str = Field(pattern="^/")
    value: Any = None


class Image(Settings):
    """Another name or tag for an image."""

    name: str
    newName: str | None = None
    newTag: str | None = None


class Source(Selector):
    """A field of one document."""

    fieldPath: str


class Options(Settings):
    """create: whether fields that are not there are made."""

    create: Literal[True]


class Target(Settings):
    """The fields that a replacement sets."""

    select: Selector
    reject: tuple[Selector, ...] = ()
    fieldPaths: tuple[str, ...]
    options: Options


class Replacement(Settings):
    """Copies a field of one document into others."""

    source: Source
    targets: tuple[Target, ...]


class Kustomization(Settings):
    """A kustomization.yaml."""

    apiVersion: str = "kustomize.config.k8s.io/v1beta1"
    kind: Literal["Kustomization", "Component"] = "Kustomization"
    namespace: str | None = None
    resources: tuple[str, ...] = ()
    components: tuple[str, ...] = ()
    images: tuple[Image, ...] = ()
    patches: tuple[Patch, ...] = ()
    replacements: tuple[Replacement, ...] = ()


def render(folder: Path) -> list[Document]:
    """The documents of a kustomization, in the order of its resources. Raises `UserError`."""
    return apply(folder, [])


def apply(folder: Path, documents: list[Document]) -> list[Document]:
    """`documents` of the kustomization that lists this folder as a component, and its own; in kustomize's order:
    resources, components, patches, namespace, images, replacements. Raises `UserError`."""
    path = folder / "kustomization.yaml"
    given = config.validate(Kustomization, config.load_yaml(path, "kustomization"), str(path))
    for name in given.resources:
        documents += apply(folder / name, []) if (folder / name).is_dir() else _load(folder / name)
    for name in given.components:
        documents = apply(folder / name, documents)
    for patch in given.patches:
        _apply_patch(documents, patch, folder)
    if given.namespace:
        set_namespace(documents, given.namespace)
    for image in given.images:
        _set_image(documents, image)
    for replacement in given.replacements:
        _replace(documents, replacement, str(path))
    return documents


def set_namespace(documents: list[Document], namespace: str) -> None:
    """Puts all documents into a namespace; a document that is one gets its name."""
    for document in documents:
        if document["kind"] not in CLUSTER_WIDE:
            document["metadata"]["namespace"] = namespace
        elif document["kind"] == "Namespace":
            document["metadata"]["name"] = namespace
        for subject in document.get("subjects", []):
            subject["namespace"] = namespace


def _load(path: Path) -> list[Document]:
    # without shared values, so that no two places change when one that both anchors stand for does
    return [_unshared(document) for document in _parse(_read(path), str(path), yaml.safe_load_all)]


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        raise _error(f"{path} is not a file that can be read as text") from None


def _parse(text: str, origin: str, load: Any = yaml.safe_load) -> Any:
    try:
        return list(load(text)) if load is yaml.safe_load_all else load(text)
    except yaml.YAMLError as error:
        raise _error(f"{origin} is not valid YAML: {str(error).splitlines()[0]}") from None


def _error(message: str) -> UserError:
    return UserError(message, "invalid_overlay")


def _unshared(value: Any) -> Any:
    """The same value without parts that occur in it more than once, as YAML's aliases make them."""
    if isinstance(value, dict):
        return {key: _unshared(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_unshared(item) for item in value]
    return value


def _select(documents: list[Document], selector: Selector) -> list[Document]:
    return [
        document
        for document in documents
        if selector.kind in (None, document["kind"]) and selector.name in (None, document["metadata"]["name"])
    ]


def _named(selector: Selector) -> str:
    return str(selector.model_dump(include={"kind", "name"}, exclude_none=True))


def _apply_patch(documents: list[Document], patch: Patch, folder: Path) -> None:
    origin = str(folder / "kustomization.yaml")
    if (patch.patch is None) == (patch.path is None):
        raise _error(f"{origin}: a patch has either 'patch' or 'path'")
    text = patch.patch if patch.patch is not None else _read(folder / str(patch.path))
    operations = _parse(text, origin)
    if not isinstance(operations, list):
        raise _error(f"{origin}: a patch is a list of operations with op, path and value")
    targets = _select(documents, patch.target)
    if not targets:
        raise _error(f"{origin}: no document matches {_named(patch.target)}")
    for operation in [config.validate(Operation, each, f"{origin}: patch") for each in operations]:
        for document in targets:
            _change(document, operation)


def _change(document: Document, operation: Operation) -> None:
    *parents, last = [step.replace("~1", "/").replace("~0", "~") for step in operation.path.split("/")[1:]]
    here: Any = document
    try:
        for step in parents:
            here = here[int(step) if isinstance(here, list) else step]
        key: Any = int(last) if isinstance(here, list) else last
        if operation.op != "add":
            here[key]  # must exist
    except (KeyError, IndexError, ValueError, TypeError):
        name = f"{document['kind']} {document['metadata']['name']}"
        raise _error(f"{name} has no {operation.path}") from None
    if operation.op == "remove":
        del here[key]
    elif operation.op == "add" and isinstance(here, list):
        raise _error(f"patch: add in a list is not supported: {operation.path}")
    else:
        here[key] = _unshared(operation.value)


def _set_image(value: Any, image: Image) -> None:
    """Sets the image of a name in all lists `containers` and `initContainers`, at any depth."""
    if isinstance(value, list):
        for item in value:
            _set_image(item, image)
    elif isinstance(value, dict):
        for key, item in value.items():
            if key in ("containers", "initContainers") and isinstance(item, list):
                for container in item:
                    name, _, tag = container["image"].partition(":")
                    if name == image.name:
                        tag = tag if image.newTag is None else image.newTag
                        container["image"] = (image.newName or name) + (f":{tag}" if tag else "")
            _set_image(item, image)


def _replace(documents: list[Document], replacement: Replacement, origin: str) -> None:
    """Copies a field of one document into others; fields that are not there are made."""
    sources = _select(documents, replacement.source)
    if len(sources) != 1:
        raise _error(f"{origin}: {len(sources)} documents match {_named(replacement.source)}")
    value: Any = sources[0]
    for step in _steps(replacement.source.fieldPath):
        value = _step(value, step, origin)
    for target in replacement.targets:
        rejected = [id(d) for selector in target.reject for d in _select(documents, selector)]
        for document in _select(documents, target.select):
            if id(document) in rejected:
                continue
            for path in target.fieldPaths:
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
        raise _error(f"{origin}: there is no {step}") from None
    return found
