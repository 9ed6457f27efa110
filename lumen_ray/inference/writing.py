"""An answer in text while it is written: its prompt, its tokens so far, and the links in it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from lumen_ray.answer import AnswerPart
from lumen_ray.cancellation import current
from lumen_ray.inference.sampling import Sampler, stop_at
from lumen_ray.tasks import MAX_TEXT_LINKS, family_of
from lumen_ray.trunk.branch import Branch
from lumen_ray.trunk.tokenizer import LumenTokenizer


@dataclass
class TextPrompt:
    """A prompt whose answer is to be written. `branch.image`: index of its image in the batch; `region`: uint8 [H, W]
    mask in the trunk's input of its visual prompt, if it has one; `limit`: most tokens of the answer; `routes`: the
    routing tokens behind which it goes on; `never`: ids of tokens that it cannot use and does not write; `only`: ids of
    the routing tokens of which it is one, empty for any answer; `length`: tokens of the prompt and of its images."""

    branch: Branch
    sampler: Sampler
    limit: int
    region: Tensor | None = None
    routes: Collection[str] = ()
    never: Sequence[int] = ()
    only: Sequence[int] = ()
    length: int = 0

    @property
    def most_queries(self) -> int:
        """Queries in the answer, at most."""
        links = min(MAX_TEXT_LINKS, self.limit // 2)  # a link takes a word and a routing token
        return links * max((family_of(route).num_queries for route in self.routes), default=0)


@dataclass
class TextLink:
    """A link in an answer. `start`, `end`: [first, end) in the answer's tokens of the words that name its objects; its
    routing token is the one behind them; `states`: the hidden states [width] at its queries so far."""

    route: str
    start: int
    end: int
    states: list[Tensor] = field(default_factory=list)
    route_read: bool = False  # whether the LLM has read the routing token, so that queries are next

    @property
    def is_open(self) -> bool:
        """Whether queries are left to read."""
        return len(self.states) < family_of(self.route).num_queries


@dataclass(eq=False)
class Writing:
    """An answer that is being written: `tokens` so far, without the end token and queries; `links` in it; `end`: why it
    is done ('stop', 'length', 'route' behind a routing token, 'cancelled' or 'error'), None before;
    `is_wanted`: whether somebody waits for it, as of the thread that asks for it."""

    prompt: TextPrompt
    tokens: list[int] = field(default_factory=list)
    links: list[TextLink] = field(default_factory=list)
    end: str | None = None
    error: BaseException | None = None
    is_wanted: Callable[[], bool] = field(default_factory=current)

    @property
    def need(self) -> int:
        """Own tokens and queries at the end, at most."""
        return len(self.prompt.sampler.prompt) + self.prompt.limit + self.prompt.most_queries

    @property
    def open_link(self) -> TextLink | None:
        """The link whose queries are next."""
        return self.links[-1] if self.links and self.links[-1].is_open else None

    def begin_link(self, route: str) -> bool:
        """Begins the link of a routing token that was just written; False if the answer cannot go on behind it."""
        start, end = self.links[-1].end + 1 if self.links else 0, len(self.tokens) - 1
        if route not in self.prompt.routes or start == end or len(self.links) == MAX_TEXT_LINKS:
            return False
        self.links.append(TextLink(route, start, end))
        return True

    def read(self, hidden: Tensor) -> bool:
        """Enters the hidden state [width] of the last input; returns whether a word is next."""
        link = self.open_link
        if link is None:
            return True
        if link.route_read:
            link.states.append(hidden)
        link.route_read = True
        if link.is_open:
            return False
        if len(self.tokens) >= self.prompt.limit:
            self.end = "length"
        return self.end is None


def written_text(writing: Writing, tokenizer: LumenTokenizer) -> str:
    """The text of an answer, up to its first stop text and without routing tokens."""
    text = tokenizer.decode(writing.tokens)
    stopped = stop_at(text, writing.prompt.sampler.settings.stop)
    return text if stopped is None else stopped


def written_parts(writing: Writing, tokenizer: LumenTokenizer) -> list[AnswerPart] | None:
    """The texts and links of an answer in order, links without predictions; None if it has no link. Links behind a stop
    text are left out."""
    text, start = written_text(writing, tokenizer), 0
    parts = []
    for link in writing.links:
        end = len(tokenizer.decode(writing.tokens[: link.end]))
        if end > len(text):
            break
        parts += [AnswerPart(text[start:end]), AnswerPart(route=link.route)]
        start = end
    parts.append(AnswerPart(text[start:]))
    return [part for part in parts if part.text or part.route] if len(parts) > 1 else None


def top_tokens(
    writing: Writing, places: Sequence[int], tokenizer: LumenTokenizer
) -> list[list[tuple[str, float]]] | None:
    """The most probable tokens at these places of an answer, as of `Answer`, if it was asked for them; special tokens
    by their names."""
    if not (top := writing.prompt.sampler.top):
        return None

    def text_of(number: int, place: int) -> str:
        before = writing.tokens[max(place - 1, 0) : place]
        return tokenizer.token_texts([*before, number])[-1] or tokenizer.name_of(number)

    return [[(text_of(number, place), value) for number, value in top[place]] for place in places]
