"""The Serve config of the RayService, with the preset's decoders, shares of a GPU and replicas."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import Any

import yaml

from lumen_ray import config
from lumen_ray.cluster.entrypoints import served_model
from lumen_ray.cluster.needs import CUDA_BYTES, Needs
from lumen_ray.cluster.yaml_text import Figure, dump, plain
from lumen_ray.errors import UserError
from lumen_ray.footprint import BF16, Role
from lumen_ray.presets import bundled_models
from lumen_ray.serve.settings import ServeSettings

#: share of a GPU that a decoder reserves: at least, and in steps of
_LEAST_SHARE, _STEP = 0.1, 0.05
_ACTIVATIONS = 1.25  # a decoder's weights and what a batch takes on top, assumed


@dataclass(frozen=True)
class ServePlan:
    """text: for `serveConfigV2`. gpus: that one replica of each deployment takes, and all of them at most. cpus: that
    the replicas reserve which may share a GPU's pod."""

    text: str
    gpus: tuple[int, int]
    cpus: float


def serve_plan(text: str, needs: Needs, surge: float) -> ServePlan:
    """The plan for a preset, from the Serve config of the manifests.

    surge: share of the GPUs that an upgrade takes on top of those that serve, which are left free for it.
    Raises `UserError` for a model that does not fit on the GPUs.
    """
    given = yaml.safe_load(text)
    args = given["applications"][0]["args"]
    name = needs.settings.name
    if args["model"] != name or name not in bundled_models():
        args["model"] = served_model(needs)
    templates = args["decoders"]
    first = next(iter(templates.values()))  # for decoders that the manifests have not
    args["decoders"] = {each: copy.deepcopy(templates.get(each, first)) for each in needs.settings.decoder_names}
    gpus = _share_gpus(args, needs, surge) if needs.gpu else (0, 0)
    config.validate(ServeSettings, plain(args), "serveConfigV2")
    cpus = sum(each["num_cpus"] for each in (args["trunk"], *args["decoders"].values()))
    return ServePlan(dump(given), gpus, cpus)


def _share_gpus(args: dict[str, Any], needs: Needs, surge: float) -> tuple[int, int]:
    """Sets shares and replicas in `args`; returns the GPUs of one replica each, and of all."""
    memory, total = needs.serving_gpu().memory, needs.request.gpus
    trunk, *decoders = needs.roles
    shares = {role.name: _share(role, memory) for role in decoders}
    rest = math.ceil(round(sum(shares.values()), 2))  # GPUs of one replica of each decoder
    if total > rest:
        trunk_share, why = 1.0, "alone on a GPU"
    else:
        trunk_share, why = round(total - sum(shares.values()), 2), "what the decoders leave of the GPUs"
    if trunk_share > 1 or _share(trunk, memory) > trunk_share:
        needed = 1 + rest
        raise UserError(
            f"serving '{needs.settings.name}' takes {needed} GPUs, one for the trunk and {rest} for its decoders, and "
            f"--gpus is {total}; give --gpus {needed}",
            "too_few_gpus",
        )
    least = min(total, rest + 1)
    sets = max(1, math.floor(total / (1 + surge) / least))
    limit = f"{sets} times {least} GPUs, of {total}" + (f" less {surge:.0%} for an upgrade" if surge else "")
    for role, section in ((trunk, args["trunk"]), *((role, args["decoders"][role.name]) for role in decoders)):
        is_trunk = role is trunk
        size = f"{role.parameters * BF16 / 1e9:.1f} GB in bfloat16"
        share = Figure(trunk_share, f"{why}; {size}") if is_trunk else Figure(shares[role.name], size)
        section["num_gpus"] = share
        section["autoscaling"] |= {"min_replicas": 1, "max_replicas": Figure(sets, limit)}
    return least, sets * least


def _share(role: Role, memory: float) -> float:
    """The share of a GPU that a role's weights and activations take."""
    needed = (role.parameters * BF16 * _ACTIVATIONS + CUDA_BYTES) / memory
    return round(max(_LEAST_SHARE, math.ceil(needed / _STEP) * _STEP), 2)
