"""The text tokenizer: a `tokenizers.Tokenizer` with the special tokens of the prompt layout.

Trained from scratch it is a byte-level BPE. The tokenizer of a published LLM may have other names for special tokens; a
file beside it maps them. Another file holds the tokenizer of the text encoder of published diffusion decoders.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from lumen_ray.errors import UserError
from lumen_ray.tasks import LINK_FAMILIES, REGION_TOKEN, ROUTING_TOKENS
from lumen_ray.trunk.turns import Turns

if TYPE_CHECKING:
    from torch import Tensor

PAD, EOS, USER, ASSISTANT = "<pad>", "<eos>", "<user>", "<assistant>"
_LAYOUT_TOKENS = (PAD, EOS, USER, ASSISTANT, REGION_TOKEN)
#: a tokenizer may lack routing tokens of decoders that its model does not have
SPECIAL_TOKENS: tuple[str, ...] = (*_LAYOUT_TOKENS, *ROUTING_TOKENS)
#: turns of a conversation; a tokenizer for the sequential layout lacks them, its turns are plain text
TURN_TOKENS = (USER, ASSISTANT)
#: file beside a tokenizer with other names for special tokens: {our name: its name}
NAMES_FILE = "special_tokens.json"
#: file beside the tokenizer of a model whose diffusion decoders have a published text encoder: that encoder's tokenizer
CAPTIONS_FILE = "caption_tokenizer.json"
#: file beside the tokenizer of a published LLM that was taught conversations: their `Turns`
TURNS_FILE = "turns.json"
#: the files that a tokenizer may have beside it
EXTRA_FILES = (NAMES_FILE, CAPTIONS_FILE, TURNS_FILE)


class LumenTokenizer:
    """Encodes prompts and responses; any string can be encoded, since unknown words fall back to bytes."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        names: Mapping[str, str] | None = None,
        captions: Tokenizer | None = None,
        turns: Turns | None = None,
    ):
        """`names`: {our special token: its name in this vocabulary}, where they differ. `captions`: the tokenizer of
        the diffusion decoders' text encoder, which truncates and pads to that encoder's length. `turns`: how a
        published LLM was taught to write conversations; None: with <user>, <assistant> and <eos>. Raises `UserError` if
        special tokens are missing."""
        self.backend, self.captions, self.turns = tokenizer, captions, turns
        self.names = dict(names or {})
        ids = {token: tokenizer.token_to_id(self.names.get(token, token)) for token in SPECIAL_TOKENS}
        self.ids = {token: i for token, i in ids.items() if i is not None}
        missing = [token for token in _LAYOUT_TOKENS if token not in self.ids and token not in TURN_TOKENS]
        if missing:
            raise UserError(f"the tokenizer lacks the special tokens {missing}", "invalid_model")
        stops = (tokenizer.token_to_id(token) for token in (turns.stops if turns else ()))
        #: ids of the tokens that end an answer
        self.end_ids = frozenset([self.ids[EOS], *(i for i in stops if i is not None)])
        self.encode = lru_cache(maxsize=65536)(self._encode)

    @classmethod
    def extend(
        cls,
        tokenizer: Tokenizer,
        names: Mapping[str, str],
        families: Iterable[str] = tuple(LINK_FAMILIES),
        captions: Tokenizer | None = None,
        turns: Turns | None = None,
    ) -> tuple[LumenTokenizer, int]:
        """Adds missing special tokens, including the routing tokens of these link families; <user> and <assistant> only
        without `turns`. Returns the tokenizer and the id of the first added token."""
        before = vocabulary_rows(tokenizer)
        ours = [token for token in _LAYOUT_TOKENS if turns is None or token not in TURN_TOKENS]
        wanted = [names.get(token, token) for token in (*ours, *routing_tokens(families))]
        absent = [token for token in wanted if tokenizer.token_to_id(token) is None]
        tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in absent])
        return cls(tokenizer, names, captions, turns), before

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int, families: Iterable[str] = ("perception",)) -> LumenTokenizer:
        """Trains a tokenizer on `texts`, with the routing tokens of these link families. Deterministic for the same
        texts in the same order."""
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
        names, captions, turns = (Path(path).with_name(name) for name in EXTRA_FILES)
        return cls(
            Tokenizer.from_file(str(path)),
            json.loads(names.read_text()) if names.is_file() else None,
            Tokenizer.from_file(str(captions)) if captions.is_file() else None,
            Turns.from_dict(json.loads(turns.read_text())) if turns.is_file() else None,
        )

    @classmethod
    def from_json(
        cls,
        text: str,
        names: Mapping[str, str] | None = None,
        captions: str | None = None,
        turns: Turns | None = None,
    ) -> LumenTokenizer:
        return cls(Tokenizer.from_str(text), names, None if captions is None else Tokenizer.from_str(captions), turns)

    def to_json(self) -> str:
        return self.backend.to_str()

    def save(self, path: str | Path) -> None:
        self.backend.save(str(path))
        names, captions, turns = (Path(path).with_name(name) for name in EXTRA_FILES)
        for file in (names, captions, turns):
            file.unlink(missing_ok=True)
        if self.names:
            names.write_text(json.dumps(self.names, indent=1))
        if self.captions is not None:
            self.captions.save(str(captions))
        if self.turns is not None:
            turns.write_text(json.dumps(self.turns.to_dict(), indent=1))

    def __len__(self) -> int:
        """Rows of the token embedding."""
        return vocabulary_rows(self.backend)

    def __reduce__(self) -> tuple[Any, ...]:
        captions = None if self.captions is None else self.captions.to_str()
        return LumenTokenizer.from_json, (self.to_json(), self.names, captions, self.turns)

    def _encode(self, text: str) -> tuple[int, ...]:
        """Token ids of text; special tokens written in it (`<region>`) become their ids."""
        return tuple(self.backend.encode(text, add_special_tokens=False).ids)

    def spans(self, text: str) -> list[tuple[int, int]]:
        """(token id, index of its first character in `text`) of every token."""
        encoding = self.backend.encode(text, add_special_tokens=False)
        return [(token, start) for token, (start, _) in zip(encoding.ids, encoding.offsets, strict=True)]

    def caption_ids(self, texts: Sequence[str]) -> Tensor | None:
        """int64 [G, L], input ids for the diffusion decoders' text encoder; None if there is no tokenizer for it."""
        if self.captions is None:
            return None
        import torch  # imported here: preparing data does not need it

        return torch.tensor([self.captions.encode(text).ids for text in texts])

    def decode(self, ids: Iterable[int]) -> str:
        """Text of the ids, without special tokens."""
        return self._text(ids).strip()

    def token_texts(self, ids: Sequence[int]) -> list[str]:
        """The text of each id. Joined and stripped they are `decode(ids)`, as long as bytes make up characters. One
        that several tokens write together belongs to the last of them; special tokens have no text."""
        texts: list[str] = []
        start = read = 0  # of the last id with a text: decoding it again keeps the blank between it and the next
        for end in range(1, len(ids) + 1):
            before, now = self._text(ids[start:read]), self._text(ids[start:end])
            is_whole = not now.endswith("\ufffd") or end == len(ids)  # U+FFFD: the bytes of a character so far
            texts.append(now[len(before) :] if is_whole else "")
            if texts[-1]:
                start, read = read, end
        return texts

    def name_of(self, number: int) -> str:
        """The entry of an id in the vocabulary."""
        return self.backend.id_to_token(number) or ""

    def _text(self, ids: Iterable[int]) -> str:
        return self.backend.decode([int(i) for i in ids], skip_special_tokens=True)


def routing_tokens(families: Iterable[str]) -> list[str]:
    return [token for name in families for token in LINK_FAMILIES[name].routing_tokens]


def vocabulary_rows(tokenizer: Tokenizer) -> int:
    """The highest token id plus one: ids of published vocabularies may have gaps."""
    return max(tokenizer.get_vocab().values(), default=-1) + 1
