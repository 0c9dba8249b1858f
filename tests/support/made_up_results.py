"""Results of a comparison, made up."""

from __future__ import annotations

from typing import Any

from mlx_sink.measure.comparison.methods import NAMES


def values() -> dict[str, Any]:
    """Return what a run writes as JSON, made up: every method, two needle tests."""
    lengths = [1 << 10, 1 << 12, 1 << 14]
    methods: dict[str, Any] = {}
    for i, name in enumerate(NAMES):
        at = [
            {
                "length": n,
                "ms": 2.0 + i,
                "ms_low": 1.9 + i,
                "ms_high": 3.0 + i,
                "prefill_tokens_per_s": 1e3 / (i + 1),
                "cache_bytes": (i + 1) << 20,
                "peak_bytes": (i + 2) << 21,
                "count": 9,
                "loss": 3 + 0.1 * i,
                "perplexity": 20.0,
                "from": n // 4,
                "low": 2.9 + 0.1 * i,
                "high": 3.2 + 0.1 * i,
            }
            for n in lengths
        ]
        methods[name] = {"tokens": 1 << 14, "stopped": None, "at": at}
    methods["full"] |= {"stopped": "its time was out", "tokens": 1 << 12}
    scores = [
        {
            "test": test,
            "place": f"{n} tokens back",
            "distance": n,
            "arm": name,
            "right": 1,
            "trials": 8,
        }
        for test in ("needle", "lines")
        for n in (64, 128, 288, 512)
        for name in NAMES
    ]
    machine = {
        "platform": "a & b",
        "processor": "<M1>",
        "cores": 8,
        "device": "gpu",
        "matmul_gflops_float32": 1e3,
        "fast_blas": True,
        "python": "3",
        "memory": 16 << 30,
        "mlx-sink": "0",
        "mlx": "0",
        "mlx-lm": "0",
    }
    return {
        "mlx_sink_compare": 1,
        "command": "python -m mlx_sink.compare " + "--text x " * 40,
        "date": "today",
        "machine": machine,
        "model": {"name": "demo", "context": 512, "weights": 1},
        "text": {"name": "book.txt", "tokens": 1 << 14},
        "config": {"num_sinks": 4, "window": 252, "capacity": 256},
        "lengths": lengths,
        "trials": 8,
        "choices": 8,
        "finished": True,
        "arms": methods,
        "beside_recompute": {},
        "recall": scores,
    }
