"""The text tokenizer: byte-level BPE from `tokenizers`, with the special tokens of the prompt layout."""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from lumen_ray.errors import UserError
from lumen_ray.tasks import LINK_FAMILIES, REGION_TOKEN, ROUTING_TOKENS

PAD, EOS, USER, ASSISTANT = "<pad>", "<eos>", "<user>", "<assistant>"
_LAYOUT_TOKENS = (PAD, EOS, USER, ASSISTANT, REGION_TOKEN)
#: of the routing tokens a tokenizer may lack those that its model has no decoder for
SPECIAL_TOKENS: tuple[str, ...] = (*_LAYOUT_TOKENS, *ROUTING_TOKENS)


class LumenTokenizer:
    """Encodes prompt and response text; any string can be encoded, since unseen words fall back to bytes."""

    def __init__(self, tokenizer: Tokenizer):
        self.backend = tokenizer
        found = {token: tokenizer.token_to_id(token) for token in SPECIAL_TOKENS}
        self.ids = {token: i for token, i in found.items() if i is not None}
        missing = [token for token in _LAYOUT_TOKENS if token not in self.ids]
        if missing:
            raise UserError(f"the tokenizer lacks the special tokens {missing}", "invalid_model")
        self.encode = lru_cache(maxsize=65536)(self._encode)

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int, families: Iterable[str] = ("perception",)) -> LumenTokenizer:
        """A tokenizer learned from `texts`, with the routing tokens of these link families; the same texts in the same
        order give the same tokenizer."""
        routing = [token for name in families for token in LINK_FAMILIES[name].routing_tokens]
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=[*_LAYOUT_TOKENS, *routing],
            initial_alphabet=alphabet,
            show_progress=False,
        )
        tokenizer.train_from_iterator(texts, trainer)
        return cls(tokenizer)

    @classmethod
    def load(cls, path: str | Path) -> LumenTokenizer:
        return cls(Tokenizer.from_file(str(path)))

    @classmethod
    def from_json(cls, text: str) -> LumenTokenizer:
        return cls(Tokenizer.from_str(text))

    def to_json(self) -> str:
        return self.backend.to_str()

    def save(self, path: str | Path) -> None:
        self.backend.save(str(path))

    def __len__(self) -> int:
        return self.backend.get_vocab_size()

    def __reduce__(self):
        return LumenTokenizer.from_json, (self.to_json(),)

    def _encode(self, text: str) -> tuple[int, ...]:
        """Token ids of plain text; special tokens written in it (`<region>`) keep their own id."""
        return tuple(self.backend.encode(text, add_special_tokens=False).ids)

    def decode(self, ids: Iterable[int]) -> str:
        """Text of the ids, special tokens left out."""
        return self.backend.decode([int(i) for i in ids], skip_special_tokens=True).strip()
