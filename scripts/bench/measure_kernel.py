"""Count what the decode kernel does, and time the Python of a call: no GPU is needed for either.

The counts are those of the kernel's text run on the CPU (`tests/support/host_metal`), the same on
every machine; beside them those of MLX's own kernel, `sdpa_vector`, on as many keys. A `simd_sum`
or `simd_max` counts as the five shuffles that it takes to join 32 lanes.

Python is timed while MLX traces a function: that is where its kernels may be called without
Metal, and what it does then is what it does at every call. Text to stdout, or JSON (`--json`).
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any
from unittest import mock

import _checkout  # noqa: F401 (the runner and its cases are the tests')
import _mlx_sdpa
import host_metal
import mlx.core as mx
from decode_case import Case, arrays, ring_at, run

from mlx_sink.attention.dispatch import sink_attention
from mlx_sink.attention.kernels import check_decode, source, trust
from mlx_sink.attention.kernels import decode as kernel
from mlx_sink.attention.kernels.tables import decode_tables

SHAPES = [
    (64, 1, 1), (64, 8, 1), (64, 16, 1), (80, 4, 1), (96, 4, 1), (128, 1, 1), (128, 4, 1),
    (128, 8, 1), (128, 16, 1), (192, 8, 1), (256, 8, 1), (128, 4, 2), (128, 4, 4), (128, 4, 8),
    (128, 8, 8),
]  # fmt: skip
"""head_dim, query heads a kv head, new tokens."""
RING = ring_at(4, 508, 1999)
REDUCTIONS = ("simd_sum", "simd_max")


def count(head_dim: int, group: int, n: int, splits: int = 2) -> dict[str, Any]:
    """Return the counts of a call of one kv head on a full ring that has wrapped, float16."""
    case = Case((RING,), mx.float16, head_dim, n_kv=1, group=group, n=n, splits=splits)
    a = arrays(case)
    with mock.patch.object(mx.fast, "metal_kernel", host_metal.metal_kernel):
        kernel.forget()
        run(case, a)
        passes = [built.report for built in (kernel._pass_1(), kernel._pass_2())]
    kernel.forget()
    keys = RING.capacity + n - 1
    theirs = _mlx_sdpa.run(a.q, *(mx.contiguous(x[:, :, :keys]) for x in (a.k, a.v)))
    return {
        "head_dim": head_dim,
        "group": group,
        "n": n,
        "ours": _figures(passes[0], ("k", "v"), keys, head_dim, group * n),
        "mlx": theirs and _figures(theirs[1], ("keys", "values"), keys, head_dim, group * n),
        "bytes_stored": [report.stored for report in passes],
    }


def _figures(
    report: host_metal.Report, names: tuple[str, str], keys: int, head_dim: int, rows: int
) -> dict[str, float]:
    loaded = sum(report.buffers[name].loaded for name in names)
    shuffles = sum(5 * n if name in REDUCTIONS else n for name, n in report.simd.items())
    return {
        "kv_loaded_over_minimum": loaded / (2 * keys * head_dim * mx.float16.size),
        "shuffles_a_key_and_row": shuffles / (keys * rows),
        "threadgroup_barriers": report.counts["threadgroup_barriers"],
    }


def time_python(calls: int) -> dict[str, dict[str, float]]:
    """Return the microseconds of Python of one layer's call in a decode step."""
    case = Case((RING,), mx.float16, 128, group=4)
    a, layout, rotation = arrays(case), case.layouts[0], case.rotation
    block = layout.block(layout.ring.tokens, layout.end)
    found: dict[str, dict[str, float]] = {}

    def traced(q: mx.array) -> mx.array:
        def launch(splits: int) -> Callable[[], object]:
            return lambda: kernel.decode(q, a.k, a.v, a.tables, scale=1.0, splits=splits)

        def attend() -> mx.array:
            return sink_attention(q, a.k, a.v, layout=layout, rotation=rotation, scale=1.0)

        found["tables looked up"] = _microseconds(
            lambda: decode_tables(layout, block, rotation), calls
        )
        found["decode, one pass"] = _microseconds(launch(1), calls)
        found["decode, two passes"] = _microseconds(launch(2), calls)
        found["sink_attention, all of it"] = _microseconds(attend, calls)
        return q

    trusted = trust.Verdict(True, 0.0, "")
    with (
        mock.patch.object(source, "backend", return_value="metal"),
        mock.patch.object(source, "device", mx.default_device),
        mock.patch.object(check_decode, "verdict_of", return_value=trusted),
    ):
        check_decode.forget()
        mx.export_function(lambda _: None, traced, a.q)
    check_decode.forget()
    return found


def _microseconds(call: Callable[[], object], calls: int) -> dict[str, float]:
    call()  # the first makes what the others find
    times: list[float] = []
    for _ in range(calls):
        began = time.perf_counter()
        call()
        times.append((time.perf_counter() - began) * 1e6)
    return {"fastest": round(min(times), 1), "median": round(statistics.median(times), 1)}


def as_text(found: dict[str, Any]) -> str:
    """Write what was measured for people."""
    lines = [
        f"ring of {RING.capacity} keys in 2 splits, one kv head, float16; in brackets MLX's own",
        f"{'head_dim':>8} {'GQA':>4} {'new':>4} {'K, V loaded / minimum':>22} "
        f"{'shuffles a key and row':>23} {'barriers':>10}  bytes stored",
    ]
    for row in found["counts"]:
        loaded, shuffles, barriers = (
            f"{row['ours'][name]:.{places}f} ({row['mlx'][name]:.{places}f})"
            if row["mlx"]
            else f"{row['ours'][name]:.{places}f} (-)"
            for name, places in (
                ("kv_loaded_over_minimum", 3),
                ("shuffles_a_key_and_row", 2),
                ("threadgroup_barriers", 0),
            )
        )
        lines.append(
            f"{row['head_dim']:>8} {row['group']:>4} {row['n']:>4} {loaded:>22} {shuffles:>23} "
            f"{barriers:>10}  {' + '.join(map(str, row['bytes_stored']))}"
        )
    lines.append("Python of one call, in microseconds")
    for name, took in found["python_us"].items():
        lines.append(f"{name:>26}: {took['fastest']:5.1f} fastest, {took['median']:5.1f} median")
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run as a command; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--calls", type=int, default=3000, help="timed of each kind (3000)")
    parser.add_argument("--shapes", type=int, default=len(SHAPES), help="counted (all)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    given = parser.parse_args(arguments)
    found = {
        "counts": [count(*shape) for shape in SHAPES[: given.shapes]],
        "python_us": time_python(given.calls),
    }
    sys.stdout.write(json.dumps(found, indent=1) + "\n" if given.json else as_text(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
