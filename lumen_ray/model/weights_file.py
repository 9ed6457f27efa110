"""Writing weights in safetensors' format, tensor by tensor.

`safetensors.torch.save` makes one block of bytes of all of them; its `save_file` does not say by number that a disk is
full, and leaves a nameless temporary file behind when the process is killed. Reading is left to the library.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

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
ALIGNMENT = 8  # of the first tensor, in bytes from the start of the file


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
        file.write(len(told).to_bytes(8, "little"))
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
