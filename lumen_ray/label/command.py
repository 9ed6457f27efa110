"""The verb `label` of the command line: its options and its output.

Heavy imports happen inside the functions.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from lumen_ray import api
from lumen_ray.console import bar, class_names, comma_separated, decoders_by_task, say, texts_by_task
from lumen_ray.errors import UserError
from lumen_ray.label.exporters.registry import DEFAULT_EXPORTS
from lumen_ray.label.interrupts import stopped_in_two_steps
from lumen_ray.label.output_command import export_parser, status_parser
from lumen_ray.options import decoders_arg, device_arg, dtype_arg, exemplars_arg, model_arg, say_bundled
from lumen_ray.presets import model_folder
from lumen_ray.remote.command import add_submit_args

if TYPE_CHECKING:
    from lumen_ray.label.progress import Status

#: of a job with ``--strict`` that could not label every image
EXIT_WITH_ERRORS = 3
#: of the progress line
_UNITS = {"images": "img", "requests": "req"}


def add_args(verbs: Any, parser_class: type) -> None:
    """Adds `label INPUT`, `label export` and `label status`; `verbs` are argparse's subparsers."""
    _input_args(verbs)
    parser = verbs.choices["label"]
    parser.subcommands["export"] = export_parser(parser_class)
    parser.subcommands["status"] = status_parser(parser_class)
    parser.advice = "label takes one input; put a glob in quotes, such as 'photos/*.jpg'"
    names = ", ".join(f"'lumen-ray label {name} --help'" for name in parser.subcommands)
    parser.epilog = f"see also {names}; a folder of such a name is given as ./NAME"


def _input_args(verbs: Any) -> None:
    p = verbs.add_parser("label", help="label a folder of images: Parquet, COCO json, HTML gallery; export labels")
    p.add_argument(
        "input",
        nargs="?",
        help="folder, glob, shard folder, .txt list, .csv, .jsonl or Parquet table, or .tar of images; a path or URL",
    )
    p.add_argument(
        "--input-jsonl",
        metavar="FILE",
        help="instead of images, a batch file of chat requests in OpenAI's format; gives output.jsonl and errors.jsonl",
    )
    model_arg(p)
    decoders_arg(p)
    device_arg(p, "a GPU for each actor where the Ray cluster has any, else cpu")
    dtype_arg(p)
    p.add_argument(
        "--output", required=True, help="folder or bucket for the labels; run it again to continue after a stop"
    )
    p.add_argument(
        "--tasks",
        type=comma_separated,
        default=["detect"],
        help="tasks to run, comma separated, e.g. segment,caption (default: detect)",
    )
    p.add_argument(
        "--classes",
        help="class names, comma separated, or a .txt file of them; auto: what the model's caption of each image names "
        "(default: the model's, none with --exemplars)",
    )
    exemplars_arg(p, "classes given by example, also those that --classes names")
    p.add_argument(
        "--text",
        action="append",
        default=[],
        metavar="TASK=TEXT",
        help="a text for vqa, refer, ground or chat, in addition to --tasks; can be given several times",
    )
    p.add_argument(
        "--agree-with",
        metavar="DECODER",
        help="a second decoder of the model, asked the same: instances get their agreement (IoU) with its own",
    )
    p.add_argument(
        "--verify", action="store_true", help="ask the LLM about each instance: instances get its probability of yes"
    )
    p.add_argument("--score-threshold", type=float, default=0.3, help="leave out instances below it (default: 0.3)")
    p.add_argument("--batch-size", type=int, default=8, help="images per forward pass (default: 8)")
    p.add_argument(
        "--actors",
        default="auto",
        metavar="N|MIN:MAX",
        help="model actors on Ray, or the fewest and most of a pool that follows the load (default: auto, one for each "
        "GPU or core; 0: without Ray)",
    )
    p.add_argument(
        "--gpus-per-actor",
        type=float,
        default=1,
        metavar="SHARE",
        help="share of a GPU that an actor reserves, e.g. 0.5 for two on each (default: 1)",
    )
    p.add_argument(
        "--tile",
        type=int,
        metavar="PIXELS",
        help="search images larger than this in tiles of this side, beside the whole image (default: no tiles)",
    )
    p.add_argument("--overlap", type=float, help="of neighbouring tiles, a share of the side (default: 0.2)")
    p.add_argument(
        "--image-column", metavar="NAME", help="column of images or of their paths, in a table with a name of its own"
    )
    p.add_argument("--refresh", action="store_true", help="look for images that were added since the input was listed")
    p.add_argument(
        "--retry-errors", action="store_true", help="ask the images that could not be labelled again, each once"
    )
    p.add_argument(
        "--max-errors", metavar="N|P%", help="stop once more images than this cannot be labelled, e.g. 50 or 5%%"
    )
    p.add_argument(
        "--dedup",
        action="store_true",
        help="label images with the same bytes once, copy the labels, and record perceptual hashes",
    )
    p.add_argument(
        "--usd-per-hour", type=float, metavar="X", help="price of the whole cluster for an hour, to show the cost"
    )
    p.add_argument("--strict", action="store_true", help="exit with status 3 if any image could not be labelled")
    p.add_argument(
        "--progress", choices=("bar", "json"), default="bar", help="json: a line of JSON every second (default: bar)"
    )
    p.add_argument(
        "--export",
        type=comma_separated,
        metavar="FORMAT,..",
        help=f"formats to export the labels in, see 'lumen-ray label export --help', or none (default: "
        f"{','.join(DEFAULT_EXPORTS)}, in a bucket none)",
    )
    add_submit_args(p)
    p.set_defaults(run=lambda args: _label(args) if args.input_jsonl is None else _answer_batch(args, p))


#: what ``--input-jsonl`` can be combined with
_OF_BATCHES = (
    "input_jsonl", "model", "decoders", "device", "dtype", "output", "score_threshold", "batch_size", "actors",
    "gpus_per_actor", "max_errors", "usd_per_hour", "strict", "progress", "verb", "run",
)  # fmt: skip


def _answer_batch(args: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    model_folder(args.model)
    # a default that was not given is the very object that the parser has
    given = [name for name, value in vars(args).items() if value is not parser.get_default(name)]
    if others := [name for name in given if name not in _OF_BATCHES]:
        named = "an input of images" if others[0] == "input" else f"--{others[0].replace('_', '-')}"
        raise UserError(
            f"{named} does not go with --input-jsonl, whose lines say what is asked about which images; leave it out",
            "usage",
        )
    from lumen_ray.label.batch.job import answered_line

    actors = actor_numbers(args.actors)
    as_json = args.progress == "json"
    if not as_json:
        say_bundled(args.model)
    with stopped_in_two_steps(), _reported(as_json) as progress, _options_named(args):
        summary = api.answer_batch(
            args.input_jsonl,
            args.output,
            model=args.model,
            decoders=decoders_by_task(args.decoders),
            device=args.device,
            dtype=args.dtype,
            actors=actors,
            gpus_per_actor=args.gpus_per_actor,
            batch_size=args.batch_size,
            score_threshold=args.score_threshold,
            max_errors=args.max_errors,
            usd_per_hour=args.usd_per_hour,
            progress=progress,
        )
    if as_json:
        print(json.dumps({"state": "finished", **summary}), flush=True)
    else:
        say(answered_line(summary, args.output))
    return EXIT_WITH_ERRORS if args.strict and summary["errors"] else 0


def _label(args: argparse.Namespace) -> int:
    if args.input is None:
        raise UserError("give the images to label, such as a folder, or --input-jsonl with a batch file", "usage")
    model_folder(args.model)
    from lumen_ray.label.vocabulary import AUTO
    from lumen_ray.tasks import get_task

    if args.overlap is not None and args.tile is None:
        raise UserError("--overlap is of neighbouring tiles; give --tile PIXELS with it, or leave it out", "usage")
    classes = args.classes if args.classes in (None, AUTO) else class_names(args.classes)
    text = texts_by_task(args.text)
    for task in (*args.tasks, *text):
        get_task(task)
    actors = actor_numbers(args.actors)
    as_json = args.progress == "json"
    if not as_json:
        say_bundled(args.model)
    with stopped_in_two_steps(), _reported(as_json) as progress, _options_named(args):
        summary = api.label(
            args.input,
            args.output,
            model=args.model,
            tasks=args.tasks,
            classes=classes,
            text=text,
            exemplars=args.exemplars,
            decoders=decoders_by_task(args.decoders),
            agree_with=args.agree_with,
            verify=args.verify,
            device=args.device,
            dtype=args.dtype,
            actors=actors,
            gpus_per_actor=args.gpus_per_actor,
            batch_size=args.batch_size,
            score_threshold=args.score_threshold,
            tile=args.tile,
            overlap=args.overlap,
            image_column=args.image_column,
            refresh=args.refresh,
            retry_errors=args.retry_errors,
            max_errors=args.max_errors,
            dedup=args.dedup,
            usd_per_hour=args.usd_per_hour,
            exports=[] if args.export == ["none"] else args.export,
            progress=progress,
        )
    if as_json:
        print(json.dumps({"state": "finished", **summary}), flush=True)
    else:
        from lumen_ray.label.pipeline import labelled_line

        say(labelled_line(summary, args.output))
    return EXIT_WITH_ERRORS if args.strict and summary["errors"] else 0


@contextmanager
def _options_named(args: argparse.Namespace) -> Iterator[None]:
    """Messages about an argument of the Python function begin with the option's name instead."""
    try:
        yield
    except UserError as error:
        name, verb, rest = str(error).partition(" is ")
        if not verb or not hasattr(args, name):
            raise
        raise UserError(f"--{name.replace('_', '-')}{verb}{rest}", error.reason) from None


@contextmanager
def _reported(as_json: bool) -> Iterator[Callable[[Status], None]]:
    """What shows the progress of a job."""
    if as_json:
        from lumen_ray.label.progress_lines import ProgressLines

        with ProgressLines() as lines:
            yield lines.update
        return
    with bar("label") as shown:

        def update(status: Status) -> None:
            total = status.total if status.is_listed else None
            facts = [f"{status.rate:.1f} {_UNITS[status.counted]}/s", f"{status.errors} errors", *status.notes()]
            if not status.is_listed:
                facts.append(f"{status.total:,} listed so far")
            shown.update(status.done, total, ", ".join(facts))

        yield update


def actor_numbers(text: str) -> int | range | None:
    """The value of ``--actors``: "4", "1:32" (a pool), or "auto". Raises `UserError` for others."""
    if text == "auto":
        return None
    fewest, colon, most = text.partition(":")
    if fewest.isdecimal() and (not colon or most.isdecimal()):
        if not colon:
            return int(fewest)
        if 1 <= int(fewest) <= int(most):
            return range(int(fewest), int(most) + 1)
    raise UserError(f"--actors is '{text}'; give a number such as 4, a range such as 1:32, or auto", "invalid_setting")
