"""Bodies of the task API. The descriptions are the API's documentation (`/docs`, `/openapi.json`)."""

from __future__ import annotations

import json
import math
import re
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field
from pydantic_core import ErrorDetails, PydanticCustomError

from lumen_ray.config import Settings, validate
from lumen_ray.errors import UserError
from lumen_ray.exemplars import MOST_EXAMPLES
from lumen_ray.structures import REGION_KINDS
from lumen_ray.tasks import Needs, in_words
from lumen_ray.wire.images import IMAGE_URL
from lumen_ray.wire.settings import MAX_NEW_TOKENS

_FRAME = "pixels of the image after EXIF rotation, x to the right, y down, origin at the top left corner"
T = TypeVar("T", bound=Settings)
Fraction = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
Temperature = Annotated[float, Field(ge=0, le=2, allow_inf_nan=False)]
Penalty = Annotated[float, Field(ge=0.01, le=10, allow_inf_nan=False)]


def _needing(what: Needs) -> str:
    return in_words(lambda task: task.needs == what)


_TEXTS = in_words(lambda task: task.is_text)
_POSES = in_words(lambda task: task.result == "keypoints")
_PICTURES = in_words(lambda task: task.result == "image")


class RegionPrompt(Settings):
    """The place in the image that a prompt refers to."""

    kind: str = Field(
        description="box, point, scribble, polygon or mask", json_schema_extra={"enum": list(REGION_KINDS)}
    )
    points: list[tuple[float, float]] | None = Field(
        None,
        description=f"[[x, y], ...] in {_FRAME}. box: its top left and bottom right corner; point: one; "
        "scribble and polygon: the vertices",
    )
    mask: dict[str, Any] | None = Field(
        None,
        description="kind mask only: COCO run lengths {'size': [height, width], 'counts': string or list of int}",
    )


_IMAGE_TEXT = f"the encoded image (JPEG, PNG, WebP): {IMAGE_URL}"


class ExampleBox(Settings):
    """A box around an object of a class, or around one that is not meant."""

    box: list[float] = Field(min_length=4, max_length=4, description=f"x1, y1, x2, y2 in {_FRAME}")
    positive: bool = Field(True, description="false: an object that is not meant")
    image: str | None = Field(
        None, description=f"the image that the box is on, null for the request's own: {_IMAGE_TEXT}"
    )


class ClassExamples(Settings):
    """A class given by boxes."""

    name: str = Field(description="what its objects are called in the answer")
    named: bool = Field(True, description="false: the model does not read the name, only the boxes")
    examples: list[ExampleBox] = Field(
        description=f"1 to {MOST_EXAMPLES} boxes, at least one of them positive, for models that were trained with some"
    )


def _name_or_examples(value: Any) -> Any:
    """Validates an object as `ClassExamples`, so that errors are about its fields and not about both kinds."""
    if isinstance(value, dict):
        return ClassExamples.model_validate(value)
    if not isinstance(value, str | ClassExamples):
        raise PydanticCustomError("class_type", "it must be a name or an object with name and examples")
    return value


class TaskFields(Settings):
    """The fields of a request, for all tasks."""

    classes: list[Annotated[str | ClassExamples, BeforeValidator(_name_or_examples)]] | None = Field(
        None,
        description=f"class names, or objects that give a class by boxes around examples of it (not for {_POSES}); "
        f"{_needing('classes')} need them",
    )
    text: str | None = Field(
        None,
        description=f"the question ({_needing('question')}), the sentence whose phrases are to be located "
        f"({_needing('sentence')}), the expression that describes one object ({_needing('expression')}), the picture "
        f"to make ({_needing('description')}) or what to change in it ({_needing('instruction')})",
    )
    region: RegionPrompt | None = Field(None, description=f"the place that {_needing('region')} refer to")
    keypoints: list[str] | None = Field(
        None, description=f"names of the keypoints that {_POSES} locates; null for those the model was trained with"
    )
    score_threshold: Fraction | None = Field(
        None,
        description="lowest score of an instance, 0..1; null for the server's default",
    )
    max_per_phrase: int | None = Field(
        None,
        ge=1,
        le=1000,
        description="most instances of one class or phrase, best first; null for the server's default",
    )
    max_new_tokens: int | None = Field(
        None, ge=1, le=MAX_NEW_TOKENS, description="longest text answer, in tokens of the model"
    )
    history: list[tuple[str, str]] | None = Field(
        None,
        description="chat: the earlier questions of the conversation with their answers, [[question, answer], ...]",
    )
    system: str | None = Field(None, description="chat: the system text, before the first question")
    temperature: Temperature | None = Field(
        None,
        description=f"{_TEXTS}: above 0, tokens are drawn at this temperature; 0 or null takes the most probable ones",
    )
    top_p: Fraction | None = Field(
        None,
        description=f"{_TEXTS}: draw from the most probable tokens that together have this probability; null is 1",
    )
    top_k: int | None = Field(
        None, ge=0, le=2**31, description=f"{_TEXTS}: draw from so many tokens at most; null or 0: all"
    )
    repetition_penalty: Penalty | None = Field(
        None,
        description=f"{_TEXTS}: above 1, tokens of the prompt and the answer become less probable; null is 1",
    )
    stop: list[str] | None = Field(None, description=f"{_TEXTS}: up to 16 texts that end the answer, not part of it")
    seed: int | None = Field(
        None,
        ge=0,
        description=f"{_PICTURES}: each seed gives another picture; null is 0. {_TEXTS}: of the tokens drawn; null: "
        "another one for each request",
    )
    steps: int | None = Field(None, ge=1, le=200, description=f"{_PICTURES}: denoising steps; null is 30")
    guidance: float | None = Field(
        None, ge=0, le=100, description=f"{_PICTURES}: how strictly the text is followed; null: the model's own"
    )
    image_guidance: float | None = Field(
        None,
        ge=0,
        le=100,
        description=f"{_needing('instruction')}: how much of the image is kept; null: the model's own",
    )
    height: int | None = Field(None, ge=8, le=4096, description="of the picture made, with `width`; null: the model's")
    width: int | None = Field(None, ge=8, le=4096, description="of the picture made, with `height`")
    num_images: int | None = Field(None, ge=1, le=16, description=f"{_PICTURES}: pictures to make; null is 1")


_IMAGE_ID = Field(
    None,
    pattern=r"^[0-9a-f]{32}$",
    description="in place of the image, its id from an earlier response; 410 if it is not held any more",
)


class TaskRequest(TaskFields):
    """One task, about one image unless it generates one."""

    image: str | None = Field(None, description=f"{_IMAGE_TEXT}; chat can do without")
    image_id: str | None = _IMAGE_ID


class NamedTask(TaskFields):
    """One entry of an `/v1/infer` request."""

    task: str = Field(description="name of a task, see GET /v1/tasks")


class InferRequest(Settings):
    """Several tasks about one image, or about each of several, answered in one pass of the trunk for each image."""

    image: str | None = Field(None, description=f"{_IMAGE_TEXT}; null with `images` or `image_id`")
    images: list[str] | None = Field(
        None, min_length=1, description="instead of `image`: images in the same forms, each of which gets all tasks"
    )
    image_id: str | None = _IMAGE_ID
    requests: list[NamedTask] = Field(min_length=1, description="the tasks, answered in this order")


class Mask(BaseModel):
    size: tuple[int, int] = Field(description="(height, width) in pixels of the image")
    counts: str = Field(description="COCO's compressed run lengths, column-major, the first run is background")


class Instance(BaseModel):
    """One object."""

    phrase: str = Field(description="the class, phrase or expression that it matches")
    score: float = Field(description="confidence, 0..1")
    box: tuple[float, float, float, float] = Field(description=f"x1, y1, x2, y2 in {_FRAME}; the far edge is exclusive")
    mask: Mask | None = Field(None, description=f"its pixels; {in_words(lambda task: task.result == 'masks')} only")
    keypoints: dict[str, tuple[float, float, float]] | None = Field(
        None, description=f"name -> x, y (in {_FRAME}) and score 0..1; {_POSES} only"
    )


class AnswerPart(BaseModel):
    """A piece of an answer that is text with instances in it."""

    type: Literal["text", "instances"]
    text: str | None = Field(None, description="of a piece of text")
    task: str | None = Field(None, description="of instances: the task, as if it had been asked for the phrase")
    phrase: str | None = Field(None, description="of instances: the noun phrase that ends the text before them")
    instances: list[Instance] | None = Field(None, description="objects, best first")


_SIZE = "of the image after EXIF rotation, in pixels; without one, of the pictures made or the model's input"


class TaskAnswer(BaseModel):
    """The answer to one task."""

    task: str
    height: int = Field(description=_SIZE)
    width: int = Field(description=_SIZE)
    size: tuple[int, int] = Field(description=f"(height, width) {_SIZE}")
    frame: Literal["exif_rotated"] = Field(
        "exif_rotated",
        description=f"the frame of all coordinates: {_FRAME}; boxes are xyxy",
    )
    image: int | None = Field(None, description="number of the image in `images` of the request, from 0")
    text: str | None = Field(None, description=f"the written answer of {in_words(lambda task: task.is_text)}")
    route: str | None = Field(
        None, description="routing token that sent the prompt to a decoder, the first of several; absent for text"
    )
    phrases: list[str] | None = Field(
        None, description="the phrases of the request, or of the parts in their order; absent for text"
    )
    instances: list[Instance] | None = Field(None, description="objects, per phrase best first; absent for text")
    parts: list[AnswerPart] | None = Field(
        None,
        description="chat with instances in the text: texts and instances in the order of writing; `text` is the texts "
        "joined, `instances` those of all parts",
    )
    counts: dict[str, int] | None = Field(None, description="count only: phrase -> number of objects")
    images: list[str] | None = Field(None, description=f"{_PICTURES} only: the pictures, PNG in base64")


class TaskResponse(TaskAnswer):
    model_config = ConfigDict(protected_namespaces=())

    model: str = Field(description="preset@version of the weights that answered")
    timing_ms: dict[str, float] = Field(
        description="milliseconds: fetch (of images on the web, if any), decode, model (queueing included), total"
    )
    image_id: str | None = Field(None, description="names the image in further requests, while the server holds it")


class InferResponse(BaseModel):
    """Answers in the order of the requests; of several images first those about the first one."""

    model_config = ConfigDict(protected_namespaces=())

    answers: list[TaskAnswer]
    model: str = Field(description="preset@version of the weights that answered")
    timing_ms: dict[str, float] = Field(
        description="milliseconds: fetch (of images on the web, if any), decode, model (queueing included), total"
    )
    image_id: str | None = Field(None, description="names the image in further requests, while the server holds it")


class ErrorBody(BaseModel):
    """With the fields of OpenAI's errors."""

    message: str = Field(description="one sentence that says what to change")
    type: Literal["invalid_request_error", "server_error"] = Field(description="whether the request is wrong")
    param: str | None = Field(description="the field that is wrong, if it is a certain one")
    code: str = Field(description="the same as reason")
    reason: str = Field(description="machine-readable, e.g. unknown_task")
    request_id: str = Field(description="also in the X-Request-ID header; names the request in the server's log")


class ErrorResponse(BaseModel):
    error: ErrorBody


#: the escape of a surrogate, which JSON has in pairs for characters such as emoji
_MAYBE_HALF_A_PAIR = re.compile(r"\\u[dD][89a-fA-F]")


def _finite(text: str) -> float:
    """The value of a number in JSON, or in Python's additions to it."""
    if math.isfinite(value := float(text)):
        return value
    raise UserError(f"the request body has the number {text[:20]}; give a finite one", "invalid_json")


def parse_json(body: bytes) -> dict[str, Any]:
    """The JSON object in a request body, of finite numbers and texts that UTF-8 can hold; raises `UserError` for
    anything else."""
    try:
        text = body.decode(json.detect_encoding(body))
        data = json.loads(text, parse_constant=_finite, parse_float=_finite)
        if _MAYBE_HALF_A_PAIR.search(text):
            json.dumps(data, ensure_ascii=False).encode()
    except UserError:
        raise
    except UnicodeEncodeError:
        raise UserError("a text of the request body has half a surrogate pair; leave it out", "invalid_json") from None
    except (ValueError, RecursionError) as error:
        cause = str(error) if isinstance(error, json.JSONDecodeError) else "it is not UTF-8 text, or nested too deeply"
        raise UserError(f"the request body is not valid JSON: {cause}", "invalid_json") from None
    if not isinstance(data, dict):
        raise UserError("the request body must be a JSON object like {'image': ...}", "invalid_json")
    return data


#: pydantic's type of a problem -> the kind of value that the field takes
_EXPECTED = {
    "string_type": "a text",
    "bool_type": "true or false",
    "int_type": "an integer",
    "float_type": "a number",
    "list_type": "a list",
    "tuple_type": "a list",
    "dict_type": "an object",
    "model_type": "an object",
    "class_type": "a name or an object with its name and examples",
}
#: kinds of values in JSON and in forms; a bool is an int to Python
_KINDS = ((bool, "true or false"), (int | float, "a number"), (str, "a text"), (list, "a list"), (dict, "an object"))
#: longest text that an error repeats
_SHOWN_CHARS = 20


def _kind(value: Any) -> str:
    if value is None:
        return "null"
    return next((kind for of, kind in _KINDS if isinstance(value, of)), "a file")


def _shown(value: Any) -> str:
    """A number, a flag or a short text itself, the kind of any other value, which may hold an image."""
    if isinstance(value, str):
        return repr(value) if len(value) <= _SHOWN_CHARS else f"a text of {len(value)} characters"
    return json.dumps(value) if isinstance(value, int | float) else _kind(value)


def _describe(problem: ErrorDetails) -> str:
    """What is wrong with a value, without images and other long values."""
    value = problem["input"]
    if expected := _EXPECTED.get(problem["type"]):
        return f"it must be {expected}, not {_kind(value)}"
    if problem["type"] == "literal_error":
        return f"it must be {problem['ctx']['expected']}, not {_shown(value)}"
    return f"{problem['msg']} (got {_shown(value)})"


def parse(model: type[T], data: dict[str, Any]) -> T:
    """Parses `data` as `model`; raises a one-sentence `UserError` that names the field without echoing images."""
    try:
        return validate(model, data, "request", _describe)
    except UserError as error:
        raise UserError(str(error), "invalid_request", error.field) from None
