"""What a model costs at any length of its stream, worked out from its configuration."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import mlx.nn as nn

from mlx_sink.config import BITS, SinkConfig
from mlx_sink.errors import ConfigError, SinkError, UnsupportedModelError
from mlx_sink.measure import budget
from mlx_sink.measure import flops as work
from mlx_sink.models import checkpoint, settings
from mlx_sink.models import lazy as skeleton
from mlx_sink.models.attach import attach
from mlx_sink.models.report import LayerReport, Report

LENGTHS = (4 << 10, 32 << 10, 128 << 10, 1 << 20, 10 << 20)
"""Tokens of a stream."""

MEMORIES = (8, 16, 24, 32, 64, 128, 192)
"""Memory of Macs, in units of 2^30 bytes."""

NATIVE_STEP = 256
"""Tokens that mlx-lm's caches grow by; its chunked ones keep that much room for ever."""

NATIVE = ("window ring", "chunk ring")
"""Kinds of layers whose own window bounds them in mlx-lm too."""


@dataclass(frozen=True, slots=True)
class Costs:
    """The layers of a model, and what each holds and multiplies.

    Attributes:
        report: Of sinks and window.
        per_key: From `work.per_key`; ``None`` where MLX cannot count it.
        quantised: The reports of rings in so many bits, or why they are refused.
        weights: Bytes of the parameters.
        read: Bytes of them that a token reads: of experts, those that are chosen.
    """

    report: Report
    per_key: dict[int | None, work.PerKey] | None
    quantised: dict[int, Report | str]
    weights: int
    read: int

    @property
    def rings(self) -> list[LayerReport]:
        """The layers with full attention."""
        return [layer for layer in self.report.layers if layer.cache == "sink ring"]

    def full_bytes(self, tokens: int) -> int:
        """Return the bytes of mlx-lm's own caches after so many tokens of one sequence.

        Its caches grow by 256 tokens: the count is exact for multiples of that, once a token has
        been decoded.
        """
        chunked = (layer for layer in self.report.layers if layer.cache == "chunk ring")
        slack = sum(NATIVE_STEP * c.bytes_per_token for c in chunked if tokens > c.slots)
        return self._bytes(tokens, tokens) + slack

    def bounded_bytes(self, tokens: int, capacity: int) -> int:
        """Return the bytes of our caches after so many tokens, full attention bounded."""
        return self._bytes(tokens, min(tokens, capacity))

    def quantised_bytes(self, tokens: int, bits: int) -> int | None:
        """Return the bytes of quantised rings; the sinks stay as they are."""
        report = self.quantised[bits]
        if isinstance(report, str):
            return None
        total = 0
        for layer in report.layers:
            sinks, held = min(tokens, layer.sinks), min(tokens, layer.slots)
            total += sinks * layer.bytes_per_sink + (held - sinks) * layer.bytes_per_token
            total += layer.state_bytes
        return total

    def _bytes(self, tokens: int, in_rings: int) -> int:
        held = {"sink ring": in_rings, "state": 0}
        return sum(
            held.get(layer.cache, min(tokens, layer.slots)) * layer.bytes_per_token
            + layer.state_bytes
            for layer in self.report.layers
        )

    def decode_work(self, tokens: int, capacity: int | None = None) -> int | None:
        """Return the multiply-adds of attention for the token that is the ``tokens``-th.

        Args:
            tokens: Tokens of the stream so far, its own included.
            capacity: Tokens that full attention keeps; all of them if left out.
        """
        if self.per_key is None:
            return None
        return sum(
            cost.decode * min(tokens, limit) for limit, cost in self._limits(tokens, capacity)
        )

    def prefill_work(self, tokens: int, capacity: int | None = None) -> int | None:
        """Return the multiply-adds of attention for a whole prompt: of keys that are seen."""
        if self.per_key is None:
            return None
        return sum(
            cost.prefill * _pairs(tokens, limit) for limit, cost in self._limits(tokens, capacity)
        )

    def _limits(self, tokens: int, capacity: int | None) -> list[tuple[int, work.PerKey]]:
        own = tokens if capacity is None else capacity
        kinds = (self.per_key or {}).items()
        return [(own if window is None else window, cost) for window, cost in kinds]


def _pairs(tokens: int, limit: int) -> int:
    """Return how many pairs of a query and a visible key there are."""
    growing = min(tokens, limit)
    return growing * (growing + 1) // 2 + (tokens - growing) * limit


def costs_of(model: Any, config: SinkConfig | None = None) -> Costs:
    """Attach a model from `skeleton.build`, and find out what it costs.

    Raises:
        UnsupportedModelError, ConfigError: As in `attach`.
    """
    report = attach(model, config)
    quantised = {bits: _quantised(model, report.config, bits) for bits in BITS}
    weights = skeleton.weight_bytes(model)
    windows = {layer.slots for layer in report.layers if layer.cache in NATIVE}
    try:
        per_key = work.per_key(model, sorted(windows))
        read = work.step_of(model, work.after(model, 1), 1).read
    except UnsupportedModelError:
        per_key, read = None, weights
    return Costs(report, per_key, quantised, weights, read)


def _quantised(model: Any, config: SinkConfig, bits: int) -> Report | str:
    try:
        return attach(model, replace(config, kv_bits=bits))
    except SinkError as error:
        return str(error)


def plan(
    name: str,
    *,
    num_sinks: int | None = None,
    window: int | None = None,
    dtype: str | None = None,
    lengths: Sequence[int] = LENGTHS,
) -> tuple[dict[str, Any], Report]:
    """Work out what a model costs, from its configuration alone.

    Args:
        name: As in `skeleton.read_config`.
        num_sinks: As in `SinkConfig`.
        window: As in `SinkConfig`.
        dtype: Of the weights, if not that of the configuration.
        lengths: Tokens of the streams.

    Returns:
        A JSON-ready dictionary, and the report of `attach`. Bytes are of one sequence; values
        over tokens are in the order of ``lengths``, and ``None`` where they cannot be known.

    Raises:
        ModelError, UnsupportedModelError: From `skeleton`.
        ConfigError: The window is larger than the trained context.
    """
    read = skeleton.read_config(name)
    named = skeleton.dtype_of(read)
    model = skeleton.build(read, dtype)
    context = checkpoint.trained_context(model.args) or checkpoint.trained_context(read)
    config, _ = settings.apply(settings.Settings.of(read), context, num_sinks, window)
    costs = costs_of(model, config)
    capacity = config.capacity
    found = {
        "model": name,
        "dtype": dtype or named or skeleton.DEFAULT_DTYPE,
        "dtype_assumed": dtype is None and named is None,
        "notes": _notes(read, costs),
        "context": context,
        "weights": {"bytes": costs.weights, "read_by_a_token": costs.read},
        "report": costs.report.to_dict(),
        "bytes_per_token": sum(layer.bytes_per_token for layer in costs.rings),
        "lengths": list(lengths),
        "cache_bytes": {
            "full": [costs.full_bytes(n) for n in lengths],
            "window": [costs.bounded_bytes(n, config.window) for n in lengths],
            "sinks": [costs.bounded_bytes(n, capacity) for n in lengths],
            **{f"sinks_{b}bit": [costs.quantised_bytes(n, b) for n in lengths] for b in BITS},
        },
        "decode_multiply_adds": {
            "full": [costs.decode_work(n) for n in lengths],
            "sinks": [costs.decode_work(n, capacity) for n in lengths],
        },
        "prefill_multiply_adds": {
            "full": [costs.prefill_work(n) for n in lengths],
            "sinks": [costs.prefill_work(n, capacity) for n in lengths],
        },
        "fits": [_fit(model, costs, gib, context) for gib in MEMORIES],
        "chips": _bounds(costs, lengths),
    }
    return found, costs.report


def _notes(read: dict[str, Any], costs: Costs) -> list[str]:
    notes: list[str] = []
    if "quantization" not in read and "quantization_config" in read:
        notes.append("quantization_config is not followed: weights are counted unquantised")
    if costs.per_key is None:
        notes.append("MLX cannot count this model's multiply-adds; all experts count as read")
    reasons = {reason for reason in costs.quantised.values() if isinstance(reason, str)}
    return notes + [f"no quantised rings: {reason}" for reason in sorted(reasons)]


def working_set(gib: int) -> int:
    """Return the bytes that macOS recommends a program's GPU memory to stay within.

    By default that is two thirds of a Mac's memory, and three quarters from 36 GB on
    (``recommendedMaxWorkingSetSize`` of Metal).
    """
    whole = gib << 30
    return whole * 3 // 4 if gib >= 36 else whole * 2 // 3


def _fit(model: nn.Module, costs: Costs, gib: int, context: int | None) -> dict[str, Any]:
    room = working_set(gib) - costs.weights
    one, config = costs.report.nbytes, costs.report.config
    window = None
    if costs.rings and room > 0:
        with suppress(ConfigError):  # Not even a window of one token fits.
            found = budget.largest(model, working_set(gib), config, context=context)
            window = found.config.window
    return {
        "memory_gib": gib,
        "beside_weights": max(0, room),
        "full_tokens": _longest(costs, room),
        "streams": max(0, room // one) if one else None,
        "window": window,
    }


def _longest(costs: Costs, room: int) -> int | None:
    """Return the longest stream of full attention, or ``None`` if there is no longest."""
    per_token = sum(layer.bytes_per_token for layer in costs.rings)
    if not per_token:
        return None if costs.full_bytes(1 << 40) <= room else 0
    # From here on only layers with full attention grow.
    settled = max((layer.slots for layer in costs.report.layers), default=0)
    rest = room - costs.full_bytes(settled)
    if rest >= 0:
        return settled + rest // per_token
    below = [n for n in range(settled) if costs.full_bytes(n) <= room]
    return max(below, default=0)


def chips() -> list[dict[str, Any]]:
    """Return the bandwidth of each Apple chip, with where it is from."""
    data = json.loads(Path(__file__).with_name("chips.json").read_text(encoding="utf-8"))
    return [{**chip, "source": data["pages"][chip["source"]]} for chip in data["chips"]]


def _bounds(costs: Costs, lengths: Sequence[int]) -> list[dict[str, Any]]:
    """Return tokens per second that no chip can exceed: its bandwidth over what a token reads."""
    ours = costs.report.config.capacity

    def bound(chip: dict[str, Any], cache: int) -> float:
        return round(chip["gb_per_s"] * 1e9 / (costs.read + cache), 2)

    return [
        chip
        | {
            "full": [bound(chip, costs.full_bytes(n)) for n in lengths],
            "sinks": [bound(chip, costs.bounded_bytes(n, ours)) for n in lengths],
        }
        for chip in chips()
    ]
