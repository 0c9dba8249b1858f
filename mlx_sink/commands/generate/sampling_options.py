"""Options that say how the next token is chosen, spelled as mlx-lm spells them."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any, cast

from mlx_lm.sample_utils import make_logits_processors, make_sampler

from mlx_sink.commands.numbers import add_integer, add_real
from mlx_sink.errors import ConfigError
from mlx_sink.stream.sampler import Sampling, never

CONTEXT = 20
"""Newest tokens that a penalty looks at unless stated, as in mlx-lm."""

PENALTIES = {
    "repetition": "logits of tokens that came up are divided by this",
    "presence": "taken from the logits of tokens that came up",
    "frequency": "taken from the logits of tokens for each time they came up",
}


def add_options(p: argparse.ArgumentParser) -> None:
    """Add the options to a parser."""
    usual = "0; 0.7 for the demo model"
    add_real(p, "--temp", least=0, usual=usual, help="sampling temperature")
    add_real(p, "--top-p", least=0, most=1, default=1, help="sampling top-p")
    add_real(p, "--min-p", least=0, most=1, default=0, help="sampling min-p")
    add_integer(p, "--top-k", least=0, default=0, help="sampling top-k, 0 for all")
    add_integer(p, "--min-tokens-to-keep", least=1, default=1, help="least tokens for min-p")
    add_real(p, "--xtc-probability", least=0, most=1, default=0, help="probability of XTC")
    add_real(p, "--xtc-threshold", least=0, most=0.5, default=0.1, help="threshold of XTC")
    for name, what in PENALTIES.items():
        flag, is_factor = f"--{name}-penalty", name == "repetition"
        least, most = (0, None) if is_factor else (-100, 100)
        add_real(p, flag, least=least, most=most, above=is_factor, usual="none", help=what)
        add_integer(
            p,
            f"--{name}-context-size",
            least=1,
            default=CONTEXT,
            help=f"newest tokens that the {name} penalty looks at",
        )


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
        ConfigError: ``top_k`` is not below the size of the vocabulary.
    """
    values = dict(settings)
    if values["top_k"] >= vocabulary:
        raise ConfigError(
            f"--top-k must be below the vocabulary's {vocabulary}, got {values['top_k']}"
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
