"""Losses by position in a stream: the figures of each bucket, as a table and as a plot."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from mlx_sink.io.units import short
from mlx_sink.measure.comparison.methods import NAMES, QUANTISED
from mlx_sink.measure.losses import Mean, by_position

# A palette that people with any colour vision can tell apart (Okabe and Ito, 2008).
STYLES: dict[str, dict[str, Any]] = {
    "full": {"color": "#999999"},
    "rotating": {"color": "#d55e00"},
    "window": {"color": "#0072b2", "linestyle": ":", "zorder": 2.5},
    "recompute": {
        "color": "#000000",
        "linestyle": "",
        "marker": "o",
        "markersize": 4,
        "zorder": 3,
    },
    "ours": {"color": "#009e73", "linewidth": 3},
    "bits8": {"color": "#56b4e9", "linestyle": "--", "zorder": 3},
    "bits4": {"color": "#cc79a7", "linestyle": "--", "zorder": 3},
}


def bucket_edges(tokens: int, wanted: Sequence[int] | None) -> list[int]:
    """Return where position buckets begin and end: at 0, 256, 512, 1024, ... unless stated."""
    ends = wanted or [256 << i for i in range(max(0, math.ceil(math.log2(tokens / 256))) + 1)]
    return [0, *sorted({min(end, tokens) for end in [*ends, tokens]})]


def summary(losses: np.ndarray, positions: np.ndarray, edges: list[int]) -> dict[str, Any]:
    """Return mean loss and perplexity over all positions, by bucket, and finely for a plot."""
    # A sampled method has fewer losses, so fewer points keep it as steady as the others.
    sampled = len(positions) > 1 and positions[1] - positions[0] > 1
    curve = curve_edges(edges[-1], 16 if sampled else 64)
    return {
        **asdict(Mean.of(losses)),
        "buckets": [bucket.to_dict() for bucket in by_position(losses, positions, edges)],
        "curve": [point.to_dict() for point in by_position(losses, positions, curve)],
    }


def curve_edges(tokens: int, points: int) -> list[int]:
    """Return the edges of even buckets."""
    return sorted({round(tokens * i / points) for i in range(points + 1)})


def same_tokens(ours: np.ndarray, oracle: np.ndarray) -> dict[str, Any]:
    """Compare ours with the oracle on exactly the same tokens."""
    if not ours.size:
        return {"count": 0}
    a, b = Mean.of(ours).perplexity, Mean.of(oracle).perplexity
    return {"count": ours.size, "ours": a, "recompute": b, "ratio": a / b}


def table(result: dict[str, Any]) -> str:
    """Lay the perplexities out for people, one row for each bucket."""
    methods = result["arms"]
    cells = {
        name: {(b["from"], b["to"]): f"{b['perplexity']:.2f}" for b in method["buckets"]}
        for name, method in methods.items()
    }
    spans = sorted({span for column in cells.values() for span in column})
    widths = {name: max(len(NAMES[name]), 8) for name in methods}
    lines = [
        f"perplexity by position: {result['streams']} streams of {result['tokens']} tokens, "
        f"{result['capacity']} in the cache",
        "  ".join([f"{'tokens':>12}", *(f"{NAMES[name]:>{widths[name]}}" for name in methods)]),
    ]
    for low, high in spans:
        row = (f"{cells[name].get((low, high), '-'):>{widths[name]}}" for name in methods)
        lines.append("  ".join([f"{f'{short(low)}-{short(high)}':>12}", *row]))
    row = (f"{method['perplexity']:>{widths[name]}.2f}" for name, method in methods.items())
    lines.append("  ".join([f"{'all':>12}", *row]))
    same = result.get("same_tokens")
    if same and same["count"]:
        lines.append(
            f"the same {same['count']} tokens, all past the first eviction: mlx_sink "
            f"{same['ours']:.4f}, recompute {same['recompute']:.4f}, ratio {same['ratio']:.4f}"
        )
    if "ours" in methods:
        lines += [against(methods[n], methods["ours"], n) for n in QUANTISED if n in methods]
    return "\n".join(lines)


def against(method: dict[str, Any], ours: dict[str, Any], name: str) -> str:
    """Say how much more loss a quantised ring has than a plain one, and how many bytes less."""
    more = [
        f"{short(b['from'])}-{short(b['to'])} {b['loss'] / a['loss'] - 1:+.3%}"
        for a, b in zip(ours["buckets"], method["buckets"], strict=True)
    ]
    nbytes = method["cache_bytes"]
    size = f"{nbytes} bytes a stream, {nbytes / ours['cache_bytes']:.1%}"
    whole = f"loss {method['loss'] / ours['loss'] - 1:+.3%} in all"
    return f"{NAMES[name]} against mlx_sink: {size}; {whole}; {', '.join(more)}"


def plot(result: dict[str, Any], path: Path) -> None:
    """Draw perplexity by position as a PNG, on a log scale if the methods lie far apart."""
    # Only a run that is to be drawn needs matplotlib.
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    figure = Figure(figsize=(8, 4.5), layout="constrained", facecolor="white")
    axes = figure.add_subplot()
    for name, method in result["arms"].items():
        middles = [(b["from"] + b["to"]) / 2 for b in method["curve"]]
        heights = [b["perplexity"] for b in method["curve"]]
        axes.plot(middles, heights, label=NAMES[name], **STYLES[name])
    axes.axvline(result["capacity"], color="#bbbbbb", linewidth=0.8, linestyle=":")
    low, high = axes.get_ylim()
    if high > 4 * low:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.0f}"))
    axes.set_xlim(0, result["tokens"])
    axes.set_xlabel("position in the stream (tokens); the dotted line is where eviction begins")
    axes.set_ylabel("perplexity")
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150, format="png")
