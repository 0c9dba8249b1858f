"""Small tokenizers of every kind that chat models have, with control tokens of their own.

Each can also be made without them, of the same vocabulary: what it gives then is the text that a
control word is.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from typing import Any

from mlx_lm.tokenizer_utils import NaiveStreamingDetokenizer, TokenizerWrapper
from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizer, PreTrainedTokenizerFast

CONTROL = ["<|im_start|>", "<|im_end|>", "</s>", "<s>", "[INST]"]
USER = "<|User|>"
"""A control token that is not marked as one: only the template says so."""

TEXTS = [
    "the cat and the dog went to the sea",
    "a cat  with   spaces\nand lines\n\nof a log: [x] <y> |z| im_end im_start s /s User INST",
] * 4

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'user' %}<|User|>{% endif %}{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def byte_level() -> Tokenizer:
    """As in GPT-2, Llama 3 and Qwen."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(TEXTS, trainer)
    return tokenizer


def byte_level_normalised() -> Tokenizer:
    """One that folds full-width characters, so that a control word has many spellings."""
    tokenizer = byte_level()
    tokenizer.normalizer = normalizers.NFKC()
    return tokenizer


def sentence_piece() -> Tokenizer:
    """As in Llama 2: a space before the text, bytes for what is not in the vocabulary."""
    bytes_ = [f"<0x{b:02X}>" for b in range(256)]
    trained = Tokenizer(models.BPE())
    spaces = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    trained.normalizer = spaces
    trained.train_from_iterator(TEXTS, trainers.BpeTrainer(vocab_size=200, show_progress=False))
    words = dict.fromkeys(["<unk>", *bytes_, *sorted(trained.get_vocab())])
    vocabulary = {word: n for n, word in enumerate(words)}
    model = json.loads(trained.to_str())["model"]
    merges = [tuple(pair) for pair in model["merges"]]
    tokenizer = Tokenizer(
        models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    )
    tokenizer.normalizer = spaces
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)])
    return tokenizer


def unigram() -> Tokenizer:
    """As in T5 and XGLM: the likeliest pieces."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    letters = sorted(set("".join(TEXTS)) - {" "})
    trainer = trainers.UnigramTrainer(
        vocab_size=120,
        special_tokens=["<unk>"],
        unk_token="<unk>",
        initial_alphabet=letters,
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    return tokenizer


KINDS: dict[str, Callable[[], Tokenizer]] = {
    "byte-level": byte_level,
    "byte-level, normalised": byte_level_normalised,
    "sentencepiece": sentence_piece,
    "unigram": unigram,
}


@cache
def _trained(kind: str) -> str:
    """Train once: what a trainer does twice may differ."""
    return KINDS[kind]().to_str()


class Letters(PreTrainedTokenizer):
    """A slow tokenizer, in Python: each letter is a token."""

    def __init__(self, **options: Any):
        self._letters = sorted({chr(i) for i in range(9, 127)})
        super().__init__(**options)

    @property
    def vocab_size(self) -> int:
        return len(self._letters)

    def get_vocab(self) -> dict[str, int]:
        return {letter: n for n, letter in enumerate(self._letters)} | self.added_tokens_encoder

    def _tokenize(self, text: str, **_: Any) -> list[str]:
        return list(text)

    def _convert_token_to_id(self, token: str) -> int:
        return self._letters.index(token) if token in self._letters else self.unk_token_id

    def _convert_id_to_token(self, index: int) -> str:
        return self._letters[index]

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        return "".join(tokens)


def fast(
    kind: str,
    *,
    control: bool = True,
    begin: str = "",
    end: str = "",
    normalized: bool = False,
    **options: Any,
) -> TokenizerWrapper:
    """Make a tokenizer, wrapped as mlx-lm does.

    Args:
        kind: Of `KINDS`.
        control: It has control tokens.
        begin: The control token that it puts before a text.
        end: The one that it puts after.
        normalized: Control tokens are looked for in the normalised text.
        options: More, as transformers takes them.
    """
    tokenizer = Tokenizer.from_str(_trained(kind))
    if control:
        special = [AddedToken(w, special=True, normalized=normalized) for w in CONTROL]
        tokenizer.add_special_tokens(special)
        tokenizer.add_tokens([AddedToken(USER, normalized=True)])
        options = {"eos_token": "</s>", "chat_template": TEMPLATE} | options
    if begin or end:
        ids = [(w, tokenizer.token_to_id(w)) for w in (begin, end) if w]
        single = " ".join(part for part in (begin, "$A", end) if part)
        tokenizer.post_processor = processors.TemplateProcessing(single=single, special_tokens=ids)
    inner = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **options)
    return TokenizerWrapper(inner, NaiveStreamingDetokenizer)


def slow(*, control: bool = True) -> TokenizerWrapper:
    """Wrap `Letters` as mlx-lm does."""
    options: dict[str, Any] = {"unk_token": "<unk>"}
    if control:
        options |= {"eos_token": "</s>", "bos_token": "<s>", "chat_template": TEMPLATE}
        options["extra_special_tokens"] = [w for w in CONTROL if w not in ("<s>", "</s>")]
    inner = Letters(**options)
    if control:
        inner.add_tokens([AddedToken(USER, normalized=True)])
    return TokenizerWrapper(inner, NaiveStreamingDetokenizer)
