"""Parse and format numbers of tokens (4K is 4,096) and of bytes (2GB is 2e9)."""

from __future__ import annotations

import re

from mlx_sink.errors import ConfigError

SIZES = {"": 1, "K": 1 << 10, "M": 1 << 20}
UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
BINARY = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def short(n: int) -> str:
    """Format a number of tokens, in K or M where it is a multiple: 4K, 1M."""
    for unit in ("M", "K"):
        if n and n % SIZES[unit] == 0:
            return f"{n // SIZES[unit]}{unit}"
    return str(n)


def parse_tokens(text: str) -> int:
    """Parse a number of tokens, such as 4096, 4K or 10M.

    Raises:
        ConfigError: It is not a number of that kind.
    """
    match = re.fullmatch(r"(\d+)([KM]?)", text.strip().upper())
    if match is None or int(match[1]) == 0:
        raise ConfigError(f"a length must be tokens such as 500, 4K or 1M, got {text!r}")
    return int(match[1]) * SIZES[match[2]]


def format_bytes(n: float) -> str:
    """Format a number of bytes, in units of 1000."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if n < 1000 or unit == "GB":
            break
        n /= 1000
    return f"{n:.0f} bytes" if unit == "bytes" else f"{n:.2f} {unit}"


def parse_bytes(text: str, name: str = "--memory") -> int:
    """Parse a number of bytes: ``2GB`` is 2e9, ``2GiB`` is 2 * 2**30.

    Args:
        text: The number.
        name: What it is called in an error.

    Raises:
        ConfigError: It is not a number of that kind.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(I?)B?\s*", text.upper())
    if match is None or (match[3] and not match[2]) or float(match[1]) == 0:
        raise ConfigError(f"{name} must be bytes such as 2GB or 512MiB, got {text!r}")
    return int(float(match[1]) * (BINARY if match[3] else UNITS)[match[2]])
