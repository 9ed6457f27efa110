"""Rules for UniPose's weights: the released VisionLLM v2 module -> `UniPoseDecoder`."""

from __future__ import annotations

from lumen_ray.checkpoints.rules import ModuleRules, ReleasedModule, Rule
from lumen_ray.decoders.grounding_dino.released import RELEASED_LINK_HEAD

_BOTH = r"(weight|bias)"
_QKV = ("query", "key", "value")


def _renamed(prefix: str, target: str, names: dict[str, str]) -> list[Rule]:
    """Rules for weight and bias of the modules `names` {old: new} of every layer.

    `prefix`: a regular expression with one group, the layer's index, `\\1` in `target`."""
    return [Rule(rf"{prefix}{old}\.{_BOTH}", rf"{target}{new}.\2") for old, new in names.items()]


def _attention(prefix: str, target: str) -> list[Rule]:
    """Rules for attention with query, key and value in one matrix; `prefix` and `target` as in `_renamed`."""
    return [
        Rule(rf"{prefix}in_proj_{_BOTH}", tuple(rf"{target}{part}.\2" for part in _QKV)),
        *_renamed(prefix, target, {r"out_proj": "out_proj"}),
    ]


def _swin() -> list[Rule]:
    source, target = r"backbone\.0\.", "trunk.backbone."
    block, to = source + r"layers\.(\d+\.blocks\.\d+)\.", target + r"swin.encoder.layers.\1."
    bias_table = "relative_position_bias_table"
    return [
        Rule(source + r"patch_embed\.proj\." + _BOTH, target + r"swin.embeddings.patch_embeddings.projection.\1"),
        Rule(source + r"patch_embed\.norm\." + _BOTH, target + r"swin.embeddings.norm.\1"),
        Rule(block + r"attn\.relative_position_index", drop="buffer that the model computes from the window size"),
        Rule(rf"{block}attn\.{bias_table}", rf"{to}attention.relative_position_bias.{bias_table}"),
        Rule(rf"{block}attn\.qkv\.{_BOTH}", tuple(rf"{to}attention.{part}_proj.\2" for part in "qkv")),
        *_renamed(
            block,
            to,
            {
                r"attn\.proj": "attention.o_proj",
                "norm1": "layernorm_before",
                "norm2": "layernorm_after",
                r"mlp\.fc1": "mlp.fc1",
                r"mlp\.fc2": "mlp.fc2",
            },
        ),
        Rule(source + r"layers\.(\d+)\.downsample\.(.+)", target + r"swin.encoder.layers.\1.downsample.\2"),
        *(Rule(rf"{source}norm{i}\.{_BOTH}", rf"{target}hidden_states_norms.stage{i + 1}.\1") for i in (1, 2, 3)),
    ]


def _encoder() -> list[Rule]:
    source, target = r"transformer\.encoder\.{}\.(\d+)\.", r"trunk.encoder.layers.\1.{}."
    pixels, to_pixels = source.format("layers"), target.format("deformable_layer")
    links, to_links = source.format("text_layers"), target.format("text_enhancer_layer")
    fusion, to_fusion = source.format("fusion_layers"), target.format("fusion_layer")
    feed_forward = {"linear1": "fc1", "linear2": "fc2"}
    both = {"v": "vision", "l": "text"}
    return [
        Rule(pixels + r"self_attn\.(.+)", to_pixels + r"self_attn.\2"),
        *_renamed(pixels, to_pixels, {"norm1": "self_attn_layer_norm", "norm2": "final_layer_norm"} | feed_forward),
        *_attention(links + r"self_attn\.", to_links + "self_attn."),
        *_renamed(links, to_links, {"norm1": "layer_norm_before", "norm2": "layer_norm_after"} | feed_forward),
        *(Rule(fusion + rf"gam_{old}", to_fusion + f"{new}_param") for old, new in both.items()),
        *_renamed(fusion, to_fusion, {f"layer_norm_{old}": f"layer_norm_{new}" for old, new in both.items()}),
        *(
            rule
            for old, new in both.items()
            for rule in _renamed(
                fusion,
                to_fusion,
                {rf"attn\.{kind}{old}_proj": f"attn.{kind}{new}_proj" for kind in ("", "values_", "out_")},
            )
        ),
    ]


def _decoder() -> list[Rule]:
    source, target = r"transformer\.decoder\.layers\.(\d+)\.", r"trunk.decoder.layers.\1."
    names = {
        "norm1": "encoder_attn_layer_norm",
        "catext_norm": "encoder_attn_text_layer_norm",
        "norm2": "self_attn_layer_norm",
        "norm3": "final_layer_norm",
        "linear1": "fc1",
        "linear2": "fc2",
    }
    return [
        *_attention(source + r"self_attn\.", target + "self_attn."),
        *_attention(source + r"ca_text\.", target + "encoder_attn_text."),
        Rule(source + r"cross_attn\.(.+)", target + r"encoder_attn.\2"),
        *_renamed(source, target, names),
        Rule(rf"transformer\.decoder\.norm\.{_BOTH}", r"trunk.decoder.layer_norm.\1"),
        Rule(r"transformer\.decoder\.ref_point_head\.(.+)", r"trunk.decoder.reference_points_head.\1"),
        Rule(r"transformer\.decoder\.hw\.weight", "keypoint_start.size_tables.0"),
        Rule(r"transformer\.decoder\.hw_append\.weight", "keypoint_start.size_tables.1"),
    ]


#: the released module `unipose`; names below the prefix of the decoder
RELEASED = [
    *_swin(),
    Rule(r"input_proj\.(.+)", r"trunk.input_proj_vision.\1"),
    Rule(r"transformer\.level_embed", "trunk.level_embed"),
    Rule(r"transformer\.tgt_embed\.weight", "trunk.query_position_embeddings.weight"),
    Rule(r"transformer\.(enc_output(?:_norm)?\..+)", r"trunk.\1"),
    Rule(r"transformer\.enc_out_bbox_embed\.(.+)", r"trunk.encoder_output_bbox_embed.\1"),
    *_encoder(),
    *_decoder(),
    # heads shared by all layers, saved once per layer
    Rule(r"(?:transformer\.decoder\.)?(bbox_embed|pose_embed|pose_hw_embed)\.\d+\.(.+)", r"\1.\2"),
]

#: prefixes of weights that the released module lacks. Their initial values reproduce the released code: a keypoint
#: starts from its link alone, and its visibility is a constant.
FRESH = ("keypoint_start.instance.", "keypoint_start.size.", "visible_embed.")

#: settings that the released weights need: two tables of keypoint sizes, by slot
RELEASED_SETTINGS = {"size_tables": (17, 51)}


def released_parts(decoder: str, link_head: str, source: str = "unipose.") -> list[ModuleRules]:
    """The rules for the released module; `decoder` and `link_head` (a `PoseLinkHead`): our prefixes, which end with a
    dot."""
    return [
        ModuleRules(source + "projection_llava.", link_head + "objects.", RELEASED_LINK_HEAD),
        ModuleRules(source + "projection_kpt_llava.", link_head + "keypoints.", RELEASED_LINK_HEAD),
        ModuleRules(source, decoder, RELEASED),
    ]


MODULE = ReleasedModule("unipose", released_parts, FRESH)
