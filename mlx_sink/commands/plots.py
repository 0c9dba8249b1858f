"""Plots, made by matplotlib: an optional dependency, imported when something is drawn."""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import Any, cast

from mlx_sink.errors import ConfigError
from mlx_sink.io.atomic import write_whole
from mlx_sink.io.units import short

FORMATS = (".png", ".svg")

# A palette that people with any colour vision can tell apart (Okabe and Ito, 2008).
STYLES: dict[str, dict[str, Any]] = {
    "full": {"color": "#999999", "label": "full attention"},
    "window": {"color": "#0072b2", "linestyle": ":", "label": "window only"},
    "sinks": {"color": "#009e73", "linewidth": 3, "label": "sinks + window"},
    "sinks_8bit": {"color": "#e69f00", "label": "the same, 8 bits"},
    "sinks_4bit": {"color": "#d55e00", "label": "the same, 4 bits"},
}
PANELS = {
    "cache_bytes": "bytes of the cache",
    "decode_multiply_adds": "attention: multiply-adds of a token",
    "prefill_multiply_adds": "attention: multiply-adds of the prompt",
}


def new_figure(width: float, height: float) -> Any:
    """Return an empty figure of so many inches.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ConfigError("a plot needs matplotlib: pip install matplotlib") from None
    return Figure(figsize=(width, height), layout="constrained", facecolor="white")


def check() -> None:
    """Raise unless something can be drawn; errors as in `new_figure`."""
    new_figure(1, 1)


def check_path(path: Path) -> None:
    """Raise unless a plot can be written to such a name.

    Raises:
        ConfigError: It is neither a .png nor a .svg.
    """
    if path.suffix.lower() not in FORMATS:
        raise ConfigError(f"a plot is a .png or a .svg file, not {path.name!r}")


def save(figure: Any, path: Path) -> None:
    """Write a figure as its file's name says.

    Raises:
        OutputError: It cannot be written.
    """
    data = io.BytesIO()
    figure.savefig(data, dpi=150, format=path.suffix.lower()[1:])
    write_whole(path, data.getvalue())


INK = "#010203"
"""Stands for the colour of the page's text."""


def svg(figure: Any, salt: str) -> str:
    """Return a figure as an SVG element to stand in a page, in the colours of its text.

    Args:
        figure: Drawn in `INK`.
        salt: Keeps its names apart from those of other figures in the page.
    """
    import matplotlib

    data = io.BytesIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    # Text stays text: a reader's program can read it, and the page is a third as long.
    with cast("Any", matplotlib).rc_context({"svg.hashsalt": salt, "svg.fonttype": "none"}):
        figure.savefig(data, format="svg", transparent=True, metadata=nothing)
    text = data.getvalue().decode()
    text = text[text.index("<svg") :].replace(INK, "currentColor")
    # Names that nothing refers to would be those of other figures in the page too.
    used = set(re.findall(r"#([\w.-]+)", text))
    return re.sub(r' id="([^"]*)"', lambda m: m[0] if m[1] in used else "", text)


def plain(axes: Any) -> None:
    """Leave away what says nothing."""
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)


def draw_plan(found: dict[str, Any]) -> Any:
    """Draw memory and work over the length of the stream.

    Args:
        found: From `planning.plan`.
    """
    figure = new_figure(8, 11)
    lengths = found["lengths"]
    for axes, (key, title) in zip(figure.subplots(len(PANELS)), PANELS.items(), strict=True):
        for name, values in found[key].items():
            known = [(n, v) for n, v in zip(lengths, values, strict=True) if v]
            if known:
                axes.plot(*zip(*known, strict=True), marker="o", markersize=4, **STYLES[name])
        axes.set_xscale("log", base=2)
        axes.set_xticks(lengths, [short(n) for n in lengths])
        axes.minorticks_off()
        if any(v for values in found[key].values() for v in values):
            axes.set_yscale("log")
        axes.set_title(title, loc="left", fontsize=10)
        plain(axes)
    figure.axes[0].legend(frameon=False)
    figure.axes[-1].set_xlabel("tokens of the stream")
    report = found["report"]
    figure.suptitle(f"{report['model_type']}: {found['model']}", fontsize=11)
    return figure
