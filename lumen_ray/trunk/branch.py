"""A branch: one prompt about an image, and its tokens."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from lumen_ray.tasks import family_of

IGNORE = -100  # label of tokens without LM loss


@dataclass
class TokenSpan:
    """Consecutive tokens that attend to each other causally, and to no other span of the same image.

    `owner`: the branch it is logged under; `queries`: (branch, position of its first query) of every link in it;
    `members`: all branches in it; `regions`: for every <region> token its index in the batch's regions.
    """

    owner: int
    tokens: list[int] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    queries: list[tuple[int, int]] = field(default_factory=list)
    members: list[int] = field(default_factory=list)
    regions: tuple[int, ...] = ()

    def add(self, tokens: Iterable[int], learned: bool) -> None:
        """Appends tokens; `learned`: whether they have LM loss."""
        tokens = list(tokens)
        self.tokens += tokens
        self.labels += tokens if learned else [IGNORE] * len(tokens)

    def add_queries(self, branch: int, route: str, pad: int) -> None:
        """Reserves positions, filled with `pad`, for the queries behind the routing token that was just added."""
        self.queries.append((branch, len(self.tokens)))
        self.add([pad] * family_of(route).num_queries, False)


@dataclass(frozen=True)
class Branch:
    """One prompt about image `image` of the batch.

    `route`: the routing token given as the response; or None for text, with `response` the target text (training) or
    None (inference: the LLM generates it). `history`: earlier (instruction, response) pairs of the conversation, whose
    responses are supervised too. `regions`: for every <region> in the instructions, its index in the batch's regions.
    `parent`: for a keypoint prompt the index (in the list of branches) of its object's prompt, else -1.
    `limit`: maximum number of tokens; a response is cut off there, without an end token. `system`: the system text of a
    conversation, where the LLM was taught turns its system turn, and with an image the beginning of the first question.
    `image_turns`: the question (0-based, those of `history` counted) from which on each further image of the row is
    seen; the row's first image is seen by everything.

    `group`: prompts of one image and group are one request: expert decoders process them jointly, and the sequential
    layout puts them into one string, in which `phrase` names the prompt's object (by default parsed from the prompt).
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
    system: str = ""
    image_turns: tuple[int, ...] = ()
