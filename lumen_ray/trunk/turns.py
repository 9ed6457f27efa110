"""The turns of a conversation as a published LLM was taught them: the literal texts around questions and answers.

A chat template is a program. Most of them write the same few literal texts around the turns, whatever the turns say:

    begin question to_assistant (gap answer to_user question to_assistant)*

`read_template` finds these texts by rendering conversations of marker words, and checks them by rendering others.
Examples: ChatML (Qwen, SmolLM2), Llama 2 and 3, Mistral's [INST], Vicuna, Gemma.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from lumen_ray.errors import UserError

Message = dict[str, str]  # {"role": system, user or assistant, "content"}
Render = Callable[[list[Message]], str]  # with the prompt for an answer at the end; raises if the template refuses


@dataclass(frozen=True)
class Turns:
    """`begin`: before the first question; `system`: before and after a system text that stands there instead, None if
    the LLM has no system turn; `to_assistant`: behind a question; `gap`: before an answer, which the LLM writes itself;
    `to_user`: between an answer and the next question; `end`: the part of `to_user` by which the LLM ends its answer,
    up to its end token; `strips`: the roles whose texts lose blanks at both ends; `stops`: all tokens that end an
    answer."""

    begin: str
    to_assistant: str
    to_user: str
    end: str
    system: tuple[str, str] | None = None
    gap: str = ""
    strips: tuple[str, ...] = ()
    stops: tuple[str, ...] = ()

    def text(self, role: str, content: str) -> str:
        """A question (role user), answer (assistant) or system text as the template writes it."""
        return content.strip() if role in self.strips else content

    def opening(self, system: str = "") -> str:
        """What stands before the first question. Raises `UserError` if there is a system text but no system turn."""
        if not system:
            return self.begin
        if self.system is None:
            raise UserError("this model's LLM has no system turn; put the text into the question", "no_system_turn")
        return self.system[0] + self.text("system", system) + self.system[1]

    def render(self, messages: Sequence[Message]) -> str:
        """A conversation that ends with a question, as the template renders it with the prompt for an answer."""
        system = ""
        turns = list(messages)
        if turns and turns[0]["role"] == "system":
            system = turns.pop(0)["content"]
        parts = [self.opening(system)]
        for n, turn in enumerate(turns):
            if n % 2:
                parts += [self.gap, self.text("assistant", turn["content"]), self.to_user]
            else:
                parts += [self.text("user", turn["content"]), self.to_assistant]
        return "".join(parts)

    def to_dict(self) -> dict[str, Any]:
        """JSON types, as `turns.json` of a model folder."""
        return json.loads(json.dumps(asdict(self)))

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Turns:
        lists = {name: tuple(data[name]) for name in ("system", "strips", "stops") if data.get(name) is not None}
        return cls(**{**data, **lists})


#: texts that no template writes itself and that no trimming changes
_QUESTIONS, _ANSWERS, _SYSTEM = ("question1", "question2", "question3"), ("answer1", "answer2"), "systemtext"


def read_template(render: Render, special: Iterable[str], eos: str | None) -> Turns:
    """The turns of a chat template.

    render: renders messages by it. special: the tokenizer's special tokens. eos: the one that ends a sequence. Raises
    `UserError` (`unknown_template`) if the template cannot be expressed so.
    """
    try:
        one = render(_conversation(1))
        two = render(_conversation(2))
    except Exception as error:  # templates raise whatever they like
        raise _unknown(f"it cannot render a conversation: {_first_line(error)}") from None
    begin, to_assistant = _split(one, _QUESTIONS[0])
    start, rest = begin + _QUESTIONS[0], ""
    if two.startswith(start):
        rest = two[len(start) :]
    before, after = _split(rest, _ANSWERS[0])
    if not before.startswith(to_assistant):
        raise _unknown("it writes an answer elsewhere than behind the prompt for it")
    to_user, last = _split(after, _QUESTIONS[1])
    if last != to_assistant:
        raise _unknown("it writes the prompt for an answer differently in later turns")
    gap = before[len(to_assistant) :]
    end, end_token = _end(to_user, special, eos)
    turns = Turns(begin, to_assistant, to_user, end, gap=gap, stops=(end_token,))
    turns = _with_system(turns, render)
    turns = replace(turns, strips=_stripping_roles(turns, render))
    for length in (1, 2, 3):
        if turns.render(_conversation(length)) != _rendered(render, _conversation(length)):
            raise _unknown(f"it renders a conversation of {length} questions differently than turn by turn")
    return turns


def _rendered(render: Render, messages: list[Message]) -> str | None:
    """The rendered messages, None if the template refuses them."""
    try:
        return render(messages)
    except Exception:  # templates raise whatever they like
        return None


def _conversation(questions: int, system: str = "", padded: str = "") -> list[Message]:
    """Marker words in turn, the last of them a question; blanks around those of the role `padded`."""
    found = [{"role": "system", "content": system}] if system else []
    for n in range(questions):
        found.append({"role": "user", "content": _QUESTIONS[n]})
        if n + 1 < questions:
            found.append({"role": "assistant", "content": _ANSWERS[n]})
    return [m | {"content": f"  {m['content']}  "} if m["role"] == padded else m for m in found]


def _split(text: str, marker: str) -> tuple[str, str]:
    before, found, after = text.partition(marker)
    if not found or marker in after:
        raise _unknown("it does not write each turn once and in order")
    return before, after


def _end(to_user: str, special: Iterable[str], eos: str | None) -> tuple[str, str]:
    """(the beginning of `to_user` up to its first special token, which ends an answer; that token); without one,
    `eos`."""
    ends = [(to_user.index(token) + len(token), token) for token in special if token and token in to_user]
    if ends:
        length, token = min(ends)
        return to_user[:length], token
    if not eos:
        raise _unknown("it has no token that ends an answer")
    return eos, eos


def _stripping_roles(turns: Turns, render: Render) -> tuple[str, ...]:
    """The roles whose texts the template strips of blanks."""
    found: list[str] = []
    for role in ("user", "assistant", *(("system",) if turns.system is not None else ())):
        # Llama 2 strips the first question and the system text in it as one
        padded = _conversation(2, _SYSTEM if role == "system" else "", role)
        rendered = _rendered(render, padded)
        if rendered == turns.render(padded):
            continue
        if rendered != replace(turns, strips=(role,)).render(padded):
            raise _unknown(f"it changes the texts of role {role}")
        found.append(role)
    return tuple(found)


def _with_system(turns: Turns, render: Render) -> Turns:
    """`turns` with the texts around a system text; without them if the template refuses it or puts it elsewhere."""
    one = _rendered(render, _conversation(1, _SYSTEM))
    if one is None or one.count(_SYSTEM) != 1:
        return turns
    before, after = one.split(_SYSTEM)
    opening, found, _ = after.partition(_QUESTIONS[0])
    candidate = replace(turns, system=(before, opening))
    conversations = [_conversation(length, _SYSTEM) for length in (1, 2, 3)]
    same = all(candidate.render(messages) == _rendered(render, messages) for messages in conversations)
    return candidate if found and same else turns


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0][:160] if str(error) else type(error).__name__


def _unknown(why: str) -> UserError:
    return UserError(
        f"the LLM's chat template cannot be expressed as fixed texts around turns: {why}; give a checkpoint with "
        "another chat template, or remove the template to use turns of our own",
        "unknown_template",
    )
