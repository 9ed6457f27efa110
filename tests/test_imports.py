"""The structure of the package, over its real imports: no circles, no upward imports, no names of decoders.

Imports inside functions and under `TYPE_CHECKING` count like all others.
"""

from __future__ import annotations

import ast
import io
import re
import tokenize
from functools import cache
from pathlib import Path

import pytest

from lumen_ray.decoders.registry import DECODERS

ROOT = Path(__file__).resolve().parents[1] / "lumen_ray"
#: names of modules and packages below `lumen_ray`, lowest first; a layer imports itself and what is below it
LAYERS = (
    (
        "version", "errors", "config", "structures", "answer", "tasks", "presets", "console", "keypoints", "attention",
        "cpu_linear", "precision", "targets", "input_size", "superlink", "meta_init", "ray_env", "ray_log", "viz",
        "head_watch", "ray_metrics", "installation", "exemplars", "cancellation", "outline", "run_settings",
        "training_report",
    ),
    ("checkpoints",),
    ("decoders", "trunk"),
    ("recipe",),
    ("model",),
    ("data",),
    ("inference", "train"),
    ("footprint", "exemplar_file", "options", "remote", "wire"),
    ("label", "evaluate"),
    ("serve",),  # answers batches over label's ledger
    ("api", "callable_package", "bench", "cluster", "plan"),
    ("cli", "quickstart", "doctor", "lumen_ray"),
)  # fmt: skip
RANK = {name: rank for rank, layer in enumerate(LAYERS) for name in layer}
#: layers whose members import each other; elsewhere the packages of a layer stay apart
SHARED = {0, RANK["decoders"], RANK["api"], RANK["cli"]}
#: modules of the command line that live beside what they run
COMMANDS = (
    "data.command", "model.convert.command", "label.command", "label.output_command", "bench.command", "bench.kinds",
    "plan.command", "remote.command", "cluster.command",
)  # fmt: skip
#: packages that can be called as a function of the API
CALLABLE = ("train", "label", "evaluate", "serve")


@cache
def modules() -> dict[str, Path]:
    """Dotted name below `lumen_ray` (the package itself: "lumen_ray") -> file."""
    found = {}
    for path in ROOT.rglob("*.py"):
        parts = path.relative_to(ROOT).with_suffix("").parts
        name = ".".join(part for part in parts if part != "__init__")
        found[name or "lumen_ray"] = path
    return found


@cache
def imports(name: str) -> frozenset[str]:
    """Modules of the package that a module imports."""
    found = set()
    for node in ast.walk(ast.parse(modules()[name].read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name} has a relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            origin = node.module or ""
        elif isinstance(node, ast.Import):
            names, origin = [alias.name for alias in node.names], ""
        else:
            continue
        for full in names:
            inner, outer = full.removeprefix("lumen_ray."), origin.removeprefix("lumen_ray.")
            if full.startswith("lumen_ray.") and inner in modules():
                found.add(inner)
            elif origin.startswith("lumen_ray") and outer in modules():
                found.add(outer)
    return frozenset(found - {name})


def circles(graph: dict[str, frozenset[str]]) -> list[list[str]]:
    """Sets of modules that reach each other."""
    reach: dict[str, set[str]] = {}
    for start in graph:
        seen, waiting = set(), [start]
        while waiting:
            for target in graph[waiting.pop()] - seen:
                seen.add(target)
                waiting.append(target)
        reach[start] = seen
    together = {tuple(sorted(b for b in reach[a] if a in reach[b])) for a in graph if a in reach[a]}
    return [list(circle) for circle in sorted(together)]


def test_no_modules_import_each_other():
    assert circles({name: imports(name) for name in modules()}) == []


def test_a_circle_would_be_found():
    graph = {"a": frozenset({"b"}), "b": frozenset({"c"}), "c": frozenset({"b"}), "d": frozenset()}
    assert circles(graph) == [["b", "c"]]


def rank_of(name: str) -> int:
    return RANK["cli"] if name in COMMANDS else RANK[name.split(".")[0]]


def goes_up(name: str, target: str) -> bool:
    """Whether an import points at a higher layer, or at a neighbour of its own."""
    own, other = name.split(".")[0], target.split(".")[0]
    if own == other and target not in COMMANDS:
        return False
    if name in CALLABLE and target == "callable_package":
        return False
    here, there = rank_of(name), rank_of(target)
    return there > here or (there == here and here not in SHARED)


def test_nothing_imports_upward():
    assert [f"{name} -> {target}" for name in modules() for target in imports(name) if goes_up(name, target)] == []


@pytest.mark.parametrize(
    ("name", "target", "up"),
    [
        ("model.build", "train.trainer", True),
        ("data.batches.feed", "train.launch", True),
        ("tasks", "decoders.registry", True),
        ("label.pipeline", "serve.app", True),
        ("train.trainer", "model.build", False),
        ("trunk.trunk", "decoders.registry", False),
    ],
)
def test_layers(name, target, up):
    assert goes_up(name, target) == up


def test_every_module_belongs_to_a_layer():
    assert {name.split(".")[0] for name in modules()} == set(RANK)


def test_tasks_import_nothing_by_name():
    assert "importlib" not in (ROOT / "tasks.py").read_text(encoding="utf-8")


#: what only a decoder's own folder may say in code: its name, its losses, its classes
NAMES = [name for spec in DECODERS.values() for name in (spec.name, *spec.losses)]
#: of these the ones that are plain words elsewhere; as a string they still stand for the decoder
WORDS = {"lumen", "box", "mask", "match", "heatmap", "keypoint", "edit", "generate", "presence"}
NAMED = re.compile(
    rf"\b({'|'.join(name for name in NAMES if name not in WORDS)})\b|decoders\.lumen\b"
    r"|\b(Lumen|GroundingDino|UniPose|StableDiffusion|InstructPix2Pix|Diffusion|Dino)(Decoder|Settings|LossSettings|Raw)\b"
)
#: a module that belongs to a decoder
OF_A_DECODER = re.compile(r"decoders\.(lumen|grounding_dino|unipose|diffusion|dino)\b")
#: where decoders are named on purpose: their registry, and the comparison of one of them with its library
NAMES_DECODERS = ("decoders.registry", "bench.grounding_dino", "bench.command", "bench.kinds")
#: where "lumen" is the product's own name: its server, its assistant, its deployments
PRODUCT = (
    "serve.app",
    "serve.openai_api",
    "serve.openai_images",
    "serve.task_api",
    "wire.completions",
    "wire.response_events",
)


def tokens_naming_decoders(source: str, product: bool = False) -> list[str]:
    """Names and strings that name a decoder, as "line: token"; comments and docstrings do not count.

    product: whether the string "lumen" is the product's name here.
    """
    docstrings = {
        node.body[0].lineno
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        and node.body
        and isinstance(node.body[0], ast.Expr)
        and isinstance(node.body[0].value, ast.Constant)
    }
    found = []
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        is_docstring = token.type == tokenize.STRING and token.start[0] in docstrings
        if token.type not in (tokenize.NAME, tokenize.STRING) or is_docstring:
            continue
        light = token.string in ("'lumen'", '"lumen"') and not product
        if light or NAMED.search(token.string):
            found.append(f"{token.start[0]}: {token.string}")
    return found


def test_a_name_in_code_is_seen_and_one_in_a_docstring_is_not():
    source = (
        '"""Of grounding_dino and unipose."""\nif name == "grounding_dino":\n    settings.unipose = parts["lumen"]\n'
    )
    assert tokens_naming_decoders(source) == ['2: "grounding_dino"', "3: unipose", '3: "lumen"']


def test_decoders_are_named_in_their_own_folders_alone():
    found = []
    for name, path in modules().items():
        if name not in NAMES_DECODERS and not OF_A_DECODER.match(name):
            tokens = tokens_naming_decoders(path.read_text(encoding="utf-8"), name in PRODUCT)
            found += [f"{name}:{token}" for token in tokens]
            found += [f"{name} imports {target}" for target in imports(name) if OF_A_DECODER.match(target)]
    assert found == []


def test_the_exceptions_exist():
    assert {*NAMES_DECODERS, *PRODUCT, *COMMANDS, *CALLABLE} <= modules().keys()
