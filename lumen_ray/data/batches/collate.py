"""Shard rows -> one training batch: samples, prompts, and what each prompt should give, as tensors."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lumen_ray.data.batches.decoder_inputs import BatchImages, as_pixels, prompted_images
from lumen_ray.data.batches.packing import Packing, fit_branches, pack
from lumen_ray.data.batches.prompts import PromptBatch, SamplePrompts
from lumen_ray.data.batches.transforms import PAD_VALUE, Sample, as_picture, mask_shape, picture_of, transform
from lumen_ray.data.images import Picture
from lumen_ray.decoders.registry import DECODERS
from lumen_ray.input_size import SizeRule
from lumen_ray.recipe import AugmentSettings, BranchSettings
from lumen_ray.structures import Size, as_size
from lumen_ray.targets import ImageTargets, PerceptionTargets, Pixels
from lumen_ray.tasks import TASKS
from lumen_ray.trunk.batch import TrainingBatch
from lumen_ray.trunk.layout import Layout, build_layout
from lumen_ray.trunk.tokenizer import LumenTokenizer


def perception_targets(prompts: PromptBatch, samples: list[Sample | None], members: list[int]) -> PerceptionTargets:
    """Targets of the given branches (those that are links of the perception family), padded to the most instances.

    Those about an image without a sample have none. Masks of samples of different sizes are padded to the largest.
    """
    wanted = [prompts.targets[b] for b in members]
    most = max([len(target.instances) for target in wanted] + [1])
    boxes = np.zeros((len(members), most, 4), np.float32)
    valid, crowd = np.zeros((2, len(members), most), bool)
    mask_index, instance = np.full((2, len(members), most), -1)
    keypoints = np.zeros((len(members), most, 3), np.float32)
    masks: list[np.ndarray] = []
    stored: dict[tuple[int, int], int] = {}  # an instance asked for by several prompts keeps one mask
    for row, (branch, target) in enumerate(zip(members, wanted, strict=True)):
        image = prompts.branches[branch].image
        sample = samples[image]
        for g, n in enumerate(target.instances if sample else ()):
            boxes[row, g], valid[row, g], crowd[row, g] = sample.boxes[n], True, sample.crowd[n]
            instance[row, g] = n
            if sample.masks[n] is not None and not sample.crowd[n]:
                if (image, n) not in stored:
                    stored[image, n] = len(masks)
                    masks.append(sample.masks[n])
                mask_index[row, g] = stored[image, n]
            if target.keypoint >= 0 and sample.keypoints[n] is not None:
                keypoints[row, g] = sample.keypoints[n][target.keypoint]
    sides = [mask_shape(sample.image.shape[:2]) for sample in samples if sample]
    stack = np.zeros((len(masks), *map(max, zip(*sides, strict=True))), np.uint8)
    for place, mask in zip(stack, masks, strict=True):
        place[: mask.shape[0], : mask.shape[1]] = mask
    counted = torch.tensor([target.keypoint < 0 for target in wanted])
    arrays = (torch.from_numpy(a) for a in (boxes, valid, crowd, mask_index, stack, keypoints))
    sigma = torch.tensor([target.sigma for target in wanted])
    return PerceptionTargets(*arrays, counted, torch.from_numpy(instance), sigma)


def image_targets(
    prompts: PromptBatch, samples: list[Sample], members: list[int], tokenizer: LumenTokenizer, rule: SizeRule
) -> ImageTargets:
    """Targets of the given branches, which ask for pictures, in the size of a rule."""
    wanted = [(prompts.targets[b], samples[prompts.branches[b].image]) for b in members]
    pictures = as_pixels([picture_of(sample, target.picture, rule) for target, sample in wanted])
    return ImageTargets(pictures.images, pictures.extents, tokenizer.caption_ids([target.text for target, _ in wanted]))


#: stands in for the image of a text-only row
GREY = np.full((8, 8, 3), PAD_VALUE, np.uint8)


@dataclass
class Collator:
    """Rows and a random generator per row -> a batch. Plain settings inside, so Ray can ship it to CPU tasks."""

    tokenizer: LumenTokenizer
    input_size: int | Size  # (height, width) in pixels, or the side of a square
    tasks: tuple[str, ...]
    skeletons: dict[str, tuple[str, ...]]
    branches: BranchSettings = BranchSettings()
    augment: AugmentSettings = AugmentSettings()
    frequencies: dict[str, int] = field(default_factory=dict)  # images per class, weighs the negatives
    packing: Packing | None = None
    prompt_layout: str = "branches"  # the model's
    input_rules: dict[str, SizeRule] = field(default_factory=dict)  # of decoders; those that make pictures need one

    def __call__(
        self,
        rows: list[dict[str, Any]],
        images: list[np.ndarray | Picture | None],
        rngs: list[np.random.Generator],
        edited: list[np.ndarray | Picture | None] | None = None,
    ) -> TrainingBatch:
        """Rows -> the batch that `Generalist.forward` takes.

        `images`: decoded, None for text-only rows; `edited`: the target images of rows that have one. Prompts of a
        generation step see no image: those of the rows are their targets, and so they are not augmented.

        Packed, rows with an image come first, and the batch's `images` are theirs alone (one grey where there is none).
        """
        edited = edited or [None] * len(rows)
        if self.packing:
            order = sorted(range(len(rows)), key=lambda i: images[i] is None)
            rows, images, rngs, edited = ([values[i] for i in order] for values in (rows, images, rngs, edited))
        pictures = [as_picture(GREY if image is None else image) for image in images]
        blind = not all(TASKS[task].sees_image for task in self.tasks)
        prompts, samples = PromptBatch(), []
        for index, (row, rng) in enumerate(zip(rows, rngs, strict=True)):
            target = edited[index] if "edit" in self.tasks else None
            augment = self._augment(blind, editing=target is not None)
            sample = transform(row, pictures[index], self.input_size, augment, rng, self.skeletons)
            samples.append(sample)
            about = SamplePrompts(
                prompts, index, row, sample, self.tasks, self.branches, rng, self.skeletons, self.frequencies
            )
            if blind and images[index] is not None:
                about.add_generation(pictures[index])
            if target is not None:
                about.add_edits(as_picture(target))
            about.add_understanding()
        has_image = torch.tensor([image is not None and not blind for image in images])
        return self._tensors(prompts, BatchImages(rows, pictures, samples), has_image)

    def _augment(self, blind: bool, editing: bool) -> AugmentSettings:
        """The augmentation of one row."""
        if blind:  # else the decoder learns to draw borders, and colours that the caption does not name
            return AugmentSettings()
        if editing:  # other colours before and after would be another edit
            return self.augment.model_copy(update={"color": 0.0})
        return self.augment

    def _tensors(self, prompts: PromptBatch, shown: BatchImages, has_image: Tensor) -> TrainingBatch:
        """The collected prompts and samples as a batch."""
        number = len(shown.rows)
        truncated = self._truncate(prompts, has_image, self.packing) if self.packing else {}
        layout = build_layout(prompts.branches, number, self.tokenizer, self.prompt_layout)
        if self.packing:
            layout.pack = pack(layout, has_image, self.packing)
            number = max(1, int(has_image.sum()))
        pixels, targets = self._given(prompts, shown, layout, number)
        samples = shown.samples[:number]
        masks = np.stack(prompts.regions) if prompts.regions else np.zeros((0, *as_size(self.input_size)), np.uint8)
        return TrainingBatch(
            images=torch.from_numpy(np.stack([s.image for s in samples])).permute(0, 3, 1, 2).contiguous(),
            extents=torch.tensor([s.extent for s in samples]),
            has_image=has_image,
            layout=layout,
            tasks=prompts.tasks,
            region_masks=torch.from_numpy(masks),
            region_images=torch.tensor(prompts.region_images, dtype=torch.int64),
            targets=targets,
            pixels=pixels,
            image_ids=[row["image_id"] for row in shown.rows],
            truncated=truncated,
        )

    def _given(
        self, prompts: PromptBatch, shown: BatchImages, layout: Layout, number: int
    ) -> tuple[dict[str, Pixels], dict[str, PerceptionTargets | ImageTargets]]:
        """What decoders with a size of their own look at, of the first `number` images, and targets: by family, and of
        those decoders."""
        pixels: dict[str, Pixels] = {}
        targets: dict[str, PerceptionTargets | ImageTargets] = {}
        links = {family: members.tolist() for family, members in layout.link_branches.items()}
        if "perception" in links:
            targets["perception"] = perception_targets(prompts, shown.samples, links["perception"])
        of_rule: dict[SizeRule, list[str]] = {}
        for name, rule in self.input_rules.items():
            if (family := DECODERS[name].family) not in links:
                continue
            if family == "perception":
                of_rule.setdefault(rule, []).append(name)
                continue
            targets[family] = image_targets(prompts, shown.samples, links[family], self.tokenizer, rule)
            if family == "editing":
                sources = shown.pictured(prompted_images(layout, prompts.tasks, name), rule)
                pixels[name] = as_pixels(sources[:number])
        for rule, names in of_rule.items():
            asked = set().union(*(prompted_images(layout, prompts.tasks, name) for name in names))
            if asked:
                own = shown.resized(asked, rule, self.skeletons)
                found = perception_targets(prompts, own, links["perception"])
                pixels |= dict.fromkeys(names, as_pixels([sample and sample.image for sample in own[:number]]))
                targets |= dict.fromkeys(names, found)
        return pixels, targets

    def _truncate(self, prompts: PromptBatch, has_image: Tensor, packing: Packing) -> dict[str, int]:
        """Cuts the prompts of each sample to fit a packed row; returns what was lost, empty where nothing was."""
        tokens = (has_image.long() * packing.image_tokens).tolist()
        kept, lost = fit_branches(prompts.branches, tokens, packing.tokens, self.tokenizer)
        if not any(lost.values()):
            return {}
        prompts.replace(kept)
        return lost
