"""The kinds of `python jobs/bench.py`, each with its benches: how a bench takes its options from the command line.

Benches are imported when they run: the one for GPUs must work where Ray is not installed.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from lumen_ray.bench.timing import Result
from lumen_ray.errors import UserError


@dataclass(frozen=True)
class Bench:
    """`check` raises `UserError` for options that `run` cannot finish with; every check is called before the first run.
    `optional`: runs only if `--only` names it."""

    run: Callable[[argparse.Namespace, Path], Iterable[Result]]
    check: Callable[[argparse.Namespace], None]
    optional: bool = False


def _set(options: dict[str, Any]) -> dict[str, Any]:
    """The options that were given; others keep the default of each bench."""
    return {name: value for name, value in options.items() if value is not None}


def _pipeline(args: argparse.Namespace, folder: Path) -> list[Result]:
    from lumen_ray.bench import pipeline

    given = {"steps": args.steps, "batch_size": args.batch_size, "threads": args.threads, "turns": args.turns}
    return [pipeline.bench(folder, args.shards, workers=args.workers, **_set(given))]


def _input(args: argparse.Namespace, folder: Path) -> list[Result]:
    from lumen_ray.bench import inputs

    given = {"steps": args.steps, "batch_size": args.batch_size, "turns": args.turns}
    return [inputs.bench(folder, args.shards, workers=args.workers, **_set(given))]


def _check_pipeline(args: argparse.Namespace) -> None:
    from lumen_ray.bench import pipeline

    given = {"steps": args.steps, "batch_size": args.batch_size}
    pipeline.check(args.shards, workers=args.workers, **_set(given))


def _check_input(args: argparse.Namespace) -> None:
    from lumen_ray.bench import inputs

    given = {"steps": args.steps, "batch_size": args.batch_size}
    inputs.check(args.shards, workers=args.workers, **_set(given))


def _prompts(args: argparse.Namespace, folder: Path) -> list[Result]:
    from lumen_ray.bench import prompts

    engine = prompts.load_engine(args.model)
    return [prompts.bench(engine, **_set({"threads": args.threads, "turns": args.turns}))]


def _check_prompts(args: argparse.Namespace) -> None:
    from lumen_ray.presets import model_folder

    if args.model:
        model_folder(args.model)


def _classes(args: argparse.Namespace, folder: Path) -> Iterator[Result]:
    from lumen_ray.bench import classes

    given = {"model": args.model, "threads": args.threads, "turns": args.turns, "against_model": args.against_model}
    return classes.bench(against=args.against, **_set(given))


def _check_classes(args: argparse.Namespace) -> None:
    from lumen_ray.bench import classes

    classes.check(args.against)
    _check_prompts(args)
    if args.against_model and not args.against:
        raise UserError("--against-model is the model of another checkout; give that with --against", "usage")


def _gpu(args: argparse.Namespace, folder: Path) -> Iterator[Result]:
    from lumen_ray.bench import gpu

    load = gpu.Load(images=args.batch_size) if args.batch_size else None
    return gpu.bench(args.preset, load=load, **_set({"turns": args.turns}))


def _check_gpu(args: argparse.Namespace) -> None:
    from lumen_ray.bench import gpu

    gpu.check(args.preset)


def _checkpoint(args: argparse.Namespace, folder: Path) -> Iterator[Result]:
    from lumen_ray.bench import checkpoint

    return checkpoint.bench(folder, args.preset, **_set({"batch_size": args.batch_size, "turns": args.turns}))


def _check_checkpoint(args: argparse.Namespace) -> None:
    from lumen_ray.bench import checkpoint

    checkpoint.check(args.preset, **_set({"batch_size": args.batch_size}))


def _grounding_dino(args: argparse.Namespace, folder: Path) -> Iterator[Result]:
    from lumen_ray.bench import grounding_dino

    return grounding_dino.bench(**_set({"turns": args.turns, "threads": args.threads}))


def _memory(args: argparse.Namespace, folder: Path) -> Iterator[Result]:
    from lumen_ray.bench import memory

    given = {"images": args.batch_size, "checkpointed": args.activation_checkpointing}
    return memory.bench(args.preset, args.decoders, **_set(given))


def _variants(args: argparse.Namespace, folder: Path) -> Iterator[Result]:
    from lumen_ray.bench import variants

    given = {"images": args.batch_size, "turns": args.turns}
    return variants.bench(args.preset, args.decoders, **_set(given))


def _frozen_trunk(args: argparse.Namespace, folder: Path) -> Iterator[Result]:
    from lumen_ray.bench import frozen_trunk

    return frozen_trunk.bench(folder, **_set({"turns": args.turns, "batch_size": args.batch_size}))


def _check_memory(args: argparse.Namespace) -> None:
    from lumen_ray.bench.training_step import read_preset

    read_preset(args.preset, args.decoders)


def _check_variants(args: argparse.Namespace) -> None:
    from lumen_ray.bench import variants

    variants.check(args.preset, args.decoders)


def _chat(name: str, args: argparse.Namespace, folder: Path) -> list[Result]:
    from lumen_ray.bench import chat

    given = {"turns": args.turns, "users": args.users, "threads": args.threads, "vllm": args.vllm}
    return [chat.bench(name, folder, args.llm, **_set(given))]


def _check_chat(args: argparse.Namespace) -> None:
    from lumen_ray.bench import chat

    chat.check(args.llm)


def _objects(args: argparse.Namespace, folder: Path) -> Iterator[Result]:
    from lumen_ray.bench import objects

    return objects.bench(**_set({"model": args.model, "threads": args.threads, "turns": args.turns}))


def _label(args: argparse.Namespace, folder: Path) -> Iterator[Result]:
    from lumen_ray.bench import label

    return label.bench(folder, **_set({"model": args.model, "threads": args.threads, "turns": args.turns}))


def _label_command(args: argparse.Namespace, folder: Path) -> Iterator[Result]:
    from lumen_ray.bench import label

    given = {"model": args.model, "turns": args.turns, "images": args.images}
    return label.bench_command(folder, against=args.against, **_set(given))


def _check_label_command(args: argparse.Namespace) -> None:
    from lumen_ray.bench import classes

    if not args.against:
        raise UserError("the bench 'command' compares two checkouts; name the other one with --against", "usage")
    classes.check(args.against)
    _check_prompts(args)


def _label_scale(args: argparse.Namespace, folder: Path) -> Iterator[Result]:
    from lumen_ray.bench import label_scale

    return label_scale.bench(folder, **_set({"numbers": args.numbers}))


def _plan(args: argparse.Namespace, folder: Path) -> Iterator[Result]:
    from lumen_ray.bench import plan

    given = {"model": args.model, "turns": args.turns, "images": args.images, "tasks": args.tasks}
    return plan.bench(folder, **_set(given))


def _yolo(args: argparse.Namespace, folder: Path) -> list[Result]:
    from lumen_ray.bench import yolo

    given = {"model": args.model, "threads": args.threads, "turns": args.turns}
    return [yolo.bench(folder, ultralytics=args.ultralytics, **_set(given))]


def _check_yolo(args: argparse.Namespace) -> None:
    from lumen_ray.bench import yolo

    yolo.check(args.model, args.ultralytics)


def _serve(name: str, args: argparse.Namespace, folder: Path) -> Iterator[Result]:
    from lumen_ray.bench import serve

    given = {"model": args.model, "threads": args.threads, "turns": args.turns, "rate": args.rate}
    return serve.bench(name, against=args.against, haproxy=args.haproxy, **_set(given))


def _serve_stream(args: argparse.Namespace, folder: Path) -> Iterable[Result]:
    if args.llm is None:
        return [Result("stream", "tokens/s", {}, skipped="give --llm FOLDER, a published LLM with a chat template")]
    from lumen_ray.bench import serve_stream

    return serve_stream.bench(folder, args.llm, **_set({"threads": args.threads, "turns": args.turns}))


def _check_serve_stream(args: argparse.Namespace) -> None:
    from lumen_ray.bench import chat

    chat.check(args.llm)


def _check_serve(args: argparse.Namespace) -> None:
    from lumen_ray.bench import classes

    classes.check(args.against)
    _check_prompts(args)
    if args.rate is not None and args.rate <= 0:
        raise UserError(f"--rate {args.rate:g} must be above 0", "invalid_option")


#: kind -> its benches by name, in the order in which they run
KINDS: dict[str, dict[str, Bench]] = {
    "train": {
        "prompts": Bench(_prompts, _check_prompts),
        "input": Bench(_input, _check_input),
        "pipeline": Bench(_pipeline, _check_pipeline),
        "gpu": Bench(_gpu, _check_gpu),
        "checkpoint": Bench(_checkpoint, _check_checkpoint, optional=True),
    },
    "prompts": {"classes": Bench(_classes, _check_classes)},
    "objects": {"objects": Bench(_objects, _check_prompts)},
    "label": {
        "worker": Bench(_label, _check_prompts),
        "command": Bench(_label_command, _check_label_command, optional=True),
        "scale": Bench(_label_scale, lambda args: None, optional=True),
    },
    "plan": {"plan": Bench(_plan, _check_prompts)},
    "yolo": {"yolo": Bench(_yolo, _check_yolo)},
    "decoders": {
        "grounding_dino": Bench(_grounding_dino, lambda args: None),
        "memory": Bench(_memory, _check_memory),
        "variants": Bench(_variants, _check_variants, optional=True),
        "frozen_trunk": Bench(_frozen_trunk, lambda args: None, optional=True),
    },
    "serve": {
        **{name: Bench(partial(_serve, name), _check_serve) for name in ("latency", "throughput", "cached", "load")},
        "stream": Bench(_serve_stream, _check_serve_stream, optional=True),
    },
    "chat": {
        name: Bench(partial(_chat, name), _check_chat) for name in ("images", "single", "serve", "vllm", "memory")
    },
}
