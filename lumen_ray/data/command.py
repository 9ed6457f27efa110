"""The commands `prepare` and `data`: their arguments and output.

Heavy imports happen inside the commands.
"""

from __future__ import annotations

import argparse
from typing import Any

from lumen_ray.console import bar, console, say
from lumen_ray.errors import UserError
from lumen_ray.ray_env import tasks_at_once


def add_args(verbs: Any, parser_class: type) -> None:
    """Adds `prepare`, with a subcommand per source, and `data`, with one per action."""
    _prepare_args(verbs, parser_class)
    _data_args(verbs, parser_class)


def _prepare_args(verbs: Any, parser_class: type) -> None:
    from lumen_ray.data.sources.registry import SOURCES

    p = verbs.add_parser("prepare", help="write training shards from synthetic scenes or annotated data")
    kinds = p.add_subparsers(dest="kind", metavar="SOURCE", parser_class=parser_class)
    for name, source in SOURCES.items():
        q = kinds.add_parser(name, help=source.help, description=f"{source.help}. {source.layout}".strip())
        for argument in source.arguments:
            argument.add_to(q)
        q.add_argument("--output", required=True, help="shard folder to write; local, s3:// or gs://")
        q.add_argument("--shuffle-seed", type=int, default=0, help="seed for shuffling the rows (default: 0)")
        q.add_argument(
            "--rows-per-group",
            type=int,
            default=8,
            help="images per row group; batch sizes are its multiples (default: 8)",
        )
        q.add_argument(
            "--rows-per-file", type=int, default=512, help="images per file, the unit of work (default: 512)"
        )
        q.add_argument("--overwrite", action="store_true", help="replace existing shards")
        q.add_argument(
            "--workers",
            type=int,
            help="maximal number of concurrent tasks (default: one per core, on a cluster as many as fit; 0: no Ray)",
        )
    p.set_defaults(run=_prepare)


def _data_args(verbs: Any, parser_class: type) -> None:
    p = verbs.add_parser("data", help="inspect shards, or export them to other formats")
    kinds = p.add_subparsers(dest="action", metavar="ACTION", parser_class=parser_class, required=True)
    export = kinds.add_parser("export", help="shards -> COCO json (boxes, masks, keypoints, captions)")
    export.add_argument("shards", help="shard folder")
    export.add_argument("--output", required=True, help="folder for instances.json and captions.json")
    export.add_argument("--format", choices=("coco",), default="coco", help="format to write (default: coco)")
    export.add_argument("--images", action="store_true", help="also write the images, byte for byte")
    export.set_defaults(run=_data_export)
    look = kinds.add_parser("inspect", help="counts and histograms, and a page of samples as used in training")
    look.add_argument("shards", help="shard folder")
    look.add_argument("--output", default="inspect", help="folder for index.html, statistics.json (default: inspect)")
    look.add_argument("--samples", type=int, default=24, help="rows on the page (default: 24)")
    look.add_argument(
        "--recipe",
        help="recipe whose prompts and augmentation are shown (default: all tasks but generate, no augmentation)",
    )
    look.add_argument("--stage", help="stage of the recipe (default: the one with the most tasks)")
    look.add_argument("--top", type=int, default=30, help="classes listed; the others share a line (default: 30)")
    look.add_argument("--seed", type=int, default=0, help="seed of the sampled rows (default: 0)")
    look.add_argument(
        "--verify", action=argparse.BooleanOptionalAction, default=True, help="verify the checksums of all files first"
    )
    look.set_defaults(run=_data_inspect)


def _prepare(args: argparse.Namespace) -> None:
    from lumen_ray.data.sources.registry import SOURCES

    if not args.kind:
        raise UserError(
            f"prepare needs a source; sources: {', '.join(SOURCES)} (see 'lumen-ray prepare --help')", "usage"
        )
    from lumen_ray.data.shards.prepare import prepare_source

    with bar("prepare") as progress:
        summary = prepare_source(
            args.output,
            SOURCES[args.kind].make(vars(args)),
            shuffle_seed=args.shuffle_seed,
            rows_per_group=args.rows_per_group,
            rows_per_file=args.rows_per_file,
            overwrite=args.overwrite,
            workers=tasks_at_once() if args.workers is None else args.workers,
            progress=progress.update,
        )
    say(prepared_line(summary))


def prepared_line(summary: dict[str, Any]) -> str:
    """A one-line summary of `prepare`."""
    tasks = ", ".join(f"{name} {count}" for name, count in summary["tasks"].items())
    rejected = f"; {summary['rejected']} rejected, see rejected.parquet" if summary["rejected"] else ""
    changed = "".join(f"; {number} {what}" for what, number in summary["changed"].items())
    return f"{summary['rows']} rows in {summary['files']} files -> {summary['output']} ({tasks}{rejected}{changed})"


def _data_export(args: argparse.Namespace) -> None:
    from lumen_ray.data.shards.export import export_coco

    counts = export_coco(args.shards, args.output, images=args.images)
    written = ", ".join(f"{number} {kind.replace('_', ' ')}" for kind, number in counts.items() if number)
    say(f"{written} -> {args.output}")


def _data_inspect(args: argparse.Namespace) -> None:
    from lumen_ray.data.inspect.command import inspect, print_sections, sections

    with bar("inspect") as progress:
        statistics, page = inspect(
            args.shards,
            args.output,
            samples=args.samples,
            recipe=args.recipe,
            stage=args.stage,
            top=args.top,
            seed=args.seed,
            verify=args.verify,
            progress=progress.update,
        )
    print_sections(sections(statistics, args.top), console)
    say(f"page -> {page}; the counts as JSON are beside it")
