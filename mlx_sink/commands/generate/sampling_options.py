"""Options that say how the next token is chosen, spelled as mlx-lm spells them."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any, cast

from mlx_lm.sample_utils import make_logits_processors, make_sampler

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
    p.add_argument("--temp", type=float, help="sampling temperature (0; 0.7 for the demo model)")
    p.add_argument("--top-p", type=float, default=1.0, help="sampling top-p (1)")
    p.add_argument("--min-p", type=float, default=0.0, help="sampling min-p (0)")
    p.add_argument("--top-k", type=int, default=0, help="sampling top-k, 0 for all (0)")
    p.add_argument("--min-tokens-to-keep", type=int, default=1, help="least tokens for min-p (1)")
    p.add_argument("--xtc-probability", type=float, default=0.0, help="probability of XTC (0)")
    p.add_argument("--xtc-threshold", type=float, default=0.1, help="threshold of XTC (0.1)")
    for name, what in PENALTIES.items():
        p.add_argument(f"--{name}-penalty", type=float, help=f"{what} (none)")
        p.add_argument(
            f"--{name}-context-size",
            type=int,
            default=CONTEXT,
            help=f"newest tokens that the {name} penalty looks at ({CONTEXT})",
        )


def check(args: argparse.Namespace) -> None:
    """Raise for values that only a later, less clear error would complain about.

    Raises:
        ConfigError: A value is out of range.
    """
    if args.temp is not None and args.temp < 0:
        raise ConfigError(f"--temp must be at least 0, got {args.temp}")
    for name, most in (("top_p", 1), ("min_p", 1), ("xtc_probability", 1), ("xtc_threshold", 0.5)):
        value = getattr(args, name)
        if not 0 <= value <= most:
            raise ConfigError(f"{_flag(name)} must be from 0 to {most}, got {value}")
    least = {"top_k": 0, "min_tokens_to_keep": 1} | {f"{n}_context_size": 1 for n in PENALTIES}
    for name, minimum in least.items():
        if getattr(args, name) < minimum:
            raise ConfigError(
                f"{_flag(name)} must be at least {minimum}, got {getattr(args, name)}"
            )
    penalty = args.repetition_penalty
    if penalty is not None and penalty <= 0:
        raise ConfigError(f"--repetition-penalty must be more than 0, got {penalty}")


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


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
