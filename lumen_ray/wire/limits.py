"""What one request body may ask of the model, checked before any of it is done."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

from lumen_ray.errors import UserError
from lumen_ray.inference.request import Request
from lumen_ray.tasks import TASKS
from lumen_ray.wire.schemas import TaskFields
from lumen_ray.wire.settings import Limits

#: bytes of a name that counts once
LONG_NAME = 256


def check_messages(given: Any, field: str, limits: Limits) -> None:
    """Bounds the number of messages in the value of `field`, before any of them is read. Raises `UserError`."""
    if isinstance(given, list) and len(given) > limits.max_messages:
        raise UserError(
            f"{len(given)} messages in '{field}'; give at most {limits.max_messages}", "too_many_messages", field
        )


def check_lengths(fields: TaskFields, limits: Limits) -> None:
    """Bounds each name and text. Raises `UserError`."""
    names = (given if isinstance(given, str) else given.name for given in fields.classes or ())
    for text in (fields.text or "", *names, *(fields.keypoints or ())):
        if len(text) > limits.max_text_chars:
            raise UserError(
                f"a text of {len(text)} characters is too long; give at most {limits.max_text_chars}", "text_too_long"
            )


def check_amount(requests: Sequence[Request], max_new_tokens: int, limits: Limits) -> None:
    """Bounds what one request body costs the model. Of branches and regions: phrases, for poses every keypoint of every
    phrase, and examples; of tokens: see `cost_of`. Raises `UserError`."""
    if len(requests) > limits.max_requests:
        raise UserError(
            f"{len(requests)} tasks in one request; give at most {limits.max_requests}", "too_many_requests"
        )
    phrases = sum(len(r.phrases) * (1 + len(r.keypoints or ())) for r in requests)
    examples = sum(len(shown.examples) for r in requests for shown in r.examples.values())
    if phrases + examples > limits.max_classes:
        what = "classes, phrases, keypoints and examples" if examples else "classes, phrases and keypoints"
        raise UserError(
            f"{phrases + examples} {what} in one request; give at most {limits.max_classes}",
            "too_many_classes",
        )
    # the model's own answers come back as history, so that one of them may be longer than a question
    before = sum(len(r.system) + sum(len(text) for turn in r.history for text in turn) for r in requests)
    if before > limits.max_history_chars:
        raise UserError(
            f"the system text and earlier turns have {before} characters; give at most {limits.max_history_chars}",
            "text_too_long",
        )
    if (cost := cost_of(requests, max_new_tokens)) > limits.max_request_tokens:
        raise UserError(
            f"the request may cost {cost} tokens, but this server allows {limits.max_request_tokens} "
            "(limits.max_request_tokens): each byte of its classes, keypoints and texts counts, in names of more than "
            f"{LONG_NAME} bytes several times, and max_new_tokens for each answer in text; give fewer or shorter ones, "
            "or send several requests",
            "too_many_tokens",
        )


def cost_of(requests: Iterable[Request], max_new_tokens: int) -> int:
    """The tokens that requests may cost, at most: their classes, phrases, keypoints and questions have at most a token
    for each byte in UTF-8, and an answer in text has `max_new_tokens`. Without earlier turns of conversations.

    The time for a name grows with the square of its length, so a long one counts several times.
    """
    return sum(_prompt_cost(r) + max_new_tokens * TASKS[r.task].is_text for r in requests)


def _prompt_cost(request: Request) -> int:
    """A keypoint is asked for with the name of its class."""
    if not request.phrases:
        return len(request.text.encode())
    phrases = [len(phrase.encode()) for phrase in request.phrases]
    keypoints = [len(name.encode()) for name in request.keypoints or ()]
    names = [*phrases, *(phrase + keypoint for phrase in phrases for keypoint in keypoints)]
    return sum(length * math.ceil(length / LONG_NAME) for length in names)
