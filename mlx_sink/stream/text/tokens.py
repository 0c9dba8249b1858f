"""Token ids from outside, checked before a model reads them: MLX reads past a table's end."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence, Set
from operator import index
from typing import Any, cast

from mlx_sink.errors import InputError

PLAIN = "tokens must be a flat list or a one-dimensional array of integers"
NO_LIST = (str, bytes, bytearray, Mapping, Set)


def token_ids(tokens: object, vocabulary: int, tokenizer: Any = None) -> list[int]:
    """Return tokens as a list of plain integers that a model can read.

    Args:
        tokens: A list, tuple or one-dimensional array of integers, of Python, numpy or MLX.
        vocabulary: How many tokens the model can read.
        tokenizer: Names the word of a token that the model cannot read.

    Raises:
        InputError: They are something else, or one of them is not in the vocabulary.
    """
    ids = _integers(_listed(tokens))
    if ids and not (min(ids) >= 0 and max(ids) < vocabulary):
        place = next(i for i, token in enumerate(ids) if not 0 <= token < vocabulary)
        token = ids[place]
        word = _word(tokenizer, token)
        named = f" ({word!r})" if word else ""
        raise InputError(
            f"token {token}{named} at place {place} is not in the model's vocabulary: its "
            f"embedding has rows for tokens 0 to {vocabulary - 1}"
        )
    return ids


def _listed(tokens: Any) -> Sequence[object]:
    if hasattr(tokens, "tolist"):  # an array of numpy, MLX or PyTorch
        tokens = tokens.tolist()
    kind = type(tokens).__name__
    if isinstance(tokens, Mapping) and "input_ids" in tokens:
        raise InputError(f"{PLAIN}, got a {kind}: pass its input_ids")
    if not isinstance(tokens, Iterable) or isinstance(tokens, NO_LIST):
        raise InputError(f"{PLAIN}, got {_short(cast('object', tokens))} ({kind})")
    return list(cast("Iterable[object]", tokens))


def _integers(tokens: Sequence[object]) -> list[int]:
    if all(type(token) is int for token in tokens):
        return cast("list[int]", list(tokens))
    ids: list[int] = []
    for place, token in enumerate(tokens):
        try:
            is_bool = isinstance(token, bool) or "bool" in str(getattr(token, "dtype", ""))
            ids.append(index(cast("Any", None if is_bool else token)))
        except (TypeError, ValueError):
            kind = type(token).__name__
            raise InputError(f"{PLAIN}, got {_short(token)} ({kind}) at place {place}") from None
    return ids


def _short(value: object) -> str:
    text = " ".join(repr(value).split())
    return text if len(text) <= 40 else f"{text[:40]}..."


def _word(tokenizer: Any, token: int) -> str | None:
    """Return the word of a token, if the tokenizer has one."""
    if tokenizer is None or not 0 <= token < len(tokenizer):
        return None
    return cast("str | None", tokenizer.convert_ids_to_tokens(token))
