"""Parameters of OpenAI's API that are taken at the value that changes nothing, and refused at any other.

Clients write such defaults into every request. A field says so in its annotation::

    top_p: Annotated[float | None, Neutral("decoding is greedy", 1)] = None
"""

from __future__ import annotations

import json
from typing import Any

from pydantic import GetJsonSchemaHandler
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema

from lumen_ray.config import Settings
from lumen_ray.errors import UserError


class Neutral:
    """Metadata of a field that takes null and `values` only. `because`: why, as the beginning of a sentence."""

    def __init__(self, because: str, *values: Any, reason: str = "unsupported_parameter"):
        self.because = because
        self.values = values
        self.reason = reason

    def takes(self, value: Any) -> bool:
        return value is None or value in self.values

    def refusal(self, name: str) -> UserError:
        """The error for another value of the parameter `name`."""
        choices = f" or set it to {_in_words(*self.values)}" if self.values else ""
        return UserError(f"{self.because}; leave '{name}' out{choices}", self.reason, name)

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        values = [None, *self.values]
        return {**handler(schema), "enum": values, "description": f"{_in_words(*values)}: {self.because}"}


def _in_words(*values: Any) -> str:
    *others, last = (json.dumps(value) for value in values)
    return f"{', '.join(others)} or {last}" if others else last


def refuse_others(body: Settings, place: str = "") -> None:
    """Raises `UserError` for the first field that is not neutral. `place`: where `body` is in the request."""
    for name, field in type(body).model_fields.items():
        for rule in field.metadata:
            if isinstance(rule, Neutral) and not rule.takes(getattr(body, name)):
                raise rule.refusal(place + name)
