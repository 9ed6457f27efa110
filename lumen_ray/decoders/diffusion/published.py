"""Reads published Stable Diffusion and InstructPix2Pix checkpoints: a folder with `unet`, `vae`, `text_encoder`,
`scheduler`, `tokenizer`.

`published_settings` reads the settings of a decoder, `load_published` its weights, and `published_tokenizer` the
tokenizer of its text encoder.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lumen_ray.checkpoints.loader import PublishedLoader
from lumen_ray.decoders.diffusion.decoder import DiffusionDecoder
from lumen_ray.decoders.diffusion.schedule import scheduler_keys
from lumen_ray.decoders.diffusion.schedulers import config_keys
from lumen_ray.decoders.diffusion.settings import SAMPLERS
from lumen_ray.errors import UserError

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from torch import Tensor, nn

#: one of these sets is required; without them `transformers` would return an empty tokenizer
_TOKENIZER_FILES = (("tokenizer.json",), ("vocab.json", "merges.txt"))


def _read(folder: Path, part: str, name: str) -> dict[str, Any]:
    path = folder / part / name
    if not path.is_file():
        raise UserError(
            f"'{folder}' is not a diffusion model in diffusers' format: {part}/{name} is missing", "missing_weights"
        )
    try:
        keys = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise UserError(f"'{path}' cannot be read: {error}", "damaged_weights") from None
    if not isinstance(keys, dict):
        raise UserError(f"'{path}' must hold a JSON object", "damaged_weights")
    return keys


def published_settings(folder: str | Path) -> dict[str, Any]:
    """The keys `unet`, `vae`, `text_encoder`, `scheduler`, `sampler`, `image_size` and `num_tokens` of
    `DiffusionSettings` for a published folder. Raises `UserError` if it is not one."""
    import diffusers
    from transformers import CLIPTextConfig

    folder = Path(folder)
    unet, vae = _read(folder, "unet", "config.json"), _read(folder, "vae", "config.json")
    text = _read(folder, "text_encoder", "config.json")
    scheduler = _read(folder, "scheduler", "scheduler_config.json")
    sampler = scheduler.get("_class_name")
    if sampler not in SAMPLERS:
        raise UserError(
            f"'{folder}' has the scheduler '{sampler}', which is not one of {', '.join(SAMPLERS)}; set _class_name in "
            "its scheduler_config.json to one of them",
            "unknown_sampler",
        )
    halvings = len(vae.get("block_out_channels", (64,))) - 1
    changed = CLIPTextConfig(**text).to_diff_dict()
    fields = {f.name for f in dataclasses.fields(CLIPTextConfig)} - {"architectures", "dtype", "transformers_version"}
    return {
        "unet": {k: v for k, v in unet.items() if k in config_keys(diffusers.UNet2DConditionModel)},
        "vae": {k: v for k, v in vae.items() if k in config_keys(diffusers.AutoencoderKL)},
        "text_encoder": {k: v for k, v in changed.items() if k in fields},
        "scheduler": {k: v for k, v in scheduler.items() if k in scheduler_keys()},
        "sampler": sampler,
        "image_size": int(unet.get("sample_size", 64)) * 2**halvings,
        "num_tokens": CLIPTextConfig(**text).max_position_embeddings,
    }


def published_tokenizer(folder: str | Path) -> Tokenizer:
    """The tokenizer of a published folder's text encoder, which truncates and pads to that encoder's length. Raises
    `UserError` if it is missing or damaged."""
    from tokenizers import Tokenizer
    from transformers import CLIPTextConfig, CLIPTokenizer

    path = Path(folder) / "tokenizer"
    if not any(all((path / name).is_file() for name in names) for names in _TOKENIZER_FILES):
        raise UserError(
            f"'{folder}' has no tokenizer for its text encoder; add the published tokenizer/vocab.json and "
            "tokenizer/merges.txt, or tokenizer/tokenizer.json",
            "missing_tokenizer",
        )
    try:
        read = CLIPTokenizer.from_pretrained(str(path), local_files_only=True)
        tokenizer = Tokenizer.from_str(read.backend_tokenizer.to_str())
    except Exception as error:  # `tokenizers` raises nothing more specific
        raise UserError(
            f"the tokenizer in '{path}' cannot be read: {str(error).strip().splitlines()[0]}", "damaged_weights"
        ) from None
    length = CLIPTextConfig(**_read(Path(folder), "text_encoder", "config.json")).max_position_embeddings
    tokenizer.enable_truncation(length)
    tokenizer.enable_padding(pad_id=read.pad_token_id, pad_token=read.pad_token, length=length)
    return tokenizer


def load_published(decoder: DiffusionDecoder | nn.Module, folder: str | Path, allow_pickle: bool = False) -> None:
    """Loads the weights of a published folder into a decoder built with its settings.

    Pickled files, which can run code, are only read with `allow_pickle`. Raises `UserError` for weights that are
    missing or do not fit.
    """
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextModel

    classes = {"unet": UNet2DConditionModel, "vae": AutoencoderKL, "text_encoder": CLIPTextModel}
    for part, cls in classes.items():
        module: nn.Module | None = getattr(decoder, part)
        if module is None:
            continue
        _read(Path(folder), part, "config.json")
        try:
            loaded = cls.from_pretrained(
                str(folder), subfolder=part, local_files_only=True, use_safetensors=None if allow_pickle else True
            )
        except OSError as error:
            raise UserError(
                f"no {part} weights {'' if allow_pickle else 'in safetensors format '}can be read in '{folder}': "
                f"{str(error).splitlines()[0]}",
                "missing_weights",
            ) from None
        try:
            module.load_state_dict(loaded.state_dict())
        except RuntimeError as error:
            raise UserError(
                f"the {part} in '{folder}' does not fit the settings {decoder.name}.{part}: "
                f"{str(error).splitlines()[-1].strip()}",
                "wrong_weights",
            ) from None


def load(folder: Path, build: Callable[[], nn.Module], pickle: bool) -> dict[str, Tensor]:
    """The state dict of the decoder that `build` makes, with the weights of a folder."""
    decoder = build()
    load_published(decoder, folder, pickle)
    return decoder.state_dict()


LOADER = PublishedLoader(published_settings, load, tokenizer=published_tokenizer)
