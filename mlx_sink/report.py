"""What `attach` did to a model: which layer got which cache, and how many bytes it will hold."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from mlx_sink.config import SinkConfig


@dataclass(frozen=True, slots=True)
class LayerReport:
    """One layer's cache.

    Attributes:
        index: The layer's place in ``model.layers``.
        cache: What it got: ``"sink ring"``.
        positions: ``"rope"``, or ``"none"`` for a layer without positions.
        slots: Tokens it holds when full.
        bytes_per_token: Keys and values of one token of one sequence.
    """

    index: int
    cache: str
    positions: str
    slots: int
    bytes_per_token: int

    @property
    def nbytes(self) -> int:
        """Bytes of a full cache for one sequence."""
        return self.slots * self.bytes_per_token


@dataclass(frozen=True, slots=True)
class Report:
    """What a model got; ``print(report)`` shows it as a table.

    `sources` says where each setting comes from: ``"argument"``, ``"config.json"`` (the model's
    ``mlx_sink`` section) or ``"default"``. It is empty where `attach` was called by hand.
    """

    model_type: str
    config: SinkConfig
    layers: tuple[LayerReport, ...]
    sources: Mapping[str, str] = field(default_factory=dict[str, str])

    @property
    def nbytes(self) -> int:
        """Bytes of all layers' full caches for one sequence."""
        return sum(layer.nbytes for layer in self.layers)

    def to_dict(self) -> dict[str, Any]:
        """Return the report as a JSON-ready dictionary."""
        return {
            "model_type": self.model_type,
            "config": self.config.to_dict(),
            "sources": dict(self.sources),
            "layers": [asdict(layer) | {"bytes": layer.nbytes} for layer in self.layers],
            "bytes": self.nbytes,
        }

    def __str__(self) -> str:
        c = self.config
        lines = [
            f"{self.model_type}: {c.num_sinks} sinks + window {c.window} = {c.capacity} tokens, "
            f"{format_bytes(self.nbytes)} when full",
            f"{'layers':>9}  {'cache':<10} {'positions':<10} {'slots':>7} {'bytes/token':>12} "
            f"{'bytes':>12}",
        ]
        if self.sources:
            lines.insert(1, f"settings: {self.origin}")
        for first, last in _alike(self.layers):
            layer = self.layers[first]
            name = f"{first}" if first == last else f"{first}-{last}"
            lines.append(
                f"{name:>9}  {layer.cache:<10} {layer.positions:<10} {layer.slots:>7} "
                f"{layer.bytes_per_token:>12} {layer.nbytes * (last - first + 1):>12}"
            )
        return "\n".join(lines)

    @property
    def origin(self) -> str:
        """The settings and where they come from, in one line; empty if that is not known."""
        values = self.config.to_dict()
        return ", ".join(f"{key} {values[key]} ({self.sources[key]})" for key in self.sources)


def format_bytes(n: float) -> str:
    """Write a number of bytes for people, in units of 1000."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if n < 1000 or unit == "GB":
            break
        n /= 1000
    return f"{n:.0f} bytes" if unit == "bytes" else f"{n:.2f} {unit}"


def _alike(layers: tuple[LayerReport, ...]) -> list[tuple[int, int]]:
    """Group neighbouring layers that differ in nothing but their index."""
    groups: list[tuple[int, int]] = []
    for i, layer in enumerate(layers):
        if groups and _kind(layers[groups[-1][0]]) == _kind(layer):
            groups[-1] = (groups[-1][0], i)
        else:
            groups.append((i, i))
    return groups


def _kind(layer: LayerReport) -> tuple[object, ...]:
    return layer.cache, layer.positions, layer.slots, layer.bytes_per_token
