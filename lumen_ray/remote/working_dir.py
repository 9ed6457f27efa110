"""The files of this machine that a job takes along: a folder, less what its ignore files name."""

from __future__ import annotations

import logging
import os
import zipfile
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from lumen_ray.errors import UserError

#: besides what `.gitignore` and `.rayignore` name: as Ray does, and files that often hold passwords
EXCLUDED = (".git", ".venv", "venv", "__pycache__", ".env")
#: bytes before compression; Ray keeps packages in the memory of the head, and takes no larger ones
MAX_BYTES = 512 << 20
MAX_FILES = 100_000
_MOST_NAMED = 8


class _TooLarge(Exception):
    pass


@dataclass
class WorkingDir:
    """A folder to pack: its `files`, their bytes, and what is `left_out`, both relative to it. Nothing in a folder that
    is left out is listed."""

    root: Path
    files: list[Path] = field(default_factory=list)
    num_bytes: int = 0
    left_out: list[Path] = field(default_factory=list)

    @classmethod
    def scan(cls, folder: str | Path) -> WorkingDir:
        """Raises `UserError` if it is no folder or larger than `MAX_BYTES` or `MAX_FILES`."""
        from ray._private.runtime_env.packaging import _dir_travel, _get_excludes

        root = Path(os.path.abspath(folder))
        if not root.is_dir():
            raise UserError(f"--working-dir '{folder}' is not a folder; give one, or 'none'", "usage")
        found = cls(root)
        folders: list[Path] = []
        sizes: Counter[str] = Counter()

        def visit(path: Path) -> None:
            if path.is_dir():
                folders.append(path)
                return
            if not path.is_file():
                return
            found.files.append(path.relative_to(root))
            size = path.stat().st_size
            sizes[found.files[-1].parts[0]] += size
            found.num_bytes += size
            if found.num_bytes > MAX_BYTES or len(found.files) > MAX_FILES:
                raise _TooLarge

        quiet = logging.getLogger("lumen_ray.remote")  # Ray logs the path at which `visit` raises
        quiet.disabled = True
        try:
            # the walk of Ray itself, so that its ignore files mean the same as to `ray job submit`
            _dir_travel(root, [_get_excludes(root, list(EXCLUDED))], visit, include_gitignore=True, logger=quiet)
        except _TooLarge:
            raise found._too_large(sizes) from None
        seen = {root / file for file in found.files} | set(folders)
        left_out = (path for each in folders for path in sorted(each.iterdir()) if path not in seen)
        found.left_out = [path.relative_to(root) for path in left_out]
        found.files.sort()
        return found

    def _too_large(self, sizes: Counter[str]) -> UserError:
        largest = ", ".join(f"{name} ({_mb(size)})" for name, size in sizes.most_common(3))
        return UserError(
            f"the working directory {self.root} has more than {_mb(MAX_BYTES)} or {MAX_FILES:,} files, of which a job "
            f"takes no more along (found first: {largest}); name folders to leave out in its .rayignore, or give "
            "another --working-dir, 'none' for a command that needs none of your files",
            "working_dir_too_large",
        )

    def holds(self, path: str | Path) -> bool:
        """Whether a path of this machine, or something in the folder that it names, is packed."""
        try:
            inside = Path(os.path.abspath(path)).relative_to(self.root)
        except ValueError:
            return False
        return any(inside == file or inside in file.parents for file in self.files)

    def write(self, target: Path) -> None:
        """Packs the files into a zip file. That of the same files is the same, so that Ray sends it once."""
        with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED, strict_timestamps=False) as packed:
            for file in self.files:
                packed.write(self.root / file, file)

    def describe(self) -> str:
        """One line: what is packed and what is left out."""
        text = f"{len(self.files):,} files, {_mb(self.num_bytes)} of {self.root}"
        if not self.left_out:
            return text
        named = ", ".join(str(path) for path in self.left_out[:_MOST_NAMED])
        more = len(self.left_out) - _MOST_NAMED
        return f"{text}; left out: {named}{f' and {more} more' if more > 0 else ''}"


def _mb(num_bytes: int) -> str:
    return f"{num_bytes / (1 << 20):,.1f} MiB"
