"""The verbs `prepare` and `data` of the command line: their options and their output.

Heavy imports happen inside the functions.
"""

from __future__ import annotations

import argparse
from functools import partial
from typing import Any

from lumen_ray import api
from lumen_ray.console import bar, console, say
from lumen_ray.errors import UserError
from lumen_ray.remote.command import add_submit_args


def add_args(verbs: Any, parser_class: type) -> None:
    """Adds `prepare SOURCE` and `data ACTION`; `verbs` are argparse's subparsers."""
    _prepare_args(verbs, parser_class)
    _data_args(verbs, parser_class)


def _prepare_args(verbs: Any, parser_class: type) -> None:
    from lumen_ray.data.sources.registry import SOURCES

    p = verbs.add_parser("prepare", help="write training shards from synthetic scenes or annotated data")
    kinds = p.add_subparsers(dest="kind", metavar="SOURCE", parser_class=parser_class)
    for name, source in SOURCES.items():
        q = kinds.add_parser(name, help=source.help, description=source.description)
        source.add_arguments(q)
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
        q.add_argument(
            "--max-rejected",
            metavar="P%",
            help="stop, and write nothing, if more than this share of any kind of record is rejected (default: any)",
        )
        q.add_argument("--overwrite", action="store_true", help="replace the shards in the output folder")
        q.add_argument(
            "--workers",
            type=int,
            help="most tasks at once (default: one per core, on a cluster as many as it has room for; 0: without Ray)",
        )
        add_submit_args(q)
    p.set_defaults(run=_prepare)


def _data_args(verbs: Any, parser_class: type) -> None:
    p = verbs.add_parser("data", help="inspect, join or export shards, or check data for mistakes")
    kinds = p.add_subparsers(dest="action", metavar="ACTION", parser_class=parser_class, required=True)
    export = kinds.add_parser("export", help="shards -> COCO json (boxes, masks, keypoints, captions)")
    export.add_argument("shards", help="shard folder")
    export.add_argument("--output", required=True, help="folder for instances.json and captions.json")
    export.add_argument("--format", choices=("coco",), default="coco", help="format to write (default: coco)")
    export.add_argument("--images", action="store_true", help="also write the images, byte for byte")
    export.set_defaults(run=_data_export)
    joined = kinds.add_parser("join", help="shard folders -> one, to train over scenes, photographs and text together")
    joined.add_argument("shards", nargs="+", help="shard folders")
    joined.add_argument("--output", required=True, help="shard folder to write")
    joined.set_defaults(run=_data_join)
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
    _lint_args(kinds, parser_class)


def _lint_args(kinds: Any, parser_class: type) -> None:
    from lumen_ray.data.sources.registry import SOURCES

    p = kinds.add_parser(
        "lint",
        help="check a shard folder, or data before it is prepared, for mistakes",
        usage="%(prog)s [options] INPUT [options] [options of the source]",
        description="Checks annotated data for mistakes: repeated images and objects, images that are in two splits, "
        "boxes, masks and keypoints that cannot be right, class names, texts, lost records. INPUT is a shard folder, "
        f"or the name of a source ({', '.join(SOURCES)}) with the options of 'lumen-ray prepare SOURCE', which is read "
        "without writing shards. Findings are problems (training or scores suffer), warnings (probably a mistake) or "
        "notes (a fact to know).",
    )
    _lint_options(p)
    p.add_argument("input", metavar="INPUT", help="shard folder, local or a URL, or the name of a source")
    p.add_argument("rest", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    p.set_defaults(run=partial(_data_lint, parser_class))


def _lint_options(p: argparse.ArgumentParser) -> None:
    p.add_argument(
        "--against",
        nargs="+",
        action="extend",
        default=[],
        metavar="SHARDS",
        help="shard folders that must not have an image in common with it, e.g. that of the validation split",
    )
    p.add_argument("--strict", action="store_true", help="exit with 1 for problems and warnings, not for notes")
    p.add_argument(
        "--ignore", nargs="+", action="extend", default=[], metavar="CHECK", help="checks to leave out, by their names"
    )
    p.add_argument("--output", default="lint", help="folder for index.html and lint.json (default: lint)")
    p.add_argument("--samples", type=int, default=24, help="most pictures on the page (default: 24)")
    p.add_argument(
        "--min-side",
        type=float,
        default=2.0,
        help="report boxes with a side of fewer pixels in the stored image (default: 2)",
    )
    p.add_argument(
        "--decode",
        action="store_true",
        help="decode the images of a shard folder and compare their sizes (default: read their bytes only; "
        "images of a source are always decoded)",
    )


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
            max_rejected=args.max_rejected,
            workers=args.workers,
            progress=progress.update,
            **{argument.name: getattr(args, argument.name) for argument in SOURCES[args.kind].arguments},
        )
    for line in prepared_lines(summary):
        say(line)


#: rules of rejected records that the summary lists; the others share a line
_RULES_SHOWN = 6


def prepared_lines(summary: dict[str, Any]) -> list[str]:
    """The summary of `prepare`: one line, one per note, and one per rule by which records were rejected."""
    lines = [prepared_line(summary), *(f"note: {note}" for note in summary["notes"])]
    if number := summary["untrained"]:
        lines.append(
            f"{number} of {summary['rows']} images train nothing: no class is left that they are annotated for"
        )
    for rule in summary["rules"][:_RULES_SHOWN]:
        first = rule["first"]
        lines.append(
            f"rejected {rule['records']}, {rule['rule']}: {first['origin'] or first['image_id']}: {first['reason']}; "
            f"{rule['mend']}"
        )
    if rest := summary["rules"][_RULES_SHOWN:]:
        lines.append(
            f"rejected {sum(rule['records'] for rule in rest)} by {len(rest)} more rules, see rejected.parquet"
        )
    return lines


def prepared_line(summary: dict[str, Any]) -> str:
    """The summary of `prepare` in one line."""
    parts = [", ".join(f"{name} {count}" for name, count in summary["tasks"].items()) or "no task"]
    if summary["rejected"]:
        parts.append(f"{summary['rejected']} rejected, see rejected.parquet")
    parts += [f"{number} {what}" for what, number in summary["changed"].items()]
    return f"{summary['rows']} rows in {summary['files']} files -> {summary['output']} ({'; '.join(parts)})"


def _data_export(args: argparse.Namespace) -> None:
    from lumen_ray.data.shards.export import export_coco

    counts = export_coco(args.shards, args.output, images=args.images)
    written = ", ".join(f"{number} {kind.replace('_', ' ')}" for kind, number in counts.items() if number)
    say(f"{written} -> {args.output}")


def _data_join(args: argparse.Namespace) -> None:
    from lumen_ray.data.shards.join import join

    manifest = join(args.shards, args.output)
    tasks = ", ".join(f"{name} {count}" for name, count in manifest["tasks"].items())
    say(f"{manifest['rows']} rows in {len(manifest['files'])} files -> {args.output} ({tasks})")


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


def _data_lint(parser_class: type, args: argparse.Namespace) -> int:
    """Parses the options after INPUT, which depend on it, and lints. Returns the exit status."""
    from lumen_ray.data.lint.command import is_source, lint, print_report
    from lumen_ray.data.sources.registry import SOURCES

    source = SOURCES[args.input] if is_source(args.input, args.rest) else None
    about = source.description if source else "Checks a shard folder."
    parser = parser_class(prog=f"lumen-ray data lint {args.input}", description=about)
    if source:
        source.add_arguments(parser)
    _lint_options(parser)
    args = parser.parse_args(args.rest, args)
    with bar("lint") as progress:
        report, page = lint(
            source.make(vars(args)) if source else args.input,
            args.output,
            against=args.against,
            samples=args.samples,
            min_side=args.min_side,
            decode=args.decode,
            ignore=args.ignore,
            progress=progress.update,
        )
    print_report(report, console)
    say(f"{report.summary()}; page -> {page}; the findings as JSON are beside it")
    return int(args.strict and report.failed)
