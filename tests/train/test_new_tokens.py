"""Where a published LLM is frozen or trained by adapters, only the rows of new tokens learn."""

import pytest
import torch
import yaml
from support.tiny_models import llm, tiny_folder, tiny_model, tiny_settings
from support.train_fakes import job_of, on_two_ranks, weights_of

from lumen_ray.model.build import VOCABULARY, load_model
from lumen_ray.recipe import LoraSettings, Stage
from lumen_ray.train.launch import train_local
from lumen_ray.train.lora import inject
from lumen_ray.train.new_tokens import RowMask, only_new_rows, vocabulary
from lumen_ray.train.optimizer import build_optimizer, lr_factors, set_trainable

PUBLISHED = 90
ALIGN = {"steps": 3, "lr": 0.01, "weight_decay": 0.1, "trainable": ["vision", "queries"]}
EVERYTHING = {"steps": 3, "lr": 0.01, "weight_decay": 0.1}
LORA = {"rank": 2, "alpha": 4}


def published(tied=True):
    return {"published_tokens": PUBLISHED, "llm": llm() | {"tie_word_embeddings": tied}}


def stage(**changes):
    return Stage.model_validate({"name": "s", "steps": 1} | changes)


@pytest.mark.parametrize("tied", [True, False])
def test_which_stages_train_the_new_rows_only(tied):
    model = tiny_model(**published(tied))
    of_llm = {id(p) for p in model.trunk.llm.parameters()}
    for trainable, only, learns in (
        (["vision", "queries"], True, True),
        (["lumen", "link_heads"], False, False),
        (["llm", "queries"], False, True),
        (["llm"], False, True),
        (None, False, True),
    ):
        s = stage(trainable=trainable)
        set_trainable(model, s)
        rows = vocabulary(model)
        assert len(rows) == (1 if tied else 2)
        assert all(p.requires_grad == learns for p in rows)
        assert only_new_rows(model) == (rows if only else [])
        trained = {id(p) for group in build_optimizer(model, s).param_groups for p in group["params"]} & of_llm
        assert trained == ({id(p) for p in rows} if only else of_llm if learns else set())


def test_the_new_rows_have_the_rate_of_the_queries_where_the_llm_is_frozen():
    model = tiny_model(**published())
    for scale, wanted in (({}, 1.0), ({"queries": 0.5, "llm": 0}, 0.5)):
        s = stage(trainable=["vision", "queries"] if "llm" not in scale else None, lr_scale=scale)
        set_trainable(model, s)
        [rows] = only_new_rows(model)
        assert lr_factors(model, s)[rows] == wanted
    frozen = stage(lr_scale={"llm": 0, VOCABULARY[0]: 0})
    set_trainable(model, frozen)
    assert only_new_rows(model) == []


def test_adapters_train_the_new_rows_only():
    pytest.importorskip("peft")
    model = tiny_model(**published())
    inject(model, LoraSettings(rank=2), 0)
    set_trainable(model, stage())
    assert only_new_rows(model) == vocabulary(model) != []
    model = tiny_model(**published())
    inject(model, LoraSettings(rank=2, also_train=()), 0)
    set_trainable(model, stage(trainable=["queries"]))
    assert only_new_rows(model) == []  # a checkpoint has none of them


def test_a_preset_with_an_llm_of_its_own_has_no_published_rows():
    model = tiny_model()
    set_trainable(model, stage(trainable=["vision", "queries"]))
    assert vocabulary(model) == only_new_rows(model) == []
    assert not any(p.requires_grad for p in model.trunk.llm.parameters())


def test_the_mask_is_of_the_gradients_of_published_rows():
    model = tiny_model(**published())
    set_trainable(model, stage(trainable=["queries"]))
    [rows] = vocabulary(model)
    mask = RowMask(model)
    mask.apply()  # no gradient yet
    rows.grad = torch.ones_like(rows)
    mask.apply()
    assert not rows.grad[:PUBLISHED].any() and rows.grad[PUBLISHED:].all()


def job(data, folder, run, tied, **changes):
    file = folder / "tiny.yaml"
    file.write_text(yaml.safe_dump(tiny_settings(llm=llm() | {"tie_word_embeddings": tied}).model_dump(mode="json")))
    stages = [EVERYTHING] if changes.get("lora") else [ALIGN]
    start = {"model": str(file), "init_from": str(folder / "start")}
    return job_of(data, run, *stages, ema={"decay": 0.5}, **start, **changes)


@pytest.mark.parametrize("lora", [None, LORA], ids=["frozen", "lora"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "apart"])
def test_published_rows_keep_their_bits(data, tmp_path, tied, lora):
    if lora:
        pytest.importorskip("peft")
    tiny_folder(tmp_path / "start", **published(tied))
    before = load_model(tmp_path / "start").model.state_dict()
    train_local(job(data, tmp_path, tmp_path / "one", tied, lora=lora))
    on_two_ranks(train_local, job(data, tmp_path, tmp_path / "two", tied, lora=lora, workers=2))
    for run in ("one", "two"):
        loaded = load_model(tmp_path / run / "model")
        assert loaded.settings.published_tokens == PUBLISHED
        after = loaded.model.state_dict()
        for name in VOCABULARY:
            assert torch.equal(after[name][:PUBLISHED].view(torch.int32), before[name][:PUBLISHED].view(torch.int32))
            assert not torch.equal(after[name][PUBLISHED:], before[name][PUBLISHED:])
        assert torch.equal(*(after[name] for name in VOCABULARY)) == tied
        kept = "trunk.llm.model.layers.0.self_attn.o_proj.weight"
        assert torch.equal(after[kept], before[kept]) == (lora is None)
    one, two = (weights_of(tmp_path / run)[VOCABULARY[0]] for run in ("one", "two"))
    moved = float((one - before[VOCABULARY[0]]).norm())
    assert float((one - two).norm()) < 0.05 * moved
