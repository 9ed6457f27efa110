"""Links that do not look: the same for every image, in training and at inference."""

import pytest
import torch
from support.tiny_models import llm, plain_batch, random_images, scrambled, tiny_model, tiny_settings, tiny_tokenizer

from lumen_ray import config
from lumen_ray.data.batches.packing import Packing, pack
from lumen_ray.errors import UserError
from lumen_ray.model.settings import ModelSettings
from lumen_ray.trunk.branch import Branch
from lumen_ray.trunk.layout import IGNORE, build_layout

TOKENIZER = tiny_tokenizer()
NONE = torch.zeros(0)
BLIND = [
    Branch(0, "detect red circle", route="[DET]", reads_image=False),
    Branch(0, "locate head of figure", route="[POSE]", parent=0, reads_image=False),
    Branch(0, "segment blue square", route="[SEG]", reads_image=False),
]
LOOKING = [Branch(0, "detect red circle", route="[DET]"), Branch(0, "what is this ?", response="a circle")]


def make_trunk(**changes):
    return scrambled(tiny_model(llm=llm("llama"), links_see_image=False, **changes).trunk)


def training_links(trunk, images, blind=BLIND, packed=False):
    branches = [*blind, *LOOKING]
    layout = build_layout(branches, len(images), TOKENIZER)
    batch = plain_batch(images, layout)
    if packed:
        layout.pack = pack(layout, batch.has_image, Packing(600, 16))
    with torch.no_grad():
        return trunk(batch).links["lumen"].embeddings


@pytest.mark.parametrize("mode", ["causal", "full"])
@pytest.mark.parametrize("lead", [(), (3, 4)])
@pytest.mark.parametrize("adapters", [None, {"rank": 2, "alpha": 4}])
def test_training_and_inference_give_the_same_links_for_every_image(mode, lead, adapters):
    published = {"published_tokens": 90} if adapters else {}
    trunk = make_trunk(prefix_attention=mode, lead_tokens=lead, image_adapters=adapters, **published)
    ours, other = (training_links(trunk, random_images(1, seed=seed)) for seed in (0, 1))
    larger = training_links(trunk, random_images(1, side=128))
    kept = trunk.branch_links(trunk.lead_prefix(), build_layout(BLIND, 1, TOKENIZER))["lumen"].embeddings
    prefix = trunk.encode(random_images(1))
    cached = trunk.branch_links(prefix, build_layout([*BLIND, *LOOKING], 1, TOKENIZER))["lumen"].embeddings
    for found in (other, larger, cached):
        torch.testing.assert_close(found[:3], ours[:3], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(kept, ours[:3], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(cached, ours, atol=1e-4, rtol=1e-4)
    assert (other[3] - ours[3]).abs().max() > 1e-3  # this one looks


def test_packed_rows_give_the_same_links():
    trunk, images = make_trunk(), random_images(1)
    torch.testing.assert_close(
        training_links(trunk, images, packed=True), training_links(trunk, images), atol=1e-4, rtol=1e-4
    )


def test_the_routing_token_of_a_prompt_that_sees_nothing_is_not_learned():
    layout = build_layout([BLIND[0], LOOKING[0]], 1, TOKENIZER)
    learned = [bool((layout.labels[layout.branch_ids == b] != IGNORE).any()) for b in (0, 1)]
    assert learned == [False, True]
    assert (layout.seen[layout.branch_ids == 0] == 0).all() and (layout.images[layout.branch_ids == 0] == 0).all()


def test_the_sequential_layout_looks():
    changes = {"prompt_layout": "sequential", "prefix_attention": "causal", "link_reads_words": False}
    data = tiny_settings(**changes).model_dump() | {"links_see_image": False}
    with pytest.raises(UserError, match="links_see_image: false needs prompt_layout 'branches'"):
        config.validate(ModelSettings, data, "preset")
