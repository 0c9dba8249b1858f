"""Which cache each layer gets, planned from what was seen of the model.

A plan holds for every size of the context: it says how a layer attends and how its keys are
rotated, not how many tokens it keeps. So the caches of a new stream, and those under which the
contract is checked, come from the same plan, and the model need not be watched again.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from mlx_sink.attention.rope import RopeCall, Rotation
from mlx_sink.cache.aligned import AlignedCache, Rows
from mlx_sink.cache.archive import Archive
from mlx_sink.cache.sink_cache import SinkCache
from mlx_sink.config import SinkConfig
from mlx_sink.errors import UnsupportedModelError
from mlx_sink.models.layers import Kind, bounded_caches, common_epoch
from mlx_sink.models.trace import CacheTrace, ModelTrace


@dataclass(frozen=True, slots=True)
class RingPlan:
    """What one ring is made of.

    Attributes:
        rotation: Of the queries.
        rows: What the layer keeps, if it multiplies queries and keys on its own.
        lends: Other layers attend to its rows too.
        limit: As in `SinkCache`; 0 for a layer that keeps no keys.
        window: The window that the model asks for, or 0 if it is that of mlx-lm's cache.
        layer: The place of the layer among the model's.
    """

    rotation: Rotation
    rows: Rows | None = None
    lends: bool = False
    limit: int | None = None
    window: int = 0
    layer: int = 0

    def cache(self, config: SinkConfig, kind: Kind, blocks: int) -> SinkCache:
        """Make the ring, empty.

        Args:
            config: What to keep.
            kind: Of the layer.
            blocks: Evicted blocks that may be held, if the layer recalls.
        """
        config = replace(config, window=max(config.window, self.window))
        if self.rows is not None:
            # Its keys stand where the model wants them; blocks of others cannot come between.
            config = replace(config, recall=0)
            return AlignedCache(config, self.rotation, self.rows, limit=self.limit)
        layers = config.recall_layers
        recalls = config.recall > 0 and (layers is None or self.layer in layers)
        return SinkCache(
            config,
            self.rotation,
            lends=self.lends,
            limit=self.limit,
            chunked=kind is Kind.CHUNK,
            archive=Archive(config, self.rotation, blocks) if recalls else None,
        )


@dataclass(frozen=True, slots=True)
class CachePlan:
    """The caches of a model.

    Attributes:
        native: Empty caches as mlx-lm gives them, one for each layer.
        rings: One for each of those that would grow, in order, groups one by one.
        limit: Positions from which on the model would compute something else, or ``None``.
        farthest: The largest position up to which the model was watched.
        blocks: Evicted blocks that a layer holds, if it recalls; ``None`` for as many as are
            looked up at once.
    """

    native: tuple[Any, ...]
    rings: tuple[RingPlan, ...]
    limit: int | None
    farthest: int
    blocks: int | None = None

    def caches(self, config: SinkConfig) -> list[Any]:
        """Make empty caches, one for each layer; the model is not called.

        Args:
            config: What to keep.

        Raises:
            UnsupportedModelError: The rings do not fit below `limit`.
        """
        rings = iter(self.rings)
        blocks = config.recall // config.recall_block if self.blocks is None else self.blocks

        def make(config: SinkConfig, kind: Kind) -> SinkCache:
            return next(rings).cache(config, kind, blocks)

        config = common_epoch(self.native, config, self.limit)
        return bounded_caches(copy.deepcopy(self.native), config, make)

    @property
    def aligns(self) -> bool:
        """Whether the model's rotary embeddings must turn queries for an `AlignedCache`."""
        return any(ring.rows is not None and not ring.rotation.is_identity for ring in self.rings)


def plan_caches(trace: ModelTrace) -> CachePlan:
    """Plan the cache of every layer.

    Raises:
        UnsupportedModelError: A layer does something that no cache serves.
    """
    rotations, windows = _Rotations(trace.farthest), _windows(trace.chunk)
    rings: list[RingPlan] = []
    for chunk, token in zip(trace.chunk, trace.token, strict=True):
        try:
            ring = _ring(chunk, token, rotations, trace.limit)
        except UnsupportedModelError as error:
            raise UnsupportedModelError(f"{error} (layer {chunk.layer})") from None
        window = windows.get(chunk.length, 0)
        rings.append(replace(ring, window=window, layer=chunk.layer))
    return CachePlan(trace.native, tuple(rings), trace.limit, trace.farthest)


def _windows(traces: Iterable[CacheTrace]) -> dict[int, int]:
    """Return the window that the model asks for in its masks, for each that its caches have.

    A mask is asked of one cache and serves every layer of its kind.
    """
    windows: dict[int, int] = {}
    for trace in traces:
        windows[trace.length] = max(windows.get(trace.length, 0), trace.window)
    return windows


def _ring(
    chunk: CacheTrace, token: CacheTrace, rotations: _Rotations, limit: int | None
) -> RingPlan:
    """Plan one ring from what was seen of it in the two calls."""
    if not chunk.calls and not token.calls:
        return RingPlan(rotations.of(None), limit=0)
    if chunk.calls != 1 or token.calls != 1:
        raise UnsupportedModelError("keys are not taken in once for each call")
    rope = chunk.rope
    if not _is_same(rope, token.rope):
        raise UnsupportedModelError(
            "its position embedding is not a fixed rotation: it changes with the position"
        )
    lends = chunk.lends or token.lends
    if chunk.attended and token.attended and not chunk.rotated:
        return RingPlan(rotations.of(rope, chunk.keys[-1]), lends=lends, limit=limit)
    if lends:
        raise UnsupportedModelError("it multiplies queries and keys in a way that is not known")
    widths = chunk.keys[-1], chunk.values[-1]
    rows = Rows(
        widths,
        chunk.rotated,
        positions=rotations.of(rope, widths[chunk.rotated]),
        in_chunks=rotations.of(rope, chunk.attended_width) if chunk.attended else None,
    )
    return RingPlan(rotations.of(rope), rows, limit=limit)


def _is_same(rope: RopeCall | None, other: RopeCall | None) -> bool:
    if rope is None or other is None:
        return rope is other
    return rope.is_like(other)


class _Rotations:
    """The rotations of a model, each checked; layers with equal ones share the object."""

    def __init__(self, farthest: int):
        self._farthest = farthest
        self._checked: dict[object, Rotation] = {}

    def of(self, rope: RopeCall | None, width: int = 0) -> Rotation:
        """Return the rotation of an embedding, in rows of a width; see `Rotation.of`."""
        rotation = Rotation.of(rope, width)
        width = max(width, 0 if rope is None else rope.width)
        frequencies = rotation.frequencies.tobytes()
        key = (width, rotation.start, rotation.interleaved, frequencies)
        if key not in self._checked:
            if rope is not None:
                Rotation.of(rope).check(rope, rope.width, self._farthest)
            self._checked[key] = rotation
        return self._checked[key]
