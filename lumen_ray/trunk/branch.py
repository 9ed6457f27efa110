"""A branch: one prompt about an image, and its tokens."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

from lumen_ray.tasks import family_of

IGNORE = -100  # label of tokens without LM loss


class QuerySlots(NamedTuple):
    """The queries of one link in a span: the branch it is of, the position of the first, the routing token before
    them, and of a link in a text [start, end) of the words that name its objects (of others None)."""

    branch: int
    start: int
    route: str
    words: tuple[int, int] | None = None

    @property
    def end(self) -> int:
        return self.start + family_of(self.route).num_queries


@dataclass
class TokenSpan:
    """Consecutive tokens that attend to each other causally, and to no other span of the same image.

    `owner`: the branch it is logged under; `queries`: of every link in it; `members`: all branches in it; `regions`:
    for every <region> token its index in the batch's regions; `questions`: the position at which each question of a
    conversation begins.
    """

    owner: int
    tokens: list[int] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    queries: list[QuerySlots] = field(default_factory=list)
    members: list[int] = field(default_factory=list)
    regions: tuple[int, ...] = ()
    questions: list[int] = field(default_factory=list)

    def add(self, tokens: Iterable[int], learned: bool) -> None:
        """Appends tokens; `learned`: whether they have LM loss."""
        tokens = list(tokens)
        self.tokens += tokens
        self.labels += tokens if learned else [IGNORE] * len(tokens)

    def add_queries(self, branch: int, route: str, pad: int, words: tuple[int, int] | None = None) -> None:
        """Reserves positions, filled with `pad`, for the queries behind the routing token that was just added; `words`:
        see `QuerySlots`."""
        self.queries.append(QuerySlots(branch, len(self.tokens), route, words))
        self.add([pad] * family_of(route).num_queries, False)

    def cut(self, limit: int | None) -> None:
        """Drops the tokens from `limit` on; a link that would lose queries goes with its routing token."""
        if limit is None or len(self.tokens) <= limit:
            return
        limit = min([limit, *(slots.start - 1 for slots in self.queries if slots.end > limit)])
        self.queries = [slots for slots in self.queries if slots.end <= limit]
        self.tokens, self.labels = self.tokens[:limit], self.labels[:limit]


@dataclass(frozen=True)
class Branch:
    """One prompt about image `image` of the batch.

    `route`: the routing token given as the response; or None for text, with `response` the target text (training) or
    None (inference: the LLM generates it). `history`: earlier (instruction, response) pairs of the conversation, whose
    responses are supervised too. `regions`: for every <region> in the instructions, its index in the batch's regions.
    `parent`: for a keypoint prompt the index (in the list of branches) of its object's prompt, else -1.
    `limit`: maximum number of tokens; a response is cut off there, without an end token. `system`: the system text of a
    conversation, where the LLM was taught turns its system turn, and with an image the beginning of the first question.
    `image_turns`: in a conversation with several images, the question (0-based, those of `history` counted) from which
    on each image behind the first is seen.
    `links`: number of the routing tokens in its responses, each of which is followed by queries, then by more text;
    with 0 they are words like any other.
    `reads_image`: False for a perception prompt whose link is made of its words alone (`links_see_image` of the
    settings): the same for every image, so it can be kept. Its routing token is then not supervised.

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
    links: int = 0
    reads_image: bool = True
