"""Size buckets: the input sizes that a model is trained and run with, and the assignment of images to them.

Images of one batch share a bucket, so an image is padded only to the bucket that fits its shape best. A row group of
the shards mixes shapes, so the rows of a training step are chosen one by one (`BucketStream`): every image gets the
same bucket as at inference, rows stay as shuffled as they were written, and shards are not tied to the buckets of one
recipe. In return, a row group is read once for each bucket of its rows.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import numpy as np

from lumen_ray.data.batches.packing import MIN_BRANCH_TOKENS
from lumen_ray.errors import UserError
from lumen_ray.model.settings import ModelSettings
from lumen_ray.recipe import BucketRange, Recipe
from lumen_ray.structures import Size

Row = tuple[str, int, int]  # file, row group, number of the row in it

PADDING_SLACK = 0.1  # buckets whose share of padding differs by less fit an image equally well


def resolve(buckets: Sequence[Size] | BucketRange, settings: ModelSettings) -> tuple[Size, ...]:
    """The distinct buckets as (height, width), those of a `BucketRange` rounded to the model's grid.

    Raises `UserError` if a listed bucket does not fit the grid.
    """
    step = settings.input_step
    if isinstance(buckets, BucketRange):
        exact = [(side / math.sqrt(r), side * math.sqrt(r)) for side in buckets.sides for r in buckets.aspect_ratios]
        return tuple(dict.fromkeys((_round(height, step), _round(width, step)) for height, width in exact))
    for height, width in buckets:
        if height % step or width % step:
            near = [_round(height, step), _round(width, step)]
            raise UserError(
                f"bucket [{height}, {width}] does not fit the grid of model '{settings.name}': height and width must "
                f"be multiples of {step}, e.g. {near}",
                "invalid_config",
            )
    return tuple(dict.fromkeys(buckets))


def _round(length: float, step: int) -> int:
    """The nearest positive multiple of `step`."""
    return max(1, round(length / step)) * step


@lru_cache(maxsize=65536)
def choose(size: Size, buckets: tuple[Size, ...]) -> Size:
    """The bucket of an image of (height, width) `size`.

    Of the buckets with the least padding (up to `PADDING_SLACK`), the smallest that does not shrink the image; if all
    shrink it, the one that shrinks it least.
    """
    height, width = size
    scales = [min(h / height, w / width) for h, w in buckets]
    areas = [h * w for h, w in buckets]
    padding = [1 - scale * scale * height * width / area for scale, area in zip(scales, areas, strict=True)]
    fitting = [i for i, share in enumerate(padding) if share <= min(padding) + PADDING_SLACK]
    if whole := [i for i in fitting if scales[i] >= 1]:
        return buckets[min(whole, key=lambda i: (areas[i], padding[i], i))]
    return buckets[max(fitting, key=lambda i: (scales[i], -areas[i], -i))]


def assign(sizes: Sequence[Size | None], buckets: tuple[Size, ...], batch_size: int) -> list[Size | None]:
    """The bucket of each row of a pool; None for rows without an image, which form separate batches.

    Buckets that would not fill one batch are dropped, the rarest first: their rows go to the next best one. If the rows
    without image, or those of a bucket, are fewer than a batch, rows without image join the most frequent bucket. So a
    batch spans at most two epochs, unless the whole pool has fewer rows than a batch.
    """
    used = list(buckets)
    while True:
        chosen = [None if size is None else choose(size, tuple(used)) for size in sizes]
        counts = Counter(bucket for bucket in chosen if bucket is not None)
        rare = [bucket for bucket in used if 0 < counts[bucket] < batch_size]
        if not rare or len(counts) == 1:
            break
        used.remove(min(rare, key=lambda bucket: (counts[bucket], used.index(bucket))))
    if counts and min(chosen.count(None), *counts.values()) < batch_size:
        most = max(used, key=lambda bucket: counts[bucket])
        chosen = [most if bucket is None else bucket for bucket in chosen]
    return chosen


class BucketStream:
    """Endless batches of rows that share a bucket: batch n is a pure function of n and the constructor's arguments.

    In every epoch all rows pass in the order of row groups given by `order(epoch)`. Each bucket collects its rows;
    whenever it has `batch_size`, they are the next batch. Rows left over at the end of an epoch are kept for the next,
    so every row is used once per epoch. Batches can be computed in any order, since the number of batches that a bucket
    has filled before an epoch follows from its number of rows.
    """

    def __init__(
        self,
        pool: Sequence[tuple[str, int, int]],
        sizes: Sequence[Sequence[Size | None]],
        buckets: tuple[Size, ...],
        batch_size: int,
        order: Callable[[int], np.ndarray],
    ):
        """`pool`: row groups (file, index, number of rows); `sizes`: of the images of each, None for text-only rows."""
        self.pool, self.batch_size, self.order = pool, batch_size, order
        self.starts = np.cumsum([0, *(rows for _, _, rows in pool)])
        chosen = assign([size for group in sizes for size in group], buckets, batch_size)
        self.buckets = sorted(set(chosen), key=lambda bucket: bucket or (0, 0))
        place = {bucket: i for i, bucket in enumerate(self.buckets)}
        self.bucket_of = np.array([place[bucket] for bucket in chosen])
        self.counts = [int(n) for n in np.bincount(self.bucket_of, minlength=len(self.buckets))]
        self.smallest = min(buckets, key=lambda bucket: bucket[0] * bucket[1])
        self._epochs: dict[int, tuple[np.ndarray, list[np.ndarray]]] = {}
        self._full: dict[int, list[tuple[int, int]]] = {}

    def batch(self, n: int) -> tuple[Size, tuple[Row, ...]]:
        """(bucket, rows) of batch n. Text-only rows have the smallest bucket."""
        epoch = n * self.batch_size // len(self.bucket_of)
        while self._filled(epoch + 1) <= n:
            epoch += 1
        while self._filled(epoch) > n:
            epoch -= 1
        bucket, number = self._batches(epoch)[n - self._filled(epoch)]
        first = number * self.batch_size
        rows = tuple(self._row(bucket, i) for i in range(first, first + self.batch_size))
        return self.buckets[bucket] or self.smallest, rows

    def _filled(self, epoch: int) -> int:
        """Number of batches filled before an epoch."""
        return sum(epoch * count // self.batch_size for count in self.counts)

    def _batches(self, epoch: int) -> list[tuple[int, int]]:
        """The (bucket, number within the bucket) of the batches that an epoch fills, in the order of filling."""
        if epoch not in self._full:
            _, places = self._epoch(epoch)
            full = []
            for bucket, count in enumerate(self.counts):
                for number in range(epoch * count // self.batch_size, (epoch + 1) * count // self.batch_size):
                    last = (number + 1) * self.batch_size - 1 - epoch * count
                    full.append((int(places[bucket][last]), bucket, number))
            _forget(self._full)
            self._full[epoch] = [(bucket, number) for _, bucket, number in sorted(full)]
        return self._full[epoch]

    def _row(self, bucket: int, i: int) -> Row:
        """The i-th row of a bucket, counted over all epochs."""
        epoch, place = divmod(i, self.counts[bucket])
        order, places = self._epoch(epoch)
        row = int(order[places[bucket][place]])
        group = int(np.searchsorted(self.starts, row, side="right")) - 1
        file, index, _ = self.pool[group]
        return file, index, row - int(self.starts[group])

    def _epoch(self, epoch: int) -> tuple[np.ndarray, list[np.ndarray]]:
        """The rows in the order of an epoch, and per bucket the positions of its rows in that order."""
        if epoch not in self._epochs:
            groups = self.order(epoch)
            order = np.concatenate([np.arange(self.starts[g], self.starts[g + 1]) for g in groups])
            passing = self.bucket_of[order]
            _forget(self._epochs)
            self._epochs[epoch] = order, [np.flatnonzero(passing == b) for b in range(len(self.buckets))]
        return self._epochs[epoch]


def _forget(epochs: dict[int, Any]) -> None:
    """Drops all but the last two epochs, so that three are kept: a batch seldom spans more, and old ones can be
    recomputed."""
    while len(epochs) > 2:
        del epochs[next(iter(epochs))]


def with_sizes(recipe: Recipe, settings: ModelSettings) -> Recipe:
    """The recipe with its buckets as (height, width). Raises `UserError` if one does not fit the model's grid or leaves
    no room in `pack_tokens`."""
    sizes: tuple[Size, ...] = ()
    if recipe.buckets is not None:
        sizes = resolve(recipe.buckets, settings)
        recipe = recipe.model_copy(update={"buckets": sizes})
    side = settings.image_size
    height, width = max(sizes or [(side, side)], key=settings.image_tokens)
    least = settings.image_tokens((height, width)) + MIN_BRANCH_TOKENS
    if 0 < recipe.pack_tokens < least:
        raise UserError(
            f"pack_tokens {recipe.pack_tokens} leaves no room for prompts beside the image tokens of an input of "
            f"{width}x{height} pixels; give at least {least}, or 0 for a row per image",
            "invalid_config",
        )
    return recipe
