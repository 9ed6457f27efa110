"""Pictures, clips and sounds of a conversation: what is read, and what must not be overlooked.

Data sets name pictures under many keys and mark them in many ways. A record with a picture, clip or sound that is not
read would train answers about something that the model does not see, so it is rejected instead.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from lumen_ray.data.pictures import SUFFIXES
from lumen_ray.data.sources.record_parsing import IMAGE_ID_KEYS, IMAGE_KEYS, ImageRef, Record, image_ref, short
from lumen_ray.errors import UserError

IMAGE_MARKER = "<image>"
TURN_KEYS = ("conversations", "conversation", "messages")
#: words of keys that name a picture, or a clip or sound; and of keys that describe one without naming it
_PICTURE_WORDS = frozenset(
    ["image", "images", "img", "imgs", "photo", "photos", "picture", "pictures", "pic", "pics", "frame", "frames"]
)
_OTHER_WORDS = frozenset(
    ["video", "videos", "audio", "audios", "sound", "sounds", "speech", "clip", "clips", "movie", "music", "voice"]
)
_DESCRIPTIONS = frozenset(
    ["id", "ids", "size", "sizes", "width", "height", "source", "sources", "type", "num", "number", "count", "caption"]
)
_MEDIA_SUFFIXES = (*SUFFIXES, ".heic", ".heif", ".svg", ".tga", ".dib", ".mp4", ".mov", ".avi", ".mkv", ".webm", ".m4v",
                   ".mpg", ".mpeg", ".wav", ".mp3", ".flac", ".ogg", ".m4a", ".aac", ".opus")  # fmt: skip
_WORDS = re.compile(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])|\d+")
_KINDS = "image|img|picture|photo|pic|video|audio|sound|speech|clip|frame|vision"
_MARKERS = re.compile(
    rf"<\s*/?\s*(?:{_KINDS})s?(?:[\s_-]*\d+)?\s*/?\s*>"  # <video>, <image_1>, <img>a.jpg</img>
    rf"|<\s*(?:{_KINDS}|source)\b[^<>]*\bsrc\b[^<>]*>"  # <img src="a.jpg">
    rf"|<\|(?:{_KINDS})[\w-]*\|>|<\|?(?:{_KINDS})_?(?:pad|token|placeholder|here)\|?>|<ImageHere>"
    rf"|\[\s*(?:{_KINDS})s?(?:[\s_-]*\d+)?\s*\]"  # [IMG]
    r"|!\[[^\]]*\]\([^)]*\)",  # ![](a.jpg)
    re.IGNORECASE,
)


def conversation_image(record: Record, listed: list[ImageRef]) -> ImageRef | None:
    """The image of a conversation, under a key of the record or among those `listed` in its turns.

    None for a conversation about text alone. Raises `UserError` (`several_images`, `other_media`) if it has several
    images, or names a picture, clip or sound that is not read.
    """
    found = image_ref(record)
    names = {ref.name for ref in listed}
    if len(names) > 1 or (found is not None and names - {found.name}):
        number = len(names | ({found.name} if found is not None else set()))
        raise UserError(f"the record has {number} images; one image per record is supported", "several_images")
    image = found or next(iter(listed), None)
    for key, value in record.items():
        if key not in (*TURN_KEYS, *IMAGE_KEYS, "id") and _is_media(key, value, has_image=image is not None):
            raise UserError(f"its key '{key}' names a picture, clip or sound that is not read: {short(value)}",
                            "other_media")  # fmt: skip
    return image


def _is_media(key: str, value: Any, has_image: bool) -> bool:
    """Whether a key of a record names a picture, clip or sound. With an image, pictures are taken for that image."""
    if value is None or value in ("", [], {}, False):
        return False
    words = {word.lower() for word in _WORDS.findall(key)}
    if words & _OTHER_WORDS:
        return not words & _DESCRIPTIONS
    if has_image:
        return False
    if key in IMAGE_ID_KEYS or (words & _PICTURE_WORDS and not words & _DESCRIPTIONS):
        return True
    return any(text.lower().endswith(_MEDIA_SUFFIXES) or text.startswith("data:image/") for text in _texts(value))


def _texts(value: Any, depth: int = 3) -> Iterator[str]:
    if isinstance(value, str):
        if len(value.split()) == 1 or "/" in value:  # a name, not a sentence that ends in one
            yield value.strip().split("?")[0]
    elif depth and isinstance(value, list | tuple | dict):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _texts(item, depth - 1)


def check_markers(turns: list[dict[str, str]]) -> None:
    """Raises `UserError` if a question has a marker of a picture, clip or sound other than ``<image>``, or an answer
    has ``<image>``."""
    for number, turn in enumerate(turns):
        if turn["role"] == "assistant":
            if IMAGE_MARKER in turn["content"]:
                raise UserError(f"turn {number}, an answer, has {IMAGE_MARKER}", "marker_in_answer")
            continue
        for match in _MARKERS.finditer(turn["content"]):
            if match[0] != IMAGE_MARKER:
                raise UserError(f"turn {number} has the marker '{match[0][:60]}', which is not read", "other_media")


def read_content(content: Any, number: int) -> tuple[str, list[ImageRef]]:
    """(text, images) of a turn: a text, or parts as OpenAI, Qwen and TRL write them.

    A part is ``{"type": "text", "text": ..}``, ``{"type": "image", "image" or "path": ..}``, which may leave the image
    to the record, or ``{"type": "image_url", "image_url": {"url": ..}}``. Images leave ``<image>`` in the text. Raises
    `UserError` for anything else.
    """
    if isinstance(content, str):
        return content, []
    if not isinstance(content, list) or not content:
        raise UserError(f"turn {number} needs 'from' (human, gpt or system) and a text 'value'", "invalid_turn")
    texts: list[str] = []
    images: list[ImageRef] = []
    for part in content:
        part = {"type": "text", "text": part} if isinstance(part, str) else part
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "text" and isinstance(part.get("text"), str):
            texts.append(part["text"])
        elif kind in ("image", "image_url"):
            value = next((part[key] for key in ("image", "image_url", "path", "url") if part.get(key)), None)
            found = image_ref({"image": value})
            images += [found] if found is not None else []
            texts.append(IMAGE_MARKER)
        else:
            raise UserError(f"turn {number} has a part of type {short(kind)}; types: text, image, image_url",
                            "other_media" if isinstance(kind, str) and kind != "text" else "invalid_turn")  # fmt: skip
    return "\n".join(texts), images
