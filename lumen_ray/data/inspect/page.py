"""The page of `data inspect`: one self-contained HTML file."""

from __future__ import annotations

import base64
import html
import io
import re
from collections.abc import Iterable
from pathlib import Path
from string import Template
from typing import Any

import numpy as np
from PIL import Image, ImageDraw
from torch import Tensor

from lumen_ray.data.images import decode
from lumen_ray.data.inspect.prompts import Prompt, PromptToken, prompts_of
from lumen_ray.data.inspect.view import Sampler, Section, View, shown
from lumen_ray.data.shards.statistics import Statistics
from lumen_ray.errors import UserError
from lumen_ray.structures import Boxes, Keypoints, Masks, Prediction
from lumen_ray.tasks import CLASS_TASKS
from lumen_ray.viz import Colour, draw, known_edges, palette, upscale_factor

STORED_SIDE = 640
#: longer side of the further images of a row
THUMBNAIL_SIDE = 320
#: with more objects, names would hide the image and are not drawn
MAX_NAMED = 40
#: of more queries, only the first and the last are shown
MAX_QUERIES = 8

_PAGE = Template((Path(__file__).parent / "inspect.html").read_text())
Row = dict[str, Any]


def page(
    folder: str,
    manifest: dict[str, Any],
    tables: Iterable[Section],
    statistics: Statistics,
    sampler: Sampler,
    views: Iterable[View],
) -> str:
    """The page's HTML. `views` are rendered one by one, so that only one is in memory at a time."""
    edges = {c["name"]: c["skeleton"] for c in manifest["categories"] if c.get("skeleton")}
    names = {c["name"]: tuple(c["keypoints"]) for c in manifest["categories"] if c.get("keypoints")}
    cards = [card(view, sampler, names, edges) for view in views]
    return _PAGE.substitute(
        title=safe(folder),
        facts=_facts(statistics, sampler),
        sections="".join(map(_section, tables)),
        settings=_settings(sampler),
        cards="\n".join(cards) or "<p>no samples requested</p>",
    )


def safe(text: Any) -> str:
    """`text` escaped for HTML."""
    return html.escape(str(text))


def _facts(s: Statistics, sampler: Sampler) -> str:
    stage = sampler.recipe.stages[sampler.stage]
    facts = {
        "rows": f"{s.rows:,}",
        "files": f"{s.files:,}",
        "size": f"{s.bytes / 1e6:,.1f} MB",
        "sources": ", ".join(s.sources),
        "objects": f"{s.instances:,}",
        "rejected": f"{s.reasons.total():,}",
        "recipe": f"{sampler.recipe.name}, stage {stage.name}",
        "model": sampler.settings.name,
    }
    return "".join(f"<div><dt>{safe(name)}</dt><dd>{safe(value)}</dd></div>" for name, value in facts.items())


def _section(section: Section) -> str:
    """A table, with its first column of numbers also drawn as bars."""
    bar = section.first_number
    values = [row[bar] if bar < len(row) and isinstance(row[bar], int) else 0 for row in section.rows]
    most = max([*values, 1])
    head = "".join(f"<th{' class=n' * (i >= bar)}>{safe(c)}</th>" for i, c in enumerate(section.columns))
    body = ""
    for row, value in zip(section.rows, values, strict=True):
        cells = "".join(f"<td{' class=n' * (i >= bar)}>{safe(shown(c))}</td>" for i, c in enumerate(row))
        body += f'<tr style="--share:{100 * value / most:.1f}%">{cells}</tr>'
    return (
        f"<details open class=table><summary>{safe(section.title)}</summary><div>"
        f"<table><tr>{head}</tr>{body}</table></div></details>"
    )


def _settings(sampler: Sampler) -> str:
    """The settings of the recipe's stage that determine a sample."""
    stage = sampler.recipe.stages[sampler.stage]
    settings = {"augment": stage.augment, "branches": stage.branches}
    lines = [f"<p><b>{name}</b> {_keys(value.model_dump(mode='json'))}</p>" for name, value in settings.items()]
    groups = "; ".join(f"{', '.join(g.tasks)} (weight {g.weight:g})" for g in stage.groups)
    return f"<p><b>groups</b> {safe(groups)}</p>" + "".join(lines)


def _keys(values: dict[str, Any]) -> str:
    return ", ".join(f"{safe(k)} <code>{safe(v)}</code>" for k, v in values.items())


def card(view: View, sampler: Sampler, names: dict[str, tuple[str, ...]], edges: dict[str, Any]) -> str:
    """One row: as stored, and as the model's input and targets."""
    prompts = prompts_of(view, sampler.tokenizer, edges)
    colours = palette([i["phrase"] for i in view.row["instances"]] + [p.phrase for p in prompts if p.phrase])
    row = view.row
    facts = f"{row['width']}×{row['height']} · {', '.join(row['tasks'])}"
    head = f"<b>{safe(row['image_id'])}</b> <small>{safe(facts)}</small>"
    return (
        f"<article><h3>{head}</h3><div class=sample>"
        f"<figure>{_stored(row, names, edges, colours)}</figure>"
        f"<figure>{_model_input(view, prompts, colours)}</figure>"
        f"<div class=prompts>{_prompts(view, prompts, colours)}</div></div></article>"
    )


def _stored(row: Row, names: dict[str, tuple[str, ...]], edges: dict[str, Any], colours: dict[str, Colour]) -> str:
    counts: dict[str, int] = {}
    for instance in row["instances"]:
        counts[instance["phrase"]] = counts.get(instance["phrase"], 0) + 1
    caption = ", ".join(f"{n} × {safe(phrase)}" for phrase, n in counts.items())
    absent = len(set(row["classes"]) - set(counts))
    partial = sorted(set(counts) - set(row["classes"]))
    notes = [f"classes annotated as absent: {absent:,}"] * bool(absent)
    notes += [f"not annotated exhaustively, not used as prompts: {safe(', '.join(partial))}"] * bool(partial)
    texts = [f"<li><i>{safe(m['task'])}</i> {' → '.join(_turns(m))}</li>" for m in row["messages"]]
    texts += [f"<li><i>{safe(p['task'])}</i> {safe(p['phrase'])} → {len(p['instances'])} objects</li>"
              for p in row["phrases"]]  # fmt: skip
    listed = f"<details><summary>{len(texts)} texts</summary><ul>{''.join(texts)}</ul></details>" if texts else ""
    words = f"<p>{caption}</p>" + "".join(f"<p>{note}</p>" for note in notes)
    stored, title = _stored_picture(row, names, edges, colours), "as stored"
    if row["target_image"] is not None:
        stored = _pair(stored, _edited_picture(row["target_image"]))
        title += ", before and after the edit"
    stored += _strip([_stored_thumbnail(image["image"]) for image in row["further_images"]])
    if row["further_images"]:
        title += f", {1 + len(row['further_images'])} images"
    return f"{stored}<figcaption><i>{title}</i>{words}{listed}</figcaption>"


def _turns(message: dict[str, Any]) -> list[str]:
    """The texts of a message, behind the numbers of the further images that come in each question."""
    texts = [safe(turn["content"]) for turn in message["turns"]]
    for number, question in reversed(list(enumerate(message["image_turns"], start=2))):
        if 2 * question < len(texts):
            texts[2 * question] = f"<code>image {number}</code> {texts[2 * question]}"
    return texts


def _strip(pictures: list[str]) -> str:
    """The further images of a row, each with its number; nothing without any."""
    if not pictures:
        return ""
    shown = "".join(
        f"<div>{picture}<small>image {number}</small></div>" for number, picture in enumerate(pictures, start=2)
    )
    return f"<div class=strip>{shown}</div>"


def _stored_thumbnail(encoded: bytes | None) -> str:
    try:
        picture = Image.fromarray(decode(encoded or b""))
    except UserError as error:
        return f"<div class=none>{safe(error)}</div>"
    picture.thumbnail((THUMBNAIL_SIDE, THUMBNAIL_SIDE), Image.Resampling.LANCZOS)
    return f'<img class=zoom loading=lazy src="{data_url(picture)}" alt="further stored image">'


def _edited_picture(encoded: bytes) -> str:
    try:
        edited = Image.fromarray(decode(encoded))
    except UserError as error:
        return f"<div class=none>{safe(error)}</div>"
    edited.thumbnail((STORED_SIDE, STORED_SIDE), Image.Resampling.LANCZOS)
    return f'<img class=zoom loading=lazy src="{data_url(edited)}" alt="stored picture after the edit">'


def _stored_picture(
    row: Row, names: dict[str, tuple[str, ...]], edges: dict[str, Any], colours: dict[str, Colour]
) -> str:
    if row["image"] is None:
        return "<div class=none>text only</div>"
    try:
        image = decode(row["image"])
    except UserError as error:
        return f"<div class=none>{safe(error)}</div>"
    found = predictions(row, names)
    tints = colours | {p.phrase: colours[p.phrase.removesuffix(" (crowd)")] for p in found}
    drawn = Image.fromarray(
        draw(image, found, edges=edges, colours=tints, labels=len(row["instances"]) <= MAX_NAMED, scores=False)
    )
    _draw_regions(drawn, row, upscale_factor(image.shape[:2]))
    drawn.thumbnail((STORED_SIDE, STORED_SIDE), Image.Resampling.LANCZOS)
    return f'<img class=zoom loading=lazy src="{data_url(drawn)}" alt="stored image with its annotations">'


def predictions(row: Row, names: dict[str, tuple[str, ...]]) -> list[Prediction]:
    """A row's instances as predictions to draw, grouped by class, crowd, and whether they have masks and keypoints."""
    size = (row["height"], row["width"])
    groups: dict[tuple[str, bool, bool, bool], list[Row]] = {}
    for instance in row["instances"]:
        name = instance["phrase"]
        posed = instance["keypoints"] is not None and name in names
        groups.setdefault((name, bool(instance["crowd"]), instance["mask"] is not None, posed), []).append(instance)
    found = []
    for (name, crowd, masked, posed), members in groups.items():
        p = Prediction(name + " (crowd)" * crowd, Boxes([i["box"] for i in members], size), np.ones(len(members)))
        p.masks = Masks([i["mask"] for i in members], size) if masked else None
        p.keypoints = Keypoints([i["keypoints"] for i in members], names[name], size) if posed else None
        found.append(p)
    return found


def _draw_regions(picture: Image.Image, row: Row, scale: int) -> None:
    """Draws region prompts in white on black, with the number that messages refer to."""
    pen = ImageDraw.Draw(picture)
    for number, region in enumerate(row["regions"]):
        if region["mask"]:
            box = Masks([region["mask"]], tuple(region["mask"]["size"])).to_arrays()[0].nonzero()
            points = np.array([[box[1].min(), box[0].min()], [box[1].max() + 1, box[0].max() + 1]], float)
        else:
            points = np.array(region["points"], float).reshape(-1, 2)
        points = points * scale
        for colour, width in (((0, 0, 0), 4), ((255, 255, 255), 2)):
            if region["kind"] in ("box", "mask"):
                pen.rectangle([*points.min(0), *points.max(0)], outline=colour, width=width)
            elif region["kind"] == "point":
                pen.ellipse([*(points[0] - 3 - width), *(points[0] + 3 + width)], outline=colour, width=width)
            else:
                path = [tuple(p) for p in points]
                pen.line(path + path[:1] * (region["kind"] == "polygon"), fill=colour, width=width)
        spot = tuple(points.min(0) + 4)
        pen.text(spot, f"region {number}", fill=(255, 255, 255), stroke_width=2, stroke_fill=(0, 0, 0), font_size=13)


def style() -> str:
    """The style sheet, for other pages of this kind."""
    match = re.search(r"<style>(.*?)</style>", _PAGE.template, re.DOTALL)
    assert match is not None, "inspect.html has one style sheet"
    return match[1]


def data_url(picture: Image.Image, kind: str = "JPEG") -> str:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **({"quality": 88} if kind == "JPEG" else {}))
    return f"data:image/{kind.lower()};base64," + base64.b64encode(buffer.getvalue()).decode()


def _model_input(view: View, prompts: list[Prompt], colours: dict[str, Colour]) -> str:
    """The augmented model input with the targets of each prompt drawn on it, and the target image if there is one."""
    made, size = "", ""
    target = next((p.picture for p in prompts if p.picture is not None), None)  # a row has one
    if target is not None:
        made = f'<img loading=lazy src="{data_url(Image.fromarray(target), "PNG")}" alt="to make">'
        size = f", and {target.shape[1]}×{target.shape[0]} to make"
    if not bool(view.batch.has_image[0]):
        return f"{_pair('<div class=none>no image</div>', made)}<figcaption><i>model input</i>{size}</figcaption>"
    pixels = view.batch.images[0].permute(1, 2, 0).numpy()
    height, width = pixels.shape[:2]
    layers = "".join(_layer(p, colours.get(p.phrase, (255, 255, 255)), view, (height, width)) for p in prompts)
    lost = _lost(view.row, prompts)
    left_out = f"<p>{lost} objects of the prompted classes are not in it: cropped away or too small</p>" * bool(lost)
    drawn = (
        f'<div class=input><img loading=lazy src="{data_url(Image.fromarray(pixels), "PNG")}" alt="model input">'
        f'<svg viewBox="0 0 {width} {height}">{layers}</svg></div>'
    )
    beside = ", and the picture to make of it" if made else ""
    strip = _strip([_further_input(image) for image in view.batch.further_images])
    augmented = "without augmentation, since texts compare images" if strip else "after augmentation"
    return (
        f"{_pair(drawn, made)}{strip}<figcaption><i>model input</i> {width}×{height}, {augmented}, with what the "
        f"prompts should find{beside}{left_out}</figcaption>"
    )


def _further_input(image: Tensor) -> str:
    """A further image of the batch, uint8 [3, H, W]."""
    picture = Image.fromarray(image.permute(1, 2, 0).numpy())
    return f'<img loading=lazy src="{data_url(picture, "PNG")}" alt="further model input">'


def _pair(left: str, right: str) -> str:
    return f"<div class=pair>{left}{right}</div>" if right else left


def _lost(row: Row, prompts: list[Prompt]) -> int:
    """Number of instances of the classes prompted by name that are not in the model input."""
    left = {p.phrase: len(p.boxes) for p in prompts if p.task in CLASS_TASKS and not p.regions}
    return sum(i["phrase"] in left for i in row["instances"]) - sum(left.values())


def _layer(prompt: Prompt, colour: Colour, view: View, size: tuple[int, int]) -> str:
    """The targets of one prompt as SVG in input pixels; its regions are shown by their masks."""
    height, width = size
    rgb, unit = f"rgb{colour}", max(size) / 256
    parts = []
    for mask in prompt.masks:
        parts.append(_mask_image(mask > 127, colour, width, height))
    for region in prompt.regions:
        parts.append(_mask_image(view.batch.region_masks[region].numpy(), (255, 255, 255), width, height))
    for (x1, y1, x2, y2), crowd in zip(prompt.boxes, prompt.crowd, strict=True):
        dash = f' stroke-dasharray="{4 * unit}"' if crowd else ""
        parts.append(
            f'<rect x="{x1:.1f}" y="{y1:.1f}" width="{x2 - x1:.1f}" height="{y2 - y1:.1f}" stroke="{rgb}"{dash} '
            f'stroke-width="{1.6 * unit:.2f}"/>'
        )
    for points in prompt.keypoints:
        for a, b in prompt.edges or known_edges(prompt.keypoint_names):
            if points[a][2] > 0 and points[b][2] > 0:
                (x1, y1, _), (x2, y2, _) = points[a], points[b]
                parts.append(
                    f'<path d="M{x1:.1f} {y1:.1f}L{x2:.1f} {y2:.1f}" stroke="{rgb}" stroke-width="{1.5 * unit}"/>'
                )
        for x, y, v in points:
            if v > 0:
                fill = rgb if v == 2 else "none"  # hidden ones are rings
                parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{2 * unit}" fill="{fill}" stroke="white" '
                             f'stroke-width="{0.5 * unit}"/>')  # fmt: skip
    shy = " class=shy" if prompt.regions and not prompt.boxes else ""  # regions show while their prompt is hovered
    return f'<g data-prompt="{prompt.index}"{shy}>{"".join(parts)}</g>'


def _mask_image(mask: np.ndarray, colour: Colour, width: int, height: int) -> str:
    pixels = np.zeros((*mask.shape, 4), np.uint8)
    pixels[mask > 0] = (*colour, 110)
    url = data_url(Image.fromarray(pixels), "PNG")
    return f'<image href="{url}" width="{width}" height="{height}" preserveAspectRatio="none"/>'


def _prompts(view: View, prompts: list[Prompt], colours: dict[str, Colour]) -> str:
    if rejected := view.batch.rejected:
        return f"<p class=warn>{safe(rejected[0]['reason'])}; training goes on without it</p>"
    if not prompts:
        return f"<p class=warn>the row is not annotated for {safe(', '.join(view.tasks))}: no prompts</p>"
    total = sum(p.num_tokens for p in prompts)
    learned = int((view.batch.layout.labels != -100).sum())
    head = (
        f"<p>prompts: {len(prompts)}, together {total:,} tokens ({learned:,} learned by the language model) behind "
        f"{view.image_tokens:,} image tokens</p>"
    )
    if cut := view.batch.truncated:
        head += f"<p class=warn>cut to fit pack_tokens: {safe(cut)}</p>"
    items = [_item(p, prompts, colours) for p in prompts if p.parent < 0]
    return head + "<ol>" + "".join(items) + "</ol>"


def _item(prompt: Prompt, prompts: list[Prompt], colours: dict[str, Colour]) -> str:
    children = [p for p in prompts if p.parent == prompt.index]
    below = ""
    if children:
        rows = "".join(f"<li>{_line(p)}</li>" for p in children)
        below = f"<details><summary>{len(children)} keypoint prompts</summary><ul>{rows}</ul></details>"
    tint = f' style="background:rgb{colours[prompt.phrase]}"' if prompt.phrase in colours else ""
    kind = " class=absent" if prompt.negative else ""
    head = f"<i class=dot{tint}></i><em>{safe(prompt.task)}</em><div>{_line(prompt)}</div>"
    return f'<li data-prompt="{prompt.index}"{kind}>{head}{below}</li>'


def _line(prompt: Prompt) -> str:
    """The prompt's tokens and its note."""
    tokens = "".join(_token(token) for token in _few_queries(prompt.tokens))
    return f"<span class=tokens>{tokens}</span> <small>{safe(prompt.note)}</small>"


def _few_queries(tokens: list[PromptToken]) -> list[PromptToken]:
    """The tokens with only the first and last of many queries: generation has 64, too many for a line."""
    queries = [i for i, (_, kind, _) in enumerate(tokens) if kind == "query"]
    if len(queries) <= MAX_QUERIES:
        return tokens
    return [*tokens[: queries[0] + 1], ("…", "query", False), *tokens[queries[-1] :]]


def _token(token: PromptToken) -> str:
    text, kind, learned = token
    title = {"query": "super-link query", "special": "special token", "text": ""}[kind]
    return (
        f'<s class="{kind}{" learned" * learned}"{f" title={chr(34)}{title}{chr(34)}" * bool(title)}>{safe(text)}</s>'
    )
