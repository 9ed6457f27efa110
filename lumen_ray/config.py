"""Typed settings, read from YAML and validated on construction; an unknown key is an error naming the nearest one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic_core import ErrorDetails

from lumen_ray.errors import UserError, suggest

T = TypeVar("T", bound="Settings")


class Settings(BaseModel):
    """Base of every settings class. Fields are documented by `Field(description=...)`."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


def _with_value(problem: ErrorDetails) -> str:
    return f"{problem['msg']} (got {problem['input']!r})"


def _explain(cls: type[BaseModel], error: ValidationError, origin: str, describe: Callable[[ErrorDetails], str]) -> str:
    """Describes the first problem in one sentence."""
    first = error.errors()[0]
    cause = first.get("ctx", {}).get("error")
    path = ".".join(str(p) for p in first["loc"])
    if first["type"] == "extra_forbidden":
        owner = _owner(cls, first["loc"][:-1])
        fields = sorted(owner.model_fields) if owner else []
        key = str(first["loc"][-1])
        valid = f" valid keys: {', '.join(fields)}" if fields else ""
        return f"{origin}: unknown key '{path}';{suggest(key, fields)}{valid}"
    if first["type"] == "missing":
        return f"{origin}: '{path}' is required"
    if isinstance(cause, UserError):  # raised by a validator of the settings class
        return f"{origin}: {path + ': ' if path else ''}{cause}"
    return f"{origin}: '{path}' is invalid: {describe(first)}"


def _owner(cls: type[BaseModel], path: tuple[Any, ...]) -> type[BaseModel] | None:
    """The settings class of the keys at `path`, by the field annotations; None if there is none."""
    current: Any = cls
    for step in path:
        if isinstance(step, int) or not (isinstance(current, type) and issubclass(current, BaseModel)):
            continue
        field = current.model_fields.get(step)
        current = _settings_in(field.annotation) if field else None
    return current if isinstance(current, type) and issubclass(current, BaseModel) else None


def _settings_in(annotation: Any) -> Any:
    """The first settings class in an annotation such as `list[Stage]` or `Clip | None`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    for arg in getattr(annotation, "__args__", ()):
        if (found := _settings_in(arg)) is not None:
            return found
    return None


def validate(cls: type[T], data: Any, origin: str, describe: Callable[[ErrorDetails], str] = _with_value) -> T:
    """`data` as settings of class `cls`. Raises `UserError`, which names `origin`, if it is not valid.

    `describe` says what is wrong with a value, by default with the value itself.
    """
    if not isinstance(data, dict):
        raise UserError(f"{origin}: expected a mapping of settings, got {type(data).__name__}", "invalid_config")
    try:
        return cls.model_validate(data)
    except ValidationError as error:
        place = ".".join(str(step) for step in error.errors()[0]["loc"])
        raise UserError(_explain(cls, error, origin, describe), "invalid_config", place or None) from None


def load_yaml(path: str | Path, kind: str = "config file") -> dict[str, Any]:
    """The mapping in a YAML file, {} for an empty file. Raises `UserError`, which says what `kind` of file it is, if it
    is unreadable or not a mapping."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{kind} '{path}' does not exist", "missing_config")
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError:
        raise UserError(f"{kind} '{path}' is not UTF-8 text; give a YAML file", "invalid_config") from None
    except OSError as error:
        raise UserError(f"{kind} '{path}' cannot be read: {error.strerror}", "invalid_config") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" at line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        why = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise UserError(f"{kind} '{path}' is not valid YAML{where}: {why}", "invalid_config") from None
    if data is None:
        return {}
    if not isinstance(data, dict):
        raise UserError(
            f"{kind} '{path}' must contain a mapping of settings, not a {type(data).__name__}", "invalid_config"
        )
    return data


def load(cls: type[T], path: str | Path) -> T:
    """Settings of class `cls` from a YAML file."""
    return validate(cls, load_yaml(path), str(path))
