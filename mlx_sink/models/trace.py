"""Watch what a model does with its caches, without computing anything.

MLX is lazy: a forward pass tells shapes, types and the order of calls, and costs nothing until
its result is asked for. Every rotary embedding of mlx-lm ends in ``mx.fast.rope``, which is
watched too; so no name of a model's parts needs to be known.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Generator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn

from mlx_sink.attention.rope import RopeCall, Rotation
from mlx_sink.cache.group import leaves
from mlx_sink.cache.sink_cache import SinkCache
from mlx_sink.config import PREFILL_STEP, SinkConfig
from mlx_sink.errors import SinkError, UnsupportedModelError, one_line
from mlx_sink.models.architectures import FUSED_ROPES, position_limit
from mlx_sink.models.hook import namespaces
from mlx_sink.models.layers import Kind, bounded_caches, common_epoch, native_caches


@dataclass(slots=True)
class CacheTrace:
    """What was seen of one cache in one call of the model.

    Attributes:
        length: Tokens that the layer attends to in mlx-lm; 0 where those are all.
        layer: The layer that it belongs to.
        keys: Shape of the keys taken in last, ``(B, n_kv_heads, L, head_dim)``.
        values: Likewise.
        rope: The rotary embedding, or ``None`` for a layer without positions.
        rotated: Which of keys (0) and values (1) it rotates.
        calls: How often tokens were taken in.
        attended: How often they were attended to by mlx-lm's function, under a mask of ours.
        attended_width: The last dimension of the keys that the model made of ours for that.
        lends: Whether another layer attended to them too.
        window: The longest window that the model asked a mask of, in a layer that has one.
    """

    length: int = 0
    layer: int = 0
    keys: tuple[int, ...] = ()
    values: tuple[int, ...] = ()
    rope: RopeCall | None = None
    rotated: int = 0
    calls: int = 0
    attended: int = 0
    attended_width: int = 0
    lends: bool = False
    window: int = 0


@dataclass(frozen=True, slots=True)
class ModelTrace:
    """What was seen of a model in two calls, in which nothing was computed.

    Attributes:
        native: Empty caches as mlx-lm gives them, one for each layer.
        limit: Positions from which on the model would compute something else, or ``None``.
        farthest: The largest position that its embeddings will see.
        chunk: Of each cache that would grow, groups one by one: two tokens at position 0.
        token: Likewise: one token at position `farthest`.
    """

    native: tuple[Any, ...]
    limit: int | None
    farthest: int
    chunk: tuple[CacheTrace, ...]
    token: tuple[CacheTrace, ...]


class WatchedCache(SinkCache):
    """A ring that notes what is done with it."""

    def __init__(self, config: SinkConfig, kind: Kind = Kind.FULL):
        super().__init__(config, Rotation([]), lends=True, chunked=kind is Kind.CHUNK)
        self.trace = CacheTrace(length=0 if kind is Kind.FULL else config.window)

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Take in tokens as a `SinkCache` does; that nobody attends to them is no mistake."""
        trace, self._is_pending = self.trace, False
        trace.rope, trace.rotated = _watch.rope_of(keys, values)
        _watch.drop(self)
        trace.keys, trace.values = keys.shape, values.shape
        trace.calls += 1
        return super().update_and_fetch(keys, values)

    def has_window(self, window_size: int) -> bool:
        """Note the window that the model asks for; a layer with full attention has none."""
        if not self.trace.length:
            return False
        self.trace.window = max(self.trace.window, window_size)
        return True

    def leaves_to_model(self, keys: mx.array, mask: object) -> bool:
        """Note whether ours could have been used, and leave it to mlx-lm."""
        was_pending, self._is_pending = self._is_pending, False
        if was_pending and self.knows(mask):
            self.trace.attended += 1
            self.trace.attended_width = keys.shape[3]
        elif not was_pending:
            self.trace.lends = True
        if _watch.last is self:
            # What rotated these queries has nothing to do with the next layer's keys.
            _watch.drop(self)
        return True


class _Watch(threading.local):
    """The calls of ``mx.fast.rope`` in this thread, while it is watched."""

    calls: list[tuple[Any, RopeCall]] | None = None
    since = 0
    last: WatchedCache | None = None

    def rope_of(self, *rows: mx.array) -> tuple[RopeCall | None, int]:
        """Return the embedding of a layer's keys, and which of its rows are its very output.

        If none is (a norm, a scale or a part without positions came between), what was called
        since the layer before.
        """
        calls = self.calls or []
        for out, call in reversed(calls):
            for which, row in enumerate(rows):
                if row is out:
                    return call, which
        recent = [call for _, call in calls[self.since :]]
        if any(not call.is_like(recent[0]) for call in recent):
            raise UnsupportedModelError("a layer has more than one position embedding")
        return (recent[0] if recent else None), 0

    def start(self) -> None:
        self.calls, self.since, self.last = [], 0, None

    def stop(self) -> None:
        self.calls = self.last = None

    def drop(self, cache: WatchedCache) -> None:
        self.since, self.last = len(self.calls or []), cache


_watch = _Watch()
_patching = threading.Lock()


def _of_fast_rope(x: mx.array, dims: int, **options: Any) -> RopeCall:
    return RopeCall(
        width=x.shape[-1],
        dims=dims,
        traditional=bool(options["traditional"]),
        base=options.get("base"),
        scale=float(options["scale"]),
        freqs=options.get("freqs"),
    )


@contextmanager
def _watching(model: nn.Module | None = None) -> Generator[None]:
    """Note this thread's calls of ``mx.fast.rope`` and of kernels that have it inside.

    What other threads call goes through.
    """
    places: list[tuple[dict[str, Any], str, Callable[..., RopeCall]]] = []
    places.append((mx.fast.__dict__, "rope", _of_fast_rope))
    for names in [] if model is None else namespaces(model):
        places += [(names, name, of) for name, of in FUSED_ROPES.items() if name in names]
    with _patching, ExitStack() as stack:
        stack.callback(_watch.stop)
        _watch.start()
        for place, name, of in places:
            original = place[name]
            place[name] = _noted(original, of)
            stack.callback(place.__setitem__, name, original)
        yield


def _noted(original: Callable[..., Any], of: Callable[..., RopeCall]) -> Callable[..., Any]:
    def noted(*args: Any, **options: Any) -> Any:
        result = original(*args, **options)
        if _watch.calls is not None:
            _watch.calls.append((result, of(*args, **options)))
        return result

    return noted


def forward(model: nn.Module, tokens: mx.array, caches: Sequence[Any]) -> mx.array:
    """Call a model of mlx-lm.

    Args:
        model: The model.
        tokens: ``[B, n]`` int32.
        caches: Its caches.

    Returns:
        The logits, ``[B, n, vocabulary]``, not computed yet.
    """
    return cast("Any", model)(tokens, cache=list(caches))


def dry_run(model: nn.Module, caches: Sequence[Any], n: int) -> None:
    """Send tokens through a model without computing anything.

    Args:
        model: The model.
        caches: Its caches.
        n: Tokens of the call.

    Raises:
        UnsupportedModelError: The model does not take these caches.
    """
    try:
        forward(model, mx.zeros((1, n), mx.int32), caches)
    except SinkError as error:
        raise UnsupportedModelError(str(error)) from None
    except Exception as error:
        # A model that is not known yet may fail in any way.
        raise UnsupportedModelError(
            f"its forward pass fails with a bounded cache ({one_line(error)})"
        ) from None


def watch(model: nn.Module, config: SinkConfig) -> ModelTrace:
    """Watch a chunk at the beginning of a stream, and a token at the largest position.

    Args:
        model: The model, hooked.
        config: What its caches will keep.

    Raises:
        UnsupportedModelError: The model does not take bounded caches.
    """
    native, limit = tuple(native_caches(model)), position_limit(model)
    config = common_epoch(native, config, limit)
    farthest = config.epoch_length + PREFILL_STEP
    if limit is not None:
        farthest = min(farthest, limit - 1)
    config = replace(config, epoch=farthest + 2)

    def caches() -> list[Any]:
        return bounded_caches(copy.deepcopy(native), config, WatchedCache)

    chunk = _watched(model, caches(), n=2, position=0)
    token = _watched(model, caches(), n=1, position=farthest)
    return ModelTrace(native, limit, farthest, chunk, token)


def _watched(
    model: nn.Module, caches: Sequence[Any], n: int, position: int
) -> tuple[CacheTrace, ...]:
    """Return what is seen of each `WatchedCache` in a call of n tokens at a position."""
    traces: list[CacheTrace] = []
    for layer, cache in enumerate(caches):
        for part in leaves([cache]):
            if isinstance(part, WatchedCache):
                part.ring = replace(part.ring, tokens=position)
                part.trace.layer = layer
                traces.append(part.trace)
    with _watching(model):
        dry_run(model, caches, n)
    return tuple(traces)


def rope_call(rope: Callable[..., mx.array], width: int) -> RopeCall | None:
    """Return what a rotary embedding asks for, given an input ``[1, 1, 1, width]``."""
    with _watching():
        rope(mx.zeros((1, 1, 1, width)), offset=0)
        calls = _watch.calls or []
        return calls[-1][1] if calls else None
