"""The panels of a comparison: for each the values of every method, drawn and as a table."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass
from typing import Any

from mlx_sink.commands import plots
from mlx_sink.io.units import format_bytes, short
from mlx_sink.measure.comparison.methods import NAMES, SAMPLED
from mlx_sink.measure.comparison.results import LINES, NEEDLE, Measurement, Results, Score

# Okabe and Ito, 2008: people with any colour vision tell these apart, on light and on dark.
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
        values: For each method and row a value with its interval, or ``None``.
        write: Formats a value for people.
        level: A value to compare with, such as the share of right guesses.
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


def panels(results: Results) -> list[Panel]:
    """Return the panels of a run."""
    sampled = frozenset({SAMPLED})
    return [
        _by_length(
            results,
            "Time of a decoded token (ms)",
            "Median and middle half, of the last tokens before each length, all methods in turns.",
            _three,
            lambda m: (m.ms, m.ms_low, m.ms_high),
        ),
        _by_length(
            results,
            "Reading (tokens a second)",
            "Since the length before. mlx-lm's RotatingKVCache is fed token by token, because its "
            "mask hides the sinks in chunks; recomputing reads a whole window for each token.",
            _three,
            lambda m: _exact(m.prefill_tokens_per_s),
        ),
        _by_length(
            results,
            "Bytes of the cache",
            "Full attention grows with every token (linearly); all others are bounded.",
            format_bytes,
            lambda m: _exact(m.cache_bytes),
            without=sampled,
        ),
        _by_length(
            results,
            "Peak memory",
            "Weights, the method's cache, and the most that reading took on top.",
            format_bytes,
            lambda m: _exact(m.peak_bytes),
        ),
        _by_length(
            results,
            "Perplexity since the length before",
            "Lower is better. 95% intervals by a bootstrap over blocks of neighbouring tokens. "
            "Recomputing is sampled: it is compared below, on the same tokens.",
            _three,
            lambda m: (math.exp(m.loss), math.exp(m.low), math.exp(m.high)),
            without=sampled,
        ),
        *_needle_panels(results),
    ]


def _by_length(
    results: Results,
    title: str,
    about: str,
    write: Write,
    value_of: Callable[[Measurement], Spread],
    *,
    without: Set[str] = frozenset(),
) -> Panel:
    """Return the panel of one value that was measured at each length.

    Args:
        results: Of the run.
        title: As in `Panel`.
        about: As in `Panel`.
        write: As in `Panel`.
        value_of: Takes the value out of a measurement.
        without: Methods that are left out.
    """
    values: dict[str, list[Spread | None]] = {}
    for name, method in results.methods.items():
        spreads = {measurement.length: value_of(measurement) for measurement in method.at}
        if spreads and name not in without:
            values[name] = [spreads.get(length) for length in results.lengths]
    return Panel(title, about, [short(n) for n in results.lengths], values, write)


def _exact(value: float) -> Spread:
    return value, value, value


def _three(x: float) -> str:
    return f"{x:,.0f}" if x >= 1000 else f"{x:.3g}"


def _needle_panels(results: Results) -> list[Panel]:
    tests = {
        NEEDLE: (
            "Needles: a fact hidden in the text (share answered right)",
            "Where the line with the fact lies. What lies neither at the sinks nor in the window "
            "is gone for every bounded method.",
        ),
        LINES: (
            "Lines: facts asked for from a distance (share answered right)",
            "A text of nothing but facts, one of which is asked for (StreamEval's form).",
        ),
    }
    guess = 1 / results.choices
    result: list[Panel] = []
    for test, (title, about) in tests.items():
        scores = [score for score in results.scores if score.test == test]
        if not scores:
            continue
        places = list(dict.fromkeys(score.place for score in scores))
        shares = {(score.method, score.place): _share(score) for score in scores}
        values = {
            method: [shares.get((method, place)) for place in places]
            for method in dict.fromkeys(score.method for score in scores)
        }
        about = f"{about} {scores[0].trials} questions each; the line is a guess's share."
        result.append(Panel(title, about, places, values, lambda x: f"{x:.0%}", level=guess))
    return result


def _share(score: Score) -> Spread:
    return score.right / score.trials, *wilson(score.right, score.trials)


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
        # An interval of a few values may miss their mean, and matplotlib takes no negative bars.
        errors = [
            [max(0.0, y - low) for y, low in zip(ys, lows, strict=True)],
            [max(0.0, high - y) for y, high in zip(ys, highs, strict=True)],
        ]
        style = {**STYLES[name], **({"linestyle": ""} if panel.level is not None else {})}
        axes.errorbar(xs, ys, errors, label=NAMES[name], markersize=4, elinewidth=1, **style)
    if panel.level is not None:
        axes.axhline(panel.level, color=plots.INK, linewidth=0.8, linestyle=":")
        axes.set_ylim(-0.05, 1.05)
    elif panel.drawn:
        _scale(axes, panel.write, span or (min(panel.drawn), max(panel.drawn)))
    is_wide = max(map(len, panel.rows), default=0) > 5
    slant = {"rotation": 20, "ha": "right"} if is_wide else {}
    axes.set_xticks(places, panel.rows, parse_math=False, **slant)
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
