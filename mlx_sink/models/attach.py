"""Attach to a model of mlx-lm: watch it, plan its caches, and have it make them from then on."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import mlx.nn as nn

from mlx_sink.cache.aligned import align_ropes, restore_ropes
from mlx_sink.cache.group import leaves
from mlx_sink.cache.rewindable import rollback_of
from mlx_sink.cache.sink_cache import SinkCache
from mlx_sink.config import SinkConfig
from mlx_sink.errors import CacheError, ConfigError, UnsupportedModelError
from mlx_sink.io.units import format_bytes
from mlx_sink.models.architectures import VERIFIED, refusal
from mlx_sink.models.cache_plan import CachePlan, plan_caches
from mlx_sink.models.checkpoints.checkpoint import trained_context
from mlx_sink.models.hook import hook
from mlx_sink.models.layers import size_asked_for
from mlx_sink.models.report import LayerReport, Report, report_of
from mlx_sink.models.trace import dry_run, watch
from mlx_sink.models.verify import verify


@dataclass(frozen=True, slots=True)
class _MakeCache:
    """The ``make_cache`` that an attached model carries: it calls no model.

    Attributes:
        config: What was asked for.
        plan: Which cache each layer gets.
    """

    config: SinkConfig
    plan: CachePlan

    def __call__(self) -> list[Any]:
        size, capacity = size_asked_for(inspect.currentframe()), self.config.capacity
        if size not in (None, capacity):
            warnings.warn(
                f"max_kv_size={size} is not used: attach(model, SinkConfig(window=...)) fixes the "
                f"size of a sink cache, here to num_sinks + window = {capacity} tokens",
                RuntimeWarning,
                stacklevel=3,
            )
        return self.plan.caches(self.config)


def attach(model: nn.Module, config: SinkConfig | None = None) -> Report:
    """Give an mlx-lm model caches of fixed size, in place.

    Sets ``model.make_cache``, so that everything built on mlx-lm (its generate, chat and
    server, ``make_prompt_cache``) gets the bounded caches without knowing. The weights are not
    changed, and not loaded unless the architecture is one that mlx_sink does not know: then the
    model itself is checked against the contract. Attaching again replaces the settings of caches
    made later.

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
        hook(model)
        plan = plan_caches(watch(model, config))
        if plan.aligns:
            align_ropes(model)
        caches = plan.caches(config)
        _try_caches(model, caches, config)
        plan = replace(plan, blocks=archive_blocks(caches, config))
        layers = _reports(caches, plan.blocks or 0)
        if not _is_verified(model):
            verify(model, plan)
    except UnsupportedModelError as error:
        restore_ropes(model)
        raise UnsupportedModelError(f"{_name(model)} is not supported: {error}") from None
    model.make_cache = _MakeCache(config, plan)
    return Report(_name(model), config, layers)


def detach(model: nn.Module) -> None:
    """Take back what `attach` did: new caches of the model are mlx-lm's own again.

    The hook stays in the model's module, where it passes every other cache through.
    """
    if isinstance(model.__dict__.get("make_cache"), _MakeCache):
        del model.make_cache
    restore_ropes(model)


def config_of(model: nn.Module) -> SinkConfig | None:
    """Return what a model is attached with; ``None`` if it is not."""
    make = model.__dict__.get("make_cache")
    return make.config if isinstance(make, _MakeCache) else None


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


def _try_caches(model: nn.Module, caches: Sequence[Any], config: SinkConfig) -> None:
    """Send two tokens through the planned caches; nothing is computed.

    Raises:
        UnsupportedModelError: The model does not use the caches as when it was watched, or a
            cache cannot do what the configuration asks for.
    """
    _check_rollback(caches, config)
    dry_run(model, caches, 2)
    for i, cache in enumerate(caches):
        for part in leaves([cache]):
            if isinstance(part, SinkCache) and part.is_pending:
                raise UnsupportedModelError(f"layer {i} does not attend to the keys it keeps")


def _reports(caches: Sequence[Any], blocks: int) -> tuple[LayerReport, ...]:
    """Report what caches hold when they are full, after tokens went through them."""
    reports: list[LayerReport] = []
    for i, cache in enumerate(caches):
        for part in leaves([cache]):
            if not isinstance(part, SinkCache) or not part.empty():
                reports.append(report_of(i, part, blocks))
    return tuple(reports)


def archive_blocks(caches: Sequence[Any], config: SinkConfig) -> int:
    """Return among how many evicted blocks each layer that recalls chooses; 0 without recall.

    Args:
        caches: The model's, after tokens went through them.
        config: What to keep.

    Raises:
        UnsupportedModelError: No layer recalls.
        ConfigError: A layer that is to recall cannot, or ``recall_memory`` is too small.
    """
    if not config.recall:
        return 0
    archives = {
        i: part.archive
        for i, cache in enumerate(caches)
        for part in leaves([cache])
        if isinstance(part, SinkCache) and part.archive and part.archive.bytes_per_block
    }
    for layer in config.recall_layers or ():
        if layer not in archives:
            able = "" if not archives else f", such as {next(iter(archives))}"
            raise ConfigError(
                f"layer {layer} of recall_layers cannot recall: use layers with full attention "
                f"that leave it to mlx_sink{able}"
            )
    if not archives:
        raise UnsupportedModelError(
            "no layer of it can recall: recall needs full attention that is left to mlx_sink"
        )
    one = sum(archive.bytes_per_block for archive in archives.values())
    most, spare = config.recall // config.recall_block, config.spare_blocks
    blocks = config.recall_memory // one - spare
    if blocks < most:
        raise ConfigError(
            f"recall_memory must hold the {config.recall} tokens that are looked up at once: "
            f"at least {format_bytes(one * (most + spare))}, "
            f"got {format_bytes(config.recall_memory)}"
        )
    return blocks


def _check_rollback(caches: Sequence[Any], config: SinkConfig) -> None:
    """Raise if tokens are to be taken back, and a layer's cache cannot do that."""
    for i, cache in enumerate(caches):
        if rollback_of(cache) < config.rollback:
            raise UnsupportedModelError(
                f"layer {i} has a {type(cache).__name__}, which cannot take tokens back: "
                f"leave rollback ({config.rollback}) and draft models out"
            )
