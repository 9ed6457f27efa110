"""Rules for published encoders and LLMs, for the names on disk of any library version."""

from __future__ import annotations

from lumen_ray.checkpoints.rules import Rule

#: CLIP, whole or its vision tower alone, with or without the prefix that current `transformers` leaves out
CLIP = (
    Rule(r"(?:vision_model\.)?embeddings\.position_ids", drop="indices that the model computes"),
    Rule(r"(?:vision_model\.)?((?:embeddings|pre_layrnorm|encoder|post_layernorm)\..+)", r"\1"),
    Rule(r"text_model\..+|(?:text|visual)_projection\.weight|logit_scale", drop="CLIP's text tower and projections"),
)
#: DINOv2; current `transformers` has other names in memory than on disk
DINOV2 = (
    *(
        Rule(rf"(?:dinov2\.)?(encoder\.layer\.\d+)\.{theirs}\.(weight|bias)", rf"\1.{ours}.\2")
        for theirs, ours in (
            (r"attention\.attention\.query", "attention.q_proj"),
            (r"attention\.attention\.key", "attention.k_proj"),
            (r"attention\.attention\.value", "attention.v_proj"),
            (r"attention\.output\.dense", "attention.o_proj"),
            (r"mlp\.weights_out", "mlp.down_proj"),
        )
    ),
    Rule(
        r"(?:dinov2\.)?(encoder\.layer\.\d+\.mlp)\.weights_in\.(weight|bias)",
        (r"\1.gate_proj.\2", r"\1.up_proj.\2"),
    ),
    Rule(r"(?:dinov2\.)?((?:embeddings|encoder|layernorm)\..+)", r"\1"),
    Rule(r"classifier\..+", drop="the head of an image classifier"),
)
#: Llama, Qwen and Mistral families, also with the names of a model wrapped by PEFT
LLM = (
    Rule(r".*rotary_emb\.inv_freq", drop="frequencies that the model computes"),
    Rule(r"(?:base_model\.model\.)?((?:model\..+?|lm_head))(?:\.base_layer)?\.(weight|bias)", r"\1.\2"),
)
