"""The counted operations are those that PyTorch counts."""

import pytest
import torch
from support.tiny_models import CLIP, scene_batch, tiny_model
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from lumen_ray.data.batches.collate import BranchSettings
from lumen_ray.decoders.registry import PARTS
from lumen_ray.recipe import LoraSettings, Stage
from lumen_ray.train.metrics import flops
from lumen_ray.train.optimizer import set_trainable

WIDE = {
    "stem_channels": 16,
    "dense_channels": 32,
    "lumen": {"hidden_size": 32, "num_layers": 2, "num_heads": 2, "max_masks_per_object": 3},
}


def counted(model, batch, backward=True):
    """PyTorch's own count of a pass: of each module's forward, and of all of it."""
    counter = FlopCounterMode(display=False)
    with torch.set_grad_enabled(backward), sdpa_kernel(SDPBackend.MATH), counter:  # the CPU's fused one is not counted
        losses = model(batch)
        if backward:
            sum(term.total for term in losses.values() if term.total.requires_grad).backward()
    return {name.removeprefix("Generalist."): sum(found.values()) for name, found in counter.get_flop_counts().items()}


def stage(trainable=PARTS):
    return Stage.model_validate({"name": "s", "steps": 1, "trainable": trainable})


@pytest.mark.parametrize("tasks", [("detect", "segment", "caption"), ("caption", "vqa"), ("pose",)])
def test_forward(tasks):
    model, batch = tiny_model(**WIDE), scene_batch(4, tasks, BranchSettings(max_messages=6))
    found, wanted = flops.forward(model, batch), counted(model, batch, backward=False)
    wanted["trunk.llm"] = wanted["trunk.llm.model"] + wanted["trunk.llm.lm_head"]
    wanted["trunk.dense"] = wanted["trunk.stem"] + wanted.get("trunk.dense", 0)
    for name in ("vision", "llm", "dense"):
        assert found[name] == pytest.approx(wanted[f"trunk.{name}"], rel=0.01), name
    # masks and poses are computed outside of the decoder's `forward`; masks are counted for the most there can be
    others = sum(wanted.get(f"trunk.{name}", 0) for name in ("vision", "llm", "dense", "link_heads", "regions"))
    model.requires_grad_(False)
    assert flops.of_step(model, [batch]).get("lumen", 0) == pytest.approx(wanted["Global"] - others, rel=0.1, abs=1)


def test_clip_with_an_mlp_bridge():
    vision = {"clip": CLIP, "bridge": "mlp2x_gelu", "clip_layers": "last", "token_merge": 2}
    model = tiny_model(vision=vision, tokens_read_stem=False, **WIDE)
    batch = scene_batch(4, ("caption",))
    found, wanted = flops.forward(model, batch)["vision"], counted(model, batch, backward=False)["trunk.vision"]
    assert found == pytest.approx(wanted, rel=0.01)


@pytest.mark.parametrize(
    "trainable", [PARTS, ("llm",), ("vision",), ("lumen",), ("stem", "dense", "lumen", "link_heads")]
)
def test_forward_and_backward(trainable):
    model, batch = tiny_model(**WIDE).train(), scene_batch(4, ("detect", "segment", "caption"))
    set_trainable(model, stage(trainable))
    found, wanted = sum(flops.of_step(model, [batch]).values()), counted(model, batch)["Global"]
    assert found == pytest.approx(wanted, rel=0.12)


def test_micro_steps_add_up():
    model, batch = tiny_model(), scene_batch(2)
    once, twice = flops.of_step(model, [batch]), flops.of_step(model, [batch, batch])
    assert twice == {name: 2 * count for name, count in once.items()}


def test_what_does_not_learn_is_passed_less_often():
    model, batch = tiny_model(), scene_batch(2)
    passes, decoder = {}, {}
    for names in (PARTS, ("llm",), ("vision",), ("lumen",), ()):
        set_trainable(model, stage(names)) if names else model.requires_grad_(False)
        passes[names] = flops.passes_by_component(model)
        decoder[names] = flops.of_step(model, [batch])["lumen"]
    assert passes[PARTS] == {"vision": 3, "llm": 3, "dense": 3}
    assert passes["llm",] == {"vision": 1, "llm": 3, "dense": 2}
    assert passes["vision",] == {"vision": 3, "llm": 2, "dense": 2}
    assert passes["lumen",] == {"vision": 1, "llm": 1, "dense": 1}
    assert {names: count / decoder[()] for names, count in decoder.items()} == {
        PARTS: 3, ("llm",): 2, ("vision",): 2, ("lumen",): 3, (): 1
    }  # fmt: skip


def test_adapters_need_no_gradient_of_the_weights_beside_them():
    pytest.importorskip("peft", reason="LoRA needs peft (pip install 'lumen-ray[lora]')")
    from lumen_ray.train.lora import inject

    model = tiny_model()
    inject(model, LoraSettings(rank=2), 0)
    set_trainable(model, stage())
    assert flops.passes_by_component(model)["llm"] == 2


@pytest.mark.parametrize(
    ("name", "bf16"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA A10G", 70e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA GeForce RTX 4090", 165e12),
        ("Some Other GPU", None),
    ],
)
def test_the_peak_of_a_gpu_is_found_by_its_name(name, bf16):
    assert flops.peak_of(name, "bf16") == bf16
    assert flops.peak(torch.device("cpu"), "bf16") is None
    if bf16:
        assert flops.peak_of(name, "fp32") < bf16
