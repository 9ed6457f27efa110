"""Pictures that a model generates or edits for the rows of a split, scored by its own detector (see `generation`)."""

from __future__ import annotations

import textwrap
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from lumen_ray.answer import Answer
from lumen_ray.data.images import decode
from lumen_ray.evaluate.generation import Detector, described, detections, score_edits, score_generated
from lumen_ray.evaluate.scored import Row, ScoredRequest
from lumen_ray.inference.protocol import EngineProtocol
from lumen_ray.inference.request import make_request
from lumen_ray.structures import Boxes, SampleSettings

_JUDGED_AT_ONCE = 8
_SHEET, _CELL = 1200, 132  # pixels: width of a sheet of pictures, side of one of them
_LINES, _LINE, _LETTER = 3, 12, 6  # of text above; pixels of a line and of a letter


def detector_of(engine: EngineProtocol, classes: Sequence[str]) -> Detector:
    """A detector made of the engine's answers to `detect` with all classes."""

    def detect(pictures: Sequence[np.ndarray]) -> list[dict[str, Boxes]]:
        found = []
        if pictures:  # a split of texts alone has no classes
            request = make_request("detect", classes=classes)
        for start in range(0, len(pictures), _JUDGED_AT_ONCE):
            chunk = pictures[start : start + _JUDGED_AT_ONCE]
            found += [detections(answers[0]) for answers in engine.run(chunk, [[request]] * len(chunk))]
        return found

    return detect


@dataclass
class PicturesEvaluator:
    """Collects pictures; `evaluate` scores them. The seed of a row's picture is its number in the split."""

    captions: list[str] = field(default_factory=list)
    described: list[dict[str, int]] = field(default_factory=list)
    generated: list[np.ndarray] = field(default_factory=list)
    instructions: list[str] = field(default_factory=list)
    before: list[np.ndarray] = field(default_factory=list)
    wanted: list[np.ndarray] = field(default_factory=list)
    edited: list[np.ndarray] = field(default_factory=list)

    def generate_requests(self, row: Row, number: int) -> list[ScoredRequest]:
        """The row's first caption that describes a scene; pictures of other captions cannot be scored by counting."""
        for message in row["messages"]:
            if message["image_turns"]:  # a caption of several images describes none of them alone
                continue
            if message["task"] == "caption" and (objects := described(message["turns"][-1]["content"])):
                text = message["turns"][-1]["content"]
                request = make_request("generate", text=text, sample=SampleSettings(seed=number))
                return [ScoredRequest(request, partial(self._add_generated, text, objects))]
        return []

    def edit_requests(self, row: Row, number: int) -> list[ScoredRequest]:
        """The row's instructions; none without the edited picture."""
        if row["target_image"] is None:
            return []
        before, wanted = decode(row["image"]), decode(row["target_image"])
        instructions = [m["turns"][0]["content"] for m in row["messages"] if m["task"] == "edit"]
        return [
            ScoredRequest(
                make_request("edit", text=text, sample=SampleSettings(seed=number)),
                partial(self._add_edited, text, before, wanted),
            )
            for text in instructions
        ]

    def _add_generated(self, caption: str, objects: dict[str, int], answer: Answer) -> None:
        self.captions.append(caption)
        self.described.append(objects)
        self.generated += _images(answer)

    def _add_edited(self, instruction: str, before: np.ndarray, wanted: np.ndarray, answer: Answer) -> None:
        self.instructions.append(instruction)
        self.before.append(before)
        self.wanted.append(wanted)
        self.edited += _images(answer)

    def evaluate(self, tasks: Collection[str], detect: Detector) -> dict[str, float | None]:
        """The metrics of `score_generated` and `score_edits`, for those of the two tasks in `tasks`; None where no
        picture was made."""
        metrics: dict[str, float | None] = {}
        if "generate" in tasks:
            metrics |= score_generated(self.described, self.generated, detect)
        if "edit" in tasks:
            metrics |= score_edits(self.before, self.wanted, self.edited, detect)
        return metrics

    def save(self, folder: Path) -> None:
        """Writes ``generated.png``, a picture per caption, and ``edited.png``, per instruction the picture before, the
        target and the model's; a file without pictures is left out."""
        if self.generated:
            write_sheet(folder / "generated.png", [[picture] for picture in self.generated], self.captions)
        if self.edited:
            rows = [list(row) for row in zip(self.before, self.wanted, self.edited, strict=True)]
            write_sheet(folder / "edited.png", rows, self.instructions)


def _images(answer: Answer) -> list[np.ndarray]:
    assert answer.images is not None, f"an answer to '{answer.task}' has pictures"
    return answer.images


def write_sheet(path: Path, rows: Sequence[Sequence[np.ndarray]], texts: Sequence[str]) -> None:
    """Writes a PNG of rows of pictures (uint8 [H, W, 3], the same number in each row), each row under its text."""
    width, cells = len(rows[0]) * _CELL, []
    for pictures, text in zip(rows, texts, strict=True):
        lines = textwrap.wrap(text, max(16, width // _LETTER))[:_LINES]
        cell = Image.new("RGB", (width, _LINES * _LINE + _CELL), "white")
        ImageDraw.Draw(cell).multiline_text((2, 1), "\n".join(lines), fill="black", spacing=1)
        for column, picture in enumerate(pictures):
            shown = Image.fromarray(picture).resize((_CELL - 4, _CELL - 4), Image.Resampling.NEAREST)
            cell.paste(shown, (column * _CELL + 2, _LINES * _LINE))
        cells.append(cell)
    columns = max(1, min(len(cells), _SHEET // width))
    height = cells[0].height
    sheet = Image.new("RGB", (columns * width, -(-len(cells) // columns) * height), "white")
    for number, cell in enumerate(cells):
        sheet.paste(cell, (number % columns * width, number // columns * height))
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path)
