"""Write a calibration into a model's folder: a section of config.json, SINK.md, a heat map."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

import mlx_sink
from mlx_sink.commands import plots
from mlx_sink.io.units import format_bytes
from mlx_sink.measure.calibrate import Calibration, Candidate
from mlx_sink.measure.sink_share import SinkShare
from mlx_sink.models import demo
from mlx_sink.models.checkpoints.checkpoint import read_json
from mlx_sink.models.checkpoints.settings import SECTION

CARD, PICTURE = "SINK.md", "SINK.png"
SAMPLE = "the short story that comes with mlx_sink"
ON_FIRST = 4
"""First tokens whose share of attention is shown."""
NO_MATPLOTLIB = (
    f"{PICTURE} was left out: it needs matplotlib ({plots.INSTALL}); "
    f"{CARD} has the same figures by layer"
)


def sample_text() -> str:
    """Return the text that models are measured on when none is given; of our own writing."""
    return demo.STORY.read_text(encoding="utf-8")


def write_calibration(folder: Path, calibration: Calibration, text: str) -> list[str]:
    """Write the recommended settings into config.json, and the figures into SINK.md.

    The folder is one that is not in its place yet: nothing is written atomically.

    Args:
        folder: A model's folder.
        calibration: What was measured.
        text: What it was measured on, in words.

    Returns:
        Messages for the user: what was left out, and why.
    """
    file = folder / "config.json"
    config = read_json(file)
    config[SECTION] = {
        "num_sinks": calibration.settings.num_sinks,
        "window": calibration.settings.window,
        "calibration": {
            "version": mlx_sink.__version__,
            "text": text,
            "tokens": calibration.tokens,
            "sinks_matter": calibration.sinks_matter,
            "loss_by_num_sinks": {str(c.num_sinks): c.loss for c in calibration.sinks},
            "loss_by_window": {str(c.window): c.loss for c in calibration.windows},
        },
    }
    file.write_text(json.dumps(dict(sorted(config.items())), indent=4), encoding="utf-8")
    can_draw = plots.is_available()
    has_picture = can_draw and len(calibration.share.layers) > 0
    if has_picture:
        _draw(calibration.share, folder / PICTURE)
    model = str(config["model_type"])
    (folder / CARD).write_text(card(calibration, model, text, has_picture), encoding="utf-8")
    return [] if can_draw else [NO_MATPLOTLIB]


def card(calibration: Calibration, model: str, text: str, has_picture: bool) -> str:
    """Return SINK.md.

    Args:
        calibration: What was measured.
        model: The model's type.
        text: What it was measured on, in words.
        has_picture: There is a heat map beside it.
    """
    share = calibration.share
    uniform = share.uniform(ON_FIRST)
    after_sinks, after_windows = (
        calibration.tokens - 1 - since
        for since in (calibration.sinks_from, calibration.windows_from)
    )
    lines = [
        "# Sinks and window, measured",
        "",
        calibration.verdict,
        "",
        f"Measured by mlx_sink {mlx_sink.__version__} on this model ({model}), on "
        f"{calibration.tokens:,} tokens of {text}. The settings are in the `{SECTION}` section of "
        "config.json; mlx_sink takes them as its defaults, and everything else ignores them.",
        "",
        "## Loss by number of sinks",
        "",
        f"Mean loss in nats over the {after_sinks:,} tokens after the "
        f"first eviction, all of them with {calibration.sinks_from} tokens in the cache; ± is the "
        "standard error of the difference.",
        "",
        *_table(calibration.sinks, "num_sinks"),
        "",
        "## Loss by window",
        "",
        f"The same, over the {after_windows:,} tokens that are past every "
        "window's first eviction.",
        "",
        *_table(calibration.windows, "window"),
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
    if has_picture:
        lines += ["", f"![share of attention on the first {ON_FIRST} tokens]({PICTURE})"]
    return "\n".join(lines) + "\n"


def _table(candidates: tuple[Candidate, ...], by: str) -> list[str]:
    head = [
        f"| {by} | loss | perplexity | above the best | cache when full |",
        "|---|---|---|---|---|",
    ]
    return head + [
        f"| {getattr(c, by)} | {c.loss:.4f} | {np.exp(c.loss):.2f} | "
        f"{c.over_best:.4f} ± {c.error:.4f} | {format_bytes(c.cache_bytes)} |"
        for c in candidates
    ]


def _draw(share: SinkShare, path: Path) -> None:
    """Draw each head's share of attention on the first tokens, a row a layer."""
    values = share.shares[:, :, :ON_FIRST].sum(axis=2)
    layers, heads = values.shape
    width, height = 2.5 + min(0.25 * heads, 8), max(3.5, 1.5 + min(0.25 * layers, 8))
    figure = plots.new_figure(width, height)
    axes = figure.add_subplot()
    image = axes.imshow(values, vmin=0, vmax=1, cmap="viridis", aspect="auto", origin="lower")
    axes.set_xlabel("head")
    axes.set_ylabel("layer")
    step = -(-layers // 16)
    axes.set_yticks(range(0, layers, step), [str(i) for i in share.layers[::step]])
    axes.set_xticks(range(0, heads, -(-heads // 16)))
    figure.colorbar(image, label=f"attention on the first {ON_FIRST} tokens")
    plots.save(figure, path)
