"""Collates shard rows to a training batch: images, prompts and targets, as tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lumen_ray.data.batches.decoder_inputs import BatchImages, as_pixels, prompted_images
from lumen_ray.data.batches.example_pool import ExamplePool
from lumen_ray.data.batches.packing import Packing, fit_branches, num_images, pack
from lumen_ray.data.batches.prompts import PromptBatch, SamplePrompts
from lumen_ray.data.batches.transforms import (
    PAD_VALUE,
    Sample,
    fit_matrix,
    mask_shape,
    picture_of,
    transform,
    warp,
)
from lumen_ray.data.images import Picture, as_picture
from lumen_ray.decoders.registry import DECODERS
from lumen_ray.input_size import PictureSize, SizeRule
from lumen_ray.recipe import AugmentSettings, BranchSettings
from lumen_ray.structures import Size, as_size
from lumen_ray.targets import ImageTargets, PerceptionTargets, Pixels
from lumen_ray.tasks import TASKS
from lumen_ray.trunk.batch import TrainingBatch
from lumen_ray.trunk.layout import Layout, build_layout
from lumen_ray.trunk.tokenizer import LumenTokenizer


def perception_targets(prompts: PromptBatch, samples: Sequence[Sample | None], members: list[int]) -> PerceptionTargets:
    """Targets of the links of the perception family, padded to the most instances; `members`: the branch of each.

    Branches of an image whose sample is None have no instances. Masks of different sizes are padded to the largest.
    """
    wanted = prompts.link_targets(members)
    most = max([len(target.instances) for target in wanted] + [1])
    boxes = np.zeros((len(members), most, 4), np.float32)
    valid, crowd = np.zeros((2, len(members), most), bool)
    mask_index, instance = np.full((2, len(members), most), -1)
    keypoints = np.zeros((len(members), most, 3), np.float32)
    masks: list[np.ndarray] = []
    stored: dict[tuple[int, int], int] = {}  # (image, instance) -> its mask, which all its prompts share
    for row, (branch, target) in enumerate(zip(members, wanted, strict=True)):
        image = prompts.branches[branch].image
        sample = samples[image]
        if sample is None:
            continue
        for g, n in enumerate(target.instances):
            boxes[row, g], valid[row, g], crowd[row, g] = sample.boxes[n], True, sample.crowd[n]
            instance[row, g] = n
            if (mask := sample.masks[n]) is not None and not sample.crowd[n]:
                if (image, n) not in stored:
                    stored[image, n] = len(masks)
                    masks.append(mask)
                mask_index[row, g] = stored[image, n]
            if target.keypoint >= 0 and (points := sample.keypoints[n]) is not None:
                keypoints[row, g] = points[target.keypoint]
    sides = [mask_shape(sample.image.shape[:2]) for sample in samples if sample]
    stack = np.zeros((len(masks), *map(max, zip(*sides, strict=True))), np.uint8)
    for padded, mask in zip(stack, masks, strict=True):
        padded[: mask.shape[0], : mask.shape[1]] = mask
    return PerceptionTargets(
        boxes=torch.from_numpy(boxes),
        valid=torch.from_numpy(valid),
        crowd=torch.from_numpy(crowd),
        mask_index=torch.from_numpy(mask_index),
        masks=torch.from_numpy(stack),
        keypoints=torch.from_numpy(keypoints),
        counted=torch.tensor([target.keypoint < 0 for target in wanted]),
        instance=torch.from_numpy(instance),
        sigma=torch.tensor([target.sigma for target in wanted]),
    )


def image_targets(
    prompts: PromptBatch, samples: Sequence[Sample], members: list[int], tokenizer: LumenTokenizer, rule: SizeRule
) -> ImageTargets:
    """Targets of the generation or editing branches at `members`, in the size that `rule` gives."""
    pictures = []
    for target, sample in ((prompts.target(b), samples[prompts.branches[b].image]) for b in members):
        assert target.picture is not None  # all prompts of these tasks have one
        pictures.append(picture_of(sample, target.picture, rule))
    pixels = as_pixels(pictures)
    return ImageTargets(pixels.images, pixels.extents, tokenizer.caption_ids([prompts.target(b).text for b in members]))


#: the image of a text-only row
GREY = np.full((8, 8, 3), PAD_VALUE, np.uint8)


@dataclass
class Collator:
    """Makes a batch of rows, with a random generator for each. Holds plain settings, so that Ray can ship it."""

    tokenizer: LumenTokenizer
    input_size: int | Size  # (height, width) in pixels, or the side of a square
    tasks: tuple[str, ...]
    skeletons: dict[str, tuple[str, ...]]
    branches: BranchSettings = BranchSettings()
    augment: AugmentSettings = AugmentSettings()
    frequencies: dict[str, int] = field(default_factory=dict)  # images per class, which weight the negatives
    packing: Packing | None = None
    prompt_layout: str = "branches"  # the model's
    input_rules: dict[str, SizeRule] = field(default_factory=dict)  # by decoder; those that draw pictures need one
    links_see_image: bool = True  # the model's

    def __call__(
        self,
        rows: Sequence[dict[str, Any]],
        images: Sequence[np.ndarray | Picture | None],
        rngs: Sequence[np.random.Generator],
        edited: Sequence[np.ndarray | Picture | None] | None = None,
        further: Sequence[Sequence[np.ndarray | Picture]] | None = None,
    ) -> TrainingBatch:
        """Makes the batch that `Generalist.forward` takes.

        `images`: decoded, None for text-only rows; `edited`: the target images of rows that have one; `further`: the
        further images of each row, all or none, without which its messages about them are left out. Prompts of a
        generation step see no image: the images of the rows are their targets, and are not augmented.

        In a packed batch rows with an image come first, and `images` holds theirs alone (one grey image if there is
        none). A row whose images leave no room for a prompt in a packed row has neither.
        """
        edited = edited or [None] * len(rows)
        blind = not all(TASKS[task].sees_image for task in self.tasks)
        further = further if further and not blind else [()] * len(rows)
        fits = [image is not None and self._fits(1 + len(more)) for image, more in zip(images, further, strict=True)]
        if self.packing:
            order = sorted(range(len(rows)), key=lambda i: not fits[i])
            rows, rngs, fits = [rows[i] for i in order], [rngs[i] for i in order], [fits[i] for i in order]
            images, edited = [images[i] for i in order], [edited[i] for i in order]
            further = [further[i] for i in order]
        pictures = [as_picture(GREY if image is None else image) for image in images]
        prompts, samples = PromptBatch(), []
        targets = list(edited) if "edit" in self.tasks else [None] * len(rows)
        for index, (row, rng) in enumerate(zip(rows, rngs, strict=True)):
            augment = self._augment(blind, editing=targets[index] is not None, several=bool(further[index]))
            samples.append(transform(row, pictures[index], self.input_size, augment, rng, self.skeletons))
        shown = [index for index, fit in enumerate(fits) if fit]
        pool = ExamplePool.of(rows, samples, shown) if self.branches.exemplars and not blind else ExamplePool()
        for index, (row, sample, rng) in enumerate(zip(rows, samples, rngs, strict=True)):
            target = targets[index]
            drawn = SamplePrompts(
                prompts,
                index,
                row,
                sample,
                self.tasks,
                self.branches,
                rng,
                self.skeletons,
                self.frequencies,
                len(further[index]),
                self.links_see_image,
                pool,
            )
            if blind and images[index] is not None:
                drawn.add_generation(pictures[index])
            if target is not None:
                drawn.add_edits(as_picture(target))
            drawn.add_understanding()
        has_image = torch.tensor([fit and not blind for fit in fits])
        if self.packing:
            truncated = self._truncate(prompts, has_image, further, self.packing)
        else:
            truncated = {}
        batch = self._tensors(prompts, BatchImages(rows, pictures, samples), has_image, further)
        return replace(batch, truncated=truncated)

    def _fits(self, images: int) -> bool:
        """Whether that many images of a row leave room for a prompt."""
        return self.packing is None or images * self.packing.image_tokens < self.packing.tokens

    def _augment(self, blind: bool, editing: bool, several: bool) -> AugmentSettings:
        """The augmentation of one row."""
        if several:  # texts compare images by side, size and colour, and name their order
            return AugmentSettings()
        if blind:  # else the decoder would learn to draw padding, and colours that the caption does not name
            return AugmentSettings()
        if editing:  # jitter of the source's colours alone would be part of the edit
            return self.augment.model_copy(update={"color": 0.0})
        return self.augment

    def _tensors(
        self,
        prompts: PromptBatch,
        shown: BatchImages,
        has_image: Tensor,
        further: Sequence[Sequence[np.ndarray | Picture]],
    ) -> TrainingBatch:
        """The batch of the collected prompts and samples."""
        number = len(shown.rows)
        needed = {branch.image for branch in prompts.branches if branch.image_turns}
        further_images = [(row, image) for row in sorted(needed) for image in further[row]]
        further_rows = torch.tensor([row for row, _ in further_images], dtype=torch.int64)
        layout = build_layout(prompts.branches, number, self.tokenizer, self.prompt_layout, has_image)
        if self.packing:
            layout.pack = pack(layout, num_images(has_image, further_rows), self.packing)
            number = max(1, int(has_image.sum()))
        pixels, targets = self._decoder_inputs(prompts, shown, layout, number)
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
            further_images=self._fitted([image for _, image in further_images]),
            further_rows=further_rows,
            image_ids=[row["image_id"] for row in shown.rows],
            sources=[row["source"] for row in shown.rows],
        )

    def _fitted(self, images: Sequence[np.ndarray | Picture]) -> Tensor:
        """Images without augmentation in the input size, uint8 [E, 3, H, W]."""
        fitted = [np.zeros((0, *as_size(self.input_size), 3), np.uint8)]
        for picture in map(as_picture, images):
            matrix = fit_matrix(picture.size, self.input_size)
            fitted.append(warp(picture.pixels, matrix, self.input_size, reduction=picture.reduction)[None])
        return torch.from_numpy(np.concatenate(fitted)).permute(0, 3, 1, 2).contiguous()

    def _decoder_inputs(
        self, prompts: PromptBatch, shown: BatchImages, layout: Layout, number: int
    ) -> tuple[dict[str, Pixels], dict[str, PerceptionTargets | ImageTargets]]:
        """(images by decoder, for decoders with a separate input size, of the first `number` images; targets by
        family, and by those decoders in the frame of their images)."""
        pixels: dict[str, Pixels] = {}
        targets: dict[str, PerceptionTargets | ImageTargets] = {}
        links = {family: members.tolist() for family, members in layout.link_branches.items()}
        if "perception" in links:
            targets["perception"] = perception_targets(prompts, shown.samples, links["perception"])
        of_rule: dict[SizeRule, list[str]] = {}
        for name, rule in self.input_rules.items():
            if (family := DECODERS[name].family) not in links:
                continue
            if not isinstance(rule, PictureSize):
                of_rule.setdefault(rule, []).append(name)
                continue
            drawn = image_targets(prompts, shown.samples, links[family], self.tokenizer, rule)
            targets[name if family in targets else family] = drawn  # a second decoder of a family has its own size
            if DECODERS[name].reads == "pixels":
                sources = shown.pictured(prompted_images(layout, prompts.tasks, name), rule)
                pixels[name] = as_pixels(sources[:number])
        for rule, names in of_rule.items():
            needed: set[int] = set().union(*(prompted_images(layout, prompts.tasks, name) for name in names))
            if needed:
                samples = shown.resized(needed, rule, self.skeletons)
                in_frame = perception_targets(prompts, samples, links["perception"])
                images = [None if sample is None else sample.image for sample in samples[:number]]
                pixels |= dict.fromkeys(names, as_pixels(images))
                targets |= dict.fromkeys(names, in_frame)
        return pixels, targets

    def _truncate(
        self,
        prompts: PromptBatch,
        has_image: Tensor,
        further: Sequence[Sequence[np.ndarray | Picture]],
        packing: Packing,
    ) -> dict[str, int]:
        """Cuts the prompts of each sample to fit a packed row; returns how much was cut, empty if nothing was."""
        # those of a row whose images do not fit count too, so that its prompts are dropped and counted
        shown = [(has or bool(more)) + len(more) for has, more in zip(has_image.tolist(), further, strict=True)]
        tokens = [number * packing.image_tokens for number in shown]
        kept, lost = fit_branches(prompts.branches, tokens, packing.tokens, self.tokenizer)
        if not any(lost.values()):
            return {}
        prompts.replace(kept)
        return lost
