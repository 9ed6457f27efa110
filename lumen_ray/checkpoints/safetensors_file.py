"""Reads and writes weights in the safetensors format, tensor by tensor.

The library is used only to validate files: `safetensors.torch.save` serialises the whole state in memory; `save_file`
reports a full disk without an errno and leaves a temporary file behind if the process is killed; and reading returns
views of a memory-mapped file, which double memory use while they are copied and change if the file is overwritten.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lumen_ray.errors import UserError

#: the format's dtype names, in the order in which safetensors sorts tensors in a file
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
ALIGNMENT = 8  # bytes, of the first tensor from the start of the file
LENGTH = 8  # bytes of the field that holds the header's length


def write_weights(path: Path, state: Mapping[str, Tensor]) -> None:
    """Writes the same bytes as `safetensors.torch.save` gives for `state`: header length, header, values.

    Tensors may be on any device, non-contiguous, and share memory. Needs memory for a copy of one tensor at most.
    """
    order = list(DTYPES)
    names = sorted(state, key=lambda name: (order.index(state[name].dtype), name))
    header, end = {}, 0
    for name in names:
        tensor, start = state[name], end
        end += tensor.numel() * tensor.element_size()
        header[name] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    encoded = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % ALIGNMENT)
    with path.open("wb") as file:
        file.write(len(encoded).to_bytes(LENGTH, "little"))
        file.write(encoded)
        for name in names:
            file.write(state[name].detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)


def sync(path: Path) -> None:
    """Flushes a file's contents, or a folder's entries, to disk, so that they survive a crash of the machine."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


class WeightsFile(Mapping[str, Tensor]):
    """The tensors of a safetensors file by name; each access reads the tensor into fresh memory.

    Reads the file that was opened even if it has since been replaced on disk. `tied`: {name: name of the tensor that it
    is}, for tensors that are stored once; a file that holds both is read as it is. Raises `UserError` if it is damaged.
    """

    def __init__(self, path: Path, tied: Mapping[str, str] = MappingProxyType({})):
        self.path = path
        try:
            with safe_open(path, framework="pt"):  # validates the header and the file's length
                pass
        except SafetensorError as error:
            raise UserError(f"'{path}' is damaged: {str(error).splitlines()[-1].strip()}", "damaged_model") from None
        self._file = path.open("rb")
        length = int.from_bytes(self._file.read(LENGTH), "little")
        self._header = json.loads(self._file.read(length))
        self._header.pop("__metadata__", None)
        for name, source in tied.items():
            if source in self._header:
                self._header.setdefault(name, self._header[source])
        self._start = LENGTH + length

    def shapes(self) -> dict[str, Tensor]:
        """All tensors on the meta device, without values."""
        return {
            name: torch.empty(entry["shape"], dtype=_TYPES[entry["dtype"]], device="meta")
            for name, entry in self._header.items()
        }

    def digest(self) -> str:
        """sha256 of the whole file, in hexadecimal."""
        self._file.seek(0)
        return hashlib.file_digest(self._file, "sha256").hexdigest()

    def __getitem__(self, name: str) -> Tensor:
        entry = self._header[name]
        start, end = entry["data_offsets"]
        self._file.seek(self._start + start)
        values = torch.empty(end - start, dtype=torch.uint8)
        if self._file.readinto(values.numpy().data) != end - start:
            raise UserError(f"'{self.path}' is damaged: it ends inside '{name}'", "damaged_model")
        return values.view(_TYPES[entry["dtype"]]).reshape(entry["shape"])

    def __iter__(self) -> Iterator[str]:
        return iter(self._header)

    def __len__(self) -> int:
        return len(self._header)
