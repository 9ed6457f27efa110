"""Where files and folders lie: local paths, ``s3://``, ``gs://`` and every other URL. Nothing here looks at a store.

A location is a plain string, so that it pickles and prints. What follows ``scheme://bucket/`` is the key, taken
literally: image names with blanks, ``%`` or ``#`` need no quoting. Settings of the store stand behind a ``?``
at the end, as in pyarrow: ``s3://bucket/folder?region=eu-west-1&endpoint_override=localhost:9000&scheme=http``;
``s3://anonymous@bucket/folder`` reads a public bucket without credentials.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path

Location = str | os.PathLike[str]
NATIVE = ("s3", "gs", "gcs")  # stores that pyarrow knows, with settings
_URL = re.compile(r"^([a-z][a-z0-9+.-]+)://(.*)$", re.DOTALL)
_SETTINGS = re.compile(r"^(.*)\?((?:[a-z_]+=[^&?/]*)(?:&[a-z_]+=[^&?]*)*)$", re.DOTALL)


def is_url(location: Location) -> bool:
    """Whether it is a URL of a store and no local path (``file://`` counts as local)."""
    return bool(match := _URL.match(str(location))) and match[1] != "file"


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
    return (f"{scheme}://{path}" if scheme else path) + (f"?{settings}" if settings else "")


def shown(location: Location) -> str:
    """The location for messages and records: without the store's settings and without what may be a password."""
    scheme, path, _ = split(location)
    if not scheme:
        return path
    bucket, slash, key = path.partition("/")
    return f"{scheme}://{bucket.rpartition('@')[2]}{slash}{key}"


def absolute(location: Location) -> str:
    """The location as any process of the cluster can use it; a URL as it is, without a slash at its end."""
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
    """The last part: ``"s3://b/x/train.json?region=r" -> "train.json"``."""
    return split(location)[1].replace("\\", "/").rstrip("/").rsplit("/", 1)[-1]


def map_path(location: Location, change: Callable[[str], str]) -> str:
    """The location with `change` made to its path; scheme and settings of the store stay."""
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
