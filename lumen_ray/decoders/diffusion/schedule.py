"""Noise schedules and samplers of `diffusers` (DDPM, arXiv 2006.11239, and others), and checks of their settings.

They take seconds to import, so they are imported when one is built.
"""

from __future__ import annotations

import torch

from lumen_ray.decoders.diffusion.schedulers import TRAINING, Scheduler, config_keys, make_scheduler
from lumen_ray.decoders.diffusion.settings import SAMPLERS, DiffusionSettings
from lumen_ray.errors import UserError

PREDICTED = ("epsilon", "v_prediction", "sample")


def scheduler_keys() -> set[str]:
    """The config keys of all samplers and of the training schedule, so that one set of keys serves all of them."""
    import diffusers

    return set().union(*(config_keys(getattr(diffusers, name)) for name in SAMPLERS))


def check_schedule(decoder: str, settings: DiffusionSettings) -> None:
    """Raises `UserError` if training or sampling cannot work with these settings, by running one step of each."""
    keys, sampler = settings.scheduler, settings.sampler
    predicted = keys.get("prediction_type", "epsilon")
    if predicted not in PREDICTED:
        raise UserError(
            f"{decoder}.scheduler.prediction_type '{predicted}' is not one of {', '.join(PREDICTED)}", "invalid_config"
        )
    if keys.get("rescale_betas_zero_snr"):
        if predicted == "epsilon":
            raise UserError(
                f"{decoder}.scheduler.rescale_betas_zero_snr leaves no signal in the last step, so predicting its "
                "noise says nothing about the image; set prediction_type: v_prediction",
                "invalid_config",
            )
        if "rescale_betas_zero_snr" not in make_scheduler(sampler, {}).config:
            raise UserError(
                f"{decoder}.sampler {sampler} has no rescale_betas_zero_snr, which the scheduler settings set; choose "
                "another, such as DDIMScheduler",
                "invalid_config",
            )
    for name in dict.fromkeys((TRAINING, sampler)):
        try:
            with torch.device("cpu"):  # also while the model is built on the meta device
                _draw(make_scheduler(name, keys))
        except (ValueError, TypeError, NotImplementedError) as error:
            reason = str(error).strip().splitlines()[0]
            raise UserError(f"{decoder}.scheduler cannot work with {name}: {reason}", "invalid_config") from None


def check_steps(decoder: str, settings: DiffusionSettings, steps: int) -> None:
    """Raises `UserError` if the sampler cannot run with `steps` steps: PNDM's first steps take several each, unless
    `skip_prk_steps` is set, and with `steps_offset` the maximum number would start after the last training step."""
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


def _draw(scheduler: Scheduler) -> None:
    scheduler.set_timesteps(8)
    latents = torch.zeros(1, 1, 2, 2)
    for step in scheduler.timesteps[:1]:
        scheduler.step(scheduler.scale_model_input(latents, step), step, latents)
