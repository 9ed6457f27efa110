"""Invalid noise schedules raise `UserError` when a decoder is built."""

import pytest
import torch
from support.diffusion_fakes import instruct_pix2pix, make_link, stable_diffusion

from lumen_ray.decoders.diffusion.schedule import PREDICTED, check_steps, scheduler_keys
from lumen_ray.decoders.diffusion.schedulers import make_scheduler
from lumen_ray.decoders.diffusion.settings import SAMPLERS, StableDiffusionSettings
from lumen_ray.errors import UserError
from lumen_ray.structures import SampleSettings

ZERO = {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}


def test_every_sampler_draws_with_the_defaults():
    for sampler in SAMPLERS:
        assert stable_diffusion(sampler=sampler).settings.sampler == sampler


@pytest.mark.parametrize(
    ("keys", "sampler", "message"),
    [
        (
            {"prediction_type": "v-prediction"},
            "DDIMScheduler",
            "'v-prediction' is not one of epsilon, v_prediction, sample",
        ),
        ({"beta_schedule": "linearr"}, "DDIMScheduler", "cannot work with DDPMScheduler: linearr is not implemented"),
        ({"timestep_spacing": "first"}, "DDIMScheduler", "first is not supported"),
        ({"rescale_betas_zero_snr": True}, "DDIMScheduler", "set prediction_type: v_prediction"),
        (ZERO, "PNDMScheduler", "sampler PNDMScheduler has no rescale_betas_zero_snr"),
        ({"prediction_type": "sample"}, "PNDMScheduler", "cannot work with PNDMScheduler"),
        ({"prediction_type": "sample"}, "EulerAncestralDiscreteScheduler", "not implemented yet: sample"),
    ],
)
def test_an_invalid_schedule_raises_user_errors(keys, sampler, message):
    published = StableDiffusionSettings.model_fields["scheduler"].default
    for make in (stable_diffusion, instruct_pix2pix):
        with pytest.raises(UserError, match=message) as error:
            make(scheduler={**published, **keys}, sampler=sampler)
        assert error.value.reason == "invalid_config" and "\n" not in str(error.value)


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("steps", [1, 2, 999])
def test_every_sampler_runs_with_few_and_with_the_maximum_of_steps(sampler, steps):
    decoder = stable_diffusion(sampler=sampler)
    check_steps("stable_diffusion", decoder.settings, steps)
    if steps < 999:
        drawn = decoder.eval().sample(make_link(1, images=1), None, SampleSettings(steps=steps, guidance=1.0))
        assert len(drawn) == 1


def test_too_many_steps_raise_user_errors():
    keys = {**StableDiffusionSettings.model_fields["scheduler"].default, "skip_prk_steps": False}
    decoder = stable_diffusion(sampler="PNDMScheduler", scheduler=keys)
    with pytest.raises(UserError, match="PNDMScheduler cannot draw in 3 steps; give a number from 4 to 999") as error:
        decoder.sample(make_link(1, images=1), None, SampleSettings(steps=3))
    assert error.value.reason == "invalid_sampling"
    check_steps("stable_diffusion", decoder.settings, 4)


def test_without_its_numbers_a_decoder_is_checked_as_well():
    with torch.device("meta"):
        stable_diffusion(scheduler=ZERO)
        with pytest.raises(UserError):
            stable_diffusion(scheduler=ZERO, sampler="PNDMScheduler")


def test_a_scheduler_takes_the_keys_that_it_has():
    assert make_scheduler("PNDMScheduler", {"beta_end": 0.5, "clip_sample": False}).config.beta_end == 0.5
    assert {"skip_prk_steps", "clip_sample", "prediction_type"} <= scheduler_keys()
    assert PREDICTED[0] == make_scheduler("DDIMScheduler", {}).config.prediction_type
