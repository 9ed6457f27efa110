"""A decoder's half of the engine: its input from the trunk -> predictions, or pictures."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from lumen_ray.cancellation import between_passes
from lumen_ray.decoders.base import ImageDecoder, PredictSettings, PromptSpec
from lumen_ray.inference.calibration import Calibration
from lumen_ray.inference.outputs import DecoderInput, DecoderResult, TrunkOutput
from lumen_ray.input_size import padded_pixels
from lumen_ray.model.build import LoadedModel, load_model
from lumen_ray.precision import in_model_dtype
from lumen_ray.structures import Prediction, SampleSettings, Size
from lumen_ray.superlink import SuperLink
from lumen_ray.targets import Frame, Pixels

DEFAULTS = PredictSettings()
#: Object prompts times cells of the dense features in one pass: 512 prompts at 128 pixels, 128 at 256.
MAX_DECODER_CELLS = 1 << 19
#: Groups of prompts in one pass of an expert decoder.
MAX_DECODER_GROUPS = 8
#: Pixels of the images of those groups: 4 at 1024 x 1024.
MAX_DECODER_PIXELS = 1 << 22


class DecoderStage:
    """Holds one decoder of a model."""

    def __init__(self, loaded: LoadedModel, name: str, device: str = "cpu"):
        self.name = name
        self.device, self.dtype = torch.device(device), loaded.dtype
        self.decoder = loaded.decoder(name, device)
        self.input_rule = loaded.settings.input_rules.get(name)
        self.calibration = Calibration.from_dict(loaded.meta.calibration)

    @classmethod
    def load(cls, model: str | Path, name: str, device: str = "cpu", dtype: str = "float32") -> DecoderStage:
        """Reads one decoder of a model folder, nothing else of it."""
        return cls(load_model(model, parts=(), dtype=dtype), name, device)

    @in_model_dtype
    def predict(self, output: TrunkOutput, settings: PredictSettings = DEFAULTS) -> list[DecoderResult]:
        """The result of each link of this decoder, in stored-image pixels, with calibrated scores where the model has
        them. Received tensors are never written to.

        Prompts are decoded in chunks, so that memory does not grow with their number. Prompts that attend to each other
        stay in one chunk, so results do not depend on the chunks.
        """
        if (inputs := output.decoder_inputs.get(self.name)) is None:
            return []
        if isinstance(self.decoder, ImageDecoder):
            return self._draw(self.decoder, inputs)
        results: list[DecoderResult] = [None] * len(inputs.link)
        raw_settings = self._raw(settings, inputs.prompts)
        for members in self._chunks(inputs, output):
            between_passes()
            link, images = inputs.link.select_with_images(members)
            frames = [self._decoder_frame(output.frames[i]) for i in images.tolist()]
            view: Tensor | Pixels | None = None
            if self.decoder.reads == "dense":
                assert output.dense is not None, f"'{self.name}' reads dense features"
                view = output.dense[images].to(self.device)
            elif self.decoder.reads == "pixels":
                view = self._pixels(inputs, members, link, [frame.extent for frame in frames])
            raw = self.decoder(link.to(self.device), view)
            prompts = [inputs.prompts[i] for i in members.tolist()]
            predictions = self.decoder.predict(raw, frames, prompts, raw_settings)
            for i, prompt, prediction in zip(members.tolist(), prompts, predictions, strict=True):
                results[i] = self._calibrated(prediction, prompt, settings)
        return results

    def _raw(self, settings: PredictSettings, prompts: Sequence[PromptSpec | None]) -> PredictSettings:
        """Settings whose threshold is of the decoder's own scores: the lowest of all prompts."""
        thresholds = [
            curve.raw(settings.score_threshold, prompt.phrase)
            if (curve := self.calibration.curve(prompt.task, self.name)) is not None
            else settings.score_threshold
            for prompt in prompts
            if prompt is not None
        ]
        return replace(settings, score_threshold=min(thresholds, default=settings.score_threshold))

    def _calibrated(
        self, prediction: Prediction | None, prompt: PromptSpec | None, settings: PredictSettings
    ) -> Prediction | None:
        """The prediction with calibrated scores, above the threshold."""
        if prediction is None or prompt is None or not self.calibration.curves:
            return prediction
        if (curve := self.calibration.curve(prompt.task, self.name)) is not None:
            prediction = replace(prediction, scores=curve(prediction.scores, prompt.phrase))
        return prediction.above(settings.score_threshold)

    def _draw(self, decoder: ImageDecoder, inputs: DecoderInput) -> list[DecoderResult]:
        """The pictures of every prompt; prompts with the same settings are sampled together."""
        results: list[DecoderResult] = [None] * len(inputs.link)
        by_settings: dict[SampleSettings, list[int]] = {}
        for i, prompt in enumerate(inputs.prompts):
            assert prompt is not None and prompt.sample is not None, "a prompt for pictures has sample settings"
            sample = prompt.sample
            if inputs.pixels:  # an edit is drawn at the size of the picture it starts from
                _, height, width = inputs.pixels[i].shape
                sample = replace(sample, size=(height, width))
            by_settings.setdefault(sample, []).append(i)
        for sample, members in by_settings.items():
            link, _ = inputs.link.select_with_images(torch.tensor(members))
            view = self._pixels(inputs, torch.tensor(members), link) if inputs.pixels else None
            drawn = decoder.sample(link.to(self.device), view, sample)
            pictures = drawn.permute(0, 2, 3, 1).cpu().numpy()
            for number, i in enumerate(members):
                results[i] = list(pictures[number * sample.num_images : (number + 1) * sample.num_images])
        return results

    def passes(self, output: TrunkOutput) -> int:
        """The number of passes for this output alone, of pictures their steps; 0 if it has no link of this decoder."""
        if (inputs := output.decoder_inputs.get(self.name)) is None:
            return 0
        if not isinstance(self.decoder, ImageDecoder):
            return len(self._chunks(inputs, output))
        samples = [prompt.sample for prompt in inputs.prompts if prompt is not None and prompt.sample is not None]
        return sum(sample.steps * math.ceil(sample.num_images / sample.batch_size) for sample in samples)

    def _chunks(self, inputs: DecoderInput, output: TrunkOutput) -> list[Tensor]:
        """Indices of the links of each pass."""
        assert not isinstance(self.decoder, ImageDecoder)
        if self.decoder.reads == "pixels":
            each = padded_pixels((image.shape[1], image.shape[2]) for image in inputs.pixels)
            return inputs.link.group_chunks(max(1, min(MAX_DECODER_GROUPS, MAX_DECODER_PIXELS // each)))
        if not self.decoder.independent:
            return inputs.link.group_chunks(MAX_DECODER_GROUPS)
        cells = 1 if output.dense is None else output.dense.shape[-2] * output.dense.shape[-1]
        return inputs.link.chunks(max(1, MAX_DECODER_CELLS // cells))

    def _decoder_frame(self, frame: Frame) -> Frame:
        """The frame of an image in this decoder's input, from its frame in the trunk's."""
        if self.input_rule is None:
            return frame
        size, (scale, _) = self.input_rule.fit(frame.size)
        return Frame(frame.size, scale, size)

    def _pixels(
        self, inputs: DecoderInput, members: Tensor, link: SuperLink, extents: list[Size] | None = None
    ) -> Pixels:
        """The images of the prompts at `members`; `link.image_index` counts among these images."""
        images = dict(zip(link.image_index.tolist(), (inputs.pixels[i] for i in members.tolist()), strict=True))
        return Pixels.stack([images[i] for i in range(len(images))], extents).to(self.device)


class DecoderStages(Mapping[str, DecoderStage]):
    """The stages of a model's decoders. Each is made on first use, which may read its weights."""

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
