"""Requests to the engine, one task about one image each. Label, evaluate and serve build them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Real
from typing import Any

import numpy as np

from lumen_ray.data.images import Picture
from lumen_ray.errors import UserError
from lumen_ray.exemplars import ClassByExample, split_classes
from lumen_ray.inference.sampling import GREEDY, Sampling
from lumen_ray.structures import Boxes, Region, SampleSettings, Size, check_pixels
from lumen_ray.tasks import ROUTING_TOKENS, Needs, check_classes, get_task, split_phrases
from lumen_ray.trunk.tokenizer import SPECIAL_TOKENS

#: What requests are about: an image, the images of a conversation in their order, or nothing but text. Images are
#: uint8 [height, width, 3] RGB, EXIF-rotated, or a `Picture` of one that was decoded at reduced scale.
Image = np.ndarray | Picture
Shown = Image | Sequence[Image] | None


def images_of(shown: Shown) -> tuple[Image, ...]:
    """The images that requests are about, in order; none for text alone."""
    if shown is None:
        return ()
    return (shown,) if isinstance(shown, np.ndarray | Picture) else tuple(shown)


@dataclass(frozen=True)
class Routing:
    """To which decoders the LLM may send a chat.

    `tokens`: the routing tokens that it may write, None for all; `is_required`: its answer is one of them, with nothing
    before it; `is_single`: an answer ends at its first one.
    """

    tokens: tuple[str, ...] | None = None
    is_required: bool = False
    is_single: bool = False


ANY_ROUTE = Routing()


@dataclass(frozen=True)
class Request:
    """One task about one image. Build it with `make_request`, which validates.

    `phrases`: the phrase of each branch, in the order of the answer's predictions (classes, phrases, expression);
    `text`: the question of chat and vqa, else the sentence or expression as given;
    `examples`: the classes among `phrases` that are given by example, by name;
    `keypoints`: names of the keypoints of a pose request; None for the skeleton the model was trained with. `sample`:
    how the pictures of a generate or edit request are drawn. `score_threshold` (0..1) and `max_per_phrase` limit the
    instances of the answer; None for the limits of the call. `history`: earlier (question, answer) pairs of a chat, and
    its `system` text; `sampling`: how the tokens of a text are chosen. `image_turns`: about several images, the
    question (0-based, those of `history` counted) from which on each image behind the first is seen; empty: all from
    the first. `routing`: to which decoders the LLM may send a chat.
    """

    task: str
    phrases: tuple[str, ...] = ()
    text: str = ""
    region: Region | None = None
    examples: Mapping[str, ClassByExample] = field(default_factory=dict)
    keypoints: tuple[str, ...] | None = None
    template: int = 0
    sample: SampleSettings | None = None
    score_threshold: float | None = None
    max_per_phrase: int | None = None
    history: tuple[tuple[str, str], ...] = ()
    system: str = ""
    sampling: Sampling = GREEDY
    image_turns: tuple[int, ...] = ()
    routing: Routing = ANY_ROUTE

    def turns_of(self, images: int) -> tuple[int, ...]:
        """`image_turns` about so many images. Raises `UserError` if they are of another number."""
        if not self.image_turns:
            return (0,) * (images - 1)
        if len(self.image_turns) != max(images - 1, 0):
            raise UserError(
                f"'image_turns' has {len(self.image_turns)} numbers for {images} images; give one for each image "
                "behind the first, or none",
                "invalid_image_turns",
            )
        return self.image_turns


def make_request(
    task: str,
    *,
    classes: Sequence[str | ClassByExample] | ClassByExample | str | None = None,
    text: str | None = None,
    region: Region | None = None,
    keypoints: Sequence[str] | str | None = None,
    template: int = 0,
    sample: SampleSettings | None = None,
    history: Sequence[tuple[str, str]] = (),
    system: str | None = None,
    sampling: Sampling = GREEDY,
    image_turns: Sequence[int] = (),
    routing: Routing = ANY_ROUTE,
) -> Request:
    """A validated `Request`. Raises `UserError` (one sentence, machine-readable reason) if it is invalid.

    The registry's `Task.needs` says which argument a task takes: "classes" `classes`, "region" `region`, "nothing"
    none, all others `text`. A single string stands for a list of one. A class may be given by example
    (`lumen_ray.exemplars.ClassByExample`). `history` (earlier pairs of question and answer), `system` and `routing` go
    with task "chat", `sampling` with tasks that give a text, and `image_turns` with a chat about several images.
    """
    needs = get_task(task).needs
    _check_conversation(task, history, system, sampling)
    _check_image_turns(task, image_turns, len(history))
    _check_routing(task, routing)
    classes = [classes] if isinstance(classes, str | ClassByExample) else classes
    keypoints = [keypoints] if isinstance(keypoints, str) else keypoints
    names, examples = split_classes(classes or ())
    for name in (*names, *(keypoints or ())):
        if not isinstance(name, str):
            raise UserError(f"names of classes and keypoints are texts, got {name!r}", "invalid_classes")
    if region is not None and not isinstance(region, Region):
        raise UserError(
            f"'region' takes a lumen_ray.structures.Region, e.g. Region('box', (height, width), ...), got {region!r}",
            "invalid_region",
        )
    if text is not None and not isinstance(text, str):
        raise UserError(f"'text' must be a text, got {text!r}", "invalid_text")
    for given in (text or "", *names, *(keypoints or ())):
        _refuse_reserved(given or "")
    sample = _checked_sample(task, sample)
    if needs == "classes":
        points = tuple(keypoints) if keypoints else None
        if examples and get_task(task).keypoint_template:
            raise UserError(f"task '{task}' takes classes by name only; give none by example", "invalid_classes")
        found = tuple(check_classes(names, task))
        return Request(task, found, examples=examples, keypoints=points, template=template)
    if needs == "region":
        if region is None:
            raise UserError(f"task '{task}' needs a region (box, point, scribble, polygon or mask)", "missing_region")
        return Request(task, region=region, template=template, sampling=sampling)
    if needs == "nothing":
        return Request(task, template=template, sampling=sampling)
    text = (text or "").strip()
    if not text:
        raise UserError(f"task '{task}' needs a text ({needs}); give one", "empty_text")
    return Request(
        task,
        _phrases(needs, text),
        text,
        template=template,
        sample=sample,
        history=tuple((question, answer) for question, answer in history),
        system=(system or "").strip(),
        sampling=sampling,
        image_turns=tuple(image_turns),
        routing=routing,
    )


def _check_image_turns(task: str, turns: Sequence[int], earlier: int) -> None:
    """Raises `UserError` unless the numbers are those of questions, `earlier` and one more, in order."""
    if turns and not get_task(task).is_conversation:
        raise UserError(f"task '{task}' is no conversation; leave 'image_turns' out", "unexpected_field")
    whole = all(isinstance(turn, int) and not isinstance(turn, bool) and 0 <= turn <= earlier for turn in turns)
    if not whole or list(turns) != sorted(turns):
        raise UserError(
            f"'image_turns' are numbers of questions from 0 to {earlier}, ascending, got {list(turns)}",
            "invalid_image_turns",
        )


def _check_routing(task: str, routing: Routing) -> None:
    if routing != ANY_ROUTE and not get_task(task).is_conversation:
        raise UserError(f"task '{task}' is no conversation; leave 'routing' out", "unexpected_field")
    if unknown := next((token for token in routing.tokens or () if token not in ROUTING_TOKENS), None):
        raise UserError(
            f"'{unknown}' is no routing token; give some of: {', '.join(ROUTING_TOKENS)}", "invalid_routing"
        )


def _check_conversation(task: str, history: Sequence[tuple[str, str]], system: str | None, sampling: Sampling) -> None:
    if not isinstance(sampling, Sampling):
        raise UserError(
            f"'sampling' takes a Sampling, e.g. Sampling(temperature=0.7), got {sampling!r}", "invalid_sampling"
        )
    if sampling != GREEDY and not get_task(task).is_text:
        raise UserError(f"task '{task}' writes no text; leave 'sampling' out", "unexpected_field")
    if not get_task(task).is_conversation:
        if history or system:
            raise UserError(f"task '{task}' is no conversation; leave 'history' and 'system' out", "unexpected_field")
        return
    if isinstance(history, str) or not all(
        isinstance(pair, list | tuple)
        and len(pair) == 2
        and all(isinstance(text, str) and text.strip() for text in pair)
        for pair in history
    ):
        raise UserError("'history' must be pairs of a question and its answer, both texts", "invalid_history")
    if not isinstance(system, str | None):
        raise UserError(f"'system' must be a text, got {system!r}", "invalid_history")
    for question, answer in history:
        _refuse_reserved(question)
        _check_unicode(
            answer
        )  # may hold what is a special token of other models only; the trunk's stage checks its own
    _refuse_reserved(system or "")


def _phrases(needs: Needs, text: str) -> tuple[str, ...]:
    """The phrases of a request with a text: none for a question, those of a sentence, else the text itself."""
    if needs == "question":
        return ()
    if needs != "sentence":
        return (text,)
    phrases = split_phrases(text)
    for phrase in phrases:  # in lower case now, like some special tokens
        _refuse_reserved(phrase)
    return tuple(phrases)


#: (lowest, highest) value of each setting; the decoder checks sizes, which must be multiples of its step
_SAMPLE_LIMITS = {"steps": (1, 1000), "guidance": (0, 100), "image_guidance": (0, 100), "num_images": (1, 16)}


def _checked_sample(task: str, sample: SampleSettings | None) -> SampleSettings | None:
    """The settings of a request for pictures, by default all defaults; None for other tasks."""
    if get_task(task).result != "image":
        if sample is not None:
            raise UserError(f"task '{task}' makes no pictures; leave out the settings for them", "unexpected_field")
        return None
    sample = sample or SampleSettings()
    for name, (low, high) in _SAMPLE_LIMITS.items():
        value = getattr(sample, name)
        if value is not None and not low <= value <= high:
            raise UserError(f"'{name}' must be from {low} to {high}, got {value}", "invalid_sample_settings")
    if not 0 <= sample.seed < 2**63:
        raise UserError(f"'seed' must be from 0 to 2^63 - 1, got {sample.seed}", "invalid_sample_settings")
    return sample


def _check_unicode(text: str) -> None:
    """Raises `UserError` for a text with half of a surrogate pair, which no tokenizer reads."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        broken = text[error.start]
        raise UserError(f"a text may not contain {broken!r}, half of a surrogate pair", "invalid_text") from None


def _refuse_reserved(text: str) -> None:
    """Raises `UserError` for a special token in the caller's text, which would change the layout of the prompt."""
    _check_unicode(text)
    if reserved := next((token for token in SPECIAL_TOKENS if token in text), None):
        raise UserError(f"a text may not contain '{reserved}', which the prompt layout uses", "reserved_text")


def check_requests(size: Size | None, requests: Sequence[Request], images: int = 1) -> None:
    """Raises `UserError` for requests that do not fit an image of (height, width) `size`, text alone (None), or several
    images."""
    for request in requests:
        check_image(request.task, size is not None)
        check_several(request.task, images)
        if size is not None:
            request.turns_of(images)
        if size is not None and request.region is not None:
            _check_region(size, request.region)
        for example in (e for shown in request.examples.values() for e in shown.examples):
            if size is not None and example.image is None:
                example.region(size)


def check_image(task: str, given: bool) -> None:
    """Raises `UserError` if a task that needs an image has none, or one that takes none has one. Free chat works with
    both."""
    if get_task(task).sees_image == given or get_task(task).is_conversation:
        return
    if given:
        raise UserError(f"task '{task}' takes no image, only a text; leave it out", "unexpected_image")
    raise UserError(f"task '{task}' needs an image; give one", "missing_image")


def check_several(task: str, images: int) -> None:
    """Raises `UserError` for several images if the task is about one: those that answer in text about the whole image
    take several."""
    if images > 1 and not (get_task(task).is_text and get_task(task).needs != "region"):
        raise UserError(f"task '{task}' is about one image, got {images}; ask about each by itself", "several_images")


def no_decoder(task: str, serves: Sequence[str]) -> UserError:
    """The error for a task that the model has no decoder for; `serves`: names of the tasks it serves."""
    return UserError(f"the model has no decoder for task '{task}'; it serves: {', '.join(serves)}", "no_decoder")


def _check_region(size: Size, region: Region) -> None:
    """Raises `UserError` for a region drawn on an image of another size."""
    if tuple(region.size) != tuple(size):
        theirs, ours = (f"{width}x{height}" for height, width in (region.size, size))
        raise UserError(
            f"the region is for an image of {theirs} but the image is {ours} pixels; "
            "build the region with the (height, width) of the image",
            "invalid_region",
        )


def _given_images(shown: Any) -> Sequence[Any]:
    """What was given as the image or images of a row. Raises `UserError` for an empty list."""
    if shown is None:
        return ()
    if not isinstance(shown, list | tuple):
        return (shown,)
    if not shown:
        raise UserError("a list of a conversation's images is empty; give None for text alone", "invalid_image")
    return shown


def check_call(images: Any, requests: Any, score_threshold: Any, max_new_tokens: Any = 1) -> None:
    """Raises `UserError` for arguments of `Engine.run` that are not lists of images and of lists of requests, one per
    image, for a threshold outside 0..1 and for answers without a token."""
    stacked = isinstance(images, np.ndarray) and images.ndim == 4
    if (
        not (stacked or isinstance(images, Sequence))
        or not isinstance(requests, Sequence)
        or len(images) != len(requests)
    ):
        raise UserError(
            "give a list of images and, for each image, a list of requests, e.g. engine.run([image], [[request]])",
            "invalid_call",
        )
    for image in (image for shown in images for image in _given_images(shown)):
        pixels = image.pixels if isinstance(image, Picture) else image
        check_pixels(pixels, "an image", "invalid_image")
        if pixels.size == 0:
            raise UserError(f"an image is empty, its shape is {list(pixels.shape)}", "invalid_image")
    for row in requests:
        if not isinstance(row, Sequence) or not all(isinstance(request, Request) for request in row):
            raise UserError(
                "the requests of one image are a list of make_request's results, e.g. engine.run([image], [[request]])",
                "invalid_call",
            )
    if isinstance(max_new_tokens, bool) or not isinstance(max_new_tokens, int) or max_new_tokens < 1:
        raise UserError(f"max_new_tokens must be a whole number from 1, got {max_new_tokens!r}", "invalid_length")
    if not isinstance(score_threshold, Real) or not 0 <= float(score_threshold) <= 1:
        raise UserError(f"score_threshold must be from 0 to 1, got {score_threshold!r}", "invalid_threshold")


@dataclass(frozen=True)
class RegionQuestion:
    """Whether `region` of image `image` (index into the batch) is a `phrase`."""

    image: int
    region: Region
    phrase: str


def box_region(boxes: Boxes, index: int) -> Region:
    """A box as a region: inside the image, and at least a pixel wide and high."""
    height, width = boxes.size
    x1, y1, x2, y2 = boxes.clip().xyxy[index].tolist()
    x1, y1 = max(min(x1, width - 1.0), 0.0), max(min(y1, height - 1.0), 0.0)
    return Region("box", boxes.size, [[x1, y1], [max(x2, x1 + 1), max(y2, y1 + 1)]])
