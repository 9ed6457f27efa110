"""Boxes for free: time against the number of objects in an image, of the engine, whose decoder gives all boxes in one
pass, and of the same trunk with boxes written as tokens, as most vision-language models do.

The images really hold 1, 30 and 300 red squares, and the engine must find all of them: each object gives several
candidates for NMS, and every box is converted to stored pixels. (A threshold that lets N predictions of one image
through would need no such image, but would time boxes that nobody asks for.) All images have the same size, the
smallest multiple of the grid at which the bundled weights find 300 objects.

The baseline encodes the same image with the same trunk, reads a question, and takes one decoding step of the LLM with
its keys and values for every token. The LLM has not learned to write boxes, so end tokens are ignored and the number of
tokens is set: 4 location tokens a box, one a coordinate and nothing between boxes (fewer than in PaliGemma, arXiv
2407.07726, which adds a class and a separator), or as many as the model's tokenizer makes of the text
`[x1, y1, x2, y2], ..` with the coordinates that the engine has found (Qwen-VL, arXiv 2308.12966, writes digits too).
Reading the boxes out of the tokens is not timed. Nothing is extrapolated: where the LLM's context is too short for all
boxes, the most that fit are measured, on an image that holds as many objects.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw

from lumen_ray.bench.timing import Result, SidesDiffer, in_turns
from lumen_ray.decoders.base import PredictSettings
from lumen_ray.inference.engine import Engine
from lumen_ray.inference.outputs import TrunkOutput
from lumen_ray.inference.request import make_request
from lumen_ray.inference.sampling import GREEDY, Sampler
from lumen_ray.inference.writing import TextPrompt
from lumen_ray.presets import DEFAULT_MODEL, model_folder
from lumen_ray.structures import Boxes
from lumen_ray.tasks import ROUTING_TOKENS
from lumen_ray.trunk.branch import Branch
from lumen_ray.trunk.layout import branch_span

COUNTS = (1, 30, 300)
SIDE = 448  # pixels of images and input: 784 image tokens of nano
CLASS = "red square"
COLOUR, GROUND = (225, 25, 35), (205, 203, 200)  # RGB
LARGEST = 48.0  # pixels between the centres of neighbouring objects, at most
SHARE = 0.8  # side of a square over that distance
SUPERSAMPLING = 4
QUESTION = "where is every red square ?"
THRESHOLD = 0.3
LOCATION_TOKENS = 4  # a box
FORMATS = ("location tokens", "text")
#: time with the most objects over time with the fewest, at most
MOST_GROWTH = 1.5
SECONDS = 2.0  # of a side in a turn, about
UNIT = "CPU ms/image"


def crowd(count: int, side: int = SIDE, seed: int = 0) -> np.ndarray:
    """An image of `count` red squares that do not touch, uint8 [side, side, 3], deterministic in `seed`: on a hexagonal
    grid just fine enough for them, in places that are drawn."""
    step = LARGEST
    while len(places := _grid(side, step)) < count:
        step *= 0.995
    draw = np.random.default_rng(seed)
    canvas = Image.new("RGB", (side * SUPERSAMPLING,) * 2, GROUND)
    pen = ImageDraw.Draw(canvas)
    half = step * SHARE / 2
    for place in draw.permutation(len(places))[:count]:
        x, y = places[place]
        pen.rectangle([SUPERSAMPLING * v for v in (x - half, y - half, x + half, y + half)], fill=COLOUR)
    smooth = np.asarray(canvas.resize((side, side), Image.Resampling.BOX)).astype(np.float32)
    return np.clip(smooth + draw.normal(0, 3, smooth.shape), 0, 255).astype(np.uint8)


def _grid(side: int, step: float) -> list[tuple[float, float]]:
    """The places (x, y) of a hexagonal grid, at least half a `step` inside a square of `side`."""
    rows = np.arange(step / 2, side - step / 2, step * 3**0.5 / 2)
    return [(x, y) for n, y in enumerate(rows) for x in np.arange(step / 2 * (1 + n % 2), side - step / 2, step)]


def box_text(boxes: Boxes) -> str:
    """Boxes in text, `[x1, y1, x2, y2], ..` in whole pixels."""
    return ", ".join(str([round(float(v)) for v in box]) for box in boxes.xyxy)


@dataclass
class Sides:
    """Both sides: the engine, and its trunk alone as a writer of boxes."""

    engine: Engine

    @classmethod
    def load(cls, model: str, side: int) -> Sides:
        """Of a model that knows `CLASS`, with a square input of `side` pixels."""
        engine = Engine.load(model_folder(model))
        engine.trunk.buckets = ((side, side),)
        engine.trunk.tokenizer.end_ids = frozenset()  # so that as many tokens are written as are asked for
        return cls(engine)

    def detect(self, image: np.ndarray) -> Boxes:
        """The boxes of all objects."""
        request = make_request("detect", classes=[CLASS])
        ((answer,),) = self.engine.run([image], [[request]], score_threshold=THRESHOLD)
        return answer.predictions[0].boxes

    def trunk_output(self, image: np.ndarray) -> TrunkOutput:
        """The input of the decoder."""
        return self.engine.trunk.links([image], [[make_request("detect", classes=[CLASS])]])

    def decode(self, output: TrunkOutput) -> int:
        """The number of boxes, from the decoder alone: its pass over the dense features, NMS and conversion."""
        decoder = self.engine.decoders[self.engine.serving["detect"]]
        return sum(len(found) for found in decoder.predict(output, PredictSettings(THRESHOLD)) if found is not None)

    def write(self, image: np.ndarray, tokens: int) -> int:
        """Writes `tokens` tokens about an image; returns their number."""
        stage = self.engine.trunk
        encoded = self.engine.encode([image])
        never = [stage.tokenizer.ids[token] for token in ROUTING_TOKENS if token in stage.tokenizer.ids]
        prompt = TextPrompt(Branch(0, QUESTION), Sampler(GREEDY, self._question()), tokens, never=never)
        (writing,) = stage.loop.submit(encoded.prefix, [prompt])
        stage.loop.wait([writing])
        return len(writing.tokens)

    def _question(self) -> list[int]:
        return branch_span(0, Branch(0, QUESTION), self.engine.trunk.tokenizer).tokens

    @property
    def read(self) -> int:
        """Tokens of image and question."""
        trunk = self.engine.trunk.trunk
        image = trunk.settings.image_tokens(self.engine.trunk.buckets[0])
        return len(trunk.lead) + image + len(self._question())

    @property
    def room(self) -> int:
        """The most tokens of an answer that fit into the LLM's context."""
        return int(self.engine.loaded.settings.llm["max_position_embeddings"]) - self.read

    def tokens(self, boxes: Boxes, form: str) -> int:
        """Tokens of boxes in a format of `FORMATS`."""
        if form == "location tokens":
            return LOCATION_TOKENS * len(boxes)
        return len(self.engine.trunk.tokenizer.encode(box_text(boxes)))


@dataclass(frozen=True)
class Case:
    """An image of `count` objects, which the engine finds, and the tokens of their boxes in one format. `is_most`: more
    boxes would not fit into the LLM's context."""

    count: int
    image: np.ndarray
    tokens: int
    form: str
    is_most: bool = False

    @property
    def name(self) -> str:
        return _objects(self.count) + (" (most)" if self.is_most else "") + f", {self.form}"


def _objects(count: int) -> str:
    return f"{count} object" + ("s" if count > 1 else "")


def _alone(count: int) -> str:
    return f"decoder, {_objects(count)}"


def _found(sides: Sides, image: np.ndarray, count: int) -> Boxes:
    """The boxes of all `count` objects. Raises `SidesDiffer` if the engine finds another number, by more than 2%."""
    boxes = sides.detect(image)
    if abs(len(boxes) - count) > 0.02 * count:
        raise SidesDiffer(f"the engine finds {len(boxes)} of {count} objects, so its time is not that of {count}")
    return boxes


def cases(sides: Sides, counts: Sequence[int], side: int) -> list[Case]:
    """Every number of objects in every format, at most what fits. Raises `SidesDiffer` if the engine does not find all
    objects."""
    out: list[Case] = []
    for count in counts:
        image = crowd(count, side)
        boxes = _found(sides, image, count)
        for form in FORMATS:
            if (tokens := sides.tokens(boxes, form)) <= sides.room:
                out.append(Case(count, image, tokens, form))
                continue
            longest = max(sides.tokens(boxes[n : n + 1], form) for n in range(count))
            fewer = sides.room // (longest + 2)  # and the comma and blank before it
            smaller = crowd(fewer, side)
            out.append(Case(fewer, smaller, sides.tokens(_found(sides, smaller, fewer), form), form, True))
    return out


def _timed(run: Callable[[], Any], repeats: int) -> float:
    """Milliseconds of CPU time of a run."""
    began = time.process_time()
    for _ in range(repeats):
        run()
    return (time.process_time() - began) / repeats * 1e3


def bench(
    *, model: str = DEFAULT_MODEL, threads: int = 1, turns: int = 3, counts: Sequence[int] = COUNTS, side: int = SIDE
) -> Iterator[Result]:
    """Milliseconds per image of both sides for every number of objects, then of the engine and of its decoder alone
    with the fewest and the most objects.

    Raises `SidesDiffer` if the engine does not find the objects or the LLM writes fewer tokens."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        sides = Sides.load(model, side)
        rows = cases(sides, counts, side)
        images = {case.count: case.image for case in rows}
        ends = (min(counts), max(counts))
        measures: dict[str, Callable[[], float]] = {}
        for count, image in images.items():
            measures[_objects(count)] = _measure(lambda image=image: sides.detect(image))  # type: ignore[misc]
        for count in ends:
            output = sides.trunk_output(images[count])
            measures[_alone(count)] = _measure(lambda output=output: sides.decode(output))  # type: ignore[misc]
        for case in rows:
            if (written := sides.write(case.image, case.tokens)) != case.tokens:
                raise SidesDiffer(f"the LLM writes {written} of {case.tokens} tokens")
            measures[case.name] = _measure(lambda case=case: sides.write(case.image, case.tokens))  # type: ignore[misc]
        rates = in_turns(measures, turns)
        for case in rows:
            yield Result(
                case.name,
                UNIT,
                {f"{case.tokens} tokens": rates[case.name], "engine": rates[_objects(case.count)]},
                budget=f"{threads} threads",
                details={
                    "objects": case.count,
                    "tokens": case.tokens,
                    "tokens_per_box": round(case.tokens / case.count, 2),
                    "tokens_read": sides.read,
                    "input": side,
                    "model": model,
                },
            )
        yield _growth("growth", rates, [_objects(count) for count in ends], 1 / MOST_GROWTH)
        yield _growth("growth, decoder alone", rates, [_alone(count) for count in ends], None)
    finally:
        torch.set_num_threads(before)


def _growth(name: str, rates: dict[str, list[float]], sides: list[str], aim: float | None) -> Result:
    """Time with the fewest objects over time with the most, turn by turn."""
    fewest, most = (rates[side] for side in sides)
    return Result(
        name,
        UNIT,
        {side.removeprefix("decoder, "): rates[side] for side in sides},
        aim,
        details={
            "most_over_fewest": statistics.median(b / a for a, b in zip(fewest, most, strict=True)),
            "more_ms": statistics.median(b - a for a, b in zip(fewest, most, strict=True)),
        },
    )


def _measure(run: Callable[[], Any]) -> Callable[[], float]:
    """Times `run` over about `SECONDS`; warms it up first."""
    run()
    repeats = max(1, round(SECONDS * 1e3 / max(_timed(run, 1), 1e-3)))
    return lambda: _timed(run, repeats)
