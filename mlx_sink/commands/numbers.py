"""Numbers on a command line: each has a range, and a message that names it."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable


def integer(
    least: int, most: int | None = None, *, default: str = "", besides: int | None = None
) -> Callable[[str], int]:
    """Return a parser of integers, for an argument's ``type``.

    Args:
        least: The smallest that is allowed.
        most: The largest, if there is one.
        default: What holds without the option, in words.
        besides: One more value that is allowed, outside the range.
    """

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = None
        inside = value is not None and least <= value and (most is None or value <= most)
        if value is None or not (inside or value == besides):
            also = "" if besides is None else f", or {besides}"
            raise _refusal("an integer", least, most, also, default, text)
        return value

    return parse


def real(
    least: float, most: float | None = None, *, above: bool = False, default: str = ""
) -> Callable[[str], float]:
    """Return a parser of finite numbers, for an argument's ``type``; arguments as in `integer`.

    Args:
        least: The smallest that is allowed.
        most: The largest, if there is one.
        above: ``least`` itself is not allowed.
        default: What holds without the option, in words.
    """

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        inside = value > least if above else value >= least
        if not (inside and math.isfinite(value) and (most is None or value <= most)):
            raise _refusal("a number", least, most, "", default, text, above=above)
        return value

    return parse


def add_integer(
    p: argparse.ArgumentParser,
    *flags: str,
    least: int,
    most: int | None = None,
    default: int | None = None,
    usual: str = "",
    besides: int | None = None,
    help: str,
) -> None:
    """Add an option that takes an integer; its help and its errors name the default.

    Args:
        p: The parser.
        flags: The option's names.
        least: As in `integer`.
        most: As in `integer`.
        default: What holds without the option.
        usual: The default in words, where its figure says too little.
        besides: As in `integer`.
        help: What it is for.
    """
    usual = usual or str(default)
    kind = integer(least, most, default=usual, besides=besides)
    p.add_argument(*flags, type=kind, default=default, help=f"{help} ({usual})")


def add_real(
    p: argparse.ArgumentParser,
    flag: str,
    *,
    least: float,
    most: float | None = None,
    above: bool = False,
    default: float | None = None,
    usual: str = "",
    help: str,
) -> None:
    """Add an option that takes a finite number; arguments as in `add_integer` and `real`."""
    usual = usual or f"{default:g}"
    kind = real(least, most, above=above, default=usual)
    p.add_argument(flag, type=kind, default=default, help=f"{help} ({usual})")


def _refusal(
    kind: str,
    least: float,
    most: float | None,
    also: str,
    default: str,
    text: str,
    *,
    above: bool = False,
) -> argparse.ArgumentTypeError:
    if most is not None:
        span = f"from {least:g} to {most:g}" if abs(most) < 1e6 else f"from {least} to {most}"
    else:
        span = f"above {least:g}" if above else f"of at least {least:g}"
    if most is not None and above:
        span = f"above {least:g} and up to {most:g}"
    usual = f" (default: {default})" if default else ""
    got = text if text.strip() == text != "" else repr(text)
    return argparse.ArgumentTypeError(f"must be {kind} {span}{also}, got {got}{usual}")


MAX_SEED = 2**64 - 1
"""MLX's seeds have 64 bits."""
