"""The caption tokenizer of the diffusion decoders: saved beside the model's tokenizer, and used to align links."""

import pickle

import numpy as np
import pytest
import torch
from support.tiny_models import (
    EXPERTS,
    SIDE,
    captioning_tokenizer,
    clip_tokenizer,
    tiny_model,
    tiny_settings,
    tiny_tokenizer,
)

from lumen_ray.data.batches.collate import Collator
from lumen_ray.data.images import decode
from lumen_ray.data.scenes import render as scenes
from lumen_ray.data.shards.schema import make_message
from lumen_ray.errors import UserError
from lumen_ray.model.build import ModelMeta, load_model, save_model
from lumen_ray.model.warm_start import start_settings, start_tokenizer
from lumen_ray.trunk.tokenizer import CAPTIONS_FILE, LumenTokenizer

LENGTH = EXPERTS["stable_diffusion"]["num_tokens"]
TEXT = {
    "vocab_size": 56, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
    "max_position_embeddings": LENGTH, "bos_token_id": 54, "eos_token_id": 55,
}  # fmt: skip
DIFFUSION = {name: EXPERTS[name] | {"text_encoder": TEXT} for name in ("stable_diffusion", "instruct_pix2pix")}


def ids(*texts):
    return clip_tokenizer()(list(texts), padding="max_length", truncation=True, max_length=LENGTH).input_ids


def test_it_is_kept_with_the_tokenizer(tmp_path):
    ours, file = captioning_tokenizer(LENGTH), tmp_path / "tokenizer.json"
    ours.save(file)
    extended, _ = LumenTokenizer.extend(ours.backend, ours.names, captions=ours.captions)
    for again in (LumenTokenizer.load(file), pickle.loads(pickle.dumps(ours)), extended):
        assert again.to_json() == ours.to_json()
        assert again.caption_ids(["a red b", "longer than that"]).tolist() == ids("a red b", "longer than that")
    tiny_tokenizer().save(file)  # one without leaves nothing behind
    for without in (LumenTokenizer.load(file), pickle.loads(pickle.dumps(tiny_tokenizer()))):
        assert without.captions is None and without.caption_ids(["red"]) is None


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    model = tiny_model(**DIFFUSION)
    path = tmp_path_factory.mktemp("captions") / "model"
    return save_model(path, model.state_dict(), model.settings, captioning_tokenizer(LENGTH), ModelMeta("tiny"))


def test_a_model_that_starts_from_another_reads_captions_as_that_does(folder):
    for sections in (DIFFUSION, {}):  # text encoder or none
        settings = start_settings(tiny_settings(name="more", **sections), folder)
        assert start_tokenizer(settings, folder).caption_ids(["red b"]).tolist() == ids("red b")
    for keys, told in (({"vocab_size": 50}, "6 below 50"), ({"max_position_embeddings": 8}, "8 below 56")):
        section = EXPERTS["stable_diffusion"] | {"text_encoder": TEXT | keys}
        with pytest.raises(UserError, match=f"6 ids below 56, but stable_diffusion.text_encoder takes {told}") as error:
            start_tokenizer(tiny_settings(stable_diffusion=section), folder)
        assert error.value.reason == "wrong_tokenizer" and CAPTIONS_FILE in str(error.value)


def test_a_damaged_tokenizer_raises_a_user_error(folder, tmp_path):
    model = load_model(folder)
    broken = save_model(tmp_path / "x", model.model.state_dict(), model.settings, model.tokenizer, model.meta)
    (broken / CAPTIONS_FILE).write_text("nothing")
    with pytest.raises(UserError, match="or a file of the tokenizer beside it is damaged") as error:
        load_model(broken)
    assert error.value.reason == "damaged_model"


@pytest.mark.parametrize(
    ("task", "decoder", "loss"),
    [("generate", "stable_diffusion", "generate_align"), ("edit", "instruct_pix2pix", "edit_align")],
)
def test_a_step_aligns_links_with_captions(folder, task, decoder, loss):
    """The gradient of that loss alone reaches the head which makes the links, and the LLM, but no text encoder."""
    loaded = load_model(folder)
    model, rows = loaded.model.train(), [scenes.scene_row(5, n, SIDE) for n in range(2)]
    for row in rows:
        row["messages"] = [make_message("caption", "red b", "red b"), make_message("edit", "red b", None)]
    images = [decode(row["image"]) for row in rows]
    generators = [np.random.default_rng(n) for n in range(2)]
    collator = Collator(loaded.tokenizer, SIDE, (task,), {}, input_rules=loaded.settings.input_rules)
    batch = collator(rows, images, generators, images)
    torch.manual_seed(0)
    term = model(batch)[loss]
    assert term.count == 2 and term.total > 0
    term.total.backward()
    head = model.trunk.link_heads[decoder]
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in head.proj.parameters())
    assert model.trunk.llm.get_input_embeddings().weight.grad.abs().sum() > 0
    assert all(p.grad is None for p in model.decoders[decoder].text_encoder.parameters())
    batch.targets[family_of(batch)].caption_ids = None
    assert model(batch)[loss].total == 0


def family_of(batch):
    (family,) = batch.targets
    return family
