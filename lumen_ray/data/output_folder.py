"""A folder for programs that write local files, also where it is in a bucket: then files are copied there."""

from __future__ import annotations

import tempfile
import threading
import warnings
from pathlib import Path
from typing import Self

from lumen_ray.data import files, urls
from lumen_ray.errors import UserError

#: between copies of what changed, in addition to those before checkpoints
UPLOAD_SECONDS = 30.0
#: copied last, and removed before the files beside it change: a model folder with it is complete
LAST = "model.safetensors"


class OutputFolder:
    """Where a process writes files, a context manager.

    `location`: a path or URL. `folder`: the same for a path; for a URL a scratch folder on this machine. Its files are
    copied to the bucket whenever `upload` is called, every `UPLOAD_SECONDS` while the context is open, and at its end.
    Hidden files and folders stay.
    """

    def __init__(self, location: urls.Location):
        self.location = urls.absolute(location)
        self._temporary: tempfile.TemporaryDirectory[str] | None = None
        self.folder = Path(self.location)
        if urls.is_url(self.location):
            self._temporary = tempfile.TemporaryDirectory(prefix="lumen-ray-output-", ignore_cleanup_errors=True)
            self.folder = Path(self._temporary.name) / urls.base_name(self.location)
            self.folder.mkdir()
        self._known: dict[str, tuple[int, int]] = {}  # name -> time and size of the file that the bucket has
        self._uploading = threading.Lock()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._keep, name="output-folder", daemon=True)

    def check(self) -> None:
        """Makes the folder. Raises `UserError` (`invalid_output`, `store_unreachable`) if it cannot be written."""
        if self._temporary is None:
            files.make_folder(self.location)
            return
        trial = urls.join(self.location, ".writable")
        files.write_bytes(trial, b"")
        files.remove(trial)

    def fetch(self, *names: str) -> None:
        """Copies files that the bucket has to the scratch folder, for programs that go on with them; by default all
        that are directly in it."""
        if self._temporary is None:
            return
        for name in names or [name for name in files.sizes(self.location, recursive=False) if not name.startswith(".")]:
            source = urls.join(self.location, name)
            if names and not files.is_file(source):
                continue
            target = self.folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            files.copy(source, target)
            self._known[name] = _state(target)

    def upload(self) -> None:
        """Copies what has changed to the bucket. Raises `StoreError`."""
        if self._temporary is None:
            return
        with self._uploading:
            changed = {
                name: state
                for name, path in self._files()
                if path.is_file() and self._known.get(name) != (state := _state(path))
            }
            models = [name for name in changed if urls.base_name(name) == LAST]
            for name in models:
                files.remove(urls.join(self.location, name))
            for name in (*(name for name in changed if name not in models), *models):
                files.copy(self.folder / name, urls.join(self.location, name))
                self._known[name] = changed[name]

    def _files(self) -> list[tuple[str, Path]]:
        found = ((path.relative_to(self.folder), path) for path in sorted(self.folder.rglob("*")))
        return [(name.as_posix(), path) for name, path in found if not any(p.startswith(".") for p in name.parts)]

    def __enter__(self) -> Self:
        if self._temporary is not None:
            self._thread.start()
        return self

    def _keep(self) -> None:
        while not self._ended.wait(UPLOAD_SECONDS):
            try:
                self.upload()
            except (UserError, OSError) as error:  # the next one copies it; the last one raises
                warnings.warn(f"files were not copied to the bucket yet: {error}", stacklevel=2)

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._temporary is None:
            return
        self._ended.set()
        self._thread.join()
        try:
            self.upload()
        except UserError:
            if kind is None:
                raise
        finally:
            self._temporary.cleanup()


def _state(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_mtime_ns, status.st_size
