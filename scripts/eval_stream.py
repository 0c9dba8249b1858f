"""Measure loss by position in a long stream: mlx_sink, mlx-lm's caches, and the oracle.

    python scripts/eval_stream.py --model MODEL --text FILE --tokens 8192 --streams 16 \\
        --num-sinks 4 --window 252 --plot loss.png

The text is cut into streams that move in step as rows of a batch, each behind the tokenizer's
BOS. Five arms read the same tokens: `full` (mlx-lm's growing cache), `rotating` (mlx-lm's
`RotatingKVCache(max_size=capacity, keep=num_sinks)`, token by token as in decoding: its mask hides
the sinks in larger chunks), `window` (ours without sinks, same capacity), `recompute` (the
unmodified model on the visible tokens alone, from position 0, for every k-th token) and `ours`.
A whole book: `--streams 1 --arms ours`. Two more arms, on demand, are ours with a quantised ring:
`--arms ours bits8 bits4`.

On Linux, mlx's wheel brings a slow BLAS: preload a tuned one, as in
`LD_PRELOAD=.../libopenblas.so.0 OPENBLAS_NUM_THREADS=2 python scripts/eval_stream.py ...`.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from _buckets import bucket_edges, plot, same_tokens, summary, table
from _measure import (
    DTYPES,
    as_json,
    describe,
    evaluate_caches,
    full_caches,
    machine,
    rotating_caches,
    say,
)
from tqdm import tqdm

from mlx_sink import SinkConfig, SinkError, attach, load

ARMS = ("full", "rotating", "window", "recompute", "ours")
BITS = {"bits8": 8, "bits4": 4}
RECOMPUTE_LOGITS = 1 << 26
"""Logits that the oracle computes at once: a model returns those of every token it is fed."""


def main(argv: list[str] | None = None) -> int:
    """Measure the chosen arms, print a table and write the files that were asked for."""
    args = parse(argv)
    try:
        config = SinkConfig(args.num_sinks, args.window)
        model, tokenizer = load(args.model, config)
        if args.dtype:
            model.set_dtype(DTYPES[args.dtype])
        inputs, targets = cut(tokenize(tokenizer, args.text, args.separator), tokenizer, args)
        result = measure(model, config, inputs, targets, args)
        text = as_json(result, indent=1) + "\n"
        if args.json:
            args.json.write_text(text, encoding="utf-8")
        print(table(result))
        if args.plot:
            plot(result, args.plot)
    except (SinkError, OSError, UnicodeDecodeError) as error:
        say(f"error: {error}")
        return 2
    return 0


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description="Measure loss by position in a long stream.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--model", required=True, help="folder or repository of an mlx-lm model, or `demo`")
    add("--text", type=Path, required=True, help="UTF-8 text file")
    add("--separator", default="", help="text between documents, replaced by a line break")
    add("--tokens", type=int, help="tokens of a stream; all of the text if left out")
    add("--streams", type=int, default=1, help="streams that the text is cut into")
    add("--num-sinks", type=int, default=4, help="sinks, and mlx-lm's keep")
    add("--window", type=int, default=1024, help="window, own token included")
    arms = [*ARMS, *BITS]
    add("--arms", nargs="+", choices=arms, default=list(ARMS), help="what to measure")
    add("--kv-group-size", type=int, default=64, help="of the quantised arms")
    add("--chunk", type=int, default=128, help="tokens fed at once")
    add("--rotating-chunk", type=int, default=1, help="the same for the rotating arm")
    add("--full-tokens", type=int, help="where the full arm stops: its cost grows with position")
    add("--every", type=int, default=40, help="recompute every k-th token of a stream")
    add("--edges", type=int, nargs="+", help="ends of the position buckets; doubling if left out")
    add("--dtype", choices=DTYPES, help="type of weights and cache; the model's if left out")
    add("--json", type=Path, help="write the figures here")
    add("--plot", type=Path, help="write a PNG of perplexity by position here")
    return parser.parse_args(argv)


def tokenize(tokenizer: Any, path: Path, separator: str) -> list[int]:
    """Read a text file as one stream of tokens, without any special ones."""
    text = path.read_text(encoding="utf-8")
    if separator:
        text = "\n".join(part.strip("\n") for part in text.split(separator))
    return tokenizer.encode(text, add_special_tokens=False)


def cut(ids: list[int], tokenizer: Any, args: argparse.Namespace) -> tuple[np.ndarray, np.ndarray]:
    """Cut tokens into streams, and return what is fed and what is to be predicted.

    Returns:
        Two arrays ``[streams, tokens]``: position i predicts the token fed at i + 1.

    Raises:
        SinkError: The text has too few tokens.
    """
    bos = tokenizer.bos_token_id
    room = (len(ids) - (bos is None)) // args.streams
    n = room if args.tokens is None else args.tokens
    if not 1 <= n <= room:
        raise SinkError(f"the text has {room} tokens for each of {args.streams} streams, not {n}")
    body = np.array(ids[: args.streams * n + (bos is None)], np.int32)
    if bos is None:
        return body[:-1].reshape(-1, n), body[1:].reshape(-1, n)
    targets = body.reshape(-1, n)
    first = np.full((args.streams, 1), bos, np.int32)
    return np.concatenate([first, targets[:, :-1]], axis=1), targets


def measure(
    model: nn.Module,
    config: SinkConfig,
    inputs: np.ndarray,
    targets: np.ndarray,
    args: argparse.Namespace,
) -> dict[str, Any]:
    """Run the arms and gather their figures in JSON-ready form."""
    facts = machine()
    say(describe(facts))
    edges = bucket_edges(inputs.shape[1], args.edges)
    options = {key: str(v) if isinstance(v, Path) else v for key, v in vars(args).items()}
    result: dict[str, Any] = {"machine": facts, "options": options, "streams": inputs.shape[0]}
    result |= {"tokens": inputs.shape[1], "capacity": config.capacity, "arms": {}}
    losses: dict[str, np.ndarray] = {}
    sampled = np.arange(args.every - 1, inputs.shape[1], args.every)
    for name in args.arms:
        start = time.perf_counter()
        if name == "recompute":
            positions = sampled
            losses[name] = recompute(model, config, inputs, targets, sampled)
        else:
            stop = args.full_tokens if name == "full" else None
            losses[name] = stream(model, config, name, inputs[:, :stop], targets[:, :stop], args)
            positions = np.arange(losses[name].shape[1])
        arm: dict[str, Any] = {"seconds": round(time.perf_counter() - start, 2)}
        if name in ("ours", "window", *BITS):
            arm["cache_bytes"] = attach(model, config_of(name, config, args)).nbytes
        result["arms"][name] = arm | summary(losses[name], positions, edges)
    if {"ours", "recompute"} <= losses.keys():
        # Before anything is evicted the two do the same, which would flatter the ratio.
        late = sampled >= config.capacity
        ours, oracle = losses["ours"][:, sampled[late]], losses["recompute"][:, late]
        result["same_tokens"] = same_tokens(ours, oracle)
    return result


def config_of(arm: str, config: SinkConfig, args: argparse.Namespace) -> SinkConfig:
    """Return the settings of one of our arms."""
    if arm == "window":
        return SinkConfig(0, config.capacity)
    return replace(config, kv_bits=BITS.get(arm), kv_group_size=args.kv_group_size)


def stream(
    model: nn.Module,
    config: SinkConfig,
    arm: str,
    inputs: np.ndarray,
    targets: np.ndarray,
    args: argparse.Namespace,
) -> np.ndarray:
    """Return the loss of every token in nats, ``[streams, tokens]``, over one kind of cache."""
    if arm == "full":
        caches: list[Any] = full_caches(model)
    elif arm == "rotating":
        caches = rotating_caches(model, config.capacity, config.num_sinks)
    else:
        attach(model, config_of(arm, config, args))
        caches = model.make_cache()
    chunk = args.rotating_chunk if arm == "rotating" else args.chunk
    losses = np.empty(inputs.shape, np.float32)
    with tqdm(total=inputs.size, desc=arm, unit="tok", unit_scale=True) as progress:
        for i, part in chunk_losses(model, caches, inputs, targets, chunk):
            losses[:, i : i + part.shape[1]] = part
            progress.update(part.size)
    return losses


def chunk_losses(
    model: nn.Module, caches: list[Any], inputs: np.ndarray, targets: np.ndarray, chunk: int
) -> Iterator[tuple[int, np.ndarray]]:
    """Feed streams in chunks and yield where each began and its losses; logits are not kept."""
    for i in range(0, inputs.shape[1], chunk):
        logits = model(mx.array(inputs[:, i : i + chunk]), cache=caches)
        losses = cross_entropy(logits, mx.array(targets[:, i : i + chunk]))
        mx.eval(losses)
        # Rows written by the last chunk may still be pending when its losses are there.
        evaluate_caches(caches)
        yield i, np.array(losses)


def recompute(
    model: nn.Module,
    config: SinkConfig,
    inputs: np.ndarray,
    targets: np.ndarray,
    sampled: np.ndarray,
) -> np.ndarray:
    """Return the losses of sampled tokens from a plain model fed only what each may see."""
    streams, capacity, S = inputs.shape[0], config.capacity, config.num_sinks
    losses = np.empty((streams, len(sampled)), np.float32)
    vocab = model(mx.zeros((1, 1), mx.int32)).shape[-1]
    for j, t in enumerate(tqdm(sampled, desc="recompute", unit="pos")):
        recent = np.arange(max(S, t - config.window + 1), t + 1)
        seen = inputs[:, np.concatenate([np.arange(min(S, t + 1)), recent])]
        rows = max(1, RECOMPUTE_LOGITS // (capacity * vocab))
        for i in range(0, streams, rows):
            logits = model(mx.array(seen[i : i + rows]))[:, -1]
            losses[i : i + rows, j] = cross_entropy(logits, mx.array(targets[i : i + rows, t]))
    return losses


def cross_entropy(logits: mx.array, targets: mx.array) -> mx.array:
    """Return the loss of each target in nats."""
    return nn.losses.cross_entropy(logits.astype(mx.float32), targets)


if __name__ == "__main__":
    sys.exit(main())
