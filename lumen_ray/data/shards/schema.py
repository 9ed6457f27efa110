"""The Arrow schema of a shard row: one row per image, the same columns for all tasks (DESIGN: Shards).

A conversation about several images is a row of its own: `image` is the first of them, `further_images` the others.
All annotations but those messages are about `image`.

Boxes are `xyxy`, absolute pixels of the EXIF-rotated image, float32. Masks are COCO RLE. Keypoints are flat
``x, y, v`` with v in {0, 1, 2}. All annotations of a row become branches of one training pass.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa

from lumen_ray.errors import UserError
from lumen_ray.tasks import get_task, text_pieces

_RLE = pa.struct([("size", pa.list_(pa.int32())), ("counts", pa.string())])

_INSTANCE = pa.struct(
    [
        ("phrase", pa.string()),  # class name
        ("box", pa.list_(pa.float32(), 4)),  # xyxy
        ("mask", _RLE),  # null if there is none
        ("keypoints", pa.list_(pa.float32())),  # 3 * K flat, names in the manifest's categories; null if there are none
        ("crowd", pa.bool_()),
        ("area", pa.float32()),  # square pixels, as in the file; else of the mask, or of the box
    ]
)

_REGION = pa.struct(
    [
        ("kind", pa.string()),  # box | point | scribble | polygon | mask
        ("points", pa.list_(pa.float32())),  # flat x, y; null for masks
        ("mask", _RLE),
    ]
)

_LINK = pa.struct(
    [
        ("phrase", pa.string()),  # the objects that the answer names
        ("instances", pa.list_(pa.int32())),  # indices into `instances`
    ]
)

_MESSAGE = pa.struct(
    [
        ("task", pa.string()),  # chat | caption | vqa | region_caption | edit
        ("turns", pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))),  # user, assistant, ...
        ("regions", pa.list_(pa.int32())),  # indices into `regions`, one per <region> in the text
        # the question, from 0, from which on each of `further_images` is seen; empty: only `image` is
        ("image_turns", pa.list_(pa.int32())),
    ]
)
#: of files with links
_LINKED_MESSAGE = pa.struct(
    [
        *_MESSAGE,
        ("links", pa.list_(_LINK)),  # one per routing token in the assistant's turns, in order; null: none
    ]
)

_PHRASE = pa.struct(
    [
        ("task", pa.string()),  # ground | refer
        ("phrase", pa.string()),
        ("instances", pa.list_(pa.int32())),  # indices into `instances`; empty: no object in the image matches
    ]
)

_FURTHER_IMAGE = pa.struct([("image", pa.binary()), ("height", pa.int32()), ("width", pa.int32())])

SCHEMA = pa.schema(
    [
        ("image_id", pa.string()),
        ("image", pa.binary()),  # encoded bytes, unchanged; null for text-only samples
        ("height", pa.int32()),
        ("width", pa.int32()),
        ("source", pa.string()),
        ("tasks", pa.list_(pa.string())),  # tasks this row can train
        ("classes", pa.list_(pa.string())),  # classes annotated exhaustively here: those absent are true negatives
        ("instances", pa.list_(_INSTANCE)),
        ("phrases", pa.list_(_PHRASE)),
        ("messages", pa.list_(_MESSAGE)),
        ("regions", pa.list_(_REGION)),
        ("target_image", pa.binary()),  # edit triples
        ("further_images", pa.list_(_FURTHER_IMAGE)),  # encoded bytes, unchanged, and size after EXIF rotation
    ]
)

_MESSAGES = SCHEMA.get_field_index("messages")
#: of files in which a message has links; others are as they were before there were any
LINKED_SCHEMA = SCHEMA.set(_MESSAGES, pa.field("messages", pa.list_(_LINKED_MESSAGE)))

REJECTED_SCHEMA = pa.schema(
    [
        ("kind", pa.string()),  # kind of record as in the manifest's counts: images, annotations, ...
        ("image_id", pa.string()),
        ("origin", pa.string()),  # file and position in it
        ("reason", pa.string()),
        ("rule", pa.string()),  # by which it was rejected, of `sources.rules`
        ("mend", pa.string()),  # how to mend the input
    ]
)


def make_row(image_id: str, image: bytes | None, size: tuple[int, int], source: str, **columns: Any) -> dict[str, Any]:
    """A row with every column; `size` is (height, width) in pixels after EXIF rotation. Raises `ValueError` for unknown
    columns."""
    row: dict[str, Any] = {
        "image_id": image_id,
        "image": image,
        "height": int(size[0]),
        "width": int(size[1]),
        "source": source,
        "tasks": [],
        "classes": [],
        "instances": [],
        "phrases": [],
        "messages": [],
        "regions": [],
        "target_image": None,
        "further_images": [],
    }
    extra = set(columns) - set(row)
    if extra:
        raise ValueError(f"columns {sorted(extra)} are not in the shard schema")
    row.update(columns)
    return row


def make_message(
    task: str,
    prompt: str,
    response: str | None,
    regions: tuple[int, ...] = (),
    image_turns: tuple[int, ...] = (),
) -> dict[str, Any]:
    """A single-turn message; without a `response`, the answer is the row's `target_image`."""
    turns = [{"role": "user", "content": prompt}]
    turns += [] if response is None else [{"role": "assistant", "content": response}]
    return {"task": task, "turns": turns, "regions": list(regions), "image_turns": list(image_turns)}


def with_new_fields(row: dict[str, Any], columns: Sequence[str] | None = None) -> dict[str, Any]:
    """A row as read from a file, with the fields that files written before there were several images lack; `columns`:
    those read, None for all. Changes the row."""
    if columns is None or "further_images" in columns:
        row["further_images"] = row.get("further_images") or []
    for message in row.get("messages") or ():
        message["image_turns"] = message.get("image_turns") or []
    return row


def message_links(message: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The links of a message, none in shards written before there were any. Raises `UserError` (`invalid_links`) unless
    there is one for each routing token in its answers, and all of these may stand in a text."""
    links = message.get("links") or []
    if not links:
        return []
    if not get_task(message["task"]).is_conversation:
        raise UserError(f"a message of task '{message['task']}' has links; only chats may", "invalid_links")
    answers = [turn["content"] for turn in message["turns"] if turn["role"] == "assistant"]
    number = sum(len(text_pieces(answer)) - 1 for answer in answers)
    if number != len(links):
        raise UserError(
            f"the answers {answers!r} have {number} routing tokens but {len(links)} links; give one for each",
            "invalid_links",
        )
    return links


def message_routes(message: Mapping[str, Any]) -> list[str]:
    """The routing token of each link of a message."""
    if not message_links(message):
        return []
    answers = (turn["content"] for turn in message["turns"] if turn["role"] == "assistant")
    return [token for answer in answers for _, token in text_pieces(answer) if token]
