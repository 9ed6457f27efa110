"""Parts of a trained model for a model with another LLM: encoders, stem, dense features and decoders.

What the LLM reads and writes (projector, region encoder, queries, link heads) depends on its width and its words, so it
starts fresh.
"""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from lumen_ray.errors import UserError
from lumen_ray.model.build import open_weights
from lumen_ray.model.settings import ModelSettings, read_settings

#: prefixes of the tensors that do not depend on the LLM
PARTS = (
    "trunk.vision.clip.",
    "trunk.vision.dinov2.",
    "trunk.vision.dinov2_mlp.",
    "trunk.stem.",
    "trunk.dense.",
    "decoders.",
)
#: of those, what reads the LLM
_READS_LLM = ("trunk.dense.from_llm.",)
#: settings that these parts depend on, beside the sections of decoders
_SETTINGS = ("image_size", "vision", "stem_channels", "dense_channels", "link_channels")


def load_parts(preset: ModelSettings, model: str | Path) -> dict[str, Tensor]:
    """The tensors of `PARTS` that `model`, a model folder or bundled weights, has and the preset needs. Raises
    `UserError` where settings that they depend on differ."""
    theirs = read_settings(model)
    merge = preset.vision.token_merge  # how many patches the LLM reads as one token does not concern the encoders
    comparable = theirs.model_copy(update={"vision": theirs.vision.model_copy(update={"token_merge": merge})})
    shared = [name for name in preset.decoder_names if name in theirs.decoder_names]
    for name in (*_SETTINGS, *shared):
        if getattr(preset, name) != getattr(comparable, name):
            raise UserError(
                f"preset '{preset.name}' has another '{name}' than '{model}'; give a model with the preset's, or a "
                "preset file of your own with the model's",
                "wrong_start",
            )
    absent = tuple(f"decoders.{name}." for name in theirs.decoder_names if name not in shared) + _READS_LLM
    weights = open_weights(model)
    return {name: weights[name] for name in weights if name.startswith(PARTS) and not name.startswith(absent)}
