"""The same numbers as `transformers`, and as the published VisionLLM v2 code."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.gdino_tiny import SWIN, TINY, features_of_padded_input, tiny_decoder
from support.tiny_models import scrambled
from transformers import BertConfig, GroundingDinoConfig, GroundingDinoForObjectDetection, SwinConfig

from lumen_ray.checkpoints.rules import apply
from lumen_ray.decoders.dino.transformer import STRIDES, class_logits, gather_rows
from lumen_ray.decoders.grounding_dino.decoder import GroundingDinoDecoder
from lumen_ray.decoders.grounding_dino.released import published_parts, released_parts
from lumen_ray.decoders.grounding_dino.settings import GroundingDinoSettings
from lumen_ray.targets import MASK_STRIDE
from lumen_ray.trunk.queries import LinkHead

CLOSE = {"atol": 1e-4, "rtol": 1e-5}


def run(decoder, levels, links, link_valid, **text):
    """Memory, encoder output and decoder layer outputs of groups that are one per image.

    Query positions are relative to the padded input, as in the references."""
    memory = decoder.trunk.encode(levels, torch.arange(len(links)), links, link_valid, **text)
    ratio = memory.valid_ratios[:, :1].repeat(1, 1, 2)
    query_position = type(decoder.trunk).query_position
    decoder.trunk.query_position = lambda reference: query_position(decoder.trunk, reference * ratio)
    encoder, layers, query_valid = decoder.decode(memory)
    assert query_valid.all()
    return memory, encoder, layers


# transformers


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A model of `transformers` with scrambled weights, the folder it was saved in, and ours with those weights."""
    config = GroundingDinoConfig(
        backbone_config=SwinConfig(**SWIN, out_features=["stage2", "stage3", "stage4"]),
        text_config=BertConfig(
            vocab_size=1100, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
        ),
        d_model=TINY["hidden_size"], encoder_layers=1, decoder_layers=2, encoder_ffn_dim=64, decoder_ffn_dim=64,
        encoder_attention_heads=4, decoder_attention_heads=4, num_queries=20, max_text_len=16,
    )  # fmt: skip
    torch.manual_seed(0)
    theirs = scrambled(GroundingDinoForObjectDetection(config))
    # padding scores 0 for every phrase, so that they, which may select it, do not
    for bias in (theirs.model.enc_output.bias, theirs.model.enc_output_norm.bias):
        torch.nn.init.zeros_(bias)
    folder = tmp_path_factory.mktemp("published")
    theirs.save_pretrained(folder)
    ours = tiny_decoder()
    state, report = apply(load_file(folder / "model.safetensors"), published_parts())
    assert not report.of("unknown")
    missing, unexpected = ours.load_state_dict(state, strict=False)
    assert not unexpected
    assert {name.split(".")[0] for name in missing} == {"link_proj", "mask_head", "mask_embed", "trunk"}
    norm = "trunk.backbone.hidden_states_norms.stage1."
    assert all(name.startswith(norm) for name in missing if name.startswith("trunk"))
    return theirs, ours.eval()


# [CLS] phrases ended by "." [SEP], padded with 0
TEXTS = {
    "one": [[101, 1050, 1051, 1012, 1060, 1012, 102]],
    "ragged": [[101, 1050, 1051, 1012, 1060, 1012, 102], [101, 1070, 1012, 102, 0, 0, 0]],
}


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("texts", TEXTS)
def test_logits_and_boxes_are_those_of_transformers(published, texts, padded):
    theirs, ours = published
    ids = torch.tensor(TEXTS[texts])
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randn(len(ids), 3, 96, 128, generator=generator)
    pixel_mask = torch.ones(len(ids), 96, 128, dtype=torch.int64)
    if padded:
        pixels[-1, :, 70:], pixels[-1, :, :, 90:] = 0, 0
        pixel_mask[-1, 70:], pixel_mask[-1, :, 90:] = 0, 0
    kept = {}
    hook = theirs.model.encoder.register_forward_pre_hook(lambda _, args, kwargs: kept.update(kwargs), with_kwargs=True)
    with torch.no_grad():
        wanted = theirs(pixels, ids, attention_mask=(ids > 0).long(), pixel_mask=pixel_mask)
        hook.remove()
        levels = features_of_padded_input(ours, pixels, pixel_mask)
        memory, encoder, stages = run(
            ours, levels, kept["text_features"], ids > 0, positions=kept["text_position_ids"],
            blocked=kept["text_self_attention_masks"],
        )  # fmt: skip
    length = ids.shape[1]
    torch.testing.assert_close(memory.vision, wanted.encoder_last_hidden_state_vision, **CLOSE)
    torch.testing.assert_close(encoder.boxes, wanted.init_reference_points, **CLOSE)
    assert torch.isinf(wanted.logits[..., length:]).all()
    torch.testing.assert_close(stages[-1].logits, wanted.logits[..., :length], **CLOSE)
    torch.testing.assert_close(stages[-1].boxes, wanted.pred_boxes, **CLOSE)


def test_names_in_memory_and_on_disk_lead_to_the_same_weights(published, tmp_path):
    theirs, ours = published
    in_memory, report = apply(theirs.state_dict(), published_parts())
    assert not report.of("unknown")
    for name, tensor in in_memory.items():
        torch.testing.assert_close(tensor, ours.state_dict()[name], atol=0, rtol=0)


# The published VisionLLM v2 code


def fixture(test_data: Path, name: str):
    folder = test_data / "visionllm_v2" / "fixtures"
    config = json.loads((folder / f"{name}.json").read_text())["config"]
    tensors = load_file(folder / f"{name}.safetensors")
    swin = {key: value for key, value in config["backbone_config"].items() if key != "out_features"}
    settings = GroundingDinoSettings(
        backbone=swin, hidden_size=config["d_model"], num_heads=config["encoder_attention_heads"],
        encoder_layers=config["encoder_layers"], decoder_layers=config["decoder_layers"],
        encoder_ffn=config["encoder_ffn_dim"], decoder_ffn=config["decoder_ffn_dim"],
        encoder_points=config["encoder_n_points"], decoder_points=config["decoder_n_points"],
        num_queries=config["num_queries"], mask_channels=config["mask_dim"],
    )  # fmt: skip
    decoder = GroundingDinoDecoder(settings, config["d_model"]).eval()
    head = LinkHead(config["l_hidden_size"], config["d_model"])
    weights = {key.removeprefix("weights."): value for key, value in tensors.items() if key.startswith("weights.")}
    state, report = apply(weights, released_parts("decoder.", "head.", source=""))
    assert not report.of("unknown")
    torch.nn.ModuleDict({"decoder": decoder, "head": head}).load_state_dict(state)
    return decoder, head, {key: value for key, value in tensors.items() if not key.startswith("weights.")}


def scramble_link_masks(decoder, allowed):
    """The reference lays out its masks [B, T, T] head by head and reads them sample by sample."""
    for layer in decoder.trunk.encoder.layers:
        attention = layer.text_enhancer_layer.self_attn
        heads = attention.num_attention_heads
        mask = allowed.repeat(heads, 1, 1).view(len(allowed), heads, *allowed.shape[1:])
        mask = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
        attention.register_forward_pre_hook(
            lambda _, args, kwargs, mask=mask: (args, kwargs | {"attention_mask": mask}), with_kwargs=True
        )


@pytest.mark.parametrize("name", ["gdino_a", "gdino_b", "gdino_ragged_a"])
def test_matches_reference_values_of_the_released_code(test_data, name):
    decoder, head, data = fixture(test_data, name)
    valid = data["inputs.text_query_masks"]
    with torch.no_grad():
        links = head(data["inputs.text_query"].flatten(0, 1)).view(*valid.shape, -1)
        torch.testing.assert_close(links, data["outputs.link_embeddings"], **CLOSE)
        levels = features_of_padded_input(decoder, data["inputs.pixel_values"], data["inputs.pixel_mask"])
        scramble_link_masks(decoder, data["outputs.text_self_attention_mask"])
        memory, encoder, stages = run(decoder, levels, links, valid, positions=data["outputs.text_position_ids"])
        features = decoder.mask_head(memory, levels, torch.arange(len(valid)))
        masks = [torch.einsum("gqc,gchw->gqhw", decoder.mask_embed(stage.hidden), features) for stage in stages]
        proposals = decoder.trunk.propose(memory)
        logits = class_logits(proposals.features, memory)
        chosen = decoder.trunk.select(proposals, logits.amax(-1))
    torch.testing.assert_close(levels.stride4, data["outputs.backbone.0"], **CLOSE)
    torch.testing.assert_close(memory.vision, data["outputs.encoder_vision"], **CLOSE)
    torch.testing.assert_close(memory.links, data["outputs.encoder_text"], **CLOSE)
    ratios = data["outputs.valid_ratios"]
    torch.testing.assert_close(memory.valid_ratios.expand_as(ratios), ratios, **CLOSE)
    torch.testing.assert_close(logits, data["outputs.enc_class_logits"], **CLOSE)
    proposed = decoder.trunk.encoder_output_bbox_embed(proposals.features) + proposals.start
    torch.testing.assert_close(proposed, data["outputs.enc_coord_logits"], **CLOSE)
    assert torch.equal(chosen, data["outputs.topk_indices"])
    torch.testing.assert_close(encoder.boxes, data["outputs.init_reference_boxes"], **CLOSE)
    torch.testing.assert_close(encoder.logits, gather_rows(logits, chosen), **CLOSE)
    torch.testing.assert_close(features, data["outputs.mask_features"], **CLOSE)
    for index, stage in enumerate(stages):
        torch.testing.assert_close(stage.logits, data["outputs.logits"][index][..., : valid.shape[1]], **CLOSE)
        torch.testing.assert_close(stage.boxes, data["outputs.boxes"][index], **CLOSE)
        torch.testing.assert_close(masks[index], data["outputs.mask_logits"][index], **CLOSE)


def test_every_released_tensor_has_a_place_at_full_size(test_data):
    shapes = json.loads((test_data / "visionllm_v2" / "state_dict_7b.json").read_text())
    aliases = json.loads((test_data / "visionllm_v2" / "state_dict_7b.aliases.json").read_text())["alias_of"]
    with torch.device("meta"):
        released = {name: torch.empty(shape) for name, shape in shapes.items() if name.startswith("gdino.")}
        ours = torch.nn.ModuleDict({"decoder": GroundingDinoDecoder(GroundingDinoSettings(), 256)})
        ours["head"] = LinkHead(4096, 256)
    state, report = apply(released, released_parts("decoder.", "head."))
    assert {k: v.shape for k, v in state.items()} == {k: v.shape for k, v in ours.state_dict().items()}
    assert len(report.entries) == len(released) and not report.of("unknown")
    dropped = {entry.name for entry in report.of("dropped")}
    assert all("relative_position_index" in name or name.startswith("gdino.model.mask_embed.") for name in dropped)
    assert {entry.name for entry in report.of("alias")} == {name for name in aliases if name.startswith("gdino.")}
    assert (MASK_STRIDE, *STRIDES) == (4, 8, 16, 32, 64)
