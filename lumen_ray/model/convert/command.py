"""`lumen-ray convert`: makes a model folder from published weights."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lumen_ray.console import say
from lumen_ray.errors import UserError

if TYPE_CHECKING:
    from lumen_ray.model.convert.pretrained import Assembly
    from lumen_ray.model.settings import ModelSettings


def add_args(verbs: Any, parser_class: type) -> None:
    """The verb's options; `verbs` are argparse's subparsers."""
    p = verbs.add_parser("convert", help="make a model folder from published weights")
    kinds = p.add_subparsers(dest="source", metavar="SOURCE", parser_class=parser_class, required=True)
    parts = kinds.add_parser(
        "pretrained", help="CLIP, DINOv2, an LLM and decoders, each from its own checkpoint (a folder or a hub id)"
    )
    parts.add_argument("--preset", default="7b", help="name in configs/models, or a YAML file (default: 7b)")
    parts.add_argument("--clip", help="CLIP image encoder, e.g. openai/clip-vit-large-patch14-336")
    parts.add_argument("--dinov2", help="DINOv2 image encoder, e.g. facebook/dinov2-large")
    parts.add_argument(
        "--vision",
        metavar="MODEL",
        help="instead of --clip and --dinov2: model folder or bundled weights whose encoders and decoders to take over",
    )
    parts.add_argument(
        "--llm", required=True, help="causal LM of the Llama, Qwen or Mistral family, with its tokenizer"
    )
    parts.add_argument(
        "--decoder",
        action="append",
        default=[],
        metavar="NAME=DIR",
        help="published weights of a decoder; can be given several times",
    )
    parts.add_argument("--seed", type=int, default=0, help="seed of the weights that are not published (default: 0)")
    parts.set_defaults(run=_pretrained)
    released = kinds.add_parser("visionllm-v2", help="the released checkpoint of VisionLLM v2")
    released.add_argument("checkpoint", help="folder of the checkpoint, or its hub id, OpenGVLab/VisionLLMv2")
    released.add_argument(
        "--preset", default="visionllm-v2", help="preset of the checkpoint's size (default: visionllm-v2)"
    )
    released.add_argument("--lora-alpha", type=float, help="alpha of LoRA adapters that are not merged (default: 64)")
    released.set_defaults(run=_visionllm_v2)
    for parser in (parts, released):
        parser.add_argument("output", help="model folder to write")
        parser.add_argument(
            "--allow-pickle", action="store_true", help="read pickled weights too (tensors only); for trusted sources"
        )


def _preset(name: str) -> ModelSettings:
    from lumen_ray import config
    from lumen_ray.model.settings import ModelSettings
    from lumen_ray.presets import model_path

    return config.load(ModelSettings, model_path(name))


def _decoders(pairs: list[str]) -> dict[str, str]:
    """``["NAME=folder"] -> {"NAME": "folder"}``."""
    folders = {}
    for pair in pairs:
        name, equals, folder = pair.partition("=")
        if not (name and equals and folder):
            raise UserError(
                f"--decoder '{pair}' must be NAME=DIR: a decoder, and the folder or hub id of its published weights",
                "usage",
            )
        folders[name] = folder
    return folders


def _check_output(output: str) -> None:
    if Path(output).exists() and (not Path(output).is_dir() or any(Path(output).iterdir())):
        raise UserError(f"'{output}' is not empty; give a new folder for the model", "output_exists")


def _pretrained(args: argparse.Namespace) -> None:
    _check_output(args.output)
    from lumen_ray.model.convert.pretrained import Sources, assemble

    sources = Sources(args.llm, args.clip, args.dinov2, _decoders(args.decoder), args.vision)
    made = assemble(_preset(args.preset), sources, args.output, args.allow_pickle, args.seed)
    for line in summary(made):
        say(line)
    say(f"model -> {args.output}")


def _visionllm_v2(args: argparse.Namespace) -> None:
    _check_output(args.output)
    from lumen_ray.model.convert.visionllm_v2 import LORA_ALPHA, REPORT_FILE, convert

    alpha = LORA_ALPHA if args.lora_alpha is None else args.lora_alpha
    made, report = convert(args.checkpoint, _preset(args.preset), args.output, args.allow_pickle, alpha)
    say("tensors: " + ", ".join(f"{number} {outcome}" for outcome, number in report.counts().items()))
    for line in summary(made):
        say(line)
    say(f"model -> {args.output}; where each tensor went -> {args.output}/{REPORT_FILE}")


def summary(made: Assembly) -> list[str]:
    """Lines with the loaded and fresh parameters of each part of a model, and a note if caption alignment is off."""
    from lumen_ray.model.convert.decoders import text_encoders

    parts = made.parameters()
    width = max(len(name) for name in parts)
    lines = [
        f"  {name:<{width}} {loaded:>15,} from checkpoints {fresh:>13,} fresh"
        for name, (loaded, fresh) in parts.items()
    ]
    loaded, fresh = (sum(counts) for counts in zip(*parts.values(), strict=True))
    lines.append(f"  {'in all':<{width}} {loaded:>15,} from checkpoints {fresh:>13,} fresh")
    if made.tokenizer.captions is None and (names := text_encoders(made.settings)):
        lines.append(
            f"no tokenizer came for the text encoder of {' and '.join(names)}: in training, links are not aligned with "
            "captions"
        )
    return lines
