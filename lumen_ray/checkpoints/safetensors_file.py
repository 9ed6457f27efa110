"""Weights in safetensors' format, written and read tensor by tensor.

`safetensors.torch.save` makes one block of bytes of all of them; its `save_file` does not say by number that a disk is
full, and leaves a nameless temporary file behind when the process is killed. What it reads are views of a mapped file:
copied to where they belong they stay in the process's memory a second time until all are, and kept they are at the
mercy of whoever writes into the file. It does say whether a file is whole.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lumen_ray.errors import UserError

#: the format's name of every type, in the order in which safetensors puts them into a file
DTYPES = {
    torch.uint64: "U64",
    torch.int64: "I64",
    torch.float64: "F64",
    torch.complex64: "C64",
    torch.float32: "F32",
    torch.uint32: "U32",
    torch.int32: "I32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.uint16: "U16",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_TYPES = {name: dtype for dtype, name in DTYPES.items()}
ALIGNMENT = 8  # of the first tensor, in bytes from the start of the file
LENGTH = 8  # bytes that say how long the header is


def write_weights(path: Path, state: Mapping[str, Tensor]) -> None:
    """Writes the bytes that `safetensors.torch.save` gives for `state`: the header's length, the header, the values.

    Tensors may lie on any device, with any strides, and share memory. Needs memory for a copy of one of them at most.
    """
    order = list(DTYPES)
    names = sorted(state, key=lambda name: (order.index(state[name].dtype), name))
    header, end = {}, 0
    for name in names:
        tensor, start = state[name], end
        end += tensor.numel() * tensor.element_size()
        header[name] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    told = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    told += b" " * (-len(told) % ALIGNMENT)
    with path.open("wb") as file:
        file.write(len(told).to_bytes(LENGTH, "little"))
        file.write(told)
        for name in names:
            file.write(state[name].detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())


def sync(path: Path) -> None:
    """Flushes a file's bytes, or the names in a folder, to the disk: a crash of the machine then leaves them there."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


class WeightsFile(Mapping[str, Tensor]):
    """The tensors of a file by name, each read anew, into memory of its own, when it is asked for.

    They are those of the file that was opened, also where another has taken its place since. Raises `UserError` when
    it is damaged.
    """

    def __init__(self, path: Path):
        self.path = path
        try:
            with safe_open(path, framework="pt"):  # which checks the header, and that all tensors are there
                pass
        except SafetensorError as error:
            raise UserError(f"'{path}' is damaged: {str(error).splitlines()[-1].strip()}", "damaged_model") from None
        self._file = path.open("rb")
        length = int.from_bytes(self._file.read(LENGTH), "little")
        self._header = json.loads(self._file.read(length))
        self._header.pop("__metadata__", None)
        self._start = LENGTH + length

    def shapes(self) -> dict[str, Tensor]:
        """All tensors without their values: on the meta device."""
        return {
            name: torch.empty(told["shape"], dtype=_TYPES[told["dtype"]], device="meta")
            for name, told in self._header.items()
        }

    def digest(self) -> str:
        """sha256 of the whole file, in hexadecimal."""
        self._file.seek(0)
        return hashlib.file_digest(self._file, "sha256").hexdigest()

    def __getitem__(self, name: str) -> Tensor:
        told = self._header[name]
        start, end = told["data_offsets"]
        self._file.seek(self._start + start)
        values = torch.empty(end - start, dtype=torch.uint8)
        if self._file.readinto(values.numpy()) != end - start:
            raise UserError(f"'{self.path}' is damaged: it ends in '{name}'", "damaged_model")
        return values.view(_TYPES[told["dtype"]]).reshape(told["shape"])

    def __iter__(self) -> Iterator[str]:
        return iter(self._header)

    def __len__(self) -> int:
        return len(self._header)
