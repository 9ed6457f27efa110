"""A decoder's half of the engine: its part of what the trunk gave -> predictions, or pictures."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from lumen_ray.decoders.base import ImageDecoder, PredictSettings
from lumen_ray.inference.outputs import Found, LinkPart, TrunkOutput
from lumen_ray.input_size import padded_pixels
from lumen_ray.model.build import LoadedModel, load_model
from lumen_ray.precision import in_own_dtype
from lumen_ray.structures import SampleSettings, Size
from lumen_ray.superlink import SuperLink
from lumen_ray.targets import Frame, Pixels

DEFAULTS = PredictSettings()
#: Object prompts times cells of the dense features that are decoded at once: 512 prompts at 128 pixels, 128 at 256.
MAX_DECODER_CELLS = 1 << 19
#: Groups of prompts that an expert decoder looks at in one pass.
MAX_DECODER_GROUPS = 8
#: Pixels of the images that those groups are about: 4 at 1024 x 1024.
MAX_DECODER_PIXELS = 1 << 22


class DecoderStage:
    """A decoder's half: its part of a trunk's output -> predictions in stored-image pixels."""

    def __init__(self, loaded: LoadedModel, name: str, device: str = "cpu"):
        self.name = name
        self.device, self.dtype = torch.device(device), loaded.dtype
        self.decoder = loaded.decoder(name, device)
        self.input_rule = loaded.settings.input_rules.get(name)

    @classmethod
    def load(cls, model: str | Path, name: str, device: str = "cpu", dtype: str = "float32") -> DecoderStage:
        """Of a model folder only the decoder is read, and kept."""
        return cls(load_model(model, parts=(), dtype=dtype), name, device)

    @in_own_dtype
    def run(self, output: TrunkOutput, settings: PredictSettings = DEFAULTS) -> list[Found]:
        """What was found for each link of this decoder, None for keypoint prompts. Received tensors are only read.

        The prompts are decoded in chunks, so that memory does not grow with their number; those that do not see each
        other are not in one group, so the results do not depend on it.
        """
        if (part := output.parts.get(self.name)) is None:
            return []
        if isinstance(self.decoder, ImageDecoder):
            return self._draw(part)
        found: list[Found] = [None] * len(part.link)
        for members in self._chunks(part, output):
            link, images = part.link.select_with_images(members)
            frames = [self._frame(output.frames[i]) for i in images.tolist()]
            if self.decoder.reads == "dense":
                view = output.dense[images].to(self.device)
            else:
                view = self._pixels(part, members, link, [frame.extent for frame in frames])
            raw = self.decoder(link.to(self.device), view)
            specs = [part.prompts[i] for i in members.tolist()]
            for i, prediction in zip(members.tolist(), self.decoder.predict(raw, frames, specs, settings), strict=True):
                found[i] = prediction
        return found

    def _draw(self, part: LinkPart) -> list[Found]:
        """The pictures of every prompt; those that want the same settings are drawn together."""
        found: list[Found] = [None] * len(part.link)
        wishes: dict[SampleSettings, list[int]] = {}
        for i, spec in enumerate(part.prompts):
            sample = spec.sample
            if part.pixels:  # in the size in which it got the picture that it starts from
                sample = replace(sample, size=tuple(part.pixels[i].shape[1:]))
            wishes.setdefault(sample, []).append(i)
        for sample, members in wishes.items():
            link, _ = part.link.select_with_images(torch.tensor(members))
            view = self._pixels(part, torch.tensor(members), link) if part.pixels else None
            drawn = self.decoder.sample(link.to(self.device), view, sample)
            pictures = drawn.permute(0, 2, 3, 1).cpu().numpy()
            for number, i in enumerate(members):
                found[i] = list(pictures[number * sample.num_images : (number + 1) * sample.num_images])
        return found

    def _chunks(self, part: LinkPart, output: TrunkOutput) -> list[Tensor]:
        link = part.link
        if self.decoder.independent:
            height, width = output.dense.shape[-2:]
            return link.chunks(max(1, MAX_DECODER_CELLS // (height * width)))
        each = padded_pixels(tuple(image.shape[1:]) for image in part.pixels)
        return link.group_chunks(max(1, min(MAX_DECODER_GROUPS, MAX_DECODER_PIXELS // each)))

    def _frame(self, frame: Frame) -> Frame:
        """Where the image that lies so in the trunk's input lies in this decoder's."""
        if self.input_rule is None:
            return frame
        size, (scale, _) = self.input_rule.fit(frame.size)
        return Frame(frame.size, scale, size)

    def _pixels(self, part: LinkPart, members: Tensor, link: SuperLink, extents: list[Size] | None = None) -> Pixels:
        """The images of a part's prompts at `members`, whose link counts the images among themselves."""
        images = dict(zip(link.image_index.tolist(), (part.pixels[i] for i in members.tolist()), strict=True))
        return Pixels.stack([images[i] for i in range(len(images))], extents).to(self.device)


class DecoderStages(Mapping[str, DecoderStage]):
    """The stages of a model's decoders, each made when it is first asked for, which may read its weights."""

    def __init__(self, loaded: LoadedModel, device: str):
        self._loaded, self._device = loaded, device
        self._made: dict[str, DecoderStage] = {}

    def __getitem__(self, name: str) -> DecoderStage:
        if name not in self._loaded.model.decoders:
            raise KeyError(name)
        if name not in self._made:
            self._made[name] = DecoderStage(self._loaded, name, self._device)
        return self._made[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._loaded.model.decoders)

    def __len__(self) -> int:
        return len(self._loaded.model.decoders)
