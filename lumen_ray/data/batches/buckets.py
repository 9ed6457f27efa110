"""Size buckets: the few input sizes a model is trained and run at, and which image goes into which.

Images of one batch share a bucket, so an image is padded only to the bucket that fits its shape best. A row group of
the shards mixes shapes; what a training step reads is therefore chosen row by row (`BucketStream`): every image sees
the bucket it also gets at inference, rows stay as shuffled as they were written, and shards need not be prepared for
one recipe's buckets. The price is that a row group is read once for each bucket it holds rows of.
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

PADDING_SLACK = 0.1  # buckets whose padding differs by less fit an image's shape equally well


def resolve(buckets: Sequence[Size] | BucketRange, settings: ModelSettings) -> tuple[Size, ...]:
    """The buckets as (height, width), each once; `UserError` when one does not fit the model's grid.

    The sides of a `BucketRange` are rounded to the grid.
    """
    step = settings.input_step
    if isinstance(buckets, BucketRange):
        wanted = [(side / math.sqrt(r), side * math.sqrt(r)) for side in buckets.sides for r in buckets.aspect_ratios]
        sizes = [tuple(max(1, round(length / step)) * step for length in size) for size in wanted]
        return tuple(dict.fromkeys(sizes))
    for height, width in buckets:
        if height % step or width % step:
            near = [max(1, round(side / step)) * step for side in (height, width)]
            raise UserError(
                f"bucket [{height}, {width}] does not fit the grid of model '{settings.name}': height and width must "
                f"be multiples of {step}, e.g. {near}",
                "invalid_config",
            )
    return tuple(dict.fromkeys(buckets))


@lru_cache(maxsize=65536)
def choose(size: Size, buckets: tuple[Size, ...]) -> Size:
    """The bucket of an image of (height, width) `size`.

    Of the buckets that need least padding (up to `PADDING_SLACK`) the smallest that need not shrink the image; when
    all shrink it, the one that shrinks it least.
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
    """The bucket of each row of a pool; None for rows without an image, which make batches of their own.

    A bucket that would not fill one batch is not used, the rarest first: its rows go to their next best one, rows
    without image to the most frequent where they, or the images, are fewer than a batch. So a batch spans no more than
    two epochs, unless the whole pool has fewer rows than a batch.
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
    """Endless batches of rows that share a bucket: batch n is a pure function of n and what it is made from.

    Epoch after epoch all rows pass in the order of the row groups that `order(epoch)` gives. Each bucket collects its
    rows; whenever it has `batch_size`, that is the next batch. What is left over at an epoch's end waits for the next,
    so every row is used once per epoch. Batches can be computed in any order: how many a bucket has filled before an
    epoch follows from its number of rows.
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
        """(bucket, rows) of batch n. Text-only rows get the smallest bucket."""
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
        """Batches filled before an epoch."""
        return sum(epoch * count // self.batch_size for count in self.counts)

    def _batches(self, epoch: int) -> list[tuple[int, int]]:
        """The (bucket, number within the bucket) of the batches that an epoch fills, in the order they get full."""
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
        """The i-th row that a bucket collects, counted over all epochs."""
        epoch, place = divmod(i, self.counts[bucket])
        order, places = self._epoch(epoch)
        row = int(order[places[bucket][place]])
        group = int(np.searchsorted(self.starts, row, side="right")) - 1
        file, index, _ = self.pool[group]
        return file, index, row - int(self.starts[group])

    def _epoch(self, epoch: int) -> tuple[np.ndarray, list[np.ndarray]]:
        """Rows in the order they pass, and per bucket the places of its rows in that order."""
        if epoch not in self._epochs:
            groups = self.order(epoch)
            order = np.concatenate([np.arange(self.starts[g], self.starts[g + 1]) for g in groups])
            passing = self.bucket_of[order]
            _forget(self._epochs)
            self._epochs[epoch] = order, [np.flatnonzero(passing == b) for b in range(len(self.buckets))]
        return self._epochs[epoch]


def _forget(epochs: dict[int, Any]) -> None:
    """Makes room for one more of three epochs: a batch seldom spans more, and old ones can be computed again."""
    while len(epochs) > 2:
        del epochs[next(iter(epochs))]


def with_sizes(recipe: Recipe, settings: ModelSettings) -> Recipe:
    """The recipe with its buckets as sizes; `UserError` when the model's grid or `pack_tokens` does not allow them."""
    if recipe.buckets is not None:
        recipe = recipe.model_copy(update={"buckets": resolve(recipe.buckets, settings)})
    side = settings.image_size
    height, width = max(recipe.buckets or [(side, side)], key=settings.image_tokens)
    least = settings.image_tokens((height, width)) + MIN_BRANCH_TOKENS
    if 0 < recipe.pack_tokens < least:
        raise UserError(
            f"pack_tokens {recipe.pack_tokens} leaves no room for prompts beside the image tokens of an input of "
            f"{width}x{height} pixels; give at least {least}, or 0 for a row per image",
            "invalid_config",
        )
    return recipe
