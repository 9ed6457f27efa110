"""The trunk's half of the engine: images and requests -> super links, dense features and texts."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from copy import copy
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Self

import torch
from torch import Tensor

from lumen_ray.answer import TokenUsage
from lumen_ray.cancellation import between_passes, check_wanted
from lumen_ray.data.batches.buckets import choose
from lumen_ray.data.images import as_picture
from lumen_ray.decoders.registry import DECODERS
from lumen_ray.exemplars import ClassByExample, no_exemplars
from lumen_ray.inference.branches import BranchPlanner, PendingBranch, decoder_input, split_passes, with_regions
from lumen_ray.inference.decode_loop import DecodeLoop
from lumen_ray.inference.decoder_inputs import decoder_pixels
from lumen_ray.inference.encoded_images import EncodedImages, Inputs, fit_images
from lumen_ray.inference.examples import ExampleEmbeddings
from lumen_ray.inference.outputs import DecoderInput, RequestPlan, TrunkOutput
from lumen_ray.inference.region_questions import RegionQuestions
from lumen_ray.inference.request import Request, Shown, check_requests, images_of
from lumen_ray.inference.sampling import stable_text
from lumen_ray.inference.text_prompts import TextPrompts
from lumen_ray.inference.word_links import WordLinks, links_of_words
from lumen_ray.inference.writing import TextPrompt, Writing, top_tokens, written_parts, written_text
from lumen_ray.model.build import LoadedModel, load_model
from lumen_ray.precision import in_model_dtype
from lumen_ray.structures import Size
from lumen_ray.targets import Frame
from lumen_ray.tasks import ROUTING_TOKENS, TASKS, task_of_route
from lumen_ray.trunk.layout import build_layout, several_images_unsupported
from lumen_ray.trunk.prefix import Prefix

#: Called with (image, request, new text), indices into the batch.
OnText = Callable[[int, int, str], None]
#: Branches of an image in one pass.
CLASS_CHUNK = 64


class FromFolder:
    """Loads itself from a model folder. Decoders are read when they are first used."""

    def __init__(self, loaded: LoadedModel, device: str = "cpu"):
        raise NotImplementedError

    @classmethod
    def load(
        cls,
        model: str | Path,
        device: str = "cpu",
        decoders: Mapping[str, str] | None = None,
        dtype: str = "float32",
    ) -> Self:
        """Reads the trunk of a model folder; raises `UserError` if it is not a model folder.

        `decoders` (task -> decoder) overrides the folder's choice for tasks that several decoders can serve; `dtype`:
        'float32', or 'bfloat16' for half the memory and, on GPUs, faster arithmetic (see `lumen_ray.precision`)."""
        return cls(load_model(model, decoders, device, ("trunk",), dtype), device)


class TrunkStage(FromFolder):
    """Holds the vision encoders, LLM, link heads and dense features of a model."""

    def __init__(self, loaded: LoadedModel, device: str = "cpu"):
        self.loaded = loaded
        self.device, self.dtype = torch.device(device), loaded.dtype
        self.trunk = loaded.trunk(self.device)
        self.tokenizer = loaded.tokenizer
        self.prompt_layout = loaded.settings.prompt_layout
        self.loop = DecodeLoop(self.trunk, self.tokenizer, self.prompt_layout, dtype=self.dtype)
        self.serving = loaded.settings.serving
        self.input_rules = loaded.settings.input_rules
        self.sections = loaded.settings.sections
        self.skeletons = {name: tuple(names) for name, names in loaded.meta.skeletons.items()}
        trained, settings = set(loaded.meta.tasks or TASKS), loaded.settings
        self.planner = BranchPlanner(self.serving, self.skeletons, trained, settings.links_see_image)
        self.examples = ExampleEmbeddings(self.trunk, self.bucket)
        self.region_questions = RegionQuestions(self.trunk, self.tokenizer, self.loop, self.prompt_layout, self.dtype)
        self.word_links = WordLinks(partial(links_of_words, self.trunk, self.tokenizer), self.examples.of)
        self.reads_exemplars = loaded.meta.reads_exemplars
        square = (loaded.settings.image_size,) * 2
        self.buckets = tuple((int(h), int(w)) for h, w in loaded.meta.buckets) or (square,)
        self.text_prompts = TextPrompts(
            self.trunk, self.tokenizer, self.prompt_layout, self.planner, self.bucket, loaded.meta.writes_behind_routes
        )

    def serving_by(self, serving: Mapping[str, str]) -> TrunkStage:
        """This stage, with the same modules and kept links, for tasks served by these decoders, task -> decoder."""
        other = copy(self)
        other.serving = dict(serving)
        other.planner = copy(self.planner)
        other.planner.serving = other.serving
        other.text_prompts = replace(self.text_prompts, planner=other.planner)
        return other

    @property
    def tasks(self) -> tuple[str, ...]:
        """Names of the tasks that the model was trained on and, where they need a decoder, has one for."""
        return self.planner.tasks

    @property
    def takes_exemplars(self) -> bool:
        """Whether the model takes classes by example."""
        return self.reads_exemplars and self.prompt_layout != "sequential"

    @property
    def largest_side(self) -> int:
        """The longest side in pixels of any input of trunk or decoders: larger images lose nothing by being decoded at
        a reduced scale that leaves their longer side this many."""
        return max(
            max(max(bucket) for bucket in self.buckets), *(rule.longest for rule in self.input_rules.values()), 1
        )

    def bucket(self, size: Size) -> Size:
        """(height, width) of the model input for an image of (height, width) `size`."""
        return choose((max(1, size[0]), max(1, size[1])), self.buckets)

    def bucket_of(self, shown: Shown) -> Size:
        """(height, width) of the model input for an image, for several (that of the first), or for text alone."""
        images = images_of(shown)
        return self.bucket(as_picture(images[0]).size) if images else self.buckets[0]

    @in_model_dtype
    def encode(self, images: Sequence[Shown]) -> EncodedImages:
        """Encodes images once for several calls of `links`, which has the arguments."""
        return self._encode(self._inputs(images))

    @in_model_dtype
    def links(
        self,
        images: Sequence[Shown] | EncodedImages,
        requests: Sequence[Sequence[Request]],
        *,
        max_new_tokens: int = 48,
        class_chunk: int = CLASS_CHUNK,
        route_only: bool = False,
        on_text: OnText | None = None,
    ) -> TrunkOutput:
        """Encodes one prefix per image, then runs the branches of all requests against it.

        images: as of `Engine.run`, all of one `bucket_of`, None for text alone, a sequence for the
        images of a conversation, of which decoders see the last; or what `encode` has encoded. requests: per image.
        `class_chunk` bounds the branches per image and pass; results do not depend on it. In the sequential layout the
        prompts of a request are one text and are never split, however many.
        With `route_only` no decoder gets a link: the plans hold the text or the route that the LLM chose. `on_text` is
        called with (image, request, new text) for every token that is written; the text may be empty.

        Several threads may call this at once: their answers are written together.
        """
        inputs = images.inputs if isinstance(images, EncodedImages) else self._inputs(images)
        self._check(inputs, requests)
        plans = [
            [self.planner.plan(request, frame.size) for request in row]
            for row, frame in zip(requests, inputs.frames, strict=True)
        ]
        pending = [
            branch
            for b, row in enumerate(requests)
            for r, request in enumerate(row)
            for branch in self.planner.branches(request, b, r)
        ]
        prefixes = self._prefix_lengths(inputs)
        prompts = self.text_prompts.build(inputs, prefixes, requests, max_new_tokens)
        with self.loop.images(0 if isinstance(images, EncodedImages) else self._tokens_held(inputs, prefixes)):
            encoded = images if isinstance(images, EncodedImages) else self._encode(inputs)
            written = self._submit(encoded, prompts)
            self.loop.wait(list(written.values()), self._streaming(written, on_text))
            check_wanted()
            routed = self._enter_texts(written, requests, plans)
            if route_only:
                pending = []
            else:
                pending += self._routed_branches(routed, requests, plans)
            linked = {} if route_only else {place: w for place, w in written.items() if w.links}
            with self.loop.turn() if pending or linked else nullcontext():
                pending += self._text_links(linked, plans)
                return self._output(encoded.prefix, pending, plans, inputs, class_chunk)

    def room(self, number: int, size: Size) -> AbstractContextManager[None]:
        """Reserves memory for the keys and values of `number` images of (height, width) `size` while they are encoded
        and asked about, as `links` does for those that it encodes itself."""
        image_tokens = math.prod(self.trunk.vision.grid(*self.bucket(size)))
        return self.loop.images(number * (len(self.trunk.lead) + image_tokens))

    def _text_alone(self, inputs: Inputs) -> bool:
        """Whether nothing in the batch attends to a prefix."""
        taught = self.tokenizer.turns is not None and self.prompt_layout == "branches"
        return taught and not inputs.valid.any()

    def _prefix_lengths(self, inputs: Inputs) -> list[int]:
        """The number of prefix tokens of each row, with all images of a conversation."""
        lead, image_tokens = len(self.trunk.lead), math.prod(self.trunk.vision.grid(*inputs.pixels.shape[-2:]))
        return [lead + image_tokens * number for number in inputs.numbers]

    def _tokens_held(self, inputs: Inputs, prefixes: Sequence[int]) -> int:
        """Prefix tokens whose keys and values encoding makes: of every image, and once more of those in
        conversations."""
        if self._text_alone(inputs):
            return 0
        lead, several = len(self.trunk.lead), [row for row, number in enumerate(inputs.numbers) if number > 1]
        alone = sum(length + lead * (number - 1) for length, number in zip(prefixes, inputs.numbers, strict=True))
        return alone + sum(prefixes[row] for row in several)

    def _encode(self, inputs: Inputs) -> EncodedImages:
        with self.loop.turn():
            pixels, valid = inputs.pixels.to(self.device), inputs.valid.to(self.device)
            if self._text_alone(inputs):
                return EncodedImages(inputs, self.trunk.no_prefix(pixels), {})
            if not len(inputs.earlier):
                return EncodedImages(inputs, self.trunk.encode(pixels, valid), {})
            everything = torch.cat([pixels, inputs.earlier.to(self.device)])
            valid = torch.cat([valid, valid.new_ones(len(inputs.earlier))])
            places = torch.zeros(len(everything), dtype=torch.int64)
            for images in inputs.conversations.values():
                places[images] = torch.arange(len(images))
            prefix = self.trunk.encode(everything, valid, places.to(self.device))
            conversations = {row: prefix.joined(images) for row, images in inputs.conversations.items()}
            return EncodedImages(inputs, prefix.select(range(len(pixels))), conversations)

    def _submit(
        self, encoded: EncodedImages, prompts: Mapping[tuple[int, int], TextPrompt]
    ) -> dict[tuple[int, int], Writing]:
        """Enqueues prompts by (image, request): those about one image as one batch."""
        written: dict[tuple[int, int], Writing] = {}
        single = [place for place in prompts if place[0] not in encoded.conversations]
        batches = [(encoded.prefix, single)]
        for row, prefix in encoded.conversations.items():
            batches.append((prefix, [place for place in prompts if place[0] == row]))
        for prefix, places in batches:
            written |= dict(zip(places, self.loop.submit(prefix, [prompts[place] for place in places]), strict=True))
        return {place: written[place] for place in prompts}

    def _output(
        self,
        prefix: Prefix,
        pending: list[PendingBranch],
        plans: list[list[RequestPlan]],
        inputs: Inputs,
        class_chunk: int,
    ) -> TrunkOutput:
        """Runs the branches of the decoders, and collects what they read."""
        decoder_inputs = self._decoder_inputs(prefix, pending, plans, inputs.frames, class_chunk)
        reads = {name: self.sections[name].source(DECODERS[name].reads) for name in decoder_inputs}
        for name, decoder in decoder_inputs.items():
            if reads[name] == "pixels":
                about, rule = decoder.link.image_index.tolist(), self.input_rules.get(name)
                decoder.pixels = decoder_pixels(about, decoder.prompts, rule, inputs.images, inputs.pixels)
        dense = None
        if "dense" in reads.values():
            assert prefix.dense is not None, "a decoder reads dense features, but the trunk makes none"
            dense = prefix.dense.float().cpu().contiguous()
        return TrunkOutput(decoder_inputs, dense, inputs.frames, plans)

    def _streaming(
        self, written: Mapping[tuple[int, int], Writing], on_text: OnText | None
    ) -> Callable[[Writing], None] | None:
        """What passes new text on to the caller, see `links`."""
        if on_text is None:
            return None
        places = {writing: place for place, writing in written.items()}
        sent = dict.fromkeys(places, "")

        def on_token(writing: Writing) -> None:
            text = written_text(writing, self.tokenizer)
            if writing.end is None:
                text = stable_text(text, writing.prompt.sampler.settings.stop)
            new = text[len(sent[writing]) :]
            sent[writing] += new
            on_text(*places[writing], new)

        return on_token

    def _check(self, inputs: Inputs, requests: Sequence[Sequence[Request]]) -> None:
        """Raises `UserError` for requests that do not fit their image."""
        if len(inputs.images) != len(requests):
            raise ValueError(f"{len(inputs.images)} images but {len(requests)} lists of requests")
        rows = zip(inputs.images, inputs.valid.tolist(), inputs.numbers, requests, strict=True)
        for image, valid, number, row in rows:
            check_requests(image.size if valid else None, row, number)
            for shown in (shown for request in row for shown in request.examples.values()):
                self._check_examples(shown)

    def _check_examples(self, shown: ClassByExample) -> None:
        """Raises `UserError` if the model does not take a class by example. Computes the keys of its examples: here
        nobody waits for the model."""
        if not self.takes_exemplars:
            raise no_exemplars(shown.name, self.prompt_layout)
        for example in shown.examples:
            _ = example.key if example.image is not None else ""

    def _inputs(self, images: Sequence[Shown]) -> Inputs:
        """Fits images, which must share a bucket, into the trunk's input."""
        buckets = {self.bucket_of(shown) for shown in images}
        if len(buckets) > 1:
            raise ValueError(f"images of one pass must share a bucket, got {sorted(buckets)}")
        (bucket,) = buckets
        rows = [images_of(shown) for shown in images]
        if self.prompt_layout == "sequential" and any(len(row) > 1 for row in rows):
            raise several_images_unsupported()
        return fit_images(rows, bucket)

    def _enter_texts(
        self,
        written: Mapping[tuple[int, int], Writing],
        requests: Sequence[Sequence[Request]],
        plans: Sequence[Sequence[RequestPlan]],
    ) -> list[tuple[int, int]]:
        """Enters texts and chosen routes in the plans. Returns (image, request) of every free chat in which the LLM
        chose a route."""
        routing = {i: token for token, i in self.tokenizer.ids.items() if token in ROUTING_TOKENS}
        routed = []
        for (b, r), writing in written.items():
            plan = plans[b][r]
            plan.usage = TokenUsage(writing.prompt.length, len(writing.tokens))
            if writing.end == "route" and TASKS[requests[b][r].task].is_conversation and not writing.links:
                plan.route = routing[writing.tokens[-1]]
                plan.text = written_text(writing, self.tokenizer) or None
                routed.append((b, r))
            else:
                plan.text = written_text(writing, self.tokenizer)
                words = [n for n in range(len(writing.tokens)) if n not in {link.end for link in writing.links}]
                texts = self.tokenizer.token_texts(writing.tokens)
                plan.log_probs = [writing.prompt.sampler.log_probs[n] for n in words]
                plan.tokens = [texts[n] for n in words]
                plan.top_tokens = top_tokens(writing, words, self.tokenizer)
                plan.is_cut = writing.end == "length" or (writing.end == "route" and bool(writing.links))
                plan.parts = written_parts(writing, self.tokenizer)
                plan.route = writing.links[0].route if plan.parts else None
        return routed

    def _text_links(
        self, written: Mapping[tuple[int, int], Writing], plans: Sequence[Sequence[RequestPlan]]
    ) -> list[PendingBranch]:
        """The links in the texts of answers, whose queries have been read."""
        pending = []
        for (b, r), writing in written.items():
            number = sum(part.route is not None for part in plans[b][r].parts or ())
            for link in writing.links[:number]:
                ids = writing.tokens[link.start : link.end]
                decoder = self.planner.decoder(task_of_route(link.route))
                embedding = self.trunk.text_links(decoder, torch.stack(link.states)[None], [ids])[0].cpu()
                pending.append(self.planner.text_link(link.route, self.tokenizer.decode(ids), b, r, embedding))
        return pending

    def _routed_branches(
        self,
        routed: Sequence[tuple[int, int]],
        requests: Sequence[Sequence[Request]],
        plans: Sequence[Sequence[RequestPlan]],
    ) -> list[PendingBranch]:
        """The branches of free chats that chose a route."""
        pending = []
        for b, r in routed:
            task = task_of_route(plans[b][r].route or "")
            pending += self.planner.routed_branches(requests[b][r], task, b, r)
        return pending

    def _decoder_inputs(
        self,
        prefix: Prefix,
        pending: list[PendingBranch],
        plans: list[list[RequestPlan]],
        frames: Sequence[Frame],
        chunk: int,
    ) -> dict[str, DecoderInput]:
        """Runs the branches in chunks per image; the input of each decoder, in the order of `pending`."""
        # by index into `pending`
        embeddings = {i: item.embedding for i, item in enumerate(pending) if item.embedding is not None}
        blind = [i for i, item in enumerate(pending) if item.is_same_for_every_image]
        embeddings |= zip(blind, self.word_links.embeddings([pending[i] for i in blind]), strict=True)
        waiting = [i for i in range(len(pending)) if i not in embeddings]
        for numbers in split_passes([pending[i] for i in waiting], chunk, self.prompt_layout == "sequential"):
            between_passes()
            embeddings |= self._embeddings(prefix, pending, [waiting[n] for n in numbers], frames)
        inputs = {}
        for name in dict.fromkeys(item.decoder for item in pending):
            members = [i for i, item in enumerate(pending) if item.decoder == name]
            stack = torch.stack([embeddings[i] for i in members])
            inputs[name] = decoder_input(name, [pending[i] for i in members], stack, plans)
        return inputs

    def _embeddings(
        self, prefix: Prefix, pending: list[PendingBranch], members: list[int], frames: Sequence[Frame]
    ) -> dict[int, Tensor]:
        """The link embedding of each branch of one pass, float32 on the CPU, by index into `pending`."""
        branches, regions, owners = with_regions((pending[i].branch, pending[i].regions) for i in members)
        layout = build_layout(branches, len(prefix.valid), self.tokenizer, self.prompt_layout, prefix.valid)
        layout.mark_keypoints([pending[i].prompt is None for i in members])
        layout = layout.to(self.device)
        found: dict[int, Tensor] = {}
        embedded = self.examples.of_prompts(prefix, regions, owners, frames)
        for name, link in self.trunk.branch_links(prefix, layout, embedded).items():
            order = layout.link_branches[DECODERS[name].family].tolist()
            for number, embedding in zip(order, link.embeddings.float().cpu(), strict=True):
                if pending[members[number]].decoder == name:
                    found[members[number]] = embedding
        return found
