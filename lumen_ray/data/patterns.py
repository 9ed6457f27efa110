"""Patterns of file names, local and in stores: ``*``, ``?``, ``[...]`` and, for any depth, ``**``."""

from __future__ import annotations

import glob
import os
import re

from lumen_ray.data import files
from lumen_ray.data.urls import Location, join, shown, split, url_of
from lumen_ray.errors import UserError

_WILD = re.compile(r"[*?\[]")


def expand(pattern: Location) -> list[str]:
    """The files that match a location with ``*``, ``?``, ``[...]`` or, for any depth, ``**``, sorted; a location
    without wildcards is returned as it is. Raises `UserError` (`missing_file`) if nothing matches."""
    scheme, path, settings = split(pattern)
    wild = _WILD.search(path)
    if wild is None:
        return [os.fspath(pattern)]
    if not scheme:
        found = [name for name in glob.glob(os.path.expanduser(path), recursive=True) if os.path.isfile(name)]
    else:
        folder, rest = split_pattern(pattern)
        deep = "/" in path[len(split(folder)[1]) + 1 :]
        names = files.list_files(folder, recursive=deep) if files.is_dir(folder) else []
        found = [join(folder, name) for name in names if rest.fullmatch(name)]
    if not found:
        raise UserError(f"no file matches '{shown(pattern)}'", "missing_file")
    return sorted(found)


def has_wildcards(location: Location) -> bool:
    """Whether it has ``*``, ``?`` or ``[``."""
    return _WILD.search(split(location)[1]) is not None


def split_pattern(pattern: Location) -> tuple[str, re.Pattern[str]]:
    """The folder before the first wildcard of a location, and a pattern for the names relative to it."""
    scheme, path, settings = split(pattern)
    wild = _WILD.search(path)
    assert wild is not None, "a pattern has a wildcard"
    fixed = path[: wild.start()].rpartition("/")[0]
    if not scheme and not fixed:
        fixed = "/" if path.startswith("/") else "."
        return fixed, _as_regex(path.lstrip("/"))
    return url_of(scheme, fixed, settings), _as_regex(path[len(fixed) :].lstrip("/"))


def _as_regex(pattern: str) -> re.Pattern[str]:
    wildcards = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    tokens = re.split(r"(\*\*/|\*\*|\*|\?|\[[^\]]*\])", pattern)
    sets = (t.replace("[!", "[^", 1) if t.startswith("[") else re.escape(t) for t in tokens)
    try:
        return re.compile("".join(wildcards.get(t) or other for t, other in zip(tokens, sets, strict=True)))
    except re.error as error:
        raise UserError(f"'{pattern}' is not a pattern of file names: {error}", "invalid_pattern") from None
