"""The prompts of requests that the LLM answers in text, as the decode loop takes them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace

import torch

from lumen_ray.errors import UserError
from lumen_ray.inference.branches import BranchPlanner
from lumen_ray.inference.encoded_images import Inputs
from lumen_ray.inference.request import Request
from lumen_ray.inference.sampling import Sampler
from lumen_ray.inference.writing import TextPrompt
from lumen_ray.structures import Size
from lumen_ray.tasks import ROUTING_TOKENS, TASKS
from lumen_ray.trunk.branch import Branch
from lumen_ray.trunk.layout import build_layout
from lumen_ray.trunk.regions import region_mask
from lumen_ray.trunk.tokenizer import LumenTokenizer
from lumen_ray.trunk.trunk import Trunk


@dataclass(frozen=True)
class TextPrompts:
    """Builds them for one model. `bucket`: (height, width) of an image -> that of the model's input;
    `writes_behind_routes`: whether the LLM was trained to go on behind a routing token."""

    trunk: Trunk
    tokenizer: LumenTokenizer
    layout: str
    planner: BranchPlanner
    bucket: Callable[[Size], Size]
    writes_behind_routes: bool

    def build(
        self, inputs: Inputs, prefixes: Sequence[int], requests: Sequence[Sequence[Request]], limit: int
    ) -> dict[tuple[int, int], TextPrompt]:
        """The prompts of all text requests by (image, request). `prefixes`: the number of prefix tokens of each row."""
        numbers = inputs.numbers
        found: dict[tuple[int, int], TextPrompt] = {}
        for b, row in enumerate(requests):
            for r, request in enumerate(row):
                if not (task := TASKS[request.task]).is_text:
                    continue
                for _, answer in request.history:
                    self._refuse_special(answer)
                text = task.prompt(request.text, request.template)
                regions = () if request.region is None else (0,)
                turns = request.turns_of(numbers[b])
                branch = Branch(
                    0, text, regions=regions, history=request.history, system=request.system, image_turns=turns
                )
                layout = build_layout([branch], 1, self.tokenizer, self.layout, inputs.valid[b : b + 1])
                ids = layout.input_ids[0].tolist()
                useless = self.planner.useless_tokens(task, bool(inputs.valid[b]), request.routing)
                goes_on = self.writes_behind_routes and inputs.valid[b] and not request.routing.is_single
                routes = [r for r in self.planner.text_routes(task) if r not in useless] if goes_on else ()
                region = None
                if request.region is not None:
                    region = torch.from_numpy(region_mask(request.region, self.bucket(request.region.size)))
                # a conversation about several images is a batch by itself
                at = replace(branch, image=0 if turns else b)
                never = [self.tokenizer.ids[token] for token in useless if token in self.tokenizer.ids]
                prefix = 0 if layout.alone else prefixes[b]
                read = prefix if inputs.valid[b] else min(prefix, len(self.trunk.lead))
                sampler, only = Sampler(request.sampling, ids), self._required_tokens(request, useless)
                prompt = TextPrompt(at, sampler, limit, region, routes, never, only, read + len(ids))
                self._check_context(len(ids), prefix, limit, prompt.most_queries)
                found[b, r] = prompt
        return found

    def _required_tokens(self, request: Request, useless: Collection[str]) -> list[int]:
        """The ids of the routing tokens of which the answer is one; none if it may be a text. Raises `UserError` if the
        answer has to be one that cannot be followed."""
        if not request.routing.is_required:
            return []
        tokens = [token for token in ROUTING_TOKENS if token not in useless and token in self.tokenizer.ids]
        if not tokens:
            raise UserError(
                "the answer has to be sent to a decoder, but the model has none for what is allowed and given; allow "
                f"others, or give an image if there is none (the model serves: {', '.join(self.planner.tasks)})",
                "no_decoder",
            )
        return [self.tokenizer.ids[token] for token in tokens]

    def _refuse_special(self, text: str) -> None:
        """Raises `UserError` for a special token of this model in an earlier answer."""
        if token := next((token for token in self.tokenizer.ids if token in text), None):
            raise UserError(
                f"an earlier answer may not contain '{token}', which the prompt layout uses", "reserved_text"
            )

    def _check_context(self, length: int, prefix: int, limit: int, queries: int) -> None:
        """Raises `UserError` if a prefix, a prompt of `length` tokens and its answer of at most `limit` tokens and
        `queries` are longer than the LLM's context."""
        most = getattr(self.trunk.llm.config, "max_position_embeddings", None)
        if most is not None and prefix + length + limit + queries > most:
            own = f"{limit} and {queries} queries" if queries else f"{limit}"
            of_images = f", {prefix} of them of images," if prefix else ""
            raise UserError(
                f"the prompt has {prefix + length} tokens{of_images} and its answer may have {own}, more than the "
                f"LLM's context of {most} tokens; shorten the conversation, give fewer images or lower max_new_tokens",
                "context_too_long",
            )
