"""The sequential layout is the reference's string, token by token; queries stand behind each routing token."""

import copy
import pickle

import numpy as np
import pytest
import torch
from support.forced_answers import force_answers
from support.released_fakes import NEW_TOKENS, gpt_tokenizer, llama_tokenizer, released_settings
from support.tiny_models import plain_batch, random_images, scrambled, tiny_tokenizer
from tokenizers import AddedToken

from lumen_ray.errors import UserError
from lumen_ray.inference.decode_loop import DecodeLoop
from lumen_ray.inference.request import make_request
from lumen_ray.inference.sampling import GREEDY, Sampler
from lumen_ray.inference.trunk_stage import TrunkStage
from lumen_ray.inference.writing import TextPrompt
from lumen_ray.model.build import LoadedModel, ModelMeta, build_model
from lumen_ray.structures import Region
from lumen_ray.trunk.branch import Branch
from lumen_ray.trunk.layout import IGNORE, build_layout
from lumen_ray.trunk.sequential import SYSTEM, lead_tokens
from lumen_ray.trunk.tokenizer import ASSISTANT, EOS, PAD, USER, LumenTokenizer
from lumen_ray.trunk.trunk import Trunk

WORDS = (
    f"{SYSTEM} USER: ASSISTANT: Can you analyze the image and identify the red cat dog present? Yes, here are results"
)
EMBS = "[EMB][EMB2][EMB3][EMB4]"


def released_tokenizer() -> LumenTokenizer:
    backend = llama_tokenizer(WORDS)
    backend.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in NEW_TOKENS])
    return LumenTokenizer(backend, {PAD: "[PAD]", EOS: "</s>"})


TOKENIZER = released_tokenizer()


def joint(text: str) -> list[int]:
    """The reference tokenises a whole string at once, [EMB] tokens included."""
    return TOKENIZER.backend.encode(text, add_special_tokens=False).ids


def layout_ids(layout, image=0) -> list[int]:
    """A row's ids with the [EMB] tokens where the queries stand."""
    ids, n = layout.input_ids.clone(), 4
    first = TOKENIZER.backend.token_to_id("[EMB]")
    for slots in layout.query_slots.values():
        for link in slots.tolist():
            for i, (row, place) in enumerate(link):
                assert ids[row, place] == TOKENIZER.ids[PAD] and i < n
                ids[row, place] = first + i
    return ids[image][layout.branch_ids[image] >= 0].tolist()


def test_classes_of_an_image_are_one_string_of_the_reference():
    branches = [Branch(0, "detect red cat", route="[DET]"), Branch(0, "find every dog", route="[DET]")]
    layout = build_layout(branches, 1, TOKENIZER, "sequential")
    answer = f"Yes, here are the results for red cat[DET]{EMBS}, dog[DET]{EMBS} in the image."
    question = "\nCan you analyze the image and identify the red cat, dog present? ASSISTANT:"
    expected = joint(f"{question} {answer}</s>")
    assert layout_ids(layout) == expected
    assert layout.link_branches["perception"].tolist() == [0, 1]
    assert set(layout.branch_ids.unique().tolist()) == {0}  # one string: they see each other causally
    assert layout.offsets[0].tolist() == list(range(len(expected)))
    # learned: the answer with its routing tokens and the end; not the question, not the queries
    learned = layout.labels[0] != IGNORE
    asked = len(joint(question))
    assert not learned[:asked].any()
    queries = torch.zeros_like(learned)
    for slots in layout.query_slots.values():
        queries[slots[..., 1].flatten()] = True
    assert torch.equal(learned[asked:], ~queries[asked:])


def test_lead_image_and_string_are_the_reference_prompt():
    lead = lead_tokens(TOKENIZER, "<s>")
    assert list(lead) == [1, *joint(f"{SYSTEM} USER: ")]


def test_kinds_of_prompts_are_worded_apart():
    branches = [
        Branch(0, "ground red cat", route="[GRD]"),
        Branch(0, "pose of dog", route="[DET]", phrase="dog"),
        Branch(0, "tail of dog", route="[POSE]", parent=1, phrase="tail"),
        Branch(0, "ears of dog", route="[POSE]", parent=1, phrase="ears"),
        Branch(0, "segment <region>", route="[SEG]", regions=(1,), group=1),
        Branch(0, "what is red ?", response="the cat", history=(("hello", "yes"),)),
        Branch(0, "say [DET] twice", route="[DET]", phrase="say [DET] twice", group=2),
    ]
    layout = build_layout(branches, 1, TOKENIZER, "sequential")
    texts = {}
    for owner in layout.branch_ids.unique().tolist():
        ids = layout.input_ids[0][layout.branch_ids[0] == owner]
        texts[owner] = TOKENIZER.backend.decode(ids.tolist(), skip_special_tokens=False)
    assert set(texts) == {0, 1, 4, 5, 6}
    assert "Where can we locate the red cat in the image?" in texts[0] and "it is [GRD]" in texts[0].replace("  ", " ")
    assert (
        "identify the dog present? Can you examine" in texts[1] and "keypoint locations of the tail, ears?" in texts[1]
    )
    assert texts[4].count("<region>") == 1 and "region1" in texts[4] and "[SEG]" in texts[4]
    assert "hello ASSISTANT:" in texts[5] and "USER: what is red ? ASSISTANT: the cat" in texts[5].replace("  ", " ")
    assert texts[6].count("[DET]") == 1  # a user's words do not route
    parents = layout.link_parents["perception"].tolist()
    order = layout.link_branches["perception"].tolist()
    assert [order[parents[order.index(b)]] for b in (2, 3)] == [1, 1]
    assert (
        layout.region_index.tolist() == [1]
        and int(layout.input_ids[0, layout.region_slots[0, 1]]) == TOKENIZER.ids["<region>"]
    )


def small_trunk(**changes):
    lead = lead_tokens(TOKENIZER, "<s>")
    settings = released_settings(lead_tokens=lead, **changes)
    return scrambled(Trunk(settings, len(TOKENIZER), settings.sections))


def test_training_and_inference_agree_behind_a_lead():
    trunk, images = small_trunk(), random_images(2, 56)
    branches = [
        Branch(0, "detect red cat", route="[DET]"), Branch(0, "detect dog", route="[DET]"),
        Branch(1, "what is red ?", response="the cat"), Branch(1, "ground dog", route="[GRD]"),
    ]  # fmt: skip
    layout = build_layout(branches, 2, TOKENIZER, "sequential")
    batch = plain_batch(images, layout)
    with torch.no_grad():
        whole = trunk(batch)
    prefix = trunk.encode(images)
    assert prefix.length == 16 + len(trunk.lead)
    torch.testing.assert_close(prefix.dense, whole.dense, atol=1e-4, rtol=1e-4)
    found, expected = trunk.branch_links(prefix, layout), whole.links
    torch.testing.assert_close(found["lumen"].embeddings, expected["lumen"].embeddings, atol=1e-4, rtol=1e-4)


def test_in_one_string_a_prompt_changes_those_after_it_and_none_before():
    trunk, images = small_trunk(), random_images(1, 56)
    prefix = trunk.encode(images)

    def links(*names):
        branches = [Branch(0, f"detect {name}", route="[DET]") for name in names]
        layout = build_layout(branches, 1, TOKENIZER, "sequential")
        return trunk.branch_links(prefix, layout)["lumen"].embeddings

    assert (links("cat", "dog")[1] - links("red", "dog")[1]).abs().max() > 1e-4


@pytest.fixture(scope="module")
def stage():
    settings = released_settings(lead_tokens=lead_tokens(TOKENIZER, "<s>"))
    model = scrambled(build_model(settings, len(TOKENIZER)))
    return TrunkStage(LoadedModel(model, settings, TOKENIZER, ModelMeta("tiny-released"), ""))


PICTURE = np.random.default_rng(0).integers(0, 256, (56, 56, 3), np.uint8)


def links_of(stage, requests, **options):
    """Request -> its links."""
    out = stage.links([PICTURE], [requests], **options)
    return [out.decoder_inputs["lumen"].link.embeddings[plan.links] for plan in out.plans[0]]


def test_requests_do_not_share_a_string(stage):
    boxes = ([[2, 3], [20, 20]], [[30, 30], [50, 50]])
    regions = [make_request("region_segment", region=Region("box", (56, 56), np.array(box))) for box in boxes]
    asked = [make_request("segment", classes=["cat", "dog"]), *regions, make_request("detect", classes=["red"])]
    together = links_of(stage, asked)
    for request, links in zip(asked, together, strict=True):
        torch.testing.assert_close(links, links_of(stage, [request])[0], atol=1e-4, rtol=1e-4)
    assert (together[1] - together[2]).abs().max() > 1e-3


def test_free_chat_routes_are_not_part_of_another_request(stage, monkeypatch):
    force_answers(monkeypatch, stage.loop, [TOKENIZER.ids["[DET]"]])
    chat, other = make_request("chat", text="detect cat"), make_request("detect", classes=["dog"])
    found = links_of(stage, [other, chat])
    torch.testing.assert_close(found[0], links_of(stage, [other])[0], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(found[1], links_of(stage, [chat])[0], atol=1e-4, rtol=1e-4)


def test_chunks_do_not_cut_a_string(stage):
    asked = [make_request("detect", classes=["red", "cat", "dog"]), make_request("segment", classes=["cat", "dog"])]
    whole = links_of(stage, asked)
    for chunk in (1, 2, 4):
        for links, wanted in zip(links_of(stage, asked, class_chunk=chunk), whole, strict=True):
            torch.testing.assert_close(links, wanted, atol=1e-4, rtol=1e-4)


def test_without_an_image_the_lead_is_still_attended_to():
    trunk = small_trunk()
    layout = build_layout([Branch(0, "detect dog", route="[DET]")], 1, TOKENIZER, "sequential")
    blind = torch.tensor([False])

    def link(trunk, images):
        return trunk.branch_links(trunk.encode(images, blind), layout)["lumen"].embeddings

    before = link(trunk, random_images(1, 56))
    torch.testing.assert_close(before, link(trunk, random_images(1, 56, seed=5)))
    other = copy.deepcopy(trunk)
    other.lead = other.lead.flip(0)
    assert (before - link(other, random_images(1, 56))).abs().max() > 1e-4


def test_answers_are_those_of_a_plain_causal_pass():
    trunk, images = small_trunk(), random_images(1, 56)
    branch, limit = Branch(0, "what is red ?"), 5
    layout = build_layout([branch], 1, TOKENIZER, "sequential")
    loop = DecodeLoop(trunk, TOKENIZER, "sequential")
    prompts = [TextPrompt(b, Sampler(GREEDY, layout.input_ids[0].tolist()), limit) for b in (branch, branch)]
    writings = loop.submit(trunk.encode(images), prompts)
    loop.wait(writings)
    assert writings[0].tokens == writings[1].tokens  # prompts about one image are strings of their own
    written = writings[0].tokens
    with torch.no_grad():
        tokens, _, _ = trunk.extract_features(images.float() / 255)
        embed = trunk.llm.get_input_embeddings()
        ids = layout.input_ids[0].tolist()
        for _ in range(limit):
            embeds = torch.cat([tokens, embed(torch.tensor([ids]))], dim=1)
            ids.append(int(trunk.llm(inputs_embeds=embeds).logits[0, -1].argmax()))
    assert written == ids[-limit:]


def test_packing_and_the_other_layout_are_refused():
    trunk = small_trunk()
    layout = build_layout([Branch(0, "detect dog", route="[DET]")], 1, TOKENIZER, "sequential")
    layout.pack = torch.zeros(1, 4, dtype=torch.int64)
    batch = plain_batch(random_images(1, 56), layout)
    with pytest.raises(UserError, match="pack_tokens"):
        trunk(batch)
    with pytest.raises(UserError, match="prompt_layout to 'sequential'"):
        build_layout([Branch(0, "detect dog", route="[DET]")], 1, TOKENIZER, "branches")


def test_a_published_tokenizer_keeps_its_end_tokens_and_gains_ours(tmp_path):
    ours, first = LumenTokenizer.extend(gpt_tokenizer(), {EOS: "<|endoftext|>"})
    assert ours.ids[EOS] == 256 and first == 257 and EOS not in ours.backend.get_vocab()
    assert len(ours) == max(ours.ids.values()) + 1 and min(ours.ids[t] for t in (PAD, USER, ASSISTANT)) >= first
    text = "where is the Café ?"
    assert ours.decode(ours.encode(text)) == text
    assert ours.encode("find <region>")[-1] == ours.ids["<region>"]
    ours.save(tmp_path / "tokenizer.json")
    for again in (LumenTokenizer.load(tmp_path / "tokenizer.json"), pickle.loads(pickle.dumps(ours))):
        assert again.ids == ours.ids and again.encode(text) == ours.encode(text)
    tiny_tokenizer().save(tmp_path / "tokenizer.json")  # other names leave nothing behind
    assert LumenTokenizer.load(tmp_path / "tokenizer.json").ids == tiny_tokenizer().ids
