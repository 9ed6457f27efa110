"""The device that a model runs on."""

from __future__ import annotations

import re

from lumen_ray.errors import UserError


def find_device(name: str | None = None) -> str:
    """The device `name` ('cpu', 'cuda' or 'cuda:N'); None: 'cuda' if torch finds a GPU, else 'cpu'.

    Raises `UserError` for any other name and for a GPU that torch does not find.
    """
    import torch

    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name is None:
        return "cuda" if gpus else "cpu"
    if not (found := re.fullmatch(r"cpu|cuda(?::(\d+))?", name)):
        raise UserError(f"unknown device '{name}'; devices: cpu, cuda, cuda:N", "unknown_device")
    if name != "cpu" and int(found[1] or 0) >= gpus:
        have = ", ".join(["cpu", *(["cuda"] if gpus else []), *(f"cuda:{i}" for i in range(gpus))])
        raise UserError(f"device '{name}' is not available: torch finds {gpus} GPUs; devices: {have}", "no_device")
    return name
