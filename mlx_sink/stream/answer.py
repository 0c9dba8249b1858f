"""One answer of a stream: from its tokens to the text that is shown, and the reason to stop."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import mlx.core as mx
from mlx_lm.generate import GenerationResponse

from mlx_sink.stream.loop import Made
from mlx_sink.stream.text.control import control_of
from mlx_sink.stream.text.stop_strings import ShownText


class Answer(NamedTuple):
    """How an answer is shown, and when it is over.

    Attributes:
        text: Takes the tokens; may go on with an answer that was cut at its length.
        ends: End-of-text tokens.
        hidden: Tokens that are part of the stream and not of the text.
        max_tokens: Tokens at most; -1 for no limit.
        flush: At that length, hand out what is held back.
    """

    text: ShownText
    ends: frozenset[int]
    hidden: frozenset[int]
    max_tokens: int
    flush: bool

    def take(self, token: int, n: int) -> tuple[str, str | None]:
        """Take a token.

        Args:
            token: The token.
            n: How many it makes with those before.

        Returns:
            The text that can be shown, and mlx-lm's finish reason if it is the last one.
        """
        ended, full = token in self.ends, n == self.max_tokens
        shown = "" if ended or token in self.hidden else self.text.feed(token)
        reason = "stop" if ended or self.text.stopped else "length" if full else None
        if not self.text.stopped and (ended or (full and self.flush)):
            shown += self.text.finish()
        return shown, reason


def hidden_tokens(tokenizer: Any, stop: Sequence[str]) -> frozenset[int]:
    """Return the control tokens that are not shown; those that a stop string names are."""
    control = control_of(tokenizer)
    named = {i for word, i in control.words.items() if any(word in text for text in stop)}
    return control.hidden - named


def response(
    shown: str, made: Made, n: int, reason: str | None, read: tuple[int, float], began: float
) -> GenerationResponse:
    """Return what mlx-lm's generators yield for a token.

    Args:
        shown: The text that can be shown.
        made: The token.
        n: Tokens of this answer so far.
        reason: The finish reason.
        read: Tokens read before the answer, and how many of them in a second.
        began: When the answer began, by ``time.perf_counter``, in seconds.
    """
    return GenerationResponse(
        text=shown,
        token=made.token,
        logprobs=made.logprobs,
        from_draft=made.from_draft,
        prompt_tokens=read[0],
        prompt_tps=read[1],
        generation_tokens=n,
        generation_tps=n / max(time.perf_counter() - began, 1e-9),
        peak_memory=mx.get_peak_memory() / 1e9,
        finish_reason=reason,
    )
