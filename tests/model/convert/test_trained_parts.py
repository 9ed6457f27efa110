"""A model with another LLM takes over the encoders and decoders of a trained one."""

import pytest
import torch
from support.released_fakes import llama_tokenizer
from support.tiny_models import DINOV2, EXPERTS, scrambled, tiny_folder, tiny_model, tiny_settings, tiny_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

from lumen_ray import cli
from lumen_ray.errors import UserError
from lumen_ray.model.build import ModelMeta, load_model, save_model
from lumen_ray.model.convert.pretrained import Sources, assemble
from lumen_ray.model.convert.trained import PARTS

SIZES = {"hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
         "num_key_value_heads": 1, "max_position_embeddings": 512}  # fmt: skip


@pytest.fixture
def trained(tmp_path):
    model = scrambled(tiny_model())
    settings, tokenizer = tiny_settings(), tiny_tokenizer()
    return save_model(tmp_path / "trained", model.state_dict(), settings, tokenizer, ModelMeta("tiny"))


@pytest.fixture
def llm(tmp_path):
    torch.manual_seed(0)
    tokenizer = llama_tokenizer("red cat dog")
    LlamaForCausalLM(LlamaConfig(**SIZES, vocab_size=tokenizer.get_vocab_size())).save_pretrained(tmp_path / "llm")
    tokenizer.save(str(tmp_path / "llm" / "tokenizer.json"))
    return tmp_path / "llm"


def test_what_does_not_depend_on_the_llm_is_taken_over_bit_for_bit(trained, llm, tmp_path):
    preset = tiny_settings(name="new", vision=tiny_settings().vision.model_copy(update={"token_merge": 4}).model_dump())
    made = assemble(preset, Sources(llm, vision=trained), tmp_path / "new")
    before, after = (load_model(folder).model.state_dict() for folder in (trained, tmp_path / "new"))
    taken = {name for name in before if name.startswith(PARTS) and ".from_llm." not in name}
    assert taken and taken < made.loaded
    assert all(torch.equal(before[name], after[name]) for name in taken)
    assert {name for name in made.loaded if not name.startswith("trunk.llm.")} == taken
    assert made.settings.llm["hidden_size"] == 24 and made.settings.vision.clip == tiny_settings().vision.clip


def test_decoders_that_one_of_the_models_lacks_are_left_out(llm, tmp_path):
    expert = {"unipose": EXPERTS["unipose"]}
    trained = tiny_folder(tmp_path / "trained", **expert)
    made = assemble(tiny_settings(name="new"), Sources(llm, vision=trained), tmp_path / "new")
    assert not any("unipose" in name for name in made.state)
    made = assemble(
        tiny_settings(name="new", **expert), Sources(llm, vision=tiny_folder(tmp_path / "plain")), tmp_path / "more"
    )
    assert not any("unipose" in name for name in made.loaded) and any("unipose" in name for name in made.state)


def test_other_settings_of_those_parts_are_refused(trained, llm, tmp_path):
    for changes, name in (
        ({"stem_channels": 16}, "stem_channels"),
        ({"vision": tiny_settings().vision.model_dump() | {"dinov2": DINOV2 | {"num_hidden_layers": 1}}}, "vision"),
        ({"lumen": {"hidden_size": 32, "num_layers": 1, "num_heads": 2}}, "lumen"),
    ):
        with pytest.raises(UserError, match=f"another '{name}'"):
            assemble(tiny_settings(**changes), Sources(llm, vision=trained), tmp_path / "new")


def test_encoders_have_one_source(llm, tmp_path, capsys):
    common = ["convert", "pretrained", "--preset", "nano", "--llm", str(llm), str(tmp_path / "new")]
    assert cli.main([*common, "--vision", "nano", "--clip", "x"]) == 2
    assert "leave out --clip and --dinov2" in capsys.readouterr().err
    assert cli.main(common) == 2
    assert "a trained model that has it with --vision" in capsys.readouterr().err
    assert cli.main([*common, "--vision", "nano"]) == 0
    assert "decoders.lumen" in capsys.readouterr().out
