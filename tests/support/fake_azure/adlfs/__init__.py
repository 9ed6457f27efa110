"""A stand-in for `adlfs`, under its name: fsspec's file system of ``az://``, over the folder in FAKE_AZURE.

Like the real one it keeps the listings that it made, and raises errors of its own.
"""

import os
import shutil
from pathlib import Path

from fsspec.spec import AbstractFileSystem


class AzureError(Exception):
    """Not an `OSError`, as in Azure's own library."""


class AzureBlobFileSystem(AbstractFileSystem):
    protocol = ("abfs", "az", "abfss")

    def __init__(self, **options):
        super().__init__(**options)
        if "FAKE_AZURE" not in os.environ:
            raise ValueError("Must provide either a connection_string or account_name with credentials!!")
        self.root = Path(os.environ["FAKE_AZURE"])

    def _place(self, path):
        path = self._strip_protocol(path)
        if path.startswith("forbidden"):
            raise AzureError("AuthenticationFailed\nRequestId:1")
        return self.root / path

    def ls(self, path, detail=True, **options):
        path = self._strip_protocol(path).rstrip("/")
        if path not in self.dircache:
            self.dircache[path] = [self._entry(path, found) for found in self._found(path)]
        entries = self.dircache[path]
        return entries if detail else [entry["name"] for entry in entries]

    def _found(self, path):
        place = self._place(path)
        if place.is_file():
            return [place]
        if not place.is_dir():
            raise FileNotFoundError(path)
        return sorted(place.iterdir())

    def _entry(self, path, found):
        name = path if self._place(path).is_file() else f"{path}/{found.name}".lstrip("/")
        kind = "directory" if found.is_dir() else "file"
        return {"name": name, "size": 0 if found.is_dir() else found.stat().st_size, "type": kind}

    def _open(self, path, mode="rb", **options):
        place = self._place(path)
        if "w" in mode:
            place.parent.mkdir(parents=True, exist_ok=True)
        return place.open(mode)

    def rm_file(self, path):
        self._place(path).unlink()

    def cp_file(self, path1, path2, **options):
        shutil.copyfile(self._place(path1), self._place(path2))

    def makedirs(self, path, exist_ok=False):
        self._place(path).mkdir(parents=True, exist_ok=exist_ok)

    def invalidate_cache(self, path=None):
        self.dircache.clear()
