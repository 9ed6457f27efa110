"""The fields of a request as the engine's requests: which fields a task takes, its limits, its images decoded."""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType

import numpy as np

from lumen_ray.answer import Answer
from lumen_ray.data.images import Picture
from lumen_ray.errors import UserError
from lumen_ray.exemplars import ClassByExample, Example
from lumen_ray.inference.request import ANY_ROUTE, Request, Routing, Shown, check_image, check_requests, make_request
from lumen_ray.inference.sampling import GREEDY, Sampling
from lumen_ray.structures import Region, SampleSettings, Size
from lumen_ray.tasks import Task, get_task
from lumen_ray.wire import schemas
from lumen_ray.wire.images import GivenImage, check_sizes, checked_rle, decode_images, image_bytes, web_address
from lumen_ray.wire.limits import check_amount, check_lengths
from lumen_ray.wire.settings import Defaults, Limits

#: `Task.needs` -> the request fields that the task reads; any other field is refused
_FIELDS = {
    "classes": ("classes",),
    "question": ("text",),
    "sentence": ("text",),
    "expression": ("text",),
    "description": ("text",),
    "instruction": ("text",),
    "region": ("region",),
    "nothing": (),
}


#: settings of the pictures
_SAMPLE_FIELDS = ("seed", "steps", "guidance", "image_guidance", "height", "width", "num_images")
#: how the tokens of a text are chosen
_SAMPLING_FIELDS = ("temperature", "top_p", "top_k", "repetition_penalty", "stop", "seed")
_CHAT_FIELDS = ("history", "system")
_OPTIONAL = ("classes", "text", "region", "keypoints", *_CHAT_FIELDS, *_SAMPLING_FIELDS, *_SAMPLE_FIELDS)


def fields_of(task: Task) -> tuple[str, ...]:
    """Names of the request fields that `task` takes, without the limits of the answer."""
    fields = _FIELDS[task.needs] + (("keypoints",) if task.keypoint_template else ())
    if task.is_conversation:
        fields += _CHAT_FIELDS
    if task.is_text:
        fields += _SAMPLING_FIELDS
    if task.result == "image":
        fields += tuple(name for name in _SAMPLE_FIELDS if name != "image_guidance" or task.sees_image)
    return fields


def parse_request(
    task: str,
    fields: schemas.TaskFields,
    size: Size,
    limits: Limits,
    defaults: Defaults,
    example_images: Mapping[str, np.ndarray] = MappingProxyType({}),
) -> Request:
    """The validated request about an image of `size` (height, width), with its limits. Raises `UserError`.

    `example_images`: those of `decode_examples`.
    """
    taken = fields_of(get_task(task))
    for name in _OPTIONAL:
        if getattr(fields, name) is not None and name not in taken:
            raise UserError(
                f"task '{task}' does not take '{name}'; it takes {_in_words(taken)}", "unexpected_field", name
            )
    check_lengths(fields, limits)
    region = None if fields.region is None else _region(fields.region, size)
    request = make_request(
        task,
        classes=None if fields.classes is None else [_class(given, example_images) for given in fields.classes],
        text=fields.text,
        region=region,
        keypoints=fields.keypoints,
        sample=_sample(fields) if get_task(task).result == "image" else None,
        history=fields.history or (),
        system=fields.system,
        sampling=_sampling(fields) if get_task(task).is_text else GREEDY,
    )
    if request.examples:
        check_requests(size, [request])  # here, where it costs the model nothing
    return replace(
        request,
        score_threshold=defaults.score_threshold if fields.score_threshold is None else fields.score_threshold,
        max_per_phrase=fields.max_per_phrase or defaults.max_per_phrase,
    )


def _class(given: str | schemas.ClassExamples, images: Mapping[str, np.ndarray]) -> str | ClassByExample:
    """A class as of `make_request`. Raises `UserError`, which names it, for examples that do not fit."""
    if isinstance(given, str):
        return given
    try:
        examples = [
            Example(item.box, None if item.image is None else images[item.image], item.positive)
            for item in given.examples
        ]
    except UserError as error:
        raise UserError(f"class '{given.name}': {error}", error.reason) from None
    return ClassByExample(given.name, examples, given.named)


def example_texts(tasks: Sequence[tuple[str, schemas.TaskFields]]) -> dict[str, str]:
    """The images of examples as they are in the request, each once, and where it is there first."""
    found: dict[str, str] = {}
    for number, (_, fields) in enumerate(tasks):
        where = f"requests.{number}." if len(tasks) > 1 else ""
        for n, given in enumerate(fields.classes or ()):
            for m, item in enumerate(() if isinstance(given, str) else given.examples):
                if item.image is not None:
                    found.setdefault(item.image, f"{where}classes.{n}.examples.{m}.image")
    return found


def _checked_examples(tasks: Sequence[tuple[str, schemas.TaskFields]], limits: Limits) -> dict[str, str]:
    examples = example_texts(tasks)
    if len(examples) > limits.max_images:
        raise UserError(
            f"{len(examples)} images of examples in one request; give at most {limits.max_images}", "too_many_images"
        )
    return examples


def decode_examples(asked: Asked, limits: Limits) -> dict[str, np.ndarray]:
    """The images of examples in a request by their texts. Raises `UserError`, also if they and the request's other
    images have more than `limits.max_pixels` together."""
    examples = _checked_examples(asked.tasks, limits)
    beside, encoded = asked.encoded, _encoded(examples, asked.fetched)
    check_sizes([*beside, *encoded], limits.max_pixels, [*asked.all_places, *examples.values()])
    decoded = decode_images(encoded, limits.max_pixels, list(examples.values()))
    return {text: picture.pixels for text, picture in zip(examples, decoded, strict=True)}


def _encoded(examples: Mapping[str, str], fetched: Mapping[str, bytes]) -> list[bytes]:
    """The encoded images of examples. `fetched`: as of `Asked`."""
    return [fetched.get(web_address(text) or "") or image_bytes(text, place) for text, place in examples.items()]


def _decode_all(
    asked: Asked, encoded: Sequence[bytes], limits: Limits, largest_side: int | None
) -> tuple[list[Picture], Mapping[str, np.ndarray]]:
    """The images of a request, of which `encoded` are not held, and by their texts those of its examples, which are
    decoded at full scale: `limits.max_pixels` bounds them together. `largest_side`: as of `decode_images`."""
    examples = _checked_examples(asked.tasks, limits) if asked.examples is None else {}
    if not examples:
        return decode_images(encoded, limits.max_pixels, asked.places, largest_side), asked.examples or {}
    number, places = len(encoded), [*asked.all_places[: len(encoded)], *examples.values()]
    images = decode_images([*encoded, *_encoded(examples, asked.fetched)], limits.max_pixels, places)
    return images[:number], {text: i.pixels for text, i in zip(examples, images[number:], strict=True)}


def _in_words(taken: Sequence[str]) -> str:
    """The fields of a task for an error; those of sampling, which every text has, under one name."""
    if not set(_SAMPLING_FIELDS) <= set(taken):
        return " and ".join(taken)
    others = [name for name in taken if name not in _SAMPLING_FIELDS]
    return f"{' and '.join(others) or 'the image alone'}, and settings of sampling"


def _sampling(fields: schemas.TaskFields) -> Sampling:
    """How the tokens of a text are chosen. Drawn without a seed, every answer is another one."""
    names = ("temperature", "top_p", "top_k", "repetition_penalty")
    given = {name: value for name in names if (value := getattr(fields, name)) is not None}
    seed = secrets.randbits(63) if fields.seed is None else fields.seed
    return Sampling(**given, seed=seed if fields.temperature else 0, stop=tuple(fields.stop or ()))


def _sample(fields: schemas.TaskFields) -> SampleSettings:
    """The settings of a picture; those left out are the decoder's defaults."""
    height, width = fields.height, fields.width
    if (height is None) != (width is None):
        raise UserError("give 'height' and 'width' together, or neither", "invalid_size")
    names = ("seed", "steps", "guidance", "image_guidance", "num_images")
    given = {name: value for name in names if (value := getattr(fields, name)) is not None}
    return SampleSettings(**given, size=None if height is None or width is None else (height, width))


def _region(prompt: schemas.RegionPrompt, size: Size) -> Region:
    if prompt.kind == "mask":
        if prompt.points is not None:
            raise UserError("a mask region takes 'mask', not 'points'", "invalid_region")
        return Region("mask", size, rle=checked_rle(prompt.mask, size))
    if prompt.mask is not None:
        raise UserError(f"a {prompt.kind} region takes 'points', not 'mask'", "invalid_region")
    return Region(prompt.kind, size, points=np.asarray(prompt.points or [], np.float32))


@dataclass(frozen=True)
class Asked:
    """The tasks of a request, as (name, fields), about an image, several, or text alone.

    `image_turns`: as of `Request`; `places`: as of `decode_images`; `copies`: how often a request body has all this
    answered, for its limits; `examples`: the images of examples where they are decoded already, as of
    `decode_examples`; `routing`: of a chat; `top_log_probs`: as of `Sampling`; `text`: of a chat whose answer the
    request has already, the answer, so that the model has no tasks; `fetched`: the encoded images of the `addresses`.
    """

    images: Sequence[GivenImage]
    tasks: Sequence[tuple[str, schemas.TaskFields]]
    image_turns: tuple[int, ...] = ()
    places: Sequence[str] = ()
    copies: int = 1
    examples: Mapping[str, np.ndarray] | None = None
    routing: Routing = ANY_ROUTE
    top_log_probs: int = 0
    text: str | None = None
    fetched: Mapping[str, bytes] = field(default_factory=dict)

    @property
    def encoded(self) -> list[bytes]:
        """The encoded images, without those of examples, once those on the web are `fetched`."""
        return [image if isinstance(image, bytes) else self.fetched[image] for image in self.images]

    @property
    def all_places(self) -> Sequence[str]:
        """The places of all images, without those of examples."""
        return self.places or ["image"] * len(self.images)

    def addresses(self, limits: Limits) -> dict[str, str]:
        """The web addresses of images and examples, and where each is in the request first. Raises `UserError` for too
        many images of examples."""
        examples = _checked_examples(self.tasks, limits) if self.examples is None else {}
        placed = [*zip(self.images, self.all_places, strict=True), *examples.items()]
        found: dict[str, str] = {}
        for image, place in placed:
            if isinstance(image, str) and (address := web_address(image)) is not None:
                found.setdefault(address, place)
        return found

    def completed(self, request: Request) -> Request:
        """The request for one of the tasks, with what all of them share."""
        sampling = replace(request.sampling, top_log_probs=self.top_log_probs)
        return replace(request, image_turns=self.image_turns, routing=self.routing, sampling=sampling)


@dataclass(frozen=True)
class Prepared:
    """What the engine is asked: the `requests` about what is `shown`, whose text answers have `max_new_tokens` at
    most. `size`: (height, width) of the first image as stored, (1, 1) without any. `known`: the answer, if the model is
    not asked."""

    shown: Shown
    requests: tuple[Request, ...]
    max_new_tokens: int
    size: Size
    known: tuple[Answer, ...] = ()


def prepare(
    asked: Asked, limits: Limits, defaults: Defaults, largest_side: int | None = None, held: Size | None = None
) -> Prepared:
    """Decodes the images of a request and checks its tasks. Raises `UserError`.

    `largest_side`: as of `decode_images`; `held`: (height, width) of the request's image where another process holds
    it, so that it is not decoded and nothing is `shown`.
    """
    for task, _ in asked.tasks:
        check_image(task, bool(asked.images) or held is not None)  # refused before the image is decoded
    images, example_images = _decode_all(asked, asked.encoded if held is None else (), limits, largest_side)
    size = held or (images[0].size if images else (1, 1))
    parsed = [parse_request(task, fields, size, limits, defaults, example_images) for task, fields in asked.tasks]
    requests = [asked.completed(request) for request in parsed]
    tokens = [fields.max_new_tokens for _, fields in asked.tasks if fields.max_new_tokens is not None]
    max_new_tokens = max(tokens, default=defaults.max_new_tokens)
    check_amount(requests * asked.copies, max_new_tokens, limits)
    shown: Shown = images if len(images) > 1 else images[0] if images else None
    known = () if asked.text is None else (Answer("chat", size, text=asked.text),)
    return Prepared(shown, tuple(requests), max_new_tokens, size, known)
