"""The installation that `lumen-ray doctor` checks: packages, cores, memory, GPUs, and a Ray cluster to join."""

from __future__ import annotations

import os
import platform
import re
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

GIB = 1 << 30
State = Literal["ok", "note", "short", "missing"]
#: what the extras of this package are for
OPTIONAL = {
    "speed": "decodes JPEG faster",
    "lora": "trains the LLM through adapters (recipes with 'lora')",
    "mlflow": "logs runs to MLflow (recipes with 'mlflow')",
}
CONNECT_S = 3.0


@dataclass(frozen=True)
class Finding:
    """The result of one check.

    state: "missing" keeps the preset from running, "short" keeps its recipe from being trained on this machine.
    """

    state: State
    text: str


def size(count: float) -> str:
    """Bytes as text: ``3 << 30 -> "3.0 GiB"``."""
    return f"{count / GIB:.1f} GiB" if count >= GIB / 10 else f"{count / (1 << 20):.1f} MiB"


def requirements() -> list[str]:
    """The requirements of this package, with the versions it is tested with, as in PEP 508; optional ones have a marker
    with their extra."""
    checkout = Path(__file__).parents[1] / "pyproject.toml"
    if checkout.is_file():
        import tomllib

        project = tomllib.loads(checkout.read_text(encoding="utf-8"))["project"]
        optional = project.get("optional-dependencies", {})
        return [*project["dependencies"], *(f'{r}; extra == "{name}"' for name, rs in optional.items() for r in rs)]
    from importlib.metadata import requires

    return requires("lumen-ray") or []


def packages() -> Iterator[Finding]:
    from importlib.metadata import PackageNotFoundError, version

    from packaging.requirements import Requirement

    """Compares the installed packages with `requirements`; optional ones are notes."""
    yield Finding("ok", f"python {platform.python_version()} on {platform.system()} {platform.machine()}")
    optional: dict[str, list[str]] = {}
    for line in requirements():
        requirement = Requirement(line)
        extra = re.search(r"extra == ['\"](.+?)['\"]", str(requirement.marker))
        if requirement.name == "lumen-ray" or not (
            extra or requirement.marker is None or requirement.marker.evaluate()
        ):
            continue
        try:
            installed = version(requirement.name)
        except PackageNotFoundError:
            installed = None
        fits = installed is not None and requirement.specifier.contains(installed, prereleases=True)
        text = f"{requirement.name} {installed or 'is not installed'}"
        text += "" if fits else f", tested with {requirement.specifier}"
        if extra is None:
            yield Finding("ok" if fits else "missing", text)
        elif extra[1] != "test":
            optional.setdefault(extra[1], []).append(text)
    for name, texts in optional.items():
        use = f"optional: {OPTIONAL[name]}" if name in OPTIONAL else "optional"
        yield Finding("note", f"{', '.join(texts)} ({use}; pip install 'lumen-ray[{name}]')")


def host_memory() -> int:
    """Bytes of memory that this process can still allocate; 0 on systems without /proc/meminfo."""
    meminfo = Path("/proc/meminfo")
    lines = meminfo.read_text().splitlines() if meminfo.is_file() else []
    free = next((int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable:")), 0)
    limit, used = (Path("/sys/fs/cgroup") / name for name in ("memory.max", "memory.current"))
    if limit.is_file() and (most := limit.read_text().strip()).isdigit():  # of a container
        free = min(free, int(most) - int(used.read_text()))
    return max(0, free)


def gpu_memory() -> list[int]:
    """Bytes of memory of each GPU."""
    import torch

    if not torch.cuda.is_available():
        return []
    return [torch.cuda.get_device_properties(i).total_memory for i in range(torch.cuda.device_count())]


def machine() -> Iterator[Finding]:
    """Checks torch's build, cores, memory, GPUs and the Ray cluster of `RAY_ADDRESS`."""
    import torch

    build = (
        f"CUDA {torch.version.cuda}"
        if torch.version.cuda
        else f"ROCm {torch.version.hip}"
        if torch.version.hip
        else "CPU"
    )
    yield Finding(
        "note", f"torch built for {build}; {len(os.sched_getaffinity(0))} cores, {size(host_memory())} of memory free"
    )
    for i, memory in enumerate(gpu_memory()):
        name = torch.cuda.get_device_name(i)
        half = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "no bf16"
        yield Finding("ok", f"GPU {i}: {name}, {size(memory)}, {half}")
    yield ray_cluster()


def ray_cluster() -> Finding:
    """Checks whether the Ray cluster that the commands would use answers."""
    address = os.environ.get("RAY_ADDRESS", "")
    if address in ("", "local"):
        return Finding("ok", "Ray: no RAY_ADDRESS is set, commands start one on this machine")
    host, _, port = address.removeprefix("ray://").removeprefix("http://").rpartition(":")
    if not port.isdigit():
        return Finding("note", f"Ray: RAY_ADDRESS is '{address}', looked up when a command starts")
    try:
        socket.create_connection((host, int(port)), CONNECT_S).close()
    except OSError as error:
        return Finding("missing", f"Ray: nothing answers at RAY_ADDRESS {address} ({error.strerror or error})")
    return Finding("ok", f"Ray: the cluster at {address} answers")
