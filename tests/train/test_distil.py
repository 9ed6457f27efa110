"""Text alone is learned from the probabilities that the LLM gives without adapters."""

from dataclasses import replace

import pytest
import torch
import yaml
from support.tiny_models import llm, scene_batch, tiny_folder, tiny_model, tiny_settings
from support.train_fakes import job_of, log_of, on_two_ranks, weights_of

from lumen_ray import config
from lumen_ray.data.shards.schema import make_message, make_row
from lumen_ray.data.shards.shards import ShardWriter, build_manifest, write_manifest
from lumen_ray.errors import UserError
from lumen_ray.recipe import LoraSettings, TaskGroup
from lumen_ray.train.launch import train_local
from lumen_ray.train.lora import inject
from lumen_ray.trunk.batch import TrainingBatch

PUBLISHED = 90
TEXT = {"tasks": ["chat"], "text_only": True, "distil": True}
LORA = {"rank": 2, "alpha": 4}

pytest.importorskip("peft")


def text_rows(count):
    messages = [[make_message("chat", f"what is {i} ?", "a red circle " * (1 + i % 3))] for i in range(count)]
    return [make_row(f"t{i}", None, (0, 0), "test", tasks=["chat"], messages=m) for i, m in enumerate(messages)]


def text_batch() -> TrainingBatch:
    return replace(scene_batch(text_rows(3), ("chat",)), distil=True)


def adapted(noise=0.0):
    """A model with adapters, which differ from fresh ones by `noise`."""
    model = tiny_model(published_tokens=PUBLISHED)
    inject(model, LoraSettings(**LORA), 0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if ".lora_B." in name:
                p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(1)) * noise)
    return model


def log_probs(model, batch):
    """Of all tokens at the supervised positions, the LLM's own."""
    states = {}
    handle = model.trunk.llm.model.register_forward_hook(lambda _m, _a, out: states.update(last=out.last_hidden_state))
    with torch.no_grad():
        model.trunk(replace(batch, distil=False))
        handle.remove()
        labels = batch.layout.labels
        hidden = states["last"][:, -labels.shape[1] :][:, :-1][labels[:, 1:] >= 0]
        return model.trunk.llm.lm_head(hidden)


def test_the_loss_is_the_divergence_from_the_llm_without_adapters_and_new_tokens():
    batch, model = text_batch(), adapted(noise=0.3)
    own = log_probs(tiny_model(published_tokens=PUBLISHED), batch)[:, :PUBLISHED].log_softmax(-1)
    ours = log_probs(model, batch).log_softmax(-1)
    expected = (own.exp() * (own - ours[:, :PUBLISHED])).sum(-1)
    out = model.trunk(batch)
    torch.testing.assert_close(out.lm_losses[batch.layout.labels[:, 1:] >= 0], expected)
    assert expected.min() > 0 and out.lm_tokens == len(expected)
    torch.testing.assert_close(log_probs(model, batch).log_softmax(-1), ours)  # adapters are on again


def test_adapters_that_change_nothing_have_nothing_to_learn():
    batch, model = text_batch(), tiny_model()
    inject(model, LoraSettings(**LORA), 0)
    model.trunk(batch).lm_losses.sum().backward()
    grads = {name: p.grad for name, p in model.named_parameters() if ".lora_B." in name}
    assert grads and all(grad.abs().max() < 1e-5 for grad in grads.values())
    model.trunk(replace(batch, distil=False)).lm_losses.sum().backward()
    assert all(grad.abs().max() > 1e-4 for name, grad in grads.items() if "v_proj" in name)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("text")
    with ShardWriter(root / "shards", "part.parquet", rows_per_group=4) as writer:
        for row in text_rows(16):
            writer.write(row)
    write_manifest(root / "shards", build_manifest([writer.entry]))
    settings = tiny_settings(llm=llm(), vocab_size=330)
    (root / "tiny.yaml").write_text(yaml.safe_dump(settings.model_dump(mode="json")))
    tiny_folder(root / "start", published_tokens=PUBLISHED)
    return root


def test_two_ranks_learn_the_same_as_one(data, tmp_path):
    common = {"lora": LORA, "init_from": str(data / "start")}
    train_local(job_of(data, tmp_path / "one", {"steps": 3, "lr": 0.01, "groups": [TEXT]}, **common))
    on_two_ranks(
        train_local, job_of(data, tmp_path / "two", {"steps": 3, "lr": 0.01, "groups": [TEXT]}, **common, workers=2)
    )
    one, two = (log_of(tmp_path / run) for run in ("one", "two"))
    assert [line["loss/lm"] for line in two] == pytest.approx([line["loss/lm"] for line in one], rel=1e-3)
    assert one[-1]["loss/lm"] < one[0]["loss/lm"]  # new tokens get less
    for name, weight in weights_of(tmp_path / "one").items():
        torch.testing.assert_close(weights_of(tmp_path / "two")[name], weight, atol=2e-3, rtol=0)


def test_it_needs_text_alone_and_an_llm_that_stays(data, tmp_path):
    with pytest.raises(UserError, match="distil is for groups with text_only"):
        config.validate(TaskGroup, {"tasks": ["chat"], "distil": True}, "group")
    with pytest.raises(UserError, match="frozen or trained by adapters"):
        job_of(data, tmp_path / "run", {"steps": 1, "groups": [TEXT]}, init_from=str(data / "start"))
    job_of(
        data, tmp_path / "run", {"steps": 1, "groups": [TEXT], "trainable": ["queries"]}, init_from=str(data / "start")
    )
