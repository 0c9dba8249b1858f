"""Draw plots with matplotlib, an optional dependency that is imported when something is drawn."""

from __future__ import annotations

import io
import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from mlx_sink.errors import ConfigError
from mlx_sink.io.atomic import write_whole

FORMATS = (".png", ".svg")

INSTALL = "pip install 'mlx-sink[plot]'"


def is_available() -> bool:
    """Tell whether matplotlib is installed."""
    return find_spec("matplotlib") is not None


def check() -> None:
    """Raise unless plots can be drawn.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    if not is_available():
        raise ConfigError(f"a plot needs matplotlib: {INSTALL}")


def new_figure(width: float, height: float) -> Any:
    """Return an empty figure of so many inches; errors as in `check`."""
    check()
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained", facecolor="white")


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
        salt: Makes its ids differ from those of other figures in the page.
    """
    import matplotlib

    data = io.BytesIO()
    no_metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    # Text stays text: a screen reader can read it, and the page is a third as long.
    with matplotlib.rc_context({"svg.hashsalt": salt, "svg.fonttype": "none"}):
        figure.savefig(data, format="svg", transparent=True, metadata=no_metadata)
    text = data.getvalue().decode()
    text = text[text.index("<svg") :].replace(INK, "currentColor")
    # Ids that nothing refers to are the same in every figure: an id must be unique in the page.
    used = set(re.findall(r"#([\w.-]+)", text))
    return re.sub(r' id="([^"]*)"', lambda m: m[0] if m[1] in used else "", text)


def plain(axes: Any) -> None:
    """Give axes a light grid, and no frame at the top and the right."""
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
