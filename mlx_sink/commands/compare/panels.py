"""What a comparison shows: for each panel the values of each arm, drawn and as a table."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from mlx_sink.commands import plots
from mlx_sink.io.units import format_bytes, short
from mlx_sink.measure.methods import NAMES, SAMPLED

# Okabe and Ito, 2008: apart for people with any colour vision, on light and on dark.
STYLES: dict[str, dict[str, Any]] = {
    "full": {"color": "#8a8a8a", "marker": "s"},
    "window": {"color": "#0072b2", "linestyle": ":", "marker": "v"},
    SAMPLED: {"color": plots.INK, "linestyle": "", "marker": "x"},
    "rotating": {"color": "#d55e00", "marker": "^"},
    "ours": {"color": "#009e73", "linewidth": 2.5, "marker": "o"},
    "bits8": {"color": "#56b4e9", "linestyle": "--", "marker": "D"},
    "bits4": {"color": "#cc79a7", "linestyle": "--", "marker": "P"},
}
LOG = 4
"""Values that differ by more than this factor are drawn on a logarithmic scale."""

Spread = tuple[float, float, float]
Write = Callable[[float], str]


@dataclass(frozen=True, slots=True)
class Panel:
    """One plot and its table.

    Attributes:
        title: What it shows.
        about: How to read it.
        rows: What stands left of the table's rows.
        values: For each arm and row a value with its interval, or ``None``.
        write: Writes a value for people.
        level: A value to compare with, such as that of a guess.
    """

    title: str
    about: str
    rows: list[str]
    values: dict[str, list[Spread | None]]
    write: Write
    level: float | None = None

    @property
    def drawn(self) -> list[float]:
        """All values, intervals included."""
        return [x for row in self.values.values() for v in row if v for x in v]


def panels(found: dict[str, Any]) -> list[Panel]:
    """Return the panels of a run.

    Args:
        found: Results, as `compare` writes them.
    """
    return [
        _by_length(
            found,
            "Time of a decoded token (ms)",
            "Median and middle half, of the last tokens before each length, all arms in turns.",
            _three,
            ("ms", "ms_low", "ms_high"),
        ),
        _by_length(
            found,
            "Reading (tokens a second)",
            "Since the length before. mlx-lm's RotatingKVCache is fed token by token, because its "
            "mask hides the sinks in chunks; recomputing reads a whole window for each token.",
            _three,
            ("prefill_tokens_per_s",),
        ),
        _by_length(
            found,
            "Bytes of the cache",
            "Full attention grows with every token (linearly); all others are bounded.",
            format_bytes,
            ("cache_bytes",),
            skip=SAMPLED,
        ),
        _by_length(
            found,
            "Peak memory",
            "Weights, the arm's cache, and the most that reading took on top.",
            format_bytes,
            ("peak_bytes",),
        ),
        _by_length(
            found,
            "Perplexity since the length before",
            "Lower is better. 95% intervals by a bootstrap over blocks of neighbouring tokens. "
            "Recomputing is sampled: it is compared below, on the same tokens.",
            _three,
            ("loss", "low", "high"),
            skip=SAMPLED,
            of=math.exp,
        ),
        *_recalls(found),
    ]


def _by_length(
    found: dict[str, Any],
    title: str,
    about: str,
    write: Write,
    keys: tuple[str, ...],
    *,
    skip: str = "",
    of: Callable[[float], float] = float,
) -> Panel:
    """Return the panel of what was measured at each length: a value, or one and its interval."""
    lengths: list[int] = found["lengths"]
    values: dict[str, list[Spread | None]] = {}
    for name, arm in found["arms"].items():
        there = {measured["length"]: measured for measured in arm["at"]}
        if there and name != skip:
            values[name] = [_spread(there.get(n), keys, of) for n in lengths]
    return Panel(title, about, [short(n) for n in lengths], values, write)


def _spread(
    measured: dict[str, Any] | None, keys: tuple[str, ...], of: Callable[[float], float]
) -> Spread | None:
    if measured is None:
        return None
    found = [of(measured[key]) for key in keys]
    return found[0], found[1 % len(found)], found[-1]


def _three(x: float) -> str:
    return f"{x:,.0f}" if x >= 1000 else f"{x:.3g}"


def _recalls(found: dict[str, Any]) -> list[Panel]:
    tests = {
        "needle": (
            "Needles: a fact hidden in the text (share answered right)",
            "Where the line with the fact lies. What lies neither at the sinks nor in the window "
            "is gone for every bounded arm.",
        ),
        "lines": (
            "Lines: facts asked for from a distance (share answered right)",
            "A text of nothing but facts, one of which is asked for (StreamEval's form).",
        ),
    }
    made: list[Panel] = []
    for test, (title, about) in tests.items():
        asked = [row for row in found["recall"] if row["test"] == test]
        if not asked:
            continue
        rows = list(dict.fromkeys(row["place"] for row in asked))
        of = {(row["arm"], row["place"]): row for row in asked}
        values = {
            arm: [_share(of.get((arm, place))) for place in rows]
            for arm in dict.fromkeys(row["arm"] for row in asked)
        }
        guess = 1 / found["choices"]
        about = f"{about} {asked[0]['trials']} questions each; the line is a guess's share."
        made.append(Panel(title, about, rows, values, lambda x: f"{x:.0%}", level=guess))
    return made


def _share(row: dict[str, Any] | None) -> Spread | None:
    if row is None:
        return None
    return row["right"] / row["trials"], *wilson(row["right"], row["trials"])


def wilson(right: int, trials: int) -> tuple[float, float]:
    """Return the 95% interval of a share (Wilson, 1927)."""
    z, p = 1.96, right / trials
    middle = (p + z * z / (2 * trials)) / (1 + z * z / trials)
    half = z / (1 + z * z / trials) * (p * (1 - p) / trials + z * z / (4 * trials**2)) ** 0.5
    return max(0.0, middle - half), min(1.0, middle + half)


def draw(axes: Any, panel: Panel, span: tuple[float, float] | None = None) -> None:
    """Draw a panel.

    Args:
        axes: matplotlib's.
        panel: What to draw.
        span: The smallest and the largest value, if several panels are to share them.
    """
    places = range(len(panel.rows))
    for i, (name, row) in enumerate(panel.values.items()):
        shift = 0.12 * (i - len(panel.values) / 2) if panel.level is not None else 0.0
        known = [(x + shift, *v) for x, v in zip(places, row, strict=True) if v]
        if not known:
            continue
        xs, ys, lows, highs = zip(*known, strict=True)
        errors = [[y - a for y, a in zip(ys, lows, strict=True)]]
        errors.append([b - y for y, b in zip(ys, highs, strict=True)])
        style = {**STYLES[name], **({"linestyle": ""} if panel.level is not None else {})}
        axes.errorbar(xs, ys, errors, label=NAMES[name], markersize=4, elinewidth=1, **style)
    if panel.level is not None:
        axes.axhline(panel.level, color=plots.INK, linewidth=0.8, linestyle=":")
        axes.set_ylim(-0.05, 1.05)
    elif panel.drawn:
        _scale(axes, panel.write, span or (min(panel.drawn), max(panel.drawn)))
    wide = max(map(len, panel.rows), default=0) > 5
    axes.set_xticks(
        places, panel.rows, rotation=20 if wide else 0, ha="right" if wide else "center"
    )
    plots.plain(axes)


def _scale(axes: Any, write: Write, span: tuple[float, float]) -> None:
    """Make room for values, on a logarithmic scale if they lie far apart."""
    from matplotlib.ticker import LogLocator

    low, high = span

    def tick(value: float, _: object) -> str:
        return write(value)

    if high > LOG * low:
        axes.set_yscale("log")
        axes.set_ylim(low / 1.3, high * 1.3)
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 50 * low else (1,)))
        axes.yaxis.minorticks_off()
    else:
        room = 0.1 * (high - low) or 0.1 * high
        axes.set_ylim(low - room, high + room)
    axes.yaxis.set_major_formatter(tick)


def span_of(same: Sequence[Panel]) -> tuple[float, float] | None:
    """Return the smallest and the largest value of the same panel of several runs."""
    values = [x for panel in same for x in panel.drawn if x > 0]
    return (min(values), max(values)) if values else None
