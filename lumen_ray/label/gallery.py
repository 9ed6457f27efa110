"""The gallery of a labelled folder: one self-contained HTML file."""

from __future__ import annotations

import base64
import html
import io
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from string import Template
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from PIL import Image

from lumen_ray.answer import Answer
from lumen_ray.data.files import write_atomically
from lumen_ray.data.images import Picture, decode_reduced
from lumen_ray.errors import UserError
from lumen_ray.inference.records import record_edges, records_to_answers
from lumen_ray.label.inputs import Item, read_bytes
from lumen_ray.label.ledger import Ledger, open_finished
from lumen_ray.structures import Boxes, Keypoints, Masks, Prediction
from lumen_ray.viz import draw, palette

MAX_IMAGES = 120
THUMBNAIL_SIDE = 560
#: Above this many instances, labels would hide the picture.
MAX_LABELLED_INSTANCES = 40
#: At most this many instances of an answer are drawn, best scores first: a thousand would hide each other.
MAX_DRAWN = 300
#: errors.parquet has all of them
MAX_ERRORS = 1000

_PAGE = Template((Path(__file__).parent / "gallery.html").read_text())


def write_gallery(
    output: str | Path,
    *,
    max_images: int = MAX_IMAGES,
    image_ids: Sequence[str] | None = None,
    path: Path | None = None,
) -> Path:
    """Writes the gallery of the labelled folder `output`, as ``gallery.html`` in it or to `path`; returns its path.

    Shows the first `max_images` images, or those of `image_ids` in this order, embedded in the page; the counts are
    those of all images.
    """
    ledger = open_finished(output)
    instances: Counter[tuple[str, str]] = Counter()  # (task, phrase)
    shown: dict[str, list[dict[str, Any]]] = {}
    wanted = None if image_ids is None else pa.array(image_ids, pa.string())
    for table in ledger.tables():
        boxed = table.filter(table["box"].is_valid())
        instances.update(zip(boxed["task"].to_pylist(), boxed["phrase"].to_pylist(), strict=True))
        if wanted is None and len(shown) >= max_images:
            continue
        if wanted is not None:
            table = table.filter(pc.is_in(table["image_id"], value_set=wanted))
        for record in table.to_pylist():
            if record["image_id"] in shown or wanted is not None or len(shown) < max_images:
                shown.setdefault(record["image_id"], []).append(record)
    colours = palette(sorted({phrase for _, phrase in instances}))
    cards = {}
    for item, data in _images(ledger, shown):
        if (card := _card(item, data, shown[item.image_id], colours)) is not None:
            cards[item.image_id] = card
    if image_ids is not None:
        cards = {image_id: cards[image_id] for image_id in image_ids if image_id in cards}
    tasks = list(dict.fromkeys(task for task, _ in instances))
    page = _PAGE.substitute(
        summary=_summary(ledger, len(cards), "the first" if image_ids is None else "the chosen"),
        tasks="".join(f'<button data-task="{_safe(t)}">{_safe(t)}</button>' for t in tasks),
        classes=_chips(instances, tasks, colours),
        cards="\n".join(cards.values()),
        errors=_errors(ledger),
    )
    path = path or Path(ledger.output, "gallery.html")
    write_atomically(path, lambda p: p.write_text(page, encoding="utf-8"))
    return path


def _safe(text: Any) -> str:
    return html.escape(str(text))


def _images(ledger: Ledger, shown: dict[str, Any]) -> Iterator[tuple[Item, bytes]]:
    """The encoded bytes of the images in `shown`, in order; those deleted since are left out."""
    items = list(islice((item for item in ledger.items() if item.image_id in shown), len(shown)))
    for item, data in read_bytes(items):
        if not isinstance(data, UserError):
            yield item, data


def _summary(ledger: Ledger, shown: int, which: str) -> str:
    totals, job = ledger.totals(), ledger.settings()
    assert job is not None, "a labelled folder has settings"
    images, labelled = totals["images"], totals["labelled"]
    facts = {
        "images": images,
        "labelled": labelled,
        "errors": images - labelled,
        "score from": job["score_threshold"],
        "tasks": ", ".join(job["tasks"]),
    }
    if shown < labelled:
        facts["shown here"] = f"{which} {shown}"
    return "".join(f"<div><dt>{_safe(name)}</dt><dd>{_safe(value)}</dd></div>" for name, value in facts.items())


def _chips(instances: Counter[tuple[str, str]], tasks: list[str], colours: dict[str, Any]) -> str:
    """One filter button per class, with its number of instances (the largest of any task)."""
    chips = []
    for phrase, colour in colours.items():
        number = max(instances[task, phrase] for task in tasks)
        dot = f'<i style="background:rgb{colour}"></i>'
        chips.append(f'<button data-class="{_safe(phrase)}">{dot}{_safe(phrase)} <small>{number}</small></button>')
    return "".join(chips)


def _card(item: Item, data: bytes, records: list[dict[str, Any]], colours: dict[str, Any]) -> str | None:
    """The picture and what was found in it; None for an image that has changed since it was labelled."""
    try:
        picture = decode_reduced(data, 2 * THUMBNAIL_SIDE)
    except UserError:
        return None
    if picture.size != (records[0]["height"], records[0]["width"]):
        return None
    answers = records_to_answers(records)
    boxed: dict[str, list[Answer]] = {}
    for answer in answers:
        if answer.text is None:
            boxed.setdefault(answer.task, []).append(_reduced(answer.best(MAX_DRAWN), picture))
    edges = {r["phrase"]: record_edges(r) for r in records if r["keypoints"] is not None}
    pictures = [(task, _thumbnail(picture.pixels, group, colours, edges)) for task, group in boxed.items()]
    pictures = pictures or [("", _thumbnail(picture.pixels, [], colours, edges))]
    classes = sorted({p.phrase for a in answers for p in a.predictions})
    found = Counter({p.phrase: len(p) for a in answers for p in a.predictions})
    counts = ", ".join(f"{n} × {_safe(phrase)}" for phrase, n in found.items()) or "nothing found" * bool(boxed)
    return (
        f'<figure data-classes="{_safe(json.dumps(classes))}">'
        + "".join(f'<img loading="lazy" data-task="{_safe(t)}" src="{url}" alt="{_safe(t)}">' for t, url in pictures)
        + f'<figcaption><b title="{_safe(item.path)}">{_safe(item.image_id)}</b><p>{counts}</p>{_texts(records)}'
        + "</figcaption></figure>"
    )


def _reduced(answer: Answer, picture: Picture) -> Answer:
    """The answer in pixels of an image that was decoded at reduced scale."""
    if picture.reduction == 1 or answer.text is not None:
        return answer
    factor, size = picture.reduction, (picture.pixels.shape[0], picture.pixels.shape[1])
    predictions = []
    for p in answer.predictions:
        small = Prediction(p.phrase, Boxes(p.boxes.xyxy / factor, size), p.scores)
        if p.masks is not None:  # one by one: a mask of a large photograph takes as many bytes as it has pixels
            whole = (Masks([rle], answer.size).to_arrays()[0] for rle in p.masks.rles)
            small.masks = Masks.from_arrays(np.stack([mask[::factor, ::factor] for mask in whole]))
        if p.keypoints is not None:
            small.keypoints = Keypoints(p.keypoints.xyv / [factor, factor, 1], p.keypoints.names, size)
        predictions.append(small)
    return Answer(answer.task, size, predictions)


def _texts(records: list[dict[str, Any]]) -> str:
    lines = []
    for record in records:
        if record["text"] is not None:
            prompt = record["prompt"] or record["task"]
            lines.append(f"<p class=text><span>{_safe(prompt)}</span> {_safe(record['text'])}</p>")
    return "".join(lines)


def _thumbnail(image: np.ndarray, answers: list[Answer], colours: dict[str, Any], edges: dict[str, Any]) -> str:
    number = sum(len(p) for a in answers for p in a.predictions)
    drawn = draw(image, answers, edges=edges, colours=colours, labels=number <= MAX_LABELLED_INSTANCES)
    picture = Image.fromarray(drawn)
    picture.thumbnail((THUMBNAIL_SIDE, THUMBNAIL_SIDE), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=86)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def _errors(ledger: Ledger) -> str:
    errors = list(islice((error for _, entry in ledger.entries() for error in entry["errors"]), MAX_ERRORS + 1))
    if not errors:
        return ""
    rows = "".join(
        f"<tr><td>{_safe(e['image_id'])}</td><td><code>{_safe(e['reason'])}</code></td><td>{_safe(e['message'])}</td></tr>"
        for e in errors[:MAX_ERRORS]
    )
    number = f"{len(errors)} images" if len(errors) <= MAX_ERRORS else f"The first {MAX_ERRORS:,} images"
    return (
        f"<section><h2>{number} that could not be labelled</h2>"
        f"<table><tr><th>image</th><th>reason</th><th>what to do</th></tr>{rows}</table></section>"
    )
