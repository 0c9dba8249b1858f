"""``python -m mlx_sink.plan``: what a model costs on a Mac, before it is downloaded."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_sink.commands import plots
from mlx_sink.commands.options import Parser, add_sink_options, program
from mlx_sink.io import terminal
from mlx_sink.io.units import format_bytes, parse_tokens, short
from mlx_sink.measure.estimate import LENGTHS, Estimate, Series, estimate
from mlx_sink.models.lazy import DTYPES

PROG = program("plan")
DESCRIPTION = (
    "Work out a model's memory and work for full attention, and for sinks and window, at any "
    "length. No weight is read: a configuration is enough, and of weight files the headers count."
)


def _count(n: float) -> str:
    """Format a large count for people."""
    for unit in ("", " K", " M", " G", " T", " P"):
        if n < 1000:
            return f"{n:.3g}{unit}"
        n /= 1000
    return f"{n:,.0f} E"


def _rate(n: float) -> str:
    return f"{n:,.0f}" if n >= 100 else f"{n:.3g}"


# A palette that people with any colour vision can tell apart (Okabe and Ito, 2008).
STYLES: dict[str, dict[str, Any]] = {
    "full": {"color": "#999999", "label": "full attention"},
    "window": {"color": "#0072b2", "linestyle": ":", "label": "window only"},
    "sinks": {"color": "#009e73", "linewidth": 3, "label": "sinks + window"},
    "sinks_8bit": {"color": "#e69f00", "label": "the same, 8 bits"},
    "sinks_4bit": {"color": "#d55e00", "label": "the same, 4 bits"},
}


@dataclass(frozen=True, slots=True)
class Quantity:
    """Values over the length of the stream: a table of the text, and a plot.

    Attributes:
        heading: Of the table; the lengths follow.
        title: Of the plot.
        series: Takes the values out of an estimate.
        write: Formats a value for people.
    """

    heading: str
    title: str
    series: Callable[[Estimate], Series]
    write: Callable[[float], str]


QUANTITIES = (
    Quantity(
        "bytes of the cache at",
        "bytes of the cache",
        lambda estimate: estimate.cache_bytes,
        format_bytes,
    ),
    Quantity(
        "attention: multiply-adds of a token at",
        "attention: multiply-adds of a token",
        lambda estimate: estimate.decode_multiply_adds,
        _count,
    ),
    Quantity(
        "attention: multiply-adds of a prompt of",
        "attention: multiply-adds of the prompt",
        lambda estimate: estimate.prefill_multiply_adds,
        _count,
    ),
)


def parser() -> Parser:
    """Return the command's parser."""
    p = Parser(prog=PROG, description=DESCRIPTION)
    p.add_argument(
        "--model",
        default="demo",
        help="a Hugging Face repository, a model folder, a file of GGUF, a config.json, or "
        "'demo' (default)",
    )
    add_sink_options(p)
    p.add_argument("--dtype", choices=DTYPES, help="of the weights (default: the configuration's)")
    p.add_argument(
        "--lengths",
        nargs="+",
        metavar="TOKENS",
        help=f"lengths of the stream (default: {' '.join(map(short, LENGTHS))})",
    )
    p.add_argument("--json", action="store_true", help="print one JSON object")
    p.add_argument("--plot", type=Path, metavar="FILE", help="draw it: a .png or .svg file")
    return p


def as_text(estimate: Estimate) -> str:
    """Lay an estimate out for people."""
    context, weights = estimate.context, estimate.weights
    dtype = estimate.dtype + " (assumed)" * estimate.dtype_assumed
    lines = [
        str(estimate.report),
        f"weights {format_bytes(weights.nbytes)} in {dtype}, of which a token reads "
        f"{format_bytes(weights.read_by_a_token)}; trained on "
        + (f"{context} tokens" if context else "an unknown number of tokens"),
        f"full attention takes {estimate.bytes_per_token} bytes a token",
        *(f"note: {note}" for note in estimate.notes),
    ]
    for quantity in QUANTITIES:
        lines += ["", *_table(quantity, estimate)]
    lines += ["", *_fits(estimate), "", *_chips(estimate)]
    return "\n".join(lines) + "\n"


def _table(quantity: Quantity, estimate: Estimate) -> list[str]:
    head = "".join(f"{short(n):>12}" for n in estimate.lengths)
    lines = [f"{quantity.heading:<40}{head}"]
    for name, values in quantity.series(estimate).items():
        cells = "".join(f"{'-' if v is None else quantity.write(v):>12}" for v in values)
        lines.append(f"  {STYLES[name]['label']:<38}{cells}")
    return lines


def _fits(estimate: Estimate) -> list[str]:
    lines = [
        f"{'memory (2^30 bytes)':<28}{'full attention':>20}{'streams of sinks + window':>28}"
        f"{'window of --memory':>20}"
    ]
    for fit in estimate.fits:
        full, streams = "-", "-"
        if fit.beside_weights:
            full = "any length" if fit.full_tokens is None else f"{fit.full_tokens:,} tokens"
            streams = f"{fit.streams or 0:,}"
        window = f"{fit.window:,}" if fit.window else "-"
        lines.append(f"{fit.memory_gib:>19} GB      {full:>20}{streams:>28}{window:>20}")
    return lines


def _chips(estimate: Estimate) -> list[str]:
    head = "".join(f"{short(n):>9}" for n in estimate.lengths)
    title = "tokens/s at most, by bandwidth"
    lines = [f"{title:<31}{'GB/s':>8}  {'sinks':>8} | full{head[4:]}"]
    for limit in estimate.chips:
        full = "".join(f"{_rate(v):>9}" for v in limit.full)
        lines.append(
            f"  {limit.chip.name:<29}{limit.chip.gb_per_s:>8g}  "
            f"{_rate(limit.sinks[-1]):>8} | {full}"
        )
    return lines


def draw(estimate: Estimate) -> Any:
    """Draw memory and work over the length of the stream, as a matplotlib figure."""
    figure = plots.new_figure(8, 11)
    for axes, quantity in zip(figure.subplots(len(QUANTITIES)), QUANTITIES, strict=True):
        series = quantity.series(estimate)
        for name, values in series.items():
            known = [(n, v) for n, v in zip(estimate.lengths, values, strict=True) if v]
            if known:
                axes.plot(*zip(*known, strict=True), marker="o", markersize=4, **STYLES[name])
        axes.set_xscale("log", base=2)
        axes.set_xticks(estimate.lengths, [short(n) for n in estimate.lengths])
        axes.minorticks_off()
        if any(v for values in series.values() for v in values):
            axes.set_yscale("log")
        axes.set_title(quantity.title, loc="left", fontsize=10)
        plots.plain(axes)
    figure.axes[0].legend(frameon=False)
    figure.axes[-1].set_xlabel("tokens of the stream")
    name = f"{estimate.report.model_type}: {estimate.model}"
    figure.suptitle(name, fontsize=11, parse_math=False)
    return figure


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    args: argparse.Namespace = parser().parse_args(arguments)
    lengths = [parse_tokens(text) for text in args.lengths] if args.lengths else LENGTHS
    if args.plot:
        plots.check_path(args.plot)
    sizes = {"num_sinks": args.num_sinks, "window": args.window}
    result = estimate(args.model, **sizes, dtype=args.dtype, lengths=lengths)
    if args.plot:
        plots.save(draw(result), args.plot)
    text = json.dumps(result.to_dict(), indent=1) + "\n" if args.json else as_text(result)
    terminal.write(text)
    return 0
