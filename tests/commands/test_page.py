"""The page of a comparison in a real browser: what is seen, and that nothing is asked for."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from made_up_results import values
from matplotlib.image import imread

from mlx_sink.commands.compare.page import page
from mlx_sink.measure.comparison.results import Results

BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))),
    None,
)
pytestmark = pytest.mark.skipif(BROWSER is None, reason="there is no Chromium on this machine")

RESULTS = Results.from_dict(values())

GREEN = np.array([0x00, 0x9E, 0x73]) / 255
"""What draws mlx_sink."""

# A window of a browser cannot be as narrow as a phone, a frame can.
HARNESS = """<!doctype html><body style="margin:0">
<iframe style="border:0;width:{width}px;height:{height}px" srcdoc="{page}"></iframe>
<script>
onload = () => {{
  const inside = frames[0].document, rect = e => e.getBoundingClientRect();
  const said = document.createElement("pre");
  said.textContent = JSON.stringify({{
    plots: [...inside.querySelectorAll("svg")].map(rect),
    tables: [...inside.querySelectorAll("figure table")].map(rect),
    width: inside.documentElement.scrollWidth,
    height: inside.documentElement.scrollHeight,
    requests: frames[0].performance.getEntriesByType("resource").map(e => e.name),
    words: inside.body.innerText,
    ids: [...inside.querySelectorAll("[id]")].map(e => e.id),
  }});
  said.id = "said"; said.style.display = "none"; document.body.append(said);
}};
</script>"""


def browse(file: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    command = [str(BROWSER), "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
    command += ["--disable-background-networking", "--enable-logging=stderr"]
    command.append(f"--user-data-dir={file.parent / 'profile'}")
    done = subprocess.run(
        [*command, *flags, file.as_uri()], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done


def shown(folder: Path, text: str, width: int, *flags: str) -> tuple[dict[str, Any], Any, str]:
    """Return what the browser says of a page in so many pixels, its picture, and its log."""
    file, picture = folder / "harness.html", folder / "shot.png"
    inside = html.escape(text, quote=True)
    file.write_text(HARNESS.format(width=width, height=5000, page=inside))
    done = browse(file, "--dump-dom", *flags)
    said = re.search(r'<pre id="said"[^>]*>(.*?)</pre>', done.stdout, re.DOTALL)
    assert said, done.stderr
    found = json.loads(html.unescape(said[1]))
    size = f"--window-size={max(width, 500)},{found['height']}"
    file.write_text(HARNESS.format(width=width, height=found["height"], page=inside))
    browse(file, f"--screenshot={picture}", size, *flags)
    return found, imread(picture)[:, :, :3], done.stderr


@pytest.mark.parametrize(("width", "runs"), [(400, 1), (1400, 1), (1400, 2)])
def test_every_plot_is_seen(width: int, runs: int, tmp_path: Path):
    found, picture, log = shown(tmp_path, page([RESULTS] * runs), width)
    assert "CONSOLE" not in log
    assert found["requests"] == []
    assert found["width"] <= width
    assert len(found["plots"]) == len(found["tables"]) == 7 * runs
    assert len(set(found["ids"])) == len(found["ids"])
    for plot, table in zip(found["plots"], found["tables"], strict=True):
        assert plot["left"] >= 0
        assert plot["right"] <= width
        assert plot["width"] > 300
        assert plot["height"] > 150
        assert table["top"] >= plot["bottom"]
        rows = slice(int(plot["top"]), int(plot["bottom"]))
        seen = picture[rows, int(plot["left"]) : int(plot["right"])].reshape(-1, 3)
        assert (np.abs(seen - GREEN).max(axis=1) < 0.1).sum() > 40, "its curve is not there"
    assert "<M1>" in found["words"]
    assert "a & b" in found["words"]


def test_the_text_of_plots_is_light_on_dark(tmp_path: Path):
    for scheme, dark in ((1, False), (0, True)):
        found, picture, _ = shown(
            tmp_path,
            page([RESULTS]),
            600,
            f"--blink-settings=preferredColorScheme={scheme}",
        )
        plot = found["plots"][0]
        seen = picture[int(plot["top"]) : int(plot["bottom"]), : int(plot["right"])]
        ground = np.median(seen)
        assert (ground < 0.3) == dark
        # The ticks and their words: far from the ground, and grey.
        grey = np.ptp(seen, axis=2) < 0.1
        assert (np.abs(seen.mean(axis=2) - ground)[grey] > 0.6).sum() > 100
