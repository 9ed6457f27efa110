"""`lumen-ray doctor`: what a preset needs, what this machine has, and what is missing.

Sizes are counted on a model that is built on the meta device: nothing is allocated, so that a laptop can size the
largest preset. Activations come on top; they depend on batch and image size.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from rich.markup import escape

from lumen_ray.console import say
from lumen_ray.decoders.registry import DECODERS, check_usable, problems
from lumen_ray.errors import UserError
from lumen_ray.footprint import BF16, FP32, RecipeFootprint, Role, combined, count_recipe, meta_model, roles_of
from lumen_ray.installation import Finding, gpu_memory, host_memory, machine, packages, size

if TYPE_CHECKING:
    from lumen_ray.model.build import Generalist
    from lumen_ray.model.settings import ModelSettings
    from lumen_ray.recipe import Recipe


def add_args(verbs: Any) -> None:
    """The verb's options; `verbs` are argparse's subparsers."""
    p = verbs.add_parser("doctor", help="check what a preset needs and what this machine has")
    p.add_argument("--preset", default="nano", help="name in configs/models, or a YAML file (default: nano)")
    p.add_argument("--model", help="model folder with the preset's weights (default: the bundled ones, if any)")
    p.add_argument("--workers", type=int, help="training ranks (default: those of the recipe of the preset's name)")
    p.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    sections, can_run = examine(args.preset, args.model, args.workers)
    for title, findings in sections.items():
        say(title)
        for finding in findings:
            say(escape(f"  {finding.state if finding.state != 'note' else '-':<8} {finding.text}"))
    first = {f.state: f.text for findings in reversed(sections.values()) for f in reversed(findings)}
    training = f", but not be trained by its recipe: {first['short']}" if "short" in first else ""
    say(f"preset '{args.preset}' " + (f"can run here{training}" if can_run else f"cannot run here: {first['missing']}"))
    return 0 if can_run else 1


def examine(preset: str, model: str | None = None, workers: int | None = None) -> tuple[dict[str, list[Finding]], bool]:
    """Findings by section, and whether the preset can run. Raises `UserError` for an unknown preset or model."""
    sections = {"packages": list(packages())}
    if all(finding.state != "missing" for finding in sections["packages"]):
        from lumen_ray import config
        from lumen_ray.model.settings import ModelSettings
        from lumen_ray.presets import model_path

        settings = config.load(ModelSettings, model_path(preset))
        sections["machine"] = list(machine())
        if plug_ins := list(_plug_ins()):
            sections["decoders of other packages"] = plug_ins
        recipe = _recipe(settings.name)
        workers = workers or (recipe.workers if recipe else 1)
        title = f"memory of '{settings.name}', weights and optimiser, activations aside"
        published: dict[str, int] = {}
        try:
            counted = meta_model(settings)
        except ImportError as error:  # a decoder whose package is optional
            needs = f"preset '{settings.name}' needs a package that is not installed: {error}"
            sections[title] = [Finding("missing", needs)]
        else:
            roles = roles_of(counted)
            published = published_parameters(settings, counted) if settings.published_weights else {}
            by_recipe = count_recipe(settings, recipe) if recipe else None
            sections[title] = [*_needs(roles, workers, by_recipe), *_room(roles)]
            sections["image sizes"] = list(_inputs(settings))
            sections[f"GPUs for '{settings.name}'"] = list(_gpus(roles, by_recipe, workers))
        sections["weights"] = list(_weights(settings, model, published, recipe))
    can_run = all(finding.state != "missing" for findings in sections.values() for finding in findings)
    return sections, can_run


def _recipe(preset: str) -> Recipe | None:
    """The recipe of the preset's name, if there is one and it trains the preset."""
    from lumen_ray import config
    from lumen_ray.presets import recipe_path
    from lumen_ray.recipe import Recipe

    try:
        recipe = config.load(Recipe, recipe_path(preset))
    except UserError:
        return None
    return recipe if recipe.model == preset else None


def _start(recipe: Recipe | None) -> str:
    """A clause on the weights that the recipe of the preset's name starts from."""
    if recipe is None:
        return ""
    start = f"'{recipe.init_from}'" if recipe.init_from else "fresh weights"
    return f", its recipe starts from {start}"


def _needs(roles: list[Role], workers: int, by_recipe: RecipeFootprint | None) -> Iterator[Finding]:
    """Memory by role, with training of all weights that the model's settings do not freeze; then that of the recipe."""
    total = combined(roles)
    width = max(len(role.name) for role in (*roles, total))
    for role in (*roles, total):
        share = f", {size(role.training(workers))} on each of {workers} ranks" if workers > 1 else ""
        trainable = "all" if role.num_trainable == role.parameters else f"{role.num_trainable:,} of them"
        yield Finding(
            "note",
            f"{role.name:<{width}} {role.parameters:>15,} parameters; inference {size(role.parameters * FP32)} fp32, "
            f"{size(role.parameters * BF16)} bf16; training {trainable} {size(role.training(1))}{share}",
        )
    yield Finding(
        "note",
        "a role reads its own weights tensor by tensor: its host needs memory for weights that stay on it, none for "
        f"weights on a GPU, and at most {size(total.largest * FP32)} for the one on its way",
    )
    if by_recipe is None:
        return
    name = f"recipe '{by_recipe.recipe.name}'"
    if by_recipe.model is None:
        yield Finding("note", f"{name}: its trainable parameters cannot be counted: {by_recipe.fault}")
        return
    share = f", {size(by_recipe.memory(workers))} on each of {workers} ranks" if workers > 1 else ""
    average = " and keeps an average of the weights" if by_recipe.averaged else ""
    yield Finding(
        "note",
        f"{name} trains {by_recipe.model.num_trainable:,} parameters at most{average}, in stage '{by_recipe.stage}': "
        f"{size(by_recipe.memory(1))}{share}",
    )
    if workers > 1:
        whole, largest = (size(count * FP32) for count in (by_recipe.model.parameters, by_recipe.model.largest))
        yield Finding(
            "note",
            f"{name}: the host of the first rank also holds the whole model, {whole}, while it draws fresh weights or "
            f"writes the model; the weights of a model folder reach the ranks tensor by tensor, {largest} at most",
        )


def _plug_ins() -> Iterator[Finding]:
    """Decoders that other packages register, and those of them that cannot be used."""
    for spec in DECODERS.values():
        if spec.package:
            try:
                check_usable(spec.name)
            except UserError as error:
                yield Finding("note", str(error))
                continue
            tasks = ", ".join(spec.tasks)
            yield Finding("ok", f"{spec.name} of package '{spec.package}': {spec.description or 'serves'} ({tasks})")
    for problem in problems():
        yield Finding("note", problem)


def _inputs(settings: ModelSettings) -> Iterator[Finding]:
    """The input size of the trunk and of each decoder, which activations depend on."""
    side = settings.image_size
    yield Finding("note", f"trunk: {side} x {side} pixels, or what a recipe's buckets say")
    for name in settings.decoder_names:
        if (rule := settings.input_rules.get(name)) is not None:
            yield Finding("note", f"{name}: {rule}")
        elif settings.sections[name].source(DECODERS[name].reads) == "pixels":
            yield Finding("note", f"{name}: as the trunk; '{name}: {{input_size: [800, 1333]}}' for the published size")


def _room(roles: list[Role]) -> Iterator[Finding]:
    """Checks whether the model fits, on a GPU if there is one; in bf16 if it does not fit in fp32."""
    whole, largest = (f(role.parameters * FP32 for role in roles) for f in (sum, max))
    gpus = gpu_memory()
    room, where = (max(gpus), "the largest GPU") if gpus else (host_memory(), "this machine's memory")
    if whole <= room:
        yield Finding("ok", f"inference fits in {where}: {size(whole)} of {size(room)}")
    elif largest <= room and len(gpus) >= len(roles):
        yield Finding(
            "ok",
            f"inference fits with a GPU for each role, which 'serve' can do: {size(largest)} of {size(room)}",
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


def _gpus(roles: list[Role], by_recipe: RecipeFootprint | None, workers: int) -> Iterator[Finding]:
    """The GPUs that inference and the recipe need, and those of this machine."""
    whole, largest = (f(role.parameters * FP32 for role in roles) for f in (sum, max))
    gpus = gpu_memory()
    yield Finding(
        "note", f"found on this machine: {', '.join(map(size, gpus))}" if gpus else "none found on this machine"
    )
    yield Finding(
        "note",
        f"inference runs without a GPU; on one it takes {size(whole)}, when serving with a GPU for each role at most "
        f"{size(largest)} each; about half with --dtype bfloat16",
    )
    if by_recipe is None or by_recipe.model is None:
        return
    name, needed = f"recipe '{by_recipe.recipe.name}'", by_recipe.memory(workers)
    if by_recipe.recipe.precision == "fp32":
        yield Finding("note", f"training by {name} runs without a GPU, in fp32")
        return
    have = sum(memory > needed for memory in gpus)
    yield Finding(
        "ok" if have >= workers else "short",
        f"training by {name}, in bf16, needs {workers} with more than {size(needed)} each; this machine has {have}"
        + ("" if have >= workers else ", the others must be in the Ray cluster"),
    )


def _weights(
    settings: ModelSettings, model: str | None, published: Mapping[str, int], recipe: Recipe | None
) -> Iterator[Finding]:
    """Checks the weights of the preset. published: parameters of each part that has published weights."""
    from lumen_ray.model.build import read_meta
    from lumen_ray.presets import bundled_models, model_folder

    bundled = bundled_models()
    yield Finding("note", f"bundled: {', '.join(bundled) or 'none'}")
    name = model or (settings.name if settings.name in bundled else None)
    if name is not None:
        meta = read_meta(name)  # raises `UserError` for a damaged folder
        weights = model_folder(name) / "model.safetensors"
        fits = meta.preset == settings.name
        text = f"{weights}, {size(weights.stat().st_size)}"
        yield Finding("ok" if fits else "missing", text if fits else f"{text}: of preset '{meta.preset}'")
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
        yield Finding("note", f"not published, start from fresh weights: {', '.join(fresh)}")


def published_parameters(settings: ModelSettings, model: Generalist) -> dict[str, int]:
    """Number of parameters of each encoder, LLM and decoder of a preset's model that has published weights, by name."""
    from lumen_ray.model.build import count_parameters

    trunk, fresh = model.trunk, _fresh(settings, model)
    encoders = {"clip": trunk.vision.clip, "dinov2": trunk.vision.dinov2}
    counts = {name: count_parameters(encoder.model) for name, encoder in encoders.items() if encoder is not None}
    counts["llm"] = count_parameters(trunk.llm)
    for name in model.decoders:
        named = model.decoders[name].named_parameters(prefix=f"decoders.{name}")
        if count := sum(p.numel() for path, p in named if not path.startswith(fresh)):
            counts[name] = count
    return counts


def _fresh(settings: ModelSettings, model: Generalist) -> tuple[str, ...]:
    """Name prefixes of the decoders' parameters that are in no published checkpoint."""
    from lumen_ray.model.convert.decoders import loaders
    from lumen_ray.model.convert.visionllm_v2 import may_be_fresh

    if settings.prompt_layout == "sequential":  # the released VisionLLM v2
        return may_be_fresh(model.state_dict())
    known = loaders()
    fresh = {name: known[name].fresh if name in known else ("",) for name in model.decoders}
    return tuple(f"decoders.{name}.{prefix}" for name, prefixes in fresh.items() for prefix in prefixes)
