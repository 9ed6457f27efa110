"""`lumen-ray doctor`: what a preset needs, what this machine has, and what is missing.

Sizes are counted on the model itself, built on the meta device: nothing is allocated, so a laptop can tell what the
largest preset needs. Activations come on top; they depend on batch and image size.
"""

from __future__ import annotations

import argparse
import os
import platform
import re
import socket
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from rich.markup import escape

from lumen_ray.console import say
from lumen_ray.decoders.registry import DECODERS
from lumen_ray.errors import UserError
from lumen_ray.footprint import BF16, FP32, ByRecipe, Role, count_recipe, on_meta, roles_of, together

if TYPE_CHECKING:
    from lumen_ray.model.build import Generalist
    from lumen_ray.model.settings import ModelSettings
    from lumen_ray.recipe import Recipe

GIB = 1 << 30
State = Literal["ok", "note", "short", "missing"]
#: what the extras of this package are for
OPTIONAL = {
    "speed": "decodes JPEG faster",
    "lora": "trains the LLM through adapters (recipes with 'lora')",
    "mlflow": "logs runs to MLflow (recipes with 'mlflow')",
}
CONNECT_S = 3.0


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at. What is `missing` keeps the preset from running, what is `short` from being
    trained by its recipe on this machine."""

    state: State
    text: str


def add_args(verbs: Any) -> None:
    """The verb's options; `verbs` are argparse's subparsers."""
    p = verbs.add_parser("doctor", help="what a preset needs, what is there and what is missing")
    p.add_argument("--preset", default="nano", help="name in configs/models or a YAML file (default: nano)")
    p.add_argument("--model", help="model folder with the preset's weights (default: the bundled ones, if there are)")
    p.add_argument("--workers", type=int, help="ranks that train (default: those of the recipe of the preset's name)")
    p.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    sections, able = examine(args.preset, args.model, args.workers)
    for title, findings in sections.items():
        say(title)
        for finding in findings:
            say(escape(f"  {finding.state if finding.state != 'note' else '-':<8} {finding.text}"))
    first = {finding.state: finding.text for found in reversed(sections.values()) for finding in reversed(found)}
    trained = f", but not be trained by its recipe: {first['short']}" if "short" in first else ""
    say(f"preset '{args.preset}' " + (f"can run here{trained}" if able else f"cannot run here: {first['missing']}"))
    return 0 if able else 1


def examine(preset: str, model: str | None = None, workers: int | None = None) -> tuple[dict[str, list[Finding]], bool]:
    """Findings by section, and whether the preset can run. `UserError` for a preset or a model that does not exist."""
    packages = list(_packages())
    sections = {"packages": packages}
    if all(finding.state != "missing" for finding in packages):
        from lumen_ray import config
        from lumen_ray.model.settings import ModelSettings
        from lumen_ray.presets import model_path

        settings = config.load(ModelSettings, model_path(preset))
        sections["machine"] = list(_machine())
        recipe = _recipe(settings.name)
        workers = workers or (recipe.workers if recipe else 1)
        title = f"memory of '{settings.name}', weights and optimiser, activations aside"
        published: dict[str, int] = {}
        try:
            counted = on_meta(settings)
        except ImportError as error:  # a decoder whose package is optional
            needs = f"preset '{settings.name}' needs a package that is not installed: {error}"
            sections[title] = [Finding("missing", needs)]
        else:
            roles = roles_of(counted)
            published = published_parameters(settings, counted) if settings.published_weights else {}
            by_recipe = count_recipe(settings, recipe) if recipe else None
            sections[title] = [*_needs(roles, workers, by_recipe), *_room(roles)]
            sections["images as they are seen"] = list(_inputs(settings))
            sections[f"GPUs for '{settings.name}'"] = list(_gpus(roles, by_recipe, workers))
        sections["weights"] = list(_weights(settings, model, published, recipe))
    able = all(finding.state != "missing" for findings in sections.values() for finding in findings)
    return sections, able


def size(count: float) -> str:
    """Bytes in words."""
    return f"{count / GIB:.1f} GiB" if count >= GIB / 10 else f"{count / (1 << 20):.1f} MiB"


def requirements() -> list[str]:
    """What this package needs, with the versions it is tested with; optional ones name their extra."""
    checkout = Path(__file__).parents[1] / "pyproject.toml"
    if checkout.is_file():
        import tomllib

        project = tomllib.loads(checkout.read_text(encoding="utf-8"))["project"]
        optional = project.get("optional-dependencies", {})
        return [*project["dependencies"], *(f'{r}; extra == "{name}"' for name, rs in optional.items() for r in rs)]
    from importlib.metadata import requires

    return requires("lumen-ray") or []


def _packages() -> Iterator[Finding]:
    from importlib.metadata import PackageNotFoundError, version

    from packaging.requirements import Requirement

    yield Finding("ok", f"python {platform.python_version()} on {platform.system()} {platform.machine()}")
    optional: dict[str, list[str]] = {}
    for line in requirements():
        wanted = Requirement(line)
        extra = re.search(r"extra == ['\"](.+?)['\"]", str(wanted.marker))
        if wanted.name == "lumen-ray" or not (extra or wanted.marker is None or wanted.marker.evaluate()):
            continue
        try:
            found = version(wanted.name)
        except PackageNotFoundError:
            found = None
        fits = found is not None and wanted.specifier.contains(found, prereleases=True)
        told = f"{wanted.name} {found or 'is not installed'}" + ("" if fits else f", tested with {wanted.specifier}")
        if extra is None:
            yield Finding("ok" if fits else "missing", told)
        elif extra[1] != "test":
            optional.setdefault(extra[1], []).append(told)
    for extra, told in optional.items():
        use = f"optional: {OPTIONAL[extra]}" if extra in OPTIONAL else "optional"
        yield Finding("note", f"{', '.join(told)} ({use}; pip install 'lumen-ray[{extra}]')")


def host_memory() -> int:
    """Bytes of memory that this process can still get; 0 where the system does not tell."""
    told = Path("/proc/meminfo")
    lines = told.read_text().splitlines() if told.is_file() else []
    free = next((int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable:")), 0)
    limit, used = (Path("/sys/fs/cgroup") / name for name in ("memory.max", "memory.current"))
    if limit.is_file() and (most := limit.read_text().strip()).isdigit():  # a container's own
        free = min(free, int(most) - int(used.read_text()))
    return max(0, free)


def gpu_memory() -> list[int]:
    """Bytes of each GPU."""
    import torch

    if not torch.cuda.is_available():
        return []
    return [torch.cuda.get_device_properties(i).total_memory for i in range(torch.cuda.device_count())]


def _machine() -> Iterator[Finding]:
    import torch

    build = (
        f"CUDA {torch.version.cuda}"
        if torch.version.cuda
        else f"ROCm {torch.version.hip}"
        if torch.version.hip
        else "CPU"
    )
    yield Finding(
        "note", f"torch built for {build}; {len(os.sched_getaffinity(0))} cores, {size(host_memory())} of memory free"
    )
    for i, memory in enumerate(gpu_memory()):
        name = torch.cuda.get_device_name(i)
        half = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "no bf16"
        yield Finding("ok", f"GPU {i}: {name}, {size(memory)}, {half}")
    yield _ray()


def _ray() -> Finding:
    """Whether the cluster that the commands would use answers."""
    address = os.environ.get("RAY_ADDRESS", "")
    if address in ("", "local"):
        return Finding("ok", "Ray: no RAY_ADDRESS is set, commands start one on this machine")
    host, _, port = address.removeprefix("ray://").removeprefix("http://").rpartition(":")
    if not port.isdigit():
        return Finding("note", f"Ray: RAY_ADDRESS is '{address}', looked up when a command starts")
    try:
        socket.create_connection((host, int(port)), CONNECT_S).close()
    except OSError as error:
        return Finding("missing", f"Ray: nothing answers at RAY_ADDRESS {address} ({error.strerror or error})")
    return Finding("ok", f"Ray: the cluster at {address} answers")


def _recipe(preset: str) -> Recipe | None:
    """The recipe that goes by the preset's name and trains it."""
    from lumen_ray import config
    from lumen_ray.presets import recipe_path
    from lumen_ray.recipe import Recipe

    try:
        recipe = config.load(Recipe, recipe_path(preset))
    except UserError:
        return None
    return recipe if recipe.model == preset else None


def _start(recipe: Recipe | None) -> str:
    """Where the recipe of the preset's name starts from."""
    if recipe is None:
        return ""
    start = f"'{recipe.init_from}'" if recipe.init_from else "fresh weights"
    return f", its recipe starts from {start}"


def _needs(roles: list[Role], workers: int, by_recipe: ByRecipe | None) -> Iterator[Finding]:
    """`training` is that of all weights but those that the model's settings keep as they are; the last line is what
    the recipe trains of them."""
    total = together(roles)
    width = max(len(role.name) for role in (*roles, total))
    for role in (*roles, total):
        share = f", {size(role.training(workers))} on each of {workers} ranks" if workers > 1 else ""
        learns = "all of it" if role.learns == role.parameters else f"{role.learns:,} of them"
        yield Finding(
            "note",
            f"{role.name:<{width}} {role.parameters:>15,} parameters; inference {size(role.parameters * FP32)} fp32, "
            f"{size(role.parameters * BF16)} bf16; training {learns} {size(role.training(1))}{share}",
        )
    yield Finding(
        "note",
        "a role reads its own weights, tensor by tensor: its host needs memory for those that stay on it, none where "
        f"they go to a GPU, and at most {size(total.largest * FP32)} for the one on its way",
    )
    if by_recipe is None:
        return
    name = f"recipe '{by_recipe.recipe.name}'"
    if by_recipe.model is None:
        yield Finding("note", f"{name}: what it trains cannot be counted: {by_recipe.fault}")
        return
    share = f", {size(by_recipe.memory(workers))} on each of {workers} ranks" if workers > 1 else ""
    kept = " and an average of the weights" if by_recipe.averaged else ""
    yield Finding(
        "note",
        f"{name} trains {by_recipe.model.learns:,} parameters at most{kept}, in stage '{by_recipe.stage}': "
        f"{size(by_recipe.memory(1))}{share}",
    )
    if workers > 1:
        whole, largest = (size(count * FP32) for count in (by_recipe.model.parameters, by_recipe.model.largest))
        yield Finding(
            "note",
            f"{name}: the host of the first rank also holds the whole model, {whole}, while it draws fresh weights or "
            f"writes the model; the weights of a model folder reach the ranks tensor by tensor, {largest} at most",
        )


def _inputs(settings: ModelSettings) -> Iterator[Finding]:
    """The sizes that activations depend on."""
    side = settings.image_size
    yield Finding("note", f"trunk: {side} x {side} pixels, or what a recipe's buckets say")
    for name in settings.decoder_names:
        if (rule := settings.input_rules.get(name)) is not None:
            yield Finding("note", f"{name}: {rule}")
        elif DECODERS[name].reads == "pixels":
            yield Finding("note", f"{name}: as the trunk; '{name}: {{input_size: [800, 1333]}}' is as published")


def _room(roles: list[Role]) -> Iterator[Finding]:
    """Whether the model fits, on a GPU where there is one; in bf16, where it does not in fp32."""
    whole, largest = (f(role.parameters * FP32 for role in roles) for f in (sum, max))
    gpus = gpu_memory()
    room, where = (max(gpus), "the largest GPU") if gpus else (host_memory(), "this machine's memory")
    if whole <= room:
        yield Finding("ok", f"inference fits in {where}: {size(whole)} of {size(room)}")
    elif largest <= room and len(gpus) >= len(roles):
        yield Finding(
            "ok",
            f"inference fits with a GPU for each role, as 'serve' can place them: {size(largest)} of {size(room)}",
        )
    elif whole * BF16 // FP32 <= room:
        yield Finding(
            "ok",
            f"inference fits in {where} with --dtype bfloat16: about {size(whole * BF16 / FP32)} of {size(room)}",
        )
    else:
        yield Finding(
            "missing", f"inference needs {size(whole)} but {where} has {size(room)}; use a larger machine or GPU"
        )


def _gpus(roles: list[Role], by_recipe: ByRecipe | None, workers: int) -> Iterator[Finding]:
    """Whether GPUs are needed, and which are there."""
    whole, largest = (f(role.parameters * FP32 for role in roles) for f in (sum, max))
    gpus = gpu_memory()
    yield Finding(
        "note", f"found on this machine: {', '.join(map(size, gpus))}" if gpus else "none found on this machine"
    )
    yield Finding(
        "note",
        f"inference runs without one; it takes one of {size(whole)}, or to serve one for each role, of at most "
        f"{size(largest)}; about half with --dtype bfloat16",
    )
    if by_recipe is None or by_recipe.model is None:
        return
    name, least = f"recipe '{by_recipe.recipe.name}'", by_recipe.memory(workers)
    if by_recipe.recipe.precision == "fp32":
        yield Finding("note", f"training by {name} runs without one, in fp32")
        return
    have = sum(memory > least for memory in gpus)
    yield Finding(
        "ok" if have >= workers else "short",
        f"training by {name}, in bf16, needs {workers} with more than {size(least)} each; this machine has {have}"
        + ("" if have >= workers else ", the others must be in the Ray cluster"),
    )


def _weights(
    settings: ModelSettings, model: str | None, published: Mapping[str, int], recipe: Recipe | None
) -> Iterator[Finding]:
    """`published`: parameters by part, of those that have published weights."""
    from lumen_ray.model.build import read_meta
    from lumen_ray.presets import bundled_models, model_folder

    bundled = bundled_models()
    yield Finding("note", f"bundled: {', '.join(bundled) or 'none'}")
    name = model or (settings.name if settings.name in bundled else None)
    if name is not None:
        meta = read_meta(name)  # says in a sentence what is wrong with a folder
        weights = model_folder(name) / "model.safetensors"
        fits = meta.preset == settings.name
        told = f"{weights}, {size(weights.stat().st_size)}"
        yield Finding("ok" if fits else "missing", told if fits else f"{told}: of preset '{meta.preset}'")
    elif settings.published_weights:
        count = sum(published.values())
        yield Finding(
            "missing",
            f"no model folder was given; make one from published weights ({count:,} parameters, {size(count * BF16)} "
            f"in bf16) with '{settings.conversion}', then --model DIR; 'train' starts from it with --init-from DIR",
        )
    else:
        yield Finding("note", f"none come with the package: train it{_start(recipe)}")
    for part, count in published.items():
        yield Finding("note", f"published {part}: {count:,} parameters, {size(count * BF16)} in bf16")
    if published and (fresh := [name for name in settings.decoder_names if name not in published]):
        yield Finding("note", f"not published, so that they start from fresh weights: {', '.join(fresh)}")


def published_parameters(settings: ModelSettings, model: Generalist) -> dict[str, int]:
    """Parameters of the encoders, the LLM and the decoders of a preset's model that have published weights, by part."""
    from lumen_ray.model.build import count_parameters

    trunk, fresh = model.trunk, _fresh(settings, model)
    encoders = {"clip": trunk.vision.clip, "dinov2": trunk.vision.dinov2}
    found = {name: count_parameters(encoder.model) for name, encoder in encoders.items() if encoder is not None}
    found["llm"] = count_parameters(trunk.llm)
    for name in model.decoders:
        named = model.decoders[name].named_parameters(prefix=f"decoders.{name}")
        if count := sum(p.numel() for own, p in named if not own.startswith(fresh)):
            found[name] = count
    return found


def _fresh(settings: ModelSettings, model: Generalist) -> tuple[str, ...]:
    """Prefixes of the names of decoders' parameters that no published checkpoint has."""
    from lumen_ray.model.convert.decoders import loaders
    from lumen_ray.model.convert.visionllm_v2 import may_be_fresh

    if settings.prompt_layout == "sequential":  # the released VisionLLM v2
        return may_be_fresh(model.state_dict())
    known = loaders()
    own = {name: known[name].fresh if name in known else ("",) for name in model.decoders}
    return tuple(f"decoders.{name}.{prefix}" for name, prefixes in own.items() for prefix in prefixes)
