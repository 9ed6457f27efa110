"""bf16 arithmetic over fp32 weights (see `lumen_ray.precision`) under FSDP, and whether a device supports it.

FSDP gathers blocks in bf16, which halves network traffic, and sums gradients over ranks in fp32.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch.distributed.fsdp import MixedPrecisionPolicy

from lumen_ray.errors import UserError


def block_policy(precision: str) -> MixedPrecisionPolicy:
    """How FSDP gathers and reduces a block."""
    if precision == "fp32":
        return MixedPrecisionPolicy()
    return MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)


def learn_policy(precision: str) -> MixedPrecisionPolicy:
    """How FSDP gathers and reduces a decoder whose `Learner.learn` it wraps. Arguments are not cast: targets are in
    pixels."""
    return replace(block_policy(precision), cast_forward_inputs=False)


def check(precision: str, device: torch.device) -> None:
    """Raises `UserError` if the device has no bf16."""
    if precision == "bf16" and device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        name = torch.cuda.get_device_name(device)
        raise UserError(f"{name} has no bf16 arithmetic; set precision: fp32 in the recipe", "no_bf16")


def advice(precision: str, device: torch.device) -> str | None:
    """A warning for users of bf16 on a slow device; None if there is nothing to warn of."""
    if precision == "bf16" and device.type == "cpu" and not torch.cpu._is_amx_tile_supported():
        return "bf16 is 3 to 4 times slower than fp32 on this CPU; set precision: fp32 unless workers have GPUs"
    return None
