"""Branches do not attend to each other; the cached path equals the packed one; greedy text equals a plain re-run."""

import dataclasses
import random
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from support.tiny_models import SIDE, llm, plain_batch, random_images, scrambled, tiny_model, tiny_tokenizer

from lumen_ray.data.batches.packing import Packing, pack
from lumen_ray.trunk.branch import Branch
from lumen_ray.trunk.layout import IGNORE, build_layout

TOKENIZER = tiny_tokenizer()
IMAGES = random_images(2)
REGION_MASKS = torch.zeros(2, SIDE, SIDE, dtype=torch.uint8)
REGION_MASKS[0, 8:30, 8:40] = 1
REGION_MASKS[1, 40:60, 4:20] = 1

BRANCHES = [
    Branch(0, "detect red circle", route="[DET]"),
    Branch(0, "describe <region> .", response="a red circle", regions=(0,)),
    Branch(0, "pose of figure", route="[POSE]"),
    Branch(0, "head of figure", route="[POSE]", parent=2),
    Branch(1, "how many circles are there ?", response="two"),
    Branch(1, "segment blue square", route="[SEG]"),
    Branch(1, "which one is <region> or <region> ?", route="[GRD]", regions=(1, 1)),
    Branch(0, "ground the green square", route="[GRD]"),
]


def make_trunk(model_type="llama", mode="full", **changes):
    return scrambled(tiny_model(llm=llm(model_type), prefix_attention=mode, **changes).trunk)


def batch_of(branches, has_image=(True, True)):
    layout = build_layout(branches, 2, TOKENIZER)
    regions = {"region_masks": REGION_MASKS, "region_images": torch.tensor([0, 1])}
    return plain_batch(IMAGES, layout, has_image=torch.tensor(has_image), **regions)


@torch.no_grad()
def results(trunk, branches):
    """Per branch (by prompt): its link embedding, if any, and the losses of its supervised tokens."""
    batch = batch_of(branches)
    out, layout = trunk(batch), batch.layout
    found = {}
    for index, branch in enumerate(branches):
        here = (layout.branch_ids[:, 1:] == index) & (layout.labels[:, 1:] != IGNORE)
        found[branch.prompt] = [out.lm_losses[here]]
    for link, branch in enumerate(layout.link_branches.get("perception", torch.zeros(0)).tolist()):
        found[branches[branch].prompt].append(out.links["lumen"].embeddings[link])
    return found


def same(a, b, tolerance=1e-5):
    assert a.keys() == b.keys()
    for prompt in a:
        for x, y in zip(a[prompt], b[prompt], strict=True):
            torch.testing.assert_close(x, y, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("mode", ["causal", "full"])
@pytest.mark.parametrize("model_type", ["llama", "qwen3"])
def test_branches_alone_together_and_shuffled_agree(model_type, mode):
    trunk = make_trunk(model_type, mode)
    together = results(trunk, BRANCHES)
    assert len({round(float(v[0].sum()), 4) for v in together.values()}) == len(BRANCHES)  # they do differ
    alone = {}
    for branch in BRANCHES:
        alone |= results(trunk, [dataclasses.replace(branch, parent=-1)])
    same(together, alone)
    for seed in range(2):
        order = [dataclasses.replace(b, parent=-1) for b in BRANCHES]
        random.Random(seed).shuffle(order)
        same(together, results(trunk, order))


@pytest.mark.parametrize("mode", ["causal", "full"])
@pytest.mark.parametrize("model_type", ["llama", "qwen3"])
def test_the_cached_path_equals_the_packed_pass(model_type, mode):
    trunk = make_trunk(model_type, mode)
    batch = batch_of(BRANCHES)
    layout = batch.layout
    with torch.no_grad():
        packed = trunk(batch)
    prefix = trunk.encode(IMAGES)
    assert prefix.length == 16
    torch.testing.assert_close(prefix.dense, packed.dense, atol=1e-4, rtol=1e-4)
    for _ in range(2):  # the prefix can be used again: branches leave no trace in it
        regions = trunk.region_embeddings(prefix, REGION_MASKS, batch.region_images)
        hidden, _ = trunk.run_branches(prefix, layout, regions)
        links = trunk.branch_links(prefix, layout, regions)["lumen"]
        torch.testing.assert_close(links.embeddings, packed.links["lumen"].embeddings, atol=1e-4, rtol=1e-4)
        logits = trunk.llm.lm_head(hidden[:, :-1])
        losses = F.cross_entropy(logits.transpose(1, 2), layout.labels[:, 1:], reduction="none", ignore_index=IGNORE)
        torch.testing.assert_close(losses, packed.lm_losses, atol=1e-4, rtol=1e-4)


def test_without_an_image_the_pixels_do_not_matter():
    trunk = make_trunk()
    branches = [Branch(0, "detect red circle", route="[DET]"), Branch(1, "find every square", route="[DET]")]
    batch = batch_of(branches, has_image=(False, True))
    with torch.no_grad():
        before = trunk(batch).links["lumen"].embeddings
        after = trunk(replace(batch, images=random_images(2, seed=9))).links["lumen"].embeddings
    torch.testing.assert_close(before[0], after[0])
    assert (before[1] - after[1]).abs().max() > 1e-3
    prefix = trunk.encode(IMAGES, torch.tensor([False, True]))
    cached = trunk.branch_links(prefix, batch.layout)["lumen"].embeddings
    torch.testing.assert_close(cached, before, atol=1e-4, rtol=1e-4)


def test_token_merge_shortens_the_prefix_and_keeps_the_dense_map():
    from support.tiny_models import CLIP

    trunk = make_trunk(vision={"clip": CLIP, "token_merge": 2})
    prefix = trunk.encode(IMAGES)
    assert prefix.length == 4
    assert prefix.dense.shape == (2, 16, SIDE // 4, SIDE // 4)


@pytest.mark.parametrize("shape", [(32, 96), (128, 64)])
@pytest.mark.parametrize("mode", ["causal", "full"])
def test_inputs_that_are_not_square_give_the_same_packed_cached_and_alone(shape, mode):
    from support.tiny_models import CLIP, DINOV2

    trunk = make_trunk(mode=mode, vision={"clip": CLIP, "dinov2": DINOV2, "mlp_ratio": 2, "token_merge": 2})
    images = torch.randint(0, 256, (2, 3, *shape), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    masks = torch.zeros(2, *shape, dtype=torch.uint8)
    masks[0, 4:20, -30:-4], masks[1, -20:-2, 3:30] = 1, 1
    batch = replace(batch_of(BRANCHES), images=images, region_masks=masks)
    layout = batch.layout
    prefix = trunk.encode(images)
    assert prefix.length == (shape[0] // 32) * (shape[1] // 32)
    assert prefix.dense.shape == (2, 16, shape[0] // 4, shape[1] // 4)
    regions = trunk.region_embeddings(prefix, masks, batch.region_images)
    cached = trunk.branch_links(prefix, layout, regions)["lumen"].embeddings
    with torch.no_grad():
        whole = trunk(batch)
        layout.pack = pack(layout, batch.has_image, Packing(600, prefix.length))
        shared = trunk(batch)
    assert len(layout.pack) == 1
    for out in (whole, shared):
        torch.testing.assert_close(out.dense, prefix.dense, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(out.links["lumen"].embeddings, cached, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(shared.lm_losses, whole.lm_losses, atol=1e-4, rtol=1e-4)
    alone = trunk.encode(images[1:])
    torch.testing.assert_close(alone.dense, prefix.dense[1:], atol=1e-4, rtol=1e-4)
