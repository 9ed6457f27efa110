"""Keys and values of answers that are being written, and the attention of one decoding step.

All answers advance by one token in one pass of the LLM, packed into one row of N tokens, so that nothing is padded but
the attention. What an answer attends to is stored in two places:

- the prefix of its image, in `PrefixSlots`: once, however many answers are about the image;
- its own tokens, in `AnswerGroup`, padded to the longest answer of the group.

A softmax over both parts gives what attention over the concatenated sequence would give. The LLM calls
`branch_attention` in every layer (`ATTENTION` in transformers' registry); outside decoding steps that is transformers'
SDPA.

Legend: N answers, H key-value heads, G query heads per key-value head, D head width, P prefix tokens, L own tokens,
S slots of images, M answers per image (padded).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, DynamicCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from lumen_ray.errors import UserError
from lumen_ray.trunk.branch_blocks import BranchBlocks

#: Name of the attention function in the LLM's config.
ATTENTION = "lumen_branches"
#: Own tokens for which memory is taken at a time.
GROWTH = 16


def branch_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    decoding_step: DecodingStep | None = None,
    branch_blocks: BranchBlocks | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention of one layer, in transformers' format: query [B, H * G, T, D], key and value [B, H, T, D] -> [B, T,
    H * G, D]. With a `decoding_step` B is 1 and T the number of its answers."""
    if decoding_step is None and branch_blocks is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    if decoding_step is None:
        assert branch_blocks is not None, "returned above"
        return branch_blocks.attend(query * scaling, key, value), None
    layer: Any = module.layer_idx
    return decoding_step.attend(layer, query[0] * scaling, key[0], value[0])[None], None


def check_attention(llm: Any) -> None:
    """Raises `UserError` if the attention of an LLM is not the plain softmax that `branch_attention` computes."""
    kind = llm.config.model_type
    if not getattr(llm, "_supports_sdpa", True) or getattr(llm.config, "attn_logit_softcapping", None) is not None:
        raise UserError(
            f"the attention of an LLM of type '{kind}' has sinks or capped logits, which are not supported; use "
            "another, such as llama, qwen3 or mistral",
            "unsupported_llm",
        )


AttentionInterface.register(ATTENTION, branch_attention)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)


@dataclass
class KeyValues:
    """Keys and values of each layer, [rows, H, tokens, D]; empty before the first are stored."""

    keys: list[Tensor] = field(default_factory=list)
    values: list[Tensor] = field(default_factory=list)

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, tokens) there is room for."""
        return (self.keys[0].shape[0], self.keys[0].shape[2]) if self.keys else (0, 0)

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in (*self.keys, *self.values))

    def resize(self, rows: int, tokens: int, like: KeyValues) -> None:
        """Makes room for `rows` rows of `tokens` tokens, keeping the content that fits; `like` has the layers, heads
        and types."""
        for mine, theirs in ((self.keys, like.keys), (self.values, like.values)):
            for layer, example in enumerate(theirs):
                made = example.new_zeros(rows, example.shape[1], tokens, example.shape[3])
                if layer < len(mine):
                    kept = mine[layer][:rows, :, :tokens]
                    made[: kept.shape[0], :, : kept.shape[2]] = kept
                    mine[layer] = made
                else:
                    mine.append(made)

    def write(self, row: int, of: KeyValues, source: int, start: int, length: int) -> None:
        """Copies `length` tokens from `start` of row `source` of `of` to the beginning of `row`."""
        for mine, theirs in ((self.keys, of.keys), (self.values, of.values)):
            for target, tensor in zip(mine, theirs, strict=True):
                target[row, :, :length] = tensor[source, :, start : start + length]

    @classmethod
    def of_cache(cls, cache: DynamicCache, tokens: int | None = None) -> KeyValues:
        """Views of a cache's first `tokens` tokens (None: all)."""
        layers: list[Any] = list(cache.layers)
        return cls([layer.keys[:, :, :tokens] for layer in layers], [layer.values[:, :, :tokens] for layer in layers])


@dataclass
class _Batch:
    """A batch of images in slots: its own cache, the first of its slots and their number, and how many answers are
    about it."""

    cache: DynamicCache
    first: int
    size: int
    answers: int = 0


class PrefixSlots:
    """Keys and values of image prefixes of `length` tokens: each batch of images has consecutive slots.

    A batch in slots reads its own cache from them (`_share`), so that they are stored once.
    """

    def __init__(self, length: int):
        self.length = length
        self.stored = KeyValues()
        self._batches: dict[int, _Batch] = {}  # by id of the cache

    def slot(self, cache: DynamicCache) -> int:
        """The first slot of a batch that is stored."""
        return self._batches[id(cache)].first

    def acquire(self, cache: DynamicCache) -> None:
        """Stores the images of a batch, unless they are, for one more answer about them."""
        if id(cache) not in self._batches:
            self._store(cache)
        self._batches[id(cache)].answers += 1

    def _store(self, cache: DynamicCache) -> None:
        new = KeyValues.of_cache(cache, self.length)
        size = new.shape[0]
        if not self._batches:
            self.stored, first = new, 0  # alone: nothing is copied
        else:
            first = self._free(size)
            if first + size > self.stored.shape[0]:
                self.stored.resize(first + size, self.length, new)
            for row in range(size):
                self.stored.write(first + row, new, row, 0, self.length)
        self._batches[id(cache)] = _Batch(cache, first, size)
        self._share()

    def release(self, cache: DynamicCache) -> None:
        """Counts an answer out. When the last about a batch of images leaves, the images are given up."""
        batch = self._batches[id(cache)]
        batch.answers -= 1
        if batch.answers:
            return
        del self._batches[id(cache)]
        if not self._batches:
            self.stored = KeyValues()
        elif 2 * sum(other.size for other in self._batches.values()) <= self.stored.shape[0]:
            self._compact()

    def _free(self, size: int) -> int:
        """The first of `size` consecutive free slots; those behind the last one are free."""
        start = 0
        for batch in sorted(self._batches.values(), key=lambda batch: batch.first):
            if batch.first - start >= size:
                break
            start = batch.first + batch.size
        return start

    def _compact(self) -> None:
        """Moves all batches to the front, and gives back the memory behind them."""
        slots: list[int] = []
        for batch in self._batches.values():
            old, batch.first = batch.first, len(slots)
            slots += range(old, old + batch.size)
        index = torch.tensor(slots, device=self.stored.keys[0].device)
        self.stored = KeyValues([t[index] for t in self.stored.keys], [t[index] for t in self.stored.values])
        self._share()

    def _share(self) -> None:
        """Lets each batch's own cache read from the slots, unless only its lead tokens are in them."""
        for batch in self._batches.values():
            if batch.cache.get_seq_length() != self.length:
                continue
            slots = slice(batch.first, batch.first + batch.size)
            layers: list[Any] = list(batch.cache.layers)
            for layer, keys, values in zip(layers, self.stored.keys, self.stored.values, strict=True):
                layer.keys, layer.values = keys[slots], values[slots]


@dataclass(eq=False)
class Row:
    """An answer's place in a group. `cache`: of the batch its image is in; `image`: the index there; `has_image`: False
    in text alone; `length`: own tokens stored; `position`: of its next token."""

    cache: DynamicCache
    image: int
    has_image: bool
    length: int
    position: int


class AnswerGroup:
    """Answers whose prefixes have equally many tokens and that are about equally long."""

    def __init__(self, slots: PrefixSlots | None):
        """`slots`: of their images, None for text alone."""
        self.slots = slots
        self.rows: list[Row] = []
        self.stored = KeyValues()

    def reserve(self, answers: int, like: DynamicCache) -> None:
        """Makes room for so many more answers; `like`: a cache of the LLM."""
        rows, tokens = self.stored.shape
        if len(self.rows) + answers > rows:
            self.stored.resize(len(self.rows) + answers, max(tokens, GROWTH), KeyValues.of_cache(like))

    def join(self, row: Row, cache: DynamicCache, source: int, start: int) -> None:
        """Adds an answer with `row.length` own tokens: those from `start` of row `source` of `cache`. Room for it is
        reserved."""
        new = KeyValues.of_cache(cache)
        rows, tokens = self.stored.shape
        if row.length > tokens:
            self.stored.resize(rows, -(-row.length // GROWTH) * GROWTH, new)
        self.stored.write(len(self.rows), new, source, start, row.length)
        if self.slots is not None:
            self.slots.acquire(row.cache)
        self.rows.append(row)

    def leave(self, row: Row) -> None:
        """Removes an answer; the last one takes its place."""
        if self.slots is not None:
            self.slots.release(row.cache)
        place = self.rows.index(row)
        last = self.rows.pop()
        if last is not row:
            self.rows[place] = last
            self.stored.write(place, self.stored, len(self.rows), 0, last.length)
        if not self.rows:
            self.stored = KeyValues()
        elif 2 * len(self.rows) <= self.stored.shape[0]:
            longest = max(other.length for other in self.rows) + 1
            self.stored.resize(len(self.rows), -(-longest // GROWTH) * GROWTH, self.stored)

    def prepare(self) -> GroupStep:
        """Makes room for one more token of each answer, and what all layers of a step need to know."""
        longest = max(row.length for row in self.rows) + 1
        if longest > self.stored.shape[1]:
            self.stored.resize(self.stored.shape[0], self.stored.shape[1] + GROWTH, self.stored)
        device = self.stored.keys[0].device
        lengths = torch.tensor([row.length for row in self.rows], device=device)
        hidden = torch.arange(longest, device=device) > lengths[:, None]  # behind the token that is being added
        cells, width = self._cells()
        return GroupStep(
            self,
            torch.arange(len(self.rows), device=device),
            lengths,
            longest,
            hidden[:, None, None] if bool(hidden.any()) else None,
            None if cells is None else torch.tensor(cells, device=device),
            width,
        )

    def _cells(self) -> tuple[list[int] | None, int]:
        """Each answer's cell in the grid [S, M] of slots and answers per slot, None if the cells are in order; M."""
        if self.slots is None:
            return None, 0
        taken: dict[int, int] = {}
        places = []
        for row in self.rows:
            slot = self.slots.slot(row.cache) + row.image
            places.append((slot, taken.get(slot, 0)))
            taken[slot] = taken.get(slot, 0) + 1
        width = max(taken.values())
        cells = [slot * width + number for slot, number in places]
        whole = self.slots.stored.shape[0] * width == len(cells)
        return (None if whole and cells == sorted(cells) else cells), width


@dataclass
class GroupStep:
    """One step of a group's N answers.

    `rows` int64 [N]: 0..N-1; `lengths` int64 [N]: own tokens before the step; `hidden` bool [N, 1, 1, L], or None: own
    tokens behind an answer's last one; `cells` int64 [N]: see `AnswerGroup._cells`.
    """

    group: AnswerGroup
    rows: Tensor
    lengths: Tensor
    longest: int
    hidden: Tensor | None
    cells: Tensor | None
    width: int

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """query [N, H, G, D], scaled; key and value [N, H, D] of the new tokens -> [N, H, G, D]."""
        stored, number = self.group.stored, len(self.rows)
        stored.keys[layer][self.rows, :, self.lengths] = key
        stored.values[layer][self.rows, :, self.lengths] = value
        own_keys = stored.keys[layer][:number, :, : self.longest]
        own_values = stored.values[layer][:number, :, : self.longest]
        logits = query @ own_keys.transpose(-1, -2)
        if self.hidden is not None:
            logits = logits.masked_fill(self.hidden, torch.finfo(logits.dtype).min)
        if self.group.slots is None:
            return logits.float().softmax(-1).to(value.dtype) @ own_values
        shared, prefix = self.group.slots.stored, self.group.slots.length
        to_prefix = self._from_grid(self._to_grid(query) @ shared.keys[layer].transpose(-1, -2))
        weights = torch.cat([to_prefix, logits], dim=-1).float().softmax(-1).to(value.dtype)
        of_prefix = self._from_grid(self._to_grid(weights[..., :prefix]) @ shared.values[layer])
        return of_prefix + weights[..., prefix:] @ own_values

    def _to_grid(self, rows: Tensor) -> Tensor:
        """[N, H, G, X] -> [S, H, M * G, X], each answer in its image's row."""
        assert self.group.slots is not None, "only answers about images have a grid"
        slots, (_, heads, queries, size) = self.group.slots.stored.shape[0], rows.shape
        if self.cells is not None:
            grid = rows.new_zeros(slots * self.width, heads, queries, size)
            grid[self.cells] = rows
            rows = grid
        return rows.view(slots, self.width, heads, queries, size).transpose(1, 2).flatten(2, 3)

    def _from_grid(self, grid: Tensor) -> Tensor:
        """The inverse of `_to_grid`."""
        rows = grid.unflatten(2, (self.width, -1)).transpose(1, 2).flatten(0, 1)
        return rows if self.cells is None else rows[self.cells]


class DecodingStep:
    """The next token of every answer of all groups, in the order of the groups and their rows."""

    def __init__(self, groups: Sequence[AnswerGroup]):
        self.groups = [group.prepare() for group in groups]
        rows = [row for group in groups for row in group.rows]
        self.positions = [row.position for row in rows]
        self.have_images = [row.has_image for row in rows]
        self.attended = False  # whether the LLM has called `attend`

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """query [H * G, N, D], scaled; key and value [H, N, D] -> [N, H * G, D]."""
        self.attended = True
        query = query.unflatten(0, (len(key), -1)).permute(2, 0, 1, 3)
        key, value = key.transpose(0, 1), value.transpose(0, 1)
        found, start = [], 0
        for group in self.groups:
            rows = slice(start, start + len(group.rows))
            found.append(group.attend(layer, query[rows], key[rows], value[rows]))
            start = rows.stop
        return (found[0] if len(found) == 1 else torch.cat(found)).flatten(1, 2)

    def finish(self) -> None:
        """Advances the answers by the token that was stored."""
        for step in self.groups:
            for row in step.group.rows:
                row.length += 1
                row.position += 1
