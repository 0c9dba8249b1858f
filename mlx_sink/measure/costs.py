"""What a model costs at any length of its stream: bytes and multiply-adds, layer by layer."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from mlx_sink.config import BITS, SinkConfig
from mlx_sink.errors import SinkError, UnsupportedModelError
from mlx_sink.measure import flops
from mlx_sink.models.attach import attach
from mlx_sink.models.lazy import weight_bytes
from mlx_sink.models.report import LayerReport, Report

NATIVE_STEP = 256
"""Tokens that mlx-lm's caches grow by; its chunked ones keep that much spare room for ever."""

NATIVE = ("window ring", "chunk ring")
"""Kinds of layers whose own window bounds them in mlx-lm too."""


@dataclass(frozen=True, slots=True)
class Costs:
    """What the layers of a model hold and multiply, at any length of the stream.

    Attributes:
        report: What each layer gets for sinks and window.
        per_key: From `flops.per_key`; ``None`` where MLX cannot count it.
        quantised: By bits: the report of quantised rings, or why they are refused.
        weights: Bytes of the parameters.
        read: Bytes of the parameters that a token reads: of experts, those that are chosen.
    """

    report: Report
    per_key: dict[int | None, flops.PerKey] | None
    quantised: dict[int, Report | str]
    weights: int
    read: int

    @property
    def rings(self) -> list[LayerReport]:
        """The layers with full attention."""
        return [layer for layer in self.report.layers if layer.cache == "sink ring"]

    def full_bytes(self, tokens: int) -> int:
        """Return the bytes of mlx-lm's own caches after so many tokens of one sequence.

        These caches grow by 256 tokens at a time: the count is exact for multiples of that, once
        a token has been decoded.
        """
        chunked = (layer for layer in self.report.layers if layer.cache == "chunk ring")
        spare = sum(NATIVE_STEP * c.bytes_per_token for c in chunked if tokens > c.slots)
        return self._bytes(tokens, tokens) + spare

    def bounded_bytes(self, tokens: int, capacity: int) -> int:
        """Return the bytes of caches whose layers with full attention keep so many tokens."""
        return self._bytes(tokens, min(tokens, capacity))

    def quantised_bytes(self, tokens: int, bits: int) -> int | None:
        """Return the bytes of quantised rings, or ``None`` where they are refused."""
        report = self.quantised[bits]
        if isinstance(report, str):
            return None
        total = 0
        for layer in report.layers:
            sinks, slots = min(tokens, layer.sinks), min(tokens, layer.slots)
            total += sinks * layer.bytes_per_sink + (slots - sinks) * layer.bytes_per_token
            total += layer.state_bytes
        return total

    def _bytes(self, tokens: int, in_rings: int) -> int:
        kept = {"sink ring": in_rings, "state": 0}
        return sum(
            kept.get(layer.cache, min(tokens, layer.slots)) * layer.bytes_per_token
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
        """Return the multiply-adds of attention for a whole prompt: of visible keys only."""
        if self.per_key is None:
            return None
        return sum(
            cost.prefill * _pairs(tokens, limit) for limit, cost in self._limits(tokens, capacity)
        )

    def _limits(self, tokens: int, capacity: int | None) -> list[tuple[int, flops.PerKey]]:
        """Return how many keys each kind of layer sees at the most, and what a key costs it."""
        full = tokens if capacity is None else capacity
        kinds = (self.per_key or {}).items()
        return [(full if window is None else window, cost) for window, cost in kinds]


def _pairs(tokens: int, limit: int) -> int:
    """Return the pairs of a query and a visible key, where a query sees ``limit`` keys."""
    growing = min(tokens, limit)
    return growing * (growing + 1) // 2 + (tokens - growing) * limit


def costs_of(model: Any, config: SinkConfig | None = None) -> Costs:
    """Attach a model from `lazy.build`, and count what it costs.

    Raises:
        UnsupportedModelError, ConfigError: As in `attach`.
    """
    weights = weight_bytes(model)  # before a forward pass: Gemma 3n's casts some
    report = attach(model, config)
    quantised = {bits: _quantised(model, report.config, bits) for bits in BITS}
    windows = {layer.slots for layer in report.layers if layer.cache in NATIVE}
    try:
        per_key = flops.per_key(model, sorted(windows))
        read = flops.step_of(model, flops.after(model, 1), 1).read
    except UnsupportedModelError:
        per_key, read = None, weights
    return Costs(report, per_key, quantised, weights, read)


def _quantised(model: Any, config: SinkConfig, bits: int) -> Report | str:
    try:
        return attach(model, replace(config, kv_bits=bits))
    except SinkError as error:
        return str(error)
