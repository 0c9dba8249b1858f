"""Speculative decoding: a small model guesses some tokens ahead, the model reads them all at once.

A guess counts where it is the very token that the model chooses at that place, by its own logits
and random numbers (as in mlx-lm). So the text is the model's own, greedy or sampled, whatever the
draft guesses; only how many tokens come out of one pass depends on it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import copy
from typing import Any, NamedTuple, cast

import mlx.core as mx
import mlx.nn as nn

from mlx_sink.cache.group import CacheGroup, leaves
from mlx_sink.cache.rewindable import Rewindable, rollback_of
from mlx_sink.errors import CacheError, InputError
from mlx_sink.io.tensors import copied
from mlx_sink.models.attach import make_cache
from mlx_sink.models.vocabulary import vocabulary
from mlx_sink.stream.sampler import Choice, History, Sampling, choose

_evaluate: Callable[..., None] = cast("Any", mx).eval


class Step(NamedTuple):
    """A token that the model has chosen and read.

    Attributes:
        token: The token.
        logprobs: ``[vocabulary]``, of the place where it was chosen.
        key: The random key after it.
        logits: What the model expects after it, ``[1, vocabulary]``.
        from_draft: The draft had guessed it.
    """

    token: int
    logprobs: mx.array
    key: mx.array | None
    logits: mx.array
    from_draft: bool


class Round(NamedTuple):
    """What came of one pass of the model.

    Attributes:
        steps: The tokens that count, the first chosen before the pass.
        surplus: Tokens that the model has read beyond those.
        ahead: The choice that follows; it has not been read.
    """

    steps: list[Step]
    surplus: int
    ahead: Choice


class Draft:
    """A model that guesses, and its place in the text.

    Args:
        model: The draft model.
        caches: Its caches, which can take back ``num_draft_tokens``.
        num_draft_tokens: Tokens guessed at once.

    Attributes:
        held: Its caches.
        guessed: Tokens guessed so far.
        right: Those that the model chose too.
    """

    def __init__(self, model: nn.Module, caches: list[Any], num_draft_tokens: int):
        self.model = model
        self.held = CacheGroup(*caches)
        self.num_draft_tokens = num_draft_tokens
        self.guessed = 0
        self.right = 0
        self._unread: list[int] = []
        self._vocabulary = vocabulary(model)

    @property
    def caches(self) -> list[Any]:
        """Its caches, one for each layer."""
        return list(self.held.caches)

    @property
    def unread(self) -> int:
        """Tokens that the model has read and the draft has not."""
        return len(self._unread)

    @property
    def acceptance(self) -> float | None:
        """The share of guesses that were right; ``None`` before the first."""
        return self.right / self.guessed if self.guessed else None

    def read(self, tokens: Sequence[int]) -> None:
        """Take in tokens that the model takes in too."""
        self._logits(mx.array([*self._unread, *tokens], mx.int32))
        self._unread = []
        _evaluate(self.held.state)

    def round(
        self,
        first: Choice,
        history: History,
        sampling: Sampling,
        read: Callable[[mx.array], mx.array],
    ) -> Round:
        """Guess what follows a token, and have the model read both.

        Args:
            first: The token that the model has chosen and not read.
            history: The tokens before it.
            sampling: How the model chooses; the draft does likewise, by the same random numbers.
            read: The model: from tokens ``[1, n]`` to logits ``[1, n, vocabulary]``.
        """
        seen = history.then(first.token)
        guesses = self._guesses(first, seen, sampling)
        logits = read(mx.concatenate([first.token, *guesses])[None])
        choices, key = [first], first.key
        for i in range(len(guesses) + 1):
            choices.append(choose(logits[:, i], seen.tokens, key, sampling))
            key = choices[-1].key
            if i < len(guesses):
                seen = seen.then(guesses[i])
        _evaluate([choice.token for choice in choices], guesses)
        chosen = [cast("int", choice.token.item()) for choice in choices]
        right = 0
        while right < len(guesses) and guesses[right].item() == chosen[right + 1]:
            right += 1
        self._keep(right, chosen)
        steps = [
            Step(chosen[i], choices[i].logprobs, choices[i].key, logits[:, i], from_draft=i > 0)
            for i in range(right + 1)
        ]
        return Round(steps, len(guesses) - right, choices[right + 1])

    def _guesses(self, first: Choice, seen: History, sampling: Sampling) -> list[mx.array]:
        """Guess what follows the first token; the draft does not read its last guess."""
        token, key = first.token, first.key
        vocabulary = first.logprobs.shape[-1]
        unread = mx.array(self._unread, mx.int32)
        tokens = mx.concatenate([unread, token.astype(mx.int32)])
        guesses: list[mx.array] = []
        for _ in range(self.num_draft_tokens):
            logits = _as_wide(self._logits(tokens)[:, -1, :], vocabulary)
            token, _, key = choose(logits, seen.tokens, key, sampling)
            seen = seen.then(token)
            tokens = token.astype(mx.int32)
            guesses.append(token.astype(first.token.dtype))
        return guesses

    def _keep(self, right: int, chosen: Sequence[int]) -> None:
        """Forget the wrong guesses; a last one that is right is still to be read."""
        n = self.num_draft_tokens
        self.guessed += n
        self.right += right
        self._unread = [chosen[n]] if right == n else []
        self.held.trim(max(0, n - 1 - right))

    def rewind(self, n: int) -> None:
        """Take back the newest n tokens."""
        unread = min(n, len(self._unread))
        del self._unread[len(self._unread) - unread :]
        self.held.trim(n - unread)

    def _logits(self, tokens: mx.array) -> mx.array:
        # The model may know tokens that the draft does not; MLX reads past the end of a table.
        known = mx.minimum(tokens, self._vocabulary - 1)
        return cast("mx.array", self.model(known[None], cache=self.caches))

    def fork(self) -> Draft:
        """Return a copy that goes its own way from here."""
        fork = copy(self)
        fork.held, fork._unread = copy(self.held), list(self._unread)
        fork.held.state = copied(self.held.state)
        return fork


def _as_wide(logits: mx.array, vocabulary: int) -> mx.array:
    """Return a draft's logits for the model's vocabulary: what it lacks is never guessed."""
    missing = vocabulary - logits.shape[-1]
    if missing <= 0:
        return logits[..., :vocabulary]
    return mx.pad(logits, [(0, 0), (0, missing)], constant_values=mx.array(float("-inf")))


def check_caches(caches: Sequence[Any], n: int, whose: str) -> None:
    """Raise unless caches can take back n tokens at any time.

    Args:
        caches: One for each layer.
        n: ``num_draft_tokens``.
        whose: ``"model"`` or ``"draft model"``.

    Raises:
        InputError: n is less than 1.
        CacheError: A cache cannot.
    """
    if n < 1:
        raise InputError(f"num_draft_tokens must be at least 1, got {n}")
    for i, cache in enumerate(caches):
        if not all(isinstance(part, Rewindable) for part in leaves([cache])):
            raise CacheError(
                f"the {whose} cannot take tokens back, which drafting needs: layer {i} has a "
                f"{type(cache).__name__}"
            )
        spare = rollback_of(cache)
        if spare < n:
            raise CacheError(
                f"drafting {n} tokens takes as many spare slots, the {whose} has {spare}: "
                f"attach it with SinkConfig(rollback={n})"
            )


def draft_over(caches: list[Any], draft_model: nn.Module | None, n: int) -> Draft | None:
    """Return the draft of a stream over some caches, if it is to have one."""
    if draft_model is None:
        return None
    of_draft: list[Any] = list(make_cache(draft_model))
    check_caches(caches, n, "model")
    check_caches(of_draft, n, "draft model")
    return Draft(draft_model, of_draft, n)
