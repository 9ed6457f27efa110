"""The interface of an engine, on which label, evaluate and the bench depend instead of on a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

from lumen_ray.answer import Answer
from lumen_ray.inference.request import RegionQuestion, Request, Shown
from lumen_ray.structures import Size


@runtime_checkable
class EngineProtocol(Protocol):
    """Answers requests about images. `inference.engine.Engine` implements it over a model; tests use fakes."""

    @property
    def preset(self) -> str:
        """Name of the model's preset."""

    @property
    def version(self) -> str:
        """Identifies the weights."""

    @property
    def dtype(self) -> str:
        """'float32' or 'bfloat16', of weights and arithmetic."""

    @property
    def image_size(self) -> int:
        """Side in pixels of the trunk's square input."""

    @property
    def largest_side(self) -> int:
        """The longest side in pixels of any input of trunk or decoders: images may be decoded at a reduced scale that
        leaves their longer side this many."""

    @property
    def tasks(self) -> Sequence[str]:
        """Names of the tasks that the model serves."""

    @property
    def serving(self) -> Mapping[str, str]:
        """Task -> decoder that serves it; text tasks are absent."""

    @property
    def chosen_decoders(self) -> Mapping[str, str]:
        """The entries of `serving` that differ from the model folder's settings."""

    @property
    def classes(self) -> Sequence[str]:
        """Class names of the training data."""

    @property
    def skeletons(self) -> Mapping[str, Sequence[str]]:
        """Class -> keypoint names."""

    @property
    def edges(self) -> Mapping[str, Sequence[Sequence[int]]]:
        """Class -> pairs of 0-based keypoint indices to join."""

    def input_size(self, shown: Shown) -> Size:
        """(height, width) in pixels of the trunk's input for an image."""

    def run(
        self,
        images: Sequence[Shown],
        requests: Sequence[Sequence[Request]],
        *,
        score_threshold: float = 0.05,
        max_per_phrase: int = 300,
        max_new_tokens: int = 48,
        class_chunk: int = 64,
        route_only: bool = False,
    ) -> list[list[Answer]]:
        """One `Answer` per request of each entry of `images`; see `Engine.run`."""


@runtime_checkable
class EncodingEngine(EngineProtocol, Protocol):
    """An engine that encodes images once for several calls, whose `run` takes what `encode` returns in place of images.
    What `Engine` does is described there."""

    def encode(self, images: Sequence[Shown]) -> Any:
        """Encodes images of one `input_size`."""

    def beside(self, decoder: str, tasks: Sequence[str]) -> EngineProtocol:
        """An engine with another decoder for some tasks, over the same modules; see `Engine.beside`."""

    def ask_regions(self, images: Any, questions: Sequence[RegionQuestion]) -> list[float]:
        """The probability of "yes" against "no" of each question; see `Engine.ask_regions`."""
