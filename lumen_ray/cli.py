"""`lumen-ray`: quickstart, prepare, data, train, evaluate, label, serve, convert, doctor.

Heavy imports happen inside the commands, so that `--help` and mistakes answer at once.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NoReturn

from lumen_ray import __version__, doctor
from lumen_ray.console import bar, comma_separated, console, say, training_note
from lumen_ray.data import command as data_command
from lumen_ray.errors import UserError, suggest
from lumen_ray.label.pipeline import labelled_line
from lumen_ray.model.convert import command as convert
from lumen_ray.presets import DEFAULT_MODEL, bundled_models, model_folder
from lumen_ray.ray_env import prepare_environment

EXIT_USER_ERROR = 2
#: verbs that continue where they stopped
RESUMABLE = ("quickstart", "train", "label")


class _Parser(argparse.ArgumentParser):
    """Mistakes on the command line are one sentence too."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message.replace(chr(10), ' ')} (see '{self.prog} --help')", "usage")


def _classes(text: str) -> list[str]:
    """Class names of a command line, or of a file with one name a line."""
    path = Path(text)
    if not os.path.isfile(path):  # `Path.is_file` raises for a text longer than a file's name may be
        if path.suffix == ".txt":
            raise UserError(f"class file '{text}' does not exist", "invalid_classes")
        return comma_separated(text)
    try:
        return [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError):
        raise UserError(
            f"class file '{text}' cannot be read; give a UTF-8 text file with one class a line", "invalid_classes"
        ) from None


def build_parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="lumen-ray", description=__doc__.splitlines()[0])
    parser.add_argument("--version", action="version", version=f"lumen-ray {__version__}")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", parser_class=_Parser)
    _quickstart_args(verbs)
    data_command.add_args(verbs, _Parser)
    _train_args(verbs)
    _evaluate_args(verbs)
    _label_args(verbs)
    _serve_args(verbs)
    convert.add_args(verbs, _Parser)
    doctor.add_args(verbs)
    return parser


def _quickstart_args(verbs: Any) -> None:
    p = verbs.add_parser("quickstart", help="the whole pipeline on synthetic scenes, in minutes on a CPU")
    p.add_argument("--output", default="quickstart", help="folder for everything it makes (default: quickstart)")
    p.add_argument("--recipe", default="quickstart", help="recipe name or YAML (default: quickstart)")
    p.add_argument("--scenes", type=int, default=4096, help="training scenes to render")
    p.add_argument("--held-out", type=int, default=192, help="scenes of another seed to evaluate on")
    p.add_argument("--port", type=int, default=8000)
    p.add_argument("--keep-serving", action="store_true", help="leave the server up at the end")
    p.set_defaults(run=_quickstart)


def _train_args(verbs: Any) -> None:
    p = verbs.add_parser("train", help="run a recipe over shards; run it again to resume")
    p.add_argument("--recipe", required=True, help="name in configs/recipes or a YAML file")
    p.add_argument("--shards", required=True, help="shard folder")
    p.add_argument("--output", required=True, help="run folder; the trained model is in its 'model' folder")
    p.add_argument(
        "--init-from",
        help="model folder (or bundled weights) to start from, instead of the recipe's; decoders it lacks start fresh",
    )
    p.add_argument("--workers", type=int, help="Ray Train workers, instead of the recipe's")
    p.set_defaults(run=_train)


def _model_arg(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model",
        default=DEFAULT_MODEL,
        help=f"model folder, or the name of bundled weights (default: {DEFAULT_MODEL}, for the synthetic scenes)",
    )


def _decoders_arg(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--decoders",
        type=comma_separated,
        action="extend",
        default=[],
        metavar="TASK=DECODER,..",
        help="who serves a task that several of the model's decoders can, e.g. detect=grounding_dino,pose=unipose "
        "(default: what the model's settings say)",
    )


def _device_arg(parser: argparse.ArgumentParser, default: str) -> None:
    parser.add_argument("--device", help=f"cpu, cuda or cuda:N, to run the model on (default: {default})")


def _dtype_arg(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--dtype",
        default="float32",
        help="float32, or bfloat16: half the memory and, on GPUs, faster (default: float32)",
    )


def _evaluate_args(verbs: Any) -> None:
    p = verbs.add_parser("evaluate", help="score a model on shards: one table, one JSON")
    _model_arg(p)
    _decoders_arg(p)
    _device_arg(p, "cuda where torch sees a GPU, else cpu")
    _dtype_arg(p)
    p.add_argument("--shards", required=True, help="shard folder of the held-out split")
    p.add_argument("--output", required=True, help="folder for report.json and predictions.parquet")
    p.add_argument(
        "--tasks", type=comma_separated, help="only these, comma separated (default: all the split is annotated for)"
    )
    p.add_argument("--limit", type=int, help="first images only")
    p.add_argument("--pictures", type=int, default=32, help="first images only, for tasks that make pictures: 32")
    p.set_defaults(run=_evaluate)


def _label_args(verbs: Any) -> None:
    p = verbs.add_parser("label", help="label a folder of images: Parquet, COCO json, HTML gallery")
    p.add_argument("input", help="folder, glob or shard folder")
    _model_arg(p)
    _decoders_arg(p)
    _device_arg(p, "a GPU for each actor where the Ray cluster has any, else cpu")
    _dtype_arg(p)
    p.add_argument("--output", required=True, help="folder for the labels; run again to continue after a stop")
    p.add_argument(
        "--tasks",
        type=comma_separated,
        default=["detect"],
        help="comma separated, e.g. segment,caption (default: detect)",
    )
    p.add_argument("--classes", help="comma separated, or a .txt file with one a line (default: the model's own)")
    p.add_argument(
        "--text",
        action="append",
        default=[],
        metavar="TASK=TEXT",
        help="what to ask for vqa, refer, ground or chat, beside --tasks; can be given several times",
    )
    p.add_argument("--score-threshold", type=float, default=0.3, help="answers below are left out (default: 0.3)")
    p.add_argument("--batch-size", type=int, default=8, help="images per pass (default: 8)")
    p.add_argument("--actors", type=int, default=1, help="model actors on Ray (default: 1; 0: without Ray)")
    p.set_defaults(run=_label)


def _serve_args(verbs: Any) -> None:
    p = verbs.add_parser("serve", help="serve a model over HTTP with Ray Serve")
    p.add_argument("--config", default="nano", help="name in configs/serve or a YAML file (default: nano)")
    p.add_argument("--model", help="model folder or name of bundled weights, instead of the config's")
    _decoders_arg(p)
    p.add_argument("--host", help="address to bind, instead of the config's")
    p.add_argument("--port", type=int, help="port, instead of the config's")
    p.set_defaults(run=_serve)


def _quickstart(args: argparse.Namespace) -> None:
    from lumen_ray.quickstart import quickstart

    quickstart(
        args.output,
        recipe_name=args.recipe,
        scenes=args.scenes,
        held_out=args.held_out,
        port=args.port,
        keep_serving=args.keep_serving,
    )


def _train(args: argparse.Namespace) -> None:
    from lumen_ray import config
    from lumen_ray.presets import recipe_path
    from lumen_ray.recipe import Recipe
    from lumen_ray.train.launch import train

    recipe = config.load(Recipe, recipe_path(args.recipe))
    if args.workers is not None:
        recipe = config.validate(Recipe, recipe.model_dump(mode="json") | {"workers": args.workers}, "--workers")
    with bar(f"train {recipe.name}") as progress:
        model = train(
            args.shards,
            recipe,
            args.output,
            init_from=args.init_from,
            progress=lambda line: progress.update(line["step"] + 1, recipe.total_steps, training_note(line)),
            waiting=progress.line,
        )
    say(f"model -> {model}; logs -> {args.output}/metrics.jsonl and {args.output}/tensorboard")


def _evaluate(args: argparse.Namespace) -> None:
    model_folder(args.model)  # no wait for the imports where there is none
    from lumen_ray.evaluate.report import print_report
    from lumen_ray.evaluate.run import evaluate
    from lumen_ray.inference.device import find_device
    from lumen_ray.inference.engine import Engine

    engine = Engine.load(args.model, find_device(args.device), _decoders(args.decoders), args.dtype)
    with bar("evaluate") as progress:
        report = evaluate(
            engine,
            args.shards,
            args.output,
            tasks=args.tasks,
            limit=args.limit,
            picture_limit=args.pictures,
            progress=progress.update,
        )
    print_report(report, console)
    say(f"report -> {args.output}/report.json")


def _split(option: str, pairs: list[str], form: str, example: str) -> Iterable[tuple[str, str]]:
    for pair in pairs:
        task, equals, value = pair.partition("=")
        if not equals:
            raise UserError(f"{option} '{pair}' must be {form}, e.g. {option} {example}", "usage")
        yield task.strip(), value.strip()


def _texts(pairs: list[str]) -> dict[str, list[str]]:
    """``["vqa=how many ?"] -> {"vqa": ["how many ?"]}``."""
    prompts: dict[str, list[str]] = {}
    for task, text in _split("--text", pairs, "TASK=TEXT", "'vqa=how many circles are there ?'"):
        prompts.setdefault(task, []).append(text)
    return prompts


def _decoders(pairs: list[str]) -> dict[str, str]:
    """``["detect=lumen"] -> {"detect": "lumen"}``."""
    chosen: dict[str, str] = {}
    for task, decoder in _split("--decoders", pairs, "TASK=DECODER", "detect=grounding_dino,pose=unipose"):
        if task in chosen:
            raise UserError(f"--decoders names task '{task}' twice; give one decoder for it", "usage")
        chosen[task] = decoder
    return chosen


def _label(args: argparse.Namespace) -> None:
    model_folder(args.model)
    from lumen_ray.label.pipeline import label
    from lumen_ray.model.build import read_meta
    from lumen_ray.tasks import get_task

    classes = None if args.classes is None else _classes(args.classes)
    prompts = _texts(args.text)
    tasks = list(dict.fromkeys([*args.tasks, *prompts]))
    if classes is None and any(get_task(name).needs == "classes" for name in tasks):
        classes = read_meta(args.model).classes
    _tell_bundled(args.model)
    with bar("label") as progress:
        summary = label(
            args.model,
            args.input,
            args.output,
            tasks=tasks,
            classes=classes,
            prompts=prompts,
            decoders=_decoders(args.decoders),
            device=args.device,
            dtype=args.dtype,
            num_actors=args.actors,
            batch_size=args.batch_size,
            score_threshold=args.score_threshold,
            progress=lambda s: progress.update(s.done, s.total, f"{s.rate:.1f} img/s, {s.errors} errors"),
        )
    say(labelled_line(summary, args.output))


def _tell_bundled(model: str) -> None:
    """Says what bundled weights cannot be asked for, before a user wonders at what they find in photographs."""
    if not Path(model).is_dir() and model in bundled_models():
        say(
            f"the bundled weights '{model}' know the drawn shapes of 'lumen-ray prepare scenes' and nothing else; for "
            "other images train on your own and give --model"
        )


def _serve(args: argparse.Namespace) -> None:
    if args.model:
        model_folder(args.model)
    from lumen_ray.serve.app import prepare_serve_environment

    prepare_serve_environment()
    from lumen_ray.model.build import read_meta
    from lumen_ray.serve.app import run
    from lumen_ray.serve.settings import load_settings

    chosen = _decoders(args.decoders)
    settings = load_settings(args.config, model=args.model, host=args.host, port=args.port, serving=chosen)
    read_meta(settings.model)  # a folder without a model is told here, not by a replica
    _tell_bundled(settings.model)
    say("serve: starting")
    server = run(settings, blocking=False)
    say(f"serving {settings.model} at {server.url} (page at /, API at /docs); stop with Ctrl-C; log -> {server.log}")
    server.wait()
    server.stop()


def main(argv: list[str] | None = None) -> int:
    """Runs a command; returns the exit status: the command's own or 0, or 2 for what the user must change."""
    prepare_environment()
    parser = build_parser()
    argv = sys.argv[1:] if argv is None else argv
    verb = argv[0] if argv else ""
    try:
        verbs = parser._subparsers._group_actions[0].choices
        if argv and not argv[0].startswith("-") and argv[0] not in verbs:
            raise UserError(
                f"unknown verb '{argv[0]}';{suggest(argv[0], verbs)} verbs: {', '.join(verbs)}", "unknown_verb"
            )
        args = parser.parse_args(argv)
        if not args.verb:
            parser.print_help()
            return EXIT_USER_ERROR
        return args.run(args) or 0
    except UserError as error:
        print(f"lumen-ray: {error}", file=sys.stderr)
        return EXIT_USER_ERROR
    except KeyboardInterrupt:
        hint = "; run the same command again to continue" if verb in RESUMABLE else ""
        print(f"lumen-ray: stopped{hint}", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
