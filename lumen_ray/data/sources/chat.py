"""Conversations as a source: LLaVA-style json and jsonl, with regions as VisionLLM v2, GPT4RoI and Osprey write them.

    {"id": .., "image": .., "conversations": [{"from": "human", "value": "<image> <region>?"}, {"from": "gpt", ..}],
     "regions": [[x1, y1, x2, y2], {"segmentation": ..}, {"point": [x, y]}]}

Also read: `messages` of `role` and `content` (texts or parts), `images` (a list, a name, or {path or bytes}), images
under keys of a turn, and records without image. A record becomes one message with all its turns; every answer is
trained. Records with the same image, or the same list of images, share a row. Turns must
alternate, user first; `system` of the record and a system turn are prepended to the first question. A record with a
picture, clip or sound under any other key or marker is rejected, see `chat_media`.

Markers: `<image>` is removed. With several images, there are as many markers as images, or none; the n-th marker is
the n-th image, which is seen from that question on, and a marker within a line becomes ``image n``, see `chat_images`.
Regions need a record with one image. Each `<region>` in a question refers to the next entry of the regions. A numbered
`<region2>` or `<region 2>` refers to that entry: its first mention becomes ``region2 <region>``, later ones and those
in answers ``region2``; regions that no question mentions are introduced before the first question.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from lumen_ray.data import files, urls
from lumen_ray.data.frames import AnnotationFrame
from lumen_ray.data.shards.schema import make_row
from lumen_ray.data.sources.base import Listing, Outcome, Source, reject
from lumen_ray.data.sources.chat_images import PlacedImage, Turn, images_in, name_markers, place_images
from lumen_ray.data.sources.chat_media import TURN_KEYS, check_keys, check_markers, read_turn
from lumen_ray.data.sources.groups import Images, finished_group, lost_group, open_further, open_group
from lumen_ray.data.sources.objects import make_instance, read_mask
from lumen_ray.data.sources.record_parsing import (
    BOX_FORMATS,
    Record,
    as_mapping,
    check_choice,
    clean_text,
    first_of,
    fractions_note,
    image_refs,
    is_numbers,
    load_records,
    named_images,
    plain_json,
    relative_scale,
    short,
)
from lumen_ray.data.values import declared_size, id_key, numbers
from lumen_ray.errors import UserError
from lumen_ray.structures import Region
from lumen_ray.tasks import REGION_TOKEN, TASKS

ITEMS = "conversations"
TASK_NAMES = tuple(name for name, task in TASKS.items() if task.is_text)
_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
_NUMBERED = re.compile(r"<region\s*(\d{1,4})>")
_REGION_KEYS = ("regions", "region", "bbox", "bboxes", "boxes", "masks", "annotation", "annotations")
_POINT_KINDS = ("point", "scribble", "polygon")


@dataclass
class ChatSource(Source):
    """`conversations`: json or jsonl files; `images`: folder of the images, None if no record has one; `task`: the one
    of `TASK_NAMES` that the answers train; `box_format`: of the regions' boxes, see `BOX_FORMATS`; `max_images`: of a
    record."""

    conversations: list[str]
    images: str | None = None
    task: str = "chat"
    box_format: str = "xyxy"
    max_images: int = 8
    kind = "chat"
    row_kind = "samples"

    def read_listing(self) -> Listing:
        check_choice("task", self.task, TASK_NAMES)
        check_choice("box format", self.box_format, BOX_FORMATS)
        if self.max_images < 1:
            raise UserError(f"max_images must be at least 1, got {self.max_images}", "invalid_config")
        if self.images is not None:
            self.images = urls.absolute(self.images)
            if not files.is_dir(self.images):
                raise UserError(f"image folder '{self.images}' does not exist", "missing_images")
        groups = Images(ITEMS)
        for location in dict.fromkeys(self.conversations):
            for origin, record in load_records(location, ("conversations", "data", "annotations")):
                self._add(groups, origin, record)
        listed = groups.listing()
        regions = (region for group in listed for item in group["items"] for region in item["regions"])
        boxes = (region["values"] for region in regions if region["kind"] == "box")
        notes = [] if self.box_format == "relative" else fractions_note(boxes, "give --box-format relative if they are")
        inputs = {"samples": len(groups), ITEMS: groups.listed}
        return Listing(listed, inputs, rejected=groups.rejected, notes=notes)

    def _add(self, groups: Images, origin: str, record: Any) -> None:
        turns: list[Turn] = []
        try:
            record = as_mapping(record)
            turns = _turns(record)
            images = self._images(record, turns)
            item = parse(record, turns, images)
        except UserError as error:
            refs = [*named_images(record), *images_in(turns)]
            groups.reject(refs[0] if refs else None, origin, error, further=refs[1:])
            return
        size = declared_size(record.get("height"), record.get("width"))
        groups.add(
            images[0].ref if images else None,
            origin,
            item,
            size=size if any(size) and len(images) == 1 else None,  # of several, it does not say which one
            further=[image.ref for image in images[1:]],
        )

    def _images(self, record: Record, turns: list[Turn]) -> list[PlacedImage]:
        """The images of a record in order. Raises `UserError` if they are not said clearly, or are too many."""
        listed = image_refs(record)
        check_keys(record, [*listed, *images_in(turns)])
        check_markers([{"role": turn.role, "content": turn.text} for turn in turns])
        images = place_images(listed, turns)
        if len(images) > self.max_images:
            why = f"it has {len(images)} images, more than the limit of {self.max_images} (--max-images)"
            raise UserError(why, "too_many_images")
        if self.images is None and (missing := [image.ref for image in images if image.ref.data is None]):
            why = f"it has the image '{missing[0].name}'; give the folder of the images as --images"
            raise UserError(why, "no_images")
        return images

    def rows(self, record: Record, shared: Any) -> Iterator[Outcome]:
        data, frame, further = None, None, []
        if record["image"] is not None:
            try:
                data, frame = open_group(self.images or "", record)
                further = open_further(self.images or "", record)
            except UserError as error:
                yield lost_group(self.row_kind, ITEMS, record, error)
                return
        name = record["id"]
        size = frame.rotated_size if frame else (0, 0)
        row = make_row(name, data, size, self.kind, tasks=[self.task], further_images=further)
        rejected = []
        for item in record["items"]:
            try:
                regions = [_schema_region(region, self.box_format, frame) for region in item["regions"]]
            except UserError as error:
                rejected.append(reject(ITEMS, name, item["origin"], error))
                continue
            places = [len(row["regions"]) + i for i in item["order"]]
            row["regions"] += regions
            message = {"task": self.task, "turns": item["turns"], "regions": places}
            row["messages"].append(message | {"image_turns": item["image_turns"]})
        yield from finished_group(self.row_kind, ITEMS, Outcome(row), record, rejected)


def parse(record: Record, written: list[Turn], images: list[PlacedImage]) -> Record:
    """`turns` and `image_turns` as in the schema, `regions` not yet checked against the image, their `order` of use.

    Raises `UserError` if the texts or regions cannot be used.
    """
    regions = _regions(record)
    if regions and not images:
        raise UserError("it has an <image> marker or regions but no image", "missing_image")
    if regions and len(images) > 1:
        why = f"it has regions and {len(images)} images; a region does not say which image it is on"
        raise UserError(why, "regions_of_several")
    name_markers(written, len(images))
    turns = [{"role": turn.role, "content": turn.text} for turn in written]
    order = _place_regions(turns, len(regions))
    for number, turn in enumerate(turns):
        allowed = (REGION_TOKEN,) if turn["role"] == "user" else ()
        turn["content"] = clean_text(turn["content"], f"turn {number}", allowed=allowed, keep_lines=True)
    identity = first_of(record, ("id", "question_id"))
    identity = id_key(identity) if isinstance(identity, int | float) else identity
    name = None if identity is None else clean_text(identity, "the record's id", keep_lines=True)
    image_turns = [image.question for image in images[1:]]
    return {"id": name, "turns": turns, "regions": regions, "order": order, "image_turns": image_turns}


def _turns(record: Record) -> list[Turn]:
    """The turns, alternating between user and assistant, the last one of the assistant."""
    listed = first_of(record, TURN_KEYS)
    if not isinstance(listed, list) or not listed:
        raise UserError("it has no list of turns (keys: conversations, messages)", "missing_turns")
    turns: list[Turn] = []
    system = record.get("system")
    if system is not None and not isinstance(system, str):
        raise UserError(f"its 'system' must be a text, got {short(system)}", "invalid_text")
    heads = [read_turn("system", system.strip(), {}, 0)] if system and system.strip() else []
    for number, entry in enumerate(listed):
        entry = entry if isinstance(entry, dict) else {}
        role, content = first_of(entry, ("from", "role")), first_of(entry, ("value", "content"))
        role = _ROLES.get(role) if isinstance(role, str) else None
        if role is None:
            raise UserError(f"turn {number} needs 'from' (human, gpt or system) and a text 'value'", "invalid_turn")
        turn = read_turn(role, content, entry, number)
        if role == "system" and number == 0:
            turn.text = turn.text.strip()
            if turn.text in [head.text for head in heads]:
                heads[0].beside += turn.beside
            else:
                heads.append(turn)
        elif role != ("assistant" if len(turns) % 2 else "user"):
            raise UserError(f"turn {number} is from {role}; user and assistant must alternate, user first", "turns")
        else:
            turns.append(turn)
    if not turns or len(turns) % 2:
        raise UserError("the last question has no answer", "turns")
    parts = [*heads, turns[0]]
    turns[0] = Turn(
        "user",
        "\n".join(part.text for part in parts),
        [slot for part in parts for slot in part.slots],
        [ref for part in parts for ref in part.beside],
    )
    return turns


def _regions(record: Record) -> list[Record]:
    """The regions as plain json: `kind` and `values`, numbers or a segmentation."""
    listed = first_of(record, _REGION_KEYS)
    if listed is None:
        return []
    if (is_numbers(listed) and listed) or isinstance(listed, dict):
        listed = [listed]
    if not isinstance(listed, list):
        raise UserError(f"its regions must be a list, got {short(listed)}", "invalid_region")
    return [_plain_region(entry) for entry in listed]


def _plain_region(entry: Any) -> Record:
    if is_numbers(entry) and len(entry) == 4:
        return {"kind": "box", "values": list(entry)}
    if isinstance(entry, dict):
        mask = entry if "counts" in entry else first_of(entry, ("segmentation", "mask"))
        box = numbers(first_of(entry, ("bbox", "box"))) or []
        if mask:
            return {"kind": "mask", "values": plain_json(mask), "box": box if len(box) == 4 else None}
        if len(box) == 4:
            return {"kind": "box", "values": box}
        for kind in _POINT_KINDS:
            points = entry.get(kind)
            if isinstance(points, list) and all(isinstance(point, list) for point in points):
                points = [v for point in points for v in point]
            if (values := numbers(points)) and len(values) % 2 == 0:
                return {"kind": kind, "values": values}
    why = "a region must be a box of four numbers, or have a segmentation, bbox, point, scribble or polygon"
    raise UserError(f"{why}, got {short(entry)}", "invalid_region")


def _schema_region(region: Record, box_format: str, frame: AnnotationFrame | None) -> Record:
    """A schema region in the EXIF-rotated frame; with relative boxes, points are relative too.

    Raises `UserError` if it is outside the image.
    """
    assert frame is not None, "parse accepts regions only with an image"
    kind, values = region["kind"], region["values"]
    if kind == "mask":
        mask, _ = read_mask(values, frame.size)
        if mask is None and region["box"] is None:
            raise UserError("its mask is not in pixels of this image, or covers none", "invalid_mask")
        # an unusable mask leaves its box
        kind, values = ("mask", mask) if mask is not None else ("box", region["box"])
    if kind in ("box", "mask"):
        shape = {"segmentation": values} if kind == "mask" else {"bbox": values}
        found, _ = make_instance("region", frame, box_format=box_format, **shape)
        return {"kind": kind, "points": found["box"] if kind == "box" else None, "mask": found["mask"]}
    x, y = relative_scale(values, frame.size) if box_format == "relative" else (1, 1)
    moved = frame.moved([[a * x, b * y] for a, b in zip(values[::2], values[1::2], strict=True)])
    points = Region(region["kind"], frame.rotated_size, moved).points
    assert points is not None
    return {"kind": region["kind"], "points": [float(v) for v in points.flatten()], "mask": None}


def _place_regions(turns: list[dict[str, str]], number: int) -> list[int]:
    """Rewrites the markers of the turns; returns the index of the region that each `<region>` now refers to."""
    questions = [turn for turn in turns if turn["role"] == "user"]
    plain = sum(turn["content"].count(REGION_TOKEN) for turn in questions)
    if any(REGION_TOKEN in turn["content"] for turn in turns if turn["role"] == "assistant"):
        raise UserError(f"an answer has {REGION_TOKEN}; only questions can point to regions", "region_in_answer")
    named = [int(n) for turn in turns for n in _NUMBERED.findall(turn["content"])]
    if plain and (named or plain != number):
        raise UserError(f"it has {plain} {REGION_TOKEN} markers for {number} regions", "region_count")
    if plain or not number:
        if named:
            raise UserError(f"it names <region{named[0]}> but has no regions", "region_count")
        return list(range(plain))
    return _place_numbered(turns, named, number)


def _place_numbered(turns: list[dict[str, str]], named: list[int], number: int) -> list[int]:
    """`_place_regions` for markers numbered from 1, and for regions that no marker mentions."""
    if wrong := [n for n in named if not 1 <= n <= number]:
        raise UserError(f"it names <region{wrong[0]}> but has {number} regions", "region_count")
    order: list[int] = []

    def name(match: re.Match[str]) -> str:
        index = int(match[1]) - 1
        if index in order:
            return f"region{index + 1}"
        order.append(index)
        return f"region{index + 1} {REGION_TOKEN}"

    mentioned = {int(n) - 1 for turn in turns if turn["role"] == "user" for n in _NUMBERED.findall(turn["content"])}
    order += [index for index in range(number) if index not in mentioned]
    introduced = ", ".join(f"region{index + 1} {REGION_TOKEN}" for index in order)
    for turn in turns:
        if turn["role"] == "user":
            turn["content"] = _NUMBERED.sub(name, turn["content"])
        else:
            turn["content"] = _NUMBERED.sub(r"region\1", turn["content"])
    if introduced:
        turns[0]["content"] = f"regions in the image: {introduced}.\n{turns[0]['content']}"
    return order
