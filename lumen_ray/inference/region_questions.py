"""Yes/no questions about regions of images that are encoded: each is a branch over its image's prefix, of which only
the next token is read.

Nothing is written: the probability of "yes" against "no" is that of the first token of each answer, as the tokenizer
writes it behind the question.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from lumen_ray.cancellation import check_wanted
from lumen_ray.cpu_linear import packed_weights
from lumen_ray.errors import UserError
from lumen_ray.inference.branches import with_regions
from lumen_ray.inference.decode_loop import DecodeLoop
from lumen_ray.inference.encoded_images import EncodedImages
from lumen_ray.inference.request import RegionQuestion
from lumen_ray.precision import in_model_dtype
from lumen_ray.structures import Dtype
from lumen_ray.tasks import region_question
from lumen_ray.trunk.branch import IGNORE, Branch
from lumen_ray.trunk.layout import build_layout
from lumen_ray.trunk.regions import region_mask
from lumen_ray.trunk.tokenizer import LumenTokenizer
from lumen_ray.trunk.trunk import Trunk

#: questions about an image in one pass
AT_ONCE = 64
#: how models write the two answers
_ANSWERS = (("yes", "no"), ("Yes", "No"))


class RegionQuestions:
    """Asks one trunk. `loop`: its decode loop, whose answers take turns with these questions."""

    def __init__(
        self, trunk: Trunk, tokenizer: LumenTokenizer, loop: DecodeLoop, prompt_layout: str, dtype: Dtype = "float32"
    ):
        self.trunk, self.tokenizer, self.loop = trunk, tokenizer, loop
        self.prompt_layout = prompt_layout
        self.device, self.dtype = loop.device, dtype

    def answer_tokens(self) -> tuple[list[int], list[int]]:
        """Ids of the first tokens of "yes" and of "no". Raises `UserError` if the tokenizer writes them alike."""
        firsts = [[self._first_token(answer) for answer in pair] for pair in _ANSWERS]
        both = {yes for yes, _ in firsts} & {no for _, no in firsts}
        told = [(yes, no) for yes, no in firsts if yes not in both and no not in both]
        if not told:
            raise UserError(
                "the model's tokenizer begins 'yes' and 'no' with the same token, so its instances cannot be verified; "
                "leave verify out",
                "cannot_verify",
            )
        yes, no = zip(*told, strict=True)
        return list(yes), list(no)

    def _first_token(self, answer: str) -> int:
        branch = Branch(0, region_question("object"), regions=(0,), response=answer)
        labels = build_layout([branch], 1, self.tokenizer, self.prompt_layout).labels[0]
        return int(labels[labels != IGNORE][0])

    @in_model_dtype
    def probabilities(self, encoded: EncodedImages, questions: Sequence[RegionQuestion]) -> list[float]:
        """The probability of "yes" against "no", 0..1, of each question. Results do not depend on the chunks."""
        found = [0.0] * len(questions)
        yes, no = self.answer_tokens()
        most = 1 if self.prompt_layout == "sequential" else AT_ONCE
        for members in _chunks(questions, most):
            check_wanted()
            with self.loop.turn():
                logits = self._next_token(encoded, [questions[i] for i in members])
            odds = logits[:, yes].logsumexp(-1) - logits[:, no].logsumexp(-1)
            for i, value in zip(members, odds.sigmoid().tolist(), strict=True):
                found[i] = value
        return found

    def _next_token(self, encoded: EncodedImages, questions: Sequence[RegionQuestion]) -> Tensor:
        """Logits [Q, V], float32, of the token behind each question."""
        prefix = encoded.prefix
        size = (int(prefix.images.shape[-2]), int(prefix.images.shape[-1]))
        branches, masks, owners = with_regions(
            (Branch(q.image, region_question(q.phrase)), (torch.from_numpy(region_mask(q.region, size)),))
            for q in questions
        )
        layout = build_layout(branches, len(prefix.valid), self.tokenizer, self.prompt_layout, prefix.valid)
        layout = layout.to(self.device)
        last = layout.last_slots
        with packed_weights():
            owner = torch.tensor(owners, device=self.device)
            regions = self.trunk.region_embeddings(prefix, torch.stack(masks).to(self.device), owner)
            hidden, _ = self.trunk.run_branches(prefix, layout, regions)
            logits: Tensor = self.trunk.llm.lm_head(hidden[last[:, 0], last[:, 1]])
        return logits.float()


def _chunks(questions: Sequence[RegionQuestion], most: int) -> Iterator[list[int]]:
    """Indices of the questions of each pass: at most `most` about an image."""
    by_image: dict[int, list[int]] = {}
    for number, question in enumerate(questions):
        by_image.setdefault(question.image, []).append(number)
    for start in range(0, max(map(len, by_image.values()), default=0), most):
        yield [number for numbers in by_image.values() for number in numbers[start : start + most]]
