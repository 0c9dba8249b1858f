"""StreamingLLM's tables on a real model: perplexity by position, sinks, cache sizes, StreamEval.

    python scripts/bench/paper_tables.py --model SmolLM2-135M-Instruct.Q4_1.gguf --out tables \\
        --texts moby_dick.txt war_and_peace.txt

One JSON file a table is written to --out as soon as it is there, and a table whose file exists is
not measured again. `--show` prints those that exist, as Markdown. Sizes are those of a GPU;
`--scale 16` divides the tokens of the tables for a CPU, and is said in the files.

a: perplexity by position, all methods. b: number of sinks (table 2 of arXiv:2309.17453). c: size
of the cache (table 6). e: quantised rings. f: StreamEval (figure 9, table 7). long: one stream of
all texts, behind each other. Table d, the share of attention on the first tokens, is what
`python -m mlx_sink.convert --calibrate` draws.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import _checkout  # noqa: F401  (finds this checkout)
import mlx.core as mx
import numpy as np
from _buckets import bucket_edges
from mlx_lm.models.cache import RotatingKVCache

from mlx_sink import SinkConfig, attach
from mlx_sink.io.terminal import say
from mlx_sink.io.units import short
from mlx_sink.measure.comparison.methods import caches_of
from mlx_sink.measure.losses import chunk_losses, cut, recompute
from mlx_sink.measure.machine import machine
from mlx_sink.models.attach import make_cache
from mlx_sink.models.lazy import DTYPES
from mlx_sink.models.load import load_unattached

DRAWS = 2000
PIECE = 256
"""Neighbouring tokens that are drawn together for an interval."""


class Bench:
    """A model, its texts, and how much of each table is measured."""

    def __init__(self, args: argparse.Namespace):
        loaded = load_unattached(args.model)
        self.model, self.tokenizer = loaded.model, loaded.tokenizer
        if args.dtype:
            self.model.set_dtype(DTYPES[args.dtype])
        self.ids: list[int] = []
        for path in args.texts:
            text = Path(path).read_text(encoding="utf-8")
            self.ids += self.tokenizer.encode(text, add_special_tokens=False)
        self.scale, self.chunk = args.scale, args.chunk

    def streams(self, n: int, tokens: int) -> tuple[np.ndarray, np.ndarray]:
        """Cut the texts into streams, from places that lie evenly apart."""
        tokens = min(tokens // self.scale, len(self.ids) // n)
        step = len(self.ids) // n
        ids = [i for k in range(n) for i in self.ids[k * step : k * step + tokens]]
        return cut(ids, self.tokenizer.bos_token_id, n, tokens)

    def losses(
        self, method: str, config: SinkConfig, inputs: np.ndarray, targets: np.ndarray, chunk: int
    ) -> np.ndarray:
        """Return the loss of every token, ``[streams, tokens]``."""
        caches = caches_of(method, self.model, config)
        out, began = np.empty(inputs.shape, np.float32), time.time()
        for i, part in chunk_losses(self.model, caches, inputs, targets, chunk):
            out[:, i : i + part.shape[1]] = part
            if time.time() - began > 10:
                say(f"{method}: {i} of {inputs.shape[1]}")
                began = time.time()
        return out


def perplexity(losses: np.ndarray) -> dict[str, Any]:
    """Return the perplexity of some losses with a 95 % interval over pieces of neighbours."""
    pieces = _pieces(losses)
    draws = np.random.default_rng(0).integers(0, len(pieces), (DRAWS, len(pieces)))
    low, high = np.percentile(np.exp(pieces[draws].mean(axis=1)), [2.5, 97.5])
    return {
        "perplexity": float(np.exp(losses.mean())),
        "interval": [float(low), float(high)],
        "count": int(losses.size),
    }


def _pieces(losses: np.ndarray) -> np.ndarray:
    width = min(PIECE, losses.shape[1])
    n = losses.shape[1] // width * width
    return losses[:, :n].reshape(-1, width).mean(axis=1)


def ratio(ours: np.ndarray, oracle: np.ndarray) -> dict[str, Any]:
    """Return ours over the oracle's perplexity on the same tokens, pairs drawn together."""
    difference = (ours - oracle).ravel()
    draws = np.random.default_rng(0).integers(0, difference.size, (DRAWS, difference.size))
    low, high = np.percentile(np.exp(difference[draws].mean(axis=1)), [2.5, 97.5])
    return {
        "ratio": float(np.exp(difference.mean())),
        "interval": [float(low), float(high)],
        "count": int(difference.size),
    }


def by_position(losses: np.ndarray, edges: Sequence[int]) -> dict[str, Any]:
    """Return the perplexity of each bucket that is full."""
    return {
        f"{short(a)}-{short(b)}": perplexity(losses[:, a:b])
        for a, b in pairwise(edges)
        if b <= losses.shape[1]
    }


def with_oracle(
    bench: Bench,
    config: SinkConfig,
    inputs: np.ndarray,
    targets: np.ndarray,
    ours: np.ndarray,
    every: int,
    edges: Sequence[int],
) -> dict[str, Any]:
    """Recompute every k-th token that has lost some of its context, and compare them."""
    sampled = np.arange(config.capacity, inputs.shape[1], every)
    oracle, began = [], time.time()
    for i, losses in enumerate(recompute(bench.model, config, inputs, targets, sampled)):
        oracle.append(losses)
        if time.time() - began > 10:
            say(f"recompute: {i} of {len(sampled)}")
            began = time.time()
    theirs = np.stack(oracle, axis=1)
    buckets: dict[str, Any] = {}
    for a, b in pairwise(edges):
        inside = (sampled >= a) & (sampled < b)
        if inside.any():
            mine = ours[:, sampled[inside]]
            found = ratio(mine, theirs[:, inside])
            found["recompute"] = float(np.exp(theirs[:, inside].mean()))
            buckets[f"{short(a)}-{short(b)}"] = found
    return buckets


def table_a(bench: Bench) -> dict[str, Any]:
    """Perplexity by position: 16 streams of 64K tokens, capacity 1,024."""
    config = SinkConfig(4, 1020)
    inputs, targets = bench.streams(16, 64 << 10)
    edges = bucket_edges(inputs.shape[1], None)
    ours = bench.losses("ours", config, inputs, targets, bench.chunk)
    arms = {"mlx_sink": by_position(ours, edges)}
    window = bench.losses("window", config, inputs, targets, bench.chunk)
    arms["window only"] = by_position(window, edges)
    full = (12 << 10) // bench.scale
    few = inputs[:4, :full], targets[:4, :full]
    arms["full attention"] = by_position(bench.losses("full", config, *few, bench.chunk), edges)
    steps = (4 << 10) // bench.scale
    few = inputs[:, :steps], targets[:, :steps]
    arms["RotatingKVCache(keep=4)"] = by_position(bench.losses("rotating", config, *few, 1), edges)
    every = max(1, 128 // bench.scale)
    oracle = with_oracle(bench, config, inputs, targets, ours, every, edges)
    return {"config": config.to_dict(), "arms": arms, "against recompute": oracle}


def table_b(bench: Bench) -> dict[str, Any]:
    """Number of sinks, capacity 1,024: 16 streams of 16K tokens, from the first eviction on."""
    return _sizes(bench, {f"{S} sinks": SinkConfig(S, 1024 - S) for S in (0, 1, 2, 4, 8)})


def table_c(bench: Bench) -> dict[str, Any]:
    """Size of the cache, 4 sinks: 16 streams of 16K tokens, tokens 4K to 16K."""
    sizes = (256, 512, 1024, 2048, 4096)
    return _sizes(bench, {f"4 + {n - 4}": SinkConfig(4, n - 4) for n in sizes})


def table_e(bench: Bench) -> dict[str, Any]:
    """Quantised rings, 4 + 1,020: 16 streams of 16K tokens."""
    bits = {"plain": None, "8 bits": 8, "4 bits": 4}
    return _sizes(bench, {name: SinkConfig(4, 1020, kv_bits=b) for name, b in bits.items()})


def _sizes(bench: Bench, configs: dict[str, SinkConfig]) -> dict[str, Any]:
    inputs, targets = bench.streams(16, 16 << 10)
    first = (4 << 10) // bench.scale
    arms: dict[str, Any] = {}
    losses: dict[str, np.ndarray] = {}
    for name, config in configs.items():
        attach(bench.model, config)
        out, caches = np.empty(inputs.shape, np.float32), make_cache(bench.model)
        for i, part in chunk_losses(bench.model, caches, inputs, targets, bench.chunk):
            out[:, i : i + part.shape[1]] = part
        losses[name] = out[:, first:]
        arms[name] = perplexity(losses[name])
        say(f"{name}: {arms[name]}")
    base = losses[next(iter(losses))]
    for name, values in losses.items():
        difference = ratio(_pieces(values), _pieces(base))
        arms[name]["over the first"] = difference
    return {"arms": arms}


def table_f(bench: Bench) -> dict[str, Any]:
    """StreamEval: a line is asked for that many lines later; answers are forced and counted."""
    encode = lambda text: bench.tokenizer.encode(text, add_special_tokens=False)  # noqa: E731
    distances, per = (20, 40, 60, 80, 100, 150, 200, 400), max(4, 100 // bench.scale)
    arms: dict[str, Any] = {}
    for window in (1020, 2044, 4092):
        attach(bench.model, SinkConfig(4, window))
        right: dict[int, list[bool]] = {d: [] for d in distances}
        draw, caches = random.Random(7), make_cache(bench.model)
        told: list[str] = []
        fed = 0
        while any(len(answers) < per for answers in right.values()):
            number = f"{draw.randrange(10_000, 99_999)}"
            told.append(number)
            line = encode(f"line {len(told)}: REGISTER_CONTENT is <{number}>\n")
            fed += len(line)
            mx.eval(bench.model(mx.array([line]), cache=caches), [c.state for c in caches])
            if len(told) % 10 or len(told) <= max(distances):
                continue
            for d, answers in right.items():
                if len(answers) < per:
                    at = len(told) - d + 1
                    ask = encode(f"What is the REGISTER_CONTENT in line {at}? It is <")
                    answers.append(_forced(bench, caches, ask, encode(told[at - 1])))
        arms[f"4 + {window}"] = {
            "tokens a line": round(fed / len(told), 1),
            "right": {d: float(np.mean(a)) for d, a in right.items()},
            "questions": per,
        }
        say(f"{window}: {arms[f'4 + {window}']}")
    return {"arms": arms}


def _forced(bench: Bench, caches: list[Any], ask: list[int], answer: list[int]) -> bool:
    """Tell whether each token of an answer is the most likely one, on copies of the caches."""
    copies = make_cache(bench.model)
    for copy, cache in zip(copies, caches, strict=True):
        keys, values, *rest = cache.state
        copy.state = (mx.array(keys), mx.array(values), *rest)
    logits = bench.model(mx.array([ask + answer]), cache=copies)[0]
    chosen = mx.argmax(logits[len(ask) - 1 : -1], axis=-1)
    return bool((chosen == mx.array(answer)).all().item())


def table_long(bench: Bench) -> dict[str, Any]:
    """One stream of all texts, up to a million tokens; recomputed tokens are far apart."""
    config = SinkConfig(4, 1020)
    inputs, targets = bench.streams(1, 1 << 20)
    edges = bucket_edges(inputs.shape[1], None)
    chunk = 8 * bench.chunk
    ours = bench.losses("ours", config, inputs, targets, chunk)
    window = bench.losses("window", config, inputs, targets, chunk)
    arms = {"mlx_sink": by_position(ours, edges), "window only": by_position(window, edges)}
    # Token by token it would take hours: as mlx-lm reads a prompt, its sinks hidden by its mask.
    caches = [RotatingKVCache(max_size=1024, keep=4) for _ in make_cache(bench.model)]
    n = min(inputs.shape[1], (128 << 10) // bench.scale)
    out = np.empty((1, n), np.float32)
    for i, part in chunk_losses(bench.model, caches, inputs[:, :n], targets[:, :n], chunk):
        out[:, i : i + part.shape[1]] = part
    arms["RotatingKVCache(keep=4), in chunks"] = by_position(out, edges)
    every = max(1, 1024 // bench.scale)
    oracle = with_oracle(bench, config, inputs, targets, ours, every, edges)
    return {"config": config.to_dict(), "arms": arms, "against recompute": oracle}


TABLES: dict[str, Callable[[Bench], dict[str, Any]]] = {
    "a": table_a, "b": table_b, "c": table_c, "e": table_e, "f": table_f, "long": table_long,
}  # fmt: skip


def shown(folder: Path) -> Iterator[str]:
    """Lay out the tables that exist."""
    for name in TABLES:
        path = folder / f"{name}.json"
        if not path.is_file():
            continue
        result = json.loads(path.read_text(encoding="utf-8"))
        yield f"\n### {name}: {result['what']} ({result['seconds']:.0f} s, 1/{result['scale']})\n"
        arms = result["arms"]
        if name == "f":
            for arm, found in arms.items():
                cells = (f"{d}: {100 * share:.0f} %" for d, share in found["right"].items())
                yield f"{arm:<12} lines back: {', '.join(cells)}"
            continue
        for arm, found in arms.items():
            cells = {"": found} if "perplexity" in found else found
            for bucket, cell in cells.items():
                yield f"{arm:<36}{bucket:>12} {cell['perplexity']:9.2f} {_span(cell, 2)}" + (
                    f"  x{cell['over the first']['ratio']:.4f} {_span(cell['over the first'], 4)}"
                    if "over the first" in cell
                    else ""
                )
        for bucket, cell in result.get("against recompute", {}).items():
            what = f"ours / recompute {bucket:>12} {cell['ratio']:.4f} {_span(cell, 4)}"
            yield f"{what}, {cell['count']} tokens"


def _span(cell: dict[str, Any], digits: int) -> str:
    low, high = cell["interval"]
    return f"({low:.{digits}f} to {high:.{digits}f})"


def main(argv: Sequence[str] | None = None) -> int:
    p = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    p.add_argument("--model")
    p.add_argument("--texts", nargs="+", default=[])
    p.add_argument("--out", type=Path, required=True)
    p.add_argument("--tables", nargs="+", choices=TABLES, default=list(TABLES))
    p.add_argument("--scale", type=int, default=1)
    p.add_argument("--chunk", type=int, default=256)
    p.add_argument("--dtype", choices=DTYPES)
    p.add_argument("--show", action="store_true")
    args = p.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    if not args.show:
        bench = Bench(args)
        for name in args.tables:
            path = args.out / f"{name}.json"
            if path.is_file():
                continue
            say(f"table {name} ...")
            began = time.time()
            result = TABLES[name](bench)
            what = (TABLES[name].__doc__ or "").partition("\n")[0]
            facts = {"what": what, "seconds": time.time() - began, "scale": args.scale}
            facts |= {"machine": machine().to_dict(), "dtype": args.dtype}
            path.write_text(json.dumps(facts | result, indent=1, default=str), encoding="utf-8")
            say(f"table {name}: {facts['seconds']:.0f} s")
    print("\n".join(shown(args.out)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
