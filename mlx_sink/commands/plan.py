"""``python -m mlx_sink.plan``: what a model costs on a Mac, before it is downloaded."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mlx_sink.commands import plots
from mlx_sink.commands.options import Parser, add_sink_options, program
from mlx_sink.io import terminal
from mlx_sink.io.units import format_bytes, parse_tokens, short
from mlx_sink.measure.costs import LENGTHS, plan
from mlx_sink.models.lazy import DTYPES

PROG = program("plan")
DESCRIPTION = (
    "Work out a model's memory and work for full attention, and for sinks and window, at any "
    "length. Only its configuration is read."
)


def parser() -> Parser:
    """Return the command's parser."""
    p = Parser(prog=PROG, description=DESCRIPTION)
    p.add_argument(
        "--model",
        default="demo",
        help="a Hugging Face repository, a model folder, a config.json, or 'demo' (default)",
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


def as_text(found: dict[str, Any], report: str) -> str:
    """Lay a plan out for people.

    Args:
        found: From `planning.plan`.
        report: The table of `attach`.
    """
    weights = found["weights"]
    dtype = found["dtype"] + " (assumed)" * found["dtype_assumed"]
    context = found["context"]
    lines = [
        report,
        f"weights {format_bytes(weights['bytes'])} in {dtype}, of which a token reads "
        f"{format_bytes(weights['read_by_a_token'])}; trained on "
        + (f"{context} tokens" if context else "an unknown number of tokens"),
        f"full attention takes {found['bytes_per_token']} bytes a token",
        *(f"note: {note}" for note in found["notes"]),
        "",
        *_table("bytes of the cache at", found, "cache_bytes", format_bytes),
        "",
        *_table("attention: multiply-adds of a token at", found, "decode_multiply_adds", _count),
        "",
        *_table("attention: multiply-adds of a prompt of", found, "prefill_multiply_adds", _count),
        "",
        f"{'memory (2^30 bytes)':<28}{'full attention':>20}{'streams of sinks + window':>28}"
        f"{'window of --memory':>20}",
    ]
    for fit in found["fits"]:
        full = "any length" if fit["full_tokens"] is None else f"{fit['full_tokens']:,} tokens"
        window = f"{fit['window']:,}" if fit["window"] else "-"
        cells = (full, f"{fit['streams'] or 0:,}") if fit["beside_weights"] else ("-", "-")
        lines.append(f"{fit['memory_gib']:>19} GB      {cells[0]:>20}{cells[1]:>28}{window:>20}")
    lines += ["", *_chips(found)]
    return "\n".join(lines) + "\n"


def _table(title: str, found: dict[str, Any], key: str, write: Any) -> list[str]:
    head = "".join(f"{short(n):>12}" for n in found["lengths"])
    lines = [f"{title:<40}{head}"]
    for name, values in found[key].items():
        cells = "".join(f"{'-' if v is None else write(v):>12}" for v in values)
        lines.append(f"  {plots.STYLES[name]['label']:<38}{cells}")
    return lines


def _chips(found: dict[str, Any]) -> list[str]:
    lengths = found["lengths"]
    head = "".join(f"{short(n):>9}" for n in lengths)
    title = "tokens/s at most, by bandwidth"
    lines = [f"{title:<31}{'GB/s':>8}  {'sinks':>8} | full{head[4:]}"]
    for chip in found["chips"]:
        full = "".join(f"{_rate(v):>9}" for v in chip["full"])
        lines.append(
            f"  {chip['chip']:<29}{chip['gb_per_s']:>8g}  {_rate(chip['sinks'][-1]):>8} | {full}"
        )
    return lines


def _count(n: float) -> str:
    """Write a large count for people."""
    for unit in ("", " K", " M", " G", " T", " P"):
        if n < 1000:
            return f"{n:.3g}{unit}"
        n /= 1000
    return f"{n:,.0f} E"


def _rate(n: float) -> str:
    return f"{n:,.0f}" if n >= 100 else f"{n:.3g}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    args: argparse.Namespace = parser().parse_args(arguments)
    lengths = [parse_tokens(text) for text in args.lengths] if args.lengths else LENGTHS
    if args.plot:
        plots.check_path(args.plot)
    sizes = {"num_sinks": args.num_sinks, "window": args.window}
    found, report = plan(args.model, **sizes, dtype=args.dtype, lengths=lengths)
    if args.plot:
        plots.save(plots.draw_plan(found), args.plot)
    terminal.write(
        json.dumps(found, indent=1) + "\n" if args.json else as_text(found, str(report))
    )
    return 0
