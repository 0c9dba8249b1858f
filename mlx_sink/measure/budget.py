"""The largest window that fits into a number of bytes.

The bytes are those that MLX holds at its peak: the weights, the full caches, and the workspace of
the largest step. Python and its libraries come on top, some 100 MB.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn

from mlx_sink.attention import recall
from mlx_sink.attention.dispatch import BLOCK
from mlx_sink.config import DEFAULT_NUM_SINKS, PREFILL_STEP, SinkConfig
from mlx_sink.errors import ConfigError, UnsupportedModelError
from mlx_sink.io.units import format_bytes
from mlx_sink.models.attach import attach
from mlx_sink.models.checkpoints.checkpoint import trained_context
from mlx_sink.models.lazy import parameters, weight_bytes
from mlx_sink.models.report import Report

IN_FLIGHT = 16
"""Arrays of scores that exist at one time: MLX works ten operations ahead."""

LONGEST = 1 << 20
"""Tokens of a window at most, for a model that does not say what it was trained on."""


@dataclass(frozen=True, slots=True)
class Budget:
    """How a number of bytes is spent; ``print(budget)`` shows it.

    Attributes:
        limit: The bytes there are.
        config: The largest context that fits.
        report: What each layer gets, for one sequence.
        weights: Bytes of the model.
        cache: Bytes of the full caches of all sequences.
        workspace: Bytes that the largest step needs besides, estimated from above.
    """

    limit: int
    config: SinkConfig
    report: Report
    weights: int
    cache: int
    workspace: int

    @property
    def total(self) -> int:
        """Bytes that are needed at the most."""
        return self.weights + self.cache + self.workspace

    def to_dict(self) -> dict[str, Any]:
        """Return the budget as a JSON-ready dictionary."""
        parts = {"weights": self.weights, "cache": self.cache, "workspace": self.workspace}
        return {"limit": self.limit, **parts, "total": self.total, "report": self.report.to_dict()}

    def __str__(self) -> str:
        parts = [
            f"weights {format_bytes(self.weights)}",
            f"cache {format_bytes(self.cache)}",
            f"workspace up to {format_bytes(self.workspace)}",
        ]
        return (
            f"{self.report}\n{' + '.join(parts)} = {format_bytes(self.total)} "
            f"of {format_bytes(self.limit)}"
        )


def plan(
    model: nn.Module,
    limit: int,
    config: SinkConfig | None = None,
    *,
    context: int | None = None,
    batch: int = 1,
    prefill_step_size: int = PREFILL_STEP,
) -> Budget:
    """Find the largest window that fits, and attach the model with it.

    Args:
        model: A model from ``mlx_lm.load``; its weights count as they are.
        limit: Bytes that MLX may hold.
        config: Everything but the window; by default 4 sinks.
        context: Positions the model was trained on, in tokens; by default what its ``args`` say.
            Not every model of mlx-lm keeps them there; config.json has them.
        batch: Sequences that run together.
        prefill_step_size: Tokens read at once.

    Returns:
        The budget; its `config` is what the model is attached with.

    Raises:
        ConfigError: No window fits, or the device has less memory than that.
        UnsupportedModelError: As in `attach`.
    """
    _check_device(limit)
    step = prefill_step_size
    return largest(model, limit, config, context=context, batch=batch, prefill_step_size=step)


def largest(
    model: nn.Module,
    limit: int,
    config: SinkConfig | None = None,
    *,
    context: int | None = None,
    batch: int = 1,
    prefill_step_size: int = PREFILL_STEP,
) -> Budget:
    """Find the window as `plan` does, for a device that need not be this one."""
    base = config or SinkConfig(DEFAULT_NUM_SINKS, 1)
    weights = weight_bytes(model)

    def of(window: int) -> Budget:
        sized = replace(base, window=window)
        report = attach(model, sized)
        room = batch * workspace(model, sized, report, prefill_step_size)
        cache = batch * report.nbytes + report.archive_bytes
        return Budget(limit, sized, report, weights, cache, room)

    def fitting(window: int) -> Budget | None:
        try:
            budget = of(window)
        except UnsupportedModelError:  # The model does not support a window this long.
            return None
        return budget if budget.total <= limit else None

    context = context or trained_context(getattr(model, "args", None)) or LONGEST
    least = base.block
    smallest, most = of(least), max(least, context - base.seen + base.window)
    if smallest.total > limit:
        raise ConfigError(_too_small(smallest, of(min(most, 1024)), limit))
    # Bytes grow with the window: try all of the context, then halve the interval.
    best, too_large, window = smallest, most + 1, most
    while too_large - best.config.window > 1:
        budget = fitting(window)
        if budget is None:
            too_large = window
        else:
            best = budget
        window = (best.config.window + too_large) // 2
    attach(model, best.config)
    return best


def check(model: nn.Module, limit: int, config: SinkConfig, prefill_step_size: int) -> Budget:
    """Attach a model with a given window, if it fits; arguments and errors as in `plan`."""
    _check_device(limit)
    report = attach(model, config)
    room = workspace(model, config, report, prefill_step_size)
    cache = report.nbytes + report.archive_bytes
    budget = Budget(limit, config, report, weight_bytes(model), cache, room)
    if budget.total > limit:
        raise ConfigError(
            f"--memory {format_bytes(limit)} is not enough for a window of {config.window}: "
            f"{format_bytes(budget.total)} is ({_parts(budget)})"
        )
    return budget


def workspace(model: nn.Module, config: SinkConfig, report: Report, step: int) -> int:
    """Return the bytes that a step needs at the most besides weights and caches.

    An upper bound for one sequence, compared with what MLX held on a CPU: up to `IN_FLIGHT` arrays
    of a block's scores; the outputs of a layer's matrices for a chunk, two and a half times; the
    rows that the chunk attends to in the layer that holds most, three times; the scores of some
    queries over a full archive, twice; and the logits of a token, eight times.
    """
    layers = cast("list[nn.Module]", model.layers)
    size = max(_sizes(model))
    width = max((_outputs(layer) for layer in layers), default=0)
    row = max((layer.bytes_per_token for layer in report.layers), default=0)
    heads = max((_heads(layer) for layer in layers), default=1)
    scores = 4 * heads * min(BLOCK, step) * (config.capacity + BLOCK)
    at_once = min(IN_FLIGHT, 4 * -(-step // BLOCK))
    rows = (config.capacity + step) * row
    logits = 4 * _vocabulary(model)
    blocks = max((layer.archive_blocks for layer in report.layers), default=0)
    looked_up = 2 * 4 * heads * min(recall.BLOCK, step) * blocks * config.recall_block
    return at_once * scores + 5 * size * step * width // 2 + 3 * rows + looked_up + 8 * logits


def _sizes(model: nn.Module) -> set[int]:
    """Return the bytes of a number in each type that activations may have."""
    floats = {w.itemsize for _, w in parameters(model) if mx.issubdtype(w.dtype, mx.floating)}
    return floats or {4}


def _outputs(layer: nn.Module) -> int:
    """Return how many outputs the matrices of a layer have for one token; all experts count."""
    matrices = [w for name, w in parameters(layer) if name.endswith("weight") and w.ndim > 1]
    return sum(w.size // w.shape[-1] for w in matrices)


def _heads(layer: nn.Module) -> int:
    """Return the query heads of a layer; models call them by two names."""
    modules = [module for _, module in layer.named_modules()]
    counts = [getattr(module, name, 0) for module in modules for name in ("n_heads", "num_heads")]
    return max(n for n in [1, *counts] if isinstance(n, int))


def _vocabulary(model: nn.Module) -> int:
    return max((w.shape[0] for _, w in parameters(model) if w.ndim > 1), default=0)


def _check_device(limit: int) -> None:
    most = _recommended()
    if most is not None and limit > most:
        raise ConfigError(
            f"--memory {format_bytes(limit)} is more than this device recommends for one "
            f"program: use at most {format_bytes(most)}"
        )


def _recommended() -> int | None:
    """Return the recommended working set of a Metal device, in bytes."""
    if not mx.metal.is_available():
        return None
    most = mx.device_info().get("max_recommended_working_set_size")
    return most if isinstance(most, int) else None


def _parts(budget: Budget) -> str:
    return (
        f"weights {format_bytes(budget.weights)}, cache {format_bytes(budget.cache)}, "
        f"workspace {format_bytes(budget.workspace)}"
    )


def _too_small(smallest: Budget, usual: Budget, limit: int) -> str:
    return (
        f"--memory {format_bytes(limit)} does not hold this model with any window: "
        f"{format_bytes(smallest.total)} holds a window of {smallest.config.window} "
        f"({_parts(smallest)}), {format_bytes(usual.total)} one of {usual.config.window}"
    )
