"""Our bounded detokenizers against mlx-lm's own: the same text for any tokens whatever."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import cache
from random import Random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from mlx_lm.tokenizer_utils import (
    BPEStreamingDetokenizer,
    NaiveStreamingDetokenizer,
    SPMStreamingDetokenizer,
    TokenizerWrapper,
)
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from mlx_sink import InputError
from mlx_sink.stream.text.detokenize import LINE, Detokenizer, detokenizer_for

WORDS = ["the", "cat", "a", "語", "é", "\U0001f600", ".", ",", "n't", "\n", "\ufffd", "  ", "!"]


def fast(vocabulary: list[str], decoder: Any, unk: str | None = None) -> Any:
    """Make a tokenizer of given tokens; only its decoding matters here."""
    model = models.WordLevel({t: n for n, t in enumerate(dict.fromkeys(vocabulary))}, unk or "a")
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.decoder = decoder
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False)


def byte_level() -> Any:
    """All 256 bytes, words with their spaces, and added tokens as chat models have them."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    encoder = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    words = [encoder.pre_tokenize_str(text)[0][0] for w in WORDS for text in (w, " " + w)]
    added = ["<|end|>", "<tool call>", "ĠĠ", "ĠĠĠ"]
    return fast([*alphabet, *words, *added], decoders.ByteLevel())


def sentence_piece(*, strip: bool) -> Any:
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if strip:
        steps.append(decoders.Strip(" ", 1, 0))
    return fast(pieces(), decoders.Sequence(steps))


def pieces() -> list[str]:
    """Bytes, words, words after a space, and nothing but spaces."""
    words = [w.replace(" ", "▁") for w in WORDS]
    return [*(f"<0x{b:02X}>" for b in range(256)), "▁", "▁▁", *words, *("▁" + w for w in words)]


def word_piece() -> Any:
    words = [w for w in WORDS if w.strip()]
    return fast([*words, *("##" + w for w in words)], decoders.WordPiece())


@cache
def wrapped(kind: str) -> TokenizerWrapper:
    makers: dict[str, tuple[Callable[[], Any], Any]] = {
        "byte-level": (byte_level, BPEStreamingDetokenizer),
        "byte-level by decode": (byte_level, NaiveStreamingDetokenizer),
        "sentencepiece": (lambda: sentence_piece(strip=True), SPMStreamingDetokenizer),
        "sentencepiece, kept space": (
            lambda: sentence_piece(strip=False),
            lambda tokenizer: SPMStreamingDetokenizer(tokenizer, trim_space=False),
        ),
        "byte fallback by decode": (
            lambda: sentence_piece(strip=True),
            NaiveStreamingDetokenizer,
        ),
        "metaspace by decode": (
            lambda: fast(pieces()[256:], decoders.Metaspace()),
            NaiveStreamingDetokenizer,
        ),
        "word pieces by decode": (word_piece, NaiveStreamingDetokenizer),
    }
    make, detokenizer_class = makers[kind]
    return TokenizerWrapper(make(), detokenizer_class)


KINDS = [
    "byte-level",
    "byte-level by decode",
    "sentencepiece",
    "sentencepiece, kept space",
    "byte fallback by decode",
    "metaspace by decode",
    "word pieces by decode",
]


def theirs(tokenizer: TokenizerWrapper, tokens: Sequence[int]) -> list[str]:
    """Return mlx-lm's segments, read after every token as its generate does; the end last."""
    detokenizer, out = tokenizer.detokenizer, []
    for token in tokens:
        detokenizer.add_token(token)
        out.append(detokenizer.last_segment)
    detokenizer.finalize()
    return [*out, detokenizer.last_segment]


def ours(detokenizer: Detokenizer, tokens: Sequence[int]) -> list[str]:
    return [*map(detokenizer.feed, tokens), detokenizer.finish()]


@pytest.mark.parametrize("kind", KINDS)
def test_any_tokens_give_the_same_text(kind: str):
    """Characters split over tokens, bytes that are no text, spaces at the start: all of it."""
    tokenizer = wrapped(kind)
    ids = st.lists(st.integers(0, len(tokenizer) - 1), max_size=40)

    @given(ids)
    def check(tokens: list[int]) -> None:
        assert "".join(ours(detokenizer_for(tokenizer), tokens)) == "".join(
            theirs(tokenizer, tokens)
        )

    check()


@pytest.mark.parametrize("kind", KINDS[:4])
@given(text=st.text(max_size=30))
def test_real_text_split_into_bytes(kind: str, text: str):
    """Text a byte at a time: every character comes out, with the token that completes it."""
    tokenizer = wrapped(kind)
    name = "<0x{:02X}>".format if "piece" in kind else None
    vocabulary = tokenizer.get_vocab()
    encoder = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    written = (
        [name(b) for b in text.encode()]
        if name
        else [c for part, _ in encoder.pre_tokenize_str(text) for c in part]
    )
    tokens = [vocabulary[w] for w in written]
    detokenizer = detokenizer_for(tokenizer)
    mine, expected = ours(detokenizer, tokens), theirs(tokenizer, tokens)
    assert "".join(mine) == "".join(expected)
    if not {" ", "\ufffd"} & set(text):
        assert mine == expected


@pytest.mark.parametrize("kind", KINDS)
def test_long_lines_are_settled_without_a_trace(kind: str):
    """A line far longer than what is kept, decoded whole by mlx-lm: the same, in bounded room."""
    tokenizer = wrapped(kind)
    names = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    ids = [n for n, name in enumerate(names) if "\n" not in name and name not in ("<0x0A>", "Ċ")]

    for seed in range(6):
        tokens = Random(seed).choices(ids, k=4 * LINE)
        detokenizer = detokenizer_for(tokenizer)
        mine = []
        for token in tokens:
            mine.append(detokenizer.feed(token))
            assert len(json.dumps(detokenizer.state())) < 32 * LINE
        mine.append(detokenizer.finish())
        assert "".join(mine) == "".join(theirs(tokenizer, tokens))


@pytest.mark.parametrize("kind", KINDS)
def test_a_restored_detokenizer_goes_on(kind: str):
    """Saved in the middle of anything, a character included, and restored through JSON."""
    tokenizer = wrapped(kind)
    ids = st.lists(st.integers(0, len(tokenizer) - 1), min_size=1, max_size=30)

    @given(ids, st.integers(0, 30))
    def check(tokens: list[int], at: int) -> None:
        first, second = detokenizer_for(tokenizer), detokenizer_for(tokenizer)
        begun = [first.feed(token) for token in tokens[:at]]
        second.restore(json.loads(json.dumps(first.state())))
        whole = ours(detokenizer_for(tokenizer), tokens)
        assert begun + ours(second, tokens[at:]) == whole

    check()


@pytest.mark.parametrize("kind", KINDS)
def test_nonsense_for_ever_is_not_kept(kind: str):
    """A model stuck on half a character, or on a space: mlx-lm's keep all of it."""
    tokenizer = wrapped(kind)
    vocabulary = tokenizer.get_vocab()
    for name in ("<0xE8>", "è", "Ġ", "▁", "##a"):
        if name in vocabulary:
            detokenizer = detokenizer_for(tokenizer)
            for _ in range(3000):
                detokenizer.feed(vocabulary[name])
            assert len(json.dumps(detokenizer.state())) < 32 * LINE


def test_an_unknown_detokenizer_is_refused():
    class Other(BPEStreamingDetokenizer):
        pass

    with pytest.raises(InputError, match="Other"):
        detokenizer_for(TokenizerWrapper(byte_level(), Other))
