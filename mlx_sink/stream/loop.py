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
from itertools import count
from threading import Lock
from typing import Any, NamedTuple, cast

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.generate import generation_stream

from mlx_sink.cache.group import CacheGroup, leaves
from mlx_sink.cache.sink_cache import SinkCache
from mlx_sink.config import PREFILL_STEP
from mlx_sink.errors import CacheError
from mlx_sink.io.tensors import copied
from mlx_sink.models.vocabulary import vocabulary
from mlx_sink.stream.sampler import Choice, History, Sampling, choose
from mlx_sink.stream.speculative import Draft, Step

Progress = Callable[[int, int], None]
"""Called with the tokens read so far and the tokens to read."""

PENALTY_WINDOW = 1024
"""Newest tokens that logits processors see, unless stated."""

CLEAR_EVERY = 256
"""Tokens after which MLX gives buffers that it no longer uses back to the system."""

# MLX annotates the arguments of these two as nothing in particular.
_evaluate: Callable[..., None] = cast("Any", mx).eval
_start: Callable[..., None] = cast("Any", mx).async_eval


def quiet(done: int, total: int) -> None:
    """Show no progress."""


class Made(NamedTuple):
    """A token of the stream.

    Attributes:
        token: The token.
        logprobs: What it was chosen from, ``[vocabulary]``.
        from_draft: A draft model had guessed it.
    """

    token: int
    logprobs: mx.array
    from_draft: bool


class Loop:
    """One stream's place in a model.

    Args:
        model: An attached model.
        caches: The stream's caches, one for each layer.
        key: Where its random numbers begin, uint32 ``[2]``; ``None`` to draw from MLX's own
            state, as mlx-lm does.
        penalty_window: Newest tokens that logits processors see.
        draft: A model that guesses tokens ahead.

    Attributes:
        logits: What the model expects next, ``[1, vocabulary]``; ``None`` while nothing is read.
        recent: The newest tokens: as many as the penalty window has, also after a rollback.
        recalled: Which tokens have looked up evicted ones: those that can be taken back, and one.
        vocabulary: Tokens that the model can read. A wider output is cut to them.
        position: Tokens read and made.
    """

    def __init__(
        self,
        model: nn.Module,
        caches: list[Any],
        *,
        key: mx.array | None,
        penalty_window: int = PENALTY_WINDOW,
        draft: Draft | None = None,
    ):
        self.model = model
        self.caches = caches
        self.key = key
        self.draft = draft
        self.penalty_window = penalty_window
        self.vocabulary = vocabulary(model)
        self.logits: mx.array | None = None
        self._held = CacheGroup(*caches)
        self.recent: deque[int] = deque(maxlen=penalty_window + self._held.rollback)
        self.recalled: deque[bool] = deque(maxlen=1 + self._held.rollback)
        self.position = self._held.tokens
        # Read by the model, and not yet handed out; with a draft only.
        self._ahead: deque[Step] = deque()
        self._chosen: Choice | None = None
        self._lock = Lock()
        self._whole = True
        self._recalling: bool | None = None

    def read(
        self,
        tokens: Sequence[int],
        step: int = PREFILL_STEP,
        progress: Progress = quiet,
        cancelled: Callable[[], bool] = lambda: False,
        recall: bool = True,
    ) -> int:
        """Take in tokens, ``step`` at a time and the last alone, as mlx-lm does; return how many.

        Args:
            tokens: At least one; all of them below ``vocabulary``.
            step: Tokens read at once.
            progress: Called between the chunks; the loop may be saved from within.
            cancelled: Asked between the chunks. If so, one more token is read, so that there is
                something to go on from.
            recall: These tokens look up evicted ones, where the caches keep those.
        """
        total, done = len(tokens), 0
        progress(done, total)
        while total - done > 1 and not cancelled():
            n = min(step, total - done - 1)
            self._take(tokens[done : done + n], recall)
            done += n
            progress(done, total)
        self._take(tokens[done : done + 1], recall, last=True)
        progress(done + 1, total)
        return done + 1

    def _take(self, tokens: Sequence[int], recall: bool, *, last: bool = False) -> None:
        with self.stepping():
            self._whole = False
            logits = self._logits(mx.array([list(tokens)], mx.int32), recall)
            if last:
                self.logits = logits[:, -1, :]
                _evaluate(self.logits)
            else:
                # Only the caches are wanted; the logits are not even computed.
                self.logits = None
                _evaluate([cache.state for cache in self.caches])
                mx.clear_cache()
            if self.draft:
                self.draft.read(tokens)
            self.recent.extend(tokens)
            self.recalled.extend([recall] * len(tokens))
            self.position += len(tokens)
            self._whole = True

    def tokens(self, sampling: Sampling) -> Iterator[Made]:
        """Yield tokens without end.

        A token that is yielded has been read by the model too. What follows it may have been
        chosen or even read already, but counts only once it is yielded: until then the loop can
        be gone on with in another way.
        """
        if self.draft is None:
            return self._one_by_one(sampling)
        return self._drafted(sampling, self.draft)

    def _one_by_one(self, sampling: Sampling) -> Iterator[Made]:
        with self.stepping():
            history = self._history(sampling)
            chosen = self._started(self._expected(), history, self.key, sampling)
        for n in count():
            with self.stepping():
                history = history.then(chosen.token)
                self._whole = False
                logits = self._logits(chosen.token[None])[:, -1, :]
                ahead = self._started(logits, history, chosen.key, sampling)
                token = cast("int", chosen.token.item())
                self._hand_out(token, logits, chosen.key)
                self._whole = True
            yield Made(token, chosen.logprobs, False)
            if n % CLEAR_EVERY == 0:
                mx.clear_cache()
            chosen = ahead

    def _drafted(self, sampling: Sampling, draft: Draft) -> Iterator[Made]:
        with self.stepping():
            self._expected()
        for n in count():
            with self.stepping(rewind=False):
                if not self._ahead:
                    self._round(sampling, draft)
                step = self._ahead.popleft()
                self._hand_out(step.token, step.logits, step.key)
            yield Made(step.token, step.logprobs, step.from_draft)
            if n % CLEAR_EVERY == 0:
                mx.clear_cache()

    def _round(self, sampling: Sampling, draft: Draft) -> None:
        """Have the draft guess and the model read: at least one token comes of it."""
        history = self._history(sampling)
        # A choice is never made anew: without a key of its own it would be another.
        first = self._chosen or choose(self._expected(), history.tokens, self.key, sampling)
        self._whole = False
        steps, surplus, self._chosen = draft.round(first, history, sampling, self._logits)
        self._held.trim(surplus)
        self._ahead.extend(steps)
        self._whole = True

    def _rewind(self) -> None:
        """Take back what the model has read beyond the tokens handed out."""
        n, self._chosen = len(self._ahead), None
        if n and self.draft and self._whole:
            self._held.trim(n)
            self.draft.rewind(n)
            self._ahead.clear()

    @property
    def nbytes(self) -> int:
        """Bytes of all caches, the draft model's included."""
        draft = self.draft.caches if self.draft else []
        return sum(cache.nbytes for cache in [*self.caches, *draft])

    @property
    def drafted(self) -> tuple[int, int]:
        """Tokens that the draft model has guessed, and how many of them were right."""
        return (self.draft.guessed, self.draft.right) if self.draft else (0, 0)

    @property
    def spare(self) -> int:
        """Tokens that `rollback` can take back now."""
        complete = len(self.recent) == self.position
        known = len(self.recent) - (0 if complete else self.penalty_window)
        holders = [(self._held, 0)]
        if self.draft:
            holders.append((self.draft.held, self.draft.unread))
        # Caches that hold no token set no limit.
        limits = [held.spare + unread for held, unread in holders if not held.empty()]
        return max(0, min([known, *limits]))

    def rollback(self, n: int) -> None:
        """Take back the newest n tokens, as if they had never come.

        The random key alone goes on: what is sampled in their place may be other tokens.

        Raises:
            CacheError: n is more than `spare`.
        """
        with self.stepping():
            if not 0 <= n <= self.spare:
                raise CacheError(f"cannot take back {n} tokens, only {self.spare}")
            if n == 0:
                return
            self._whole = False
            self._held.trim(n)
            if self.draft:
                self.draft.rewind(n)
            for _ in range(n):
                self.recent.pop()
                if self.recalled:
                    self.recalled.pop()
            self.position -= n
            self.logits = None
            if self.position:
                self._held.reopen()
                token = mx.array([[self.recent[-1]]], mx.int32)
                # More is taken back only before the first eviction: there is nothing to look up.
                recall = self.recalled[-1] if self.recalled else True
                self.logits = self._logits(token, recall)[:, -1, :]
                _evaluate(self.logits)
            self._whole = True

    def _hand_out(self, token: int, logits: mx.array, key: mx.array | None) -> None:
        self.logits, self.key = logits, key
        self.recent.append(token)
        self.recalled.append(True)
        self.position += 1

    def _expected(self) -> mx.array:
        if self.logits is None:
            raise CacheError("the stream has read nothing to go on from")
        return self.logits

    def _history(self, sampling: Sampling) -> History:
        width = self._expected().shape[-1]
        return History.of(list(self.recent), self.penalty_window, sampling, width)

    def _logits(self, tokens: mx.array, recall: bool = True) -> mx.array:
        if recall is not self._recalling:
            for cache in leaves(self.caches):
                if isinstance(cache, SinkCache):
                    cache.recalls = recall
            self._recalling = recall
        logits = cast("mx.array", self.model(tokens, cache=self.caches))
        wide = logits.shape[-1] > self.vocabulary
        return logits[..., : self.vocabulary] if wide else logits

    def _started(
        self, logits: mx.array, history: History, key: mx.array | None, sampling: Sampling
    ) -> Choice:
        """Start to compute the next token."""
        choice = choose(logits, history.tokens, key, sampling)
        _start(choice.token, choice.logprobs, *([] if choice.key is None else [choice.key]))
        return choice

    def fork(self) -> Loop:
        """Return a copy that goes its own way from here."""
        with self.stepping():
            held = copy(self._held)
            held.state = copied(self._held.state)
            draft = self.draft.fork() if self.draft else None
            window = self.penalty_window
            fork = Loop(
                self.model, list(held.caches), key=self.key, penalty_window=window, draft=draft
            )
            fork.logits, fork.position = self.logits, self.position
            fork.recent.extend(self.recent)
            fork.recalled.extend(self.recalled)
            return fork

    def settle(self) -> None:
        """Compute what is still to be computed: MLX does that only in the thread it began in."""
        self._rewind()
        arrays = [a for a in (self.logits, self.key) if a is not None]
        _evaluate(arrays, [cache.state for cache in self.caches])

    @contextmanager
    def stepping(self, *, rewind: bool = True) -> Generator[None]:
        """Keep other threads out during a step; refuse to go on from one that was broken off.

        Args:
            rewind: Begin at the last token that was handed out.

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
            if rewind:
                self._rewind()
            with mx.stream(generation_stream):
                yield
        finally:
            self._lock.release()
