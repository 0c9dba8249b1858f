"""What is known of single architectures of mlx-lm; nothing else in mlx_sink knows one by name.

An architecture is a module of ``mlx_lm.models``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.nn as nn

# fmt: off
VERIFIED = frozenset({
    "gemma", "granite", "llama", "mixtral", "olmo2", "phi3", "qwen2", "qwen3", "smollm3",
    "stablelm", "starcoder2",
})
# fmt: on
"""Architectures for which the tests show the contract. Any other is put to the proof by `attach`.
"""

REFUSED: dict[str, str] = {}
"""Architectures that cannot keep the contract, and why."""


def _scaled_from(args: Any) -> int | None:
    """Return where a model's attention begins to grow with the logarithm of the position."""
    parameters = getattr(args, "rope_parameters", None) or {}
    return parameters.get("original_max_position_embeddings")


_LIMITS: dict[str, Callable[[Any], int | None]] = {
    "ministral3": _scaled_from,
    "mistral4": _scaled_from,
}


def refusal(name: str | None) -> str | None:
    """Return why an architecture is refused without a look at the model, or ``None``."""
    return None if name is None else REFUSED.get(name)


def position_limit(model: nn.Module) -> int | None:
    """Return the positions below which a model computes the same at each, if there is an end."""
    limits: list[int] = []
    for module in model.modules():
        limit = _LIMITS.get(type(module).__module__.rpartition(".")[2])
        args = getattr(module, "args", None)
        if limit is not None and args is not None:
            limits += [n for n in [limit(args)] if n is not None]
    return min(limits, default=None)
