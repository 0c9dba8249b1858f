"""What a model does with its caches, found by watching it without computing anything.

MLX is lazy: a forward pass tells shapes, types and the order of calls, and costs nothing until
its result is asked for. Every rotary embedding of mlx-lm ends in ``mx.fast.rope``, which is
watched too; so no name of a model's parts needs to be known.
"""

from __future__ import annotations

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
from mlx_sink.config import SinkConfig
from mlx_sink.errors import SinkError, UnsupportedModelError, one_line
from mlx_sink.models.architectures import FUSED_ROPES
from mlx_sink.models.hook import namespaces


@dataclass(slots=True)
class Seen:
    """What was seen of one cache.

    Attributes:
        keys: Shape of the keys taken in last, ``(B, n_kv_heads, L, head_dim)``.
        values: Likewise.
        itemsize: Bytes of one number.
        rope: The rotary embedding, or ``None`` for a layer without positions.
        rotated: Which of keys (0) and values (1) it rotates.
        calls: How often tokens were taken in.
        attended: How often they were attended to by mlx-lm's function, under a mask of ours.
        made: The last dimension of the keys that the model made of ours for that.
        lends: Whether another layer attended to them too.
        window: The longest window that the model asked a mask of.
    """

    keys: tuple[int, ...] = ()
    values: tuple[int, ...] = ()
    itemsize: int = 0
    rope: RopeCall | None = None
    rotated: int = 0
    calls: int = 0
    attended: int = 0
    made: int = 0
    lends: bool = False
    window: int = 0


class WatchedCache(SinkCache):
    """A ring that notes what is done with it."""

    def __init__(self, config: SinkConfig, chunked: bool = False):
        super().__init__(config, Rotation([]), lends=True, chunked=chunked)
        self.seen = Seen()

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Take in tokens as a `SinkCache` does; that nobody attends to them is no mistake."""
        seen, self._is_pending = self.seen, False
        seen.rope, seen.rotated = _watch.rope_of(keys, values)
        _watch.drop(self)
        seen.keys, seen.values, seen.itemsize = keys.shape, values.shape, keys.itemsize
        seen.calls += 1
        return super().update_and_fetch(keys, values)

    def has_window(self, window_size: int) -> bool:
        """Note the window that the model asks for."""
        if self.ring.num_sinks:
            return False
        self.seen.window = max(self.seen.window, window_size)
        return True

    def leaves_to_model(self, keys: mx.array, mask: object) -> bool:
        """Note whether ours could have been used, and leave it to mlx-lm."""
        was_pending, self._is_pending = self._is_pending, False
        if was_pending and self.knows(mask):
            self.seen.attended += 1
            self.seen.made = keys.shape[3]
        elif not was_pending:
            self.seen.lends = True
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


def trace(model: nn.Module, caches: Sequence[Any], n: int) -> None:
    """Send tokens through a model without computing anything.

    Args:
        model: The model.
        caches: Its caches.
        n: Tokens of the call.

    Raises:
        UnsupportedModelError: The model does not take these caches.
    """
    try:
        cast("Any", model)(mx.zeros((1, n), mx.int32), cache=list(caches))
    except SinkError as error:
        raise UnsupportedModelError(str(error)) from None
    except Exception as error:
        # A model that is not known yet may fail in any way.
        raise UnsupportedModelError(
            f"its forward pass fails with a bounded cache ({one_line(error)})"
        ) from None


def watch(model: nn.Module, make: Callable[[], Sequence[Any]], farthest: int) -> list[list[Seen]]:
    """Watch a chunk at the beginning of a stream, and a token at the largest position.

    Args:
        model: The model, hooked.
        make: Makes its caches; those that are watched are `WatchedCache`.
        farthest: The largest position that its embeddings will see.

    Returns:
        For each of the two, what was seen of each watched cache, in the order of the list.
    """
    seen: list[list[Seen]] = []
    for n, position in ((2, 0), (1, farthest)):
        caches = make()
        watched = [cache for cache in leaves(caches) if isinstance(cache, WatchedCache)]
        for cache in watched:
            cache.ring = replace(cache.ring, epoch=farthest + 2, tokens=position)
        with _watching(model):
            trace(model, caches, n)
        seen.append([cache.seen for cache in watched])
    return seen


def rope_call(rope: Callable[..., mx.array], width: int) -> RopeCall | None:
    """Return what a rotary embedding asks for, given an input ``[1, 1, 1, width]``."""
    with _watching():
        rope(mx.zeros((1, 1, 1, width)), offset=0)
        calls = _watch.calls or []
        return calls[-1][1] if calls else None
