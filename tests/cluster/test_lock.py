"""The locked dependencies of the image: hashes for all, within the ranges of the project, and how they are written."""

import os
import re
import shutil
import subprocess
import tomllib

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from support.manifests import ROOT

FOLDER = ROOT / "cluster"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"].keys() - {"test"}
SCRIPT = (FOLDER / "lock.sh").read_text()


def locked(name: str) -> dict[str, tuple[str, list[str]]]:
    """Package -> (version, hashes) of a file."""
    text = (FOLDER / name).read_text().replace("\\\n", " ")
    lines = [line for line in text.splitlines() if line and not line.startswith(("#", "-r "))]
    found = {}
    for line in lines:
        requirement, *options = line.split()
        package, version = re.fullmatch(r"([A-Za-z0-9._-]+)==([A-Za-z0-9.]+)", requirement).groups()
        hashes = [re.fullmatch(r"--hash=sha256:([0-9a-f]{64})", option)[1] for option in options]
        assert hashes, package
        found[canonicalize_name(package)] = (version, hashes)
    return found


def test_every_dependency_is_locked_within_its_range():
    everything = locked("requirements-cpu.txt") | locked("requirements-cuda.txt")
    wanted = [*PROJECT["dependencies"], *(d for extra in EXTRAS for d in PROJECT["optional-dependencies"][extra])]
    for requirement in map(Requirement, wanted):
        version, _ = everything[canonicalize_name(requirement.name)]
        assert requirement.specifier.contains(version), f"{requirement.name} {version}: run cluster/lock.sh"


def test_the_cpu_file_is_the_rest_of_the_cuda_file():
    cpu, cuda = locked("requirements-cpu.txt"), locked("requirements-cuda.txt")
    assert not cpu.keys() & cuda.keys()
    of_torch = re.compile(r"torch|triton|nvidia-.*|cuda-.*")
    assert all(of_torch.fullmatch(name) for name in cuda) and not any(of_torch.fullmatch(name) for name in cpu)
    assert "\n-r requirements-cpu.txt\n" in (FOLDER / "requirements-cuda.txt").read_text()


@pytest.mark.parametrize("name", ["requirements-cpu.txt", "requirements-cuda.txt"])
def test_no_registry_is_named(name):
    assert not re.search(r"://|--(extra-)?index-url|--find-links", (FOLDER / name).read_text())


def test_the_script_locks_what_the_image_installs():
    assert set(re.findall(r"--extra (\w+)", SCRIPT)) == EXTRAS
    python = re.search(r"--python-version (\S+)", SCRIPT)[1]
    assert f"ARG PYTHON={python}\n" in (FOLDER / "Dockerfile").read_text()


def test_the_script_writes_both_files(tmp_path):
    """With a `uv` that gives four requirements."""
    (tmp_path / "cluster").mkdir()
    shutil.copy(FOLDER / "lock.sh", tmp_path / "cluster")
    (tmp_path / "bin").mkdir()
    uv = tmp_path / "bin" / "uv"
    uv.write_text(
        '#!/usr/bin/env bash\nfor out; do :; done\nfor n in numpy==2 nvidia-nccl-cu13==2 torch==2 zipp==4; do\n'
        '  printf "%s \\\\\\n    --hash=sha256:%064d\\n" "$n" 1 >> "$out"\ndone\n'
    )  # fmt: skip
    uv.chmod(0o755)
    environment = os.environ | {"PATH": f"{uv.parent}:{os.environ['PATH']}"}
    done = subprocess.run([tmp_path / "cluster" / "lock.sh"], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    cpu, cuda = ((tmp_path / "cluster" / f"requirements-{kind}.txt").read_text() for kind in ("cpu", "cuda"))
    assert re.findall(r"^\w.*==", cpu, re.M) == ["numpy==", "zipp=="]
    assert re.findall(r"^\w.*==", cuda, re.M) == ["nvidia-nccl-cu13==", "torch=="]
    assert cpu.count("--hash") == 2 and cuda.count("--hash") == 2
