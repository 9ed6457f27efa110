"""The prefix-and-branches layout and its mask, for random lists of branches."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.tiny_models import tiny_tokenizer

from lumen_ray.errors import UserError
from lumen_ray.tasks import LINK_FAMILIES, REGION_TOKEN, ROUTING_TOKENS, family_of
from lumen_ray.trunk.branch import Branch
from lumen_ray.trunk.layout import IGNORE, branch_tokens, build_layout
from lumen_ray.trunk.masks import branch_allowed, prefix_allowed, prefix_segments
from lumen_ray.trunk.tokenizer import ASSISTANT, EOS, PAD, USER

TOKENIZER = tiny_tokenizer()
NUM_QUERIES = 4

words = st.text("abc de?", min_size=1, max_size=8)


@st.composite
def branch_lists(draw):
    """(branches, number of images): routed, written and asked branches, some with regions, in any image order."""
    images = draw(st.integers(1, 3))
    branches, regions = [], 0
    for _ in range(draw(st.integers(0, 7))):
        prompt = draw(words)
        count = draw(st.integers(0, 2))
        prompt += f" {REGION_TOKEN}" * count
        route = draw(st.sampled_from((None, *ROUTING_TOKENS)))
        response = draw(st.none() | words) if route is None else None
        routed = [i for i, b in enumerate(branches) if b.route and route and family_of(b.route) == family_of(route)]
        parent = draw(st.sampled_from([-1, *routed])) if route else -1
        mine = tuple(range(regions, regions + count))
        regions += count
        branches.append(Branch(draw(st.integers(0, images - 1)), prompt, route, response, mine, parent))
    return branches, images


@settings(max_examples=60, deadline=None)
@given(branch_lists())
def test_layout_holds_every_branch_once(case):
    branches, images = case
    layout = build_layout(branches, images, TOKENIZER)
    regions = []
    for index, branch in enumerate(branches):
        tokens, labels, queries = branch_tokens(branch, TOKENIZER)
        where = torch.nonzero(layout.branch_ids == index)
        assert (where[:, 0] == branch.image).all()
        row, columns = branch.image, where[:, 1]
        assert (columns.diff() == 1).all()  # contiguous
        assert layout.input_ids[row, columns].tolist() == tokens
        assert layout.labels[row, columns].tolist() == labels
        assert layout.offsets[row, columns].tolist() == list(range(len(tokens)))  # positions restart
        assert layout.last_slots[index].tolist() == [row, int(columns[-1])]
        if queries:
            family = family_of(branch.route).name
            link = layout.link_branches[family].tolist().index(index)
            assert layout.query_slots[family][link].tolist() == [[row, int(c)] for c in columns[-queries:]]
            assert layout.link_images[family][link] == row
        for column in columns[[t == TOKENIZER.ids[REGION_TOKEN] for t in tokens]]:
            regions.append([row, int(column)])
    assert (layout.branch_ids >= 0).sum() == sum(len(branch_tokens(b, TOKENIZER)[0]) for b in branches)
    padding = layout.branch_ids < 0
    assert (layout.input_ids[padding] == TOKENIZER.ids[PAD]).all() and (layout.labels[padding] == IGNORE).all()
    # link and region indices name what the branches say, whatever order the images are packed in
    found = {
        tuple(slot): int(index) for slot, index in zip(layout.region_slots.tolist(), layout.region_index, strict=True)
    }
    wanted = [index for branch in branches for index in branch.regions]
    assert [found[tuple(slot)] for slot in regions] == wanted


@settings(max_examples=60, deadline=None)
@given(branch_lists())
def test_links_keep_their_branch_and_their_parent(case):
    branches, images = case
    layout = build_layout(branches, images, TOKENIZER)
    members = {family: links.tolist() for family, links in layout.link_branches.items()}
    assert sorted(sum(members.values(), [])) == [i for i, b in enumerate(branches) if b.route]
    for family, links in members.items():
        for link, branch in enumerate(links):
            parent = int(layout.link_parents[family][link])
            assert (links[parent] if parent >= 0 else -1) == branches[branch].parent
            row, first = layout.query_slots[family][link, 0].tolist()
            assert layout.branch_ids[row, first] == branch
            assert layout.input_ids[row, first - 1] == TOKENIZER.ids[branches[branch].route]
            assert branches[branch].route in LINK_FAMILIES[family].routing_tokens


@settings(max_examples=60, deadline=None)
@given(branch_lists())
def test_only_routing_tokens_and_responses_are_supervised(case):
    branches, images = case
    layout = build_layout(branches, images, TOKENIZER)
    supervised = 0
    for branch in branches:
        if branch.route:
            supervised += 1
        elif branch.response is not None:
            supervised += len(TOKENIZER.encode(branch.response)) + 1  # and the end
    assert (layout.labels != IGNORE).sum() == supervised
    here = layout.labels != IGNORE
    assert (layout.labels[here] == layout.input_ids[here]).all()


@settings(max_examples=60, deadline=None)
@given(branch_lists(), st.integers(1, 5), st.lists(st.booleans(), min_size=3, max_size=3))
def test_a_token_attends_to_the_prefix_and_the_preceding_tokens_of_its_branch(case, prefix, valid):
    branches, images = case
    layout = build_layout(branches, images, TOKENIZER, has_image=valid[:images])
    allowed = branch_allowed(layout.branch_ids, layout.seen, prefix_segments(0, prefix, 1))
    length = layout.input_ids.shape[1]
    assert allowed.shape == (images, length, prefix + length)
    for b in range(images):
        for t in range(length):
            own = [s for s in range(t + 1) if layout.branch_ids[b, s] == layout.branch_ids[b, t]]
            expected = (list(range(prefix)) if valid[b] else []) + [prefix + s for s in own]
            assert torch.nonzero(allowed[b, t]).flatten().tolist() == expected
            assert expected  # no empty row: softmax over nothing is not a number


def test_a_routed_branch_is_user_instruction_assistant_token_queries():
    ids = TOKENIZER.ids
    tokens, labels, queries = branch_tokens(Branch(0, "detect red circle", route="[DET]"), TOKENIZER)
    instruction = list(TOKENIZER.encode("detect red circle"))
    assert tokens == [ids[USER], *instruction, ids[ASSISTANT], ids["[DET]"], *[ids[PAD]] * NUM_QUERIES]
    assert labels == [IGNORE] * (len(instruction) + 2) + [ids["[DET]"]] + [IGNORE] * NUM_QUERIES
    assert queries == NUM_QUERIES


def test_a_text_branch_ends_with_its_response_and_an_open_one_with_the_assistant():
    ids = TOKENIZER.ids
    tokens, labels, queries = branch_tokens(Branch(0, "what ?", response="a circle"), TOKENIZER)
    response = [*TOKENIZER.encode("a circle"), ids[EOS]]
    assert tokens[-len(response) :] == response == labels[-len(response) :]
    assert set(labels[: -len(response)]) == {IGNORE} and queries == 0
    tokens, labels, _ = branch_tokens(Branch(0, "what ?"), TOKENIZER)
    assert tokens[-1] == ids[ASSISTANT] and set(labels) == {IGNORE}


def test_regions_must_match_the_prompt():
    with pytest.raises(ValueError, match="1 <region> but 0 regions"):
        build_layout([Branch(0, "describe <region> .")], 1, TOKENIZER)


def test_prefix_attention_is_causal_or_full():
    segments = prefix_segments(0, 3, 1)
    assert prefix_allowed(segments, "full").all()
    assert (prefix_allowed(segments, "causal") == torch.ones(3, 3).tril().bool()).all()


def test_an_image_of_several_attends_to_the_lead_and_itself():
    segments = prefix_segments(1, 2, 2)
    assert segments.tolist() == [-1, 0, 0, 1, 1]
    first, second = [[1, 1, 1, 0, 0]] * 2, [[1, 0, 0, 1, 1]] * 2
    assert prefix_allowed(segments, "full").tolist() == [[1, 0, 0, 0, 0], *first, *second]
    causal = [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0], [1, 0, 0, 1, 0], [1, 0, 0, 1, 1]]
    assert prefix_allowed(segments, "causal").tolist() == causal


@pytest.mark.parametrize("turns", [(0,), (1,), (0, 1), (1, 1), (0, 2, 2)])
def test_a_later_image_is_seen_from_its_question_on(turns):
    history = (("a b", "c"), ("d", "a"))
    branch = Branch(0, "e ?", response="b", history=history, image_turns=turns)
    other = Branch(1, "e ?", response="b", history=history)
    layout = build_layout([branch, other], 2, TOKENIZER)
    starts = [int(c) for c in torch.nonzero(layout.input_ids[0] == TOKENIZER.ids[USER]).flatten()]
    assert len(starts) == 3
    for column in range(layout.input_ids.shape[1]):
        question = sum(start <= column for start in starts) - 1
        assert layout.seen[0, column] == 1 + sum(turn <= question for turn in turns)
    assert (layout.images[0] == 1 + len(turns)).all()
    assert (layout.seen[1] == 1).all() and (layout.images[1] == 1).all()
    allowed = branch_allowed(layout.branch_ids, layout.seen, prefix_segments(1, 2, 1 + len(turns)))
    for column in range(layout.input_ids.shape[1]):
        assert allowed[0, column, : 3 + 2 * len(turns)].sum() == 1 + 2 * layout.seen[0, column]


def test_the_sequential_layout_takes_one_image_per_conversation():
    with pytest.raises(UserError, match="one image per conversation"):
        build_layout([Branch(0, "e ?", image_turns=(0,))], 1, TOKENIZER, "sequential")
