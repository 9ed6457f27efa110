"""A decoder's half of the engine: its part of what the trunk gave -> predictions, or pictures."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from lumen_ray.decoders.base import ImageDecoder, Pixels, PredictSettings
from lumen_ray.errors import UserError
from lumen_ray.inference.outputs import Found, LinkPart, TrunkOutput
from lumen_ray.inference.precision import check_dtype, in_own_dtype, lower
from lumen_ray.model.build import LoadedModel, load_model
from lumen_ray.model.superlink import SuperLink
from lumen_ray.structures import SampleSettings

DEFAULTS = PredictSettings()
#: Object prompts times cells of the dense features that are decoded at once: 512 prompts at 128 pixels, 128 at 256.
MAX_DECODER_CELLS = 1 << 19
#: Groups of prompts that an expert decoder looks at in one pass.
MAX_DECODER_GROUPS = 8


class DecoderStage:
    """A decoder's half: its part of a trunk's output -> predictions in stored-image pixels."""

    def __init__(self, loaded: LoadedModel, name: str = "lumen", device: str = "cpu"):
        if name not in loaded.model.decoders:
            have = ", ".join(loaded.model.decoders)
            raise UserError(f"the model has no decoder '{name}'; decoders: {have}", "unknown_decoder")
        self.name = name
        self.device, self.dtype = torch.device(device), loaded.dtype
        self.decoder = loaded.model.decoders[name]
        lower(self.decoder, self.dtype)
        self.decoder.to(self.device)

    @classmethod
    def load(cls, model: str | Path, name: str = "lumen", device: str = "cpu", dtype: str = "float32") -> DecoderStage:
        dtype = check_dtype(dtype)
        return cls(replace(load_model(model), dtype=dtype), name, device)

    @in_own_dtype
    def run(self, output: TrunkOutput, settings: PredictSettings = DEFAULTS) -> list[Found]:
        """What was found for each link of this decoder, None for keypoint prompts. Received tensors are only read.

        The prompts are decoded in chunks, so that memory does not grow with their number; those that do not see each
        other are not in one group, so the results do not depend on it.
        """
        if (part := output.parts.get(self.name)) is None:
            return []
        if isinstance(self.decoder, ImageDecoder):
            return self._draw(part, output)
        found: list[Found] = [None] * len(part.link)
        for members in self._chunks(part.link, output):
            link, images = part.link.take(members)
            raw = self.decoder(link.to(self.device), self._view(output, images))
            specs = [part.prompts[i] for i in members.tolist()]
            frames = [output.frames[i] for i in images.tolist()]
            for i, prediction in zip(members.tolist(), self.decoder.predict(raw, frames, specs, settings), strict=True):
                found[i] = prediction
        return found

    def _draw(self, part: LinkPart, output: TrunkOutput) -> list[Found]:
        """The pictures of every prompt; those that want the same settings are drawn together."""
        found: list[Found] = [None] * len(part.link)
        wishes: dict[SampleSettings, list[int]] = {}
        for i, spec in enumerate(part.prompts):
            sample = spec.sample
            if sample.size is None and self.decoder.family == "editing":  # in the shape of the picture it starts from
                extent = output.pixels.extents[part.link.image_index[i]]
                sample = replace(sample, size=self.decoder.fit_size(tuple(extent.tolist())))
            wishes.setdefault(sample, []).append(i)
        for sample, members in wishes.items():
            link, images = part.link.take(torch.tensor(members))
            drawn = self.decoder.sample(link.to(self.device), self._view(output, images), sample)
            pictures = drawn.permute(0, 2, 3, 1).cpu().numpy()
            for number, i in enumerate(members):
                found[i] = list(pictures[number * sample.num_images : (number + 1) * sample.num_images])
        return found

    def _chunks(self, link: SuperLink, output: TrunkOutput) -> list[Tensor]:
        if self.decoder.independent:
            height, width = output.dense.shape[-2:]
            return link.chunks(max(1, MAX_DECODER_CELLS // (height * width)))
        groups = link.group.unique().split(MAX_DECODER_GROUPS)
        return [torch.nonzero(torch.isin(link.group, some)).flatten() for some in groups]

    def _view(self, output: TrunkOutput, images: Tensor) -> Tensor | Pixels:
        if self.decoder.reads == "dense":
            return output.dense[images].to(self.device)
        return output.pixels[images].to(self.device)
