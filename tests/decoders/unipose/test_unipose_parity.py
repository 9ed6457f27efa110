"""The same numbers as UniPose in the published VisionLLM v2 code, and a place for each of its weights."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.gdino_tiny import features_of_padded_input

from lumen_ray.attention import mask_to_bias
from lumen_ray.checkpoints.rules import apply
from lumen_ray.decoders.common.ragged import Seats
from lumen_ray.decoders.dino.decoder import Groups
from lumen_ray.decoders.dino.transformer import class_logits, gather_rows
from lumen_ray.decoders.unipose.decoder import UniPoseDecoder
from lumen_ray.decoders.unipose.link_head import PoseLinkHead
from lumen_ray.decoders.unipose.released import FRESH, RELEASED_SETTINGS, released_parts
from lumen_ray.decoders.unipose.settings import UniPoseSettings
from lumen_ray.decoders.unipose.slots import Slots

CLOSE = {"atol": 1e-4, "rtol": 1e-5}
INSTANCES, SLOTS = 50, 68  # of the reference, which knows no other numbers
BUFFER = "relative_position_index"


def fixture(test_data: Path, name: str):
    """Decoder and link head with the stored weights; inputs and outputs."""
    folder = test_data / "visionllm_v2" / "fixtures"
    about = json.loads((folder / f"{name}.json").read_text())
    tensors, config = load_file(folder / f"{name}.safetensors"), about["config"]
    data = {key: value for key, value in tensors.items() if not key.startswith("weights.")}
    weights = {key.removeprefix("weights."): value for key, value in tensors.items() if key.startswith("weights.")}
    weights = {key: value.float() if value.is_floating_point() else value for key, value in weights.items()}
    weights |= {alias: weights[first] for alias, first in about["weights"]["alias_of"].items()}
    width = about["fixed_hyperparameters"]["hidden_dim"]
    settings = UniPoseSettings(
        backbone=config["tiny_backbone"], hidden_size=width, num_heads=config["nheads"],
        encoder_layers=config["enc_layers"], decoder_layers=config["dec_layers"],
        box_layers=config["num_box_decoder_layers"], encoder_ffn=config["dim_feedforward"],
        decoder_ffn=config["dim_feedforward"], encoder_points=config["enc_n_points"],
        decoder_points=config["dec_n_points"], num_queries=config["num_queries"], num_instances=INSTANCES,
        **RELEASED_SETTINGS,
    )  # fmt: skip
    assert settings.inverse_sigmoid_eps == about["fixed_hyperparameters"]["inverse_sigmoid_eps"]
    parts = torch.nn.ModuleDict(
        {"decoder": UniPoseDecoder(settings, width), "head": PoseLinkHead(config["l_hidden_size"], width)}
    )
    state, report = apply(weights, released_parts("decoder.", "head.", source=""))
    assert not report.of("unknown")
    missing, unexpected = parts.load_state_dict(state, strict=False)
    assert not unexpected
    assert missing and all(key.removeprefix("decoder.").startswith(FRESH) for key in missing)
    return parts["decoder"].eval(), parts["head"], data


def stored_mask(data) -> torch.Tensor:
    """bool [3450, 3450], True: blocked. The reference lays blocks of 68 over groups of 69, so some queries read a few
    of their neighbours' keypoints."""
    size = INSTANCES * (SLOTS + 1)
    blocked = torch.ones(size, size, dtype=torch.bool)
    for row, start, end in data["outputs.self_attn_allowed_runs"].tolist():
        blocked[row, start:end] = False
    assert torch.equal(blocked.sum(1), data["outputs.self_attn_mask_blocked_per_row"])
    return blocked


@pytest.mark.parametrize("name", ["unipose_a", "unipose_b"])
def test_matches_reference_values_of_the_released_code(test_data, name, monkeypatch):
    decoder, head, data = fixture(test_data, name)
    trunk, box_layers = decoder.trunk, decoder.settings.box_layers
    pixels, padding = data["inputs.pixel_values"], data["inputs.padding_mask"]
    prompts, keypoints = (int(data[f"inputs.{kind}_query_masks"].sum()) for kind in ("obj", "kpt"))
    states = torch.cat([data["inputs.obj_querys"][0, :prompts], data["inputs.kpt_querys"][0, :keypoints]])
    parents = torch.tensor([-1] * prompts + [0] * keypoints)
    groups = Groups(
        torch.arange(prompts), Seats.of(torch.zeros(prompts, dtype=torch.int64), 1), torch.tensor([0]),
        torch.tensor([0]), [tuple(pixels.shape[-2:])],
    )  # fmt: skip
    normed, references = [], []
    layer = trunk.layer
    monkeypatch.setattr(
        trunk, "layer", lambda i, hidden, at, *rest: references.append(at) or layer(i, hidden, at, *rest)
    )
    trunk.decoder.layer_norm.register_forward_hook(lambda _, args, out: normed.append((args[0], out)))
    with torch.no_grad():
        links = head(states, None, parents)
        torch.testing.assert_close(links[:prompts], data["outputs.obj_link_embeddings"][0, :prompts], **CLOSE)
        torch.testing.assert_close(links[prompts:], data["outputs.kpt_link_embeddings"][0, :keypoints], **CLOSE)
        levels = features_of_padded_input(decoder, pixels, ~padding)
        memory, _ = decoder._encode(levels, groups, links[:prompts])
        ratio = memory.valid_ratios[:, :1].repeat(1, 1, 2)  # positions of queries count in the padded input
        query_position = trunk.query_position
        monkeypatch.setattr(trunk, "query_position", lambda reference: query_position(reference * ratio))
        proposals = trunk.propose(memory)
        chosen = trunk.select(proposals, class_logits(proposals.features, memory).amax(-1))
        begun = decoder.begin(memory)
        encoder = begun.encoder
        assert begun.valid.all()
        at = (begun.content, begun.boxes, begun.self_mask)
        stages, hidden, boxes = decoder.layers(memory, *at, range(box_layers))
        boxes = decoder.passed_on(boxes, hidden)
        # the reference takes each query once, however many prompts it fits, with all keypoints of the image
        logits = class_logits(hidden, memory)
        query = logits.amax(-1).topk(INSTANCES).indices
        seat = gather_rows(logits, query).argmax(-1)
        slots = Slots.at(query, seat, groups, torch.ones_like(query, dtype=torch.bool))
        table = torch.nn.functional.pad(links[prompts:], (0, 0, 0, SLOTS - keypoints))
        start = gather_rows(hidden, query), gather_rows(boxes, query)
        mask = mask_to_bias(~stored_mask(data), hidden.dtype)[None, None]
        poses = decoder._pose(memory, *start, slots, table.expand(1, INSTANCES, -1, -1), mask)
        at, hidden = references[-1].unflatten(1, (INSTANCES, SLOTS + 1)), normed[-1][0]
        boxes, xy, size = decoder._advance(at[:, :, 0], at[:, :, 1:, :2], at[:, :, 1:, 2:], hidden)
    torch.testing.assert_close(memory.vision, data["outputs.encoder_vision"], **CLOSE)
    torch.testing.assert_close(memory.links, data["outputs.encoder_text"][:, :prompts], **CLOSE)
    torch.testing.assert_close(memory.valid_ratios, data["outputs.valid_ratios"], **CLOSE)
    torch.testing.assert_close(
        class_logits(proposals.features, memory), data["outputs.enc_class_logits"][..., :prompts], **CLOSE
    )
    proposed = trunk.encoder_output_bbox_embed(proposals.features) + proposals.start
    torch.testing.assert_close(proposed, data["outputs.enc_coord_logits"], **CLOSE)
    assert torch.equal(chosen, data["outputs.topk_indices"])
    torch.testing.assert_close(encoder.boxes, data["outputs.init_reference_boxes"], **CLOSE)
    assert torch.equal(query, data["outputs.group_topk_indices"])
    for index, stage in enumerate(stages):
        torch.testing.assert_close(stage.hidden, data[f"outputs.decoder_hidden.{index}"], **CLOSE)
        torch.testing.assert_close(stage.logits, data[f"outputs.object_logits.{index}"][..., :prompts], **CLOSE)
        torch.testing.assert_close(stage.boxes, data[f"outputs.boxes.{index}"], **CLOSE)
    for index in range(box_layers):
        torch.testing.assert_close(references[index + 1], data[f"outputs.references_out.{index}"], **CLOSE)
    last = f"{box_layers}"
    passed_on = torch.cat([boxes[:, :, None], torch.cat([xy, size], dim=-1)], dim=2).flatten(1, 2)
    torch.testing.assert_close(passed_on, data[f"outputs.references_out.{last}"], **CLOSE)
    objects = normed[-1][1][:, :, 0]
    torch.testing.assert_close(objects, data[f"outputs.decoder_hidden_boxes.{last}"], **CLOSE)
    own = data[f"outputs.object_logits.{last}"].gather(2, seat[..., None])[..., 0]
    torch.testing.assert_close(poses[0].logits, own, **CLOSE)
    torch.testing.assert_close(poses[0].boxes, data[f"outputs.boxes.{last}"], **CLOSE)
    torch.testing.assert_close(poses[0].xy, data[f"outputs.keypoints_xy.{last}"], **CLOSE)
    torch.testing.assert_close(poses[0].visible.sigmoid(), data[f"outputs.keypoints_visibility.{last}"], **CLOSE)


def test_every_released_tensor_has_a_place_at_full_size(test_data):
    shapes = json.loads((test_data / "visionllm_v2" / "state_dict_7b.json").read_text())
    aliases = json.loads((test_data / "visionllm_v2" / "state_dict_7b.aliases.json").read_text())["alias_of"]
    with torch.device("meta"):
        released = {name: torch.empty(shape) for name, shape in shapes.items() if name.startswith("unipose.")}
        ours = torch.nn.ModuleDict({"decoder": UniPoseDecoder(UniPoseSettings(**RELEASED_SETTINGS), 256)})
        ours["head"] = PoseLinkHead(4096, 256)
    state, report = apply(released, released_parts("decoder.", "head."))
    wanted = {k: v.shape for k, v in ours.state_dict().items() if not k.removeprefix("decoder.").startswith(FRESH)}
    assert {k: v.shape for k, v in state.items()} == wanted
    assert len(report.entries) == len(released) and not report.of("unknown")
    assert all(entry.name.endswith(BUFFER) for entry in report.of("dropped"))
    assert {entry.name for entry in report.of("alias")} == {name for name in aliases if name.startswith("unipose.")}
