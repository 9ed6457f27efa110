"""Writes exports of a labelled folder, each whole or not at all."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from lumen_ray.data import urls
from lumen_ray.data.files import as_user_error, local_folder, make_folder, write_atomically, write_folder_atomically
from lumen_ray.errors import UserError
from lumen_ray.label.exporters.base import Exporter, ExportSettings
from lumen_ray.label.exporters.labels import Labels, open_labels
from lumen_ray.label.exporters.registry import EXPORTERS, check_formats, choose_tasks
from lumen_ray.label.near_duplicates import check_distance
from lumen_ray.version import __version__

#: hidden file that marks a folder as an export, which a later export of the format may replace
MARKER = ".lumen-ray-export"

Progress = Callable[[str, int, int], None]


def export(
    labelled: str | Path,
    formats: Sequence[str],
    output: str | Path | None = None,
    *,
    tasks: Sequence[str] | None = None,
    settings: ExportSettings | None = None,
    progress: Progress | None = None,
) -> dict[str, dict[str, Any]]:
    """Exports the folder `labelled` in each format, into a folder of its name below `output` (default: `labelled`).

    tasks: those to export; None: all that a format can hold.
    progress: called with (format, images done, images in all).

    Returns format -> ``{"output", "files", "tasks", "left_out" (tasks), "images", "missing" (pictures)}``,
    and a ``"note"`` if there is one. Everything
    is checked before anything is written. Raises `UserError`.
    """
    settings = settings or ExportSettings()
    if settings.max_images_per_file is not None and settings.max_images_per_file < 1:
        raise UserError(
            f"max_images_per_file is {settings.max_images_per_file}; give 1 or more, or leave it out", "invalid_setting"
        )
    if settings.review_budget < 1:
        raise UserError(f"review_budget is {settings.review_budget}; give 1 image or more", "invalid_setting")
    check_distance(settings.near_distance)
    if settings.gallery_images is not None and settings.gallery_images < 1:
        raise UserError(f"gallery_images is {settings.gallery_images}; give 1 image or more, or all", "invalid_setting")
    formats = check_formats(formats)
    labels = open_labels(labelled)
    chosen = {name: choose_tasks(name, labels.tasks, tasks) for name in formats}
    folder = labels.folder if output is None else local_folder(output)
    if folder is None:
        raise UserError(
            f"the labels are in a bucket, '{urls.shown(labelled)}'; give an output folder on a file system for their "
            "exports",
            "invalid_output",
        )
    _check_output(folder, labels)
    exporters = {name: EXPORTERS[name].load() for name in formats}
    paths = {name: folder / (exporter.single_file or name) for name, exporter in exporters.items()}
    for name, exporter in exporters.items():
        _check_replaceable(paths[name], exporter, labels)
    make_folder(folder)
    summaries = {}
    for name, exporter in exporters.items():
        picked = replace(labels, tasks=chosen[name])
        if progress is not None:
            picked.progress = _named(progress, name)
        with as_user_error(str(paths[name]), "written"):
            _write(exporter, name, picked, paths[name], settings)
        summaries[name] = _summary(picked, labels.tasks, paths[name])
        if exporter.front_page is not None:
            summaries[name]["output"] = str(folder / exporter.front_page.name)
            summaries[name]["files"] += 1
    return summaries


def _named(progress: Progress, name: str) -> Callable[[int, int], None]:
    return lambda done, total: progress(name, done, total)


def _write(exporter: Exporter, name: str, labels: Labels, path: Path, settings: ExportSettings) -> None:
    if exporter.single_file:
        write_atomically(path, lambda temporary: exporter.write(labels, temporary, settings))
        return

    def write(temporary: Path) -> None:
        exporter.write(labels, temporary, settings)
        marker = {"format": name, "labels": labels.ledger.output, "tasks": labels.tasks, "version": __version__}
        (temporary / MARKER).write_text(json.dumps(marker, indent=1))

    write_folder_atomically(path, write)
    if exporter.front_page is not None:
        page = exporter.front_page.read_bytes()
        write_atomically(path.parent / exporter.front_page.name, lambda temporary: temporary.write_bytes(page))


def _summary(labels: Labels, all_tasks: Sequence[str], path: Path) -> dict[str, Any]:
    number = 1 if path.is_file() else sum(p.is_file() for p in path.rglob("*") if p.name != MARKER)
    return {
        "output": str(path),
        "files": number,
        "tasks": list(labels.tasks),
        "left_out": [task for task in all_tasks if task not in labels.tasks],
        "images": labels.num_images - labels.missing if labels.written is None else labels.written,
        "missing": labels.missing,
        **({"note": labels.note} if labels.note else {}),
    }


def _check_output(folder: Path, labels: Labels) -> None:
    """Raises `UserError` for an output where the files would be taken for labels or for images to label."""
    target = folder.absolute().resolve()
    own = None if labels.folder is None else labels.folder.resolve()
    for inner in () if own is None else (own / "labels", own / "ledger"):
        if target == inner or inner in target.parents:
            raise UserError(
                f"output '{folder}' is inside '{inner}', which holds the labels themselves; give "
                "another folder, or none to export into the labelled folder",
                "invalid_output",
            )
    source = str(labels.job.get("input", ""))
    if not source or urls.is_url(source) or not Path(source).is_dir():
        return
    images = Path(source).resolve()
    if own is not None and (target == own or own in target.parents):
        return
    if target == images or images in target.parents:
        raise UserError(
            f"output '{folder}' is inside the folder of labelled images, '{source}', where the next run would label "
            "the exported files; give a folder outside of it",
            "invalid_output",
        )


def _check_replaceable(path: Path, exporter: Exporter, labels: Labels) -> None:
    """Raises `UserError` if something that is no export stands where an export would go."""
    page = exporter.front_page
    file = path if exporter.single_file else None if page is None else path.parent / page.name
    if file is not None and file.is_dir():
        raise UserError(f"'{file}' is a folder; move it away or give another output folder", "invalid_output")
    if exporter.single_file:
        return
    if not path.exists():
        return
    if path.is_dir():
        entries = list(path.iterdir())
        coco = None if labels.folder is None else labels.folder / "coco"
        older = path == coco and all(entry.suffix == ".json" for entry in entries)
        if not entries or (path / MARKER).is_file() or older:
            return
    raise UserError(
        f"'{path}' exists and is not an export of lumen-ray; move it away or give another output folder",
        "invalid_output",
    )
