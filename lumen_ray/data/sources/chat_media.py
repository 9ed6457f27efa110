"""Pictures, clips and sounds of a conversation: what is read, and what must not be overlooked.

Data sets name pictures under many keys and mark them in many ways. A record with a picture, clip or sound that is not
read would train answers about something that the model does not see, so it is rejected instead.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

from lumen_ray.data.pictures import SUFFIXES, bare_key
from lumen_ray.data.sources.chat_images import IMAGE_MARKER, Turn
from lumen_ray.data.sources.record_parsing import IMAGE_ID_KEYS, IMAGE_KEYS, ImageRef, Record, image_refs, short
from lumen_ray.errors import UserError

TURN_KEYS = ("conversations", "conversation", "messages")
#: words of keys that name a picture, or a clip or sound; and of keys that describe one without naming it
_PICTURE_WORDS = frozenset(
    [
        "image",
        "images",
        "img",
        "imgs",
        "photo",
        "photos",
        "picture",
        "pictures",
        "pic",
        "pics",
        "frame",
        "frames",
        "pixel",
    ]
    + ["screenshot", "screenshots", "thumbnail", "visual", "visuals", "media", "attachment", "attachments"]
)
_OTHER_WORDS = frozenset(
    ["video", "videos", "audio", "audios", "sound", "sounds", "speech", "clip", "clips", "movie", "music", "voice"]
    + ["youtube"]
)
_DESCRIPTIONS = frozenset(
    ["size", "sizes", "width", "height", "source", "sources", "type", "num", "number", "n", "count", "caption", "has"]
)
_MEDIA_SUFFIXES = (*SUFFIXES, ".heic", ".heif", ".svg", ".tga", ".dib", ".mp4", ".mov", ".avi", ".mkv", ".webm", ".m4v",
                   ".mpg", ".mpeg", ".wav", ".mp3", ".flac", ".ogg", ".m4a", ".aac", ".opus")  # fmt: skip
_BASE64 = re.compile(r"(?:/9j/|iVBOR|R0lGOD|UklGR|data:(?:image|video|audio)/)")  # how encoded pictures begin
_WORDS = re.compile(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])|\d+")
_KINDS = "image|img|picture|photo|pic|video|audio|sound|speech|clip|frame|vision|media|im"
# of a question; an answer may well write html and markdown
_TOKENS = (
    rf"<\s*/?\s*(?:start_of_|end_of_)?(?:{_KINDS})s?(?:[\s_-]*(?:\d+|start|end|patch|pad|token|soft_token|placeholder))*"
    r"\s*/?\s*>"  # <video>, <image_1>, <img>a.jpg</img>, <start_of_image>
    rf"|<\|\s*(?:{_KINDS})[\w-]*\s*\|?>|<(?:{_KINDS})here>"  # <|image_pad|>, <ImageHere>
)
_MARKERS = re.compile(
    _TOKENS + rf"|<\s*(?:{_KINDS}|source)\b[^<>]*\bsrc\b[^<>]*>"  # <img src="a.jpg">
    r"|\[\s*(?:image|img|picture|photo|video|audio)s?(?:[\s_-]*\d+)?\s*(?::[^\]\n]*)?\]"  # [IMG], [img: a.jpg]
    r"|!\[[^\]]*\](?:\([^)]*\)|\[[^\]]*\])",  # ![](a.jpg), ![cat][1]
    re.IGNORECASE,
)
_ANSWER_MARKERS = re.compile(_TOKENS, re.IGNORECASE)
#: keys of a turn or part that say what it is
_TURN_KEYS = frozenset(
    ["from", "role", "value", "content", "type", "text", "name", "weight", "loss", "index", "detail"]
)


def check_keys(record: Record, images: Sequence[ImageRef]) -> None:
    """Raises `UserError` (`other_media`) if a key of a record names a picture, clip or sound that is not among the
    `images` that are read."""
    for key, value in record.items():
        if key not in (*TURN_KEYS, *IMAGE_KEYS, "id", "system") and (why := _unread(key, value, images)):
            raise UserError(f"its key '{key}' {why}: {short(value)}", "other_media")


def _turn_images(entry: Record, number: int) -> list[ImageRef]:
    """The images under keys of a turn or text part. Raises `UserError` (`other_media`) for pictures, clips and sounds
    that are not read."""
    found = image_refs(entry)
    for key, value in entry.items():
        if key not in IMAGE_KEYS and key not in _TURN_KEYS and (why := _unread(key, value, found)):
            raise UserError(f"the key '{key}' of turn {number} {why}: {short(value)}", "other_media")
    return found


def _unread(key: str, value: Any, images: Sequence[ImageRef]) -> str:
    """Why a key of a record hides a picture, clip or sound that is not read; empty if it does not.

    With images, another key may repeat or describe them.
    """
    if value is None or value in ("", [], {}, False, 0):
        return ""
    words = {word.lower() for word in _WORDS.findall(key)}
    if words & _OTHER_WORDS and not words & _DESCRIPTIONS:
        return "names a clip or sound that is not read"
    named = [text for text in _texts(value) if text.lower().endswith(_MEDIA_SUFFIXES) or _BASE64.match(text)]
    if images:
        known = {bare_key(image.name) for image in images}
        others = [text for text in named if bare_key(text) not in known]
        return "names another picture, clip or sound" if others else ""
    by_id = key in IMAGE_ID_KEYS or (words & {"id", "ids"} and words & _PICTURE_WORDS)
    by_word = words & _PICTURE_WORDS and not words & _DESCRIPTIONS and not isinstance(value, int | float)
    return "names a picture, clip or sound that is not read" if named or by_id or by_word else ""


def _texts(value: Any, depth: int = 3) -> Iterator[str]:
    if isinstance(value, str):
        if len(value.split()) == 1 or "/" in value:  # a name, not a sentence that ends in one
            yield value.strip().split("?")[0]
    elif depth and isinstance(value, list | tuple | dict):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _texts(item, depth - 1)


def check_markers(turns: list[dict[str, str]], what: str = "") -> None:
    """Raises `UserError` if a turn has a marker of a picture, clip or sound, other than ``<image>`` in a question.
    `what` names the turn, by default by its number."""
    for number, turn in enumerate(turns):
        answer = turn["role"] == "assistant"
        for match in (_ANSWER_MARKERS if answer else _MARKERS).finditer(turn["content"]):
            shown = f"{what or f'turn {number}'}{', an answer,' if answer else ''} has the marker '{match[0][:60]}'"
            if answer:
                raise UserError(shown, "marker_in_answer")
            if match[0] != IMAGE_MARKER:
                raise UserError(f"{shown}, which is not read", "other_media")


def read_turn(role: str, content: Any, entry: Record, number: int) -> Turn:
    """The turn of an `entry`, number `number` of its record; its `content` is a text, or parts as OpenAI, Qwen and TRL
    write them.

    A part is ``{"type": "text", "text": ..}``, ``{"type": "image", "image" or "path": ..}``, which may leave the image
    to the record, or ``{"type": "image_url", "image_url": {"url": ..}}``. Images leave ``<image>`` in the text. Raises
    `UserError` for anything else.
    """
    turn = Turn(role, content if isinstance(content, str) else "", [], _turn_images(entry, number))
    if isinstance(content, str):
        turn.slots = [None] * content.count(IMAGE_MARKER)
        return turn
    if not isinstance(content, list) or not content:
        raise UserError(f"turn {number} needs 'from' (human, gpt or system) and a text 'value'", "invalid_turn")
    texts: list[str] = []
    for part in content:
        part = {"type": "text", "text": part} if isinstance(part, str) else part
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "text" and isinstance(part.get("text"), str):
            texts.append(part["text"])
            turn.slots += [None] * part["text"].count(IMAGE_MARKER)
            turn.beside += _turn_images(part, number)
        elif kind in ("image", "image_url"):
            turn.slots.append(_part_image(part, number))
            texts.append(IMAGE_MARKER)
        else:
            raise UserError(f"turn {number} has a part of type {short(kind)}; types: text, image, image_url",
                            "other_media" if isinstance(kind, str) and kind != "text" else "invalid_turn")  # fmt: skip
    turn.text = "\n".join(texts)
    return turn


def _part_image(part: Record, number: int) -> ImageRef | None:
    """The image of a part; None if the part leaves it to the record."""
    values = {key: part[key] for key in ("image", "image_url", "path", "url", "source") if part.get(key)}
    source = values.get("source")
    if isinstance(source, dict):  # {"type": "base64", "media_type": .., "data": ..}, or {"type": "url", "url": ..}
        values["source"] = {"bytes": source.get("data"), "url": source.get("url")}
    refs = [ref for value in values.values() for ref in image_refs({"image": value})]
    if any(other != refs[0] for other in refs):
        raise UserError(f"an image of turn {number} names {len(refs)} images", "image_order")
    for key, value in part.items():
        if key not in values and key not in _TURN_KEYS and (why := _unread(key, value, ())):
            raise UserError(f"the key '{key}' of an image in turn {number} {why}: {short(value)}", "other_media")
    return refs[0] if refs else None
