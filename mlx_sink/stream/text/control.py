"""Control tokens: the words of a tokenizer that are not text, such as ``<|im_end|>``."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple, cast

from mlx_sink.errors import InputError

SHORTEST = 3
"""Characters of the shortest word that a template can turn into a control token."""


class Control(NamedTuple):
    """The control tokens of a tokenizer.

    Attributes:
        words: Their ids by their words: the special tokens, and what a chat template writes of
            the other words that were added to the vocabulary.
        hidden: Ids of those that stand around what is said, and are none of it.
    """

    words: dict[str, int]
    hidden: frozenset[int]


def control_of(tokenizer: Any) -> Control:
    """Return the control tokens of a tokenizer.

    Not every word that was added to a vocabulary is one: runs of spaces, line ends and markup
    are text, and what opens and closes a model's thoughts is for the reader.

    Args:
        tokenizer: mlx-lm's ``TokenizerWrapper``, or the tokenizer in it.
    """
    added = cast("dict[int, Any]", getattr(tokenizer, "added_tokens_decoder", {}))
    special = {str(token): i for i, token in added.items() if token.special}
    ids = cast("Iterable[int]", tokenizer.all_special_ids)
    special |= dict(zip(cast("Iterable[str]", tokenizer.all_special_tokens), ids, strict=False))
    source, conversation = _template(tokenizer), _conversation(tokenizer)
    thoughts = (getattr(tokenizer, name, None) for name in ("think_start", "think_end"))
    text = {word for word in thoughts if word}
    ends = cast("set[int] | int | None", getattr(tokenizer, "eos_token_ids", None))
    words, hidden = dict(special), set(special.values())
    hidden |= {ends} if isinstance(ends, int) else set(ends or ())
    for i, token in added.items():
        word = str(token)
        if word in special or word in text or not _may_control(word):
            continue
        if word in conversation:
            hidden.add(i)
        if word in conversation or word in source:
            words[word] = i
    words.pop("", None)
    return Control(words, frozenset(hidden))


def _may_control(word: str) -> bool:
    return len(word) >= SHORTEST and not word.isspace() and not word.isalnum()


def _template(tokenizer: Any) -> str:
    """Return the source of the chat templates, one after the other."""
    template = getattr(tokenizer, "chat_template", None)
    if isinstance(template, dict):  # several, by name
        return "\0".join(str(text) for text in cast("dict[str, Any]", template).values())
    return template if isinstance(template, str) else ""


def _conversation(tokenizer: Any) -> str:
    """Return what the chat template makes of a short conversation; nothing if it refuses."""
    has_template = getattr(tokenizer, "chat_template", None) is not None
    if not getattr(tokenizer, "has_chat_template", has_template):
        return ""
    turns = [{"role": role, "content": "1"} for role in ("user", "assistant", "user")]
    try:
        return str(
            tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        )
    except Exception:  # a template is a program of the model's, and may raise anything
        return ""


def add_end(tokenizer: Any, word: str, vocabulary: int) -> None:
    """Have one more token end the text.

    Args:
        tokenizer: mlx-lm's ``TokenizerWrapper``; changed.
        word: The token, or its id.
        vocabulary: How many tokens the model can read.

    Raises:
        InputError: It is no token of the tokenizer, or none that the model has.
    """
    try:
        token = int(word)
    except ValueError:
        token = cast("int | None", tokenizer.convert_tokens_to_ids(word))
        if token is None or tokenizer.convert_ids_to_tokens(token) != word:
            raise InputError(
                f"--extra-eos-token {word!r} is not one token of the model's tokenizer: name "
                "one, or its id, or use --stop"
            ) from None
    if not 0 <= token < vocabulary:
        raise InputError(
            f"--extra-eos-token {word!r} is not in the model's vocabulary: its tokens are 0 to "
            f"{vocabulary - 1}"
        )
    tokenizer.eos_token_ids.add(token)
