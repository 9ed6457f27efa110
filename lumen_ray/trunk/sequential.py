"""The sequential prompt layout of the released VisionLLM v2 weights (arXiv 2406.08394, sec. 3.2): all prompts of an
image in one causal string of a Vicuna conversation.

    <s> system USER: <image> \\n question ASSISTANT: Yes, here are the results for cat[DET] q1 .. qN, dog[DET] q1 .. qN
    in the image.</s>

The text before the image is the same in every string and belongs to the model's `lead_tokens`; this module builds the
rest. The wording is the one the weights are evaluated with. A prompt's result depends on the others in its string.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from lumen_ray.errors import UserError
from lumen_ray.tasks import REGION_TOKEN, ROUTING_TOKENS, task_of_prompt
from lumen_ray.trunk.branch import Branch, TokenSpan
from lumen_ray.trunk.tokenizer import EOS, PAD, LumenTokenizer

SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
USER_TURN, ASSISTANT_TURN = "USER: ", " ASSISTANT:"


@dataclass(frozen=True)
class Wording:
    """A question and an answer with {} for the names. `lists`: the question takes several names, and the answer repeats
    each before its routing token; otherwise one, and the answer has the routing token alone."""

    question: str
    answer: str
    lists: bool


WORDINGS: dict[str, Wording] = {
    "[DET]": Wording(
        "Can you analyze the image and identify the {} present?", "Yes, here are the results for {} in the image.", True
    ),
    "[SEG]": Wording(
        "Could you aid me in generating unique masks for every category present in {} in this image?",
        "Yes, here are the results for {} in the image.",
        True,
    ),
    "[POSE]": Wording(
        "Can you examine the image and pinpoint the keypoint locations of the {}?",
        "Utilizing keypoints detection, the image analysis reveals the location of {}.",
        True,
    ),
    "[GRD]": Wording("Where can we locate the {} in the image?", "Yes, it is {}.", False),
    "[GEN]": Wording("Generate image with caption: {}.", "Here it is {}.", False),
    "[EDIT]": Wording("Edit the image according to the caption: {}.", "Here it is {}.", False),
}
#: the name of a region in a question, and in the answer
REGION_NAME, ANSWERED_REGION = f"<reg>region{{}}{REGION_TOKEN}</reg>", "region{}"


def lead_tokens(tokenizer: LumenTokenizer, start: str) -> tuple[int, ...]:
    """Token ids before the image: `start`, the begin-of-sequence token, and the system message. Raises `UserError` if
    the tokenizer lacks `start`."""
    first = tokenizer.backend.token_to_id(start)
    if first is None:
        raise UserError(f"the tokenizer lacks the token '{start}', which begins a sequence", "wrong_tokenizer")
    return (first, *tokenizer.encode(f"{SYSTEM} {USER_TURN}"))


def sequential_spans(members: Sequence[tuple[int, Branch]], tokenizer: LumenTokenizer) -> Iterator[TokenSpan]:
    """The strings of one image: one per text branch, one per group of prompts that are listed, one per other prompt."""
    groups: dict[object, list[tuple[int, Branch]]] = {}
    for index, branch in members:
        listed = branch.route is not None and WORDINGS[branch.route].lists
        groups.setdefault(("group", branch.group) if listed else index, []).append((index, branch))
    for group in groups.values():
        yield _text(*group[0], tokenizer) if group[0][1].route is None else _routed(group, tokenizer)


def _text(index: int, branch: Branch, tokenizer: LumenTokenizer) -> TokenSpan:
    """A text conversation, tokenised as in the reference: turn by turn, image and text separately."""
    span = TokenSpan(index, members=[index], regions=branch.regions)
    for turn, (question, answer) in enumerate((*branch.history, (branch.prompt, branch.response))):
        _add_turn(span, f"{USER_TURN if turn else chr(10)}{question}{ASSISTANT_TURN}", answer, tokenizer)
    span.tokens, span.labels = span.tokens[: branch.limit], span.labels[: branch.limit]
    return span


def _add_turn(span: TokenSpan, question: str, answer: str | None, tokenizer: LumenTokenizer) -> None:
    if answer is None:
        span.add(tokenizer.encode(question), False)
        return
    for token, start in tokenizer.spans(f"{question} {answer}"):
        span.add([token], start >= len(question))
    span.add([tokenizer.ids[EOS]], True)


def _routed(group: Sequence[tuple[int, Branch]], tokenizer: LumenTokenizer) -> TokenSpan:
    """A string with the prompts of a group: a question and an answer per routing token."""
    by_route: dict[str, list[tuple[int, Branch]]] = {}
    for index, branch in group:
        by_route.setdefault(_route(branch), []).append((index, branch))
    ordered = [member for members in by_route.values() for member in members]
    span = TokenSpan(group[0][0], members=[index for index, _ in ordered])
    questions, answers, regions = [], [], 0
    for route, members in by_route.items():
        wording = WORDINGS[route]
        names, named = [], []  # in the question, and in the answer
        for _, branch in members:
            names.append(_phrase(branch))
            named.append((names[-1] if wording.lists else "") + route)
            if branch.regions:
                regions += 1
                names[-1], named[-1] = REGION_NAME.format(regions), ANSWERED_REGION.format(regions) + route
                span.regions += branch.regions
        questions.append(wording.question.replace("{}", ", ".join(names)))
        answers.append(wording.answer.replace("{}", ", ".join(named)))
    question = f"\n{' '.join(questions)}{ASSISTANT_TURN}"
    pending = iter(ordered)
    routes = {tokenizer.ids[token] for token in ROUTING_TOKENS}
    for token, start in tokenizer.spans(f"{question} {' '.join(answers)}"):
        span.add([token], start >= len(question))
        if token in routes:
            index, branch = next(pending)
            assert branch.route is not None, "text branches have strings without routing tokens"
            span.add_queries(index, branch.route, tokenizer.ids[PAD])
    span.add([tokenizer.ids[EOS]], True)
    return span


def _route(branch: Branch) -> str:
    """The routing token in the string: [DET] for the objects of a pose prompt, since [POSE] follows their keypoints."""
    assert branch.route is not None, "text branches have strings without routing tokens"
    return "[DET]" if branch.route == "[POSE]" and branch.parent < 0 else branch.route


def _phrase(branch: Branch) -> str:
    """The name of a branch's object: its phrase, or the text that filled its prompt's template."""
    parsed = task_of_prompt(branch.prompt)
    phrase = branch.phrase or (parsed[1] if parsed else branch.prompt)
    for token in ROUTING_TOKENS:  # a routing token in a user's text must not route
        phrase = phrase.replace(token, token.strip("[]"))
    return phrase
