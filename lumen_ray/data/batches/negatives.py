"""Which classes an image is asked for in one training step: those present, and some that are known to be absent.

The rule, for sets of any number of classes:

1. Only classes in the row's `classes` are asked for: those annotated exhaustively in this image. In a federated set
   (LVIS, arXiv 1908.03195) that is the few that someone looked for, without those listed as not exhaustive; a class
   nobody checked is neither asked for as present (the boxes that are missing would be trained as background) nor as
   absent (it may be there).
2. Of the present ones at most `max_classes`, drawn uniformly.
3. Of the absent ones `negatives`. Each is drawn by frequency with probability `negatives_by_frequency`, else uniformly;
   none twice. By frequency means in proportion to the square root of the number of images that show the class.

The square root is the federated loss's (Zhou et al., arXiv 2103.07461, as in Detic, arXiv 2201.02605): classes that
are often asked for as present must be often asked for as absent, or their score only learns to rise. OWL-ViT (arXiv
2205.06230) also draws its negatives by frequency, GLIP (arXiv 2112.03857) uniformly; the uniform share keeps rare
classes from never being seen as absent. Unlike those, no unchecked class stands in as a negative.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import numpy as np

from lumen_ray.recipe import BranchSettings

T = TypeVar("T")


def class_frequencies(manifest: dict[str, Any]) -> dict[str, int]:
    """Images that show each class, by name; empty for shards whose manifest does not count them."""
    return {c["name"]: c["images"] for c in manifest["categories"] if "images" in c}


def choose_classes(
    row: dict[str, Any],
    visible: Sequence[str],
    settings: BranchSettings,
    frequencies: Mapping[str, int],
    rng: np.random.Generator,
) -> list[str]:
    """The classes to ask `row` for by the rule above: present ones first, then absent ones.

    `visible`: class names of the instances left in the model input, each once. What was cropped away is asked for
    neither way. `frequencies` may lack classes; without any, all draws are uniform. Uses nothing random but `rng`.
    """
    annotated = set(row["classes"])
    present = [name for name in visible if name in annotated]
    seen = {instance["phrase"] for instance in row["instances"]}
    absent = [name for name in row["classes"] if name not in seen]
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
    """At most `count` items, one after the other in proportion to their weight, without replacement.

    The smallest of exponential times with the weights as rates (Efraimidis and Spirakis, 2006): one draw per item.
    """
    times = rng.exponential(size=len(items)) / weights
    return [items[i] for i in np.argsort(times, kind="stable")[:count]]
