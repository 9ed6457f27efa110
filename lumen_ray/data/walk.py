"""The files below a folder one by one, so that a folder of any size is never listed whole."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from pyarrow import fs

from lumen_ray.data import files, urls

#: the entries of a local folder are sorted in blocks of this many, in the order of the file system
SORTED_BLOCK = 10_000
#: what a folder with `marks` is counted as
MARKED = "folder of labels"


def walk(
    folder: urls.Location,
    exclude: Path | None = None,
    depth: int | None = None,
    passed_over: Counter[str] | None = None,
    marks: tuple[str, ...] = (),
) -> Iterator[str]:
    """Names of the files below `folder`, relative to it with ``/``: sorted, but for local folders that hold more than
    `SORTED_BLOCK` entries.

    Symbolic links to folders are not followed and local folders that cannot be read are left out; `passed_over` counts
    them, and broken links. The local folder `exclude` is left out. `depth`: 0 for the folder's own files only, 1 for
    those of its folders too, ...; None: all. `marks`: a folder below that has all these entries, as those of label jobs
    have, is left out and counted. Raises `UserError` (`missing_folder`) if there is no such folder.
    """
    if not files.is_dir(folder):
        raise files.missing_folder(folder)
    counts: Counter[str] = Counter() if passed_over is None else passed_over
    if urls.is_url(folder):
        yield from _walk_store(folder, depth, marks, counts)
    else:
        hidden = None if exclude is None else os.path.realpath(exclude)
        yield from _walk_local(files.filesystem(folder)[1], "", hidden, depth, marks, counts)


def _walk_local(
    folder: str, prefix: str, exclude: str | None, depth: int | None, marks: tuple[str, ...], passed_over: Counter[str]
) -> Iterator[str]:
    if exclude is not None and os.path.realpath(folder) == exclude:
        return
    if marks and prefix and all(os.path.exists(os.path.join(folder, mark)) for mark in marks):
        passed_over[MARKED] += 1
        return
    try:
        entries = os.scandir(folder)
    except PermissionError:
        passed_over["folder without permission"] += 1
        return
    except FileNotFoundError:  # removed since
        return
    with entries:
        # the key of a folder ends in "/", so that names come in the order of their whole paths
        kinds = ((entry.name, entry.is_dir(follow_symlinks=False), _is_file(entry, passed_over)) for entry in entries)
        while block := sorted((name + "/" * is_dir, is_file) for name, is_dir, is_file in islice(kinds, SORTED_BLOCK)):
            for name, is_file in block:
                if name.endswith("/"):
                    if depth != 0:
                        below = None if depth is None else depth - 1
                        yield from _walk_local(
                            os.path.join(folder, name[:-1]), prefix + name, exclude, below, marks, passed_over
                        )
                elif is_file:
                    yield prefix + name


def _is_file(entry: os.DirEntry[str], passed_over: Counter[str]) -> bool:
    if entry.is_file():
        return True
    if entry.is_symlink():
        passed_over["link to a folder" if entry.is_dir() else "broken link"] += 1
    return False


def _walk_store(
    folder: urls.Location, depth: int | None, marks: tuple[str, ...], passed_over: Counter[str]
) -> Iterator[str]:
    """One request for each folder: no listing is longer than a folder's own entries."""
    store, root = files.filesystem(folder)
    root = root.rstrip("/")

    def below(path: str, depth: int | None) -> Iterator[str]:
        with files.as_user_error(folder):
            found = store.get_file_info(fs.FileSelector(path))
        if marks and path != root and {info.base_name for info in found}.issuperset(marks):
            passed_over[MARKED] += 1
            return
        for info in sorted(found, key=lambda i: i.path + "/" * (i.type == fs.FileType.Directory)):
            if info.type == fs.FileType.Directory:
                if depth != 0:
                    yield from below(info.path, None if depth is None else depth - 1)
            elif info.type == fs.FileType.File:
                yield info.path.lstrip("/").removeprefix(root.lstrip("/") + "/")

    yield from below(root, depth)
