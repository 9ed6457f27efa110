"""A source from keyword arguments, checked as `lumen-ray prepare` checks its command line."""

from __future__ import annotations

from collections.abc import Mapping
from os import PathLike
from typing import TYPE_CHECKING, Any

from lumen_ray.data.sources.registry import SOURCES
from lumen_ray.errors import UserError, suggest, unknown

if TYPE_CHECKING:
    from lumen_ray.data.sources.base import Source

_TYPE_NAMES = {bool: "True or False", int: "a whole number", str: "a text or a path"}


def make_source(name: str, options: Mapping[str, Any]) -> Source:
    """The source `name` with `options`, named as its fields.

    Paths may be text or path objects; an option that takes several values takes one, too. Raises `UserError` for an
    unknown source or option, a required one that is missing, and a value of the wrong type.
    """
    if name not in SOURCES:
        raise unknown("source", name, SOURCES)
    rules = {argument.name: argument.options for argument in SOURCES[name].arguments}
    for option in options:
        if option not in rules:
            raise UserError(
                f"unknown option '{option}' of source '{name}';{suggest(option, rules)} options: {', '.join(rules)}",
                "unknown_option",
            )
    values = {}
    for argument in SOURCES[name].arguments:
        if argument.name in options:
            values[argument.name] = _checked(argument.name, options[argument.name], argument.options)
        elif "default" in argument.options:
            values[argument.name] = argument.options["default"]
        else:
            raise UserError(f"source '{name}' needs '{argument.name}': {argument.help}", "missing_option")
    return SOURCES[name].make(values)


def _checked(option: str, value: Any, rules: Mapping[str, Any]) -> Any:
    """An option's value as the command line would give it: text for paths, a list where several are taken.

    rules: keyword arguments of `argparse.ArgumentParser.add_argument`.
    """
    if value is None and rules.get("default", ...) is None:
        return None
    if rules.get("nargs") == "+":
        several = [value] if isinstance(value, str | PathLike) else value
        rest = {name: rule for name, rule in rules.items() if name not in ("nargs", "default")}
        return [_checked(option, one, rest) for one in several]
    wanted = bool if "action" in rules else rules.get("type", str)
    if wanted is str and isinstance(value, PathLike):
        value = str(value)
    if not isinstance(value, wanted) or (wanted is int and isinstance(value, bool)):
        raise UserError(f"option '{option}' must be {_TYPE_NAMES[wanted]}, got {value!r}", "invalid_option")
    if value not in rules.get("choices", (value,)):
        choices = ", ".join(map(str, rules["choices"]))
        raise UserError(f"option '{option}' must be one of {choices}; got {value!r}", "invalid_option")
    return value
