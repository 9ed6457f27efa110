"""The prompts of a batch of one row, decoded from its tensors, so that the page shows the model's actual input."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from lumen_ray.targets import ImageTargets, PerceptionTargets
from lumen_ray.tasks import REGION_TOKEN, TASKS, task_of_prompt
from lumen_ray.trunk.layout import IGNORE, Layout
from lumen_ray.trunk.tokenizer import LumenTokenizer

if TYPE_CHECKING:
    from lumen_ray.data.inspect.view import View

PromptToken = tuple[str, str, bool]  # its text; kind: text, special or query; whether the LM loss includes it


@dataclass
class Prompt:
    """One branch. Boxes xyxy, masks (uint8 [H/4, W/4]) and keypoints (x, y, v) are targets in model input pixels."""

    index: int
    task: str
    tokens: list[PromptToken]
    num_tokens: int
    parent: int = -1  # of a keypoint prompt: index of its object's prompt
    phrase: str = ""  # of a class by example: as it is asked for
    regions: list[int] = field(default_factory=list)  # into the batch's region masks
    boxes: list[list[float]] = field(default_factory=list)
    crowd: list[bool] = field(default_factory=list)
    masks: list[np.ndarray] = field(default_factory=list)
    keypoints: list[list[list[float]]] = field(default_factory=list)  # instances x keypoints x 3
    keypoint_names: tuple[str, ...] = ()
    edges: list[list[int]] = field(default_factory=list)
    labelled: int = -1  # of a keypoint prompt: number of instances in which it is labelled
    reads_image: bool = True
    picture: np.ndarray | None = None  # target of generation or editing, uint8 [h, w, 3]

    @property
    def negative(self) -> bool:
        """Whether it is a perception prompt without targets."""
        finds = not TASKS[self.task].is_text and TASKS[self.task].result != "image"
        return finds and self.parent < 0 and not self.boxes

    @property
    def note(self) -> str:
        """Its targets and number of tokens, in words, and whether it sees the image."""
        return self._targets_in_words if self.reads_image else f"{self._targets_in_words}, without the image"

    @property
    def _targets_in_words(self) -> str:
        if TASKS[self.task].is_text:
            finds = f"{self.crowd.count(False)} to find, " if self.boxes else ""
            return f"{finds}{self.num_tokens} tokens"
        if self.parent >= 0:
            return f"labelled in {self.labelled}, {self.num_tokens} tokens"
        if self.picture is not None:
            height, width = self.picture.shape[:2]
            return f"to make: a picture of {width}×{height}, {self.num_tokens} tokens"
        if self.negative:
            return f"nothing to find, {self.num_tokens} tokens"
        masks = f", {len(self.masks)} with a mask" if self.masks else ""
        crowds = f", {sum(self.crowd)} crowds ignored" if any(self.crowd) else ""
        return f"{self.crowd.count(False)} to find{masks}{crowds}, {self.num_tokens} tokens"


def prompts_of(view: View, tokenizer: LumenTokenizer, edges: dict[str, Any]) -> list[Prompt]:
    """The branches of a batch of one row, in order, with their targets."""
    layout: Layout = view.batch.layout
    queries = {int(t) for slots in layout.query_slots.values() for t in slots[..., 1].flatten()}
    prompts = []
    for index, task in enumerate(view.batch.tasks):
        places = torch.nonzero(layout.branch_ids[0] == index).flatten()
        prompt = Prompt(index, task, _tokens(layout, places, queries, tokenizer), len(places))
        prompt.reads_image = bool(layout.images[0, places].any())
        slots = layout.region_slots[:, 1]
        prompt.regions = layout.region_index[torch.isin(slots, places)].tolist()
        prompts.append(prompt)
    for family, targets in view.batch.targets.items():
        if family not in layout.link_branches:  # those of a decoder with its own input size
            continue
        members, parents = layout.link_branches[family].tolist(), layout.link_parents[family].tolist()
        for link, branch in enumerate(members):
            if parents[link] >= 0:
                prompts[branch].parent = members[parents[link]]
            if isinstance(targets, ImageTargets):
                prompts[branch].picture = _picture(targets, link)
            else:
                _targets(prompts[branch], targets, link)
        if isinstance(targets, ImageTargets):
            continue
        for link, branch in enumerate(members):
            if children := [i for i, parent in enumerate(parents) if parent == link]:
                _pose(prompts[branch], [prompts[members[i]] for i in children], targets, link, children, edges)
    return prompts


def _tokens(layout: Layout, places: Tensor, queries: set[int], tokenizer: LumenTokenizer) -> list[PromptToken]:
    """The tokens of a prompt; those of one multi-byte character are joined."""
    special = {i: token for token, i in tokenizer.ids.items()}
    learned = (layout.labels[0, places] != IGNORE).tolist()
    out: list[PromptToken] = []
    open_tokens: list[int] = []  # those of a character that is still incomplete
    for place, token, is_learned in zip(places.tolist(), layout.input_ids[0, places].tolist(), learned, strict=True):
        if place in queries:
            out.append((f"q{sum(kind == 'query' for _, kind, _ in out) + 1}", "query", is_learned))
        elif token in special:
            out.append((special[token], "special", is_learned))
        else:
            if open_tokens:
                out.pop()
            open_tokens.append(token)
            out.append((tokenizer.backend.decode(open_tokens), "text", is_learned))
            open_tokens = open_tokens if "\ufffd" in out[-1][0] else []
            continue
        open_tokens = []
    return out


def instruction(prompt: Prompt) -> str:
    """The words between the first <user> and <assistant>, with the <region>s among them."""
    words = []
    for text, kind, _ in prompt.tokens[1:]:
        if text == "<assistant>":
            break
        words.append(text if kind == "text" or text == REGION_TOKEN else "")
    return "".join(words).strip()


def _targets(prompt: Prompt, targets: PerceptionTargets, link: int) -> None:
    """Adds the targets of a link to its prompt; a text may have several."""
    named = task_of_prompt(instruction(prompt))
    prompt.phrase = named[1] if named else instruction(prompt)
    valid = torch.nonzero(targets.valid[link]).flatten()
    if prompt.parent >= 0:
        prompt.labelled = int((targets.keypoints[link, valid, 2] > 0).sum())
        return
    prompt.boxes += targets.boxes[link, valid].tolist()
    prompt.crowd += targets.crowd[link, valid].tolist()
    prompt.masks += [targets.masks[i].numpy() for i in targets.mask_index[link, valid].tolist() if i >= 0]


def _picture(targets: ImageTargets, link: int) -> np.ndarray:
    """The target without its padding, uint8 [h, w, 3]."""
    picture = targets.images[link].permute(1, 2, 0)
    height, width = picture.shape[:2] if targets.extents is None else targets.extents[link].tolist()
    return picture[:height, :width].contiguous().numpy()


def _pose(
    prompt: Prompt,
    children: list[Prompt],
    targets: PerceptionTargets,
    link: int,
    links: list[int],
    edges: dict[str, Any],
) -> None:
    """Adds the keypoints of a pose prompt's instances, one from each of its keypoint prompts (`children`, `links`)."""
    valid = torch.nonzero(targets.valid[link]).flatten()
    prompt.keypoints = targets.keypoints[links][:, valid].transpose(0, 1).tolist()
    prompt.edges = edges.get(prompt.phrase, [])
    rest = TASKS["pose"].keypoint_prompt("", prompt.phrase)
    prompt.keypoint_names = tuple(instruction(child).replace(rest, "") for child in children)
