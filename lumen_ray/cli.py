"""`lumen-ray`: prepare, train, evaluate, label, serve, quickstart.

Heavy imports happen inside the commands, so that `--help` and mistakes answer at once.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any, NoReturn

from lumen_ray import __version__
from lumen_ray.console import bar, console, say, training_note
from lumen_ray.errors import UserError, suggest
from lumen_ray.ray_env import prepare_environment

EXIT_USER_ERROR = 2
#: verbs that continue where they stopped
RESUMABLE = ("quickstart", "train", "label")


class _Parser(argparse.ArgumentParser):
    """Mistakes on the command line are one sentence too."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message.replace(chr(10), ' ')} (see '{self.prog} --help')", "usage")


def _names(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def build_parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="lumen-ray", description=__doc__.splitlines()[0])
    parser.add_argument("--version", action="version", version=f"lumen-ray {__version__}")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", parser_class=_Parser)
    _quickstart_args(verbs)
    _prepare_args(verbs)
    _train_args(verbs)
    _evaluate_args(verbs)
    _label_args(verbs)
    _serve_args(verbs)
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


def _prepare_args(verbs: Any) -> None:
    p = verbs.add_parser("prepare", help="write training shards: synthetic scenes or COCO json")
    kinds = p.add_subparsers(dest="kind", metavar="SOURCE", parser_class=_Parser)
    scenes = kinds.add_parser("scenes", help="render synthetic mixed-task scenes")
    scenes.add_argument("--num", type=int, required=True, help="number of scenes")
    scenes.add_argument("--seed", type=int, default=0, help="another seed is another, disjoint set")
    coco = kinds.add_parser("coco", help="COCO json: boxes, masks, keypoints, captions")
    coco.add_argument(
        "--annotations", nargs="+", required=True, help="one or more COCO json files over the same images"
    )
    coco.add_argument("--images", required=True, help="folder of the images")
    coco.add_argument("--shuffle-seed", type=int, default=0)
    for q in (scenes, coco):
        q.add_argument("--output", required=True, help="shard folder to write")
        q.add_argument("--rows-per-group", type=int, default=8, help="images per row group; batch sizes are multiples")
        q.add_argument("--overwrite", action="store_true", help="replace shards that are there")
    p.set_defaults(run=_prepare)


def _train_args(verbs: Any) -> None:
    p = verbs.add_parser("train", help="run a recipe over shards; run it again to resume")
    p.add_argument("--recipe", required=True, help="name in configs/recipes or a YAML file")
    p.add_argument("--shards", required=True, help="shard folder")
    p.add_argument("--output", required=True, help="run folder; the trained model is in its 'model' folder")
    p.add_argument("--init-from", help="model folder whose weights the run starts from")
    p.add_argument("--workers", type=int, help="Ray Train workers, instead of the recipe's")
    p.set_defaults(run=_train)


def _evaluate_args(verbs: Any) -> None:
    p = verbs.add_parser("evaluate", help="score a model on shards: one table, one JSON")
    p.add_argument("--model", required=True, help="model folder")
    p.add_argument("--shards", required=True, help="shard folder of the held-out split")
    p.add_argument("--output", required=True, help="folder for report.json and predictions.parquet")
    p.add_argument("--tasks", type=_names, help="only these, comma separated (default: all the split is annotated for)")
    p.add_argument("--limit", type=int, help="first images only")
    p.set_defaults(run=_evaluate)


def _label_args(verbs: Any) -> None:
    p = verbs.add_parser("label", help="label a folder of images: Parquet, COCO json, HTML gallery")
    p.add_argument("input", help="folder, glob or shard folder")
    p.add_argument("--model", required=True, help="model folder")
    p.add_argument("--output", required=True, help="folder for the labels; run again to continue after a stop")
    p.add_argument("--tasks", type=_names, default=["detect"], help="comma separated, e.g. detect,segment,caption")
    p.add_argument("--classes", type=_names, help="comma separated (default: the model's own classes)")
    p.add_argument("--text", action="append", default=[], metavar="TASK=TEXT", help="text for vqa, refer, ground, chat")
    p.add_argument("--score-threshold", type=float, default=0.3)
    p.add_argument("--batch-size", type=int, default=8)
    p.add_argument("--actors", type=int, default=1, help="model actors on Ray")
    p.set_defaults(run=_label)


def _serve_args(verbs: Any) -> None:
    p = verbs.add_parser("serve", help="serve a model over HTTP with Ray Serve")
    p.add_argument("--config", default="nano", help="name in configs/serve or a YAML file (default: nano)")
    p.add_argument("--model", help="model folder, instead of the config's")
    p.add_argument("--host", help="address to bind, instead of the config's")
    p.add_argument("--port", type=int, help="port, instead of the config's")
    p.set_defaults(run=_serve)


def _quickstart(args: argparse.Namespace) -> None:
    from lumen_ray.quickstart import quickstart

    quickstart(
        Path(args.output),
        recipe_name=args.recipe,
        scenes=args.scenes,
        held_out=args.held_out,
        port=args.port,
        keep_serving=args.keep_serving,
    )


def _prepare(args: argparse.Namespace) -> None:
    if not args.kind:
        raise UserError("prepare needs a source; sources: scenes, coco (see 'lumen-ray prepare --help')", "usage")
    from lumen_ray.data.prepare import prepare_coco, prepare_scenes

    common = {"rows_per_group": args.rows_per_group, "overwrite": args.overwrite, "workers": _cores()}
    with bar("prepare") as progress:
        common["progress"] = progress.update
        if args.kind == "scenes":
            summary = prepare_scenes(args.output, args.num, args.seed, **common)
        else:
            summary = prepare_coco(args.output, args.annotations, args.images, shuffle_seed=args.shuffle_seed, **common)
    say(prepared_line(summary))


def prepared_line(summary: dict[str, Any]) -> str:
    """What `prepare` wrote, in one line."""
    tasks = ", ".join(f"{name} {count}" for name, count in summary["tasks"].items())
    rejected = f"; {summary['rejected']} rejected, see rejected.parquet" if summary["rejected"] else ""
    return f"{summary['rows']} rows in {summary['files']} files -> {summary['output']} ({tasks}{rejected})"


def _train(args: argparse.Namespace) -> None:
    from lumen_ray import config
    from lumen_ray.presets import recipe_path
    from lumen_ray.train.recipe import Recipe
    from lumen_ray.train.trainer import train

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
        )
    say(f"model -> {model}; logs -> {args.output}/metrics.jsonl and {args.output}/tensorboard")


def _evaluate(args: argparse.Namespace) -> None:
    from lumen_ray.evaluate.report import print_report
    from lumen_ray.evaluate.run import evaluate
    from lumen_ray.inference.engine import Engine

    engine = Engine.load(args.model)
    with bar("evaluate") as progress:
        report = evaluate(
            engine, args.shards, args.output, tasks=args.tasks, limit=args.limit, progress=progress.update
        )
    print_report(report, console)
    say(f"report -> {args.output}/report.json")


def _texts(pairs: list[str]) -> dict[str, list[str]]:
    """``["vqa=how many ?"] -> {"vqa": ["how many ?"]}``."""
    prompts: dict[str, list[str]] = {}
    for pair in pairs:
        task, equals, text = pair.partition("=")
        if not equals:
            raise UserError(
                f"--text '{pair}' must be TASK=TEXT, e.g. --text 'vqa=how many circles are there ?'", "usage"
            )
        prompts.setdefault(task.strip(), []).append(text.strip())
    return prompts


def _label(args: argparse.Namespace) -> None:
    from lumen_ray.label.pipeline import label
    from lumen_ray.model.build import read_meta

    classes = args.classes
    if classes is None and {"detect", "segment", "pose", "count"} & set(args.tasks):
        classes = read_meta(args.model).classes
    with bar("label") as progress:
        summary = label(
            args.model,
            args.input,
            args.output,
            tasks=args.tasks,
            classes=classes,
            prompts=_texts(args.text),
            num_actors=args.actors,
            batch_size=args.batch_size,
            score_threshold=args.score_threshold,
            progress=lambda s: progress.update(s.done, s.total, f"{s.rate:.1f} img/s, {s.errors} errors"),
        )
    say(labelled_line(summary, args.output))


def labelled_line(summary: dict[str, Any], output: str | Path) -> str:
    """What `label` wrote, in one line."""
    first = summary["first_error"]
    reason = f" (e.g. {first['image_id']}: {first['message']}; see errors.parquet)" if first else ""
    return (
        f"{summary['images']} images: {summary['labelled']} labelled, {summary['errors']} errors{reason} -> {output} "
        f"(labels/*.parquet, coco/*.json, gallery.html)"
    )


def _serve(args: argparse.Namespace) -> None:
    from lumen_ray.serve.app import prepare_serve_environment

    prepare_serve_environment()
    from lumen_ray.model.build import read_meta
    from lumen_ray.serve.app import run
    from lumen_ray.serve.settings import load_settings

    settings = load_settings(args.config, model=args.model, host=args.host, port=args.port)
    read_meta(settings.model)  # a folder without a model is told here, not by a replica
    server = run(settings, blocking=False)
    say(f"serving {settings.model} at {server.url} (page at /, API at /docs); stop with Ctrl-C")
    server.wait()
    server.stop()


def _cores() -> int:
    return os.cpu_count() or 1


def main(argv: list[str] | None = None) -> int:
    """Runs a command; returns the exit status: 0, or 2 for what the user must change."""
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
        args.run(args)
    except UserError as error:
        print(f"lumen-ray: {error}", file=sys.stderr)
        return EXIT_USER_ERROR
    except KeyboardInterrupt:
        hint = "; run the same command again to continue" if verb in RESUMABLE else ""
        print(f"lumen-ray: stopped{hint}", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
