"""GPUs that jobs are planned for. Peak rates are those of `train.metrics.flops`; memory and its bandwidth are from the
same data sheets of the vendor."""

from __future__ import annotations

from dataclasses import dataclass

from lumen_ray.errors import unknown
from lumen_ray.structures import Dtype


@dataclass(frozen=True)
class Gpu:
    """`peak_name`: in `train.metrics.flops.PEAKS`; `memory`: bytes; `bandwidth`: of its memory, bytes per second."""

    name: str
    peak_name: str
    memory: float
    bandwidth: float

    def peak(self, dtype: Dtype) -> float:
        """Dense peak rate in FLOP/s; of float32 without TF32."""
        from lumen_ray.train.metrics.flops import PEAKS

        return PEAKS[self.peak_name][0 if dtype == "bfloat16" else 1]


GPUS = {
    name: Gpu(name, peak_name, gigabytes * 1e9, rate * 1e9)
    for name, peak_name, gigabytes, rate in (
        ("b200", "B200", 180, 8000),
        ("h200", "H200", 141, 4800),
        ("h100", "H100", 80, 3350),
        ("h100-nvl", "H100 NVL", 94, 3900),
        ("h100-pcie", "H100 PCIe", 80, 2000),
        ("a100", "A100", 80, 2039),
        ("a100-40gb", "A100", 40, 1555),
        ("l40s", "L40S", 48, 864),
        ("l40", "L40", 48, 864),
        ("l4", "L4", 24, 300),
        ("a10", "A10", 24, 600),
        ("a10g", "A10G", 24, 600),
        ("rtx-4090", "RTX 4090", 24, 1008),
        ("rtx-3090", "RTX 3090", 24, 936),
    )
}


def find_gpu(name: str) -> Gpu:
    """The GPU of that name. Raises `UserError` with the valid names if there is none."""
    if name.lower() not in GPUS:
        raise unknown("gpu", name, GPUS)
    return GPUS[name.lower()]
