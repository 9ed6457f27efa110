"""Rules for Grounding DINO's weights: the released VisionLLM v2 module, and checkpoints of `transformers`.

Both map to the names of `GroundingDinoDecoder`. `transformers` renames Swin's weights on loading; the rules cover the
names on disk and in memory.
"""

from __future__ import annotations

from lumen_ray.checkpoints.rules import ModuleRules, ReleasedModule, Rule

_INDEX = "buffer that the model computes from the window size"
_QKV = (r"query.\2", r"key.\2", r"value.\2")
_BOTH = r"(weight|bias)"


def _swin(prefix: str, target: str) -> list[Rule]:
    """Swin's backbone at `prefix` (a regular expression without groups)."""
    block = prefix + r"(?:swin\.)?encoder\.layers\.(\d+)\.blocks\.(\d+)\."
    to = target + r"swin.encoder.layers.\1.blocks.\2."
    return [
        Rule(prefix + r"(?:.+)\.relative_position_index", drop=_INDEX),
        Rule(prefix + r"(?:swin\.)?layernorm\." + _BOTH, drop="norm of an unused output"),
        Rule(
            block + r"attention\.(?:self|relative_position_bias)\.relative_position_bias_table",
            to + "attention.relative_position_bias.relative_position_bias_table",
        ),
        *(
            Rule(rf"{block}attention\.self\.{old}\.{_BOTH}", rf"{to}attention.{new}.\3")
            for old, new in (("query", "q_proj"), ("key", "k_proj"), ("value", "v_proj"))
        ),
        Rule(rf"{block}attention\.output\.dense\.{_BOTH}", rf"{to}attention.o_proj.\3"),
        Rule(rf"{block}intermediate\.dense\.{_BOTH}", rf"{to}mlp.fc1.\3"),
        Rule(rf"{block}output\.dense\.{_BOTH}", rf"{to}mlp.fc2.\3"),
        Rule(prefix + r"(?:swin\.)?((?:encoder|embeddings)\..+)", target + r"swin.\1"),
        Rule(prefix + r"(hidden_states_norms\..+)", target + r"\1"),
    ]


#: names that both layouts share
_TRANSFORMER = [
    *_swin(r"model\.backbone\.conv_encoder\.model\.", "trunk.backbone."),
    Rule(
        r"model\.((?:input_proj_vision|query_position_embeddings|enc_output|enc_output_norm|encoder_output_bbox_embed)"
        r"\..+|level_embed)",
        r"trunk.\1",
    ),
    Rule(r"(?:model\.decoder\.)?bbox_embed\.\d+\.(.+)", r"bbox_embed.\1"),  # one head, saved for every layer
]
_LAYERS = Rule(r"model\.((?:encoder|decoder)\..+)", r"trunk.\1")

#: the released module `gdino`; names below the prefix of the decoder
RELEASED = [
    *_TRANSFORMER,
    Rule(
        r"model\.((?:encoder|decoder)\.layers\.\d+\.(?:text_enhancer_layer\.self_attn|self_attn|encoder_attn_text))"
        r"\.in_proj_(weight|bias)",
        tuple(rf"trunk.\1.{part}" for part in _QKV),
    ),
    _LAYERS,
    Rule(r"model\.lateral_convs\.0\.weight", "mask_head.lateral.weight"),
    Rule(rf"model\.lateral_convs\.0\.norm\.{_BOTH}", r"mask_head.lateral_norm.\1"),
    Rule(r"model\.output_convs\.0\.weight", "mask_head.output.weight"),
    Rule(rf"model\.output_convs\.0\.norm\.{_BOTH}", r"mask_head.output_norm.\1"),
    Rule(rf"model\.mask_features\.{_BOTH}", r"mask_head.project.\1"),
    Rule(r"mask_embed\.\d+\.(.+)", r"mask_embed.\1"),
    Rule(r"model\.mask_embed\..+", drop="masks of queries before the decoder, which do not depend on the image"),
]

#: `patch2query`, its perception link head, part of our trunk; names below the prefix of that head
RELEASED_LINK_HEAD = [Rule(rf"layers\.{i}\.{_BOTH}", rf"mlp.{2 * i}.\1") for i in range(3)]

#: `GroundingDinoForObjectDetection.save_pretrained`
PUBLISHED = [
    *_TRANSFORMER,
    _LAYERS,
    Rule(r"model\.text_(?:backbone|projection)\..+", drop="text branch; links take its place"),
]


def released_parts(decoder: str, link_head: str, source: str = "gdino.") -> list[ModuleRules]:
    """The rules for the released module; `decoder` and `link_head`: our prefixes, which end with a dot."""
    return [
        ModuleRules(source + "patch2query.", link_head, RELEASED_LINK_HEAD),
        ModuleRules(source, decoder, RELEASED),
    ]


def published_parts(decoder: str = "") -> list[ModuleRules]:
    """The rules for a checkpoint of `transformers`, which lacks the mask head and the norm of the stride-4 map."""
    return [ModuleRules("", decoder, PUBLISHED)]


MODULE = ReleasedModule("gdino", released_parts)
