"""CPU time of a decode step on a real model, side by side with mlx-lm's caches.

    python scripts/bench/real_speed.py --model SmolLM2-135M-Instruct.Q4_1.gguf

Caches are filled with random keys and values, as many as their length says. All take turns, step
by step, in one process. Figures are medians of process CPU time over steps, in ms; ratios are to
`RotatingKVCache(keep=4)` of the same size, with a 95 % interval from resampling. On Linux preload
a tuned BLAS: mlx's own is slow.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from typing import Any

import _checkout  # noqa: F401  (finds this checkout)
import mlx.core as mx
import numpy as np
from mlx_lm.models.cache import KVCache, RotatingKVCache

from mlx_sink import SinkConfig, attach
from mlx_sink.cache.sink_cache import SinkCache
from mlx_sink.models.attach import make_cache
from mlx_sink.models.load import load_unattached


def _random(shape: tuple[int, ...]) -> mx.array:
    return mx.random.normal(shape)


def _ours(model: Any, window: int, shape: tuple[int, int]) -> list[Any]:
    attach(model, SinkConfig(4, window))
    caches = make_cache(model)
    tokens = 2 * window + 1000
    for cache in caches:
        assert isinstance(cache, SinkCache)
        slots = (1, shape[0], window + 4, shape[1])
        integers = (4, window, cache.ring.epoch, tokens, 0, 0, 0, 0)
        cache.state = (_random(slots), _random(slots), *integers)
    return caches


def _rotating(layers: int, size: int, shape: tuple[int, int]) -> list[Any]:
    caches = [RotatingKVCache(max_size=size, keep=4) for _ in range(layers)]
    for cache in caches:
        cache.keys, cache.values = (_random((1, shape[0], size, shape[1])) for _ in range(2))
        cache.offset, cache._idx = 2 * size, size // 2
    return caches


def _full(layers: int, tokens: int, shape: tuple[int, int]) -> list[Any]:
    caches = [KVCache() for _ in range(layers)]
    for cache in caches:
        room = (1, shape[0], tokens + 256, shape[1])
        cache.keys, cache.values, cache.offset = _random(room), _random(room), tokens
    return caches


def _step(model: Any, caches: list[Any]) -> float:
    began = time.process_time()
    mx.eval(model(mx.array([[1]]), cache=caches))
    return 1e3 * (time.process_time() - began)


def _interval(a: np.ndarray, b: np.ndarray) -> tuple[float, float, float]:
    draw = np.random.default_rng(0).integers(0, len(a), (1000, len(a)))
    ratios = np.median(a[draw], axis=1) / np.median(b[draw], axis=1)
    low, high = np.percentile(ratios, [2.5, 97.5])
    return float(np.median(a) / np.median(b)), float(low), float(high)


def main(argv: Sequence[str] | None = None) -> int:
    p = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    p.add_argument("--model", required=True)
    p.add_argument("--windows", type=int, nargs="+", default=[508, 2044])
    p.add_argument("--full", type=int, nargs="+", default=[1024, 8192, 32768])
    p.add_argument("--steps", type=int, default=40)
    args = p.parse_args(argv)
    model = load_unattached(args.model).model
    layers, attention = len(model.layers), model.layers[0].self_attn
    heads = model.args.num_key_value_heads
    shape = (heads, model.args.hidden_size // model.args.num_attention_heads)
    assert attention is not None
    arms: dict[str, list[Any]] = {}
    for window in args.windows:
        arms[f"ours, window {window}"] = _ours(model, window, shape)
        arms[f"rotating, {window + 4}"] = _rotating(layers, window + 4, shape)
    for tokens in args.full:
        arms[f"full attention, {tokens}"] = _full(layers, tokens, shape)
    times: dict[str, list[float]] = {name: [] for name in arms}
    for i in range(args.steps + 3):
        for name, caches in arms.items():
            taken = _step(model, caches)
            if i >= 3:
                times[name].append(taken)
    medians = {name: float(np.median(t)) for name, t in times.items()}
    for window in args.windows:
        ours, theirs = f"ours, window {window}", f"rotating, {window + 4}"
        ratio, low, high = _interval(np.array(times[ours]), np.array(times[theirs]))
        print(f"{ours}: {medians[ours]:.1f} ms; {theirs}: {medians[theirs]:.1f} ms; "
              f"ratio {ratio:.3f} ({low:.3f} to {high:.3f})")  # fmt: skip
    for tokens in args.full:
        name = f"full attention, {tokens}"
        for window in args.windows:
            ours = f"ours, window {window}"
            ratio, low, high = _interval(np.array(times[name]), np.array(times[ours]))
            print(f"{name}: {medians[name]:.1f} ms, {ratio:.2f} ({low:.2f} to {high:.2f}) times "
                  f"{ours}")  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
