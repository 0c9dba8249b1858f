"""How the next token is chosen: from a model's logits to a token.

mlx-lm's samplers draw from MLX's random state, which is shared; here a stream has random numbers
of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar, cast

import mlx.core as mx

from mlx_sink.errors import InputError
from mlx_sink.stream.checks import integer

T = TypeVar("T")

# MLX annotates its arguments as nothing in particular.
_start: Callable[..., None] = cast("Any", mx).async_eval

Sampler = Callable[[mx.array], mx.array]
"""From log probabilities ``[1, vocabulary]`` to a token ``[1]``."""

LogitsProcessor = Callable[[mx.array, mx.array], mx.array]
"""From the newest tokens ``[n]`` and logits ``[1, vocabulary]`` to other logits."""


def greedy(logprobs: mx.array) -> mx.array:
    """Return the most likely token."""
    return mx.argmax(logprobs, axis=-1)


def never(tokens: Iterable[int]) -> LogitsProcessor:
    """Return a processor by which some tokens cannot be chosen."""
    ids = sorted(tokens)

    def forbid(_: mx.array, logits: mx.array) -> mx.array:
        known = mx.array([i for i in ids if i < logits.shape[-1]], mx.int32)
        logits[..., known] = float("-inf")
        return logits

    return forbid


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the next token is chosen.

    Attributes:
        sampler: From log probabilities to a token; the most likely one by default.
        processors: Change the logits first, one after the other.
    """

    sampler: Sampler = greedy
    processors: Sequence[LogitsProcessor] = ()


class Choice(NamedTuple):
    """A token that was chosen, not computed yet.

    Attributes:
        token: ``[1]``.
        logprobs: ``[vocabulary]``.
        key: The random key after it.
    """

    token: mx.array
    logprobs: mx.array
    key: mx.array | None


def choose(
    logits: mx.array, history: mx.array | None, key: mx.array | None, sampling: Sampling
) -> Choice:
    """Choose a token.

    Args:
        logits: ``[1, vocabulary]``.
        history: The newest tokens, ``[n]``, if there are processors.
        key: The random key to draw from; ``None`` for MLX's own state.
        sampling: How.
    """

    def draw() -> tuple[mx.array, mx.array]:
        # Some processors write into what they are given: an array of its own.
        processed = mx.array(logits)
        for processor in sampling.processors:
            assert history is not None
            processed = processor(history, processed)
        logprobs = processed - mx.logsumexp(processed, keepdims=True)
        return sampling.sampler(logprobs), logprobs.squeeze(0)

    (token, logprobs), after = seeded(key, draw)
    return Choice(token, logprobs, after)


class History:
    """The newest tokens, as processors are to see them; nothing if there are none to see them."""

    def __init__(self, tokens: mx.array | None, window: int):
        self.tokens = tokens
        self._window = window

    @classmethod
    def of(cls, recent: Sequence[int], window: int, sampling: Sampling, width: int) -> History:
        """Return the history of a list of tokens, but for those that have no logit.

        Args:
            recent: The tokens.
            window: How many of the newest count.
            sampling: Has the processors that see them.
            width: Logits of a token: processors look theirs up.
        """
        if not sampling.processors:
            return cls(None, window)
        tokens = [token for token in recent[-window:] if token < width]
        return cls(mx.array(tokens, mx.int32), window)

    def then(self, token: mx.array) -> History:
        """Return the history after one more token, ``[1]``."""
        if self.tokens is None:
            return self
        longer = mx.concatenate([self.tokens, token.astype(mx.int32)])
        return History(longer[-self._window :], self._window)


def seeded(key: mx.array | None, draw: Callable[[], T]) -> tuple[T, mx.array | None]:
    """Call a function while MLX's random state stands at a key, and put the state back.

    MLX's state belongs to the thread, and its array can be written in place, lazily. So every
    sampler that is built on ``mx.random`` draws as it would after ``mx.random.seed``, and neither
    another stream nor the caller's own random numbers are touched.

    Args:
        key: The key to draw from, uint32 ``[2]``; ``None`` to leave MLX's state alone.
        draw: The function.

    Returns:
        What the function returns, and the key to draw from next.
    """
    if key is None:
        return draw(), None
    outer = mx.array(_state())
    _state()[...] = key
    try:
        drawn = draw()
        return drawn, mx.array(_state())
    finally:
        # Looked up again: a compiled sampler replaces the array.
        _state()[...] = outer
        # Never used, it would never be computed either: a graph that grows with every call.
        _start(_state())


def _state() -> mx.array:
    """Return the array of MLX's random state in this thread."""
    return cast("list[mx.array]", mx.random.state)[0]


def fresh_key(seed: int | None) -> mx.array:
    """Return the key that ``mx.random.seed`` would set, or one drawn from MLX's state.

    Raises:
        InputError: The seed has more than 64 bits, or is negative.
    """
    if seed is not None:
        if integer("seed", seed, 0) >= 2**64:
            raise InputError(f"seed must be from 0 to 2**64 - 1, got {seed}")
        return mx.random.key(seed)
    return mx.random.randint(0, 2**31 - 1, (2,), mx.uint32)
