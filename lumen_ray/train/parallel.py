"""Everything about several processes: sharding with FSDP and collectives (`checkpoint` has the files of the shards).

With one process and no process group all functions do the obvious thing, so the loop has one code path.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

#: blocks smaller than this stay in the root's group: for a small model one gather a step is cheaper than many
MIN_BLOCK_PARAMETERS = 5_000_000


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def barrier() -> None:
    if dist.is_initialized():
        dist.barrier()


def shard(model: nn.Module, device: torch.device) -> nn.Module:
    """FSDP2 (`fully_shard`) in place: transformer blocks that are large enough, then the root. fp32 throughout."""
    if not dist.is_initialized():
        return model
    mesh = init_device_mesh(device.type, (world_size(),))
    for block_list in (m for m in model.modules() if isinstance(m, nn.ModuleList)):
        for block in block_list:
            if sum(p.numel() for p in block.parameters()) >= MIN_BLOCK_PARAMETERS:
                fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


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
