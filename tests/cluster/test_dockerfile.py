"""The Dockerfile, as far as it can be read without Docker."""

import fnmatch
import json
import re
import shutil
import tomllib
import zipfile
from pathlib import Path

import pytest
from support.manifests import ROOT, pods

from lumen_ray import cli
from lumen_ray.cluster.manifests import container

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
KNOWN = {"ARG", "FROM", "WORKDIR", "COPY", "RUN", "ENV", "EXPOSE", "HEALTHCHECK", "CMD", "USER"}


def instructions() -> list[tuple[str, str]]:
    """(instruction, its text) of the Dockerfile, line breaks and comments taken out."""
    text = (ROOT / "cluster" / "Dockerfile").read_text()
    text = re.sub(r"^\s*#.*\n", "", text, flags=re.MULTILINE).replace("\\\n", " ")
    return [(line.split()[0], line.split(maxsplit=1)[1]) for line in text.splitlines() if line.strip()]


def stages() -> dict[str, list[tuple[str, str]]]:
    """The instructions of each stage, with those of the stage it is made from."""
    found: dict[str, list[tuple[str, str]]] = {}
    for name, text in instructions():
        if name == "FROM":
            source, _, here = text.partition(" AS ")
            found[here] = list(found.get(source, []))
            assert source in found or source == "python:${PYTHON}-slim-bookworm"
        elif found:
            found[here].append((name, text))
    return found


def copied() -> list[str]:
    """What COPY takes from the repository."""
    texts = [text for name, text in instructions() if name == "COPY" and not text.startswith("--from=")]
    return [source for text in texts for source in text.split()[:-1]]


def test_instructions_and_targets():
    assert {name for name, _ in instructions()} <= KNOWN
    assert list(stages()) == ["wheel", "base", "cpu", "cuda"]
    for name, text in instructions():
        if name == "CMD" or " CMD [" in text:
            assert isinstance(json.loads(text[text.index("[") :]), list)  # without a shell, so that signals arrive
        if text.startswith("--from="):
            assert text.split()[0].removeprefix("--from=") in stages()


@pytest.mark.parametrize("target", ["cpu", "cuda"])
def test_a_target_runs_as_the_user_of_the_pods_and_is_healthy_when_ready(target):
    from lumen_ray.serve.api import create_api
    from lumen_ray.serve.settings import ServeSettings

    given = dict(stages()[target])  # the last of each
    ids = {
        (t["spec"]["securityContext"]["runAsUser"], t["spec"]["securityContext"]["runAsGroup"]) for _, t in pods("base")
    }
    assert {tuple(map(int, given["USER"].split(":")))} == ids
    assert stages()[target][-1][0] == "USER"
    assert "HOME=/tmp" in given["ENV"] and {"name": "HOME", "value": "/tmp"} in container(next(pods("base"))[1])["env"]
    command = json.loads(given["CMD"])
    args = cli.build_parser().parse_args(command[1:])
    assert command[0] == "lumen-ray" and (args.host, str(args.port)) == ("0.0.0.0", given["EXPOSE"])
    url = given["HEALTHCHECK"].split('"')[-2]
    assert url == f"http://127.0.0.1:{args.port}/readyz"
    assert "/readyz" in create_api(None, ServeSettings(model="nano")).openapi()["paths"]


def test_versions_are_those_of_the_project():
    texts = "\n".join(text for _, text in instructions())
    python = re.search(r"^PYTHON=(\S+)", texts, flags=re.MULTILINE)[1]
    assert PROJECT["requires-python"] == f">={python}"
    text = (ROOT / "cluster" / "Dockerfile").read_text()
    assert set(re.findall(r"lumen-ray:(\S+)-(?:cpu|cuda)", text)) == {PROJECT["version"]}


def test_what_is_installed_is_locked():
    for target in ("cpu", "cuda"):
        runs = [text for name, text in stages()[target] if name == "RUN" and "pip install" in text]
        for words in [part.split() for text in runs for part in text.split("pip install")[1:]]:
            from_torch = "--index-url" in words and '"$torch"' in words  # CPU wheels, whose hashes are not known here
            own = "--no-deps" in words and any(word.startswith("/wheels/") for word in words)
            assert "--require-hashes" in words or from_torch or own, words
        assert sum("--require-hashes" in text for text in runs) == 1


def test_what_is_copied_exists_and_is_sent_to_docker():
    assert copied() and [source for source in copied() if not (ROOT / source).exists()] == []
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    rules = [line for line in lines if line and not line.startswith("#")]
    assert rules[0] == "*"
    assert sorted(rule[1:] for rule in rules if rule.startswith("!")) == sorted(copied())
    for name in ("out", "findings", "tests", ".git", "docs"):
        assert not any(fnmatch.fnmatch(name, rule[1:]) for rule in rules if rule.startswith("!"))


@pytest.mark.filterwarnings("ignore")
def test_a_wheel_is_built_from_what_is_copied(tmp_path, monkeypatch):
    setuptools = pytest.importorskip("setuptools")
    if int(setuptools.__version__.split(".")[0]) < 77:
        pytest.skip(f"setuptools {setuptools.__version__} is too old to build this project")
    from setuptools import build_meta

    for source in copied():
        copy = shutil.copytree if (ROOT / source).is_dir() else shutil.copy
        (tmp_path / source).parent.mkdir(parents=True, exist_ok=True)
        copy(ROOT / source, tmp_path / source)
    monkeypatch.chdir(tmp_path)
    wheel = build_meta.build_wheel(str(tmp_path / "wheels"))
    names = zipfile.ZipFile(tmp_path / "wheels" / wheel).namelist()
    for folder, packed_as in (("lumen_ray", ""), ("configs", "configs"), ("cluster/kuberay", "kuberay")):
        files = [p.relative_to(ROOT / folder) for p in (ROOT / folder).rglob("*") if p.is_file() and p.suffix != ".pyc"]
        assert {str(Path("lumen_ray") / packed_as / p) for p in files} <= set(names), folder
