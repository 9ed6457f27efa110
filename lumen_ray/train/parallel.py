"""Sharding with FSDP, and collectives; `run.checkpoint` reads and writes sharded checkpoints.

Without a process group every function acts as for one rank, so the trainer has one code path.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor

from lumen_ray.decoders.base import ImageDecoder, Learner
from lumen_ray.meta_init import persistent_buffers, put_weights
from lumen_ray.model.build import Generalist
from lumen_ray.run_settings import ranks_per_copy
from lumen_ray.train.blocks import blocks
from lumen_ray.train.precision import block_policy, learn_policy

#: blocks smaller than this stay in the root's group: for a small model one gather a step is cheaper than many
MIN_BLOCK_PARAMETERS = 5_000_000
#: for work of one rank, such as a validation, that the others wait for
LONGEST_WAIT = timedelta(hours=12)


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def barrier() -> None:
    if dist.is_initialized():
        dist.barrier()


def cpu_group(timeout: timedelta | None = None) -> dist.ProcessGroup | None:
    """A group of all ranks over the CPU, for collectives of another thread, or for those that may take up to
    `timeout`; None without a process group. A collective."""
    return dist.new_group(backend="gloo", timeout=timeout) if dist.is_initialized() else None


def from_first_rank(value: Any, group: dist.ProcessGroup | None = None) -> Any:
    """The first rank's value, on all ranks; a collective of `group`, by default the process group."""
    values = [value]
    if dist.is_initialized():
        dist.broadcast_object_list(values, group=group)
    return values[0]


def from_all_ranks(value: Any, group: dist.ProcessGroup | None = None) -> list[Any]:
    """Every rank's value, in rank order, on all ranks; a collective."""
    if not dist.is_initialized():
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value, group=group)
    return values


def raise_together(error: Exception | None, group: dist.ProcessGroup | None = None) -> None:
    """Raises the error of the first rank that has one, on all ranks; a collective."""
    first = next((each for each in from_all_ranks(error, group) if each is not None), None)
    if first is not None:
        raise error or first


def mesh_of_ranks(device: torch.device, group: int = 0) -> DeviceMesh:
    """The ranks as FSDP shards over them; a collective.

    group: ranks that share one copy of the weights, consecutive ones, which Ray Train puts on one node where it can.
    Every further group holds another copy (HSDP). 0, or a number that does not divide the ranks, as after the loss of
    some: all ranks share one, which takes less memory of each.
    """
    ranks = world_size()
    if (sharing := ranks_per_copy(ranks, group)) < ranks:
        return init_device_mesh(device.type, (ranks // sharing, sharing), mesh_dim_names=("replicate", "shard"))
    return init_device_mesh(device.type, (ranks,))


def shard(model: Generalist, device: torch.device, precision: str = "fp32", group: int = 0) -> Generalist:
    """Shards a model in place with FSDP2 (`fully_shard`): large blocks of the encoders and the LLM, every decoder with
    an image backbone, then the root. `group`: as of `mesh_of_ranks`.

    Weights on the meta device stay there. With bf16 a block is gathered and computes in bf16; the root stays fp32, and
    autocast does its arithmetic.

    A decoder with an image backbone is one FSDP group, gathered only in steps that train it, from its forward pass to
    the end of its backward pass. Its blocks are not groups: how often they run (for images of each size, for denoising,
    or not at all) differs from rank to rank, and all ranks must gather and reduce alike.
    """
    if not dist.is_initialized():
        return model
    mesh = mesh_of_ranks(device, group)
    for _, block in (*blocks(model.trunk.vision), *blocks(model.trunk.llm)):
        if sum(p.numel() for p in block.parameters()) >= MIN_BLOCK_PARAMETERS:
            fully_shard(block, mesh=mesh, mp_policy=block_policy(precision))
    for decoder in model.decoders.values():
        if is_expert(cast(Learner, decoder)):
            # places of queries are sums of small offsets: bf16 rounding would move boxes by pixels
            policy = learn_policy(precision if isinstance(decoder, ImageDecoder) else "fp32")
            fully_shard(decoder, mesh=mesh, reshard_after_forward=False, mp_policy=policy)
            register_fsdp_forward_method(decoder, "learn")
    fully_shard(model, mesh=mesh)
    return model


def materialise(model: nn.Module, device: torch.device) -> None:
    """Allocates the weights that are on the meta device on `device`, this rank's shard of them, uninitialised."""
    swaps = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(True)  # keeps the objects, so that tied ones stay tied
    try:
        model._apply(lambda t: torch.empty_like(t, device=device) if t.is_meta else t.to(device))
    finally:
        torch.__future__.set_swap_module_params_on_conversion(swaps)


def fill(model: Generalist, read: Callable[[str], Tensor], device: torch.device) -> None:
    """Puts a model from the meta device, sharded or not, on `device` with the weights that `read` returns by name; a
    collective.

    `read` is called on the first rank only, one name at a time, and each rank gets its shard: no rank holds more than
    its shard of the model and one whole tensor.
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
    """Copies the first rank's `values` into a tensor of all ranks, sharded or not."""
    if values is None:
        values = torch.empty(target.shape, dtype=target.dtype, device=device)
    values = values.to(device, target.dtype).contiguous()
    if isinstance(target, DTensor):
        target.to_local().copy_(distribute_tensor(values, target.device_mesh, target.placements).to_local())
    else:
        dist.broadcast(values, 0)
        target.copy_(values)


def is_expert(decoder: Learner) -> bool:
    """Whether a decoder has an image backbone, or draws pictures, rather than reading dense features: others are too
    small for an FSDP group."""
    return decoder.reads != "dense"


def reduce_gradients(model: nn.Module, reduce: bool) -> None:
    """Sets whether the next backward pass sums gradients over ranks; only that of the last micro-step does."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(reduce)


def sum_over_ranks(values: Tensor) -> Tensor:
    """Elementwise sum of a small tensor over all ranks."""
    if dist.is_initialized():
        dist.all_reduce(values)
    return values


def clip_gradients(parameters: list[nn.Parameter], max_norm: float) -> float:
    """Clips gradients in place to a global norm of `max_norm`; returns the norm before."""
    norm = torch.nn.utils.clip_grad_norm_(parameters, max_norm)
    norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
    return float(norm)


def full_state(model: nn.Module) -> dict[str, Tensor]:
    """The unsharded weights on the CPU; a collective. With several ranks it is empty on all but rank 0."""
    if not dist.is_initialized():
        return {name: value.detach().cpu() for name, value in model.state_dict().items()}
    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    return cast("dict[str, Tensor]", state)  # values of other types are extra states, which no module here has


def any_rank(device: torch.device, here: bool) -> bool:
    """Whether something is so on any rank; a collective on `device`."""
    return bool(sum_over_ranks(torch.tensor(float(here), device=device)) > 0)
