"""The seam to mlx-lm: which layer gets which cache, and the hook its attention goes through.

mlx-lm's model files import ``scaled_dot_product_attention`` by name, so the hook is set in the
module that defines a model's attention. For caches that are not ours it calls the original.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models import cache as mlx_lm_cache

from mlx_sink.attention import sink_attention
from mlx_sink.cache import SinkCache
from mlx_sink.config import SinkConfig
from mlx_sink.errors import CacheError, SinkError, UnsupportedModelError
from mlx_sink.report import LayerReport, Report
from mlx_sink.rope import Rope, Rotation

# fmt: off
SUPPORTED = frozenset({
    "gemma", "granite", "llama", "mixtral", "olmo2", "phi3", "qwen2", "qwen3", "smollm3",
    "stablelm", "starcoder2",
})
# fmt: on
"""Modules of ``mlx_lm.models`` for which the tests show the contract. Mistral is in llama."""

HOOKED = "scaled_dot_product_attention"
MARK = "_hooked_by_mlx_sink"


class _MakeCache:
    """The ``make_cache`` that an attached model carries."""

    def __init__(self, config: SinkConfig, rotations: list[Rotation]):
        self.config = config
        self.rotations = rotations

    def __call__(self) -> list[SinkCache]:
        return [SinkCache(self.config, rotation) for rotation in self.rotations]


def attach(model: nn.Module, config: SinkConfig | None = None) -> Report:
    """Give an mlx-lm model a cache of fixed size, in place.

    Sets ``model.make_cache``, so that everything built on mlx-lm (its generate, chat and
    server, ``make_prompt_cache``) gets the bounded cache without knowing. The weights are
    neither changed nor loaded. Attaching again replaces the settings of caches made later.

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
    context = trained_context(model)
    config = config or SinkConfig.for_context(context)
    config.check_context(context)
    detach(model)
    try:
        _check_architecture(model)
        make_cache = _MakeCache(config, _rotations(model, config))
        for module in _attention_modules(model):
            _hook(module)
        caches = make_cache()
        _check_rollback(caches, config)
        layers = _probe(model, caches)
    except UnsupportedModelError as error:
        raise UnsupportedModelError(f"{_name(model)} is not supported: {error}") from None
    model.make_cache = make_cache
    return Report(_name(model), config, layers)


def detach(model: nn.Module) -> None:
    """Take back what `attach` did: new caches of the model are mlx-lm's own again.

    The hook stays in the model's module, where it passes every other cache through.
    """
    if isinstance(model.__dict__.get("make_cache"), _MakeCache):
        del model.make_cache


def make_cache(model: nn.Module) -> list[SinkCache]:
    """Return empty caches for a new stream, one for each layer of an attached model.

    Raises:
        CacheError: The model is not attached.
    """
    make = model.__dict__.get("make_cache")
    if not isinstance(make, _MakeCache):
        raise CacheError("the model has no bounded cache: call mlx_sink.attach(model) first")
    return make()


def trained_context(model: nn.Module) -> int | None:
    """Return the positions the model was trained on, in tokens, if its arguments say."""
    context = getattr(getattr(model, "args", None), "max_position_embeddings", None)
    return context if isinstance(context, int) else None


def _name(model: nn.Module) -> str:
    return str(getattr(model, "model_type", type(model).__module__.rpartition(".")[2]))


def _layers(model: nn.Module) -> list[nn.Module]:
    return cast("list[nn.Module]", cast("Any", model).layers)


def _check_architecture(model: nn.Module) -> None:
    package, _, name = type(model).__module__.rpartition(".")
    if package != "mlx_lm.models" or name not in SUPPORTED:
        known = ", ".join(sorted(SUPPORTED))
        raise UnsupportedModelError(f"only these of mlx-lm's models are, so far: {known}")
    wanted = cast("list[object]", mlx_lm_cache.make_prompt_cache(model))
    for i, cache in enumerate(wanted):
        if type(cache) is not mlx_lm_cache.KVCache:
            raise UnsupportedModelError(
                f"layer {i} wants a {type(cache).__name__}, and only layers with full attention "
                "can have a sink ring so far"
            )


def _rotations(model: nn.Module, config: SinkConfig) -> list[Rotation]:
    """Return each layer's rotation, checked; layers with equal ones share the object."""
    shared: dict[object, Rotation] = {}
    rotations: list[Rotation] = []
    for layer in _layers(model):
        attention = _attention(layer)
        rope = cast("Rope | None", getattr(attention, "rope", None))
        rotation = Rotation.of(rope)
        head_dim = _head_dim(attention)
        angles = rotation.interleaved, rotation.frequencies.tobytes()
        key: object = (type(rope), head_dim, *angles)
        if key not in shared:
            rotation.check(rope, head_dim, 2 * config.epoch_length)
            shared[key] = rotation
        rotations.append(shared[key])
    return rotations


def _attention(layer: nn.Module) -> nn.Module:
    attention = getattr(layer, "self_attn", None)
    if not isinstance(attention, nn.Module):
        raise UnsupportedModelError(f"a {type(layer).__name__} layer has no self_attn")
    return attention


def _head_dim(attention: nn.Module) -> int:
    head_dim = getattr(attention, "head_dim", None)
    if isinstance(head_dim, int):
        return head_dim
    # Not all models keep it; the smallest head that the rotation fits in serves the check.
    rope = getattr(attention, "rope", None)
    return int(getattr(rope, "dims", 0) or getattr(rope, "dim", 0) or 2)


def _attention_modules(model: nn.Module) -> list[ModuleType]:
    names = {type(_attention(layer)).__module__ for layer in _layers(model)}
    modules = [sys.modules[name] for name in sorted(names)]
    for module in modules:
        if not hasattr(module, HOOKED):
            raise UnsupportedModelError(f"{module.__name__} does not use mlx-lm's {HOOKED}")
    return modules


def _hook(module: ModuleType) -> None:
    """Send attention over a `SinkCache` our way; idempotent."""
    original = cast("Callable[..., mx.array]", getattr(module, HOOKED))
    if getattr(original, MARK, False):
        return

    @functools.wraps(original)
    def hooked(
        queries: mx.array,
        keys: mx.array,
        values: mx.array,
        cache: Any = None,
        scale: float = 1.0,
        mask: mx.array | str | None = None,
        sinks: mx.array | None = None,
    ) -> mx.array:
        if not isinstance(cache, SinkCache):
            return original(
                queries, keys, values, cache=cache, scale=scale, mask=mask, sinks=sinks
            )
        if sinks is not None:
            raise UnsupportedModelError("it has learned sinks")
        if isinstance(mask, mx.array):
            raise UnsupportedModelError("it attends under a mask of its own")
        return sink_attention(
            queries,
            keys,
            values,
            layout=cache.take_layout(),
            packed=cache.take_packed(),
            rotation=cache.rotation,
            scale=scale,
        )

    setattr(hooked, MARK, True)
    setattr(module, HOOKED, hooked)


def _check_rollback(caches: Sequence[Any], config: SinkConfig) -> None:
    """Raise if tokens are to be taken back, and a layer's cache cannot do that."""
    for i, cache in enumerate(caches):
        if config.rollback and not cache.is_trimmable():
            raise UnsupportedModelError(
                f"layer {i} has a {type(cache).__name__}, which cannot take tokens back: "
                f"leave rollback ({config.rollback}) and draft models out"
            )


def _probe(model: nn.Module, caches: list[SinkCache]) -> tuple[LayerReport, ...]:
    """Trace one token through the model and see what reaches the caches.

    MLX is lazy: the trace tells shapes and types, and computes nothing.
    """
    try:
        model(mx.zeros((1, 1), mx.int32), cache=caches)
    except SinkError as error:
        raise UnsupportedModelError(str(error)) from None
    reports: list[LayerReport] = []
    for i, cache in enumerate(caches):
        if cache.keys is None or cache.values is None or cache.tokens != 1:
            raise UnsupportedModelError(f"layer {i} keeps no keys of its own")
        if cache.is_pending:
            raise UnsupportedModelError(f"layer {i} does not attend through mlx-lm's {HOOKED}")
        positions = "none" if cache.rotation.is_identity else "rope"
        slots, sinks = cache.ring.slots, cache.ring.num_sinks
        row, sink = cache.bytes_per_token, cache.bytes_per_sink
        reports.append(LayerReport(i, "sink ring", positions, slots, row, sinks, sink))
    return tuple(reports)
