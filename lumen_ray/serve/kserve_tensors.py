"""Bodies of the Open Inference Protocol: tensors in JSON, or behind it in its binary extension.

In the extension the header `Inference-Header-Content-Length` says where the JSON ends; the bytes of the tensors that
have `binary_data_size` follow in their order. Each string of a BYTES tensor there stands behind its length in 4 bytes,
little endian. In JSON a BYTES tensor is a list of texts, so that an image is in base64.
"""

from __future__ import annotations

import base64
import json
import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from pydantic import ConfigDict, Field

from lumen_ray.config import Settings
from lumen_ray.errors import UserError
from lumen_ray.wire import schemas

LENGTH_HEADER = "inference-header-content-length"
#: numpy's types of the tensors of numbers in responses
_NUMBERS = {"FP32": "<f4", "INT32": "<i4"}


class TensorParameters(Settings):
    model_config = ConfigDict(extra="ignore", frozen=True, protected_namespaces=())

    binary_data_size: int | None = Field(None, ge=0, description="bytes behind the JSON, if the data is there")


class InputTensor(Settings):
    """A tensor of a request."""

    name: str
    datatype: str = Field(description="BYTES", json_schema_extra={"enum": ["BYTES"]})
    shape: list[int] = Field(description="[n], or [1, n]")
    data: Any = Field(None, description="texts, in a list; null if they are behind the JSON")
    parameters: TensorParameters | None = None


class OutputParameters(Settings):
    model_config = ConfigDict(extra="ignore", frozen=True, protected_namespaces=())

    binary_data: bool | None = Field(None, description="whether the data comes behind the JSON")
    classification: Literal[0] | None = Field(None, description="0 or null: there are no classes to count")
    shared_memory_region: None = Field(None, description="null: there is no shared memory")


class OutputWish(Settings):
    """An output that the response shall have."""

    name: str
    parameters: OutputParameters | None = None


class InferParameters(Settings):
    """Settings of the answer. `priority` and `timeout` are taken without effect."""

    binary_data_output: bool | None = Field(None, description="whether outputs come behind the JSON; see `outputs`")
    score_threshold: schemas.Fraction | None = Field(None, description="lowest score; null for the server's default")
    max_per_phrase: int | None = Field(None, ge=1, le=1000, description="most instances of a class")
    max_new_tokens: int | None = Field(None, ge=1, description="longest text, in tokens")
    temperature: schemas.Temperature | None = Field(None, description="of texts; 0 or null: the most probable tokens")
    seed: int | None = Field(None, ge=0, description="of pictures, and of texts with a temperature")
    priority: int | None = None
    timeout: int | None = None


class KserveRequest(Settings):
    """A request of the Open Inference Protocol."""

    id: str | None = Field(None, description="is in the response too")
    inputs: list[InputTensor] = Field(min_length=1)
    outputs: list[OutputWish] | None = Field(None, description="outputs to give; null or none: all")
    parameters: InferParameters | None = None


@dataclass(frozen=True)
class Texts:
    """The elements of a BYTES tensor. `in_json`: they were texts of JSON, where an image is in base64."""

    values: list[bytes]
    in_json: bool

    def decoded(self, name: str) -> list[str]:
        """As texts. Raises `UserError` if one is not UTF-8."""
        try:
            return [value.decode() for value in self.values]
        except UnicodeDecodeError:
            raise UserError(f"input '{name}' is not UTF-8 text", "invalid_tensor", name) from None


def read_request(body: bytes, json_length: str | None) -> tuple[KserveRequest, dict[str, Texts]]:
    """The request, and its tensors by name. `json_length`: the value of `LENGTH_HEADER`. Raises `UserError`."""
    length = len(body)
    if json_length is not None:
        if not (json_length.isascii() and json_length.isdigit() and int(json_length[:12]) <= len(body)):
            raise UserError(
                f"Inference-Header-Content-Length must be a number up to the body's {len(body)} bytes", "invalid_tensor"
            )
        length = int(json_length[:12])
    request = schemas.parse(KserveRequest, schemas.parse_json(body[:length]))
    rest = body[length:]
    tensors: dict[str, Texts] = {}
    for tensor in request.inputs:
        if tensor.name in tensors:
            raise UserError(f"input '{tensor.name}' is there twice", "invalid_tensor", tensor.name)
        size = tensor.parameters.binary_data_size if tensor.parameters else None
        if size is not None and (size > len(rest) or tensor.data is not None):
            raise UserError(
                f"input '{tensor.name}' has binary_data_size {size}, but {len(rest)} bytes are left behind the JSON; "
                "give its data there alone",
                "invalid_tensor",
                tensor.name,
            )
        values = _texts_of_json(tensor) if size is None else _texts_of_bytes(tensor, rest[:size])
        tensors[tensor.name] = Texts(_checked(tensor, values), size is None)
        rest = rest[size or 0 :]
    if rest:
        raise UserError(
            f"{len(rest)} bytes behind the JSON belong to no input; give binary_data_size", "invalid_tensor"
        )
    return request, tensors


def _checked(tensor: InputTensor, values: list[bytes]) -> list[bytes]:
    """`values`. Raises `UserError` if the tensor is not of texts, or its shape has room for another number of them."""
    if tensor.datatype != "BYTES":
        raise UserError(
            f"the datatype of input '{tensor.name}' must be BYTES: an encoded image, or texts",
            "invalid_tensor",
            tensor.name,
        )
    if min(tensor.shape, default=0) < 0 or len(tensor.shape) > 4 or math.prod(tensor.shape) != len(values):
        raise UserError(
            f"input '{tensor.name}' has {len(values)} elements, which is not what its shape says",
            "invalid_tensor",
            tensor.name,
        )
    return values


def _texts_of_json(tensor: InputTensor) -> list[bytes]:
    values, nested = tensor.data, 0
    while isinstance(values, list) and any(isinstance(value, list) for value in values) and nested < 4:
        values = [item for value in values for item in (value if isinstance(value, list) else [value])]
        nested += 1
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        raise UserError(f"the data of input '{tensor.name}' must be a list of texts", "invalid_tensor", tensor.name)
    return [value.encode("utf-8", "surrogatepass") for value in values]


def _texts_of_bytes(tensor: InputTensor, data: bytes) -> list[bytes]:
    values, at = [], 0
    while at + 4 <= len(data):
        (length,) = struct.unpack_from("<I", data, at)
        values.append(data[at + 4 : at + 4 + length])
        at += 4 + length
    if at != len(data):
        raise UserError(
            f"the bytes of input '{tensor.name}' are no BYTES tensor; put a length of 4 bytes in front of each element",
            "invalid_tensor",
            tensor.name,
        )
    return values


@dataclass(frozen=True)
class OutputTensor:
    """A tensor of a response: an array of numbers; or, with datatype BYTES and one dimension, texts or files, which are
    in base64 in JSON."""

    datatype: str
    values: np.ndarray | Sequence[bytes]
    are_files: bool = False

    @property
    def shape(self) -> list[int]:
        return list(self.values.shape) if isinstance(self.values, np.ndarray) else [len(self.values)]

    def to_bytes(self) -> bytes:
        if isinstance(self.values, np.ndarray):
            return self.values.astype(_NUMBERS[self.datatype]).tobytes()
        return b"".join(struct.pack("<I", len(value)) + value for value in self.values)

    def to_json(self) -> list[Any]:
        if isinstance(self.values, np.ndarray):
            return self.values.ravel().tolist()
        return [(base64.b64encode(value) if self.are_files else value).decode() for value in self.values]


def write_response(
    request: KserveRequest, fields: Mapping[str, Any], tensors: Mapping[str, OutputTensor]
) -> tuple[bytes, int | None]:
    """The body with `fields` and the outputs that the request asks for, and the length of its JSON if tensors follow.

    Raises `UserError` for an output that is not one of `tensors`.
    """
    everywhere = bool(request.parameters and request.parameters.binary_data_output)
    wishes = request.outputs or [OutputWish(name=name) for name in tensors]
    outputs, behind = [], []
    for wish in wishes:
        if wish.name not in tensors:
            raise UserError(f"unknown output '{wish.name}'; outputs: {', '.join(tensors)}", "unknown_output", "outputs")
        tensor = tensors[wish.name]
        output: dict[str, Any] = {"name": wish.name, "datatype": tensor.datatype, "shape": tensor.shape}
        wanted = wish.parameters.binary_data if wish.parameters else None
        if everywhere if wanted is None else wanted:
            behind.append(tensor.to_bytes())
            output["parameters"] = {"binary_data_size": len(behind[-1])}
        else:
            output["data"] = tensor.to_json()
        outputs.append(output)
    head = json.dumps({**fields, "outputs": outputs}).encode()
    return head + b"".join(behind), len(head) if behind else None
