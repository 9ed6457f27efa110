"""The verbs `prepare` and `data` of the command line: their options and their output.

Heavy imports happen inside the functions.
"""

from __future__ import annotations

import argparse
from typing import Any

from lumen_ray import api
from lumen_ray.console import bar, console, say
from lumen_ray.errors import UserError


def add_args(verbs: Any, parser_class: type) -> None:
    """Adds `prepare SOURCE` and `data ACTION`; `verbs` are argparse's subparsers."""
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
        q.add_argument("--shuffle-seed", type=int, default=0, help="seed of the order of the rows (default: 0)")
        q.add_argument(
            "--rows-per-group",
            type=int,
            default=8,
            help="images per row group, of which batch sizes are multiples (default: 8)",
        )
        q.add_argument(
            "--rows-per-file", type=int, default=512, help="images per file, the unit of work (default: 512)"
        )
        q.add_argument("--overwrite", action="store_true", help="replace the shards in the output folder")
        q.add_argument(
            "--workers",
            type=int,
            help="most tasks at once (default: one per core, on a cluster as many as it has room for; 0: without Ray)",
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
    view = kinds.add_parser("inspect", help="counts, histograms, and a page of samples with the prompts of training")
    view.add_argument("shards", help="shard folder")
    view.add_argument("--output", default="inspect", help="folder for index.html, statistics.json (default: inspect)")
    view.add_argument("--samples", type=int, default=24, help="rows on the page (default: 24)")
    view.add_argument(
        "--recipe",
        help="prompts and augmentation of this recipe (default: all tasks but generate, unaugmented)",
    )
    view.add_argument("--stage", help="stage of the recipe (default: the one with most tasks)")
    view.add_argument(
        "--top", type=int, default=30, help="classes listed one by one; the rest in one line (default: 30)"
    )
    view.add_argument("--seed", type=int, default=0, help="seed of the sampled rows (default: 0)")
    view.add_argument(
        "--verify", action=argparse.BooleanOptionalAction, default=True, help="verify the checksums of all files first"
    )
    view.set_defaults(run=_data_inspect)


def _prepare(args: argparse.Namespace) -> None:
    from lumen_ray.data.sources.registry import SOURCES

    if not args.kind:
        raise UserError(
            f"prepare needs a source; sources: {', '.join(SOURCES)} (see 'lumen-ray prepare --help')", "usage"
        )
    with bar("prepare") as progress:
        summary = api.prepare(
            args.kind,
            args.output,
            shuffle_seed=args.shuffle_seed,
            rows_per_group=args.rows_per_group,
            rows_per_file=args.rows_per_file,
            overwrite=args.overwrite,
            workers=args.workers,
            progress=progress.update,
            **{argument.name: getattr(args, argument.name) for argument in SOURCES[args.kind].arguments},
        )
    say(prepared_line(summary))


def prepared_line(summary: dict[str, Any]) -> str:
    """The summary of `prepare` in one line."""
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
