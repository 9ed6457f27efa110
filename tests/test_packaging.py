"""The wheel has every module and every file that the package reads."""

import tomllib
from pathlib import Path

from lumen_ray import __version__

ROOT = Path(__file__).resolve().parent.parent
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
SETUPTOOLS = PYPROJECT["tool"]["setuptools"]


def test_every_package_is_listed():
    folders = {file.parent for file in (ROOT / "lumen_ray").rglob("*.py")}
    packages = {".".join(folder.relative_to(ROOT).parts) for folder in folders}
    assert all((folder / "__init__.py").is_file() for folder in folders)
    assert sorted(SETUPTOOLS["packages"]) == sorted({*packages, "lumen_ray.configs", "lumen_ray.kuberay"})


def test_every_file_beside_the_modules_is_package_data():
    included = set()
    for package, patterns in SETUPTOOLS["package-data"].items():
        folder = ROOT / SETUPTOOLS["package-dir"].get(package, package.replace(".", "/"))
        for pattern in patterns:
            matches = {path for path in folder.glob(pattern) if path.is_file()}
            assert matches, f"{package}: {pattern}"
            included |= matches
    data = {p for top in ("lumen_ray", "configs", "cluster/kuberay") for p in (ROOT / top).rglob("*") if p.is_file()}
    data = {path for path in data if path.suffix not in (".py", ".pyc")}
    assert data == included
    assert ROOT / "lumen_ray" / "py.typed" in data


def test_the_project_says_where_it_is_and_which_version():
    project = PYPROJECT["project"]
    assert project["version"] == __version__
    assert {"Homepage", "Documentation", "Repository", "Changelog", "Issues"} <= set(project["urls"])
    assert "Typing :: Typed" in project["classifiers"]
