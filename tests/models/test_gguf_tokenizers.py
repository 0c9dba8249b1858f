"""Tokenizers out of a GGUF file's vocabulary, against other ways to the same tokens."""

from __future__ import annotations

import json
import random
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from mlx_sink.models.gguf.architectures import Metadata
from mlx_sink.models.gguf.vocabulary import Vocabulary

TEXTS = [
    "Hello world, it's 12345 times 6!",
    "Привет, мир! Ещё раз: привет.",
    "你好世界。再见。 日本語 テスト",
    "  two  spaces\n\nand\tlines \r\n end ",
    "naïve café — “quotes” 👍🏽 e\u0301",
    "",
]


def vocabulary(**fields: Any) -> Vocabulary:
    named = {f"tokenizer.ggml.{name}": value for name, value in fields.items()}
    metadata = Metadata({"general.architecture": "llama", **named}, "the file")
    return Vocabulary(metadata, len(fields["tokens"]))


PIECES = [
    "a",
    "b",
    "c",
    "d",
    "▁",
    "ab",
    "▁a",
    "abc",
    "bc",
    "▁ab",
    "cd",
    "abcd",
    "▁abc",
    "dd",
    "▁d",
]


def sentence_piece(seed: int, **fields: Any) -> tuple[Vocabulary, dict[str, float]]:
    """Make a vocabulary whose pieces have random scores, with bytes to fall back to."""
    draw = random.Random(seed)
    scores = {piece: -float(i) for i, piece in enumerate(draw.sample(PIECES, len(PIECES)))}
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), *scores]
    made = vocabulary(
        model="llama",
        tokens=tokens,
        scores=np.array([0.0] * 259 + list(scores.values()), np.float32),
        token_type=np.array([2, 3, 3] + [6] * 256 + [1] * len(scores)),
        unknown_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        **fields,
    )
    return made, scores


def merged(text: str, scores: dict[str, float]) -> list[str]:
    """Merge the pair that makes the piece with the best score, the leftmost first, to the end.

    That is SentencePiece's BPE (`bpe_model.cc`), in its plainest form.
    """
    parts = list(text)
    while True:
        pairs = [
            (scores[a + b], -i) for i, (a, b) in enumerate(pairwise(parts))
            if a + b in scores
        ]  # fmt: skip
        if not pairs:
            return parts
        i = -max(pairs)[1]
        parts[i : i + 2] = [parts[i] + parts[i + 1]]


@pytest.mark.parametrize("prefix", [True, False])
@pytest.mark.parametrize("seed", range(5))
def test_pieces_are_merged_by_their_scores(seed: int, prefix: bool):
    made, scores = sentence_piece(seed, add_space_prefix=prefix)
    tokenizer, draw = made.tokenizer(), random.Random(seed + 100)
    for _ in range(100):
        text = "".join(draw.choices("abcd ", k=draw.randrange(1, 20)))
        expected = merged(("▁" if prefix else "") + text.replace(" ", "▁"), scores)
        assert tokenizer.encode(text, add_special_tokens=False).tokens == expected, text
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        assert tokenizer.decode(ids) == text


def test_what_no_piece_has_falls_back_to_bytes():
    made, _ = sentence_piece(0)
    tokenizer = made.tokenizer()
    encoded = tokenizer.encode("aé")
    assert encoded.tokens[0] == "<s>"
    assert encoded.tokens[-2:] == ["<0xC3>", "<0xA9>"]
    assert tokenizer.decode(encoded.ids) == "aé"
    assert tokenizer.encode("</s>", add_special_tokens=False).ids == [2]


def trained(pattern: Any) -> Tokenizer:
    """Train a byte-level BPE on the texts themselves, under some way to cut them."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pattern
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=600, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(TEXTS * 20, trainer)
    return tokenizer


@pytest.mark.parametrize("pre", ["default", "smollm"])
def test_byte_level(pre: str, tmp_path: Path):
    """Vocabulary and merges of a trained tokenizer give its own tokens again."""
    cuts: list[Any] = [pre_tokenizers.ByteLevel(add_prefix_space=False)]
    if pre == "smollm":
        cuts.insert(0, pre_tokenizers.Digits(individual_digits=True))
    theirs = trained(pre_tokenizers.Sequence(cuts))
    words = sorted(theirs.get_vocab().items(), key=lambda item: item[1])
    theirs.save(str(tmp_path / "t.json"))
    merges = json.loads((tmp_path / "t.json").read_text())["model"]["merges"]
    ours = vocabulary(
        model="gpt2", pre=pre, tokens=[word for word, _ in words],
        merges=[" ".join(pair) for pair in merges],
    ).tokenizer()  # fmt: skip
    for text in TEXTS:
        assert ours.encode(text).ids == theirs.encode(text).ids, text
        assert ours.decode(ours.encode(text).ids) == text


def cut_by(pre: str, text: str) -> list[str]:
    """Return a text as it is cut before merging, in its own letters."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = vocabulary(model="gpt2", pre=pre, tokens=letters, merges=[]).tokenizer()
    cuts = made.pre_tokenizer.pre_tokenize_str(text)
    return [text[a:b] for _, (a, b) in cuts]


@pytest.mark.parametrize(
    ("pre", "text", "cuts"),
    [
        ("default", "it's 1234 ok", ["it", "'s", " 1234", " ok"]),
        ("smollm", "it's 1234 ok", ["it", "'s", " ", "1", "2", "3", "4", " ok"]),
        ("llama-bpe", "IT'S 12345 ok!!\n x", ["IT", "'S", " ", "123", "45", " ok", "!!\n", " x"]),
        ("qwen2", "a12 (b)\n\n c", ["a", "1", "2", " (", "b", ")\n\n", " c"]),
        ("tekken", "CamelCase a/b\n", ["Camel", "Case", " a", "/b", "\n"]),
    ],
)
def test_how_texts_are_cut(pre: str, text: str, cuts: list[str]):
    """By the patterns of llama.cpp's `llama-vocab.cpp`."""
    assert cut_by(pre, text) == cuts


def test_tokens_that_are_no_text(tmp_path: Path):
    """Control tokens are special, those of the user are whole, and a template comes along."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*letters, "<|end|>", "<tool>"]
    made = vocabulary(
        model="gpt2",
        tokens=tokens,
        merges=[],
        token_type=np.array([1] * 256 + [3, 4]),
        eos_token_id=256,
        eot_token_id=256,
        padding_token_id=0,
    )
    tokenizer = made.tokenizer()
    assert tokenizer.encode("a<tool>b<|end|>").tokens == ["a", "<tool>", "b", "<|end|>"]
    assert tokenizer.decode(tokenizer.encode("a<tool><|end|>").ids) == "a<tool>"
    assert made.ends() == [256]
    assert made.config(512)["eos_token"] == "<|end|>"
    assert "bos_token" not in made.config(512)
