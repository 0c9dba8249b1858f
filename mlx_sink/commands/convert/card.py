"""What a calibration leaves in a model's folder: a section of config.json, SINK.md, a heat map."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

import mlx_sink
from mlx_sink.io.units import format_bytes
from mlx_sink.measure.calibrate import Arm, Calibration
from mlx_sink.measure.sink_share import SinkShare
from mlx_sink.models import demo
from mlx_sink.models.checkpoint import read_json
from mlx_sink.models.settings import SECTION

CARD, PICTURE = "SINK.md", "SINK.png"
SAMPLE = "the short story that comes with mlx_sink"
ON_FIRST = 4
"""First tokens whose share of attention is shown."""
NO_MATPLOTLIB = (
    f"{PICTURE} was left out: it needs matplotlib (pip install 'mlx-sink[plot]'); "
    f"{CARD} has the same figures by layer"
)


def sample_text() -> str:
    """Return the text that models are measured on when none is given; of our own writing."""
    return demo.STORY.read_text(encoding="utf-8")


def write_calibration(folder: Path, found: Calibration, text: str) -> list[str]:
    """Write the recommended settings into config.json, and the figures into SINK.md.

    The folder is one that is not in its place yet: nothing is written atomically.

    Args:
        folder: A model's folder.
        found: What was measured.
        text: What it was measured on, in words.

    Returns:
        Messages for the user: what was left out, and why.
    """
    file = folder / "config.json"
    config = read_json(file)
    config[SECTION] = {
        "num_sinks": found.settings.num_sinks,
        "window": found.settings.window,
        "calibration": {
            "version": mlx_sink.__version__,
            "text": text,
            "tokens": found.tokens,
            "sinks_matter": found.sinks_matter,
            "loss_by_num_sinks": {str(arm.num_sinks): arm.loss for arm in found.sinks},
            "loss_by_window": {str(arm.window): arm.loss for arm in found.windows},
        },
    }
    file.write_text(json.dumps(dict(sorted(config.items())), indent=4), encoding="utf-8")
    can_draw = find_spec("matplotlib") is not None
    drawn = can_draw and len(found.share.layers) > 0
    if drawn:
        _draw(found.share, folder / PICTURE)
    model = str(config["model_type"])
    (folder / CARD).write_text(card(found, model, text, drawn), encoding="utf-8")
    return [] if can_draw else [NO_MATPLOTLIB]


def card(found: Calibration, model: str, text: str, drawn: bool) -> str:
    """Return SINK.md.

    Args:
        found: What was measured.
        model: The model's type.
        text: What it was measured on, in words.
        drawn: There is a heat map beside it.
    """
    share = found.share
    uniform = share.uniform(ON_FIRST)
    lines = [
        "# Sinks and window, measured",
        "",
        found.verdict,
        "",
        f"Measured by mlx_sink {mlx_sink.__version__} on this model ({model}), on "
        f"{found.tokens:,} tokens of {text}. The settings are in the `{SECTION}` section of "
        "config.json; mlx_sink takes them as its defaults, and everything else ignores them.",
        "",
        "## Loss by number of sinks",
        "",
        f"Mean loss in nats over the {found.tokens - 1 - found.sinks_from:,} tokens after the "
        f"first eviction, all of them with {found.sinks_from} tokens in the cache; ± is the "
        "standard error of the difference.",
        "",
        *_table(found.sinks, "num_sinks"),
        "",
        "## Loss by window",
        "",
        f"The same, over the {found.tokens - 1 - found.windows_from:,} tokens that are past every "
        "window's first eviction.",
        "",
        *_table(found.windows, "window"),
        "",
        f"## Attention on the first {ON_FIRST} tokens",
        "",
        f"Share of attention, by layer, of tokens {share.since} to {share.tokens} in full "
        f"attention; spread evenly it would be {uniform:.4f}.",
        "",
        f"| layer | on the first token | on the first {ON_FIRST} | of the strongest head |",
        "|---|---|---|---|",
    ]
    strongest = [heads.sum(axis=1).max() for heads in share.shares[:, :, :ON_FIRST]]
    rows = zip(share.layers, share.of_layer(1), share.of_layer(ON_FIRST), strongest, strict=True)
    lines += [f"| {i} | {a:.4f} | {b:.4f} | {c:.4f} |" for i, a, b, c in rows]
    if drawn:
        lines += ["", f"![share of attention on the first {ON_FIRST} tokens]({PICTURE})"]
    return "\n".join(lines) + "\n"


def _table(arms: tuple[Arm, ...], by: str) -> list[str]:
    head = [
        f"| {by} | loss | perplexity | above the best | cache when full |",
        "|---|---|---|---|---|",
    ]
    return head + [
        f"| {getattr(arm, by)} | {arm.loss:.4f} | {np.exp(arm.loss):.2f} | "
        f"{arm.over_best:.4f} ± {arm.error:.4f} | {format_bytes(arm.cache_bytes)} |"
        for arm in arms
    ]


def _draw(share: SinkShare, path: Path) -> None:
    """Draw each head's share of attention on the first tokens, a row a layer."""
    # Only a calibration needs matplotlib.
    from matplotlib.figure import Figure

    values = share.shares[:, :, :ON_FIRST].sum(axis=2)
    layers, heads = values.shape
    size = (2.5 + min(0.25 * heads, 8), max(3.5, 1.5 + min(0.25 * layers, 8)))
    figure: Any = Figure(figsize=size, layout="constrained", facecolor="white")
    axes: Any = figure.add_subplot()
    image = axes.imshow(values, vmin=0, vmax=1, cmap="viridis", aspect="auto", origin="lower")
    axes.set_xlabel("head")
    axes.set_ylabel("layer")
    step = -(-layers // 16)
    axes.set_yticks(range(0, layers, step), [str(i) for i in share.layers[::step]])
    axes.set_xticks(range(0, heads, -(-heads // 16)))
    figure.colorbar(image, label=f"attention on the first {ON_FIRST} tokens")
    figure.savefig(path, dpi=120, format="png")
