"""The scheduler classes of `diffusers`, imported where one is made, and the noise schedule of training."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from diffusers import SchedulerMixin


TRAINING = "DDPMScheduler"  # which adds the noise


def config_keys(cls: type) -> set[str]:
    """The keys of the config of a class of `diffusers`."""
    return set(inspect.signature(cls.__init__).parameters) - {"self", "kwargs"}


def make_scheduler(name: str, keys: Mapping[str, Any]) -> SchedulerMixin:
    """One of `diffusers`, with those of the keys that it has."""
    import diffusers

    cls = getattr(diffusers, name)
    valid = config_keys(cls)
    return cls(**{key: value for key, value in keys.items() if key in valid})


#: keys of a noise schedule that decide what a trained UNet predicts, and from what
_LEARNED = (
    "num_train_timesteps",
    "beta_start",
    "beta_end",
    "beta_schedule",
    "trained_betas",
    "prediction_type",
    "rescale_betas_zero_snr",
)


def learned_schedule(keys: Mapping[str, Any]) -> dict[str, Any]:
    """The noise schedule that a UNet learns with the `scheduler` of its settings, keys that are left out among it."""
    found = make_scheduler(TRAINING, keys).config
    return {key: found[key] for key in _LEARNED}
