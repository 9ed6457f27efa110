"""Locations of files and folders: local paths, ``s3://``, ``gs://`` and any other URL. Nothing here accesses a store.

A location is a plain string, so that it pickles and prints. The key after ``scheme://bucket/`` is taken literally:
image names with blanks, ``%`` or ``#`` need no quoting. Settings of the store follow a ``?`` at the end, as in pyarrow:
``s3://bucket/folder?region=eu-west-1&endpoint_override=localhost:9000&scheme=http``; ``s3://anonymous@bucket/folder``
reads a public bucket without credentials.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path

Location = str | os.PathLike[str]
NATIVE = ("s3", "gs", "gcs")  # stores with a file system in pyarrow, which takes settings
_URL = re.compile(r"^([a-z][a-z0-9+.-]+)://(.*)$", re.DOTALL)
_SETTINGS = re.compile(r"^(.*)\?((?:[a-z_]+=[^&?/]*)(?:&[a-z_]+=[^&?]*)*)$", re.DOTALL)


def is_url(location: Location) -> bool:
    """Whether it is the URL of a store, not a local path (``file://`` is local)."""
    match = _URL.match(str(location))
    return match is not None and match[1] != "file"


def split(location: Location) -> tuple[str, str, str]:
    """(scheme, path without settings, settings); scheme "" for local paths."""
    text = os.fspath(location)
    match = _URL.match(text)
    if not match:
        return "", text, ""
    scheme, path = match.groups()
    if scheme == "file":
        return "", path, ""
    settings = _SETTINGS.match(path) if scheme in NATIVE else None
    return (scheme, settings[1], settings[2]) if settings else (scheme, path, "")


def url_of(scheme: str, path: str, settings: str) -> str:
    """The location with these parts, the inverse of `split`."""
    return (f"{scheme}://{path}" if scheme else path) + (f"?{settings}" if settings else "")


def shown(location: Location) -> str:
    """The location for messages and records: without the store's settings and credentials."""
    scheme, path, _ = split(location)
    if not scheme:
        return path
    bucket, slash, key = path.partition("/")
    return f"{scheme}://{bucket.rpartition('@')[2]}{slash}{key}"


def absolute(location: Location) -> str:
    """The location in a form valid in any process of the cluster; a URL loses a trailing slash."""
    scheme, path, settings = split(location)
    return url_of(scheme, path.rstrip("/"), settings) if scheme else str(Path(path).expanduser().absolute())


def join(folder: Location, *names: str) -> str:
    """`names` below `folder`; a name that is itself absolute or a URL replaces the folder, as in `os.path.join`."""
    scheme, path, settings = split(folder)
    for name in names:
        if is_url(name):
            return name
        if scheme:
            path = f"{path.rstrip('/')}/{name.lstrip('/')}"
        else:
            path = os.path.join(path, name)
    return url_of(scheme, path, settings)


def base_name(location: Location) -> str:
    """The last component: ``"s3://b/x/train.json?region=r" -> "train.json"``."""
    return split(location)[1].replace("\\", "/").rstrip("/").rsplit("/", 1)[-1]


def map_path(location: Location, change: Callable[[str], str]) -> str:
    """The location with `change` applied to its path; scheme and settings of the store are kept."""
    scheme, path, settings = split(location)
    return url_of(scheme, change(path), settings)


def stem(location: Location) -> str:
    """`base_name` without its extension."""
    return os.path.splitext(base_name(location))[0]


def parent(location: Location) -> str:
    """The folder that holds it."""
    scheme, path, settings = split(location)
    if not scheme:
        return str(Path(path).parent)
    return url_of(scheme, path.rstrip("/").rpartition("/")[0], settings)
