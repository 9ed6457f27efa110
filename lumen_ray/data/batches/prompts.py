"""Draws the prompts of a training batch from annotations, with the target of each.

All annotations of an image become branches of one pass: classes (present and absent ones), phrases, poses, captions,
questions. Draws depend only on the random generator and, for classes by example, on the batch's other rows, so a
resumed run gets the same batch.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from lumen_ray.data.batches.example_pool import ExamplePool
from lumen_ray.data.batches.foreign import foreign_names
from lumen_ray.data.batches.negatives import choose_classes, draw
from lumen_ray.data.batches.region_prompts import drawn_region, region_input, region_visible
from lumen_ray.data.batches.transforms import Sample
from lumen_ray.data.images import Picture
from lumen_ray.data.shards.schema import message_links, message_routes
from lumen_ray.errors import UserError
from lumen_ray.exemplars import exemplar_phrase
from lumen_ray.keypoints import DEFAULT_SIGMA, keypoint_sigmas
from lumen_ray.recipe import BranchSettings
from lumen_ray.tasks import CLASS_TASKS, TASKS, Task, task_of_route
from lumen_ray.trunk.branch import Branch
from lumen_ray.trunk.regions import region_mask

TEXT_TASKS = tuple(name for name, task in TASKS.items() if task.is_text)


@dataclass
class Target:
    """The target of a decoder for one prompt.

    Perception: `instances`, indices into the sample's instances; for a keypoint prompt `keypoint`, its index in the
    skeleton, and `sigma`. Pictures: the `picture` to draw, in the size of the stored image, to be cropped like the
    sample, and `text`, the bare description or instruction. Texts: `links`, the target of each link in it.
    """

    instances: list[int] = field(default_factory=list)
    keypoint: int = -1
    sigma: float = DEFAULT_SIGMA
    picture: Picture | None = None
    text: str = ""
    links: list[Target] = field(default_factory=list)


@dataclass
class PromptBatch:
    """Collects the branches of a batch in parallel lists, and the masks and images of their regions."""

    branches: list[Branch] = field(default_factory=list)
    tasks: list[str] = field(default_factory=list)
    targets: list[Target | None] = field(default_factory=list)
    regions: list[np.ndarray] = field(default_factory=list)
    region_images: list[int] = field(default_factory=list)
    _requests: dict[tuple[Any, ...], int] = field(default_factory=dict)

    def add(self, task: str, branch: Branch, target: Target | None = None, request: str = "") -> int:
        """Appends a prompt and returns its index.

        Prompts of an image with the same `request` form one group, as in a user's request; a keypoint prompt joins the
        group of its object prompt, and any other prompt is a group by itself.
        """
        if branch.parent >= 0:
            group = self.branches[branch.parent].group
        else:
            key = (branch.image, request) if request else (len(self.branches),)
            group = self._requests.setdefault(key, len(self._requests))
        self.branches.append(replace(branch, group=group))
        self.tasks.append(task)
        self.targets.append(target)
        return len(self.branches) - 1

    def target(self, index: int) -> Target:
        """The target of a prompt that a decoder serves."""
        target = self.targets[index]
        assert target is not None
        return target

    def link_targets(self, members: Sequence[int]) -> list[Target]:
        """The target of each link; `members`: the branch of each, those of a text in their order in it."""
        seen: Counter[int] = Counter()
        found = []
        for index in members:
            target = self.target(index)
            found.append(target.links[seen[index]] if target.links else target)
            seen[index] += 1
        return found

    def add_region(self, image: int, mask: np.ndarray) -> int:
        """Appends the mask of a region prompt, uint8 [H, W] in the trunk's input, and returns its index."""
        self.regions.append(mask)
        self.region_images.append(image)
        return len(self.regions) - 1

    def replace(self, branches: Sequence[Branch | None]) -> None:
        """Replaces the branches one by one, and removes those that are None with the regions that only they have."""
        new_index = np.cumsum([branch is not None for branch in branches]) - 1
        kept = [(i, branch) for i, branch in enumerate(branches) if branch is not None]
        self.branches = [
            replace(branch, parent=int(new_index[branch.parent]) if branch.parent >= 0 else -1) for _, branch in kept
        ]
        self.tasks = [self.tasks[i] for i, _ in kept]
        self.targets = [self.targets[i] for i, _ in kept]
        used = sorted({region for branch in self.branches for region in branch.regions})
        number = {region: n for n, region in enumerate(used)}
        self.branches = [
            replace(branch, regions=tuple(number[region] for region in branch.regions)) if branch.regions else branch
            for branch in self.branches
        ]
        self.regions = [self.regions[i] for i in used]
        self.region_images = [self.region_images[i] for i in used]


@dataclass(frozen=True)
class SamplePrompts:
    """Draws the prompts about one sample and adds them to a batch.

    `tasks`: of the step; `skeletons`: keypoint names by class; `frequencies`: images per class, by which absent classes
    are drawn; `further`: how many of the row's further images the batch has, all or none; `links_see_image`: as in the
    model's settings; `pool`: the batch's objects that a class may be shown by.
    """

    batch: PromptBatch
    image: int
    row: dict[str, Any]
    sample: Sample
    tasks: Sequence[str]
    settings: BranchSettings
    rng: np.random.Generator
    skeletons: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    frequencies: Mapping[str, int] = field(default_factory=dict)
    further: int = 0
    links_see_image: bool = True
    pool: ExamplePool = field(default_factory=ExamplePool)

    def add_understanding(self) -> None:
        """Adds prompts whose answers are texts or perception results, in a fixed order."""
        self.add_classes()
        if "pose" in self.tasks:
            self.add_poses()
        self.add_phrases()
        if "region_segment" in self.tasks:
            self.add_region_segments()
        self.add_messages()

    def add_classes(self) -> None:
        """Adds class prompts, those of `choose_classes`, as one request of a task drawn at random.

        In random order: where prompts of a request see each other, a decoder would else learn that the first are those
        that are present, and score classes by their place."""
        tasks = [task for task in self.tasks if task in CLASS_TASKS]
        if not tasks:
            return
        visible = list(dict.fromkeys(self.row["instances"][i]["phrase"] for i in self.sample.kept))
        task = TASKS[tasks[int(self.rng.integers(len(tasks)))]]
        looks = self._looks(task)
        known = {*self.row["classes"], *visible, *self.frequencies}
        chosen = choose_classes(self.row, visible, self.settings, self.frequencies, self.rng)
        foreign = foreign_names(known, self.settings.foreign_negatives, self.rng)
        for phrase in self._shuffled([*chosen, *foreign]):
            if phrase in foreign:
                self._routed(task, phrase, Target(), looks, task.name)
                continue
            shown, regions = self._by_example(phrase, known)
            self._routed(task, shown, Target(self._instances_of(phrase)), looks, task.name, regions)

    def _shuffled(self, phrases: list[str]) -> list[str]:
        """In random order, which leaves what `rng` gives afterwards as it is."""
        return [phrases[i] for i in self.rng.spawn(1)[0].permutation(len(phrases))]

    def _by_example(self, phrase: str, known: Collection[str]) -> tuple[str, tuple[int, ...]]:
        """(a class as it is asked for, the regions in it): by its name, or some by objects of the class, with its name,
        with none, or with a name that means nothing to the model, so that the objects decide."""
        if not self.pool or self.rng.random() >= self.settings.exemplars:
            return phrase, ()
        drawn = self.pool.draw(phrase, self.image, self.rng)
        if drawn is None:
            return phrase, ()
        regions = [*drawn.positive, *drawn.negative]
        indices = tuple(self.batch.add_region(region.image, region.mask) for region in regions)
        name = (phrase, "", *foreign_names(known, 1, self.rng))[int(self.rng.integers(3))]
        return exemplar_phrase(name, len(drawn.positive), len(drawn.negative)), indices

    def add_poses(self) -> None:
        """Adds pose prompts of classes with a skeleton, present with keypoints or absent: an object branch and one
        branch per keypoint name, in random order."""
        row, sample, s = self.row, self.sample, self.settings
        task = TASKS["pose"]
        with_pose = {
            row["instances"][i]["phrase"] for n, i in enumerate(sample.kept) if sample.keypoints[n] is not None
        }
        present = {instance["phrase"] for instance in row["instances"]}
        annotated = [c for c in self.skeletons if c in row["classes"]]
        chosen = draw([c for c in annotated if c in with_pose], s.max_poses, self.rng)
        chosen += draw([c for c in annotated if c not in present], s.absent_poses, self.rng)
        for phrase in self._shuffled(chosen):  # see `add_classes`
            instances = self._instances_of(phrase)
            looks = self._looks(task)
            parent = self._routed(task, phrase, Target(instances), looks, request="pose")
            sigmas = keypoint_sigmas(self.skeletons[phrase])
            for k, name in enumerate(self.skeletons[phrase]):
                text = task.keypoint_prompt(name, phrase)
                branch = Branch(self.image, text, route=task.routing_token, parent=parent, reads_image=looks)
                self.batch.add("pose", branch, Target(instances, k, sigmas[k]))

    def add_phrases(self) -> None:
        """Adds referring expressions and grounded phrases, including those that match nothing."""
        index = {int(i): n for n, i in enumerate(self.sample.kept)}
        usable = [
            p
            for p in self.row["phrases"]
            if p["task"] in self.tasks and (not p["instances"] or any(i in index for i in p["instances"]))
        ]
        looks = {name: self._looks(TASKS[name]) for name in dict.fromkeys(item["task"] for item in usable)}
        for item in draw(usable, self.settings.max_phrases, self.rng):
            task = TASKS[item["task"]]
            target = Target([index[i] for i in item["instances"] if i in index])
            # the phrases of a sentence are one request
            request = task.name if task.needs == "sentence" else ""
            self._routed(task, item["phrase"], target, looks[task.name], request)

    def add_region_segments(self) -> None:
        """Adds prompts for the mask of an instance at a box, a point, a scribble or a polygon on it."""
        task, sample = TASKS["region_segment"], self.sample
        cells = {n: m > 127 for n, m in enumerate(sample.masks) if m is not None and not sample.crowd[n]}
        usable = {n: m for n, m in cells.items() if m.any()}
        for n in draw(list(usable), self.settings.max_regions, self.rng):
            size = sample.image.shape[:2]
            region = drawn_region(usable[n], sample.boxes[n], size, self.rng)
            index = self.batch.add_region(self.image, region_mask(region, size))
            self._routed(task, "", Target([n]), regions=(index,))

    def add_messages(self) -> None:
        """Adds captions, questions and chats; each `<region>` becomes a mask in the model input.

        A message about a region that was cropped away, or about images that the batch does not have, is left out, and
        so is one with links whose tasks the step does not train. Instances that were cropped away are no targets of a
        link.
        """
        row, sample = self.row, self.sample
        visible = [region_visible(region, sample) for region in row["regions"]]
        tasks = [task for task in self.tasks if task in TEXT_TASKS]
        usable = [
            m
            for m in row["messages"]
            if m["task"] in tasks
            and all(visible[r] for r in m["regions"])
            and len(m["image_turns"]) in (0, self.further)
            and all(task_of_route(token).name in self.tasks for token in message_routes(m))
        ]
        index = {int(i): n for n, i in enumerate(sample.kept)}
        for message in draw(usable, self.settings.max_messages, self.rng):
            history, prompt, response = exchanges(message["turns"])
            regions = tuple(
                self.batch.add_region(self.image, region_input(sample, row["regions"][region]))
                for region in message["regions"]
            )
            links = [self._link_target(link, index) for link in message_links(message)]
            branch = Branch(
                self.image,
                prompt,
                response=response,
                regions=regions,
                history=history,
                links=len(links),
                image_turns=tuple(message["image_turns"]),
            )
            self.batch.add(message["task"], branch, Target(links=links) if links else None)

    def _link_target(self, link: Mapping[str, Any], index: Mapping[int, int]) -> Target:
        """The target of a link in a text; `index`: of the row's instances in the sample, of those that are visible."""
        if wrong := [i for i in link["instances"] if not 0 <= i < len(self.row["instances"])]:
            raise UserError(
                f"a link of '{self.row['image_id']}' names instance {wrong[0]} of {len(self.row['instances'])}; "
                "instances count from 0",
                "invalid_links",
            )
        return Target([index[i] for i in link["instances"] if i in index])

    def add_generation(self, picture: Picture) -> None:
        """Adds a caption of the row as the description of its image, which the prompt does not see.

        A caption of several images describes none of them alone.
        """
        messages = [m for m in self.row["messages"] if m["task"] == "caption" and not m["image_turns"]]
        captions = [m["turns"][-1]["content"] for m in messages]
        for caption in draw(captions, 1, self.rng):
            self._routed(TASKS["generate"], caption, Target(picture=picture, text=caption))

    def add_edits(self, edited: Picture) -> None:
        """Adds the row's instructions, each with the edited image as its target."""
        for message in self.row["messages"]:
            if message["task"] == "edit":
                instruction = message["turns"][0]["content"]
                self._routed(TASKS["edit"], instruction, Target(picture=edited, text=instruction))

    def _instances_of(self, phrase: str) -> list[int]:
        """Indices into the sample of the instances whose class is `phrase`."""
        return [n for n, i in enumerate(self.sample.kept) if self.row["instances"][i]["phrase"] == phrase]

    def _looks(self, task: Task) -> bool:
        """Whether the links of a request see the image: where they need not, a share of them do all the same, since
        they do in free chat, and since the LLM learns from it to match words with places."""
        return task.link_reads_image(self.links_see_image) or self.rng.random() < self.settings.looking_share

    def _routed(
        self,
        task: Task,
        phrase: str,
        target: Target,
        looks: bool = True,
        request: str = "",
        regions: tuple[int, ...] = (),
    ) -> int:
        """Adds a branch that is answered by the task's routing token, in a phrasing drawn at random."""
        text = task.prompt(phrase, int(self.rng.integers(len(task.templates))))
        branch = Branch(self.image, text, route=task.routing_token, regions=regions, reads_image=looks)
        return self.batch.add(task.name, branch, target, request)


def exchanges(turns: Sequence[dict[str, str]]) -> tuple[tuple[tuple[str, str], ...], str, str]:
    """(earlier (instruction, response) pairs, last instruction, last response) of turns that alternate."""
    texts = [turn["content"] for turn in turns]
    *earlier, (instruction, response) = zip(texts[::2], texts[1::2], strict=True)
    return tuple(earlier), instruction, response
