"""The texts of single tokens make up the decoded text."""

from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models

from lumen_ray.trunk.tokenizer import EOS, SPECIAL_TOKENS, LumenTokenizer

BYTE_LEVEL = LumenTokenizer.train(["a red circle by a blue square"], 320)


def metaspace() -> LumenTokenizer:
    """Blanks as in SentencePiece vocabularies: part of the word behind them, the first one dropped."""
    words = [*SPECIAL_TOKENS, "▁a", "▁red", "▁circle", "s", ".", "<0xC3>", "<0xA4>"]
    tokenizer = Tokenizer(models.WordLevel({word: n for n, word in enumerate(words)}, unk_token="s"))
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(parts)
    return LumenTokenizer(tokenizer)


WORDS = metaspace()
A_UMLAUT = [WORDS.backend.token_to_id("<0xC3>"), WORDS.backend.token_to_id("<0xA4>")]


def check(tokenizer, ids):
    texts = tokenizer.token_texts(ids)
    assert len(texts) == len(ids) and "".join(texts).strip() == tokenizer.decode(ids)


@given(ids=st.lists(st.integers(0, len(BYTE_LEVEL) - 1), max_size=30), text=st.text(max_size=40))
@settings(max_examples=200, deadline=None)
def test_joined_they_are_the_decoded_text(ids, text):
    check(BYTE_LEVEL, ids)  # of any bytes
    check(BYTE_LEVEL, BYTE_LEVEL.encode(text))


@given(pieces=st.lists(st.one_of(st.just(A_UMLAUT), st.integers(0, A_UMLAUT[0] - 1).map(lambda n: [n])), max_size=30))
@settings(max_examples=200, deadline=None)
def test_with_blanks_as_parts_of_words(pieces):
    check(WORDS, [token for piece in pieces for token in piece])


def test_blanks_special_tokens_and_characters_of_several_tokens():
    ids = [WORDS.backend.token_to_id(token) for token in ("▁a", "▁red", "<0xC3>", "<0xA4>", "▁circle", "s", EOS)]
    assert WORDS.token_texts(ids) == ["a", " red", "", "ä", " circle", "s", ""]
    assert WORDS.token_texts(ids[:3]) == ["a", " red", "\ufffd"]
