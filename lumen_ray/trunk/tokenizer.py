"""The text tokenizer: one of `tokenizers`, with the special tokens of the prompt layout.

Trained from scratch it is byte-level BPE. A published LLM brings its own, in which some of those tokens go by other
names; which ones is kept beside it. So is the tokenizer of the text encoder that published diffusion decoders bring.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from lumen_ray.errors import UserError
from lumen_ray.tasks import LINK_FAMILIES, REGION_TOKEN, ROUTING_TOKENS

if TYPE_CHECKING:
    from torch import Tensor

PAD, EOS, USER, ASSISTANT = "<pad>", "<eos>", "<user>", "<assistant>"
_LAYOUT_TOKENS = (PAD, EOS, USER, ASSISTANT, REGION_TOKEN)
#: of the routing tokens a tokenizer may lack those that its model has no decoder for
SPECIAL_TOKENS: tuple[str, ...] = (*_LAYOUT_TOKENS, *ROUTING_TOKENS)
#: turns of a conversation; a tokenizer for the sequential layout spells them out instead
TURNS = (USER, ASSISTANT)
#: beside a tokenizer in which special tokens go by other names: {ours: its own}
NAMES_FILE = "special_tokens.json"
#: beside the tokenizer of a model whose diffusion decoders have a published text encoder: the tokenizer of that
CAPTIONS_FILE = "caption_tokenizer.json"


class LumenTokenizer:
    """Encodes prompt and response text; any string can be encoded, since unseen words fall back to bytes."""

    def __init__(self, tokenizer: Tokenizer, names: Mapping[str, str] | None = None, captions: Tokenizer | None = None):
        """`names`: how special tokens are called in this vocabulary, where other than here. `captions`: the tokenizer
        of the diffusion decoders' text encoder, which cuts and pads to the length that this takes."""
        self.backend, self.captions = tokenizer, captions
        self.names = dict(names or {})
        found = {token: tokenizer.token_to_id(self.names.get(token, token)) for token in SPECIAL_TOKENS}
        self.ids = {token: i for token, i in found.items() if i is not None}
        missing = [token for token in _LAYOUT_TOKENS if token not in self.ids and token not in TURNS]
        if missing:
            raise UserError(f"the tokenizer lacks the special tokens {missing}", "invalid_model")
        self.encode = lru_cache(maxsize=65536)(self._encode)

    @classmethod
    def extend(
        cls,
        tokenizer: Tokenizer,
        names: Mapping[str, str],
        families: Iterable[str] = tuple(LINK_FAMILIES),
        captions: Tokenizer | None = None,
    ) -> tuple[LumenTokenizer, int]:
        """A tokenizer with the special tokens it lacks added, routing tokens of these link families among them, and the
        id of the first that was."""
        before = vocabulary_rows(tokenizer)
        wanted = [names.get(token, token) for token in (*_LAYOUT_TOKENS, *routing_tokens(families))]
        absent = [token for token in wanted if tokenizer.token_to_id(token) is None]
        tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in absent])
        return cls(tokenizer, names, captions), before

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int, families: Iterable[str] = ("perception",)) -> LumenTokenizer:
        """A tokenizer learned from `texts`, with the routing tokens of these link families; the same texts in the same
        order give the same tokenizer."""
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=[*_LAYOUT_TOKENS, *routing_tokens(families)],
            initial_alphabet=alphabet,
            show_progress=False,
        )
        tokenizer.train_from_iterator(texts, trainer)
        return cls(tokenizer)

    @classmethod
    def load(cls, path: str | Path) -> LumenTokenizer:
        names, captions = (Path(path).with_name(name) for name in (NAMES_FILE, CAPTIONS_FILE))
        return cls(
            Tokenizer.from_file(str(path)),
            json.loads(names.read_text()) if names.is_file() else None,
            Tokenizer.from_file(str(captions)) if captions.is_file() else None,
        )

    @classmethod
    def from_json(
        cls, text: str, names: Mapping[str, str] | None = None, captions: str | None = None
    ) -> LumenTokenizer:
        return cls(Tokenizer.from_str(text), names, None if captions is None else Tokenizer.from_str(captions))

    def to_json(self) -> str:
        return self.backend.to_str()

    def save(self, path: str | Path) -> None:
        self.backend.save(str(path))
        names, captions = (Path(path).with_name(name) for name in (NAMES_FILE, CAPTIONS_FILE))
        if self.names:
            names.write_text(json.dumps(self.names, indent=1))
        else:
            names.unlink(missing_ok=True)
        if self.captions is not None:
            self.captions.save(str(captions))
        else:
            captions.unlink(missing_ok=True)

    def __len__(self) -> int:
        """Rows of the embedding."""
        return vocabulary_rows(self.backend)

    def __reduce__(self):
        captions = None if self.captions is None else self.captions.to_str()
        return LumenTokenizer.from_json, (self.to_json(), self.names, captions)

    def _encode(self, text: str) -> tuple[int, ...]:
        """Token ids of plain text; special tokens written in it (`<region>`) keep their own id."""
        return tuple(self.backend.encode(text, add_special_tokens=False).ids)

    def spans(self, text: str) -> list[tuple[int, int]]:
        """(token id, where it starts in `text`) of every token of plain text."""
        encoding = self.backend.encode(text, add_special_tokens=False)
        return [(token, start) for token, (start, _) in zip(encoding.ids, encoding.offsets, strict=True)]

    def caption_ids(self, texts: Sequence[str]) -> Tensor | None:
        """int64 [G, L], the texts as the diffusion decoders' text encoder reads them; None where the model has no
        tokenizer for it."""
        if self.captions is None:
            return None
        import torch  # which preparing data does without

        return torch.tensor([self.captions.encode(text).ids for text in texts])

    def decode(self, ids: Iterable[int]) -> str:
        """Text of the ids, special tokens left out."""
        return self.backend.decode([int(i) for i in ids], skip_special_tokens=True).strip()


def routing_tokens(families: Iterable[str]) -> list[str]:
    return [token for name in families for token in LINK_FAMILIES[name].routing_tokens]


def vocabulary_rows(tokenizer: Tokenizer) -> int:
    """One more than the highest token id: ids of published vocabularies may have gaps."""
    return max(tokenizer.get_vocab().values(), default=-1) + 1
