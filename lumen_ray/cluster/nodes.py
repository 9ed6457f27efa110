"""The labels of nodes by kind of GPU, where a provider sets them."""

from __future__ import annotations

from lumen_ray.errors import UserError

_NAME, _MEMORY = "karpenter.k8s.aws/instance-gpu-name", "karpenter.k8s.aws/instance-gpu-memory"
#: set by Karpenter on nodes of EC2, memory in MiB; and by GKE
SELECTORS: dict[str, dict[str, dict[str, str]]] = {
    "eks": {
        "b200": {_NAME: "b200"},
        "h200": {_NAME: "h200"},
        "h100": {_NAME: "h100"},
        "a100": {_NAME: "a100", _MEMORY: "81920"},
        "a100-40gb": {_NAME: "a100", _MEMORY: "40960"},
        "l40s": {_NAME: "l40s"},
        "l4": {_NAME: "l4"},
        "a10g": {_NAME: "a10g"},
    },
    "gke": {
        name: {"cloud.google.com/gke-accelerator": label}
        for name, label in (
            ("b200", "nvidia-b200"),
            ("h200", "nvidia-h200-141gb"),
            ("h100", "nvidia-h100-80gb"),
            ("a100", "nvidia-a100-80gb"),
            ("a100-40gb", "nvidia-tesla-a100"),
            ("l4", "nvidia-l4"),
        )
    },
}


def check_offered(overlay: str, gpu: str) -> None:
    """Raises `UserError` for a kind of GPU that a provider's nodes do not have."""
    known = SELECTORS.get(overlay)
    if known is not None and gpu not in known:
        raise UserError(
            f"overlay '{overlay}' knows no nodes with '{gpu}'; give one of {', '.join(known)}, or --overlay none and "
            "select the nodes yourself",
            "unknown_gpu",
        )


def selector(overlay: str, gpu: str) -> dict[str, str] | None:
    """The labels of nodes with that GPU; None where only the GPU operator's label tells that there is one."""
    return SELECTORS.get(overlay, {}).get(gpu)
