"""The sequential prompt layout, in which the released VisionLLM v2 weights were trained (arXiv 2406.08394, sec. 3.2):
everything asked of an image in one causal string of a Vicuna conversation.

    <s> system USER: <image> \\n question ASSISTANT: Yes, here are the results for cat[DET] q1 .. qN, dog[DET] q1 .. qN
    in the image.</s>

What stands in front of the image is the same in every string: it is the model's `lead_tokens`. Here is the rest. The
wording is the one the weights are evaluated with; a prompt's result depends on the prompts in the same string.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from lumen_ray.tasks import REGION_TOKEN, ROUTING_TOKENS, task_of_prompt
from lumen_ray.trunk.branch import Branch, Piece
from lumen_ray.trunk.tokenizer import EOS, PAD, LumenTokenizer

SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
USER_TURN, ASSISTANT_TURN = "USER: ", " ASSISTANT:"


@dataclass(frozen=True)
class Wording:
    """A question and an answer with {} for what is asked. `lists`: several are asked at once, and the answer names each
    before its routing token; else one, and the token stands alone."""

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
#: of region prompts in a question, and how the answer names them
REGION_NAME, ANSWERED_REGION = f"<reg>region{{}}{REGION_TOKEN}</reg>", "region{}"


def lead_tokens(tokenizer: LumenTokenizer, start: str) -> tuple[int, ...]:
    """Token ids in front of the image: `start`, the beginning of a sequence, and the system message."""
    return (tokenizer.backend.token_to_id(start), *tokenizer.encode(f"{SYSTEM} {USER_TURN}"))


def sequential_pieces(members: Sequence[tuple[int, Branch]], tokenizer: LumenTokenizer) -> Iterator[Piece]:
    """The strings of one image: one per text branch, one per group of listed prompts, one per other prompt."""
    groups: dict[object, list[tuple[int, Branch]]] = {}
    for index, branch in members:
        listed = branch.route is not None and WORDINGS[branch.route].lists
        groups.setdefault(("group", branch.group) if listed else index, []).append((index, branch))
    for group in groups.values():
        yield _text(*group[0], tokenizer) if group[0][1].route is None else _routed(group, tokenizer)


def _text(index: int, branch: Branch, tokenizer: LumenTokenizer) -> Piece:
    """A conversation that the LLM answers, as the reference tokenises it: turn by turn, image and text apart."""
    piece = Piece(index, members=[index], regions=branch.regions)
    for turn, (question, answer) in enumerate((*branch.history, (branch.prompt, branch.response))):
        asked = f"{USER_TURN if turn else chr(10)}{question}{ASSISTANT_TURN}"
        _add_turn(piece, asked, answer, tokenizer)
    piece.tokens, piece.labels = piece.tokens[: branch.limit], piece.labels[: branch.limit]
    return piece


def _add_turn(piece: Piece, asked: str, answer: str | None, tokenizer: LumenTokenizer) -> None:
    if answer is None:
        piece.add(tokenizer.encode(asked), False)
        return
    for token, start in tokenizer.spans(f"{asked} {answer}"):
        piece.add([token], start >= len(asked))
    piece.add([tokenizer.ids[EOS]], True)


def _routed(group: Sequence[tuple[int, Branch]], tokenizer: LumenTokenizer) -> Piece:
    by_route: dict[str, list[tuple[int, Branch]]] = {}
    for index, branch in group:
        by_route.setdefault(_route(branch), []).append((index, branch))
    ordered = [member for members in by_route.values() for member in members]
    piece = Piece(group[0][0], members=[index for index, _ in ordered])
    questions, answers, regions = [], [], 0
    for route, members in by_route.items():
        wording, asked, told = WORDINGS[route], [], []
        for _, branch in members:
            asked.append(_phrase(branch))
            told.append((asked[-1] if wording.lists else "") + route)
            if branch.regions:
                regions += 1
                asked[-1], told[-1] = REGION_NAME.format(regions), ANSWERED_REGION.format(regions) + route
                piece.regions += branch.regions
        questions.append(wording.question.replace("{}", ", ".join(asked)))
        answers.append(wording.answer.replace("{}", ", ".join(told)))
    asked = f"\n{' '.join(questions)}{ASSISTANT_TURN}"
    waiting = iter(ordered)
    routes = {tokenizer.ids[token] for token in ROUTING_TOKENS}
    for token, start in tokenizer.spans(f"{asked} {' '.join(answers)}"):
        piece.add([token], start >= len(asked))
        if token in routes:
            index, branch = next(waiting)
            piece.add_queries(index, branch.route, tokenizer.ids[PAD])
    piece.add([tokenizer.ids[EOS]], True)
    return piece


def _route(branch: Branch) -> str:
    """The objects whose pose is asked for are detected; [POSE] stands behind their keypoints."""
    return "[DET]" if branch.route == "[POSE]" and branch.parent < 0 else branch.route


def _phrase(branch: Branch) -> str:
    """What a branch asks for, in words: its phrase, or what its prompt's template was filled with."""
    named = task_of_prompt(branch.prompt)
    phrase = branch.phrase or (named[1] if named else branch.prompt)
    for token in ROUTING_TOKENS:  # words of a user, not a token to route by
        phrase = phrase.replace(token, token.strip("[]"))
    return phrase
