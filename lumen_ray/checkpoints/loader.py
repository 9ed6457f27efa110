"""The interface through which a decoder reads published weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from torch import Tensor, nn


@dataclass(frozen=True)
class PublishedLoader:
    """Reads one kind of published checkpoint of a decoder.

    `sizes`: (folder) -> keys of the decoder's settings that the checkpoint determines. `load`: (folder, a function that
    builds the decoder, whether pickle files may be read) -> {name below `decoders.<decoder>.`: tensor}. `fresh`:
    prefixes of names that the checkpoint lacks. `tokenizer`: (folder) -> the tokenizer of its text encoder.
    """

    sizes: Callable[[Path], dict[str, Any]]
    load: Callable[[Path, Callable[[], nn.Module], bool], dict[str, Tensor]]
    fresh: tuple[str, ...] = ()
    tokenizer: Callable[[Path], Tokenizer] | None = None
