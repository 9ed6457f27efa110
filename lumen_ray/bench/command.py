"""`python jobs/bench.py KIND`: runs benches, prints a table, writes JSON. A kind is an entry of `KINDS`."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from rich.console import Console

from lumen_ray import __version__
from lumen_ray.bench.timing import Result, table
from lumen_ray.console import console, say
from lumen_ray.errors import UserError, unknown

Bench = Callable[[argparse.Namespace, Path], list[Result]]
TABLE_WIDTH = 110  # columns, also where the terminal or the log has fewer


# A bench imports what it runs when it is called: the one for GPUs runs where Ray is not installed.


def _pipeline(args: argparse.Namespace, folder: Path) -> list[Result]:
    from lumen_ray.bench import pipeline

    given = {"steps": args.steps, "batch_size": args.batch_size, "threads": args.threads, "turns": args.turns}
    return [pipeline.bench(folder, args.shards, workers=args.workers, **_set(given))]


def _input(args: argparse.Namespace, folder: Path) -> list[Result]:
    from lumen_ray.bench import inputs

    given = {"steps": args.steps, "batch_size": args.batch_size, "turns": args.turns}
    return [inputs.bench(folder, args.shards, workers=args.workers, **_set(given))]


def _prompts(args: argparse.Namespace, folder: Path) -> list[Result]:
    from lumen_ray.bench import prompts

    engine = prompts.load_engine(args.model)
    return [prompts.bench(engine, **_set({"threads": args.threads, "turns": args.turns}))]


def _gpu(args: argparse.Namespace, folder: Path) -> list[Result]:
    from lumen_ray.bench import gpu

    load = {"load": gpu.Load(images=args.batch_size)} if args.batch_size else {}
    return gpu.bench(args.preset, **load, **_set({"turns": args.turns}))


#: kind -> its benches by name, in the order they run
KINDS: dict[str, dict[str, Bench]] = {
    "train": {"prompts": _prompts, "input": _input, "pipeline": _pipeline, "gpu": _gpu},
}


def _set(options: dict[str, Any]) -> dict[str, Any]:
    """The options that were given; the others keep each bench's own default."""
    return {name: value for name, value in options.items() if value is not None}


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="bench.py", description="Measures both sides of a comparison in one run.")
    kinds = parser.add_subparsers(dest="kind", metavar="KIND", required=True)
    p = kinds.add_parser("train", help="training pipeline, input pipeline, prompts in one pass, GPU utilisation")
    p.add_argument("--only", help=f"comma separated, of {', '.join(KINDS['train'])} (default: all)")
    p.add_argument("--output", default="bench-train.json", help="JSON to write (default: bench-train.json)")
    p.add_argument("--shards", help="shards for input and pipeline (default: rendered scenes)")
    p.add_argument("--model", help="model folder for prompts (default: nano with random weights)")
    p.add_argument("--preset", default="small", help="preset for gpu (default: small)")
    p.add_argument("--workers", type=int, default=1, help="training workers of pipeline, reading processes of input")
    p.add_argument("--threads", type=int, help="threads of a training process (default: a core is left for reading)")
    p.add_argument("--turns", type=int, help="how often the sides take turns")
    p.add_argument("--steps", type=int, help="steps a side runs in one turn")
    p.add_argument("--batch-size", type=int, help="images a step")
    return parser


def chosen(kind: str, only: str | None) -> dict[str, Bench]:
    """The benches of a kind that were asked for; `UserError` for a name that is none."""
    benches = KINDS[kind]
    names = [name.strip() for name in only.split(",") if name.strip()] if only else list(benches)
    for name in names:
        if name not in benches:
            raise unknown("bench", name, benches, plural="benches")
    return {name: bench for name, bench in benches.items() if name in names}


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
        "processor": platform.processor() or platform.machine(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "load": [round(value, 2) for value in os.getloadavg()],
        "python": platform.python_version(),
        "packages": packages,
    }


def results_of(benches: dict[str, Bench], args: argparse.Namespace) -> Iterator[Result]:
    for name, bench in benches.items():
        say(f"{name} ...")
        with tempfile.TemporaryDirectory(prefix="lumen-bench-") as folder:
            yield from bench(args, Path(folder))


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Runs the benches asked for; prints the table; returns and writes what the JSON holds, after each bench."""
    benches, results = chosen(args.kind, args.only), []
    report = {"version": __version__, "kind": args.kind, "time": round(time.time()), "machine": machine()}
    for result in results_of(benches, args):
        results.append(result)
        report["results"] = [r.to_json() for r in results]
        Path(args.output).write_text(json.dumps(report, indent=1) + "\n")
    Console(width=max(console.width, TABLE_WIDTH)).print(table(results))
    for result in results:
        if result.skipped:
            say(f"{result.name} was left out: {result.skipped}")
        _print_top(result)
    say(f"written to {args.output}")
    return report


def _print_top(result: Result) -> None:
    for side, operations in result.details.get("top", {}).items():
        mfu = result.details["mfu"][side]
        say(f"{result.name}, {side}" + (f": MFU {mfu:.1%}" if mfu else ""))
        for op in operations:
            say(f"  {op['share']:6.1%}  {op['ms']:9.2f} ms  {op['calls']:5d} calls  {op['name']}")


def main(argv: list[str] | None = None) -> int:
    """Exit status 0, or 2 for what the user must change."""
    from lumen_ray.ray_env import prepare_environment

    prepare_environment()
    try:
        run(build_parser().parse_args(argv))
    except UserError as error:
        print(f"bench: {error}", file=sys.stderr)
        return 2
    return 0
