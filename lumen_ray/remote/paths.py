"""Whether a cluster can see the files that a command names."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from lumen_ray.data.urls import is_url
from lumen_ray.errors import UserError
from lumen_ray.remote.working_dir import WorkingDir

#: where the manifests in `cluster/` mount shared storage
SHARED = ("/data", "/models")
SHARED_VARIABLE = "LUMEN_RAY_SHARED"


def shared_folders(given: Sequence[str]) -> tuple[str, ...]:
    """Folders that all nodes see: those `given`, else of `LUMEN_RAY_SHARED`, separated by colons, else `SHARED`."""
    named = [*given] or [name for name in os.environ.get(SHARED_VARIABLE, "").split(os.pathsep) if name]
    for name in named:
        if not os.path.isabs(name):
            raise UserError(f"--shared '{name}' must be an absolute path, the same on all nodes", "usage")
    return tuple(os.path.normpath(name) for name in named) or SHARED


def check_visible(arguments: Mapping[str, Any], packed: WorkingDir | None, shared: Sequence[str]) -> None:
    """Raises `UserError` for a path that the cluster cannot see.

    arguments: names and values of a parsed command line, of which texts that are absolute, or that exist here, are
    paths. URLs, and paths below a folder of `shared`, are seen; relative ones are if they are `packed`, but for the
    output: what a job writes into its own folder is lost with it.
    """
    for name, value in _texts(arguments):
        if is_url(value) or _is_below(value, shared):
            continue
        if name == "output":
            raise UserError(
                f"--output {value} would be written on a node of the cluster and lost; give a bucket, or a folder "
                f"below {_either(shared)}, which all nodes see (--shared names others)",
                "invisible_output",
            )
        if os.path.isabs(value):
            raise UserError(
                f"the cluster cannot see {value}; give a bucket, or a path below {_either(shared)}, which all nodes "
                "see (--shared names others), or a relative path in the working directory",
                "invisible_path",
            )
        if os.path.exists(value) and not (packed is not None and packed.holds(value)):
            where = f"in the files sent from {packed.root}" if packed else "sent, with --working-dir none"
            raise UserError(
                f"{value} is not {where}, so the cluster cannot see it; send it along, or move it to a bucket or below "
                f"{_either(shared)}",
                "unpacked_path",
            )


def _texts(arguments: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for name, value in arguments.items():
        for each in value if isinstance(value, list | tuple) else [value]:
            if isinstance(each, str | os.PathLike) and os.fspath(each):
                yield name, str(each)


def _is_below(path: str, folders: Sequence[str]) -> bool:
    whole = os.path.normpath(path.removeprefix("file://"))
    return any(whole == folder or whole.startswith(folder.rstrip("/") + "/") for folder in folders)


def _either(folders: Sequence[str]) -> str:
    return " or ".join(folders)
