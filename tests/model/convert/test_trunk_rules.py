"""The released VisionLLM v2 trunk gives the reference's numbers; its full-size layout converts without a rest."""

import json

import pytest
import torch
from support.released_fakes import CLIP, fixture, part, released_settings
from torch import nn

from lumen_ray import config
from lumen_ray.checkpoints.rules import ModuleRules, apply
from lumen_ray.model.build import Generalist
from lumen_ray.model.convert.encoder_rules import CLIP as CLIP_RULES
from lumen_ray.model.convert.pretrained import fill
from lumen_ray.model.convert.trunk_rules import BRIDGE, QUERIES, REGIONS, module_rules
from lumen_ray.model.convert.visionllm_v2 import convert_tensors, may_be_fresh, released_modules
from lumen_ray.model.settings import ModelSettings
from lumen_ray.presets import model_path
from lumen_ray.trunk.comm import CLIP_MEAN, CLIP_STD, BridgedVision
from lumen_ray.trunk.layout import IGNORE, Layout
from lumen_ray.trunk.masks import position_ids, prefix_segments
from lumen_ray.trunk.regions import LevelRegionEncoder
from lumen_ray.trunk.settings import RegionSettings
from lumen_ray.trunk.trunk import Trunk

TOLERANCE = {"atol": 1e-4, "rtol": 1e-4}
MEAN, STD = (torch.tensor(values).view(1, 3, 1, 1) for values in (CLIP_MEAN, CLIP_STD))


def pixels(normalised):
    """The images in 0..1 whose normalised form the fixture holds."""
    return normalised * STD + MEAN


def test_the_bridge_gives_the_reference_numbers(test_data):
    _, data = fixture(test_data, "vl_bridge_a")
    vision = BridgedVision(released_settings().vision, 56, 48)
    state, report = apply(part(data, "weights."), [
        ModuleRules("vis_encoder.", "clip.model.", CLIP_RULES), ModuleRules("vl_bridge.", "projector.", BRIDGE),
    ])  # fmt: skip
    assert report.counts() == {"renamed": 75}
    vision.load_state_dict(state)
    with torch.no_grad():
        tokens, levels = vision(pixels(data["inputs.images"]))
    torch.testing.assert_close(tokens, data["outputs.bridged_image_tokens"], **TOLERANCE)
    expected = torch.cat([data[f"outputs.clip_hidden.{i}"][:, 1:] for i in (2, 3, 4)], dim=2)
    torch.testing.assert_close(levels.flatten(2).transpose(1, 2), expected, **TOLERANCE)


def region_encoder(data, told, sampling):
    sizes = told["config"]
    settings = RegionSettings(kind="levels", channels=sizes["hidden_dim"], sampling=sampling)
    encoder = LevelRegionEncoder(3 * sizes["embed_dim"], sizes["out_dim"], sizes["patch_size"], settings, 3)
    encoder.load_state_dict(apply(part(data, "weights."), [ModuleRules("", "", REGIONS)])[0])
    height, width = data["inputs.masks"].shape[-2:]
    grid = (height // sizes["patch_size"], width // sizes["patch_size"])
    levels = [part(data, "inputs.image_features.")[str(i)] for i in range(3)]
    levels = [f if f.ndim == 4 else f.transpose(1, 2).unflatten(2, grid) for f in levels]
    index = torch.arange(len(data["inputs.masks"]))
    with torch.no_grad():
        return encoder, encoder(
            pixels(data["inputs.images"]), torch.cat(levels, dim=1), data["inputs.masks"][:, 0], index
        )


@pytest.mark.parametrize("name", ["region_encoder_a", "region_encoder_b"])
def test_the_region_encoder_gives_the_reference_numbers(test_data, name):
    told, data = fixture(test_data, name)
    _, found = region_encoder(data, told, "corner")
    torch.testing.assert_close(found, data["outputs.region_embeddings"], **TOLERANCE)


def test_by_default_a_mask_is_read_at_its_pixels_centres(test_data):
    """A region in the corner of a map that is the same everywhere reads that value; off by half a pixel it does not."""
    told, data = fixture(test_data, "region_encoder_b")
    masks, ones = data["inputs.masks"][:1], torch.ones(1, 20, 5, 7)
    for sampling, exact in (("centre", True), ("corner", False)):
        encoder, _ = region_encoder(data, told, sampling)
        assert torch.allclose(encoder.pool(ones, masks), torch.ones(1, 20), atol=1e-5) == exact
    assert RegionSettings().sampling == "centre"


def test_pooling_is_the_mean_of_bilinear_samples():
    torch.manual_seed(0)
    features, masks = torch.randn(2, 3, 4, 5), (torch.rand(2, 1, 28, 35) > 0.7).float()
    encoder = LevelRegionEncoder(9, 8, 14, RegionSettings(kind="levels", channels=8), 3)
    found = encoder.pool(features, masks)
    for r in range(2):
        y, x = masks[r, 0].nonzero().T
        grid = torch.stack([(x + 0.5) / 35, (y + 0.5) / 28], dim=-1)[None, :, None] * 2 - 1
        samples = nn.functional.grid_sample(features[r : r + 1], grid, padding_mode="border", align_corners=False)
        torch.testing.assert_close(found[r], samples.mean(dim=(0, 2, 3)))


def splice_layout(data, ids) -> Layout:
    """The fixture's strings behind the 17 tokens of the prefix: <s> and the image."""
    tokens = data["inputs.input_ids"][:, 17:]
    valid = data["inputs.attention_mask"][:, 17:] == 1
    slots = {}
    for name, tools in (("det", ("det_tool_id", "grd_tool_id", "seg_tool_id")), ("pose", ("pose_tool_id",))):
        places = torch.isin(tokens, torch.tensor([ids[tool] for tool in tools])).nonzero()
        rows = [[[row, place + 1 + n] for n in range(4)] for row, place in places.tolist()]
        slots[QUERIES[name]] = torch.tensor(rows)
    return Layout(
        input_ids=tokens,
        labels=torch.full_like(tokens, IGNORE),
        branch_ids=torch.where(valid, torch.arange(2)[:, None], -1),
        offsets=torch.arange(tokens.shape[1]).expand(2, -1),
        images=torch.ones_like(tokens), seen=torch.ones_like(tokens),
        query_slots=slots,
        link_branches={}, link_images={},
        link_parents={family: torch.full((len(found),), -1) for family, found in slots.items()},
        link_groups={},
        region_slots=(tokens == ids["reg_token_id"]).nonzero(),
        region_index=torch.arange(3),
        last_slots=valid.sum(1, keepdim=True).sub(1),
        alone=torch.zeros(2, dtype=torch.bool),
    )  # fmt: skip


@torch.no_grad()
def test_a_prompt_with_regions_and_queries_gives_the_reference_logits(test_data):
    told, data = fixture(test_data, "vl_splice_a")
    weights = part(data, "weights.")
    settings = released_settings(lead_tokens=(1,))
    trunk = Trunk(settings, 60, settings.sections).eval()
    state, report = apply(weights, module_rules(QUERIES.values()))
    assert not report.of("unknown")
    state = {name.removeprefix("trunk."): tensor for name, tensor in state.items()}
    for name, family in QUERIES.items():  # of families that the light decoder has no use for, in the fixture's numbers
        trunk.queries.queries[family] = nn.Parameter(torch.zeros_like(weights[f"emb_embeddings_{name}.weight"]))
    fresh = ("stem.", "dense.", "link_heads.")
    missing, unexpected = trunk.load_state_dict(state, strict=False)
    assert not unexpected and all(name.startswith(fresh) for name in missing)

    layout = splice_layout(data, told["config"]["token_ids"])
    masks = torch.cat([data["inputs.regions.0"], data["inputs.regions.1"]])
    owners = torch.tensor([0, 1, 1])
    images = pixels(data["inputs.images"])
    tokens, merged, _ = trunk.extract_features(images)
    regions = trunk.regions(images, merged, masks, owners)
    torch.testing.assert_close(regions, data["outputs.region_embeddings"], **TOLERANCE)
    embeds = torch.cat([tokens, trunk.embed_branches(layout, regions)], dim=1)
    valid = data["inputs.attention_mask"] == 1
    torch.testing.assert_close(embeds[valid], data["outputs.inputs_embeds"][valid], **TOLERANCE)

    segments = prefix_segments(lead=1, image_tokens=16, images=1)
    mask = trunk._training_mask(layout, torch.tensor([True, True]), segments, embeds.dtype)
    seen = torch.ones(embeds.shape[:2], dtype=torch.bool)
    hidden = trunk._llm(embeds, position_ids(layout, segments), seen, mask).last_hidden_state
    torch.testing.assert_close(hidden[valid], data["outputs.llm_last_hidden"][valid], **TOLERANCE)
    torch.testing.assert_close(trunk.llm.lm_head(hidden)[valid], data["outputs.logits"][valid], **TOLERANCE)

    prefix = trunk.encode(images * 255)
    hidden, _ = trunk.run_branches(prefix, layout, trunk.region_embeddings(prefix, masks, owners))
    valid = valid[:, 17:]
    torch.testing.assert_close(hidden[valid], data["outputs.llm_last_hidden"][:, 17:][valid], **TOLERANCE)


def test_the_full_size_layout_converts_with_nothing_missing_and_nothing_left_over(test_data):
    told = json.loads((test_data / "visionllm_v2" / "state_dict_7b.json").read_text())
    tensors = {name: torch.empty(shape, device="meta") for name, shape in told.items()}
    settings = config.load(ModelSettings, model_path("visionllm-v2"))
    with torch.device("meta"):
        model = Generalist(settings, told["llm.lm_head.weight"][0])
    expected = model.state_dict()
    state, report = convert_tensors(tensors, expected)
    assert len(report.entries) == len(told) == 4742
    assert not report.of("unknown")
    whole = fill(
        expected, state, "the layout", may_be_fresh(expected)
    )  # raises for what is missing, left over or of another shape
    assert whole.keys() == expected.keys()
    gone = {entry.name for entry in report.of("dropped")}
    modules = {released.module: decoder for decoder, released in released_modules().items()}
    decoderless = {module for module, decoder in modules.items() if decoder not in model.decoders}
    unread = {
        f"emb_embeddings_{n}.weight" for n, family in QUERIES.items() if family not in model.trunk.queries.queries
    }
    trunk = {name for name in told if name.split(".")[0] not in modules}
    assert trunk & gone == unread
    assert all(name in gone for name in told if name.split(".")[0] in decoderless)
    fresh = whole.keys() - state.keys()
    assert fresh and all(name.startswith("decoders.unipose.") for name in fresh)  # a visibility, and what starts at 0
    counted = {part: sum(t.numel() for n, t in state.items() if n.startswith(part)) for part in ("trunk", "decoders")}
    print(", ".join(f"{count:,} parameters in {part}" for part, count in counted.items()))


def test_incompatible_settings_raise_user_errors():
    from lumen_ray.errors import UserError

    with pytest.raises(UserError, match="reads one layer of CLIP alone"):
        released_settings(vision={"clip": CLIP, "bridge": "mlp2x_gelu"})
    with pytest.raises(UserError, match="is for bridge 'mlp2x_gelu'"):
        released_settings(vision={"clip": CLIP, "clip_layers": "penultimate"})
    with pytest.raises(UserError, match="needs vision.bridge 'mlp2x_gelu'"):
        released_settings(vision={"clip": CLIP})
    with pytest.raises(UserError, match="needs prefix_attention 'causal'"):
        released_settings(prefix_attention="full")
