"""An LLM's own answers to questions of text alone: written as training data, and compared with those of a later model.

Training on them beside images keeps what the LLM knew and how it says it (self-distillation). Comparing them shows how
much was kept.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from rich.markup import escape

from lumen_ray.console import bar, say
from lumen_ray.data.files import read_bytes, write_atomically
from lumen_ray.data.images import decode
from lumen_ray.errors import UserError
from lumen_ray.inference.protocol import EngineProtocol
from lumen_ray.inference.request import make_request
from lumen_ray.presets import find

#: tokens of an answer at most; longer ones have no end to learn and are left out of training data
MAX_TOKENS = 48
BATCH = 8

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Written:
    """The answer to a question: greedy, `tokens` with its end token."""

    question: str
    text: str
    tokens: int
    ended: bool

    def record(self) -> dict[str, Any]:
        """As `lumen-ray prepare chat` reads it."""
        turns = [{"from": "human", "value": self.question}, {"from": "gpt", "value": self.text}]
        return {"id": self.question, "tokens": self.tokens, "conversations": turns}


def read_questions(name: str) -> dict[str, str | None]:
    """Questions in a YAML file, or of a name in `configs/questions`: a list, or a map to a word that the answer has.
    Raises `UserError` for anything else."""
    path = find("questions", name)
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"'{path}' is not YAML: {str(error).splitlines()[0]}", "invalid_config") from None
    texts = [*found, *found.values()] if isinstance(found, dict) else found if isinstance(found, list) else []
    if not texts or not all(isinstance(text, str) and text.strip() for text in texts):
        raise UserError(f"'{path}' must be a list of questions, or a map of questions to words", "invalid_config")
    return found if isinstance(found, dict) else dict.fromkeys(texts)


def ask(
    engine: EngineProtocol,
    questions: Sequence[str],
    max_tokens: int = MAX_TOKENS,
    progress: Progress | None = None,
    image: np.ndarray | None = None,
) -> Iterator[Written]:
    """The engine's answers in free chat, in order: in text alone, or beside `image`, uint8 [h, w, 3]."""
    for start in range(0, len(questions), BATCH):
        part = questions[start : start + BATCH]
        requests = [[make_request("chat", text=question)] for question in part]
        answers = engine.run([image] * len(part), requests, max_new_tokens=max_tokens)
        for question, [answer] in zip(part, answers, strict=True):
            tokens = len(answer.log_probs or ())
            yield Written(question, answer.text or "", tokens, tokens < max_tokens)
        if progress is not None:
            progress(start + len(part), len(questions))


def write_answers(path: Path, answers: Sequence[Written]) -> list[Written]:
    """Writes those of the answers that have an end as jsonl; returns them."""
    kept = [answer for answer in answers if answer.ended and answer.text]
    text = "".join(json.dumps(answer.record(), ensure_ascii=False) + "\n" for answer in kept)
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))
    return kept


def read_answers(path: Path) -> list[Written]:
    """The answers in a file of `write_answers`. Raises `UserError` if it is none."""
    try:
        records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        return [
            Written(turns[0]["value"], turns[1]["value"], record["tokens"], True)
            for record, turns in ((record, record["conversations"]) for record in records)
        ]
    except FileNotFoundError:
        raise UserError(f"'{path}' does not exist", "missing_file") from None
    except (ValueError, KeyError, IndexError, TypeError):
        raise UserError(f"'{path}' is no file of answers; write it with 'answers.py write'", "invalid_file") from None


def changed(
    engine: EngineProtocol,
    before: Sequence[Written],
    progress: Progress | None = None,
    image: np.ndarray | None = None,
) -> list[Written]:
    """Those of the engine's answers (see `ask`) that are not the stored ones, by text and number of tokens."""
    most = max((answer.tokens for answer in before), default=0) + 1
    found = ask(engine, [answer.question for answer in before], most, progress, image)
    return [new for old, new in zip(before, found, strict=True) if (new.text, new.tokens) != (old.text, old.tokens)]


def build_parser() -> argparse.ArgumentParser:
    """The options of `jobs/answers.py`."""
    parser = argparse.ArgumentParser(prog="answers.py", description=__doc__)
    actions = parser.add_subparsers(dest="action", required=True)
    write = actions.add_parser("write", help="write the answers of a model")
    write.add_argument("--questions", required=True, help="name in configs/questions, or a YAML file")
    write.add_argument("--output", required=True, help="jsonl file, for 'lumen-ray prepare chat' and 'compare'")
    compare = actions.add_parser("compare", help="count the answers of a model that are the stored ones")
    compare.add_argument("--answers", required=True, help="file of 'write', by the model before training")
    compare.add_argument("--image", help="image file to ask the questions beside (default: in text alone)")
    for action in (write, compare):
        action.add_argument("--model", required=True, help="model folder")
        action.add_argument("--device", help="cpu, cuda or cuda:N (default: cuda where torch finds a GPU, else cpu)")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """`jobs/answers.py`. The exit status is 2 for what the user must change."""
    args = build_parser().parse_args(argv)
    try:
        _write(args) if args.action == "write" else _compare(args)
    except UserError as error:
        print(f"answers.py: {error}", file=sys.stderr)
        return 2
    return 0


def _engine(args: argparse.Namespace) -> EngineProtocol:
    from lumen_ray.inference.device import find_device
    from lumen_ray.inference.engine import Engine

    return Engine.load(args.model, find_device(args.device))


def _write(args: argparse.Namespace) -> None:
    words = read_questions(args.questions)
    engine = _engine(args)
    with bar("answers") as progress:
        answers = list(ask(engine, list(words), progress=progress.update))
    kept = write_answers(Path(args.output), answers)
    right = [word.lower() in a.text.lower() for a in kept if (word := words[a.question]) is not None]
    known = f", {sum(right)} of {len(right)} have the expected word" if right else ""
    say(f"{len(kept)} of {len(answers)} answers end within {MAX_TOKENS} tokens{known} -> {args.output}")


def _compare(args: argparse.Namespace) -> None:
    before = read_answers(Path(args.answers))
    image = None if args.image is None else decode(read_bytes(args.image))
    engine = _engine(args)
    with bar("answers") as progress:
        others = changed(engine, before, progress.update, image)
    old = {answer.question: answer.text for answer in before}
    for answer in others:
        say(escape(f"{answer.question} -> {answer.text!r}, before {old[answer.question]!r}"))
    say(f"{len(before) - len(others)} of {len(before)} answers are unchanged")
