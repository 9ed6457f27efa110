"""Model folders in buckets, downloaded once for each version to a cache on this machine.

`lumen_ray` makes `presets.model_folder` use it; file systems are imported when a URL is given.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from contextlib import suppress
from pathlib import Path

from lumen_ray.errors import UserError

#: environment variable that names the cache's folder; by default ``~/.cache/lumen-ray``
CACHE = "LUMEN_RAY_CACHE"
KEPT = 2  # versions of each model


def download(url: str) -> Path:
    """The local copy of the model folder at a URL, in its present version.

    A version is told by sizes and times of its files. Raises `UserError`: `missing_model` if there are no files,
    `store_unreachable`, and `invalid_output` if the cache cannot be written.
    """
    from lumen_ray.data import files, urls

    found = files.states(url)
    if not found:
        raise UserError(
            f"model folder '{urls.shown(url)}' does not exist; give the 'model' folder that a training run wrote",
            "missing_model",
        )
    versions = _cache() / "models" / _digest(urls.shown(url))
    folder = versions / _digest(repr(sorted(found.items())))
    if folder.is_dir():
        return folder
    files.make_folder(versions)
    temporary = Path(tempfile.mkdtemp(prefix=".partial-", dir=versions))
    try:
        for name in found:
            files.copy(urls.join(url, name), temporary / name)
        with suppress(OSError):  # another process has downloaded it
            temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    whole = sorted((p for p in versions.iterdir() if not p.name.startswith(".")), key=lambda p: p.stat().st_mtime)
    for old in whole[:-KEPT]:
        shutil.rmtree(old, ignore_errors=True)
    return folder


def _cache() -> Path:
    home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(os.environ.get(CACHE) or Path(home) / "lumen-ray").expanduser()


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
