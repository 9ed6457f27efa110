"""Shard rows -> one training batch: which prompts an image gets, and what each should find.

Everything an image is annotated for becomes branches of one pass: classes (present and absent ones), phrases, poses,
captions, questions. What is drawn depends only on the random generator given, so a resumed run sees the same batch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lumen_ray.data.batches.decoder_inputs import Shown, as_pixels, asked_images
from lumen_ray.data.batches.negatives import choose_classes, draw
from lumen_ray.data.batches.packing import Packing, fit_branches, pack
from lumen_ray.data.batches.region_prompts import drawn_region, region_input, region_visible
from lumen_ray.data.batches.transforms import Sample, as_picture, mask_shape, picture_of, transform
from lumen_ray.data.images import Picture
from lumen_ray.input_size import SizeRule
from lumen_ray.keypoints import DEFAULT_SIGMA, keypoint_sigmas
from lumen_ray.recipe import AugmentSettings, BranchSettings
from lumen_ray.structures import Size, as_size
from lumen_ray.targets import ImageTargets, PerceptionTargets, Pixels
from lumen_ray.tasks import DECODERS, TASKS
from lumen_ray.trunk.branch import Branch
from lumen_ray.trunk.layout import Layout, build_layout
from lumen_ray.trunk.regions import region_mask
from lumen_ray.trunk.tokenizer import LumenTokenizer

CLASS_TASKS = ("detect", "segment", "count")  # one box target each; they differ in wording and routing token
TEXT_TASKS = tuple(name for name, task in TASKS.items() if task.is_text)


@dataclass
class Want:
    """What a branch asks of a decoder: indices into the sample's instances, or a keypoint of them; or a picture as
    large as the image, of which it asks for what the sample shows, and the `text` that says what is to be seen or
    changed, without a prompt around it."""

    instances: list[int] = field(default_factory=list)
    keypoint: int = -1
    sigma: float = DEFAULT_SIGMA
    picture: Picture | None = None
    text: str = ""


@dataclass
class Prompts:
    """The branches of a batch while they are collected."""

    branches: list[Branch] = field(default_factory=list)
    tasks: list[str] = field(default_factory=list)
    wants: list[Want | None] = field(default_factory=list)
    regions: list[np.ndarray] = field(default_factory=list)
    region_images: list[int] = field(default_factory=list)
    _requests: dict[tuple, int] = field(default_factory=dict)

    def add(self, task: str, branch: Branch, want: Want | None = None, request: str = "") -> int:
        """The prompt's number. Those of an image with the same `request` are one group, as where a user asks for them
        at once; a keypoint prompt is in its object's, any other in one of its own."""
        if branch.parent >= 0:
            group = self.branches[branch.parent].group
        else:
            asked = (branch.image, request) if request else (len(self.branches),)
            group = self._requests.setdefault(asked, len(self._requests))
        self.branches.append(replace(branch, group=group))
        self.tasks.append(task)
        self.wants.append(want)
        return len(self.branches) - 1

    def replace(self, branches: Sequence[Branch | None]) -> None:
        """Other branches in place of those collected; the ones that are None are taken out."""
        place = np.cumsum([branch is not None for branch in branches]) - 1
        kept = [i for i, branch in enumerate(branches) if branch is not None]
        parents = [int(place[branches[i].parent]) if branches[i].parent >= 0 else -1 for i in kept]
        self.branches = [replace(branches[i], parent=parent) for i, parent in zip(kept, parents, strict=True)]
        self.tasks = [self.tasks[i] for i in kept]
        self.wants = [self.wants[i] for i in kept]


def instances_of(phrase: str, row: dict[str, Any], sample: Sample) -> list[int]:
    """Indices into the sample of the instances whose class is `phrase`."""
    return [n for n, i in enumerate(sample.kept) if row["instances"][i]["phrase"] == phrase]


def add_classes(
    prompts: Prompts,
    image: int,
    row: dict,
    sample: Sample,
    tasks: Sequence[str],
    s: BranchSettings,
    rng: np.random.Generator,
    frequencies: Mapping[str, int] = MappingProxyType({}),
) -> None:
    """Class prompts: those of `choose_classes`, present and absent, as one request of a task drawn at random."""
    tasks = [t for t in tasks if t in CLASS_TASKS]
    if not tasks:
        return
    visible = list(dict.fromkeys(row["instances"][i]["phrase"] for i in sample.kept))
    task = TASKS[tasks[int(rng.integers(len(tasks)))]]
    for phrase in choose_classes(row, visible, s, frequencies, rng):
        text = task.prompt(phrase, int(rng.integers(len(task.templates))))
        want = Want(instances_of(phrase, row, sample))
        prompts.add(task.name, Branch(image, text, route=task.routing_token), want, request=task.name)


def add_poses(
    prompts: Prompts,
    image: int,
    row: dict,
    sample: Sample,
    skeletons: dict[str, tuple[str, ...]],
    s: BranchSettings,
    rng: np.random.Generator,
) -> None:
    """Pose prompts of classes with a skeleton, present with keypoints or absent: an object branch and one branch per
    keypoint name."""
    task = TASKS["pose"]
    with_pose = {row["instances"][i]["phrase"] for n, i in enumerate(sample.kept) if sample.keypoints[n] is not None}
    seen = {instance["phrase"] for instance in row["instances"]}
    annotated = [c for c in skeletons if c in row["classes"]]
    chosen = draw([c for c in annotated if c in with_pose], s.max_poses, rng)
    for phrase in chosen + draw([c for c in annotated if c not in seen], s.absent_poses, rng):
        found = instances_of(phrase, row, sample)
        text = task.prompt(phrase, int(rng.integers(len(task.templates))))
        parent = prompts.add("pose", Branch(image, text, route=task.routing_token), Want(found), request="pose")
        sigmas = keypoint_sigmas(skeletons[phrase])
        for k, name in enumerate(skeletons[phrase]):
            text = task.keypoint_template.replace("{keypoint}", name).replace("{}", phrase)
            prompts.add("pose", Branch(image, text, route=task.routing_token, parent=parent), Want(found, k, sigmas[k]))


def add_phrases(
    prompts: Prompts,
    image: int,
    row: dict,
    sample: Sample,
    tasks: Sequence[str],
    s: BranchSettings,
    rng: np.random.Generator,
) -> None:
    """Referring expressions and grounded phrases, those with nothing to find included."""
    place = {int(i): n for n, i in enumerate(sample.kept)}
    usable = [
        p
        for p in row["phrases"]
        if p["task"] in tasks and (not p["instances"] or any(i in place for i in p["instances"]))
    ]
    for item in draw(usable, s.max_phrases, rng):
        task = TASKS[item["task"]]
        text = task.prompt(item["phrase"], int(rng.integers(len(task.templates))))
        want = Want([place[i] for i in item["instances"] if i in place])
        request = task.name if task.needs == "sentence" else ""  # which names all its phrases at once
        prompts.add(task.name, Branch(image, text, route=task.routing_token), want, request)


def add_region_segments(
    prompts: Prompts, image: int, row: dict, sample: Sample, s: BranchSettings, rng: np.random.Generator
) -> None:
    """Instances with a mask, asked for by a box, a point, a scribble or a polygon on them."""
    task = TASKS["region_segment"]
    usable = [n for n, mask in enumerate(sample.masks) if mask is not None and mask.any() and not sample.crowd[n]]
    for n in draw(usable, s.max_regions, rng):
        size = sample.image.shape[:2]
        region = drawn_region(sample.masks[n], sample.boxes[n], size, rng)
        prompts.regions.append(region_mask(region, size))
        prompts.region_images.append(image)
        text = task.prompt(template=int(rng.integers(len(task.templates))))
        branch = Branch(image, text, route=task.routing_token, regions=(len(prompts.regions) - 1,))
        prompts.add(task.name, branch, Want([n]))


def add_messages(
    prompts: Prompts,
    image: int,
    row: dict,
    sample: Sample,
    tasks: Sequence[str],
    s: BranchSettings,
    rng: np.random.Generator,
) -> None:
    """Captions, questions and chats; each `<region>` becomes a mask of the model input.

    A message about a region that was cropped away is left out.
    """
    visible = [region_visible(region, sample) for region in row["regions"]]
    tasks = [task for task in tasks if task in TEXT_TASKS]
    usable = [m for m in row["messages"] if m["task"] in tasks and all(visible[r] for r in m["regions"])]
    for message in draw(usable, s.max_messages, rng):
        history, prompt, response = exchanges(message["turns"])
        first = len(prompts.regions)
        for index in message["regions"]:
            prompts.regions.append(region_input(sample, row["regions"][index]))
            prompts.region_images.append(image)
        regions = tuple(range(first, len(prompts.regions)))
        branch = Branch(image, prompt, response=response, regions=regions, history=history)
        prompts.add(message["task"], branch)


def add_generation(prompts: Prompts, image: int, row: dict, picture: Picture, rng: np.random.Generator) -> None:
    """A caption of the row as the description of its picture, which the prompt does not see."""
    captions = [m["turns"][-1]["content"] for m in row["messages"] if m["task"] == "caption"]
    for caption in draw(captions, 1, rng):
        task = TASKS["generate"]
        text = task.prompt(caption, int(rng.integers(len(task.templates))))
        want = Want(picture=picture, text=caption)
        prompts.add(task.name, Branch(image, text, route=task.routing_token), want)


def add_edits(prompts: Prompts, image: int, row: dict, edited: Picture, rng: np.random.Generator) -> None:
    """The row's instructions, and the edited picture."""
    task = TASKS["edit"]
    for message in row["messages"]:
        if message["task"] == "edit":
            instruction = message["turns"][0]["content"]
            text = task.prompt(instruction, int(rng.integers(len(task.templates))))
            want = Want(picture=edited, text=instruction)
            prompts.add(task.name, Branch(image, text, route=task.routing_token), want)


def exchanges(turns: Sequence[dict[str, str]]) -> tuple[tuple[tuple[str, str], ...], str, str]:
    """(earlier (instruction, response) pairs, last instruction, last response) of turns that alternate."""
    texts = [turn["content"] for turn in turns]
    *earlier, last = zip(texts[::2], texts[1::2], strict=True)
    return tuple(earlier), *last


def perception_targets(prompts: Prompts, samples: list[Sample | None], members: list[int]) -> PerceptionTargets:
    """Targets of the given branches (those that are links of the perception family), padded to the most instances.

    Those about an image without a sample have none. Masks of samples of different sizes are padded to the largest.
    """
    wants = [prompts.wants[b] for b in members]
    most = max([len(w.instances) for w in wants] + [1])
    boxes = np.zeros((len(members), most, 4), np.float32)
    valid, crowd = np.zeros((2, len(members), most), bool)
    mask_index, instance = np.full((2, len(members), most), -1)
    keypoints = np.zeros((len(members), most, 3), np.float32)
    masks: list[np.ndarray] = []
    stored: dict[tuple[int, int], int] = {}  # an instance asked for by several prompts keeps one mask
    for row, (branch, want) in enumerate(zip(members, wants, strict=True)):
        image = prompts.branches[branch].image
        sample = samples[image]
        for g, n in enumerate(want.instances if sample else ()):
            boxes[row, g], valid[row, g], crowd[row, g] = sample.boxes[n], True, sample.crowd[n]
            instance[row, g] = n
            if sample.masks[n] is not None and not sample.crowd[n]:
                if (image, n) not in stored:
                    stored[image, n] = len(masks)
                    masks.append(sample.masks[n])
                mask_index[row, g] = stored[image, n]
            if want.keypoint >= 0 and sample.keypoints[n] is not None:
                keypoints[row, g] = sample.keypoints[n][want.keypoint]
    sides = [mask_shape(sample.image.shape[:2]) for sample in samples if sample]
    stack = np.zeros((len(masks), *map(max, zip(*sides, strict=True))), np.uint8)
    for place, mask in zip(stack, masks, strict=True):
        place[: mask.shape[0], : mask.shape[1]] = mask
    counted = torch.tensor([w.keypoint < 0 for w in wants])
    arrays = (torch.from_numpy(a) for a in (boxes, valid, crowd, mask_index, stack, keypoints))
    sigma = torch.tensor([w.sigma for w in wants])
    return PerceptionTargets(*arrays, counted, torch.from_numpy(instance), sigma)


def image_targets(
    prompts: Prompts, samples: list[Sample], members: list[int], tokenizer: LumenTokenizer, rule: SizeRule
) -> ImageTargets:
    """Targets of the given branches, which ask for pictures, in the size of a rule."""
    wants = [(prompts.wants[b], samples[prompts.branches[b].image]) for b in members]
    pictures = as_pixels([picture_of(sample, want.picture, rule) for want, sample in wants])
    return ImageTargets(pictures.images, pictures.extents, tokenizer.caption_ids([want.text for want, _ in wants]))


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
    own_sizes: dict[str, SizeRule] = field(default_factory=dict)  # of decoders; those that make pictures need one

    def __call__(
        self,
        rows: list[dict],
        images: list[np.ndarray | Picture | None],
        rngs: list[np.random.Generator],
        edited: list[np.ndarray | Picture | None] | None = None,
    ) -> dict:
        """The batch `Generalist.forward` takes. `images`: decoded, None for text-only rows; `edited`: the target images
        of rows that have one. `targets` are by family of decoders, in the frame of `images`; a decoder with a size of
        its own has its own `pixels`, and targets in their frame.

        To generate, prompts see no image: those of the rows are what they should give, and so they are not augmented.

        Packed, rows with an image come first, and the batch's `images` are theirs alone (one grey where there is none).
        """
        edited = edited or [None] * len(rows)
        if self.packing:
            order = sorted(range(len(rows)), key=lambda i: images[i] is None)
            rows, images, rngs, edited = ([values[i] for i in order] for values in (rows, images, rngs, edited))
        grey = np.full((8, 8, 3), 114, np.uint8)
        pictures = [as_picture(grey if image is None else image) for image in images]
        prompts, samples = Prompts(), []
        blind = not all(TASKS[task].sees_image for task in self.tasks)
        for index, (row, image, rng) in enumerate(zip(rows, images, rngs, strict=True)):
            editing = "edit" in self.tasks and edited[index] is not None
            # other colours before and after would be another edit
            augment = self.augment.model_copy(update={"color": 0.0}) if editing else self.augment
            augment = AugmentSettings() if blind else augment  # else it learns to draw borders, and colours unsaid
            sample = transform(row, pictures[index], self.input_size, augment, rng, self.skeletons)
            samples.append(sample)
            if blind and image is not None:
                add_generation(prompts, index, row, pictures[index], rng)
            if editing:
                add_edits(prompts, index, row, as_picture(edited[index]), rng)
            add_classes(prompts, index, row, sample, self.tasks, self.branches, rng, self.frequencies)
            if "pose" in self.tasks:
                add_poses(prompts, index, row, sample, self.skeletons, self.branches, rng)
            add_phrases(prompts, index, row, sample, self.tasks, self.branches, rng)
            if "region_segment" in self.tasks:
                add_region_segments(prompts, index, row, sample, self.branches, rng)
            add_messages(prompts, index, row, sample, self.tasks, self.branches, rng)
        has_image = torch.tensor([image is not None and not blind for image in images])
        truncated = self._truncate(prompts, has_image) if self.packing else {}
        layout = build_layout(prompts.branches, len(rows), self.tokenizer, self.prompt_layout)
        number = len(rows)
        if self.packing:
            layout.pack = pack(layout, has_image, self.packing)
            number = max(1, int(has_image.sum()))
        pixels, targets = self._given(prompts, Shown(rows, pictures, samples), layout, number)
        shown = samples[:number]
        masks = np.stack(prompts.regions) if prompts.regions else np.zeros((0, *as_size(self.input_size)), np.uint8)
        return {
            "images": torch.from_numpy(np.stack([s.image for s in shown])).permute(0, 3, 1, 2).contiguous(),
            "extents": torch.tensor([s.extent for s in shown]),
            "pixels": pixels,
            "has_image": has_image,
            "layout": layout,
            "region_masks": torch.from_numpy(masks),
            "region_images": torch.tensor(prompts.region_images, dtype=torch.int64),
            "targets": targets,
            "tasks": prompts.tasks,
            "image_ids": [row["image_id"] for row in rows],
            "truncated": truncated,
        }

    def _given(
        self, prompts: Prompts, shown: Shown, layout: Layout, number: int
    ) -> tuple[dict[str, Pixels], dict[str, PerceptionTargets | ImageTargets]]:
        """What decoders with a size of their own look at, of the first `number` images, and targets: by family, and of
        those decoders."""
        pixels: dict[str, Pixels] = {}
        targets: dict[str, PerceptionTargets | ImageTargets] = {}
        links = {family: members.tolist() for family, members in layout.link_branches.items()}
        if "perception" in links:
            targets["perception"] = perception_targets(prompts, shown.samples, links["perception"])
        of_rule: dict[SizeRule, list[str]] = {}
        for name, rule in self.own_sizes.items():
            if (family := DECODERS[name].family) not in links:
                continue
            if family == "perception":
                of_rule.setdefault(rule, []).append(name)
                continue
            targets[family] = image_targets(prompts, shown.samples, links[family], self.tokenizer, rule)
            if family == "editing":
                sources = shown.pictured(asked_images(layout, prompts.tasks, name), rule)
                pixels[name] = as_pixels(sources[:number])
        for rule, names in of_rule.items():
            asked = set().union(*(asked_images(layout, prompts.tasks, name) for name in names))
            if asked:
                own = shown.resized(asked, rule, self.skeletons)
                found = perception_targets(prompts, own, links["perception"])
                pixels |= dict.fromkeys(names, as_pixels([sample and sample.image for sample in own[:number]]))
                targets |= dict.fromkeys(names, found)
        return pixels, targets

    def _truncate(self, prompts: Prompts, has_image: Tensor) -> dict[str, int]:
        """Makes the prompts of each sample fit into a packed row; what was lost, where anything was."""
        tokens = (has_image.long() * self.packing.image_tokens).tolist()
        kept, lost = fit_branches(prompts.branches, tokens, self.packing.tokens, self.tokenizer)
        if not any(lost.values()):
            return {}
        prompts.replace(kept)
        return lost
