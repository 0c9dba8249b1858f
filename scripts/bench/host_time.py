"""How long Python takes to build one decode step: a GPU waits for it.

    python scripts/bench/host_time.py --model demo
    python scripts/bench/host_time.py --model SmolLM2-135M-Instruct.Q4_1.gguf --window 508

The model is called with one token and nothing is evaluated within the time: what is measured is
the graph. mlx-lm's `RotatingKVCache(keep=4)` of the same size and ours take turns, step by step,
in one process; the figures are medians of thread CPU time, and the ratio of the medians with a
95 % interval from resampling. Three kinds of steps of ours: in the steady state; in the first
tokens of an epoch, when the window lies in two; and with the decode kernel serving. There the
graph is built as on a Mac, but for the launch itself, in whose place stands one operation.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import _checkout  # noqa: F401  (finds this checkout)
import mlx.core as mx
import numpy as np
from mlx_lm.models.cache import RotatingKVCache

from mlx_sink import SinkConfig, attach
from mlx_sink.attention.kernels import check_decode, decode
from mlx_sink.cache.group import leaves
from mlx_sink.models.attach import make_cache
from mlx_sink.models.load import load_unattached


def _step(model: Any, caches: Sequence[Any]) -> float:
    """Build one step, and evaluate it outside the time; return milliseconds."""
    token = mx.array([[1]])
    began = time.thread_time()
    logits = model(token, cache=caches)
    taken = time.thread_time() - began
    mx.eval(logits, [cache.state for cache in caches])
    return 1e3 * taken


def _filled(model: Any, caches: list[Any], n: int) -> list[Any]:
    """Feed random tokens in chunks."""
    tokens = mx.array(np.random.default_rng(0).integers(0, 200, (1, n)))
    for i in range(0, n, 256):
        mx.eval(model(tokens[:, i : i + 256], cache=caches), [c.state for c in caches])
    return caches


@contextmanager
def _kernel() -> Iterator[None]:
    """Have the decode kernel serve, with one operation in the place of its launch."""

    def launch(pass_1: Any, launch: Any, arrays: Any, dtype: Any) -> mx.array:
        return mx.zeros(launch.out, dtype)

    with ExitStack() as patches:
        for module, name, answer in (
            (check_decode, "is_possible", lambda: True),
            (check_decode, "_is_trusted", lambda *_: True),
            (decode, "launched", launch),
            (decode, "_pass_1", lambda: None),
        ):
            patches.enter_context(mock.patch.object(module, name, answer))
        yield


def _ratio(ours: Sequence[float], theirs: Sequence[float]) -> tuple[float, float, float]:
    """Return the ratio of the medians, and its 95 % interval."""
    a, b = np.array(ours), np.array(theirs)
    draw = np.random.default_rng(0).integers(0, len(a), (1000, len(a)))
    ratios = np.median(a[draw], axis=1) / np.median(b[draw], axis=1)
    low, high = np.percentile(ratios, [2.5, 97.5])
    return float(np.median(a) / np.median(b)), float(low), float(high)


def measure(name: str, window: int, steps: int) -> dict[str, Any]:
    """Return milliseconds and ratios by kind of step."""
    model = load_unattached(name).model
    config = SinkConfig(4, window, epoch=2 * window + 8)
    attach(model, config)
    layers = len(make_cache(model))

    def ours(until: Callable[[Any], bool]) -> list[Any]:
        caches = _filled(model, make_cache(model), window + 40)
        ring = next(c for c in leaves(caches))
        while not until(ring.ring):
            mx.eval(model(mx.array([[1]]), cache=caches), [c.state for c in caches])
        return caches

    kinds: dict[str, tuple[Callable[[Any], bool], bool]] = {
        "one epoch": (lambda r: r.start == 0, False),
        "two epochs": (lambda r: r.start > 0 and r.position < 8, False),
        "one epoch, kernel": (lambda r: r.start == 0, True),
        "two epochs, kernel": (lambda r: r.start > 0 and r.position < 8, True),
    }
    results: dict[str, Any] = {}
    for kind, (until, kernel) in kinds.items():
        rotating = [RotatingKVCache(max_size=config.capacity, keep=4) for _ in range(layers)]
        theirs = _filled(model, rotating, window + 40)
        mine = ours(until)
        steps_here = min(steps, window - 48)
        pairs: list[tuple[float, float]] = []
        for _ in range(steps_here):
            if kernel:
                with _kernel():
                    a = _step(model, mine)
            else:
                a = _step(model, mine)
            pairs.append((a, _step(model, theirs)))
        a, b = ([pair[i] for pair in pairs[5:]] for i in (0, 1))
        ratio, low, high = _ratio(a, b)
        results[kind] = {
            "ms": round(float(np.median(a)), 3),
            "rotating_ms": round(float(np.median(b)), 3),
            "ratio": round(ratio, 3),
            "interval": [round(low, 3), round(high, 3)],
            "steps": len(a),
        }
    return results


def main(argv: Sequence[str] | None = None) -> int:
    p = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    p.add_argument("--model", default="demo")
    p.add_argument("--window", type=int, default=252)
    p.add_argument("--steps", type=int, default=150)
    p.add_argument("--json", action="store_true")
    args = p.parse_args(argv)
    results = measure(args.model, args.window, args.steps)
    if args.json:
        print(json.dumps({"model": args.model, "window": args.window, "kinds": results}))
        return 0
    print(f"{args.model}, 4 sinks + window {args.window}: ms of thread time to build a step")
    print(f"{'step':<20}{'ours':>9}{'rotating':>10}{'ratio':>8}  95 %")
    for kind, r in results.items():
        low, high = r["interval"]
        print(
            f"{kind:<20}{r['ms']:>9.3f}{r['rotating_ms']:>10.3f}{r['ratio']:>8.3f}  "
            f"{low:.3f} to {high:.3f}"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
