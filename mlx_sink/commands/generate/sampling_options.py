"""Options that say how the next token is chosen, spelled as mlx-lm spells them."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any, cast

from mlx_lm.sample_utils import make_logits_processors, make_sampler

from mlx_sink.commands.generate.options import PENALTIES
from mlx_sink.errors import ConfigError
from mlx_sink.stream.sampler import Sampling


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


def sampling(settings: dict[str, Any], tokenizer: Any) -> Sampling:
    """Build what `settings` describes from mlx-lm's samplers and logits processors.

    Raises:
        ConfigError: ``top_k`` is not below the size of the vocabulary, or
            ``min_tokens_to_keep`` above it.
    """
    values, n = dict(settings), len(tokenizer)
    if values["top_k"] >= n:
        raise ConfigError(f"--top-k must be below the vocabulary's {n}, got {values['top_k']}")
    if values["min_tokens_to_keep"] > n:
        raise ConfigError(
            f"--min-tokens-to-keep must be at most the vocabulary's {n}, "
            f"got {values['min_tokens_to_keep']}"
        )
    penalties = {
        f"{name}_{end}": values.pop(f"{name}_{end}")
        for name in PENALTIES
        for end in ("penalty", "context_size")
    }
    special = [*tokenizer.encode("\n"), *tokenizer.eos_token_ids]
    sampler = make_sampler(**values, xtc_special_tokens=special)
    make = cast("Callable[..., list[Any]]", make_logits_processors)
    return Sampling(sampler, make(**penalties))


def penalty_window(settings: dict[str, Any]) -> int:
    """Return how many of the newest tokens the penalties look at."""
    return max(settings[f"{name}_context_size"] for name in PENALTIES)
