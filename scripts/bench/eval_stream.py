"""Measure loss by position in a long stream: mlx_sink, mlx-lm's caches, and the oracle.

    python scripts/bench/eval_stream.py --model MODEL --text FILE --tokens 8192 --streams 16 \\
        --num-sinks 4 --window 252 --plot loss.png

The text is cut into streams that move in step as rows of a batch, each behind the tokenizer's
BOS. Five methods read the same tokens: `full` (mlx-lm's growing cache), `rotating` (mlx-lm's
`RotatingKVCache(max_size=capacity, keep=num_sinks)`, token by token as in decoding: its mask hides
the sinks in larger chunks), `window` (ours without sinks, same capacity), `recompute` (the
unmodified model on the visible tokens alone, from position 0, for every k-th token) and `ours`.
A whole book: `--streams 1 --arms ours`. Two more methods, on demand, are ours with a quantised
ring: `--arms ours bits8 bits4`.

On Linux, mlx's wheel brings a slow BLAS: preload a tuned one, as in
`LD_PRELOAD=.../libopenblas.so.0 OPENBLAS_NUM_THREADS=2 python scripts/bench/eval_stream.py ...`.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import mlx.nn as nn
import numpy as np
from _buckets import bucket_edges, plot, same_tokens, summary, table
from tqdm import tqdm

from mlx_sink import SinkConfig, SinkError, attach, load
from mlx_sink.io.terminal import say
from mlx_sink.measure.comparison.methods import QUANTISED, caches_of, config_of
from mlx_sink.measure.losses import chunk_losses, cut, recompute
from mlx_sink.measure.machine import as_json, machine
from mlx_sink.models.lazy import DTYPES

METHODS = ("full", "rotating", "window", "recompute", "ours")


def main(argv: list[str] | None = None) -> int:
    """Measure the chosen methods, print a table and write the files that were asked for."""
    args = parse(argv)
    try:
        config = SinkConfig(args.num_sinks, args.window, kv_group_size=args.kv_group_size)
        model, tokenizer = load(args.model, config)
        if args.dtype:
            model.set_dtype(DTYPES[args.dtype])
        ids = tokenize(tokenizer, args.text, args.separator)
        inputs, targets = cut(ids, tokenizer.bos_token_id, args.streams, args.tokens)
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
    names = [*METHODS, *QUANTISED]
    add("--arms", nargs="+", choices=names, default=list(METHODS), help="what to measure")
    add("--kv-group-size", type=int, default=64, help="of the quantised methods")
    add("--chunk", type=int, default=128, help="tokens fed at once")
    add("--rotating-chunk", type=int, default=1, help="the same for RotatingKVCache")
    add("--full-tokens", type=int, help="where full attention stops: its cost grows with position")
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


def measure(
    model: nn.Module,
    config: SinkConfig,
    inputs: np.ndarray,
    targets: np.ndarray,
    args: argparse.Namespace,
) -> dict[str, Any]:
    """Run the methods and gather their figures in JSON-ready form."""
    facts = machine()
    say(str(facts))
    edges = bucket_edges(inputs.shape[1], args.edges)
    options = {key: str(v) if isinstance(v, Path) else v for key, v in vars(args).items()}
    result: dict[str, Any] = {
        "machine": facts.to_dict(),
        "options": options,
        "streams": inputs.shape[0],
    }
    result |= {"tokens": inputs.shape[1], "capacity": config.capacity, "arms": {}}
    losses: dict[str, np.ndarray] = {}
    sampled = np.arange(args.every - 1, inputs.shape[1], args.every)
    for name in args.arms:
        start = time.perf_counter()
        if name == "recompute":
            positions = sampled
            steps = recompute(model, config, inputs, targets, sampled)
            seen = tqdm(steps, desc=name, unit="pos", total=len(sampled))
            losses[name] = np.stack(list(seen), axis=1)
        else:
            stop = args.full_tokens if name == "full" else None
            losses[name] = stream(model, config, name, inputs[:, :stop], targets[:, :stop], args)
            positions = np.arange(losses[name].shape[1])
        method: dict[str, Any] = {"seconds": round(time.perf_counter() - start, 2)}
        if name in ("ours", "window", *QUANTISED):
            method["cache_bytes"] = attach(model, config_of(name, config)).nbytes
        result["arms"][name] = method | summary(losses[name], positions, edges)
    if {"ours", "recompute"} <= losses.keys():
        # Before anything is evicted the two do the same, which would flatter the ratio.
        late = sampled >= config.capacity
        ours, oracle = losses["ours"][:, sampled[late]], losses["recompute"][:, late]
        result["same_tokens"] = same_tokens(ours, oracle)
    return result


def stream(
    model: nn.Module,
    config: SinkConfig,
    method: str,
    inputs: np.ndarray,
    targets: np.ndarray,
    args: argparse.Namespace,
) -> np.ndarray:
    """Return the loss of every token in nats, ``[streams, tokens]``, over one kind of cache."""
    caches = caches_of(method, model, config)
    chunk = args.rotating_chunk if method == "rotating" else args.chunk
    losses = np.empty(inputs.shape, np.float32)
    with tqdm(total=inputs.size, desc=method, unit="tok", unit_scale=True) as progress:
        for i, part in chunk_losses(model, caches, inputs, targets, chunk):
            losses[:, i : i + part.shape[1]] = part
            progress.update(part.size)
    return losses


if __name__ == "__main__":
    sys.exit(main())
