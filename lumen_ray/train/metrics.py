"""What a run says about itself: one JSON line per step, the same scalars for TensorBoard."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import torch
from tensorboardX import SummaryWriter

from lumen_ray.decoders.base import LossTerm
from lumen_ray.train import parallel


def reduce_losses(
    losses: dict[str, LossTerm], names: tuple[str, ...], weights: dict[str, float]
) -> tuple[torch.Tensor, dict[str, float]]:
    """(scalar to call `backward` on, global mean of each loss).

    Each loss is its sum over the normaliser of all ranks. FSDP averages gradients over ranks, so the scalar is
    multiplied by their number: the result is the gradient of the global batch.
    """
    device = losses["lm"].total.device
    zero = torch.zeros((), device=device)
    sums = torch.stack([losses[n].total.detach() if n in losses else zero for n in names])
    counts = torch.stack([losses[n].count.detach() if n in losses else zero for n in names])
    both = parallel.sum_over_ranks(torch.cat([sums, counts]))
    sums, counts = both[: len(names)], both[len(names) :].clamp_min(1.0)
    total = sum(weights.get(n, 1.0) * losses[n].total / counts[i] for i, n in enumerate(names) if n in losses)
    return total * parallel.world_size(), {n: float(s / c) for n, s, c in zip(names, sums, counts, strict=True)}


def per_task(batch: dict[str, Any], losses: dict[str, LossTerm]) -> dict[str, float]:
    """Mean loss by task on this rank: of the LM (routing token or text) and of the heatmap of perception prompts."""
    tasks: list[str] = batch["tasks"]
    sums: dict[str, list[float]] = {}
    for task, value in zip(tasks, losses["lm"].each.tolist(), strict=True):
        sums.setdefault(f"lm/{task}", []).append(value)
    if "heatmap" in losses:
        members = batch["layout"].link_branches["perception"].tolist()
        for branch, value in zip(members, losses["heatmap"].each.tolist(), strict=True):
            sums.setdefault(f"heatmap/{tasks[branch]}", []).append(value)
    return {name: sum(values) / len(values) for name, values in sums.items()}


class MetricsLog:
    """Appends to `RUN/metrics.jsonl` and `RUN/tensorboard`; only rank 0 holds one."""

    def __init__(self, run: Path):
        run.mkdir(parents=True, exist_ok=True)
        self._file = open(run / "metrics.jsonl", "a", buffering=1)  # noqa: SIM115  closed in `close`
        self._board = SummaryWriter(str(run / "tensorboard"))

    def write(self, step: int, stage: str, values: dict[str, Any]) -> None:
        self._file.write(json.dumps({"step": step, "stage": stage, "time": round(time.time(), 3), **values}) + "\n")
        for name, value in values.items():
            if isinstance(value, (int, float)):
                self._board.add_scalar(name, value, step)

    def close(self) -> None:
        self._file.close()
        self._board.close()
