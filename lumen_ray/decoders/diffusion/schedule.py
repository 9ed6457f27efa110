"""Noise schedules and samplers: the classes of `diffusers`, and which settings of them work together.

They take seconds to import, so that happens where one is made.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from lumen_ray.decoders.diffusion.schedulers import TRAINING, config_keys, make_scheduler
from lumen_ray.decoders.diffusion.settings import SAMPLERS, DiffusionSettings
from lumen_ray.errors import UserError

if TYPE_CHECKING:
    from diffusers import SchedulerMixin

PREDICTED = ("epsilon", "v_prediction", "sample")


def scheduler_keys() -> set[str]:
    """The keys of all samplers and of the noise schedule of training, so that one set of keys serves any of them."""
    import diffusers

    return set().union(*(config_keys(getattr(diffusers, name)) for name in SAMPLERS))


def check_schedule(decoder: str, settings: DiffusionSettings) -> None:
    """`UserError` where training and sampling cannot both work with these settings, found by a step of each."""
    keys, sampler = settings.scheduler, settings.sampler
    predicted = keys.get("prediction_type", "epsilon")
    if predicted not in PREDICTED:
        raise UserError(
            f"{decoder}.scheduler.prediction_type '{predicted}' is none of {', '.join(PREDICTED)}", "invalid_config"
        )
    if keys.get("rescale_betas_zero_snr"):
        if predicted == "epsilon":
            raise UserError(
                f"{decoder}.scheduler.rescale_betas_zero_snr leaves nothing of the picture in the last step, where its "
                "noise says nothing about it; set prediction_type: v_prediction",
                "invalid_config",
            )
        if "rescale_betas_zero_snr" not in make_scheduler(sampler, {}).config:
            raise UserError(
                f"{decoder}.sampler {sampler} has no rescale_betas_zero_snr, which its scheduler asks for; choose "
                "another, such as DDIMScheduler",
                "invalid_config",
            )
    for name in dict.fromkeys((TRAINING, sampler)):
        try:
            with torch.device("cpu"):  # also of a model that is built without its numbers
                _draw(make_scheduler(name, keys))
        except (ValueError, TypeError, NotImplementedError) as error:
            told = str(error).strip().splitlines()[0]
            raise UserError(f"{decoder}.scheduler cannot work with {name}: {told}", "invalid_config") from None


def check_steps(decoder: str, settings: DiffusionSettings, steps: int) -> None:
    """`UserError` where the sampler cannot draw in so many steps: PNDM's first ones take several each, unless
    `skip_prk_steps` is set, and with a `steps_offset` as many as there are would begin behind the last."""
    scheduler = make_scheduler(settings.sampler, settings.scheduler)
    whole = scheduler.config.num_train_timesteps

    def fits(steps: int) -> bool:
        if not 1 <= steps <= whole:
            return False
        try:
            scheduler.set_timesteps(steps)
        except (ValueError, IndexError):
            return False
        return float(scheduler.timesteps.max()) < whole

    if not fits(steps):
        least, most = 1 if fits(1) else 4, whole if fits(whole) else whole - 1
        raise UserError(
            f"{decoder}: {settings.sampler} cannot draw in {steps} steps; give a number from {least} to {most}",
            "invalid_sampling",
        )


def _draw(scheduler: SchedulerMixin) -> None:
    scheduler.set_timesteps(8)
    latents = torch.zeros(1, 1, 2, 2)
    for step in scheduler.timesteps[:1]:
        scheduler.step(scheduler.scale_model_input(latents, step), step, latents)
