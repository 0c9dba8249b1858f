"""Report what `attach` did: which cache each layer got, and how many bytes it will hold."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from itertools import pairwise
from typing import Any

from mlx_sink.cache.aligned import AlignedCache
from mlx_sink.cache.sink_cache import SinkCache
from mlx_sink.config import SinkConfig
from mlx_sink.io.units import format_bytes


@dataclass(frozen=True, slots=True)
class LayerReport:
    """One layer's cache.

    Attributes:
        index: The layer's place in the list of caches.
        cache: What it got: ``"sink ring"``; ``"window ring"`` in a layer with a sliding window of
            its own; ``"chunk ring"`` in one with chunked attention; ``"state"`` for what is
            recurrent, which mlx-lm keeps.
        attention: What multiplies queries and keys: ``"mlx_sink"``, or ``"model"`` where the
            model does that on its own and gets keys that are aligned.
        positions: ``"rope"``, or ``"none"`` for a layer without positions.
        slots: Tokens it holds when full, spare ones included.
        bytes_per_token: Keys and values of one token of one sequence; quantised, if it is no sink.
        sinks: Slots that are the sinks'.
        bytes_per_sink: Keys and values of a sink.
        state_bytes: Bytes that do not depend on the tokens, of one sequence.
        archive_blocks: Evicted blocks that it looks up when its archive is full; 0 without recall.
        spare_blocks: Those that the archive holds besides.
        bytes_per_block: Keys and values of one of them.
    """

    index: int
    cache: str
    attention: str
    positions: str
    slots: int
    bytes_per_token: int
    sinks: int = 0
    bytes_per_sink: int = 0
    state_bytes: int = 0
    archive_blocks: int = 0
    spare_blocks: int = 0
    bytes_per_block: int = 0

    @property
    def nbytes(self) -> int:
        """Bytes of a full cache for one sequence, without its archive."""
        ring = (self.slots - self.sinks) * self.bytes_per_token
        return ring + self.sinks * self.bytes_per_sink + self.state_bytes

    @property
    def archive_bytes(self) -> int:
        """Bytes of a full archive for one sequence."""
        return (self.archive_blocks + self.spare_blocks) * self.bytes_per_block


def report_of(index: int, cache: Any, blocks: int = 0) -> LayerReport:
    """Report what one cache will hold, from what it holds after a trace.

    Args:
        index: The layer.
        cache: A ring of ours, or a recurrent layer's cache of mlx-lm's.
        blocks: Evicted blocks that a layer that recalls may hold.
    """
    if not isinstance(cache, SinkCache):
        return LayerReport(index, "state", "-", "-", 0, 0, state_bytes=int(cache.nbytes))
    return LayerReport(
        index,
        _kind_of(cache),
        "model" if isinstance(cache, AlignedCache) else "mlx_sink",
        "none" if cache.rotation.is_identity else "rope",
        cache.ring.slots,
        cache.bytes_per_token,
        cache.ring.num_sinks,
        cache.bytes_per_sink,
        archive_blocks=blocks if cache.archive else 0,
        spare_blocks=cache.archive.size - cache.archive.limit if cache.archive else 0,
        bytes_per_block=cache.archive.bytes_per_block if cache.archive else 0,
    )


@dataclass(frozen=True, slots=True)
class Report:
    """The caches of a model, by layer; ``print(report)`` shows them as a table.

    `sources` says where each setting comes from: ``"argument"``, ``"config.json"`` (the model's
    ``mlx_sink`` section) or ``"default"``. It is empty where `attach` was called by hand.
    """

    model_type: str
    config: SinkConfig
    layers: tuple[LayerReport, ...]
    sources: Mapping[str, str] = field(default_factory=dict[str, str])

    @property
    def nbytes(self) -> int:
        """Bytes of all layers' full caches for one sequence, without their archives."""
        return sum(layer.nbytes for layer in self.layers)

    @property
    def archive_bytes(self) -> int:
        """Bytes of all layers' full archives for one sequence."""
        return sum(layer.archive_bytes for layer in self.layers)

    @property
    def recall(self) -> str:
        """What can be looked up, in one line; empty without recall."""
        c, layers = self.config, [layer for layer in self.layers if layer.archive_blocks]
        if not layers:
            return ""
        tokens = layers[0].archive_blocks * c.recall_block
        return (
            f"recall {c.recall} of the newest {tokens} evicted tokens, in {len(layers)} of "
            f"{len(self.layers)} layers ({format_bytes(self.archive_bytes)} when full)"
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the report as a JSON-ready dictionary."""
        return {
            "model_type": self.model_type,
            "config": self.config.to_dict(),
            "sources": dict(self.sources),
            "layers": [asdict(layer) | {"bytes": layer.nbytes} for layer in self.layers],
            "bytes": self.nbytes,
            "archive_bytes": self.archive_bytes,
        }

    def __str__(self) -> str:
        c = self.config
        lines = [
            f"{self.model_type}: {c.num_sinks} sinks + window {c.window} = {c.capacity} tokens"
            + f" + {c.rollback} spare slots" * (c.rollback > 0)
            + _quantised(c)
            + f", {format_bytes(self.nbytes)} when full",
            f"{'layers':>7}  {'cache':<11} {'attention':<9} {'positions':<9} {'slots':>7} "
            f"{'bytes/token':>12} {'bytes':>12}  which",
        ]
        if self.recall:
            lines.insert(1, self.recall)
        if self.sources:
            lines.insert(1, f"settings: {self.origin}")
        for layer, alike in _alike(self.layers):
            lines.append(
                f"{len(alike):>7}  {layer.cache:<11} {layer.attention:<9} {layer.positions:<9} "
                f"{layer.slots:>7} {layer.bytes_per_token:>12} "
                f"{layer.nbytes * len(alike):>12}  {_ranges(alike)}"
            )
        return "\n".join(lines)

    @property
    def origin(self) -> str:
        """The settings and where each comes from, in one line; empty if that is not known."""
        values = self.config.to_dict()
        return ", ".join(f"{key} {values[key]} ({self.sources[key]})" for key in self.sources)


def _kind_of(cache: SinkCache) -> str:
    if cache.ring.chunked:
        return "chunk ring"
    return "sink ring" if cache.ring.num_sinks else "window ring"


def _quantised(config: SinkConfig) -> str:
    k, v = config.bits
    if k is None:
        return ""
    bits = f"{k} bits" if k == v else f"{k} (keys) and {v} bits (values)"
    return f", quantised to {bits} in groups of {config.kv_group_size}"


def _alike(layers: tuple[LayerReport, ...]) -> list[tuple[LayerReport, list[int]]]:
    """Group layers that differ in nothing but their index, by the first of each kind."""
    kinds: dict[LayerReport, list[int]] = {}
    for layer in layers:
        kinds.setdefault(replace(layer, index=0), []).append(layer.index)
    return list(kinds.items())


def _ranges(indices: list[int]) -> str:
    """Format ascending indices: ``0-3``, or ``0, 2, ..., 22`` where the steps are equal."""
    steps = {b - a for a, b in pairwise(indices)}
    if len(indices) > 3 and len(steps) == 1 and steps != {1}:
        return f"{indices[0]}, {indices[1]}, ..., {indices[-1]}"
    runs: list[list[int]] = []
    for i in indices:
        if runs and i == runs[-1][-1] + 1:
            runs[-1].append(i)
        else:
            runs.append([i])
    return ", ".join(f"{r[0]}-{r[-1]}" if len(r) > 1 else f"{r[0]}" for r in runs)
