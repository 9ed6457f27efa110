"""The trunk: vision branch, region encoder, LLM, super-link queries and link heads, and the shared dense features.

Training runs prefix and branches in one pass (`forward`). Inference encodes the prefix once (`encode`), runs branches
in chunks against its cached keys and values (`run_branches`), and writes answers token by token (`decode_step`). Both
give the same results.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, DynamicCache

from lumen_ray.attention import mask_to_bias
from lumen_ray.decoders.registry import DECODERS, dense_readers
from lumen_ray.decoders.spec import DecoderSettings
from lumen_ray.errors import UserError
from lumen_ray.meta_init import published_part
from lumen_ray.superlink import SuperLink
from lumen_ray.trunk.batch import TrainingBatch
from lumen_ray.trunk.branch_blocks import BranchBlocks
from lumen_ray.trunk.comm import BridgedVision, CommVision, build_vision
from lumen_ray.trunk.decoding import ATTENTION, DecodingStep, check_attention
from lumen_ray.trunk.dense import ConvStem, DenseFeatures
from lumen_ray.trunk.image_adapters import adapt
from lumen_ray.trunk.kept import KeptOutputs
from lumen_ray.trunk.layout import IGNORE, Layout
from lumen_ray.trunk.lm_losses import distilled_losses, next_token_losses, without_adapters
from lumen_ray.trunk.masks import (
    branch_starts,
    packed,
    packed_allowed,
    position_ids,
    prefix_allowed,
    prefix_segments,
    rows_allowed,
    seen_prefix,
    unpacked,
    visible_prefix,
)
from lumen_ray.trunk.prefix import Prefix
from lumen_ray.trunk.queries import SuperLinkQueries, mean_words
from lumen_ray.trunk.regions import build_regions, encode_in_parts
from lumen_ray.trunk.settings import TrunkSettings

_Stem = tuple[Tensor, Tensor, Tensor]  # features at strides 4, 8 and 16


@dataclass
class TrunkTraining:
    """Outputs of a training pass."""

    lm_losses: Tensor  # [B, T - 1], next-token cross entropy, 0 where unsupervised
    lm_tokens: Tensor  # scalar, the number of supervised tokens
    dense: Tensor | None  # [B, channels, H/4, W/4]; None if no decoder reads it
    links: dict[str, SuperLink]  # by decoder


class Trunk(nn.Module):
    """See the module's docstring."""

    llm: Any  # a causal LM of transformers
    vision: CommVision | BridgedVision
    stem: ConvStem | None
    dense: DenseFeatures | None
    lead: Tensor  # int64 [number of lead tokens]

    def __init__(self, settings: TrunkSettings, vocab_size: int, decoders: Mapping[str, DecoderSettings]):
        """`decoders`: settings of the model's decoders by name, in the registry's order. They determine the query sets,
        the link heads, and whether dense features are computed."""
        super().__init__()
        self.settings = settings
        self.dense_readers = dense_readers(decoders)
        needs_dense = bool(self.dense_readers)
        config = settings.llm_config(vocab_size=vocab_size)
        self.llm = published_part(lambda: AutoModelForCausalLM.from_config(config, attn_implementation=ATTENTION))
        check_attention(self.llm)
        if settings.image_adapters:
            adapt(self.llm, settings.image_adapters)
        width = config.hidden_size
        std = getattr(config, "initializer_range", 0.02)
        self.stem = ConvStem(settings.stem_channels) if settings.tokens_read_stem or needs_dense else None
        stem_width = self.stem.widths[-1] if self.stem is not None and settings.tokens_read_stem else 0
        self.vision = build_vision(settings.vision, settings.image_size, width, std, stem_width)
        self.regions = build_regions(settings.regions, self.vision, width)
        self.register_buffer("lead", torch.tensor(settings.lead_tokens, dtype=torch.int64), persistent=False)
        families = dict.fromkeys(DECODERS[name].family for name in decoders)
        self.queries = SuperLinkQueries(width, std, families, settings.pose_queries)
        shape = settings.shape(width, vocab_size)
        self.link_heads = nn.ModuleDict(
            {name: DECODERS[name].resolve("link_head")(section, shape) for name, section in decoders.items()}
        )
        self._takes_blocks = True
        #: whether training on a CPU attends in blocks, which compiled blocks of the LLM cannot
        self.trains_in_blocks = True
        #: outputs that a stage with a frozen trunk keeps between its steps
        self.kept: KeptOutputs | None = None
        self.dense = None
        if needs_dense and self.stem is not None:
            self.dense = DenseFeatures(self.stem.widths, settings.dense_channels, self.vision.merged_width, width)

    def extract_features(self, images: Tensor) -> tuple[Tensor, Tensor, _Stem | None]:
        """images [B, 3, H, W] in 0..1 -> (tokens of the prefix, merged map, stem features)."""
        stem: _Stem | None = None if self.stem is None else self.stem(images)
        read = stem[-1] if stem is not None and self.settings.tokens_read_stem else None
        tokens, merged = self.vision(images, read)
        return self._with_lead(tokens), merged, stem

    def _with_lead(self, tokens: Tensor) -> Tensor:
        """Image tokens [B, P, width] with the embedded lead tokens before them."""
        if not len(self.lead):
            return tokens
        lead = self.llm.get_input_embeddings()(self.lead).to(tokens.dtype)
        return torch.cat([lead.expand(len(tokens), -1, -1), tokens], dim=1)

    def embed_branches(self, layout: Layout, regions: Tensor | None) -> Tensor:
        """Token embeddings [B, T, width] with queries and region embeddings in their slots."""
        embeds = self.llm.get_input_embeddings()(layout.input_ids).clone()
        for family, slots in layout.query_slots.items():
            embeds[slots[..., 0], slots[..., 1]] = self.queries(family, layout.link_parents[family]).to(embeds.dtype)
        if len(layout.region_slots):
            assert regions is not None, "a layout with regions needs region masks"
            slots = layout.region_slots
            embeds[slots[:, 0], slots[:, 1]] = regions[layout.region_index].to(embeds.dtype)
        return embeds

    def links(self, hidden: Tensor, layout: Layout, embeds: Tensor) -> dict[str, SuperLink]:
        """The super links by decoder, each of all prompts of the decoder's family: the link head applied to the last
        hidden states [B, T, width] at the query slots.

        With `link_reads_words` the head also reads the mean embedding of the instruction's words, in a text of those
        that name the link's objects, from `embeds` [B, T, width] or from the head's own embedding table.
        """
        words = None
        if self.settings.link_reads_words and layout.query_slots:
            words = self._words(embeds, layout)
        out = {}
        for name, head in self.link_heads.items():
            family = DECODERS[name].family
            if (slots := layout.query_slots.get(family)) is None:
                continue
            parents = layout.link_parents[family]
            vocabulary = cast("nn.Embedding | None", head.vocabulary)
            means = words if vocabulary is None else self._words(vocabulary(layout.input_ids), layout)
            read = None if means is None else means[layout.link_branches[family]]
            if read is not None and family in layout.text_routes:
                table = embeds if vocabulary is None else vocabulary(layout.input_ids)
                named = mean_words(table, layout.link_words[family], slots, len(slots))
                read = torch.where(layout.text_routes[family][:, None] >= 0, named, read)
            embeddings = head(hidden[slots[..., 0], slots[..., 1]], read, parents)
            images, groups = layout.link_images[family], layout.link_groups[family]
            out[name] = SuperLink(name, embeddings.float(), images, parents, groups)
        return out

    @torch.inference_mode()
    def text_links(self, decoder: str, states: Tensor, words: Sequence[Sequence[int]]) -> Tensor:
        """Embeddings [P, channels], float32, of links that were written in texts, from the last hidden states [P, N,
        width] at their queries and the ids of the tokens that name the objects of each."""
        head, read = self.link_heads[decoder], None
        if self.settings.link_reads_words:
            table = cast("nn.Embedding | None", head.vocabulary) or self.llm.get_input_embeddings()
            read = torch.stack([table(torch.tensor(ids, device=states.device)).mean(0) for ids in words])
        return head(states, read, torch.full((len(states),), -1, device=states.device)).float()

    @staticmethod
    def _words(embeds: Tensor, layout: Layout) -> Tensor:
        """Mean embedding of every branch's tokens before its queries: [number of branches, width]."""
        queries = torch.cat([slots.flatten(0, 1) for slots in layout.query_slots.values()])
        return mean_words(embeds, layout.branch_ids, queries, len(layout.last_slots))

    def forward(self, batch: TrainingBatch) -> TrunkTraining:
        """One pass over prefix and branches.

        Reads the batch's `images`, `has_image`, `layout`, `region_masks`, `region_images` and `decoders`. If
        `layout.pack` is set, `images` may lack those of the last samples. Dense features are computed if one of
        `decoders` (None: all) reads them. With `kept` outputs there is no text to learn.
        """
        layout = batch.layout
        if self.kept is not None:
            hidden, dense = self.kept.outputs(batch, self._reads_dense(batch), self._read_by_decoders)
            losses = torch.zeros(layout.labels[:, 1:].shape, device=hidden.device)
            embeds = self.llm.get_input_embeddings()(layout.input_ids)
            return TrunkTraining(losses, losses.sum(), dense, self.links(hidden, layout, embeds))
        branches, embeds, dense, own = self._pass(batch)
        if own is not None:
            published = self.settings.published_tokens
            losses = distilled_losses(self.llm.lm_head, branches, own, layout.labels, published)
        else:
            losses = next_token_losses(self.llm.lm_head, branches, layout.labels)
        supervised = (layout.labels[:, 1:] != IGNORE).sum().float()
        return TrunkTraining(losses, supervised, dense, self.links(branches, layout, embeds))

    def _read_by_decoders(self, batch: TrainingBatch) -> tuple[Tensor, Tensor | None]:
        """Hidden states of the branches [B, T, width], and dense features if a decoder reads them."""
        hidden, _, dense, _ = self._pass(batch)
        return hidden, dense

    def _pass(self, batch: TrainingBatch) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """Hidden states of the branches [B, T, width], their embeddings, dense features if a decoder reads them, and
        with `batch.distil` the hidden states without adapters."""
        layout, number = batch.layout, len(batch.images)
        images = batch.images
        if several := len(batch.further_rows) > 0:
            images = torch.cat([images, batch.further_images])
        images = images.float() / 255
        tokens, merged, stem = self.extract_features(images)
        image_tokens = tokens.shape[1] - len(self.lead)
        if several:
            tokens = self._with_further(tokens, number, batch.further_rows, batch.most_images)
            images, merged = images[:number], merged[:number]
            stem = None if stem is None else (stem[0][:number], stem[1][:number], stem[2][:number])
        regions = None
        if len(batch.region_masks):
            regions = self.regions(images, merged, batch.region_masks, batch.region_images)
        segments = prefix_segments(len(self.lead), image_tokens, batch.most_images, images.device)
        prefix = len(segments)
        if layout.pack is not None:
            tokens = F.pad(tokens, (0, 0, 0, 0, 0, len(layout.input_ids) - len(images)))
        branch_embeds = self.embed_branches(layout, regions)
        embeds = torch.cat([tokens, branch_embeds], dim=1)
        hidden = self._hidden(embeds, layout, batch.has_image, segments)
        branches = hidden[:, prefix:]
        own = None
        if batch.distil:
            with torch.no_grad(), without_adapters(self.llm):
                own = self._hidden(embeds, layout, batch.has_image, segments)[:, prefix:]
        dense = None
        if self.dense is not None and layout.query_slots and self._reads_dense(batch):
            grid = self.vision.grid(*images.shape[-2:])
            of_first = slice(len(self.lead), len(self.lead) + image_tokens)
            dense = self.dense(images, stem, merged, hidden[:number, of_first], grid)
        return branches, branch_embeds, dense, own

    def _reads_dense(self, batch: TrainingBatch) -> bool:
        """Whether a decoder that the batch trains reads the dense features."""
        return batch.decoders is None or not self.dense_readers.isdisjoint(batch.decoders)

    def _with_further(self, tokens: Tensor, number: int, rows: Tensor, most: int) -> Tensor:
        """Prefixes with the images behind the first: tokens [number + E, lead + I, width], those of row `rows[e]` after
        the first `number`, to [number, lead + most * I, width]; 0 where a row has fewer images than `most`."""
        firsts, further = tokens[:number], tokens[number:, len(self.lead) :]
        place = torch.arange(len(rows), device=rows.device) - torch.searchsorted(rows, rows)  # in its row
        segments = [firsts]
        for segment in range(most - 1):
            empty = firsts.new_zeros(number, *further.shape[1:])
            segments.append(empty.index_copy(0, rows[place == segment], further[place == segment]))
        return torch.cat(segments, dim=1)

    def _hidden(self, embeds: Tensor, layout: Layout, has_image: Tensor, segments: Tensor) -> Tensor:
        """The LLM's last hidden states [B, P + T, width] of a training pass."""
        of_images = has_image[:, None].expand(embeds.shape[:2])
        if layout.pack is not None:
            return self._packed(embeds, layout, layout.pack, of_images, segments)
        positions = position_ids(layout, segments)

        def run(blocks: BranchBlocks | None) -> Any:
            mask = None if blocks else self._training_mask(layout, has_image, segments, embeds.dtype)
            return self._llm(embeds, positions, of_images, mask, branch_blocks=blocks)

        blocks = None
        dropped = self.training and float(getattr(self.llm.config, "attention_dropout", None) or 0) > 0
        if self.trains_in_blocks and embeds.device.type == "cpu" and not dropped:
            visible = visible_prefix(*seen_prefix(layout, has_image, segments))
            blocks = BranchBlocks.of(layout, visible, prefix_allowed(segments, self.settings.prefix_attention))
        return self._attending(run, blocks).last_hidden_state

    def _llm(
        self, embeds: Tensor, positions: Tensor, of_images: Tensor, mask: Tensor | None = None, **others: Any
    ) -> Any:
        """A pass of the LLM over embeds [B, T, width]. `of_images`: bool [B, T], the tokens of rows with an image, on
        which image adapters act; `mask`: additive, None where `others` say what attends to what."""
        if mask is None:
            mask = embeds.new_zeros(1, 1, 1, 1)  # none is made then, and none is read
        if self.settings.image_adapters is not None:
            others["image_tokens"] = of_images if bool(of_images.any()) else None
        return self.llm.model(
            inputs_embeds=embeds,
            attention_mask=mask,
            position_ids=positions,
            use_cache="past_key_values" in others,
            **others,
        )

    def _attending(self, run: Callable[[BranchBlocks | None], Any], blocks: BranchBlocks | None) -> Any:
        """A pass in `blocks`, or over whole rows where there are none or the LLM's class has an attention of its
        own."""
        if blocks is not None and self._takes_blocks:
            out = run(blocks)
            if blocks.attended:
                return out
            self._takes_blocks = False
        return run(None)

    def _packed(self, embeds: Tensor, layout: Layout, pack: Tensor, of_images: Tensor, segments: Tensor) -> Tensor:
        """Hidden states [B, P + T, width], computed in the rows of `pack` (see `Layout`); 0 for tokens not packed."""
        if len(self.lead) or self.settings.prompt_layout != "branches":  # a row may start without image and lead
            raise UserError("pack_tokens needs prompt_layout 'branches' and no lead_tokens; set it to 0", "packed_lead")
        flat = embeds.flatten(0, 1)
        rows = flat.index_select(0, pack.clamp_min(0).flatten()).unflatten(0, pack.shape)
        allowed = packed_allowed(pack, layout, segments, self.settings.prefix_attention)
        places = packed(pack, position_ids(layout, segments))
        mask = mask_to_bias(allowed, embeds.dtype)[:, None]
        hidden = self._llm(rows, places, packed(pack, of_images), mask).last_hidden_state.flatten(0, 1)
        hidden = F.pad(hidden, (0, 0, 0, 1))  # tokens that are not packed read the zeros at the end
        return hidden[unpacked(pack, len(flat))].view(embeds.shape)

    def _training_mask(self, layout: Layout, has_image: Tensor, segments: Tensor, dtype: torch.dtype) -> Tensor:
        batch, length = layout.input_ids.shape
        top = F.pad(prefix_allowed(segments, self.settings.prefix_attention), (0, length)).expand(batch, -1, -1)
        return mask_to_bias(torch.cat([top, rows_allowed(layout, has_image, segments)], dim=1), dtype)[:, None]

    @torch.inference_mode()
    def encode(self, images: Tensor, valid: Tensor | None = None, places: Tensor | None = None) -> Prefix:
        """Encodes images uint8 [B, 3, H, W] to the prefix that all prompts about them share. `places` int64 [B]: the
        number of each image in its conversation, by default 0."""
        images = images.float() / 255
        tokens, merged, stem = self.extract_features(images)
        batch, length = tokens.shape[:2]
        segments = prefix_segments(len(self.lead), length - len(self.lead), 1, images.device)
        positions = torch.arange(length, device=images.device).expand(batch, -1)
        if places is not None:
            positions = positions + torch.where(segments < 0, 0, places[:, None] * (segments == 0).sum())
        valid = torch.ones(batch, dtype=torch.bool, device=images.device) if valid is None else valid
        states, cache = self._prefix_pass(tokens, positions, valid, segments)
        dense = None
        if self.dense is not None:
            grid = self.vision.grid(*images.shape[-2:])
            dense = self.dense(images, stem, merged, states[:, len(self.lead) :], grid)
        return Prefix(images, merged, dense, valid, cache, segments, positions[:, -1] + 1)

    def _prefix_pass(
        self, tokens: Tensor, positions: Tensor, valid: Tensor, segments: Tensor
    ) -> tuple[Tensor, DynamicCache]:
        """Hidden states [B, P, width] of prefix tokens, and their keys and values."""
        mask = mask_to_bias(prefix_allowed(segments, self.settings.prefix_attention), tokens.dtype)
        cache = DynamicCache()  # without the config, whose sliding windows would drop keys
        of_images, rows = valid[:, None].expand(tokens.shape[:2]), mask.expand(len(tokens), 1, -1, -1)
        return self._llm(tokens, positions, of_images, rows, past_key_values=cache).last_hidden_state, cache

    @torch.inference_mode()
    def lead_prefix(self) -> Prefix:
        """The prefix of prompts that see no image, as one row: the lead tokens."""
        length, device = len(self.lead), self.lead.device
        places, valid = torch.arange(length, device=device), torch.ones(1, dtype=torch.bool, device=device)
        segments, cache = torch.full_like(places, -1), DynamicCache()
        if length:
            embeds = self.llm.get_input_embeddings()(self.lead)[None]
            _, cache = self._prefix_pass(embeds, places[None], valid, segments)
        return Prefix.without_images(valid, cache, segments, valid.long() * length)

    def no_prefix(self, images: Tensor) -> Prefix:
        """The empty prefix of samples without images whose branches attend to none; `images` as of `encode`."""
        valid = torch.zeros(len(images), dtype=torch.bool, device=images.device)
        return Prefix.without_images(valid, DynamicCache(), valid[:0].long(), valid.long())

    @torch.inference_mode()
    def run_branches(
        self, prefix: Prefix, layout: Layout, regions: Tensor | None = None
    ) -> tuple[Tensor, DynamicCache]:
        """Hidden states [B, T, width] of a chunk of branches against the cached prefix, and the extended cache.
        `regions`: embeddings [R, width] of the layout's regions."""
        return self._run(prefix, layout, self.embed_branches(layout, regions))

    @torch.inference_mode()
    def branch_links(self, prefix: Prefix, layout: Layout, regions: Tensor | None = None) -> dict[str, SuperLink]:
        """The super links, by decoder, of a chunk of branches against the cached prefix; `regions` as above."""
        embeds = self.embed_branches(layout, regions)
        hidden, _ = self._run(prefix, layout, embeds)
        return self.links(hidden, layout, embeds)

    @torch.inference_mode()
    def region_embeddings(self, prefix: Prefix, masks: Tensor, image_index: Tensor) -> Tensor:
        """Embeddings [R, width] of regions on the images of a prefix: masks [R, H, W] of the model input, image_index
        int64 [R]."""
        return encode_in_parts(self.regions, prefix.images, prefix.merged, masks, image_index)

    @torch.inference_mode()
    def example_embeddings(self, images: Tensor, masks: Tensor, image_index: Tensor) -> Tensor:
        """Embeddings [R, width] of regions on images uint8 [B, 3, H, W] that nothing else is asked about; others as
        above."""
        scaled = images.float() / 255
        _, merged, _ = self.extract_features(scaled)
        return encode_in_parts(self.regions, scaled, merged, masks, image_index)

    def _run(self, prefix: Prefix, layout: Layout, embeds: Tensor) -> tuple[Tensor, DynamicCache]:
        of_images = prefix.valid[:, None].expand(embeds.shape[:2])

        def run(blocks: BranchBlocks | None) -> tuple[Tensor, DynamicCache]:
            mask, cache = None, prefix.fork()
            if blocks is None:
                mask = mask_to_bias(rows_allowed(layout, prefix.valid, prefix.segments), embeds.dtype)[:, None]
            positions = branch_starts(layout, prefix.segments, prefix.ends) + layout.offsets
            out = self._llm(embeds, positions, of_images, mask, branch_blocks=blocks, past_key_values=cache)
            return out.last_hidden_state, cache

        return self._attending(
            run, BranchBlocks.of(layout, visible_prefix(*seen_prefix(layout, prefix.valid, prefix.segments)))
        )

    @property
    def key_value_bytes(self) -> int:
        """Bytes of the keys and values of one token, in the precision of the LLM's weights."""
        config = self.llm.config
        width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        size = self.llm.get_input_embeddings().weight.element_size()
        return 2 * config.num_hidden_layers * heads * width * size

    @torch.inference_mode()
    def decode_step(
        self, step: DecodingStep, tokens: Sequence[int], queries: Mapping[int, Tensor] | None = None
    ) -> Tensor:
        """Hidden states [N, width] of the next token of every answer in a step; `queries`: by answer, the embedding
        [width] that it takes instead of its token. Raises `UserError` if the LLM does not call transformers' attention
        functions."""
        device = self.lead.device
        embeds = self.llm.get_input_embeddings()(torch.tensor([tokens], device=device))
        if queries:
            embeds[0, list(queries)] = torch.stack(list(queries.values())).to(embeds.dtype)
        positions = torch.tensor([step.positions], device=device)
        of_images = torch.tensor([step.have_images], device=device)
        hidden = self._llm(embeds, positions, of_images, decoding_step=step).last_hidden_state
        if not step.attended:
            kind = type(self.llm).__name__
            raise UserError(f"the LLM's class {kind} takes no attention function; use another LLM", "unsupported_llm")
        step.finish()
        return hidden[0]
