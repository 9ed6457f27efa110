"""Adapters that act where an image is: text alone never sees them, and every path of the LLM applies them alike."""

import pytest
import torch
import torch.nn.functional as F
from support.tiny_models import llm, plain_batch, random_images, scrambled, tiny_model, tiny_tokenizer

from lumen_ray.data.batches.packing import Packing, pack
from lumen_ray.errors import UserError
from lumen_ray.inference.decode_loop import DecodeLoop
from lumen_ray.inference.sampling import GREEDY, Sampler
from lumen_ray.inference.writing import TextPrompt
from lumen_ray.train.blocks import checkpoint_module
from lumen_ray.trunk.branch import Branch
from lumen_ray.trunk.image_adapters import AdaptedLinear
from lumen_ray.trunk.layout import IGNORE, build_layout

TOKENIZER = tiny_tokenizer()
ADAPTERS = {"rank": 2, "alpha": 4}
HAS_IMAGE = torch.tensor([True, True, False])
BRANCHES = [
    Branch(0, "which one is red ?", response="the circle"),
    Branch(0, "detect red circle", route="[DET]"),
    Branch(2, "which one is blue ?", response="the square"),
    Branch(1, "what is this ?", response="the square"),
]
SETTINGS = {"llm": llm("llama"), "published_tokens": 90}


def learned(kind="llama", **changes):
    """A trunk whose adapters are not those of the start."""
    trunk = scrambled(tiny_model(**SETTINGS | {"llm": llm(kind), "image_adapters": ADAPTERS} | changes)).trunk
    with torch.no_grad():
        for name, p in trunk.named_parameters():
            if name.endswith("lora_B"):
                p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(1)) * 0.5)
    return trunk


def plain(trunk):
    """The same trunk without adapters."""
    other = tiny_model(**SETTINGS | {"llm": trunk.settings.llm}).trunk
    other.load_state_dict({name: value for name, value in trunk.state_dict().items() if ".lora_" not in name})
    return other


def batch():
    return plain_batch(random_images(3), build_layout(BRANCHES, 3, TOKENIZER, has_image=HAS_IMAGE), has_image=HAS_IMAGE)


def losses_of(trunk, given):
    """The losses of each branch with text."""
    with torch.no_grad():
        losses = trunk(given).lm_losses
    layout = given.layout
    here = layout.labels[:, 1:] != IGNORE
    return {i: losses[here & (layout.branch_ids[:, 1:] == i)] for i in (0, 2, 3)}


@pytest.mark.parametrize("kind", ["llama", "qwen3", "mistral"])
def test_only_rows_with_an_image_read_them(kind):
    trunk = learned(kind)
    ours, without = losses_of(trunk, batch()), losses_of(plain(trunk), batch())
    assert torch.equal(ours[2], without[2])
    assert all((ours[i] - without[i]).abs().max() > 1e-2 for i in (0, 3))


def test_fresh_ones_change_nothing():
    trunk = tiny_model(**SETTINGS, image_adapters=ADAPTERS).trunk
    assert any(isinstance(module, AdaptedLinear) for module in trunk.llm.modules())
    ours, without = losses_of(trunk, batch()), losses_of(plain(trunk), batch())
    assert all(torch.equal(ours[i], without[i]) for i in ours)


@torch.no_grad()
def test_the_cached_path_equals_the_training_pass():
    trunk, given = learned(), batch()
    expected, links = losses_of(trunk, given), trunk(given).links["lumen"].embeddings
    prefix = trunk.encode(given.images, HAS_IMAGE)
    layout = given.layout
    hidden, _ = trunk.run_branches(prefix, layout)
    losses = F.cross_entropy(
        trunk.llm.lm_head(hidden[:, :-1]).flatten(0, 1), layout.labels[:, 1:].flatten(), reduction="none"
    ).view(3, -1)
    for i, found in expected.items():
        here = (layout.labels[:, 1:] != IGNORE) & (layout.branch_ids[:, 1:] == i)
        torch.testing.assert_close(losses[here], found, atol=1e-4, rtol=1e-4)
    of_cache = trunk.branch_links(prefix, layout)["lumen"].embeddings
    torch.testing.assert_close(of_cache, links, atol=1e-4, rtol=1e-4)


def test_packed_rows_equal_rows_of_their_own():
    trunk, given = learned(), batch()
    expected = losses_of(trunk, given)
    given.layout.pack = pack(given.layout, HAS_IMAGE, Packing(600, 16))
    assert len(given.layout.pack) == 1
    found = losses_of(trunk, given)
    for i, losses in expected.items():
        torch.testing.assert_close(found[i], losses, atol=1e-5, rtol=1e-5)


def _answers(trunk, asked):
    """Tokens of answers to [(images, has_image, branches)], all written together, 12 each."""
    loop = DecodeLoop(trunk, TOKENIZER)
    writings = []
    for images, has_image, branches in asked:
        prefix = trunk.encode(images, has_image)
        prompts = [TextPrompt(branch, Sampler(GREEDY), 12) for branch in branches]
        writings += loop.submit(prefix, prompts)
    loop.wait(writings)
    return [writing.tokens for writing in writings]


def test_answers_written_in_the_same_steps_are_those_of_each_alone(monkeypatch):
    monkeypatch.setattr(TOKENIZER, "end_ids", frozenset())  # shared by other tests
    trunk = learned()
    images, one = random_images(2), torch.tensor([True])
    text, seen = Branch(0, "which one is blue ?"), Branch(0, "what is this ?")
    without = torch.tensor([False])
    alone = [_answers(trunk, [(images[:1], without, [text])])[0], _answers(trunk, [(images[1:], one, [seen])])[0]]
    together = _answers(trunk, [(images[:1], without, [text]), (images[1:], one, [seen])])
    assert together == alone
    assert alone[0] == _answers(plain(trunk), [(images[:1], without, [text])])[0]
    assert alone[1] != _answers(plain(trunk), [(images[1:], one, [seen])])[0]


def test_gradients_are_the_same_where_activations_are_recomputed():
    found = []
    for recomputed in (False, True):
        trunk = learned()
        if recomputed:
            checkpoint_module(trunk.llm)
        trunk(batch()).lm_losses.sum().backward()
        found.append({name: p.grad for name, p in trunk.named_parameters() if ".lora_" in name})
    assert found[0] and all(grad.abs().max() > 0 for grad in found[0].values())
    for name, grad in found[0].items():
        torch.testing.assert_close(found[1][name], grad, atol=1e-6, rtol=1e-5)


def test_targets_are_layers_of_the_llm():
    trunk = tiny_model(**SETTINGS, image_adapters=ADAPTERS | {"targets": ["*.q_proj", "*.v_proj"]}).trunk
    names = {name.split(".")[-2] for name, _ in trunk.named_parameters() if name.endswith("lora_A")}
    assert names == {"q_proj", "v_proj"}
    with pytest.raises(UserError, match=r"image_adapters.targets: '\*.q' fits no layer.*q_proj"):
        tiny_model(**SETTINGS, image_adapters=ADAPTERS | {"targets": ["*.q"]})
