"""The counted operations of the experts are those that PyTorch counts."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from support.expert_fakes import TASKS, expert_batch, expert_model
from support.tiny_models import EXPERTS, SIDE, tiny_tokenizer
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from lumen_ray.data.batches.collate import Collator
from lumen_ray.data.images import decode
from lumen_ray.data.scenes import render as scenes
from lumen_ray.recipe import Stage
from lumen_ray.train.losses import StepSums
from lumen_ray.train.metrics import flops
from lumen_ray.train.metrics.metrics import Meter
from lumen_ray.train.optimizer import set_trainable

WIDE = {"hidden_size": 64, "encoder_ffn": 128, "num_queries": 60}
SECTIONS = {
    name: EXPERTS[name] | (WIDE | {"denoising_queries": 16} if "backbone" in EXPERTS[name] else {"image_size": 32})
    for name in EXPERTS
}


def counted(model, name, batch, flows):
    """PyTorch's own count of an expert's losses, forward and backward."""
    decoder = model.decoders[name]
    with torch.no_grad():
        link, view, targets = model._decoder_inputs(decoder, model.trunk(batch), batch)
    link.embeddings.requires_grad_(flows)
    counter = FlopCounterMode(display=False)
    with sdpa_kernel(SDPBackend.MATH), counter:  # the CPU's fused one is not counted
        sum(term.total for term in decoder.losses(link, view, targets).values()).backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("trainable", [None, ("llm", "link_heads"), tuple(TASKS)])
@pytest.mark.parametrize("name", TASKS)
def test_forward_and_backward(name, trainable):
    model, batch = expert_model(**SECTIONS), replace(expert_batch(TASKS[name], 4), decoders=[name])
    set_trainable(model, Stage.model_validate({"name": "s", "steps": 1, "trainable": trainable}))
    flows = trainable is None or "llm" in trainable
    wanted, found = counted(model, name, batch, flows), flops.of_step(model, [batch])
    assert found[name] == pytest.approx(wanted, rel=0.05)
    assert set(found) == {"vision", "llm", name}


def test_every_request_and_an_own_size_are_counted():
    sections = SECTIONS | {"grounding_dino": SECTIONS["grounding_dino"] | {"input_size": [2 * SIDE, 2 * SIDE]}}
    model = expert_model(**sections)
    rows = [scenes.scene_row(0, n, SIDE) for n in range(3)]
    collator = Collator(
        tiny_tokenizer(), SIDE, ("segment", "refer", "ground"), scenes.SKELETONS, input_rules=model.settings.input_rules
    )
    batch = collator(rows, [decode(row["image"]) for row in rows], [np.random.default_rng(n) for n in range(3)])
    batch.decoders = ["grounding_dino"]
    assert len(batch.layout.link_groups["perception"].unique()) > 6
    found = flops.of_step(model, [batch])["grounding_dino"]
    assert found == pytest.approx(counted(model, "grounding_dino", batch, True), rel=0.05)


def test_an_expert_without_prompts_computes_nothing():
    model, batch = expert_model(), expert_batch("caption")
    assert flops.of_step(model, [replace(batch, decoders=["unipose"])])["unipose"] == 0
    assert set(flops.of_step(model, [replace(batch, decoders=[])])) == {"vision", "llm"}


def test_the_log_tells_the_utilisation_by_the_experts_a_step_trains(monkeypatch):
    monkeypatch.setattr(flops, "peak", lambda device, precision: 1e12)
    batch = replace(expert_batch("segment"), decoders=["grounding_dino"])
    sums = StepSums({}, {}, tokens=300.0, computed_tokens=400.0, images=2)
    values = Meter(expert_model(), "bf16", torch.device("cpu")).metrics([batch], sums, 0.0, 0.001)
    parts = {name: value for name, value in values.items() if name.startswith("mfu/")}
    assert set(parts) == {"mfu/vision", "mfu/llm", "mfu/grounding_dino"}
    assert values["mfu"] == pytest.approx(sum(parts.values()), abs=1e-4)
    assert min(parts.values()) > 0
