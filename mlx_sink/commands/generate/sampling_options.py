"""Options that say how the next token is chosen, spelled as mlx-lm spells them."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any, cast

from mlx_lm.sample_utils import make_logits_processors, make_sampler

from mlx_sink.commands.generate.options import PENALTIES
from mlx_sink.errors import ConfigError
from mlx_sink.stream.sampler import Sampling, never


def settings(args: argparse.Namespace, temp: float) -> dict[str, Any]:
    """Return what the options say, JSON-ready.

    Args:
        args: The parsed options.
        temp: The temperature when none was given.
    """
    names = ["top_p", "min_p", "top_k", "min_tokens_to_keep", "xtc_probability", "xtc_threshold"]
    names += [f"{name}_{end}" for name in PENALTIES for end in ("penalty", "context_size")]
    chosen = temp if args.temp is None else args.temp
    return {"temp": chosen} | {name: getattr(args, name) for name in names}


def sampling(
    settings: dict[str, Any], tokenizer: Any, vocabulary: int, *, endless: bool = False
) -> Sampling:
    """Build what `settings` describes from mlx-lm's samplers and logits processors.

    Args:
        settings: From `settings`.
        tokenizer: mlx-lm's ``TokenizerWrapper``.
        vocabulary: Tokens that can be chosen.
        endless: No end-of-text token is ever chosen.

    Raises:
        ConfigError: ``top_k`` is not below the size of the vocabulary, or
            ``min_tokens_to_keep`` above it.
    """
    values = dict(settings)
    if values["top_k"] >= vocabulary:
        raise ConfigError(
            f"--top-k must be below the vocabulary's {vocabulary}, got {values['top_k']}"
        )
    if values["min_tokens_to_keep"] > vocabulary:
        raise ConfigError(
            f"--min-tokens-to-keep must be at most the vocabulary's {vocabulary}, "
            f"got {values['min_tokens_to_keep']}"
        )
    penalties = {
        f"{name}_{end}": values.pop(f"{name}_{end}")
        for name in PENALTIES
        for end in ("penalty", "context_size")
    }
    special = [*tokenizer.encode("\n"), *tokenizer.eos_token_ids]
    # MLX writes past the end of the logits, too.
    special = [token for token in special if token < vocabulary]
    sampler = make_sampler(**values, xtc_special_tokens=special)
    make = cast("Callable[..., list[Any]]", make_logits_processors)
    ends = [never(tokenizer.eos_token_ids)] if endless else []
    return Sampling(sampler, [*make(**penalties), *ends])


def penalty_window(settings: dict[str, Any]) -> int:
    """Return how many of the newest tokens the penalties look at."""
    return max(settings[f"{name}_context_size"] for name in PENALTIES)
