"""The seam to mlx-lm: give a model bounded caches, and see that it uses them."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import mlx.nn as nn

from mlx_sink.attention.rope import RopeCall, Rotation
from mlx_sink.cache.aligned import AlignedCache, Rows, align_ropes, restore_ropes
from mlx_sink.cache.group import leaves
from mlx_sink.cache.sink_cache import SinkCache
from mlx_sink.config import SinkConfig
from mlx_sink.errors import CacheError, UnsupportedModelError
from mlx_sink.models.architectures import VERIFIED, position_limit, refusal
from mlx_sink.models.checkpoint import trained_context
from mlx_sink.models.hook import hook
from mlx_sink.models.layers import bounded_caches, common_epoch, native_caches
from mlx_sink.models.report import LayerReport, Report, report_of
from mlx_sink.models.trace import Seen, WatchedCache, trace, watch
from mlx_sink.models.verify import verify

AHEAD = 2048
"""Tokens of a call up to which positions are checked beyond the epoch: mlx-lm's default."""


@dataclass(frozen=True, slots=True)
class _Plan:
    """What one ring is made of, found by watching the model.

    Attributes:
        rotation: Of the queries.
        rows: What the layer keeps, if it multiplies queries and keys on its own.
        lends: Other layers attend to its rows too.
        limit: As in `SinkCache`; 0 for a layer that keeps no keys.
        window: The window that the model asks for, or 0 if it is that of mlx-lm's cache.
    """

    rotation: Rotation
    rows: Rows | None = None
    lends: bool = False
    limit: int | None = None
    window: int = 0

    def cache(self, config: SinkConfig, chunked: bool) -> SinkCache:
        config = replace(config, window=max(config.window, self.window))
        if self.rows is not None:
            return AlignedCache(config, self.rotation, self.rows, limit=self.limit)
        flags = {"lends": self.lends, "chunked": chunked}
        return SinkCache(config, self.rotation, limit=self.limit, **flags)


class _MakeCache:
    """The ``make_cache`` that an attached model carries.

    Args:
        config: What was asked for.
        effective: The same, with the epoch that serves every ring of the model.
        native: Empty caches as mlx-lm gives them.
        plans: One for each ring, in order.
        farthest: The largest position that the model will see.
    """

    def __init__(
        self,
        config: SinkConfig,
        effective: SinkConfig,
        native: Sequence[Any],
        plans: Sequence[_Plan],
        farthest: int,
    ):
        self.config = config
        self.farthest = farthest
        self._effective = effective
        self._native = native
        self._plans = plans

    def __call__(self) -> list[Any]:
        plans, native = iter(self._plans), copy.deepcopy(self._native)

        def make(config: SinkConfig, chunked: bool) -> SinkCache:
            return next(plans).cache(config, chunked)

        return bounded_caches(native, self._effective, make)


def attach(model: nn.Module, config: SinkConfig | None = None) -> Report:
    """Give an mlx-lm model caches of fixed size, in place.

    Sets ``model.make_cache``, so that everything built on mlx-lm (its generate, chat and
    server, ``make_prompt_cache``) gets the bounded caches without knowing. The weights are not
    changed, and not loaded unless the architecture is one that mlx_sink does not know: then the
    contract is put to the proof on the model itself. Attaching again replaces the settings of
    caches made later.

    Args:
        model: A model from ``mlx_lm.load``.
        config: What to keep; by default 4 sinks and a window of 1,024 tokens, or as much as
            the model's trained context holds.

    Returns:
        Which layer got what, and its bytes.

    Raises:
        UnsupportedModelError: The contract cannot be kept for this model.
        ConfigError: The capacity exceeds the model's trained context.
    """
    context = trained_context(getattr(model, "args", None))
    config = config or SinkConfig.for_context(context)
    config.check_context(context)
    detach(model)
    try:
        reason = refusal(_architecture(model))
        if reason is not None:
            raise UnsupportedModelError(reason)
        make = _planned(model, config)
        caches = make()
        _check_rollback(caches, config)
        trace(model, caches, 2)
        layers = _report(caches)
        if not _is_verified(model):
            verify(model, lambda c: _planned(model, c)(), make.farthest)
    except UnsupportedModelError as error:
        restore_ropes(model)
        raise UnsupportedModelError(f"{_name(model)} is not supported: {error}") from None
    model.make_cache = make
    return Report(_name(model), config, layers)


def detach(model: nn.Module) -> None:
    """Take back what `attach` did: new caches of the model are mlx-lm's own again.

    The hook stays in the model's module, where it passes every other cache through.
    """
    if isinstance(model.__dict__.get("make_cache"), _MakeCache):
        del model.make_cache
    restore_ropes(model)


def make_cache(model: nn.Module) -> list[Any]:
    """Return empty caches for a new stream, one for each layer of an attached model.

    Raises:
        CacheError: The model is not attached.
    """
    make = model.__dict__.get("make_cache")
    if not isinstance(make, _MakeCache):
        raise CacheError("the model has no bounded cache: call mlx_sink.attach(model) first")
    return make()


def _name(model: nn.Module) -> str:
    return str(getattr(model, "model_type", type(model).__module__.rpartition(".")[2]))


def _architecture(model: nn.Module) -> str | None:
    """Return the model's module in mlx-lm, or ``None`` if it is from elsewhere."""
    package, _, name = type(model).__module__.rpartition(".")
    return name if package == "mlx_lm.models" else None


def _is_verified(model: nn.Module) -> bool:
    """Tell whether all of a model is an architecture's that the tests verify."""
    parts = cast("list[nn.Module]", model.modules())
    packages = {type(part).__module__.partition(".")[0] for part in parts}
    return _architecture(model) in VERIFIED and packages <= {"mlx", "mlx_lm"}


def _planned(model: nn.Module, config: SinkConfig) -> _MakeCache:
    """Watch the model, and plan the cache of every layer."""
    native, limit = native_caches(model), position_limit(model)
    effective = common_epoch(native, config, limit)
    farthest = effective.epoch_length + AHEAD
    if limit is not None:
        farthest = min(farthest, limit - 1)
    hook(model)

    def watched() -> list[Any]:
        return bounded_caches(copy.deepcopy(native), effective, WatchedCache)

    rings = [(i, ring) for i, cache in enumerate(watched()) for ring in _rings([cache])]
    near, far = watch(model, watched, farthest)
    rotations = _Rotations(farthest)
    windows = _windows(zip([ring for _, ring in rings], near, strict=True))
    plans: list[_Plan] = []
    for (i, ring), a, b in zip(rings, near, far, strict=True):
        try:
            plan = _plan(a, b, rotations)
        except UnsupportedModelError as error:
            raise UnsupportedModelError(f"{error} (layer {i})") from None
        if plan.limit is None:
            plan = replace(plan, limit=limit)
        if not ring.ring.num_sinks:
            plan = replace(plan, window=windows.get(ring.ring.window, 0))
        plans.append(plan)
    if any(plan.rows is not None and not plan.rotation.is_identity for plan in plans):
        align_ropes(model)
    return _MakeCache(config, effective, native, plans, farthest)


def _windows(rings: Iterable[tuple[SinkCache, Seen]]) -> dict[int, int]:
    """Return the window that the model asks for in its masks, for each that its caches have.

    A mask is asked of one cache and serves every layer of its kind.
    """
    windows: dict[int, int] = {}
    for cache, seen in rings:
        window = cache.ring.window
        windows[window] = max(windows.get(window, 0), seen.window)
    return windows


def _plan(near: Seen, far: Seen, rotations: _Rotations) -> _Plan:
    if not near.calls and not far.calls:
        return _Plan(rotations.of(None), limit=0)
    if near.calls != 1 or far.calls != 1:
        raise UnsupportedModelError("keys are not taken in once for each call")
    rope = near.rope
    if (rope is None) != (far.rope is None) or (rope and not rope.is_like(cast("Any", far.rope))):
        raise UnsupportedModelError(
            "its position embedding is not a fixed rotation: it changes with the position"
        )
    lends = near.lends or far.lends
    if near.attended and far.attended and not near.rotated:
        return _Plan(rotations.of(rope, near.keys[-1]), lends=lends)
    if lends:
        raise UnsupportedModelError("it multiplies queries and keys in a way that is not known")
    widths = near.keys[-1], near.values[-1]
    positions = rotations.of(rope, widths[near.rotated])
    in_chunks = rotations.of(rope, near.made) if near.attended else None
    return _Plan(rotations.of(rope), Rows(widths, near.rotated, positions, in_chunks))


def _check_rollback(caches: Sequence[Any], config: SinkConfig) -> None:
    """Raise if tokens are to be taken back, and a layer's cache cannot do that."""
    for i, cache in enumerate(caches):
        if config.rollback and not cache.is_trimmable():
            raise UnsupportedModelError(
                f"layer {i} has a {type(cache).__name__}, which cannot take tokens back: "
                f"leave rollback ({config.rollback}) and draft models out"
            )


class _Rotations:
    """The rotations of a model, each checked; layers with equal ones share the object."""

    def __init__(self, farthest: int):
        self._farthest = farthest
        self._known: dict[object, Rotation] = {}

    def of(self, rope: RopeCall | None, width: int = 0) -> Rotation:
        rotation = Rotation.of(rope, width)
        width = max(width, 0 if rope is None else rope.width)
        angles = rotation.interleaved, rotation.frequencies.tobytes()
        key = (width, rotation.start, *angles)
        if key not in self._known:
            if rope is not None:
                Rotation.of(rope).check(rope, rope.width, self._farthest)
            self._known[key] = rotation
        return self._known[key]


def _rings(caches: Sequence[Any]) -> list[SinkCache]:
    return [cache for cache in leaves(caches) if isinstance(cache, SinkCache)]


def _report(caches: Sequence[Any]) -> tuple[LayerReport, ...]:
    """Report what caches that a model was traced with hold when they are full."""
    reports: list[LayerReport] = []
    for i, cache in enumerate(caches):
        for part in leaves([cache]):
            if isinstance(part, SinkCache) and part.empty():
                continue
            if isinstance(part, SinkCache) and part.is_pending:
                raise UnsupportedModelError(f"layer {i} does not attend to the keys it keeps")
            reports.append(report_of(i, part))
    return tuple(reports)
