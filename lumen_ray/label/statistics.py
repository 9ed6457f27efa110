"""What a labelled folder holds, counted image by image, and which images are most worth a person's look."""

from __future__ import annotations

import heapq
import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from lumen_ray.label.exporters.labels import LabelledImage, Labels, Record
from lumen_ray.tasks import get_task

BINS = 20
#: of the lists of images in a report
LISTED = 20
_SURE = 1e-6  # scores are kept this far from 0 and 1


@dataclass
class ClassStatistics:
    """`instances`; `images` that have one; `histogram`: instances by score, in `BINS` equal bins of 0..1."""

    instances: int = 0
    images: int = 0
    histogram: list[int] = field(default_factory=lambda: [0] * BINS)

    @property
    def median(self) -> float:
        """The median score, to half a bin."""
        seen = 0
        for number, count in enumerate(self.histogram):
            seen += count
            if 2 * seen >= self.instances > 0:
                return (number + 0.5) / BINS
        return math.nan


@dataclass
class Statistics:
    """Counts of all labelled images.

    `classes`: task -> phrase -> its counts, most instances first; `empty`: task -> images in which it found nothing;
    `crowded` and `unsure`: (number or score, image id) of the images with most instances of one task and of those
    whose best instance has the lowest score, `LISTED` at most.
    """

    images: int
    classes: dict[str, dict[str, ClassStatistics]]
    empty: dict[str, int]
    crowded: list[tuple[float, str]]
    unsure: list[tuple[float, str]]


def collect(labels: Labels) -> Statistics:
    """Counts the labels of the tasks with instances. Memory: the classes and the lists."""
    tasks = labels.boxed_tasks()
    classes = {task: {name: ClassStatistics() for name in labels.categories[task]} for task in tasks}
    empty = dict.fromkeys(tasks, 0)
    number = 0
    crowded: list[tuple[float, int, str]] = []  # the number of the image settles ties
    unsure: list[tuple[float, int, str]] = []
    for image in labels.images():
        number += 1
        scores = []
        most = 0
        for task in tasks:
            found = image.instances(task)
            empty[task] += not found
            most = max(most, len(found))  # tasks find the same objects
            scores += [record["score"] for record in found]
            for phrase in {record["phrase"] for record in found}:
                classes[task][phrase].images += 1
            for record in found:
                counts = classes[task][record["phrase"]]
                counts.instances += 1
                counts.histogram[min(int(record["score"] * BINS), BINS - 1)] += 1
        if scores:
            _keep(crowded, (most, -number, image.image_id))
            _keep(unsure, (-max(scores), -number, image.image_id))
    ordered = {
        task: dict(sorted(found.items(), key=lambda item: -item[1].instances)) for task, found in classes.items()
    }
    return Statistics(
        number,
        ordered,
        empty,
        [(count, image_id) for count, _, image_id in sorted(crowded, reverse=True)],
        [(-score, image_id) for score, _, image_id in sorted(unsure, reverse=True)],
    )


def _keep(heap: list[tuple[float, int, str]], entry: tuple[float, int, str]) -> None:
    if len(heap) < LISTED:
        heapq.heappush(heap, entry)
    else:
        heapq.heappushpop(heap, entry)


@dataclass(frozen=True)
class Choice:
    """An image to look at: its `number` in the export, how much it is worth (`score`) and the `reasons`."""

    number: int
    image_id: str
    score: float
    reasons: dict[str, float]


def choose_for_review(labels: Labels, budget: int) -> list[Choice]:
    """The `budget` images that are most worth a person's look, best first. Each of these counts from 0 to 1:

    - ``unsure``: the mean entropy, in bits, of the three scores nearest to a half;
    - ``rare``, by a half: that of its rarest class, 1 - log(1 + images with it) / log(1 + images with the commonest);
    - ``disagree``, by a half: the share of a class's instances that one task finds and another does not, of tasks that
      find the class in any image; of one with one mask for all instances (``semantic``), whether it finds any;
    - ``disputed``, by a half: the most, of its instances, of score x (1 - agreement with a second decoder), which is
      high where only the first decoder is sure (`label --agree-with`);
    - ``doubted``, by a half: the largest difference between an instance's score and the probability that the LLM gives
      it (`label --verify`), whichever is higher;
    - ``empty``, by 0.3: nothing was found at all.

    Copies of other images (`label --dedup`) are not chosen and do not count.
    """
    tasks = labels.boxed_tasks()
    with_class: dict[str, int] = {}
    asked: dict[str, set[str]] = {task: set() for task in tasks}  # as far as it was found anywhere
    for image in _originals(labels):
        for task in tasks:
            asked[task] |= {record["phrase"] for record in image.instances(task)}
        for phrase in {record["phrase"] for task in tasks for record in image.instances(task)}:
            with_class[phrase] = with_class.get(phrase, 0) + 1
    most = math.log1p(max(with_class.values(), default=1))
    rarity = {phrase: 1 - math.log1p(number) / most for phrase, number in with_class.items()}
    chosen: list[tuple[float, int, Choice]] = []
    for image in _originals(labels):
        reasons = _reasons(image, asked, rarity)
        choice = Choice(image.number, image.image_id, sum(reasons.values()), reasons)
        entry = (choice.score, -choice.number, choice)
        if len(chosen) < budget:
            heapq.heappush(chosen, entry)
        else:
            heapq.heappushpop(chosen, entry)
    return [choice for _, _, choice in sorted(chosen, key=lambda entry: entry[:2], reverse=True)]


def _originals(labels: Labels) -> Iterator[LabelledImage]:
    return (image for image in labels.images() if image.duplicate_of is None)


def _reasons(image: LabelledImage, asked: Mapping[str, set[str]], rarity: dict[str, float]) -> dict[str, float]:
    """Reason -> what it adds to the score, those that add nothing left out. `asked`: the phrases that each task knows,
    which are the ones that it can disagree about."""
    found = {task: image.instances(task) for task in asked}
    records = [record for some in found.values() for record in some]
    entropies = sorted((_entropy(record["score"]) for record in records), reverse=True)[:3]
    counts = {task: Counter(record["phrase"] for record in some) for task, some in found.items()}
    differences = []
    for phrase in {record["phrase"] for record in records}:
        differences.append(
            _disagreement({task: counts[task][phrase] for task, known in asked.items() if phrase in known})
        )
    reasons = {
        "unsure": sum(entropies) / len(entropies) if entropies else 0.0,
        "rare": 0.5 * max((rarity[record["phrase"]] for record in records), default=0.0),
        "disagree": 0.5 * max(differences, default=0.0),
        "disputed": 0.5
        * max((r["score"] * (1 - r["agreement"]) for r in records if _has(r, "agreement")), default=0.0),
        "doubted": 0.5 * max((abs(r["score"] - r["verified"]) for r in records if _has(r, "verified")), default=0.0),
        "empty": 0.0 if records else 0.3,
    }
    return {reason: value for reason, value in reasons.items() if value > 0}


def _disagreement(found: Mapping[str, int]) -> float:
    """The share of a class's instances that some tasks find and others do not. found: task -> instances."""
    if not all(found.values()):
        return 1.0
    numbers = [number for task, number in found.items() if not get_task(task).joins_objects]
    return (max(numbers) - min(numbers)) / max(numbers) if numbers else 0.0


def _has(record: Record, column: str) -> bool:
    return record[column] is not None


def _entropy(score: float) -> float:
    p = min(max(score, _SURE), 1 - _SURE)
    return -(p * math.log2(p) + (1 - p) * math.log2(1 - p))
