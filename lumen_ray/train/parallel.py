"""Everything about several processes: sharding with FSDP and collectives (`checkpoint` has the files of the shards).

With one process and no process group all functions do the obvious thing, so the loop has one code path.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor

from lumen_ray.decoders.base import ImageDecoder
from lumen_ray.meta_init import persistent_buffers, put_weights
from lumen_ray.model.build import Generalist
from lumen_ray.train.blocks import blocks, part
from lumen_ray.train.precision import block_policy, learn_policy

#: blocks smaller than this stay in the root's group: for a small model one gather a step is cheaper than many
MIN_BLOCK_PARAMETERS = 5_000_000


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def barrier() -> None:
    if dist.is_initialized():
        dist.barrier()


def from_first_rank(value: Any) -> Any:
    """The first rank's value, on all ranks; a collective."""
    values = [value]
    if dist.is_initialized():
        dist.broadcast_object_list(values)
    return values[0]


def from_all_ranks(value: Any) -> list[Any]:
    """Every rank's value, in rank order, on all ranks; a collective."""
    if not dist.is_initialized():
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def shard(model: Generalist, device: torch.device, precision: str = "fp32") -> Generalist:
    """FSDP2 (`fully_shard`) in place: blocks of the encoders and the LLM that are large enough, every expert decoder,
    then the root.

    A model without weights stays without. With bf16 a block is gathered and computes in bf16; the root stays fp32, and
    autocast does its arithmetic.

    An expert is one group, gathered in those steps alone that train it, from its forward pass to the end of its
    backward pass. Its blocks are no groups of their own: how often they run (for pictures of each size, for denoising,
    or not at all) differs from rank to rank, and all ranks must gather and reduce alike.
    """
    if not dist.is_initialized():
        return model
    mesh = init_device_mesh(device.type, (world_size(),))
    for _, block in (found for name in ("vision", "llm") for found in blocks(part(model, name))):
        if sum(p.numel() for p in block.parameters()) >= MIN_BLOCK_PARAMETERS:
            fully_shard(block, mesh=mesh, mp_policy=block_policy(precision))
    for decoder in model.decoders.values():
        if is_expert(decoder):
            # queries' places are sums of small moves: as much as rounds off in bf16 moves boxes by pixels
            policy = learn_policy(precision if isinstance(decoder, ImageDecoder) else "fp32")
            fully_shard(decoder, mesh=mesh, reshard_after_forward=False, mp_policy=policy)
            register_fsdp_forward_method(decoder, "learn")
    fully_shard(model, mesh=mesh)
    return model


def materialise(model: nn.Module, device: torch.device) -> None:
    """Memory on the device for the weights that are on the meta device, this rank's part of them; without values."""
    swaps = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(True)  # in the same objects, so that tied ones stay tied
    try:
        model._apply(lambda t: torch.empty_like(t, device=device) if t.is_meta else t.to(device))
    finally:
        torch.__future__.set_swap_module_params_on_conversion(swaps)


def fill(model: Generalist, read: Callable[[str], Tensor], device: torch.device) -> None:
    """Puts a model built without weights, sharded or not, on the device and gives it those that `read` has; a
    collective.

    `read` is called on the first rank, one name after the other, and each gets its part of what it gives: no rank holds
    more than its part of the model and one whole tensor.
    """
    if not isinstance(model, FSDPModule):
        put_weights(model, read, device)
        return
    names = [name for name, p in model.named_parameters() if p.is_meta]
    materialise(model, device)
    state = model.state_dict()
    for name in (*names, *persistent_buffers(model)):
        _receive(state[name], read(name) if rank() == 0 else None, device)


def _receive(target: Tensor, values: Tensor | None, device: torch.device) -> None:
    """The first rank's `values` into a tensor of all ranks, sharded or not."""
    if values is None:
        values = torch.empty(target.shape, dtype=target.dtype, device=device)
    values = values.to(device, target.dtype).contiguous()
    if isinstance(target, DTensor):
        target.to_local().copy_(distribute_tensor(values, target.device_mesh, target.placements).to_local())
    else:
        dist.broadcast(values, 0)
        target.copy_(values)


def is_expert(decoder: nn.Module) -> bool:
    """Whether a decoder has an image backbone of its own, and with it a group; others are small."""
    return decoder.reads != "dense"


def reduce_gradients(model: nn.Module, reduce: bool) -> None:
    """Whether the next backward pass adds up gradients over ranks; micro-steps but the last keep their own."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(reduce)


def sum_over_ranks(values: Tensor) -> Tensor:
    """Elementwise sum of a small tensor over all ranks."""
    if dist.is_initialized():
        dist.all_reduce(values)
    return values


def clip_gradients(parameters: list[nn.Parameter], max_norm: float) -> float:
    """Clips the global gradient norm in place and returns it as it was before."""
    norm = torch.nn.utils.clip_grad_norm_(parameters, max_norm)
    norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
    return float(norm)


def full_state(model: nn.Module) -> dict[str, Tensor]:
    """The unsharded weights on the CPU; a collective, filled on rank 0 only when there are several ranks."""
    if not dist.is_initialized():
        return {name: value.detach().cpu() for name, value in model.state_dict().items()}
    return get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
