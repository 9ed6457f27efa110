"""Grounding DINO: detection by this package's engine, against `transformers`."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from transformers import (
    BertConfig,
    BertTokenizer,
    GroundingDinoForObjectDetection,
    GroundingDinoImageProcessorPil,
    GroundingDinoProcessor,
)

from lumen_ray.answer import Answer
from lumen_ray.bench.timing import Result, SidesDiffer, in_turns
from lumen_ray.checkpoints.rules import apply
from lumen_ray.data.images import decode
from lumen_ray.data.scenes import render as scenes
from lumen_ray.decoders.dino.transformer import library_config
from lumen_ray.decoders.grounding_dino.decoder import GroundingDinoDecoder
from lumen_ray.decoders.grounding_dino.released import published_parts
from lumen_ray.decoders.grounding_dino.settings import GroundingDinoSettings
from lumen_ray.decoders.registry import DECODERS
from lumen_ray.inference.engine import Engine
from lumen_ray.inference.request import Request, make_request
from lumen_ray.model.build import LoadedModel, ModelMeta, build_model
from lumen_ray.model.settings import ModelSettings
from lumen_ray.tasks import TASKS
from lumen_ray.trunk.tokenizer import LumenTokenizer

AIM = 1.0
TOLERANCE = 1e-4
BATCHES = (1, 8)
SIDE, STORED_SIDE = 96, 128  # side of the model input and of the images, pixels
DECODER = "grounding_dino"
VISION = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "patch_size": 16,
}
WORDS = ("circle", "square", "triangle", "star", "figure", "ring", "cross", "heart")  # a class each
#: ids that `transformers` expects in a BERT vocabulary
SPECIAL = {"[PAD]": 0, "[UNK]": 100, "[CLS]": 101, "[SEP]": 102, "[MASK]": 103, ".": 1012, "?": 1029}
THRESHOLD = 0.3
SETTINGS = GroundingDinoSettings(
    backbone={"embed_dim": 16, "depths": [1, 1, 1, 1], "num_heads": [1, 2, 2, 4], "window_size": 4},
    hidden_size=32,
    num_heads=4,
    encoder_layers=1,
    decoder_layers=2,
    encoder_ffn=64,
    decoder_ffn=64,
    num_queries=20,
    mask_channels=32,
)


@dataclass
class Library:
    """`transformers`' processor and model."""

    processor: GroundingDinoProcessor
    model: GroundingDinoForObjectDetection

    @classmethod
    def fresh(cls, settings: GroundingDinoSettings) -> Library:
        vocabulary = SPECIAL | {word: 2000 + i for i, word in enumerate(WORDS)}
        config: Any = library_config(settings)
        config.backbone_config.out_features = ["stage2", "stage3", "stage4"]
        config.text_config = BertConfig(
            vocab_size=2000 + len(WORDS),
            hidden_size=settings.hidden_size,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=64,
        )
        images = GroundingDinoImageProcessorPil(size={"shortest_edge": SIDE, "longest_edge": SIDE})
        processor = GroundingDinoProcessor(images, BertTokenizer(vocabulary))
        return cls(processor, GroundingDinoForObjectDetection(config).eval())

    def inputs(self, images: list[np.ndarray]) -> dict[str, Tensor]:
        return self.processor(images=images, text=[list(WORDS)] * len(images), return_tensors="pt")

    @torch.inference_mode()
    def detect(self, images: list[np.ndarray]) -> list[dict[str, Tensor]]:
        inputs = self.inputs(images)
        sizes = [image.shape[:2] for image in images]
        processor: Any = self.processor  # its type hints lack tensors
        return processor.post_process_grounded_object_detection(
            self.model(**inputs), inputs["input_ids"], THRESHOLD, THRESHOLD, sizes
        )


@dataclass
class Ours:
    """The engine of a model whose only decoder has the weights of `transformers`' model, and whose LLM has the size of
    its text encoder. It also runs a vision encoder, which the other side does not have."""

    engine: Engine
    request: Request

    @classmethod
    def like(cls, library: Library, settings: GroundingDinoSettings) -> Ours:
        text: Any = library.model.config.text_config
        llm = {
            "model_type": "llama",
            "hidden_size": text.hidden_size,
            "intermediate_size": text.intermediate_size,
            "num_hidden_layers": text.num_hidden_layers,
            "num_attention_heads": text.num_attention_heads,
            "num_key_value_heads": text.num_attention_heads,
        }
        vision = {"clip": VISION, "dinov2": None, "clip_layers": "last"}
        sections: dict[str, Any] = dict.fromkeys(DECODERS) | {DECODER: settings}
        preset = ModelSettings(name="bench", image_size=SIDE, vision=vision, llm=llm, **sections)
        tokenizer = LumenTokenizer.train([*WORDS, *TASKS["detect"].templates] * 2, preset.vocab_size, preset.families)
        model = build_model(preset, len(tokenizer))
        state, _ = apply(library.model.state_dict(), published_parts())
        model.decoders[DECODER].load_state_dict(state, strict=False)  # theirs has no mask head; boxes need none
        loaded = LoadedModel(model.eval(), preset, tokenizer, ModelMeta("bench", classes=list(WORDS)), "")
        return cls(Engine(loaded), make_request("detect", classes=list(WORDS)))

    @property
    def decoder(self) -> GroundingDinoDecoder:
        return cast(GroundingDinoDecoder, self.engine.loaded.model.decoders[DECODER])

    def detect(self, images: list[np.ndarray]) -> list[list[Answer]]:
        return self.engine.run(images, [[self.request]] * len(images), score_threshold=THRESHOLD)


@torch.inference_mode()
def difference(library: Library, ours: Ours, images: list[np.ndarray]) -> float:
    """Largest difference of logits and boxes, with the pixels and text features of `transformers` on both sides."""
    inputs = library.inputs(images)
    features: dict[str, Tensor] = {}  # arguments of the encoder
    encoder = library.model.model.encoder
    hook = encoder.register_forward_pre_hook(lambda _, args, kwargs: features.update(kwargs), with_kwargs=True)
    theirs = library.model(**inputs)
    hook.remove()
    trunk, pixels = ours.decoder.trunk, inputs["pixel_values"]
    memory = trunk.encode(
        trunk.extract_features(pixels, [(pixels.shape[-2], pixels.shape[-1])] * len(pixels)),
        torch.arange(len(pixels)),
        features["text_features"],
        ~features["text_attention_mask"],
        features["text_position_ids"],
        features["text_self_attention_masks"],
    )
    last = ours.decoder.decode(memory)[1][-1]
    logits = theirs.logits[..., : last.logits.shape[-1]]
    apart = [(last.boxes - theirs.pred_boxes).abs().max(), (last.logits - logits).nan_to_num().abs().max()]
    return float(torch.stack(apart).max())


def bench(*, turns: int = 5, repeats: int = 10, threads: int | None = None) -> Iterator[Result]:
    """Images per second of both sides for every batch size. Raises `SidesDiffer` if their results differ."""
    threads = threads or torch.get_num_threads()
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            library = Library.fresh(SETTINGS)
            ours = Ours.like(library, SETTINGS)
            for size in BATCHES:
                yield _speed(library, ours, size, turns, repeats, threads)
    finally:
        torch.set_num_threads(before)


def _speed(library: Library, ours: Ours, batch_size: int, turns: int, repeats: int, threads: int) -> Result:
    images = [decode(scenes.scene_row(0, i, STORED_SIDE)["image"]) for i in range(batch_size)]
    worst = difference(library, ours, images)
    if not worst <= TOLERANCE:
        raise SidesDiffer(f"our decoder and transformers differ by {worst:.2e}, more than {TOLERANCE:g}")

    def rate(detect: Callable[[list[np.ndarray]], object]) -> float:
        detect(images)  # warms up
        began = time.perf_counter()
        for _ in range(repeats):
            detect(images)
        return repeats * batch_size / (time.perf_counter() - began)

    return Result(
        f"grounding_dino/batch {batch_size}",
        "images/s",
        in_turns({"engine": lambda: rate(ours.detect), "transformers": lambda: rate(library.detect)}, turns),
        AIM,
        equal=f"logits and boxes to {worst:.1e} (at most {TOLERANCE:g}), given the same text features",
        budget=f"{threads} threads",
        details={"classes": len(WORDS), "input": SIDE},
    )
