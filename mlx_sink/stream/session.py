"""Save a stream and go on with it: what a session holds, and whose it is.

Nothing here knows a kind of cache: what mlx-lm's protocol calls a cache's ``state`` is saved,
whatever tree of arrays and plain values that is.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import mlx.core as mx
import mlx.nn as nn

from mlx_sink.attention.ring import Ring
from mlx_sink.cache.group import leaves
from mlx_sink.errors import CacheError, SessionError
from mlx_sink.io import tensors as store
from mlx_sink.io.tensors import pack, unpack
from mlx_sink.models.attach import make_cache
from mlx_sink.models.lazy import parameters
from mlx_sink.stream.loop import Loop

SAMPLE = 16
"""Values of each weight that tell one model from another."""


class Restored(NamedTuple):
    """A session read from a file.

    Attributes:
        loop: Where the stream stands.
        text: The state of its open text, or ``None``.
        note: What the saver noted.
    """

    loop: Loop
    text: list[Any] | None
    note: dict[str, Any]


def fingerprint(model: nn.Module, tokenizer: Any) -> dict[str, str]:
    """Return sums that differ between models, and between tokenizers.

    The model's covers its arguments and the names, shapes, types and some values of its weights;
    the tokenizer's its vocabulary.
    """
    weights = parameters(model)
    flat = [(mx.reshape(weight, (-1,)), max(1, weight.size // SAMPLE)) for _, weight in weights]
    samples = [values[::stride][:SAMPLE].view(mx.uint8) for values, stride in flat]
    cast("Callable[..., None]", cast("Any", mx).eval)(samples)
    arguments = cast("dict[str, Any]", vars(getattr(model, "args", object)))
    described = json.dumps(arguments, sort_keys=True, default=lambda o: type(o).__name__)
    of_model = hashlib.sha256(f"{type(model).__module__} {described}".encode())
    for (name, weight), sample in zip(weights, samples, strict=True):
        of_model.update(f"{name} {weight.shape} {weight.dtype}".encode())
        of_model.update(memoryview(cast("Any", sample)))
    vocabulary = sorted(cast("dict[str, int]", tokenizer.get_vocab()).items())
    of_tokenizer = hashlib.sha256(json.dumps(vocabulary).encode())
    return {"model": of_model.hexdigest(), "tokenizer": of_tokenizer.hexdigest()}


def save(
    path: Path,
    loop: Loop,
    text: list[Any] | None,
    whose: dict[str, str],
    note: Mapping[str, Any],
) -> None:
    """Write a session; see `store.write`.

    Args:
        path: The file.
        loop: Where the stream stands; its random key must be its own.
        text: The state of the text that is open.
        whose: The `fingerprint`.
        note: Anything else, JSON-ready.

    Raises:
        CacheError: The stream draws from MLX's own random state, which is not its to save.
        OutputError: It cannot be written.
    """
    if loop.key is None:
        raise CacheError("a stream over MLX's own random state cannot be saved: use Stream(...)")
    with loop.stepping():
        arrays: dict[str, mx.array] = {"key": loop.key}
        if loop.logits is not None:
            arrays["logits"] = loop.logits
        caches = [
            [type(cache).__name__, pack(cache.state, f"cache.{i}", arrays)]
            for i, cache in enumerate(loop.caches)
        ]
        held = {
            "whose": whose,
            "config": _config(loop.model),
            "position": loop.position,
            "recent": list(loop.recent),
            "penalty_window": loop.penalty_window,
            "caches": caches,
            "text": text,
            "note": dict(note),
        }
        store.write(path, held, arrays)


class Described(NamedTuple):
    """What a session says of itself, to be believed only as far as it is checked.

    Attributes:
        config: The settings that it was made with.
        note: What the saver noted.
        position: Tokens read and made.
    """

    config: dict[str, Any]
    note: dict[str, Any]
    position: int


def described(path: Path) -> Described:
    """Return what can be said of a session before its model is loaded.

    Raises:
        SessionError: The file is unsound.
    """
    held, _ = store.read(path)
    try:
        return Described(dict(held["config"]), dict(held["note"]), _natural(held["position"]))
    except (KeyError, TypeError, ValueError):
        raise SessionError(f"session {str(path)!r} says nothing of its settings") from None


def resume(path: Path, model: nn.Module, whose: dict[str, str]) -> Restored:
    """Read a session for an attached model.

    Args:
        path: The file.
        model: The model that it was made with.
        whose: The `fingerprint` of that model and its tokenizer.

    Raises:
        SessionError: The file is unsound, or belongs to another model, tokenizer or setting.
    """
    held, arrays = store.read(path)
    try:
        for part, expected in whose.items():
            if held["whose"][part] != expected:
                raise SessionError(f"session {str(path)!r} belongs to another {part}")
        config = cast("dict[str, Any]", held["config"])
        for name, value in _config(model).items():
            if config.get(name) != value:
                raise SessionError(
                    f"session {str(path)!r} was made with {name} {config.get(name)}, not {value}"
                )
        return _restored(model, held, arrays)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, OverflowError) as error:
        if isinstance(error, SessionError):
            raise
        raise SessionError(f"session {str(path)!r} does not fit the model") from None


def _restored(model: nn.Module, held: dict[str, Any], arrays: dict[str, mx.array]) -> Restored:
    """Build the loop; anything that does not fit raises some kind of error."""
    caches = make_cache(model)
    like, expected = _traced(model)
    position = _natural(held["position"])
    for cache, [name, packed], template in zip(caches, held["caches"], like, strict=True):
        state = unpack(packed, arrays)
        if name != type(cache).__name__ or not _fits(state, template):
            raise ValueError(name)
        fresh = [getattr(part, "ring", None) for part in leaves([cache])]
        cache.state = state
        for part, ring in zip(leaves([cache]), fresh, strict=True):
            # A cache that its model never feeds stays at 0.
            if not part.empty() and getattr(part, "tokens", position) != position:
                raise ValueError(position)
            if ring is not None:
                _check_ring(ring, part.ring, part.state)
    key = arrays["key"]
    if key.dtype != mx.uint32 or key.shape != (2,):
        raise ValueError(key)
    window = max(1, _natural(held["penalty_window"]))
    loop = Loop(model, caches, key=key, penalty_window=window)
    loop.position = position
    loop.recent.extend(_natural(token, loop.vocabulary) for token in held["recent"])
    logits = arrays.get("logits")
    if expected.shape[-1] > loop.vocabulary:
        expected = expected[:, : loop.vocabulary]
    if logits is not None and (logits.dtype, logits.shape) != (expected.dtype, expected.shape):
        raise ValueError(logits.shape)
    loop.logits = logits
    return Restored(loop, held["text"], dict(held["note"]))


def _natural(value: object, end: int = 2**63) -> int:
    if type(value) is not int or not 0 <= value < end:
        raise ValueError(value)
    return value


def _check_ring(fresh: Ring, ring: Ring, state: Sequence[Any]) -> None:
    """Raise unless a ring is one that the model's settings lead to, and its arrays hold it."""
    same = ("num_sinks", "window", "epoch")
    if any(getattr(ring, name) != getattr(fresh, name) for name in same):
        raise ValueError(ring)
    if not 0 <= ring.previous <= ring.start <= ring.tokens < 2**63:
        raise ValueError(ring)
    arrays: dict[str, mx.array] = {}
    pack(state, "", arrays)
    whole = [part for part in state if isinstance(part, mx.array)]
    if any(part.ndim < 3 or part.shape[2] < ring.live for part in whole):
        raise ValueError(ring)
    if not arrays and ring.tokens:
        raise ValueError(ring)


def _config(model: nn.Module) -> dict[str, Any]:
    config = getattr(cast("Any", model).make_cache, "config", None)
    return {} if config is None else config.to_dict()


def _traced(model: nn.Module) -> tuple[list[Any], mx.array]:
    """Return the states of caches that one token went into, and the logits ``[1, vocabulary]``.

    MLX is lazy: nothing is computed.
    """
    caches = make_cache(model)
    logits = cast("Any", model)(mx.zeros((1, 1), mx.int32), cache=caches)
    return [cache.state for cache in caches], logits[:, -1, :]


def _fits(value: Any, like: Any) -> bool:
    """Tell whether a state is like another but for the values, and one length of each array."""
    if isinstance(value, mx.array) and isinstance(like, mx.array):
        if value.dtype != like.dtype or value.ndim != like.ndim:
            return False
        return sum(a != b for a, b in zip(value.shape, like.shape, strict=True)) <= 1
    if isinstance(value, list | tuple):
        items = cast("list[Any]", value)
        return (
            type(items) is type(like)
            and len(items) == len(like)
            and all(map(_fits, items, cast("list[Any]", like)))
        )
    if isinstance(value, dict):
        named = cast("dict[str, Any]", value)
        return (
            isinstance(like, dict)
            and named.keys() == like.keys()
            and all(_fits(item, like[name]) for name, item in named.items())
        )
    if value is None or like is None:
        # Nothing was read yet, or the cache keeps something only later.
        return True
    return type(value) is type(like) and (type(value) is not int or value >= 0)
