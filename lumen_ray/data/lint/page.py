"""The page of `data lint`: one self-contained HTML file with the findings and pictures of the objects concerned."""

from __future__ import annotations

from pathlib import Path
from string import Template
from typing import Any

import numpy as np
from PIL import Image

from lumen_ray.data import rle as rle_tools
from lumen_ray.data.images import decode
from lumen_ray.data.inspect.page import MAX_NAMED, STORED_SIDE, data_url, predictions, safe, style
from lumen_ray.data.lint.findings import Finding, Report, Row, Sample
from lumen_ray.errors import UserError
from lumen_ray.structures import Masks
from lumen_ray.viz import draw, palette

#: objects whose extent is a smaller share of the image's longer side get a close-up
CLOSE_UP = 0.15
#: sides of the objects' extent that a close-up shows, and its smallest side in pixels
_MARGIN, _LEAST = 4, 24
#: of more objects, only the first ones are drawn
MAX_DRAWN = 200

_PAGE = Template((Path(__file__).parent / "lint.html").read_text())


def page(report: Report, categories: list[dict[str, Any]]) -> str:
    """The page's HTML. `categories`: as in the manifest, for keypoints."""
    cards = [_card(row, found, categories) for row, found in _by_row(report.findings)]
    samples = f"<h2>Samples</h2><div class=cards>{''.join(cards)}</div>" if cards else ""
    return _PAGE.substitute(
        title=safe(report.title),
        style=style(),
        facts=_facts(report),
        table=_table(report.findings),
        samples=samples,
    )


def _facts(report: Report) -> str:
    facts = {"input": report.kind, "rows": f"{report.rows:,}"}
    facts |= {f"{severity}s": f"{number:,}" for severity, number in report.severities.items()}
    if report.against:
        facts["compared with"] = ", ".join(report.against)
    return "".join(f"<div><dt>{safe(name)}</dt><dd>{safe(value)}</dd></div>" for name, value in facts.items())


def _table(findings: list[Finding]) -> str:
    if not findings:
        return "<p class=clean>No findings.</p>"
    rows = "".join(_table_row(finding) for finding in findings)
    head = "<tr><th>severity</th><th>check</th><th class=n>number</th><th>meaning, and examples</th></tr>"
    return f"<div class=findings><table>{head}{rows}</table></div>"


def _table_row(finding: Finding) -> str:
    rule = finding.rule
    examples = "".join(f"<li>{safe(example)}</li>" for example in finding.examples)
    return (
        f"<tr><td>{_chip(finding)}</td><td><b>{safe(rule.name)}</b></td>"
        f"<td class=n>{safe(finding.counted)}</td>"
        f"<td>{safe(_sentence(rule.meaning))}<ul>{examples}</ul></td></tr>"
    )


def _chip(finding: Finding) -> str:
    severity = finding.rule.severity
    return f"<span class='chip {severity}'>{severity}</span>"


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:] + "." * (not text.endswith("."))


def _by_row(findings: list[Finding]) -> list[tuple[Row, list[tuple[Finding, Sample]]]]:
    """The sampled rows, each once, with what was found in them; first those of the severest findings."""
    rows: dict[int, tuple[Row, list[tuple[Finding, Sample]]]] = {}
    for finding in findings:
        for sample in finding.samples:
            rows.setdefault(id(sample.row), (sample.row, []))[1].append((finding, sample))
    return list(rows.values())


def _card(row: Row, found: list[tuple[Finding, Sample]], categories: list[dict[str, Any]]) -> str:
    lines = "".join(
        f"<li>{_chip(finding)} <b>{safe(finding.rule.name)}</b> {safe(sample.detail)}</li>" for finding, sample in found
    )
    objects = sorted({index for _, sample in found for index in sample.objects})
    facts = f"{row['width']}×{row['height']}, {len(row['instances'])} objects"
    return (
        f"<article><h3><b>{safe(row['image_id'])}</b> <small>{safe(facts)}</small></h3>"
        f"<figure>{_pictures(row, objects, categories)}</figure><ul>{lines}</ul></article>"
    )


def _pictures(row: Row, objects: list[int], categories: list[dict[str, Any]]) -> str:
    """The stored image with the given objects drawn (all of them if none is given), and a close-up of small ones."""
    try:
        image = decode(row["image"])
    except UserError as error:
        return f"<div class=none>{safe(error)}</div>"
    size = (image.shape[0], image.shape[1])
    drawable = [_drawable(instance, size) for instance in row["instances"]]
    chosen = [drawable[i] for i in objects or range(len(drawable))]
    shown = [instance for instance in chosen if instance is not None][:MAX_DRAWN]
    whole = _picture(image, shown, categories)
    window = _window(shown, size) if objects and shown else None
    if window is None:
        return whole
    left, top, right, bottom = window
    close = _picture(image[top:bottom, left:right], [_shifted(i, window) for i in shown], categories)
    return f"<div class=pair>{whole}{close}</div>"


def _drawable(instance: dict[str, Any], size: tuple[int, int]) -> dict[str, Any] | None:
    """The instance without what cannot be drawn on an image of `size`; None if its box cannot."""
    box = np.array(instance["box"], np.float64)
    if not np.isfinite(box).all():
        return None
    x1, y1, x2, y2 = np.clip(box, -max(size), 2 * max(size))
    box = np.array([min(x1, x2), min(y1, y2), max(x1, x2), max(y1, y2)])
    mask = instance["mask"]
    try:
        mask = None if mask is None else rle_tools.check_rle(mask, size)
    except UserError:
        mask = None
    return {**instance, "box": box.tolist(), "mask": mask}


def _picture(image: np.ndarray, instances: list[dict[str, Any]], categories: list[dict[str, Any]]) -> str:
    """An `img` element of the image (uint8 [H, W, 3]) with the instances drawn."""
    height, width = image.shape[:2]
    row = {"height": height, "width": width, "instances": _with_fitting_keypoints(instances, categories)}
    names = {c["name"]: tuple(c["keypoints"]) for c in categories if c.get("keypoints")}
    edges = {c["name"]: c["skeleton"] for c in categories if c.get("skeleton")}
    found = predictions(row, names)
    colours = palette([p.phrase for p in found])
    drawn = Image.fromarray(
        draw(image, found, edges=edges, colours=colours, labels=len(instances) <= MAX_NAMED, scores=False)
    )
    drawn.thumbnail((STORED_SIDE, STORED_SIDE), Image.Resampling.LANCZOS)
    return f'<img class=zoom loading=lazy src="{data_url(drawn)}" alt="stored image and objects concerned">'


def _with_fitting_keypoints(instances: list[dict[str, Any]], categories: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The instances without keypoints that are not those of their class."""
    numbers = {c["name"]: 3 * len(c.get("keypoints") or ()) for c in categories}
    return [
        i if i["keypoints"] is None or len(i["keypoints"]) == numbers.get(i["phrase"]) else {**i, "keypoints": None}
        for i in instances
    ]


Window = tuple[int, int, int, int]  # left, top, right, bottom in pixels


def _window(instances: list[dict[str, Any]], size: tuple[int, int]) -> Window | None:
    """The part of the image for a close-up of the instances, or of the first one if they are scattered; None if they
    are large enough in the whole image."""
    together = np.array([i["box"] for i in instances])
    height, width = size
    for boxes in (together, together[:1]):
        extent = (boxes[:, 2:].max(0) - boxes[:, :2].min(0)).max()
        if extent < CLOSE_UP * max(size):
            break
    else:
        return None
    side = int(np.ceil(max(_MARGIN * extent, _LEAST)))
    columns, rows = min(side, width), min(side, height)
    x, y = (boxes[:, :2].min(0) + boxes[:, 2:].max(0)) / 2
    left, top = int(np.clip(x - columns / 2, 0, width - columns)), int(np.clip(y - rows / 2, 0, height - rows))
    return left, top, left + columns, top + rows


def _shifted(instance: dict[str, Any], window: Window) -> dict[str, Any]:
    """The instance in the frame of the window."""
    left, top, right, bottom = window
    x1, y1, x2, y2 = instance["box"]
    shifted = {**instance, "box": [x1 - left, y1 - top, x2 - left, y2 - top]}
    if (mask := instance["mask"]) is not None:
        pixels = Masks([mask], tuple(mask["size"])).to_arrays()[:, top:bottom, left:right]
        shifted["mask"] = Masks.from_arrays(pixels).rles[0]
    if instance["keypoints"] is not None:
        points = np.array(instance["keypoints"], np.float64).reshape(-1, 3) - [left, top, 0]
        shifted["keypoints"] = points.flatten().tolist()
    return shifted
