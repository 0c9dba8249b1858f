"""The tokenizer of a GGUF file: its vocabulary and merges, as transformers takes them.

Two kinds: byte-level BPE (``gpt2``), whose file names the pattern that cuts a text before merging,
and SentencePiece (``llama``), whose pieces have scores, from which the merges follow.

Source: https://github.com/ggml-org/llama.cpp/blob/master/src/llama-vocab.cpp (the patterns), and
transformers' convert_slow_tokenizer.py (merges from scores).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import numpy as np
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)
from transformers.tokenization_utils_base import generate_merges

from mlx_sink.errors import ModelError
from mlx_sink.models.gguf.architectures import Metadata, shown

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
"""Kinds of tokens."""

_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_LLAMA_3 = (
    _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN_2 = _LLAMA_3.replace(r"\p{N}{1,3}", r"\p{N}")
_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_GPT_2 = None

PATTERNS = {
    "default": _GPT_2, "gpt-2": _GPT_2, "smollm": _GPT_2, "llama-bpe": _LLAMA_3,
    "llama3": _LLAMA_3, "llama-v3": _LLAMA_3, "smaug-bpe": _LLAMA_3, "dbrx": _LLAMA_3,
    "qwen2": _QWEN_2, "deepseek-r1-qwen": _QWEN_2, "tekken": _TEKKEN,
}  # fmt: skip
"""What cuts a text before it is merged, by ``tokenizer.ggml.pre``; ``None`` for GPT-2's own."""

SINGLE_DIGITS = ("smollm",)
WHOLE_WORDS_FIRST = ("llama-bpe", "llama3", "llama-v3", "tekken")
"""A word that is a token is not merged (``ignore_merges``)."""
COMPOSED = ("qwen2", "deepseek-r1-qwen")
"""Their texts are normalised (NFC)."""

ENDS = ("eos", "eot", "eom")


class Vocabulary:
    """The tokens of a file, checked.

    Args:
        metadata: What the file says.
        size: Rows of the embedding, which tokens name.

    Raises:
        ModelError: They are missing, or not what the file says that they are.
    """

    def __init__(self, metadata: Metadata, size: int):
        self._m = metadata
        tokens = metadata.get("tokenizer.ggml.tokens")
        if not isinstance(tokens, list) or not tokens:
            raise ModelError(f"{metadata.where} has no tokenizer (tokenizer.ggml.tokens)")
        self.tokens = cast("list[str]", tokens)
        if len(self.tokens) > size:
            self._refuse(f"{len(self.tokens)} tokens for an embedding of {size} rows")
        kinds = self._numbers("token_type", np.full(len(self.tokens), NORMAL))
        self.kinds: list[int] = [int(kind) for kind in kinds]
        self.ids = {token: i for i, token in enumerate(self.tokens)}
        if len(self.ids) != len(self.tokens):
            self._refuse("two tokens that are spelled alike")

    def _refuse(self, what: str) -> None:
        raise ModelError(f"the tokenizer of {self._m.where} has {what}")

    def _numbers(self, name: str, default: np.ndarray | None = None) -> np.ndarray:
        value = self._m.get(f"tokenizer.ggml.{name}", default)
        if not isinstance(value, np.ndarray) or value.shape != (len(self.tokens),):
            self._refuse(f"no {name} for each of its {len(self.tokens)} tokens")
        return cast("np.ndarray", value)

    def _named(self, name: str) -> int | None:
        """Return the number of a token that has a part to play, if the file names one."""
        value = self._m.get(f"tokenizer.ggml.{name}_token_id")
        if value is None:
            return None
        if type(value) is not int or not 0 <= value < len(self.tokens):
            self._refuse(f"a {name} token {shown(value)}, which is none of its tokens")
        return value

    def _flag(self, name: str, default: bool) -> bool:
        value = self._m.get(f"tokenizer.ggml.{name}", default)
        if not isinstance(value, bool):
            self._refuse(f"a {name} that is neither true nor false")
        return bool(value)

    def tokenizer(self) -> Tokenizer:
        """Build the tokenizer.

        Raises:
            ModelError: It is of a kind that is not known, or does not fit together.
        """
        model = self._m.get("tokenizer.ggml.model")
        kinds = {"gpt2": self._byte_level, "llama": self._sentence_piece}
        if model not in kinds:
            self._refuse(f"the model {shown(model)}: gpt2 and llama are read")
        try:
            tokenizer = kinds[model]()
        except ModelError:
            raise
        except Exception as error:
            # What the library raises where a vocabulary makes no sense.
            raise ModelError(f"the tokenizer of {self._m.where} is damaged: {error}") from None
        tokenizer.add_special_tokens(self._added(CONTROL, UNKNOWN))
        tokenizer.add_tokens(self._added(USER_DEFINED))
        return tokenizer

    def _added(self, *kinds: int) -> list[AddedToken]:
        special = CONTROL in kinds
        return [
            AddedToken(token, special=special, normalized=False)
            for token, kind in zip(self.tokens, self.kinds, strict=True)
            if kind in kinds
        ]

    def _byte_level(self) -> Tokenizer:
        pre = self._m.get("tokenizer.ggml.pre", "default")
        if pre not in PATTERNS:
            known = ", ".join(PATTERNS)
            self._refuse(f"the pre-tokenizer {shown(pre)}: {known} are known")
        merges = self._m.get("tokenizer.ggml.merges")
        if not isinstance(merges, list):
            self._refuse("no merges")
        pairs = [tuple(merge.split(" ")) for merge in cast("list[str]", merges)]
        if any(len(pair) != 2 for pair in pairs):
            self._refuse("merges that are not of two tokens")
        whole = pre in WHOLE_WORDS_FIRST
        tokenizer = Tokenizer(
            models.BPE(vocab=self.ids, merges=cast("Any", pairs), ignore_merges=whole)
        )
        if pre in COMPOSED:
            tokenizer.normalizer = normalizers.NFC()
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(_cuts(pre))
        tokenizer.decoder = decoders.ByteLevel()
        self._begin(tokenizer, default=False)
        return tokenizer

    def _sentence_piece(self) -> Tokenizer:
        scores = self._numbers("scores").astype(np.float64)
        if not np.isfinite(scores).all():
            self._refuse("scores that are no numbers")
        pieces = {
            token: score
            for token, score, kind in zip(self.tokens, scores.tolist(), self.kinds, strict=True)
            if kind in (NORMAL, USER_DEFINED, UNUSED)
        }
        merges = generate_merges(self.ids, pieces)
        unknown = self._named("unknown")
        prefix = self._flag("add_space_prefix", True)
        bpe = models.BPE(
            vocab=self.ids,
            merges=merges,
            fuse_unk=True,
            byte_fallback=BYTE in self.kinds,
            unk_token=None if unknown is None else self.tokens[unknown],
        )
        tokenizer = Tokenizer(bpe)
        space = normalizers.Replace(" ", "▁")
        first = [normalizers.Prepend("▁")] if prefix else []
        tokenizer.normalizer = normalizers.Sequence([*first, space])
        strip = [decoders.Strip(" ", 1, 0)] if prefix else []
        tokenizer.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
        )
        self._begin(tokenizer, default=True)
        return tokenizer

    def _begin(self, tokenizer: Tokenizer, *, default: bool) -> None:
        """Have every text begin and end with the tokens that the file says."""
        bos, eos = self._named("bos"), self._named("eos")
        first = bos is not None and self._flag("add_bos_token", default)
        last = eos is not None and self._flag("add_eos_token", False)
        around = {"bos": bos if first else None, "eos": eos if last else None}
        named = [(self.tokens[i], i) for i in around.values() if i is not None]
        if not named:
            return
        words = [[self.tokens[i]] if i is not None else [] for i in around.values()]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=[*words[0], "$A", *words[1]],
            pair=[*words[0], "$A", *words[0], "$B", *words[1]],
            special_tokens=named,
        )

    def config(self, context: int) -> dict[str, Any]:
        """Return the tokenizer_config.json.

        Args:
            context: Positions the model was trained on, in tokens.
        """
        parts = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
        words = {part: self._named(name) for part, name in parts.items()}
        named = {f"{part}_token": self.tokens[i] for part, i in words.items() if i is not None}
        template = self._m.get("tokenizer.chat_template")
        if template is not None and not isinstance(template, str):
            self._refuse("a chat template that is no text")
        return {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": context,
            "clean_up_tokenization_spaces": False,
            **named,
            **({"chat_template": template} if template else {}),
        }

    def ends(self) -> list[int]:
        """Return the tokens that end a text, for ``eos_token_id`` of config.json."""
        named = [self._named(name) for name in ENDS]
        return sorted({i for i in named if i is not None})

    def special(self) -> Mapping[str, int]:
        """Return the token that begins a text, for config.json, if there is one."""
        bos = self._named("bos")
        return {} if bos is None else {"bos_token_id": bos}


def _cuts(pre: str) -> list[Any]:
    pattern = PATTERNS[pre]
    if pattern is None:
        digits = [pre_tokenizers.Digits(individual_digits=True)] if pre in SINGLE_DIGITS else []
        return [*digits, pre_tokenizers.ByteLevel(add_prefix_space=False)]
    return [
        pre_tokenizers.Split(Regex(pattern), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]
