"""Time mlx_sink against mlx-lm's own caches on a random Llama: both in one process, in turns.

    python scripts/bench/bench_stream.py --windows 256 1024 4096

Five sections: `position` (is a token late in the stream as cheap as an early one?), `decode` and
`prefill` (against `RotatingKVCache` of the same capacity), `reading` (a long text in chunks of
several sizes, against the same: does the time per token stay?), `bytes` (is the report right?).
Lines for people go to stderr; the last line of stdout is one JSON object.

On Linux, mlx's wheel brings a slow BLAS: preload a tuned one, as in
`LD_PRELOAD=.../libopenblas.so.0 OPENBLAS_NUM_THREADS=2 python scripts/bench/bench_stream.py`.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models import llama
from mlx_lm.models.base import scaled_dot_product_attention
from mlx_lm.models.cache import RotatingKVCache

from mlx_sink import SinkCache, SinkConfig, SinkError, attach
from mlx_sink.attention.dispatch import sink_attention
from mlx_sink.errors import ConfigError
from mlx_sink.io.terminal import say
from mlx_sink.measure.comparison.methods import rotating_caches
from mlx_sink.measure.machine import alternate, as_json, evaluate_caches, machine
from mlx_sink.models.lazy import DTYPES

SECTIONS = ("position", "decode", "prefill", "reading", "bytes")
EARLY = 2048
LATE = 1_000_000


def main(argv: list[str] | None = None) -> int:
    """Run the chosen sections and print their figures."""
    args = parse(argv)
    facts = machine()
    say(str(facts))
    shape = f"{args.layers} layers, hidden {args.hidden}, {args.heads}/{args.kv_heads} heads"
    say(f"random llama: {shape} of {args.head_dim}, vocabulary {args.vocab}, {args.dtype}")
    mx.random.seed(args.seed)
    model = random_llama(args)
    sections: dict[str, Callable[[nn.Module, argparse.Namespace], Any]] = {
        "position": bench_position,
        "decode": bench_decode,
        "prefill": bench_prefill,
        "reading": bench_reading,
        "bytes": bench_bytes,
    }
    result: dict[str, Any] = {"machine": facts.to_dict(), "options": vars(args)}
    try:
        for name in args.sections:
            result[name] = sections[name](model, args)
    except SinkError as error:
        say(f"error: {error}")
        return 2
    print(as_json(result))
    return 0


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description="Time mlx_sink against mlx-lm's own caches on a random Llama.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--sections", nargs="+", choices=SECTIONS, default=list(SECTIONS), help="what to time")
    add("--layers", type=int, default=4, help="layers of the model")
    add("--hidden", type=int, default=512, help="width of the model")
    add("--intermediate", type=int, default=1408, help="width of its MLP")
    add("--heads", type=int, default=8, help="query heads")
    add("--kv-heads", type=int, default=2, help="key and value heads")
    add("--head-dim", type=int, default=64, help="width of a head")
    add("--vocab", type=int, default=4096, help="vocabulary")
    add("--dtype", choices=DTYPES, default="float32", help="type of weights and cache")
    add("--seed", type=int, default=0, help="seed of the weights and tokens")
    add("--num-sinks", type=int, default=4, help="sinks, and mlx-lm's keep")
    add("--rollback", type=int, default=0, help="spare slots of ours")
    add("--kv-bits", type=int, help="bits that ours is quantised to")
    add("--windows", type=int, nargs="+", default=[256, 1024, 4096], help="windows for decode")
    add("--window", type=int, default=1024, help="window for the other sections")
    add("--steps", type=int, default=200, help="decoded tokens that are timed, each side")
    add("--warmup", type=int, default=20, help="decoded tokens before those")
    add("--prefill", type=int, default=8192, help="tokens of the prefill")
    add("--chunk", type=int, default=2048, help="tokens of a prefill chunk")
    add("--reading", type=int, default=65536, help="tokens that are read in chunks")
    add("--chunks", type=int, nargs="+", default=[512, 2048, 8192], help="their sizes")
    add("--rounds", type=int, default=5, help="timed prefills, each side")
    return parser.parse_args(argv)


def random_llama(args: argparse.Namespace) -> llama.Model:
    """Build a Llama of the wanted shape with random weights."""
    shape = llama.ModelArgs(
        model_type="llama",
        hidden_size=args.hidden,
        num_hidden_layers=args.layers,
        intermediate_size=args.intermediate,
        num_attention_heads=args.heads,
        num_key_value_heads=args.kv_heads,
        head_dim=args.head_dim,
        vocab_size=args.vocab,
        rms_norm_eps=1e-5,
        max_position_embeddings=131072,
        rope_theta=500000.0,
    )
    model = llama.Model(shape)
    model.set_dtype(DTYPES[args.dtype])
    mx.eval(model.parameters())
    return model


def bench_position(model: nn.Module, args: argparse.Namespace) -> dict[str, Any]:
    """Compare a token a million into the stream with one near its start.

    Late positions are injected: time does not depend on what the keys hold. A window that
    spans two epochs has one range of keys more, so it is timed as well.
    """
    config = ours_of(args, args.window)
    attach(model, config)
    early = max(EARLY, config.capacity)
    result: dict[str, Any] = {"window": config.window, "early": early}
    into_epoch = {"one_epoch": config.epoch_length // 2, "two_epochs": 0}
    for name, offset in into_epoch.items():
        near, far = filled(model, config, early), filled(model, config, early)
        position = move(far, LATE, offset)
        pair = alternate(
            decoder(model, far), decoder(model, near), rounds=args.steps, warmup=args.warmup
        ).to_dict()
        ratio = round(1 / pair["speedup"], 4)
        result[name] = {
            "position": position,
            "late_ms": pair["ours_ms"],
            "early_ms": pair["theirs_ms"],
            "late_over_early": ratio,
            "late_over_early_cpu": round(1 / pair["cpu_speedup"], 4),
        }
        say(
            f"position {position}, {name}: {pair['ours_ms']:.3f} ms a token, "
            f"{ratio:.3f} of position {early}'s"
        )
    return result


def bench_decode(model: nn.Module, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Compare decoding over full caches of the same capacity."""
    results: list[dict[str, Any]] = []
    for window in args.windows:
        config = ours_of(args, window)
        attach(model, config)
        # One past the capacity, so that both rings have wrapped.
        ours = filled(model, config, config.capacity + 1)
        theirs = rotating_caches(model, config.capacity, config.num_sinks)
        fill(model, theirs, config.capacity + 1)
        pair = alternate(
            decoder(model, ours), decoder(model, theirs), rounds=args.steps, warmup=args.warmup
        ).to_dict()
        results.append({"window": window} | pair)
        say(
            f"decode, window {window}: ours {pair['ours_ms']:.3f} ms a token, "
            f"RotatingKVCache {pair['theirs_ms']:.3f}, speed {pair['speedup']:.3f}x "
            f"(by CPU time {pair['cpu_speedup']:.3f}x)"
        )
    return results


def bench_prefill(model: nn.Module, args: argparse.Namespace) -> dict[str, Any]:
    """Compare a prefill in chunks: one layer's attention alone, and the whole model."""
    config = ours_of(args, args.window)
    attach(model, config)
    result: dict[str, Any] = {"window": config.window, "tokens": args.prefill, "chunk": args.chunk}

    def whole(make: Callable[[], list[Any]]) -> Callable[[], None]:
        return lambda: fill(model, make(), args.prefill, args.chunk)

    sides = {
        "attention": attention_sides(model, config, args),
        "model": (
            whole(lambda: model.make_cache()),
            whole(lambda: rotating_caches(model, config.capacity, config.num_sinks)),
        ),
    }
    for name, (ours, theirs) in sides.items():
        result[name] = alternate(ours, theirs, rounds=args.rounds, warmup=1).to_dict()
        say(
            f"prefill of {args.prefill} in chunks of {args.chunk}, {name}: "
            f"ours {result[name]['ours_ms']:.1f} ms, mlx-lm {result[name]['theirs_ms']:.1f}, "
            f"speed {result[name]['speedup']:.2f}x "
            f"(by CPU time {result[name]['cpu_speedup']:.2f}x)"
        )
    return result


def attention_sides(
    model: nn.Module, config: SinkConfig, args: argparse.Namespace
) -> tuple[Callable[[], None], Callable[[], None]]:
    """Return the attention of one layer over a whole prefill, ours and mlx-lm's.

    Both get the same chunks of queries, keys and values and update their cache. The masks of
    mlx-lm are made beforehand: all layers of a model share them.
    """
    rotation, scale, capacity = model.make_cache()[0].rotation, 0.125, config.capacity
    sizes = [args.chunk] * (args.prefill // args.chunk)
    heads = (args.heads, args.kv_heads, args.kv_heads)
    chunks = [
        tuple(mx.random.normal((1, h, n, args.head_dim)).astype(DTYPES[args.dtype]) for h in heads)
        for n in sizes
    ]
    masks, probe = [], RotatingKVCache(max_size=capacity, keep=config.num_sinks)
    for n in sizes:
        masks.append(probe.make_mask(n))
        probe.offset += n
    mx.eval(chunks, [mask for mask in masks if isinstance(mask, mx.array)])

    def ours() -> None:
        cache = SinkCache(config, rotation)
        for q, k, v in chunks:
            k, v = cache.update_and_fetch(k, v)
            layout = cache.take_layout()
            mx.eval(sink_attention(q, k, v, layout=layout, rotation=rotation, scale=scale))

    def theirs() -> None:
        cache = RotatingKVCache(max_size=capacity, keep=config.num_sinks)
        for (q, k, v), mask in zip(chunks, masks, strict=True):
            k, v = cache.update_and_fetch(k, v)
            mx.eval(scaled_dot_product_attention(q, k, v, cache, scale=scale, mask=mask))

    return ours, theirs


def bench_reading(model: nn.Module, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Read one long text chunk by chunk, ours and mlx-lm's taking turns at every chunk.

    Chunks that begin before the ring is full are not counted. `late_over_early` is the time of the
    last quarter of the others over that of their first quarter, medians.
    """
    config = SinkConfig(args.num_sinks, args.window)
    attach(model, config)
    text = mx.random.randint(0, model.args.vocab_size, (1, args.reading), key=mx.random.key(1))
    results: list[dict[str, Any]] = []
    for chunk in args.chunks:
        warmup = -(-config.capacity // chunk)
        rounds = args.reading // chunk - warmup
        if rounds < 1:
            raise ConfigError(f"--reading must be at least {(warmup + 1) * chunk}")
        rotating = rotating_caches(model, config.capacity, config.num_sinks)
        sides = [reader(model, caches, text, chunk) for caches in (model.make_cache(), rotating)]
        pair = alternate(*sides, rounds=rounds, warmup=warmup)
        quarter = max(1, rounds // 4)
        first, last = (
            statistics.median(side.cpu for side in part)
            for part in (pair.ours[:quarter], pair.ours[-quarter:])
        )
        row = {"chunk": chunk, "late_over_early_cpu": round(last / first, 4)} | pair.to_dict()
        results.append(row)
        say(
            f"reading {args.reading} tokens in chunks of {chunk}: ours "
            f"{row['ours_ms'] / chunk:.3f} ms a token, RotatingKVCache "
            f"{row['theirs_ms'] / chunk:.3f}, speed {row['speedup']:.2f}x (by CPU time "
            f"{row['cpu_speedup']:.2f}x), last quarter over first by CPU time "
            f"{row['late_over_early_cpu']:.3f}"
        )
    return results


def reader(model: nn.Module, caches: list[Any], text: mx.array, chunk: int) -> Callable[[], None]:
    """Return a function that reads the next chunk of a text."""
    starts = iter(range(0, text.shape[1], chunk))

    def step() -> None:
        start = next(starts)
        # All layers, and no logits: prompts need none.
        mx.eval(model.model(text[:, start : start + chunk], cache=caches))
        evaluate_caches(caches)

    return step


def bench_bytes(model: nn.Module, args: argparse.Namespace) -> dict[str, Any]:
    """Hold the report's bytes against those of full caches."""
    config = ours_of(args, args.window)
    report = attach(model, config)
    held = sum(cache.nbytes for cache in filled(model, config, config.capacity + 1))
    say(f"bytes of cache: {held}, reported {report.nbytes}")
    return {"reported": report.nbytes, "held": held, "equal": held == report.nbytes}


def ours_of(args: argparse.Namespace, window: int) -> SinkConfig:
    """Return the settings of our side."""
    return SinkConfig(args.num_sinks, window, rollback=args.rollback, kv_bits=args.kv_bits)


def filled(model: nn.Module, config: SinkConfig, tokens: int) -> list[SinkCache]:
    """Return attached caches that have seen random tokens."""
    caches = model.make_cache()
    fill(model, caches, tokens)
    return caches


def fill(model: nn.Module, caches: list[Any], tokens: int, chunk: int = 512) -> None:
    """Feed random tokens in chunks."""
    stream = mx.random.randint(0, model.args.vocab_size, (1, tokens), key=mx.random.key(1))
    for i in range(0, tokens, chunk):
        mx.eval(model(stream[:, i : i + chunk], cache=caches))
    evaluate_caches(caches)


def move(caches: list[SinkCache], target: int, offset: int) -> int:
    """Move full rings on in their stream, as decoding up to about ``target`` would leave them.

    Slots repeat every window, so a ring may move by any number of those.

    Args:
        caches: Full ones.
        target: Tokens that the stream is to have seen, rounded down.
        offset: How many of them came in the current epoch.

    Returns:
        The tokens seen.
    """
    for cache in caches:
        ring = cache.ring
        tokens = ring.tokens + (target - ring.tokens) // ring.window * ring.window
        start = tokens - offset
        cache.ring = replace(ring, tokens=tokens, start=start, previous=start - ring.epoch)
    return caches[0].tokens


def decoder(model: nn.Module, caches: list[Any]) -> Callable[[], None]:
    """Return a function that decodes one more token, greedily."""
    token = mx.array([[1]])

    def step() -> None:
        nonlocal token
        token = mx.argmax(model(token, cache=caches)[:, -1], axis=-1, keepdims=True)
        mx.eval(token)

    return step


if __name__ == "__main__":
    sys.exit(main())
