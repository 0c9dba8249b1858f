"""Numbers of tokens as people write them: 4K is 4,096, 1M is 1,048,576."""

from __future__ import annotations

import re

from mlx_sink.errors import ConfigError

SIZES = {"": 1, "K": 1 << 10, "M": 1 << 20}


def short(n: int) -> str:
    """Write a number of tokens as people say it: 4K, 1M."""
    for unit in ("M", "K"):
        if n and n % SIZES[unit] == 0:
            return f"{n // SIZES[unit]}{unit}"
    return str(n)


def parse_tokens(text: str) -> int:
    """Read a number of tokens, such as 4096, 4K or 10M.

    Raises:
        ConfigError: It is none.
    """
    match = re.fullmatch(r"(\d+)([KM]?)", text.strip().upper())
    if match is None or int(match[1]) == 0:
        raise ConfigError(f"a length must be tokens such as 500, 4K or 1M, got {text!r}")
    return int(match[1]) * SIZES[match[2]]
