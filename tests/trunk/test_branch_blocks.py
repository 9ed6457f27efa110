"""Attention in blocks equals attention over whole rows with the mask of the layout."""

import pytest
import torch
from support.tiny_models import llm, plain_batch, random_images, scrambled, tiny_model, tiny_tokenizer

from lumen_ray.trunk import branch_blocks
from lumen_ray.trunk.branch import Branch
from lumen_ray.trunk.branch_blocks import BranchBlocks
from lumen_ray.trunk.layout import build_layout
from lumen_ray.trunk.masks import branch_allowed, prefix_segments, visible_prefix

TOKENIZER = tiny_tokenizer()
HEADS, WIDTH = 2, 8
NAMES = ("red circle", "a", "a very blue square with a long name", "green", "red", "triangle", "dot", "b c")


def branches(rows):
    """Eight prompts about each image, in turn, and a conversation with a second image."""
    found = [Branch(row, f"detect {name}", route="[DET]") for name in NAMES for row in range(rows)]
    return [*found, Branch(0, "what ?", history=(("a", "b"),), image_turns=(1,))]


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("has_image", [[True], [True, True], [True, False, True]])
@pytest.mark.parametrize("lead", [0, 2])
@pytest.mark.parametrize("most_weights", [branch_blocks.MOST_WEIGHTS, 1, 3000])
def test_blocks_give_what_the_mask_gives(groups, has_image, lead, most_weights, monkeypatch):
    monkeypatch.setattr(branch_blocks, "MOST_WEIGHTS", most_weights)
    monkeypatch.setattr(branch_blocks, "SAVING", 0.0)
    rows = len(has_image)
    layout = build_layout(branches(rows), rows, TOKENIZER, has_image=has_image)
    segments = prefix_segments(lead, 5, 2)
    layout.alone = ~torch.tensor(has_image) if lead else layout.alone
    visible = visible_prefix(layout.seen, segments, layout.alone)
    blocks = BranchBlocks.of(layout, visible)
    length = layout.input_ids.shape[1]
    torch.manual_seed(0)
    query = torch.randn(rows, HEADS * groups, length, WIDTH)
    key, value = torch.randn(2, rows, HEADS, len(segments) + length, WIDTH)
    allowed = branch_allowed(layout.branch_ids, layout.seen, segments, layout.alone)
    wide = (stored.repeat_interleave(groups, 1) for stored in (key, value))
    expected = torch.nn.functional.scaled_dot_product_attention(query, *wide, attn_mask=allowed[:, None])
    found = blocks.attend(query * WIDTH**-0.5, key, value)
    filled = layout.branch_ids >= 0
    torch.testing.assert_close(found[filled], expected.transpose(1, 2)[filled], atol=1e-5, rtol=1e-5)
    assert found.isfinite().all()


def test_one_long_branch_takes_the_whole_row():
    layout = build_layout([Branch(0, "what ?", response="a red circle " * 20)], 1, TOKENIZER)
    assert BranchBlocks.of(layout, visible_prefix(layout.seen, prefix_segments(0, 16, 1))) is None
    nothing = build_layout([], 1, TOKENIZER)
    assert BranchBlocks.of(nothing, visible_prefix(nothing.seen, prefix_segments(0, 16, 1))) is None


def test_an_llm_with_an_attention_of_its_own_gets_the_mask():
    trunk = scrambled(tiny_model(llm=llm("stablelm"), prefix_attention="causal").trunk)
    images = random_images(1)
    prompts = [Branch(0, f"detect {name}", route="[DET]") for name in 3 * NAMES]
    prefix = trunk.encode(images)
    together = trunk.branch_links(prefix, build_layout(prompts, 1, TOKENIZER))["lumen"].embeddings
    for prompt, found in zip(prompts[:3], together, strict=False):
        alone = trunk.branch_links(prefix, build_layout([prompt], 1, TOKENIZER))["lumen"].embeddings
        torch.testing.assert_close(found[None], alone, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
@pytest.mark.parametrize("mode", ["causal", "full"])
@pytest.mark.parametrize("lead", [(), (3, 4)])
def test_training_in_blocks_gives_the_losses_and_gradients_of_the_mask(kind, mode, lead, monkeypatch):
    monkeypatch.setattr(branch_blocks, "SAVING", 0.0)
    has_image = torch.tensor([True, False, True])
    prompts = [
        *(Branch(row, f"detect {name}", route="[DET]") for name in NAMES for row in (0, 2)),
        *(Branch(row, "what ?", response="a red circle") for row in range(3)),
    ]
    layout = build_layout(prompts, 3, TOKENIZER, has_image=has_image)
    layout.alone = ~has_image if lead else layout.alone
    found = []
    for blocks in (True, False):
        trunk = scrambled(tiny_model(llm=llm(kind), prefix_attention=mode, lead_tokens=lead).trunk).train()
        trunk.trains_in_blocks = blocks
        with monkeypatch.context() as patched:
            if not blocks:
                patched.setattr(BranchBlocks, "attend", None)
            else:
                patched.setattr(trunk, "_training_mask", None)
            out = trunk(plain_batch(random_images(3), layout, has_image=has_image))
        link = out.links["lumen"].embeddings
        (out.lm_losses.sum() + link.square().sum() + out.dense.square().sum()).backward()
        grads = {name: p.grad for name, p in trunk.named_parameters() if p.grad is not None}
        found.append((out.lm_losses, link, out.dense, grads))
    for ours, whole in zip(found[0][:3], found[1][:3], strict=True):
        torch.testing.assert_close(ours, whole, atol=1e-4, rtol=1e-4)
    assert found[0][3].keys() == found[1][3].keys()
    for name, grad in found[0][3].items():
        torch.testing.assert_close(grad, found[1][3][name], atol=1e-3, rtol=1e-3)
