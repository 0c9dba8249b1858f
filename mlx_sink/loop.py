"""The generation loop: tokens in, tokens out, and nothing that grows with their number.

The same tokens and log probabilities as mlx-lm's ``generate_step``, one step ahead of the caller
like it. What it keeps between two tokens is the caches, the logits that come next, a random key
and the newest tokens: a `Loop` can be saved, copied and gone on with at every token.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass
from threading import Lock
from typing import Any, NamedTuple, cast

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.generate import generation_stream, wired_limit

from mlx_sink.errors import CacheError
from mlx_sink.group import leaves
from mlx_sink.randomness import seeded
from mlx_sink.trees import copied

Sampler = Callable[[mx.array], mx.array]
"""From log probabilities ``[1, vocabulary]`` to a token ``[1]``."""

LogitsProcessor = Callable[[mx.array, mx.array], mx.array]
"""From the newest tokens ``[n]`` and logits ``[1, vocabulary]`` to other logits."""

Progress = Callable[[int, int], None]
"""Called with the tokens read so far and the tokens to read."""

PENALTY_WINDOW = 1024
"""Newest tokens that logits processors see, unless stated."""

PREFILL_STEP = 2048
"""Tokens read at once, unless stated."""

CLEAR_EVERY = 256
"""Tokens after which MLX gives buffers that it no longer uses back to the system."""

# MLX annotates the arguments of these two as nothing in particular.
_evaluate: Callable[..., None] = cast("Any", mx).eval
_start: Callable[..., None] = cast("Any", mx).async_eval


def greedy(logprobs: mx.array) -> mx.array:
    """Return the most likely token."""
    return mx.argmax(logprobs, axis=-1)


def quiet(done: int, total: int) -> None:
    """Show no progress."""


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the next token is chosen.

    Attributes:
        sampler: From log probabilities to a token; the most likely one by default.
        processors: Change the logits first, one after the other.
    """

    sampler: Sampler = greedy
    processors: Sequence[LogitsProcessor] = ()


class _Sampled(NamedTuple):
    token: mx.array
    logprobs: mx.array
    key: mx.array | None


class Loop:
    """One stream's place in a model.

    Args:
        model: An attached model.
        caches: The stream's caches, one for each layer.
        key: Where its random numbers begin, uint32 ``[2]``; ``None`` to draw from MLX's own
            state, as mlx-lm does.
        penalty_window: Newest tokens that logits processors see.

    Attributes:
        logits: What the model expects next, ``[1, vocabulary]``; ``None`` while nothing is read.
        recent: The newest tokens, as many as the penalty window has.
        position: Tokens read and made.
    """

    def __init__(
        self,
        model: nn.Module,
        caches: list[Any],
        *,
        key: mx.array | None,
        penalty_window: int = PENALTY_WINDOW,
    ):
        self.model = model
        self.caches = caches
        self.key = key
        self.logits: mx.array | None = None
        self.recent: deque[int] = deque(maxlen=penalty_window)
        tokens = [int(getattr(cache, "tokens", 0)) for cache in leaves(caches)]
        self.position = max(tokens, default=0)
        self._lock = Lock()
        self._whole = True

    def read(
        self,
        tokens: Sequence[int],
        step: int = PREFILL_STEP,
        progress: Progress = quiet,
        cancelled: Callable[[], bool] = lambda: False,
    ) -> int:
        """Take in tokens, ``step`` at a time and the last one alone, as mlx-lm does.

        Args:
            tokens: At least one.
            step: Tokens read at once.
            progress: Called between the chunks; the loop may be saved from within.
            cancelled: Asked between the chunks. If so, one more token is read, so that there is
                something to go on from.

        Returns:
            The tokens read.
        """
        total, done = len(tokens), 0
        progress(done, total)
        while total - done > 1 and not cancelled():
            n = min(step, total - done - 1)
            self._take(tokens[done : done + n])
            done += n
            progress(done, total)
        self._take(tokens[done : done + 1], last=True)
        progress(done + 1, total)
        return done + 1

    def _take(self, tokens: Sequence[int], *, last: bool = False) -> None:
        with self.stepping():
            self._whole = False
            logits = self._logits(mx.array([list(tokens)], mx.int32))
            if last:
                self.logits = logits[:, -1, :]
                _evaluate(self.logits)
            else:
                # Only the caches are wanted; the logits are not even computed.
                self.logits = None
                _evaluate([cache.state for cache in self.caches])
                mx.clear_cache()
            self.recent.extend(tokens)
            self.position += len(tokens)
            self._whole = True

    def tokens(self, sampling: Sampling) -> Iterator[tuple[int, mx.array]]:
        """Yield tokens and their log probabilities ``[vocabulary]``, without end.

        A token that is yielded has been read by the model too. The one after it has been chosen
        already, one step ahead, but counts only once it is yielded: until then the loop can be
        gone on with in another way.
        """
        history: mx.array | None = None
        with self.stepping():
            if self.logits is None:
                raise CacheError("the stream has read nothing to go on from")
            if sampling.processors:
                history = mx.array(list(self.recent), mx.int32)
            chosen = self._sample(self.logits, history, self.key, sampling)
        for n in _count():
            with self.stepping():
                if history is not None:
                    history = mx.concatenate([history, chosen.token.astype(mx.int32)])
                    history = history[-(self.recent.maxlen or 1) :]
                self._whole = False
                logits = self._logits(chosen.token[None])[:, -1, :]
                ahead = self._sample(logits, history, chosen.key, sampling)
                token = cast("int", chosen.token.item())
                self.logits, self.key = logits, chosen.key
                self.recent.append(token)
                self.position += 1
                self._whole = True
            yield token, chosen.logprobs
            if n % CLEAR_EVERY == 0:
                mx.clear_cache()
            chosen = ahead

    def _logits(self, tokens: mx.array) -> mx.array:
        return cast("mx.array", self.model(tokens, cache=self.caches))

    def _sample(
        self,
        logits: mx.array,
        history: mx.array | None,
        key: mx.array | None,
        sampling: Sampling,
    ) -> _Sampled:
        """Start to compute the next token; the key in the result is the one after it."""

        def draw() -> tuple[mx.array, mx.array]:
            # Some processors write into what they are given: an array of its own.
            processed = mx.array(logits)
            for processor in sampling.processors:
                assert history is not None
                processed = processor(history, processed)
            logprobs = processed - mx.logsumexp(processed, keepdims=True)
            return sampling.sampler(logprobs), logprobs.squeeze(0)

        (token, logprobs), after = seeded(key, draw)
        _start(token, logprobs, *([] if after is None else [after]))
        return _Sampled(token, logprobs, after)

    def fork(self) -> Loop:
        """Return a copy that goes its own way from here."""
        with self.stepping():
            caches = [copy(cache) for cache in self.caches]
            for mine, other in zip(self.caches, caches, strict=True):
                other.state = copied(mine.state)
            window = self.recent.maxlen or PENALTY_WINDOW
            fork = Loop(self.model, caches, key=self.key, penalty_window=window)
            fork.logits, fork.position = self.logits, self.position
            fork.recent.extend(self.recent)
            return fork

    def settle(self) -> None:
        """Compute what is still to be computed: MLX does that only in the thread it began in."""
        arrays = [a for a in (self.logits, self.key) if a is not None]
        _evaluate(arrays, [cache.state for cache in self.caches])

    @contextmanager
    def stepping(self) -> Generator[None]:
        """Keep other threads out during a step; refuse to go on from one that was broken off.

        Raises:
            CacheError: Another thread is at it, or an earlier step was interrupted half-way.
        """
        if not self._lock.acquire(blocking=False):
            raise CacheError("the stream is in use by another thread: give each its own fork")
        try:
            if not self._whole:
                raise CacheError(
                    "the stream was interrupted in the middle of a step: go on from a saved one"
                )
            with mx.stream(generation_stream):
                yield
        finally:
            self._lock.release()


class _Wired:
    """mlx-lm's wired limit, which is the process's: set by the first stream, back by the last."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._users = 0
        self._limit: Any = None

    @contextmanager
    def __call__(self, model: nn.Module) -> Generator[None]:
        with self._lock:
            self._users += 1
            if self._users == 1:
                self._limit = wired_limit(model, cast("list[mx.Stream]", [generation_stream]))
                self._limit.__enter__()
        try:
            yield
        finally:
            with self._lock:
                self._users -= 1
                if self._users == 0:
                    self._limit.__exit__(None, None, None)


wired = _Wired()
"""Context manager: memory stays wired on a Mac while any stream generates."""


def _count() -> Iterator[int]:
    n = 0
    while True:
        yield n
        n += 1
