"""What labelling an image asks of a GPU: floating-point operations, passes of the LLM, and memory.

Counted on the meta device, from the shapes of the trunk's pass and by the decoders themselves. Masks of instances are
not counted, since their number is not known beforehand.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, cast

from lumen_ray.structures import Dtype, Size

if TYPE_CHECKING:
    from lumen_ray.inference.branches import PendingBranch
    from lumen_ray.inference.request import Request
    from lumen_ray.model.build import Generalist
    from lumen_ray.model.settings import ModelSettings
    from lumen_ray.plan.gpus import Gpu

BYTES = {"float32": 4, "bfloat16": 2}
ANSWER_TOKENS = 24  # of a caption or an answer, assumed
CLASS_CHUNK = 64  # branches of an image in a pass, as `Engine.run` has it
KEYPOINTS = 17  # of the one class that poses are planned for
TEXT = "how many things are in the picture ?"  # in place of a question, a sentence or an expression
#: assumed: the share of a GPU's memory bandwidth that writing a token reaches, seconds to launch the kernels of one
#: layer, layers of a decoder, and seconds of the host for the records of an image
BANDWIDTH_SHARE, LAUNCH_S, DECODER_LAYERS, RECORDS_S = 0.7, 2.5e-4, 12, 1e-3
_CUDA = 1e9  # bytes of CUDA's context and of the allocator's slack, assumed


@dataclass(frozen=True)
class ModelWork:
    """flops: component -> FLOPs of one image, writing aside. token_flops: of one token of an answer. texts: answers in
    text per image, of `answer_tokens` tokens each. passes: of the LLM of `layers` layers per batch, besides a pass for
    each token. other_layers: of encoders and decoders.

    parameters, llm_parameters: of the trunk and the decoders in use, and of the LLM alone. kv_values,
    activation_values: numbers kept per image, of keys and values and at the widest point of the pass (estimated).
    links_kept: links of classes are computed once and not per image.
    """

    preset: str
    flops: dict[str, float]
    token_flops: float
    texts: int
    answer_tokens: int
    passes: int
    layers: int
    other_layers: int
    parameters: int
    llm_parameters: int
    kv_values: float
    activation_values: float
    decoders: tuple[str, ...]
    links_kept: bool
    longest_side: int

    def seconds(self, batch: int, gpu: Gpu, dtype: Dtype, mfu: float) -> float:
        """Seconds of a batch. mfu: share of the GPU's peak rate that the passes reach."""
        rate = gpu.peak(dtype) * mfu
        launches = (self.passes * self.layers + self.other_layers) * LAUNCH_S
        together = max(batch * sum(self.flops.values()) / rate, launches) + batch * RECORDS_S
        if not self.texts:
            return together
        reading = self.llm_parameters * BYTES[dtype] / (gpu.bandwidth * BANDWIDTH_SHARE)
        step = max(reading, batch * self.texts * self.token_flops / rate, self.layers * LAUNCH_S)
        return together + self.answer_tokens * step

    def memory(self, batch: int, dtype: Dtype) -> dict[str, float]:
        """Bytes on a GPU: weights, keys and values, activations and CUDA itself."""
        size = BYTES[dtype]
        return {
            "weights": self.parameters * size,
            "keys and values": batch * self.kv_values * size,
            "activations": batch * self.activation_values * size,
            "CUDA": _CUDA,
        }


def _class_names(number: int) -> list[str]:
    return [f"object {n}" for n in range(number)]


def plan_requests(tasks: Sequence[str], num_classes: int) -> list[Request]:
    """Requests like those of a job with that many classes. Raises `UserError` for tasks that `label` does not take."""
    from lumen_ray.label.requests import build_requests
    from lumen_ray.tasks import TASKS, get_task

    classes = _class_names(num_classes)
    requests: list[Request] = []
    for name in dict.fromkeys(tasks):
        task = get_task(name)
        texts = {name: [TEXT]} if task.needs not in ("classes", "nothing", "region") else {}
        points = [f"point {n}" for n in range(KEYPOINTS)] if task.keypoint_template else None
        some = classes[:1] if points else classes
        requests += build_requests([name], some if TASKS[name].needs == "classes" else None, texts, points)
    return requests


def count_work(
    settings: ModelSettings, tasks: Sequence[str], num_classes: int, answer_tokens: int = ANSWER_TOKENS
) -> ModelWork:
    """Counts what a job asks of a model. Raises `UserError` for unknown tasks and those that no decoder serves."""
    from lumen_ray.decoders.registry import DECODERS
    from lumen_ray.footprint import meta_model
    from lumen_ray.inference.branches import BranchPlanner
    from lumen_ray.model.build import count_parameters
    from lumen_ray.tasks import TASKS
    from lumen_ray.train.metrics import flops as count
    from lumen_ray.trunk.branch import Branch
    from lumen_ray.trunk.layout import build_layout
    from lumen_ray.trunk.tokenizer import LumenTokenizer

    requests = plan_requests(tasks, num_classes)
    planner = BranchPlanner(settings.serving, {}, TASKS, settings.links_see_image)
    pending = [branch for r, request in enumerate(requests) for branch in planner.branches(request, 0, r)]
    model = meta_model(settings).requires_grad_(False)
    words = [t for task in TASKS.values() for t in task.templates] + _class_names(num_classes) + [TEXT]
    tokenizer, trunk = LumenTokenizer.train(words, settings.vocab_size, settings.families), model.trunk
    config, side = trunk.llm.config, settings.image_size

    def tokens(branches: Sequence[Branch]) -> int:
        return build_layout(branches, 1, tokenizer, settings.prompt_layout).input_ids.shape[1]

    prefix = settings.image_tokens((side, side))
    looking = [item.branch for item in pending if not item.is_same_for_every_image]
    chunks = [looking[start : start + CLASS_CHUNK] for start in range(0, len(looking), CLASS_CHUNK)]
    texts = [Branch(0, TASKS[r.task].prompt(r.text)) for r in requests if TASKS[r.task].is_text]
    lengths = [tokens(chunk) for chunk in [*chunks, *([text] for text in texts)]]
    alone = count.llm(config, prefix)
    llm = alone + sum(count.llm(config, prefix + length) - alone for length in lengths)
    used = tuple(dict.fromkeys(item.decoder for item in pending))
    flops = {"vision": count.vision(trunk.vision, side, side), "llm": llm}
    if settings.dense_readers.intersection(used) and trunk.dense is not None and trunk.stem is not None:
        patch, grid = trunk.vision.patch_size, trunk.vision.grid(side, side)
        flops["dense"] = count.stem(trunk.stem, side, side) + count.dense(trunk.dense, side, side, patch, grid)
    for name in used:
        flops[name] = _decoder(model, name, [item for item in pending if item.decoder == name])
    most = max([0, *lengths])
    reach = prefix + most + (answer_tokens if texts else 0)
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    kv_width = head * (getattr(config, "num_key_value_heads", None) or config.num_attention_heads)
    inputs = [rule.longest for name, rule in settings.input_rules.items() if name in used]
    return ModelWork(
        preset=settings.name,
        flops=flops,
        token_flops=count.llm(config, 1) + 2.0 * config.hidden_size * config.vocab_size,
        texts=len(texts),
        answer_tokens=answer_tokens,
        passes=1 + len(chunks) + bool(texts),
        layers=config.num_hidden_layers,
        other_layers=DECODER_LAYERS * len(used)
        + sum(each.model.config.num_hidden_layers for each in (trunk.vision.clip, trunk.vision.dinov2) if each),
        parameters=count_parameters(trunk) + sum(count_parameters(model.decoders[name]) for name in used),
        llm_parameters=count_parameters(trunk.llm),
        kv_values=2.0 * config.num_hidden_layers * kv_width * reach,
        activation_values=(prefix + most) * (8.0 * config.hidden_size + 3.0 * config.intermediate_size)
        + sum(
            _backbone_values(side)
            for side in inputs
            if any(settings.sections[name].source(DECODERS[name].reads) == "pixels" for name in used)
        ),
        decoders=used,
        links_kept=bool(pending) and not looking,
        longest_side=max([side, *inputs]),
    )


def _backbone_values(side: int) -> float:
    """Numbers at the widest point of a decoder's own backbone, at stride 4, for an image of that longer side in the
    shape 4 to 3: 96 channels with an MLP of four times as many."""
    return (side / 4) * (side * 0.75 / 4) * 96 * 8.0


def _decoder(model: Generalist, name: str, pending: Sequence[PendingBranch]) -> float:
    """FLOPs of a decoder's forward pass on the prompts of one image."""
    import torch

    from lumen_ray.decoders.common.flops import DecoderWork
    from lumen_ray.decoders.registry import DECODERS
    from lumen_ray.model.build import build_decoder
    from lumen_ray.superlink import SuperLink
    from lumen_ray.targets import PerceptionTargets, Pixels

    settings = model.settings
    side: Size = (settings.image_size, settings.image_size)
    rule, number = settings.input_rules.get(name), len(pending)
    size = side if rule is None else rule.fit((3, 4))[0]
    parents, last = [], -1
    for n, item in enumerate(pending):
        last = n if item.prompt is not None else last
        parents.append(-1 if item.prompt is not None else last)
    groups = torch.tensor([item.branch.group for item in pending])
    groups = torch.unique(groups, return_inverse=True)[1]
    link = SuperLink(
        name, torch.empty(number, 0), torch.zeros(number, dtype=torch.int64), torch.tensor(parents), groups
    )
    none = torch.zeros(number, 1, dtype=torch.bool)
    targets = PerceptionTargets(
        torch.zeros(number, 1, 4), none, none, torch.full((number, 1), -1), torch.zeros(0, 1, 1, dtype=torch.uint8),
        torch.zeros(number, 1, 3), torch.ones(number, dtype=torch.bool),
    )  # fmt: skip
    work = DecoderWork(
        link=link,
        pixels=Pixels(torch.zeros(1, 3, *size, dtype=torch.uint8), torch.tensor([size])),
        targets=targets,
        num_images=1,
        input_size=side,
        needs_input_grad=False,
        build=partial(build_decoder, settings, name),
    )
    return float(cast(Any, DECODERS[name].resolve("flops"))(model.decoders[name], work))
