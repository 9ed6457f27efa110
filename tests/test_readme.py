"""The README's commands: every `lumen-ray` line must parse, every file it names must exist."""

import re
import shlex
from pathlib import Path

import pytest

from lumen_ray import cli
from lumen_ray.presets import find

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"


def commands() -> list[str]:
    blocks = re.findall(r"```sh\n(.*?)```", README.read_text(), flags=re.DOTALL)
    joined = "\n".join(blocks).replace("\\\n", " ")
    pieces = [piece.strip() for line in joined.splitlines() for piece in line.split("&&")]
    return [piece for piece in pieces if re.match(r"(\S*/)?lumen-ray ", piece)]


@pytest.mark.parametrize("command", commands())
def test_command_lines_parse(command):
    args = cli.build_parser().parse_args(shlex.split(command, comments=True)[1:])
    if recipe := getattr(args, "recipe", None):
        find("recipes", recipe)


def test_the_readme_has_commands_of_every_verb():
    verbs = {shlex.split(c)[1] for c in commands()}
    assert verbs == {"quickstart", "prepare", "data", "train", "evaluate", "label", "serve", "convert", "doctor"}


def test_links_point_at_files():
    for target in re.findall(r"\]\(([^)#]+)\)", README.read_text()):
        if not target.startswith("http"):
            assert (ROOT / target).exists(), target
