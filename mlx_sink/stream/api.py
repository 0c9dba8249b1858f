"""`stream_generate` and `generate`, as mlx-lm has them, in constant memory."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.generate import GenerationResponse

from mlx_sink.cache.group import leaves
from mlx_sink.config import PREFILL_STEP
from mlx_sink.errors import InputError
from mlx_sink.models.attach import make_cache
from mlx_sink.stream.loop import Progress, quiet
from mlx_sink.stream.sampler import LogitsProcessor, Sampler, greedy
from mlx_sink.stream.stream import Stream
from mlx_sink.stream.text.encode import Encoder, Piece

INSTEAD = {
    "max_kv_size": "its size is fixed by attach(model, SinkConfig(window=...))",
    "kv_bits": "use attach(model, SinkConfig(kv_bits=...))",
    "draft_model": "use Stream(model, tokenizer, draft_model=...)",
}
"""Options of mlx-lm's that are not taken here, and what serves instead."""


def stream_generate(
    model: nn.Module,
    tokenizer: Any,
    prompt: str | Sequence[int] | mx.array,
    max_tokens: int = 256,
    *,
    stop: Sequence[str] = (),
    ignore_eos: bool = False,
    special: bool = True,
    prompt_cache: list[Any] | None = None,
    sampler: Sampler | None = None,
    logits_processors: Sequence[LogitsProcessor] | None = None,
    prefill_step_size: int = PREFILL_STEP,
    prompt_progress_callback: Progress | None = None,
    **options: Any,
) -> Iterator[GenerationResponse]:
    """Generate text from an attached model, piece by piece, in constant memory.

    Args:
        model: A model from `load`, or one given to `attach`.
        tokenizer: Its tokenizer.
        prompt: Text, which is encoded as is, or token ids.
        max_tokens: Tokens to generate; -1 for no limit.
        stop: Strings that end the text; they are not part of it.
        ignore_eos: Go on after an end-of-text token.
        special: Control tokens such as ``<|im_end|>`` count in a prompt that is text, as with
            mlx-lm: it may be one that a chat template has rendered. Of a text from elsewhere say
            ``False``: they are the text that they are.
        prompt_cache: The caches of a stream to go on with, from ``model.make_cache()``; read
            and written. A new stream by default.
        sampler: Picks the token, as from mlx-lm's ``make_sampler``; the most likely by default.
        logits_processors: As from mlx-lm's ``make_logits_processors``; they see the newest
            1,024 tokens of this call.
        prefill_step_size: Tokens of the prompt read at once.
        prompt_progress_callback: Called with the prompt's tokens read so far, and all of them.
        options: None of mlx-lm's others go with a bounded cache.

    Yields:
        mlx-lm's ``GenerationResponse``: one for each token, its text possibly empty.

    Raises:
        InputError: The prompt is empty, a token is not in the model's vocabulary, an option does
            not go with a bounded cache, or the caches are not from ``model.make_cache()``.
        CacheError: The model is not attached.
    """
    for name, value in options.items():
        if name not in INSTEAD:
            raise TypeError(f"stream_generate() got an unexpected option {name!r}")
        if value is not None:
            raise InputError(f"{name} does not go with a sink cache: {INSTEAD[name]}")
    caches: list[Any] = list(make_cache(model))
    if prompt_cache is not None:
        _check_kinds(prompt_cache, caches)
        caches = prompt_cache
    stream = Stream.over(model, tokenizer, caches)
    if isinstance(prompt, str):
        piece = Piece(prompt, special)
        prompt = Encoder(stream.tokenizer).encode(piece, first=True)
    progress = prompt_progress_callback or quiet
    stream.feed(prompt, prefill_step_size=prefill_step_size, progress=progress)
    yield from stream.generate(
        max_tokens,
        sampler=sampler or greedy,
        logits_processors=logits_processors or (),
        stop=stop,
        ignore_eos=ignore_eos,
        show_special_tokens=True,
    )


def _check_kinds(given: Sequence[Any], own: Sequence[Any]) -> None:
    """Raise for caches of another kind: they would serve, and grow without end."""
    kinds, expected = ([type(cache).__name__ for cache in leaves(c)] for c in (given, own))
    if kinds != expected:
        raise InputError(
            f"prompt_cache must come from model.make_cache(), with {_counted(expected)}, "
            f"got {_counted(kinds)}"
        )


def _counted(names: Sequence[str]) -> str:
    return ", ".join(f"{n} {name}" for name, n in Counter(names).items()) or "none"


def generate(
    model: nn.Module,
    tokenizer: Any,
    prompt: str | Sequence[int] | mx.array,
    max_tokens: int = 256,
    **options: Any,
) -> str:
    """Generate a whole text; arguments and errors as in `stream_generate`.

    Raises:
        InputError: Also when ``max_tokens`` is -1: an endless text has no end to return.
    """
    if max_tokens < 0:
        raise InputError("generate returns a whole text: for an endless one use stream_generate")
    pieces = stream_generate(model, tokenizer, prompt, max_tokens, **options)
    return "".join(piece.text for piece in pieces)
