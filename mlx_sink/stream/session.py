"""Save a stream and go on with it: what a session holds, and whose it is.

Nothing here knows a kind of cache: what mlx-lm's protocol calls a cache's ``state`` is saved,
whatever tree of arrays and plain values that is.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn

from mlx_sink.attention.ring import Ring
from mlx_sink.cache.group import leaves
from mlx_sink.cache.sink_cache import SinkCache
from mlx_sink.config import SinkConfig
from mlx_sink.errors import CacheError, SessionError
from mlx_sink.io import lock
from mlx_sink.io import tensors as store
from mlx_sink.io.tensors import Known, pack, plain, unpack
from mlx_sink.models.attach import config_of, make_cache
from mlx_sink.models.lazy import parameters
from mlx_sink.stream.loop import Loop
from mlx_sink.stream.text.detokenize import detokenizer_for
from mlx_sink.stream.text.stop_strings import ShownText

SAMPLE = 16
"""Values of each weight that tell one model from another."""


LIMIT = 2**31
"""Tokens, and the tokens of a penalty window, are less: MLX counts in 32 bits."""


@dataclass(frozen=True, slots=True, eq=False)
class Saved:
    """A session that was read from its file.

    Every value is of its type and in its range. Whether the session is a certain model's, `resume`
    finds out.

    Attributes:
        path: The file.
        whose: The `fingerprint` of the model and tokenizer.
        config: The settings that it was made with.
        position: Tokens read and made.
        recent: The newest tokens.
        recalled: Which of the newest tokens have looked up evicted ones, 0 or 1.
        penalty_window: Newest tokens that logits processors see.
        caches: For each layer the class of its cache, and what `trees.pack` made of its state.
        text: The state of the text that was open, or ``None``.
        note: What the saver noted; of that only the saver knows what is right.
        arrays: The tensors, by the names in ``caches``.
        known: The sum of the file.
    """

    path: Path
    whose: dict[str, str]
    config: SinkConfig
    position: int
    recent: list[int]
    recalled: list[int]
    penalty_window: int
    caches: list[tuple[str, Any]]
    text: list[Any] | None
    note: dict[str, Any]
    arrays: dict[str, mx.array]
    known: Known


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
    known: Known | None = None,
) -> None:
    """Write a session; see `store.write`.

    Args:
        path: The file.
        loop: Where the stream stands; its random key must be its own.
        text: The state of the text that is open.
        whose: The `fingerprint`.
        note: Anything else, JSON-ready.
        known: The files that the stream was saved to, or resumed from.

    Raises:
        CacheError: The stream draws from MLX's own random state, which is not its to save.
        OutputError: It cannot be written, or another process is at it.
        SessionError: Another stream has been saved there meanwhile.
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
            "recalled": [int(flag) for flag in loop.recalled],
            "penalty_window": loop.penalty_window,
            "caches": caches,
            "text": text,
            "note": dict(note),
        }
        with lock.holding(path, f"session {str(path)!r}", nested=True):
            store.write(path, held, arrays, known)


def read(path: Path) -> Saved:
    """Read a session, whole and once.

    Raises:
        SessionError: The file is unsound, or a value in it is not what was saved.
    """
    held, arrays, known = store.read_known(path)
    try:
        return _saved(path, held, arrays, known)
    except _UNFIT:
        raise SessionError(f"session {str(path)!r} holds values that no stream has") from None


def _saved(path: Path, held: dict[str, Any], arrays: dict[str, mx.array], known: Known) -> Saved:
    """Check values one by one; any that is wrong raises some kind of error."""
    config = SinkConfig.from_dict(held["config"])
    position = natural(held["position"])
    window = natural(held["penalty_window"], LIMIT)
    recent = [natural(token, LIMIT) for token in _of(list, held["recent"])]
    if window < 1 or len(recent) > min(position, window + config.rollback):
        raise ValueError(window)
    recalled = [natural(flag, 2) for flag in _of(list, held.get("recalled", []))]
    whose = {_of(str, part): _of(str, held["whose"][part]) for part in ("model", "tokenizer")}
    caches = [(_of(str, name), packed) for name, packed in _of(list, held["caches"])]
    text = None if held["text"] is None else _of(list, held["text"])
    note = _of(dict, held["note"])
    values = whose, config, position, recent, recalled, window, caches, text, note, arrays
    return Saved(path, *values, known)


def resume(saved: Saved, model: nn.Module, whose: dict[str, str]) -> Loop:
    """Go on from a session with an attached model.

    Args:
        saved: The session, which stays as it is.
        model: The model that it was made with.
        whose: The `fingerprint` of that model and its tokenizer.

    Raises:
        SessionError: It belongs to another model, tokenizer or setting.
    """
    name = repr(str(saved.path))
    for part, expected in whose.items():
        if saved.whose[part] != expected:
            raise SessionError(f"session {name} belongs to another {part}")
    config = config_of(model) or saved.config
    for field in fields(SinkConfig):
        was, value = (getattr(c, field.name) for c in (saved.config, config))
        if was != value:
            raise SessionError(f"session {name} was made with {field.name} {was}, not {value}")
    try:
        loop = _restored(model, saved)
    except _UNFIT:
        raise SessionError(f"session {name} does not fit the model") from None
    return loop


_UNFIT = (
    KeyError, TypeError, ValueError, AttributeError, IndexError, OverflowError, RecursionError,
)  # fmt: skip
"""What values of other types raise where they are used."""


def open_text(saved: Saved, tokenizer: Any) -> ShownText | None:
    """Return the text that was open when a session was saved, if one was.

    Raises:
        SessionError: Its state does not fit the tokenizer.
    """
    if saved.text is None:
        return None
    try:
        return ShownText.restored(detokenizer_for(tokenizer), saved.text)
    except (TypeError, ValueError):
        raise SessionError(f"session {str(saved.path)!r} does not fit the tokenizer") from None


def _restored(model: nn.Module, saved: Saved) -> Loop:
    """Build the loop; anything that does not fit raises some kind of error."""
    caches = make_cache(model)
    like, expected = _traced(model)
    # Arrays of its own: a stream writes into them.
    arrays = {name: mx.array(array) for name, array in saved.arrays.items()}
    for cache, (name, packed), template in zip(caches, saved.caches, like, strict=True):
        state = unpack(packed, arrays)
        if name != type(cache).__name__ or not _fits(state, template):
            raise ValueError(name)
        rings = [part for part in leaves([cache]) if isinstance(part, SinkCache)]
        fresh = [part.ring for part in rings]
        cache.state = state
        for part, ring in zip(rings, fresh, strict=True):
            # A cache that its model never feeds stays at 0.
            if not part.empty() and part.tokens != saved.position:
                raise ValueError(saved.position)
            _check_ring(ring, part.ring, part.state)
    key = arrays["key"]
    if key.dtype != mx.uint32 or key.shape != (2,):
        raise ValueError(key)
    loop = Loop(model, caches, key=key, penalty_window=saved.penalty_window)
    loop.position = saved.position
    loop.recent.extend(natural(token, loop.vocabulary) for token in saved.recent)
    loop.recalled.extend(map(bool, saved.recalled))
    logits = arrays.get("logits")
    width = min(expected.shape[-1], loop.vocabulary)
    if logits is not None and (logits.dtype, logits.shape) != (expected.dtype, (1, width)):
        raise ValueError(logits.shape)
    loop.logits = logits
    _check_step(loop, expected)
    return loop


def _check_step(loop: Loop, expected: mx.array) -> None:
    """Raise unless the model takes the caches: a copy of them, of which nothing is computed."""
    for n in (1, 2):
        try:
            logits = _step(loop.model, loop.fork().caches, n)
        except Exception as error:
            # What a state that somebody made up does to a model is anybody's guess.
            raise ValueError(n) from error
        if logits.shape != expected.shape:
            raise ValueError(logits.shape)


def natural(value: object, end: int = 2**63) -> int:
    """Return a value that is an integer from 0 to ``end - 1``.

    Raises:
        ValueError: It is not.
    """
    if type(value) is not int or not 0 <= value < end:
        raise ValueError(value)
    return value


def _of(kind: type, value: Any) -> Any:
    if type(value) is not kind:
        raise ValueError(value)
    return value


def _check_ring(fresh: Ring, ring: Ring, state: Sequence[Any]) -> None:
    """Raise unless a ring is one that the model's settings lead to, and its arrays hold it."""
    same = ("num_sinks", "window", "epoch", "rollback")
    if any(getattr(ring, name) != getattr(fresh, name) for name in same):
        raise ValueError(ring)
    if not 0 <= ring.previous <= ring.start <= ring.tokens < 2**63:
        raise ValueError(ring)
    # An epoch that is over has ended with its last call; spare slots hold what was taken back,
    # and before the first eviction all of them do.
    taken_back = max(ring.rollback, ring.slots - ring.tokens)
    if ring.position >= ring.epoch or ring.taken_back > taken_back:
        raise ValueError(ring)
    arrays: dict[str, mx.array] = {}
    pack(state, "", arrays)
    whole = [part for part in state if isinstance(part, mx.array)]
    if any(part.ndim < 3 or part.shape[2] < ring.live for part in whole):
        raise ValueError(ring)
    if not arrays and ring.tokens:
        raise ValueError(ring)


def _config(model: nn.Module) -> dict[str, Any]:
    config = config_of(model)
    return {} if config is None else config.to_dict()


def _traced(model: nn.Module) -> tuple[list[Any], mx.array]:
    """Return the states of caches that one token went into, and the logits ``[1, vocabulary]``."""
    caches = make_cache(model)
    logits = _step(model, caches, 1)
    return [plain(cache.state) for cache in caches], logits


def _step(model: nn.Module, caches: list[Any], n: int) -> mx.array:
    """Return the logits after n tokens, ``[1, vocabulary]``; MLX is lazy and computes nothing."""
    logits = cast("Any", model)(mx.zeros((1, n), mx.int32), cache=caches)
    return logits[:, -1, :]


def _fits(value: Any, like: Any) -> bool:
    """Tell whether a state is like another but for the values, and one length of each array."""
    if value is None or like is None:
        # Nothing was read yet, or the cache keeps something only later.
        return True
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
    return type(value) is type(like) and (type(value) is not int or value >= 0)
