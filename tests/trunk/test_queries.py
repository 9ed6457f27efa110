"""Gradients through the super link, and what the LM loss supervises."""

import pytest
import torch
from support.tiny_models import EXPERTS, scene_batch, scrambled, tiny_model, tiny_tokenizer
from torch import nn

from lumen_ray.attention import mask_to_bias
from lumen_ray.superlink import SuperLink
from lumen_ray.tasks import LINK_FAMILIES, ROUTING_TOKENS
from lumen_ray.trunk.branch import Branch
from lumen_ray.trunk.layout import IGNORE, build_layout
from lumen_ray.trunk.masks import branch_allowed, prefix_segments
from lumen_ray.trunk.queries import LinkHead, SuperLinkQueries, mean_words


def test_gradients_of_a_decoders_loss_alone_reach_llm_queries_link_head_and_vision():
    model = tiny_model()
    losses = model(scene_batch(2))
    sum(losses[name].total for name in ("heatmap", "match", "box", "mask", "keypoint")).backward()
    trunk = model.trunk
    reached = {
        "LLM": trunk.llm.model.layers[0].self_attn.q_proj.weight,
        "LLM MLP": trunk.llm.model.layers[-1].mlp.down_proj.weight,
        "word embeddings": trunk.llm.get_input_embeddings().weight,
        "queries": trunk.queries.queries["perception"],
        "link head": trunk.link_heads["lumen"].mlp[0].weight,
        "projector": trunk.vision.projector.weight,
        "CLIP": trunk.vision.clip.merge.weights,
        "dense": trunk.stem.down4[0][0].weight,
    }
    for name, parameter in reached.items():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name
    # routing tokens stand in front of the queries, so their embeddings learn from the decoder too
    rows = trunk.llm.get_input_embeddings().weight.grad[[tiny_tokenizer().ids[t] for t in ("[DET]", "[SEG]")]]
    assert rows.abs().sum(dim=1).min() > 0


def test_heatmap_loss_alone_reaches_the_queries():
    model = tiny_model()
    model(scene_batch(1, tasks=("detect",)))["heatmap"].total.backward()
    assert model.trunk.queries.queries["perception"].grad.abs().min() > 0


class Raised(nn.Module):
    """A vocabulary projection with the logit of one token raised."""

    def __init__(self, head: nn.Module, token: int):
        super().__init__()
        self.head, self.token = head, token

    def forward(self, hidden):
        logits = self.head(hidden).clone()
        logits[..., self.token] += 3
        return logits


def test_the_routing_token_is_in_the_lm_loss():
    model = tiny_model().eval()
    batch = scene_batch(2, tasks=("detect", "caption"))
    ids = tiny_tokenizer().ids
    layout = batch.layout
    routed = [i for i, task in enumerate(batch.tasks) if task == "detect"]
    assert routed and "caption" in batch.tasks
    with torch.no_grad():
        before = model(batch)["lm"]
        model.trunk.llm.lm_head = Raised(model.trunk.llm.lm_head, ids["[DET]"])
        after = model(batch)["lm"]
    for branch, task in enumerate(batch.tasks):
        if task == "detect":
            assert after.each[branch] < before.each[branch] - 1
        else:
            assert after.each[branch] > before.each[branch]
    supervised = layout.labels != IGNORE
    assert int(before.count) == int(supervised.sum()) == int((layout.labels[:, 1:] != IGNORE).sum())
    routing = torch.isin(layout.labels, torch.tensor([ids[t] for t in ROUTING_TOKENS]))
    assert int(routing.sum()) == len(routed)
    torch.testing.assert_close(before.each.sum(), before.total)


def test_queries_are_one_set_per_family_on_the_scale_of_the_word_embeddings():
    torch.manual_seed(0)
    queries = SuperLinkQueries(256, std=0.08)
    assert queries.queries["perception"].shape == (LINK_FAMILIES["perception"].num_queries, 256)
    assert 0.06 < queries.queries["perception"].std() < 0.1


def test_the_link_head_averages_over_the_queries():
    head = scrambled(LinkHead(8, 6))
    states = torch.randn(3, 4, 8)
    expected = torch.stack([head.mlp(states[:, i]) for i in range(4)]).mean(0)
    torch.testing.assert_close(head(states), expected)
    torch.testing.assert_close(head(states[:, [2, 0, 3, 1]]), expected)


def test_a_batch_without_prompts_still_has_a_gradient_for_every_part():
    """On another rank the same step may have prompts; every rank must reduce the same set of gradients."""
    rows = [dict(row, classes=[], instances=[], phrases=[], messages=[]) for row in _rows(2)]
    model = tiny_model()
    full, empty = scene_batch(2), scene_batch(rows)
    assert not empty.tasks and not empty.targets
    with_gradient = []
    for batch in (full, empty):
        losses = model(batch)
        sum(term.total for term in losses.values()).backward()
        with_gradient.append({name for name, p in model.named_parameters() if p.grad is not None})
        model.zero_grad()
    assert with_gradient[0] == with_gradient[1]


def _rows(count):
    from support.tiny_models import SIDE

    from lumen_ray.data.scenes import render as scenes

    return [scenes.scene_row(0, i, SIDE) for i in range(count)]


def chain(number):
    """Prompts about 3 images; every third object has two keypoint prompts behind it."""
    parents, images = [], []
    for i in range(number):
        parents.append(-1)
        images.append(i * 3 // number)
        if i % 3 == 0:
            parents += [len(parents) - 1] * 2
            images += [images[-1]] * 2
    embeddings = torch.arange(len(parents), dtype=torch.float32)[:, None].expand(-1, 4).contiguous()
    return SuperLink("lumen", embeddings, torch.tensor(images), torch.tensor(parents))


@pytest.mark.parametrize("most", [1, 2, 5, 100])
def test_chunks_keep_keypoint_prompts_with_their_object(most):
    link = chain(11)
    parts = link.chunks(most)
    assert torch.cat(parts).sort().values.tolist() == list(range(len(link)))
    for members in parts:
        part, images = link.select_with_images(members)
        assert 0 < int((part.parent < 0).sum()) <= most
        assert torch.equal(images[part.image_index], link.image_index[members])
        assert torch.equal(part.embeddings, link.embeddings[members])
        children = part.parent >= 0
        assert torch.equal(members[part.parent[children]], link.parent[members][children])


def test_no_prompts_are_no_chunks():
    empty = SuperLink("lumen", torch.zeros(0, 4), *torch.zeros(2, 0, dtype=torch.int64))
    assert empty.chunks(3) == []


def test_mean_words_is_the_mean_over_a_branchs_tokens_without_its_queries():
    embeds = torch.randn(2, 7, 3, generator=torch.Generator().manual_seed(0))
    branches = torch.tensor([[0, 0, 0, 2, 2, 2, -1], [1, 1, 1, 1, -1, -1, -1]])
    queries = torch.tensor([[[0, 2]], [[0, 5]], [[1, 3]]])
    found = mean_words(embeds, branches, queries, 4)
    expected = torch.stack([embeds[0, :2].mean(0), embeds[1, :3].mean(0), embeds[0, 3:5].mean(0), torch.zeros(3)])
    torch.testing.assert_close(found, expected)


def test_class_names_differ_in_fresh_links_when_words_are_read():
    """Share of the links' squared norm that differs from name to name, before any training."""

    def share(reads_words, route="[DET]", decoder="lumen"):
        model = tiny_model(link_reads_words=reads_words, **EXPERTS)
        model.train()
        names = ("red circle", "blue square", "green figure")
        branches = [Branch(0, f"find all {name} .", route=route) for name in names]
        layout = build_layout(branches, 1, tiny_tokenizer())
        embeds = model.trunk.embed_branches(layout, None)
        hidden = model.trunk.llm.model(
            inputs_embeds=embeds,
            attention_mask=mask_to_bias(
                branch_allowed(layout.branch_ids, layout.seen, prefix_segments(0, 0, 1)), torch.float32
            )[:, None],
            position_ids=layout.offsets,
        ).last_hidden_state
        links = model.trunk.links(hidden, layout, embeds)[decoder].embeddings
        return float((links - links.mean(0)).square().sum() / links.square().sum())

    assert share(True) > 0.02 > 5 * share(False)
    picture = "[GEN]", "stable_diffusion"
    assert share(True, *picture) > 0.01 > 5 * share(False, *picture)
