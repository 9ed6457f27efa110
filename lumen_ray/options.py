"""Options that several verbs of the command line share, and what they say about the model that is used."""

from __future__ import annotations

import argparse
from pathlib import Path

from lumen_ray.console import comma_separated, say
from lumen_ray.decoders.registry import choice_example
from lumen_ray.presets import DEFAULT_MODEL, bundled_models


def model_arg(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model",
        default=DEFAULT_MODEL,
        help=f"model folder, or the name of bundled weights (default: {DEFAULT_MODEL}, for the synthetic scenes)",
    )


def decoders_arg(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--decoders",
        type=comma_separated,
        action="extend",
        default=[],
        metavar="TASK=DECODER,..",
        help="decoder for each task that several of the model's decoders can serve, e.g. "
        f"{choice_example()} (default: as in the model's settings)",
    )


def exemplars_arg(parser: argparse.ArgumentParser, what: str) -> None:
    parser.add_argument("--exemplars", metavar="FILE", help=f"{what}: a YAML or JSON file with boxes on images")


def device_arg(parser: argparse.ArgumentParser, default: str) -> None:
    parser.add_argument("--device", help=f"device to run the model on: cpu, cuda or cuda:N (default: {default})")


def dtype_arg(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--dtype",
        default="float32",
        help="float32, or bfloat16: half the memory and, on GPUs, faster (default: float32)",
    )


def say_bundled(model: str) -> None:
    """Prints what the bundled weights were trained on, which is not photographs."""
    if not Path(model).is_dir() and model in bundled_models():
        say(
            f"the bundled weights '{model}' are trained on the drawn shapes of 'lumen-ray prepare scenes' only; for "
            "other images train a model on your data and give --model"
        )
