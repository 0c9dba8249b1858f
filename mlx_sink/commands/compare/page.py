"""A comparison as one page that needs nothing else: no network, no script."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any

from mlx_sink.commands import plots
from mlx_sink.commands.compare.panels import STYLES, Panel, draw, panels, span_of, wilson
from mlx_sink.measure.methods import NAMES

NEEDED = (
    *("command", "date", "machine", "model", "text", "config", "lengths", "trials", "choices"),
    *("finished", "arms", "beside_recompute", "recall"),
)
"""Keys of results."""

STYLE = """
:root { color-scheme: light dark; --line: #8884; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 74rem; margin: 0 auto; padding: 1rem; }
h1 { font-size: 1.5rem; }
h2 { font-size: 1.15rem; margin: 2.5rem 0 .25rem; }
.runs { display: grid; gap: 1.5rem;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 34rem), 1fr)); }
figure { margin: 0; }
svg { display: block; width: 100%; height: auto; max-width: 44rem; }
.scroll { overflow-x: auto; max-width: 100%; }
table { border-collapse: collapse; font-size: .8rem; font-variant-numeric: tabular-nums; }
th, td { border-bottom: 1px solid var(--line); padding: .15rem .5rem;
  text-align: right; white-space: nowrap; }
th:first-child { text-align: left; }
.key span { margin-right: 1.2rem; white-space: nowrap; }
.key i { display: inline-block; width: 1.1rem; height: .3rem;
  vertical-align: middle; margin-right: .35rem; }
code { overflow-wrap: anywhere; }
.warn { border-left: .3rem solid #d55e00; padding-left: .8rem; }
"""
POLICY = "default-src 'none'; style-src 'unsafe-inline'"


def page(results: Sequence[dict[str, Any]]) -> str:
    """Return the page of one run or more, as HTML.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    of_runs = [panels(found) for found in results]
    parts = ["<h1>Ways to keep a stream's context</h1>", _key(results), _runs(results)]
    for title in dict.fromkeys(panel.title for made in of_runs for panel in made):
        same = [next((p for p in made if p.title == title), None) for made in of_runs]
        parts.append(_section(results, same))
    parts.append(_beside(results))
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        "<title>mlx_sink compare</title>\n"
        f"<style>{STYLE}</style>\n</head>\n<body>\n" + "\n".join(parts) + "\n</body>\n</html>\n"
    )


def notes(found: dict[str, Any]) -> list[str]:
    """Return what a reader must know of a run, in sentences."""
    c = found["config"]
    said = [
        "The stream is endless, the context is not: bounded arms see "
        f"{c['num_sinks']} first tokens and the newest {c['window']}. "
        "What lies between is lost, and no arm but full attention can answer from it.",
    ]
    if not found["finished"]:
        said.append("This run has not come to its end yet.")
    for name, arm in found["arms"].items():
        if arm["stopped"]:
            said.append(f"{NAMES[name]} stopped at {arm['tokens']:,} tokens: {arm['stopped']}.")
    said += _guessing(found)
    context = found["model"]["context"]
    if context and found["lengths"][-1] > context:
        said.append(
            f"The model was trained on {context:,} tokens: beyond them full attention and "
            "RotatingKVCache use positions that it has never seen."
        )
    return said


def _guessing(found: dict[str, Any]) -> list[str]:
    """Say so if an arm answers no better than a guess where it still sees the fact."""
    asked = [r for r in found["recall"] if r["arm"] == "full" or _is_within(found, r)]
    if not asked:
        return []
    arms = {row["arm"] for row in asked}
    arm = next(name for name in ("ours", *NAMES) if name in arms)
    mine = [row for row in asked if row["arm"] == arm]
    right, trials = (sum(row[key] for row in mine) for key in ("right", "trials"))
    low, _ = wilson(right, trials)
    if low > 1 / found["choices"]:
        return []
    return [
        f"Where the fact is in view, {NAMES[arm]} answers {right} of {trials} questions right, no "
        f"better than a guess (1 in {found['choices']}): this model is too small to copy what it "
        "reads. Its recall says nothing about the caches."
    ]


def _is_within(found: dict[str, Any], row: dict[str, Any]) -> bool:
    return row["distance"] < found["config"]["capacity"]


def picture(results: Sequence[dict[str, Any]]) -> Any:
    """Draw all panels of all runs in one figure."""
    of_runs = [panels(found) for found in results]
    titles = list(dict.fromkeys(panel.title for made in of_runs for panel in made))
    across = 2 if len(results) == 1 else len(results)
    cells = [(i, title) for title in titles for i in range(len(results))]
    rows = max(1, -(-len(cells) // across))
    figure = plots.new_figure(5.2 * across, 3.1 * rows)
    grid = figure.subplots(rows, across, squeeze=False).flatten()
    for axes, (i, title) in zip(grid, cells, strict=False):
        same = [p for made in of_runs for p in made if p.title == title]
        mine = next((p for p in of_runs[i] if p.title == title), None)
        if mine:
            draw(axes, mine, span_of(same))
        label = "" if len(results) == 1 else f" ({_label(results[i])})"
        axes.set_title(title + label, fontsize=9, loc="left")
    for axes in grid[len(cells) :]:
        axes.set_visible(False)
    if cells:
        figure.legend(*grid[0].get_legend_handles_labels(), loc="outside upper left", ncols=3)
    return figure


def _label(found: dict[str, Any]) -> str:
    return f"{found['model']['name']}, {found['machine']['processor']}"


def _key(results: Sequence[dict[str, Any]]) -> str:
    present = [name for name in NAMES if any(found["arms"].get(name) for found in results)]
    cells = (
        f'<span><i style="background:{STYLES[name]["color"].replace(plots.INK, "currentColor")}">'
        f"</i>{escape(NAMES[name])}</span>"
        for name in present
    )
    return f'<p class="key">{"".join(cells)}</p>'


def _runs(results: Sequence[dict[str, Any]]) -> str:
    made: list[str] = []
    for found in results:
        m, text, c = found["machine"], found["text"], found["config"]
        facts = {
            "command": f"<code>{escape(found['command'])}</code>",
            "date": escape(found["date"]),
            "machine": escape(f"{m['processor']}, {m['cores']} cores, {m['platform']}"),
            "versions": escape(
                f"mlx_sink {m['mlx-sink']}, mlx {m['mlx']} on the {m['device']}, "
                f"mlx-lm {m['mlx-lm']}, Python {m['python']}"
            ),
            "model": escape(found["model"]["name"]),
            "text": escape(f"{text['name']}, {text['tokens']:,} tokens"),
            "keeps": f"{c['num_sinks']} sinks + window {c['window']} = {c['capacity']} tokens",
        }
        rows = "".join(f"<li><b>{name}</b>: {value}</li>" for name, value in facts.items())
        said = "".join(f'<p class="warn">{escape(note)}</p>' for note in notes(found))
        made.append(f"<div><ul>{rows}</ul>{said}</div>")
    return f'<div class="runs">{"".join(made)}</div>'


def _section(results: Sequence[dict[str, Any]], same: Sequence[Panel | None]) -> str:
    there = [panel for panel in same if panel]
    span, figures = span_of(there), list[str]()
    for i, (found, panel) in enumerate(zip(results, same, strict=True)):
        if panel is None:
            continue
        figure = plots.new_figure(5.4, 3.2)
        axes = figure.add_subplot()
        draw(axes, panel, span)
        _ink(axes)
        label = escape(_label(found)) if len(results) > 1 else ""
        figures.append(
            f"<figure><figcaption>{label}</figcaption>{plots.svg(figure, f'{panel.title}{i}')}"
            f'<div class="scroll">{_table(panel)}</div></figure>'
        )
    title, about = escape(there[0].title), escape(there[0].about)
    return f'<h2>{title}</h2><p>{about}</p><div class="runs">{"".join(figures)}</div>'


def _ink(axes: Any) -> None:
    """Draw what is not data in the colour of the page's text."""
    axes.tick_params(which="both", colors=plots.INK, labelsize=8)
    for spine in axes.spines.values():
        spine.set_edgecolor(plots.INK)


def _table(panel: Panel) -> str:
    names = list(panel.values)
    head = "".join(f"<th>{escape(NAMES[name])}</th>" for name in names)
    rows: list[str] = []
    for i, row in enumerate(panel.rows):
        cells = "".join(f"<td>{_cell(panel, panel.values[name][i])}</td>" for name in names)
        rows.append(f"<tr><th>{escape(row)}</th>{cells}</tr>")
    return f"<table><tr><th></th>{head}</tr>{''.join(rows)}</table>"


def _cell(panel: Panel, value: Any) -> str:
    if value is None:
        return "-"
    middle, low, high = value
    spread = "" if low == high else f" ({panel.write(low)} - {panel.write(high)})"
    return escape(panel.write(middle) + spread)


def _beside(results: Sequence[dict[str, Any]]) -> str:
    rows: list[str] = []
    for found in results:
        for name, b in found["beside_recompute"].items():
            label = f"{_label(found)}: " if len(results) > 1 else ""
            rows.append(
                f"<tr><th>{escape(label + NAMES[name])}</th><td>{b['count']}</td>"
                f"<td>{b['perplexity']:.4g}</td><td>{b['recompute']:.4g}</td>"
                f"<td>{b['difference']:+.4f} ({b['low']:+.4f} - {b['high']:+.4f})</td></tr>"
            )
    if not rows:
        return ""
    titles = ("", "tokens", "perplexity", "recomputed", "loss, difference")
    head = "<tr>" + "".join(f"<th>{title}</th>" for title in titles) + "</tr>"
    return (
        "<h2>Beside recomputing, on the same tokens</h2><p>Tokens past the first eviction. "
        "Recomputing feeds the plain model what a token may see, from position 0.</p>"
        f'<div class="scroll"><table>{head}{"".join(rows)}</table></div>'
    )
