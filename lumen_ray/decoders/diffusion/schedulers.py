"""The scheduler classes of `diffusers`, imported where one is made, and the noise schedule of training."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

Scheduler = Any  # a scheduler of diffusers: its base class declares none of the methods used here
TRAINING = "DDPMScheduler"  # adds the noise in training


def config_keys(cls: Any) -> set[str]:
    """The config keys of a class of `diffusers`."""
    return set(inspect.signature(cls.__init__).parameters) - {"self", "kwargs"}


def make_scheduler(name: str, keys: Mapping[str, Any]) -> Scheduler:
    """Builds a scheduler of `diffusers` from those of the keys that it has."""
    import diffusers

    cls = getattr(diffusers, name)
    valid = config_keys(cls)
    return cls(**{key: value for key, value in keys.items() if key in valid})


#: keys of a noise schedule that define the input and the target of a trained UNet
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
    """The training noise schedule for `scheduler` settings, including defaults of keys that are not set."""
    config = make_scheduler(TRAINING, keys).config
    return {key: config[key] for key in _LEARNED}
