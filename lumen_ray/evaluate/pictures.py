"""Pictures that a model makes for the rows of a split, judged by its own detector (see `generation`)."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from lumen_ray.data.images import decode
from lumen_ray.evaluate.generation import Detector, described, found_in, score_edits, score_generated
from lumen_ray.inference.request import Request, make_request
from lumen_ray.structures import Answer, SampleSettings

Row = dict[str, Any]
Asks = list[tuple[Request, Callable[[Answer], None]]]
_JUDGED_AT_ONCE = 8
_SHEET, _CELL = 1200, 132  # pixels: width of a sheet of pictures, side of one of them
_LINES, _LINE, _LETTER = 3, 12, 6  # of text above; pixels of a line and of a letter


def detector_of(engine: Any, classes: Sequence[str]) -> Detector:
    """The engine's own answers to `detect` with all classes."""
    request = make_request("detect", classes=list(classes))

    def detect(pictures: Sequence[np.ndarray]) -> list[Mapping[str, Any]]:
        found = []
        for start in range(0, len(pictures), _JUDGED_AT_ONCE):
            some = pictures[start : start + _JUDGED_AT_ONCE]
            found += [found_in(answers[0]) for answers in engine.run(some, [[request]] * len(some))]
        return found

    return detect


@dataclass
class PicturesEvaluator:
    """Collects what was made; `evaluate` judges it. The seed of a row's picture is its number in the split."""

    captions: list[str] = field(default_factory=list)
    described: list[dict[str, int]] = field(default_factory=list)
    generated: list[np.ndarray] = field(default_factory=list)
    instructions: list[str] = field(default_factory=list)
    before: list[np.ndarray] = field(default_factory=list)
    wanted: list[np.ndarray] = field(default_factory=list)
    edited: list[np.ndarray] = field(default_factory=list)

    def generate_asks(self, row: Row, number: int) -> Asks:
        """The row's first caption as a description, where it is one of a scene: others cannot be judged by counting."""
        for message in row["messages"]:
            if message["task"] == "caption" and (objects := described(message["turns"][-1]["content"])):
                text = message["turns"][-1]["content"]
                request = make_request("generate", text=text, sample=SampleSettings(seed=number))
                return [(request, lambda answer, text=text: self._made(text, objects, answer))]
        return []

    def edit_asks(self, row: Row, number: int) -> Asks:
        """The row's instructions; it must have the edited picture."""
        if row["target_image"] is None:
            return []
        before, wanted = decode(row["image"]), decode(row["target_image"])
        return [
            (
                make_request("edit", text=message["turns"][0]["content"], sample=SampleSettings(seed=number)),
                lambda answer, asked=message["turns"][0]["content"]: self._changed(asked, before, wanted, answer),
            )
            for message in row["messages"]
            if message["task"] == "edit"
        ]

    def _made(self, caption: str, objects: dict[str, int], answer: Answer) -> None:
        self.captions.append(caption)
        self.described.append(objects)
        self.generated += answer.images

    def _changed(self, instruction: str, before: np.ndarray, wanted: np.ndarray, answer: Answer) -> None:
        self.instructions.append(instruction)
        self.before.append(before)
        self.wanted.append(wanted)
        self.edited += answer.images

    def evaluate(self, tasks: Collection[str], detect: Detector) -> dict[str, float | None]:
        """The metrics of `score_generated` and `score_edits`, for those of their tasks that were asked; None where no
        picture was made."""
        metrics: dict[str, float | None] = {}
        if "generate" in tasks:
            metrics |= score_generated(self.described, self.generated, detect)
        if "edit" in tasks:
            metrics |= score_edits(self.before, self.wanted, self.edited, detect)
        return metrics

    def save(self, folder: Path) -> None:
        """Writes ``generated.png``, what was made of each caption, and ``edited.png``, with the picture before, as it
        should be and as it was made; those of which there are pictures."""
        if self.generated:
            write_sheet(folder / "generated.png", [[picture] for picture in self.generated], self.captions)
        if self.edited:
            rows = [list(row) for row in zip(self.before, self.wanted, self.edited, strict=True)]
            write_sheet(folder / "edited.png", rows, self.instructions)


def write_sheet(path: Path, rows: Sequence[Sequence[np.ndarray]], texts: Sequence[str]) -> None:
    """A PNG of rows of pictures (uint8 [H, W, 3], all rows as many), each under its text."""
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
