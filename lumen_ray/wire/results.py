"""The results of tools as JSON: their schemas, and whether another schema is the same."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, Field

from lumen_ray.answer import Answer
from lumen_ray.errors import UserError, unknown
from lumen_ray.tasks import TASKS


class Found(BaseModel):
    """An object."""

    phrase: str = Field(description="the class or phrase that it matches")
    score: float = Field(description="confidence, 0..1")
    box: list[float] = Field(description="x1, y1, x2, y2 in pixels of the image after EXIF rotation")


class RunLengths(BaseModel):
    """A mask as COCO's compressed run lengths."""

    size: list[int] = Field(description="height, width")
    counts: str


class Outlined(Found):
    """An object with its mask."""

    mask: RunLengths


class Posed(Found):
    """An object with its keypoints."""

    keypoints: dict[str, list[float]] = Field(description="name -> x, y, score; empty for a class without a skeleton")


class Boxes(BaseModel):
    instances: list[Found]


class Masks(BaseModel):
    instances: list[Outlined]


class Poses(BaseModel):
    instances: list[Posed]


class Counts(BaseModel):
    counts: dict[str, int] = Field(description="phrase -> number of objects")


class Pictures(BaseModel):
    images: list[str] = Field(description="PNG in base64")


_RESULTS: dict[str, type[BaseModel]] = {
    "boxes": Boxes,
    "masks": Masks,
    "keypoints": Poses,
    "count": Counts,
    "image": Pictures,
}


def result_schema(tool: str) -> dict[str, Any]:
    """The JSON schema of a tool's result, without references."""
    schema = _RESULTS[TASKS[tool].result].model_json_schema()
    plain: dict[str, Any] = _inlined(schema, schema.get("$defs", {}))
    return plain


def result_of(tool: str, answer: Answer) -> dict[str, Any]:
    """The result of a tool from an answer by its decoder."""
    if (kind := TASKS[tool].result) == "count":
        return {"counts": answer.counts}
    whole = answer.to_dict()
    if kind == "image":
        return {"images": whole["images"]}
    instances = whole.get("instances", [])
    if kind == "keypoints":
        instances = [{**instance, "keypoints": instance.get("keypoints", {})} for instance in instances]
    return {"instances": instances}


def tool_of_schema(name: str, schema: Any, tools: tuple[str, ...], place: str) -> str:
    """The tool whose result a schema of that name describes. Raises `UserError`, which names the `place` of both, if
    there is none: no other schema can be honoured, as the LLM writes text and the decoders have one form of result."""
    if (tool := name.lower()) not in tools:
        error = unknown("result", name, tools)
        raise UserError(f"'{place}.name': {error}", "unsupported_parameter", f"{place}.name")
    definitions = schema.get("$defs") if isinstance(schema, dict) else None
    if not _is_same(schema, result_schema(tool), definitions if isinstance(definitions, dict) else {}):
        raise UserError(
            f"'{place}.schema' is not that of the result of '{tool}', which is the only one that it can have; take it "
            "from GET /v1/tools",
            "unsupported_parameter",
            f"{place}.schema",
        )
    return tool


def _inlined(schema: Any, definitions: dict[str, Any]) -> Any:
    """One of our schemas without references."""
    if isinstance(schema, list):
        return [_inlined(item, definitions) for item in schema]
    if not isinstance(schema, dict):
        return schema
    schema = _resolved(schema, definitions)
    return {key: _inlined(value, definitions) for key, value in schema.items() if key != "$defs"}


def _resolved(schema: Any, definitions: dict[str, Any]) -> Any:
    """What a reference names, or of a few that name each other the last; any other schema itself."""
    for _ in range(4):
        name = schema.get("$ref") if isinstance(schema, dict) else None
        if not isinstance(name, str):
            break
        schema = definitions.get(name.removeprefix("#/$defs/"))
    return schema


def _is_same(given: Any, ours: Any, definitions: dict[str, Any]) -> bool:
    """Whether a schema, whose references are to `definitions`, describes the values of one of ours. As deep as ours."""
    given = _resolved(given, definitions)
    if not isinstance(given, dict) or not isinstance(ours, dict):
        return bool(given == ours)
    given, ours = _bare(given), _bare(ours)
    return given.keys() == ours.keys() and all(_is_same(given[key], ours[key], definitions) for key in ours)


def _bare(schema: dict[str, Any]) -> dict[str, Any]:
    """A schema without what differs between two of the same values: titles, descriptions, the order of what is
    required, and whether more is allowed than the result has."""
    kept = {
        key: value
        for key, value in schema.items()
        if not (key in ("title", "description") and isinstance(value, str))
        and not (key == "additionalProperties" and isinstance(value, bool))
        and key != "$defs"
    }
    if isinstance(required := kept.get("required"), list):
        kept["required"] = sorted(map(str, required))
    return kept
