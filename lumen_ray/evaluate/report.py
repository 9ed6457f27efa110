"""The report of an evaluation: one table for people, one JSON for machines."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from lumen_ray.data.files import write_atomically

# (task, description, metrics, metric of guessing or None)
_LINES: tuple[tuple[str, str, str, str | None], ...] = (
    ("detect", "box AP50", "box_AP50", None),
    ("detect", "box AP", "box_AP", None),
    ("detect", "box AP75", "box_AP75", None),
    ("detect", "box AP small/medium/large", "box_APs box_APm box_APl", None),
    ("detect", "box AR, 100 boxes", "box_AR100", None),
    ("detect", "cgF1 (pmF1 x IL_MCC)", "box_cgF1", None),
    ("detect", "pmF1, IL_MCC", "box_pmF1 box_IL_MCC", None),
    ("detect", "calibration error", "box_ECE", None),
    ("segment", "mask AP50", "mask_AP50", None),
    ("segment", "mask AP", "mask_AP", None),
    ("segment", "cgF1 (pmF1 x IL_MCC)", "mask_cgF1", None),
    ("segment", "pmF1, IL_MCC", "mask_pmF1 mask_IL_MCC", None),
    ("segment", "calibration error", "mask_ECE", None),
    ("region_segment", "mask IoU, IoU of 0.5 or more", "region_segment_iou region_segment_p50", None),
    ("semantic", "mean IoU of classes", "semantic_miou", None),
    ("pose", "keypoint AP50", "keypoint_AP50", None),
    ("pose", "keypoint AP", "keypoint_AP", None),
    ("refer", "P@0.5", "refer_p50", None),
    ("refer", "accuracy, no target", "refer_no_target_accuracy", None),
    ("refer", "accuracy, with target", "refer_target_accuracy", None),
    ("refer", "calibration error", "refer_ECE", None),
    ("ground", "P@0.5 per phrase", "ground_p50", None),
    ("ground", "recall/precision/F1", "ground_recall50 ground_precision50 ground_f1", None),
    ("ground", "calibration error", "ground_ECE", None),
    ("count", "exact, present classes", "count_accuracy", None),
    ("count", "mean error, present classes", "count_error", None),
    ("count", "zero, absent classes", "count_absent_accuracy", None),
    ("count", "calibration error", "count_ECE", None),
    ("vqa", "answers, exact", "vqa_accuracy", "vqa_chance"),
    ("caption", "attributes F1", "caption_attributes", "caption_chance"),
    ("region_caption", "captions, exact", "region_caption_accuracy", "region_caption_chance"),
    ("generate", "objects present", "generate_objects", "generate_objects_chance"),
    ("generate", "all counts right", "generate_exact", "generate_exact_chance"),
    ("edit", "changes made", "edit_done", None),
    ("edit", "other objects kept", "edit_kept", None),
    ("edit", "changes made, nothing else changed", "edit_exact", None),
    ("chat", "routing accuracy", "routing_accuracy", None),
)


def make_table(report: dict[str, Any]) -> Table:
    """The main lines of the scored tasks as a `rich` table; a dash where nothing could be measured."""
    title = f"{report['model']['preset']} {report['model']['version']} on {report['split']}: {report['scored']} images"
    table = Table(title=title, title_justify="left")
    table.add_column("task", style="bold")
    table.add_column("metric")
    table.add_column("value", justify="right")
    table.add_column("by chance", justify="right", style="dim")
    before = None
    for task, name, keys, chance in (line for line in _LINES if line[0] in report["tasks"]):
        values = [report["metrics"].get(key) for key in keys.split()]
        if before is not None and task != before:
            table.add_section()
        table.add_row(
            task if task != before else "",
            name,
            "-" if all(value is None for value in values) else "/".join(map(format_value, values)),
            format_value(report["metrics"].get(chance)) if chance else "",
        )
        before = task
    return table


def format_value(value: float | None) -> str:
    """Three decimals, or a dash for None."""
    return "-" if value is None else f"{value:.3f}"


def print_report(report: dict[str, Any], console: Console | None = None) -> None:
    """Prints the table, and below it the number of skipped images and the notes."""
    console = console or Console()
    console.print(make_table(report))
    if report["skipped"]:
        first = report["errors"][0]
        console.print(f"{report['skipped']} images were skipped, e.g. {first['image_id']}: {first['message']}")
    for note in report.get("notes", ()):
        console.print(f"note: {note}")


def write_report(report: dict[str, Any], path: str | Path) -> None:
    """Writes the report as JSON; null where nothing could be measured."""
    text = json.dumps(report, indent=1, allow_nan=False) + "\n"
    write_atomically(Path(path), lambda temporary: temporary.write_text(text))
