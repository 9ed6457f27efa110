"""`python jobs/bench.py KIND`: runs benches, prints a table, writes JSON. A kind is an entry of `KINDS`."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console

from lumen_ray.bench.timing import Result, SidesDiffer, table
from lumen_ray.console import comma_separated, console, say
from lumen_ray.errors import UserError, unknown
from lumen_ray.version import __version__

TABLE_WIDTH = 110  # columns, also where the terminal or the log has fewer


@dataclass(frozen=True)
class Bench:
    """`check` raises `UserError` for options with which `run` could not end; all are called before the first runs.
    `asked`: it only runs where `--only` names it."""

    run: Callable[[argparse.Namespace, Path], Iterable[Result]]
    check: Callable[[argparse.Namespace], None]
    asked: bool = False


# A bench imports what it runs when it is called: the one for GPUs runs where Ray is not installed.


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


def _gpu(args: argparse.Namespace, folder: Path) -> Iterator[Result]:
    from lumen_ray.bench import gpu

    load = {"load": gpu.Load(images=args.batch_size)} if args.batch_size else {}
    return gpu.bench(args.preset, **load, **_set({"turns": args.turns}))


def _check_preset(args: argparse.Namespace) -> None:
    from lumen_ray.presets import model_path

    model_path(args.preset)


def _grounding_dino(args: argparse.Namespace, folder: Path) -> Iterator[Result]:
    from lumen_ray.bench import decoders

    return decoders.bench(**_set({"turns": args.turns, "threads": args.threads}))


def _memory(args: argparse.Namespace, folder: Path) -> Iterator[Result]:
    from lumen_ray.bench import memory

    given = {"images": args.batch_size, "checkpointed": args.activation_checkpointing}
    return memory.bench(args.preset, args.decoders, **_set(given))


def _variants(args: argparse.Namespace, folder: Path) -> Iterator[Result]:
    from lumen_ray.bench import variants

    given = {"images": args.batch_size, "turns": args.turns}
    return variants.bench(args.preset, args.decoders, **_set(given))


def _check_memory(args: argparse.Namespace) -> None:
    from lumen_ray.bench.training_step import read_preset

    read_preset(args.preset, args.decoders)


def _check_variants(args: argparse.Namespace) -> None:
    from lumen_ray.bench import variants

    variants.check(args.preset, args.decoders)


#: kind -> its benches by name, in the order they run
KINDS: dict[str, dict[str, Bench]] = {
    "train": {
        "prompts": Bench(_prompts, _check_prompts),
        "input": Bench(_input, _check_input),
        "pipeline": Bench(_pipeline, _check_pipeline),
        "gpu": Bench(_gpu, _check_preset),
    },
    "decoders": {
        "grounding_dino": Bench(_grounding_dino, lambda args: None),
        "memory": Bench(_memory, _check_memory),
        "variants": Bench(_variants, _check_variants, asked=True),
    },
}
AT_LEAST_ONE = ("workers", "threads", "turns", "steps", "batch_size")


def _set(options: dict[str, Any]) -> dict[str, Any]:
    """The options that were given; the others keep each bench's own default."""
    return {name: value for name, value in options.items() if value is not None}


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="bench.py", description="Measures both sides of a comparison in one run.")
    kinds = parser.add_subparsers(dest="kind", metavar="KIND", required=True)
    p = _add_kind(kinds, "train", "training pipeline, input pipeline, prompts in one pass, GPU utilisation")
    p.add_argument("--shards", help="shards for input and pipeline (default: rendered scenes)")
    p.add_argument("--model", help="model folder for prompts (default: nano with random weights)")
    p.add_argument("--preset", default="small", help="preset for gpu (default: small)")
    p.add_argument("--workers", type=int, default=1, help="training workers of pipeline, reading processes of input")
    p.add_argument("--threads", type=int, help="threads of a training process (default: a core is left for reading)")
    p.add_argument("--steps", type=int, help="steps a side runs in one turn, warm-up included")
    p = _add_kind(kinds, "decoders", "grounding_dino against transformers, training steps of every decoder")
    p.add_argument(
        "--preset", default="nano-experts", help="whose decoders memory and variants look at (default: nano-experts)"
    )
    p.add_argument(
        "--decoders",
        type=comma_separated,
        help="comma separated, of the preset, for memory and variants (default: all)",
    )
    p.add_argument("--activation-checkpointing", action="store_true", help="of memory: as a recipe has it")
    p.add_argument("--threads", type=int, help="threads of grounding_dino's sides (default: torch's)")
    return parser


def _add_kind(kinds: Any, kind: str, about: str) -> argparse.ArgumentParser:
    """The parser of a kind, with the options that all have."""
    p = kinds.add_parser(kind, help=about)
    rest = [name for name, bench in KINDS[kind].items() if bench.asked]
    default = f"all but {', '.join(rest)}" if rest else "all"
    p.add_argument("--only", help=f"comma separated, of {', '.join(KINDS[kind])} (default: {default})")
    p.add_argument("--output", default=f"bench-{kind}.json", help=f"JSON to write (default: bench-{kind}.json)")
    p.add_argument("--check", action="store_true", help="exit status 1 when an aim is missed or the sides differ")
    p.add_argument("--turns", type=int, help="how often the sides take turns")
    p.add_argument("--batch-size", type=int, help="images a step")
    return p


def chosen(kind: str, only: str | None) -> dict[str, Bench]:
    """The benches of a kind that were asked for; `UserError` for a name that is none, or for no name."""
    benches = KINDS[kind]
    names = [name for name, bench in benches.items() if not bench.asked] if only is None else comma_separated(only)
    if not names:
        raise UserError(f"--only '{only}' names no bench; benches: {', '.join(sorted(benches))}", "invalid_option")
    for name in names:
        if name not in benches:
            raise unknown("bench", name, benches, plural="benches")
    return {name: bench for name, bench in benches.items() if name in names}


def check(args: argparse.Namespace, benches: dict[str, Bench]) -> None:
    """`UserError` for options that a bench would only stumble over when it, or those before it, have run."""
    for option in AT_LEAST_ONE:
        value = getattr(args, option, None)
        if value is not None and value < 1:
            raise UserError(f"--{option.replace('_', '-')} {value} must be 1 or more", "invalid_option")
    _check_output(Path(args.output))
    for bench in benches.values():
        bench.check(args)


def _check_output(path: Path) -> None:
    if path.is_dir():
        raise UserError(f"--output '{path}' is a folder; give the name of a JSON file", "invalid_output")
    if not path.parent.is_dir():
        raise UserError(
            f"--output '{path}' cannot be written: there is no folder '{path.parent}'; make it or give another",
            "invalid_output",
        )
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise UserError(f"--output '{path}' cannot be written: permission denied; give another", "invalid_output")


def processor(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """The CPU's model name; its architecture where the system does not tell."""
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return (named or [platform.processor() or platform.machine()])[0]


def machine() -> dict[str, Any]:
    """Where and on what the figures were taken."""
    import torch

    packages = {}
    for name in ("ray", "torch", "transformers", "simplejpeg", "pillow"):
        try:
            packages[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            packages[name] = None
    return {
        "cores": os.cpu_count(),
        "processor": processor(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "load": [round(value, 2) for value in os.getloadavg()],
        "python": platform.python_version(),
        "packages": packages,
    }


def results_of(benches: dict[str, Bench], args: argparse.Namespace) -> Iterator[Result]:
    for name, bench in benches.items():
        say(f"{name} ...")
        with tempfile.TemporaryDirectory(prefix="lumen-bench-") as folder:
            try:
                yield from bench.run(args, Path(folder))
            except SidesDiffer as error:
                yield Result(name, "", {}, failed=str(error))


def run(args: argparse.Namespace) -> list[Result]:
    """Runs the benches asked for; writes the JSON after each; prints the table and whether the aims are reached."""
    benches, results = chosen(args.kind, args.only), []
    check(args, benches)
    report = {
        "version": __version__,
        "kind": args.kind,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": machine(),
    }
    for result in results_of(benches, args):
        say(result.verdict())
        results.append(result)
        report["results"] = [r.to_json() for r in results]
        Path(args.output).write_text(json.dumps(report, indent=1) + "\n")
    Console(width=max(console.width, TABLE_WIDTH)).print(table(results))
    for result in results:
        _print_top(result)
    say(f"written to {args.output}")
    return results


def _print_top(result: Result) -> None:
    for side, operations in result.details.get("top", {}).items():
        mfu = result.details["mfu"][side]
        say(f"{result.name}, {side}" + (f": MFU {mfu:.1%}" if mfu else ""))
        for op in operations:
            say(f"  {op['share']:6.1%}  {op['ms']:9.2f} ms  {op['calls']:5d} calls  {op['name']}")


def main(argv: list[str] | None = None) -> int:
    """Exit status 0, 1 with `--check` when an aim is missed or the sides differ, or 2 for what the user must change."""
    from lumen_ray.ray_env import prepare_environment

    prepare_environment()
    args = build_parser().parse_args(argv)
    try:
        results = run(args)
    except UserError as error:
        print(f"bench: {error}", file=sys.stderr)
        return 2
    return int(args.check and any(result.reached is False for result in results))
