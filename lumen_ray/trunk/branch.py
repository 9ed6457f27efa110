"""A branch: one prompt about an image, and the tokens that it becomes."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from lumen_ray.tasks import family_of

IGNORE = -100  # label of tokens that the LM loss does not see


@dataclass
class Piece:
    """A run of tokens that see each other causally, and no other piece of the same image.

    `owner`: the branch it is logged under; `queries`: (branch, place of its first query) of every link in it;
    `members`: all branches in it; `regions`: for every <region> token its index in the batch's regions.
    """

    owner: int
    tokens: list[int] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    queries: list[tuple[int, int]] = field(default_factory=list)
    members: list[int] = field(default_factory=list)
    regions: tuple[int, ...] = ()

    def add(self, tokens: Iterable[int], learned: bool) -> None:
        tokens = list(tokens)
        self.tokens += tokens
        self.labels += tokens if learned else [IGNORE] * len(tokens)

    def add_queries(self, branch: int, route: str, pad: int) -> None:
        """Places for the queries of a routing token that was just added; they hold `pad` until they are filled."""
        self.queries.append((branch, len(self.tokens)))
        self.add([pad] * family_of(route).num_queries, False)


@dataclass(frozen=True)
class Branch:
    """One prompt about image `image` of the batch.

    `route`: the routing token that is the response; or None for text, with `response` the text to learn (training) or
    None (inference: the LLM writes it). `history`: earlier (instruction, response) pairs of the conversation, whose
    responses are learned too. `regions`: for every <region> in the instructions, its index in the batch's regions.
    `parent`: for a keypoint prompt the index (in the list of branches) of its object's prompt, else -1.
    `limit`: the tokens at most; a response is cut off there, without an end token.

    `group`: prompts of one image and group are one request: experts look at them together, and in the sequential layout
    they share a string. There `phrase` is what the prompt asks for (else it is read from the prompt).
    """

    image: int
    prompt: str
    route: str | None = None
    response: str | None = None
    regions: tuple[int, ...] = ()
    parent: int = -1
    limit: int | None = None
    history: tuple[tuple[str, str], ...] = ()
    phrase: str = ""
    group: int = 0
