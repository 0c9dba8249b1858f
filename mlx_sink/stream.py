"""Text in, endless text out: the streaming API."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.generate import GenerationResponse, generate_step, generation_stream, wired_limit
from mlx_lm.tokenizer_utils import TokenizerWrapper

from mlx_sink.attach import make_cache
from mlx_sink.cache import SinkCache
from mlx_sink.errors import InputError
from mlx_sink.text import StopStrings, forget

FORGET_EVERY = 256
"""Tokens after which text that was already handed out is dropped."""


def stream_generate(
    model: nn.Module,
    tokenizer: Any,
    prompt: str | Sequence[int] | mx.array,
    max_tokens: int = 256,
    *,
    stop: Sequence[str] = (),
    ignore_eos: bool = False,
    prompt_cache: list[SinkCache] | None = None,
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
        prompt_cache: The caches of a stream to go on with, from ``model.make_cache()``; read
            and written. A new stream by default.
        options: Passed to mlx-lm's ``generate_step``: ``sampler``, ``logits_processors``,
            ``prefill_step_size``, ``prompt_progress_callback``.

    Yields:
        mlx-lm's ``GenerationResponse``: one for each token, its text possibly empty.

    Raises:
        InputError: The prompt is empty, or an option does not go with a bounded cache.
    """
    for name in ("max_kv_size", "kv_bits", "draft_model"):
        if options.get(name) is not None:
            raise InputError(f"{name} does not go with a sink cache: its size is fixed by attach")
    if max_tokens == 0 or max_tokens < -1:
        raise InputError(f"max_tokens must be positive, or -1 for no limit, got {max_tokens}")
    if not isinstance(tokenizer, TokenizerWrapper):
        tokenizer = TokenizerWrapper(tokenizer)
    tokens = _encode(tokenizer, prompt)
    if tokens.size == 0:
        raise InputError("the prompt is empty")
    caches = make_cache(model) if prompt_cache is None else prompt_cache
    steps = generate_step(tokens, model, max_tokens=max_tokens, prompt_cache=caches, **options)
    # mlx-lm annotates tokens as arrays but yields integers.
    tokens_out = cast("Iterator[tuple[int, mx.array]]", steps)
    with wired_limit(model, cast("list[mx.Stream]", [generation_stream])):
        yield from _responses(tokens_out, tokenizer, tokens.size, max_tokens, stop, ignore_eos)


def _encode(tokenizer: Any, prompt: str | Sequence[int] | mx.array) -> mx.array:
    if isinstance(prompt, mx.array):
        return prompt
    if isinstance(prompt, str):
        special = tokenizer.bos_token is None or not prompt.startswith(tokenizer.bos_token)
        prompt = cast("list[int]", tokenizer.encode(prompt, add_special_tokens=special))
    return mx.array(list(prompt), mx.int32)


def _responses(
    steps: Iterator[tuple[int, mx.array]],
    tokenizer: Any,
    prompt_tokens: int,
    max_tokens: int,
    stop: Sequence[str],
    ignore_eos: bool,
) -> Iterator[GenerationResponse]:
    """Turn tokens into text until one of the reasons to stop comes up."""
    detokenizer, stops = tokenizer.detokenizer, StopStrings(stop)
    began = time.perf_counter()
    prompt_tps = 0.0
    for n, (token, logprobs) in enumerate(steps, start=1):
        if n == 1:
            now = time.perf_counter()
            prompt_tps, began = prompt_tokens / (now - began), now
        ended = token in tokenizer.eos_token_ids and not ignore_eos
        if not ended:
            detokenizer.add_token(token)
        last = ended or n == max_tokens
        if last:
            detokenizer.finalize()
        text = stops.feed(detokenizer.last_segment)
        if last and not stops.found:
            text += stops.finish()
        if n % FORGET_EVERY == 0:
            forget(detokenizer)
        reason = "stop" if ended or stops.found else "length" if last else None
        yield GenerationResponse(
            text=text,
            token=token,
            logprobs=logprobs,
            from_draft=False,
            prompt_tokens=prompt_tokens,
            prompt_tps=prompt_tps,
            generation_tokens=n,
            generation_tps=n / max(time.perf_counter() - began, 1e-9),
            peak_memory=mx.get_peak_memory() / 1e9,
            finish_reason=reason,
        )
        if reason:
            return


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
