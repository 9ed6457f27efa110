"""`label export` and `label status` of the command line: what is done with the output of a job.

Heavy imports happen inside the functions.
"""

from __future__ import annotations

import argparse
import json

from lumen_ray import api
from lumen_ray.console import bar, comma_separated, say
from lumen_ray.errors import UserError
from lumen_ray.label.exporters.registry import EXPORTERS


def export_parser(parser_class: type) -> argparse.ArgumentParser:
    p = parser_class(
        prog="lumen-ray label export",
        description="Writes labels in the formats of annotation tools and trainers.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="formats:\n" + "\n".join(f"  {name:<13} {form.summary}" for name, form in EXPORTERS.items()),
    )
    p.add_argument("labels", metavar="DIR", help="output folder of 'lumen-ray label'")
    p.add_argument(
        "--format", type=comma_separated, required=True, metavar="FORMAT,..", help="formats, comma separated, see below"
    )
    p.add_argument("--output", help="folder in which each format gets a folder of its name (default: DIR)")
    p.add_argument(
        "--tasks", type=comma_separated, help="tasks to export, comma separated (default: all that a format can hold)"
    )
    p.add_argument(
        "--max-images-per-file",
        type=int,
        metavar="N",
        help="images in one JSON, XML, CSV or tar file (default: all, in tars 1000)",
    )
    p.add_argument(
        "--copy-images",
        action="store_true",
        help="copy the image files of formats that have them (default: hard links, copies on another disk)",
    )
    p.add_argument(
        "--image-url", metavar="PREFIX", help="prefix of image addresses in labelstudio (default: local files)"
    )
    p.add_argument(
        "--review-budget", type=int, default=100, metavar="N", help="images that review chooses (default: 100)"
    )
    p.add_argument(
        "--near-distance",
        type=int,
        default=6,
        metavar="BITS",
        help="of the 64 of perceptual hashes, the most in which those of near duplicates differ (default: 6)",
    )
    p.add_argument(
        "--gallery-images",
        default="1000",
        metavar="N|all",
        help="images that gallery shows, the first of the input (default: 1000)",
    )
    p.set_defaults(run=_export)
    return p


def status_parser(parser_class: type) -> argparse.ArgumentParser:
    p = parser_class(
        prog="lumen-ray label status",
        description="Says how far a job is, from its output: on any machine that sees it, while it runs or later.",
    )
    p.add_argument("labels", metavar="DIR", help="output folder or bucket of 'lumen-ray label'")
    p.add_argument("--json", action="store_true", help="print JSON")
    p.set_defaults(run=_status)
    return p


def gallery_images(text: str) -> int | None:
    """The value of ``--gallery-images``; None for "all". Raises `UserError` for others."""
    if text != "all" and not (text.isdecimal() and int(text)):
        raise UserError(f"--gallery-images is '{text}'; give a number of images from 1, or all", "invalid_setting")
    return None if text == "all" else int(text)


def _export(args: argparse.Namespace) -> None:
    shown = gallery_images(args.gallery_images)
    with bar("export") as progress:
        written = api.export_labels(
            args.labels,
            args.format,
            output=args.output,
            tasks=args.tasks,
            max_images_per_file=args.max_images_per_file,
            copy_images=args.copy_images,
            image_url=args.image_url,
            review_budget=args.review_budget,
            near_distance=args.near_distance,
            gallery_images=shown,
            progress=lambda name, done, total: progress.update(done, total, name),
        )
    for name, found in written.items():
        left_out = f"; not {', '.join(found['left_out'])}, which it cannot hold" if found["left_out"] else ""
        missing = f"; {found['missing']} images could not be read any more, or have changed" if found["missing"] else ""
        tasks = ", ".join(found["tasks"])
        note = f"; {found['note']}" if "note" in found else ""
        say(f"{name}: {found['images']} images, {tasks} -> {found['output']}{left_out}{missing}{note}")


def _status(args: argparse.Namespace) -> None:
    from lumen_ray.label.status import label_status, status_lines

    status = label_status(args.labels)
    if args.json:
        print(json.dumps(status, indent=1))
        return
    for line in status_lines(args.labels, status):
        say(line)
