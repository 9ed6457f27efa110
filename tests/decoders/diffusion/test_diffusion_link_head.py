"""The link head of decoders that make pictures, against the reference's mapper, and the released layout of both."""

import json

import pytest
import torch
from safetensors.torch import load_file

from lumen_ray.checkpoints.rules import ModuleRules, apply
from lumen_ray.decoders.diffusion.instruct_pix2pix import InstructPix2PixDecoder
from lumen_ray.decoders.diffusion.link_head import DiffusionHead
from lumen_ray.decoders.diffusion.released import DECODER_RULES, HEAD_RULES
from lumen_ray.decoders.diffusion.settings import InstructPix2PixSettings, StableDiffusionSettings
from lumen_ray.decoders.diffusion.stable_diffusion import StableDiffusionDecoder

FULL = {
    "image_size": 512,
    "vae": {
        "block_out_channels": [128, 256, 512, 512],
        "down_block_types": ["DownEncoderBlock2D"] * 4,
        "up_block_types": ["UpDecoderBlock2D"] * 4,
        "layers_per_block": 2,
    },
    "text_encoder": {
        "vocab_size": 49408,
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "projection_dim": 768,
    },
}
UNET = {"sample_size": 64, "cross_attention_dim": 768}  # all else is the class's default


def test_a_head_gives_the_references_conditioning(test_data):
    folder = test_data / "visionllm_v2" / "fixtures"
    tensors = load_file(folder / "sd_mapper_a.safetensors")
    config = json.loads((folder / "sd_mapper_a.json").read_text())["config"]
    weights = {key.removeprefix("weights."): value for key, value in tensors.items() if key.startswith("weights.")}
    converted, report = apply(weights, [ModuleRules("", "", HEAD_RULES)])
    assert report.counts() == {"renamed": len(weights)}
    head = DiffusionHead(config["llm_hidden_size"], config["sd_hidden_size"], config["num_queries"]).eval()
    head.load_state_dict(converted)
    states, ids = tensors["inputs.hidden_states"], tensors["inputs.input_ids"]
    number = config["num_embed_tokens"]
    triggers = torch.nonzero(ids == config["trigger_token_id"]).tolist()
    behind = torch.stack([states[b, t + 1 : t + 1 + number] for b, t in triggers])
    with torch.no_grad():
        projected = head.proj(behind)
        memory, conditioning = head.mapper.encoder(projected), head(behind)
    assert torch.allclose(projected, tensors["outputs.projected"], atol=1e-5)
    assert torch.allclose(memory, tensors["outputs.mapper_encoder_memory"], atol=1e-4)
    assert torch.allclose(conditioning, tensors["outputs.conditioning"], atol=1e-4)


def test_a_prompt_does_not_depend_on_the_others():
    torch.manual_seed(0)
    head = DiffusionHead(12, 16, num_tokens=5, heads=2, layers=2).eval()
    states = torch.randn(4, 8, 12)
    with torch.no_grad():
        together = head(states)
        assert together.shape == (4, 5, 16)
        assert torch.allclose(together[2:3], head(states[2:3]), atol=1e-6)
    assert (together[0] - together[1]).abs().max() > 0.01


@pytest.mark.parametrize("prefix", ["sd", "ip2p"])
def test_the_released_layout_fills_head_and_decoder(test_data, prefix):
    shapes = json.loads((test_data / "visionllm_v2" / "state_dict_7b.json").read_text())
    released = {k: torch.empty(s, device="meta") for k, s in shapes.items() if k.startswith(f"{prefix}.")}
    parts = [ModuleRules(f"{prefix}.", "head.", HEAD_RULES), ModuleRules(f"{prefix}.", "decoder.", DECODER_RULES)]
    converted, report = apply(released, parts)
    assert report.counts() == {"renamed": len(released)}
    with torch.device("meta"):
        head = DiffusionHead(4096, 768)
        if prefix == "sd":
            decoder = StableDiffusionDecoder(StableDiffusionSettings(**FULL, unet=UNET))
        else:
            decoder = InstructPix2PixDecoder(InstructPix2PixSettings(**FULL, unet={**UNET, "in_channels": 8}))
    ours = {f"head.{k}": v for k, v in head.state_dict().items()}
    ours |= {f"decoder.{k}": v for k, v in decoder.state_dict().items()}
    assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in converted.items()}
    assert decoder.step == 64
