"""Selects the classes that an image is prompted with in a training step: classes present, and absent ones as negatives.

The rule, for any number of classes:

1. Only classes in the row's `classes` are used: those annotated exhaustively in this image. In a federated data set
   (LVIS, arXiv 1908.03195) these are the few that annotators checked, without those listed as not exhaustive; an
   unchecked class is used neither as present (missing boxes would be trained as background) nor as absent (it may be
   in the image).
2. Of the classes present, at most `max_classes`, drawn uniformly.
3. Of the absent ones, `negatives`. Each is drawn by frequency with probability `negatives_by_frequency`, else
   uniformly, without repeats. By frequency: in proportion to the square root of the number of images with the class.

The square root is that of the federated loss (Zhou et al., arXiv 2103.07461, as in Detic, arXiv 2201.02605): classes
that are often prompted as present must often be prompted as absent, or their score only learns to rise. OWL-ViT (arXiv
2205.06230) also draws its negatives by frequency, GLIP (arXiv 2112.03857) uniformly; the uniform share makes sure that
rare classes are also trained as absent. Unlike there, an unchecked class is never a negative.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import numpy as np

from lumen_ray.recipe import BranchSettings

T = TypeVar("T")


def class_frequencies(manifest: dict[str, Any]) -> dict[str, int]:
    """Number of images with each class, by name; empty for shards whose manifest does not count them."""
    return {c["name"]: c["images"] for c in manifest["categories"] if "images" in c}


def choose_classes(
    row: dict[str, Any],
    visible: Sequence[str],
    settings: BranchSettings,
    frequencies: Mapping[str, int],
    rng: np.random.Generator,
) -> list[str]:
    """The classes to prompt `row` with, by the rule above: present ones, then absent ones.

    `visible`: class names of the instances left in the model input, each once; a class that was cropped away is left
    out. `frequencies` may lack classes; without any, all draws are uniform. All random draws come from `rng`.
    """
    annotated = set(row["classes"])
    present = [name for name in visible if name in annotated]
    stored = {instance["phrase"] for instance in row["instances"]}
    absent = [name for name in row["classes"] if name not in stored]
    count = min(settings.negatives, len(absent))
    by_frequency = int(rng.binomial(count, settings.negatives_by_frequency))
    weights = np.sqrt([max(frequencies.get(name, 1), 1) for name in absent])
    frequent = weighted_draw(absent, weights, by_frequency, rng)
    rest = [name for name in absent if name not in frequent]
    return draw(present, settings.max_classes, rng) + frequent + draw(rest, count - by_frequency, rng)


def draw(items: Sequence[T], count: int, rng: np.random.Generator) -> list[T]:
    """At most `count` items in random order, without replacement."""
    return [items[i] for i in rng.permutation(len(items))[:count]]


def weighted_draw(items: Sequence[T], weights: np.ndarray, count: int, rng: np.random.Generator) -> list[T]:
    """At most `count` items, drawn in proportion to their weights, without replacement.

    Takes the smallest exponential times with the weights as rates (Efraimidis and Spirakis, 2006): one draw per item.
    """
    times = rng.exponential(size=len(items)) / weights
    return [items[i] for i in np.argsort(times, kind="stable")[:count]]
