"""Packages that register decoders, for processes of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).parents[1]


def install(site: Path, package: str, entry_points: dict[str, str]) -> None:
    """Writes what pip leaves of an installed package that registers `entry_points` (name -> "module:object")."""
    info = site / f"{package.replace('-', '_')}-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
    lines = "".join(f"{name} = {target}\n" for name, target in entry_points.items())
    (info / "entry_points.txt").write_text(f"[lumen_ray.decoders]\n{lines}")


def environment(site: Path) -> dict[str, str]:
    """The environment of a process that sees the packages in `site` and the helpers of the tests."""
    path = [str(site), str(TESTS), *filter(None, [os.environ.get("PYTHONPATH")])]
    return os.environ | {"PYTHONPATH": os.pathsep.join(path), "OMP_NUM_THREADS": "1"}


def python(site: Path, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    """Runs Python with these packages; fails with its output where it fails."""
    done = subprocess.run(
        [sys.executable, *arguments], env=environment(site), capture_output=True, text=True, check=False
    )
    assert not check or done.returncode == 0, done.stdout + done.stderr
    return done


def lumen_ray(site: Path, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    """Runs `lumen-ray` with these packages."""
    return python(site, "-m", "lumen_ray.cli", *arguments, check=check)
